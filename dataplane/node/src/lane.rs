//! One stream: requests in, answers out, in any order.
//!
//! A lane is one task. Each round it takes what has arrived, answers what the shard's cache can answer on the spot, starts a
//! task for everything else, collects what earlier tasks have finished, and writes all of it at once. That keeps the cost of a
//! cached GET below a microsecond and gives QUIC full packets.
//!
//! *Backpressure*: a lane reads nothing while its connection has `requests_max` requests unanswered or while its own writes
//! wait for the client; QUIC's flow control tells the client.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Bytes;
use metanode_quic::{ReadError, RecvStream, SendStream, TryRead, WriteError};
use metanode_shard::{now, spawn_local, timeout, yield_now, yield_queue_now};
use metanode_types::Hash;
use metanode_wire::{Frame, FrameError, FrameLimits, FrameReader, Kind, Refusal, RefusalCode, message::Get};

use crate::{
    admission::{Bound, Permit, RETRY_AFTER_MS_MIN},
    bulk, codes,
    counters::Operation,
    reply::{Batch, Reply},
    request::{self, Admitted, Request, RequestError, malformed},
    session::{InFlight, Session},
};

/// Most bytes of one read: what GRO hands over at once.
pub(crate) const READ_BYTES_MAX: usize = 64 * 1024;

/// Reads of one round: then answers leave before more is taken.
const READS_PER_ROUND: usize = 16;

/// Reads from the disk that a round begins at most. The disk gets them when the reactor is looked at, behind the round: with all of a burst
/// at once, the disk would be idle while requests are served, and the shard while the disk reads.
const READS_BEGUN_MAX: u32 = 8;

/// How long a client may leave its answers untaken, or an upload without a next chunk. A megabyte in that time is slower than a
/// telephone line.
pub(crate) const STALL_TIME_MAX: Duration = Duration::from_secs(60);

/// Bytes in a batch from which on it is written before more requests are read: what a lane hands to QUIC at once.
const BATCH_BYTES_MAX: usize = 1 << 20;

/// The same when the connection may have no more than this unacknowledged.
const BATCH_BYTES_MIN: usize = 4 << 10;

/// Heads and bodies that are taken from clients who may not write: the longest request that they may make has a tag's name in it.
const READER_HEAD_BYTES_MAX: usize = 4 << 10;
const READER_BODY_BYTES_MAX: usize = 16 << 10;

/// Time for a refusal to reach the client before its connection is closed.
const FAREWELL_TIME_MAX: Duration = Duration::from_millis(500);

/// Why a lane ends before its stream does.
#[derive(Debug)]
pub(crate) enum LaneEnd {
    /// The connection or the stream has gone; nobody is left to tell.
    Gone,
    /// The client violated the protocol.
    Violation { request: u32, error: FrameError },
    /// The connection has too many bytes of unfinished frames, as long as others have some as well.
    Overloaded,
    /// The client does not read.
    Stalled,
}

impl From<ReadError> for LaneEnd {
    fn from(_: ReadError) -> Self {
        Self::Gone
    }
}

impl From<WriteError> for LaneEnd {
    fn from(_: WriteError) -> Self {
        Self::Gone
    }
}

/// Serves one stream until it ends.
pub(crate) async fn serve(session: Rc<Session>, send: SendStream, recv: RecvStream) {
    let mut lane = Lane {
        reader: FrameReader::new(limits_of(&session)),
        batch: Batch::default(),
        answered: Vec::new(),
        answers: Rc::default(),
        held_bytes: 0,
        last_bytes: 0,
        partial: None,
        input: Input::Open,
        reads_begun: 0,
        fresh: true,
        session,
        send,
        recv,
    };
    let ran = lane.run().await;
    lane.session.ended_frame(lane.send.id());
    match ran {
        Ok(None) => {
            lane.send.finish().ok(); // the client may have gone
        }
        Ok(Some(bulk)) => {
            let Lane { session, send, recv, reader, .. } = lane;
            match bulk.frame.kind {
                Kind::GetBulk => bulk::get(session, send, recv, bulk).await,
                _ => bulk::put(session, send, recv, reader, bulk).await,
            }
        }
        Err(end) => lane.end(end).await,
    }
}

