//! Which shard a packet belongs to.
//!
//! The first byte of the destination connection ID, modulo the number of shards; where there is a shard [apart](Layout::with_apart), the byte
//! [`APART_BYTE`] is its own. For a connection's first packets the client
//! chose that ID: one that knows the node's shards picks the byte ([`steering_byte`]), any other gets a random shard. All
//! later packets carry an ID issued by the shard itself:
//!
//! ```text
//!  0       1             4                   8
//! +-------+-------------+-------------------+
//! | shard | random      | checksum(0..4)    |
//! +-------+-------------+-------------------+
//! ```
//!
//! The byte is random among those with the right remainder; the checksum is keyed, so that noise is dropped and not answered
//! with a stateless reset. An observer can link the IDs of a connection as far as they share a remainder.
//!
//! Offsets are those of RFC 8999 (section 5: the invariants of all QUIC versions), so that version negotiation steers too:
//!
//! ```text
//! long header:   0x80 | .., version (4), DCID length (1) at [5], DCID at [6]
//! short header:  0x00 | .., DCID at [1]
//! ```

use std::time::Duration;

use metanode_crypto::CidKey;
use metanode_types::{ShardCount, ShardId};
use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};

/// Bytes of a connection ID that a node issues.
pub const CID_BYTES: usize = 8;

/// Bytes of a connection ID that the checksum covers: the steering byte and three of randomness.
const CID_LEADING_BYTES: usize = 4;

/// Shortest connection ID a client may choose (RFC 9000 section 7.2); a shorter one can't belong to an Initial packet.
const CLIENT_CID_BYTES_MIN: u8 = 8;

/// The byte that leads to the shard apart. Where there is none, it leads to one of the others, always the same.
pub const APART_BYTE: u8 = 255;

/// How the shards of a port share its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Those that share them evenly.
    shards: ShardCount,
    /// One more, behind them, which has those that ask for it, and few others.
    apart: bool,
}

impl From<ShardCount> for Layout {
    fn from(shards: ShardCount) -> Self {
        Self { shards, apart: false }
    }
}

impl Layout {
    /// With one shard more than these, behind them.
    pub fn with_apart(shards: ShardCount) -> Self {
        Self { shards, apart: true }
    }

    /// Those that share connections evenly.
    pub fn shards(self) -> ShardCount {
        self.shards
    }

    /// All of them.
    pub fn all(self) -> ShardCount {
        ShardCount::new(self.shards.get() + u16::from(self.apart)).expect("a shard apart is one of those that may be")
    }

    /// The shard that a byte leads to.
    pub fn of_byte(self, byte: u8) -> ShardId {
        match byte {
            APART_BYTE if self.apart => ShardId(self.shards.get()),
            byte => ShardId(u16::from(byte) % self.shards.get()),
        }
    }
}

/// The shard a datagram belongs to; `None` when it has no byte to tell. The kernel's program follows the same rule.
pub fn owner(datagram: &[u8], layout: impl Into<Layout>) -> Option<ShardId> {
    let is_long = *datagram.first()? & 0x80 != 0;
    let byte = match is_long {
        true if *datagram.get(5)? >= CLIENT_CID_BYTES_MIN => *datagram.get(6)?,
        true => return None,
        false => *datagram.get(1)?,
    };
    Some(layout.into().of_byte(byte))
}

/// A byte that steers to `shard`, chosen by `random` among all that do.
///
/// With more than 256 shards the ones above have no byte; they receive no packets.
pub fn steering_byte(shard: ShardId, layout: impl Into<Layout>, random: u8) -> u8 {
    let Layout { shards, apart } = layout.into();
    if apart && shard.0 == shards.get() {
        return APART_BYTE;
    }
    let bytes = if apart { u16::from(APART_BYTE) } else { 256 };
    let choices = (bytes - shard.0.min(bytes - 1)).div_ceil(shards.get());
    (shard.0 + shards.get() * (u16::from(random) % choices)) as u8
}

