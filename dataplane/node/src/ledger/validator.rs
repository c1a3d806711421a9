//! What the tasks of a ledger share.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use metanode_crypto::Identity;
use metanode_ibft::{Certificate, ChainId, Draft, Height, Message, Now, Record, Signature, Timer, Verifier, View};
use metanode_ledger::{Batch, Block, Genesis, system::Zip215};
use metanode_quic::Connection;
use metanode_replica::{Effect, Replica};
use metanode_shard::{Companion, Task, local::Notify, now, spawn_local, timeout, unix_ms};
use metanode_store::Store;
use metanode_types::{Hash, NodeKey};
use metanode_wal::Wal;
use metanode_wire::Refusal;
use rustc_hash::FxHashMap;

use crate::counters::LedgerCounters;

use super::{
    application::{App, Gone},
    batches, blocks,
    checks::Checks,
    files::{Addresses, Arrivals},
    links::Links,
    outcomes::{self, Outcomes},
    replay,
    results::Results,
    submit, voice,
    voting::Voting,
};

/// Bytes of batches that are kept in memory until they are executed; more are read from the store again.
const BATCHES_CACHED_BYTES_MAX: usize = 64 << 20;

/// Heights after which somebody is accused again, when the chain says nothing of it.
const ACCUSED_AGAIN: u64 = 200;

/// Times from proposal to quorum that are kept for those who ask.
const FINALITY_KEPT: usize = 8_192;

/// Pause before a node whose application has gone is asked again.
const AWAY_RETRY_MS: u32 = 500;

/// See the module.
pub(crate) struct Validator {
    pub(super) chain: ChainId,
    pub(super) genesis: Genesis,
    pub(super) identity: Identity,
    pub(super) store: Store,
    pub(super) replica: RefCell<Replica>,
    /// `None`: it only observes.
    pub(super) wal: Option<Wal>,
    /// What the sign state has of heights that are not known to be stored for good, each record with its height.
    pub(super) said: RefCell<VecDeque<(u64, Vec<u8>)>>,
    pub(super) app: App,
    /// Why there is no application now.
    away: RefCell<Option<String>>,
    pub(super) app_gone: Notify,
    /// How often it has come back.
    app_lives: Progress,
    /// Root of its state behind the last executed height.
    pub(super) app_root: Cell<Hash>,
    pub(super) checks: Checks,
    /// The ledger's folder.
    pub(super) folder: PathBuf,
    pub(super) block_list: Addresses,
    pub(super) arrivals: Arrivals,
    /// Heights from one snapshot to the next; 0: none is made.
    pub(super) snapshot_heights: u64,
    /// The state of this height is being exported.
    pub(super) exporting: Cell<Option<Height>>,
    /// A snapshot is being made.
    pub(super) snapshotting: Cell<bool>,
    /// Where snapshots are written.
    pub(super) scribe: Companion,
    /// Addresses of the blocks' blobs, by height from 1.
    pub(super) block_addresses: RefCell<Vec<Hash>>,
    pub(super) batches: RefCell<Cached>,
    pub(super) links: Links,
    /// Connections that others have opened, by their keys.
    pub(super) incoming: RefCell<ByKey<Vec<Connection>>>,
    pub(super) results: Results,
    pub(super) outcomes: Outcomes,
    /// What is done in order, see [`voice`].
    pub(super) ordered: RefCell<VecDeque<Ordered>>,
    pub(super) ordered_came: Notify,
    pub(super) to_store: RefCell<VecDeque<(Block, Certificate)>>,
    pub(super) to_store_came: Notify,
    pub(super) stored: Progress,
    pub(super) to_execute: RefCell<VecDeque<Block>>,
    pub(super) to_execute_came: Notify,
    /// Final heights.
    pub(super) decided: Progress,
    pub(super) executed: Progress,
    /// Batches of this validator: each makes room for more transactions.
    pub(super) batches_made: Progress,
    timers: RefCell<[Option<(Timer, Instant)>; 3]>,
    timers_changed: Notify,
    /// Whom to ask for the next blocks, and up to which height there are some.
    pub(super) behind: Cell<Option<(Option<NodeKey>, Height)>>,
    pub(super) behind_came: Notify,
    began: Instant,
    pub(super) voting: Voting,
    /// Why the ledger does not go on.
    pub(super) failed: RefCell<Option<String>>,
    /// The latest times from proposal to quorum of commits, of this node's proposals.
    pub(super) finality: RefCell<VecDeque<Duration>>,
    pub(super) counters: Arc<LedgerCounters>,
    proposed: Cell<Option<(View, Instant)>>,
    /// It was said that there is no quorum.
    said_no_quorum: Cell<bool>,
    /// Who was accused, and at which height.
    accused: RefCell<ByKey<Height>>,
    pub(super) tasks: RefCell<Vec<Task<()>>>,
}

