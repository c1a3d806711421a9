//! The state of one hash partition: what is stored, who refers to it, what is on its way to the log.
//!
//! A partition owns the chunks, roots and tags whose keys fall to its shard. It is a core: [`Partition::submit`] takes an
//! [`Op`] with a caller's token, [`Partition::poll`] says what the log's shell must do, and [`Partition::take_events`] returns what
//! became of the tokens.
//!
//! # Rules
//!
//! * **One change of a key at a time.** A key with a record on its way is *pending*; further operations on it wait and are then
//!   decided anew. So identical PUTs join, and the order of records of a key in the log is the order of its changes.
//! * **References are derived.** A chunk is kept by the roots that list it and by uploads in progress, a root by being held, by
//!   tags, folders and leases. Counts are not stored: recovery counts again.
//! * **A root commits after its content.** Whoever stages a root holds references to chunks that are committed.
//! * **Every dropped root leaves a tombstone,** which stays until no older segment could bring the root back.
//! * A durable operation is answered when its record is on disk; a `memory` PUT when it is staged, and is readable from then on.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Bound,
};

use bytes::Bytes;
use metanode_log::{
    Append, Committed, Effect, Failure, Location, RecordFlags, RecordKind, SegmentIdentity, Table, Writer,
    WriterLimits,
    format::{HEAD_BYTES, Record, RecordHead},
};
use metanode_types::{BlobKind, DurabilityClass, Hash, TagName, limits::CHUNK_BYTES};

/// Identifies a caller of [`Partition::submit`].
pub type Token = u64;

/// A change.
#[derive(Debug, Clone)]
pub enum Op {
    /// A blob of at most one chunk with its bytes, whose hash the caller has checked.
    PutWhole {
        /// Address.
        hash: Hash,
        /// Contents.
        bytes: Bytes,
        /// How it is to be kept.
        options: RootOptions,
    },
    /// A chunk of a larger blob, or a page of its map; the caller gets one reference to it.
    PutChunk {
        /// BLAKE3 of the bytes, checked by the caller.
        name: Hash,
        /// Contents.
        bytes: Bytes,
    },
    /// The root of a larger blob; the caller's references to its content pass to the root unless the answer says that it
    /// existed.
    PutRoot {
        /// Address.
        hash: Hash,
        /// Bytes of the blob.
        size_bytes: u64,
        /// List of extents.
        payload: Bytes,
        /// How it is to be kept.
        options: RootOptions,
    },
    /// Remove a root.
    Remove {
        /// Address.
        hash: Hash,
    },
    /// Take a reference to a root, for a folder.
    Refer {
        /// Address.
        hash: Hash,
    },
    /// Point a tag to a root of this or another partition, to which the caller holds a reference; it passes to the tag.
    TagSet {
        /// Name.
        name: TagName,
        /// Where it points.
        target: Hash,
    },
    /// Remove a tag; its reference passes to the caller.
    TagRemove {
        /// Name.
        name: TagName,
    },
    /// Copy a record out of a segment that is to be freed, if it is still what counts for its key.
    Move {
        /// As found there.
        head: RecordHead,
        /// Its payload.
        payload: Bytes,
        /// Whether a tombstone may be dropped: no older segment is left.
        droppable: bool,
    },
}

/// How a root is to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootOptions {
    /// When to answer.
    pub class: DurabilityClass,
    /// What it is.
    pub kind: BlobKind,
    /// Whether it stays by itself.
    pub hold: bool,
    /// Whether the caller takes a lease on it.
    pub lease: bool,
}

/// What became of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Of `PutWhole` and `PutRoot`.
    Stored {
        /// The root was there before: references to content stay with the caller.
        existed: bool,
        /// It was there and not as a folder: references to children pass to it now.
        became_folder: bool,
    },
    /// Of `PutChunk`, `Refer` and `Move`.
    Done,
    /// Of `Remove`; content is released through [`Event::Released`].
    Removed,
    /// Of `TagSet` and `TagRemove`: the reference that the tag held before, which is the caller's now.
    Untagged(Option<Hash>),
}

/// Why an operation was not done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpError {
    /// No such root or tag.
    NotFound,
    /// Tags, folders, or uploads refer to it.
    InUse {
        /// How many.
        references: u32,
    },
    /// The index has reached its cap.
    IndexFull,
    /// The log refused or failed.
    Log(Failure),
}

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// An operation ended.
    Ended(Token, Result<Outcome, OpError>),
    /// A root of more than one chunk, or a folder, is gone and nobody reads it: the shell releases its chunks, and a folder's
    /// children, whose names it reads first.
    Released(ReleasedRoot),
    /// Content of segments became dead; the shell may want to compact.
    SpaceDied,
}

