//! Reading ranges of a blob as bao slices.

use std::{collections::VecDeque, rc::Rc};

use bytes::Bytes;
use metanode_blob::{
    extent::{ExtentEntry, ExtentPage, decode_root, upper_tree},
    tree::{Outboard, SliceWalk, Step},
};
use metanode_shard::{Task, spawn_local};
use metanode_types::{
    ByteRange, Hash, ShardId,
    limits::{CHUNK_BYTES, EXTENT_BYTES},
};

use crate::{
    Fetched, Store, StoreError, release,
    request::{Notice, Reply, Request},
    serve::Check,
    shard::{Inner, wrong},
};

/// Chunks that are read ahead of the one being sent: 2 MiB, enough to keep a disk busy and little enough for many readers.
const AHEAD_CHUNKS: usize = 8;

/// Memory of an extent in a blob's map: its entry, its part of the root's payload, its node in the upper tree.
const EXTENT_MAP_BYTES: u64 = 224;

/// Memory of a page: names of chunks and their trees.
const PAGE_BYTES: u64 = 288 << 10;

/// A blob that is open for reading; removal meanwhile takes effect on its content when this is dropped.
#[derive(Debug)]
pub struct BlobReader {
    pin: Pin,
    size_bytes: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// At most one chunk.
    Whole(Bytes),
    Extents(Vec<ExtentEntry>),
}

/// Ends a pin.
#[derive(Debug)]
struct Pin {
    inner: Rc<Inner>,
    owner: ShardId,
    hash: Hash,
}

impl Pin {
    /// What the root lists is not what it must be.
    fn damaged(&self) -> StoreError {
        self.inner.notice(self.owner, Notice::Damaged(self.hash));
        StoreError::Corrupt
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.inner.notice(self.owner, Notice::Unpin(self.hash));
    }
}

impl BlobReader {
    pub(crate) async fn open(store: Store, hash: Hash) -> Result<Self, StoreError> {
        let inner = store.0.clone();
        let owner = inner.owner(&hash);
        let (root, payload) = match inner.request(owner, Request::Pin(hash)).await? {
            Reply::Pin(result) => result?,
            other => return Err(wrong(&other)),
        };
        let pin = Pin { inner, owner, hash };
        let size_bytes = root.size_bytes;
        let content = if root.is_whole() {
            match store.get(hash).await? {
                Fetched::Whole(bytes) => Content::Whole(bytes),
                Fetched::Large { .. } => return Err(StoreError::Corrupt),
            }
        } else {
            let extents = decode_root(&payload, size_bytes);
            Content::Extents(extents.map_err(|_| pin.damaged())?)
        };
        Ok(Self { pin, size_bytes, content })
    }

    /// Bytes of the blob.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes of memory that the map of a large blob takes while it is read: of each extent a name, a hash and a node of the tree, and one page.
    pub fn map_bytes(&self) -> u64 {
        match &self.content {
            Content::Whole(_) => 0,
            Content::Extents(extents) => extents.len() as u64 * EXTENT_MAP_BYTES + PAGE_BYTES,
        }
    }

    /// The bao encoding of a range.
    pub fn slice(self, range: ByteRange) -> Result<Slice, StoreError> {
        let (start, end) = range.clamp(self.size_bytes).ok_or(StoreError::BadRange)?;
        let walk = SliceWalk::new(self.size_bytes, start, end);
        let source = match self.content {
            Content::Whole(bytes) => Source::Whole(Whole { outboard: Outboard::of(0, &bytes), bytes }),
            Content::Extents(extents) => {
                let chunk = CHUNK_BYTES as u64;
                let last = if start == end { start / chunk } else { end.div_ceil(chunk) };
                Source::Extents(Box::new(Extents {
                    upper: upper_tree(&extents, self.size_bytes),
                    extents,
                    page: None,
                    current: None,
                    ahead: VecDeque::new(),
                    next: start / chunk,
                    end: last,
                }))
            }
        };
        Ok(Slice { pin: self.pin, size_bytes: self.size_bytes, walk, source })
    }
}

/// A range being sent.
#[derive(Debug)]
pub struct Slice {
    pin: Pin,
    size_bytes: u64,
    walk: SliceWalk,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Whole(Whole),
    Extents(Box<Extents>),
}

/// A blob of one chunk, with its tree.
#[derive(Debug)]
struct Whole {
    outboard: Outboard,
    bytes: Bytes,
}

#[derive(Debug)]
struct Extents {
    extents: Vec<ExtentEntry>,
    upper: Outboard,
    page: Option<(usize, ExtentPage)>,
    current: Option<(u64, Bytes)>,
    ahead: VecDeque<(u64, Task<Result<Bytes, StoreError>>)>,
    /// Next chunk to ask for.
    next: u64,
    /// First chunk not needed.
    end: u64,
}

