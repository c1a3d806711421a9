//! The one verifier of what validators must agree on: Ed25519 by the rules of [ZIP-215](https://zips.z.cash/zip-0215).
//!
//! RFC 8032 leaves open whether a verifier multiplies by the cofactor and which encodings of a point it takes, so that verifiers differ on
//! signatures that are made to make them differ, and one that checks many at once differs from itself. By ZIP-215 the verdict of one and of
//! many is the same, always. Keys of small order are refused on top of it: whoever has one has a signature for every message.

use ed25519_zebra::{Signature, VerificationKey, VerificationKeyBytes, batch};
use metanode_types::NodeKey;
use rand_core::{TryCryptoRng, TryRng};

use crate::verified::preimage;

/// Signatures that are checked together at most. 64 take some 0.8 ms, during which votes wait; of more each costs hardly less.
pub const PIECE_MAX: usize = 64;

/// What somebody says to have signed.
#[derive(Debug, Clone, Copy)]
pub struct Claim<'a> {
    /// Who.
    pub signer: NodeKey,
    /// See [`Identity::sign`](crate::Identity::sign).
    pub domain: &'a str,
    /// What.
    pub message: &'a [u8],
    /// The signature.
    pub signature: &'a [u8; 64],
}

impl Claim<'_> {
    /// Whether the signature is the signer's.
    pub fn holds(&self) -> bool {
        !is_small_order(&self.signer) && self.holds_of_any_key()
    }

    fn holds_of_any_key(&self) -> bool {
        let Ok(key) = VerificationKey::try_from(self.signer.0) else { return false };
        key.verify(&Signature::from(*self.signature), &preimage(self.domain, self.message)).is_ok()
    }
}

