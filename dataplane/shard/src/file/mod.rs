//! Files of a shard.
//!
//! * [`LogFile`]: O_DIRECT, written in large aligned pieces and synced by plain system calls on a thread that may wait;
//! * [`DirectFile`]: reads past the page cache, for what is cached in another form;
//! * [`CachedFile`]: reads through the page cache, without a trip through io_uring when the pages are there;
//! * everything else (rename, unlink, a folder's fsync, statvfs) is a system call in [`run_blocking`](crate::run_blocking).
//!
//! Errors carry the operating system's number: ENOSPC and EIO call for different things.

mod cached;
mod direct;
mod log;

pub use cached::{Access, CachedFile};
pub use direct::DirectFile;
pub use log::{ALIGNMENT, AlignedBuffer, DirectReader, LogFile};

/// Whether a read failed because what it asked for is lost: a sector that can't be read, a file that is not there. Other errors, such as a
/// want of memory, say nothing about the data.
pub fn is_lost(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::ENODATA | libc::ENOENT))
        || error.kind() == std::io::ErrorKind::NotFound
}
