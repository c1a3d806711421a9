//! Checkpoints of the index: written now and then and when the store is closed, read by recovery.

use std::{collections::BTreeMap, io, path::Path, rc::Rc, time::Duration};

use metanode_blob::partition::{Checkpoint, Coverage, Recovery};
use metanode_shard::{
    fs::{self, PlainFile, sync_folder},
    now, run_blocking, sleep, yield_now,
};
use metanode_types::{ShardCount, ShardId};
use tracing::{debug, warn};

use crate::{
    StoreConfig,
    folder::{checkpoint_path, is_checkpoint},
    shard::Inner,
};

/// Bytes of log behind a checkpoint that make a new one worth its writing: a start reads the heads in them, about a second.
const LOG_BYTES: u64 = 2 << 30;

/// How often that is looked at.
const INTERVAL: Duration = Duration::from_secs(10);

/// Bytes handed to the file at once.
const WRITE_BYTES: usize = 1 << 20;

/// How long a checkpoint keeps the shard from other work: unnoticeable, and on a busy shard each turn that is given up costs
/// milliseconds, of which a stopping node has few.
const TURN: Duration = Duration::from_micros(300);

/// Writes checkpoints as the log grows.
pub(crate) async fn run(inner: Rc<Inner>) {
    let mut covered = inner.counters.written_bytes.value();
    loop {
        sleep(INTERVAL).await;
        if inner.closing.get() {
            return;
        }
        let _work = inner.in_background();
        let written = inner.counters.written_bytes.value();
        if written - covered >= LOG_BYTES {
            covered = written;
            if let Err(error) = write(&inner).await {
                warn!(%error, "no checkpoint was written; a start reads more of the log");
            }
        }
    }
}

/// Writes one; the one before stays until the new one is whole and durable.
pub(crate) async fn write(inner: &Rc<Inner>) -> io::Result<()> {
    if inner.checkpointing.replace(true) {
        return Ok(()); // one is being written
    }
    let result = write_alone(inner).await;
    inner.checkpointing.set(false);
    result
}

async fn write_alone(inner: &Rc<Inner>) -> io::Result<()> {
    let (store, shard) = (inner.shared.config.path.clone(), inner.shard.0);
    let path = checkpoint_path(&store, shard);
    let new = path.with_extension("new");
    let made = new.clone();
    let mut file = run_blocking(move || PlainFile::create(made)).await?;
    let mut written = 0;
    let mut checkpoint = Checkpoint::begin(&inner.partition.borrow(), inner.shared.store, shard, inner.shards.get());
    let mut buffer: Vec<u8> = Vec::new();
    let mut more = true;
    let mut turn = now();
    while more {
        let part = checkpoint.next(&inner.partition.borrow());
        more = part.is_some();
        buffer.extend(part.unwrap_or_default());
        if buffer.len() >= WRITE_BYTES || !more {
            let bytes = std::mem::take(&mut buffer);
            let (at, length) = (written, bytes.len() as u64);
            file = run_blocking(move || file.write_at(&bytes, at).map(|()| file)).await?;
            written += length;
        }
        if now() - turn >= TURN {
            yield_now().await;
            turn = now();
        }
    }
    run_blocking(move || {
        file.sync()?;
        fs::rename(new, path)?;
        sync_folder(&store)
    })
    .await?;
    debug!(shard, "wrote a checkpoint");
    Ok(())
}

/// Loads the checkpoints of all partitions, if they are all there, whole, and of one number of shards; then returns what they
/// cover. Otherwise the log is read from its beginning.
///
/// `begun_in` knows the segments that are on disk and the openings that they were begun in, where their headers say it.
pub(crate) fn load(
    config: &StoreConfig,
    store: [u8; 16],
    begun_in: &BTreeMap<(u16, u32), Option<u64>>,
    recoveries: &mut Vec<Recovery>,
) -> Vec<Coverage> {
    let read = |shard: u16| fs::read(checkpoint_path(&config.path, shard)).ok();
    let Some(first) = read(0) else { return Vec::new() };
    let Some(shards) = Coverage::decode(&first).ok().and_then(|coverage| ShardCount::new(coverage.shards)) else {
        return Vec::new();
    };
    let mut covered = Vec::new();
    for shard in shards.iter() {
        let owner = |key: &_| ShardId::owner_of(key, config.shards).index();
        let loaded = read(shard.0).and_then(|bytes| {
            let coverage = Coverage::decode(&bytes).ok()?;
            let ours = coverage.store == store && coverage.shard == shard.0 && coverage.shards == shards.get();
            let exists = |log, segment| match begun_in.get(&(log, segment)) {
                Some(boot) => boot.is_none_or(|boot| coverage.knows_segment(boot)),
                None => false,
            };
            (ours && Recovery::load(&bytes, exists, owner, recoveries).is_ok()).then_some(coverage)
        });
        let Some(coverage) = loaded else {
            warn!(shard = shard.0, "a checkpoint is missing or damaged; reading the whole log");
            *recoveries = config.shards.iter().map(|_| Recovery::new()).collect();
            return Vec::new();
        };
        covered.push(coverage);
    }
    covered
}

/// Removes the checkpoints, since the whole log was read instead.
///
/// The log gives chunks that nobody refers to once more, as orphans; what commits now may count on them. A checkpoint that lacks them,
/// written before, would lose that when the missing one has been written and the others have not.
pub(crate) fn discard(store: &Path) -> io::Result<()> {
    for name in fs::names(store)? {
        if name.to_str().is_some_and(is_checkpoint) {
            fs::remove_file(store.join(name))?;
        }
    }
    sync_folder(store)
}
