//! What large chunks had for a checksum when they last had their hash.
//!
//! Checking a chunk by its BLAKE3 is the largest single cost of serving it, a quarter of the node's CPU time, and nobody relies on it: a
//! client checks every byte by the blob's tree, and this node only wants to refuse rot by name. A place that was checked by hash once
//! is checked by CRC-32C afterwards, seeded as the log's own checksums are, at a fifth of the cost. What does not have its
//! checksum is checked by hash, which decides. So is all that gets into the memory cache, and all that a scrub reads.
//!
//! A place is written once in one opening of the store, so that a sum is that of its chunk as long as this process lives.

use std::cell::RefCell;

use metanode_log::{Location, SegmentIdentity};
use quick_cache::{OptionsBuilder, UnitWeighter, unsync};

/// Places whose sums are kept: those of 16 GiB of chunks, some 3 MiB a shard once all are in use.
const PLACES_MAX: u64 = 65_536;

/// Smaller payloads are hashed side by side, several at a time, and answered from the memory cache after that.
const BYTES_MIN: u32 = 64 * 1024;

/// Checksums by place.
pub(crate) struct Sums {
    store: [u8; 16],
    known: RefCell<unsync::Cache<Location, u32, UnitWeighter, rustc_hash::FxBuildHasher>>,
}

impl Sums {
    /// For the store with this UUID.
    pub(crate) fn new(store: [u8; 16]) -> Self {
        let options = OptionsBuilder::new().weight_capacity(PLACES_MAX).estimated_items_capacity(64).build();
        let options = options.expect("both capacities are set");
        let known = unsync::Cache::with_options(options, UnitWeighter, Default::default(), Default::default());
        Self { store, known: RefCell::new(known) }
    }

    /// Whether these bytes of `location` are those that had their hash. False also when that is not known.
    pub(crate) fn knows(&self, location: Location, bytes: &[u8]) -> bool {
        let known = self.known.borrow().get(&location).copied();
        known.is_some_and(|sum| bytes.len() == location.length as usize && sum == self.sum(location, bytes))
    }

    /// These bytes of `location` have their hash.
    pub(crate) fn learn(&self, location: Location, bytes: &[u8]) {
        if location.length >= BYTES_MIN {
            let sum = self.sum(location, bytes);
            self.known.borrow_mut().insert(location, sum);
        }
    }

    fn sum(&self, location: Location, bytes: &[u8]) -> u32 {
        let identity = SegmentIdentity { store: self.store, log: location.log, segment: location.segment };
        identity.payload_checksum(location.offset.into(), bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_learnt_is_known_and_only_as_it_was() {
        let sums = Sums::new([7; 16]);
        let bytes = vec![5; BYTES_MIN as usize];
        let place = Location { log: 0, segment: 3, offset: 4096, length: BYTES_MIN };
        assert!(!sums.knows(place, &bytes));
        sums.learn(place, &bytes);
        assert!(sums.knows(place, &bytes));
        assert!(!sums.knows(place, &bytes[1..]));
        assert!(!sums.knows(Location { segment: 4, ..place }, &bytes));
        for bit in [0, 8 * 1000 + 3, 8 * bytes.len() - 1] {
            let mut rotten = bytes.clone();
            rotten[bit / 8] ^= 1 << (bit % 8);
            assert!(!sums.knows(place, &rotten), "bit {bit}");
        }
    }

    #[test]
    fn small_payloads_are_not_kept() {
        let sums = Sums::new([7; 16]);
        let place = Location { log: 0, segment: 0, offset: 4096, length: 100 };
        sums.learn(place, &[0; 100]);
        assert!(!sums.knows(place, &[0; 100]));
    }
}
