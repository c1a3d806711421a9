//! What a shard, and a connection on it, share among their tasks.

use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
    sync::Arc,
    task::{Context, Waker},
    time::{Duration, Instant},
};

use metanode_quic::Connection;
use metanode_shard::{now, spawn_local};
use metanode_store::{Leases, Store};
use metanode_types::NodeKey;
use metanode_wire::RefusalCode;

use crate::{
    access::{AccessList, Rights},
    admission::{Bound, Budget, PerBound},
    codes,
    config::Config,
    counters::ShardCounters,
    gate::Gate,
    lane::{self, STALL_TIME_MAX},
    ledger::LedgerRoute,
    outgoing::{Account, Outgoing},
    peers::{Member, Peers},
    state::NodeState,
};

/// Receive window of a connection that may write and runs no bulk upload: four whole blobs under way.
pub(crate) const RECEIVE_WINDOW_BYTES: u64 = 1 << 20;

/// Receive window of a connection that may not write, and of each one until its key is known: a thousand requests. What strangers can
/// fill by sending all but the first byte: 64 MiB for a thousand of them.
pub(crate) const READER_WINDOW_BYTES: u64 = 64 << 10;

/// Looks at connections that keep memory and don't move.
pub(crate) const STUCK_LOOK_PERIOD: Duration = Duration::from_secs(1);

/// What a connection acknowledges at least, while it has so much unacknowledged: as fast as a telephone line. A slower one would keep its part of the
/// memory that all share for minutes.
const LEAST_BYTES_PER_SECOND: u64 = 16 << 10;

/// An acknowledgement that takes longer than so many looks is late: several round trips of a slow path whose buffers are full.
const LATE_LOOKS: usize = 3;

/// How long a connection may keep memory without moving while there is little left: many round trips of any path.
const TIGHT_TIME_MAX: Duration = Duration::from_secs(3);

/// The part of a budget above which little is left.
const TIGHT_SHARE: f64 = 0.75;

/// Requests that wait for one shard's store, over all its connections: a quarter of a second's PUTs; each takes a task.
pub(crate) const REQUESTS_WAITING_MAX: u32 = 16_384;

/// Fetches that read from the disk at a time, on one shard: several times the queue depth at which a disk is saturated; each
/// holds at most one whole blob.
pub(crate) const READS_MAX: usize = 256;

/// Fetches that read from the disk or wait for it, on one shard. A disk that reads 4 KiB 40,000 times a second has them done in a tenth of
/// a second; whoever would have to wait for longer hears "busy" now.
pub(crate) const READS_WAITING_MAX: u64 = 4_096;

/// "Busy" advises to wait as long as what was admitted last has waited, within these bounds.
const READ_RETRY_AFTER: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// Chunks that are read at a time on one shard because an upload names them: a name of 60 bytes makes the node read 256 KiB, so
/// whatever many uploads name, others get their share of the disk.
const KNOWN_CHUNKS_MAX: usize = 4;

/// Listings that are made at a time on one shard: a request of 60 bytes makes every shard sort a part of its table.
const LISTINGS_MAX: usize = 2;

/// One shard as its connections see it.
pub(crate) struct Shard {
    pub(crate) store: Store,
    pub(crate) state: Arc<NodeState>,
    pub(crate) counters: Arc<ShardCounters>,
    pub(crate) limits: Limits,
    pub(crate) access: Rc<AccessList>,
    /// The way to the ledger, if the node has one.
    pub(crate) ledger: Option<Rc<LedgerRoute>>,
    pub(crate) budgets: PerBound<Budget>,
    /// Answers that clients have not acknowledged.
    pub(crate) outgoing: Outgoing,
    pub(crate) reads: Gate,
    /// How long the fetch that entered last has waited.
    pub(crate) read_wait: Cell<Duration>,
    peers: Rc<Peers>,
    /// Those that have ended are taken out at the next look.
    sessions: RefCell<Vec<Weak<Session>>>,
    /// Chunks that uploads name in place of sending them: each is read from the disk.
    pub(crate) known_chunks: Gate,
    /// Listings and status, which take a while each.
    pub(crate) listings: Gate,
    /// Requests, bulk transfers included, whose answers are not yet written.
    pub(crate) in_flight: Cell<u32>,
    /// No new requests: the node is stopping.
    pub(crate) draining: Cell<bool>,
}

