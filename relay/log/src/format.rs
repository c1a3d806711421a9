//! Layout on disk, version 1. Numbers are little-endian; offsets and lengths are bytes.
//!
//! ```text
//! segment   | header block (4096) | frame | frame | …
//!
//! segment header
//!   0  "MNSEG\0\0\x01"      8
//!   8  store uuid          16
//!  24  log                u16 | reserved u16 | segment u32
//!  32  boot               u64   number of the store's opening that wrote it
//!  40  checksum           u32   CRC-32C of bytes 0..40
//!
//! frame     | frame header (64) | record heads (64 each) | pad to 4096 | payloads | pad to 4096 |
//!
//! frame header
//!   0  "MNFR"               4
//!   4  record count       u32
//!   8  frame length       u32   multiple of 4096
//!  12  previous           u32   checksum of the log's previous frame, 0 for the first of a boot
//!  16  sequence           u64   counts the frames of a log
//!  24  boot               u64
//!  32  reserved            28
//!  60  checksum           u32   CRC-32C, seeded, of bytes 0..60 and all record heads
//!
//! record head
//!   0  kind                u8 | flags u8 | stored form u8 (0 = raw) | reserved u8
//!   4  payload length     u32
//!   8  key                 32
//!  40  payload offset     u32   from the start of the frame
//!  44  payload checksum   u32   CRC-32C, seeded with its own offset
//!  48  blob size          u64   of roots; at most the largest blob's
//!  56  reserved             8
//! ```
//!
//! Payloads whose length is a multiple of 4096 come first, so they are aligned and a direct read of one touches no other block.
//! A checksum's seed is the CRC-32C of store uuid, log, segment and the offset of what it covers.

use bytes::Bytes;
use metanode_types::{
    Hash,
    limits::BLOB_BYTES_MAX,
    sabotage::{self, Sabotage},
};

/// Unit of writing: the block of every device we know, and of O_DIRECT.
pub const BLOCK_BYTES: usize = 4096;

/// Size of a frame header, and of a record head.
pub const HEAD_BYTES: usize = 64;

/// Largest frame that is read back: a corrupt length can't ask for more. It holds the largest root record (4 MiB) and its head.
pub const FRAME_BYTES_MAX: usize = 8 * 1024 * 1024;

const SEGMENT_MAGIC: &[u8; 8] = b"MNSEG\0\0\x01";
const FRAME_MAGIC: &[u8; 4] = b"MNFR";

/// What a record says. The numbers are the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RecordKind {
    /// A chunk: key is the BLAKE3 of the payload.
    Chunk = 1,
    /// A root: key is a blob's address. A blob of at most one chunk has no payload here, its chunk has the same key; a larger
    /// one's payload is its list of extents.
    Root = 2,
    /// A chunk and the root of the blob that it is.
    Whole = 3,
    /// The root with this key was removed.
    Unroot = 4,
    /// A tag: key is the BLAKE3 of its name; the payload is the target's address (32) and the name.
    Tag = 5,
    /// The tag with this key was removed.
    Untag = 6,
}

impl RecordKind {
    /// The kind with this number.
    pub fn from_u8(value: u8) -> Option<Self> {
        [Self::Chunk, Self::Root, Self::Whole, Self::Unroot, Self::Tag, Self::Untag]
            .into_iter()
            .find(|kind| *kind as u8 == value)
    }
}

/// Bits of a root record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RecordFlags(pub u8);

impl RecordFlags {
    /// The blob stays by itself.
    pub const HELD: u8 = 1;
    /// The blob is a folder manifest.
    pub const FOLDER: u8 = 2;
    /// The node itself needs the blob.
    pub const KEPT: u8 = 4;

    /// Whether a bit is set.
    pub const fn has(self, bit: u8) -> bool {
        self.0 & bit != 0
    }
}

/// Which file a segment is; part of every checksum in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SegmentIdentity {
    /// Of the store.
    pub store: [u8; 16],
    /// Number of the log.
    pub log: u16,
    /// Number of the segment in its log; no two files have the same, and none comes twice in one opening of the store.
    pub segment: u32,
}

