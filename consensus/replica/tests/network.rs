//! Networks of validators with all that belongs to one but sockets and files: mempool, chain, reference application, real signatures. Seed by
//! seed: loss, delay, crashes that keep what was synced, validators that lie, withhold and corrupt. Clients pay each other and read and write
//! values; what they were told must be what the chain says.
//!
//! `REPLICA_SEEDS=2000 cargo test --release -p metanode-replica` runs more.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
    time::Duration,
};

use metanode_application::{Application, Operation, Reference};
use metanode_codec::{decode_message, encode_message};
use metanode_crypto::{Claim, Identity, hash, verify_all};
use metanode_ibft::{
    Certificate, ChainId, Commit, Draft, Height, Message, Now, Payload, Prepare, Proposal, ProposalMessage, Record,
    Round, RoundChangeMessage, Signature, Signed, Timer, Verifier, View,
};
use metanode_ledger::{
    Account, Batch, BatchDraft, Block, Chain, Done, Genesis, Kind, Outcome, Plan, TRANSACTION_DOMAIN, Transaction,
    TransactionDraft, TransactionId,
    system::{Zip215, encode_evidence},
};
use metanode_mempool::{BoardLimits, WaitingLimits};
use metanode_replica::{Config, Effect, Replica};
use metanode_types::{
    Hash, NodeKey,
    sabotage::{self, Sabotage},
};

const CLIENTS: usize = 4;
/// Of each client.
const OPERATIONS: u32 = 8;
const FETCH_TIME: Duration = Duration::from_millis(60);
const RETRY_TIME: Duration = Duration::from_secs(3);

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, of: u64) -> bool {
        of > 0 && self.below(of) == 0
    }
}

fn validator(index: usize) -> Identity {
    Identity::from_seed(&[1 + index as u8; 32])
}

fn client(index: usize) -> Identity {
    Identity::from_seed(&[200 + index as u8; 32])
}

fn genesis(count: usize) -> Genesis {
    Genesis {
        version: 1,
        name: "sim".to_owned(),
        time_ms: 500,
        lag: 2,
        round_ms: 100,
        round_ms_max: 1_600,
        empty_ms: 200,
        clock_drift_ms_max: 500,
        expiry_heights_max: 1_000,
        opaque: true,
        validators: (0..count).map(|index| validator(index).public()).collect(),
        accounts: (0..CLIENTS).map(|index| Account { key: client(index).public(), balance: 1_000_000 }).collect(),
    }
}

/// How a validator misbehaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vice {
    /// Says one thing to some and another to others.
    Equivocates,
    /// Proposes, and keeps the batches to itself.
    Withholds,
    /// Its batches carry a signature that does not hold.
    Corrupts,
    /// Its blocks have the right header and wrong batches.
    Garbles,
    /// Says nothing at all.
    Dead,
}

/// What goes to disk with one sync (clause 21).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    Proposal,
    Prepare,
    Commit,
    RoundChange,
    Decision,
}

fn group_of(record: &Record<Block>) -> Group {
    match record {
        Record::Cast(Message::Proposal(_)) => Group::Proposal,
        Record::Block(_) | Record::Cast(Message::Prepare(_)) => Group::Prepare,
        Record::Prepared(_) | Record::Cast(Message::Commit(_)) => Group::Commit,
        Record::Round(_) | Record::Cast(Message::RoundChange(_)) => Group::RoundChange,
        Record::Decision(_) | Record::Cast(Message::NewBlock(_)) => Group::Decision,
    }
}

/// What is broken on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// A sync is left out: what it should have made durable is, with the next one.
    Sync(Group),
    Rule(Sabotage),
}

#[derive(Clone, Copy)]
struct Weather {
    delay_ms: u64,
    lost_one_in: u64,
    crash_one_in: u64,
    /// A signer that errs.
    bad_signature_one_in: u64,
}

const FINE: Weather = Weather { delay_ms: 1, lost_one_in: 0, crash_one_in: 0, bad_signature_one_in: 0 };

#[derive(Default)]
struct Disk {
    wal: Vec<Record<Block>>,
    blocks: Vec<(Block, Certificate)>,
    batches: BTreeMap<Hash, Batch>,
    /// How much of each a crash leaves.
    wal_synced: usize,
    blocks_synced: usize,
}

impl Disk {
    fn record(&mut self, record: Record<Block>, broken: Option<Broken>) {
        let synced = broken != Some(Broken::Sync(group_of(&record)));
        self.wal.push(record);
        if synced {
            (self.wal_synced, self.blocks_synced) = (self.wal.len(), self.blocks.len());
        }
    }