/// What the configuration says about connections.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) requests_max: u32,
    pub(crate) connections_per_key_max: u32,
    pub(crate) upload_window_bytes: u64,
}

impl Shard {
    pub(crate) fn new(
        store: Store,
        state: Arc<NodeState>,
        config: &Config,
        ledger: Option<Rc<LedgerRoute>>,
    ) -> Rc<Self> {
        let counters = state.shards[store.shard().index()].clone();
        Rc::new(Self {
            store,
            state,
            counters,
            limits: Limits {
                requests_max: config.quic.requests_max,
                connections_per_key_max: match config.quic.listen.ip().is_loopback() {
                    true => u32::MAX,
                    false => config.quic.connections_per_key_max,
                },
                upload_window_bytes: config.store.upload_window_bytes,
            },
            access: AccessList::new(&config.access),
            ledger,
            budgets: PerBound::<Budget>::new(|bound| match bound {
                Bound::Uploads | Bound::Partial => config.store.uploads_bytes_max,
                Bound::Answers | Bound::Fetches => config.store.downloads_bytes_max,
                Bound::Requests => REQUESTS_WAITING_MAX.into(),
                Bound::Reads => READS_WAITING_MAX,
            }),
            outgoing: Outgoing::new(config.store.downloads_bytes_max),
            reads: Gate::new(READS_MAX),
            read_wait: Cell::default(),
            peers: Rc::default(),
            sessions: RefCell::default(),
            known_chunks: Gate::new(KNOWN_CHUNKS_MAX),
            listings: Gate::new(LISTINGS_MAX),
            in_flight: Cell::new(0),
            draining: Cell::new(false),
        })
    }

    /// Puts numbers that other threads ask for where they find them.
    pub(crate) fn publish(&self) {
        let usage = self.store.usage();
        let published = &self.counters.usage;
        published.blobs.set(usage.blobs);
        published.blob_bytes.set(usage.blob_bytes);
        published.cache_bytes.set(usage.cache_bytes);
        published.segment_bytes.set(usage.segment_bytes);
        let taken = |bound| self.budgets[bound].taken();
        self.counters.requests_waiting.set(taken(Bound::Requests));
        self.counters.upload_bytes.set(taken(Bound::Uploads) + taken(Bound::Partial));
        self.counters.download_bytes.set(taken(Bound::Answers) + taken(Bound::Fetches) + self.outgoing.bytes());
    }

    /// Closes connections that keep memory and don't move: that acknowledge less than [`LEAST_BYTES_PER_SECOND`] of what was written to them, or
    /// don't end a frame that they have begun. They have [`STALL_TIME_MAX`], and [`TIGHT_TIME_MAX`] while there is little left for others; then those who keep the most
    /// go first, until there is enough. To be called each [`STUCK_LOOK_PERIOD`].
    pub(crate) fn close_stuck(&self) {
        let taken = |bound| self.budgets[bound].taken_share();
        let fullest = taken(Bound::Answers).max(taken(Bound::Fetches)).max(taken(Bound::Partial));
        let is_tight = fullest.max(self.outgoing.taken_share()) > TIGHT_SHARE;
        let patience = if is_tight { TIGHT_TIME_MAX } else { STALL_TIME_MAX };
        let mut stuck = Vec::new();
        self.sessions.borrow_mut().retain(|session| {
            let Some(session) = session.upgrade() else { return false };
            // While there is little, nobody keeps its part for more than a minute.
            let kept = session.account.bytes();
            let least = if is_tight {
                LEAST_BYTES_PER_SECOND.max(kept / STALL_TIME_MAX.as_secs())
            } else {
                LEAST_BYTES_PER_SECOND
            };
            let behind = session.pace.borrow_mut().look(session.account.acknowledged_bytes(), kept, least);
            if STUCK_LOOK_PERIOD.mul_f64(behind) > patience || session.has_unfinished(patience) {
                stuck.push(session);
            }
            true
        });
        stuck.sort_unstable_by_key(|session| std::cmp::Reverse(session.kept_bytes()));
        // What they kept is given back later, when their tasks end: half of them are enough for now.
        let count = if is_tight { stuck.len().div_ceil(2) } else { stuck.len() };
        for session in stuck.into_iter().take(count) {
            tracing::debug!(peer = ?session.peer, kept = session.kept_bytes(), "closed: it does not move");
            session.shard.counters.stalled.increment();
            session.connection.close(codes::STALLED, b"answers were not taken, or a frame did not end");
        }
    }

