//! Recovery: reads all logs and rebuilds the partitions, before any shard starts.
//!
//! Logs of an earlier number of shards are read like the others: a record goes to the partition that owns its key now. It reads
//! heads, not payloads, except of large blobs' maps and folders' manifests, whose references are counted.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use metanode_blob::{
    extent::{ExtentPage, decode_root},
    partition::{Coverage, Order, Partition, Recovery, RootEntry, Source},
};
use metanode_log::{BLOCK_BYTES, Location, ScanStep, SegmentIdentity, SegmentScan, WriterLimits};
use metanode_shard::fs::{self, PlainFile, sync_folder};
use metanode_types::{BlobKind, Hash, ShardCount, ShardId};
use tracing::{info, warn};

use crate::{
    StoreConfig, checkpoint,
    children::ChildNames,
    error::OpenError,
    folder::{log_path, parse_log, parse_segment, segment_path},
    open::{Meta, RecoveryReport, SegmentInfo},
};

pub(crate) struct Recovered {
    pub(crate) partitions: Vec<Partition>,
    pub(crate) segments: BTreeMap<(u16, u32), SegmentInfo>,
    pub(crate) report: RecoveryReport,
}

pub(crate) fn recover(config: &StoreConfig, meta: &Meta) -> Result<Recovered, OpenError> {
    let mut recoveries: Vec<Recovery> = config.shards.iter().map(|_| Recovery::new()).collect();
    let Found { segments: found, next } = Found::look(config, meta)?;
    let begun_in = found.iter().map(|(place, segment)| (*place, segment.begun_in)).collect();
    let covered = checkpoint::load(config, meta.store, &begun_in, &mut recoveries);
    if covered.is_empty() {
        checkpoint::discard(&config.path).map_err(OpenError::io(&config.path))?;
    }
    let mut scan = Scan {
        config,
        meta,
        recoveries,
        covered,
        followed_in: HashMap::new(),
        segments: BTreeMap::new(),
        report: RecoveryReport::default(),
    };
    // The last first: what follows a segment says whether its end can be torn.
    for ((log, segment), found) in found.into_iter().rev() {
        scan.segment(log, segment, &found).map_err(OpenError::io(&found.path))?;
    }
    for log in logs(&config.path)?.values() {
        sync_folder(log).map_err(OpenError::io(log))?;
    }
    let Scan { recoveries, segments, mut report, .. } = scan;
    let limits = WriterLimits::for_segments(meta.segment_bytes);
    let entries = (config.index_entries_max / u64::from(config.shards.get())) as usize;
    let mut tags = Vec::new();
    let mut partitions: Vec<Partition> = config
        .shards
        .iter()
        .zip(recoveries)
        .map(|(shard, recovery)| {
            let segment = next.get(&shard.0).copied().unwrap_or(0);
            let identity = SegmentIdentity { store: meta.store, log: shard.0, segment };
            let mut partition = Partition::new(identity, meta.boot, limits, entries);
            tags.push(recovery.finish(&mut partition));
            partition
        })
        .collect();
    let mut counter = Counter { config, files: HashMap::new(), partitions: &mut partitions };
    let damaged = counter.count(tags);
    report.damaged_blobs = damaged;
    for partition in &mut partitions {
        // What a damaged map refers to is unknown: then nothing is dropped until it is mended or removed.
        let (orphans, roots) = partition.recover_end(damaged == 0);
        report.orphans += orphans as u64;
        report.dropped += roots as u64;
    }
    if report.segments > 0 {
        info!(segments = report.segments, frames = report.frames, records = report.records, "recovered");
    }
    Ok(Recovered { partitions, segments, report })
}

/// Folders of logs, by number.
fn logs(store: &Path) -> Result<BTreeMap<u16, PathBuf>, OpenError> {
    let mut logs = BTreeMap::new();
    for name in fs::names(store).map_err(OpenError::io(store))? {
        if let Some(log) = name.to_str().and_then(parse_log) {
            logs.insert(log, store.join(name));
        }
    }
    Ok(logs)
}

/// A segment file with something in it.
struct FoundSegment {
    path: PathBuf,
    /// The opening that its header names, unless that is damaged.
    begun_in: Option<u64>,
    /// Without frames it is nobody's.
    may_go: bool,
}

/// What is on disk, by log and segment.
struct Found {
    segments: BTreeMap<(u16, u32), FoundSegment>,
    /// First unused segment number of each log.
    next: BTreeMap<u16, u32>,
}

impl Found {
    /// Reads the headers of all segments.
    fn look(config: &StoreConfig, meta: &Meta) -> Result<Self, OpenError> {
        let mut this = Self { segments: BTreeMap::new(), next: BTreeMap::new() };
        for (log, folder) in logs(&config.path)? {
            for name in fs::names(&folder).map_err(OpenError::io(&folder))? {
                let Some(segment) = name.to_str().and_then(parse_segment) else { continue };
                let next = this.next.entry(log).or_default();
                *next = (*next).max(segment + 1);
                let path = folder.join(name);
                let identity = SegmentIdentity { store: meta.store, log, segment };
                let found = FoundSegment::look(&path, identity).map_err(OpenError::io(&path))?;
                this.segments.insert((log, segment), found);
            }
        }
        Ok(this)
    }
}

