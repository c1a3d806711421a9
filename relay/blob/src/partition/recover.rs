//! Rebuilds a partition from the records of all logs.

use std::collections::BTreeMap;

use metanode_log::{
    RecordKind, Table,
    format::{Placed, RecordHead},
};
use metanode_types::{Hash, TagName};

use super::{ChunkEntry, Live, Order, Partition, RootEntry, TagEntry, Tombstone, tag_key};

/// What is known of a key before all records were seen: the newest wins, whatever log it comes from.
#[derive(Debug, Default)]
pub struct Recovery {
    chunks: Table<(Order, Placed)>,
    roots: Table<(Order, RecordHead)>,
    tags: BTreeMap<Hash, (Order, RecordHead)>,
}

impl Recovery {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a record of this partition, in any order.
    pub fn record(&mut self, head: &RecordHead, order: Order) {
        let key = head.key;
        if matches!(head.kind, RecordKind::Chunk | RecordKind::Whole)
            && self.chunks.get(&key).is_none_or(|(known, _)| *known <= order)
        {
            self.chunks.insert(key, (order, Placed { location: head.location, checksum: head.checksum }));
        }
        if matches!(head.kind, RecordKind::Root | RecordKind::Whole | RecordKind::Unroot)
            && self.roots.get(&key).is_none_or(|(known, _)| *known <= order)
        {
            self.roots.insert(key, (order, *head));
        }
        if matches!(head.kind, RecordKind::Tag | RecordKind::Untag)
            && self.tags.get(&key).is_none_or(|(known, _)| *known <= order)
        {
            self.tags.insert(key, (order, *head));
        }
    }

    /// Fills the partition. Returns the tags' records: their payloads have names and targets, to be given to
    /// [`Partition::recover_tag`].
    pub fn finish(self, partition: &mut Partition) -> Vec<RecordHead> {
        for (name, (_, placed)) in self.chunks.iter() {
            partition.lives(placed.location);
            partition.chunks.insert(*name, ChunkEntry::new(*placed));
        }
        for (hash, (order, head)) in self.roots.iter() {
            if head.kind == RecordKind::Unroot {
                partition.lives(head.location);
                partition
                    .tombstones
                    .insert(*hash, Tombstone { kind: head.kind, location: head.location, order: *order });
            } else {
                let entry = RootEntry {
                    location: head.location,
                    size_bytes: head.blob_bytes,
                    references: 0,
                    flags: head.flags,
                    damaged: false,
                };
                partition.lives_record(head.location, if entry.is_whole() { 0 } else { head.location.length });
                // Sizes are what the disk says: many false ones have a sum that no number holds.
                partition.blob_bytes = partition.blob_bytes.saturating_add(entry.size_bytes);
                partition.roots.insert(*hash, entry);
            }
        }
        let mut tags = Vec::new();
        for (key, (order, head)) in self.tags {
            if head.kind == RecordKind::Untag {
                partition.lives(head.location);
                partition.tombstones.insert(key, Tombstone { kind: head.kind, location: head.location, order });
            } else {
                tags.push(head);
            }
        }
        partition.events.clear();
        tags
    }
}

impl Partition {
    /// Restores a tag from its record's payload; returns its target, to which a reference must be taken. `None` when the
    /// payload is not a tag's: rot.
    pub fn recover_tag(&mut self, head: &RecordHead, payload: &[u8]) -> Option<Hash> {
        let (target, name) = payload.split_first_chunk::<32>()?;
        let name: TagName = std::str::from_utf8(name).ok()?.parse().ok()?;
        if tag_key(&name) != head.key {
            return None;
        }
        self.lives(head.location);
        self.tags.insert(name, TagEntry { target: Hash(*target), location: head.location });
        Some(Hash(*target))
    }

    /// Counts the references that roots of one chunk have to their content. Returns the larger roots and folders, whose
    /// content the shell must count.
    pub fn recover_roots(&mut self) -> Vec<(Hash, RootEntry)> {
        let mut others = Vec::new();
        for (hash, root) in self.roots.iter() {
            if root.is_whole()
                && let Some(chunk) = self.chunks.get_mut(hash)
            {
                chunk.references += 1;
            }
            if !root.is_whole() || root.kind() == metanode_types::BlobKind::Folder {
                others.push((*hash, *root));
            }
        }
        others
    }

    /// Counts a reference to a chunk; `false` when it is not here.
    pub fn recover_chunk_reference(&mut self, name: &Hash) -> bool {
        self.chunks.get_mut(name).map(|chunk| chunk.references += 1).is_some()
    }

    /// Counts a reference of a tag or folder to a root; `false` when it is not here, and what is stored under that name later has it.
    pub fn recover_root_reference(&mut self, hash: &Hash) -> bool {
        match self.roots.get_mut(hash) {
            Some(root) => root.references += 1,
            None => *self.lost.entry(*hash).or_default() += 1,
        }
        self.roots.get(hash).is_some()
    }

    /// Ends recovery: chunks that nobody refers to are orphans, and roots go, unless not all references are known. Returns how many
    /// orphans and roots that were.
    pub fn recover_end(&mut self, all_known: bool) -> (usize, usize) {
        if !all_known {
            return (0, 0);
        }
        let left: Vec<Hash> =
            self.chunks.iter().filter(|(_, chunk)| chunk.references == 0).map(|(name, _)| *name).collect();
        for name in &left {
            self.leave(*name);
        }
        let unused: Vec<Hash> =
            self.roots.iter().filter(|(_, r)| !r.is_held() && r.references == 0).map(|(hash, _)| *hash).collect();
        for hash in &unused {
            self.drop_if_unused(hash);
        }
        (left.len(), unused.len())
    }

    /// Segments with anything live, for a look at the whole.
    pub fn live_segments(&self) -> impl Iterator<Item = ((u16, u32), Live)> {
        self.live.iter().map(|(place, live)| (*place, *live))
    }

    /// The opening of the store that this partition writes for.
    pub fn boot(&self) -> u64 {
        self.boot
    }
}
