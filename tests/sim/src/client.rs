//! What a user of the store does: puts, removes, tags, folders and reads of blobs that are its own, one operation at a time.

use std::{cell::RefCell, rc::Rc};

use bytes::Bytes;
use metanode_blob::tree::SliceDecoder;
use metanode_shard::sim::Random;
use metanode_store::{Fetched, Leases, PutOptions, Store, StoreError};
use metanode_types::{BlobKind, ByteRange, DurabilityClass, Hash, TagName};
use metanode_wire::{Entry, EntryKind, Manifest};

use crate::model::{Blob, BlobState, CHUNK_BYTES, Known, Model, TagState, contents};

/// Blobs of a client.
const BLOBS: u64 = 24;
/// Tags of a client.
const TAGS: u64 = 4;
/// Folders of a client; their numbers come behind those of blobs.
const FOLDERS: u64 = 4;
/// Numbers of a folder's children begin here.
const CHILDREN: u32 = 1000;

/// A client of one opening.
pub struct Client {
    /// Of the run.
    pub seed: u64,
    /// Its number.
    pub number: u32,
    /// The shard that it is connected to.
    pub store: Store,
    /// What it knows.
    pub model: Rc<RefCell<Model>>,
    /// What it does next.
    pub random: Random,
    /// Writes may fail: what was acknowledged in memory may go before the power does.
    pub writes_fail: bool,
    /// Something has rotted: a tag does not protect a blob that was lost and stored again, until the next start counts anew.
    pub rotted: bool,
    /// It removes more than it puts, and only every second of its blobs: segments with the others stay where they are.
    pub removes: bool,
}

/// Whether an error says for certain that nothing has changed, also on disk.
fn is_refusal(error: &StoreError) -> bool {
    !matches!(error, StoreError::Storage(_) | StoreError::ReadOnly(_) | StoreError::DiskFull | StoreError::ShuttingDown)
}

impl Client {
    /// Does so many operations.
    pub async fn run(mut self, operations: u32) {
        let leases = self.store.leases();
        for _ in 0..operations {
            match self.random.below(20) {
                0..=7 if self.removes && self.random.below(3) > 0 => self.remove().await,
                0..=7 => self.put().await,
                8..=10 => self.remove().await,
                11 | 12 => self.tag_set().await,
                13 => self.tag_remove().await,
                14 => self.folder(&leases).await,
                16 => self.interrupted().await,
                15 => self.tag_get().await,
                _ => self.get().await,
            }
            self.model.borrow_mut().answered += 1;
        }
    }

    fn violation(&self, what: &str) {
        self.model.borrow_mut().violation(format!("client {}: {what}", self.number));
    }

    fn answered<T>(&self, result: &Result<T, StoreError>) {
        self.model.borrow_mut().refused += u64::from(result.is_err());
    }

    fn key(&self, number: u64) -> (u32, u32) {
        (self.number, number as u32)
    }

    fn some(&mut self, below: u64) -> (u32, u32) {
        (self.number, self.random.below(below) as u32)
    }

    fn blob(&self, number: u64) -> Rc<Blob> {
        let key = self.key(number);
        if let Some(state) = self.model.borrow().blobs.get(&key) {
            return state.blob.clone();
        }
        let bytes = contents(self.seed, self.number, number as u32);
        let hash = metanode_crypto::hash(&bytes);
        Rc::new(Blob { hash, bytes, kind: BlobKind::Blob, children: Vec::new() })
    }

    /// A blob or folder that the model knows.
    fn any(&mut self) -> Option<(u32, u32)> {
        let key = self.some(BLOBS + FOLDERS);
        self.model.borrow().blobs.contains_key(&key).then_some(key)
    }

    /// The number of a blob to put or to remove.
    fn changed(&mut self, below: u64) -> u64 {
        let number = self.random.below(below);
        if self.removes { number | 1 } else { number }
    }

