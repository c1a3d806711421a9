use std::{fmt, num::NonZeroU16};

use crate::{Hash, limits::SHARDS_MAX};

/// How many shards a node runs: 1 to [`SHARDS_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardCount(NonZeroU16);

impl ShardCount {
    /// `None` for 0 and for more than [`SHARDS_MAX`].
    pub fn new(count: u16) -> Option<Self> {
        NonZeroU16::new(count).filter(|n| n.get() <= SHARDS_MAX).map(Self)
    }

    /// The count.
    pub const fn get(self) -> u16 {
        self.0.get()
    }

    /// All shards, in order.
    pub fn iter(self) -> impl Iterator<Item = ShardId> {
        (0..self.get()).map(ShardId)
    }
}

/// One executor of a node: 0 to count − 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ShardId(pub u16);

impl ShardId {
    /// The shard that owns `hash` among `count`: an even split of the last four bytes, read as a little-endian number.
    ///
    /// Hash tables use the first bytes, so the two stay independent. Clients compute the same, so it is part of the protocol.
    pub fn owner_of(hash: &Hash, count: ShardCount) -> Self {
        let h = &hash.0;
        let tail = u32::from_le_bytes([h[28], h[29], h[30], h[31]]);
        Self(((u64::from(tail) * u64::from(count.get())) >> 32) as u16)
    }

    /// As an index into per-shard arrays.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shard_owns_an_even_part() {
        for count in [1u16, 2, 3, 4, 7, 64] {
            let shards = ShardCount::new(count).unwrap();
            let mut owned = vec![0u32; count as usize];
            for i in 0..64_000u32 {
                let mut bytes = [0; 32];
                bytes[28..].copy_from_slice(&(i.wrapping_mul(0x9e37_79b9)).to_le_bytes());
                owned[ShardId::owner_of(&Hash(bytes), shards).index()] += 1;
            }
            let mean = 64_000 / u32::from(count);
            assert!(owned.iter().all(|&n| n.abs_diff(mean) <= mean / 10 + 2), "{count}: {owned:?}");
        }
    }

    #[test]
    fn counts_outside_the_limit_are_refused() {
        assert_eq!(ShardCount::new(0), None);
        assert_eq!(ShardCount::new(SHARDS_MAX + 1), None);
        assert!(ShardCount::new(SHARDS_MAX).is_some());
    }
}
