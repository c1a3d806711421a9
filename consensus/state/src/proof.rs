use metanode_types::Hash;

use crate::{EMPTY, Key, inner_hash, leaf_hash};

/// Ties a key's value, or that it has none, to a root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// Hashes beside the way down to where the key is or would be, the root's child first; at most 256.
    pub beside: Vec<Hash>,
    /// What is there: a key with the hash of its value, this one or another; or nothing.
    pub found: Option<(Key, Hash)>,
}

/// It proves nothing about this key and root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadProof;

impl std::fmt::Display for BadProof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the proof does not lead to the root")
    }
}

impl std::error::Error for BadProof {}

impl Proof {
    /// The hash of the key's value under this root, or that it has none.
    pub fn verify(&self, root: &Hash, key: &Key) -> Result<Option<Hash>, BadProof> {
        match self.leads_to(key)? {
            (above, found) if above == *root => Ok(found),
            _ => Err(BadProof),
        }
    }

    /// The root that the proof leads to, and the hash of the key's value under it, or that it has none.
    pub fn leads_to(&self, key: &Key) -> Result<(Hash, Option<Hash>), BadProof> {
        let depth = self.beside.len();
        if depth > 256 {
            return Err(BadProof);
        }
        let below = match &self.found {
            None => EMPTY,
            Some((found, value_hash)) => {
                // Another key proves an absence only where this one would be.
                if (0..depth).any(|depth| found.bit(depth) != key.bit(depth)) {
                    return Err(BadProof);
                }
                leaf_hash(found, value_hash)
            }
        };
        let above = self.beside.iter().enumerate().rev().fold(below, |below, (depth, beside)| match key.bit(depth) {
            true => inner_hash(beside, &below),
            false => inner_hash(&below, beside),
        });
        Ok((above, self.found.filter(|(found, _)| found == key).map(|(_, value_hash)| value_hash)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::State;

    #[test]
    fn bent_proofs_prove_nothing() {
        let mut state = State::default();
        let keys: Vec<Key> = (0..50u8).map(|number| Key::of("test", &[number])).collect();
        let mut writes: Vec<_> = keys.iter().map(|key| (*key, Some(vec![1].into_boxed_slice()))).collect();
        writes.sort();
        let root = state.commit(1, writes);
        let absent = Key::of("test", b"absent");
        for key in keys.iter().take(9).chain([&absent]) {
            let proof = state.prove(1, key).unwrap();
            assert_eq!(proof.verify(&root, key).unwrap().is_some(), *key != absent);
            let bad = |proof: Proof| assert_eq!(proof.verify(&root, key), Err(BadProof));
            assert_eq!(proof.verify(&Hash([1; 32]), key), Err(BadProof));
            let mut bent = proof.clone();
            bent.beside[0].0[0] ^= 1;
            bad(bent);
            let mut shorter = proof.clone();
            shorter.beside.pop();
            bad(shorter);
            bad(Proof { beside: [&proof.beside[..], &[EMPTY]].concat(), ..proof.clone() });
            bad(Proof { beside: vec![EMPTY; 257], ..proof.clone() });
            if let Some((found, value_hash)) = proof.found {
                bad(Proof { found: Some((found, Hash([9; 32]))), ..proof.clone() });
                bad(Proof { found: None, ..proof.clone() });
                assert_ne!(value_hash, EMPTY);
            }
            // One key's proof says nothing about another that goes another way.
            let other = keys.iter().find(|other| other.bit(0) != key.bit(0)).unwrap();
            assert_eq!(proof.verify(&root, other), Err(BadProof));
        }
    }
}
