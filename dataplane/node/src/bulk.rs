//! Transfers that have a stream for themselves: blobs of any size, in and out.

use std::{
    future::poll_fn,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use metanode_quic::{RecvStream, SendStream};
use metanode_shard::{Timer, now};
use metanode_store::{PutOptions, Slice, StoreError};
use metanode_types::{
    ByteRange, Hash,
    limits::{BLOB_BYTES_MAX, CHUNK_BYTES},
};
use metanode_wire::{
    Frame, FrameError, FrameReader, Kind, Message, Refusal, RefusalCode, encode,
    message::{BulkBegin, Chunk, GetBulk, KnownChunk, PutBulk, PutEnd},
};

use crate::{
    admission::Bound,
    codes,
    counters::Operation,
    lane::{LaneEnd, READ_BYTES_MAX, STALL_TIME_MAX, Takeover, write_all},
    reply::{refusal_of, stored_message},
    request::{class_and_kind, malformed},
    session::Session,
};

/// What a bulk fetch holds at most: the store's read-ahead.
const FETCH_BYTES: u64 = 8 * CHUNK_BYTES as u64;

/// Why a transfer ends early.
enum Failure {
    /// The client can and should be told.
    Refused(Refusal),
    /// The connection is closed with the error's code.
    Violation(FrameError),
    /// As the lane.
    End(LaneEnd),
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Refused(refusal_of(&error))
    }
}

impl From<FrameError> for Failure {
    fn from(error: FrameError) -> Self {
        Self::Violation(error)
    }
}

impl From<LaneEnd> for Failure {
    fn from(end: LaneEnd) -> Self {
        Self::End(end)
    }
}

/// Sends a range of a blob: [`BulkBegin`], then the bao encoding, then the end of the stream.
pub(crate) async fn get(session: Rc<Session>, mut send: SendStream, recv: RecvStream, request: Takeover) {
    let _in_flight = session.begin();
    let counters = session.shard.counters.clone();
    counters.bulk_transfers.add(1);
    let mut begun = false;
    let result = send_slice(&session, &mut send, &request, &mut begun).await;
    counters.bulk_transfers.sub(1);
    counters.seconds[Operation::GetBulk].record(now() - request.arrived);
    drop(recv);
    match result {
        Ok(()) => {
            send.finish().ok(); // the client may have gone
        }
        // Behind a beginning there is no place for a frame: the code of the reset says it.
        Err(Failure::Refused(refusal)) if begun => {
            counters.refused(refusal.code);
            send.reset(refusal.code as u32);
        }
        Err(failure) => fail(&session, &mut send, request.frame.request, failure).await,
    }
}

async fn send_slice(
    session: &Rc<Session>,
    send: &mut SendStream,
    request: &Takeover,
    begun: &mut bool,
) -> Result<(), Failure> {
    let get = request.frame.message::<GetBulk>()?;
    let (hash, range) = (Hash(get.hash), ByteRange { offset: get.offset.to_native(), length: get.length.to_native() });
    may_begin(session, session.rights.read)?;
    let mut held = session.admit(Bound::Fetches, fetch_bytes(range)).map_err(Refusal::busy)?;
    let reader = session.shard.store.read(hash).await?;
    let size_bytes = reader.size_bytes();
    held.extend(reader.map_bytes()).map_err(Refusal::busy)?;
    let mut slice = reader.slice(range)?;
    *begun = true;
    let begin = head_of(request.frame.request, &BulkBegin { size_bytes });
    send_pieces(session, send, &mut [begin]).await?;
    while let Some(mut pieces) = next_pieces(&mut slice).await? {
        send_pieces(session, send, &mut pieces).await?;
    }
    Ok(())
}

/// What a fetch of this range holds at most: a range begins and ends inside of chunks that are read whole.
fn fetch_bytes(range: ByteRange) -> u64 {
    let chunk = CHUNK_BYTES as u64;
    (range.length / chunk).saturating_add(2).saturating_mul(chunk).min(FETCH_BYTES)
}

