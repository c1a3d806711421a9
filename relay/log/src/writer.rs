//! The commit machine of one log: group commit, one frame in flight.

use std::collections::VecDeque;

use crate::format::{
    BLOCK_BYTES, FRAME_BYTES_MAX, FrameImage, FramePlace, HEAD_BYTES, Placed, Record, SegmentIdentity, encode_frame,
    frame_bytes,
};

/// Sizes of a writer.
#[derive(Debug, Clone, Copy)]
pub struct WriterLimits {
    /// Bytes of a segment that may be used.
    pub segment_bytes: u32,
    /// Bytes at which a frame is closed although more is staged: bounds the latency that a large batch adds to a small one.
    pub frame_bytes_target: usize,
    /// Segments that may fail in a row before the log takes nothing more.
    pub failures_max: u32,
}

impl WriterLimits {
    /// For segment files of this size: frames of at most 4 MiB (2 ms of a 2 GB/s disk) and a quarter of the segment. The last block stays
    /// free, so that a file that was cut off behind its last frame is always shorter than one that was not.
    pub fn for_segments(file_bytes: u32) -> Self {
        Self {
            segment_bytes: file_bytes - BLOCK_BYTES as u32,
            frame_bytes_target: (4 << 20).min(file_bytes as usize / 4),
            failures_max: 3,
        }
    }
}

/// A record to append, with what identifies it to the caller.
#[derive(Debug)]
pub struct Append<T> {
    /// What to write.
    pub record: Record,
    /// Returned in [`Committed`] or with a failure.
    pub ticket: T,
    /// Removals and moves: they may use the reserve of a full disk, since they make room.
    pub essential: bool,
}

/// A record that is on disk.
#[derive(Debug)]
pub struct Committed<T> {
    /// As appended.
    pub record: Record,
    /// As appended.
    pub ticket: T,
    /// Where it is.
    pub placed: Placed,
}

/// Why records were not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// No room on the disk.
    NoSpace,
    /// The disk failed; the records are not there.
    Io,
    /// The disk failed twice; whether the records are there after a restart is open, and the log takes nothing more until then.
    Unknown,
    /// Too many segments failed in a row; the log takes nothing more.
    ReadOnly,
}

/// What the shell must do, one at a time except for `Prepare`.
#[derive(Debug)]
pub enum Effect {
    /// Make segment `segment` ready: a file of the full size with its header block, durable, in the folder. Answer:
    /// [`Writer::prepared`].
    Prepare {
        /// Number.
        segment: u32,
        /// Whether the space reserved for removals may be used.
        reserve: bool,
    },
    /// Write a frame, then `fdatasync` the segment. Answer: [`Writer::committed`].
    Commit {
        /// Segment.
        segment: u32,
        /// Byte of the segment.
        offset: u32,
        /// What.
        image: FrameImage,
    },
    /// Cut the segment off before a frame that failed, and sync it: the frame may be on disk all the same, and must not count
    /// after a restart, since what comes next is decided without it. Answer: [`Writer::revoked`].
    Revoke {
        /// Segment.
        segment: u32,
        /// First byte that goes.
        offset: u32,
    },
}

/// A frame on its way.
#[derive(Debug, Clone, Copy)]
struct Flight {
    segment: u32,
    offset: u32,
    /// Why it failed, if it did.
    failed: Option<Failure>,
    /// It failed, and its revocation was asked for.
    revoking: bool,
}

#[derive(Debug)]
struct Active {
    segment: u32,
    at: u32,
}

/// Appends to one log. `T` identifies a record to the caller.
#[derive(Debug)]
pub struct Writer<T> {
    identity: SegmentIdentity, // of the store and log; the segment number is the next to be prepared
    boot: u64,
    limits: WriterLimits,
    sequence: u64,
    previous: u32,
    active: Option<Active>,
    ready: Option<u32>,
    preparing: bool,
    reserve_wanted: bool,
    full: bool,
    failures: u32,
    flight: Option<Flight>,
    in_flight: Vec<(Record, T, Placed)>,
    staged: VecDeque<Append<T>>,
    staged_bytes: usize,
}