/// A root whose content is to be released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReleasedRoot {
    /// Address.
    pub hash: Hash,
    /// Its entry.
    pub entry: RootEntry,
}

/// A chunk in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkEntry {
    /// Where its bytes are.
    pub location: Location,
    /// How many roots list it, and uploads hold it.
    pub references: u32,
    /// Its bytes on disk are not what they should be: the next PUT replaces them.
    pub corrupt: bool,
}

/// A root in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootEntry {
    /// Where its record is; of a larger blob, the list of its extents.
    pub location: Location,
    /// Bytes of the blob.
    pub size_bytes: u64,
    /// Tags and folders that refer to it.
    pub references: u32,
    /// Held, folder.
    pub flags: RecordFlags,
}

impl RootEntry {
    /// Whether its content is one chunk of the same name, or nothing.
    pub fn is_whole(&self) -> bool {
        self.size_bytes <= CHUNK_BYTES as u64
    }

    /// What it is.
    pub fn kind(&self) -> BlobKind {
        if self.flags.has(RecordFlags::FOLDER) { BlobKind::Folder } else { BlobKind::Blob }
    }

    /// Whether it stays by itself.
    pub fn is_held(&self) -> bool {
        self.flags.has(RecordFlags::HELD)
    }
}

/// A tag in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TagEntry {
    /// Where it points.
    pub target: Hash,
    location: Location,
}

/// Bytes that still count in a segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Live {
    /// Payloads and record heads.
    pub bytes: u64,
    /// Records.
    pub records: u32,
}

/// What a blob of at most one chunk, or a chunk, can be read from.
#[derive(Debug, Clone)]
pub enum Source {
    /// Memory: its record is on its way to the log.
    Bytes(Bytes),
    /// The log.
    Log(Location),
    /// Nowhere: the index has lost it, or its copy is corrupt.
    Corrupt,
}

/// Order of a record in time: number of the store's opening, number of the frame in its log.
pub type Order = (u64, u64);

#[derive(Debug)]
struct Tombstone {
    kind: RecordKind,
    location: Location,
    order: Order,
}

/// What a commit does to the index.
#[derive(Debug)]
enum Change {
    Whole(RootOptions),
    Chunk,
    Root { options: RootOptions },
    Unroot,
    Tag { name: TagName, target: Hash },
    Untag { name: TagName },
    Move { from: Location },
}

#[derive(Debug)]
struct Ticket {
    token: Option<Token>,
    change: Change,
}

/// A key with a record on its way.
#[derive(Debug, Default)]
struct Pending {
    /// Contents, for reads before the commit.
    whole: Option<(Bytes, RootOptions)>,
    chunk: Option<Bytes>,
    waiting: VecDeque<(Token, Op)>,
}

#[derive(Debug, Default)]
struct Pin {
    readers: u32,
    dead: Option<RootEntry>,
}

/// See the module.
#[derive(Debug)]
pub struct Partition {
    pub(crate) chunks: Table<ChunkEntry>,
    pub(crate) roots: Table<RootEntry>,
    pub(crate) tags: BTreeMap<TagName, TagEntry>,
    tombstones: HashMap<Hash, Tombstone>,
    leases: HashMap<Hash, u32>,
    pins: HashMap<Hash, Pin>,
    pending: HashMap<Hash, Pending>,
    live: HashMap<(u16, u32), Live>,
    blob_bytes: u64,
    entries_max: usize,
    boot: u64,
    writer: Writer<Ticket>,
    events: Vec<Event>,
}

/// The key of a tag's records.
pub fn tag_key(name: &TagName) -> Hash {
    Hash(*blake3::hash(name.as_str().as_bytes()).as_bytes())
}

impl Partition {
    /// An empty partition whose records go to log `identity.log`, beginning with a new segment `identity.segment`.
    pub fn new(identity: SegmentIdentity, boot: u64, limits: WriterLimits, entries_max: usize) -> Self {
        Self {
            chunks: Table::default(),
            roots: Table::default(),
            tags: BTreeMap::new(),
            tombstones: HashMap::new(),
            leases: HashMap::new(),
            pins: HashMap::new(),
            pending: HashMap::new(),
            live: HashMap::new(),
            blob_bytes: 0,
            entries_max,
            boot,
            writer: Writer::new(identity, boot, 0, limits),
            events: Vec::new(),
        }
    }