impl SegmentIdentity {
    /// The seed of a checksum over bytes that start at `offset`.
    fn seed(&self, offset: u64) -> u32 {
        let seed = crc32c::crc32c(&self.store);
        let mut place = [0; 14];
        place[..2].copy_from_slice(&self.log.to_le_bytes());
        let unseeded = sabotage::is_on(Sabotage::RecycleWithoutGeneration);
        place[2..6].copy_from_slice(&(if unseeded { 0 } else { self.segment }).to_le_bytes());
        place[6..].copy_from_slice(&offset.to_le_bytes());
        crc32c::crc32c_append(seed, &place)
    }

    /// The checksum of a payload that starts at `offset` of the segment.
    pub fn payload_checksum(&self, offset: u64, payload: &[u8]) -> u32 {
        crc32c::crc32c_append(self.seed(offset), payload)
    }

    /// The header block.
    pub fn encode_header(&self, boot: u64) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES];
        block[..8].copy_from_slice(SEGMENT_MAGIC);
        block[8..24].copy_from_slice(&self.store);
        block[24..26].copy_from_slice(&self.log.to_le_bytes());
        block[28..32].copy_from_slice(&self.segment.to_le_bytes());
        block[32..40].copy_from_slice(&boot.to_le_bytes());
        let sum = crc32c::crc32c(&block[..40]);
        block[40..44].copy_from_slice(&sum.to_le_bytes());
        block
    }

    /// The identity and boot in a header block; `None` when it is not one.
    pub fn decode_header(block: &[u8]) -> Option<(Self, u64)> {
        let header = block.get(..44)?;
        if &header[..8] != SEGMENT_MAGIC || crc32c::crc32c(&header[..40]) != u32_at(header, 40) {
            return None;
        }
        let store = header[8..24].try_into().ok()?;
        let log = u16::from_le_bytes([header[24], header[25]]);
        Some((Self { store, log, segment: u32_at(header, 28) }, u64_at(header, 32)))
    }
}

/// Where a payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Location {
    /// Log.
    pub log: u16,
    /// Segment of the log.
    pub segment: u32,
    /// Byte of the segment where the payload starts; for a record without one, where the frame starts.
    pub offset: u32,
    /// Bytes of the payload.
    pub length: u32,
}

/// Where a payload was laid out, and its checksum, which is of that place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Where.
    pub location: Location,
    /// [`SegmentIdentity::payload_checksum`].
    pub checksum: u32,
}

/// A record to be written.
#[derive(Debug, Clone)]
pub struct Record {
    /// What it says.
    pub kind: RecordKind,
    /// Of roots.
    pub flags: RecordFlags,
    /// By kind.
    pub key: Hash,
    /// Of roots: bytes of the blob.
    pub blob_bytes: u64,
    /// By kind; may be empty.
    pub payload: Bytes,
}

impl Record {
    /// A record with nothing but a key.
    pub fn bare(kind: RecordKind, key: Hash) -> Self {
        Self { kind, flags: RecordFlags(0), key, blob_bytes: 0, payload: Bytes::new() }
    }
}

/// A frame ready to be written: `head` at its start, each payload at its place, zeros between, `length` bytes in all.
#[derive(Debug)]
pub struct FrameImage {
    /// Header and record heads.
    pub head: Vec<u8>,
    /// Offset in the frame, and bytes.
    pub payloads: Vec<(u32, Bytes)>,
    /// Multiple of [`BLOCK_BYTES`].
    pub length: u32,
    /// Of the header; the next frame carries it.
    pub checksum: u32,
}

