//! The files of a sign state.
//!
//! ```text
//! file    header block 4096 | frames | zeros, or frames of an earlier generation
//! header  magic 8 | chain 32 | key 32 | generation u64 | salt u64 | CRC-32C u32 | zeros
//! frame   kind u32 | length u32 | sequence u64 | CRC-32C u32 | payload (length) | zeros up to a multiple of 4096
//! payload of kind 1 (records): u32 length | bytes, for each; of kind 2 (superseded): nothing
//! ```
//!
//! Numbers are little-endian. A frame's checksum covers, in this order: the header's generation and salt, its place in the file u64, kind,
//! length, sequence and payload. So a frame that another generation has left, or that lies elsewhere, is none; and as the salt is drawn at
//! random, nobody can make a block whose bytes pass for a frame. Sequence numbers go up by one from 1 in each generation.
//!
//! The two files are `sign-0.wal` and `sign-1.wal`. The next generation is written to the one that is not in use: header, then its first
//! frame; then the old one gets a *superseded* frame. Only then does anything rely on the new one. So a file that is not superseded is the
//! truth even if the other one is torn, and one that is superseded, without a newer one that checks, is damage.

use metanode_types::NodeKey;

/// Header and frames begin at multiples of this, which is what a disk writes at once.
pub const BLOCK: usize = 4096;

/// The first bytes of a file; the last of them is the version of the format.
pub const MAGIC: [u8; 8] = *b"MNSIGN\0\x01";

/// Bytes of a frame before its payload.
pub const FRAME_HEADER: usize = 20;

const HEADER: usize = 8 + 32 + 32 + 8 + 8;
const RECORDS: u32 = 1;
const SUPERSEDED: u32 = 2;

/// Whose sign state it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// Hash of the chain's genesis.
    pub chain: [u8; 32],
    /// The validator's key.
    pub key: NodeKey,
}

/// A life of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Generation {
    /// From 1; the higher is the newer.
    pub number: u64,
    /// Drawn at random.
    pub salt: u64,
}

/// What the first block of a file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// Zeros: nothing was ever begun here.
    Empty,
    /// It checks.
    Valid {
        /// Whose.
        owner: Owner,
        /// Which.
        generation: Generation,
    },
    /// Another version of the format.
    OtherVersion(u8),
    /// Anything else.
    Bad,
}

/// Lays out a header block.
pub fn encode_header(owner: &Owner, generation: Generation) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    block[..8].copy_from_slice(&MAGIC);
    block[8..40].copy_from_slice(&owner.chain);
    block[40..72].copy_from_slice(&owner.key.0);
    block[72..80].copy_from_slice(&generation.number.to_le_bytes());
    block[80..HEADER].copy_from_slice(&generation.salt.to_le_bytes());
    let checksum = crc32c::crc32c(&block[..HEADER]);
    block[HEADER..HEADER + 4].copy_from_slice(&checksum.to_le_bytes());
    block
}

/// Reads one; of a file that is too short for one, what there is.
pub fn decode_header(file: &[u8]) -> Header {
    let block = &file[..file.len().min(BLOCK)];
    if block.iter().all(|byte| *byte == 0) {
        return Header::Empty;
    }
    let Some((header, rest)) = block.split_at_checked(HEADER) else { return Header::Bad };
    let checksum = rest.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    if checksum != Some(crc32c::crc32c(header)) || header[..7] != MAGIC[..7] {
        return Header::Bad;
    }
    if header[7] != MAGIC[7] {
        return Header::OtherVersion(header[7]);
    }
    let field = |from: usize| <[u8; 32]>::try_from(&header[from..from + 32]).expect("it has 32 bytes");
    let number = |from: usize| u64::from_le_bytes(header[from..from + 8].try_into().expect("it has 8 bytes"));
    let generation = Generation { number: number(72), salt: number(80) };
    Header::Valid { owner: Owner { chain: field(8), key: NodeKey(field(40)) }, generation }
}

/// Lays out a frame of records that begins at `offset`.
pub fn encode_records(generation: Generation, offset: u64, sequence: u64, records: &[impl AsRef<[u8]>]) -> Vec<u8> {
    let mut payload = Vec::new();
    for record in records {
        let record = record.as_ref();
        payload.extend((record.len() as u32).to_le_bytes());
        payload.extend(record);
    }
    encode(generation, offset, sequence, RECORDS, &payload)
}

/// Lays out the frame that says that a newer generation is the truth.
pub fn encode_superseded(generation: Generation, offset: u64, sequence: u64) -> Vec<u8> {
    encode(generation, offset, sequence, SUPERSEDED, &[])
}

