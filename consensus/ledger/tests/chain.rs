//! Chains of blocks, made and checked by several nodes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use metanode_crypto::{Identity, hash};
use metanode_ibft::{ChainId, Commit, Evidence, Height, Payload, Round, Signed, View};
use metanode_ledger::{
    Account, Batch, BatchDraft, Block, BlockError, Chain, Code, DecodeError, Executed, Facts, Genesis, Kind, Outcome,
    Snapshot, Transaction, TransactionDraft, TransactionError,
    system::{OPEN_VOTES_MAX, PROOF_DOMAIN, SENT_MAX, Wish, encode_evidence, proof_message},
    tree,
};
use metanode_types::{Hash, NodeKey};

const LAG: u64 = 2;

fn identity(number: u8) -> Identity {
    Identity::from_seed(&[number; 32])
}

fn genesis() -> Genesis {
    Genesis {
        version: 1,
        name: "test".to_owned(),
        time_ms: 1_000,
        lag: LAG,
        round_ms: 500,
        round_ms_max: 10_000,
        empty_ms: 0,
        clock_drift_ms_max: 500,
        expiry_heights_max: 100,
        opaque: true,
        validators: (1..=4).map(|number| identity(number).public()).collect(),
        accounts: vec![Account { key: identity(9).public(), balance: 1_000 }],
    }
}

/// A node whose application counts.
#[derive(Clone)]
struct Node {
    chain: Chain,
    count: u64,
    numbers: u64,
}

impl Node {
    fn new() -> Self {
        Self { chain: Chain::new(&genesis(), &hash(&0u64.to_le_bytes())), count: 0, numbers: 0 }
    }

    fn id(&self) -> ChainId {
        *self.chain.id()
    }

    fn next(&self) -> Height {
        self.chain.tip().height.next()
    }

    fn transaction(&self, by: u8, kind: Kind, payload: &[u8]) -> Vec<u8> {
        let signer = identity(by);
        let expiry = Height(self.next().0 + 50);
        let draft = TransactionDraft { kind, account: signer.public(), nonce: 0, fee: 0, expiry, payload };
        draft.encode(&self.id(), |domain, message| Ok::<_, ()>(signer.sign(domain, message))).unwrap()
    }

    fn batch(&mut self, transactions: &[Vec<u8>]) -> Batch {
        self.numbers += 1;
        let author = identity(1);
        let mut draft = BatchDraft::new(author.public(), self.numbers, Height(self.next().0 + 10));
        for transaction in transactions {
            assert!(draft.push(&Transaction::decode(transaction).unwrap()));
        }
        draft.finish(&self.id(), |domain, message| Ok::<_, ()>(author.sign(domain, message))).unwrap()
    }

    fn execute(&mut self, block: &Block, batches: &[Batch]) -> Executed {
        let done = self.chain.plan(block, batches.to_vec()).execute(|_, _, transactions| {
            self.count += transactions.len() as u64;
            Ok::<_, ()>((vec![Outcome::DONE; transactions.len()], hash(&self.count.to_le_bytes())))
        });
        self.chain.executed(done.unwrap())
    }

    /// A block of one batch, checked, decided and executed.
    fn advance(&mut self, transactions: &[Vec<u8>]) -> (Block, Executed) {
        let batch = self.batch(transactions);
        let author = self.chain.new_height().unwrap().validators.proposer(&self.chain.tip().author, Round::ZERO);
        let block = self.chain.make(author, 2_000, vec![batch.digest()]).unwrap();
        self.chain.check(&block, &[batch.facts()]).unwrap();
        self.chain.decided(&block, &[batch.facts()]);
        let executed = self.execute(&block, &[batch]);
        (block, executed)
    }

    fn validators(&self) -> Vec<NodeKey> {
        self.chain.validators().unwrap().iter().copied().collect()
    }

    fn vote(&self, by: u8, wish: &Wish) -> Vec<u8> {
        self.transaction(by, Kind::Validators, &wish.encode())
    }

