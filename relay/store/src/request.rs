//! What shards ask of each other.

use bytes::Bytes;
use metanode_blob::partition::{Live, Op, OpError, Outcome, RootEntry};
use metanode_log::format::RecordHead;
use metanode_shard::mesh::MeshPort;
use metanode_types::{Hash, ShardId, TagName};

use crate::{BlobLine, BlobStat, Fetched, StoreError, TagLine, serve::Check};

/// One shard's end of the mesh between stores.
pub struct StorePort(pub(crate) MeshPort<Packet>);

impl std::fmt::Debug for StorePort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "StorePort({})", self.0.shard())
    }
}

/// What travels.
#[derive(Debug)]
pub(crate) enum Packet {
    /// To be answered under the same number.
    Request(u64, Request),
    /// Answer.
    Reply(u64, Reply),
    /// Not answered.
    Notice(Notice),
}

/// To the owner of a key.
#[derive(Debug)]
pub(crate) enum Request {
    /// Change something; `bool`: check the hash of its bytes first.
    Op(Op),
    /// Fetch a blob of at most a chunk.
    Get(Hash),
    /// Fetch a chunk.
    Chunk(Hash, Check),
    /// Take a pin on a root, and its record's payload.
    Pin(Hash),
    /// What is known of a blob.
    Stat(Hash),
    /// Where a tag points.
    Tag(TagName),
    /// Roots behind an address.
    Blobs(Option<Hash>, usize),
    /// Tags behind a name.
    Tags(Option<TagName>, usize),
    /// Take a reference to each of these roots, or to none: then the first that is missing.
    Refer(Vec<Hash>),
    /// Drop a reference to this root, and say when it is done.
    Release(Hash),
    /// Which of these chunks are here.
    Have(Vec<Hash>),
    /// What of these segments still counts.
    Live(Vec<(u16, u32)>),
    /// Move what still counts of these records; answered when it is durable.
    Move(Vec<(RecordHead, Bytes, bool)>),
}

/// Answers, in the same order as the requests.
#[derive(Debug)]
pub(crate) enum Reply {
    Op(Result<Outcome, OpError>),
    Get(Result<Fetched, StoreError>),
    Chunk(Result<Bytes, StoreError>),
    Pin(Result<(RootEntry, Bytes), StoreError>),
    Stat(Result<BlobStat, StoreError>),
    Tag(Result<Hash, StoreError>),
    Blobs(Vec<BlobLine>),
    Tags(Vec<TagLine>),
    Refer(Result<(), Hash>),
    Released,
    Have(Vec<bool>),
    Live(Vec<Live>),
    Move(Result<(), StoreError>),
}

/// To the owner of keys; order between two of them does not matter.
#[derive(Debug)]
pub(crate) enum Notice {
    /// End a pin.
    Unpin(Hash),
    /// Drop a reference to each of these chunks.
    ReleaseChunks(Vec<Hash>),
    /// Drop an upload's reference to each of these chunks, and keep them for a while.
    AbandonChunks(Vec<Hash>),
    /// A disk is full: let go of what interrupted uploads have left.
    DropOrphans,
    /// Drop a reference to each of these roots.
    ReleaseRoots(Vec<Hash>),
    /// Drop a lease of each of these roots.
    ReleaseLeases(Vec<Hash>),
    /// The map of this blob can't be read.
    Damaged(Hash),
    /// This segment is being deleted.
    Forget(u16, u32),
    /// Space was freed: a full log tries again.
    SpaceFreed,
}

/// Groups keys by owner.
pub(crate) fn by_owner(keys: Vec<Hash>, shards: metanode_types::ShardCount) -> Vec<(ShardId, Vec<Hash>)> {
    let mut groups: Vec<(ShardId, Vec<Hash>)> = shards.iter().map(|shard| (shard, Vec::new())).collect();
    for key in keys {
        groups[ShardId::owner_of(&key, shards).index()].1.push(key);
    }
    groups.retain(|(_, keys)| !keys.is_empty());
    groups
}
