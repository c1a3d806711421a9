//! Kills a node again and again, and checks what it had acknowledged.
//!
//! Writers work side by side, each on blobs and tags of its own, one operation at a time. So the history of each writer is a
//! plain sequence, and at a kill at most its last operation is undetermined: carried out or not, nothing between. Contents come
//! from seeds; large blobs of different writers share chunks, so that a removal by one meets references of another. [`model`]
//! holds what must be true, this file makes it happen.

mod model;

use std::{
    collections::BTreeSet,
    process::ExitCode,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use metanode_client::{BytesSource, Client, ClientError, Got, PutOptions, VecSink};
use metanode_types::{ByteRange, Hash, TagName};
use metanode_wire::RefusalCode;
use tokio::task::JoinSet;

use self::model::{BLOBS_PER_WRITER, Expected, Operation, Outcome, TAGS_PER_WRITER, WRITERS, Writer};
use crate::{
    Crash, data,
    data::{Random, derived_seed},
    measure::{Latencies, Report},
    node::{Node, Place},
};

/// Small segments, so that seconds of load fill many and compaction runs; all else is as shipped.
const CONFIG: &str = "[store]\nsegment_bytes = 8388608\n";
/// How long a node is under load before it is killed.
const LOAD_MS: std::ops::Range<u64> = 50..600;
/// A node that is killed while it starts is killed within this time, which includes recovery.
const START_KILL_US_MAX: u64 = 60_000;
/// One start in so many is killed.
const START_KILL_ONE_IN: u64 = 4;
/// One node in so many is stopped in good order instead of killed: then nothing may be lost that was ever acknowledged.
const STOP_ONE_IN: u64 = 8;
/// Entries asked for in one page of a listing.
const PAGE: u32 = 128;

/// What was checked.
#[derive(Default)]
struct Tally {
    rounds: u32,
    start_kills: u32,
    stops: u32,
    operations: u64,
    blobs_checked: u64,
    removals_checked: u64,
    tags_checked: u64,
    violations: Vec<String>,
}

type Shared = Arc<Mutex<Writer>>;

pub(crate) async fn run(options: &Crash) -> Result<(Report, ExitCode)> {
    let seed = match options.seed {
        Some(seed) => seed,
        None => data::fresh_seed()?,
    };
    eprintln!("seed {seed}");
    let mut place = Place::make(&options.common, "crash")?;
    place.configure(CONFIG)?;
    let mut tally = Tally::default();
    let mut recovery = Latencies::new();
    let ended = rounds(options, seed, &place, &mut tally, &mut recovery).await;
    if let Err(error) = ended {
        // Whatever keeps a round from its end (a node that does not start, say) is a violation like any other.
        tally.violations.push(format!("{error:#}"));
    }
    let mut report = Report::default();
    report.add("crash_rounds", tally.rounds.into());
    report.add("crash_start_kills", tally.start_kills.into());
    report.add("crash_stops", tally.stops.into());
    report.add("crash_operations", tally.operations as f64);
    report.add("crash_blobs_checked", tally.blobs_checked as f64);
    report.add("crash_removals_checked", tally.removals_checked as f64);
    report.add("crash_tags_checked", tally.tags_checked as f64);
    report.add("recovery_p50_ms", recovery.quantile_us(0.5) / 1e3);
    report.add("recovery_max_ms", recovery.max_us() / 1e3);
    report.add("violations", tally.violations.len() as f64);
    if tally.violations.is_empty() {
        return Ok((report, ExitCode::SUCCESS));
    }
    place.keep();
    for violation in &tally.violations {
        eprintln!("violation in round {}: {violation}", tally.rounds);
    }
    eprintln!("error: {} violations\nhint: --seed {seed} repeats what is written", tally.violations.len());
    Ok((report, ExitCode::FAILURE))
}

/// All rounds, or those up to the first violation: behind it, the model and the node differ anyway.
async fn rounds(options: &Crash, seed: u64, place: &Place, tally: &mut Tally, recovery: &mut Latencies) -> Result<()> {
    let common = &options.common;
    let writers: Vec<Shared> = (0..WRITERS).map(|number| Arc::new(Mutex::new(Writer::new(seed, number)))).collect();
    let mut random = Random::new(derived_seed(seed, u64::MAX));
    while tally.rounds < options.count {
        if random.below(START_KILL_ONE_IN) == 0 {
            let after = Duration::from_micros(random.below(START_KILL_US_MAX));
            Node::start_and_kill(common, place, after).await?;
            tally.start_kills += 1;
        }
        let node = Node::start(common, place).await.context("a restart failed")?;
        recovery.push(node.start_time);
        let client = node.client().await?;
        check(&client, &writers, tally).await?;
        if !tally.violations.is_empty() {
            return Ok(());
        }
        let time = Duration::from_millis(LOAD_MS.start + random.below(LOAD_MS.end - LOAD_MS.start));
        let mut tasks: JoinSet<Result<()>> =
            writers.iter().map(|writer| write(client.clone(), writer.clone())).collect();
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            // A writer ends by an error only.
            Some(ended) = tasks.join_next() => ended?.context("under load")?,
        }
        if random.below(STOP_ONE_IN) == 0 {
            node.stop().await?;
            tally.stops += 1;
            settle(&mut tasks).await;
            writers.iter().for_each(|writer| lock(writer).node_stopped());
        } else {
            node.kill()?;
            settle(&mut tasks).await;
            writers.iter().for_each(|writer| lock(writer).node_killed());
        }
        tally.rounds += 1;
        tally.operations += writers.iter().map(|writer| std::mem::take(&mut lock(writer).acknowledged)).sum::<u64>();
        if tally.rounds.is_multiple_of(20) {
            eprintln!("{} of {} rounds, {} operations", tally.rounds, options.count, tally.operations);
        }
    }
    let node = Node::start(common, place).await.context("the last restart failed")?;
    recovery.push(node.start_time);
    let client = node.client().await?;
    check(&client, &writers, tally).await?;
    client.close().await;
    node.stop().await
}