fn encode(generation: Generation, offset: u64, sequence: u64, kind: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity((FRAME_HEADER + payload.len()).next_multiple_of(BLOCK));
    frame.extend(kind.to_le_bytes());
    frame.extend((payload.len() as u32).to_le_bytes());
    frame.extend(sequence.to_le_bytes());
    let checksum = checksum(generation, offset, &frame, payload);
    frame.extend(checksum.to_le_bytes());
    frame.extend(payload);
    frame.resize(frame.len().next_multiple_of(BLOCK), 0);
    frame
}

fn checksum(generation: Generation, offset: u64, head: &[u8], payload: &[u8]) -> u32 {
    [&generation.number.to_le_bytes()[..], &generation.salt.to_le_bytes(), &offset.to_le_bytes(), head, payload]
        .iter()
        .fold(0, |checksum, bytes| crc32c::crc32c_append(checksum, bytes))
}

/// Bytes that a frame of records of these lengths takes.
pub fn frame_bytes(lengths: impl Iterator<Item = usize>) -> u64 {
    let payload: usize = lengths.map(|length| 4 + length).sum();
    (FRAME_HEADER + payload).next_multiple_of(BLOCK) as u64
}

struct Frame<'a> {
    kind: u32,
    sequence: u64,
    payload: &'a [u8],
    bytes: usize,
}

fn decode(file: &[u8], generation: Generation, offset: usize) -> Option<Frame<'_>> {
    let frame = file.get(offset..)?;
    let (header, rest) = frame.split_at_checked(FRAME_HEADER)?;
    let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("it has 4 bytes"));
    let payload = rest.get(..number(4) as usize)?;
    if number(16) != checksum(generation, offset as u64, &header[..16], payload) {
        return None;
    }
    let sequence = u64::from_le_bytes(header[8..16].try_into().expect("it has 8 bytes"));
    let bytes = (FRAME_HEADER + payload.len()).next_multiple_of(BLOCK);
    Some(Frame { kind: number(0), sequence, payload, bytes })
}

/// What the frames of one generation say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Scan {
    /// In their order.
    pub records: Vec<Vec<u8>>,
    /// Where the next frame goes.
    pub end: u64,
    /// Its number.
    pub sequence: u64,
    /// A newer generation is the truth.
    pub superseded: bool,
    /// Behind the end lies something that is neither zeros nor a frame of an earlier life: a write that a crash cut off.
    pub torn: bool,
}

/// Behind a frame that does not check lies one that does: the disk has lost what was said there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a record at byte {at} does not check, and later ones do")]
pub struct Rot {
    /// Where.
    pub at: u64,
}

/// Reads the frames of a generation.
pub fn scan(file: &[u8], generation: Generation) -> Result<Scan, Rot> {
    let mut scan = Scan { end: BLOCK as u64, sequence: 1, ..Scan::default() };
    while let Some(frame) = decode(file, generation, scan.end as usize).filter(|frame| frame.sequence == scan.sequence)
    {
        match frame.kind {
            RECORDS => {
                let Some(mut records) = records(frame.payload) else { break };
                scan.records.append(&mut records);
            }
            SUPERSEDED => scan.superseded = true,
            _ => break,
        }
        scan.end += frame.bytes as u64;
        scan.sequence += 1;
    }
    let end = scan.end as usize;
    let later = (end..file.len())
        .step_by(BLOCK)
        .any(|at| decode(file, generation, at).is_some_and(|frame| frame.sequence >= scan.sequence));
    if later {
        return Err(Rot { at: scan.end });
    }
    scan.torn = file.get(end..end + BLOCK).is_some_and(|block| block.iter().any(|byte| *byte != 0));
    Ok(scan)
}

