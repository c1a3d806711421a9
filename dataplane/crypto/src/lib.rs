//! Hashes, identities and transport security.
//!
//! * [`hash`]: BLAKE3 of bytes, the address of everything that is stored; [`hash_all`] of many small inputs in
//!   less time, [`HashBatcher`] of what tasks need at the same time.
//! * [`Identity`]: an Ed25519 key pair. Its public half, [`NodeKey`](metanode_types::NodeKey), *is* the name of a node or an
//!   operator; there are no certificates, hence no certificate dates and no authority to lose.
//! * [`NodeSecret`]: what stateless-reset, token and connection-ID keys derive from, so that all shards of a node and the next
//!   start of the same node agree on them.
//! * [`tls`]: rustls configurations for QUIC: TLS 1.3 only, aws-lc-rs, X25519MLKEM768 first, RFC 7250 raw public keys on both
//!   sides, ALPN.
//! * [`Verified`]: the type of something whose signature was checked.
//! * [`Claim`] and [`verify_all`]: the verifier of what validators must agree on, by the rules of ZIP-215.
//!
//! This crate performs no I/O and draws no randomness for keys: seeds come from the caller.

mod batch;
mod identity;
mod many;
mod secret;
pub mod tls;
mod verified;
mod zip215;

pub use batch::HashBatcher;
pub use identity::{Identity, KeyFileError};
pub use many::hash_all;
use metanode_types::Hash;
pub use secret::{CidKey, NodeSecret};
pub use verified::{BadSignature, Verified};
pub use zip215::{Claim, PIECE_MAX, is_small_order, verify_all};

/// The BLAKE3 hash of `bytes`.
pub fn hash(bytes: &[u8]) -> Hash {
    Hash(*blake3::hash(bytes).as_bytes())
}

/// The BLAKE3 hash of `bytes` under a key.
pub fn keyed(key: &[u8; 32], bytes: &[u8]) -> Hash {
    Hash(*blake3::keyed_hash(key, bytes).as_bytes())
}

/// 32 bytes of BLAKE3 in key-derivation mode: a hash of `bytes` that no other purpose (`context`) shares.
pub fn derive(context: &str, bytes: &[u8]) -> [u8; 32] {
    blake3::derive_key(context, bytes)
}
