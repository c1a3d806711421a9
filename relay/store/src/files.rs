//! Open segment files of a shard, for reading.
//!
//! Small payloads are read through io_uring, many at a time. Large ones, if the page cache doesn't have them, are read by threads
//! beside the shard into buffers that are used again, which takes two thirds of the CPU time of reading them through the page cache
//! (measured at 256 KiB) and doesn't sweep it clean. Only where the disk is slow, by our own measurement, is it worth that: there
//! large payloads go through the page cache, with the kernel reading ahead, so that a second reader finds them in memory.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::HashMap,
    io,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use metanode_log::Location;
use metanode_shard::{
    Companion,
    buffer::BufferPool,
    file::{CachedFile, DirectFile, DirectReader},
    run_blocking,
};

use crate::folder::segment_path;

/// Files a shard keeps open for reading; three descriptors each. 1,000 segments of 64 MiB are 62 GiB of data at hand.
const OPEN_MAX: usize = 1000;

/// Payloads up to this size are never read through the page cache: they are cached as blobs, and a page cache copy would be a
/// second one.
const SMALL_BYTES_MAX: u32 = 64 * 1024;

/// Threads that read large payloads: as many reads of 256 KiB keep a disk busy that reads 4 GB/s.
const READERS: usize = 4;

/// Buffers for large payloads that are kept while nobody reads, 256 KiB each (a chunk has that many bytes at most).
const IDLE_BUFFERS_MAX: usize = 16;

/// A disk that takes longer for a chunk is slow: flash takes 0.1 ms, a rotating disk 10, and one that is this busy is glad of a
/// cache.
const SLOW_READ: Duration = Duration::from_millis(2);

/// Of the large reads of a slow disk, one in so many is timed, to notice when it is no longer slow.
const PROBE_EVERY: u32 = 16;

/// Larger than a chunk by the alignment on both sides.
const BUFFER_BYTES_MAX: usize = metanode_types::limits::CHUNK_BYTES + 2 * metanode_shard::file::ALIGNMENT;

/// Reads payloads, whatever shard wrote them.
#[derive(Debug)]
pub(crate) struct Files {
    store: PathBuf,
    open: RefCell<HashMap<(u16, u32), Rc<Open>>>,
    /// Started when first needed.
    readers: OnceCell<Vec<Companion>>,
    next_reader: Cell<usize>,
    /// A moving average of what a timed read of a large payload took.
    read_time: Cell<Duration>,
    since_probe: Cell<u32>,
    buffers: BufferPool,
}

#[derive(Debug)]
struct Open {
    direct: DirectFile,
    cached: CachedFile,
    reader: Arc<DirectReader>,
}

impl Files {
    pub(crate) fn new(store: PathBuf) -> Self {
        Self {
            store,
            open: RefCell::default(),
            readers: OnceCell::new(),
            next_reader: Cell::new(0),
            read_time: Cell::default(),
            since_probe: Cell::new(0),
            buffers: BufferPool::new(IDLE_BUFFERS_MAX, BUFFER_BYTES_MAX),
        }
    }

    /// The bytes at `location`; fewer only where the file ends.
    pub(crate) async fn read(&self, location: Location) -> io::Result<Bytes> {
        let file = self.file(location.log, location.segment).await?;
        let (offset, length) = (u64::from(location.offset), location.length as usize);
        if location.length <= SMALL_BYTES_MAX {
            return file.direct.read_at(offset, length).await;
        }
        if file.cached.is_resident(offset, length as u64)
            && let Some(bytes) = file.cached.try_read_at(offset, length)?
        {
            return Ok(bytes);
        }
        if self.is_slow() {
            return file.cached.read_at(offset, length).await;
        }
        let (mut buffer, reader) = (self.buffers.take(), file.reader.clone());
        let job = move || {
            let began = Instant::now();
            let range = reader.read_at(&mut buffer, offset, length)?;
            Ok((Bytes::from_owner(buffer).slice(range), began.elapsed()))
        };
        let read: io::Result<_> = self.reader()?.run(job).await;
        let (bytes, took) = read?;
        self.read_time.set((self.read_time.get() * 7 + took) / 8);
        Ok(bytes)
    }

    /// Whether to leave a large read to the page cache.
    fn is_slow(&self) -> bool {
        if self.read_time.get() < SLOW_READ {
            return false;
        }
        self.since_probe.set((self.since_probe.get() + 1) % PROBE_EVERY);
        self.since_probe.get() != 0
    }

    fn reader(&self) -> io::Result<&Companion> {
        let readers = match self.readers.get() {
            Some(readers) => readers,
            None => {
                let started =
                    (0..READERS).map(|n| Companion::start(&format!("read-{n}"))).collect::<io::Result<_>>()?;
                self.readers.get_or_init(|| started)
            }
        };
        let next = self.next_reader.get();
        self.next_reader.set((next + 1) % READERS);
        Ok(&readers[next])
    }

    /// The same past the page cache. A page that was read ahead of a direct write can be stale, so a copy that looks corrupt is looked
    /// at on the device before anybody believes it.
    pub(crate) async fn read_again(&self, location: Location) -> io::Result<Bytes> {
        let file = self.file(location.log, location.segment).await?;
        let (offset, length) = (u64::from(location.offset), location.length as usize);
        file.cached.advise_dontneed(offset, location.length.into())?;
        file.direct.read_at(offset, length).await
    }

    /// Bytes of a segment for a scan.
    pub(crate) async fn read_raw(&self, log: u16, segment: u32, offset: u32, length: u32) -> io::Result<Bytes> {
        self.file(log, segment).await?.cached.read_at(offset.into(), length as usize).await
    }

    /// Closes a file that is to be deleted: its space returns when nobody has it open.
    pub(crate) fn forget(&self, log: u16, segment: u32) {
        self.open.borrow_mut().remove(&(log, segment));
    }

    async fn file(&self, log: u16, segment: u32) -> io::Result<Rc<Open>> {
        if let Some(file) = self.open.borrow().get(&(log, segment)) {
            return Ok(file.clone());
        }
        let path = segment_path(&self.store, log, segment);
        let direct = DirectFile::open(&path).await?;
        let cached = CachedFile::open(&path).await?;
        let reader = Arc::new(run_blocking(move || DirectReader::open(path)).await?);
        let file = Rc::new(Open { direct, cached, reader });
        let mut open = self.open.borrow_mut();
        if open.len() >= OPEN_MAX
            && let Some(oldest) = open.keys().min_by_key(|(_, segment)| *segment).copied()
        {
            open.remove(&oldest);
        }
        open.insert((log, segment), file.clone());
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_disk_is_read_through_the_page_cache_and_looked_at_now_and_then() {
        let files = Files::new(PathBuf::new());
        assert!(!files.is_slow(), "nothing known yet");
        files.read_time.set(SLOW_READ);
        let probes = (0..10 * PROBE_EVERY).filter(|_| !files.is_slow()).count();
        assert_eq!(probes, 10);
        files.read_time.set(SLOW_READ / 2);
        assert!(!files.is_slow());
    }
}
