//! Answers requests for keys of this shard, which come from here or from other shards.

use std::rc::Rc;

use bytes::Bytes;
use metanode_blob::partition::{Op, RootEntry, Source};
use metanode_log::{Location, SegmentIdentity, format::RecordHead};
use metanode_types::{DurabilityClass, Hash};
use tracing::warn;

use crate::{
    BlobLine, BlobStat, Fetched, StoreError, TagLine,
    request::{Notice, Reply, Request},
    shard::Inner,
};
use metanode_shard::local::Slot;

/// A payload may move between the look at the index and the read; twice in a row is beyond what compaction does.
const READ_ATTEMPTS: usize = 3;

/// How a copy on the disk is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Check {
    /// By its hash: for what is cached, or believed without another check.
    Hash,
    /// By the checksum of its record, and by its hash if that is wrong: for what a client checks by the blob's tree. It finds rot, and
    /// what belongs to another place, as the log's own recovery does, in a quarter of the time.
    Checksum,
}

impl Inner {
    /// Answers a request for keys of this shard.
    pub(crate) async fn serve(self: &Rc<Self>, request: Request) -> Reply {
        match request {
            Request::Op(op) => Reply::Op(self.submit(op).await),
            Request::Get(hash) => Reply::Get(self.serve_get(hash).await),
            Request::Chunk(name, check) => Reply::Chunk(self.chunk(&name, check).await),
            Request::Pin(hash) => Reply::Pin(self.serve_pin(hash).await),
            Request::Stat(hash) => Reply::Stat(self.serve_stat(&hash).await),
            Request::Tag(name) => Reply::Tag(self.partition.borrow().tag(&name).ok_or(StoreError::NotFound)),
            Request::Blobs(after, count) => {
                let roots = self.partition.borrow().roots_page(after.as_ref(), count);
                let line = |(hash, root): (Hash, RootEntry)| BlobLine {
                    hash,
                    size_bytes: root.size_bytes,
                    kind: root.kind(),
                    held: root.is_held(),
                    references: root.references,
                };
                Reply::Blobs(roots.into_iter().map(line).collect())
            }
            Request::Tags(after, count) => {
                let tags = self.partition.borrow().tags_page(after.as_ref(), count);
                Reply::Tags(tags.into_iter().map(|(name, hash)| TagLine { name, hash }).collect())
            }
            Request::Have(names) => {
                let partition = self.partition.borrow();
                Reply::Have(names.iter().map(|name| !matches!(partition.chunk(name), Source::Corrupt)).collect())
            }
            Request::Refer(hashes) => Reply::Refer(self.serve_refer(hashes).await),
            Request::Release(hash) => {
                self.notice_here(Notice::ReleaseRoots(vec![hash]));
                Reply::Released
            }
            Request::Live(segments) => {
                let partition = self.partition.borrow();
                Reply::Live(segments.into_iter().map(|(log, segment)| partition.live(log, segment)).collect())
            }
            Request::Move(records) => Reply::Move(self.serve_move(records).await),
        }
    }

    async fn serve_get(self: &Rc<Self>, hash: Hash) -> Result<Fetched, StoreError> {
        if let Some(bytes) = self.cache.get(&hash) {
            self.counters.cache_hits.increment();
            return Ok(Fetched::Whole(bytes));
        }
        self.counters.cache_misses.increment();
        if self.partition.borrow().blob(&hash).is_none() {
            self.settled(&hash).await;
        }
        for _ in 0..READ_ATTEMPTS {
            let (size_bytes, source) = self.partition.borrow().blob(&hash).ok_or(StoreError::NotFound)?;
            let location = match source {
                None => return Ok(Fetched::Large { size_bytes }),
                Some(Source::Bytes(bytes)) => return Ok(Fetched::Whole(bytes)),
                Some(Source::Corrupt) => return Err(StoreError::Corrupt),
                Some(Source::Log(location)) => location,
            };
            if let Some(bytes) = self.read_verified(&hash, location, Check::Hash).await? {
                if self.partition.borrow().root(&hash).is_some() {
                    self.cache.insert(hash, bytes.clone());
                }
                return Ok(Fetched::Whole(bytes));
            }
        }
        Err(StoreError::Corrupt)
    }

    /// A root that was acknowledged in memory, or is about to be on disk, is there once its record is.
    async fn settled(self: &Rc<Self>, hash: &Hash) {
        let waits = {
            let partition = self.partition.borrow();
            partition.root(hash).is_none() && partition.is_pending(hash)
        };
        if waits {
            // Whether the record got there is asked next.
            _ = self.submit(Op::Settle { hash: *hash }).await;
        }
    }

    /// A chunk of this shard, checked.
    pub(crate) async fn chunk(self: &Rc<Self>, name: &Hash, check: Check) -> Result<Bytes, StoreError> {
        for _ in 0..READ_ATTEMPTS {
            let source = self.partition.borrow().chunk(name);
            match source {
                Source::Bytes(bytes) => return Ok(bytes),
                Source::Corrupt => return Err(StoreError::Corrupt),
                Source::Log(location) => {
                    if let Some(bytes) = self.read_verified(name, location, check).await? {
                        return Ok(bytes);
                    }
                }
            }
        }
        Err(StoreError::Corrupt)
    }