async fn next_pieces(slice: &mut Slice) -> Result<Option<Vec<Bytes>>, Failure> {
    Ok(slice.next().await?)
}

async fn send_pieces(session: &Session, send: &mut SendStream, pieces: &mut [Bytes]) -> Result<(), Failure> {
    let bytes: usize = pieces.iter().map(Bytes::len).sum();
    session.shard.counters.bytes_out.add(bytes as u64);
    Ok(write_all(session, send, pieces).await?)
}

/// Stores a blob that comes in [`Chunk`] frames.
pub(crate) async fn put(
    session: Rc<Session>,
    mut send: SendStream,
    recv: RecvStream,
    reader: FrameReader,
    request: Takeover,
) {
    let _in_flight = session.begin();
    let counters = session.shard.counters.clone();
    counters.bulk_transfers.add(1);
    let number = request.frame.request;
    let mut input = Input { recv, reader, timer: Timer::after(STALL_TIME_MAX) };
    let result = receive(&session, &mut input, &request).await;
    counters.bulk_transfers.sub(1);
    counters.seconds[Operation::PutBulk].record(now() - request.arrived);
    let answered = match result {
        Ok(stored) => send_pieces(&session, &mut send, &mut [stored]).await,
        Err(failure) => Err(failure),
    };
    match answered {
        Ok(()) => {
            send.finish().ok(); // the client may have gone
        }
        Err(failure) => {
            if let Failure::Refused(refusal) = &failure {
                input.recv.stop(refusal.code as u32);
            }
            fail(&session, &mut send, number, failure).await;
        }
    }
}

/// Takes all chunks and gives them to the store; the frame to answer with.
async fn receive(session: &Rc<Session>, input: &mut Input, request: &Takeover) -> Result<Bytes, Failure> {
    let put = request.frame.message::<PutBulk>()?;
    let size_bytes = put.size_bytes.as_ref().map(|size| size.to_native());
    may_begin(session, session.rights.write)?;
    let (class, kind) = class_and_kind(put.class, put.kind)?;
    if size_bytes.is_some_and(|size| size > BLOB_BYTES_MAX) {
        return Err(Refusal::new(RefusalCode::TooLarge, format!("a blob has at most {BLOB_BYTES_MAX} bytes")).into());
    }
    let window_bytes = session.shard.limits.upload_window_bytes;
    let _bytes = session.admit(Bound::Uploads, window_bytes).map_err(Refusal::busy)?;
    let _window = session.widen();
    let options = PutOptions { class, kind, hold: put.hold, keep: false, leases: Some(session.leases.clone()) };
    let mut upload = session.shard.store.put_bulk(size_bytes, options);
    let mut taken_bytes = 0u64;
    let mut short = false;
    loop {
        let frame = input.next(session).await?;
        match frame.kind {
            Kind::Chunk | Kind::KnownChunk => {
                let chunk = if frame.kind == Kind::Chunk {
                    frame.message::<Chunk>()?;
                    frame.body
                } else {
                    let name = Hash(frame.message::<KnownChunk>()?.name);
                    known_chunk(session, name, !frame.body.is_empty()).await?
                };
                if short || chunk.is_empty() {
                    return Err(malformed(format_args!(
                        "only the last chunk is shorter than {CHUNK_BYTES} bytes, none is empty"
                    ))
                    .into());
                }
                short = chunk.len() < CHUNK_BYTES;
                taken_bytes += chunk.len() as u64;
                if taken_bytes > size_bytes.unwrap_or(BLOB_BYTES_MAX) {
                    return Err(Refusal::new(
                        RefusalCode::TooLarge,
                        "more bytes than announced, or than a blob may have",
                    )
                    .into());
                }
                upload.push(chunk).await?;
            }
            Kind::PutEnd => {
                let hash = Hash(frame.message::<PutEnd>()?.hash);
                if size_bytes.is_some_and(|size| size != taken_bytes) {
                    return Err(
                        malformed(format_args!("{taken_bytes} bytes came, another number was announced")).into()
                    );
                }
                let stored = upload.finish(hash).await?;
                return Ok(head_of(request.frame.request, &stored_message(&stored)));
            }
            other => return Err(FrameError::Unexpected(other).into()),
        }
    }
}