    fn adding(&self, number: u8) -> Wish {
        let new = identity(number);
        Wish::Add(new.public(), new.sign(PROOF_DOMAIN, &proof_message(&self.id(), &new.public())))
    }
}

fn outcomes(executed: &Executed) -> Vec<Outcome> {
    executed.outcomes.iter().map(|(_, outcome)| *outcome).collect()
}

/// The header of h carries what h − lag did, and a result is proven by it.
#[test]
fn results_are_carried_by_the_header_behind_the_lag() {
    let mut node = Node::new();
    let opaque = TransactionDraft::encode_opaque(b"anything");
    let payment = node.transaction(9, Kind::Application, b"pay");
    let (first, executed) = node.advance(&[opaque, payment]);
    assert_eq!(outcomes(&executed), [Outcome::DONE; 2]);
    let (second, _) = node.advance(&[]);
    let (third, _) = node.advance(&[]);
    assert_eq!((second.header.parent, third.header.height), (first.header.hash(), Height(3)));
    assert_eq!(second.header.app_hash, first.header.app_hash, "the beginning's");
    assert_eq!((third.header.app_hash, third.header.results_root), (executed.app_hash, executed.results_root));
    assert_ne!(third.header.app_hash, first.header.app_hash);
    let leaves: Vec<Hash> = executed.outcomes.iter().map(|(id, outcome)| tree::leaf(&outcome.encode(id))).collect();
    let path = tree::proof(&leaves, 1).unwrap();
    assert!(tree::verify(&third.header.results_root, &leaves[1], 1, 2, &path));
}

#[test]
fn a_block_that_says_anything_else_is_refused() {
    let mut node = Node::new();
    node.advance(&[]);
    let batch = node.batch(&[]);
    let author = identity(2).public();
    let good = node.chain.make(author, 3_000, vec![batch.digest()]).unwrap();
    node.chain.check(&good, &[batch.facts()]).unwrap();
    let refused = |change: &dyn Fn(&mut Block)| {
        let mut block = good.clone();
        change(&mut block);
        node.chain.check(&block, &vec![batch.facts(); block.batches.len()]).unwrap_err()
    };
    let other = Hash([9; 32]);
    assert_eq!(refused(&|block| block.header.parent = other), BlockError::Differs("parent"));
    assert_eq!(refused(&|block| block.header.time_ms = 2_000), BlockError::Differs("time"), "the parent's");
    assert_eq!(refused(&|block| block.header.batches_root = other), BlockError::Differs("batches root"));
    assert_eq!(refused(&|block| block.batches.clear()), BlockError::Differs("batches root"));
    assert_eq!(refused(&|block| block.header.app_hash = other), BlockError::Differs("application hash"));
    assert_eq!(refused(&|block| block.header.results_root = other), BlockError::Differs("results root"));
    assert_eq!(refused(&|block| block.header.validators_hash = other), BlockError::Differs("validators hash"));
    assert_eq!(
        refused(&|block| block.header.next_validators_hash = other),
        BlockError::Differs("next validators hash")
    );
    assert_eq!(
        refused(&|block| block.header.height = Height(3)),
        BlockError::Height { found: Height(3), expected: Height(2) }
    );
    assert_eq!(refused(&|block| block.batches.push(batch.digest())), BlockError::Twice(batch.digest()));
    let many = |block: &mut Block| block.batches = (0..65).map(|number| hash(&[number])).collect();
    assert_eq!(refused(&many), BlockError::TooManyBatches(65));
}

/// Clause 20, and clause 25's last part: what was not executed can't be voted on.
#[test]
fn who_has_not_executed_far_enough_knows_it() {
    let mut node = Node::new();
    let mut open = Vec::new();
    for _ in 0..LAG {
        let block = node.chain.make(identity(1).public(), 2_000, Vec::new()).unwrap();
        node.chain.decided(&block, &[]);
        open.push(block);
    }
    assert_eq!(node.chain.new_height(), Err(BlockError::NotExecuted(Height(1))));
    assert_eq!(node.chain.make(identity(1).public(), 2_000, Vec::new()), Err(BlockError::NotExecuted(Height(1))));
    node.execute(&open[0], &[]);
    assert_eq!(node.chain.new_height().unwrap().height, Height(3));
}

