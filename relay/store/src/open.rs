//! Opening a store: its identity, its number of openings, and the partitions that recovery rebuilt.

use std::{
    collections::BTreeMap,
    io::ErrorKind,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use metanode_blob::partition::{Order, Partition};
use metanode_log::{SegmentIdentity, WriterLimits};
use metanode_shard::{
    fill_random,
    fs::{self, PlainFile, sync_folder},
    now,
};
use metanode_types::{ShardCount, ShardId};

use crate::{
    Maintenance,
    counters::StoreCounters,
    error::OpenError,
    folder::{log_path, reserve_path},
    recover,
};

/// Format of the folder that this build reads and writes.
const FORMAT: u32 = 1;

/// Smallest segment: a root record of 4 TiB and a frame around it still fit. Simulated stores hold no such blob, and use up
/// segments faster.
const SEGMENT_BYTES_MIN: u64 = if cfg!(feature = "sim") { 1 << 20 } else { 4 << 20 };

/// A store on a small disk has smaller segments: the active, the next and the reserve of a log are 3 of these.
const SEGMENTS_A_DISK: u64 = 64;

/// How a store is opened.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Folder; made if it is not there.
    pub path: PathBuf,
    /// Bytes of memory cache of the whole node.
    pub cache_bytes_max: u64,
    /// Bytes of a segment, for a new store; a small disk gets smaller ones.
    pub segment_bytes: u64,
    /// Entries of the index of the whole node.
    pub index_entries_max: u64,
    /// Shards.
    pub shards: ShardCount,
    /// How long after a scrub the next one begins by itself; never without.
    pub scrub_period: Option<Duration>,
    /// Bytes a second that such a scrub reads, over all shards.
    pub scrub_bytes_per_second: u64,
}

impl StoreConfig {
    /// With the defaults: a cache for 100,000 blobs of 4 KiB, segments of 64 MiB, 50 million index entries (about 6 GiB).
    pub fn new(path: PathBuf, shards: ShardCount) -> Self {
        Self {
            path,
            cache_bytes_max: 416 << 20,
            segment_bytes: 64 << 20,
            index_entries_max: 50_000_000,
            shards,
            scrub_period: None,
            scrub_bytes_per_second: 0,
        }
    }
}

/// What recovery found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Segments that were read.
    pub segments: u64,
    /// Valid frames in them.
    pub frames: u64,
    /// Records in those.
    pub records: u64,
    /// Bytes behind the last valid frame of a segment that were cut: never acknowledged.
    pub cut_bytes: u64,
    /// Bytes that are no frame although valid ones follow: the disk lost what was acknowledged.
    pub rot_bytes: u64,
    /// Larger blobs whose map can't be read.
    pub damaged_blobs: u64,
    /// Roots that nobody referred to.
    pub dropped: u64,
    /// Chunks that nobody referred to: kept for a while, for an upload that goes on.
    pub orphans: u64,
    /// How long it took.
    pub duration: Duration,
}

/// What the shards of a process share.
#[derive(Debug, Clone)]
pub struct StoreShared(pub(crate) Arc<Shared>);

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: StoreConfig,
    pub(crate) store: [u8; 16],
    pub(crate) boot: u64,
    pub(crate) segment_bytes: u32,
    pub(crate) counters: Vec<Arc<StoreCounters>>,
    pub(crate) report: RecoveryReport,
    partitions: Mutex<Vec<Option<Partition>>>,
    segments: Mutex<BTreeMap<(u16, u32), SegmentInfo>>,
    read_only: Mutex<Option<String>>,
    pub(crate) maintenance: Maintenance,
}

/// A segment that is on disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SegmentInfo {
    /// Of its first frame, or of its making.
    pub(crate) first: Order,
    /// Bytes of its file.
    pub(crate) bytes: u64,
}

