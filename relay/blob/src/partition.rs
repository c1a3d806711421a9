//! The state of one hash partition: what is stored, who refers to it, what is on its way to the log.
//!
//! A partition owns the chunks, roots and tags whose keys fall to its shard. It is a core: [`Partition::submit`] takes an
//! [`Op`] with a caller's token, [`Partition::poll`] says what the log's shell must do, and [`Partition::take_events`] returns what
//! became of the tokens.
//!
//! # Rules
//!
//! * **One change of a key at a time.** A key with a record on its way is *pending*; further operations on it wait and are then
//!   decided anew. So identical PUTs join, and the order of records of a key in the log is the order of its changes.
//! * **References are derived.** A chunk is kept by the roots that list it and by uploads in progress, for a while behind an
//!   interrupted one, a root by being held, by
//!   tags, folders and leases. Counts are not stored: recovery counts again.
//! * **A root commits after its content.** Whoever stages a root holds references to chunks that are committed.
//! * **Every dropped root leaves a tombstone,** which stays until no older segment could bring the root back.
//! * A durable operation is answered when its record is on disk; a `memory` PUT when it is staged, and is readable from then on.

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Bound,
};

use bytes::Bytes;
use metanode_log::{
    Append, Committed, Effect, Failure, Location, RecordFlags, RecordKind, SegmentIdentity, Table, Writer,
    WriterLimits,
    format::{HEAD_BYTES, Placed, Record, RecordHead},
};
use metanode_types::{BlobKind, DurabilityClass, Hash, TagName, limits::CHUNK_BYTES};
use rustc_hash::FxHashMap;

/// Identifies a caller of [`Partition::submit`].
pub type Token = u64;

/// A chunk in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkEntry {
    /// Where its bytes are.
    pub location: Location,
    /// The checksum that they have there.
    pub checksum: u32,
    /// How many roots list it, and uploads hold it.
    pub references: u32,
    /// Its bytes on disk are not what they should be: the next PUT replaces them.
    pub corrupt: bool,
    /// Whether it is among the orphans.
    pub queued: Queued,
}

impl ChunkEntry {
    /// A chunk that nobody refers to.
    fn new(Placed { location, checksum }: Placed) -> Self {
        Self { location, checksum, references: 0, corrupt: false, queued: Queued::No }
    }

    /// Drops one reference, if there is one; whether it was the last. Without one it was taken by a root that had lost the chunk.
    fn drop_reference(&mut self) -> bool {
        if matches!(self.references, 0 | u32::MAX) {
            return false;
        }
        self.references -= 1;
        self.references == 0
    }
}

/// A root in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootEntry {
    /// Where its record is; of a larger blob, the list of its extents.
    pub location: Location,
    /// Bytes of the blob.
    pub size_bytes: u64,
    /// Tags and folders that refer to it.
    pub references: u32,
    /// Held, folder.
    pub flags: RecordFlags,
    /// Its list of extents can't be read, or what it lists is not all there: the next PUT of it writes it anew.
    pub damaged: bool,
}

impl RootEntry {
    /// Whether its content is one chunk of the same name, or nothing.
    pub fn is_whole(&self) -> bool {
        self.size_bytes <= CHUNK_BYTES as u64
    }

    /// What it is.
    pub fn kind(&self) -> BlobKind {
        if self.flags.has(RecordFlags::FOLDER) { BlobKind::Folder } else { BlobKind::Blob }
    }

    /// Whether it stays by itself.
    pub fn is_held(&self) -> bool {
        self.flags.has(RecordFlags::HELD)
    }

    /// Whether the node itself needs it.
    pub fn is_kept(&self) -> bool {
        self.flags.has(RecordFlags::KEPT)
    }
}

/// A tag in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TagEntry {
    /// Where it points.
    pub target: Hash,
    location: Location,
}

/// Bytes that still count in a segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Live {
    /// Payloads and record heads.
    pub bytes: u64,
    /// Records.
    pub records: u32,
}

/// What a blob of at most one chunk, or a chunk, can be read from.
#[derive(Debug, Clone)]
pub enum Source {
    /// Memory: its record is on its way to the log.
    Bytes(Bytes),
    /// The log.
    Log(Location),
    /// Nowhere: the index has lost it, or its copy is corrupt.
    Corrupt,
}

/// Order of a record in time: number of the store's opening, number of the frame in its log.
pub type Order = (u64, u64);

#[derive(Debug)]
struct Tombstone {
    kind: RecordKind,
    location: Location,
    order: Order,
}

/// What a commit does to the index.
#[derive(Debug)]
enum Change {
    Whole(RootOptions),
    Chunk,
    Root { options: RootOptions },
    Unroot,
    Tag { name: TagName, target: Hash },
    Untag { name: TagName },
    Move { from: Location },
}