    // ---- what the shell does for the log

    /// The next thing the log needs; call until `None` after every input.
    pub fn poll(&mut self) -> Option<Effect> {
        self.writer.poll()
    }

    /// Answer to [`Effect::Prepare`].
    pub fn prepared(&mut self, segment: u32, result: Result<(), Failure>) {
        let failed = self.writer.prepared(segment, result);
        self.fail(failed);
    }

    /// Answer to [`Effect::Write`].
    pub fn written(&mut self, result: Result<(), Failure>) {
        let failed = self.writer.written(result);
        self.fail(failed);
    }

    /// Answer to [`Effect::Sync`].
    pub fn synced(&mut self, result: Result<(), Failure>) {
        let order = (self.boot, self.writer.next_sequence() - 1); // one frame at a time: it was the last
        match self.writer.synced(result) {
            Ok(committed) => committed.into_iter().for_each(|done| self.commit(done, order)),
            Err(failed) => self.fail(failed),
        }
    }

    /// Number of the next frame.
    pub fn next_sequence(&self) -> u64 {
        self.writer.next_sequence()
    }

    /// The writer, for its gauges.
    pub fn log_state(&self) -> LogState {
        LogState {
            idle: self.writer.is_idle(),
            full: self.writer.is_full(),
            read_only: self.writer.is_read_only(),
            staged_bytes: self.writer.staged_bytes(),
            active_segment: self.writer.active_segment(),
        }
    }

    /// Files were deleted: a full log tries again.
    pub fn space_freed(&mut self) {
        self.writer.space_freed();
    }

    /// What happened since the last call.
    pub fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    // ---- changes

    /// Does `op`, now or when its key is free; [`Event::Ended`] says how it went.
    pub fn submit(&mut self, token: Token, op: Op) {
        if let Some(pending) = self.pending.get_mut(&op.key()) {
            pending.waiting.push_back((token, op));
            return;
        }
        match self.decide(token, op) {
            Ok(Some(outcome)) => self.events.push(Event::Ended(token, Ok(outcome))),
            Ok(None) => {}
            Err(error) => self.events.push(Event::Ended(token, Err(error))),
        }
    }

    /// The outcome if it is known at once; `None` when a record was staged.
    fn decide(&mut self, token: Token, op: Op) -> Result<Option<Outcome>, OpError> {
        match op {
            Op::PutWhole { hash, bytes, options } => self.put_whole(token, hash, bytes, options),
            Op::PutChunk { name, bytes } => self.put_chunk(token, name, bytes),
            Op::PutRoot { hash, size_bytes, payload, options } => {
                self.put_root(token, hash, size_bytes, payload, options)
            }
            Op::Remove { hash } => self.remove(token, hash),
            Op::Refer { hash } => {
                self.roots.get_mut(&hash).ok_or(OpError::NotFound)?.references += 1;
                Ok(Some(Outcome::Done))
            }
            Op::TagSet { name, target } => self.tag_set(token, name, target),
            Op::TagRemove { name } => {
                self.tags.get(&name).ok_or(OpError::NotFound)?;
                let key = tag_key(&name);
                self.stage(Some(token), Record::bare(RecordKind::Untag, key), Change::Untag { name }, true)?;
                Ok(None)
            }
            Op::Move { head, payload, droppable } => self.relocate(token, &head, payload, droppable),
        }
    }

    fn put_whole(
        &mut self,
        token: Token,
        hash: Hash,
        bytes: Bytes,
        options: RootOptions,
    ) -> Result<Option<Outcome>, OpError> {
        let size_bytes = bytes.len() as u64;
        let chunk = self.chunks.get(&hash).filter(|chunk| !chunk.corrupt);
        let content_here = chunk.is_some() || bytes.is_empty();
        if let Some(root) = self.roots.get(&hash).filter(|_| content_here) {
            if let Some(outcome) = self.existing_root(hash, *root, options) {
                return Ok(Some(outcome));
            }
        } else {
            self.check_room()?;
        }
        let mut record = Record { blob_bytes: size_bytes, ..Record::bare(RecordKind::Root, hash) };
        record.flags = self.root_flags(&hash, options);
        let pending = Pending { whole: Some((bytes.clone(), options)), ..Pending::default() };
        let change = if content_here {
            Change::Root { options }
        } else {
            record.kind = RecordKind::Whole;
            record.payload = bytes;
            Change::Whole(options)
        };
        self.stage_root(token, record, change, options.class, pending)
    }