impl FoundSegment {
    fn look(path: &Path, identity: SegmentIdentity) -> io::Result<Self> {
        let header = read(&PlainFile::open(path)?, 0, BLOCK_BYTES)?;
        // Frames are written behind a header that is durable. So there are none, and nothing to keep, behind one that was not written,
        // or is that of another name which the file had before. Otherwise frames say by themselves whether they are this segment's.
        let (begun_in, may_go) = match SegmentIdentity::decode_header(&header) {
            Some((found, boot)) if found == identity => (Some(boot), true),
            None if header.iter().all(|byte| *byte == 0) => (None, true),
            Some((found, _)) if (found.store, found.log) == (identity.store, identity.log) => (None, true),
            _ => (None, false),
        };
        Ok(Self { path: path.to_owned(), begun_in, may_go })
    }
}

struct Scan<'a> {
    config: &'a StoreConfig,
    meta: &'a Meta,
    recoveries: Vec<Recovery>,
    /// What the checkpoints hold, by partition of their number of shards; empty without them.
    covered: Vec<Coverage>,
    /// Opening of the first frame behind what is looked at, by log.
    followed_in: HashMap<u16, u64>,
    segments: BTreeMap<(u16, u32), SegmentInfo>,
    report: RecoveryReport,
}

impl Scan<'_> {
    fn segment(&mut self, log: u16, segment: u32, found: &FoundSegment) -> io::Result<()> {
        let FoundSegment { path, begun_in: boot, may_go } = found;
        let identity = SegmentIdentity { store: self.meta.store, log, segment };
        let file = PlainFile::open_for_change(path)?;
        let bytes = u32::try_from(file.size()?).unwrap_or(u32::MAX);
        if let Some(boot) = *boot
            && !self.covered.is_empty()
            && self.covered.iter().all(|c| c.has_segment(log, segment, boot))
        {
            self.segments.insert((log, segment), SegmentInfo { first: (boot, 0), bytes: bytes.into() });
            return Ok(());
        }
        self.report.segments += 1;
        let followed_in = self.followed_in.get(&log).copied();
        let is_closed = is_closed(bytes, self.meta.segment_bytes, *boot, followed_in);
        let mut scan = SegmentScan::new(identity, bytes).closed(is_closed);
        let mut first = None;
        let mut last = None;
        let mut rot_bytes = 0;
        let tail = loop {
            match scan.step() {
                ScanStep::Read { offset, length } => {
                    scan.supply(offset, read(&file, offset.into(), length as usize)?.into());
                }
                ScanStep::Frame { header, records } => {
                    let order = (header.boot, header.sequence);
                    first = first.or(Some(order));
                    last = Some(header.length);
                    self.report.frames += 1;
                    self.report.records += records.len() as u64;
                    for head in &records {
                        if self.covers(&head.key, log, order) {
                            continue;
                        }
                        let owner = ShardId::owner_of(&head.key, self.config.shards);
                        self.recoveries[owner.index()].record(head, order);
                    }
                }
                ScanStep::Rot { offset, length } => {
                    warn!(path = %path.display(), offset, length, "a part of a segment is damaged");
                    rot_bytes += u64::from(length);
                }
                ScanStep::End { tail } => break tail,
            }
        };
        self.report.rot_bytes += rot_bytes;
        let Some((first, last)) = first.zip(last).filter(|_| tail > BLOCK_BYTES as u32) else {
            if rot_bytes == 0 && *may_go {
                return fs::remove_file(path);
            }
            warn!(path = %path.display(), "no frame of a segment can be read");
            self.report.rot_bytes += u64::from(bytes) - rot_bytes;
            return Ok(());
        };
        self.followed_in.insert(log, first.0);
        if boot.is_none() {
            warn!(path = %path.display(), "the header of a segment is damaged; its frames are not");
            self.report.rot_bytes += BLOCK_BYTES as u64;
        }
        // A frame that was written and not synced when the process died counts from now on, so it must not get lost. It is written
        // again, with the same bytes: behind a sync that failed, a page cache has what the disk has not, and no later sync writes it.
        let at = u64::from(tail - last);
        match file.write_at(&read(&file, at, last as usize)?, at) {
            // A file system that writes elsewhere has no room; the node must start all the same, so that something can be removed.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                warn!(path = %path.display(), "the disk is full: the end of a segment could not be written again");
            }
            written => written?,
        }
        file.sync()?;
        if tail < bytes {
            // Only now: what a cut file ends with was whole once.
            self.report.cut_bytes += u64::from(bytes - tail);
            file.set_size(tail.into())?;
            file.sync()?;
        }
        self.segments.insert((log, segment), SegmentInfo { first, bytes: tail.into() });
        Ok(())
    }
}

