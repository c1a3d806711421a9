use std::{
    fmt, fs, io,
    ops::Range,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use rustix::fs::{FallocateFlags, OFlags, fallocate};

use crate::fs::simulated;

/// What O_DIRECT asks of buffers, offsets and lengths on every device we know; also the unit in which logs are padded.
pub const ALIGNMENT: usize = 4096;

/// Memory aligned for O_DIRECT, filled from the front.
///
/// It is written as a whole, so its filled length must be a multiple of [`ALIGNMENT`] by then. Made to be used
/// again: fresh memory costs the kernel more than filling it costs us.
#[derive(Default)]
pub struct AlignedBuffer {
    blocks: Vec<Block>,
    filled: usize,
}

#[derive(Clone)]
#[repr(C, align(4096))]
struct Block([u8; ALIGNMENT]);

impl fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AlignedBuffer").field("len", &self.filled).field("capacity", &self.capacity()).finish()
    }
}

impl AlignedBuffer {
    /// Zeros.
    pub fn zeroed(len: usize) -> Self {
        let mut buffer = Self::default();
        buffer.reserve(len);
        buffer.filled = len;
        buffer
    }

    /// Bytes that fit without another allocation.
    pub fn capacity(&self) -> usize {
        self.blocks.len() * ALIGNMENT
    }

    /// The filled bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: blocks are arrays of bytes without padding (size and alignment are equal), one behind the other.
        let bytes = unsafe { std::slice::from_raw_parts(self.blocks.as_ptr().cast::<u8>(), self.capacity()) };
        &bytes[..self.filled]
    }

    /// Fills the buffer with what the file has from `offset` on, up to `len` bytes; fewer only at its end.
    fn read_from(&mut self, file: &Reader, offset: u64, len: usize) -> io::Result<()> {
        self.filled = 0;
        self.reserve(len);
        while self.filled < len {
            let at = self.filled;
            match file.read_at(&mut self.all_mut()[at..len], offset + at as u64) {
                Ok(read) => {
                    self.filled += read;
                    if !read.is_multiple_of(ALIGNMENT) || read == 0 {
                        break; // the end of the file; to ask again there would not be aligned
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Forgets what lies behind `len`.
    pub fn truncate(&mut self, len: usize) {
        self.filled = self.filled.min(len);
    }

    /// Forgets what is filled, and the memory too if it is more than `keep` bytes.
    pub fn clear(&mut self, keep: usize) {
        self.filled = 0;
        if self.capacity() > keep {
            self.blocks = Vec::new();
        }
    }

    /// Appends `bytes`.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        let start = self.filled;
        self.reserve(bytes.len());
        self.filled += bytes.len();
        let end = self.filled;
        self.all_mut()[start..end].copy_from_slice(bytes);
    }

    fn all_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and the blocks are borrowed for as long as the slice.
        unsafe { std::slice::from_raw_parts_mut(self.blocks.as_mut_ptr().cast::<u8>(), self.capacity()) }
    }

    /// Makes room for `more` bytes.
    pub fn reserve(&mut self, more: usize) {
        let blocks = (self.filled + more).div_ceil(ALIGNMENT);
        if blocks > self.blocks.len() {
            self.blocks.resize(blocks, Block([0; ALIGNMENT]));
        }
    }
}

/// A file that a log is written to with plain system calls, past the page cache where the file system allows it; see
/// [`is_direct`](Self::is_direct). Its methods wait for the disk: call them on threads that may
/// ([`Companion`](crate::Companion), [`run_blocking`](crate::run_blocking)).
#[derive(Debug)]
pub struct LogFile(Log);

#[derive(Debug)]
enum Log {
    System {
        file: fs::File,
        direct: bool,
    },
    #[cfg(feature = "sim")]
    Simulated(crate::sim::Handle),
}

impl LogFile {
    /// Creates a file that must not exist yet.
    pub fn create_new(path: impl AsRef<Path>) -> io::Result<Self> {
        simulated!(|world| world.open(path.as_ref(), crate::sim::Mode::New).map(Log::Simulated).map(Self));
        let mut new = fs::OpenOptions::new();
        new.write(true).create_new(true).mode(0o640);
        Self::open_with(path.as_ref(), new)
    }

    /// Opens an existing file.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        simulated!(|world| world.open(path.as_ref(), crate::sim::Mode::Existing).map(Log::Simulated).map(Self));
        let mut existing = fs::OpenOptions::new();
        existing.write(true);
        Self::open_with(path.as_ref(), existing)
    }

    fn open_with(path: &Path, mut options: fs::OpenOptions) -> io::Result<Self> {
        match options.custom_flags(libc::O_DIRECT).open(path) {
            Ok(file) => Ok(Self(Log::System { file, direct: true })),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Self::open_paged(path),
            Err(error) => Err(error),
        }
    }

    /// The refusal of O_DIRECT comes after the file was created.
    fn open_paged(path: &Path) -> io::Result<Self> {
        let file = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o640).open(path)?;
        Ok(Self(Log::System { file, direct: false }))
    }

    /// As if the file system had refused O_DIRECT: for tests of the fallback.
    #[doc(hidden)]
    pub fn open_refused(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::open_paged(path.as_ref())
    }

    /// Whether writes bypass the page cache. If not, [`fdatasync`](Self::fdatasync) is as durable, only slower.
    pub fn is_direct(&self) -> bool {
        match &self.0 {
            Log::System { file, direct } => {
                *direct && rustix::fs::fcntl_getfl(file).is_ok_and(|flags| flags.contains(OFlags::DIRECT))
            }
            #[cfg(feature = "sim")]
            Log::Simulated(_) => true,
        }
    }

    /// Reserves space, so that the file has at least `bytes` and writes below can't meet a full disk.
    pub fn allocate(&self, bytes: u64) -> io::Result<()> {
        match &self.0 {
            Log::System { file, .. } => Ok(fallocate(file, FallocateFlags::empty(), 0, bytes)?),
            #[cfg(feature = "sim")]
            Log::Simulated(file) => crate::sim::world()?.allocate(file, bytes),
        }
    }

    /// Writes the whole buffer.
    ///
    /// Offset and filled length must be multiples of [`ALIGNMENT`], whatever the file system.
    pub fn write_at(&self, buffer: &AlignedBuffer, offset: u64) -> io::Result<()> {
        let bytes = buffer.as_slice();
        if !bytes.len().is_multiple_of(ALIGNMENT) || !offset.is_multiple_of(ALIGNMENT as u64) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "write is not aligned"));
        }
        match &self.0 {
            Log::System { file, .. } => file.write_all_at(bytes, offset),
            #[cfg(feature = "sim")]
            Log::Simulated(file) => crate::sim::world()?.write_at(file, bytes, offset),
        }
    }

    /// Makes written data, and the size, survive a crash.
    pub fn fdatasync(&self) -> io::Result<()> {
        match &self.0 {
            Log::System { file, .. } => file.sync_data(),
            #[cfg(feature = "sim")]
            Log::Simulated(file) => crate::sim::world()?.sync(file),
        }
    }
}

