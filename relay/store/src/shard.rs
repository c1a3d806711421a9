//! A shard's store: what its users may ask, and what its parts share.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use metanode_blob::partition::{Event, Op, OpError, Outcome, Partition, RootOptions, Token, tag_key};
use metanode_crypto::HashBatcher;
use metanode_shard::{
    local::{Notify, Slot},
    sleep, spawn_local,
};
use metanode_types::{BlobKind, Hash, ShardCount, ShardId, TagName};
use rustc_hash::FxHashMap;
use tracing::{error, warn};

use crate::{
    BlobLine, BlobStat, Fetched, Leases, OpenError, Page, PutBulk, PutOptions, StoreCounters, StoreError, StorePort,
    StoreShared, Stored, TagLine, Usage, WHOLE_BYTES_MAX,
    cache::Cache,
    checkpoint,
    commit::{self, LogFiles},
    compact,
    files::Files,
    maintain,
    open::Shared,
    read::BlobReader,
    release,
    request::{Reply, Request, by_owner},
    route,
};

/// One per shard. Cheap to clone; not `Send`.
#[derive(Debug, Clone)]
pub struct Store(pub(crate) Rc<Inner>);

pub(crate) struct Inner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) shard: ShardId,
    pub(crate) shards: ShardCount,
    pub(crate) partition: RefCell<Partition>,
    pub(crate) log: LogFiles,
    pub(crate) files: Files,
    pub(crate) cache: Cache,
    pub(crate) hashes: HashBatcher,
    pub(crate) counters: Arc<StoreCounters>,
    /// The log has something to do.
    pub(crate) work: Notify,
    /// The log has nothing to do.
    pub(crate) idle: Notify,
    /// There may be a segment to free.
    pub(crate) compact: Notify,
    /// Someone asked to free what can be freed; the number of the request.
    pub(crate) compact_hard: Cell<Option<u64>>,
    pub(crate) closing: Cell<bool>,
    /// Tasks that use the disk by themselves; the store is closed when they have ended.
    background: Cell<u32>,
    /// A checkpoint is being written.
    pub(crate) checkpointing: Cell<bool>,
    pub(crate) port: StorePort,
    next: Cell<u64>,
    pub(crate) ops: RefCell<FxHashMap<Token, Slot<Result<Outcome, OpError>>>>,
    pub(crate) replies: RefCell<FxHashMap<u64, Slot<Reply>>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Store({})", self.shard)
    }
}

impl Store {
    /// Starts the store of a shard; every shard of the process must do so. Each partition can be taken once. A shard behind those of the
    /// store is a guest: it looks after nothing, and asks the others for everything.
    pub async fn open(shared: StoreShared, shard: ShardId, port: StorePort) -> Result<Self, OpenError> {
        let shared = shared.0;
        let is_guest = shard.0 >= shared.config.shards.get();
        let partition = match is_guest {
            true => shared.empty_partition(shard),
            false => shared
                .take_partition(shard)
                .ok_or(OpenError::Damaged { path: shared.config.path.clone(), what: "this partition is in use" })?,
        };
        let log = LogFiles::new(&shared, shard.0).map_err(OpenError::io(&shared.config.path))?;
        let shards = shared.config.shards;
        let inner = Rc::new(Inner {
            partition: RefCell::new(partition),
            log,
            files: Files::new(shared.config.path.clone()),
            cache: Cache::new(shared.config.cache_bytes_max / u64::from(shards.get())),
            hashes: HashBatcher::default(),
            counters: shared.counters.get(shard.index()).cloned().unwrap_or_default(),
            work: Notify::default(),
            idle: Notify::default(),
            compact: Notify::default(),
            compact_hard: Cell::new(None),
            closing: Cell::new(false),
            background: Cell::new(0),
            checkpointing: Cell::new(false),
            port,
            next: Cell::new(0),
            ops: RefCell::default(),
            replies: RefCell::default(),
            shared,
            shard,
            shards,
        });
        spawn_local(route::receive(inner.clone())).detach();
        if is_guest {
            return Ok(Self(inner));
        }
        spawn_local(commit::run(inner.clone())).detach();
        spawn_local(compact::run(inner.clone())).detach();
        spawn_local(checkpoint::run(inner.clone())).detach();
        spawn_local(maintain::run(inner.clone())).detach();
        spawn_local(age_orphans(inner.clone())).detach();
        inner.dispatch(); // what recovery staged
        inner.compact.notify();
        Ok(Self(inner))
    }

    /// This shard.
    pub fn shard(&self) -> ShardId {
        self.0.shard
    }

    /// All shards that look after something.
    pub fn shards(&self) -> ShardCount {
        self.0.shards
    }

