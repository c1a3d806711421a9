//! What a shard, and a connection on it, share among their tasks.

use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
    sync::Arc,
    task::{Context, Waker},
    time::Duration,
};

use metanode_quic::Connection;
use metanode_shard::spawn_local;
use metanode_store::{Leases, Store};
use metanode_types::NodeKey;
use metanode_wire::RefusalCode;

use crate::{
    access::{AccessList, Rights},
    admission::{Admission, Permit},
    codes,
    config::Config,
    counters::ShardCounters,
    gate::Gate,
    lane::{self, STALL_TIME_MAX},
    outgoing::{Account, Outgoing},
    peers::{Member, Peers, Share},
    state::NodeState,
};

/// Receive window of a connection that may write and runs no bulk upload: four whole blobs under way.
pub(crate) const RECEIVE_WINDOW_BYTES: u64 = 1 << 20;

/// Receive window of a connection that may not write, and of each one until its key is known: a thousand requests. What strangers can
/// fill by sending all but the first byte: 64 MiB for a thousand of them.
pub(crate) const READER_WINDOW_BYTES: u64 = 64 << 10;

/// Looks at connections that don't acknowledge what was written to them.
pub(crate) const STUCK_LOOK_PERIOD: Duration = Duration::from_secs(5);

/// Requests that wait for one shard's store, over all its connections: a quarter of a second's PUTs; each takes a task.
pub(crate) const REQUESTS_WAITING_MAX: u32 = 16_384;

/// Fetches that read from the disk at a time, on one shard: several times the queue depth at which a disk is saturated; each
/// holds at most one whole blob.
pub(crate) const READS_MAX: usize = 256;

/// Fetches that read from the disk or wait for it, on one shard. A disk that reads 4 KiB 40,000 times a second has them done in a tenth of
/// a second; whoever would have to wait for longer hears "busy" now.
pub(crate) const READS_WAITING_MAX: u64 = 4_096;

/// The part of a shard's waiting places that the connections of one key may have: half, so that one key alone never fills them.
const KEY_SHARE: u32 = 2;

/// "Busy" advises to wait as long as what was admitted last has waited, within these bounds.
const READ_RETRY_AFTER: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// Chunks that are read at a time on one shard because an upload names them: a name of 60 bytes makes the node read 256 KiB, so
/// whatever many uploads name, others get their share of the disk.
const KNOWN_CHUNKS_MAX: usize = 4;

/// One shard as its connections see it.
pub(crate) struct Shard {
    pub(crate) store: Store,
    pub(crate) state: Arc<NodeState>,
    pub(crate) counters: Arc<ShardCounters>,
    pub(crate) limits: Limits,
    pub(crate) access: Rc<AccessList>,
    /// Bodies of uploads and windows of bulk uploads.
    pub(crate) uploads: Admission,
    /// Answers that were read from the disk and are not yet written to their streams.
    pub(crate) downloads: Admission,
    /// What bulk fetches read ahead.
    pub(crate) fetches: Admission,
    /// Answers that clients have not acknowledged.
    outgoing: Outgoing,
    /// Frames of which a part has arrived.
    pub(crate) partial_frames: Admission,
    pub(crate) reads: Gate,
    /// Fetches that have a place at that gate, or wait for one.
    reads_waiting: Admission,
    /// How long the fetch that entered last has waited.
    pub(crate) read_wait: Cell<Duration>,
    peers: Rc<Peers>,
    /// Those that have ended are taken out at the next look.
    sessions: RefCell<Vec<Weak<Session>>>,
    /// Chunks that uploads name in place of sending them: each is read from the disk.
    pub(crate) known_chunks: Gate,
    /// Requests, bulk transfers included, that are not yet answered.
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
    pub(crate) fn new(store: Store, state: Arc<NodeState>, config: &Config) -> Rc<Self> {
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
            uploads: Admission::new(config.store.uploads_bytes_max),
            downloads: Admission::new(config.store.downloads_bytes_max),
            fetches: Admission::new(config.store.downloads_bytes_max),
            outgoing: Outgoing::new(config.store.downloads_bytes_max),
            partial_frames: Admission::new(config.store.uploads_bytes_max),
            reads: Gate::new(READS_MAX),
            reads_waiting: Admission::new(READS_WAITING_MAX),
            read_wait: Cell::default(),
            peers: Rc::default(),
            sessions: RefCell::default(),
            known_chunks: Gate::new(KNOWN_CHUNKS_MAX),
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
        self.counters.requests_waiting.set(u64::from(self.in_flight.get()));
        self.counters.upload_bytes.set(self.uploads.bytes() + self.partial_frames.bytes());
        self.counters.download_bytes.set(self.downloads.bytes() + self.fetches.bytes() + self.outgoing.bytes());
    }

