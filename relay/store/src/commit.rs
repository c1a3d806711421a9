//! The log's shell: makes segments, writes frames, syncs them.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    path::PathBuf,
    rc::Rc,
    time::{Duration, Instant},
};

use metanode_log::{BLOCK_BYTES, Effect, Failure, SegmentIdentity, format::FrameImage};
use metanode_shard::{
    file::{DirectFile, DmaBuffer, OpenMode},
    run_blocking, spawn_local, yield_now,
};
use tracing::{error, warn};

use crate::{
    error::failure,
    folder::{filling_path, log_path, reserve_path, segment_path, spare_path, sync_folder},
    open::{SegmentInfo, Shared},
    shard::Inner,
};

/// Bytes of one write while a spare is filled with zeros: small enough that a commit waits less than a millisecond behind it.
const FILL_BYTES: usize = 1 << 20;

/// A log that used up a segment faster than this moves bulk data: it gets unfilled segments, which cost it little, rather than
/// twice the writes.
const FILL_PACE: Duration = Duration::from_millis(120);

/// Part of the free space that a spare may take.
const SPARE_SHARE: u64 = 16;

/// The files of the log that this shard writes.
#[derive(Debug)]
pub(crate) struct LogFiles {
    store: PathBuf,
    identity: SegmentIdentity, // its segment number is not used
    boot: u64,
    segment_bytes: u32,
    active: RefCell<HashMap<u32, Rc<DirectFile>>>,
    filling: Cell<bool>,
    prepared_at: Cell<Option<Instant>>,
}

impl LogFiles {
    pub(crate) fn new(shared: &Shared, log: u16) -> Self {
        Self {
            store: shared.config.path.clone(),
            identity: SegmentIdentity { store: shared.store, log, segment: 0 },
            boot: shared.boot,
            segment_bytes: shared.segment_bytes,
            active: RefCell::default(),
            filling: Cell::new(false),
            prepared_at: Cell::new(None),
        }
    }

    /// Makes a segment: from the spare, the reserve, or anew. Durable when it returns.
    async fn prepare(&self, segment: u32, reserve: bool) -> io::Result<()> {
        let log = self.identity.log;
        let path = segment_path(&self.store, log, segment);
        let spare = if reserve { reserve_path(&self.store, log) } else { spare_path(&self.store, log) };
        let (from, to) = (spare, path.clone());
        let reused = run_blocking(move || match std::fs::rename(from, to) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        })
        .await?;
        if reserve && !reused {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let result = self.fill_in(segment, &path, reused).await;
        if result.is_err() && !reserve {
            // Nothing was acknowledged in it; a leftover would only be cleared by the next start.
            let _ = run_blocking(move || std::fs::remove_file(path)).await;
        }
        result
    }

    async fn fill_in(&self, segment: u32, path: &std::path::Path, reused: bool) -> io::Result<()> {
        let file = if reused {
            DirectFile::open(path, OpenMode::ReadWrite).await?
        } else {
            let file = DirectFile::create_new(path).await?;
            file.allocate(self.segment_bytes.into()).await?;
            file
        };
        let identity = SegmentIdentity { segment, ..self.identity };
        let mut block = DmaBuffer::with_capacity(BLOCK_BYTES);
        block.extend_from_slice(&identity.encode_header(self.boot));
        file.write_at(block, 0).await?;
        file.fdatasync().await?;
        let folder = log_path(&self.store, self.identity.log);
        run_blocking(move || sync_folder(&folder)).await?;
        self.active.borrow_mut().insert(segment, Rc::new(file));
        Ok(())
    }

    async fn write(&self, segment: u32, offset: u32, image: &FrameImage) -> io::Result<()> {
        let file = self.file(segment)?;
        let mut buffer = DmaBuffer::with_capacity(image.length as usize);
        image.for_each_piece(|piece| buffer.extend_from_slice(piece));
        file.write_at(buffer, offset.into()).await
    }

    async fn sync(&self, segment: u32) -> io::Result<()> {
        self.file(segment)?.fdatasync().await
    }

    fn file(&self, segment: u32) -> io::Result<Rc<DirectFile>> {
        self.active.borrow().get(&segment).cloned().ok_or_else(|| io::Error::other("the segment is not open"))
    }

    /// Closes segments that are full: frames go to `active` and later ones only.
    fn close_before(&self, active: u32) {
        self.active.borrow_mut().retain(|segment, _| *segment >= active);
    }