    /// Milliseconds after which a fetch that finds no place should come again.
    pub(crate) fn read_retry_after_ms(&self) -> u32 {
        let (least, most) = READ_RETRY_AFTER;
        u32::try_from(self.read_wait.get().clamp(least, most).as_millis()).expect("a second at most")
    }
}

/// How a connection keeps up with acknowledging.
#[derive(Debug, Default)]
struct Pace {
    /// What was written at the latest looks, the oldest first, since the beginning.
    written: [u64; LATE_LOOKS],
    /// What was acknowledged at the last look, since the beginning.
    acknowledged: u64,
    looks_behind: f64,
}

impl Pace {
    /// How many looks it is behind. What was written [`LATE_LOOKS`] ago and is not acknowledged is late. As long as there is such a thing, a
    /// look without acknowledgements is one look behind, one with half of the least half a look; more than the least makes up
    /// for earlier ones. To be called each [`STUCK_LOOK_PERIOD`], a second.
    fn look(&mut self, acknowledged: u64, kept: u64, least: u64) -> f64 {
        let taken = acknowledged - std::mem::replace(&mut self.acknowledged, acknowledged);
        let late = self.written[0].saturating_sub(acknowledged);
        self.written.rotate_left(1);
        self.written[LATE_LOOKS - 1] = acknowledged + kept;
        self.looks_behind = match late {
            0 => 0.0,
            _ => (self.looks_behind + 1.0 - taken as f64 / least.min(late + taken) as f64).max(0.0),
        };
        self.looks_behind
    }
}

/// One connection.
pub(crate) struct Session {
    pub(crate) shard: Rc<Shard>,
    pub(crate) connection: Connection,
    pub(crate) peer: Option<NodeKey>,
    pub(crate) rights: Rights,
    /// Keep what was put without `hold` as long as the connection lives.
    pub(crate) leases: Leases,
    _member: Member,
    /// What it has of the shard's budgets.
    pub(crate) held: PerBound<Cell<u64>>,
    pub(crate) account: Account,
    unanswered: Cell<u32>,
    /// Lanes that wait until one is answered.
    waiting_for_room: RefCell<Vec<Waker>>,
    bulk_uploads: Cell<u64>,
    /// Streams with a frame of which a part has arrived, and since when.
    unfinished: RefCell<Vec<(u64, Instant)>>,
    pace: RefCell<Pace>,
}

/// Serves a connection until it ends.
pub(crate) async fn serve(shard: Rc<Shard>, connection: Connection) {
    let peer = connection.peer_key();
    let rights = shard.access.rights_of(peer);
    let leases = shard.store.leases();
    let Some(member) = shard.peers.join(peer, shard.limits.connections_per_key_max) else {
        shard.counters.refused(RefusalCode::Busy);
        return connection.close(codes::BUSY, b"this key has too many connections");
    };
    let account = shard.outgoing.account();
    shard.counters.connections_accepted.increment();
    shard.counters.connections.add(1);
    let session = Rc::new(Session {
        shard,
        connection,
        peer,
        rights,
        leases,
        _member: member,
        held: PerBound::default(),
        account,
        unanswered: Cell::new(0),
        waiting_for_room: RefCell::default(),
        bulk_uploads: Cell::new(0),
        unfinished: RefCell::default(),
        pace: RefCell::default(),
    });
    session.set_window();
    session.shard.sessions.borrow_mut().push(Rc::downgrade(&session));
    tracing::debug!(peer = ?peer, address = %session.connection.remote_address(), "connected");
    let lost = loop {
        match session.connection.accept_bi().await {
            Ok((send, recv)) => {
                spawn_local(lane::serve(session.clone(), send, recv)).detach();
            }
            Err(lost) => break lost,
        }
    };
    tracing::debug!(peer = ?peer, "disconnected: {lost}");
    session.account.end();
    session.shard.counters.connections.sub(1);
}

impl Session {
    /// Begins a request; it counts until the guard is dropped, which is when its answer was handed to QUIC.
    pub(crate) fn begin(self: &Rc<Self>) -> InFlight {
        self.unanswered.set(self.unanswered.get() + 1);
        self.shard.in_flight.set(self.shard.in_flight.get() + 1);
        InFlight(self.clone())
    }

