//! Segment files: a scan ends, its frames and rotten parts lie one behind the other inside the file, and recovery takes whatever
//! their checksums let through.

use std::ops::Range;

use bytes::Bytes;
use metanode_blob::partition::{Partition, Recovery};
use metanode_log::{
    BLOCK_BYTES, RecordFlags, RecordKind, ScanStep, SegmentIdentity, SegmentScan, WriterLimits,
    format::{FRAME_BYTES_MAX, FrameHeader, FramePlace, HEAD_BYTES, Record, RecordHead, decode_records, encode_frame},
};
use metanode_types::Hash;

use crate::script::Script;

/// Of the segment that is scanned.
pub(crate) const IDENTITY: SegmentIdentity = SegmentIdentity { store: [7; 16], log: 1, segment: 2 };

/// Payloads have less than this: a few blocks.
const PAYLOAD_BYTES_MAX: u16 = 9_000;

/// Frames of a file: with the largest payloads they are a megabyte.
const FRAMES_MAX: u8 = 24;

/// `what u8 | how much of the file is missing u16 | blocks behind the end u8 | bytes behind the header block, or frames and damage`
///
/// With the second bit of `what`, checksums are made right after the damage, so that fields reach what lies behind them.
pub fn segments(data: &[u8]) {
    let mut script = Script::new(data);
    let what = script.u8();
    let missing = usize::from(script.u16());
    let behind = usize::from(script.u8() % 8);
    let mut file = IDENTITY.encode_header(1);
    if what.is_multiple_of(2) {
        file.extend(script.rest());
    } else {
        let places = frames(&mut script, &mut file);
        let mut frames = file.split_off(BLOCK_BYTES);
        damage(&mut script, &mut frames);
        file.append(&mut frames);
        if what & 2 != 0 {
            places.into_iter().for_each(|place| mend(&mut file, place));
        }
    }
    if what & 4 != 0 {
        file.resize(file.len() + behind * BLOCK_BYTES, 0);
    }
    let said = file.len();
    if what & 8 != 0 {
        file.truncate(said - missing.min(said)); // shorter than it was said to be
    }
    let found = scan(&file, said as u32);
    if what & 8 == 0 {
        // A caller may hand out more than was asked for, and no less.
        assert_eq!(scan_all_at_once(&file), found);
    }
    recover(&found.frames);
}

/// Appends frames; returns where they begin.
///
/// `count u8 | frames: boot u8, sequence u8, record count u8 | records: kind u8, flags u8, key u8, payload length u16, size u64`
fn frames(script: &mut Script<'_>, file: &mut Vec<u8>) -> Vec<usize> {
    let mut places = Vec::new();
    let mut previous = 0;
    for _ in 0..script.u8() % (FRAMES_MAX + 1) {
        let (boot, sequence, count) = (script.u8(), script.u8(), script.u8() % 80);
        let records: Vec<Record> = (0..count).map(|_| record(script)).collect();
        let place = FramePlace {
            identity: IDENTITY,
            offset: file.len() as u32,
            sequence: sequence.into(),
            boot: boot.into(),
            previous,
        };
        let (image, placed) = encode_frame(place, &records);
        assert_eq!(placed.len(), records.len());
        previous = image.checksum;
        places.push(file.len());
        image.for_each_piece(|piece| file.extend_from_slice(piece));
    }
    places
}

fn record(script: &mut Script<'_>) -> Record {
    let kind = RecordKind::from_u8(script.u8() % 6 + 1).expect("kinds are 1 to 6");
    let (flags, key) = (RecordFlags(script.u8()), script.u8());
    let length = script.u16() % PAYLOAD_BYTES_MAX;
    let payload = Bytes::from(vec![key; length.into()]);
    Record { kind, flags, key: Hash([key; 32]), blob_bytes: script.u64(), payload }
}

/// Changes words and blocks; a frame stays where it is.
fn damage(script: &mut Script<'_>, frames: &mut [u8]) {
    while !script.is_empty() && !frames.is_empty() {
        let (what, block, at) = (script.u8(), usize::from(script.u8()), usize::from(script.u16()));
        let blocks = frames.len() / BLOCK_BYTES;
        let block = block % blocks * BLOCK_BYTES;
        // Half of all changes hit the first heads of a frame, if it is one.
        let at = block + at % if what & 128 == 0 { 4 * HEAD_BYTES } else { BLOCK_BYTES };
        match what % 4 {
            0 => frames[at] ^= script.u8().max(1),
            1 => {
                let word = script.array::<4>();
                let end = frames.len().min(at + 4);
                frames[at..end].copy_from_slice(&word[..end - at]);
            }
            2 => frames[block..block + BLOCK_BYTES].fill(0),
            _ => {
                let from = usize::from(script.u8()) % blocks * BLOCK_BYTES;
                frames.copy_within(from..from + BLOCK_BYTES, block);
            }
        }
    }
}

/// Makes the checksum of the frame at `place` right, if it still has one; those of payloads stay as they are.
fn mend(file: &mut [u8], place: usize) {
    let Some(header) = FrameHeader::peek(&file[place..]) else { return };
    let Some(frame) = file.get_mut(place..place + header.head_bytes()) else { return };
    let (header, heads) = frame.split_at_mut(HEAD_BYTES);
    let sum = IDENTITY.payload_checksum(place as u64 | 1 << 63, &header[..60]);
    header[60..].copy_from_slice(&crc32c::crc32c_append(sum, heads).to_le_bytes());
}

#[derive(Debug, Default, PartialEq)]
struct Found {
    frames: Vec<(FrameHeader, Vec<RecordHead>)>,
    rot: Vec<Range<u32>>,
    tail: u32,
}