    fn put_chunk(&mut self, token: Token, name: Hash, bytes: Bytes) -> Result<Option<Outcome>, OpError> {
        if let Some(chunk) = self.chunks.get_mut(&name).filter(|chunk| !chunk.corrupt) {
            chunk.references += 1;
            return Ok(Some(Outcome::Done));
        }
        self.check_room()?;
        let record = Record { payload: bytes.clone(), ..Record::bare(RecordKind::Chunk, name) };
        self.stage(Some(token), record, Change::Chunk, false)?;
        self.pending.insert(name, Pending { chunk: Some(bytes), ..Pending::default() });
        Ok(None)
    }

    fn put_root(
        &mut self,
        token: Token,
        hash: Hash,
        size_bytes: u64,
        payload: Bytes,
        options: RootOptions,
    ) -> Result<Option<Outcome>, OpError> {
        if let Some(root) = self.roots.get(&hash) {
            if let Some(outcome) = self.existing_root(hash, *root, options) {
                return Ok(Some(outcome));
            }
        } else {
            self.check_room()?;
        }
        let mut record = Record { blob_bytes: size_bytes, payload, ..Record::bare(RecordKind::Root, hash) };
        record.flags = self.root_flags(&hash, options);
        self.stage_root(token, record, Change::Root { options }, options.class, Pending::default())
    }

    /// The answer when the root is there and already as it is wanted.
    fn existing_root(&mut self, hash: Hash, root: RootEntry, options: RootOptions) -> Option<Outcome> {
        let folder = options.kind == BlobKind::Folder && root.kind() == BlobKind::Blob;
        if (options.hold && !root.is_held()) || folder {
            return None;
        }
        if options.lease {
            *self.leases.entry(hash).or_default() += 1;
        }
        Some(Outcome::Stored { existed: true, became_folder: false })
    }

    fn root_flags(&self, hash: &Hash, options: RootOptions) -> RecordFlags {
        let before = self.roots.get(hash).map_or(0, |root| root.flags.0);
        let hold = if options.hold { RecordFlags::HELD } else { 0 };
        let folder = if options.kind == BlobKind::Folder { RecordFlags::FOLDER } else { 0 };
        RecordFlags(before | hold | folder)
    }

    fn stage_root(
        &mut self,
        token: Token,
        record: Record,
        mut change: Change,
        class: DurabilityClass,
        pending: Pending,
    ) -> Result<Option<Outcome>, OpError> {
        let key = record.key;
        let mut lease_now = false;
        if let Change::Whole(options) | Change::Root { options } = &mut change
            && class == DurabilityClass::Memory
        {
            lease_now = std::mem::take(&mut options.lease); // the caller may release it before the commit
        }
        // A chunk that is here already must outlive the wait for this record.
        if let (Change::Root { .. }, Some(chunk)) = (&change, self.chunks.get_mut(&key))
            && record.blob_bytes <= CHUNK_BYTES as u64
            && !self.roots.get(&key).is_some_and(RootEntry::is_whole)
        {
            chunk.references += 1;
        }
        let later = (class == DurabilityClass::Durable).then_some(token);
        if let Err(error) = self.stage(later, record, change, false) {
            self.undo_root(&key);
            return Err(error);
        }
        self.pending.insert(key, pending);
        if lease_now {
            *self.leases.entry(key).or_default() += 1;
        }
        match class {
            DurabilityClass::Durable => Ok(None),
            DurabilityClass::Memory => Ok(Some(Outcome::Stored { existed: false, became_folder: false })),
        }
    }

    /// A root record failed: the chunk's reference that was taken for it goes back.
    fn undo_root(&mut self, key: &Hash) {
        if !self.roots.get(key).is_some_and(RootEntry::is_whole) && self.chunks.get(key).is_some() {
            self.release_chunk(key);
        }
    }

    fn remove(&mut self, token: Token, hash: Hash) -> Result<Option<Outcome>, OpError> {
        let root = self.roots.get(&hash).ok_or(OpError::NotFound)?;
        let references = root.references + self.leases.get(&hash).copied().unwrap_or(0);
        if references > 0 {
            return Err(OpError::InUse { references });
        }
        self.stage(Some(token), Record::bare(RecordKind::Unroot, hash), Change::Unroot, true)?;
        Ok(None)
    }

