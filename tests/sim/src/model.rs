//! What must be so, as far as the answers to the clients tell.

use std::{collections::BTreeMap, rc::Rc};

use bytes::Bytes;
use metanode_shard::sim::Random;
use metanode_types::{BlobKind, DurabilityClass, Hash};

/// Bytes of a chunk of larger blobs.
pub const CHUNK_BYTES: usize = metanode_types::limits::CHUNK_BYTES;

/// Distinct chunks that larger blobs are made of, besides a last one of their own: so that they share.
const SHARED_CHUNKS: u64 = 5;

/// Whether something is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It must be.
    Yes,
    /// It must not be.
    No,
    /// Not known: under way, refused with an error that says nothing, or acknowledged in memory only.
    Unknown,
}

/// A blob that a client uses.
#[derive(Debug, Clone)]
pub struct Blob {
    /// Address.
    pub hash: Hash,
    /// Contents.
    pub bytes: Bytes,
    /// What it is.
    pub kind: BlobKind,
    /// Of a folder: the blobs that it lists.
    pub children: Vec<Rc<Blob>>,
}

/// A blob's state.
#[derive(Debug, Clone)]
pub struct BlobState {
    /// The blob.
    pub blob: Rc<Blob>,
    /// As the running store must have it.
    pub now: Known,
    /// As the next opening must find it.
    pub durable: Known,
    /// Tags of its client that refer to it.
    pub tags: u32,
}

impl BlobState {
    /// A PUT was acknowledged.
    pub fn put(&mut self, class: DurabilityClass, writes_fail: bool) {
        if class == DurabilityClass::Durable {
            (self.now, self.durable) = (Known::Yes, Known::Yes);
        } else if !writes_fail {
            self.now = Known::Yes;
        }
    }
}

/// A tag's state: where it may point. `None` is nowhere.
#[derive(Debug, Clone)]
pub struct TagState {
    /// In the running store.
    pub now: Vec<Option<Hash>>,
    /// At the next opening.
    pub durable: Vec<Option<Hash>>,
}

/// All clients' states; keys start with the client's number.
#[derive(Debug, Default)]
pub struct Model {
    /// Blobs.
    pub blobs: BTreeMap<(u32, u32), BlobState>,
    /// Tags.
    pub tags: BTreeMap<(u32, u32), TagState>,
    /// What was found wrong.
    pub violations: Vec<String>,
    /// Operations that were answered.
    pub answered: u64,
    /// Of them, refused.
    pub refused: u64,
}

impl Model {
    /// Notes something that must not be.
    pub fn violation(&mut self, what: String) {
        self.violations.push(what);
    }

    /// The power has failed, or the store was closed: what was acknowledged in memory may be gone.
    pub fn restarted(&mut self) {
        for state in self.blobs.values_mut() {
            state.now = state.durable;
            state.tags = 0; // counted anew from what is found
        }
        for state in self.tags.values_mut() {
            state.now.clone_from(&state.durable);
        }
    }

    /// After rot, anything may be missing, and a removal may be forgotten.
    pub fn rotted(&mut self) {
        for state in self.blobs.values_mut() {
            state.durable = Known::Unknown;
        }
        for state in self.tags.values_mut() {
            state.durable.push(None);
        }
    }
}

/// Contents that follow from numbers.
pub fn contents(seed: u64, client: u32, number: u32) -> Bytes {
    let mut random = Random::new(seed ^ (u64::from(client) << 40) ^ (u64::from(number) << 8) ^ 0x6461_7461);
    let length = match random.below(12) {
        // The smallest contents are alike whoever makes them, and no two clients may share a blob.
        0 if client == 0 && number < 3 => u64::from(number),
        0 => 8 + random.below(20),
        1 => 4094 + random.below(4),
        2 => 65_536 + random.below(3) - 1,
        3 => return large(seed, &mut random),
        4 => CHUNK_BYTES as u64 - 1 + random.below(2),
        _ => 8 + random.below(20_000),
    };
    fill(&mut random, length as usize)
}

fn large(seed: u64, random: &mut Random) -> Bytes {
    let mut bytes = Vec::new();
    for _ in 0..1 + random.below(3) {
        let mut shared = Random::new(seed ^ 0x6368_756e_6b00 ^ random.below(SHARED_CHUNKS));
        bytes.extend_from_slice(&fill(&mut shared, CHUNK_BYTES));
    }
    let last = 1 + random.below(40_000) as usize;
    bytes.extend_from_slice(&fill(random, last));
    bytes.into()
}

fn fill(random: &mut Random, length: usize) -> Bytes {
    // One number a sector is enough to tell blocks apart.
    let mut bytes = vec![0; length];
    for piece in bytes.chunks_mut(256) {
        let number = random.next().to_le_bytes();
        piece.chunks_mut(8).for_each(|word| word.copy_from_slice(&number[..word.len()]));
    }
    bytes.into()
}
