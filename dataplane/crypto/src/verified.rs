use ed25519_dalek::{Signature, VerifyingKey};
use metanode_types::NodeKey;

/// A value whose signature was checked; only [`Verified::check`] makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified<T> {
    value: T,
    signer: NodeKey,
}

/// The signature does not fit the key and the message, or the key is no valid point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the signature does not verify")]
pub struct BadSignature;

impl<T> Verified<T> {
    /// Checks `signer`'s signature over `domain` and the canonical encoding of `value`.
    ///
    /// Strict verification (RFC 8032, cofactorless, small-order keys refused): signatures checked here are between a node and
    /// its own users. What a quorum must agree on goes through the consensus verifier instead.
    pub fn check(
        value: T,
        encoding: &[u8],
        domain: &str,
        signer: NodeKey,
        signature: &[u8; 64],
    ) -> Result<Self, BadSignature> {
        let key = VerifyingKey::from_bytes(signer.as_bytes()).map_err(|_| BadSignature)?;
        key.verify_strict(&preimage(domain, encoding), &Signature::from_bytes(signature)).map_err(|_| BadSignature)?;
        Ok(Self { value, signer })
    }

    /// Who signed.
    pub const fn signer(&self) -> NodeKey {
        self.signer
    }

    /// What was signed.
    pub const fn value(&self) -> &T {
        &self.value
    }
}

/// `domain ‖ 0 ‖ message`: domains contain no zero byte, so no two pairs share a preimage.
pub(crate) fn preimage(domain: &str, message: &[u8]) -> Vec<u8> {
    debug_assert!(!domain.contains('\0'), "a domain has no zero byte");
    [domain.as_bytes(), &[0], message].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Identity;

    #[test]
    fn another_domain_message_or_key_is_refused() {
        let signer = Identity::from_seed(&[1; 32]);
        let signature = signer.sign("metanode test v1", b"message");
        let check = |encoding: &[u8], domain, key| Verified::check((), encoding, domain, key, &signature);
        assert!(check(b"message", "metanode test v1", signer.public()).is_ok());
        assert_eq!(check(b"messag3", "metanode test v1", signer.public()), Err(BadSignature));
        assert_eq!(check(b"message", "metanode test v2", signer.public()), Err(BadSignature));
        assert_eq!(check(b"message", "metanode test v1", Identity::from_seed(&[2; 32]).public()), Err(BadSignature));
    }
}