/// Effects whose order counts.
#[derive(Debug)]
pub(super) enum Ordered {
    Persist(Record<Block>),
    Cast(Draft<Block>),
    Send { to: Option<NodeKey>, message: Message<Block> },
    Help { to: NodeKey, height: Height },
    Store { block: Block, certificate: Certificate },
    Execute(Block),
}

/// A height that only grows, and those who wait for it.
#[derive(Debug, Default)]
pub(super) struct Progress {
    height: Cell<u64>,
    waiting: RefCell<BTreeMap<u64, Waker>>,
    next_ticket: Cell<u64>,
}

impl Progress {
    pub(super) fn new(height: Height) -> Self {
        Self { height: Cell::new(height.0), ..Self::default() }
    }

    pub(super) fn get(&self) -> Height {
        Height(self.height.get())
    }

    pub(super) fn set(&self, height: Height) {
        if height.0 > self.height.get() {
            self.height.set(height.0);
            self.waiting.take().into_values().for_each(Waker::wake);
        }
    }

    /// Waits until it is there.
    pub(super) fn reach(&self, height: Height) -> Reach<'_> {
        Reach { progress: self, height, ticket: None }
    }
}

/// See [`Progress::reach`].
pub(super) struct Reach<'a> {
    progress: &'a Progress,
    height: Height,
    ticket: Option<u64>,
}

impl Future for Reach<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let progress = self.progress;
        if progress.height.get() >= self.height.0 {
            return Poll::Ready(());
        }
        let ticket = *self.ticket.get_or_insert_with(|| {
            let ticket = progress.next_ticket.get();
            progress.next_ticket.set(ticket + 1);
            ticket
        });
        progress.waiting.borrow_mut().insert(ticket, cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Reach<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.progress.waiting.borrow_mut().remove(&ticket);
        }
    }
}

/// Batches in memory.
#[derive(Debug, Default)]
pub(super) struct Cached {
    batches: FxHashMap<Hash, Batch>,
    bytes: usize,
}

impl Cached {
    pub(super) fn insert(&mut self, batch: &Batch) {
        let bytes = batch.bytes().len();
        if self.bytes + bytes <= BATCHES_CACHED_BYTES_MAX
            && self.batches.insert(batch.digest(), batch.clone()).is_none()
        {
            self.bytes += bytes;
        }
    }

    pub(super) fn get(&self, digest: &Hash) -> Option<&Batch> {
        self.batches.get(digest)
    }

    pub(super) fn remove(&mut self, digest: &Hash) {
        if let Some(batch) = self.batches.remove(digest) {
            self.bytes -= batch.bytes().len();
        }
    }
}