    async fn put(&mut self) {
        let number = self.changed(BLOBS);
        let key = self.key(number);
        let blob = self.blob(number);
        let class = if self.random.below(3) == 0 { DurabilityClass::Memory } else { DurabilityClass::Durable };
        // Now and then the same blob twice at once: in memory, and durably behind it.
        let twice = self.random.below(6) == 0;
        self.begin(key, &blob);
        let options = |class| PutOptions { class, kind: BlobKind::Blob, hold: true, keep: false, leases: None };
        let (class, result) = if twice {
            let memory = metanode_shard::spawn_local({
                let (store, blob) = (self.store.clone(), blob.clone());
                async move { put(&store, &blob, options(DurabilityClass::Memory)).await }
            });
            metanode_shard::yield_now().await;
            let result = put(&self.store, &blob, options(DurabilityClass::Durable)).await;
            // Both are over before the next operation on it.
            match (memory.await, result) {
                (Ok(existed), Err(_)) => (DurabilityClass::Memory, Ok(existed)),
                (_, result) => (DurabilityClass::Durable, result),
            }
        } else {
            (class, put(&self.store, &blob, options(class)).await)
        };
        self.answered(&result);
        let mut model = self.model.borrow_mut();
        let state = model.blobs.get_mut(&key).expect("begun above");
        match result {
            Ok(_) => state.put(class, self.writes_fail),
            Err(error) => {
                if error == StoreError::HashMismatch {
                    drop(model);
                    self.violation(&format!("{} was refused: {error}", blob.hash));
                }
            }
        }
    }

    /// Begins to store a large blob and gives up; what it has stored is there for the next attempt.
    async fn interrupted(&mut self) {
        let number = self.random.below(BLOBS);
        let blob = self.blob(number);
        let chunks: Vec<Bytes> = (0..blob.bytes.len() / CHUNK_BYTES)
            .map(|index| blob.bytes.slice(index * CHUNK_BYTES..(index + 1) * CHUNK_BYTES))
            .collect();
        let pushed = self.random.below(chunks.len() as u64 + 1) as usize;
        let options =
            PutOptions { class: DurabilityClass::Durable, kind: BlobKind::Blob, hold: true, keep: false, leases: None };
        let mut bulk = self.store.put_bulk(Some(blob.bytes.len() as u64), options);
        for chunk in &chunks[..pushed] {
            if bulk.push(chunk.clone()).await.is_err() {
                return;
            }
        }
        if self.random.below(2) == 0 {
            metanode_shard::sleep(std::time::Duration::from_millis(self.random.below(20))).await;
        }
        drop(bulk);
        let names: Vec<Hash> = chunks.iter().map(|chunk| metanode_crypto::hash(chunk)).collect();
        let Ok(have) = self.store.have_chunks(&names).await else { return };
        for ((name, chunk), _) in names.iter().zip(&chunks).zip(have).filter(|(_, have)| *have) {
            match self.store.chunk(*name).await {
                Ok(bytes) if bytes == *chunk => {}
                Ok(_) => self.violation(&format!("chunk {name}: other bytes came back")),
                Err(_) => {} // it may have gone, or rotted
            }
        }
    }

    /// From here on the disk may have it or not; if it was there durably, it stays.
    fn begin(&self, key: (u32, u32), blob: &Rc<Blob>) {
        let mut model = self.model.borrow_mut();
        let state = model.blobs.entry(key).or_insert_with(|| BlobState {
            blob: blob.clone(),
            now: Known::No,
            durable: Known::No,
            tags: 0,
        });
        if state.durable != Known::Yes {
            state.durable = Known::Unknown;
        }
        if state.now != Known::Yes {
            state.now = Known::Unknown;
        }
    }