impl<T> Writer<T> {
    /// A writer for log `identity.log` whose next new segment is `identity.segment` and next frame `sequence`.
    pub fn new(identity: SegmentIdentity, boot: u64, sequence: u64, limits: WriterLimits) -> Self {
        assert!(limits.segment_bytes as usize >= 2 * BLOCK_BYTES && limits.segment_bytes.is_multiple_of(4096));
        Self {
            identity,
            boot,
            limits,
            sequence,
            previous: 0,
            active: None,
            ready: None,
            preparing: false,
            reserve_wanted: false,
            full: false,
            failures: 0,
            flight: None,
            in_flight: Vec::new(),
            staged: VecDeque::new(),
            staged_bytes: 0,
        }
    }

    /// Largest payload that fits a frame of this log.
    pub fn payload_bytes_max(&self) -> usize {
        let segment = self.limits.segment_bytes as usize - BLOCK_BYTES;
        segment.min(FRAME_BYTES_MAX) - BLOCK_BYTES
    }

    /// Stages a record. Refused at once when it can't succeed.
    pub fn append(&mut self, append: Append<T>) -> Result<(), (Failure, Append<T>)> {
        if self.is_read_only() {
            return Err((Failure::ReadOnly, append));
        }
        if self.full && !append.essential && !self.fits_active(append.record.payload.len()) {
            return Err((Failure::NoSpace, append));
        }
        assert!(append.record.payload.len() <= self.payload_bytes_max(), "callers check payload_bytes_max");
        self.staged_bytes += append.record.payload.len() + HEAD_BYTES;
        self.staged.push_back(append);
        Ok(())
    }

    /// Number of the next frame.
    pub fn next_sequence(&self) -> u64 {
        self.sequence
    }

    /// Number of the first frame that is not committed.
    pub fn committed_sequence(&self) -> u64 {
        self.sequence - u64::from(self.flight.is_some())
    }

    /// The first segment that a later frame may go to: the active one, else the one that is ready or being made, else the next.
    pub fn first_open_segment(&self) -> u32 {
        let next = self.identity.segment - u32::from(self.preparing);
        self.active_segment().or(self.ready).unwrap_or(next)
    }

    /// Bytes staged and not yet in a frame.
    pub fn staged_bytes(&self) -> usize {
        self.staged_bytes
    }

    /// Whether nothing is staged or in flight.
    pub fn is_idle(&self) -> bool {
        self.staged.is_empty() && self.flight.is_none()
    }

    /// Whether the log takes nothing more, after repeated failures.
    pub fn is_read_only(&self) -> bool {
        self.failures >= self.limits.failures_max
    }

    /// Whether the disk was full when a segment was last needed.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// The segment that frames go to now; it must not be compacted.
    pub fn active_segment(&self) -> Option<u32> {
        self.active.as_ref().map(|active| active.segment)
    }

    /// Says that files were deleted: a full log tries again.
    pub fn space_freed(&mut self) {
        self.full = false;
    }

    /// The next thing to do; call until `None` after every input.
    pub fn poll(&mut self) -> Option<Effect> {
        if let Some(Flight { segment, offset, failed: Some(_), revoking }) = &mut self.flight
            && !std::mem::replace(revoking, true)
        {
            return Some(Effect::Revoke { segment: *segment, offset: *offset });
        }
        if self.flight.is_none()
            && !self.staged.is_empty()
            && let Some(effect) = self.next_frame()
        {
            return Some(effect);
        }
        self.prepare_ahead()
    }

    /// A segment that [`Effect::Prepare`] asked for is ready, or not. Returns records that fail for it.
    #[must_use = "the callers of these records wait"]
    pub fn prepared(&mut self, segment: u32, result: Result<(), Failure>) -> Vec<(Failure, Append<T>)> {
        assert!(self.preparing, "only an answer to Prepare");
        self.preparing = false;
        let reserve = std::mem::take(&mut self.reserve_wanted);
        match result {
            Ok(()) => {
                self.ready = Some(segment);
                Vec::new()
            }
            Err(Failure::NoSpace) => {
                self.full = true;
                // Without the reserve, only what needs it waits on; with it, nothing can be done for anybody.
                self.fail_staged(Failure::NoSpace, |append| reserve || !append.essential)
            }
            Err(failure) => {
                self.failures += 1;
                self.fail_staged(failure, |_| true)
            }
        }
    }

