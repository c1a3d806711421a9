//! One blob in and out over a bad network: the proxy of `tests/proxy`, as a process of its own.

use std::{
    io::{BufRead as _, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    process::{Child, Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use metanode_client::{BytesSource, PutOptions};

use crate::{
    Network, bulk, data,
    measure::{Meter, Report},
    node::{Node, Place},
};

pub(crate) async fn run(options: &Network) -> Result<Report> {
    let mut report = Report::default();
    measure(options, Ipv4Addr::LOCALHOST.into(), "lossy", &mut report).await?;
    measure(options, Ipv6Addr::LOCALHOST.into(), "lossy6", &mut report).await?;
    Ok(report)
}

/// A put and a get of fresh bytes through a proxy of the node's family.
async fn measure(options: &Network, ip: IpAddr, name: &str, report: &mut Report) -> Result<()> {
    let common = &options.common;
    let place = Place::make(common, "network")?;
    let blob = data::Random::new(data::fresh_seed()?).bytes(options.bytes as usize);
    let node = Node::start_at(common, &place, (ip, 0).into()).await?;
    let proxy = Proxy::start(options, node.address())?;
    let client = node.client_at(proxy.address).await?;

    let (meter, start) = (Meter::start(node.pid())?, Instant::now());
    let stored = client.put_source(&mut BytesSource(blob), Some(options.bytes), PutOptions::default()).await?;
    report.add_transfer(&format!("{name}_put"), options.bytes, start.elapsed(), meter.read()?);
    let before = client.wire_counters();
    report.add(format!("{name}_put_wire_share"), before.sent_bytes as f64 / options.bytes as f64);
    ensure!(!stored.existed && stored.size_bytes == options.bytes, "the node stored another blob");

    let (meter, start) = (Meter::start(node.pid())?, Instant::now());
    bulk::fetch(&client, stored.hash, options.bytes).await?;
    report.add_transfer(&format!("{name}_get"), options.bytes, start.elapsed(), meter.read()?);
    let received = client.wire_counters().received_bytes - before.received_bytes;
    report.add(format!("{name}_get_wire_share"), received as f64 / options.bytes as f64);
    client.close().await;
    drop(proxy);
    node.stop().await
}

/// The proxy's process. Dropping it ends it.
struct Proxy {
    child: Child,
    address: SocketAddr,
}

impl Proxy {
    /// On this process's core: a path this bad keeps nobody busy.
    fn start(options: &Network, server: SocketAddr) -> Result<Self> {
        let program: &Path = &options.proxy;
        let mut command = Command::new(program);
        command.args(["--server", &server.to_string(), "--loss", &options.loss.to_string()]);
        command.args(["--delay-ms", &options.delay_ms.to_string(), "--mtu", &options.mtu.to_string()]);
        for (name, value) in [("--rate-mbs", options.rate_mbs), ("--buffer-ms", options.buffer_ms)] {
            if let Some(value) = value {
                command.args([name, &value.to_string()]);
            }
        }
        command.args(["--seed", &data::fresh_seed()?.to_string()]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("the proxy has no stdout")?).read_line(&mut line)?;
        let address = line.trim().parse().with_context(|| format!("the proxy said {line:?}"))?;
        Ok(Self { child, address })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.child.stdin.take()); // it ends with its input
        if let Err(error) = self.child.wait() {
            eprintln!("the proxy: {error}");
        }
    }
}