/// Issues the connection IDs of one shard.
pub(crate) struct ShardCids {
    pub(crate) shard: ShardId,
    pub(crate) layout: Layout,
    pub(crate) key: CidKey,
}

impl ConnectionIdGenerator for ShardCids {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; CID_BYTES];
        metanode_shard::fill_random(&mut id[..CID_LEADING_BYTES]).expect("the kernel has randomness");
        id[0] = steering_byte(self.shard, self.layout, id[0]);
        let checksum = self.key.checksum(&id[..CID_LEADING_BYTES]);
        id[CID_LEADING_BYTES..].copy_from_slice(&checksum);
        ConnectionId::new(&id)
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        match id.split_at_checked(CID_LEADING_BYTES) {
            Some((leading, checksum)) if checksum == self.key.checksum(leading) => Ok(()),
            _ => Err(InvalidCid),
        }
    }

    fn cid_len(&self) -> usize {
        CID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(n: u16) -> ShardCount {
        ShardCount::new(n).unwrap()
    }

    #[test]
    fn every_byte_choice_steers_to_its_shard() {
        for n in [1, 2, 3, 4, 7, 8, 64, 255, 256] {
            for shard in count(n).iter() {
                let mut seen = std::collections::BTreeSet::new();
                for random in 0..=255 {
                    let byte = steering_byte(shard, count(n), random);
                    assert_eq!(u16::from(byte) % n, shard.0, "{n} {shard} {random}");
                    seen.insert(byte);
                }
                let choices = (0..256u16).filter(|byte| byte % n == shard.0).count();
                assert_eq!(seen.len(), choices, "{n} {shard}");
            }
        }
    }

    #[test]
    fn a_shard_apart_has_one_byte_and_the_others_share_the_rest() {
        for n in [1, 2, 3, 7, 64, 254] {
            let layout = Layout::with_apart(count(n));
            assert_eq!(layout.all(), count(n + 1));
            for shard in count(n).iter() {
                for random in 0..=255 {
                    let byte = steering_byte(shard, layout, random);
                    assert_eq!(layout.of_byte(byte), shard, "{n} {shard} {random}");
                }
            }
            assert_eq!(steering_byte(ShardId(n), layout, 9), APART_BYTE);
            assert_eq!(layout.of_byte(APART_BYTE), ShardId(n));
            assert_eq!(Layout::from(count(n)).of_byte(APART_BYTE), ShardId(255 % n));
        }
    }

    #[test]
    fn issued_ids_validate_steer_home_and_others_do_not() {
        let key = CidKey([7; 32]);
        let mut cids = ShardCids { shard: ShardId(2), layout: count(3).into(), key: key.clone() };
        for _ in 0..100 {
            let id = cids.generate_cid();
            assert!(cids.validate(&id).is_ok());
            let short = [&[0x40], &id[..]].concat();
            assert_eq!(owner(&short, count(3)), Some(ShardId(2)));
            let mut other = id.to_vec();
            other[3] ^= 1;
            assert!(cids.validate(&ConnectionId::new(&other)).is_err());
            assert!(cids.validate(&ConnectionId::new(&id[..7])).is_err());
        }
        assert!(cids.validate(&ConnectionId::new(&[])).is_err());
        assert_eq!(cids.cid_len(), CID_BYTES);
    }

    #[test]
    fn packets_without_a_steering_byte_have_no_owner() {
        assert_eq!(owner(&[], count(2)), None);
        assert_eq!(owner(&[0x40], count(2)), None);
        assert_eq!(owner(&[0x40, 5], count(2)), Some(ShardId(1)));
        assert_eq!(owner(&[0xc0, 0, 0, 0, 1], count(2)), None);
        assert_eq!(owner(&[0xc0, 0, 0, 0, 1, 7, 3], count(2)), None);
        assert_eq!(owner(&[0xc0, 0, 0, 0, 1, 8], count(2)), None);
        assert_eq!(owner(&[0xc0, 0, 0, 0, 1, 8, 3], count(2)), Some(ShardId(1)));
    }
}