    /// Without a wait: a blob that is in this shard's memory.
    pub fn cached(&self, hash: &Hash) -> Option<Bytes> {
        let found = self.0.cache.get(hash);
        if found.is_some() {
            self.0.counters.cache_hits.increment();
        }
        found
    }

    /// Without a wait: the size of a blob that this shard looks after, as far as it is known now.
    pub fn size_here(&self, hash: &Hash) -> Option<u64> {
        self.0.partition.borrow().root(hash).map(|root| root.size_bytes)
    }

    /// A blob of at most [`WHOLE_BYTES_MAX`] bytes, verified; of a larger one the size.
    pub async fn get(&self, hash: Hash) -> Result<Fetched, StoreError> {
        match self.0.request(self.0.owner(&hash), Request::Get(hash)).await? {
            Reply::Get(result) => result,
            other => Err(wrong(&other)),
        }
    }

    /// Stores a blob of at most [`WHOLE_BYTES_MAX`] bytes, which must have this hash.
    pub async fn put(&self, hash: Hash, bytes: Bytes, options: PutOptions) -> Result<Stored, StoreError> {
        if bytes.len() > WHOLE_BYTES_MAX {
            return Err(StoreError::TooLarge);
        }
        if self.0.hashes.hash(&bytes).await != hash {
            return Err(StoreError::HashMismatch);
        }
        self.put_verified(hash, bytes, options).await
    }

    /// As [`Store::put`], for a caller that has computed the hash of these bytes itself: it is not looked at again.
    pub async fn put_verified(&self, hash: Hash, bytes: Bytes, options: PutOptions) -> Result<Stored, StoreError> {
        let size_bytes = bytes.len() as u64;
        let children = match options.kind {
            BlobKind::Folder => crate::children::children(&bytes)?,
            BlobKind::Blob => Vec::new(),
        };
        self.0.refer(&children).await?;
        let op = Op::PutWhole { hash, bytes, options: options.for_root() };
        let result = self.0.put_op(hash, op, &options).await;
        self.0.settle_children(&options, children, &result);
        result.map(|(existed, _)| Stored { hash, size_bytes, existed })
    }

    /// Begins to store a blob of any size.
    pub fn put_bulk(&self, size_bytes: Option<u64>, options: PutOptions) -> PutBulk {
        PutBulk::new(self.clone(), size_bytes, options)
    }

    /// A reader for ranges; the blob's content stays while it lives.
    pub async fn read(&self, hash: Hash) -> Result<BlobReader, StoreError> {
        BlobReader::open(self.clone(), hash).await
    }

    /// A chunk of a larger blob, verified by its hash, whatever blob it belongs to.
    pub async fn chunk(&self, name: Hash) -> Result<Bytes, StoreError> {
        release::chunk(&self.0, name).await
    }

    /// Which of these chunks are here, in their order: for an upload that goes on where another one stopped. The answer may be out of
    /// date when it comes.
    pub async fn have_chunks(&self, names: &[Hash]) -> Result<Vec<bool>, StoreError> {
        let mut have = vec![false; names.len()];
        for shard in self.0.shards.iter() {
            let mine: Vec<usize> = (0..names.len()).filter(|&index| self.0.owner(&names[index]) == shard).collect();
            if mine.is_empty() {
                continue;
            }
            match self.0.request(shard, Request::Have(mine.iter().map(|&index| names[index]).collect())).await? {
                Reply::Have(here) => mine.into_iter().zip(here).for_each(|(index, here)| have[index] = here),
                other => return Err(wrong(&other)),
            }
        }
        Ok(have)
    }

    /// What is known of a blob.
    pub async fn stat(&self, hash: Hash) -> Result<BlobStat, StoreError> {
        match self.0.request(self.0.owner(&hash), Request::Stat(hash)).await? {
            Reply::Stat(result) => result,
            other => Err(wrong(&other)),
        }
    }

    /// Removes a blob that the node itself needs no more, durably.
    pub async fn remove_kept(&self, hash: Hash) -> Result<(), StoreError> {
        self.0.op(self.0.owner(&hash), Op::RemoveKept { hash }).await.map(|_| ())
    }

    /// Removes a blob, durably.
    pub async fn remove(&self, hash: Hash) -> Result<(), StoreError> {
        self.0.op(self.0.owner(&hash), Op::Remove { hash }).await.map(|_| ())
    }

    /// Points a tag to a blob, durably.
    pub async fn tag_set(&self, name: TagName, hash: Hash) -> Result<(), StoreError> {
        self.0.op(self.0.owner(&hash), Op::Refer { hash }).await?;
        let owner = self.0.owner(&tag_key(&name));
        match self.0.op(owner, Op::TagSet { name, target: hash }).await {
            Ok(Outcome::Untagged(Some(before))) => self.0.untagged(before).await,
            Ok(_) => Ok(()),
            Err(error) => {
                self.0.release_roots(vec![hash]);
                Err(error)
            }
        }
    }