/// What a validator is made of.
pub(super) struct Parts {
    pub(super) genesis: Genesis,
    pub(super) identity: Identity,
    pub(super) store: Store,
    pub(super) replica: Replica,
    pub(super) wal: Option<Wal>,
    pub(super) said: VecDeque<(u64, Vec<u8>)>,
    pub(super) app: App,
    pub(super) root: Hash,
    pub(super) checks: Checks,
    pub(super) block_list: Addresses,
    pub(super) arrivals: Arrivals,
    pub(super) block_addresses: Vec<Hash>,
    pub(super) links: Links,
    pub(super) results: Results,
    pub(super) outcomes: Outcomes,
    pub(super) folder: PathBuf,
    pub(super) snapshot_heights: u64,
    pub(super) scribe: Companion,
    pub(super) voting: Voting,
    pub(super) began: Instant,
    pub(super) counters: Arc<LedgerCounters>,
}

impl Validator {
    pub(super) fn new(parts: Parts) -> Rc<Self> {
        let stored = Height(parts.block_addresses.len() as u64);
        let tip = parts.replica.chain().tip().height;
        Rc::new(Self {
            chain: *parts.replica.chain().id(),
            genesis: parts.genesis,
            identity: parts.identity,
            store: parts.store,
            replica: RefCell::new(parts.replica),
            wal: parts.wal,
            said: RefCell::new(parts.said),
            app: parts.app,
            away: RefCell::default(),
            app_gone: Notify::default(),
            app_lives: Progress::default(),
            app_root: Cell::new(parts.root),
            checks: parts.checks,
            folder: parts.folder,
            block_list: parts.block_list,
            arrivals: parts.arrivals,
            snapshot_heights: parts.snapshot_heights,
            exporting: Cell::default(),
            snapshotting: Cell::default(),
            scribe: parts.scribe,
            block_addresses: RefCell::new(parts.block_addresses),
            batches: RefCell::default(),
            links: parts.links,
            incoming: RefCell::default(),
            results: parts.results,
            outcomes: parts.outcomes,
            ordered: RefCell::default(),
            ordered_came: Notify::default(),
            to_store: RefCell::default(),
            to_store_came: Notify::default(),
            stored: Progress::new(stored),
            to_execute: RefCell::default(),
            to_execute_came: Notify::default(),
            decided: Progress::new(tip),
            executed: Progress::new(tip),
            batches_made: Progress::default(),
            timers: RefCell::default(),
            timers_changed: Notify::default(),
            behind: Cell::default(),
            behind_came: Notify::default(),
            began: parts.began,
            voting: parts.voting,
            failed: RefCell::default(),
            finality: RefCell::default(),
            counters: parts.counters,
            proposed: Cell::default(),
            said_no_quorum: Cell::default(),
            accused: RefCell::default(),
            tasks: RefCell::default(),
        })
    }

    /// Starts what goes on as long as the node does.
    pub(super) fn run(self: &Rc<Self>) {
        let mut tasks = self.tasks.borrow_mut();
        tasks.push(spawn_local(voice::run(self.clone())));
        tasks.push(spawn_local(blocks::store(self.clone())));
        tasks.push(spawn_local(blocks::execute(self.clone())));
        tasks.push(spawn_local(blocks::catch_up(self.clone())));
        tasks.push(spawn_local(keep_time(self.clone())));
        tasks.push(spawn_local(outcomes::run(self.clone())));
        tasks.push(spawn_local(outcomes::merge(self.clone())));
        tasks.push(spawn_local(replay::revive(self.clone())));
        drop(tasks);
        self.publish_role();
        self.act(|_, _| ()); // what it begins with
    }

    /// The time, as the protocol has it.
    pub(super) fn now(&self) -> Now {
        clock(self.began)
    }

    pub(super) fn me(&self) -> NodeKey {
        self.identity.public()
    }

    /// Gives the replica an input; what follows from it is begun.
    pub(super) fn act<R>(self: &Rc<Self>, work: impl FnOnce(&mut Replica, Now) -> R) -> R {
        let mut replica = self.replica.borrow_mut();
        let result = work(&mut replica, self.now());
        // A task begins when it is spawned, and may act at once: after all that comes before it.
        let mut tasks: Vec<Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        while let Some(effect) = replica.poll() {
            tasks.extend(self.perform(effect, &replica));
        }
        let tip = replica.chain().tip().height;
        self.publish(&replica);
        drop(replica);
        self.decided.set(tip);
        if self.voting.begins(tip) {
            tracing::info!(height = tip.0, "from now on this node votes, if its key is a validator's");
            tasks.push(Box::pin(may_vote(self.clone(), true)));
        }
        tasks.into_iter().for_each(|task| spawn_local(task).detach_quietly());
        result
    }

