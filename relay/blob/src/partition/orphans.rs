//! Chunks that an interrupted upload has left behind.
//!
//! Nobody refers to an orphan. It is kept for a while all the same, so that the upload can go on where it stopped: an upload that
//! brings the chunk again, or only its name, takes a reference to the copy that is here. A start finds the chunks that nobody
//! refers to, whatever left them, and treats them the same.
//!
//! Orphans go when they have been left alone through a whole turn ([`Partition::age_orphans`]), the oldest first when they have more
//! bytes than they may, and all of them when room is needed.

use std::collections::VecDeque;

use super::*;

/// Bytes of orphans in one partition: half of a blob of 8 GiB that was interrupted at its end, on each of four shards.
const ORPHAN_BYTES_MAX: u64 = 2 << 30;

/// In the order in which they were left. An entry may be out of date: its chunk has been taken up again, or is gone.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    queue: VecDeque<Hash>,
    /// Entries from the front that have been there for a turn.
    old: usize,
    /// Of chunks without references, in the queue or not yet counted by recovery.
    bytes: u64,
}

impl Orphans {
    /// A chunk without references has got one.
    pub(super) fn adopted(&mut self, chunk: &ChunkEntry) {
        self.bytes = self.bytes.saturating_sub(chunk.location.length.into());
    }
}

impl Partition {
    /// Takes a reference to a chunk that is here.
    pub(super) fn take_chunk(&mut self, name: &Hash, references: u32) {
        if let Some(chunk) = self.chunks.get_mut(name) {
            if chunk.references == 0 {
                self.orphans.adopted(chunk);
            }
            chunk.references += references;
        }
    }

    /// Drops one reference to a chunk that an upload has left; at the last it is an orphan.
    pub fn abandon_chunk(&mut self, name: &Hash) {
        let Some(chunk) = self.chunks.get_mut(name).filter(|chunk| chunk.references > 0) else { return };
        chunk.references -= 1;
        if chunk.references == 0 {
            self.leave(*name);
        }
    }

    /// A chunk that is here has no references.
    pub(super) fn leave(&mut self, name: Hash) {
        if let Some(chunk) = self.chunks.get(&name) {
            self.orphans.bytes += u64::from(chunk.location.length);
            self.orphans.queue.push_back(name);
        }
        while self.orphans.bytes > ORPHAN_BYTES_MAX && self.drop_oldest() {}
    }

    /// A turn is over: orphans that were there when it began go.
    pub fn age_orphans(&mut self) {
        for _ in 0..std::mem::take(&mut self.orphans.old) {
            self.drop_oldest();
        }
        self.orphans.old = self.orphans.queue.len();
    }

    /// Room is needed: all of them go. Whether there were any.
    pub fn drop_orphans(&mut self) -> bool {
        let any = !self.orphans.queue.is_empty();
        while self.drop_oldest() {}
        any
    }

    /// Bytes of orphans.
    pub fn orphan_bytes(&self) -> u64 {
        self.orphans.bytes
    }

    fn drop_oldest(&mut self) -> bool {
        let Some(name) = self.orphans.queue.pop_front() else { return false };
        self.orphans.old = self.orphans.old.saturating_sub(1);
        // One that is being written anew, since its copy was corrupt, gets a reference by that.
        if let Some(chunk) = self.chunks.get(&name).filter(|chunk| chunk.references == 0).copied()
            && !self.pending.contains_key(&name)
        {
            self.orphans.adopted(&chunk);
            self.chunks.remove(&name);
            self.died(chunk.location);
        }
        true
    }
}
