//! Networks of validators with all that belongs to one but sockets and files: mempool, chain, reference application, real signatures. Seed by
//! seed: loss, delay, crashes that keep what was synced, validators that lie, withhold and corrupt. Clients pay each other and read and write
//! values; what they were told must be what the chain says.
//!
//! `REPLICA_SEEDS=2000 cargo test --release -p metanode-replica` runs more.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod audit;
mod disk;
mod message;
mod random;

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
    time::Duration,
};

use metanode_application::{Application, Operation, Reference};
use metanode_codec::{decode_message, encode_message};
use metanode_crypto::{Claim, Identity, verify_all};
use metanode_ibft::{ChainId, Commit, Draft, Height, Message, Now, Prepare, Record, Signed, Timer};
use metanode_ledger::{
    Account, Batch, BatchDraft, Block, Chain, Done, Genesis, Kind, Outcome, Plan, Snapshot, TRANSACTION_DOMAIN,
    Transaction, TransactionDraft, TransactionId, system::encode_evidence,
};
use metanode_mempool::{BoardLimits, WaitingLimits};
use metanode_replica::{Config, Effect, Replica};
use metanode_types::{
    Hash, NodeKey,
    sabotage::{self, Sabotage},
};

use audit::Audit;
use disk::{Disk, Group};
use message::{Known, garble, sign_draft, spoil};
use random::Random;

const CLIENTS: usize = 4;
/// Of each client.
const OPERATIONS: u32 = 8;
const FETCH_TIME: Duration = Duration::from_millis(60);
const RETRY_TIME: Duration = Duration::from_secs(3);

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
    /// There are two of it, with one key, that know nothing of each other: each is honest.
    Twin,
}

const VICES: [Vice; 6] = [Vice::Equivocates, Vice::Withholds, Vice::Corrupts, Vice::Garbles, Vice::Dead, Vice::Twin];

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
    /// In this life it has seen that it may vote.
    Vote(usize, u64),
    Client(usize),
}

fn execute(plan: Plan, app: &mut Reference) -> Done {
    let mut done =
        plan.execute(|height, time_ms, transactions| Ok::<_, ()>(app.execute(height, time_ms, transactions))).unwrap();
    let next: Vec<u64> = done.early().iter().map(|early| app.next_nonce(&early.account)).collect();
    done.note_nonces(next);
    done
}

struct Client {
    identity: Identity,
    nonce: u64,
    sent: Option<(Vec<u8>, TransactionId, Duration)>,
    /// When it first sent that.
    begun: Duration,
    told: Vec<Told>,
    left: u32,
}

