use std::sync::Arc;

use aws_lc_rs::{hkdf, hmac};
use zeroize::Zeroizing;

use crate::Identity;

/// The one secret that the keys of a node's QUIC endpoints derive from (BLAKE3 `derive_key`, one context a purpose).
///
/// quinn-proto draws these keys at random for each endpoint; shards would then refuse each other's tokens and connection IDs,
/// and a restarted node could not reset connections of its former life.
pub struct NodeSecret(Zeroizing<[u8; 32]>);

/// Keys the checksum in connection IDs, so that a shard can tell an ID it issued from noise.
#[derive(Clone)]
pub struct CidKey(pub [u8; 32]);

impl NodeSecret {
    /// The secret that belongs to an identity.
    pub fn of(identity: &Identity) -> Self {
        Self(Zeroizing::new(blake3::derive_key("metanode 2026 node secret v1", identity.seed())))
    }

    /// Authenticates stateless resets (RFC 9000 section 10.3).
    pub fn reset_key(&self) -> Arc<dyn quinn_proto::crypto::HmacKey> {
        Arc::new(hmac::Key::new(hmac::HMAC_SHA256, &self.derive("metanode 2026 quic stateless reset v1")))
    }

    /// Seals Retry and address-validation tokens (RFC 9000 section 8.1).
    pub fn token_key(&self) -> Arc<dyn quinn_proto::crypto::HandshakeTokenKey> {
        let secret = self.derive("metanode 2026 quic token v1");
        Arc::new(hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &secret))
    }

    /// Keys connection IDs.
    pub fn cid_key(&self) -> CidKey {
        CidKey(self.derive("metanode 2026 quic connection id v1"))
    }

    fn derive(&self, context: &str) -> [u8; 32] {
        blake3::derive_key(context, &*self.0)
    }
}

impl CidKey {
    /// Four bytes of keyed BLAKE3 over the leading bytes of a connection ID.
    pub fn checksum(&self, leading: &[u8]) -> [u8; 4] {
        let full = blake3::keyed_hash(&self.0, leading);
        let [a, b, c, d, ..] = *full.as_bytes();
        [a, b, c, d]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_identity_same_keys_other_identity_other_keys() {
        let secret = |seed| NodeSecret::of(&Identity::from_seed(&[seed; 32]));
        assert_eq!(secret(1).cid_key().checksum(b"abcd"), secret(1).cid_key().checksum(b"abcd"));
        assert_ne!(secret(1).cid_key().checksum(b"abcd"), secret(2).cid_key().checksum(b"abcd"));
        let sign = |seed| {
            let mut out = [0; 32];
            secret(seed).reset_key().sign(b"cid", &mut out);
            out
        };
        assert_eq!(sign(1), sign(1));
        assert_ne!(sign(1), sign(2));
    }
}