/// The first frame of a stream that a bulk transfer takes over.
pub(crate) struct Takeover {
    pub(crate) frame: Frame,
    pub(crate) arrived: Instant,
}

struct Lane {
    session: Rc<Session>,
    send: SendStream,
    recv: RecvStream,
    reader: FrameReader,
    batch: Batch,
    /// What the batch answers; recorded once it is written.
    answered: Vec<Answered>,
    answers: Rc<Answers>,
    /// At most so many bytes are in the reader, `last_bytes` of them in its last piece.
    held_bytes: usize,
    last_bytes: usize,
    /// Admits `held_bytes` while they are part of an unfinished frame.
    partial: Option<Permit>,
    input: Input,
    /// Reads from the disk that this round has begun.
    reads_begun: u32,
    /// No frame was read yet: the stream may still become a bulk transfer.
    fresh: bool,
}

/// What is known of the incoming half.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Input {
    Open,
    /// The reader may hold whole frames that wait for room, or for the next round.
    Held,
    Finished,
}

struct Answered {
    operation: Operation,
    arrived: Instant,
    /// Keep the request unanswered, and its answer's bytes counted, until it is written.
    _in_flight: Option<InFlight>,
    _answer: Option<Permit>,
}

/// Answers of a lane's tasks, on their way to it.
#[derive(Default)]
struct Answers {
    done: RefCell<VecDeque<(u32, Reply, Answered)>>,
    /// Tasks that have not answered yet.
    running: Cell<u32>,
    lane: RefCell<Option<Waker>>,
}

impl Lane {
    async fn run(&mut self) -> Result<Option<Takeover>, LaneEnd> {
        loop {
            self.reads_begun = 0;
            let first = poll_fn(|cx| self.poll_work(cx)).await?;
            let Some(work) = first else {
                return Ok(None);
            };
            let arrived = now();
            if let Work::Bytes(bytes) = work {
                self.take_in(bytes);
            }
            let mut reads = 0;
            // The round ends behind `serve_frames`: a frame that the last read completed must not wait for more bytes.
            loop {
                if let Some(takeover) = self.serve_frames(arrived).await? {
                    return Ok(Some(takeover));
                }
                if self.input != Input::Open || reads == READS_PER_ROUND {
                    break;
                }
                reads += 1;
                match self.recv.try_read_chunk(READ_BYTES_MAX)? {
                    TryRead::Data(bytes) => self.take_in(bytes),
                    TryRead::Blocked => break,
                    TryRead::Finished => self.input = Input::Finished,
                }
            }
            self.account_partial()?;
            self.collect_answers().await?;
            self.flush().await?;
            if self.reads_begun >= READS_BEGUN_MAX {
                yield_queue_now().await;
            } else if reads == READS_PER_ROUND {
                yield_now().await; // other lanes' turn: a full window of small requests takes milliseconds
            }
        }
    }