    fn tag_set(&mut self, token: Token, name: TagName, target: Hash) -> Result<Option<Outcome>, OpError> {
        if self.tags.get(&name).is_some_and(|tag| tag.target == target) {
            return Ok(Some(Outcome::Untagged(Some(target)))); // as it was; the caller's reference is one too many
        }
        if !self.tags.contains_key(&name) {
            self.check_room()?;
        }
        let payload = [&target.0[..], name.as_str().as_bytes()].concat();
        let record = Record { payload: payload.into(), ..Record::bare(RecordKind::Tag, tag_key(&name)) };
        self.stage(Some(token), record, Change::Tag { name, target }, false)?;
        Ok(None)
    }

    fn relocate(
        &mut self,
        token: Token,
        head: &RecordHead,
        payload: Bytes,
        droppable: bool,
    ) -> Result<Option<Outcome>, OpError> {
        let key = head.key;
        let root = self.roots.get(&key).filter(|root| root.location == head.location).copied();
        let chunk = self.chunks.get(&key).is_some_and(|chunk| chunk.location == head.location);
        let kind = match head.kind {
            RecordKind::Whole | RecordKind::Root | RecordKind::Chunk => match (root, chunk) {
                (Some(_), true) => RecordKind::Whole,
                (Some(_), false) => RecordKind::Root,
                (None, true) => RecordKind::Chunk,
                (None, false) => return Ok(Some(Outcome::Done)),
            },
            RecordKind::Tag => {
                let name = std::str::from_utf8(payload.get(32..).unwrap_or_default()).unwrap_or_default();
                if self.tags.get(name).is_none_or(|tag| tag.location != head.location) {
                    return Ok(Some(Outcome::Done));
                }
                RecordKind::Tag
            }
            RecordKind::Unroot | RecordKind::Untag => {
                match self.tombstones.get(&key).map(|t| t.location == head.location) {
                    Some(true) if droppable => {
                        self.tombstones.remove(&key);
                        self.died(head.location);
                        return Ok(Some(Outcome::Done));
                    }
                    Some(true) => head.kind,
                    _ => return Ok(Some(Outcome::Done)),
                }
            }
        };
        let keep_payload = chunk || matches!(kind, RecordKind::Tag) || root.is_some_and(|root| !root.is_whole());
        let record = Record {
            kind,
            flags: root.map_or(RecordFlags(0), |root| root.flags),
            key,
            blob_bytes: root.map_or(0, |root| root.size_bytes),
            payload: if keep_payload { payload } else { Bytes::new() },
        };
        self.stage(Some(token), record, Change::Move { from: head.location }, true)?;
        Ok(None)
    }

    fn check_room(&self) -> Result<(), OpError> {
        let entries = self.chunks.len() + self.roots.len() + self.tags.len();
        if entries >= self.entries_max { Err(OpError::IndexFull) } else { Ok(()) }
    }

    fn stage(&mut self, token: Option<Token>, record: Record, change: Change, essential: bool) -> Result<(), OpError> {
        let key = record.key;
        let append = Append { record, ticket: Ticket { token, change }, essential };
        self.writer.append(append).map_err(|(failure, _)| OpError::Log(failure))?;
        self.pending.entry(key).or_default();
        Ok(())
    }

    // ---- references, leases, pins

    /// Drops one reference to a chunk; at the last its bytes are dead.
    pub fn release_chunk(&mut self, name: &Hash) {
        let Some(chunk) = self.chunks.get_mut(name) else { return };
        chunk.references -= 1;
        if chunk.references == 0 {
            let location = chunk.location;
            self.chunks.remove(name);
            self.died(location);
        }
    }

    /// Drops one reference of a tag or folder to a root; nobody's root goes.
    pub fn release_root(&mut self, hash: &Hash) {
        if let Some(root) = self.roots.get_mut(hash) {
            root.references -= 1;
            self.drop_if_unused(hash);
        }
    }

    /// Drops one lease.
    pub fn release_lease(&mut self, hash: &Hash) {
        if let Some(count) = self.leases.get_mut(hash) {
            *count -= 1;
            if *count == 0 {
                self.leases.remove(hash);
                self.drop_if_unused(hash);
            }
        }
    }