/// Clauses 19 and 20: a change acts lag + 1 blocks behind the one whose execution decided it, on every node.
#[test]
fn validators_are_voted_in_and_out() {
    let mut node = Node::new();
    let add = node.adding(5);
    let (_, executed) = node.advance(&[node.vote(1, &add), node.vote(2, &add), node.vote(2, &add)]);
    assert_eq!(outcomes(&executed)[..2], [Outcome::DONE; 2]);
    assert_eq!(outcomes(&executed)[2], Outcome::Skipped(Code::KNOWN), "the same transaction");
    assert_eq!(node.validators().len(), 4);
    let (decisive, _) = node.advance(&[node.vote(3, &add)]);
    let acts_at = Height(decisive.header.height.0 + LAG + 1);
    while node.next() < acts_at {
        assert_eq!(node.validators().len(), 4, "{:?}", node.next());
        let (block, _) = node.advance(&[]);
        let announced = block.header.next_validators_hash != block.header.validators_hash;
        assert_eq!(announced, block.header.height.next() == acts_at);
    }
    assert_eq!(node.validators().len(), 5);
    assert!(node.validators().contains(&identity(5).public()));
    // Five need four votes.
    let remove = Wish::Remove(identity(1).public());
    node.advance(&[node.vote(1, &remove), node.vote(2, &remove), node.vote(3, &remove)]);
    (0..5).for_each(|_| drop(node.advance(&[])));
    assert_eq!(node.validators().len(), 5);
    node.advance(&[node.vote(5, &remove)]);
    (0..LAG).for_each(|_| drop(node.advance(&[])));
    assert_eq!(node.validators().len(), 4);
    assert!(!node.validators().contains(&identity(1).public()));
    // The turn is the next one's, also behind an author that was removed.
    let set = node.chain.validators().unwrap();
    assert!(set.contains(&set.proposer(&identity(1).public(), Round::ZERO)));
}

#[test]
fn a_validator_rotates_its_key_alone_and_nobody_elses() {
    let mut node = Node::new();
    let new = identity(6);
    let proof = new.sign(PROOF_DOMAIN, &proof_message(&node.id(), &new.public()));
    let stolen = Wish::Rotate(new.public(), [1; 64]);
    let (_, executed) = node.advance(&[
        node.vote(2, &stolen),
        node.vote(9, &Wish::Rotate(new.public(), proof)),
        node.vote(2, &Wish::Rotate(new.public(), proof)),
    ]);
    assert_eq!(
        outcomes(&executed),
        [Outcome::Failed(Code::NO_PROOF_OF_KEY), Outcome::Failed(Code::NOT_A_VALIDATOR), Outcome::DONE]
    );
    (0..LAG).for_each(|_| drop(node.advance(&[])));
    assert!(node.validators().contains(&new.public()) && !node.validators().contains(&identity(2).public()));
    assert_eq!(node.validators().len(), 4);
}

#[test]
fn votes_that_change_nothing_say_so() {
    let mut node = Node::new();
    let there = node.adding(4);
    let unproven = Wish::Add(identity(5).public(), [0; 64]);
    let (_, executed) = node.advance(&[
        node.vote(1, &there),
        node.vote(1, &Wish::Remove(identity(8).public())),
        node.vote(1, &unproven),
        node.transaction(1, Kind::Validators, b"nonsense"),
        node.vote(1, &Wish::Remove(identity(4).public())),
        node.transaction(1, Kind::Validators, &[Wish::Remove(identity(4).public()).encode(), vec![0]].concat()),
    ]);
    assert_eq!(
        outcomes(&executed),
        [
            Outcome::Failed(Code::NO_CHANGE),
            Outcome::Failed(Code::NO_CHANGE),
            Outcome::Failed(Code::NO_PROOF_OF_KEY),
            Outcome::Failed(Code::MALFORMED),
            Outcome::DONE,
            Outcome::Failed(Code::MALFORMED),
        ]
    );
}

