//! Reads a segment back: for recovery, and for moving what is live out of a segment.

use bytes::Bytes;
use metanode_types::sabotage::{self, Sabotage};

use crate::format::{
    BLOCK_BYTES, FRAME_BYTES_MAX, FrameHeader, HEAD_BYTES, RecordHead, SegmentIdentity, decode_records,
};

/// Bytes that one read asks for at least: heads of many small frames, or of one with thousands of records.
const WINDOW_BYTES: u32 = 256 * 1024;

/// What the scan needs, or found.
#[derive(Debug)]
pub enum ScanStep {
    /// Read these bytes and [`SegmentScan::supply`] them; less is fine at the end of the file.
    Read {
        /// Byte of the segment.
        offset: u32,
        /// Bytes.
        length: u32,
    },
    /// A valid frame.
    Frame {
        /// Its header.
        header: FrameHeader,
        /// Its records.
        records: Vec<RecordHead>,
    },
    /// Bytes that are no frame although valid ones follow: the disk lost what was acknowledged.
    Rot {
        /// First byte.
        offset: u32,
        /// Bytes.
        length: u32,
    },
    /// No more frames. What lies behind `tail` was never acknowledged.
    End {
        /// First byte behind the last frame.
        tail: u32,
    },
}

/// Finds the frames of one segment of `file_bytes` bytes.
///
/// A frame is reported when the next one was found valid. The last one's payloads are checked too, since only that one can be
/// torn: frame *n* + 1 is not written before *n* was synced.
#[derive(Debug)]
pub struct SegmentScan {
    identity: SegmentIdentity,
    file_bytes: u32,
    at: u32,
    window: (u32, Bytes),
    /// First byte behind the last read that was asked for.
    asked_end: u32,
    last: Option<(u32, FrameHeader, Vec<RecordHead>)>,
    /// Set while looking for a valid frame behind a bad one.
    seeking: Option<Seek>,
    /// Of the last frame the heads are enough.
    is_closed: bool,
    ended: bool,
}

#[derive(Debug)]
struct Seek {
    from: u32,
    at: u32,
}

enum Parsed {
    Frame(FrameHeader, Vec<RecordHead>),
    Need { offset: u32, length: u32 },
    Bad,
}

impl SegmentScan {
    /// Starts behind the segment's header block, which the caller has checked.
    pub fn new(identity: SegmentIdentity, file_bytes: u32) -> Self {
        Self {
            identity,
            file_bytes,
            at: BLOCK_BYTES as u32,
            window: (0, Bytes::new()),
            asked_end: 0,
            last: None,
            seeking: None,
            is_closed: false,
            ended: false,
        }
    }

    /// All frames of this segment are known to have been whole: a payload of the last one that is not has rotted, and takes no other
    /// record with it.
    #[must_use]
    pub fn closed(mut self, is_closed: bool) -> Self {
        self.is_closed = is_closed;
        self
    }

