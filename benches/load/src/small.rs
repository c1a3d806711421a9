//! 4 KiB objects: puts, gets from memory and from the disk, under closed and open loops.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use metanode_client::{Client, Got, PutOptions};
use metanode_types::Hash;

use crate::{
    Small, data,
    measure::{Done, Meter, OPEN_LOOP_TICK, Report, closed_loop, open_loop, paced_loop},
    node::{Node, Place},
    raw,
};

/// Size of an object.
pub(crate) const OBJECT_BYTES: usize = 4096;
/// Requests of a lone user, one each [`IDLE_GAP`].
const IDLE_COUNT: usize = 3_000;
const IDLE_GAP: Duration = Duration::from_millis(1);
/// How often each object is fetched in the closed loop: a rate over less than a second says little.
const GET_PASSES: usize = 5;
/// How long the open loop lasts.
const OPEN_TIME: Duration = Duration::from_secs(4);
/// Before the open loop, arrivals at its rate but in larger portions, which are not measured: a virtual machine whose cores go from
/// rest, or from a closed loop, to no rest at all is stopped by its host for 3 to 25 ms at a time, all cores at once (seen in the
/// gaps between a profiler's samples), and the tail would be the host's.
const WARM_UP_TIME: Duration = Duration::from_secs(4);
const WARM_UP_TICK: Duration = Duration::from_micros(500);
/// How long each raw measurement lasts. Commits are measured before and after the puts, half each.
const RAW_TIME: Duration = Duration::from_secs(2);

/// The operation that the loops call.
macro_rules! get {
    ($gets:expr) => {{
        let gets: Gets = $gets.clone();
        move |index| gets.clone().get(index)
    }};
}

pub(crate) async fn run(options: &Small) -> Result<Report> {
    let common = &options.common;
    let place = Place::make(common, "small")?;
    let mut report = Report::default();
    let seed = data::fresh_seed()?;
    let objects = Objects::generate(options.count, seed);

    let node = Node::start(common, &place).await?;
    let client = node.client().await?;
    let before = raw_commits(&place, common.server_core).await?;
    let meter = Meter::start(node.pid())?;
    let (stored, done) = put_all(&client, objects, options.concurrency, common.deadline()).await?;
    report.add_operations("put_4k_durable", &done, meter.read()?);
    let after = raw_commits(&place, common.server_core).await?;
    for ((name, before), (_, after)) in before.iter().zip(&after) {
        report.add(format!("{name}_ops"), before.per_second.midpoint(after.per_second));
        let p50_us = before.latencies.quantile_us(0.5).midpoint(after.latencies.quantile_us(0.5));
        report.add(format!("{name}_p50_us"), p50_us);
    }

    // One pass to warm up: what is measured next comes from the node's memory.
    let gets = Gets::new(&client, &stored, seed);
    closed_loop(stored.len(), options.concurrency, common.deadline(), get!(gets)).await?;
    let meter = Meter::start(node.pid())?;
    let count = GET_PASSES * stored.len();
    let done = closed_loop(count, options.concurrency, common.deadline(), get!(gets)).await?;
    report.add_operations("get_4k", &done, meter.read()?);

    let idle = paced_loop(IDLE_COUNT, IDLE_GAP, common.deadline(), get!(gets)).await?;
    report.add_latencies("get_4k_idle", &idle.latencies);

    // Around the open loop, whose tail shows it.
    let steady = raw::steady_share(common.server_core, RAW_TIME).await?;
    let rate = done.rate() / 2.0;
    let until = common.deadline().min(Instant::now() + WARM_UP_TIME);
    open_loop(usize::MAX, rate, WARM_UP_TICK, until, data::fresh_seed()?, get!(gets)).await?;
    open(&mut report, options, &node, &gets, rate).await?;
    let steady = steady.midpoint(raw::steady_share(common.server_core, RAW_TIME).await?);
    report.add("machine_steady_share", steady);
    report.add("small_node_hwm_mib", node.hwm_mib()?);
    let status = client.status().await?;
    report.add("small_shard_stalls", status.shard_stalls as f64);
    drop(gets);
    client.close().await;
    node.stop().await?;

    place.drop_page_cache()?;
    let node = Node::start(common, &place).await?;
    report.add("small_restart_ms", node.start_time.as_secs_f64() * 1e3);
    let client = node.client().await?;
    let gets = Gets::new(&client, &stored, seed.wrapping_add(1));
    let meter = Meter::start(node.pid())?;
    let done = closed_loop(stored.len(), options.concurrency, common.deadline(), get!(gets)).await?;
    report.add_operations("get_4k_cold", &done, meter.read()?);
    drop(gets);
    client.close().await;
    node.stop().await?;

    place.drop_page_cache()?;
    let reads = raw::random_reads(place.segments()?, common.server_core, RAW_TIME).await?;
    report.add("raw_read_4k_ops", reads.per_second);
    report.add("raw_read_4k_p50_us", reads.latencies.quantile_us(0.5));
    Ok(report)
}