/// Clause 26: evidence is checked by all, counts once, and names who and where.
#[test]
fn evidence_is_recorded_once() {
    let mut node = Node::new();
    let signer = identity(3);
    let view = View { height: Height(1), round: Round(2) };
    let commit = |hash: u8, by: &Identity| {
        let payload = Commit { view, hash: Hash([hash; 32]) };
        let signature = by.sign(Commit::DOMAIN, &payload.encode(&node.id()));
        Signed { payload, signer: by.public(), signature }
    };
    let proof = encode_evidence(&Evidence::Commit([commit(1, &signer), commit(2, &signer)]));
    let same = encode_evidence(&Evidence::Commit([commit(1, &signer), commit(1, &signer)]));
    let stranger = encode_evidence(&Evidence::Commit([commit(1, &identity(9)), commit(2, &identity(9))]));
    let mut forged = proof.clone();
    *forged.last_mut().unwrap() ^= 1;
    let sent = [same, stranger, forged, proof.clone()].map(|payload| node.transaction(1, Kind::Evidence, &payload));
    let again = node.transaction(2, Kind::Evidence, &proof);
    let (_, executed) = node.advance(&[&sent[..], &[again]].concat());
    assert_eq!(
        outcomes(&executed),
        [
            Outcome::Failed(Code::NO_EVIDENCE),
            Outcome::Failed(Code::NO_EVIDENCE),
            Outcome::Failed(Code::NO_EVIDENCE),
            Outcome::DONE,
            Outcome::Failed(Code::KNOWN),
        ]
    );
    assert_eq!(node.chain.system().guilty().collect::<Vec<_>>(), [(&signer.public(), &view)]);
}

#[test]
fn what_has_expired_is_not_executed_and_what_may_enter_is_known() {
    let mut node = Node::new();
    let early = node.transaction(9, Kind::Application, b"pay");
    let vote = node.vote(9, &Wish::Remove(identity(1).public()));
    let check = |node: &Node, bytes: &[u8]| node.chain.check_transaction(&Transaction::decode(bytes).unwrap());
    assert_eq!(check(&node, &early), Ok(()));
    assert_eq!(check(&node, &vote), Err(TransactionError::NotAValidator));
    assert_eq!(check(&node, &TransactionDraft::encode_opaque(b"x")), Ok(()));
    let batch = node.batch(&[]);
    let check_batch = |node: &Node, batch: &Batch| node.chain.check_batch(&batch.digest(), &batch.facts());
    assert_eq!(check_batch(&node, &batch), Ok(()));
    (0..51).for_each(|_| drop(node.advance(&[])));
    assert_eq!(check(&node, &early), Err(TransactionError::Expired(Height(51))));
    assert_eq!(check_batch(&node, &batch), Err(BlockError::ExpiredBatch(batch.digest())));
    let fresh = node.batch(&[]);
    let strange = Facts { author: identity(9).public(), ..fresh.facts() };
    let refused = node.chain.check_batch(&fresh.digest(), &strange);
    assert_eq!(refused, Err(BlockError::StrangersBatch(fresh.digest())));
    let block = node.chain.make(identity(1).public(), 9_000, vec![fresh.digest()]).unwrap();
    node.chain.decided(&block, &[fresh.facts()]);
    assert_eq!(check_batch(&node, &fresh), Err(BlockError::OrderedBefore(fresh.digest())));
    node.execute(&block, &[fresh]);
    let (_, executed) = node.advance(&[early]);
    assert_eq!(outcomes(&executed), [Outcome::Skipped(Code::EXPIRED)]);
    let mut late = TransactionDraft {
        kind: Kind::Application,
        account: identity(9).public(),
        nonce: 0,
        fee: 0,
        expiry: Height(node.next().0 + 101),
        payload: b"",
    };
    let sign = |domain: &str, message: &[u8]| Ok::<_, ()>(identity(9).sign(domain, message));
    let bytes = late.encode(&node.id(), sign).unwrap();
    assert!(matches!(check(&node, &bytes), Err(TransactionError::ExpiresTooLate(_))));
    late.expiry = Height(node.next().0 + 100);
    assert_eq!(check(&node, &late.encode(&node.id(), sign).unwrap()), Ok(()));
}

