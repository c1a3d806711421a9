use std::{fmt, str::FromStr};

use data_encoding::HEXLOWER_PERMISSIVE;
use rkyv::{Archive, Deserialize, Serialize};

/// An Ed25519 public key: who a node or an operator is.
///
/// Text form: `ed25519:` and 64 hexadecimal digits. Holding a `NodeKey` says nothing about the key being a valid curve point;
/// `metanode-crypto` decides that when a signature is checked.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Archive, Serialize, Deserialize)]
pub struct NodeKey(pub [u8; 32]);

const PREFIX: &str = "ed25519:";

impl NodeKey {
    /// The bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", HEXLOWER_PERMISSIVE.encode_display(&self.0))
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeKey({self})")
    }
}

/// The text is not `ed25519:` and 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a key: expected ed25519: and 64 hexadecimal digits")]
pub struct ParseKeyError;

impl FromStr for NodeKey {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_prefix(PREFIX).ok_or(ParseKeyError)?;
        digits.parse::<crate::Hash>().map(|hash| Self(hash.0)).map_err(|_| ParseKeyError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_round_trips() {
        let key = NodeKey([0xab; 32]);
        assert_eq!(key.to_string().parse(), Ok(key));
        assert_eq!("ed25519:ab".parse::<NodeKey>(), Err(ParseKeyError));
        assert_eq!(key.to_string()[8..].parse::<NodeKey>(), Err(ParseKeyError));
    }
}