#[derive(Debug)]
struct Ticket {
    token: Option<Token>,
    change: Change,
}

/// A key with a record on its way.
#[derive(Debug, Default)]
struct Pending {
    /// Contents, for reads before the commit.
    whole: Option<(Bytes, RootOptions)>,
    chunk: Option<Bytes>,
    waiting: VecDeque<(Token, Op)>,
}

#[derive(Debug, Default)]
struct Pin {
    readers: u32,
    dead: Option<RootEntry>,
}

/// See the module.
#[derive(Debug)]
pub struct Partition {
    pub(crate) chunks: Table<ChunkEntry>,
    pub(crate) roots: Table<RootEntry>,
    pub(crate) tags: BTreeMap<TagName, TagEntry>,
    tombstones: FxHashMap<Hash, Tombstone>,
    /// References of tags and folders to roots that a start did not find: rot. They count again for who stores such a blob again.
    lost: FxHashMap<Hash, u32>,
    leases: FxHashMap<Hash, u32>,
    pins: FxHashMap<Hash, Pin>,
    pending: FxHashMap<Hash, Pending>,
    live: FxHashMap<(u16, u32), Live>,
    orphans: Orphans,
    blob_bytes: u64,
    entries_max: usize,
    boot: u64,
    writer: Writer<Ticket>,
    events: Vec<Event>,
}

/// The key of a tag's records.
pub fn tag_key(name: &TagName) -> Hash {
    Hash(*blake3::hash(name.as_str().as_bytes()).as_bytes())
}

impl Partition {
    /// An empty partition whose records go to log `identity.log`, beginning with a new segment `identity.segment`.
    pub fn new(identity: SegmentIdentity, boot: u64, limits: WriterLimits, entries_max: usize) -> Self {
        Self {
            chunks: Table::default(),
            roots: Table::default(),
            tags: BTreeMap::new(),
            tombstones: FxHashMap::default(),
            lost: FxHashMap::default(),
            leases: FxHashMap::default(),
            pins: FxHashMap::default(),
            pending: FxHashMap::default(),
            live: FxHashMap::default(),
            orphans: Orphans::default(),
            blob_bytes: 0,
            entries_max,
            boot,
            writer: Writer::new(identity, boot, 0, limits),
            events: Vec::new(),
        }
    }

    /// The next thing the log needs; call until `None` after every input.
    pub fn poll(&mut self) -> Option<Effect> {
        self.writer.poll()
    }

    /// Answer to [`Effect::Prepare`].
    pub fn prepared(&mut self, segment: u32, result: Result<(), Failure>) {
        let failed = self.writer.prepared(segment, result);
        self.fail(failed);
    }

    /// Answer to [`Effect::Commit`].
    pub fn committed(&mut self, result: Result<(), Failure>) {
        let order = (self.boot, self.writer.next_sequence() - 1); // one frame at a time: it was the last
        self.writer.committed(result).into_iter().for_each(|done| self.commit(done, order));
    }

    /// Answer to [`Effect::Revoke`].
    pub fn revoked(&mut self, result: Result<(), Failure>) {
        let failed = self.writer.revoked(result);
        self.fail(failed);
    }

    /// Number of the next frame.
    pub fn next_sequence(&self) -> u64 {
        self.writer.next_sequence()
    }

    /// The writer, for its gauges.
    pub fn log_state(&self) -> LogState {
        LogState {
            idle: self.writer.is_idle(),
            full: self.writer.is_full(),
            read_only: self.writer.is_read_only(),
            staged_bytes: self.writer.staged_bytes(),
            active_segment: self.writer.active_segment(),
        }
    }

    /// Files were deleted: a full log tries again.
    pub fn space_freed(&mut self) {
        self.writer.space_freed();
    }

    /// What happened since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }
}

/// State of a partition's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogState {
    /// Nothing staged or in flight.
    pub idle: bool,
    /// The disk was full when a segment was last needed.
    pub full: bool,
    /// It takes nothing more.
    pub read_only: bool,
    /// Bytes staged.
    pub staged_bytes: usize,
    /// Segment that frames go to.
    pub active_segment: Option<u32>,
}

mod change;
mod checkpoint;
mod commit;
mod lookup;
mod op;
mod orphans;
mod recover;
mod references;
pub use checkpoint::{Checkpoint, Coverage, MalformedCheckpoint};
pub use op::{Event, Op, OpError, Outcome, ReleasedRoot, RootOptions};
use orphans::Orphans;
pub use orphans::Queued;
pub use recover::Recovery;

#[cfg(test)]
mod tests;