/// The validators decide on a form of blocks; who does not know it goes on up to there, and stops by name.
#[test]
fn a_form_of_blocks_that_is_not_known_is_where_a_node_stops() {
    let mut node = Node::new();
    let from = Height(12);
    let wish = |version, from| Wish::Upgrade { version, from };
    let (_, executed) = node.advance(&[
        node.vote(1, &wish(1, from)),
        node.vote(1, &wish(2, Height(1 + LAG))),
        node.vote(1, &wish(2, from)),
        node.vote(2, &wish(2, from)),
        node.vote(3, &wish(3, from)),
    ]);
    let no = Outcome::Failed(Code::NO_CHANGE);
    assert_eq!(outcomes(&executed), [no, no, Outcome::DONE, Outcome::DONE, Outcome::DONE]);
    assert_eq!(node.chain.system().unknown_versions().count(), 0);
    node.advance(&[node.vote(3, &wish(2, from))]);
    assert_eq!(node.chain.system().unknown_versions().collect::<Vec<_>>(), [(from, 2)]);
    assert_eq!((node.chain.system().version(Height(11)), node.chain.system().version(from)), (1, 2));
    let (_, executed) = node.advance(&[node.vote(4, &wish(2, Height(20)))]);
    assert_eq!(outcomes(&executed), [no], "no way back, and none twice");
    while node.next() < from {
        node.advance(&[]);
    }
    let stop = BlockError::NotSupported { version: 2, from };
    assert_eq!(node.chain.new_height(), Err(stop));
    assert_eq!(node.chain.make(identity(1).public(), 2_000, Vec::new()), Err(stop));
    assert_eq!(stop.to_string(), "not supported: blocks of version 2, which the chain has from height 12 on");
}

/// A validator that lies can fill neither the votes nor what is remembered of the ledger's transactions.
#[test]
fn wishes_and_transactions_of_one_validator_are_bounded() {
    let mut node = Node::new();
    let vote =
        |node: &Node, number: usize| node.vote(1, &Wish::Upgrade { version: 2 + number as u32, from: Height(50_000) });
    let all: Vec<Vec<u8>> = (0..=SENT_MAX).map(|number| vote(&node, number)).collect();
    let (_, executed) = node.advance(&all);
    let outcomes = outcomes(&executed);
    assert!(outcomes[..OPEN_VOTES_MAX].iter().all(|outcome| *outcome == Outcome::DONE));
    assert!(outcomes[OPEN_VOTES_MAX..SENT_MAX].iter().all(|outcome| *outcome == Outcome::Failed(Code::TOO_MANY)));
    assert_eq!(outcomes[SENT_MAX], Outcome::Skipped(Code::TOO_MANY));
    // Others are not kept from it, and once its own have expired, it may go on.
    let other = node.vote(2, &Wish::Remove(identity(1).public()));
    assert_eq!(node.advance(&[other]).1.outcomes[0].1, Outcome::DONE);
    (0..51).for_each(|_| drop(node.advance(&[])));
    let again = node.vote(1, &Wish::Remove(identity(2).public()));
    assert_eq!(node.advance(&[again]).1.outcomes[0].1, Outcome::Failed(Code::TOO_MANY), "its votes are still open");
}