    /// Removes a tag, durably.
    pub async fn tag_remove(&self, name: TagName) -> Result<(), StoreError> {
        let owner = self.0.owner(&tag_key(&name));
        if let Outcome::Untagged(Some(before)) = self.0.op(owner, Op::TagRemove { name }).await? {
            self.0.untagged(before).await?;
        }
        Ok(())
    }

    /// Where a tag points.
    pub async fn tag_get(&self, name: TagName) -> Result<Hash, StoreError> {
        match self.0.request(self.0.owner(&tag_key(&name)), Request::Tag(name)).await? {
            Reply::Tag(result) => result,
            other => Err(wrong(&other)),
        }
    }

    /// Blobs behind `after`, in the order of their addresses.
    pub async fn list_blobs(&self, after: Option<Hash>, count: usize) -> Result<Page<BlobLine>, StoreError> {
        let mut entries = Vec::new();
        for shard in self.0.shards.iter() {
            match self.0.request(shard, Request::Blobs(after, count + 1)).await? {
                Reply::Blobs(lines) => entries.extend(lines),
                other => return Err(wrong(&other)),
            }
        }
        entries.sort_unstable_by_key(|line: &BlobLine| line.hash);
        Ok(page(entries, count))
    }

    /// Tags behind `after`, in the order of their names.
    pub async fn list_tags(&self, after: Option<TagName>, count: usize) -> Result<Page<TagLine>, StoreError> {
        let mut entries = Vec::new();
        for shard in self.0.shards.iter() {
            match self.0.request(shard, Request::Tags(after.clone(), count + 1)).await? {
                Reply::Tags(lines) => entries.extend(lines),
                other => return Err(wrong(&other)),
            }
        }
        entries.sort_unstable_by(|a: &TagLine, b| a.name.cmp(&b.name));
        Ok(page(entries, count))
    }

    /// A set of leases for a connection.
    pub fn leases(&self) -> Leases {
        Leases::new(Rc::downgrade(&self.0))
    }

    /// What this shard holds.
    pub fn usage(&self) -> Usage {
        let (blobs, blob_bytes) = self.0.partition.borrow().blobs();
        let (mut segments, mut segment_bytes) = (0, 0);
        for (&(log, _), info) in self.0.shared.segments().iter() {
            if log % self.0.shards.get() == self.0.shard.0 {
                segments += 1;
                segment_bytes += info.bytes;
            }
        }
        let orphan_bytes = self.0.partition.borrow().orphan_bytes();
        let cache_bytes = self.0.cache.bytes();
        let usage = Usage { blobs, blob_bytes, cache_bytes, segments, segment_bytes, orphan_bytes };
        let counters = &self.0.counters;
        counters.blobs.set(blobs);
        counters.blob_bytes.set(blob_bytes);
        counters.cache_bytes.set(usage.cache_bytes);
        counters.segments.set(segments);
        counters.segment_bytes.set(segment_bytes);
        counters.orphan_bytes.set(orphan_bytes);
        usage
    }

    /// Commits what is staged; writes are refused from then on.
    pub async fn shutdown(&self) -> Result<(), StoreError> {
        self.0.closing.set(true);
        if self.0.shard.0 >= self.0.shards.get() {
            return Ok(()); // a guest has nothing to close
        }
        // The log wakes for every change by itself: waking it here, each time it says that it is idle, would keep both of them
        // running for ever and the disk and the other shards from being heard.
        while !self.0.partition.borrow().log_state().idle || self.0.background.get() > 0 {
            self.0.idle.wait().await;
        }
        if let Err(error) = checkpoint::write(&self.0).await {
            warn!(%error, "no checkpoint was written; the next start reads the log");
        }
        Ok(())
    }

    /// This shard's counters.
    pub fn counters(&self) -> Arc<StoreCounters> {
        self.0.counters.clone()
    }
}

impl PutOptions {
    pub(crate) fn for_root(&self) -> RootOptions {
        let lease = !self.hold && self.leases.is_some();
        RootOptions { class: self.class, kind: self.kind, hold: self.hold, keep: self.keep, lease }
    }
}

/// How long an interrupted upload's chunks are kept at least, and half of what they are at most: time to come back from a journey
/// between two networks, or to restart a machine.
const ORPHAN_TURN: Duration = Duration::from_secs(30 * 60);

async fn age_orphans(inner: Rc<Inner>) {
    loop {
        sleep(ORPHAN_TURN).await;
        inner.partition.borrow_mut().age_orphans();
        inner.dispatch();
    }
}

fn page<T>(mut entries: Vec<T>, count: usize) -> Page<T> {
    let more = entries.len() > count;
    entries.truncate(count);
    Page { entries, more }
}

