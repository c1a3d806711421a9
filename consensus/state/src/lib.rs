//! Application state: a map in memory whose contents have a root hash, which depends on the contents alone. A core.
//!
//! It is a binary Merkle tree over hashed keys, as deep as it must be to tell its keys apart: a subtree of one key is its leaf, one without
//! any has the hash 0. [`State::commit`] makes a version of it; the tree of a version shares with the one before all that has not changed.
//! Old versions are kept until [`State::forget_before`], so that proofs of what a header carries can still be made when that header is final.
//!
//! ```text
//! leaf  = BLAKE3 keyed "metanode state tree: leaf      \0" (key 32 | BLAKE3(value))
//! inner = BLAKE3 keyed "metanode state tree: inner node\0" (left 32 | right 32)
//! ```
//!
//! So an inner node costs one compression, and a proof of absence shows another key's value as a hash only. The bits of a key, the highest
//! of its first byte first, say which way it goes. Keys are hashes of what applications call them ([`Key::of`]): nobody can make the tree
//! deep but by finding hashes that begin alike.

mod arena;
mod proof;
mod tree;

pub use proof::{BadProof, Proof};
pub use tree::{State, Write};

use metanode_crypto::keyed;
use metanode_types::Hash;

const INNER_KEY: &[u8; 32] = b"metanode state tree: inner node\0";
const LEAF_KEY: &[u8; 32] = b"metanode state tree: leaf      \0";

/// Where something is in the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub [u8; 32]);

impl Key {
    /// The key of what an application calls `name`, in a space of names of its own.
    pub fn of(space: &str, name: &[u8]) -> Self {
        Self(metanode_crypto::derive(space, name))
    }

    fn bit(&self, depth: usize) -> bool {
        self.0[depth / 8] >> (7 - depth % 8) & 1 == 1
    }
}

/// The hash of nothing.
pub const EMPTY: Hash = Hash([0; 32]);

fn inner_hash(left: &Hash, right: &Hash) -> Hash {
    let mut bytes = [0; 64];
    bytes[..32].copy_from_slice(&left.0);
    bytes[32..].copy_from_slice(&right.0);
    keyed(INNER_KEY, &bytes)
}

fn leaf_hash(key: &Key, value_hash: &Hash) -> Hash {
    let mut bytes = [0; 64];
    bytes[..32].copy_from_slice(&key.0);
    bytes[32..].copy_from_slice(&value_hash.0);
    keyed(LEAF_KEY, &bytes)
}
