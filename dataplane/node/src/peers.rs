//! What the connections of one client key take of a shard, together: one key, however many addresses it comes from, leaves room for
//! the others.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
};

use metanode_types::NodeKey;

/// The keys that have connections to a shard. Keys are a stranger's choice, hence a table with a keyed hash.
#[derive(Debug, Default)]
pub(crate) struct Peers(RefCell<HashMap<Option<NodeKey>, Rc<Share>>>);

/// What one key has.
#[derive(Debug, Default)]
pub(crate) struct Share {
    connections: Cell<u32>,
    /// Unanswered, bulk transfers included.
    pub(crate) requests: Cell<u32>,
    /// Fetches that read from the disk, or wait for it.
    pub(crate) reads: Cell<u32>,
}

/// A connection of a key; its share ends with the last one.
#[derive(Debug)]
pub(crate) struct Member {
    shard: Rc<Peers>,
    key: Option<NodeKey>,
    pub(crate) share: Rc<Share>,
}

impl Peers {
    /// One more connection of a key, unless it has `connections_max` already.
    pub(crate) fn join(self: &Rc<Self>, key: Option<NodeKey>, connections_max: u32) -> Option<Member> {
        let share = self.0.borrow_mut().entry(key).or_default().clone();
        if share.connections.get() >= connections_max {
            return None;
        }
        share.connections.set(share.connections.get() + 1);
        Some(Member { shard: self.clone(), key, share })
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.share.connections.set(self.share.connections.get() - 1);
        if self.share.connections.get() == 0 {
            self.shard.0.borrow_mut().remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_one_share_for_all_its_connections_and_none_afterwards() {
        let peers = Rc::new(Peers::default());
        let [one, other] = [1, 2].map(|byte| Some(NodeKey([byte; 32])));
        let first = peers.join(one, 2).unwrap();
        let second = peers.join(one, 2).unwrap();
        assert!(peers.join(one, 2).is_none() && peers.join(other, 2).is_some());
        first.share.reads.set(7);
        assert_eq!(second.share.reads.get(), 7);
        drop(first);
        assert_eq!(peers.join(one, 2).unwrap().share.reads.get(), 7);
        drop(second);
        assert!(peers.0.borrow().is_empty());
    }
}