impl Slice {
    /// The next pieces of the encoding, up to the end of a chunk; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<Bytes>>, StoreError> {
        let mut pieces = Vec::new();
        let mut nodes = Vec::new();
        while let Some(step) = self.walk.peek() {
            match step {
                Step::Node { span, .. } => {
                    let pair = match &mut self.source {
                        Source::Whole(whole) => whole.outboard.pair(span),
                        Source::Extents(extents) if span.length > EXTENT_BYTES => extents.upper.pair(span),
                        Source::Extents(extents) => {
                            let index = (span.start / EXTENT_BYTES) as usize;
                            extents.page(&self.pin, index, self.size_bytes).await?.outboard.pair(span)
                        }
                    };
                    nodes.extend_from_slice(&pair.ok_or(StoreError::Corrupt)?.to_bytes());
                }
                Step::Group(span) => {
                    let chunk = span.start / CHUNK_BYTES as u64;
                    let bytes = match &mut self.source {
                        Source::Whole(whole) => whole.bytes.clone(),
                        Source::Extents(extents) => {
                            if !pieces.is_empty() && extents.current.as_ref().is_some_and(|(at, _)| *at != chunk) {
                                break; // what is ready can go while the next chunk is waited for
                            }
                            extents.chunk(&self.pin, chunk, self.size_bytes).await?
                        }
                    };
                    let start = (span.start - chunk * CHUNK_BYTES as u64) as usize;
                    let end = start + span.length as usize;
                    if end > bytes.len() {
                        return Err(StoreError::Corrupt);
                    }
                    if !nodes.is_empty() {
                        pieces.push(std::mem::take(&mut nodes).into());
                    }
                    pieces.push(bytes.slice(start..end));
                }
            }
            self.walk.next();
        }
        // A small part of a chunk would keep all of it in memory until the client has it.
        let wanted: usize = pieces.iter().map(Bytes::len).sum();
        if wanted < CHUNK_BYTES / 2 {
            pieces.iter_mut().for_each(|piece| *piece = Bytes::copy_from_slice(piece));
        }
        if !nodes.is_empty() {
            pieces.push(nodes.into());
        }
        Ok((!pieces.is_empty()).then_some(pieces))
    }
}

impl Extents {
    async fn page(&mut self, pin: &Pin, index: usize, size_bytes: u64) -> Result<&ExtentPage, StoreError> {
        if self.page.as_ref().is_none_or(|(at, _)| *at != index) {
            let entry = self.extents.get(index).ok_or(StoreError::Corrupt)?;
            let bytes = match release::chunk(&pin.inner, entry.page).await {
                // Perhaps the root has a wrong name for it.
                Err(StoreError::Corrupt) => return Err(pin.damaged()),
                read => read?,
            };
            let page = ExtentPage::decode(&bytes, index, size_bytes).map_err(|_| pin.damaged())?;
            self.page = Some((index, page));
        }
        Ok(&self.page.as_ref().expect("set above").1)
    }

    /// The chunk with this index, and starts to read those behind it.
    async fn chunk(&mut self, pin: &Pin, index: u64, size_bytes: u64) -> Result<Bytes, StoreError> {
        if let Some((at, bytes)) = &self.current
            && *at == index
        {
            return Ok(bytes.clone());
        }
        self.read_ahead(pin, index, size_bytes).await?;
        let (at, task) = self.ahead.pop_front().ok_or(StoreError::Corrupt)?;
        if at != index {
            return Err(StoreError::Corrupt);
        }
        let bytes = task.await?;
        self.current = Some((index, bytes.clone()));
        Ok(bytes)
    }

    /// Stays inside the extent of `index`: the page of the next one is fetched when it is reached.
    async fn read_ahead(&mut self, pin: &Pin, index: u64, size_bytes: u64) -> Result<(), StoreError> {
        let per_extent = EXTENT_BYTES / CHUNK_BYTES as u64;
        let extent = index / per_extent;
        let limit = self.end.min((extent + 1) * per_extent);
        while self.ahead.len() < AHEAD_CHUNKS && self.next < limit {
            let next = self.next;
            let page = self.page(pin, extent as usize, size_bytes).await?;
            let name = *page.chunks.get((next % per_extent) as usize).ok_or(StoreError::Corrupt)?;
            let inner = pin.inner.clone();
            let read = async move { release::checked_chunk(&inner, name, Check::Checksum).await };
            self.ahead.push_back((next, spawn_local(read)));
            self.next += 1;
        }
        Ok(())
    }
}