    /// The frame of [`Effect::Commit`] is written and synced: these records are on disk. Or not: then there are none, the frame
    /// is to be revoked, and the segment is not used again.
    pub fn committed(&mut self, result: Result<(), Failure>) -> Vec<Committed<T>> {
        let flight = self.flight.as_mut().filter(|flight| flight.failed.is_none()).expect("only an answer to Commit");
        match result {
            Ok(()) => {
                self.flight = None;
                self.failures = 0;
                let done = self.in_flight.drain(..);
                done.map(|(record, ticket, placed)| Committed { record, ticket, placed }).collect()
            }
            Err(failure) => {
                flight.failed = Some(failure);
                // What a failed sync leaves in the page cache is unknown, so nothing more goes to that segment.
                self.active = None;
                Vec::new()
            }
        }
    }

    /// The frame of [`Effect::Revoke`] is gone, or may still come back. Returns the records that failed with it.
    #[must_use = "the callers of these records wait"]
    pub fn revoked(&mut self, result: Result<(), Failure>) -> Vec<(Failure, Append<T>)> {
        let flight = self.flight.take().filter(|flight| flight.revoking).expect("only an answer to Revoke");
        let mut failure = flight.failed.expect("only a frame that failed is revoked");
        let mut waiting = Vec::new();
        if result.is_err() {
            failure = Failure::Unknown;
            self.failures = self.limits.failures_max;
        } else if failure == Failure::NoSpace {
            self.full = true;
            // No segment will be made for them until there is room.
            if self.ready.is_none() {
                waiting = self.fail_staged(Failure::NoSpace, |append| !append.essential);
            }
        } else {
            self.failures += 1;
        }
        let mut failed: Vec<_> = self
            .in_flight
            .drain(..)
            .map(|(record, ticket, _)| (failure, Append { record, ticket, essential: false }))
            .collect();
        failed.extend(waiting);
        if self.is_read_only() {
            failed.extend(self.fail_staged(Failure::ReadOnly, |_| true));
        }
        failed
    }

    fn fail_staged(&mut self, failure: Failure, which: impl Fn(&Append<T>) -> bool) -> Vec<(Failure, Append<T>)> {
        let (failed, kept): (Vec<_>, Vec<_>) = self.staged.drain(..).partition(which);
        self.staged = kept.into();
        self.staged_bytes = self.staged.iter().map(|a| a.record.payload.len() + HEAD_BYTES).sum();
        failed.into_iter().map(|append| (failure, append)).collect()
    }

    fn room(&self) -> usize {
        self.active.as_ref().map_or(0, |active| (self.limits.segment_bytes - active.at) as usize)
    }

    fn fits_active(&self, payload: usize) -> bool {
        frame_bytes(self.staged.len() + 1, self.staged_bytes + payload) <= self.room()
    }

    fn next_frame(&mut self) -> Option<Effect> {
        let first = self.staged.front().expect("the caller checked").record.payload.len();
        if frame_bytes(1, first) > self.room() {
            let Some(segment) = self.ready.take() else {
                return self.prepare();
            };
            self.active = Some(Active { segment, at: BLOCK_BYTES as u32 });
        }
        let limit = self.room().min(self.limits.frame_bytes_target.max(frame_bytes(1, first)));
        let (mut records, mut tickets, mut payload) = (Vec::new(), Vec::new(), 0);
        while let Some(next) = self.staged.front() {
            let length = next.record.payload.len();
            if frame_bytes(records.len() + 1, payload + length) > limit {
                break;
            }
            let append = self.staged.pop_front().expect("front saw it");
            payload += length;
            self.staged_bytes -= length + HEAD_BYTES;
            records.push(append.record);
            tickets.push(append.ticket);
        }
        let active = self.active.as_mut().expect("there is room in it");
        let place = FramePlace {
            identity: SegmentIdentity { segment: active.segment, ..self.identity },
            offset: active.at,
            sequence: self.sequence,
            boot: self.boot,
            previous: self.previous,
        };
        let (image, placed) = encode_frame(place, &records);
        self.in_flight = records.into_iter().zip(tickets).zip(placed).map(|((r, t), placed)| (r, t, placed)).collect();
        self.sequence += 1;
        self.previous = image.checksum;
        active.at += image.length;
        self.flight =
            Some(Flight { segment: place.identity.segment, offset: place.offset, failed: None, revoking: false });
        Some(Effect::Commit { segment: place.identity.segment, offset: place.offset, image })
    }

