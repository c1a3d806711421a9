//! One large blob: a durable put, gets from the page cache and from the disk.

use std::time::Instant;

use anyhow::{Result, ensure};
use metanode_client::{BytesSource, Client, FnSink, PutOptions};
use metanode_types::{ByteRange, Hash};

use crate::{
    Bulk, data,
    measure::{self, Meter, Report},
    node::{Node, Place},
    raw,
};

pub(crate) async fn run(options: &Bulk) -> Result<Report> {
    let common = &options.common;
    let place = Place::make(common, "bulk")?;
    let mut report = Report::default();
    let blob = data::Random::new(data::fresh_seed()?).bytes(options.bytes as usize);

    let node = Node::start(common, &place).await?;
    let client = node.client().await?;
    let (meter, start) = (Meter::start(node.pid())?, Instant::now());
    let stored = client.put_source(&mut BytesSource(blob), Some(options.bytes), PutOptions::default()).await?;
    report.add_transfer("put_1g_durable", options.bytes, start.elapsed(), meter.read()?);
    ensure!(!stored.existed && stored.size_bytes == options.bytes, "the node stored another blob");
    report.add("node_put_hwm_mib", node.hwm_mib()?);

    fetch(&client, stored.hash, options.bytes).await?;
    let (meter, start) = (Meter::start(node.pid())?, Instant::now());
    fetch(&client, stored.hash, options.bytes).await?;
    report.add_transfer("get_1g", options.bytes, start.elapsed(), meter.read()?);
    report.add("node_hwm_mib", node.hwm_mib()?);
    report.add("get_1g_lost_packets", client.wire_counters().lost_packets as f64);
    client.close().await;
    node.stop().await?;

    place.drop_page_cache()?;
    let node = Node::start(common, &place).await?;
    let client = node.client().await?;
    let (meter, start) = (Meter::start(node.pid())?, Instant::now());
    fetch(&client, stored.hash, options.bytes).await?;
    report.add_transfer("get_1g_cold", options.bytes, start.elapsed(), meter.read()?);
    client.close().await;
    node.stop().await?;

    place.drop_page_cache()?;
    report.add("raw_read_mbs", raw::plain_reads(place.segments()?, common.server_core).await? / 1e6);
    report.add("raw_read_deep_mbs", raw::deep_reads(place.segments()?, common.server_core).await? / 1e6);
    report.add("client_hwm_mib", measure::memory_kib(std::process::id(), "VmHWM")? / 1024.0);
    Ok(report)
}

/// Fetches the whole blob. The client verifies it; what it has verified is dropped.
pub(crate) async fn fetch(client: &Client, hash: Hash, bytes: u64) -> Result<()> {
    let mut end = 0;
    let mut sink = FnSink(|offset, data: &[u8]| end = offset + data.len() as u64);
    let fetched = client.get_range(hash, ByteRange::ALL, &mut sink).await?;
    ensure!(fetched.taken_bytes == bytes && end == bytes, "{} of {bytes} bytes came back", fetched.taken_bytes);
    Ok(())
}
