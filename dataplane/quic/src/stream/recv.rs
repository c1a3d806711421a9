use std::{
    fmt,
    future::poll_fn,
    task::{Context, Poll},
};

use bytes::Bytes;
use quinn_proto::{StreamId, VarInt};

use super::{DROPPED, ReadError, TryRead};
use crate::Connection;

/// The incoming half of a stream. Dropping it before its end tells the peer to stop.
pub struct RecvStream {
    connection: Connection,
    id: StreamId,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    Finished,
    /// By either side.
    GivenUp,
}

impl fmt::Debug for RecvStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecvStream").field("id", &self.id()).finish_non_exhaustive()
    }
}

impl RecvStream {
    pub(crate) fn new(connection: Connection, id: StreamId) -> Self {
        Self { connection, id, state: State::Open }
    }

    /// The stream's number in its connection (RFC 9000 section 2.1).
    pub fn id(&self) -> u64 {
        VarInt::from(self.id).into_inner()
    }

    /// The next bytes in order, at most `max`; `None` at the end. The bytes are those of the packets, not copied.
    pub async fn read_chunk(&mut self, max: usize) -> Result<Option<Bytes>, ReadError> {
        poll_fn(|cx| self.poll_read_chunk(cx, max)).await
    }

    /// [`read_chunk`](Self::read_chunk) for futures written by hand.
    pub fn poll_read_chunk(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<Result<Option<Bytes>, ReadError>> {
        match self.try_read_chunk(max) {
            Ok(TryRead::Data(bytes)) => Poll::Ready(Ok(Some(bytes))),
            Ok(TryRead::Finished) => Poll::Ready(Ok(None)),
            Err(error) => Poll::Ready(Err(error)),
            Ok(TryRead::Blocked) => {
                let mut wakers = self.connection.state.wakers.borrow_mut();
                wakers.readers.insert(self.id, cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// The next bytes in order, at most `max`, if they have arrived.
    pub fn try_read_chunk(&mut self, max: usize) -> Result<TryRead, ReadError> {
        match self.state {
            State::Open => {}
            State::Finished => return Ok(TryRead::Finished),
            State::GivenUp => return Err(ReadError::Stopped),
        }
        let state = &self.connection.state;
        let mut proto = state.proto.borrow_mut();
        let mut stream = proto.recv_stream(self.id);
        let Ok(mut chunks) = stream.read(true) else {
            self.state = State::GivenUp;
            return Err(ReadError::Stopped);
        };
        let read = chunks.next(max);
        let credit = chunks.finalize().should_transmit();
        drop(proto);
        if credit {
            self.connection.endpoint.mark(state);
        }
        match read {
            Ok(Some(chunk)) => Ok(TryRead::Data(chunk.bytes)),
            Ok(None) => {
                self.state = State::Finished;
                Ok(TryRead::Finished)
            }
            Err(quinn_proto::ReadError::Reset(code)) => {
                self.state = State::GivenUp;
                Err(ReadError::Reset(code.into_inner()))
            }
            // What had arrived before the end stays readable.
            Err(quinn_proto::ReadError::Blocked) => match state.why_lost() {
                Some(why) => Err(why.into()),
                None => Ok(TryRead::Blocked),
            },
        }
    }

    /// Tells the peer that the rest is not wanted.
    pub fn stop(&mut self, code: u32) {
        if self.state != State::Open {
            return;
        }
        self.state = State::GivenUp;
        let state = &self.connection.state;
        if !state.is_lost() {
            state.proto.borrow_mut().recv_stream(self.id).stop(code.into()).ok();
            self.connection.endpoint.mark(state);
        }
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        self.stop(DROPPED);
        self.connection.state.wakers.borrow_mut().readers.remove(&self.id);
    }
}