    async fn remove(&mut self) {
        let number = self.changed(BLOBS + FOLDERS);
        let key = self.key(number);
        if !self.model.borrow().blobs.contains_key(&key) {
            return;
        }
        let (blob, before, tags) = {
            let mut model = self.model.borrow_mut();
            let state = model.blobs.get_mut(&key).expect("the model has it");
            let before = state.clone();
            if before.tags == 0 {
                state.durable = Known::Unknown;
                state.now = Known::Unknown;
            }
            (before.blob.clone(), before, state.tags)
        };
        let result = self.store.remove(blob.hash).await;
        self.answered(&result);
        let mut wrong = None;
        let mut model = self.model.borrow_mut();
        let state = model.blobs.get_mut(&key).expect("the model has it");
        match &result {
            Ok(()) => {
                if (tags > 0 && !self.rotted) || before.now == Known::No {
                    wrong = Some("a removal was acknowledged of what is tagged, or not there");
                }
                (state.now, state.durable) = (Known::No, Known::No);
            }
            Err(StoreError::NotFound) => {
                if before.now == Known::Yes {
                    wrong = Some("it was not found");
                }
                (state.now, state.durable) =
                    (Known::No, if before.durable == Known::No { Known::No } else { Known::Unknown });
            }
            Err(StoreError::InUse { .. }) => {
                if tags == 0 && before.now == Known::Yes && !self.is_unsure_of_tags(&model, blob.hash) {
                    wrong = Some("it is said to be in use, and nothing refers to it");
                }
                let state = model.blobs.get_mut(&key).expect("the model has it");
                (state.now, state.durable) = (before.now, before.durable);
            }
            Err(error) if is_refusal(error) => wrong = Some("its removal was refused"),
            Err(_) => state.now = before.now,
        }
        drop(model);
        if let Some(wrong) = wrong {
            self.violation(&format!("{} ({key:?}): {wrong}: {result:?}, known {before:?}", blob.hash));
        }
    }

    /// A tag that may or may not refer to the blob.
    fn is_unsure_of_tags(&self, model: &Model, hash: Hash) -> bool {
        let mine = model.tags.range(self.key(0)..self.key(TAGS));
        mine.into_iter().any(|(_, tag)| tag.now.len() > 1 && tag.now.contains(&Some(hash)))
    }

    fn tag_name(&self, key: (u32, u32)) -> TagName {
        tag_name(key)
    }

    async fn tag_set(&mut self) {
        let tag = self.some(TAGS);
        let Some(target) = self.any() else { return };
        let (hash, known) = {
            let model = self.model.borrow();
            let state = &model.blobs[&target];
            (state.blob.hash, state.now)
        };
        {
            let mut model = self.model.borrow_mut();
            let state = model.tags.entry(tag).or_insert_with(|| TagState { now: vec![None], durable: vec![None] });
            state.durable.push(Some(hash));
            state.now.push(Some(hash));
        }
        let result = self.store.tag_set(self.tag_name(tag), hash).await;
        self.answered(&result);
        let mut wrong = None;
        {
            let mut model = self.model.borrow_mut();
            let state = model.tags.get_mut(&tag).expect("inserted above");
            match &result {
                Ok(()) => {
                    (state.now, state.durable) = (vec![Some(hash)], vec![Some(hash)]);
                    if known == Known::No {
                        wrong = Some("a tag was set to what is not there");
                    }
                    // It was durable before a tag could refer to it.
                    let target = model.blobs.get_mut(&target).expect("chosen above");
                    (target.now, target.durable) = (Known::Yes, Known::Yes);
                }
                Err(StoreError::NotFound) => {
                    state.now.pop();
                    state.durable.pop();
                    if known == Known::Yes {
                        wrong = Some("the target of a tag was not found");
                    }
                }
                Err(_) => {
                    state.now.pop();
                }
            }
            count_tags(&mut model, self.number);
        }
        if let Some(wrong) = wrong {
            self.violation(&format!("{hash} ({target:?}), tag {tag:?}: {wrong}"));
        }
    }

