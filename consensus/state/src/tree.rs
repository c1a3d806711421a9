use std::collections::VecDeque;

use metanode_crypto::hash;
use metanode_types::Hash;

use crate::{EMPTY, Key, arena::Arena, inner_hash, leaf_hash, proof::Proof};

/// A change of one key: another value, or none.
pub type Write = (Key, Option<Box<[u8]>>);

/// A node: nothing, an inner one, or a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Nothing,
    Inner(u32),
    Leaf(u32),
}

#[derive(Debug, Clone)]
struct Inner {
    hash: Hash,
    left: Node,
    right: Node,
}

#[derive(Debug, Clone)]
struct Leaf {
    hash: Hash,
    key: Key,
    value: Box<[u8]>,
}

#[derive(Debug, Clone)]
struct Version {
    number: u64,
    root: Node,
    /// What the version before has and this one has not.
    stale: Vec<Node>,
}

/// The map, in its latest versions.
#[derive(Debug, Clone)]
pub struct State {
    inner: Arena<Inner>,
    leaves: Arena<Leaf>,
    /// At least one.
    versions: VecDeque<Version>,
    stale: Vec<Node>,
    count: usize,
}

impl Default for State {
    /// Empty, as version 0.
    fn default() -> Self {
        let first = Version { number: 0, root: Node::Nothing, stale: Vec::new() };
        Self {
            inner: Arena::default(),
            leaves: Arena::default(),
            versions: VecDeque::from([first]),
            stale: Vec::new(),
            count: 0,
        }
    }
}

impl State {
    fn latest(&self) -> &Version {
        self.versions.back().expect("there is always one")
    }

    /// Number of the latest version.
    pub fn version(&self) -> u64 {
        self.latest().number
    }

    /// Root of the latest version.
    pub fn root(&self) -> Hash {
        self.hash(self.latest().root)
    }

    /// Root of a version that is kept.
    pub fn root_of(&self, version: u64) -> Option<Hash> {
        self.find(version).map(|found| self.hash(found.root))
    }

    /// Keys in the latest version.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether the latest version has none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Nodes in memory, of all versions.
    pub fn nodes(&self) -> usize {
        self.inner.used() + self.leaves.used()
    }

    fn find(&self, version: u64) -> Option<&Version> {
        let at = self.versions.binary_search_by_key(&version, |kept| kept.number).ok()?;
        Some(&self.versions[at])
    }

    fn hash(&self, node: Node) -> Hash {
        match node {
            Node::Nothing => EMPTY,
            Node::Inner(slot) => self.inner.get(slot).hash,
            Node::Leaf(slot) => self.leaves.get(slot).hash,
        }
    }

    /// What is there in the latest version.
    pub fn get(&self, key: &Key) -> Option<&[u8]> {
        let (mut node, mut depth) = (self.latest().root, 0);
        loop {
            match node {
                Node::Nothing => return None,
                Node::Leaf(slot) => {
                    let leaf = self.leaves.get(slot);
                    return (leaf.key == *key).then_some(&*leaf.value);
                }
                Node::Inner(slot) => {
                    let inner = self.inner.get(slot);
                    node = if key.bit(depth) { inner.right } else { inner.left };
                    depth += 1;
                }
            }
        }
    }

    /// All keys and values of the latest version, in the order of the keys.
    pub fn iter(&self) -> impl Iterator<Item = (&Key, &[u8])> {
        self.walk(self.latest().root, None)
    }

    /// Keys and values of a version that is kept, in the order of the keys: those behind `after`, or all.
    pub fn iter_of(&self, version: u64, after: Option<Key>) -> Option<impl Iterator<Item = (&Key, &[u8])>> {
        Some(self.walk(self.find(version)?.root, after))
    }

    fn walk(&self, root: Node, after: Option<Key>) -> impl Iterator<Item = (&Key, &[u8])> {
        // Nodes with their depth, and whether all bits above are those of `after`: only there may something not be behind it.
        let mut open = vec![(root, 0, after.is_some())];
        std::iter::from_fn(move || {
            loop {
                let (node, depth, beside) = open.pop()?;
                let after = after.filter(|_| beside);
                match node {
                    Node::Nothing => {}
                    Node::Leaf(slot) => {
                        let leaf = self.leaves.get(slot);
                        if after.is_none_or(|after| leaf.key > after) {
                            return Some((&leaf.key, &*leaf.value));
                        }
                    }
                    Node::Inner(slot) => {
                        let inner = self.inner.get(slot);
                        match after {
                            None => open.extend([(inner.right, depth + 1, false), (inner.left, depth + 1, false)]),
                            Some(after) if after.bit(depth) => open.push((inner.right, depth + 1, true)),
                            Some(_) => open.extend([(inner.right, depth + 1, false), (inner.left, depth + 1, true)]),
                        }
                    }
                }
            }
        })
    }