impl Scan<'_> {
    /// Whether a record is in the checkpoints.
    fn covers(&self, key: &Hash, log: u16, order: Order) -> bool {
        let Some(shards) = ShardCount::new(self.covered.len() as u16) else { return false };
        self.covered[ShardId::owner_of(key, shards).index()].has_frame(log, order)
    }
}

/// Whether the last frame of a segment of `bytes` bytes is known to have been whole, so that what is wrong with it is rot.
///
/// Recovery cuts a file off behind its last frame, once that is durable; a log cuts a frame off that failed. Both leave the file shorter
/// than a segment. And nothing is written to a later segment before that: not by the opening that began this one, whose frames wait for
/// each other, nor by a later one, whose recovery comes first.
pub(crate) fn is_closed(bytes: u32, segment_bytes: u32, begun_in: Option<u64>, followed_in: Option<u64>) -> bool {
    bytes < segment_bytes || begun_in.is_some_and(|boot| followed_in.is_some_and(|later| boot <= later))
}

/// Reads up to `length` bytes: fewer where the file ends.
pub(crate) fn read(file: &PlainFile, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let read = file.read_at(&mut bytes, offset)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// Counts the references of tags, maps and folders.
struct Counter<'a> {
    config: &'a StoreConfig,
    files: HashMap<(u16, u32), PlainFile>,
    partitions: &'a mut Vec<Partition>,
}

/// Open files at once; logs are read in order, so few are used again.
const FILES_MAX: usize = 256;

impl Counter<'_> {
    /// Returns the number of blobs whose references can't be known.
    fn count(&mut self, tags: Vec<Vec<metanode_log::format::RecordHead>>) -> u64 {
        let mut damaged = 0;
        for (index, heads) in tags.into_iter().enumerate() {
            for head in heads {
                let target = self.payload(head.location).and_then(|p| self.partitions[index].recover_tag(&head, &p));
                match target {
                    Some(target) => _ = self.owner(&target).recover_root_reference(&target),
                    None => damaged += 1,
                }
            }
        }
        for index in 0..self.partitions.len() {
            for (hash, root) in self.partitions[index].recover_roots() {
                if self.root(&hash, &root).is_none() {
                    warn!(%hash, "the map of a blob can't be read; nothing is dropped until it is removed");
                    self.owner(&hash).mark_damaged(&hash);
                    damaged += 1;
                }
            }
        }
        damaged
    }

    fn owner(&mut self, key: &Hash) -> &mut Partition {
        &mut self.partitions[ShardId::owner_of(key, self.config.shards).index()]
    }

    fn root(&mut self, hash: &Hash, root: &RootEntry) -> Option<()> {
        let mut names = Vec::new();
        if root.is_whole() {
            names.push(*hash); // counted by its partition already
        } else {
            let extents = decode_root(&self.payload(root.location)?, root.size_bytes).ok()?;
            let mut whole = true;
            for (index, extent) in extents.iter().enumerate() {
                let page = self.chunk(&extent.page)?;
                let page = ExtentPage::decode(&page, index, root.size_bytes).ok()?;
                self.owner(&extent.page).recover_chunk_reference(&extent.page);
                for name in &page.chunks {
                    whole &= self.owner(name).recover_chunk_reference(name);
                }
                names.extend(page.chunks);
            }
            if !whole {
                // Rot: reading a chunk that is missing says so, and a PUT of the blob brings it back.
                self.owner(hash).mark_damaged(hash);
            }
        }
        if root.kind() == BlobKind::Folder {
            let mut children = ChildNames::default();
            for name in names {
                if children.push(&self.chunk(&name)?).ok()? {
                    break;
                }
            }
            for child in children.finish().ok()? {
                self.owner(&child).recover_root_reference(&child);
            }
        }
        Some(())
    }

    fn chunk(&mut self, name: &Hash) -> Option<Bytes> {
        let Source::Log(location) = self.owner(name).chunk(name) else { return None };
        self.payload(location).filter(|bytes| metanode_crypto::hash(bytes) == *name)
    }

    fn payload(&mut self, location: Location) -> Option<Bytes> {
        let place = (location.log, location.segment);
        if !self.files.contains_key(&place) {
            if self.files.len() >= FILES_MAX {
                self.files.clear();
            }
            let file = PlainFile::open(segment_path(&self.config.path, place.0, place.1)).ok()?;
            self.files.insert(place, file);
        }
        let bytes = read(&self.files[&place], location.offset.into(), location.length as usize).ok()?;
        (bytes.len() == location.length as usize).then(|| bytes.into())
    }
}

/// The folder of a log that this number of shards no longer has, once it is empty.
pub(crate) fn remove_log_if_empty(store: &Path, log: u16) {
    let folder = log_path(store, log);
    let empty =
        fs::names(&folder).is_ok_and(|names| names.iter().all(|name| name.to_str().and_then(parse_segment).is_none()));
    if empty && let Err(error) = fs::remove_folder(&folder) {
        warn!(path = %folder.display(), %error, "an empty log could not be removed");
    }
}
