//! Reads a whole store that nobody has open, and says what is wrong with it. Changes nothing.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    path::{Path, PathBuf},
};

use metanode_blob::extent::{ExtentPage, decode_root};
use metanode_log::{
    BLOCK_BYTES, Location, RecordFlags, RecordKind, ScanStep, SegmentIdentity, SegmentScan, format::RecordHead,
};
use metanode_shard::fs::{self, PlainFile};
use metanode_types::{Hash, limits::CHUNK_BYTES};

use crate::{
    children::ChildNames,
    error::OpenError,
    folder::{log_path, parse_log, parse_segment, segment_path},
    open::Meta,
    recover::{is_closed, read},
};

/// Findings that are described; all are counted.
const FINDINGS_MAX: usize = 1000;

/// What a check has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Segment files.
    pub segments: u64,
    /// Bytes of them.
    pub segment_bytes: u64,
    /// Valid frames.
    pub frames: u64,
    /// Records in those.
    pub records: u64,
    /// Blobs that count.
    pub blobs: u64,
    /// Tags that count.
    pub tags: u64,
    /// Bytes behind the last frame of a segment: the next start cuts them off. Never acknowledged, and no damage.
    pub tail_bytes: u64,
    /// Damaged copies that newer ones have replaced: no damage, and gone with their segment.
    pub replaced: u64,
    /// Number of findings.
    pub damages: u64,
    /// The first of them, in words.
    pub findings: Vec<String>,
}

impl CheckReport {
    fn found(&mut self, what: String) {
        self.damages += 1;
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(what);
        }
    }
}

/// The newest record of a key, by kind of key.
#[derive(Default)]
struct Newest {
    chunks: BTreeMap<Hash, ((u64, u64), Location)>,
    roots: BTreeMap<Hash, ((u64, u64), RecordHead)>,
    tags: BTreeMap<Hash, ((u64, u64), RecordHead)>,
    /// Chunks whose newest copy is what it must be.
    sound: HashSet<Hash>,
    /// Payloads without their checksums: the key, the place, and the file.
    unsound: Vec<(Hash, Location, PathBuf)>,
}

impl Newest {
    /// Whether it is the record at this place that counts for the key.
    fn is_at(&self, key: &Hash, location: Location) -> bool {
        self.chunks.get(key).is_some_and(|(_, newest)| *newest == location)
            || [&self.roots, &self.tags]
                .iter()
                .any(|heads| heads.get(key).is_some_and(|(_, newest)| newest.location == location))
    }
}

/// Checks every checksum and hash, and that what roots, tags and folders refer to is there. The caller holds the lock on the data
/// folder. Memory: about 150 bytes a record that counts.
pub fn check(store: &Path) -> Result<CheckReport, OpenError> {
    let meta = Meta::read(store)?;
    let mut report = CheckReport::default();
    let mut newest = Newest::default();
    for name in fs::names(store).map_err(OpenError::io(store))? {
        let Some(log) = name.to_str().and_then(parse_log) else { continue };
        let folder = log_path(store, log);
        let names = fs::names(&folder).map_err(OpenError::io(&folder))?;
        let mut segments: Vec<u32> = names.iter().filter_map(|name| parse_segment(name.to_str()?)).collect();
        segments.sort_unstable_by(|one, other| other.cmp(one)); // the last first, as recovery does
        let mut followed_in = None;
        for segment in segments {
            let identity = SegmentIdentity { store: meta.store, log, segment };
            let path = segment_path(store, log, segment);
            let begins = check_segment(&path, identity, (meta.segment_bytes, followed_in), &mut newest, &mut report);
            followed_in = begins.map_err(OpenError::io(&path))?.or(followed_in);
        }
    }
    for (key, location, path) in &newest.unsound {
        match newest.is_at(key, *location) {
            true => {
                let (shown, offset) = (path.display(), location.offset);
                report.found(format!("{shown}: the payload at {offset} of {key} does not have its checksum"));
            }
            false => report.replaced += 1,
        }
    }
    let mut references = References { store, newest: &newest, report: &mut report, file: None };
    references.check();
    Ok(report)
}

/// Returns the opening of the first frame.
fn check_segment(
    path: &Path,
    identity: SegmentIdentity,
    (segment_bytes, followed_in): (u32, Option<u64>),
    newest: &mut Newest,
    report: &mut CheckReport,
) -> io::Result<Option<u64>> {
    let file = PlainFile::open(path)?;
    let bytes = u32::try_from(file.size()?).unwrap_or(u32::MAX);
    let shown = path.display();
    report.segments += 1;
    report.segment_bytes += u64::from(bytes);
    let header = read(&file, 0, BLOCK_BYTES)?;
    let is_blank = header.iter().all(|byte| *byte == 0);
    let begun_in =
        SegmentIdentity::decode_header(&header).filter(|(found, _)| *found == identity).map(|(_, boot)| boot);
    let mut scan = SegmentScan::new(identity, bytes).closed(is_closed(bytes, segment_bytes, begun_in, followed_in));
    let mut first = None;
    let mut frames = 0;
    loop {
        match scan.step() {
            ScanStep::Read { offset, length } => {
                scan.supply(offset, read(&file, offset.into(), length as usize)?.into());
            }
            ScanStep::Frame { header, records } => {
                frames += 1;
                first = first.or(Some(header.boot));
                let order = (header.boot, header.sequence);
                for head in records {
                    report.records += 1;
                    check_record(&file, identity, head, order, newest, report, path)?;
                }
            }
            ScanStep::Rot { offset, length } => {
                report.found(format!("{shown}: {length} bytes from {offset} on are no frame, and frames follow"));
            }
            ScanStep::End { tail } => {
                report.tail_bytes += u64::from(bytes.saturating_sub(tail));
                break;
            }
        }
    }
    report.frames += frames;
    let never_used = is_blank && frames == 0;
    if begun_in.is_none() && !never_used {
        report.found(format!("{shown}: the header is damaged, or another segment's"));
    }
    Ok(first)
}