/// A reply of another kind than its request: a mistake of ours, which costs that request.
pub(crate) fn wrong(reply: &Reply) -> StoreError {
    error!(?reply, "a shard gave an answer of a wrong kind");
    StoreError::Storage("a shard gave an answer of a wrong kind".into())
}

impl Inner {
    pub(crate) fn owner(&self, key: &Hash) -> ShardId {
        ShardId::owner_of(key, self.shards)
    }

    pub(crate) fn number(&self) -> u64 {
        let number = self.next.get();
        self.next.set(number + 1);
        number
    }

    /// A PUT of a root. Its lease is noted even when the caller has stopped waiting, so it runs by itself.
    pub(crate) async fn put_op(
        self: &Rc<Self>,
        hash: Hash,
        op: Op,
        options: &PutOptions,
    ) -> Result<(bool, bool), StoreError> {
        let owner = self.owner(&hash);
        let outcome = match options.leases.clone().filter(|_| !options.hold) {
            None => self.op(owner, op).await?,
            Some(leases) if !leases.has_room() => return Err(StoreError::Busy),
            Some(leases) => {
                let (inner, slot) = (self.clone(), Slot::new());
                let done = slot.clone();
                spawn_local(async move {
                    let result = inner.op(owner, op).await;
                    if result.is_ok() {
                        leases.add(hash);
                    }
                    done.set(result);
                })
                .detach();
                slot.wait().await?
            }
        };
        match outcome {
            Outcome::Stored { existed, became_folder } => Ok((existed, became_folder)),
            _ => Ok((false, false)),
        }
    }

    /// Takes references to a folder's children, all or none.
    pub(crate) async fn refer(self: &Rc<Self>, children: &[Hash]) -> Result<(), StoreError> {
        let mut taken = Vec::new();
        for (owner, group) in by_owner(children.to_vec(), self.shards) {
            let result = match self.request(owner, Request::Refer(group.clone())).await {
                Ok(Reply::Refer(result)) => result.map_err(StoreError::MissingChild),
                Ok(other) => Err(wrong(&other)),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                self.release_roots(taken);
                return Err(error);
            }
            taken.extend(group);
        }
        Ok(())
    }

    /// A tag points there no more: who is told so may remove the blob at once, by way of any shard.
    async fn untagged(self: &Rc<Self>, hash: Hash) -> Result<(), StoreError> {
        match self.request(self.owner(&hash), Request::Release(hash)).await? {
            Reply::Released => Ok(()),
            other => Err(wrong(&other)),
        }
    }

    /// Children's references stay with a folder that is new; otherwise they go back.
    pub(crate) fn settle_children(
        self: &Rc<Self>,
        options: &PutOptions,
        children: Vec<Hash>,
        result: &Result<(bool, bool), StoreError>,
    ) {
        let kept = matches!(result, Ok((false, _) | (_, true)));
        if options.kind == BlobKind::Folder && !kept {
            self.release_roots(children);
        }
    }

    /// Counts a piece of work that uses the disk until the guard is dropped.
    pub(crate) fn in_background(self: &Rc<Self>) -> Background {
        self.background.set(self.background.get() + 1);
        Background(self.clone())
    }

    /// Gives an operation to this shard's partition.
    pub(crate) async fn submit(self: &Rc<Self>, op: Op) -> Result<Outcome, OpError> {
        let (token, slot) = (self.number(), Slot::new());
        self.ops.borrow_mut().insert(token, slot.clone());
        self.partition.borrow_mut().submit(token, op);
        self.dispatch();
        slot.wait().await
    }

    /// Passes on what the partition says, and wakes the log.
    pub(crate) fn dispatch(self: &Rc<Self>) {
        let events = self.partition.borrow_mut().take_events();
        for event in events {
            match event {
                Event::Ended(token, result) => {
                    let slot = self.ops.borrow_mut().remove(&token);
                    if let Some(slot) = slot {
                        slot.set(result);
                    }
                }
                Event::Released(root) => {
                    let inner = self.clone();
                    spawn_local(async move { release::content(&inner, root).await }).detach();
                }
                Event::Unrooted(hash) => self.cache.remove(&hash),
                Event::SpaceDied => self.compact.notify(),
            }
        }
        if self.partition.borrow().log_state().read_only {
            let mut reason = self.shared.read_only();
            reason.get_or_insert_with(|| "writes to the log failed repeatedly; restart after mending the disk".into());
        }
        self.work.notify();
    }
}

/// Work in progress; see [`Inner::in_background`].
pub(crate) struct Background(Rc<Inner>);

impl Drop for Background {
    fn drop(&mut self) {
        self.0.background.set(self.0.background.get() - 1);
        self.0.idle.notify();
    }
}
