//! The relay store of a node: performs what the cores in `log` and `blob` decide, on `shard`.
//!
//! Each shard has a [`Store`]: its hash partition, its log, its memory cache. A request goes to the shard that owns its key by
//! itself; [`StoreShared`] is what the shards of a process have in common, and recovers all partitions before they start.
//!
//! # Paths of data
//!
//! * A PUT of at most 256 KiB travels to its owner as one message, is hashed there, joins the next commit frame, and is answered
//!   after `fdatasync` (class `durable`). One copy: from the receive buffer into the aligned buffer of the frame.
//! * A larger PUT is cut by the shard that receives it; its chunks go to their owners, eight at a time.
//! * A GET of at most 256 KiB is answered from the memory cache, else read, verified by its hash, and then cached. Chunks of larger
//!   blobs are checked by the checksum of their record, since the client checks them by the blob's tree; they are not cached, so that
//!   one large transfer can't push everything else out, and memory stays bounded.
//!
//! # Start reading
//!
//! `shard.rs` (requests and their routes), `commit.rs` (the log's shell), `open.rs` (recovery).

mod cache;
mod check;
mod checkpoint;
mod children;
mod commit;
mod compact;
mod counters;
#[cfg(feature = "decoders")]
pub mod decoders;
mod error;
mod files;
mod folder;
mod leases;
mod maintain;
mod open;
mod put;
mod read;
mod recover;
mod release;
mod request;
mod route;
mod serve;
mod shard;

pub use check::{CheckReport, check};
pub use counters::StoreCounters;
pub use error::{OpenError, StoreError};
pub use leases::Leases;
pub use maintain::Maintenance;
use metanode_types::{BlobKind, DurabilityClass, Hash, ShardCount, TagName};
pub use open::{RecoveryReport, StoreConfig, StoreShared};
pub use put::PutBulk;
pub use read::{BlobReader, Slice};
pub use request::StorePort;
pub use shard::Store;

/// Largest blob that [`Store::get`] returns and [`Store::put`] takes whole: one chunk.
pub const WHOLE_BYTES_MAX: usize = metanode_types::limits::CHUNK_BYTES;

/// Messages that may wait between two shards; a sender waits when there are more.
const MESH_CAPACITY: usize = 1024;

/// A port for each shard, in order.
pub fn mesh(count: ShardCount) -> Vec<StorePort> {
    metanode_shard::mesh::Mesh::new(count, MESH_CAPACITY).into_iter().map(StorePort).collect()
}

/// How a blob is to be stored.
#[derive(Debug, Clone)]
pub struct PutOptions {
    /// When to answer.
    pub class: DurabilityClass,
    /// What it is.
    pub kind: BlobKind,
    /// Whether it stays by itself.
    pub hold: bool,
    /// Whether the node itself needs it: only [`Store::remove_kept`] removes it.
    pub keep: bool,
    /// Where its lease goes when it is not held.
    pub leases: Option<Leases>,
}

/// Answer to a PUT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Address.
    pub hash: Hash,
    /// Bytes.
    pub size_bytes: u64,
    /// Whether it was there.
    pub existed: bool,
}

/// Answer to a GET.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fetched {
    /// All of it, verified.
    Whole(bytes::Bytes),
    /// It has more than [`WHOLE_BYTES_MAX`] bytes: use [`Store::read`].
    Large {
        /// Bytes.
        size_bytes: u64,
    },
}

impl Fetched {
    /// Bytes that it holds.
    pub fn bytes_here(&self) -> u64 {
        match self {
            Self::Whole(bytes) => bytes.len() as u64,
            Self::Large { .. } => 0,
        }
    }
}

/// What is known of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobStat {
    /// Bytes.
    pub size_bytes: u64,
    /// What it is.
    pub kind: BlobKind,
    /// What a crash leaves.
    pub class: DurabilityClass,
    /// Whether it stays by itself.
    pub held: bool,
    /// Tags and folders that refer to it.
    pub references: u32,
}

/// One line of a listing of blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobLine {
    /// Address.
    pub hash: Hash,
    /// Bytes.
    pub size_bytes: u64,
    /// What it is.
    pub kind: BlobKind,
    /// Whether it stays by itself.
    pub held: bool,
    /// Tags and folders that refer to it.
    pub references: u32,
}

/// One line of a listing of tags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagLine {
    /// Name.
    pub name: TagName,
    /// Where it points.
    pub hash: Hash,
}

/// A page of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// In order.
    pub entries: Vec<T>,
    /// Whether there is more behind the last.
    pub more: bool,
}

/// What one shard holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Blobs.
    pub blobs: u64,
    /// Bytes of their contents.
    pub blob_bytes: u64,
    /// Bytes in the memory cache.
    pub cache_bytes: u64,
    /// Segments of the logs this shard looks after.
    pub segments: u64,
    /// Bytes of their files.
    pub segment_bytes: u64,
    /// Bytes of chunks that interrupted uploads have left.
    pub orphan_bytes: u64,
}
