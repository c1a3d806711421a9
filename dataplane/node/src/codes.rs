//! Application error codes with which the node closes connections and ends streams (RFC 9000 section 20.2).
//!
//! Numbers below 0x100 are [`RefusalCode`]s: a stream that is reset or stopped in the middle of a bulk transfer, or a
//! connection that is closed, carries the refusal there when no frame can carry it. Clients read both the same way.

use metanode_wire::{FrameError, RefusalCode};

/// A connection or stream ended in order.
pub const DONE: u32 = 0;

/// The node is stopping.
pub const SHUTTING_DOWN: u32 = RefusalCode::ShuttingDown as u32;

/// Too many bytes of unfinished frames are held on this shard; come back later.
pub const BUSY: u32 = RefusalCode::Busy as u32;

/// The client did not take its answers, or did not go on with an upload, for too long.
pub const STALLED: u32 = 0x100;

/// How a frame error is refused; its connection is closed with the same number.
pub fn of_frame_error(error: FrameError) -> RefusalCode {
    match error {
        FrameError::UnsupportedVersion(_) => RefusalCode::UnsupportedVersion,
        FrameError::TooLarge { .. } => RefusalCode::TooLarge,
        FrameError::UnknownKind(_) | FrameError::UnknownFlags(_) => RefusalCode::NotSupported,
        FrameError::Malformed | FrameError::Unexpected(_) => RefusalCode::Malformed,
    }
}