impl FrameImage {
    /// The frame's bytes in order, in pieces.
    pub fn for_each_piece(&self, mut take: impl FnMut(&[u8])) {
        const ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];
        let mut at = self.head.len();
        take(&self.head);
        for (offset, payload) in &self.payloads {
            take(&ZEROS[..*offset as usize - at]);
            take(payload);
            at = *offset as usize + payload.len();
        }
        take(&ZEROS[..self.length as usize - at]);
    }

    /// Writes the frame into `out`, which has its length.
    pub fn copy_to(&self, out: &mut [u8]) {
        assert_eq!(out.len(), self.length as usize, "the buffer has the frame's length");
        let mut at = 0;
        self.for_each_piece(|piece| {
            out[at..at + piece.len()].copy_from_slice(piece);
            at += piece.len();
        });
    }
}

/// Where a frame goes.
#[derive(Debug, Clone, Copy)]
pub struct FramePlace {
    /// The file.
    pub identity: SegmentIdentity,
    /// Byte of the file.
    pub offset: u32,
    /// Number of the frame in its log.
    pub sequence: u64,
    /// Of this opening of the store.
    pub boot: u64,
    /// Checksum of the frame before.
    pub previous: u32,
}

/// Bytes of a frame with these payloads.
pub fn frame_bytes(records: usize, payload_bytes: usize) -> usize {
    let head = (HEAD_BYTES * (records + 1)).next_multiple_of(BLOCK_BYTES);
    (head + payload_bytes).next_multiple_of(BLOCK_BYTES)
}

/// Lays a frame out. Returns it with the place of each record, in the order of `records`.
pub fn encode_frame(place: FramePlace, records: &[Record]) -> (FrameImage, Vec<Placed>) {
    let heads = (HEAD_BYTES * (records.len() + 1)).next_multiple_of(BLOCK_BYTES);
    let aligned = |r: &Record| r.payload.len().is_multiple_of(BLOCK_BYTES);
    let mut at = heads as u32;
    let mut offsets = vec![0u32; records.len()];
    let mut payloads = Vec::with_capacity(records.len());
    for want_aligned in [true, false] {
        for (i, record) in records.iter().enumerate().filter(|(_, r)| aligned(r) == want_aligned) {
            if !record.payload.is_empty() {
                offsets[i] = at;
                payloads.push((at, record.payload.clone()));
                at += record.payload.len() as u32;
            }
        }
    }
    let length = at.next_multiple_of(BLOCK_BYTES as u32);
    assert!(length as usize <= FRAME_BYTES_MAX, "the writer cuts batches below the limit");
    let mut head = vec![0; HEAD_BYTES * (records.len() + 1)];
    head[..4].copy_from_slice(FRAME_MAGIC);
    head[4..8].copy_from_slice(&(records.len() as u32).to_le_bytes());
    head[8..12].copy_from_slice(&length.to_le_bytes());
    head[12..16].copy_from_slice(&place.previous.to_le_bytes());
    head[16..24].copy_from_slice(&place.sequence.to_le_bytes());
    head[24..32].copy_from_slice(&place.boot.to_le_bytes());
    let mut placed = Vec::with_capacity(records.len());
    for (i, record) in records.iter().enumerate() {
        let absolute = place.offset + offsets[i];
        let out = &mut head[HEAD_BYTES * (i + 1)..HEAD_BYTES * (i + 2)];
        out[0] = record.kind as u8;
        out[1] = record.flags.0;
        out[4..8].copy_from_slice(&(record.payload.len() as u32).to_le_bytes());
        out[8..40].copy_from_slice(&record.key.0);
        out[40..44].copy_from_slice(&offsets[i].to_le_bytes());
        let checksum = place.identity.payload_checksum(absolute.into(), &record.payload);
        out[44..48].copy_from_slice(&checksum.to_le_bytes());
        out[48..56].copy_from_slice(&record.blob_bytes.to_le_bytes());
        let SegmentIdentity { log, segment, .. } = place.identity;
        let location = Location { log, segment, offset: absolute, length: record.payload.len() as u32 };
        placed.push(Placed { location, checksum });
    }
    let checksum = frame_checksum(&place.identity, place.offset, &head);
    head[60..64].copy_from_slice(&checksum.to_le_bytes());
    (FrameImage { head, payloads, length, checksum }, placed)
}

