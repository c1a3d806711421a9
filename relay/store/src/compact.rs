//! Frees segments: moves what still counts out of them and deletes them.
//!
//! A shard looks after its own log and those of shards that no longer exist. It reads the heads of a segment's records and asks the
//! owners of their keys to move what still counts, each into its own log; the file is deleted when that is durable. So space of
//! removed blobs returns, and what is left of a crash after the move is a second copy, which the next start leaves behind.

use std::{collections::HashSet, rc::Rc, time::Duration};

use bytes::Bytes;
use metanode_blob::partition::Live;
use metanode_log::{RecordKind, ScanStep, SegmentIdentity, SegmentScan, format::RecordHead};
use metanode_shard::{
    fs::{self, sync_folder},
    run_blocking, sleep,
};
use metanode_types::sabotage::{self, Sabotage};
use tracing::{debug, warn};

use crate::{
    StoreError,
    folder::{log_path, segment_path, spare_path},
    open::make_reserve,
    recover::remove_log_if_empty,
    request::{Notice, Reply, Request},
    shard::{Inner, wrong},
};

/// A segment is worth moving when less than this part of it counts: at most one byte is copied for each that is freed.
const LIVE_PERCENT_MAX: u64 = 50;

/// On a full disk every freed block helps, at the price of more copying.
const LIVE_PERCENT_MAX_FULL: u64 = 90;

/// Where someone asked for it, all but what would be copied to win nothing.
const LIVE_PERCENT_MAX_HARD: u64 = 98;

/// Waits after a change, so that many removals make one round.
const ROUND: Duration = Duration::from_millis(200);

/// Bytes of payload in one message to an owner.
const BATCH_BYTES: usize = 2 << 20;

pub(crate) async fn run(inner: Rc<Inner>) {
    let mut damaged = HashSet::new();
    loop {
        inner.compact.wait().await;
        sleep(ROUND).await;
        let hard = inner.compact_hard.take();
        // Copies fill new segments, which are not worth copying again.
        let begun_before = inner.partition.borrow().next_sequence();
        loop {
            match round(&inner, &mut damaged, hard.map(|_| begun_before)).await {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    warn!(%error, "compaction stopped; it goes on with the next removal");
                    break;
                }
            }
        }
        if let Some(hard) = hard {
            crate::Store(inner.clone()).usage(); // shows the numbers that whoever asked looks at next
            inner.counters.compact_done.set(hard);
        }
    }
}

/// Frees one segment; `false` when none is worth it. `hard`: whatever it costs, but only segments that were begun before that frame.
async fn round(inner: &Rc<Inner>, damaged: &mut HashSet<(u16, u32)>, hard: Option<u64>) -> Result<bool, StoreError> {
    let _work = inner.in_background();
    let state = inner.partition.borrow().log_state();
    if state.read_only || inner.closing.get() {
        return Ok(false);
    }
    let candidates: Vec<(u16, u32, u64)> = {
        let segments = inner.shared.segments();
        let mine = segments.iter().filter(|((log, _), _)| log % inner.shards.get() == inner.shard.0);
        mine.filter(|((log, segment), info)| {
            // Of its own log, only what is behind the segment that frames go to now.
            let behind = state.active_segment.is_some_and(|active| *segment < active);
            let old = info.first.0 < inner.shared.boot;
            (*log != inner.shard.0 || old || behind)
                && (old || hard.is_none_or(|sequence| info.first.1 < sequence))
                && !damaged.contains(&(*log, *segment))
        })
        .map(|((log, segment), info)| (*log, *segment, info.bytes))
        .collect()
    };
    if candidates.is_empty() {
        return Ok(false);
    }
    let places: Vec<(u16, u32)> = candidates.iter().map(|(log, segment, _)| (*log, *segment)).collect();
    let mut live = vec![Live::default(); places.len()];
    for shard in inner.shards.iter() {
        match inner.request(shard, Request::Live(places.clone())).await? {
            Reply::Live(lives) => live.iter_mut().zip(lives).for_each(|(sum, one)| {
                sum.bytes += one.bytes;
                sum.records += one.records;
            }),
            other => return Err(wrong(&other)),
        }
    }
    let percent_max = match (state.full, hard) {
        (_, Some(_)) => LIVE_PERCENT_MAX_HARD,
        (true, None) => LIVE_PERCENT_MAX_FULL,
        (false, None) => LIVE_PERCENT_MAX,
    };
    let best = candidates.iter().zip(&live).min_by_key(|((_, _, bytes), live)| live.bytes * 100 / bytes.max(&1));
    let Some((&(log, segment, bytes), live)) = best else { return Ok(false) };
    if live.bytes * 100 > bytes * percent_max {
        return Ok(false);
    }
    if live.records > 0
        && let Err(error) = move_out(inner, log, segment, bytes).await
    {
        if error == StoreError::Corrupt {
            damaged.insert((log, segment));
        }
        return Err(error);
    }
    delete(inner, log, segment).await?;
    Ok(true)
}