    fn drop_if_unused(&mut self, hash: &Hash) {
        let unused = self.roots.get(hash).is_some_and(|root| !root.is_held() && root.references == 0);
        if unused && !self.leases.contains_key(hash) && !self.pending.contains_key(hash) {
            // If the log takes nothing more the root stays until the next start, which drops it.
            let _ = self.stage(None, Record::bare(RecordKind::Unroot, *hash), Change::Unroot, true);
        }
    }

    /// Keeps the content of a root while it is read.
    pub fn pin(&mut self, hash: Hash) -> Option<RootEntry> {
        let root = *self.roots.get(&hash)?;
        self.pins.entry(hash).or_default().readers += 1;
        Some(root)
    }

    /// Ends a [`pin`](Self::pin); content of a root that was removed meanwhile is released at the last.
    pub fn unpin(&mut self, hash: Hash) {
        let Some(pin) = self.pins.get_mut(&hash) else { return };
        pin.readers -= 1;
        if pin.readers == 0 {
            let dead = pin.dead;
            self.pins.remove(&hash);
            if let Some(entry) = dead {
                self.release_content(hash, entry);
            }
        }
    }

    fn release_content(&mut self, hash: Hash, entry: RootEntry) {
        if entry.is_whole() && entry.kind() == BlobKind::Blob {
            self.release_chunk(&hash);
        } else {
            self.events.push(Event::Released(ReleasedRoot { hash, entry }));
        }
    }

    // ---- reads

    /// A root.
    pub fn root(&self, hash: &Hash) -> Option<&RootEntry> {
        self.roots.get(hash)
    }

    /// Leases of a root.
    pub fn leases(&self, hash: &Hash) -> u32 {
        self.leases.get(hash).copied().unwrap_or(0)
    }

    /// Size of a blob and, of one of at most one chunk, where its bytes are.
    pub fn blob(&self, hash: &Hash) -> Option<(u64, Option<Source>)> {
        if let Some(Pending { whole: Some((bytes, options)), .. }) = self.pending.get(hash)
            && (options.class == DurabilityClass::Memory || self.roots.get(hash).is_some())
        {
            return Some((bytes.len() as u64, Some(Source::Bytes(bytes.clone()))));
        }
        let root = self.roots.get(hash)?;
        let source = match (root.is_whole(), root.size_bytes) {
            (true, 0) => Some(Source::Bytes(Bytes::new())),
            (true, _) => Some(self.chunk(hash)),
            (false, _) => None,
        };
        Some((root.size_bytes, source))
    }

    /// Where the bytes of a chunk are.
    pub fn chunk(&self, name: &Hash) -> Source {
        match self.chunks.get(name) {
            Some(chunk) if !chunk.corrupt => Source::Log(chunk.location),
            Some(_) | None => match self.pending.get(name) {
                Some(Pending { chunk: Some(bytes), .. } | Pending { whole: Some((bytes, _)), .. }) => {
                    Source::Bytes(bytes.clone())
                }
                _ => Source::Corrupt,
            },
        }
    }

    /// The bytes at `location` are not this chunk's; unless it has moved, the next PUT replaces them.
    pub fn mark_corrupt(&mut self, name: &Hash, location: Location) {
        if let Some(chunk) = self.chunks.get_mut(name).filter(|chunk| chunk.location == location) {
            chunk.corrupt = true;
        }
    }

    /// Where a tag points.
    pub fn tag(&self, name: &TagName) -> Option<Hash> {
        self.tags.get(name).map(|tag| tag.target)
    }

    /// Roots behind `after`, in order.
    pub fn roots_page(&self, after: Option<&Hash>, count: usize) -> Vec<(Hash, RootEntry)> {
        self.roots.page(after, count).into_iter().map(|(hash, root)| (hash, *root)).collect()
    }