    /// Somebody to whom this node has connected says how far the chain is there.
    pub(super) fn welcomed(self: &Rc<Self>, key: NodeKey, height: Height) {
        if height > self.decided.get() && self.behind.get().is_none_or(|(_, known)| known < height) {
            self.behind.set(Some((Some(key), height)));
            self.behind_came.notify();
        }
        let (votes, needed) = {
            let replica = self.replica.borrow();
            let set = replica.chain().system().validators(replica.chain().tip().height.next());
            (set.contains(&key), set.faults() + 1)
        };
        if votes {
            self.voting.heard(key, height, needed);
            self.act(|_, _| ()); // it may vote now
        }
    }

    /// Does what can be done at once, and queues what has an order; the rest is a task.
    fn perform(self: &Rc<Self>, effect: Effect, replica: &Replica) -> Option<Pin<Box<dyn Future<Output = ()>>>> {
        let mut then = None;
        let ordered = match effect {
            Effect::Persist(record) => Ordered::Persist(record),
            Effect::Cast(draft) => {
                if let Draft::Proposal { payload, .. } = &draft {
                    self.proposed.set(Some((payload.view, now())));
                }
                Ordered::Cast(draft)
            }
            Effect::Send { to, message } => Ordered::Send { to, message },
            Effect::Help { to, height } => Ordered::Help { to, height },
            Effect::Store { block, certificate } => {
                self.note_finality(&certificate);
                if self.wal.is_some() && self.voting.has_forgotten(&self.me(), &certificate) {
                    tracing::error!("this node says nothing more: {}", self.voting.why_not().unwrap_or_default());
                    then = Some(Box::pin(may_vote(self.clone(), false)) as Pin<Box<dyn Future<Output = ()>>>);
                }
                Ordered::Store { block, certificate }
            }
            Effect::Execute(block) => Ordered::Execute(block),
            Effect::SetTimer { timer, after } => {
                let kind = match timer {
                    Timer::Round(_) => 0,
                    Timer::Resend(_) => 1,
                    Timer::Empty(_) => 2,
                };
                self.timers.borrow_mut()[kind] = Some((timer, now() + after));
                self.timers_changed.notify();
                return None;
            }
            Effect::MakeBatch(draft) => {
                self.batches_made.set(self.batches_made.get().next());
                return Some(Box::pin(batches::make(self.clone(), draft)));
            }
            Effect::FetchBatch { digest, from } => return Some(Box::pin(batches::fetch(self.clone(), digest, from))),
            Effect::CatchUp { from, height } => {
                self.behind.set(Some((from, height)));
                self.behind_came.notify();
                return None;
            }
            Effect::Accuse(evidence) => {
                let (signer, view) = evidence.of();
                let tip = replica.chain().tip().height;
                let is_known = replica.chain().system().guilty().any(|(key, _)| *key == signer);
                let mut accused = self.accused.borrow_mut();
                // Once; and again when that has led to nothing.
                if is_known || accused.get(&signer).is_some_and(|at| tip.0 < at.0 + ACCUSED_AGAIN) {
                    return None;
                }
                accused.insert(signer, tip);
                tracing::warn!(%signer, height = view.height.0, round = view.round.0, "signed two things that exclude each other");
                let expiry = Height(replica.chain().tip().height.0 + self.genesis.expiry_heights_max.min(100));
                return Some(Box::pin(submit::accuse(self.clone(), evidence, expiry)));
            }
            Effect::Forget(digests) => return Some(Box::pin(batches::forget(self.clone(), digests))),
            Effect::Refused { signer, refusal } => {
                self.counters.refused.increment();
                tracing::trace!(?signer, ?refusal, "a message counts for nothing");
                return None;
            }
            Effect::Halt(certificate) => {
                let height = certificate.view.height.0;
                self.fail(format!("a quorum has decided for a block of height {height} that is invalid here"));
                return None;
            }
        };
        self.ordered.borrow_mut().push_back(ordered);
        self.ordered_came.notify();
        then
    }

