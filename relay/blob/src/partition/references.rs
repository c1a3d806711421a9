//! References, leases and pins: what keeps content.

use super::*;

impl Partition {
    /// Drops one reference to a chunk; at the last its bytes are dead.
    pub fn release_chunk(&mut self, name: &Hash) {
        let Some(chunk) = self.chunks.get_mut(name) else { return };
        if chunk.drop_reference() {
            let location = chunk.location;
            self.chunks.remove(name);
            self.died(location);
        }
    }

    /// Drops one reference of a tag or folder to a root; nobody's root goes.
    pub fn release_root(&mut self, hash: &Hash) {
        if let Some(root) = self.roots.get_mut(hash) {
            // A folder whose manifest could not be read at the start has taken none.
            root.references = root.references.saturating_sub(1);
            self.drop_if_unused(hash);
        } else if let Some(count) = self.lost.get_mut(hash) {
            *count -= 1;
            if *count == 0 {
                self.lost.remove(hash);
            }
        }
    }

    /// Drops one lease.
    pub fn release_lease(&mut self, hash: &Hash) {
        if let Some(count) = self.leases.get_mut(hash) {
            *count -= 1;
            if *count == 0 {
                self.leases.remove(hash);
                self.drop_if_unused(hash);
            }
        }
    }

    pub(super) fn drop_if_unused(&mut self, hash: &Hash) {
        let unused = self.roots.get(hash).is_some_and(|root| !root.is_held() && root.references == 0);
        if unused && !self.leases.contains_key(hash) && !self.pending.contains_key(hash) {
            // If the log takes nothing more the root stays until the next start, which drops it.
            let _ = self.stage(None, Record::bare(RecordKind::Unroot, *hash), Change::Unroot, true);
        }
    }

    /// Keeps the content of a root while it is read.
    pub fn pin(&mut self, hash: Hash) -> Option<RootEntry> {
        let root = *self.roots.get(&hash)?;
        self.pins.entry(hash).or_default().readers += 1;
        Some(root)
    }

    /// Ends a [`pin`](Self::pin); content of a root that was removed meanwhile is released at the last.
    pub fn unpin(&mut self, hash: Hash) {
        let Some(pin) = self.pins.get_mut(&hash) else { return };
        pin.readers -= 1;
        if pin.readers == 0 {
            let dead = pin.dead;
            self.pins.remove(&hash);
            if let Some(entry) = dead {
                self.release_content(hash, entry);
            }
        }
    }

    /// What a damaged root refers to was counted in part; the next start counts again.
    pub(super) fn release_content(&mut self, hash: Hash, entry: RootEntry) {
        if entry.damaged {
            return;
        }
        if entry.is_whole() && entry.kind() == BlobKind::Blob {
            self.release_chunk(&hash);
        } else {
            self.events.push(Event::Released(ReleasedRoot { hash, entry }));
        }
    }
}