    fn crash(&mut self) {
        self.wal.truncate(self.wal_synced);
        self.blocks.truncate(self.blocks_synced);
    }
}

/// What an honest validator has said and heard, whatever its disk has of it: the rules are kept across crashes.
#[derive(Default)]
struct Audit {
    said: BTreeMap<(u8, View), Hash>,
    asked: BTreeMap<Height, Round>,
    committed: BTreeMap<Height, Round>,
    announced: usize,
    heard: BTreeMap<Height, BTreeMap<NodeKey, Round>>,
    proposals: BTreeSet<View>,
}

impl Audit {
    fn says(&mut self, me: NodeKey, draft: &Draft<Block>) {
        let (kind, view, choice) = match draft {
            Draft::Proposal { payload, justification, .. } => {
                let claims = justification.round_changes.iter().filter_map(|signed| signed.payload.prepared);
                if let Some((_, highest)) = claims.max_by_key(|(round, _)| *round) {
                    assert_eq!(payload.hash, highest, "clause 9: the highest lock is proposed again");
                }
                (0, payload.view, payload.hash)
            }
            Draft::Prepare(payload) => (1, payload.view, payload.hash),
            Draft::Commit(payload) => {
                let round = self.committed.entry(payload.view.height).or_insert(payload.view.round);
                *round = payload.view.round.max(*round);
                (2, payload.view, payload.hash)
            }
            Draft::RoundChange { payload, .. } => {
                let (height, round) = (payload.view.height, payload.view.round);
                self.asked.insert(height, round);
                self.heard.entry(height).or_default().insert(me, round); // from its disk, if it dies before it hears itself
                let claimed = payload.prepared.map(|(round, _)| round);
                assert!(claimed >= self.committed.get(&height).copied(), "clause 12: the lock survives");
                (3, payload.view, payload.prepared.map_or(Hash([0; 32]), |(_, hash)| hash))
            }
        };
        let asked = self.asked.get(&view.height).copied().unwrap_or(Round::ZERO);
        assert!(view.round >= asked, "clause 8: nothing below the round that it has asked for");
        let before = *self.said.entry((kind, view)).or_insert(choice);
        assert_eq!(before, choice, "clause 8: one thing in a round, kind {kind} at {view:?}");
    }

    fn hears(&mut self, message: &Message<Block>) {
        match message {
            Message::RoundChange(message) => {
                let view = message.signed.payload.view;
                let heard =
                    self.heard.entry(view.height).or_default().entry(message.signed.signer).or_insert(view.round);
                *heard = view.round.max(*heard);
            }
            Message::Proposal(message) => _ = self.proposals.insert(message.signed.payload.view),
            _ => {}
        }
    }

    fn starts_clock(&self, view: View, quorum: usize) {
        let heard = self.heard.get(&view.height);
        let shared = heard.map_or(0, |heard| heard.values().filter(|round| **round >= view.round).count());
        let started = view.round == Round::ZERO || shared >= quorum || self.proposals.contains(&view);
        assert!(started, "clause 16: the clock of a later round starts with a quorum, or its proposal");
    }
}

struct Node {
    identity: Identity,
    vice: Option<Vice>,
    replica: Option<Replica>,
    app: Reference,
    disk: Disk,
    audit: Audit,
    timers: BTreeMap<u8, Timer>,
    /// What became of transactions, by whoever asks here.
    results: BTreeMap<TransactionId, Outcome>,
    life: u64,
}

enum Event {
    Deliver(usize, Message<Block>),
    Batch(usize, Batch),
    /// From one, to another, whom to ask after that.
    Fetch {
        from: usize,
        digest: Hash,
        rest: Vec<NodeKey>,
        life: u64,
    },
    CatchUp {
        from: Option<usize>,
        to: usize,
        height: Height,
    },
    Timeout(usize, Timer),
    Execute(usize, Block, u64),
    Restart(usize),
    Client(usize),
}

fn execute(plan: Plan, app: &mut Reference) -> Done {
    let mut done =
        plan.execute(|height, time_ms, transactions| Ok::<_, ()>(app.execute(height, time_ms, transactions))).unwrap();
    done.note_nonces(|account| app.next_nonce(account));
    done
}

struct Client {
    identity: Identity,
    nonce: u64,
    sent: Option<(Vec<u8>, TransactionId, Duration)>,
    /// What it was told.
    told: Vec<(TransactionId, Outcome)>,
    left: u32,
}

/// Real signatures, each checked once for all validators: it is the same for all.
#[derive(Default)]
struct Known(RefCell<HashMap<Hash, bool>>);

