use std::{fmt, io, os::fd::AsFd, path::Path};

use bytes::Bytes;
use glommio::io::{BufferedFile, DmaFile, OpenOptions};
use rustix::fs::OFlags;

use super::DmaBuffer;
use crate::{error::io_error, notice::Noticed};

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Reading.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// A file that bypasses the page cache, where the file system allows it; see [`is_direct`](Self::is_direct).
pub struct DirectFile(Inner);

enum Inner {
    Direct(DmaFile),
    /// glommio writes through the page cache on tmpfs, and we do where O_DIRECT is refused.
    Paged(BufferedFile),
}

impl fmt::Debug for DirectFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectFile").field("direct", &self.is_direct()).finish()
    }
}

impl DirectFile {
    /// Opens an existing file.
    pub async fn open(path: impl AsRef<Path>, mode: OpenMode) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(mode == OpenMode::ReadWrite);
        Self::open_with(path.as_ref(), &options, &options).await
    }

    /// Creates a file that must not exist yet, for reading and writing.
    pub async fn create_new(path: impl AsRef<Path>) -> io::Result<Self> {
        let mut existing = OpenOptions::new();
        existing.read(true).write(true);
        let mut new = existing.clone();
        new.create_new(true).mode(0o640);
        // A refusal of O_DIRECT comes after the file was created, so the second attempt opens what the first one made.
        Self::open_with(path.as_ref(), &new, &existing).await
    }

    async fn open_with(path: &Path, options: &OpenOptions, fallback: &OpenOptions) -> io::Result<Self> {
        match Noticed::new(options.dma_open(path)).await {
            Ok(file) => Ok(Self(Inner::Direct(file))),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Self::open_paged(path, fallback).await,
            Err(error) => Err(io_error(error)),
        }
    }

    async fn open_paged(path: &Path, options: &OpenOptions) -> io::Result<Self> {
        let file = Noticed::new(options.buffered_open(path)).await.map_err(io_error)?;
        Ok(Self(Inner::Paged(file)))
    }

    /// Whether writes bypass the page cache. If not, [`fdatasync`](Self::fdatasync) is as durable, only slower.
    pub fn is_direct(&self) -> bool {
        match &self.0 {
            Inner::Direct(file) => {
                rustix::fs::fcntl_getfl(file.as_fd()).is_ok_and(|flags| flags.contains(OFlags::DIRECT))
            }
            Inner::Paged(_) => false,
        }
    }

    /// Writes the whole buffer; a short write is an error (`WriteZero`).
    ///
    /// Offset and filled length must be multiples of [`ALIGNMENT`](super::ALIGNMENT), whatever the file system.
    pub async fn write_at(&self, buffer: DmaBuffer, offset: u64) -> io::Result<()> {
        let len = buffer.len();
        let aligned = len.is_multiple_of(super::ALIGNMENT) && offset.is_multiple_of(super::ALIGNMENT as u64);
        if !aligned {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "write is not aligned"));
        }
        if len == 0 {
            return Ok(());
        }
        let written = match &self.0 {
            Inner::Direct(file) => Noticed::new(file.write_at(buffer.into_inner(), offset)).await,
            Inner::Paged(file) => Noticed::new(file.write_at(buffer.as_slice().to_vec(), offset)).await,
        };
        match written.map_err(io_error)? {
            written if written == len => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::WriteZero, "the file system wrote less than it was given")),
        }
    }

    /// Reads up to `len` bytes, fewer only at the end of the file. Any alignment; one copy.
    pub async fn read_at(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let read = match &self.0 {
            Inner::Direct(file) => Noticed::new(file.read_at(offset, len)).await,
            Inner::Paged(file) => Noticed::new(file.read_at(offset, len)).await,
        };
        Ok(Bytes::copy_from_slice(&read.map_err(io_error)?))
    }

    /// Makes written data, and the size, survive a crash.
    pub async fn fdatasync(&self) -> io::Result<()> {
        match &self.0 {
            Inner::Direct(file) => Noticed::new(file.fdatasync()).await,
            Inner::Paged(file) => Noticed::new(file.fdatasync()).await,
        }
        .map_err(io_error)
    }

    /// Reserves space, so that the file has at least `bytes` and writes below can't meet a full disk.
    pub async fn allocate(&self, bytes: u64) -> io::Result<()> {
        match &self.0 {
            Inner::Direct(file) => Noticed::new(file.pre_allocate(bytes, false)).await,
            Inner::Paged(file) => Noticed::new(file.pre_allocate(bytes, false)).await,
        }
        .map_err(io_error)
    }

    /// Cuts or extends the file to `bytes`.
    pub async fn truncate(&self, bytes: u64) -> io::Result<()> {
        match &self.0 {
            Inner::Direct(file) => Noticed::new(file.truncate(bytes)).await,
            Inner::Paged(file) => Noticed::new(file.truncate(bytes)).await,
        }
        .map_err(io_error)
    }

    /// Bytes in the file.
    pub async fn size(&self) -> io::Result<u64> {
        match &self.0 {
            Inner::Direct(file) => Noticed::new(file.file_size()).await,
            Inner::Paged(file) => Noticed::new(file.file_size()).await,
        }
        .map_err(io_error)
    }

    /// Closes the file. Dropping closes it too, at the executor's next turn and without a result.
    pub async fn close(self) -> io::Result<()> {
        match self.0 {
            Inner::Direct(file) => Noticed::new(file.close()).await,
            Inner::Paged(file) => Noticed::new(file.close()).await,
        }
        .map_err(io_error)
    }

    /// As if the file system had refused O_DIRECT: for tests of the fallback.
    #[doc(hidden)]
    pub async fn open_refused(path: impl AsRef<Path>) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        Self::open_paged(path.as_ref(), &options).await
    }
}
