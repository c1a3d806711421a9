//! The memory cache of a shard: whole blobs, verified.

use std::cell::RefCell;

use bytes::Bytes;
use metanode_types::Hash;
use quick_cache::{OptionsBuilder, Weighter, unsync};

/// Bytes of bookkeeping that each entry is charged with: key, links, table slot, allocation header.
const ENTRY_BYTES: u64 = 112;

/// Size below which half of the cache would hold more entries than its tables are made for at first; they grow.
const TYPICAL_BLOB_BYTES: u64 = 4096;

#[derive(Clone)]
struct ByBytes;

impl Weighter<Hash, Bytes> for ByBytes {
    fn weight(&self, _hash: &Hash, bytes: &Bytes) -> u64 {
        bytes.len() as u64 + ENTRY_BYTES
    }
}

/// Evicts by CLOCK-Pro: what was used twice outlives what was used once.
pub(crate) struct Cache {
    blobs: RefCell<unsync::Cache<Hash, Bytes, ByBytes, rustc_hash::FxBuildHasher>>,
    bytes_max: u64,
}

impl Cache {
    pub(crate) fn new(bytes_max: u64) -> Self {
        let options = OptionsBuilder::new()
            .weight_capacity(bytes_max)
            .estimated_items_capacity((bytes_max / TYPICAL_BLOB_BYTES).clamp(64, 1 << 20) as usize)
            .build()
            .expect("both capacities are set");
        let blobs = unsync::Cache::with_options(options, ByBytes, rustc_hash::FxBuildHasher, Default::default());
        Self { blobs: RefCell::new(blobs), bytes_max }
    }

    pub(crate) fn get(&self, hash: &Hash) -> Option<Bytes> {
        self.blobs.borrow().get(hash).cloned()
    }

    /// Takes bytes that are all of their allocation, or nearly, as reads return them; a slice of a large buffer would keep all of it alive.
    pub(crate) fn insert(&self, hash: Hash, bytes: Bytes) {
        if bytes.len() as u64 <= self.bytes_max / 8 {
            self.blobs.borrow_mut().insert(hash, bytes);
        }
    }

    pub(crate) fn remove(&self, hash: &Hash) {
        self.blobs.borrow_mut().remove(hash);
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.blobs.borrow().weight()
    }
}