    /// Something to do; `None` at the end.
    fn poll_work(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Work>, LaneEnd>> {
        if !self.answers.done.borrow().is_empty() {
            return Poll::Ready(Ok(Some(Work::Again)));
        }
        match self.input {
            Input::Finished if self.answers.running.get() == 0 => {
                let cut = self.reader.is_mid_frame();
                return Poll::Ready(if cut { Err(LaneEnd::Gone) } else { Ok(None) });
            }
            Input::Finished => {}
            Input::Held if self.session.has_room() => return Poll::Ready(Ok(Some(Work::Again))),
            Input::Held => self.session.wait_for_room(cx),
            Input::Open => match self.recv.poll_read_chunk(cx, READ_BYTES_MAX) {
                Poll::Ready(Ok(Some(bytes))) => return Poll::Ready(Ok(Some(Work::Bytes(bytes)))),
                Poll::Ready(Ok(None)) => {
                    self.input = Input::Finished;
                    return self.poll_work(cx);
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                Poll::Pending => {}
            },
        }
        *self.answers.lane.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }

    fn take_in(&mut self, bytes: Bytes) {
        self.session.shard.counters.bytes_in.add(bytes.len() as u64);
        self.held_bytes += bytes.len();
        self.last_bytes = bytes.len();
        self.reader.push(bytes);
    }

    /// Serves the whole frames that the reader holds, as far as there is room and the round may begin reads.
    async fn serve_frames(&mut self, arrived: Instant) -> Result<Option<Takeover>, LaneEnd> {
        while self.session.has_room() {
            let frame = self.reader.next_frame().map_err(|error| LaneEnd::Violation { request: 0, error })?;
            let Some(frame) = frame else {
                if self.input == Input::Held {
                    self.input = Input::Open;
                }
                return Ok(None);
            };
            self.session.ended_frame(self.send.id());
            // A frame has ended in the last piece, or whole frames are held in it.
            self.held_bytes = self.held_bytes.min(self.last_bytes);
            let request = frame.request;
            let violation = |error| LaneEnd::Violation { request, error };
            if matches!(frame.kind, Kind::GetBulk | Kind::PutBulk) {
                if !self.fresh {
                    return Err(violation(FrameError::Unexpected(frame.kind)));
                }
                return Ok(Some(Takeover { frame, arrived }));
            }
            self.fresh = false;
            self.serve_frame(&frame, arrived).map_err(violation)?;
            if self.is_full() {
                self.flush().await?;
            }
            if self.reads_begun >= READS_BEGUN_MAX {
                break;
            }
        }
        // A finished input may still have frames in the reader; reading on finds the end again.
        self.input = Input::Held;
        Ok(None)
    }

    fn serve_frame(&mut self, frame: &Frame, arrived: Instant) -> Result<(), FrameError> {
        let session = self.session.clone();
        let shard = &session.shard;
        let Some(operation) = Operation::of(frame.kind) else {
            return match Request::from_frame(frame) {
                Err(RequestError::Frame(error)) => Err(error),
                Err(RequestError::Refused(refusal)) => {
                    self.refuse(frame.request, None, arrived, refusal);
                    Ok(())
                }
                Ok(_) => unreachable!("every request is an operation"),
            };
        };
        if shard.draining.get() {
            self.refuse(frame.request, Some(operation), arrived, RefusalCode::ShuttingDown.into());
            return Ok(());
        }
        let request = if operation == Operation::Get {
            // The hot path: no copy, no task, no allocation of its own.
            let hash = Hash(frame.message::<Get>()?.hash);
            if !frame.body.is_empty() {
                self.refuse(frame.request, Some(operation), arrived, malformed(format_args!("Get has no body")));
                return Ok(());
            }
            // Without room to send it, it is counted as what is read from the disk is.
            if session.rights.read
                && let Some(bytes) = shard.store.cached(&hash)
                && (bytes.len() <= BATCH_BYTES_MIN || session.account.room() >= bytes.len() as u64)
            {
                self.batch.push_whole(frame.request, bytes);
                self.answered.push(Answered { operation, arrived, _in_flight: None, _answer: None });
                shard.counters.cached_gets.increment();
                return Ok(());
            }
            Request::Get(hash)
        } else {
            match Request::from_frame(frame) {
                Ok(request) => request,
                Err(RequestError::Frame(error)) => return Err(error),
                Err(RequestError::Refused(refusal)) => {
                    self.refuse(frame.request, Some(operation), arrived, refusal);
                    return Ok(());
                }
            }
        };
        match self.admit(&request) {
            Ok(admitted) => {
                let reads = matches!(&request, Request::Get(hash) if shard.store.size_here(hash).is_some());
                self.reads_begun += u32::from(reads);
                self.start(frame.request, operation, arrived, request, admitted);
            }
            Err(refusal) => self.refuse(frame.request, Some(operation), arrived, refusal),
        }
        Ok(())
    }

    /// Whether the request may and can be served now.
    fn admit(&self, request: &Request) -> Result<Admitted, Refusal> {
        match request.is_permitted(&self.session) {
            true => request.admit(&self.session),
            false => Err(RefusalCode::Forbidden.into()),
        }
    }

    /// Whether the batch should be written before more is added: it is as large as a write should be, or as the connection may have
    /// unacknowledged.
    fn is_full(&self) -> bool {
        let bytes = self.batch.bytes();
        bytes >= BATCH_BYTES_MAX || (bytes >= BATCH_BYTES_MIN && bytes as u64 >= self.session.account.room())
    }

    fn start(&self, number: u32, operation: Operation, arrived: Instant, request: Request, admitted: Admitted) {
        let session = self.session.clone();
        let answers = self.answers.clone();
        let in_flight = session.begin();
        answers.running.set(answers.running.get() + 1);
        spawn_local(async move {
            let (reply, answer) = request::answer(&session, request, admitted).await;
            let answered = Answered { operation, arrived, _in_flight: Some(in_flight), _answer: Some(answer) };
            answers.running.set(answers.running.get() - 1);
            answers.done.borrow_mut().push_back((number, reply, answered));
            if let Some(lane) = answers.lane.take() {
                lane.wake();
            }
        })
        .detach();
    }

    fn refuse(&mut self, request: u32, operation: Option<Operation>, arrived: Instant, refusal: Refusal) {
        self.session.shard.counters.refused(refusal.code);
        self.batch.push_reply(request, refusal.into());
        let answered = |operation| Answered { operation, arrived, _in_flight: None, _answer: None };
        self.answered.extend(operation.map(answered));
    }

    async fn collect_answers(&mut self) -> Result<(), LaneEnd> {
        loop {
            let next = self.answers.done.borrow_mut().pop_front();
            let Some((request, reply, answered)) = next else {
                return Ok(());
            };
            if let Reply::Refused(refusal) = &reply {
                self.session.shard.counters.refused(refusal.code);
            }
            self.batch.push_reply(request, reply);
            self.answered.push(answered);
            if self.is_full() {
                self.flush().await?;
            }
        }
    }

    /// Hands the batch to QUIC with one call, waiting when the client is slow.
    async fn flush(&mut self) -> Result<(), LaneEnd> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let counters = &self.session.shard.counters;
        counters.bytes_out.add(self.batch.bytes() as u64);
        write_all(&self.session, &mut self.send, self.batch.take()).await?;
        let now = now();
        for answered in self.answered.drain(..) {
            counters.seconds[answered.operation].record(now.saturating_duration_since(answered.arrived));
        }
        Ok(())
    }

    /// Counts what the reader holds of an unfinished frame.
    fn account_partial(&mut self) -> Result<(), LaneEnd> {
        self.partial = None;
        if !self.reader.is_mid_frame() {
            self.held_bytes = 0;
            self.session.ended_frame(self.send.id());
            return Ok(());
        }
        if self.input == Input::Open {
            // It holds the datagrams that its pieces came in.
            self.reader.compact();
            self.session.began_frame(self.send.id());
        }
        let admitted = self.session.admit(Bound::Partial, self.held_bytes as u64);
        self.partial = Some(admitted.map_err(|_| LaneEnd::Overloaded)?);
        Ok(())
    }

    async fn end(mut self, end: LaneEnd) {
        let connection = self.session.connection.clone();
        let counters = self.session.shard.counters.clone();
        let (request, refusal, code) = match end {
            LaneEnd::Gone => return,
            LaneEnd::Violation { request, error } => {
                tracing::debug!(peer = ?self.session.peer, "protocol violation: {error}");
                counters.protocol_errors.increment();
                let may_not = matches!(error, FrameError::TooLarge { .. }) && !self.session.rights.write;
                let code = if may_not { RefusalCode::Forbidden } else { codes::of_frame_error(error) };
                (request, Refusal::new(code, error.to_string()), code as u32)
            }
            LaneEnd::Overloaded => (0, Refusal::busy(RETRY_AFTER_MS_MIN), codes::BUSY),
            LaneEnd::Stalled => return connection.close(codes::STALLED, b"answers were not taken"),
        };
        counters.refused(refusal.code);
        let reason = refusal.to_string();
        self.batch.push_reply(request, refusal.into());
        self.recv.stop(code);
        let farewell = async {
            self.flush().await?;
            self.send.finish()?;
            self.send.stopped().await.map_err(LaneEnd::from)
        };
        // Whether it was heard or not: the connection ends, and its code says the same.
        let _heard = timeout(FAREWELL_TIME_MAX, farewell).await;
        connection.close(code, reason.as_bytes());
    }
}

/// What woke a lane.
enum Work {
    /// The next bytes.
    Bytes(Bytes),
    /// Answers, or room for frames that were held back.
    Again,
}

/// What a frame of this client may have. One that may not write has no bodies to send, and short heads; small ones are read, to be refused by
/// what they ask.
fn limits_of(session: &Session) -> FrameLimits {
    match session.rights.write {
        true => FrameLimits::default(),
        false => FrameLimits { head_bytes_max: READER_HEAD_BYTES_MAX, body_bytes_max: READER_BODY_BYTES_MAX },
    }
}

/// Writes all pieces, as many bytes at a time as the connection may have unacknowledged. Only a write that has to wait costs a timer, and those
/// who take little at a time have no more time for it.
pub(crate) async fn write_all(session: &Session, send: &mut SendStream, pieces: &mut [Bytes]) -> Result<(), LaneEnd> {
    let wanted = pieces.iter().map(|piece| piece.len() as u64).sum();
    let is_charged = session.account.room() >= wanted;
    if is_charged {
        session.account.charge(pieces);
        if send.try_write_chunks(pieces)? {
            return Ok(());
        }
    }
    // On the heap: every idle lane would carry the room for this.
    let rest = Box::pin(async {
        match is_charged {
            true => Ok(send.write_chunks(pieces).await?),
            false => write_in_parts(session, send, pieces, wanted).await,
        }
    });
    Box::pin(timeout(STALL_TIME_MAX, rest)).await.unwrap_or(Err(LaneEnd::Stalled))
}

async fn write_in_parts(
    session: &Session,
    send: &mut SendStream,
    pieces: &mut [Bytes],
    bytes: u64,
) -> Result<(), LaneEnd> {
    let mut left = bytes;
    while left > 0 {
        let room = session.account.room_for(left).await.ok_or(LaneEnd::Gone)?;
        let mut front = take_front(pieces, room);
        left -= front.iter().map(|piece| piece.len() as u64).sum::<u64>();
        session.account.charge(&mut front);
        send.write_chunks(&mut front).await?;
    }
    Ok(())
}

/// Takes the first so many bytes out of the pieces.
fn take_front(pieces: &mut [Bytes], bytes: u64) -> Vec<Bytes> {
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    let take = |piece: &mut Bytes| {
        let front = piece.split_to(piece.len().min(left));
        left -= front.len();
        front
    };
    pieces.iter_mut().map(take).filter(|front| !front.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_front_is_cut_where_the_room_ends() {
        let mut pieces = [&b"abc"[..], b"", b"defg", b"h"].map(Bytes::from_static);
        assert_eq!(take_front(&mut pieces, 5), ["abc", "de"]);
        assert_eq!(take_front(&mut pieces, 1), ["f"]);
        assert_eq!(take_front(&mut pieces, u64::MAX), ["g", "h"]);
        assert!(take_front(&mut pieces, 1).is_empty());
    }
}