    /// Makes a version. The writes are in the order of their keys, each once. Returns its root.
    ///
    /// # Panics
    /// When the version is not above the latest, or the writes are not in order.
    pub fn commit(&mut self, version: u64, mut writes: Vec<Write>) -> Hash {
        assert!(version > self.version(), "versions go up");
        assert!(writes.windows(2).all(|pair| pair[0].0 < pair[1].0), "writes are in order, each key once");
        let root = self.update(self.latest().root, 0, &mut writes);
        let stale = std::mem::take(&mut self.stale);
        self.versions.push_back(Version { number: version, root, stale });
        self.hash(root)
    }

    fn update(&mut self, node: Node, depth: usize, writes: &mut [Write]) -> Node {
        if writes.is_empty() {
            return node;
        }
        let (left, right) = match node {
            Node::Inner(slot) => {
                let inner = self.inner.get(slot);
                (inner.left, inner.right)
            }
            Node::Nothing if writes.len() == 1 => return self.place(writes),
            Node::Leaf(slot) if writes.len() == 1 && self.leaves.get(slot).key == writes[0].0 => {
                self.stale.push(node);
                self.count -= 1;
                return self.place(writes);
            }
            Node::Nothing => (Node::Nothing, Node::Nothing),
            Node::Leaf(slot) if self.leaves.get(slot).key.bit(depth) => (Node::Nothing, node),
            Node::Leaf(_) => (node, Node::Nothing),
        };
        let middle = writes.partition_point(|(key, _)| !key.bit(depth));
        let (to_left, to_right) = writes.split_at_mut(middle);
        let new_left = self.update(left, depth + 1, to_left);
        let new_right = self.update(right, depth + 1, to_right);
        if let Node::Inner(_) = node {
            if (new_left, new_right) == (left, right) {
                return node;
            }
            self.stale.push(node);
        }
        match (new_left, new_right) {
            // A subtree of one key is its leaf.
            (Node::Nothing, Node::Nothing | Node::Leaf(_)) => new_right,
            (Node::Leaf(_), Node::Nothing) => new_left,
            (left, right) => {
                let hash = inner_hash(&self.hash(left), &self.hash(right));
                Node::Inner(self.inner.put(Inner { hash, left, right }))
            }
        }
    }

    /// The leaf of one write, where there is none.
    fn place(&mut self, writes: &mut [Write]) -> Node {
        let (key, value) = &mut writes[0];
        match value.take() {
            None => Node::Nothing,
            Some(value) => {
                self.count += 1;
                let hash = leaf_hash(key, &hash(&value));
                Node::Leaf(self.leaves.put(Leaf { hash, key: *key, value }))
            }
        }
    }

    /// Forgets versions below this one; the latest stays in any case.
    pub fn forget_before(&mut self, version: u64) {
        while self.versions.len() > 1 && self.versions[0].number < version {
            self.versions.pop_front();
            for node in std::mem::take(&mut self.versions[0].stale) {
                match node {
                    Node::Nothing => {}
                    Node::Inner(slot) => self.inner.release(slot),
                    Node::Leaf(slot) => self.leaves.release(slot),
                }
            }
        }
    }