    /// Puts numbers that other threads ask for where they find them.
    fn publish(&self, replica: &Replica) {
        let (counters, chain) = (&self.counters, replica.chain());
        counters.height.set(chain.tip().height.0);
        counters.executed.set(chain.executed_height().0);
        counters.round.set(replica.view().map_or(0, |view| view.round.0.into()));
        counters.waiting.set(replica.waiting().count() as u64);
        counters.waiting_bytes.set(replica.waiting().bytes() as u64);
        counters.batches.set(replica.board().open_count() as u64);
        let no_quorum = replica.no_quorum();
        counters.quorum_lacks.set(no_quorum.map_or(0, |lack| lack.quorum.saturating_sub(lack.heard) as u64));
        if no_quorum.is_none() && self.said_no_quorum.take() {
            tracing::info!(height = chain.tip().height.0, "a quorum of validators is there again");
        }
    }

    /// Says once that nothing is decided, when asking again was of no use either.
    fn say_no_quorum(&self) {
        let why = no_quorum(&self.replica.borrow());
        if let Some(why) = why
            && !self.said_no_quorum.replace(true)
        {
            tracing::warn!("no block comes: {why}");
        }
    }

    /// Whether it votes, for other threads.
    pub(super) fn publish_role(&self) {
        let replica = self.replica.borrow();
        let next = replica.chain().tip().height.next();
        let is_validator = replica.chain().system().validators(next).contains(&self.me());
        let votes = is_validator && self.is_sound() && self.silence().is_none();
        self.counters.votes.set(votes.into());
    }

    fn note_finality(&self, certificate: &Certificate) {
        if let Some((view, since)) = self.proposed.get()
            && view == certificate.view
        {
            let time = now() - since;
            self.counters.finality.record(time);
            let mut kept = self.finality.borrow_mut();
            if kept.len() == FINALITY_KEPT {
                kept.pop_front();
            }
            kept.push_back(time);
        }
    }

    /// There is no application: nothing is executed until it is back.
    pub(super) fn lost_app(&self, gone: &Gone) {
        if self.away.borrow().as_ref() != Some(&gone.0) {
            tracing::warn!("the ledger waits for its application: {}", gone.0);
        }
        *self.away.borrow_mut() = Some(gone.0.clone());
        self.counters.votes.set(0);
        self.app_gone.notify();
    }

    pub(super) fn app_is_away(&self) -> bool {
        self.away.borrow().is_some()
    }

    /// It is where it should be.
    pub(super) fn app_is_back(&self) {
        tracing::info!("the application is back");
        *self.away.borrow_mut() = None;
        self.app_lives.set(self.app_lives.get().next());
        self.publish_role();
    }

    /// Waits until there is one.
    pub(super) async fn app_is_here(&self) {
        while self.app_is_away() {
            self.app_lives.reach(self.app_lives.get().next()).await;
        }
    }

    /// The application, if there is one now.
    pub(super) fn app(&self) -> Result<&App, Refusal> {
        match &*self.away.borrow() {
            None => Ok(&self.app),
            Some(why) => Err(away(why)),
        }
    }

    /// Why this node says nothing although it could.
    pub(super) fn silence(&self) -> Option<String> {
        let waits = |why: &String| format!("it waits for its application: {why}");
        self.voting.why_not().or_else(|| self.away.borrow().as_ref().map(waits))
    }

