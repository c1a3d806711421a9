//! Streams of a connection.
//!
//! A stream handle borrows quinn-proto's state for the length of a call. Handles are dropped by their handlers at any time, so
//! dropping means something: an unread stream is stopped, an unfinished one is reset, and the peer learns of both.

mod recv;
mod send;

use bytes::Bytes;
pub use recv::RecvStream;
pub use send::SendStream;

use crate::ConnectionLost;

/// The code sent when a stream handle is dropped without a word.
const DROPPED: u32 = 0;

/// Reading failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The peer gave the stream up.
    #[error("stream reset by the peer: code {0}")]
    Reset(u64),
    /// The connection has ended.
    #[error("connection lost: {0}")]
    Lost(#[from] ConnectionLost),
    /// This side has stopped the stream.
    #[error("the stream was stopped")]
    Stopped,
}

/// Writing failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The peer doesn't want more.
    #[error("stream stopped by the peer: code {0}")]
    Stopped(u64),
    /// The connection has ended.
    #[error("connection lost: {0}")]
    Lost(#[from] ConnectionLost),
    /// This side has finished or reset the stream.
    #[error("the stream was finished or reset")]
    Finished,
}

/// What a read that doesn't wait has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TryRead {
    /// The next bytes; not empty.
    Data(Bytes),
    /// Nothing has arrived yet.
    Blocked,
    /// The peer has finished the stream and all of it was read.
    Finished,
}