    async fn tag_remove(&mut self) {
        let tag = self.some(TAGS);
        let before = {
            let mut model = self.model.borrow_mut();
            let Some(state) = model.tags.get_mut(&tag) else { return };
            let before = state.clone();
            state.durable.push(None);
            state.now.push(None);
            before
        };
        let result = self.store.tag_remove(self.tag_name(tag)).await;
        self.answered(&result);
        let mut wrong = None;
        {
            let mut model = self.model.borrow_mut();
            let state = model.tags.get_mut(&tag).expect("seen above");
            match &result {
                Ok(()) => {
                    if before.now == [None] {
                        wrong = Some("the removal of a tag was acknowledged that is not there");
                    }
                    (state.now, state.durable) = (vec![None], vec![None]);
                }
                Err(StoreError::NotFound) => {
                    if !before.now.contains(&None) {
                        wrong = Some("a tag was not found");
                    }
                    state.now = vec![None];
                }
                Err(_) => state.now = before.now.clone(),
            }
            count_tags(&mut model, self.number);
        }
        if let Some(wrong) = wrong {
            self.violation(&format!("tag {tag:?}: {wrong}: {result:?}, known {before:?}"));
        }
    }

    async fn tag_get(&mut self) {
        let tag = self.some(TAGS);
        let Some(known) = self.model.borrow().tags.get(&tag).cloned() else { return };
        let found = match self.store.tag_get(self.tag_name(tag)).await {
            Ok(hash) => Some(hash),
            Err(StoreError::NotFound) => None,
            Err(_) => return,
        };
        if !known.now.contains(&found) {
            self.violation(&format!("tag {tag:?} points to {found:?}, known {known:?}"));
        }
    }

    /// Stores children under a lease, then the folder that lists them, sometimes without waiting for the ones before.
    async fn folder(&mut self, leases: &Leases) {
        let number = BLOBS + self.random.below(FOLDERS);
        let key = self.key(number);
        let blob = self.folder_of(number);
        let class = if self.random.below(2) == 0 { DurabilityClass::Memory } else { DurabilityClass::Durable };
        let of_child =
            PutOptions { class, kind: BlobKind::Blob, hold: false, keep: false, leases: Some(leases.clone()) };
        for child in &blob.children {
            if put(&self.store, child, of_child.clone()).await.is_err() {
                return;
            }
        }
        self.begin(key, &blob);
        let options = PutOptions { class, kind: BlobKind::Folder, hold: true, keep: false, leases: None };
        let result = put(&self.store, &blob, options).await;
        self.answered(&result);
        let mut model = self.model.borrow_mut();
        let state = model.blobs.get_mut(&key).expect("begun above");
        match result {
            Ok(_) => state.put(class, self.writes_fail),
            Err(StoreError::MissingChild(child)) if !self.writes_fail => {
                drop(model);
                self.violation(&format!("folder {key:?}: its child {child} is missing although it is leased"));
            }
            Err(_) => {}
        }
    }

    fn folder_of(&self, number: u64) -> Rc<Blob> {
        if let Some(state) = self.model.borrow().blobs.get(&self.key(number)) {
            return state.blob.clone();
        }
        let children: Vec<Rc<Blob>> = (0..1 + number % 3)
            .map(|child| {
                let bytes = contents(self.seed, self.number, CHILDREN * number as u32 + child as u32);
                let hash = metanode_crypto::hash(&bytes);
                Rc::new(Blob { hash, bytes, kind: BlobKind::Blob, children: Vec::new() })
            })
            .collect();
        let entries = children.iter().enumerate().map(|(index, child)| Entry {
            path: format!("file-{index}"),
            mode: 0o644,
            kind: EntryKind::File { hash: child.hash, size_bytes: child.bytes.len() as u64 },
        });
        let mut manifest = Manifest { entries: entries.collect() };
        let bytes: Bytes = manifest.encode().expect("a small folder is within every limit").into();
        Rc::new(Blob { hash: metanode_crypto::hash(&bytes), bytes, kind: BlobKind::Folder, children })
    }