/// Has the owners move what counts.
async fn move_out(inner: &Rc<Inner>, log: u16, segment: u32, bytes: u64) -> Result<(), StoreError> {
    let identity = SegmentIdentity { store: inner.shared.store, log, segment };
    let heads = heads(inner, identity, bytes).await?;
    let mut batches: Vec<Vec<(RecordHead, Bytes, bool)>> = inner.shards.iter().map(|_| Vec::new()).collect();
    let mut batch_bytes = 0;
    for (head, order) in heads {
        if inner.owner(&head.key) == inner.shard && !inner.partition.borrow().counts(&head) {
            continue;
        }
        let payload = if head.location.length == 0 {
            Bytes::new()
        } else {
            let result = inner.files.read_again(head.location).await;
            let payload = result.map_err(|error| StoreError::Storage(error.to_string()))?;
            // A copy gets a checksum of its own: rot must not be made to look sound.
            if identity.payload_checksum(head.location.offset.into(), &payload) != head.checksum {
                return Err(StoreError::Corrupt);
            }
            payload
        };
        batch_bytes += payload.len();
        let tombstone = matches!(head.kind, RecordKind::Unroot | RecordKind::Untag);
        let unneeded = inner.shared.nothing_older(log, segment, order) || sabotage::is_on(Sabotage::DropTombstones);
        let droppable = tombstone && unneeded;
        batches[inner.owner(&head.key).index()].push((head, payload, droppable));
        if batch_bytes >= BATCH_BYTES {
            send(inner, &mut batches).await?;
            batch_bytes = 0;
        }
    }
    send(inner, &mut batches).await
}

async fn send(inner: &Rc<Inner>, batches: &mut [Vec<(RecordHead, Bytes, bool)>]) -> Result<(), StoreError> {
    for shard in inner.shards.iter() {
        let batch = std::mem::take(&mut batches[shard.index()]);
        if batch.is_empty() {
            continue;
        }
        match inner.request(shard, Request::Move(batch)).await? {
            Reply::Move(result) => result?,
            other => return Err(wrong(&other)),
        }
    }
    Ok(())
}

/// Record heads of a segment, with the order of their frames. A segment with rot is not compacted: a repair may need it.
async fn heads(
    inner: &Rc<Inner>,
    identity: SegmentIdentity,
    bytes: u64,
) -> Result<Vec<(RecordHead, (u64, u64))>, StoreError> {
    let SegmentIdentity { log, segment, .. } = identity;
    let mut scan = SegmentScan::new(identity, bytes as u32).closed(true);
    let mut heads = Vec::new();
    loop {
        match scan.step() {
            ScanStep::Read { offset, length } => {
                let read = inner.files.read_raw(log, segment, offset, length).await;
                let read = read.map_err(|error| StoreError::Storage(error.to_string()))?;
                if read.len() < length as usize {
                    return Err(StoreError::Corrupt); // the file has lost its end
                }
                scan.supply(offset, read);
            }
            ScanStep::Frame { header, records } => {
                heads.extend(records.into_iter().map(|head| (head, (header.boot, header.sequence))));
            }
            ScanStep::Rot { .. } => return Err(StoreError::Corrupt),
            ScanStep::End { .. } => return Ok(heads),
        }
    }
}

/// Deletes a segment that nothing counts in, and lets full logs try again.
async fn delete(inner: &Rc<Inner>, log: u16, segment: u32) -> Result<(), StoreError> {
    for shard in inner.shards.iter() {
        inner.notice(shard, Notice::Forget(log, segment));
    }
    let store = inner.shared.config.path.clone();
    let foreign = log >= inner.shards.get();
    let segment_bytes = inner.shared.segment_bytes;
    let own = inner.shard.0;
    let deleted = run_blocking(move || -> std::io::Result<()> {
        let path = segment_path(&store, log, segment);
        match sabotage::is_on(Sabotage::RecycleWithoutGeneration) {
            true => fs::rename(path, spare_path(&store, log))?,
            false => fs::remove_file(path)?,
        }
        sync_folder(log_path(&store, log))?;
        if foreign {
            remove_log_if_empty(&store, log);
        }
        make_reserve(&store, own, segment_bytes)
    })
    .await;
    inner.shared.segments().remove(&(log, segment));
    deleted.map_err(|error| StoreError::Storage(error.to_string()))?;
    inner.counters.compacted_segments.increment();
    debug!(log, segment, "freed a segment");
    for shard in inner.shards.iter() {
        inner.notice(shard, Notice::SpaceFreed);
    }
    Ok(())
}