impl Verifier for Known {
    fn verify(&self, signer: &NodeKey, domain: &str, message: &[u8], signature: &Signature) -> bool {
        let all = hash(&[&signer.0[..], domain.as_bytes(), &[0], message, signature].concat());
        *self.0.borrow_mut().entry(all).or_insert_with(|| Zip215.verify(signer, domain, message, signature))
    }
}

struct Network {
    verifier: Rc<Known>,
    random: Random,
    now: Duration,
    number: u64,
    events: BTreeMap<(Duration, u64), Event>,
    nodes: Vec<Node>,
    clients: Vec<Client>,
    weather: Weather,
    genesis: Genesis,
    chain: ChainId,
    broken: Option<Broken>,
    trace: DefaultHasher,
}

impl Network {
    fn new(count: usize, seed: u64, weather: Weather, vices: &[(usize, Vice)], broken: Option<Broken>) -> Self {
        let genesis = genesis(count);
        let mut this = Self {
            verifier: Rc::default(),
            random: Random(seed),
            now: Duration::ZERO,
            number: 0,
            events: BTreeMap::new(),
            nodes: Vec::new(),
            clients: Vec::new(),
            weather,
            chain: genesis.chain(),
            genesis,
            broken,
            trace: DefaultHasher::new(),
        };
        for index in 0..count {
            this.nodes.push(Node {
                identity: validator(index),
                vice: vices.iter().find(|(at, _)| *at == index).map(|(_, vice)| *vice),
                replica: None,
                app: Reference::new(&this.genesis),
                disk: Disk::default(),
                audit: Audit::default(),
                timers: BTreeMap::new(),
                results: BTreeMap::new(),
                life: 0,
            });
        }
        for index in 0..CLIENTS {
            let identity = client(index);
            this.clients.push(Client { identity, nonce: 0, sent: None, told: Vec::new(), left: OPERATIONS });
            this.at(Duration::from_millis(5 * index as u64), Event::Client(index));
        }
        this.start_all();
        this
    }

    fn clock(&self) -> Now {
        Now { monotonic: self.now, unix_ms: 1_000 + self.now.as_millis() as u64 }
    }

    fn at(&mut self, after: Duration, event: Event) {
        self.number += 1;
        self.events.insert((self.now + after, self.number), event);
    }

    fn index_of(&self, key: &NodeKey) -> Option<usize> {
        self.nodes.iter().position(|node| node.identity.public() == *key)
    }

    /// From its disk: the chain is executed again, from its beginning.
    fn start(&mut self, index: usize) {
        let now = self.clock();
        let node = &mut self.nodes[index];
        node.life += 1;
        node.timers.clear();
        assert!(node.disk.blocks.len() >= node.audit.announced, "clause 21: a decision that was announced is on disk");
        node.app = Reference::new(&self.genesis);
        let mut chain = Chain::new(&self.genesis, &node.app.executed().1);
        for (block, _) in &node.disk.blocks {
            let batches: Vec<Batch> = block.batches.iter().map(|digest| node.disk.batches[digest].clone()).collect();
            let named: Vec<_> = batches.iter().map(Batch::facts).collect();
            chain.check(block, &named).unwrap();
            chain.decided(block, &named);
            let executed = chain.executed(execute(chain.plan(block, batches), &mut node.app));
            remember(&mut node.results, &executed.outcomes);
        }
        let config = Config {
            me: Some(node.identity.public()),
            waiting: WaitingLimits::default(),
            board: BoardLimits::default(),
            batch_number: 1_000 * node.life,
            verifier: self.verifier.clone(),
        };
        let batches: Vec<Batch> = node.disk.batches.values().cloned().collect();
        node.replica = Some(Replica::restore(config, &self.genesis, chain, &batches, &node.disk.wal, true, now));
        self.perform(index);
        for other in 0..self.nodes.len() {
            if other != index {
                let key = self.nodes[index].identity.public();
                self.with(other, |replica, now| replica.connected(now, key));
            }
        }
    }

    fn with(&mut self, index: usize, work: impl FnOnce(&mut Replica, Now)) {
        let now = self.clock();
        if let Some(replica) = &mut self.nodes[index].replica {
            work(replica, now);
            self.perform(index);
        }
    }

    fn perform(&mut self, index: usize) {
        while let Some(effect) = self.nodes[index].replica.as_mut().and_then(Replica::poll) {
            if self.random.one_in(self.weather.crash_one_in) && self.nodes[index].vice.is_none() {
                self.nodes[index].replica = None; // and with it all that it was about to do
                self.nodes[index].disk.crash();
                let pause = Duration::from_millis(1 + self.random.below(400));
                return self.at(pause, Event::Restart(index));
            }
            self.effect(index, effect);
        }
        self.shorten_log(index);
    }

