use hashbrown::{HashTable, hash_table::Entry};
use metanode_types::Hash;

/// Sub-tables: one grows at a time, so an insertion rehashes at most 1/1024 of the entries (about 10,000 of 10 million, ~0.3 ms).
const PARTS: usize = 1 << PART_BITS;
const PART_BITS: u32 = 10;

/// A hash table by `Hash`, cut into sub-tables by the leading bits, so that it grows in small steps and can be listed in order
/// page by page. Keys are BLAKE3 hashes that the node computed itself, hence evenly spread; they are used as they are.
#[derive(Debug)]
pub struct Table<V> {
    parts: Vec<HashTable<(Hash, V)>>,
    count: usize,
}

impl<V> Default for Table<V> {
    fn default() -> Self {
        Self { parts: (0..PARTS).map(|_| HashTable::new()).collect(), count: 0 }
    }
}

fn part(key: &Hash) -> usize {
    (u16::from_be_bytes([key.0[0], key.0[1]]) >> (16 - PART_BITS)) as usize
}

fn slot(key: &Hash) -> u64 {
    let [.., a, b, c, d, e, f, g, h] = *key.0.first_chunk::<16>().expect("a hash has 32 bytes");
    u64::from_le_bytes([a, b, c, d, e, f, g, h])
}

impl<V> Table<V> {
    /// Number of entries.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The value of `key`.
    pub fn get(&self, key: &Hash) -> Option<&V> {
        self.parts[part(key)].find(slot(key), |(k, _)| k == key).map(|(_, v)| v)
    }

    /// The value of `key`, to change it.
    pub fn get_mut(&mut self, key: &Hash) -> Option<&mut V> {
        self.parts[part(key)].find_mut(slot(key), |(k, _)| k == key).map(|(_, v)| v)
    }

    /// Sets the value of `key`; returns the one before.
    pub fn insert(&mut self, key: Hash, value: V) -> Option<V> {
        match self.parts[part(&key)].entry(slot(&key), |(k, _)| *k == key, |(k, _)| slot(k)) {
            Entry::Occupied(mut entry) => Some(std::mem::replace(&mut entry.get_mut().1, value)),
            Entry::Vacant(entry) => {
                entry.insert((key, value));
                self.count += 1;
                None
            }
        }
    }

    /// Removes `key`.
    pub fn remove(&mut self, key: &Hash) -> Option<V> {
        let entry = self.parts[part(key)].find_entry(slot(key), |(k, _)| k == key).ok()?;
        self.count -= 1;
        Some(entry.remove().0.1)
    }

    /// Number of parts that [`part`](Self::part) knows.
    pub const PARTS: usize = PARTS;

    /// The entries of one part, in no order: for a walk in steps, between which the table may change.
    pub fn part(&self, index: usize) -> impl Iterator<Item = (&Hash, &V)> {
        self.parts.get(index).into_iter().flatten().map(|(key, value)| (key, value))
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&Hash, &V)> {
        self.parts.iter().flatten().map(|(key, value)| (key, value))
    }

    /// Removes what `keep` refuses.
    pub fn retain(&mut self, mut keep: impl FnMut(&Hash, &mut V) -> bool) {
        for part in &mut self.parts {
            part.retain(|(key, value)| keep(key, value));
        }
        self.count = self.parts.iter().map(HashTable::len).sum();
    }

    /// Up to `count` entries behind `after`, in the order of their keys. Costs a look at one sub-table more than it returns.
    pub fn page(&self, after: Option<&Hash>, count: usize) -> Vec<(Hash, &V)> {
        let mut page = Vec::new();
        let first = after.map_or(0, part);
        for part in &self.parts[first..] {
            if page.len() >= count {
                break;
            }
            let mut keys: Vec<_> = part.iter().filter(|(k, _)| after.is_none_or(|a| k > a)).collect();
            let wanted = count - page.len();
            if wanted < keys.len() {
                keys.select_nth_unstable_by_key(wanted, |(key, _)| *key);
                keys.truncate(wanted);
            }
            keys.sort_unstable_by_key(|(key, _)| *key);
            page.extend(keys.into_iter().map(|(key, value)| (*key, value)));
        }
        page.truncate(count);
        page
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn key(n: u16) -> Hash {
        let mut bytes = [0; 32];
        bytes[..2].copy_from_slice(&n.wrapping_mul(40_503).to_be_bytes());
        bytes[9] = n as u8;
        Hash(bytes)
    }

    proptest! {
        #[test]
        fn behaves_like_an_ordered_map(ops in prop::collection::vec((0u16..300, any::<bool>()), 0..600), page in 1usize..50) {
            let (mut table, mut model) = (Table::default(), BTreeMap::new());
            for (i, (n, insert)) in ops.into_iter().enumerate() {
                if insert {
                    prop_assert_eq!(table.insert(key(n), i), model.insert(key(n), i));
                } else {
                    prop_assert_eq!(table.remove(&key(n)), model.remove(&key(n)));
                }
                prop_assert_eq!(table.len(), model.len());
            }
            let mut listed = Vec::new();
            loop {
                let after = listed.last().map(|(k, _)| *k);
                let next: Vec<_> = table.page(after.as_ref(), page).into_iter().map(|(k, v)| (k, *v)).collect();
                if next.is_empty() { break }
                listed.extend(next);
            }
            prop_assert_eq!(listed, model.into_iter().collect::<Vec<_>>());
        }
    }
}