/// A validator that changes its key is the one that it was: what it may send and vote for does not begin anew, and it may not change it over and
/// over. What would be remembered for ever is not executed.
#[test]
fn another_key_gives_no_more_votes_and_transactions() {
    let mut node = Node::new();
    let new = identity(6);
    let proof = new.sign(PROOF_DOMAIN, &proof_message(&node.id(), &new.public()));
    let vote = |node: &Node, by: u8, number: usize| {
        node.vote(by, &Wish::Upgrade { version: 2 + number as u32, from: Height(50_000) })
    };
    let mut all: Vec<Vec<u8>> = (0..OPEN_VOTES_MAX).map(|number| vote(&node, 2, number)).collect();
    all.push(node.vote(2, &Wish::Rotate(new.public(), proof)));
    let again = identity(7);
    let proof = again.sign(PROOF_DOMAIN, &proof_message(&node.id(), &again.public()));
    all.push(vote(&node, 6, OPEN_VOTES_MAX));
    all.push(node.vote(6, &Wish::Rotate(again.public(), proof)));
    all.push(vote(&node, 2, OPEN_VOTES_MAX));
    all.extend((0..SENT_MAX).map(|number| vote(&node, 6, OPEN_VOTES_MAX + 1 + number)));
    let (_, executed) = node.advance(&all);
    let outcomes = outcomes(&executed);
    let [voted @ .., rotated] = &outcomes[..=OPEN_VOTES_MAX] else { unreachable!() };
    assert!(voted.iter().chain([rotated]).all(|outcome| *outcome == Outcome::DONE));
    let failed = Outcome::Failed;
    assert_eq!(
        outcomes[OPEN_VOTES_MAX + 1..][..3],
        [failed(Code::TOO_MANY), failed(Code::TOO_SOON), failed(Code::NOT_A_VALIDATOR)]
    );
    let skipped = outcomes.iter().filter(|outcome| **outcome == Outcome::Skipped(Code::TOO_MANY)).count();
    assert_eq!(skipped, OPEN_VOTES_MAX + 3, "all but what the old key has left over");
    let signer = identity(1);
    let draft = TransactionDraft {
        kind: Kind::Validators,
        account: signer.public(),
        nonce: 0,
        fee: 0,
        expiry: Height(u64::MAX),
        payload: &Wish::Remove(identity(3).public()).encode(),
    };
    let late = draft.encode(&node.id(), |domain, message| Ok::<_, ()>(signer.sign(domain, message))).unwrap();
    assert_eq!(node.advance(&[late]).1.outcomes[0].1, Outcome::Skipped(Code::EXPIRES_TOO_LATE));
    (0..1_000).for_each(|_| drop(node.advance(&[])));
    let proof = again.sign(PROOF_DOMAIN, &proof_message(&node.id(), &again.public()));
    let rotate = node.vote(6, &Wish::Rotate(again.public(), proof));
    assert_eq!(node.advance(&[rotate]).1.outcomes[0].1, Outcome::DONE);
}

/// What a block has named can't be named again, also while it is not known yet who votes.
#[test]
fn an_ordered_batch_is_known_as_such_whatever_is_not_executed() {
    let mut node = Node::new();
    let batch = node.batch(&[]);
    let block = node.chain.make(identity(1).public(), 2_000, vec![batch.digest()]).unwrap();
    node.chain.decided(&block, &[batch.facts()]);
    let next = node.chain.make(identity(1).public(), 2_000, Vec::new()).unwrap();
    node.chain.decided(&next, &[]);
    assert!(matches!(node.chain.validators(), Err(BlockError::NotExecuted(_))));
    let known = Err(BlockError::OrderedBefore(batch.digest()));
    assert_eq!(node.chain.check_batch(&batch.digest(), &batch.facts()), known);
}