    fn shorten_log(&mut self, index: usize) {
        let node = &mut self.nodes[index];
        if let Some(records) = node.replica.as_ref().and_then(Replica::records).filter(|_| self.random.one_in(30)) {
            node.disk.wal = records;
            node.disk.wal_synced = node.disk.wal.len();
        }
    }

    fn effect(&mut self, index: usize, effect: Effect) {
        let count = self.nodes.len();
        match effect {
            Effect::Persist(record) => {
                let broken = self.broken;
                self.nodes[index].disk.record(record, broken);
            }
            Effect::Cast(draft) if self.nodes[index].vice == Some(Vice::Equivocates) => {
                self.say_two_things(index, draft);
            }
            Effect::Cast(draft) => {
                let me = self.nodes[index].identity.public();
                self.nodes[index].audit.says(me, &draft);
                let mut message = sign_draft(&self.chain, &self.nodes[index].identity, draft);
                if self.random.one_in(self.weather.bad_signature_one_in) {
                    spoil(&mut message);
                }
                let broken = self.broken;
                self.nodes[index].disk.record(Record::Cast(message.clone()), broken);
                (0..count).for_each(|to| self.send(index, to, &message));
            }
            Effect::Send { to: Some(to), message } => {
                let to = self.index_of(&to).unwrap();
                self.send(index, to, &message);
            }
            Effect::Send { to: None, message } => {
                (0..count).filter(|to| *to != index).for_each(|to| self.send(index, to, &message));
            }
            Effect::SetTimer { timer, after } => {
                let kind = match timer {
                    Timer::Round(view) => {
                        if self.nodes[index].vice.is_none() {
                            self.nodes[index].audit.starts_clock(view, (2 * count).div_ceil(3));
                        }
                        0
                    }
                    Timer::Resend(_) => 1,
                    Timer::Empty(_) => 2,
                };
                self.nodes[index].timers.insert(kind, timer);
                self.at(after, Event::Timeout(index, timer));
            }
            Effect::MakeBatch(draft) => self.make_batch(index, draft),
            Effect::FetchBatch { digest, from } => {
                let life = self.nodes[index].life;
                self.at(Duration::from_millis(1), Event::Fetch { from: index, digest, rest: from, life });
            }
            Effect::Store { block, certificate } => {
                let node = &mut self.nodes[index];
                assert_eq!(block.header.height.0, node.disk.blocks.len() as u64 + 1);
                node.disk.blocks.push((block, certificate));
                if self.broken != Some(Broken::Sync(Group::Decision)) {
                    node.disk.blocks_synced = node.disk.blocks.len();
                }
            }
            Effect::Execute(block) => {
                let life = self.nodes[index].life;
                let after = Duration::from_micros(self.random.below(3_000));
                self.at(after, Event::Execute(index, block, life));
            }
            Effect::Help { to, height } => {
                let to = self.index_of(&to).unwrap();
                self.tell(index, to, height);
            }
            Effect::CatchUp { from, height } => {
                let from = from.and_then(|key| self.index_of(&key));
                self.at(Duration::from_millis(1), Event::CatchUp { from, to: index, height });
            }
            Effect::Accuse(evidence) => {
                let identity = self.nodes[index].identity.clone();
                let Some(next) = self.nodes[index].replica.as_ref().map(|replica| replica.chain().tip().height.next())
                else {
                    return;
                };
                let payload = encode_evidence(&evidence);
                let draft = TransactionDraft {
                    kind: Kind::Evidence,
                    account: identity.public(),
                    nonce: 0,
                    fee: 0,
                    expiry: Height(next.0 + 50),
                    payload: &payload,
                };
                let bytes =
                    draft.encode(&self.chain, |domain, message| Ok::<_, ()>(identity.sign(domain, message))).unwrap();
                let (now, key) = (self.clock(), identity.public());
                if let Some(replica) = &mut self.nodes[index].replica {
                    _ = replica.submit(now, key, &Transaction::decode(&bytes).unwrap(), 0);
                }
            }
            Effect::Forget(digests) => {
                let batches = &mut self.nodes[index].disk.batches;
                digests.iter().for_each(|digest| _ = batches.remove(digest));
            }
            Effect::Refused { .. } => {}
            Effect::Halt(certificate) => panic!("{certificate:?}"),
        }
    }

    fn delay(&mut self) -> Duration {
        Duration::from_micros(100 + self.random.below(1000 * self.weather.delay_ms + 1))
    }