/// A chunk that the client knows to be here. Its tree is made from its bytes, so they are read; only the way over the network is saved.
async fn known_chunk(session: &Session, name: Hash, has_body: bool) -> Result<Bytes, Failure> {
    if has_body {
        return Err(malformed(format_args!("KnownChunk has no body")).into());
    }
    let _place = session.shard.known_chunks.enter().await;
    match session.shard.store.chunk(name).await {
        Ok(chunk) if chunk.len() == CHUNK_BYTES => Ok(chunk),
        // Gone, or not to be trusted: either way the client has to send it.
        Ok(_) | Err(StoreError::Corrupt | StoreError::NotFound) => {
            Err(Refusal::new(RefusalCode::NotFound, "the chunk is not here any more").into())
        }
        Err(error) => Err(error.into()),
    }
}

/// The incoming half of a bulk upload.
struct Input {
    recv: RecvStream,
    reader: FrameReader,
    /// Moved by each frame; a client that sends none for too long loses its place.
    timer: Timer,
}

impl Input {
    async fn next(&mut self, session: &Session) -> Result<Frame, Failure> {
        self.timer.reset_after(STALL_TIME_MAX);
        loop {
            if let Some(frame) = self.reader.next_frame()? {
                return Ok(frame);
            }
            let bytes = poll_fn(|cx| self.poll_bytes(cx)).await?;
            session.shard.counters.bytes_in.add(bytes.len() as u64);
            self.reader.push(bytes);
        }
    }

    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, LaneEnd>> {
        match self.recv.poll_read_chunk(cx, READ_BYTES_MAX) {
            Poll::Ready(Ok(Some(bytes))) => Poll::Ready(Ok(bytes)),
            // Without a PutEnd the client has given the upload up.
            Poll::Ready(Ok(None)) => Poll::Ready(Err(LaneEnd::Gone)),
            Poll::Ready(Err(error)) => Poll::Ready(Err(error.into())),
            Poll::Pending => self.timer.poll_expired(cx).map(|()| Err(LaneEnd::Stalled)),
        }
    }
}

fn may_begin(session: &Session, permitted: bool) -> Result<(), Refusal> {
    if session.shard.draining.get() {
        return Err(RefusalCode::ShuttingDown.into());
    }
    if !permitted {
        return Err(RefusalCode::Forbidden.into());
    }
    Ok(())
}

/// Tells the client what can be told.
async fn fail(session: &Session, send: &mut SendStream, request: u32, failure: Failure) {
    let counters = &session.shard.counters;
    match failure {
        Failure::Refused(refusal) => {
            counters.refused(refusal.code);
            let frame = head_of(request, &refusal.to_message());
            if send_pieces(session, send, &mut [frame]).await.is_ok() {
                send.finish().ok(); // the client may have gone
            }
        }
        Failure::Violation(error) => {
            counters.protocol_errors.increment();
            let code = codes::of_frame_error(error);
            counters.refused(code);
            session.connection.close(code as u32, error.to_string().as_bytes());
        }
        Failure::End(LaneEnd::Stalled) => session.connection.close(codes::STALLED, b"the transfer stood still"),
        Failure::End(_) => {}
    }
}

fn head_of<M: Message>(request: u32, message: &M) -> Bytes {
    let mut out = Vec::new();
    encode(&mut out, request, message, 0);
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_ranges_hold_little_and_long_ones_the_read_ahead() {
        let holds = |offset, length| fetch_bytes(ByteRange { offset, length }) / CHUNK_BYTES as u64;
        assert_eq!([holds(5, 0), holds(5, 10), holds(5, 1 << 20), holds(0, u64::MAX)], [2, 2, 6, 8]);
    }
}