    /// Reads what must have the hash `name`. `None`: it is not there, perhaps because it has moved; look again.
    async fn read_verified(&self, name: &Hash, location: Location, check: Check) -> Result<Option<Bytes>, StoreError> {
        self.counters.reads.increment();
        self.counters.read_bytes.add(location.length.into());
        let bytes = match self.files.read(location).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                if matches!(self.partition.borrow().chunk(name), Source::Log(now) if now == location) {
                    return Err(self.corrupt(name, location, "its segment is missing"));
                }
                return Ok(None); // compaction has moved it
            }
            Err(error) => return Err(StoreError::Storage(error.to_string())),
        };
        if check == Check::Checksum && self.has_checksum(name, location, &bytes) {
            return Ok(Some(bytes));
        }
        if self.hashes.hash(&bytes).await == *name {
            return Ok(Some(bytes));
        }
        if let Ok(bytes) = Box::pin(self.files.read_again(location)).await
            && metanode_crypto::hash(&bytes) == *name
        {
            return Ok(Some(bytes));
        }
        if matches!(self.partition.borrow().chunk(name), Source::Log(now) if now == location) {
            return Err(self.corrupt(name, location, "it does not have its hash"));
        }
        Ok(None)
    }

    /// Whether these bytes, read at `location`, have the checksum of this chunk's record.
    fn has_checksum(&self, name: &Hash, location: Location, bytes: &[u8]) -> bool {
        let identity = SegmentIdentity { store: self.shared.store, log: location.log, segment: location.segment };
        let checksum = self.partition.borrow().checksum(name, location);
        checksum == Some(identity.payload_checksum(location.offset.into(), bytes))
    }

    pub(crate) fn corrupt(&self, name: &Hash, location: Location, what: &str) -> StoreError {
        self.counters.corrupt_reads.increment();
        warn!(chunk = %name, ?location, "the copy of a chunk is corrupt: {what}; the next PUT replaces it");
        self.partition.borrow_mut().mark_corrupt(name, location);
        StoreError::Corrupt
    }

    async fn serve_pin(self: &Rc<Self>, hash: Hash) -> Result<(RootEntry, Bytes), StoreError> {
        self.settled(&hash).await;
        let root = self.partition.borrow_mut().pin(hash).ok_or(StoreError::NotFound)?;
        if root.is_whole() {
            return Ok((root, Bytes::new()));
        }
        match self.root_payload(&hash, root.location).await {
            Ok(payload) => Ok((root, payload)),
            Err(error) => {
                self.notice_here(Notice::Unpin(hash));
                Err(error)
            }
        }
    }

    /// The payload of a larger blob's root record.
    pub(crate) async fn root_payload(&self, hash: &Hash, mut location: Location) -> Result<Bytes, StoreError> {
        for _ in 0..READ_ATTEMPTS {
            match self.files.read(location).await {
                Ok(bytes) if bytes.len() == location.length as usize => return Ok(bytes),
                Ok(_) => return Err(StoreError::Corrupt),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    location = self.partition.borrow().root(hash).ok_or(StoreError::NotFound)?.location;
                }
                Err(error) => return Err(StoreError::Storage(error.to_string())),
            }
        }
        Err(StoreError::Corrupt)
    }

    async fn serve_stat(self: &Rc<Self>, hash: &Hash) -> Result<BlobStat, StoreError> {
        self.settled(hash).await;
        let partition = self.partition.borrow();
        let root = partition.root(hash).ok_or(StoreError::NotFound)?;
        Ok(BlobStat {
            size_bytes: root.size_bytes,
            kind: root.kind(),
            class: DurabilityClass::Durable, // its record is on disk, whatever its PUT asked for
            held: root.is_held(),
            references: root.references,
        })
    }

    async fn serve_refer(self: &Rc<Self>, hashes: Vec<Hash>) -> Result<(), Hash> {
        for (done, hash) in hashes.iter().enumerate() {
            if self.submit(Op::Refer { hash: *hash }).await.is_err() {
                self.notice_here(Notice::ReleaseRoots(hashes[..done].to_vec()));
                return Err(*hash);
            }
        }
        Ok(())
    }

    async fn serve_move(self: &Rc<Self>, records: Vec<(RecordHead, Bytes, bool)>) -> Result<(), StoreError> {
        let slots: Vec<_> = records
            .into_iter()
            .map(|(head, payload, droppable)| {
                let (token, slot) = (self.number(), Slot::new());
                self.ops.borrow_mut().insert(token, slot.clone());
                self.counters.moved_bytes.add(payload.len() as u64);
                self.partition.borrow_mut().submit(token, Op::Move { head, payload, droppable });
                slot
            })
            .collect();
        self.dispatch();
        let mut result = Ok(());
        for slot in slots {
            result = result.and(slot.wait().await.map(|_| ()).map_err(StoreError::from));
        }
        result
    }
}
