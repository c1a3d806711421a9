//! The proxy for a server in another process. Prints its address, and runs until its standard input ends.

use std::{
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use metanode_proxy::{Conditions, Proxy};

/// A bad network on loopback.
#[derive(Parser)]
#[command(version, about)]
struct Options {
    /// The server's address
    #[arg(long, value_name = "ADDRESS")]
    server: SocketAddr,
    /// Percent of the datagrams that are lost, in each direction
    #[arg(long, default_value_t = 0.0)]
    loss: f64,
    /// Percent of the datagrams that arrive twice
    #[arg(long, default_value_t = 0.0)]
    duplication: f64,
    /// Percent of the datagrams that are cut short or have a bit changed
    #[arg(long, default_value_t = 0.0)]
    damage: f64,
    /// Milliseconds that a datagram takes, one way
    #[arg(long, default_value_t = 0.0)]
    delay_ms: f64,
    /// Up to so many more, drawn for each
    #[arg(long, default_value_t = 0.0)]
    jitter_ms: f64,
    /// Megabytes a second that the narrowest link carries [default: no limit]
    #[arg(long)]
    rate_mbs: Option<f64>,
    /// Milliseconds that a datagram may wait for that link [default: no limit]
    #[arg(long)]
    buffer_ms: Option<f64>,
    /// Largest UDP payload in bytes; 1472 is Ethernet with IPv4
    #[arg(long, default_value_t = 65_535)]
    mtu: usize,
    /// What decides about each datagram
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> Result<()> {
    let options = Options::parse();
    for percent in [options.loss, options.duplication, options.damage] {
        ensure!((0.0..=100.0).contains(&percent), "a percentage is 0 to 100");
    }
    ensure!(options.rate_mbs.is_none_or(|rate| rate > 0.0), "a rate is above 0");
    let time = |ms: f64| Duration::try_from_secs_f64(ms / 1000.0).context("a time is not negative, and not endless");
    let conditions = Conditions {
        loss: options.loss / 100.0,
        duplication: options.duplication / 100.0,
        damage: options.damage / 100.0,
        delay: time(options.delay_ms)?,
        jitter: time(options.jitter_ms)?,
        rate: options.rate_mbs.map_or(f64::INFINITY, |rate| rate * 1e6),
        buffer: options.buffer_ms.map_or(Ok(Duration::MAX), time)?,
        mtu_bytes: options.mtu,
    };
    let listen = match options.server {
        SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    let proxy = Proxy::start(listen, options.server, conditions, options.seed).context("the proxy does not start")?;
    writeln!(io::stdout(), "{}", proxy.address())?;
    io::stdin().read_to_end(&mut Vec::new())?;
    let counts = proxy.counts();
    eprintln!(
        "passed {}, lost {}, damaged {}, too large {}, overflowed {}",
        counts.passed, counts.lost, counts.damaged, counts.too_large, counts.overflowed
    );
    Ok(())
}