    /// What ties a key's value, or that there is none, to the root of a version that is kept.
    pub fn prove(&self, version: u64, key: &Key) -> Option<Proof> {
        let (mut node, mut depth) = (self.find(version)?.root, 0);
        let mut beside = Vec::new();
        loop {
            let found = match node {
                Node::Nothing => None,
                Node::Leaf(slot) => {
                    let leaf = self.leaves.get(slot);
                    Some((leaf.key, hash(&leaf.value)))
                }
                Node::Inner(slot) => {
                    let inner = self.inner.get(slot);
                    let (way, other) =
                        if key.bit(depth) { (inner.right, inner.left) } else { (inner.left, inner.right) };
                    beside.push(self.hash(other));
                    node = way;
                    depth += 1;
                    continue;
                }
            };
            return Some(Proof { beside, found });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Keys that begin alike, so that the tree gets deep.
    fn key(number: u8) -> Key {
        let mut bytes = [0; 32];
        bytes[31] = number & 7;
        bytes[0] = number >> 5 << 5;
        bytes[12] = number & 0x18;
        Key(bytes)
    }

    fn rebuilt(map: &BTreeMap<Key, Vec<u8>>) -> State {
        let mut state = State::default();
        let writes = map.iter().map(|(key, value)| (*key, Some(value.clone().into_boxed_slice())));
        state.commit(1, writes.collect());
        state
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Root, contents and proofs are those of the contents, whatever led to them; and nothing is left in memory that nobody needs.
        #[test]
        fn the_root_is_that_of_the_contents(
            rounds in proptest::collection::vec(proptest::collection::btree_map(0u8..=255, proptest::option::of(0u8..4), 0..12), 1..12)
        ) {
            let mut state = State::default();
            let mut map: BTreeMap<Key, Vec<u8>> = BTreeMap::new();
            let mut roots = vec![state.root()];
            for (number, round) in rounds.iter().enumerate() {
                let mut writes: BTreeMap<Key, Option<u8>> = BTreeMap::new();
                writes.extend(round.iter().map(|(number, value)| (key(*number), *value)));
                for (key, value) in &writes {
                    match value {
                        Some(value) => map.insert(*key, vec![*value; usize::from(*value)]),
                        None => map.remove(key),
                    };
                }
                let boxed = |value: u8| vec![value; usize::from(value)].into_boxed_slice();
                let root = state.commit(1 + number as u64, writes.into_iter().map(|(key, value)| (key, value.map(boxed))).collect());
                let same = rebuilt(&map);
                prop_assert_eq!(root, same.root());
                prop_assert_eq!(state.len(), map.len());
                prop_assert!(state.iter().eq(map.iter().map(|(key, value)| (key, &value[..]))));
                roots.push(root);
            }
            let last = rounds.len() as u64;
            for version in 0..=last {
                prop_assert_eq!(state.root_of(version), Some(roots[version as usize]));
                for number in 0..=255 {
                    let proof = state.prove(version, &key(number)).unwrap();
                    let proven = proof.verify(&roots[version as usize], &key(number)).unwrap();
                    if version == last {
                        prop_assert_eq!(proven, map.get(&key(number)).map(|value| hash(value)));
                    }
                }
            }
            state.forget_before(last);
            prop_assert_eq!(state.root_of(last), Some(roots[last as usize]));
            prop_assert_eq!(state.root_of(last - 1), None);
            prop_assert_eq!(state.nodes(), rebuilt(&map).nodes());
        }
    }

    /// A header must mean the same in later versions.
    /// A version is walked from anywhere, and is what it was however much has come since.
    #[test]
    fn a_version_is_walked_in_pieces() {
        let mut state = State::default();
        let write = |number: u8, value: u8| (Key::of("test", &[number]), Some(vec![value].into_boxed_slice()));
        let mut writes: Vec<Write> = (0..200).map(|number| write(number, 1)).collect();
        writes.sort();
        let all: Vec<Key> = writes.iter().map(|(key, _)| *key).collect();
        state.commit(1, writes);
        let mut others: Vec<Write> = (100..250).map(|number| write(number, 2)).collect();
        others.sort();
        state.commit(2, others);
        for piece in [1, 7, 199, 200, 500] {
            let (mut found, mut after) = (Vec::new(), None);
            loop {
                let part: Vec<_> = state.iter_of(1, after).unwrap().take(piece).collect();
                assert!(part.iter().all(|(_, value)| *value == [1]));
                found.extend(part.iter().map(|(key, _)| **key));
                match part.last() {
                    Some((last, _)) => after = Some(**last),
                    None => break,
                }
            }
            assert_eq!(found, all);
        }
        let between = Key([0x80; 32]);
        let behind: Vec<Key> = state.iter_of(1, Some(between)).unwrap().map(|(key, _)| *key).collect();
        assert_eq!(behind, all.iter().copied().filter(|key| *key > between).collect::<Vec<_>>());
        assert_eq!(state.iter_of(2, None).unwrap().count(), 250);
        assert!(state.iter_of(3, None).is_none());
    }

    #[test]
    fn golden_root() {
        let mut state = State::default();
        assert_eq!(state.root(), EMPTY);
        let writes = (0..3u8).map(|number| (Key::of("test", &[number]), Some(vec![number].into_boxed_slice())));
        let mut writes: Vec<Write> = writes.collect();
        writes.sort();
        let root = state.commit(1, writes).to_string();
        assert_eq!(root, "6637ca6c05b5947e746a36bcca30a8599eec305010a1b468c77ccd108b255660");
    }
}