    /// Fills a spare with zeros, if there is none, the disk has room, and the log is not moving bulk data: writing over written
    /// blocks syncs 2.5 times as fast as over allocated ones.
    async fn fill_spare(&self, closing: &Cell<bool>) -> io::Result<()> {
        let log = self.identity.log;
        let (spare, filling) = (spare_path(&self.store, log), filling_path(&self.store, log));
        let (store, bytes) = (self.store.clone(), u64::from(self.segment_bytes));
        let (exists, new) = (spare.clone(), filling.clone());
        let wanted = run_blocking(move || -> io::Result<bool> {
            let disk = rustix::fs::statvfs(&store)?;
            let room = disk.f_bavail * disk.f_frsize / SPARE_SHARE > bytes;
            match std::fs::remove_file(new) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            Ok(room && !exists.exists())
        })
        .await?;
        if !wanted {
            return Ok(());
        }
        let file = DirectFile::create_new(&filling).await?;
        if !file.is_direct() {
            drop(file); // written through the page cache, zeros would be no better than allocated blocks
            return run_blocking(move || std::fs::remove_file(filling)).await;
        }
        file.allocate(bytes).await?;
        let mut at = 0;
        while at < bytes {
            if closing.get() {
                drop(file);
                return run_blocking(move || std::fs::remove_file(filling)).await;
            }
            let length = FILL_BYTES.min((bytes - at) as usize);
            file.write_at(DmaBuffer::alloc(length), at).await?;
            at += length as u64;
        }
        file.fdatasync().await?;
        file.close().await?;
        run_blocking(move || std::fs::rename(filling, spare)).await
    }
}

/// Performs the log's effects until the store is closed.
pub(crate) async fn run(inner: Rc<Inner>) {
    loop {
        let effect = inner.partition.borrow_mut().poll();
        match effect {
            Some(Effect::Prepare { segment, reserve }) => {
                let inner = inner.clone();
                spawn_local(async move { prepare(inner, segment, reserve).await }).detach();
            }
            Some(Effect::Write { segment, offset, image }) => {
                let records = image.payloads.len() as u64;
                let result = inner.log.write(segment, offset, &image).await;
                inner.counters.frames.increment();
                inner.counters.records.add(records);
                inner.counters.written_bytes.add(image.length.into());
                let result = result.map_err(|error| report(&inner, "write", segment, &error));
                inner.partition.borrow_mut().written(result);
                inner.dispatch();
            }
            Some(Effect::Sync { segment }) => {
                let started = Instant::now();
                let result = inner.log.sync(segment).await;
                inner.counters.syncs.increment();
                inner.counters.sync_duration.record(started.elapsed());
                let result = result.map_err(|error| report(&inner, "fdatasync", segment, &error));
                inner.partition.borrow_mut().synced(result);
                inner.dispatch();
                inner.log.close_before(segment);
            }
            None => {
                let state = inner.partition.borrow().log_state();
                inner.counters.staged_bytes.set(state.staged_bytes as u64);
                if state.idle {
                    inner.idle.notify();
                }
                inner.work.wait().await;
                yield_now().await; // let others that are ready join this frame
            }
        }
    }
}

async fn prepare(inner: Rc<Inner>, segment: u32, reserve: bool) {
    let _work = inner.in_background();
    let result = inner.log.prepare(segment, reserve).await;
    let key = (inner.log.identity.log, segment);
    if result.is_ok() {
        let first = (inner.shared.boot, inner.partition.borrow().next_sequence());
        let info = SegmentInfo { first, bytes: inner.shared.segment_bytes.into() };
        inner.shared.segments().insert(key, info);
    }
    let result = result.map_err(|error| match failure(&error) {
        Failure::NoSpace => Failure::NoSpace,
        _ => report(&inner, "preparation", segment, &error),
    });
    inner.partition.borrow_mut().prepared(segment, result);
    inner.dispatch();
    inner.work.notify();
    if result.is_err() {
        inner.compact.notify();
        return;
    }
    let pace = inner.log.prepared_at.replace(Some(Instant::now())).map(|at| at.elapsed());
    let bulk = pace.is_some_and(|pace| pace < FILL_PACE);
    if !bulk && !inner.closing.get() && !inner.log.filling.replace(true) {
        if let Err(error) = inner.log.fill_spare(&inner.closing).await {
            warn!(%error, "no spare segment could be filled");
        }
        inner.log.filling.set(false);
    }
}

/// Logs a failed write where it is consumed, and says what it means to the log.
fn report(inner: &Inner, what: &str, segment: u32, error: &io::Error) -> Failure {
    inner.counters.sync_failures.increment();
    error!(log = inner.log.identity.log, segment, %error, "{what} of a segment failed; it is not used again");
    failure(error)
}
