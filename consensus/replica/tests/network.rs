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
    rc::Rc,
    time::Duration,
};

use metanode_application::{Application, Operation, Reference};
use metanode_crypto::{Claim, Identity, hash, verify_all};
use metanode_ibft::{
    Certificate, ChainId, Commit, Draft, Height, Message, Now, Payload, Prepare, Proposal, ProposalMessage, Record,
    RoundChangeMessage, Signature, Signed, Timer, Verifier,
};
use metanode_ledger::{
    Account, Batch, BatchDraft, Block, Chain, Genesis, Kind, Outcome, TRANSACTION_DOMAIN, Transaction,
    TransactionDraft, TransactionId,
    system::{Zip215, encode_evidence},
};
use metanode_mempool::{BoardLimits, WaitingLimits};
use metanode_replica::{Config, Effect, Replica};
use metanode_types::{Hash, NodeKey};

const CLIENTS: usize = 4;
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
}

#[derive(Clone, Copy)]
struct Weather {
    delay_ms: u64,
    lost_one_in: u64,
    crash_one_in: u64,
}

const FINE: Weather = Weather { delay_ms: 1, lost_one_in: 0, crash_one_in: 0 };

#[derive(Default)]
struct Disk {
    wal: Vec<Record<Block>>,
    blocks: Vec<(Block, Certificate)>,
    batches: BTreeMap<Hash, Batch>,
}

struct Node {
    identity: Identity,
    vice: Option<Vice>,
    replica: Option<Replica>,
    app: Reference,
    disk: Disk,
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
    guilty: bool,
    trace: DefaultHasher,
}

impl Network {
    fn new(count: usize, seed: u64, weather: Weather, vices: &[(usize, Vice)], operations: u32) -> Self {
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
            guilty: false,
            trace: DefaultHasher::new(),
        };
        for index in 0..count {
            this.nodes.push(Node {
                identity: validator(index),
                vice: vices.iter().find(|(at, _)| *at == index).map(|(_, vice)| *vice),
                replica: None,
                app: Reference::new(&this.genesis),
                disk: Disk::default(),
                timers: BTreeMap::new(),
                results: BTreeMap::new(),
                life: 0,
            });
        }
        for index in 0..CLIENTS {
            let identity = client(index);
            this.clients.push(Client { identity, nonce: 0, sent: None, told: Vec::new(), left: operations });
            this.at(Duration::from_millis(5 * index as u64), Event::Client(index));
        }
        (0..count).for_each(|index| this.start(index));
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
        node.app = Reference::new(&self.genesis);
        let mut chain = Chain::new(&self.genesis, &node.app.executed().1);
        for (block, _) in &node.disk.blocks {
            let batches: Vec<Batch> = block.batches.iter().map(|digest| node.disk.batches[digest].clone()).collect();
            let named: Vec<_> = batches.iter().map(Batch::facts).collect();
            chain.check(block, &named).unwrap();
            chain.decided(block, &named);
            let plan = chain.plan(block, &batches);
            let (outcomes, root) = node.app.execute(plan.height, plan.time_ms, &plan.transactions);
            let executed = chain.executed(plan, outcomes, &root);
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
                let pause = Duration::from_millis(1 + self.random.below(400));
                return self.at(pause, Event::Restart(index));
            }
            self.effect(index, effect);
        }
        self.shorten_log(index);
    }

    fn shorten_log(&mut self, index: usize) {
        let me = self.nodes[index].identity.public();
        let own = |event: &Event| matches!(event, Event::Deliver(to, message) if *to == index && message.signer() == Some(me));
        if self.random.one_in(50) && !self.events.values().any(own) {
            let node = &mut self.nodes[index];
            if let Some(replica) = &node.replica {
                node.disk.wal = replica.records();
            }
        }
    }

    fn effect(&mut self, index: usize, effect: Effect) {
        let count = self.nodes.len();
        match effect {
            Effect::Persist(record) => self.nodes[index].disk.wal.push(record),
            Effect::Cast(draft) if self.nodes[index].vice == Some(Vice::Equivocates) => {
                self.say_two_things(index, draft);
            }
            Effect::Cast(draft) => {
                let message = sign_draft(&self.chain, &self.nodes[index].identity, draft);
                self.nodes[index].disk.wal.push(Record::Cast(message.clone()));
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
                    Timer::Round(_) => 0,
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
                self.guilty = true;
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
            Effect::Forget(_) | Effect::Refused { .. } => {}
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
            self.at(delay, Event::Deliver(to, message.clone()));
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
        let plan = replica.chain().plan(block, &batches);
        let (outcomes, root) = node.app.execute(plan.height, plan.time_ms, &plan.transactions);
        let executed = replica.executed(now, plan, outcomes, &root);
        remember(&mut node.results, &executed.outcomes);
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
            if self.nodes[index].replica.is_none() {
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
            let plan = chain.plan(block, &batches);
            assert!(plan.transactions.iter().all(|it| it.is_signed(&self.chain)), "a forged transaction was executed");
            let (results, root) = app.execute(plan.height, plan.time_ms, &plan.transactions);
            let executed = chain.executed(plan, results, &root);
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

fn seeds(usual: u64) -> u64 {
    std::env::var("REPLICA_SEEDS").map_or(usual, |seeds| seeds.parse().unwrap())
}

/// A seed: bad weather first, then fine, in which everything must come to its end.
fn run(seed: u64) -> u64 {
    let count = [4, 4, 7][seed as usize % 3];
    let faults = (count - 1) / 3;
    let mut random = Random(seed ^ 0x7669_6365);
    let vices = [Vice::Equivocates, Vice::Withholds, Vice::Corrupts];
    let bad: Vec<(usize, Vice)> = (0..faults)
        .filter(|_| !seed.is_multiple_of(4))
        .map(|at| ((at + random.below(count as u64) as usize) % count, vices[random.below(3) as usize]))
        .collect();
    let weather = Weather {
        delay_ms: 1 + seed % 60,
        lost_one_in: if seed.is_multiple_of(3) { 15 } else { 0 },
        crash_one_in: if seed.is_multiple_of(2) && bad.is_empty() { 600 } else { 0 },
    };
    let mut network = Network::new(count, seed, weather, &bad, 8);
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
    let count = seeds(40);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || (thread as u64..count).step_by(threads).for_each(|seed| _ = run(seed)));
        }
    });
}

#[test]
fn a_seed_repeats() {
    for seed in [0, 1, 2, 3] {
        assert_eq!(run(seed), run(seed));
    }
}
