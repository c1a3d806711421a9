//! Files of a shard.
//!
//! * [`DirectFile`]: O_DIRECT, for logs that are written once in large aligned pieces and synced;
//! * [`CachedFile`]: reads through the page cache, without a trip through io_uring when the pages are there;
//! * everything else (rename, unlink, a folder's fsync, statvfs) is a system call in [`run_blocking`](crate::run_blocking).
//!
//! Errors carry the operating system's number: ENOSPC and EIO call for different things.

mod cached;
mod direct;
mod dma;

pub use cached::{Access, CachedFile};
pub use direct::{DirectFile, OpenMode};
pub use dma::{ALIGNMENT, DmaBuffer};
