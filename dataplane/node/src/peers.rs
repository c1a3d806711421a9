//! How many connections one client key has to a shard, from however many addresses.

use std::{cell::RefCell, collections::HashMap, rc::Rc};

use metanode_types::NodeKey;

/// The keys that have connections. Keys are a stranger's choice, hence a table with a keyed hash.
#[derive(Debug, Default)]
pub(crate) struct Peers(RefCell<HashMap<Option<NodeKey>, u32>>);

/// A connection of a key.
#[derive(Debug)]
pub(crate) struct Member {
    peers: Rc<Peers>,
    key: Option<NodeKey>,
}

impl Peers {
    /// One more connection of a key, unless it has `connections_max` already.
    pub(crate) fn join(self: &Rc<Self>, key: Option<NodeKey>, connections_max: u32) -> Option<Member> {
        let mut all = self.0.borrow_mut();
        let connections = all.entry(key).or_default();
        if *connections >= connections_max {
            return None;
        }
        *connections += 1;
        Some(Member { peers: self.clone(), key })
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut all = self.peers.0.borrow_mut();
        if let Some(connections) = all.get_mut(&self.key) {
            *connections -= 1;
            if *connections == 0 {
                all.remove(&self.key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_so_many_connections_and_leaves_nothing_behind() {
        let peers = Rc::new(Peers::default());
        let [one, other] = [1, 2].map(|byte| Some(NodeKey([byte; 32])));
        let first = peers.join(one, 2).unwrap();
        let second = peers.join(one, 2).unwrap();
        assert!(peers.join(one, 2).is_none() && peers.join(other, 2).is_some());
        drop(first);
        assert!(peers.join(one, 2).is_some());
        drop(second);
        assert!(peers.0.borrow().is_empty());
    }
}