/// Checks signatures together, in less time than one by one. `Err` has the places of those that do not hold.
pub fn verify_all(claims: &[Claim<'_>]) -> Result<(), Vec<usize>> {
    let mut bad = Vec::new();
    for (piece, claims) in claims.chunks(PIECE_MAX).enumerate() {
        if !piece_holds(claims) {
            let places = claims.iter().enumerate().filter(|(_, claim)| !claim.holds());
            bad.extend(places.map(|(place, _)| piece * PIECE_MAX + place));
        }
    }
    if bad.is_empty() { Ok(()) } else { Err(bad) }
}

fn piece_holds(claims: &[Claim<'_>]) -> bool {
    if let [claim] = claims {
        return claim.holds();
    }
    let mut all = batch::Verifier::new();
    let mut weights = blake3::Hasher::new_derive_key("metanode 2026 weights of signatures checked together v1");
    for claim in claims {
        if is_small_order(&claim.signer) {
            return false;
        }
        let message = preimage(claim.domain, claim.message);
        weights.update(&claim.signer.0).update(claim.signature).update(blake3::hash(&message).as_bytes());
        all.queue((VerificationKeyBytes::from(claim.signer.0), Signature::from(*claim.signature), &message));
    }
    all.verify(Weights(weights.finalize_xof())).is_ok()
}

/// Factors that whoever chose the signatures could not foresee: a hash of them all.
struct Weights(blake3::OutputReader);

impl TryRng for Weights {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        let mut bytes = [0; 4];
        self.0.fill(&mut bytes);
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Self::Error> {
        self.0.fill(bytes);
        Ok(())
    }
}

impl TryCryptoRng for Weights {}

/// Whether a key is one of the eight points of small order, by any of the fourteen encodings that ZIP-215 takes.
pub fn is_small_order(key: &NodeKey) -> bool {
    // The sign bit aside, there are seven: y of the points of order 8 (two), of 4 (0, also written as p), of 2 (p - 1) and of 1 (1, also
    // written as p + 1).
    let mut y = key.0;
    y[31] &= 0x7f;
    SMALL_ORDER_Y.contains(&y)
}

/// See [`is_small_order`].
const SMALL_ORDER_Y: [[u8; 32]; 7] = [
    number(0),
    number(1),
    below_2_255(0x13), // p - 1 = 2^255 - 20, so 0x13 below 2^255 - 1
    below_2_255(0x12), // p
    below_2_255(0x11), // p + 1
    [
        0x26, 0xe8, 0x95, 0x8f, 0xc2, 0xb2, 0x27, 0xb0, 0x45, 0xc3, 0xf4, 0x89, 0xf2, 0xef, 0x98, 0xf0, 0xd5, 0xdf,
        0xac, 0x05, 0xd3, 0xc6, 0x33, 0x39, 0xb1, 0x38, 0x02, 0x88, 0x6d, 0x53, 0xfc, 0x05,
    ],
    [
        0xc7, 0x17, 0x6a, 0x70, 0x3d, 0x4d, 0xd8, 0x4f, 0xba, 0x3c, 0x0b, 0x76, 0x0d, 0x10, 0x67, 0x0f, 0x2a, 0x20,
        0x53, 0xfa, 0x2c, 0x39, 0xcc, 0xc6, 0x4e, 0xc7, 0xfd, 0x77, 0x92, 0xac, 0x03, 0x7a,
    ],
];

const fn number(low: u8) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[0] = low;
    bytes
}

/// 2^255 - 1 - `by`.
const fn below_2_255(by: u8) -> [u8; 32] {
    let mut bytes = [0xff; 32];
    bytes[0] -= by;
    bytes[31] = 0x7f;
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Identity;

    const DOMAIN: &str = "metanode test v1";

    /// The fourteen encodings of points of small order.
    fn encodings() -> Vec<[u8; 32]> {
        let mut all = Vec::new();
        for y in SMALL_ORDER_Y {
            for sign in [0, 0x80] {
                let mut bytes = y;
                bytes[31] |= sign;
                all.push(bytes);
            }
        }
        all
    }

    fn claim<'a>(signer: NodeKey, message: &'a [u8], signature: &'a [u8; 64]) -> Claim<'a> {
        Claim { signer, domain: DOMAIN, message, signature }
    }

    /// The vectors published with ZIP-215: for each pair of encodings of small order as key and R, with s = 0, over "Zcash", the verdict is
    /// "valid". They are what verifiers differ on.
    #[test]
    fn the_196_vectors_of_zip_215() {
        let mut all = batch::Verifier::new();
        for key in encodings() {
            for r in encodings() {
                let mut bytes = [0; 64];
                bytes[..32].copy_from_slice(&r);
                let signature = Signature::from(bytes);
                VerificationKey::try_from(key).and_then(|key| key.verify(&signature, b"Zcash")).unwrap();
                all.queue((VerificationKeyBytes::from(key), signature, b"Zcash"));
            }
        }
        all.verify(Weights(blake3::Hasher::new().finalize_xof())).unwrap();
    }

    #[test]
    fn keys_of_small_order_sign_nothing_here() {
        let encodings = encodings();
        assert_eq!(encodings.iter().collect::<std::collections::BTreeSet<_>>().len(), 14);
        for key in &encodings {
            for r in &encodings {
                let mut signature = [0; 64];
                signature[..32].copy_from_slice(r);
                let forged = claim(NodeKey(*key), b"anything", &signature);
                assert!(forged.holds_of_any_key() && !forged.holds(), "what is refused here would hold elsewhere");
                assert_eq!(verify_all(&[forged, forged]), Err(vec![0, 1]));
            }
        }
        assert!(!is_small_order(&Identity::from_seed(&[1; 32]).public()));
    }

    /// One and many agree, wherever the bad ones are, on signatures bent in every byte too.
    #[test]
    fn together_and_one_by_one_the_verdict_is_the_same() {
        let signers: Vec<Identity> = (1..=150u8).map(|seed| Identity::from_seed(&[seed; 32])).collect();
        let mut signed: Vec<(NodeKey, [u8; 64])> =
            signers.iter().map(|signer| (signer.public(), signer.sign(DOMAIN, b"message"))).collect();
        let claims = |signed: &[(NodeKey, [u8; 64])]| {
            let claims: Vec<Claim<'_>> =
                signed.iter().map(|(signer, signature)| claim(*signer, b"message", signature)).collect();
            let one_by_one: Vec<usize> = (0..claims.len()).filter(|&place| !claims[place].holds()).collect();
            let together = verify_all(&claims).err().unwrap_or_default();
            assert_eq!(together, one_by_one);
            together
        };
        assert!(claims(&signed).is_empty());
        for (place, byte) in (0..64).map(|byte| (byte * 2 + 1, byte)) {
            signed[place].1[byte] ^= 1 << (byte % 8);
        }
        assert_eq!(claims(&signed).len(), 64);
        signed[0].0 = NodeKey([2; 32]); // not a point, or another's
        assert!(claims(&signed).contains(&0));
        assert!(claims(&[]).is_empty());
    }

    /// s and s + L are one number: taken, a signature could be changed by anybody.
    #[test]
    fn a_signature_has_one_form() {
        let signer = Identity::from_seed(&[1; 32]);
        let mut signature = signer.sign(DOMAIN, b"message");
        // The order of the group, little-endian.
        const L: [u8; 32] = [
            0xed, 0xd3, 0xf5, 0x5c, 0x1a, 0x63, 0x12, 0x58, 0xd6, 0x9c, 0xf7, 0xa2, 0xde, 0xf9, 0xde, 0x14, 0, 0, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10,
        ];
        let mut carry = 0;
        for (byte, add) in signature[32..].iter_mut().zip(L) {
            let sum = u16::from(*byte) + u16::from(add) + carry;
            (*byte, carry) = (sum as u8, sum >> 8);
        }
        assert!(!claim(signer.public(), b"message", &signature).holds());
    }

    #[test]
    fn another_message_or_domain_does_not_hold() {
        let signer = Identity::from_seed(&[1; 32]);
        let signature = signer.sign(DOMAIN, b"message");
        assert!(claim(signer.public(), b"message", &signature).holds());
        assert!(!claim(signer.public(), b"messagf", &signature).holds());
        assert!(!Claim { domain: "metanode test v2", ..claim(signer.public(), b"message", &signature) }.holds());
    }
}