    fn send(&mut self, from: usize, to: usize, message: &Message<Block>) {
        if from == to {
            return self.at(Duration::ZERO, Event::Deliver(to, message.clone()));
        }
        if !self.random.one_in(self.weather.lost_one_in) {
            let delay = self.delay();
            let mut message = message.clone();
            if self.nodes[from].vice == Some(Vice::Garbles) {
                garble(&mut message);
            }
            // Through the door that all bytes from others come through.
            if let Ok(message) = decode_message(&encode_message(&message)) {
                self.at(delay, Event::Deliver(to, message));
            }
        }
    }

    fn tell(&mut self, from: usize, to: usize, height: Height) {
        if let Some(decided) = self.nodes[from].disk.blocks.get(height.0 as usize - 1).cloned() {
            self.send(from, to, &Message::NewBlock(Box::new(decided)));
        }
    }

    fn make_batch(&mut self, index: usize, mut draft: BatchDraft) {
        let identity = self.nodes[index].identity.clone();
        let vice = self.nodes[index].vice;
        if vice == Some(Vice::Corrupts) {
            let forged = TransactionDraft {
                kind: Kind::Application,
                account: client(0).public(),
                nonce: 0,
                fee: 0,
                expiry: Height(90),
                payload: b"forged",
            };
            let forged = forged.encode(&self.chain, |_, _| Ok::<_, ()>([7; 64])).unwrap();
            draft.push(&Transaction::decode(&forged).unwrap());
        }
        let batch = draft.finish(&self.chain, |domain, message| Ok::<_, ()>(identity.sign(domain, message))).unwrap();
        self.nodes[index].disk.batches.insert(batch.digest(), batch.clone());
        if vice != Some(Vice::Withholds) {
            for to in (0..self.nodes.len()).filter(|to| *to != index) {
                if !self.random.one_in(self.weather.lost_one_in) {
                    let delay = self.delay();
                    self.at(delay, Event::Batch(to, batch.clone()));
                }
            }
        }
        let now = self.clock();
        if let Some(replica) = &mut self.nodes[index].replica {
            replica.batch_here(now, &batch);
        }
    }

    /// What each validator does with a batch that comes.
    fn batch(&mut self, index: usize, batch: &Batch) {
        let chain = self.chain;
        let node = &mut self.nodes[index];
        let Some(replica) = &mut node.replica else { return };
        if replica.wants_batch(&batch.digest(), &batch.facts(), batch.bytes().len()).is_err() {
            return;
        }
        let verdict = || {
            let messages: Vec<(NodeKey, Vec<u8>, [u8; 64])> = batch
                .transactions()
                .filter_map(|it| Some((it.account, it.signed_message(&chain), *it.signature?)))
                .collect();
            let claims: Vec<Claim<'_>> = messages
                .iter()
                .map(|(signer, message, signature)| Claim {
                    signer: *signer,
                    domain: TRANSACTION_DOMAIN,
                    message,
                    signature,
                })
                .collect();
            batch.is_signed(&chain) && verify_all(&claims).is_ok()
        };
        let holds = *self.verifier.0.borrow_mut().entry(batch.digest()).or_insert_with(verdict);
        if holds {
            node.disk.batches.insert(batch.digest(), batch.clone());
            self.with(index, |replica, now| replica.batch_here(now, batch));
        } else {
            self.with(index, |replica, now| replica.batch_is_bad(now, batch.digest()));
        }
    }

    fn execute(&mut self, index: usize, block: &Block) {
        let now = self.clock();
        let node = &mut self.nodes[index];
        let Some(replica) = &mut node.replica else { return };
        let batches: Vec<Batch> = block.batches.iter().map(|digest| node.disk.batches[digest].clone()).collect();
        let done = execute(replica.chain().plan(block, batches), &mut node.app);
        let executed = replica.executed(now, done);
        remember(&mut node.results, &executed.outcomes);
        node.audit.announced = node.audit.announced.max(block.header.height.0 as usize);
        self.perform(index);
    }

    /// Half of the nodes hear one thing, the others another.
    fn say_two_things(&mut self, index: usize, draft: Draft<Block>) {
        let other = match draft.clone() {
            Draft::Proposal { mut payload, mut block, justification } => {
                block.header.time_ms += 1;
                payload.hash = block.header.hash();
                Draft::Proposal { payload, block, justification }
            }
            Draft::Prepare(payload) => Draft::Prepare(Prepare { hash: Hash([9; 32]), ..payload }),
            Draft::Commit(payload) => Draft::Commit(Commit { hash: Hash([9; 32]), ..payload }),
            Draft::RoundChange { mut payload, .. } => {
                payload.prepared = None;
                Draft::RoundChange { payload, block: None, prepares: Vec::new() }
            }
        };
        for (half, draft) in [draft, other].into_iter().enumerate() {
            let message = sign_draft(&self.chain, &self.nodes[index].identity, draft);
            (0..self.nodes.len()).filter(|to| to % 2 == half).for_each(|to| self.send(index, to, &message));
            if self.random.one_in(3) {
                let to = self.random.below(self.nodes.len() as u64) as usize;
                self.send(index, to, &message);
            }
        }
    }

