//! What a shard, and a connection on it, share among their tasks.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    task::{Context, Waker},
};

use metanode_quic::Connection;
use metanode_shard::spawn_local;
use metanode_store::{Leases, Store};
use metanode_types::NodeKey;

use crate::{
    access::{AccessList, Rights},
    admission::Admission,
    config::Config,
    counters::ShardCounters,
    gate::Gate,
    lane,
    state::NodeState,
};

/// Receive window of a connection that runs no bulk upload: four whole blobs under way. What thousands of idle clients could
/// fill if the node stopped reading.
pub(crate) const RECEIVE_WINDOW_BYTES: u64 = 1 << 20;

/// Requests that wait for one shard's store, over all its connections: each costs a task of about a kilobyte.
const REQUESTS_WAITING_MAX: u32 = 65_536;

/// Fetches that read from the disk at a time, on one shard: several times the queue depth at which a disk is saturated; each
/// holds at most one whole blob.
const READS_MAX: usize = 256;

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
    /// Answers that clients have not taken.
    pub(crate) downloads: Admission,
    /// Frames of which a part has arrived.
    pub(crate) partial_frames: Admission,
    pub(crate) reads: Gate,
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
                upload_window_bytes: config.store.upload_window_bytes,
            },
            access: AccessList::new(&config.access),
            uploads: Admission::new(config.store.uploads_bytes_max),
            downloads: Admission::new(config.store.downloads_bytes_max),
            partial_frames: Admission::new(config.store.uploads_bytes_max),
            reads: Gate::new(READS_MAX),
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
        self.counters.download_bytes.set(self.downloads.bytes());
    }

    /// Whether more requests may wait for the store.
    pub(crate) fn is_crowded(&self) -> bool {
        self.in_flight.get() >= REQUESTS_WAITING_MAX
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
    unanswered: Cell<u32>,
    /// Lanes that wait until one is answered.
    waiting_for_room: RefCell<Vec<Waker>>,
    bulk_uploads: Cell<u64>,
}

/// Serves a connection until it ends.
pub(crate) async fn serve(shard: Rc<Shard>, connection: Connection) {
    let peer = connection.peer_key();
    let rights = shard.access.rights_of(peer);
    let leases = shard.store.leases();
    shard.counters.connections_accepted.increment();
    shard.counters.connections.add(1);
    let session = Rc::new(Session {
        shard,
        connection,
        peer,
        rights,
        leases,
        unanswered: Cell::new(0),
        waiting_for_room: RefCell::default(),
        bulk_uploads: Cell::new(0),
    });
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
        InFlight(self.clone())
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
        self.connection.set_receive_window(RECEIVE_WINDOW_BYTES + extra);
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