impl StoreShared {
    /// Opens the store in `config.path`, or makes one, and recovers it. Blocks; the caller holds the lock on the data folder.
    pub fn open(config: StoreConfig) -> Result<Self, OpenError> {
        let started = now();
        fs::create_folders(&config.path).map_err(OpenError::io(&config.path))?;
        // The store's own name must survive too.
        let around = config.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync_folder(around.unwrap_or(Path::new("."))).map_err(OpenError::io(&config.path))?;
        let meta = Meta::open(&config)?;
        for shard in config.shards.iter() {
            make_log(&config.path, shard.0, meta.segment_bytes)?;
        }
        let mut recovered = recover::recover(&config, &meta)?;
        recovered.report.duration = now() - started;
        let counters = config.shards.iter().map(|_| Arc::default()).collect();
        Ok(Self(Arc::new(Shared {
            store: meta.store,
            boot: meta.boot,
            segment_bytes: meta.segment_bytes,
            counters,
            report: recovered.report,
            partitions: Mutex::new(recovered.partitions.into_iter().map(Some).collect()),
            segments: Mutex::new(recovered.segments),
            read_only: Mutex::new(None),
            maintenance: Maintenance::default(),
            config,
        })))
    }

    /// Why there are no writes, if so.
    pub fn read_only_reason(&self) -> Option<String> {
        self.0.read_only().clone()
    }

    /// Scrubbing and compaction on demand.
    pub fn maintenance(&self) -> &Maintenance {
        &self.0.maintenance
    }

    /// What recovery found.
    pub fn recovery(&self) -> RecoveryReport {
        self.0.report
    }

    /// How many shards look after something.
    pub fn shards(&self) -> ShardCount {
        self.0.config.shards
    }

    /// The counters of a shard.
    pub fn counters(&self, shard: ShardId) -> Arc<StoreCounters> {
        self.0.counters[shard.index()].clone()
    }
}

impl Shared {
    /// One that has nothing, and is asked for nothing.
    pub(crate) fn empty_partition(&self, shard: ShardId) -> Partition {
        let identity = SegmentIdentity { store: self.store, log: shard.0, segment: 0 };
        Partition::new(identity, self.boot, WriterLimits::for_segments(self.segment_bytes), 0)
    }

    pub(crate) fn take_partition(&self, shard: ShardId) -> Option<Partition> {
        self.partitions.lock().unwrap_or_else(|e| e.into_inner()).get_mut(shard.index())?.take()
    }

    pub(crate) fn segments(&self) -> MutexGuard<'_, BTreeMap<(u16, u32), SegmentInfo>> {
        self.segments.lock().unwrap_or_else(|e| e.into_inner()) // a map of plain data is never half changed
    }

    pub(crate) fn read_only(&self) -> MutexGuard<'_, Option<String>> {
        self.read_only.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether no segment but `(log, segment)` can hold a record that is older than `order` of that log.
    pub(crate) fn nothing_older(&self, log: u16, segment: u32, order: Order) -> bool {
        self.segments().iter().all(|(&(other_log, other_segment), info)| {
            let same = (other_log, other_segment) == (log, segment);
            let older = if other_log == log { info.first < order } else { info.first.0 <= order.0 };
            same || !older
        })
    }
}

/// The file `meta`: what must be known before any segment is read.
#[derive(Debug, Clone)]
pub(crate) struct Meta {
    pub(crate) store: [u8; 16],
    pub(crate) boot: u64,
    pub(crate) segment_bytes: u32,
}

impl Meta {
    /// Reads it, or makes it; counts this opening, durably, so that no two openings share a number.
    fn open(config: &StoreConfig) -> Result<Self, OpenError> {
        let path = config.path.join("meta");
        let mut meta = match fs::read(&path) {
            Ok(text) => Self::parse(&String::from_utf8_lossy(&text), &path)?,
            Err(error) if error.kind() == ErrorKind::NotFound => Self::make(config)?,
            Err(error) => return Err(OpenError::io(path)(error)),
        };
        meta.count_opening();
        let new = config.path.join("meta.new");
        let text = meta.text();
        let write = || -> std::io::Result<()> {
            let file = PlainFile::create(&new)?;
            file.write_at(text.as_bytes(), 0)?;
            file.sync()?;
            fs::rename(&new, &path)?;
            sync_folder(&config.path)
        };
        write().map_err(OpenError::io(&path))?;
        Ok(meta)
    }