/// Ends all writers where they stand. What they had on the way stays written down in the model.
async fn settle(tasks: &mut JoinSet<Result<()>>) {
    tasks.abort_all();
    while tasks.join_next().await.is_some() {}
}

fn lock(writer: &Shared) -> MutexGuard<'_, Writer> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes, removes, tags and reads until the node goes away.
async fn write(client: Client, writer: Shared) -> Result<()> {
    loop {
        let operation = lock(&writer).begin();
        let outcome = match perform(&client, &writer, &operation).await {
            Ok(outcome) => outcome,
            // The node is on its way down; whether this was carried out shows after the restart.
            Err(ClientError::ConnectionLost(_)) => return std::future::pending().await,
            Err(ClientError::Refused(refusal)) if refusal.code == RefusalCode::ShuttingDown => {
                return std::future::pending().await;
            }
            Err(error) => bail!("{}: {error}", lock(&writer).describe(&operation)),
        };
        lock(&writer).end(outcome)?;
    }
}

async fn perform(client: &Client, writer: &Shared, operation: &Operation) -> Result<Outcome, ClientError> {
    let done = |result: Result<(), ClientError>| match result {
        Ok(()) => Ok(Outcome::Done),
        Err(error) => Ok(Outcome::Refused(refusal_of(error)?)),
    };
    match *operation {
        Operation::Put { blob, class } => {
            let content = lock(writer).content(blob);
            let size_bytes = content.len() as u64;
            let options = PutOptions { class, ..PutOptions::default() };
            let stored = client.put_source(&mut BytesSource(content), Some(size_bytes), options).await?;
            Ok(Outcome::Stored { hash: stored.hash, existed: stored.existed })
        }
        Operation::Remove { blob } => {
            let hash = lock(writer).hash(blob);
            done(client.remove(hash).await)
        }
        Operation::TagSet { tag, blob } => {
            let hash = lock(writer).hash(blob);
            let name = lock(writer).tag_name(tag);
            done(client.tag_set(&name, hash).await)
        }
        Operation::TagRemove { tag } => {
            let name = lock(writer).tag_name(tag);
            done(client.tag_remove(&name).await)
        }
        Operation::Get { blob } => {
            let hash = lock(writer).hash(blob);
            let content = lock(writer).content(blob);
            Ok(match read_back(client, hash, content.len()).await? {
                None => Outcome::Refused(RefusalCode::NotFound),
                Some(bytes) => Outcome::Read { is_equal: bytes == content },
            })
        }
    }
}

/// The code, if it says something of what was asked; other refusals are errors here.
fn refusal_of(error: ClientError) -> Result<RefusalCode, ClientError> {
    match error.refusal_code() {
        Some(code @ (RefusalCode::NotFound | RefusalCode::InUse)) => Ok(code),
        _ => Err(error),
    }
}

