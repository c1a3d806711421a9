use std::{
    cell::RefCell,
    rc::{Rc, Weak},
};

use metanode_types::Hash;

use crate::shard::Inner;

/// Leases of one connection at most: the largest folder has as many files, and this is 32 MB. Further PUTs without hold are `Busy`.
const LEASES_MAX: usize = metanode_types::limits::MANIFEST_ENTRIES_MAX;

/// Leases of one connection: blobs that were put without hold live while this does, and longer when a folder or a tag refers to
/// them by then.
///
/// A lease costs 32 bytes here and an entry in the owner's table; a set takes at most `LEASES_MAX`, a million.
#[derive(Debug, Clone)]
pub struct Leases(Rc<LeaseSet>);

#[derive(Debug)]
struct LeaseSet {
    store: Weak<Inner>,
    hashes: RefCell<Vec<Hash>>,
}

impl Leases {
    pub(crate) fn new(store: Weak<Inner>) -> Self {
        Self(Rc::new(LeaseSet { store, hashes: RefCell::default() }))
    }

    pub(crate) fn add(&self, hash: Hash) {
        self.0.hashes.borrow_mut().push(hash);
    }

    /// Whether another one may be added.
    pub(crate) fn has_room(&self) -> bool {
        self.len() < LEASES_MAX
    }

    /// Leases held.
    pub fn len(&self) -> usize {
        self.0.hashes.borrow().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Drop for LeaseSet {
    fn drop(&mut self) {
        if let Some(store) = self.store.upgrade() {
            store.release_leases(self.hashes.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_has_room_for_a_million() {
        let leases = Leases::new(Weak::new());
        for _ in 0..LEASES_MAX {
            assert!(leases.has_room());
            leases.add(Hash([0; 32]));
        }
        assert!(!leases.has_room());
        assert!(!leases.clone().has_room(), "clones are the same set");
    }
}
