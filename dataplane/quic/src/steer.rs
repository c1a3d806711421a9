//! Which shard a packet belongs to.
//!
//! The first byte of the destination connection ID, modulo the number of shards. For a connection's first packets the client
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

/// The shard a datagram belongs to; `None` when it has no byte to tell. The kernel's program follows the same rule.
pub fn owner(datagram: &[u8], count: ShardCount) -> Option<ShardId> {
    let is_long = *datagram.first()? & 0x80 != 0;
    let byte = match is_long {
        true if *datagram.get(5)? >= CLIENT_CID_BYTES_MIN => *datagram.get(6)?,
        true => return None,
        false => *datagram.get(1)?,
    };
    Some(ShardId(u16::from(byte) % count.get()))
}

/// A byte that steers to `shard`, chosen by `random` among all that do.
///
/// With more than 256 shards the ones above have no byte; they receive no packets.
pub fn steering_byte(shard: ShardId, count: ShardCount, random: u8) -> u8 {
    let choices = (256 - shard.0.min(255)).div_ceil(count.get());
    (shard.0 + count.get() * (u16::from(random) % choices)) as u8
}

/// Issues the connection IDs of one shard.
pub(crate) struct ShardCids {
    pub(crate) shard: ShardId,
    pub(crate) count: ShardCount,
    pub(crate) key: CidKey,
}

impl ConnectionIdGenerator for ShardCids {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; CID_BYTES];
        metanode_shard::fill_random(&mut id[..CID_LEADING_BYTES]).expect("the kernel has randomness");
        id[0] = steering_byte(self.shard, self.count, id[0]);
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
    fn issued_ids_validate_steer_home_and_others_do_not() {
        let key = CidKey([7; 32]);
        let mut cids = ShardCids { shard: ShardId(2), count: count(3), key: key.clone() };
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