    /// A part of a frame has arrived on this stream.
    pub(crate) fn began_frame(&self, stream: u64) {
        let mut unfinished = self.unfinished.borrow_mut();
        if !unfinished.iter().any(|(one, _)| *one == stream) {
            unfinished.push((stream, now()));
        }
    }

    /// All of it has, or the stream has ended.
    pub(crate) fn ended_frame(&self, stream: u64) {
        self.unfinished.borrow_mut().retain(|(one, _)| *one != stream);
    }

    /// Whether a frame was begun so long ago.
    fn has_unfinished(&self, age: Duration) -> bool {
        self.unfinished.borrow().iter().any(|(_, since)| now() - *since > age)
    }

    /// Bytes of memory that it keeps from others.
    fn kept_bytes(&self) -> u64 {
        let held = [Bound::Answers, Bound::Fetches, Bound::Partial].map(|bound| self.held[bound].get());
        held.iter().sum::<u64>() + self.account.bytes()
    }

    /// Whether the connection may have one more request unanswered.
    pub(crate) fn has_room(&self) -> bool {
        self.unanswered.get() < self.shard.limits.requests_max
    }

    /// Wakes the task once there may be room.
    pub(crate) fn wait_for_room(&self, cx: &Context<'_>) {
        let mut waiting = self.waiting_for_room.borrow_mut();
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
    }

    /// Gives the connection the window of one more bulk upload. Its bytes were admitted by the caller.
    pub(crate) fn widen(self: &Rc<Self>) -> WideWindow {
        self.bulk_uploads.set(self.bulk_uploads.get() + 1);
        self.set_window();
        WideWindow(self.clone())
    }

    fn set_window(&self) {
        let extra = self.bulk_uploads.get() * self.shard.limits.upload_window_bytes;
        let own = if self.rights.write { RECEIVE_WINDOW_BYTES } else { READER_WINDOW_BYTES };
        self.connection.set_receive_window(own + extra);
    }
}

/// A request that is not answered yet.
pub(crate) struct InFlight(Rc<Session>);

impl Drop for InFlight {
    fn drop(&mut self) {
        let session = &self.0;
        session.unanswered.set(session.unanswered.get() - 1);
        session.shard.in_flight.set(session.shard.in_flight.get() - 1);
        if !session.waiting_for_room.borrow().is_empty() {
            session.waiting_for_room.take().into_iter().for_each(Waker::wake);
        }
    }
}

/// The wider receive window of a bulk upload; narrowed when dropped.
pub(crate) struct WideWindow(Rc<Session>);

impl Drop for WideWindow {
    fn drop(&mut self) {
        self.0.bulk_uploads.set(self.0.bulk_uploads.get() - 1);
        self.0.set_window();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: u64 = LEAST_BYTES_PER_SECOND;

    /// The most that one is behind that writes whenever it has less than `kept` unacknowledged, and acknowledges so much at each look.
    fn behind(kept: u64, taken: impl Fn(u64) -> u64, looks: u64) -> f64 {
        let (mut pace, mut acknowledged, mut most) = (Pace::default(), 0, 0.0f64);
        for look in 0..looks {
            acknowledged += taken(look).min(kept);
            most = most.max(pace.look(acknowledged, kept, LEAST));
        }
        most
    }

    #[test]
    fn who_takes_little_falls_behind_and_who_is_slow_does_not() {
        assert_eq!(behind(8 << 20, |_| 0, 63), 60.0, "the first looks know of nothing late");
        assert!(behind(8 << 20, |_| 1, 70) > 60.0, "a byte a second is as good as nothing");
        assert_eq!(behind(8 << 20, |_| LEAST, 1000), 0.0);
        let bursts = |look| if look % 16 == 15 { 16 * LEAST } else { 0 };
        assert!(behind(8 << 20, bursts, 1000) <= 16.0, "256 KiB at once, every sixteen seconds");
        // Little at a time over a long path: what was written two seconds ago is being acknowledged.
        assert_eq!(behind(2_000, |_| 1_000, 1000), 0.0);
        // A single answer that is never acknowledged.
        assert_eq!(behind(100, |_| 0, 63), 60.0);
    }
}
