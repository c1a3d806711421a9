use std::fmt;

use data_encoding::BASE64;
use ed25519_dalek::{Signer as _, SigningKey};
use metanode_types::NodeKey;
use zeroize::Zeroizing;

/// An Ed25519 key pair (RFC 8032).
///
/// In a file it is PKCS#8 version 1 in PEM (RFC 8410), so other tools can read it; whoever writes the file gives it mode 0600.
#[derive(Clone)]
pub struct Identity {
    key: SigningKey,
}

/// A key file that is not an Ed25519 private key in PKCS#8 PEM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyFileError {
    /// No `BEGIN PRIVATE KEY` and `END PRIVATE KEY` around base64.
    #[error("not a PEM private key")]
    NotPem,
    /// PEM, but of another algorithm or version.
    #[error("not an Ed25519 private key in PKCS#8 version 1")]
    NotEd25519,
}

/// `PrivateKeyInfo { version 0, algorithm id-Ed25519, OCTET STRING { OCTET STRING { 32 bytes` (RFC 8410 section 7).
const PKCS8_PREFIX: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
const PEM_BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_END: &str = "-----END PRIVATE KEY-----";

impl Identity {
    /// The key pair of a 32-byte seed. The seed must come from the operating system's generator, or from a test.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self { key: SigningKey::from_bytes(seed) }
    }

    /// The public half.
    pub fn public(&self) -> NodeKey {
        NodeKey(self.key.verifying_key().to_bytes())
    }

    /// Signs `domain`, a zero byte and `message`. Each kind of message has a domain of its own, so that a signature over one
    /// can't be passed off as one over another.
    pub fn sign(&self, domain: &str, message: &[u8]) -> [u8; 64] {
        self.key.sign(&crate::verified::preimage(domain, message)).to_bytes()
    }

    /// The text of a key file.
    pub fn to_pem(&self) -> Zeroizing<String> {
        let der = self.to_pkcs8();
        Zeroizing::new(format!("{PEM_BEGIN}\n{}\n{PEM_END}\n", BASE64.encode(&der)))
    }

    /// Reads the text of a key file.
    pub fn from_pem(text: &str) -> Result<Self, KeyFileError> {
        let start = text.find(PEM_BEGIN).ok_or(KeyFileError::NotPem)? + PEM_BEGIN.len();
        let length = text[start..].find(PEM_END).ok_or(KeyFileError::NotPem)?;
        let base64: Zeroizing<String> =
            Zeroizing::new(text[start..start + length].chars().filter(|c| !c.is_ascii_whitespace()).collect());
        let der = Zeroizing::new(BASE64.decode(base64.as_bytes()).map_err(|_| KeyFileError::NotPem)?);
        let seed = der.strip_prefix(&PKCS8_PREFIX).ok_or(KeyFileError::NotEd25519)?;
        Ok(Self::from_seed(seed.try_into().map_err(|_| KeyFileError::NotEd25519)?))
    }

    pub(crate) fn to_pkcs8(&self) -> Zeroizing<Vec<u8>> {
        let mut der = Zeroizing::new(Vec::with_capacity(PKCS8_PREFIX.len() + 32));
        der.extend_from_slice(&PKCS8_PREFIX);
        der.extend_from_slice(self.key.as_bytes());
        der
    }

    pub(crate) fn seed(&self) -> &[u8; 32] {
        self.key.as_bytes()
    }
}

/// Shows the public half only.
impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.public())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_round_trips_and_matches_rfc_8410() {
        // RFC 8410 section 10.3, the version 1 example.
        let text = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC\n-----END PRIVATE KEY-----\n";
        let identity = Identity::from_pem(text).unwrap();
        assert_eq!(*identity.to_pem(), text);
        assert_eq!(
            identity.public().to_string(),
            "ed25519:19bf44096984cdfe8541bac167dc3b96c85086aa30b6b6cb0c5c38ad703166e1"
        );
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(Identity::from_pem("").err(), Some(KeyFileError::NotPem));
        assert_eq!(Identity::from_pem(&format!("{PEM_BEGIN}\n***\n{PEM_END}")).err(), Some(KeyFileError::NotPem));
        let other = format!("{PEM_BEGIN}\n{}\n{PEM_END}", BASE64.encode(&[0x30; 48]));
        assert_eq!(Identity::from_pem(&other).err(), Some(KeyFileError::NotEd25519));
        assert!(!format!("{:?}", Identity::from_seed(&[7; 32])).contains("0707"), "a seed must not be printed");
    }
}