    /// The bytes that a [`ScanStep::Read`] asked for. Where they are fewer, the file ends.
    pub fn supply(&mut self, offset: u32, bytes: Bytes) {
        let end = offset.saturating_add(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        if end < self.asked_end {
            self.file_bytes = self.file_bytes.min(end); // it is shorter than it was said to be
        }
        self.window = (offset, bytes);
    }

    /// The next step.
    pub fn step(&mut self) -> ScanStep {
        loop {
            if self.ended {
                return ScanStep::End { tail: self.at };
            }
            if self.seeking.is_some() {
                if let Some(step) = self.seek() {
                    return step;
                }
                continue;
            }
            match self.parse(self.at) {
                Parsed::Need { offset, length } => return self.read(offset, length),
                Parsed::Frame(header, records) => {
                    let before = self.last.replace((self.at, header, records));
                    self.at += header.length;
                    if let Some((_, header, records)) = before {
                        return ScanStep::Frame { header, records };
                    }
                }
                Parsed::Bad => {
                    let at = self.at.saturating_add(BLOCK_BYTES as u32);
                    self.seeking = Some(Seek { from: self.at, at });
                }
            }
        }
    }

    /// Nothing valid at `from`: looks for a frame within the longest that a bad header could hide.
    fn seek(&mut self) -> Option<ScanStep> {
        let Seek { from, at } = *self.seeking.as_ref().expect("the caller checked");
        let end = self.file_bytes.min(from.saturating_add(FRAME_BYTES_MAX as u32));
        if at >= end {
            return self.check_tail(from);
        }
        match self.parse(at) {
            Parsed::Need { offset, length } => Some(self.read(offset, length)),
            Parsed::Bad => {
                self.seeking = Some(Seek { from, at: at.saturating_add(BLOCK_BYTES as u32) });
                None
            }
            Parsed::Frame(..) => {
                if let Some((_, header, records)) = self.last.take() {
                    return Some(ScanStep::Frame { header, records }); // the next call comes here again
                }
                self.seeking = None;
                self.at = at;
                Some(ScanStep::Rot { offset: from, length: at - from })
            }
        }
    }

    /// Nothing valid behind `tail`: the last frame counts if its payloads are whole.
    fn check_tail(&mut self, tail: u32) -> Option<ScanStep> {
        let Some((offset, header, _)) = &self.last else {
            self.ended = true;
            return None;
        };
        let (offset, length) = (*offset, header.length);
        if self.is_closed && u64::from(offset) + u64::from(length) <= u64::from(self.file_bytes) {
            let (_, header, records) = self.last.take().expect("seen above");
            self.at = tail;
            self.ended = true;
            return Some(ScanStep::Frame { header, records });
        }
        let Some(frame) = self.bytes(offset, length) else {
            if u64::from(offset) + u64::from(length) > u64::from(self.file_bytes) {
                return self.cut(offset);
            }
            return Some(self.read(offset, length));
        };
        let (_, header, records) = self.last.take().expect("seen above");
        let whole = records.iter().all(|record| {
            let start = (record.location.offset - offset) as usize;
            let payload = &frame[start..start + record.location.length as usize];
            record.location.length == 0
                || self.identity.payload_checksum(record.location.offset.into(), payload) == record.checksum
        });
        if !whole {
            return self.cut(offset);
        }
        self.at = tail;
        self.ended = true;
        Some(ScanStep::Frame { header, records })
    }

    fn cut(&mut self, tail: u32) -> Option<ScanStep> {
        self.last = None;
        self.at = tail;
        self.ended = true;
        let length = self.file_bytes.saturating_sub(tail);
        sabotage::is_on(Sabotage::TornTailIsRot).then_some(ScanStep::Rot { offset: tail, length })
    }

    fn read(&mut self, offset: u32, length: u32) -> ScanStep {
        self.asked_end = offset + length; // at most the file's end
        ScanStep::Read { offset, length }
    }

    fn parse(&self, at: u32) -> Parsed {
        if at.saturating_add(BLOCK_BYTES as u32) > self.file_bytes {
            return Parsed::Bad;
        }
        let Some(bytes) = self.bytes(at, HEAD_BYTES as u32) else {
            return Parsed::Need { offset: at, length: WINDOW_BYTES.min(self.file_bytes - at) };
        };
        let Some(header) = FrameHeader::peek(&bytes) else { return Parsed::Bad };
        let head_bytes = header.head_bytes() as u32;
        if u64::from(at) + u64::from(header.length) > u64::from(self.file_bytes) {
            return Parsed::Bad;
        }
        let Some(head) = self.bytes(at, head_bytes) else {
            return Parsed::Need { offset: at, length: head_bytes.max(WINDOW_BYTES).min(self.file_bytes - at) };
        };
        match decode_records(&self.identity, at, &header, &head) {
            Some(records) => Parsed::Frame(header, records),
            None => Parsed::Bad,
        }
    }

    fn bytes(&self, offset: u32, length: u32) -> Option<Bytes> {
        let start = offset.checked_sub(self.window.0)? as usize;
        let end = start + length as usize;
        (end <= self.window.1.len()).then(|| self.window.1.slice(start..end))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::{
        FramePlace, RecordKind, encode_frame,
        tests::{IDENTITY, record},
    };

    /// A segment with one frame for each list of payload lengths; returns it with the offset of each frame.
    fn segment(frames: &[Vec<usize>]) -> (Vec<u8>, Vec<u32>) {
        let mut file = IDENTITY.encode_header(1);
        let (mut offsets, mut previous) = (Vec::new(), 0);
        for (sequence, lengths) in frames.iter().enumerate() {
            let records: Vec<_> = lengths.iter().map(|&l| record(RecordKind::Chunk, sequence as u8 + 1, l)).collect();
            let offset = file.len() as u32;
            let place = FramePlace { identity: IDENTITY, offset, sequence: sequence as u64, boot: 1, previous };
            let (image, _) = encode_frame(place, &records);
            previous = image.checksum;
            offsets.push(offset);
            file.resize(file.len() + image.length as usize, 0);
            image.copy_to(&mut file[offset as usize..]);
        }
        (file, offsets)
    }

    #[derive(Debug, Default, PartialEq)]
    struct Found {
        frames: Vec<u64>,
        rot: Vec<(u32, u32)>,
        tail: u32,
    }

    fn scan(file: &[u8]) -> Found {
        scan_with(file, SegmentScan::new(IDENTITY, file.len() as u32))
    }

    fn scan_with(file: &[u8], mut scan: SegmentScan) -> Found {
        let mut found = Found::default();
        for _ in 0..10_000 {
            match scan.step() {
                ScanStep::Read { offset, length } => {
                    assert!(length > 0);
                    let end = (offset as usize + length as usize).min(file.len());
                    scan.supply(offset, Bytes::copy_from_slice(&file[offset as usize..end]));
                }
                ScanStep::Frame { header, .. } => found.frames.push(header.sequence),
                ScanStep::Rot { offset, length } => found.rot.push((offset, length)),
                ScanStep::End { tail } => {
                    found.tail = tail;
                    return found;
                }
            }
        }
        panic!("the scan does not end");
    }

    #[test]
    fn whole_frames_are_found_up_to_the_tail() {
        let (mut file, _) = segment(&[vec![10], vec![4096, 100], vec![], vec![300_000]]);
        let tail = file.len() as u32;
        assert_eq!(scan(&file), Found { frames: vec![0, 1, 2, 3], rot: vec![], tail });
        file.resize(file.len() + (1 << 20), 0);
        assert_eq!(scan(&file), Found { frames: vec![0, 1, 2, 3], rot: vec![], tail });
        assert_eq!(scan(&file[..4096]), Found { frames: vec![], rot: vec![], tail: 4096 });
    }

    #[test]
    fn a_torn_last_frame_is_cut_and_a_rotten_one_before_valid_ones_is_reported() {
        let (mut file, offsets) = segment(&[vec![5000], vec![5000], vec![5000]]);
        let last = offsets[2] as usize;
        file[last + 4096 + 7] ^= 1; // payload of the last frame: torn
        assert_eq!(scan(&file), Found { frames: vec![0, 1], rot: vec![], tail: offsets[2] });
        let closed = SegmentScan::new(IDENTITY, file.len() as u32).closed(true);
        let all = Found { frames: vec![0, 1, 2], rot: vec![], tail: file.len() as u32 };
        assert_eq!(scan_with(&file, closed), all, "rot: other records of the frame are sound");
        file[last + 4096 + 7] ^= 1;
        file[last + 3] ^= 1; // header of the last frame: never there
        assert_eq!(scan(&file), Found { frames: vec![0, 1], rot: vec![], tail: offsets[2] });
        file[last + 3] ^= 1;
        file[offsets[1] as usize + 70] ^= 1; // record heads of a frame with a valid one behind it: rot
        let rot = vec![(offsets[1], offsets[2] - offsets[1])];
        assert_eq!(scan(&file), Found { frames: vec![0, 2], rot, tail: file.len() as u32 });
    }

    #[test]
    fn a_file_that_is_shorter_than_it_was_said_to_be_ends_where_it_ends() {
        let (file, offsets) = segment(&[vec![5000], vec![5000]]);
        for length in BLOCK_BYTES..file.len() {
            if length % 500 > 1 && length % BLOCK_BYTES > 70 {
                continue;
            }
            let mut scan = SegmentScan::new(IDENTITY, file.len() as u32 + 9);
            let mut found = Vec::new();
            for _ in 0..100 {
                match scan.step() {
                    ScanStep::Read { offset, length: asked } => {
                        let start = length.min(offset as usize);
                        let end = length.min(start + asked as usize);
                        scan.supply(offset, Bytes::copy_from_slice(&file[start..end]));
                    }
                    ScanStep::Frame { header, .. } => found.push(header.sequence),
                    ScanStep::Rot { offset, .. } => panic!("rot at {offset} of {length} bytes"),
                    ScanStep::End { tail } => {
                        found.push(tail.into());
                        break;
                    }
                }
            }
            let second = offsets[1];
            let whole = if length < second as usize { vec![BLOCK_BYTES as u64] } else { vec![0, second.into()] };
            assert_eq!(found, whole, "{length}");
        }
    }

    #[test]
    fn a_file_of_four_gibibytes_has_an_end() {
        // Frames of nothing but a header, which says that they are as long as can be.
        let header = |offset: u32| {
            let place = FramePlace { identity: IDENTITY, offset, sequence: 0, boot: 1, previous: 0 };
            let mut head = encode_frame(place, &[]).0.head;
            head[8..12].copy_from_slice(&(FRAME_BYTES_MAX as u32).to_le_bytes());
            let sum = IDENTITY.payload_checksum(u64::from(offset) | 1 << 63, &head[..60]);
            head[60..].copy_from_slice(&sum.to_le_bytes());
            head
        };
        let mut scan = SegmentScan::new(IDENTITY, u32::MAX);
        let mut frames = 0;
        loop {
            match scan.step() {
                ScanStep::Read { offset, length } => {
                    let mut bytes = vec![0; length as usize];
                    if offset as usize % FRAME_BYTES_MAX == BLOCK_BYTES && offset < u32::MAX - FRAME_BYTES_MAX as u32 {
                        bytes[..HEAD_BYTES].copy_from_slice(&header(offset));
                    }
                    scan.supply(offset, bytes.into());
                }
                ScanStep::Frame { .. } => frames += 1,
                ScanStep::Rot { offset, .. } => panic!("rot at {offset}"),
                ScanStep::End { tail } => {
                    assert_eq!((frames, tail as usize), (511, BLOCK_BYTES + 511 * FRAME_BYTES_MAX));
                    return;
                }
            }
        }
    }

    #[test]
    fn frames_of_an_older_use_of_the_file_are_not_live() {
        let (mut file, offsets) = segment(&[vec![10], vec![10]]);
        let other = SegmentIdentity { segment: 1, ..IDENTITY };
        let place = FramePlace { identity: other, offset: offsets[1], sequence: 9, boot: 1, previous: 0 };
        let (image, _) = encode_frame(place, &[record(RecordKind::Chunk, 9, 10)]);
        image.copy_to(&mut file[offsets[1] as usize..]);
        assert_eq!(scan(&file), Found { frames: vec![0], rot: vec![], tail: offsets[1] });
    }

    proptest! {
        #[test]
        fn any_damage_ends_and_loses_only_damaged_frames(
            lengths in prop::collection::vec(prop::collection::vec(0usize..9000, 0..4), 1..6),
            at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>(),
        ) {
            let (mut file, offsets) = segment(&lengths);
            let at = BLOCK_BYTES + at.index(file.len() - BLOCK_BYTES);
            file[at] ^= 1 << bit;
            let damaged = offsets.iter().rposition(|&o| (o as usize) <= at).unwrap() as u64;
            let found = scan(&file);
            for frame in 0..lengths.len() as u64 {
                prop_assert!(frame == damaged || found.frames.contains(&frame), "{frame} of {found:?}");
            }
            file.truncate(BLOCK_BYTES + cut.index(file.len() - BLOCK_BYTES));
            scan(&file);
        }
    }
}
