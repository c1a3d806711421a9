//! Chunks that an interrupted upload has left behind.
//!
//! Nobody refers to an orphan. It is kept for a while all the same, so that the upload can go on where it stopped: an upload that
//! brings the chunk again, or only its name, takes a reference to the copy that is here. A start finds the chunks that nobody
//! refers to, whatever left them, and treats them the same.
//!
//! Orphans go when they have been left alone through a whole turn ([`Partition::age_orphans`]), the oldest first when they have more
//! bytes than they may, and all of them when room is needed. A chunk stands in the queue once, however often it is taken up and left.

use std::collections::VecDeque;

use super::*;

/// Bytes of orphans in one partition: half of a blob of 8 GiB that was interrupted at its end, on each of four shards.
const ORPHAN_BYTES_MAX: u64 = 2 << 30;

/// In the order in which they were left.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    queue: VecDeque<Hash>,
    /// Entries from the front that have been there for a turn.
    old: usize,
    /// Of chunks without references that recovery or an upload has left.
    bytes: u64,
}

impl Orphans {
    /// A chunk without references has got one.
    pub(super) fn adopted(&mut self, chunk: &ChunkEntry) {
        self.bytes = self.bytes.saturating_sub(chunk.location.length.into());
    }
}

/// Whether a chunk waits in the queue of orphans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Queued {
    /// It does not.
    #[default]
    No,
    /// It does; it may have references again.
    Yes,
    /// It does, and was left again since it got there: it starts its turn anew.
    Again,
}

impl Partition {
    /// Takes references to a chunk that is here. A count that has reached the largest number stays there, and the chunk with it.
    pub(super) fn take_chunk(&mut self, name: &Hash, references: u32) {
        if let Some(chunk) = self.chunks.get_mut(name) {
            if chunk.references == 0 && references > 0 {
                self.orphans.adopted(chunk);
            }
            chunk.references = chunk.references.saturating_add(references);
        }
    }

    /// Drops one reference to a chunk that an upload has left; at the last it is an orphan.
    pub fn abandon_chunk(&mut self, name: &Hash) {
        if let Some(chunk) = self.chunks.get_mut(name)
            && chunk.drop_reference()
        {
            self.leave(*name);
        }
    }

    /// A chunk that is here has no references.
    pub(super) fn leave(&mut self, name: Hash) {
        if let Some(chunk) = self.chunks.get_mut(&name) {
            self.orphans.bytes += u64::from(chunk.location.length);
            if chunk.queued == Queued::No {
                chunk.queued = Queued::Yes;
                self.orphans.queue.push_back(name);
            } else {
                chunk.queued = Queued::Again;
            }
        }
        if self.writer.is_full() {
            self.drop_orphans();
        }
        for _ in 0..self.orphans.queue.len() {
            if self.orphans.bytes <= ORPHAN_BYTES_MAX {
                break;
            }
            self.drop_oldest(true);
        }
    }

    /// A turn is over: orphans that were left alone through all of it go.
    pub fn age_orphans(&mut self) {
        for _ in 0..std::mem::take(&mut self.orphans.old) {
            self.drop_oldest(false);
        }
        self.orphans.old = self.orphans.queue.len();
    }

    /// Room is needed: all of them go. Whether there were any.
    pub fn drop_orphans(&mut self) -> bool {
        let count = self.orphans.queue.len();
        for _ in 0..count {
            self.drop_oldest(true);
        }
        count > 0
    }

    /// Bytes of orphans.
    pub fn orphan_bytes(&self) -> u64 {
        self.orphans.bytes
    }

    /// Takes the first of the queue: it goes, unless somebody refers to it, a record of it is on its way (it is being moved, or written
    /// anew), or it was left again since and `at_once` does not matter more.
    fn drop_oldest(&mut self, at_once: bool) {
        let Some(name) = self.orphans.queue.pop_front() else { return };
        self.orphans.old = self.orphans.old.saturating_sub(1);
        let is_pending = self.pending.contains_key(&name);
        let Some(chunk) = self.chunks.get_mut(&name) else { return };
        if chunk.references > 0 {
            chunk.queued = Queued::No;
        } else if is_pending || (chunk.queued == Queued::Again && !at_once) {
            chunk.queued = Queued::Yes;
            self.orphans.queue.push_back(name);
        } else {
            let chunk = *chunk;
            self.orphans.adopted(&chunk);
            self.chunks.remove(&name);
            self.died(chunk.location);
        }
    }
}
