// Without the feature `sim`, `Inner` has one variant.
#![cfg_attr(not(feature = "sim"), allow(clippy::infallible_destructuring_match))]

use std::{
    fmt, io,
    os::fd::{AsRawFd, BorrowedFd},
    path::Path,
};

use bytes::Bytes;
use glommio::io::BufferedFile;
use rustix::fs::Advice;

use crate::{error::io_error, fs::simulated, notice::Noticed};

/// How a file will be read; see [`CachedFile::advise`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// These bytes are needed soon: read them ahead.
    WillNeed,
    /// These bytes are not needed: drop their pages.
    DontNeed,
    /// No order: read nothing ahead.
    Random,
    /// In order: read far ahead.
    Sequential,
}

/// A file read through the page cache.
///
/// A read whose pages are there is one system call on the shard, straight into the result; one that would wait for the disk
/// goes through io_uring and lets other tasks run.
pub struct CachedFile(Inner);

enum Inner {
    System(BufferedFile),
    #[cfg(feature = "sim")]
    Simulated(crate::sim::Handle),
}

/// Goes on with the operating system's file; a simulated one, whose pages are never in memory, has the other answer.
macro_rules! system {
    ($inner:expr, |$handle:ident| $answer:expr) => {
        match $inner {
            Inner::System(file) => file,
            #[cfg(feature = "sim")]
            Inner::Simulated($handle) => return $answer,
        }
    };
}

impl fmt::Debug for CachedFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = system!(&self.0, |handle| handle.fmt(f));
        f.debug_tuple("CachedFile").field(&file.as_raw_fd()).finish()
    }
}

impl CachedFile {
    /// Opens an existing file for reading.
    pub async fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        simulated!(|world| world.open(path.as_ref(), crate::sim::Mode::Existing).map(Inner::Simulated).map(Self));
        Noticed::new(BufferedFile::open(path)).await.map(Inner::System).map(Self).map_err(io_error)
    }

    /// Reads up to `len` bytes, fewer only at the end of the file.
    pub async fn read_at(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let file = system!(&self.0, |handle| crate::sim::world()?.read(handle, offset, len).await);
        let mut buffer = Vec::with_capacity(len);
        loop {
            match read_resident(file, &mut buffer, offset, len) {
                Ok(0) => return Ok(buffer.into()), // full, or the end of the file
                Ok(_) => {}
                Err(error) if would_wait(&error) => break,
                Err(error) => return Err(error),
            }
        }
        while buffer.len() < len {
            let at = offset + buffer.len() as u64;
            let read = Noticed::new(file.read_at(at, len - buffer.len())).await.map_err(io_error)?;
            if read.is_empty() {
                break;
            }
            buffer.extend_from_slice(&read);
        }
        Ok(buffer.into())
    }

    /// Whether the page cache has all of these bytes; `false` where the kernel can't tell (before Linux 6.5).
    pub fn is_resident(&self, offset: u64, len: u64) -> bool {
        const PAGE_BYTES: u64 = 4096;
        const SYS_CACHESTAT: libc::c_long = 451; // on every architecture that Rust runs on; not in `libc` yet
        // `struct cachestat_range` and `struct cachestat` of `include/uapi/linux/mman.h`.
        let range = [offset, len];
        let mut counts = [0u64; 5]; // cached, dirty, in writeback, evicted, recently evicted
        let fd = system!(&self.0, |_handle| false).as_raw_fd();
        // There is no safe interface to this call.
        // SAFETY: the kernel reads two words and writes five, which both places have; the descriptor is open.
        let result = unsafe { libc::syscall(SYS_CACHESTAT, fd, &raw const range, &raw mut counts, 0) };
        let pages = (offset + len).div_ceil(PAGE_BYTES) - offset / PAGE_BYTES;
        result == 0 && counts[0] >= pages
    }

    /// The bytes, if all of them lie in the page cache; `None` when a read would wait, or the file ends before. Without them, the
    /// kernel begins to read ahead.
    pub fn try_read_at(&self, offset: u64, len: usize) -> io::Result<Option<Bytes>> {
        let file = system!(&self.0, |_handle| Ok(None));
        let mut buffer = Vec::with_capacity(len);
        while buffer.len() < len {
            match read_resident(file, &mut buffer, offset, len) {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) if would_wait(&error) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(buffer.into()))
    }

    /// Tells the kernel how a range will be read; a length of 0 means to the end. A hint: errors don't matter to the reader.
    pub fn advise(&self, offset: u64, len: u64, access: Access) -> io::Result<()> {
        let file = system!(&self.0, |_handle| Ok(()));
        let advice = match access {
            Access::WillNeed => Advice::WillNeed,
            Access::DontNeed => Advice::DontNeed,
            Access::Random => Advice::Random,
            Access::Sequential => Advice::Sequential,
        };
        // SAFETY: the file owns the descriptor and closes it only when dropped.
        let file = unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) };
        Ok(rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(len), advice)?)
    }

    /// [`advise`](Self::advise): read the range ahead.
    pub fn advise_willneed(&self, offset: u64, len: u64) -> io::Result<()> {
        self.advise(offset, len, Access::WillNeed)
    }

    /// [`advise`](Self::advise): drop the range's pages.
    pub fn advise_dontneed(&self, offset: u64, len: u64) -> io::Result<()> {
        self.advise(offset, len, Access::DontNeed)
    }

    /// [`advise`](Self::advise): the whole file is read in no order.
    pub fn advise_random(&self) -> io::Result<()> {
        self.advise(0, 0, Access::Random)
    }

    /// Bytes in the file.
    pub async fn size(&self) -> io::Result<u64> {
        let file = system!(&self.0, |handle| crate::sim::world()?.length(handle));
        Noticed::new(file.file_size()).await.map_err(io_error)
    }

    /// Closes the file. Dropping closes it too, at the executor's next turn.
    pub async fn close(self) -> io::Result<()> {
        let file = system!(self.0, |handle| {
            drop(handle);
            Ok(())
        });
        Noticed::new(file.close()).await.map_err(io_error)
    }
}

/// Extends the buffer, towards `len` bytes, with what lies in the page cache; `offset` is that of the buffer's first byte.
fn read_resident(file: &BufferedFile, buffer: &mut Vec<u8>, offset: u64, len: usize) -> io::Result<usize> {
    let at = i64::try_from(offset + buffer.len() as u64).map_err(|_| io::ErrorKind::InvalidInput)?;
    let wanted = len - buffer.len();
    let spare = &mut buffer.spare_capacity_mut()[..wanted];
    let vector = libc::iovec { iov_base: spare.as_mut_ptr().cast(), iov_len: spare.len() };
    // Safe reads ask for initialised memory, and zeroing 256 KiB costs as much as copying it.
    // SAFETY: the vector describes the spare capacity, which is ours to write and outlives the call; the descriptor is open.
    let read = unsafe { libc::preadv2(file.as_raw_fd(), &raw const vector, 1, at, libc::RWF_NOWAIT) };
    let Ok(read) = usize::try_from(read) else {
        return Err(io::Error::last_os_error());
    };
    // SAFETY: the kernel has initialised the first `read` bytes of the spare capacity.
    unsafe { buffer.set_len(buffer.len() + read) };
    Ok(read)
}

/// The data is not in memory, or the file system can't tell.
fn would_wait(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EOPNOTSUPP | libc::EINTR))
}