/// Scans a file that is said to have `said` bytes.
fn scan(file: &[u8], said: u32) -> Found {
    let mut scan = SegmentScan::new(IDENTITY, said);
    let mut found = Found::default();
    let mut at = BLOCK_BYTES as u32;
    // Each block is asked for once as itself and once as the last frame, with a frame or a rotten part reported in between.
    let steps_max = 8 * (said as usize / BLOCK_BYTES + 2);
    for _ in 0..steps_max {
        match scan.step() {
            ScanStep::Read { offset, length } => {
                assert!(length > 0 && length as usize <= FRAME_BYTES_MAX, "a read is bounded");
                assert!(offset.checked_add(length).is_some_and(|end| end <= said), "a read is inside the file");
                let start = file.len().min(offset as usize);
                let end = file.len().min(start + length as usize);
                scan.supply(offset, Bytes::copy_from_slice(&file[start..end]));
            }
            ScanStep::Frame { header, records } => {
                check_frame(file, at, &header, &records);
                at += header.length;
                found.frames.push((header, records));
            }
            ScanStep::Rot { offset, length } => {
                assert!(offset == at && length > 0, "a rotten part begins where the frame before ends");
                at += length;
                found.rot.push(offset..at);
            }
            ScanStep::End { tail } => {
                assert_eq!(tail, at, "what lies before the tail was reported");
                assert!(tail == BLOCK_BYTES as u32 || tail as usize <= file.len());
                found.tail = tail;
                check_tail(file, &found);
                assert!(matches!(scan.step(), ScanStep::End { .. }), "the end is the end");
                return found;
            }
        }
    }
    panic!("the scan of {} bytes, said to be {said}, takes more than {steps_max} steps", file.len());
}

/// It is in the file, at `at`, as it was reported, and has its payloads inside.
fn check_frame(file: &[u8], at: u32, header: &FrameHeader, records: &[RecordHead]) {
    let head = file.get(at as usize..).expect("a frame is inside the file");
    assert_eq!(FrameHeader::peek(head).as_ref(), Some(header));
    assert_eq!(decode_records(&IDENTITY, at, header, head).as_deref(), Some(records));
    assert_eq!(header.records, records.len());
    for record in records {
        let location = record.location;
        assert_eq!((location.log, location.segment), (IDENTITY.log, IDENTITY.segment));
        assert!(location.offset >= at && location.offset + location.length <= at + header.length, "{location:?}");
    }
}

/// No whole frame lies at the tail, and the last one that can have been torn is whole.
fn check_tail(file: &[u8], found: &Found) {
    let behind = file.get(found.tail as usize..).unwrap_or_default();
    let cut = FrameHeader::peek(behind)
        .and_then(|header| Some((header, decode_records(&IDENTITY, found.tail, &header, behind)?)));
    match (cut, found.frames.last()) {
        // The frame before it was synced when this one was written: what is wrong with that is for its readers.
        (Some((header, records)), _) => {
            assert!(header.length as usize > behind.len() || !is_whole(file, &records), "a whole frame was cut");
        }
        (None, Some((_, records))) if found.rot.last().is_none_or(|rot| rot.end < found.tail) => {
            assert!(is_whole(file, records), "a torn frame was taken");
        }
        _ => {}
    }
}

fn is_whole(file: &[u8], records: &[RecordHead]) -> bool {
    records.iter().filter(|record| record.location.length > 0).all(|record| {
        let start = record.location.offset as usize;
        let payload = file.get(start..start + record.location.length as usize);
        payload.is_some_and(|payload| IDENTITY.payload_checksum(start as u64, payload) == record.checksum)
    })
}

/// The same with the whole file behind each read.
fn scan_all_at_once(file: &[u8]) -> Found {
    let mut scan = SegmentScan::new(IDENTITY, file.len() as u32);
    let mut found = Found::default();
    let mut at = BLOCK_BYTES as u32;
    let file = Bytes::copy_from_slice(file);
    loop {
        match scan.step() {
            ScanStep::Read { offset, .. } => scan.supply(offset, file.slice(offset as usize..)),
            ScanStep::Frame { header, records } => {
                at += header.length;
                found.frames.push((header, records));
            }
            ScanStep::Rot { offset, length } => {
                at += length;
                found.rot.push(offset..at);
            }
            ScanStep::End { tail } => {
                found.tail = tail;
                return found;
            }
        }
    }
}

/// What was read becomes a partition, which counts no more than that.
fn recover(frames: &[(FrameHeader, Vec<RecordHead>)]) {
    let mut recovery = Recovery::new();
    let mut count = 0;
    for (header, records) in frames {
        for record in records {
            recovery.record(record, (header.boot, header.sequence));
            count += 1;
        }
    }
    let identity = SegmentIdentity { segment: IDENTITY.segment + 1, ..IDENTITY };
    let mut partition = Partition::new(identity, 256, WriterLimits::for_segments(1 << 20), 1 << 20);
    let tags = recovery.finish(&mut partition);
    assert!(tags.iter().all(|head| head.kind == RecordKind::Tag));
    let payload = |head: &RecordHead| vec![head.key.0[0]; head.location.length as usize];
    for head in &tags {
        let _ = partition.recover_tag(head, &payload(head));
    }
    assert!(partition.recover_roots().len() <= count);
    partition.recover_end(true);
    assert!(partition.blobs().0 <= count as u64);
    // A record may count as chunk and as root.
    assert!(partition.live_segments().all(|(_, live)| live.records as usize <= 2 * count));
}