fn frame_checksum(identity: &SegmentIdentity, offset: u32, head: &[u8]) -> u32 {
    let seed = identity.seed(u64::from(offset) | 1 << 63); // never the seed of a payload at the same place
    crc32c::crc32c_append(crc32c::crc32c_append(seed, &head[..60]), &head[HEAD_BYTES..])
}

/// The fixed part of a frame that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Records.
    pub records: usize,
    /// Bytes of the frame.
    pub length: u32,
    /// Checksum of the frame before.
    pub previous: u32,
    /// Number in the log.
    pub sequence: u64,
    /// Opening of the store that wrote it.
    pub boot: u64,
    /// Of this frame.
    pub checksum: u32,
}

impl FrameHeader {
    /// Bytes of header and record heads.
    pub fn head_bytes(&self) -> usize {
        HEAD_BYTES * (self.records + 1)
    }

    /// Reads the first [`HEAD_BYTES`] bytes of what may be a frame; its checksum is not checked yet.
    pub fn peek(bytes: &[u8]) -> Option<Self> {
        let header = bytes.get(..HEAD_BYTES)?;
        let header = (&header[..4] == FRAME_MAGIC).then_some(header)?;
        let this = Self {
            records: u32_at(header, 4) as usize,
            length: u32_at(header, 8),
            previous: u32_at(header, 12),
            sequence: u64_at(header, 16),
            boot: u64_at(header, 24),
            checksum: u32_at(header, 60),
        };
        let sane = this.length as usize <= FRAME_BYTES_MAX
            && (this.length as usize).is_multiple_of(BLOCK_BYTES)
            && this.records < FRAME_BYTES_MAX / HEAD_BYTES
            && this.head_bytes() <= this.length as usize;
        sane.then_some(this)
    }
}

/// A record that was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHead {
    /// What it says.
    pub kind: RecordKind,
    /// Of roots.
    pub flags: RecordFlags,
    /// By kind.
    pub key: Hash,
    /// Of roots: bytes of the blob.
    pub blob_bytes: u64,
    /// Where its payload is.
    pub location: Location,
    /// Of the payload.
    pub checksum: u32,
}