    /// A client looks for its answer, and sends the next or the same again.
    fn client(&mut self, index: usize) {
        self.at(Duration::from_millis(7), Event::Client(index));
        let now = self.now;
        if let Some((bytes, id, since)) = self.clients[index].sent.clone() {
            // What a validator that lies says is not worth asking for.
            let outcome = self.honest().find_map(|node| node.results.get(&id).copied());
            if let Some(outcome) = outcome {
                let client = &mut self.clients[index];
                client.told.push((id, outcome));
                client.nonce += 1;
                client.sent = None;
            } else if now - since > RETRY_TIME {
                let other = self.random.below(self.nodes.len() as u64) as usize;
                self.clients[index].sent = Some((bytes.clone(), id, now));
                return self.submit(other, &bytes);
            } else {
                return;
            }
        }
        let next = self.nodes.iter().map(|node| node.disk.blocks.len() as u64).max().unwrap();
        let (kind, amount) = (self.random.below(3), self.random.below(5_000));
        let owner = client(self.random.below(CLIENTS as u64) as usize).public();
        let client = &mut self.clients[index];
        if client.left == 0 {
            return;
        }
        client.left -= 1;
        let value = amount.to_le_bytes();
        let operation = match kind {
            0 => Operation::Pay { to: owner, amount },
            1 => Operation::Set { name: b"name", value: &value },
            _ => Operation::Read { owner, name: b"name" },
        };
        let draft = TransactionDraft {
            kind: Kind::Application,
            account: client.identity.public(),
            nonce: client.nonce,
            fee: 1,
            expiry: Height(next + 900),
            payload: &operation.encode(),
        };
        let bytes =
            draft.encode(&self.chain, |domain, message| Ok::<_, ()>(client.identity.sign(domain, message))).unwrap();
        let id = Transaction::decode(&bytes).unwrap().id(&self.chain);
        let to = self.random.below(self.nodes.len() as u64) as usize;
        self.clients[index].sent = Some((bytes.clone(), id, now));
        self.submit(to, &bytes);
    }

    fn submit(&mut self, to: usize, bytes: &[u8]) {
        let transaction = Transaction::decode(bytes).unwrap();
        assert!(transaction.is_signed(&self.chain));
        let executed = self.nodes[to].app.next_nonce(&transaction.account);
        if self.nodes[to].app.check(&transaction).is_ok() {
            let peer = transaction.account;
            self.with(to, |replica, now| _ = replica.submit(now, peer, &transaction, executed));
        }
    }

    fn step(&mut self) {
        let ((at, number), event) = self.events.pop_first().unwrap();
        self.now = at;
        (at, number).hash(&mut self.trace);
        match event {
            Event::Deliver(to, message) => {
                message.hash(&mut self.trace);
                if self.nodes[to].replica.is_some() {
                    self.nodes[to].audit.hears(&message);
                }
                self.with(to, |replica, now| replica.message(now, message));
            }
            Event::Batch(to, batch) => self.batch(to, &batch),
            Event::Fetch { from, digest, mut rest, life } => {
                if self.nodes[from].life != life || self.nodes[from].disk.batches.contains_key(&digest) {
                    return;
                }
                if rest.is_empty() {
                    return self.with(from, |replica, now| replica.batch_is_missing(now, &digest));
                }
                let asked = self.index_of(&rest.remove(0)).unwrap();
                let has = self.nodes[asked].replica.is_some() && self.nodes[asked].vice != Some(Vice::Withholds);
                let found = self.nodes[asked].disk.batches.get(&digest).filter(|_| has).cloned();
                if let Some(batch) = found.filter(|_| !self.random.one_in(self.weather.lost_one_in)) {
                    let delay = self.delay() + self.delay();
                    self.at(delay, Event::Batch(from, batch));
                }
                self.at(FETCH_TIME, Event::Fetch { from, digest, rest, life });
            }
            Event::CatchUp { from, to, height } => {
                let from = from.unwrap_or_else(|| self.random.below(self.nodes.len() as u64) as usize);
                if self.nodes[from].replica.is_some() {
                    self.tell(from, to, height);
                }
            }
            Event::Timeout(index, timer) => {
                if self.nodes[index].timers.values().any(|set| *set == timer) {
                    self.with(index, |replica, now| replica.timeout(now, timer));
                }
            }
            Event::Execute(index, block, life) => {
                if self.nodes[index].life == life {
                    self.execute(index, &block);
                }
            }
            Event::Restart(index) => self.start(index),
            Event::Client(index) => self.client(index),
        }
    }

