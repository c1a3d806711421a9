//! Operations on a partition, and what becomes of them.

use bytes::Bytes;
use metanode_log::{Failure, format::RecordHead};
use metanode_types::{BlobKind, DurabilityClass, Hash, TagName};

use super::{RootEntry, Token, tag_key};

/// A change.
#[derive(Debug, Clone)]
pub enum Op {
    /// A blob of at most one chunk with its bytes, whose hash the caller has checked.
    PutWhole {
        /// Address.
        hash: Hash,
        /// Contents.
        bytes: Bytes,
        /// How it is to be kept.
        options: RootOptions,
    },
    /// A chunk of a larger blob, or a page of its map; the caller gets one reference to it.
    PutChunk {
        /// BLAKE3 of the bytes, checked by the caller.
        name: Hash,
        /// Contents.
        bytes: Bytes,
    },
    /// The root of a larger blob; the caller's references to its content pass to the root unless the answer says that it
    /// existed.
    PutRoot {
        /// Address.
        hash: Hash,
        /// Bytes of the blob.
        size_bytes: u64,
        /// List of extents.
        payload: Bytes,
        /// How it is to be kept.
        options: RootOptions,
    },
    /// Remove a root that the node itself does not need.
    Remove {
        /// Address.
        hash: Hash,
    },
    /// Remove a root, whoever needs it.
    RemoveKept {
        /// Address.
        hash: Hash,
    },
    /// Wait until the key has no record on its way.
    Settle {
        /// Key.
        hash: Hash,
    },
    /// Take a reference to a root, for a folder.
    Refer {
        /// Address.
        hash: Hash,
    },
    /// Point a tag to a root of this or another partition, to which the caller holds a reference; it passes to the tag.
    TagSet {
        /// Name.
        name: TagName,
        /// Where it points.
        target: Hash,
    },
    /// Remove a tag; its reference passes to the caller.
    TagRemove {
        /// Name.
        name: TagName,
    },
    /// Copy a record out of a segment that is to be freed, if it is still what counts for its key.
    Move {
        /// As found there.
        head: RecordHead,
        /// Its payload.
        payload: Bytes,
        /// Whether a tombstone may be dropped: no older segment is left.
        droppable: bool,
    },
}

/// How a root is to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootOptions {
    /// When to answer.
    pub class: DurabilityClass,
    /// What it is.
    pub kind: BlobKind,
    /// Whether it stays by itself.
    pub hold: bool,
    /// Whether the node itself needs it: only the node removes it.
    pub keep: bool,
    /// Whether the caller takes a lease on it.
    pub lease: bool,
}

/// What became of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Of `PutWhole` and `PutRoot`.
    Stored {
        /// The root was there before: references to content stay with the caller.
        existed: bool,
        /// It was there and not as a folder: references to children pass to it now.
        became_folder: bool,
    },
    /// Of `PutChunk`, `Settle`, `Refer` and `Move`.
    Done,
    /// Of `Remove`; content is released through [`Event::Released`].
    Removed,
    /// Of `TagSet` and `TagRemove`: the reference that the tag held before, which is the caller's now.
    Untagged(Option<Hash>),
}

/// Why an operation was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpError {
    /// No such root or tag.
    NotFound,
    /// Tags, folders, or uploads refer to it.
    InUse {
        /// How many.
        references: u32,
    },
    /// The node itself needs it.
    Kept,
    /// The index has reached its cap.
    IndexFull,
    /// The log refused or failed.
    Log(Failure),
}

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// An operation ended.
    Ended(Token, Result<Outcome, OpError>),
    /// A root of more than one chunk, or a folder, is gone and nobody reads it: the shell releases its chunks, and a folder's
    /// children, whose names it reads first.
    Released(ReleasedRoot),
    /// There is no such root any more: caches must forget it.
    Unrooted(Hash),
    /// Content of segments became dead; the shell may want to compact.
    SpaceDied,
}

/// A root whose content is to be released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReleasedRoot {
    /// Address.
    pub hash: Hash,
    /// Its entry.
    pub entry: RootEntry,
}

impl Op {
    pub(super) fn key(&self) -> Hash {
        match self {
            Self::PutWhole { hash, .. }
            | Self::PutRoot { hash, .. }
            | Self::Remove { hash }
            | Self::RemoveKept { hash }
            | Self::Settle { hash }
            | Self::Refer { hash } => *hash,
            Self::PutChunk { name, .. } => *name,
            Self::TagSet { name, .. } | Self::TagRemove { name } => tag_key(name),
            Self::Move { head, .. } => head.key,
        }
    }
}