    /// The ledger does not go on. The node does: it stores and fetches.
    pub(super) fn fail(&self, why: String) {
        tracing::error!("the ledger of this node has stopped: {why}");
        self.failed.borrow_mut().get_or_insert(why);
        self.counters.votes.set(0);
    }

    /// Whether it goes on.
    pub(super) fn is_sound(&self) -> bool {
        self.failed.borrow().is_none()
    }

    /// Connects to those who vote or soon will, as far as it knows how.
    pub(super) fn reach_validators(&self) {
        let (latest, now) = {
            let replica = self.replica.borrow();
            let (system, next) = (replica.chain().system(), replica.chain().tip().height.next());
            (system.latest().clone(), system.validators(next).clone())
        };
        self.links.reach(&latest);
        self.links.leave(|key| latest.contains(key) || now.contains(key));
    }

    /// A message to one validator, or to all others.
    pub(super) fn send(&self, to: Option<NodeKey>, message: &Message<Block>) {
        let bytes = Bytes::from(metanode_codec::encode_message(message));
        self.links.send(to, &bytes);
    }

    /// Ends what goes on.
    pub(crate) fn stop(&self) {
        self.app.end();
        self.outcomes.stop();
        self.tasks.take();
        self.links.stop();
    }
}

/// Tells the replica whether this node votes.
async fn may_vote(this: Rc<Validator>, may: bool) {
    this.act(|replica, now| replica.may_vote(now, may));
    this.publish_role();
}

/// Why nothing is decided, for a person, when it is for want of validators that take part.
pub(super) fn no_quorum(replica: &Replica) -> Option<String> {
    let lack = replica.no_quorum()?;
    let round = replica.view()?.round.0;
    Some(format!("no quorum: {} validators are heard of in round {round}, {} are needed", lack.heard, lack.quorum))
}

/// What is said while there is no application.
pub(super) fn away(why: &str) -> Refusal {
    Refusal { detail: format!("the ledger waits for its application: {why}"), ..Refusal::busy(AWAY_RETRY_MS) }
}

/// The chain's verifier, which counts.
#[derive(Debug, Default)]
pub(super) struct Counting(pub(super) Arc<LedgerCounters>);

impl Verifier for Counting {
    fn verify(&self, signer: &NodeKey, domain: &str, message: &[u8], signature: &Signature) -> bool {
        self.0.signatures.increment();
        Zip215.verify(signer, domain, message, signature)
    }
}

/// The time, as the protocol has it, counted from `began`.
pub(super) fn clock(began: Instant) -> Now {
    Now { monotonic: now() - began, unix_ms: unix_ms() }
}

/// Tells the replica when a timer has run out.
async fn keep_time(this: Rc<Validator>) {
    loop {
        let next = this.timers.borrow().iter().flatten().map(|(_, at)| *at).min();
        match next {
            None => this.timers_changed.wait().await,
            Some(at) => {
                let left = at.saturating_duration_since(now());
                if !left.is_zero() && timeout(left, this.timers_changed.wait()).await.is_ok() {
                    continue; // there may be an earlier one
                }
            }
        }
        let due: Vec<Timer> = {
            let (mut timers, now) = (this.timers.borrow_mut(), now());
            timers.iter_mut().filter_map(|slot| slot.take_if(|(_, at)| *at <= now)).map(|(timer, _)| timer).collect()
        };
        for timer in due {
            // One that was set for a round that is over means nothing.
            if matches!(timer, Timer::Round(view) if this.replica.borrow().view() == Some(view)) {
                this.counters.timeouts.increment();
            }
            this.act(|replica, now| replica.timeout(now, timer));
            if matches!(timer, Timer::Resend(_)) {
                this.say_no_quorum();
            }
        }
    }
}

/// Lets a task run to its end.
pub(super) trait Detach {
    fn detach_quietly(self);
}

impl Detach for Task<()> {
    fn detach_quietly(self) {
        drop(self.detach());
    }
}

/// What each validator of a set is asked for.
pub(super) type ByKey<T> = BTreeMap<NodeKey, T>;