fn records(mut payload: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut records = Vec::new();
    while !payload.is_empty() {
        let (length, rest) = payload.split_first_chunk()?;
        let (record, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        records.push(record.to_vec());
        payload = rest;
    }
    Some(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner = Owner { chain: [1; 32], key: NodeKey([2; 32]) };
    const THIRD: Generation = Generation { number: 3, salt: 5 };

    fn file(frames: &[&[&str]]) -> (Vec<u8>, Vec<u64>) {
        let mut file = encode_header(&OWNER, THIRD).to_vec();
        let mut offsets = Vec::new();
        for (number, records) in frames.iter().enumerate() {
            offsets.push(file.len() as u64);
            let frame = encode_records(THIRD, file.len() as u64, 1 + number as u64, records);
            file.extend(frame);
        }
        file.resize(file.len() + 8 * BLOCK, 0);
        (file, offsets)
    }

    /// A file must mean the same in later versions.
    #[test]
    fn golden_bytes() {
        let header = encode_header(&OWNER, THIRD);
        assert_eq!(header[..8], *b"MNSIGN\0\x01");
        assert_eq!((header[8], header[39], header[40], header[71]), (1, 1, 2, 2));
        assert_eq!(header[72..88], [3, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(header[88..92], [150, 216, 51, 3]);
        assert!(header[92..].iter().all(|byte| *byte == 0));
        let frame = encode_records(THIRD, 4096, 1, &["ab", "c"]);
        let head = [1, 0, 0, 0, 11, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!((&frame[..16], frame.len()), (&head[..], BLOCK));
        assert_eq!(frame[16..20], [12, 54, 132, 120]);
        assert_eq!(frame[20..31], [2, 0, 0, 0, b'a', b'b', 1, 0, 0, 0, b'c']);
    }

    #[test]
    fn what_was_written_is_read() {
        let (bytes, _) = file(&[&["one", ""], &["two"]]);
        assert_eq!(decode_header(&bytes), Header::Valid { owner: OWNER, generation: THIRD });
        let scan = scan(&bytes, THIRD).unwrap();
        assert_eq!(scan.records, [b"one".to_vec(), vec![], b"two".to_vec()]);
        assert_eq!((scan.end, scan.sequence, scan.superseded, scan.torn), (3 * BLOCK as u64, 3, false, false));
        assert_eq!(frame_bytes([3, 0].into_iter()), BLOCK as u64);
        assert_eq!(frame_bytes([BLOCK].into_iter()), 2 * BLOCK as u64);
    }

    #[test]
    fn another_generation_or_place_is_none() {
        let (bytes, offsets) = file(&[&["one"], &["two"]]);
        for other in [Generation { number: 4, ..THIRD }, Generation { salt: 4, ..THIRD }] {
            assert_eq!(scan(&bytes, other).unwrap().records, Vec::<Vec<u8>>::new());
        }
        let mut moved = bytes.clone();
        moved.copy_within(offsets[0] as usize..offsets[1] as usize, offsets[1] as usize);
        assert_eq!(scan(&moved, THIRD).unwrap().records, [b"one"]);
    }

    /// Any bit of the last frame: cut off. Of one before: damage.
    #[test]
    fn a_torn_tail_is_cut_and_anything_else_is_damage() {
        let (bytes, offsets) = file(&[&["one"], &["two"], &["three"]]);
        for bit in 0..8 * (FRAME_HEADER + 4 + 3) {
            for (number, expected) in [(0, Err(Rot { at: offsets[0] })), (1, Err(Rot { at: offsets[1] })), (2, Ok(2))] {
                let mut bent = bytes.clone();
                bent[offsets[number] as usize + bit / 8] ^= 1 << (bit % 8);
                let found = scan(&bent, THIRD).map(|scan| (scan.records.len(), scan.torn).0);
                assert_eq!(found, expected, "bit {bit} of frame {number}");
            }
        }
        let mut bent = bytes;
        bent[offsets[2] as usize] ^= 1;
        assert!(scan(&bent, THIRD).unwrap().torn);
    }

    #[test]
    fn headers_that_are_not_ours() {
        assert_eq!(decode_header(&[0; BLOCK]), Header::Empty);
        assert_eq!(decode_header(&[]), Header::Empty);
        let good = encode_header(&OWNER, THIRD);
        for byte in 0..92 {
            let mut bent = good;
            bent[byte] ^= 1;
            assert_eq!(decode_header(&bent), Header::Bad, "{byte}");
        }
        assert_eq!(decode_header(&good[..91]), Header::Bad);
        let mut later = good;
        later[7] = 2;
        let checksum = crc32c::crc32c(&later[..HEADER]);
        later[HEADER..HEADER + 4].copy_from_slice(&checksum.to_le_bytes());
        assert_eq!(decode_header(&later), Header::OtherVersion(2));
    }

    proptest::proptest! {
        /// Whatever the bytes: no panic, no more records than bytes.
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..3 * BLOCK), number: u64, salt: u64) {
            let _ = decode_header(&bytes);
            if let Ok(scan) = scan(&bytes, Generation { number, salt }) {
                assert!(scan.records.len() <= bytes.len());
            }
        }
    }
}