/// Reads the record heads of the frame at `offset` from its first `head_bytes()` bytes; `None` when the checksum or a field is
/// wrong.
pub fn decode_records(
    identity: &SegmentIdentity,
    offset: u32,
    header: &FrameHeader,
    head: &[u8],
) -> Option<Vec<RecordHead>> {
    let head = head.get(..header.head_bytes())?;
    if frame_checksum(identity, offset, head) != header.checksum {
        return None;
    }
    head[HEAD_BYTES..]
        .chunks_exact(HEAD_BYTES)
        .map(|bytes| {
            let length = u32_at(bytes, 4);
            let at = u32_at(bytes, 40);
            let inside = u64::from(at) + u64::from(length) <= u64::from(header.length);
            Some(RecordHead {
                kind: RecordKind::from_u8(bytes[0]).filter(|_| inside && bytes[2] == 0)?,
                flags: RecordFlags(bytes[1]),
                key: Hash(bytes[8..40].try_into().ok()?),
                blob_bytes: Some(u64_at(bytes, 48)).filter(|size| *size <= BLOB_BYTES_MAX)?,
                location: Location { log: identity.log, segment: identity.segment, offset: offset + at, length },
                checksum: u32_at(bytes, 44),
            })
        })
        .collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const IDENTITY: SegmentIdentity = SegmentIdentity { store: [7; 16], log: 1, segment: 2 };

    pub(crate) fn record(kind: RecordKind, byte: u8, length: usize) -> Record {
        let payload = Bytes::from(vec![byte; length]);
        Record { kind, flags: RecordFlags(0), key: Hash([byte; 32]), blob_bytes: length as u64, payload }
    }

    #[test]
    fn golden_bytes_of_a_segment_header() {
        let block = IDENTITY.encode_header(3);
        let mut golden = b"MNSEG\0\0\x01".to_vec();
        golden.extend([7; 16]);
        golden.extend([1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        golden.extend(0x1d5b_c8c8u32.to_le_bytes());
        assert_eq!(block[..40], golden[..40]);
        assert_eq!(block.len(), BLOCK_BYTES);
        assert_eq!(SegmentIdentity::decode_header(&block), Some((IDENTITY, 3)));
        let mut other = block.clone();
        other[24] ^= 1;
        assert_eq!(SegmentIdentity::decode_header(&other), None);
    }

    #[test]
    fn aligned_payloads_come_first_and_everything_reads_back() {
        let records = [
            record(RecordKind::Root, 1, 0),
            record(RecordKind::Whole, 2, 100),
            record(RecordKind::Chunk, 3, 4096),
            record(RecordKind::Chunk, 4, 8192),
        ];
        let place = FramePlace { identity: IDENTITY, offset: 8192, sequence: 9, boot: 3, previous: 0xabcd };
        let (image, placed) = encode_frame(place, &records);
        let locations: Vec<_> = placed.iter().map(|placed| placed.location).collect();
        assert_eq!(image.length as usize, frame_bytes(4, 100 + 4096 + 8192));
        assert_eq!(locations[2].offset, 8192 + 4096);
        assert_eq!(locations[3].offset, 8192 + 8192);
        assert_eq!(locations[1].offset, 8192 + 16384);
        let mut bytes = vec![0xff; image.length as usize];
        image.copy_to(&mut bytes);
        let header = FrameHeader::peek(&bytes).unwrap();
        assert_eq!((header.sequence, header.boot, header.previous, header.records), (9, 3, 0xabcd, 4));
        let heads = decode_records(&IDENTITY, 8192, &header, &bytes).unwrap();
        for ((head, record), Placed { location, checksum }) in heads.iter().zip(&records).zip(&placed) {
            assert_eq!((head.kind, head.key, head.location), (record.kind, record.key, *location));
            assert_eq!(head.checksum, *checksum);
            let start = (location.offset - 8192) as usize;
            let payload = if location.length == 0 { &[][..] } else { &bytes[start..start + location.length as usize] };
            assert_eq!(payload, &record.payload[..]);
            assert_eq!(IDENTITY.payload_checksum(location.offset.into(), payload), head.checksum);
        }
    }

    #[test]
    fn a_blob_larger_than_any_is_none() {
        let place = FramePlace { identity: IDENTITY, offset: 4096, sequence: 1, boot: 1, previous: 0 };
        for (blob_bytes, taken) in [(BLOB_BYTES_MAX, true), (BLOB_BYTES_MAX + 1, false)] {
            let (image, _) = encode_frame(place, &[Record { blob_bytes, ..record(RecordKind::Root, 1, 64) }]);
            let header = FrameHeader::peek(&image.head).unwrap();
            assert_eq!(decode_records(&IDENTITY, 4096, &header, &image.head).is_some(), taken, "{blob_bytes}");
        }
    }

    #[test]
    fn another_segment_store_or_offset_has_other_checksums() {
        let place = FramePlace { identity: IDENTITY, offset: 4096, sequence: 1, boot: 1, previous: 0 };
        let (image, _) = encode_frame(place, &[record(RecordKind::Chunk, 1, 10)]);
        let mut bytes = vec![0; image.length as usize];
        image.copy_to(&mut bytes);
        let header = FrameHeader::peek(&bytes).unwrap();
        assert!(decode_records(&IDENTITY, 4096, &header, &bytes).is_some());
        assert!(decode_records(&IDENTITY, 8192, &header, &bytes).is_none());
        assert!(decode_records(&SegmentIdentity { segment: 3, ..IDENTITY }, 4096, &header, &bytes).is_none());
        assert!(decode_records(&SegmentIdentity { store: [8; 16], ..IDENTITY }, 4096, &header, &bytes).is_none());
        bytes[70] ^= 1;
        assert!(decode_records(&IDENTITY, 4096, &header, &bytes).is_none());
    }
}
