//! The log's shell: makes segments, writes frames, syncs them.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use metanode_log::{Effect, Failure, SegmentIdentity, format::FrameImage};
use metanode_shard::{
    Companion,
    file::{AlignedBuffer, LogFile},
    fs::{self, PlainFile, sync_folder},
    now, run_blocking, spawn_local, yield_now,
};
use metanode_types::sabotage::{self, Sabotage};
use tracing::{error, warn};

use crate::{
    error::failure,
    folder::{filling_path, log_path, reserve_path, segment_path, spare_path},
    open::{SegmentInfo, Shared},
    request::Notice,
    shard::Inner,
};

/// Bytes of one write while a spare is filled with zeros: small enough that a commit waits less than a millisecond behind it.
const FILL_BYTES: usize = 1 << 20;

/// A log that used up a segment faster than this moves bulk data: it gets unfilled segments, which cost it little, rather than
/// twice the writes.
const FILL_PACE: Duration = Duration::from_millis(120);

/// Part of the free space that a spare may take.
const SPARE_SHARE: u64 = 16;

/// Memory that is kept to lay out the next frame in: a frame of the usual target size fits.
const BUFFER_BYTES_KEPT: usize = 4 << 20;

/// The files of the log that this shard writes.
#[derive(Debug)]
pub(crate) struct LogFiles {
    store: PathBuf,
    identity: SegmentIdentity, // its segment number is not used
    boot: u64,
    segment_bytes: u32,
    active: RefCell<BTreeMap<u32, Arc<LogFile>>>,
    /// Writes and syncs frames.
    companion: Companion,
    buffer: RefCell<AlignedBuffer>,
    filling: Cell<bool>,
    prepared_at: Cell<Option<Instant>>,
}

impl LogFiles {
    pub(crate) fn new(shared: &Shared, log: u16) -> io::Result<Self> {
        Ok(Self {
            store: shared.config.path.clone(),
            identity: SegmentIdentity { store: shared.store, log, segment: 0 },
            boot: shared.boot,
            segment_bytes: shared.segment_bytes,
            active: RefCell::default(),
            companion: Companion::start(&format!("log-{log}"), 1)?,
            buffer: RefCell::default(),
            filling: Cell::new(false),
            prepared_at: Cell::new(None),
        })
    }

    /// Makes a segment: from the spare, the reserve, or anew. Durable when it returns.
    async fn prepare(&self, segment: u32, reserve: bool) -> io::Result<()> {
        let identity = SegmentIdentity { segment, ..self.identity };
        let (store, boot, bytes) = (self.store.clone(), self.boot, u64::from(self.segment_bytes));
        let file = run_blocking(move || make_segment(&store, identity, boot, bytes, reserve)).await?;
        self.active.borrow_mut().insert(segment, Arc::new(file));
        Ok(())
    }

    /// Writes a frame and syncs it. With the time that the sync took.
    async fn commit(&self, segment: u32, offset: u32, image: FrameImage) -> io::Result<Duration> {
        let file = self.active.borrow().get(&segment).cloned();
        let file = file.ok_or_else(|| io::Error::other("the segment is not open"))?;
        let mut buffer = self.buffer.take();
        let job = move || {
            buffer.clear(BUFFER_BYTES_KEPT);
            buffer.reserve(image.length as usize);
            image.for_each_piece(|piece| buffer.extend_from_slice(piece));
            let written = file.write_at(&buffer, offset.into());
            let began = now();
            let synced = written.and_then(|()| match sabotage::is_on(Sabotage::SkipSync) {
                true => Ok(()),
                false => file.fdatasync(),
            });
            (buffer, synced.map(|()| now() - began))
        };
        let (buffer, result) = self.companion.run(job).await;
        self.buffer.replace(buffer);
        result
    }

    /// Cuts a segment off before a frame that failed, durably. Opened anew: a descriptor that has reported a failed sync may not
    /// report another.
    async fn revoke(&self, segment: u32, offset: u32) -> io::Result<()> {
        let path = segment_path(&self.store, self.identity.log, segment);
        let job = move || {
            let file = PlainFile::open_for_change(path)?;
            file.set_size(offset.into())?;
            file.sync()
        };
        self.companion.run(job).await
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
        let begun = run_blocking(move || begin_spare(&store, &exists, &new, bytes)).await?;
        let Some(file) = begun.map(Arc::new) else {
            return Ok(());
        };
        let mut zeros = AlignedBuffer::zeroed(FILL_BYTES);
        let mut at = 0;
        while at < bytes {
            if closing.get() {
                return run_blocking(move || fs::remove_file(filling)).await;
            }
            // Piece by piece: the blocking thread has other callers.
            zeros.truncate((bytes - at) as usize);
            let file = file.clone();
            zeros = run_blocking(move || file.write_at(&zeros, at).map(|()| zeros)).await?;
            at += zeros.as_slice().len() as u64;
        }
        run_blocking(move || file.fdatasync().and_then(|()| fs::rename(filling, spare))).await
    }
}

