//! Counters that a transfer advances and somebody else shows.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use bytes::Bytes;

use crate::{BlobSink, BlobSource};

/// How far a transfer is. Clones share the counters.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    inner: Arc<Counters>,
}

#[derive(Debug, Default)]
struct Counters {
    bytes: AtomicU64,
    bytes_total: AtomicU64,
    files: AtomicU64,
    files_total: AtomicU64,
}

impl Progress {
    /// Bytes of contents moved.
    pub fn bytes(&self) -> u64 {
        self.inner.bytes.load(Relaxed)
    }

    /// Bytes of contents in all; 0 while that is unknown.
    pub fn bytes_total(&self) -> u64 {
        self.inner.bytes_total.load(Relaxed)
    }

    /// Files done.
    pub fn files(&self) -> u64 {
        self.inner.files.load(Relaxed)
    }

    /// Files in all; 0 while that is unknown.
    pub fn files_total(&self) -> u64 {
        self.inner.files_total.load(Relaxed)
    }

    /// Says how much there is.
    pub fn expect(&self, files: u64, bytes: u64) {
        self.inner.files_total.store(files, Relaxed);
        self.inner.bytes_total.store(bytes, Relaxed);
    }

    pub(crate) fn add_bytes(&self, count: u64) {
        self.inner.bytes.fetch_add(count, Relaxed);
    }

    pub(crate) fn add_file(&self) {
        self.inner.files.fetch_add(1, Relaxed);
    }
}

/// A source or sink whose bytes are counted.
#[derive(Debug)]
pub struct Counted<T> {
    /// What is counted.
    pub inner: T,
    /// By what.
    pub progress: Progress,
}

impl<S: BlobSource> BlobSource for Counted<S> {
    async fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        let chunk = self.inner.next_chunk().await?;
        self.progress.add_bytes(chunk.as_ref().map_or(0, |chunk| chunk.len() as u64));
        Ok(chunk)
    }
}

impl<S: BlobSink> BlobSink for Counted<S> {
    async fn take(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner.take(offset, data).await?;
        self.progress.add_bytes(data.len() as u64);
        Ok(())
    }
}