    /// Tags behind `after`, in order.
    pub fn tags_page(&self, after: Option<&TagName>, count: usize) -> Vec<(TagName, Hash)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.tags
            .range::<TagName, _>((from, Bound::Unbounded))
            .take(count)
            .map(|(name, tag)| (name.clone(), tag.target))
            .collect()
    }

    /// Number of blobs, and bytes of their contents.
    pub fn blobs(&self) -> (u64, u64) {
        (self.roots.len() as u64, self.blob_bytes)
    }

    /// What of a segment still counts here.
    pub fn live(&self, log: u16, segment: u32) -> Live {
        self.live.get(&(log, segment)).copied().unwrap_or_default()
    }

    /// Whether a record in a segment is what counts for its key.
    pub fn counts(&self, head: &RecordHead) -> bool {
        let (key, here) = (&head.key, head.location);
        match head.kind {
            RecordKind::Chunk | RecordKind::Whole | RecordKind::Root => {
                self.chunks.get(key).is_some_and(|chunk| chunk.location == here)
                    || self.roots.get(key).is_some_and(|root| root.location == here)
            }
            RecordKind::Tag => true, // known by name only; the move decides
            RecordKind::Unroot | RecordKind::Untag => self.tombstones.get(key).is_some_and(|t| t.location == here),
        }
    }

    // ---- commits and failures

    fn commit(&mut self, done: Committed<Ticket>, order: Order) {
        let Committed { record, ticket: Ticket { token, change }, location } = done;
        let key = record.key;
        let outcome = self.apply(&record, change, location, order);
        if let Some(token) = token {
            self.events.push(Event::Ended(token, Ok(outcome)));
        }
        self.settle(key);
        self.drop_if_unused(&key);
    }

    fn apply(&mut self, record: &Record, change: Change, location: Location, order: Order) -> Outcome {
        let key = record.key;
        match change {
            Change::Chunk => {
                self.set_chunk(key, location, 1);
                Outcome::Done
            }
            Change::Whole(options) => {
                let new = self.roots.get(&key).is_none();
                self.set_chunk(key, location, u32::from(new));
                self.set_root(record, location, options)
            }
            Change::Root { options } => self.set_root(record, location, options),
            Change::Unroot => {
                if let Some(entry) = self.roots.remove(&key) {
                    self.blob_bytes -= entry.size_bytes;
                    self.died_record(entry.location, if entry.is_whole() { 0 } else { entry.location.length });
                    match self.pins.get_mut(&key) {
                        Some(pin) => pin.dead = Some(entry),
                        None => self.release_content(key, entry),
                    }
                }
                self.set_tombstone(record.kind, key, location, order);
                Outcome::Removed
            }
            Change::Tag { name, target } => {
                self.drop_tombstone(&key);
                self.lives(location);
                let before = self.tags.insert(name, TagEntry { target, location });
                Outcome::Untagged(before.map(|tag| {
                    self.died(tag.location);
                    tag.target
                }))
            }
            Change::Untag { name } => {
                let before = self.tags.remove(&name).map(|tag| {
                    self.died(tag.location);
                    tag.target
                });
                self.set_tombstone(record.kind, key, location, order);
                Outcome::Untagged(before)
            }
            Change::Move { from } => {
                self.moved(record, from, location, order);
                Outcome::Done
            }
        }
    }

    /// Sets where a chunk is; `taken` references are added.
    fn set_chunk(&mut self, name: Hash, location: Location, taken: u32) {
        let references = self.chunks.get(&name).map_or(0, |chunk| chunk.references) + taken;
        self.lives(location);
        if let Some(before) = self.chunks.insert(name, ChunkEntry { location, references, corrupt: false }) {
            self.died(before.location);
        }
    }

    fn set_root(&mut self, record: &Record, location: Location, options: RootOptions) -> Outcome {
        let key = record.key;
        let whole = record.blob_bytes <= CHUNK_BYTES as u64;
        self.drop_tombstone(&key);
        self.lives_record(location, if whole { 0 } else { location.length });
        let before = self.roots.get(&key).copied();
        let references = before.map_or(0, |root| root.references);
        let entry = RootEntry { location, size_bytes: record.blob_bytes, references, flags: record.flags };
        self.roots.insert(key, entry);
        match before {
            Some(before) => self.died_record(before.location, if whole { 0 } else { before.location.length }),
            None => self.blob_bytes += record.blob_bytes,
        }
        if options.lease {
            *self.leases.entry(key).or_default() += 1;
        }
        let folder = options.kind == BlobKind::Folder && before.is_some_and(|root| root.kind() == BlobKind::Blob);
        Outcome::Stored { existed: before.is_some(), became_folder: folder }
    }

    fn moved(&mut self, record: &Record, from: Location, to: Location, order: Order) {
        let key = record.key;
        if let Some(chunk) = self.chunks.get_mut(&key).filter(|chunk| chunk.location == from)
            && matches!(record.kind, RecordKind::Whole | RecordKind::Chunk)
        {
            chunk.location = to;
            self.lives(to);
            self.died(from);
        }
        if let Some(root) = self.roots.get_mut(&key).filter(|root| root.location == from)
            && matches!(record.kind, RecordKind::Whole | RecordKind::Root)
        {
            root.location = to;
            let payload = if root.is_whole() { 0 } else { to.length };
            self.lives_record(to, payload);
            self.died_record(from, payload);
        }
        if record.kind == RecordKind::Tag
            && let Some(name) = record.payload.get(32..).and_then(|name| std::str::from_utf8(name).ok())
            && let Some(tag) = self.tags.get_mut(name).filter(|tag| tag.location == from)
        {
            tag.location = to;
            self.lives(to);
            self.died(from);
        }
        if matches!(record.kind, RecordKind::Unroot | RecordKind::Untag) {
            self.set_tombstone(record.kind, key, to, order);
        }
    }

    fn set_tombstone(&mut self, kind: RecordKind, key: Hash, location: Location, order: Order) {
        self.drop_tombstone(&key);
        self.lives(location);
        self.tombstones.insert(key, Tombstone { kind, location, order });
    }

    fn drop_tombstone(&mut self, key: &Hash) {
        if let Some(before) = self.tombstones.remove(key) {
            self.died(before.location);
        }
    }

    /// The order of the tombstone that is live at `location`.
    pub fn tombstone_order(&self, key: &Hash, location: Location) -> Option<Order> {
        self.tombstones.get(key).filter(|t| t.location == location).map(|t| t.order)
    }

    fn fail(&mut self, failed: Vec<(Failure, Append<Ticket>)>) {
        for (failure, append) in failed {
            let key = append.record.key;
            if matches!(append.ticket.change, Change::Root { .. }) && append.record.blob_bytes <= CHUNK_BYTES as u64 {
                self.undo_root(&key);
            }
            if let Some(token) = append.ticket.token {
                self.events.push(Event::Ended(token, Err(OpError::Log(failure))));
            }
            self.settle(key);
        }
    }

    /// The key is free: decides what waited for it.
    fn settle(&mut self, key: Hash) {
        let Some(Pending { mut waiting, .. }) = self.pending.remove(&key) else { return };
        while let Some((token, op)) = waiting.pop_front() {
            self.submit(token, op);
            if let Some(pending) = self.pending.get_mut(&key) {
                waiting.append(&mut pending.waiting);
                pending.waiting = waiting;
                return;
            }
        }
    }

    // ---- space

    fn lives(&mut self, location: Location) {
        self.lives_record(location, location.length);
    }

    fn lives_record(&mut self, location: Location, payload: u32) {
        let live = self.live.entry((location.log, location.segment)).or_default();
        live.bytes += u64::from(payload) + HEAD_BYTES as u64;
        live.records += 1;
    }

    fn died(&mut self, location: Location) {
        self.died_record(location, location.length);
    }

    fn died_record(&mut self, location: Location, payload: u32) {
        let place = (location.log, location.segment);
        if let Some(live) = self.live.get_mut(&place) {
            live.bytes = live.bytes.saturating_sub(u64::from(payload) + HEAD_BYTES as u64);
            live.records = live.records.saturating_sub(1);
            if live.records == 0 {
                self.live.remove(&place);
            }
        }
        if !matches!(self.events.last(), Some(Event::SpaceDied)) {
            self.events.push(Event::SpaceDied);
        }
    }
}

/// State of a partition's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogState {
    /// Nothing staged or in flight.
    pub idle: bool,
    /// The disk was full when a segment was last needed.
    pub full: bool,
    /// It takes nothing more.
    pub read_only: bool,
    /// Bytes staged.
    pub staged_bytes: usize,
    /// Segment that frames go to.
    pub active_segment: Option<u32>,
}

impl Op {
    fn key(&self) -> Hash {
        match self {
            Self::PutWhole { hash, .. } | Self::PutRoot { hash, .. } | Self::Remove { hash } | Self::Refer { hash } => {
                *hash
            }
            Self::PutChunk { name, .. } => *name,
            Self::TagSet { name, .. } | Self::TagRemove { name } => tag_key(name),
            Self::Move { head, .. } => head.key,
        }
    }
}

mod checkpoint;
mod recover;
pub use checkpoint::{Checkpoint, Coverage, MalformedCheckpoint};
pub use recover::Recovery;

#[cfg(test)]
mod tests;