    /// Reads it; there must be one.
    pub(crate) fn read(store: &Path) -> Result<Self, OpenError> {
        let path = store.join("meta");
        let text = fs::read(&path).map_err(OpenError::io(&path))?;
        Self::parse(&String::from_utf8_lossy(&text), &path)
    }

    fn make(config: &StoreConfig) -> Result<Self, OpenError> {
        let mut store = [0; 16];
        fill_random(&mut store).map_err(OpenError::io(&config.path))?;
        let share = fs::space(&config.path).map_err(OpenError::io(&config.path))?.total_bytes / SEGMENTS_A_DISK;
        let bytes = config.segment_bytes.min(share).clamp(SEGMENT_BYTES_MIN, 1 << 30);
        Ok(Self { store, boot: 0, segment_bytes: (bytes >> 20 << 20) as u32 })
    }

    pub(crate) fn count_opening(&mut self) {
        self.boot += 1;
    }

    pub(crate) fn text(&self) -> String {
        format!(
            "metanode-store {FORMAT}\nstore {}\nsegment_bytes {}\nboot {}\n",
            self.store.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
            self.segment_bytes,
            self.boot
        )
    }

    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, OpenError> {
        let damaged = |what| OpenError::Damaged { path: path.to_owned(), what };
        let value = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')).ok_or(damaged("a line is missing"))
        };
        let number = |name| value(name)?.parse::<u64>().map_err(|_| damaged("a number is malformed"));
        let format = number("metanode-store")?;
        if format > u64::from(FORMAT) {
            return Err(OpenError::NewerFormat { found: format as u32, supported: FORMAT });
        }
        let hex = value("store")?;
        let mut store = [0; 16];
        if hex.len() != 32 || !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(damaged("the store's identity is malformed"));
        }
        for (i, byte) in store.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * i..2 * i + 2], 16)
                .map_err(|_| damaged("the store's identity is malformed"))?;
        }
        let segment_bytes = number("segment_bytes")?;
        if !(SEGMENT_BYTES_MIN..=1 << 30).contains(&segment_bytes) || segment_bytes % 4096 != 0 {
            return Err(damaged("the segment size is malformed"));
        }
        let boot = number("boot")?;
        if boot == u64::MAX {
            return Err(damaged("there is no opening behind the last number"));
        }
        Ok(Self { store, boot, segment_bytes: segment_bytes as u32 })
    }
}

/// The folder of a log, with its reserve.
fn make_log(store: &Path, log: u16, segment_bytes: u32) -> Result<(), OpenError> {
    let folder = log_path(store, log);
    fs::create_folders(&folder).map_err(OpenError::io(&folder))?;
    make_reserve(store, log, segment_bytes).map_err(OpenError::io(reserve_path(store, log)))?;
    sync_folder(store).map_err(OpenError::io(store))
}

/// Sets space aside for removals; there is nothing to do when it is there. A full disk is no error: the space comes with the next
/// segment that is freed.
pub(crate) fn make_reserve(store: &Path, log: u16, segment_bytes: u32) -> std::io::Result<()> {
    let path = reserve_path(store, log);
    let file = PlainFile::open_or_create(&path)?;
    if file.size()? == u64::from(segment_bytes) {
        return Ok(());
    }
    match file.allocate(u64::from(segment_bytes)) {
        Ok(()) => file.sync(),
        Err(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
            drop(file);
            fs::remove_file(&path)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meta_counts_openings_and_refuses_newer_formats() {
        let folder = tempfile::tempdir().unwrap();
        let config = StoreConfig::new(folder.path().into(), ShardCount::new(1).unwrap());
        let first = Meta::open(&config).unwrap();
        let second = Meta::open(&config).unwrap();
        assert_eq!((first.boot, second.boot), (1, 2));
        assert_eq!(first.store, second.store);
        let path = folder.path().join("meta");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replace("metanode-store 1", "metanode-store 2")).unwrap();
        assert!(matches!(Meta::open(&config), Err(OpenError::NewerFormat { found: 2, supported: 1 })));
        for boot in ["x", "18446744073709551615"] {
            std::fs::write(&path, text.replace("boot 2", &format!("boot {boot}"))).unwrap();
            assert!(matches!(Meta::open(&config), Err(OpenError::Damaged { .. })), "{boot}");
        }
    }
}
