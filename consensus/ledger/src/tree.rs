//! Merkle trees over BLAKE3, of the shape of RFC 6962 (section 2.1): a leaf is hashed behind a zero byte, a node behind a one, and no leaf is
//! ever counted twice.
//!
//! ```text
//! leaf(d)    = BLAKE3(0 | d)
//! node(l, r) = BLAKE3(1 | l | r)
//! root of n  = node(root of the first k, root of the others), k the largest power of two below n; of none: BLAKE3()
//! ```

use metanode_crypto::hash;
use metanode_types::Hash;

/// Hash of a leaf.
pub fn leaf(data: &[u8]) -> Hash {
    hash(&[&[0], data].concat())
}

fn node(left: &Hash, right: &Hash) -> Hash {
    let mut bytes = [1; 65];
    bytes[1..33].copy_from_slice(&left.0);
    bytes[33..].copy_from_slice(&right.0);
    hash(&bytes)
}

fn split(count: usize) -> usize {
    1 << (count - 1).ilog2()
}

/// The root over leaves that are hashed already.
pub fn root(leaves: &[Hash]) -> Hash {
    match leaves {
        [] => hash(&[]),
        [leaf] => *leaf,
        leaves => {
            let (left, right) = leaves.split_at(split(leaves.len()));
            node(&root(left), &root(right))
        }
    }
}

/// What ties the leaf of this place to the root: the roots beside the way up, the lowest first. `None` when there is no such leaf.
pub fn proof(leaves: &[Hash], index: usize) -> Option<Vec<Hash>> {
    if index >= leaves.len() {
        return None;
    }
    let (mut leaves, mut index, mut path) = (leaves, index, Vec::new());
    while leaves.len() > 1 {
        let (left, right) = leaves.split_at(split(leaves.len()));
        if index < left.len() {
            path.push(root(right));
            leaves = left;
        } else {
            path.push(root(left));
            (leaves, index) = (right, index - left.len());
        }
    }
    path.reverse();
    Some(path)
}

/// Whether a leaf is at this place among so many under a root.
pub fn verify(root: &Hash, leaf: &Hash, index: u64, count: u64, path: &[Hash]) -> bool {
    if index >= count {
        return false;
    }
    // From the top down: on which side the leaf is.
    let (mut sides, mut index, mut count) = (Vec::new(), index, count);
    while count > 1 {
        let left = 1u64 << (count - 1).ilog2();
        sides.push(index >= left);
        (index, count) = if index < left { (index, left) } else { (index - left, count - left) };
    }
    if sides.len() != path.len() {
        return false;
    }
    let found = sides.iter().rev().zip(path).fold(*leaf, |below, (is_right, beside)| match is_right {
        true => node(beside, &below),
        false => node(&below, beside),
    });
    found == *root
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaves(count: usize) -> Vec<Hash> {
        (0..count).map(|number| leaf(&(number as u64).to_le_bytes())).collect()
    }

    #[test]
    fn every_leaf_is_proven_and_nothing_else_is() {
        for count in 1..40 {
            let leaves = leaves(count);
            let root = root(&leaves);
            for index in 0..count {
                let path = proof(&leaves, index).unwrap();
                let holds = |leaf: &Hash, index, count, path: &[Hash]| verify(&root, leaf, index, count, path);
                let (at, of) = (index as u64, count as u64);
                assert!(holds(&leaves[index], at, of, &path));
                assert!(!holds(&leaf(b"other"), at, of, &path));
                for other in (0..of + 2).filter(|other| *other != at) {
                    assert!(!holds(&leaves[index], other, of, &path), "{index} of {count} at {other}");
                }
                assert!(!holds(&leaves[index], at, of, &[&path[..], &[root]].concat()));
                if let Some((_, shorter)) = path.split_last() {
                    assert!(!holds(&leaves[index], at, of, shorter));
                }
            }
            assert_eq!(proof(&leaves, count), None);
        }
    }

    /// The last leaf twice is another tree (CVE-2012-2459), and a node is no leaf.
    #[test]
    fn shapes_are_not_confused() {
        let three = leaves(3);
        let four = [&three[..], &three[2..]].concat();
        assert_ne!(root(&three), root(&four));
        let two = leaves(2);
        assert_ne!(leaf(&[two[0].0, two[1].0].concat()), root(&two));
        assert_ne!(root(&[]), root(&[leaf(b"")]));
    }

    /// A header must mean the same in later versions.
    #[test]
    fn golden_roots() {
        assert_eq!(root(&[]).to_string(), "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262");
        assert_eq!(root(&leaves(5)).to_string(), "49c8fc0c045016dd643efade4b32a2b3e86455f0e443800e31c209eb9a017e31");
    }
}