fn check_record(
    file: &PlainFile,
    identity: SegmentIdentity,
    head: RecordHead,
    order: (u64, u64),
    newest: &mut Newest,
    report: &mut CheckReport,
    path: &Path,
) -> io::Result<()> {
    let Location { offset, length, .. } = head.location;
    let payload = if length == 0 { Vec::new() } else { read(file, offset.into(), length as usize)? };
    let whole = payload.len() == length as usize
        && (length == 0 || identity.payload_checksum(offset.into(), &payload) == head.checksum);
    if !whole {
        newest.unsound.push((head.key, head.location, path.to_owned()));
    }
    let key = head.key;
    if matches!(head.kind, RecordKind::Chunk | RecordKind::Whole)
        && newest.chunks.get(&key).is_none_or(|(known, _)| *known <= order)
    {
        newest.chunks.insert(key, (order, head.location));
        let sound = whole && metanode_crypto::hash(&payload) == key;
        if sound {
            newest.sound.insert(key);
        } else {
            newest.sound.remove(&key);
            if whole {
                report.found(format!("{}: the chunk at {offset} is not {key}", path.display()));
            }
        }
    }
    let known = match head.kind {
        RecordKind::Root | RecordKind::Whole | RecordKind::Unroot => &mut newest.roots,
        RecordKind::Tag | RecordKind::Untag => &mut newest.tags,
        RecordKind::Chunk => return Ok(()),
    };
    if known.get(&key).is_none_or(|(known, _)| *known <= order) {
        known.insert(key, (order, head));
    }
    Ok(())
}

/// Follows what refers to what.
struct References<'a> {
    store: &'a Path,
    newest: &'a Newest,
    report: &'a mut CheckReport,
    /// The segment read last.
    file: Option<((u16, u32), PlainFile)>,
}

impl References<'_> {
    fn check(&mut self) {
        let newest = self.newest;
        for (hash, (_, head)) in newest.roots.iter().filter(|(_, (_, head))| head.kind != RecordKind::Unroot) {
            self.report.blobs += 1;
            if let Err(what) = self.root(hash, head) {
                self.report.found(format!("blob {hash}: {what}"));
            }
        }
        for (key, (_, head)) in newest.tags.iter().filter(|(_, (_, head))| head.kind == RecordKind::Tag) {
            self.report.tags += 1;
            let payload = self.payload(head.location);
            let target = payload.as_ref().and_then(|payload| payload.split_first_chunk::<32>());
            match target {
                Some((target, name)) if self.has_root(&Hash(*target)) => _ = name,
                Some((target, name)) => {
                    let (name, target) = (String::from_utf8_lossy(name).into_owned(), Hash(*target));
                    self.report.found(format!("tag {name}: it points to {target}, which is not there"));
                }
                None => self.report.found(format!("the tag with key {key} can't be read")),
            }
        }
    }

    fn root(&mut self, hash: &Hash, head: &RecordHead) -> Result<(), String> {
        let mut names = Vec::new();
        if head.blob_bytes <= CHUNK_BYTES as u64 {
            names.extend((head.blob_bytes > 0).then_some(*hash));
        } else {
            let payload = self.payload(head.location).ok_or("its map can't be read")?;
            let extents = decode_root(&payload, head.blob_bytes).map_err(|_| "its map is malformed")?;
            for (index, extent) in extents.iter().enumerate() {
                let page = self.chunk(&extent.page).ok_or("a page of its map is missing or damaged")?;
                let page =
                    ExtentPage::decode(&page, index, head.blob_bytes).map_err(|_| "a page of its map is malformed")?;
                names.extend(page.chunks);
            }
        }
        let bad = names.iter().filter(|name| !self.newest.sound.contains(name)).count();
        if bad > 0 {
            return Err(format!("{bad} of its {} chunks are missing or damaged", names.len()));
        }
        if head.flags.has(RecordFlags::FOLDER) {
            let mut children = ChildNames::default();
            for name in &names {
                let bytes = self.chunk(name).ok_or("it can't be read")?;
                if children.push(&bytes).map_err(|error| error.to_string())? {
                    break;
                }
            }
            let children = children.finish().map_err(|error| error.to_string())?;
            let missing = children.iter().filter(|child| !self.has_root(child)).count();
            if missing > 0 {
                return Err(format!("{missing} of the {} blobs that the folder lists are not there", children.len()));
            }
        }
        Ok(())
    }

    fn has_root(&self, hash: &Hash) -> bool {
        self.newest.roots.get(hash).is_some_and(|(_, head)| head.kind != RecordKind::Unroot)
    }

    fn chunk(&mut self, name: &Hash) -> Option<Vec<u8>> {
        let (_, location) = self.newest.chunks.get(name).filter(|_| self.newest.sound.contains(name))?;
        self.payload(*location)
    }

    fn payload(&mut self, location: Location) -> Option<Vec<u8>> {
        let place = (location.log, location.segment);
        if self.file.as_ref().is_none_or(|(open, _)| *open != place) {
            self.file = Some((place, PlainFile::open(segment_path(self.store, place.0, place.1)).ok()?));
        }
        let (_, file) = self.file.as_ref().expect("opened above");
        read(file, location.offset.into(), location.length as usize)
            .ok()
            .filter(|b| b.len() == location.length as usize)
    }
}
