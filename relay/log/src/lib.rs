//! The segment log as a core: it decides, a shell performs.
//!
//! A *log* is a sequence of *segments* (files), a segment a sequence of *commit frames*, a frame a batch of *records*. One shard
//! writes one log, one frame at a time: write, `fdatasync`, acknowledge. Nothing here does I/O: [`Writer`] returns
//! [`Effect`]s and is told how they ended, so that a simulated disk can answer as well as a real one; [`SegmentScan`] reads a
//! segment back the same way.
//!
//! # Invariants
//!
//! * A block that was acknowledged is never rewritten: frames are padded to [`BLOCK_BYTES`], and a restarted node begins a new
//!   segment.
//! * A segment's number comes again only in a later opening of the store, when no file has it, with that opening's number in its header;
//!   and every checksum is seeded with the store, the log, the segment and the offset: what
//!   an older use of the same blocks left behind is never taken for a record.
//! * Frame *n* + 1 is not written before frame *n* was synced. So a bad frame with a valid one behind it is rot, and a bad frame
//!   with none behind it is a torn tail, which nobody was promised.
//! * Records of a frame become visible together, or not at all.
//!
//! [`mod@format`] has the layout byte by byte; [`Table`] is the in-memory index that points into it.

pub mod format;
mod scan;
mod table;
mod writer;

pub use format::{BLOCK_BYTES, Location, RecordFlags, RecordKind, SegmentIdentity};
pub use scan::{ScanStep, SegmentScan};
pub use table::Table;
pub use writer::{Append, Committed, Effect, Failure, Writer, WriterLimits};