    async fn get(&mut self) {
        let Some(key) = self.any() else { return };
        let (blob, known) = {
            let model = self.model.borrow();
            (model.blobs[&key].blob.clone(), model.blobs[&key].now)
        };
        let length = blob.bytes.len() as u64;
        let range = match self.random.below(3) {
            0 if length > 0 => {
                let offset = self.random.below(length);
                ByteRange { offset, length: 1 + self.random.below(length - offset) }
            }
            _ => ByteRange::ALL,
        };
        let found = look(&self.store, &blob, range).await;
        let wrong = match (&found, known) {
            (Look::Right, Known::No) => "it was removed and is there",
            (Look::Gone, Known::Yes) => "it is not there",
            (Look::Wrong, _) => "other bytes came back",
            _ => return,
        };
        self.violation(&format!("{} ({key:?}): {wrong}", blob.hash));
    }
}

/// Counts the tags that refer to each blob of a client for certain.
pub fn count_tags(model: &mut Model, client: u32) {
    let targets: Vec<Hash> = model
        .tags
        .range((client, 0)..(client, u32::MAX))
        .filter(|(_, tag)| tag.now.len() == 1)
        .filter_map(|(_, tag)| tag.now[0])
        .collect();
    for (_, state) in model.blobs.range_mut((client, 0)..(client, u32::MAX)) {
        state.tags = targets.iter().filter(|target| **target == state.blob.hash).count() as u32;
    }
}

/// The name of a tag.
pub fn tag_name(key: (u32, u32)) -> TagName {
    format!("tag-{}-{}", key.0, key.1).parse().expect("a short name")
}

/// Stores a blob, whatever its size.
pub async fn put(store: &Store, blob: &Blob, options: PutOptions) -> Result<bool, StoreError> {
    if blob.bytes.len() <= CHUNK_BYTES {
        return store.put(blob.hash, blob.bytes.clone(), options).await.map(|stored| stored.existed);
    }
    let mut bulk = store.put_bulk(Some(blob.bytes.len() as u64), options);
    for start in (0..blob.bytes.len()).step_by(CHUNK_BYTES) {
        bulk.push(blob.bytes.slice(start..blob.bytes.len().min(start + CHUNK_BYTES))).await?;
    }
    bulk.finish(blob.hash).await.map(|stored| stored.existed)
}

/// What a look at a blob shows.
#[derive(Debug, PartialEq, Eq)]
pub enum Look {
    /// Its bytes.
    Right,
    /// Others.
    Wrong,
    /// It is not there.
    Gone,
    /// An error, which says that the copy is not to be trusted, or the disk not to be read.
    Refused(StoreError),
}

/// Reads a blob and compares.
pub async fn look(store: &Store, blob: &Blob, range: ByteRange) -> Look {
    let (start, end) = range.clamp(blob.bytes.len() as u64).expect("ranges are made to fit");
    match fetch(store, blob, range).await {
        Ok(bytes) if bytes == blob.bytes[start as usize..end as usize] => Look::Right,
        Ok(_) => Look::Wrong,
        Err(StoreError::NotFound) => Look::Gone,
        Err(error) => Look::Refused(error),
    }
}

async fn fetch(store: &Store, blob: &Blob, range: ByteRange) -> Result<Bytes, StoreError> {
    if range == ByteRange::ALL
        && let Fetched::Whole(bytes) = store.get(blob.hash).await?
    {
        return Ok(bytes);
    }
    let reader = store.read(blob.hash).await?;
    let mut decoder = SliceDecoder::new(blob.hash, reader.size_bytes(), range).map_err(|_| StoreError::BadRange)?;
    let mut slice = reader.slice(range)?;
    let (mut buffer, mut out) = (Vec::new(), Vec::new());
    while let Some(pieces) = slice.next().await? {
        buffer.extend(pieces.iter().flat_map(|piece| piece.iter().copied()));
        let mut at = 0;
        while decoder.expects() > 0 && buffer.len() - at >= decoder.expects() {
            let item = &buffer[at..at + decoder.expects()];
            at += item.len();
            // What does not verify is not for a user's eyes.
            if let Some(leaf) = decoder.push(item).map_err(|_| StoreError::Corrupt)? {
                out.extend_from_slice(&item[leaf.skip..leaf.skip + leaf.take]);
            }
        }
        buffer.drain(..at);
    }
    Ok(out.into())
}