/// Half of each raw measurement of commits.
async fn raw_commits(place: &Place, core: usize) -> Result<[(&'static str, raw::Rate); 2]> {
    let each = raw::commits(place.path(), core, raw::Append::Each, RAW_TIME / 2).await?;
    let together = raw::commits(place.path(), core, raw::Append::Together, RAW_TIME / 2).await?;
    Ok([("raw_commit", each), ("raw_commit_together", together)])
}

async fn open(report: &mut Report, options: &Small, node: &Node, gets: &Gets, rate: f64) -> Result<()> {
    let name = "get_4k_open";
    let deadline = options.common.deadline().min(Instant::now() + OPEN_TIME);
    let meter = Meter::start(node.pid())?;
    let done = open_loop(usize::MAX, rate, OPEN_LOOP_TICK, deadline, data::fresh_seed()?, get!(gets)).await?;
    let cpu = meter.read()?;
    let per_operation = 1e6 / done.count.max(1) as f64;
    report.add(format!("{name}_ops"), done.rate());
    report.add_latencies(name, &done.latencies);
    report.add(format!("{name}_max_us"), done.latencies.max_us());
    report.add(format!("{name}_late_us"), done.late_max.as_secs_f64() * 1e6);
    report.add(format!("{name}_server_us"), cpu.server.as_secs_f64() * per_operation);
    report.add(format!("{name}_client_us"), cpu.client.as_secs_f64() * per_operation);
    report.add_foreign(name, cpu);
    // An overloaded side shows here: then the latencies are those of a queue that grows.
    ensure!(done.rate() > 0.9 * rate, "an open loop of {rate:.0} operations a second got {:.0}", done.rate());
    Ok(())
}

/// Distinct random objects, one behind the other.
pub(crate) struct Objects(Bytes);

impl Objects {
    pub(crate) fn generate(count: u32, seed: u64) -> Self {
        Self(data::Random::new(seed).bytes(count as usize * OBJECT_BYTES))
    }

    fn len(&self) -> usize {
        self.0.len() / OBJECT_BYTES
    }

    fn object(&self, index: usize) -> Bytes {
        self.0.slice(index * OBJECT_BYTES..(index + 1) * OBJECT_BYTES)
    }
}

/// Puts all objects, durably, each hashed by the client on the way; returns the addresses of those that were stored in time.
pub(crate) async fn put_all(
    client: &Client,
    objects: Objects,
    concurrency: u32,
    deadline: Instant,
) -> Result<(Vec<Hash>, Done)> {
    struct Puts {
        client: Client,
        objects: Objects,
        hashes: Vec<OnceLock<Hash>>,
    }
    let count = objects.len();
    let hashes = std::iter::repeat_with(OnceLock::new).take(count).collect();
    let puts = Arc::new(Puts { client: client.clone(), objects, hashes });
    let operation = {
        let puts = puts.clone();
        move |index: usize| {
            let puts = puts.clone();
            async move {
                let stored = puts.client.put_whole(puts.objects.object(index), PutOptions::default()).await?;
                ensure!(!stored.existed, "the node had a fresh random object already");
                ensure!(puts.hashes[index].set(stored.hash).is_ok(), "an object was put twice");
                Ok(())
            }
        }
    };
    let done = closed_loop(count, concurrency, deadline, operation).await?;
    let stored: Option<Vec<Hash>> = puts.hashes[..done.count].iter().map(|hash| hash.get().copied()).collect();
    Ok((stored.context("an object was not put")?, done))
}

/// Fetches objects in random order, again and again. Clones are cheap.
#[derive(Clone)]
pub(crate) struct Gets(Arc<Getting>);

struct Getting {
    client: Client,
    order: Vec<Hash>,
}

impl Gets {
    pub(crate) fn new(client: &Client, stored: &[Hash], seed: u64) -> Self {
        let order = data::shuffled(stored.len() as u32, seed).into_iter().map(|index| stored[index as usize]).collect();
        Self(Arc::new(Getting { client: client.clone(), order }))
    }

    /// One fetch. The client verifies the hash; a mismatch is an error.
    pub(crate) async fn get(self, index: usize) -> Result<()> {
        let Getting { client, order } = &*self.0;
        match client.get_whole(order[index % order.len()]).await? {
            Got::Whole(bytes) if bytes.len() == OBJECT_BYTES => Ok(()),
            Got::Whole(bytes) => bail!("an object of {} bytes came back", bytes.len()),
            Got::Large { size_bytes } => bail!("an object came back as one of {size_bytes} bytes"),
        }
    }
}