    fn honest(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.vice.is_none())
    }

    /// Until all heights are there and all clients have their answers, or time is over.
    fn run(&mut self, heights: usize, until: Duration) -> bool {
        while self.events.first_key_value().is_some_and(|((at, _), _)| *at <= until) {
            self.step();
            if self.is_done(heights) {
                return true;
            }
        }
        false
    }

    fn is_done(&self, heights: usize) -> bool {
        self.clients.iter().all(|client| client.left == 0 && client.sent.is_none())
            && self.honest().all(|node| node.replica.is_some() && node.disk.blocks.len() >= heights)
    }

    fn start_all(&mut self) {
        for index in 0..self.nodes.len() {
            if self.nodes[index].replica.is_none() && self.nodes[index].vice != Some(Vice::Dead) {
                self.events.retain(|_, event| !matches!(event, Event::Restart(at) if *at == index));
                self.start(index);
            }
        }
    }

    /// One chain, on which everything is that clients were told, once.
    fn check(&self) {
        let longest = self.honest().map(|node| &node.disk.blocks).max_by_key(|blocks| blocks.len()).unwrap();
        for node in self.honest() {
            for ((one, _), (other, _)) in node.disk.blocks.iter().zip(longest) {
                assert_eq!(one, other, "two blocks of a height");
            }
        }
        let disks: Vec<&Disk> = self.honest().map(|node| &node.disk).collect();
        let batch = |digest: &Hash| disks.iter().find_map(|disk| disk.batches.get(digest)).cloned().unwrap();
        let mut app = Reference::new(&self.genesis);
        let mut chain = Chain::new(&self.genesis, &app.executed().1);
        let mut outcomes: BTreeMap<TransactionId, Vec<Outcome>> = BTreeMap::new();
        for (block, certificate) in longest {
            let batches: Vec<Batch> = block.batches.iter().map(batch).collect();
            let named: Vec<_> = batches.iter().map(Batch::facts).collect();
            chain.check(block, &named).unwrap();
            let voters = chain.validators().unwrap();
            let valid = |commit: &&Signed<Commit>| {
                let says = Commit { view: certificate.view, hash: block.header.hash() };
                voters.contains(&commit.signer) && commit.payload == says && commit.verify(&self.chain, &*self.verifier)
            };
            let signers: BTreeSet<NodeKey> =
                certificate.commits.iter().filter(valid).map(|commit| commit.signer).collect();
            assert!(signers.len() >= voters.quorum(), "a stored certificate does not hold");
            chain.decided(block, &named);
            let mut transactions = batches.iter().flat_map(Batch::transactions);
            assert!(transactions.all(|it| it.is_signed(&self.chain)), "a forged transaction was executed");
            drop(transactions);
            let executed = chain.executed(execute(chain.plan(block, batches), &mut app));
            for (id, outcome) in executed.outcomes {
                outcomes.entry(id).or_default().push(outcome);
            }
        }
        assert_eq!(app.total(), 1_000_000 * CLIENTS as u128);
        for client in &self.clients {
            for (id, told) in &client.told {
                let happened = &outcomes[id];
                assert!(happened.contains(told), "{told:?} was told, {happened:?} happened");
                let executed = happened.iter().filter(|outcome| !matches!(outcome, Outcome::Skipped(_))).count();
                assert_eq!(executed, 1, "{happened:?}");
            }
        }
    }
}

/// The first that was no skip counts: a transaction may be in several batches.
fn remember(results: &mut BTreeMap<TransactionId, Outcome>, outcomes: &[(TransactionId, Outcome)]) {
    for (id, outcome) in outcomes {
        if !matches!(outcome, Outcome::Skipped(_)) {
            results.insert(*id, *outcome);
        }
    }
}

fn sign<P: Payload>(chain: &ChainId, by: &Identity, payload: P) -> Signed<P> {
    let signature = by.sign(P::DOMAIN, &payload.encode(chain));
    Signed { payload, signer: by.public(), signature }
}

fn sign_draft(chain: &ChainId, by: &Identity, draft: Draft<Block>) -> Message<Block> {
    match draft {
        Draft::Proposal { payload, block, justification } => {
            let signed: Signed<Proposal> = sign(chain, by, payload);
            Message::Proposal(Box::new(ProposalMessage { signed, block, justification }))
        }
        Draft::Prepare(payload) => Message::Prepare(sign(chain, by, payload)),
        Draft::Commit(payload) => Message::Commit(sign(chain, by, payload)),
        Draft::RoundChange { payload, block, prepares } => {
            Message::RoundChange(Box::new(RoundChangeMessage { signed: sign(chain, by, payload), block, prepares }))
        }
    }
}

