//! Tickets: one string that names a node's key, its addresses and, if it is for a blob, the blob's address.
//!
//! Text: `mn1` and the lower-case base32 (RFC 4648, no padding) of
//!
//! ```text
//! node key (32) | address count (1) | addresses | 0 or 1 | hash (32) if 1 | checksum (4)
//! address: 4 | IPv4 (4) | port (2, little-endian)   or   6 | IPv6 (16) | port (2)
//! checksum: the first bytes of BLAKE3 derive_key("metanode 2026 ticket checksum v1", all before)
//! ```
//!
//! The checksum catches typing errors. It proves nothing: the handshake does, which accepts only the named key.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use data_encoding::BASE32_NOPAD;
use metanode_types::{Hash, NodeKey, limits::TICKET_ADDRESSES_MAX};

use crate::cursor::{Cursor, Short};

/// Names a node, and perhaps a blob on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// Who must answer.
    pub node: NodeKey,
    /// Where to try, in order; one to [`TICKET_ADDRESSES_MAX`].
    pub addresses: Vec<SocketAddr>,
    /// The blob.
    pub hash: Option<Hash>,
}

/// Why a text is not a ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Another prefix.
    #[error("a ticket starts with {}", Ticket::PREFIX)]
    Prefix,
    /// Another alphabet.
    #[error("behind {} a ticket is base32: a character is missing or mistyped", Ticket::PREFIX)]
    Encoding,
    /// A character is wrong or missing.
    #[error("the ticket's checksum is wrong: a character is missing or mistyped")]
    Checksum,
    /// The parts do not fit.
    #[error("the ticket's contents are malformed")]
    Malformed,
}

impl Ticket {
    /// What the text of every ticket begins with.
    pub const PREFIX: &str = "mn1";

    /// The same node without the blob.
    pub fn node_only(&self) -> Self {
        Self { hash: None, ..self.clone() }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.node.as_bytes().to_vec();
        let addresses = &self.addresses[..self.addresses.len().min(TICKET_ADDRESSES_MAX)];
        out.push(addresses.len() as u8);
        for address in addresses {
            match address.ip() {
                IpAddr::V4(ip) => {
                    out.push(4);
                    out.extend(ip.octets());
                }
                IpAddr::V6(ip) => {
                    out.push(6);
                    out.extend(ip.octets());
                }
            }
            out.extend(address.port().to_le_bytes());
        }
        out.push(u8::from(self.hash.is_some()));
        out.extend(self.hash.iter().flat_map(|hash| hash.0));
        let sum = checksum(&out);
        out.extend(sum);
        out
    }

    fn from_bytes(bytes: &[u8]) -> Result<Self, TicketError> {
        let (body, sum) = bytes.split_last_chunk::<4>().ok_or(TicketError::Checksum)?;
        if checksum(body) != *sum {
            return Err(TicketError::Checksum);
        }
        let mut cursor = Cursor::new(body);
        let ticket = Self::parse(&mut cursor).map_err(|Short| TicketError::Malformed)?;
        ticket.filter(|_| cursor.is_empty()).ok_or(TicketError::Malformed)
    }

    fn parse(cursor: &mut Cursor<'_>) -> Result<Option<Self>, Short> {
        let node = NodeKey(cursor.array()?);
        let count = usize::from(cursor.u8()?);
        if count == 0 || count > TICKET_ADDRESSES_MAX {
            return Ok(None);
        }
        let mut addresses = Vec::with_capacity(count);
        for _ in 0..count {
            let ip: IpAddr = match cursor.u8()? {
                4 => cursor.array::<4>()?.into(),
                6 => cursor.array::<16>()?.into(),
                _ => return Ok(None),
            };
            addresses.push(SocketAddr::new(ip, cursor.u16()?));
        }
        let hash = match cursor.u8()? {
            0 => None,
            1 => Some(Hash(cursor.array()?)),
            _ => return Ok(None),
        };
        Ok(Some(Self { node, addresses, hash }))
    }
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    let [a, b, c, d, ..] = metanode_crypto::derive("metanode 2026 ticket checksum v1", bytes);
    [a, b, c, d]
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", Self::PREFIX, BASE32_NOPAD.encode(&self.to_bytes()).to_ascii_lowercase())
    }
}

impl FromStr for Ticket {
    type Err = TicketError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim().to_ascii_uppercase();
        let base32 = text.strip_prefix("MN1").ok_or(TicketError::Prefix)?;
        let bytes = BASE32_NOPAD.decode(base32.as_bytes()).map_err(|_| TicketError::Encoding)?;
        Self::from_bytes(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ticket() -> Ticket {
        Ticket {
            node: NodeKey([1; 32]),
            addresses: vec!["127.0.0.1:4433".parse().unwrap(), "[::1]:4433".parse().unwrap()],
            hash: Some(Hash([2; 32])),
        }
    }

    #[test]
    fn golden_text() {
        let text = ticket().to_string();
        let golden = concat!(
            "mn1aeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqebd7aaaacuirayaaaaaaaaaaa",
            "aaaaaaaaaaaaaavceibaibaeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqcaibaeaqcaibp7xurnq"
        );
        assert_eq!(text, golden);
        assert_eq!(text.parse(), Ok(ticket()));
    }

    #[test]
    fn every_mistyped_character_is_caught() {
        let text = ticket().to_string();
        for at in 3..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] = if bytes[at] == b'a' { b'b' } else { b'a' };
            let typo = String::from_utf8(bytes).unwrap();
            assert!(typo.parse::<Ticket>().is_err(), "{at}");
        }
        assert_eq!("mn2aaaa".parse::<Ticket>(), Err(TicketError::Prefix));
        assert_eq!("mn1!".parse::<Ticket>(), Err(TicketError::Encoding));
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut signed = bytes.clone();
            signed.extend(checksum(&bytes));
            if let Ok(ticket) = Ticket::from_bytes(&signed) {
                prop_assert_eq!(ticket.to_bytes(), signed);
            }
        }
    }
}