/// What became of a transaction, as its client was told.
struct Told {
    id: TransactionId,
    outcome: Outcome,
    begun: Duration,
    ended: Duration,
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
        let vice = |index: usize| vices.iter().find(|(at, _)| *at == index).map(|(_, vice)| *vice);
        let twins = (0..count).filter(|index| vice(*index) == Some(Vice::Twin));
        for index in (0..count).chain(twins) {
            this.nodes.push(Node {
                identity: validator(index),
                vice: vice(index),
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
            this.clients.push(Client {
                identity,
                nonce: 0,
                sent: None,
                begun: Duration::ZERO,
                told: Vec::new(),
                left: OPERATIONS,
            });
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

    /// All that have a key: two, if they are twins.
    fn with_key(&self, key: &NodeKey) -> Vec<usize> {
        (0..self.nodes.len()).filter(|index| self.nodes[*index].identity.public() == *key).collect()
    }

    /// From its disk: the chain is executed again, from its beginning or from a snapshot.
    fn start(&mut self, index: usize) {
        let now = self.clock();
        let node = &mut self.nodes[index];
        node.life += 1;
        node.timers.clear();
        assert!(node.disk.blocks.len() >= node.audit.announced, "clause 21: a decision that was announced is on disk");
        node.app = Reference::new(&self.genesis);
        let mut chain = Chain::new(&self.genesis, &node.app.executed().1);
        if let Some((snapshot, app)) = &node.disk.snapshot
            && self.random.one_in(2)
        {
            let snapshot = Snapshot::decode(snapshot).unwrap();
            let at = snapshot.height().0 as usize;
            if at <= node.disk.blocks.len() {
                if let Some((carrier, _)) = node.disk.blocks.get(at - 1 + self.genesis.lag as usize) {
                    assert!(snapshot.is_carried_by(self.genesis.lag, &app.executed().1, &carrier.header));
                }
                chain = Chain::restore(&self.genesis, snapshot, &node.disk.blocks[at - 1].0).unwrap();
                node.app = app.clone();
            }
        }
        let first = chain.tip().height.0 as usize;
        for (block, _) in &node.disk.blocks[first..] {
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
        // Some see only later that they may.
        let at_once = self.random.one_in(2);
        node.replica = Some(Replica::restore(config, &self.genesis, chain, &batches, &node.disk.wal, at_once, now));
        if !at_once {
            let (life, after) = (node.life, Duration::from_millis(self.random.below(100)));
            self.at(after, Event::Vote(index, life));
        }
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
        let quorum = (2 * self.genesis.validators.len()).div_ceil(3);
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
                if self.nodes[index].vice.is_none() {
                    self.nodes[index].audit.says(me, &draft);
                }
                let mut message = sign_draft(&self.verifier, &self.chain, &self.nodes[index].identity, draft);
                if self.random.one_in(self.weather.bad_signature_one_in) {
                    spoil(&mut message);
                }
                let broken = self.broken;
                self.nodes[index].disk.record(Record::Cast(message.clone()), broken);
                (0..count).for_each(|to| self.send(index, to, &message));
            }
            Effect::Send { to: Some(to), message } => {
                self.with_key(&to).into_iter().for_each(|to| self.send(index, to, &message));
            }
            Effect::Send { to: None, message } => {
                (0..count).filter(|to| *to != index).for_each(|to| self.send(index, to, &message));
            }
            Effect::SetTimer { timer, after } => {
                let kind = match timer {
                    Timer::Round(view) => {
                        if self.nodes[index].vice.is_none() {
                            self.nodes[index].audit.starts_clock(view, quorum);
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
                self.with_key(&to).into_iter().for_each(|to| self.tell(index, to, height));
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
        if self.verifier.holds(batch.digest(), verdict) {
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
        if self.random.one_in(6) {
            node.disk.snapshot = Some((replica.chain().snapshot().encode(), node.app.clone()));
        }
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
            let message = sign_draft(&self.verifier, &self.chain, &self.nodes[index].identity, draft);
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
                client.told.push(Told { id, outcome, begun: client.begun, ended: now });
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
        let owner = self.clients[self.random.below(CLIENTS as u64) as usize].identity.public();
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
        let client = &mut self.clients[index];
        (client.sent, client.begun) = (Some((bytes.clone(), id, now)), now);
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
            Event::Vote(index, life) => {
                if self.nodes[index].life == life {
                    self.with(index, |replica, now| replica.may_vote(now, true));
                }
            }
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

    /// One chain, on which everything is that clients were told, once, in an order that they can't tell from one after the other
    /// (linearizable).
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
        let mut order: BTreeMap<TransactionId, usize> = BTreeMap::new();
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
                if !matches!(outcome, Outcome::Skipped(_)) {
                    let place = order.len();
                    order.insert(id, place);
                }
                outcomes.entry(id).or_default().push(outcome);
            }
        }
        assert_eq!(app.total(), 1_000_000 * CLIENTS as u128);
        let told = || self.clients.iter().flat_map(|client| &client.told);
        for Told { id, outcome, .. } in told() {
            let happened = &outcomes[id];
            assert!(happened.contains(outcome), "{outcome:?} was told, {happened:?} happened");
            let executed = happened.iter().filter(|outcome| !matches!(outcome, Outcome::Skipped(_))).count();
            assert_eq!(executed, 1, "{happened:?}");
        }
        // They were told what comes of the chain's order, reads too; it is an order that fits what clients have seen of time.
        for one in told() {
            for other in told().filter(|other| other.begun > one.ended) {
                assert!(order[&other.id] > order[&one.id], "what began after an end is ordered behind it");
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
    let bad: Vec<(usize, Vice)> = (0..faults)
        .filter(|_| !seed.is_multiple_of(4))
        .map(|at| ((at + random.below(count as u64) as usize) % count, VICES[random.below(6) as usize]))
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