    /// Closes connections that have acknowledged nothing for [`STALL_TIME_MAX`] of what was written to them: what they leave in memory
    /// would stay as long as they keep the connection alive. To be called each [`STUCK_LOOK_PERIOD`].
    pub(crate) fn close_stuck(&self) {
        let mut stuck = Vec::new();
        self.sessions.borrow_mut().retain(|session| {
            let Some(session) = session.upgrade() else { return false };
            let looks = if session.account.is_stuck() { session.stuck_looks.get() + 1 } else { 0 };
            session.stuck_looks.set(looks);
            if STUCK_LOOK_PERIOD * looks > STALL_TIME_MAX {
                stuck.push(session);
            }
            true
        });
        for session in stuck {
            session.connection.close(codes::STALLED, b"answers were not acknowledged");
        }
    }

    /// Milliseconds after which a fetch that finds no place should come again.
    pub(crate) fn read_retry_after_ms(&self) -> u32 {
        let (least, most) = READ_RETRY_AFTER;
        u32::try_from(self.read_wait.get().clamp(least, most).as_millis()).expect("a second at most")
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
    member: Member,
    pub(crate) account: Account,
    unanswered: Cell<u32>,
    /// Lanes that wait until one is answered.
    waiting_for_room: RefCell<Vec<Waker>>,
    bulk_uploads: Cell<u64>,
    /// Looks in a row that found it stuck.
    stuck_looks: Cell<u32>,
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
        member,
        account,
        unanswered: Cell::new(0),
        waiting_for_room: RefCell::default(),
        bulk_uploads: Cell::new(0),
        stuck_looks: Cell::new(0),
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
    session.shard.counters.connections.sub(1);
}

impl Session {
    /// Begins a request; it counts until the guard is dropped, which is when its answer was handed to QUIC.
    pub(crate) fn begin(self: &Rc<Self>) -> InFlight {
        self.unanswered.set(self.unanswered.get() + 1);
        self.shard.in_flight.set(self.shard.in_flight.get() + 1);
        let share = self.share();
        share.requests.set(share.requests.get() + 1);
        InFlight(self.clone())
    }

    /// What the connections of this one's key have.
    fn share(&self) -> &Share {
        &self.member.share
    }

    /// Whether no more requests may wait for the store, of anybody or of this key.
    pub(crate) fn is_crowded(&self) -> bool {
        self.shard.in_flight.get() >= REQUESTS_WAITING_MAX
            || self.share().requests.get() >= REQUESTS_WAITING_MAX / KEY_SHARE
    }

    /// A place among the fetches that read from the disk, or the milliseconds to wait.
    pub(crate) fn admit_read(self: &Rc<Self>) -> Result<ReadPlace, u32> {
        let reads = &self.share().reads;
        let refused = |_| self.shard.read_retry_after_ms();
        if u64::from(reads.get()) >= READS_WAITING_MAX / u64::from(KEY_SHARE) {
            return Err(refused(0));
        }
        let permit = self.shard.reads_waiting.admit(1).map_err(refused)?;
        reads.set(reads.get() + 1);
        Ok(ReadPlace { session: self.clone(), _permit: permit })
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
        let share = session.share();
        share.requests.set(share.requests.get() - 1);
        if !session.waiting_for_room.borrow().is_empty() {
            session.waiting_for_room.take().into_iter().for_each(Waker::wake);
        }
    }
}

/// A fetch that reads from the disk, or waits for it.
pub(crate) struct ReadPlace {
    session: Rc<Session>,
    _permit: Permit,
}

impl Drop for ReadPlace {
    fn drop(&mut self) {
        let reads = &self.session.share().reads;
        reads.set(reads.get() - 1);
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