/// A file that is read past the page cache, where the file system allows it, by plain system calls on a thread that may wait.
#[derive(Debug)]
pub struct DirectReader(Reader);

#[derive(Debug)]
enum Reader {
    System(fs::File),
    #[cfg(feature = "sim")]
    Simulated(crate::sim::Handle),
}

impl Reader {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        match self {
            Self::System(file) => file.read_at(buffer, offset),
            #[cfg(feature = "sim")]
            Self::Simulated(file) => crate::sim::world()?.read_at(file, buffer, offset),
        }
    }
}

impl DirectReader {
    /// Opens an existing file.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        simulated!(|world| world.open(path.as_ref(), crate::sim::Mode::Existing).map(Reader::Simulated).map(Self));
        let mut options = fs::OpenOptions::new();
        options.read(true);
        let file = match options.clone().custom_flags(libc::O_DIRECT).open(path.as_ref()) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => options.open(path),
            result => result,
        };
        file.map(Reader::System).map(Self)
    }

    /// Reads `len` bytes from `offset` on, fewer only at the end of the file, into a buffer that may get more on both sides. Returns
    /// where in the buffer they are. Any alignment.
    pub fn read_at(&self, buffer: &mut AlignedBuffer, offset: u64, len: usize) -> io::Result<Range<usize>> {
        let skip = (offset % ALIGNMENT as u64) as usize;
        buffer.read_from(&self.0, offset - skip as u64, (skip + len).next_multiple_of(ALIGNMENT))?;
        let end = (skip + len).min(buffer.as_slice().len());
        Ok(skip.min(end)..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_grows_by_blocks_and_is_used_again() {
        let mut buffer = AlignedBuffer::default();
        buffer.extend_from_slice(&[7; 4097]);
        assert_eq!(buffer.capacity(), 8192);
        buffer.extend_from_slice(&[0; 4095]);
        assert_eq!(buffer.as_slice().as_ptr().align_offset(ALIGNMENT), 0);
        assert_eq!(buffer.as_slice()[..4097], [7; 4097]);
        assert_eq!(buffer.as_slice()[4097..], [0; 4095]);
        buffer.clear(8192);
        assert!(buffer.as_slice().is_empty());
        buffer.extend_from_slice(&[8; 10]);
        buffer.extend_from_slice(&[0; 4086]);
        assert_eq!((&buffer.as_slice()[..10], &buffer.as_slice()[10..]), (&[8; 10][..], &[0; 4086][..]));
        buffer.clear(8191);
        assert_eq!(buffer.capacity(), 0);
        assert_eq!(AlignedBuffer::zeroed(5000).as_slice(), [0; 5000]);
    }
}
