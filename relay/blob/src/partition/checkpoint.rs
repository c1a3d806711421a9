//! The index of a partition as bytes, so that a start need not read the whole log.
//!
//! A checkpoint is *fuzzy*: it is written in steps while the partition changes. It says up to which frame everything is in it
//! ([`Coverage`]); what comes behind that frame is read from the log and wins, whether the checkpoint has it already or not.
//! References are not in it: they are counted again.
//!
//! ```text
//! header: "MNCKPT\0\x02" | store uuid (16) | shard u16 | shards u16 | active segment u32 | boot u64, from 1 | sequence u64
//! entry:  kind u8 (record kind) | flags u8 | log u16 | segment u32 | offset u32 | length u32 | key (32)
//!         chunks: payload checksum u32      roots: blob size u64      tombstones: boot u64 | sequence u64
//! end:    0 u8 | BLAKE3 of all before (32)
//! ```

use metanode_log::{Location, RecordFlags, RecordKind, Table, format::RecordHead};
use metanode_types::{Hash, limits::BLOB_BYTES_MAX};

use super::{Order, Partition, Recovery, tag_key};

const MAGIC: &[u8; 8] = b"MNCKPT\0\x02";
const HEADER_BYTES: usize = 48;
const ENTRY_BYTES: usize = 48;

/// What a checkpoint holds: all that its partition knew of every log when its own log was about to write frame `sequence`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coverage {
    /// Of the store.
    pub store: [u8; 16],
    /// Partition.
    pub shard: u16,
    /// Number of partitions.
    pub shards: u16,
    /// Segment that frames went to, or would have gone to.
    pub active_segment: u32,
    /// Opening of the store; the first is 1.
    pub boot: u64,
    /// First frame of that opening that is not in the checkpoint.
    pub sequence: u64,
}

impl Coverage {
    /// Whether a segment that was begun in opening `boot` is older than the checkpoint. A younger one may have the number of one that
    /// was there then, and is another.
    pub fn knows_segment(&self, boot: u64) -> bool {
        boot <= self.boot
    }

    /// Whether a frame with records of this partition is in the checkpoint.
    pub fn has_frame(&self, log: u16, order: Order) -> bool {
        order.0 < self.boot || (order.0 == self.boot && (log != self.shard || order.1 < self.sequence))
    }

    /// Whether all frames of a segment that was begun in opening `boot` are.
    pub fn has_segment(&self, log: u16, segment: u32, boot: u64) -> bool {
        boot < self.boot || (boot == self.boot && (log != self.shard || segment < self.active_segment))
    }

    /// The order that entries of the checkpoint have: newer than all it covers, older than what follows.
    fn order(&self) -> Order {
        match self.sequence.checked_sub(1) {
            Some(sequence) => (self.boot, sequence),
            None => (self.boot - 1, u64::MAX),
        }
    }
}

/// The bytes are not a whole checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the checkpoint is damaged")]
pub struct MalformedCheckpoint;

/// A checkpoint being written: call [`next`](Self::next) until `None`, writing what it returns.
#[derive(Debug)]
pub struct Checkpoint {
    hasher: blake3::Hasher,
    header: Option<Vec<u8>>,
    part: usize,
    done: bool,
}

impl Checkpoint {
    /// Begins; what the partition commits from now on may or may not be in it.
    pub fn begin(partition: &Partition, store: [u8; 16], shard: u16, shards: u16) -> Self {
        let mut out = MAGIC.to_vec();
        out.extend(store);
        out.extend(shard.to_le_bytes());
        out.extend(shards.to_le_bytes());
        out.extend(partition.writer.first_open_segment().to_le_bytes());
        out.extend(partition.boot.to_le_bytes());
        // A frame that is in flight is not in the index yet.
        out.extend(partition.writer.committed_sequence().to_le_bytes());
        Self { hasher: blake3::Hasher::new(), header: Some(out), part: 0, done: false }
    }

    /// The next bytes: a part of 1/1024 of the entries.
    pub fn next(&mut self, partition: &Partition) -> Option<Vec<u8>> {
        if let Some(header) = self.header.take() {
            self.hasher.update(&header);
            return Some(header);
        }
        if self.done {
            return None;
        }
        let mut out = Vec::new();
        if self.part < Table::<()>::PARTS {
            for (key, chunk) in partition.chunks.part(self.part) {
                entry(&mut out, RecordKind::Chunk, RecordFlags(0), chunk.location, key);
                out.extend(chunk.checksum.to_le_bytes());
            }
            for (key, root) in partition.roots.part(self.part) {
                entry(&mut out, RecordKind::Root, root.flags, root.location, key);
                out.extend(root.size_bytes.to_le_bytes());
            }
            self.part += 1;
        } else {
            for (name, tag) in &partition.tags {
                entry(&mut out, RecordKind::Tag, RecordFlags(0), tag.location, &tag_key(name));
            }
            for (key, tombstone) in &partition.tombstones {
                entry(&mut out, tombstone.kind, RecordFlags(0), tombstone.location, key);
                out.extend(tombstone.order.0.to_le_bytes());
                out.extend(tombstone.order.1.to_le_bytes());
            }
            out.push(0);
            self.done = true;
        }
        self.hasher.update(&out);
        if self.done {
            out.extend(self.hasher.finalize().as_bytes());
        }
        Some(out)
    }
}