    fn prepare(&mut self) -> Option<Effect> {
        if self.preparing || (self.full && !self.staged.iter().any(|append| append.essential)) {
            return None;
        }
        self.preparing = true;
        self.reserve_wanted = self.full;
        let segment = self.identity.segment;
        self.identity.segment += 1;
        Some(Effect::Prepare { segment, reserve: self.full })
    }

    /// Keeps one segment ready, so that a full one costs no wait.
    fn prepare_ahead(&mut self) -> Option<Effect> {
        let needed = self.ready.is_none() && !self.full && !self.is_read_only();
        if needed { self.prepare() } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{
        RecordKind,
        tests::{IDENTITY, record},
    };

    fn writer() -> Writer<u32> {
        Writer::new(IDENTITY, 1, 0, WriterLimits::for_segments(64 * 1024))
    }

    fn append(writer: &mut Writer<u32>, ticket: u32, length: usize) {
        let record = record(RecordKind::Chunk, ticket as u8, length);
        writer.append(Append { record, ticket, essential: false }).unwrap();
    }

    fn prepare(writer: &mut Writer<u32>) {
        match writer.poll() {
            Some(Effect::Prepare { segment, .. }) => assert!(writer.prepared(segment, Ok(())).is_empty()),
            other => panic!("{other:?}"),
        }
    }

    fn commit(writer: &mut Writer<u32>) -> Vec<u32> {
        assert!(matches!(writer.poll(), Some(Effect::Commit { .. })));
        writer.committed(Ok(())).into_iter().map(|c| c.ticket).collect()
    }

    #[test]
    fn what_is_staged_while_a_frame_is_in_flight_goes_into_the_next_one() {
        let mut writer = writer();
        prepare(&mut writer);
        append(&mut writer, 1, 10);
        assert!(matches!(writer.poll(), Some(Effect::Commit { segment: 2, offset: 4096, .. })));
        append(&mut writer, 2, 10);
        append(&mut writer, 3, 10);
        assert!(!matches!(writer.poll(), Some(Effect::Commit { .. })), "one frame at a time");
        let done = writer.committed(Ok(()));
        assert_eq!(done.iter().map(|c| c.ticket).collect::<Vec<_>>(), [1]);
        assert_eq!(commit(&mut writer), [2, 3]);
        assert!(writer.is_idle());
    }

    #[test]
    fn a_full_segment_is_followed_by_the_one_prepared_ahead() {
        let mut writer = writer();
        prepare(&mut writer);
        for ticket in 0..4 {
            append(&mut writer, ticket, 12 * 1024);
            let mut segments = Vec::new();
            while let Some(effect) = writer.poll() {
                match effect {
                    Effect::Prepare { segment, .. } => assert!(writer.prepared(segment, Ok(())).is_empty()),
                    Effect::Commit { segment, .. } => {
                        segments.push(segment);
                        assert_eq!(writer.committed(Ok(())).len(), 1);
                    }
                    Effect::Revoke { .. } => panic!("nothing failed"),
                }
            }
            assert_eq!(segments, [if ticket < 3 { 2 } else { 3 }]);
        }
    }

    #[test]
    fn a_full_disk_refuses_puts_and_lets_removals_use_the_reserve() {
        let mut writer = writer();
        append(&mut writer, 1, 10);
        let removal = record(RecordKind::Unroot, 2, 0);
        writer.append(Append { record: removal, ticket: 2, essential: true }).unwrap();
        let Some(Effect::Prepare { segment, reserve: false }) = writer.poll() else { panic!() };
        let failed = writer.prepared(segment, Err(Failure::NoSpace));
        assert_eq!(failed.iter().map(|(f, a)| (*f, a.ticket)).collect::<Vec<_>>(), [(Failure::NoSpace, 1)]);
        let Some(Effect::Prepare { segment, reserve: true }) = writer.poll() else { panic!() };
        assert!(writer.prepared(segment, Ok(())).is_empty());
        assert_eq!(commit(&mut writer), [2]);
        // The reserve has room now, and may be used by anybody: it is on disk already.
        append(&mut writer, 3, 10);
        assert_eq!(commit(&mut writer), [3]);
        let big = record(RecordKind::Chunk, 4, 60 * 1024 - 4096);
        let refused = writer.append(Append { record: big, ticket: 4, essential: false });
        assert_eq!(refused.map_err(|(failure, _)| failure), Err(Failure::NoSpace));
        writer.space_freed();
        append(&mut writer, 5, 50 * 1024);
        assert!(matches!(writer.poll(), Some(Effect::Prepare { reserve: false, .. })));
    }

    #[test]
    fn a_failed_commit_is_revoked_fails_its_records_and_leaves_the_segment() {
        let mut writer = writer();
        prepare(&mut writer);
        for round in 0..3 {
            append(&mut writer, round, 10);
            let Some(Effect::Commit { segment, .. }) = writer.poll() else { panic!() };
            assert_eq!(segment, 2 + round);
            if round == 2 {
                append(&mut writer, 100, 10);
            }
            assert!(writer.committed(Err(Failure::Io)).is_empty());
            assert_eq!(writer.active_segment(), None);
            let Some(Effect::Revoke { segment: revoked, offset: 4096 }) = writer.poll() else { panic!() };
            assert_eq!(revoked, segment);
            prepare(&mut writer); // nothing else is to be done meanwhile
            assert!(writer.poll().is_none());
            let failed = writer.revoked(Ok(()));
            let tickets: Vec<_> = failed.iter().map(|(failure, append)| (*failure, append.ticket)).collect();
            let staged: &[_] = if round == 2 { &[(Failure::ReadOnly, 100)] } else { &[] };
            assert_eq!(tickets[0], (Failure::Io, round));
            assert_eq!(tickets.get(1), staged.first());
        }
        assert!(writer.is_read_only());
        let append = Append { record: record(RecordKind::Chunk, 9, 1), ticket: 9, essential: true };
        assert_eq!(writer.append(append).map_err(|(failure, _)| failure), Err(Failure::ReadOnly));
    }

    #[test]
    fn a_checkpoint_that_is_written_now_covers_no_segment_that_frames_may_still_go_to() {
        let mut writer = writer();
        assert_eq!(writer.first_open_segment(), 2);
        let Some(Effect::Prepare { segment: 2, .. }) = writer.poll() else { panic!() };
        assert_eq!(writer.first_open_segment(), 2, "it is being made");
        assert!(writer.prepared(2, Ok(())).is_empty());
        assert_eq!(writer.first_open_segment(), 2, "it is ready");
        append(&mut writer, 1, 10);
        let Some(Effect::Commit { segment: 2, .. }) = writer.poll() else { panic!() };
        prepare(&mut writer);
        assert!(writer.committed(Err(Failure::Io)).is_empty());
        assert_eq!(writer.first_open_segment(), 3, "2 is not used again, 3 is ready");
    }

    #[test]
    fn a_disk_that_is_found_full_by_a_write_keeps_nobody_waiting() {
        let mut writer = writer();
        prepare(&mut writer);
        append(&mut writer, 1, 10);
        let Some(Effect::Commit { .. }) = writer.poll() else { panic!() };
        append(&mut writer, 2, 10);
        assert!(writer.committed(Err(Failure::NoSpace)).is_empty());
        assert!(matches!(writer.poll(), Some(Effect::Revoke { .. })));
        let failed = writer.revoked(Ok(()));
        let tickets: Vec<_> = failed.iter().map(|(failure, append)| (*failure, append.ticket)).collect();
        assert_eq!(tickets, [(Failure::NoSpace, 1), (Failure::NoSpace, 2)]);
        assert!(writer.is_idle());
    }

    #[test]
    fn frames_are_closed_at_their_target() {
        let mut writer = writer();
        prepare(&mut writer);
        for ticket in 0..5 {
            append(&mut writer, ticket, 4096);
        }
        assert_eq!(commit(&mut writer), [0, 1, 2]); // 16 KiB: heads and three payloads
        assert_eq!(commit(&mut writer), [3, 4]);
    }
}