/// The content of a blob, or `None` when the node has none.
async fn read_back(client: &Client, hash: Hash, size_bytes: usize) -> Result<Option<Vec<u8>>, ClientError> {
    let read = match client.get_whole(hash).await {
        Ok(Got::Whole(bytes)) => Ok(bytes.to_vec()),
        Ok(Got::Large { .. }) => {
            let mut sink = VecSink { bytes: Vec::with_capacity(size_bytes), bytes_max: size_bytes as u64 };
            client.get_range(hash, ByteRange::ALL, &mut sink).await.map(|_| sink.bytes)
        }
        Err(error) => Err(error),
    };
    match read {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.refusal_code() == Some(RefusalCode::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Compares a node that has just started with the model, and settles in the model what the last kill left open.
async fn check(client: &Client, writers: &[Shared], tally: &mut Tally) -> Result<()> {
    let mut checks = JoinSet::new();
    for writer in writers {
        let (client, writer) = (client.clone(), writer.clone());
        checks.spawn(async move { check_writer(&client, &writer).await });
    }
    while let Some(checked) = checks.join_next().await {
        let Checked { blobs, removals, tags, violations } = checked??;
        tally.blobs_checked += blobs;
        tally.removals_checked += removals;
        tally.tags_checked += tags;
        tally.violations.extend(violations);
    }
    // What the node lists is what it gives, no more and no less.
    let (blobs, tags) = (listed_blobs(client).await?, listed_tags(client).await?);
    let mut expected_blobs = BTreeSet::new();
    let mut expected_tags = BTreeSet::new();
    for writer in writers {
        let writer = lock(writer);
        expected_blobs.extend(writer.present_blobs().map(|blob| writer.hash(blob)));
        expected_tags.extend(writer.set_tags().map(|(tag, blob)| (writer.tag_name(tag), writer.hash(blob))));
    }
    for hash in blobs.symmetric_difference(&expected_blobs) {
        let how = if blobs.contains(hash) { "listed, but not found" } else { "found, but not listed" };
        tally.violations.push(format!("blob {hash} is {how}"));
    }
    for (name, hash) in tags.symmetric_difference(&expected_tags) {
        tally.violations.push(format!("tag {name} at {hash} is either listed or found, but not both"));
    }
    Ok(())
}

#[derive(Default)]
struct Checked {
    blobs: u64,
    removals: u64,
    tags: u64,
    violations: Vec<String>,
}

async fn check_writer(client: &Client, writer: &Shared) -> Result<Checked> {
    let mut checked = Checked::default();
    for tag in 0..TAGS_PER_WRITER {
        let name = lock(writer).tag_name(tag);
        let found = match client.tag_get(&name).await {
            Ok(hash) => Some(hash),
            Err(error) if error.refusal_code() == Some(RefusalCode::NotFound) => None,
            Err(error) => return Err(error).with_context(|| format!("asking for tag {name}")),
        };
        checked.tags += 1;
        checked.violations.extend(lock(writer).tag_found(tag, found));
    }
    for blob in 0..BLOBS_PER_WRITER {
        let (hash, content, expected) = {
            let writer = lock(writer);
            (writer.hash(blob), writer.content(blob), writer.expected(blob))
        };
        let read = match read_back(client, hash, content.len()).await {
            Ok(read) => read,
            Err(error) => {
                checked.violations.push(format!("{}: {error}", lock(writer).describe_blob(blob)));
                continue;
            }
        };
        match expected {
            Expected::Present => checked.blobs += 1,
            Expected::Absent { was_removed } => checked.removals += u64::from(was_removed),
            Expected::Either => {}
        }
        let is_found = read.is_some();
        if read.is_some_and(|bytes| bytes != content) {
            checked.violations.push(format!("{} came back different", lock(writer).describe_blob(blob)));
        }
        checked.violations.extend(lock(writer).blob_found(blob, is_found));
        if is_found {
            let info = client.stat(hash).await?;
            let references = lock(writer).references(blob);
            let is_right = info.size_bytes == content.len() as u64 && info.held && info.references == references;
            if !is_right {
                let blob = lock(writer).describe_blob(blob);
                checked.violations.push(format!("{blob}: {info:?}, but {references} tags refer to it"));
            }
        }
    }
    Ok(checked)
}

async fn listed_blobs(client: &Client) -> Result<BTreeSet<Hash>> {
    let mut all = BTreeSet::new();
    let mut after = None;
    loop {
        let page = client.list_blobs(after, PAGE).await?;
        all.extend(page.entries.iter().map(|line| line.hash));
        after = page.entries.last().map(|line| line.hash);
        if !page.more {
            return Ok(all);
        }
    }
}

async fn listed_tags(client: &Client) -> Result<BTreeSet<(TagName, Hash)>> {
    let mut all = BTreeSet::new();
    let mut after: Option<TagName> = None;
    loop {
        let page = client.list_tags(after.as_ref(), PAGE).await?;
        after = page.entries.last().map(|(name, _)| name.clone());
        all.extend(page.entries);
        if !page.more {
            return Ok(all);
        }
    }
}