/// A node goes on from a snapshot as from the beginning, wherever it was made.
#[test]
fn a_snapshot_is_as_good_as_all_that_came_before() {
    let mut node = Node::new();
    let add = node.adding(5);
    let mut waiting = Vec::new();
    let mut snapshots = Vec::new();
    let mut blocks = Vec::new();
    for number in 0..30u8 {
        let by = 1 + number % 4;
        let transactions = vec![node.vote(by, &add), node.transaction(9, Kind::Application, &[number])];
        let batch = node.batch(&transactions);
        let block = node.chain.make(identity(by).public(), 2_000, vec![batch.digest()]).unwrap();
        node.chain.decided(&block, &[batch.facts()]);
        blocks.push((block.clone(), batch.clone()));
        waiting.push((block, batch));
        if waiting.len() as u64 == LAG {
            let (block, batch) = waiting.remove(0);
            node.execute(&block, &[batch]);
            snapshots.push((node.chain.snapshot(), node.count));
        }
    }
    while !waiting.is_empty() {
        let (block, batch) = waiting.remove(0);
        node.execute(&block, &[batch]);
    }
    for (snapshot, count) in snapshots {
        let encoded = snapshot.encode();
        let decoded = Snapshot::decode(&encoded).unwrap();
        assert_eq!(decoded, snapshot);
        for cut in [0, 4, encoded.len() / 2, encoded.len() - 1] {
            assert!(Snapshot::decode(&encoded[..cut]).is_err());
        }
        let long = [&encoded[..], &[0]].concat();
        assert_eq!(Snapshot::decode(&long), Err(DecodeError::Long(1)));
        let at = snapshot.height().0 as usize;
        if let Some((carrier, _)) = blocks.get(at - 1 + LAG as usize) {
            let root = hash(&count.to_le_bytes());
            assert!(snapshot.is_carried_by(LAG, &root, &carrier.header));
            assert!(!snapshot.is_carried_by(LAG, &Hash([1; 32]), &carrier.header));
            assert!(!snapshot.is_carried_by(LAG, &root, &blocks[at].0.header));
        }
        let other = Chain::restore(&genesis(), decoded.clone(), &blocks[at].0);
        assert_eq!(
            other.unwrap_err(),
            BlockError::Height { found: Height(at as u64 + 1), expected: Height(at as u64) }
        );
        let chain = Chain::restore(&genesis(), decoded, &blocks[at - 1].0).unwrap();
        let mut again = Node { chain, count, numbers: 0 };
        for (block, batch) in &blocks[at..] {
            again.chain.check(block, &[batch.facts()]).unwrap();
            again.chain.decided(block, &[batch.facts()]);
            again.execute(block, std::slice::from_ref(batch));
            let known = Err(BlockError::OrderedBefore(batch.digest()));
            assert_eq!(again.chain.check_batch(&batch.digest(), &batch.facts()), known);
        }
        let next = |node: &Node| node.chain.make(identity(1).public(), 9_000, vec![]).unwrap();
        assert_eq!((next(&again), again.chain.snapshot()), (next(&node), node.chain.snapshot()));
    }
}

/// Two nodes that execute the same are the same, whenever they do it.
#[test]
fn a_node_that_executes_later_comes_to_the_same() {
    let mut node = Node::new();
    let mut other = node.clone();
    let add = node.adding(5);
    let mut waiting = Vec::new();
    for number in 0..20u8 {
        let by = 1 + number % 4;
        let payment = TransactionDraft::encode_opaque(&[number]);
        let transactions = vec![payment, node.vote(by, &add), node.transaction(9, Kind::Application, &[number])];
        let batch = node.batch(&transactions);
        let block = node.chain.make(identity(by).public(), 2_000, vec![batch.digest()]).unwrap();
        other.chain.check(&block, &[batch.facts()]).unwrap();
        node.chain.decided(&block, &[batch.facts()]);
        other.chain.decided(&block, &[batch.facts()]);
        node.execute(&block, std::slice::from_ref(&batch));
        waiting.push((block, batch));
        if waiting.len() as u64 == LAG {
            let (block, batch) = waiting.remove(0);
            other.execute(&block, &[batch]);
        }
    }
    for (block, batch) in waiting {
        other.execute(&block, &[batch]);
    }
    assert_eq!(other.chain.system(), node.chain.system());
    assert_eq!(
        other.chain.make(identity(1).public(), 9_000, vec![]),
        node.chain.make(identity(1).public(), 9_000, vec![])
    );
}