fn make_segment(store: &Path, identity: SegmentIdentity, boot: u64, bytes: u64, reserve: bool) -> io::Result<LogFile> {
    let log = identity.log;
    let path = segment_path(store, log, identity.segment);
    let spare = if reserve { reserve_path(store, log) } else { spare_path(store, log) };
    let reused = match fs::rename(spare, &path) {
        Ok(()) => true,
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Err(_) if reserve => return Err(io::ErrorKind::StorageFull.into()),
        Err(_) => false,
    };
    let make = || {
        let file = if reused { LogFile::open(&path)? } else { LogFile::create_new(&path)? };
        if !reused {
            file.allocate(bytes)?;
        }
        let mut header = AlignedBuffer::default();
        header.extend_from_slice(&identity.encode_header(boot));
        file.write_at(&header, 0)?;
        file.fdatasync()?;
        sync_folder(log_path(store, log))?;
        Ok(file)
    };
    let result = make();
    if result.is_err() && !reserve {
        // Nothing was acknowledged in it; a leftover would only be cleared by the next start.
        let _ = fs::remove_file(path);
    }
    result
}

/// The file for a spare, unless none is wanted now.
fn begin_spare(store: &Path, spare: &Path, filling: &Path, bytes: u64) -> io::Result<Option<LogFile>> {
    match fs::remove_file(filling) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let room = fs::space(store)?.free_bytes / SPARE_SHARE > bytes;
    if !room || fs::exists(spare) {
        return Ok(None);
    }
    let file = LogFile::create_new(filling)?;
    if !file.is_direct() {
        // Written through the page cache, zeros would be no better than allocated blocks.
        fs::remove_file(filling)?;
        return Ok(None);
    }
    file.allocate(bytes)?;
    Ok(Some(file))
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
            Some(Effect::Commit { segment, offset, image }) => {
                let (records, bytes) = (image.payloads.len() as u64, image.length);
                let result = inner.log.commit(segment, offset, image).await;
                inner.counters.frames.increment();
                inner.counters.records.add(records);
                inner.counters.written_bytes.add(bytes.into());
                inner.counters.syncs.increment();
                if let Ok(duration) = &result {
                    inner.counters.sync_duration.record(*duration);
                }
                let result = result.map(drop).map_err(|error| report(&inner, "commit", segment, &error));
                inner.partition.borrow_mut().committed(result);
                inner.dispatch();
                inner.log.close_before(segment);
            }
            Some(Effect::Revoke { segment, offset }) => {
                let result = inner.log.revoke(segment, offset).await;
                if result.is_ok()
                    && let Some(info) = inner.shared.segments().get_mut(&(inner.log.identity.log, segment))
                {
                    info.bytes = offset.into();
                }
                let result = result.map_err(|error| report(&inner, "revocation of a frame", segment, &error));
                inner.partition.borrow_mut().revoked(result);
                inner.dispatch();
                if inner.partition.borrow().log_state().full {
                    make_room(&inner);
                }
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
    if let Err(failure) = result {
        match failure {
            Failure::NoSpace => make_room(&inner),
            _ => inner.compact.notify(),
        }
        return;
    }
    let pace = inner.log.prepared_at.replace(Some(now())).map(|at| now() - at);
    let bulk = pace.is_some_and(|pace| pace < FILL_PACE);
    if !bulk && !inner.closing.get() && !inner.log.filling.replace(true) {
        if let Err(error) = inner.log.fill_spare(&inner.closing).await {
            warn!(%error, "no spare segment could be filled");
        }
        inner.log.filling.set(false);
    }
}

/// The disk is full: what nobody needs goes.
fn make_room(inner: &Rc<Inner>) {
    inner.shards.iter().for_each(|shard| inner.notice(shard, Notice::DropOrphans));
    inner.compact.notify();
}

/// Logs a failed write where it is consumed, and says what it means to the log.
fn report(inner: &Inner, what: &str, segment: u32, error: &io::Error) -> Failure {
    inner.counters.sync_failures.increment();
    error!(log = inner.log.identity.log, segment, %error, "{what} of a segment failed; it is not used again");
    failure(error)
}