/// Its own signature does not hold.
fn spoil(message: &mut Message<Block>) {
    match message {
        Message::Proposal(message) => message.signed.signature[0] ^= 1,
        Message::Prepare(signed) => signed.signature[0] ^= 1,
        Message::Commit(signed) => signed.signature[0] ^= 1,
        Message::RoundChange(message) => message.signed.signature[0] ^= 1,
        Message::NewBlock(_) => {}
    }
}

/// The header stays, and with it the block's hash and what was signed.
fn garble(message: &mut Message<Block>) {
    let block = match message {
        Message::Proposal(message) => Some(&mut message.block),
        Message::RoundChange(message) => message.block.as_mut(),
        Message::NewBlock(decided) => Some(&mut decided.0),
        Message::Prepare(_) | Message::Commit(_) => None,
    };
    if let Some(block) = block {
        block.batches.push(Hash([3; 32]));
    }
}

/// From the environment.
fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().unwrap())
}

/// A seed: bad weather first, then fine, in which everything must come to its end.
fn run(seed: u64, broken: Option<Broken>) -> u64 {
    sabotage::set(match broken {
        Some(Broken::Rule(rule)) => Some(rule),
        _ => None,
    });
    let count = [4, 4, 7][seed as usize % 3];
    let faults = (count - 1) / 3;
    let mut random = Random(seed ^ 0x7669_6365);
    let vices = [Vice::Equivocates, Vice::Withholds, Vice::Corrupts, Vice::Garbles, Vice::Dead];
    let bad: Vec<(usize, Vice)> = (0..faults)
        .filter(|_| !seed.is_multiple_of(4))
        .map(|at| ((at + random.below(count as u64) as usize) % count, vices[random.below(5) as usize]))
        // Many crashes beside one who says two things: what a lost vote would make somebody contradict.
        .map(|(at, vice)| (at, if seed % 8 == 2 { Vice::Equivocates } else { vice }))
        .collect();
    let weather = Weather {
        delay_ms: 1 + seed % 60,
        lost_one_in: [15, 0, 0, 3, 0, 6][seed as usize % 6],
        crash_one_in: [300, 0, 60, 0][seed as usize % 4],
        bad_signature_one_in: if seed % 5 == 1 { 20 } else { 0 },
    };
    let mut network = Network::new(count, seed, weather, &bad, broken);
    network.run(20, Duration::from_secs(20));
    network.weather = FINE;
    network.start_all();
    let from = network.now;
    let done = network.run(20, from + Duration::from_secs(120));
    let state: Vec<_> = network
        .nodes
        .iter()
        .map(|node| {
            (
                node.disk.blocks.len(),
                node.vice,
                node.replica
                    .as_ref()
                    .map(|replica| (replica.view(), replica.waiting().count(), replica.board().open_count())),
            )
        })
        .collect();
    assert!(done, "seed {seed} does not come to an end at {:?}: {state:?}", network.now);
    network.check();
    network.trace.finish()
}

#[test]
fn seeds_come_to_an_end_with_one_chain_and_nothing_lost() {
    let (first, count) = (number("REPLICA_SEED", 0), number("REPLICA_SEEDS", 40));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let work = |thread: usize| {
        (first + thread as u64..first + count)
            .step_by(threads)
            .find(|seed| catch_unwind(AssertUnwindSafe(|| run(*seed, None))).is_err())
    };
    let failed: Vec<u64> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
        running.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
    });
    assert!(failed.is_empty(), "failed: {failed:?}; REPLICA_SEED=N REPLICA_SEEDS=1 runs one");
}

#[test]
fn a_seed_repeats() {
    for seed in [0, 1, 2, 3] {
        assert_eq!(run(seed, None), run(seed, None));
    }
}

/// A simulation that finds nothing proves little until it is shown to find something.
#[test]
fn each_broken_rule_is_found_within_500_seeds() {
    let groups = [Group::Proposal, Group::Prepare, Group::Commit, Group::RoundChange, Group::Decision];
    let broken = groups.map(Broken::Sync).into_iter().chain(Sabotage::CONSENSUS.map(Broken::Rule));
    for broken in broken {
        let found = (0..500).find(|seed| catch_unwind(AssertUnwindSafe(|| run(*seed, Some(broken)))).is_err());
        sabotage::set(None);
        println!("{broken:?}: seed {}", found.unwrap_or_else(|| panic!("{broken:?} was not found")));
    }
}
