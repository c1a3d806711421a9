//! Blobs over chunks.
//!
//! * [`tree`]: BLAKE3 as a tree (bao, groups of 16 KiB): builders, slices, their verification.
//! * [`extent`]: the map of a large blob: chunk names and tree of 64 MiB each, and the root record above them.

pub mod extent;
pub mod partition;
pub mod tree;
