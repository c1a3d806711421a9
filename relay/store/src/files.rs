//! Open segment files of a shard, for reading.
//!
//! Small payloads are read through io_uring, many at a time. Large ones, if the page cache doesn't have them, are read by threads
//! beside the shard into buffers that are used again, which takes two thirds of the CPU time of reading them through the page cache
//! (measured at 256 KiB) and doesn't sweep it clean. Only where the disk is slow, by our own measurement, is it worth that: there
//! large payloads go through the page cache, with the kernel reading ahead, so that a second reader finds them in memory.

use std::{
    cell::{Cell, OnceCell, RefCell},
    collections::BTreeMap,
    io,
    path::PathBuf,
    rc::Rc,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use metanode_log::Location;
use metanode_shard::{
    Companion,
    buffer::BufferPool,
    file::{CachedFile, DirectFile, DirectReader},
    now,
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
    files: RefCell<BTreeMap<(u16, u32), Rc<Open>>>,
    /// Started when first needed.
    readers: OnceCell<Companion>,
    /// What a timed read of a large payload takes, see [`estimate`].
    read_time: Cell<Duration>,
    since_probe: Cell<u32>,
    buffers: BufferPool,
}

#[derive(Debug)]
struct Open {
    direct: DirectFile,
    cached: CachedFile,
    /// Opened by the first thread that reads with it.
    reader: Arc<OnceLock<DirectReader>>,
}

impl Files {
    pub(crate) fn new(store: PathBuf) -> Self {
        Self {
            store,
            files: RefCell::default(),
            readers: OnceCell::new(),
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
        Box::pin(self.read_large(&file, location)).await // one allocation for many pages, and small reads carry less
    }

    async fn read_large(&self, file: &Open, location: Location) -> io::Result<Bytes> {
        let (offset, length) = (u64::from(location.offset), location.length as usize);
        if file.cached.is_resident(offset, length as u64)
            && let Some(bytes) = file.cached.try_read_at(offset, length)?
        {
            return Ok(bytes);
        }
        if self.is_slow() {
            return file.cached.read_at(offset, length).await;
        }
        let (buffers, reader) = (self.buffers.clone(), file.reader.clone());
        let path = segment_path(&self.store, location.log, location.segment);
        let job = move || {
            let reader = match reader.get() {
                Some(reader) => reader,
                None => {
                    let opened = DirectReader::open(path)?;
                    reader.get_or_init(|| opened)
                }
            };
            let mut buffer = buffers.take();
            let began = now();
            let range = reader.read_at(&mut buffer, offset, length)?;
            let took = now() - began;
            // What is kept of the answer keeps the whole buffer: a much shorter one gets memory of its own.
            if range.len() < buffer.capacity() / 16 * 15 {
                return Ok((Bytes::copy_from_slice(&buffer.as_slice()[range]), took));
            }
            Ok((Bytes::from_owner(buffer).slice(range), took))
        };
        let read: io::Result<_> = self.readers()?.run(job).await;
        let (bytes, took) = read?;
        self.read_time.set(estimate(self.read_time.get(), took));
        Ok(bytes)
    }

    fn readers(&self) -> io::Result<&Companion> {
        if let Some(readers) = self.readers.get() {
            return Ok(readers);
        }
        let started = Companion::start("read", READERS)?;
        Ok(self.readers.get_or_init(|| started))
    }

    /// Whether to leave a large read to the page cache.
    fn is_slow(&self) -> bool {
        if self.read_time.get() < SLOW_READ {
            return false;
        }
        self.since_probe.set((self.since_probe.get() + 1) % PROBE_EVERY);
        self.since_probe.get() != 0
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
        self.files.borrow_mut().remove(&(log, segment));
    }

    async fn file(&self, log: u16, segment: u32) -> io::Result<Rc<Open>> {
        if let Some(file) = self.files.borrow().get(&(log, segment)) {
            return Ok(file.clone());
        }
        // Opening is rare, and its futures are large: every read would carry the room for them.
        Box::pin(self.open(log, segment)).await
    }

    async fn open(&self, log: u16, segment: u32) -> io::Result<Rc<Open>> {
        let path = segment_path(&self.store, log, segment);
        let direct = DirectFile::open(&path).await?;
        let file = Rc::new(Open { direct, cached: CachedFile::open(&path).await?, reader: Arc::default() });
        let mut open = self.files.borrow_mut();
        if open.len() >= OPEN_MAX
            && let Some(oldest) = open.keys().min_by_key(|(_, segment)| *segment).copied()
        {
            open.remove(&oldest);
        }
        open.insert((log, segment), file.clone());
        Ok(file)
    }
}

/// What a read takes of the disk's time, after one more that took so long. Down at once and up slowly: a reader shares its core with a busy
/// shard and may wait for the core longer than for the disk, but not each time.
fn estimate(before: Duration, took: Duration) -> Duration {
    let sample = took.min(SLOW_READ * 4); // one hiccup says little
    if sample <= before { sample } else { before + (sample - before) / 16 }
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

        let after = |takes: &[u64]| {
            let reads = takes.iter().map(|ms| Duration::from_millis(*ms));
            reads.cycle().take(200).fold(Duration::ZERO, estimate)
        };
        assert!(after(&[10]) >= SLOW_READ && after(&[3]) >= SLOW_READ);
        assert!(after(&[10, 1, 20, 10]) < SLOW_READ, "it was the core that was busy");
    }
}
