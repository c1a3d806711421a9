//! One kind of load for a profiler to look at.

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;
use metanode_client::{BytesSource, PutOptions};

use crate::{
    Quickload, bulk, data,
    measure::{Meter, OPEN_LOOP_TICK, Report, closed_loop, open_loop},
    node::{Node, Place},
    small::{Gets, Objects, put_all},
};

/// What is done over and over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Fetch 4 KiB objects that the node has in memory
    Get4k,
    /// As `get4k`, with arrivals at random at --rate
    Open4k,
    /// Store distinct 4 KiB objects durably, until --count are stored
    Put4k,
    /// Fetch one blob of 1 GiB, from the page cache
    Get1g,
    /// Store blobs of 1 GiB
    Put1g,
    /// Fetch each of --count 4 KiB objects once, from the disk
    Cold4k,
    /// Fetch one blob of 1 GiB, from the disk
    Cold1g,
}

/// Size of the large blob.
const BULK_BYTES: u64 = 1 << 30;

pub(crate) async fn run(options: &Quickload) -> Result<Report> {
    let common = &options.common;
    let place = Place::make(common, "quickload")?;
    let mut report = Report::default();
    let mut random = data::Random::new(data::fresh_seed()?);
    let mut node = Node::start(common, &place).await?;
    let mut client = node.client().await?;
    let time = Duration::from_secs_f64(options.seconds.clamp(0.1, 3_600.0));
    let far = Instant::now() + Duration::from_secs(3_600);
    match options.kind {
        Kind::Get4k | Kind::Open4k => {
            let objects = Objects::generate(options.count, random.next());
            let (stored, _) = put_all(&client, objects, options.concurrency, far).await?;
            let gets = Gets::new(&client, &stored, random.next());
            let get = move |index| gets.clone().get(index);
            closed_loop(stored.len(), options.concurrency, far, get.clone()).await?;
            let (meter, deadline) = (begin(&node, time)?, Instant::now() + time);
            let done = match options.kind {
                Kind::Open4k => {
                    open_loop(usize::MAX, options.rate, OPEN_LOOP_TICK, deadline, random.next(), get).await?
                }
                _ => closed_loop(usize::MAX, options.concurrency, deadline, get).await?,
            };
            report.add_operations("get_4k", &done, meter.read()?);
            report.add("late_us", done.late_max.as_secs_f64() * 1e6);
            report.add("lost_packets", client.wire_counters().lost_packets as f64);
        }
        Kind::Put4k => {
            let objects = Objects::generate(options.count, random.next());
            let (meter, deadline) = (begin(&node, time)?, Instant::now() + time);
            let (_, done) = put_all(&client, objects, options.concurrency, deadline).await?;
            report.add_operations("put_4k_durable", &done, meter.read()?);
        }
        Kind::Cold4k => {
            let objects = Objects::generate(options.count, random.next());
            let (stored, _) = put_all(&client, objects, options.concurrency, far).await?;
            client.close().await;
            node.stop().await?;
            place.drop_page_cache()?;
            node = Node::start(common, &place).await?;
            client = node.client().await?;
            let gets = Gets::new(&client, &stored, random.next());
            let (meter, deadline) = (begin(&node, time)?, Instant::now() + time);
            let get = move |index| gets.clone().get(index);
            let done = closed_loop(stored.len(), options.concurrency, deadline, get).await?;
            report.add_operations("get_4k_cold", &done, meter.read()?);
        }
        Kind::Get1g | Kind::Cold1g => {
            let blob = random.bytes(BULK_BYTES as usize);
            let hash = client.put_source(&mut BytesSource(blob), Some(BULK_BYTES), PutOptions::default()).await?.hash;
            bulk::fetch(&client, hash, BULK_BYTES).await?;
            let (meter, start) = (begin(&node, time)?, Instant::now());
            let mut bytes = 0;
            while start.elapsed() < time {
                if options.kind == Kind::Cold1g {
                    place.drop_page_cache()?; // the node has its files open; clean pages go all the same
                }
                bulk::fetch(&client, hash, BULK_BYTES).await?;
                bytes += BULK_BYTES;
            }
            report.add_transfer("get_1g", bytes, start.elapsed(), meter.read()?);
        }
        Kind::Put1g => {
            let begun = Instant::now();
            while begun.elapsed() < time {
                let mut blob = BytesSource(random.bytes(BULK_BYTES as usize));
                let (meter, start) = (begin(&node, time)?, Instant::now());
                let stored = client.put_source(&mut blob, Some(BULK_BYTES), PutOptions::default()).await?;
                report.add_transfer("put_1g_durable", BULK_BYTES, start.elapsed(), meter.read()?);
                client.remove(stored.hash).await?;
            }
        }
    }
    report.add("node_hwm_mib", node.hwm_mib()?);
    client.close().await;
    node.stop().await?;
    Ok(report)
}

/// Says which processes to look at.
fn begin(node: &Node, time: Duration) -> Result<Meter> {
    eprintln!("load begins: node {}, this process {}, {:.1} s", node.pid(), std::process::id(), time.as_secs_f64());
    Meter::start(node.pid())
}
