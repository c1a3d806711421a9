//! Storing a blob of any size, chunk by chunk.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use bytes::Bytes;
use metanode_blob::{extent::MapBuilder, partition::Op};
use metanode_shard::{local::Notify, spawn_local};
use metanode_types::{
    BlobKind, Hash,
    limits::{BLOB_BYTES_MAX, CHUNK_BYTES, MANIFEST_BYTES_MAX},
    sabotage::{self, Sabotage},
};

use crate::{PutOptions, Store, StoreError, Stored, children::ChildNames, release};

/// Chunks of one PUT that may wait for their commit: 4 MiB, which is one large frame of the log.
const WINDOW_CHUNKS: usize = 16;

/// A PUT in progress. Dropping it leaves the chunks that it has stored as orphans, so that another one can go on.
#[derive(Debug)]
pub struct PutBulk {
    store: Store,
    options: PutOptions,
    /// Kept back until it is known not to be the only one.
    first: Option<Bytes>,
    map: MapBuilder,
    flight: Rc<Flight>,
    children: ChildNames,
    children_done: bool,
    last_was_short: bool,
    size_bytes: u64,
}

#[derive(Debug, Default)]
struct Flight {
    chunks: Cell<usize>,
    landed: Notify,
    error: RefCell<Option<StoreError>>,
    /// References taken, of the current extent; those of pages before are in the pages.
    taken: RefCell<Vec<Hash>>,
    pages: RefCell<Vec<Hash>>,
    abandoned: Cell<bool>,
}

impl PutBulk {
    pub(crate) fn new(store: Store, size_bytes: Option<u64>, options: PutOptions) -> Self {
        let flight = Rc::new(Flight::default());
        if size_bytes.is_some_and(|size| size > BLOB_BYTES_MAX) {
            *flight.error.borrow_mut() = Some(StoreError::TooLarge);
        }
        Self {
            store,
            options,
            first: None,
            map: MapBuilder::new(),
            flight,
            children: ChildNames::default(),
            children_done: false,
            last_was_short: false,
            size_bytes: 0,
        }
    }

    /// Takes the next chunk: [`CHUNK_BYTES`], or less if it is the last. Waits while too many are on their way.
    pub async fn push(&mut self, chunk: Bytes) -> Result<(), StoreError> {
        if chunk.is_empty() || chunk.len() > CHUNK_BYTES || self.last_was_short {
            return Err(StoreError::Malformed("chunks have 256 KiB, the last one less".into()));
        }
        self.last_was_short = chunk.len() < CHUNK_BYTES;
        self.size_bytes += chunk.len() as u64;
        if self.options.kind == BlobKind::Folder {
            if self.size_bytes > MANIFEST_BYTES_MAX {
                return Err(StoreError::TooLarge);
            }
            self.children_done = self.children_done || self.children.push(&chunk)?;
        }
        if self.size_bytes <= CHUNK_BYTES as u64 {
            self.first = Some(chunk);
            return self.check();
        }
        if let Some(first) = self.first.take() {
            self.store_chunk(first).await?;
        }
        self.store_chunk(chunk).await
    }

    /// Closes the blob, which must have the address `expected`. Answered in the class that was asked for; the content of a larger
    /// blob is always durable before its root is staged.
    pub async fn finish(mut self, expected: Hash) -> Result<Stored, StoreError> {
        self.check()?;
        if self.size_bytes <= CHUNK_BYTES as u64 {
            let bytes = self.first.take().unwrap_or_default();
            let (store, options) = (self.store.clone(), self.options.clone());
            return store.put(expected, bytes, options).await;
        }
        let map = std::mem::take(&mut self.map).finish().ok_or(StoreError::TooLarge)?;
        if map.hash != expected {
            return Err(StoreError::HashMismatch);
        }
        if let Some(page) = map.page {
            self.store_page(page).await?;
        }
        self.wait_for_content().await?;
        let inner = self.store.0.clone();
        let children = match self.options.kind {
            BlobKind::Folder => std::mem::take(&mut self.children).finish()?,
            BlobKind::Blob => Vec::new(),
        };
        inner.refer(&children).await?;
        let options = self.options.for_root();
        let op = Op::PutRoot { hash: map.hash, size_bytes: map.size_bytes, payload: map.root, options };
        let result = inner.put_op(map.hash, op, &self.options).await;
        inner.settle_children(&self.options, children, &result);
        let (existed, _) = result?;
        if !existed {
            self.flight.taken.take();
            self.flight.pages.take();
        }
        Ok(Stored { hash: map.hash, size_bytes: map.size_bytes, existed })
    }

    async fn store_chunk(&mut self, chunk: Bytes) -> Result<(), StoreError> {
        let (name, page) = self.map.push(&chunk).map_err(|_| StoreError::TooLarge)?;
        if let Some(page) = page {
            self.store_page(page).await?;
        }
        self.send(name, chunk, false).await
    }

    /// A page replaces the names of its chunks in our memory, so it must be readable first.
    async fn store_page(&mut self, page: Bytes) -> Result<(), StoreError> {
        self.wait_for_content().await?;
        let name = metanode_crypto::hash(&page);
        self.send(name, page, true).await?;
        self.wait_for_content().await?;
        self.flight.taken.take();
        Ok(())
    }

    async fn send(&mut self, name: Hash, bytes: Bytes, page: bool) -> Result<(), StoreError> {
        self.wait_until(WINDOW_CHUNKS - 1).await?;
        self.flight.chunks.set(self.flight.chunks.get() + 1);
        let (flight, inner) = (self.flight.clone(), self.store.0.clone());
        // By itself: the reference it takes must be noted even when this PUT is dropped meanwhile.
        spawn_local(async move {
            let result = inner.op(inner.owner(&name), Op::PutChunk { name, bytes }).await;
            match result {
                Ok(_) if flight.abandoned.get() => inner.abandon_chunks(vec![name]),
                Ok(_) if page => flight.pages.borrow_mut().push(name),
                Ok(_) => flight.taken.borrow_mut().push(name),
                Err(error) => _ = flight.error.borrow_mut().get_or_insert(error),
            }
            flight.chunks.set(flight.chunks.get() - 1);
            flight.landed.notify();
        })
        .detach();
        Ok(())
    }

    /// Waits until all that was sent is durable.
    async fn wait_for_content(&self) -> Result<(), StoreError> {
        match sabotage::is_on(Sabotage::RootBeforeChunks) {
            true => Ok(()),
            false => self.wait_until(0).await,
        }
    }

    async fn wait_until(&self, in_flight: usize) -> Result<(), StoreError> {
        while self.flight.chunks.get() > in_flight {
            self.flight.landed.wait().await;
        }
        self.check()
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.store.0.closing.get() {
            return Err(StoreError::ShuttingDown);
        }
        self.flight.error.borrow().clone().map_or(Ok(()), Err)
    }
}

impl Drop for PutBulk {
    fn drop(&mut self) {
        self.flight.abandoned.set(true);
        let (taken, pages) = (self.flight.taken.take(), self.flight.pages.take());
        if taken.is_empty() && pages.is_empty() {
            return;
        }
        let inner = self.store.0.clone();
        spawn_local(async move {
            inner.abandon_chunks(taken);
            for page in pages {
                let names = match release::chunk(&inner, page).await {
                    Ok(bytes) => metanode_blob::extent::ExtentPage::chunk_names(&bytes).unwrap_or_default(),
                    Err(_) => Vec::new(), // the next start finds what nobody refers to
                };
                inner.abandon_chunks(names);
                inner.release_chunks(vec![page]);
            }
        })
        .detach();
    }
}
