use std::{fmt, io, path::Path};

use bytes::Bytes;
use glommio::io::{BufferedFile, DmaFile, OpenOptions};

use crate::{error::io_error, fs::simulated, notice::Noticed};

/// A file read past the page cache, where the file system allows it.
pub struct DirectFile(Inner);

enum Inner {
    Direct(DmaFile),
    /// glommio reads through the page cache on tmpfs, and we do where O_DIRECT is refused.
    Paged(BufferedFile),
    #[cfg(feature = "sim")]
    Simulated(crate::sim::Handle),
}

impl fmt::Debug for DirectFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirectFile").field("direct", &matches!(self.0, Inner::Direct(_))).finish()
    }
}

impl DirectFile {
    /// Opens an existing file.
    pub async fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        simulated!(|world| world.open(path.as_ref(), crate::sim::Mode::Existing).map(Inner::Simulated).map(Self));
        match Noticed::new(Self::reading().dma_open(path.as_ref())).await {
            Ok(file) => Ok(Self(Inner::Direct(file))),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Self::open_refused(path).await,
            Err(error) => Err(io_error(error)),
        }
    }

    /// As if the file system had refused O_DIRECT: for tests of the fallback.
    #[doc(hidden)]
    pub async fn open_refused(path: impl AsRef<Path>) -> io::Result<Self> {
        let file = Noticed::new(Self::reading().buffered_open(path.as_ref())).await.map_err(io_error)?;
        Ok(Self(Inner::Paged(file)))
    }

    fn reading() -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(true);
        options
    }

    /// Reads up to `len` bytes, fewer only at the end of the file. Any alignment; one copy.
    pub async fn read_at(&self, offset: u64, len: usize) -> io::Result<Bytes> {
        let read = match &self.0 {
            Inner::Direct(file) => Noticed::new(file.read_at(offset, len)).await,
            Inner::Paged(file) => Noticed::new(file.read_at(offset, len)).await,
            #[cfg(feature = "sim")]
            Inner::Simulated(file) => return crate::sim::world()?.read(file, offset, len).await,
        };
        Ok(Bytes::copy_from_slice(&read.map_err(io_error)?))
    }
}