fn entry(out: &mut Vec<u8>, kind: RecordKind, flags: RecordFlags, location: Location, key: &Hash) {
    out.extend([kind as u8, flags.0]);
    out.extend(location.log.to_le_bytes());
    out.extend(location.segment.to_le_bytes());
    out.extend(location.offset.to_le_bytes());
    out.extend(location.length.to_le_bytes());
    out.extend(key.0);
}

impl Coverage {
    /// Reads the header of a checkpoint.
    pub fn decode(bytes: &[u8]) -> Result<Self, MalformedCheckpoint> {
        let header: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or(MalformedCheckpoint)?;
        if &header[..8] != MAGIC {
            return Err(MalformedCheckpoint);
        }
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let boot = Some(u64_at(32)).filter(|boot| *boot > 0).ok_or(MalformedCheckpoint)?;
        Ok(Self {
            store: std::array::from_fn(|i| header[8 + i]),
            shard: u16::from_le_bytes([header[24], header[25]]),
            shards: u16::from_le_bytes([header[26], header[27]]),
            active_segment: u32::from_le_bytes([header[28], header[29], header[30], header[31]]),
            boot,
            sequence: u64_at(40),
        })
    }
}

impl Recovery {
    /// Takes the entries of a whole checkpoint. `exists` says whether the segment that an entry points to is still the one that the
    /// checkpoint means; if not, the entry was moved or removed after the checkpoint, and what became of it is in the log.
    /// `owner` says which recovery gets a key: another number of shards may read it.
    pub fn load(
        bytes: &[u8],
        exists: impl Fn(u16, u32) -> bool,
        mut owner: impl FnMut(&Hash) -> usize,
        recoveries: &mut [Self],
    ) -> Result<(), MalformedCheckpoint> {
        let coverage = Coverage::decode(bytes)?;
        let (body, sum) = bytes.split_last_chunk::<32>().ok_or(MalformedCheckpoint)?;
        if blake3::hash(body) != *sum {
            return Err(MalformedCheckpoint);
        }
        let mut rest = body.get(HEADER_BYTES..).ok_or(MalformedCheckpoint)?;
        while rest.first().is_some_and(|kind| *kind != 0) {
            let (entry, tail) = rest.split_first_chunk::<ENTRY_BYTES>().ok_or(MalformedCheckpoint)?;
            rest = tail;
            let kind = RecordKind::from_u8(entry[0]).ok_or(MalformedCheckpoint)?;
            let u32_at = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
            let mut head = RecordHead {
                kind,
                flags: RecordFlags(entry[1]),
                key: Hash(std::array::from_fn(|i| entry[16 + i])),
                blob_bytes: 0,
                location: Location {
                    log: u16::from_le_bytes([entry[2], entry[3]]),
                    segment: u32_at(4),
                    offset: u32_at(8),
                    length: u32_at(12),
                },
                checksum: 0,
            };
            let mut order = coverage.order();
            let mut number = || -> Result<u64, MalformedCheckpoint> {
                let (number, tail) = rest.split_first_chunk::<8>().ok_or(MalformedCheckpoint)?;
                rest = tail;
                Ok(u64::from_le_bytes(*number))
            };
            match kind {
                RecordKind::Root => {
                    head.blob_bytes =
                        Some(number()?).filter(|size| *size <= BLOB_BYTES_MAX).ok_or(MalformedCheckpoint)?;
                }
                RecordKind::Unroot | RecordKind::Untag => order = (number()?, number()?),
                RecordKind::Chunk => {
                    let (checksum, tail) = rest.split_first_chunk::<4>().ok_or(MalformedCheckpoint)?;
                    rest = tail;
                    head.checksum = u32::from_le_bytes(*checksum);
                }
                RecordKind::Tag => {}
                RecordKind::Whole => return Err(MalformedCheckpoint),
            }
            if exists(head.location.log, head.location.segment) {
                recoveries[owner(&head.key)].record(&head, order);
            }
        }
        if rest == [0] { Ok(()) } else { Err(MalformedCheckpoint) }
    }
}
