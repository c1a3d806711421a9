//! Work on a store that nobody waits for: scrubbing, surveys of damage, and compaction on demand.
//!
//! A scrub reads every chunk and every map past all caches and compares them with their hashes, within a budget of bytes a second. What it finds
//! is counted and marked: reads refuse it, and the next PUT of the blob replaces it. Without one, rot is noticed only by whoever needs the bytes, when
//! perhaps no other copy is left.
//!
//! A survey names the blobs that damaged chunks and maps belong to: chunks don't know who refers to them, so it follows the map of every blob.
//!
//! [`Maintenance`] is how other threads ask for it: plain numbers that each shard looks at.

use std::{
    collections::BTreeSet,
    ops::Bound,
    rc::Rc,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use metanode_blob::{
    extent::{ExtentPage, decode_root},
    partition::{RootEntry, Source},
};
use metanode_log::{Location, Table};
use metanode_shard::{file::is_lost, now, sleep, yield_now};
use metanode_types::Hash;
use tracing::{info, warn};

use crate::{
    StoreError, release,
    request::{Reply, Request, by_owner},
    shard::{Inner, wrong},
};

/// How often a shard looks whether anything was asked for: such work takes seconds at least.
const LOOK_PERIOD: Duration = Duration::from_millis(500);

/// A scrub that is ahead of its budget sleeps at least so long, so that sleeping costs little.
const PAUSE_MIN: Duration = Duration::from_millis(20);

/// What was asked of all shards of a store, and how far they are.
#[derive(Debug, Default)]
pub struct Maintenance {
    scrub: AtomicU64,
    scrub_bytes_per_second: AtomicU64,
    compact: AtomicU64,
    survey: AtomicU64,
    /// What the latest survey has found.
    damaged: Mutex<BTreeSet<Hash>>,
}

/// Blobs that a survey lists: 3 MiB of hashes. Once these are repaired, the next survey lists others.
const DAMAGED_MAX: usize = 100_000;

impl Maintenance {
    /// Asks every shard for a pass of the scrub, at so many bytes a second of the whole store; 0 is as fast as it goes. One that is under
    /// way begins anew. Returns its number.
    pub fn scrub(&self, bytes_per_second: u64) -> u64 {
        self.scrub_bytes_per_second.store(bytes_per_second, Relaxed);
        self.scrub.fetch_add(1, Relaxed) + 1
    }

    /// Asks every shard to free what can be freed, at any cost of copying. Returns the number of this request.
    pub fn compact(&self) -> u64 {
        self.compact.fetch_add(1, Relaxed) + 1
    }

    /// Asks every shard which blobs the damage that is known belongs to; the list begins anew. Returns the number of this request.
    pub fn survey(&self) -> u64 {
        let mut damaged = self.listed();
        damaged.clear();
        self.survey.fetch_add(1, Relaxed) + 1
    }

    /// The number of the latest survey, up to `count` blobs behind `after` that it has found so far, in order, and whether there are more.
    pub fn damaged(&self, after: Option<&Hash>, count: usize) -> (u64, Vec<Hash>, bool) {
        let damaged = self.listed();
        let mut behind = damaged.range((after.map_or(Bound::Unbounded, Bound::Excluded), Bound::Unbounded));
        let page = behind.by_ref().take(count).copied().collect();
        (self.survey.load(Relaxed), page, behind.next().is_some())
    }

    /// Lists a blob, unless another survey was asked for since.
    fn add_damaged(&self, survey: u64, hash: Hash) {
        let mut damaged = self.listed();
        if self.survey.load(Relaxed) == survey && damaged.len() < DAMAGED_MAX {
            damaged.insert(hash);
        }
    }

    fn listed(&self) -> MutexGuard<'_, BTreeSet<Hash>> {
        self.damaged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does what is asked for, until the store is closed.
pub(crate) async fn run(inner: Rc<Inner>) {
    let every = inner.shared.config.scrub_period;
    let mut next = every.map(|every| now() + every);
    loop {
        sleep(LOOK_PERIOD).await;
        if inner.closing.get() {
            return;
        }
        let maintenance = &inner.shared.maintenance;
        let asked = maintenance.compact.load(Relaxed);
        if inner.counters.compact_asked.value() != asked {
            inner.counters.compact_asked.set(asked);
            inner.compact_hard.set(Some(asked));
            inner.compact.notify();
        }
        let asked = maintenance.survey.load(Relaxed);
        if inner.counters.survey_done.value() != asked {
            survey(&inner, asked).await;
        }
        let asked = maintenance.scrub.load(Relaxed);
        let due = next.is_some_and(|next| now() >= next);
        if inner.counters.scrub_done.value() != asked || due {
            let budget = match inner.counters.scrub_done.value() != asked {
                true => maintenance.scrub_bytes_per_second.load(Relaxed),
                false => inner.shared.config.scrub_bytes_per_second,
            };
            let share = (budget / u64::from(inner.shards.get())).max(u64::from(budget > 0));
            pass(&inner, asked, share).await;
            next = every.map(|every| now() + every);
        }
    }
}

/// One pass over everything that this shard's partition refers to. Ends early when another one is asked for, or the store is closed.
async fn pass(inner: &Rc<Inner>, number: u64, bytes_per_second: u64) {
    let counters = &inner.counters;
    counters.scrub_running.set(1);
    let mut budget = Budget { began: now(), bytes: 0, bytes_per_second };
    let found_before = counters.scrub_corrupt.value();
    for part in 0..Table::<()>::PARTS {
        let (chunks, maps) = {
            let partition = inner.partition.borrow();
            partition.scrub_part(part)
        };
        for (name, location) in chunks {
            if is_over(inner, number) {
                counters.scrub_running.set(0);
                return;
            }
            if check_chunk(inner, &name, location).await == Some(false) {
                counters.scrub_corrupt.increment();
            }
            counters.scrub_bytes.add(location.length.into());
            budget.spend(location.length.into()).await;
        }
        for (hash, size_bytes, location) in maps {
            if is_over(inner, number) {
                counters.scrub_running.set(0);
                return;
            }
            if !check_map(inner, &hash, size_bytes, location).await {
                inner.partition.borrow_mut().mark_damaged(&hash);
                counters.scrub_corrupt.increment();
            }
            counters.scrub_bytes.add(location.length.into());
            budget.spend(location.length.into()).await;
        }
        yield_now().await;
    }
    let found = counters.scrub_corrupt.value() - found_before;
    info!(shard = %inner.shard, bytes = budget.bytes, corrupt = found, "scrubbed");
    counters.scrub_passes.increment();
    counters.scrub_running.set(0);
    counters.scrub_done.set(number);
}

/// Lists the blobs of this shard's partition that something is missing of. Ends early when another survey is asked for, or the store is
/// closed.
async fn survey(inner: &Rc<Inner>, number: u64) {
    let maintenance = &inner.shared.maintenance;
    for part in 0..Table::<()>::PARTS {
        let roots = inner.partition.borrow().roots_part(part);
        for (hash, root) in roots {
            if inner.closing.get() || maintenance.survey.load(Relaxed) != number {
                return;
            }
            if is_damaged(inner, &hash, &root).await {
                maintenance.add_damaged(number, hash);
            }
        }
        yield_now().await;
    }
    inner.counters.survey_done.set(number);
}

async fn is_damaged(inner: &Rc<Inner>, hash: &Hash, root: &RootEntry) -> bool {
    if root.is_whole() {
        return root.size_bytes > 0 && matches!(inner.partition.borrow().chunk(hash), Source::Corrupt);
    }
    let missing = root.damaged || {
        match has_all(inner, hash, root).await {
            Ok(all) => !all,
            Err(StoreError::ShuttingDown) => false, // the survey does not end
            Err(error) => {
                warn!(%hash, %error, "the map of a blob can't be read");
                true
            }
        }
    };
    // Removed meanwhile, it is missing because it has gone.
    missing && inner.partition.borrow().root(hash).is_some()
}

/// Whether all pages and chunks of a larger blob are there.
async fn has_all(inner: &Rc<Inner>, hash: &Hash, root: &RootEntry) -> Result<bool, StoreError> {
    let payload = inner.root_payload(hash, root.location).await?;
    let extents = decode_root(&payload, root.size_bytes).map_err(|_| StoreError::Corrupt)?;
    for (index, extent) in extents.iter().enumerate() {
        let page = release::chunk(inner, extent.page).await?;
        let page = ExtentPage::decode(&page, index, root.size_bytes).map_err(|_| StoreError::Corrupt)?;
        for (owner, names) in by_owner(page.chunks, inner.shards) {
            match inner.request(owner, Request::Have(names)).await? {
                Reply::Have(have) if have.contains(&false) => return Ok(false),
                Reply::Have(_) => {}
                other => return Err(wrong(&other)),
            }
        }
    }
    Ok(true)
}

fn is_over(inner: &Inner, number: u64) -> bool {
    inner.closing.get() || inner.shared.maintenance.scrub.load(Relaxed) != number
}

/// Whether a chunk's copy has its hash; `None` when it has moved or gone meanwhile, or could not be read.
async fn check_chunk(inner: &Rc<Inner>, name: &Hash, location: Location) -> Option<bool> {
    let is_here = || matches!(inner.partition.borrow().chunk(name), Source::Log(now) if now == location);
    if !is_here() {
        return None;
    }
    let bytes = match inner.files.read_again(location).await {
        Ok(bytes) => bytes,
        // What the disk or the file system has lost is as good as rotten.
        Err(error) if is_lost(&error) => {
            return is_here().then(|| {
                inner.corrupt(name, location, &format!("it can't be read: {error}"));
                inner.cache.remove(name);
                false
            });
        }
        // No memory, no descriptor: that says nothing about it.
        Err(error) => {
            warn!(chunk = %name, %error, "a scrub could not read a chunk");
            return None;
        }
    };
    if inner.hashes.hash(&bytes).await == *name {
        return Some(true);
    }
    if !is_here() {
        return None;
    }
    inner.corrupt(name, location, "a scrub has found another hash");
    inner.cache.remove(name);
    Some(false)
}

/// Whether the list of extents of a larger blob can be read and its pages are there. What the pages list is checked as chunks.
async fn check_map(inner: &Rc<Inner>, hash: &Hash, size_bytes: u64, location: Location) -> bool {
    let is_here = || inner.partition.borrow().root(hash).is_some_and(|root| root.location == location);
    let Ok(payload) = inner.root_payload(hash, location).await else { return !is_here() };
    let Ok(extents) = decode_root(&payload, size_bytes) else { return !is_here() };
    for extent in extents {
        let have = inner.have_chunk(extent.page).await;
        if matches!(have, Ok(false)) && is_here() {
            return false;
        }
    }
    true
}

impl Inner {
    async fn have_chunk(self: &Rc<Self>, name: Hash) -> Result<bool, StoreError> {
        match self.request(self.owner(&name), Request::Have(vec![name])).await? {
            Reply::Have(have) => Ok(have.first() == Some(&true)),
            other => Err(wrong(&other)),
        }
    }
}

/// Keeps a pass at its rate.
struct Budget {
    began: std::time::Instant,
    bytes: u64,
    bytes_per_second: u64,
}

impl Budget {
    async fn spend(&mut self, bytes: u64) {
        self.bytes += bytes;
        if self.bytes_per_second == 0 {
            return;
        }
        let due = Duration::from_secs_f64(self.bytes as f64 / self.bytes_per_second as f64);
        let ahead = due.saturating_sub(now() - self.began);
        if ahead >= PAUSE_MIN {
            sleep(ahead).await;
        }
    }
}
