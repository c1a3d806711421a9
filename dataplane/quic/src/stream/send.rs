use std::{
    fmt,
    future::poll_fn,
    task::{Context, Poll},
};

use bytes::Bytes;
use quinn_proto::{FinishError, StreamId, VarInt};

use super::{DROPPED, WriteError};
use crate::Connection;

/// The outgoing half of a stream. Dropping it unfinished resets it.
pub struct SendStream {
    connection: Connection,
    id: StreamId,
    ended: bool,
}

impl fmt::Debug for SendStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendStream").field("id", &self.id()).finish_non_exhaustive()
    }
}

impl SendStream {
    pub(crate) fn new(connection: Connection, id: StreamId) -> Self {
        Self { connection, id, ended: false }
    }

    /// The stream's number in its connection (RFC 9000 section 2.1).
    pub fn id(&self) -> u64 {
        VarInt::from(self.id).into_inner()
    }

    /// Writes all of `bytes`, waiting for credit and for room in the send window. They are kept, not copied, until the peer
    /// acknowledges them.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), WriteError> {
        self.write_chunks(&mut [bytes]).await
    }

    /// Writes all chunks, waiting as [`write`](Self::write) does. What was written is taken out of them.
    pub async fn write_chunks(&mut self, chunks: &mut [Bytes]) -> Result<(), WriteError> {
        poll_fn(|cx| self.poll_write_chunks(cx, chunks)).await
    }

    /// [`write_chunks`](Self::write_chunks) for futures written by hand.
    pub fn poll_write_chunks(&mut self, cx: &mut Context<'_>, chunks: &mut [Bytes]) -> Poll<Result<(), WriteError>> {
        match self.try_write_chunks(chunks) {
            Ok(true) => Poll::Ready(Ok(())),
            Ok(false) => {
                let mut wakers = self.connection.state.wakers.borrow_mut();
                wakers.writers.insert(self.id, cx.waker().clone());
                Poll::Pending
            }
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    /// Writes as much as credit and send window allow. True when nothing is left; what was written is taken out of `chunks`.
    pub fn try_write_chunks(&mut self, chunks: &mut [Bytes]) -> Result<bool, WriteError> {
        let state = &self.connection.state;
        if let Some(why) = state.why_lost() {
            return Err(why.into());
        }
        if self.ended {
            return Err(WriteError::Finished);
        }
        let mut proto = state.proto.borrow_mut();
        let mut stream = proto.send_stream(self.id);
        let mut first = 0;
        let result = loop {
            while chunks.get(first).is_some_and(Bytes::is_empty) {
                first += 1;
            }
            if first == chunks.len() {
                break Ok(true);
            }
            match stream.write_chunks(&mut chunks[first..]) {
                Ok(written) => first += written.chunks,
                Err(quinn_proto::WriteError::Blocked) => break Ok(false),
                Err(quinn_proto::WriteError::Stopped(code)) => break Err(WriteError::Stopped(code.into_inner())),
                Err(quinn_proto::WriteError::ClosedStream) => break Err(WriteError::Finished),
            }
        };
        drop(proto);
        // Also when blocked: the peer is told that more credit is wanted.
        self.connection.endpoint.mark(state);
        result
    }

    /// Ends the stream; what was written will still be delivered.
    pub fn finish(&mut self) -> Result<(), WriteError> {
        let state = &self.connection.state;
        if let Some(why) = state.why_lost() {
            return Err(why.into());
        }
        if self.ended {
            return Err(WriteError::Finished);
        }
        self.ended = true;
        let finished = state.proto.borrow_mut().send_stream(self.id).finish();
        self.connection.endpoint.mark(state);
        match finished {
            Ok(()) => Ok(()),
            Err(FinishError::Stopped(code)) => Err(WriteError::Stopped(code.into_inner())),
            Err(FinishError::ClosedStream) => Err(WriteError::Finished),
        }
    }

    /// Gives the stream up: what was not sent yet won't be.
    pub fn reset(&mut self, code: u32) {
        if self.ended {
            return;
        }
        self.ended = true;
        let state = &self.connection.state;
        if !state.is_lost() {
            state.proto.borrow_mut().send_stream(self.id).reset(code.into()).ok();
            self.connection.endpoint.mark(state);
        }
    }

    /// Waits until the peer stops the stream (`Ok(Some(code))`) or has acknowledged all of a finished one (`Ok(None)`).
    pub async fn stopped(&self) -> Result<Option<u64>, WriteError> {
        poll_fn(|cx| {
            let state = &self.connection.state;
            let stopped = state.proto.borrow_mut().send_stream(self.id).stopped();
            match stopped {
                Ok(Some(code)) => Poll::Ready(Ok(Some(code.into_inner()))),
                Err(_) => Poll::Ready(Ok(None)), // quinn-proto forgets a stream once all of it is acknowledged
                Ok(None) => match state.why_lost() {
                    Some(why) => Poll::Ready(Err(why.into())),
                    None => {
                        state.wakers.borrow_mut().stopped.insert(self.id, cx.waker().clone());
                        Poll::Pending
                    }
                },
            }
        })
        .await
    }

    /// Streams of a higher priority are sent first; all begin at 0.
    pub fn set_priority(&self, priority: i32) {
        self.connection.state.proto.borrow_mut().send_stream(self.id).set_priority(priority).ok();
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        self.reset(DROPPED);
        let mut wakers = self.connection.state.wakers.borrow_mut();
        wakers.writers.remove(&self.id);
        wakers.stopped.remove(&self.id);
    }
}
