//! Drives real nodes in their shipped configuration and prints one flat JSON object of numbers.
//!
//! Each scenario starts `metanode start --foreground` as a child on one core, puts load on it from another core through
//! `metanode-client`, stops it and removes its files. README.md says what each number is and what keeps it honest.
//!
//! Where to start reading: [`measure`] holds the load loops, percentiles and CPU accounting, [`node`] the child, [`raw`] what
//! the disk does without a node; then one module a scenario.

mod bulk;
mod connections;
mod consensus;
mod crash;
mod data;
mod file;
mod flood;
mod measure;
mod network;
mod node;
mod overload;
mod quickload;
mod raw;
mod small;

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use measure::Report;
use tokio::signal::unix::{SignalKind, signal};

/// The allocator of the product and of the peers.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Load on real nodes; one flat JSON object of numbers on standard output.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Subcommand)]
enum Scenario {
    /// 4 KiB objects: durable puts, gets warm and cold, under closed and open loops, and what the disk can do without a node
    Small(Small),
    /// One large blob: durable put, get warm and cold, and what the disk can do without a node
    Bulk(Bulk),
    /// One large file in and out through the command line, compared, with the peak memory of each process
    File(FileOptions),
    /// Idle connections: memory of the node for each, handshakes a second, latency of others meanwhile
    Connections(Connections),
    /// One blob in and out over a bad network, by IPv4 and by IPv6
    Network(Network),
    /// A client's gets while strangers begin handshakes and streams without end; the node's memory, and what is left afterwards
    Flood(Flood),
    /// Ten times the load that the node can do: what it still does, what it refuses, the memory that it takes
    Overload(Overload),
    /// Validators of one chain: finality, and transactions a second
    Consensus(Consensus),
    /// Kill the node again and again under load; check what it had acknowledged
    Crash(Crash),
    /// One kind of load for as long as you like, for a profiler
    Quickload(Quickload),
}

/// Options of all scenarios.
#[derive(Args, Clone)]
struct Common {
    /// The program that is measured
    #[arg(long, value_name = "PATH")]
    metanode: PathBuf,
    /// The core that the node is pinned to
    #[arg(long, default_value_t = 0, value_name = "CPU")]
    server_core: usize,
    /// The core that this process is pinned to
    #[arg(long, default_value_t = 1, value_name = "CPU")]
    client_core: usize,
    /// Where a folder for the node is made, and removed at the end; on a disk, or durable figures mean nothing
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
    /// Seconds after which a timed part starts no further operation; rates are those of what was done
    #[arg(long, default_value_t = 10.0, value_name = "SECONDS")]
    seconds_max: f64,
}

#[derive(Args)]
struct Small {
    #[command(flatten)]
    common: Common,
    /// Distinct objects
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(64..=1_000_000))]
    count: u32,
    /// Operations on the way at once in closed loops
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    concurrency: u32,
}

#[derive(Args)]
struct Bulk {
    #[command(flatten)]
    common: Common,
    /// Size of the blob
    #[arg(long, default_value_t = 1 << 30, value_parser = clap::value_parser!(u64).range(1 << 20..=4 << 30))]
    bytes: u64,
}

#[derive(Args)]
struct FileOptions {
    #[command(flatten)]
    common: Common,
    /// Size of the file
    #[arg(long, default_value_t = 5 << 30, value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    bytes: u64,
}

#[derive(Args)]
struct Connections {
    #[command(flatten)]
    common: Common,
    /// Connections
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// Handshakes on the way at once
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    concurrency: u32,
}

#[derive(Args)]
struct Network {
    #[command(flatten)]
    common: Common,
    /// The program `metanode-proxy`
    #[arg(long, value_name = "PATH")]
    proxy: PathBuf,
    /// Size of the blob
    #[arg(long, default_value_t = 256 << 20, value_parser = clap::value_parser!(u64).range(1 << 20..=4 << 30))]
    bytes: u64,
    /// Percent of the datagrams that are lost, in each direction
    #[arg(long, default_value_t = 1.0)]
    loss: f64,
    /// Milliseconds that a datagram takes, one way
    #[arg(long, default_value_t = 25.0)]
    delay_ms: f64,
    /// Megabytes a second that the narrowest link carries [default: no limit]
    #[arg(long)]
    rate_mbs: Option<f64>,
    /// Milliseconds that a datagram may wait for that link [default: no limit]
    #[arg(long)]
    buffer_ms: Option<f64>,
    /// Largest UDP payload that the path carries: Ethernet, IP and UDP
    #[arg(long, default_value_t = 1472)]
    mtu: usize,
}

#[derive(Args)]
struct Flood {
    #[command(flatten)]
    common: Common,
    /// Half-open handshakes
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    half_open: u32,
}

#[derive(Args)]
struct Overload {
    #[command(flatten)]
    common: Common,
    /// Distinct objects; together much more than the node's memory cache
    #[arg(long, default_value_t = 400_000, value_parser = clap::value_parser!(u32).range(64..=1_000_000))]
    count: u32,
    /// Size of an object
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=256 << 10))]
    object_bytes: u32,
    /// Seconds of the overload
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// Seconds in which the node's best is measured before
    #[arg(long, default_value_t = 20.0)]
    best_seconds: f64,
    /// How many times that best is asked for
    #[arg(long, default_value_t = 10.0)]
    times: f64,
}

#[derive(Args)]
struct Consensus {
    #[command(flatten)]
    common: Common,
    /// Seconds of empty blocks
    #[arg(long, default_value_t = 15.0)]
    empty_seconds: f64,
    /// Seconds in which it is looked how many signed transactions are taken at most
    #[arg(long, default_value_t = 8.0)]
    find_seconds: f64,
    /// Seconds of the open loop of signed transactions
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// The part of that most that the open loop offers [default: 0.9]
    #[arg(long)]
    offered_share: Option<f64>,
    /// Seconds of opaque transactions
    #[arg(long, default_value_t = 20.0)]
    opaque_seconds: f64,
    /// Seven validators too
    #[arg(long)]
    seven: bool,
}

#[derive(Args)]
struct Crash {
    #[command(flatten)]
    common: Common,
    /// Kills
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// What is written, and when the node is killed; printed, so that a run can be repeated [default: random]
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Args)]
struct Quickload {
    /// What to do over and over
    #[arg(value_enum)]
    kind: quickload::Kind,
    #[command(flatten)]
    common: Common,
    /// For how long
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Distinct small objects
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(64..=1_000_000))]
    count: u32,
    /// Operations on the way at once
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    concurrency: u32,
    /// Arrivals a second, on average, of an open loop
    #[arg(long, default_value_t = 100_000.0)]
    rate: f64,
}

impl Common {
    /// The moment when a timed part that begins now starts no further operation.
    fn deadline(&self) -> Instant {
        Instant::now() + Duration::from_secs_f64(self.seconds_max.clamp(0.1, 120.0))
    }
}

impl Scenario {
    fn common(&self) -> &Common {
        match self {
            Self::Small(Small { common, .. })
            | Self::Bulk(Bulk { common, .. })
            | Self::File(FileOptions { common, .. })
            | Self::Connections(Connections { common, .. })
            | Self::Network(Network { common, .. })
            | Self::Flood(Flood { common, .. })
            | Self::Overload(Overload { common, .. })
            | Self::Consensus(Consensus { common, .. })
            | Self::Crash(Crash { common, .. })
            | Self::Quickload(Quickload { common, .. }) => common,
        }
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse().scenario) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(scenario: &Scenario) -> Result<ExitCode> {
    let common = scenario.common();
    ensure!(common.server_core != common.client_core, "node and client need a core each\nhint: see --server-core");
    ensure!(
        common.metanode.is_file(),
        "{} is not a program\nhint: cargo build --release -p metanode-cli",
        common.metanode.display()
    );
    // Before any thread starts: threads inherit the affinity. Validators are pinned by themselves, and share all cores with the load.
    if !matches!(scenario, Scenario::Consensus(_)) {
        measure::pin(common.client_core)?;
    }
    // One thread: with one core, a second one only adds wake-ups between threads.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("no runtime")?;
    let outcome = runtime.block_on(async {
        // Boxed: the scenarios' futures hold whole load loops. Dropping one kills its node and removes its files.
        let mut measured = Box::pin(perform(scenario));
        tokio::select! {
            outcome = &mut measured => outcome,
            () = terminated() => bail!("interrupted"),
        }
    });
    runtime.shutdown_background();
    let (report, code) = outcome?;
    println!("{}", report.to_json());
    Ok(code)
}

async fn perform(scenario: &Scenario) -> Result<(Report, ExitCode)> {
    match scenario {
        Scenario::Small(options) => Ok((small::run(options).await?, ExitCode::SUCCESS)),
        Scenario::Bulk(options) => Ok((bulk::run(options).await?, ExitCode::SUCCESS)),
        Scenario::File(options) => Ok((file::run(options).await?, ExitCode::SUCCESS)),
        Scenario::Connections(options) => Ok((connections::run(options).await?, ExitCode::SUCCESS)),
        Scenario::Network(options) => Ok((network::run(options).await?, ExitCode::SUCCESS)),
        Scenario::Flood(options) => Ok((flood::run(options).await?, ExitCode::SUCCESS)),
        Scenario::Overload(options) => Ok((overload::run(options).await?, ExitCode::SUCCESS)),
        Scenario::Consensus(options) => Ok((consensus::run(options).await?, ExitCode::SUCCESS)),
        Scenario::Crash(options) => crash::run(options).await,
        Scenario::Quickload(options) => Ok((quickload::run(options).await?, ExitCode::SUCCESS)),
    }
}

/// Returns when SIGTERM or SIGINT arrives.
async fn terminated() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_lines_of_xtask_parse() {
        Cli::command().debug_assert();
        for line in [
            "metanode-load small --metanode /m --server-core 0 --client-core 1 --dir /tmp/x",
            "metanode-load bulk --metanode /m --server-core 0 --client-core 1 --dir /tmp/x",
            "metanode-load connections --metanode /m --server-core 0 --client-core 1 --dir /tmp/x",
            "metanode-load network --proxy /p --metanode /m --server-core 0 --client-core 1 --dir /tmp/x",
            "metanode-load flood --metanode /m --server-core 0 --client-core 1 --dir /tmp/x",
            "metanode-load overload --metanode /m --server-core 0 --client-core 1 --dir /tmp/x",
            "metanode-load consensus --seven --metanode /m --server-core 0 --client-core 1 --dir /tmp/x",
            "metanode-load crash --count 100 --metanode /m --dir /tmp/x",
            "metanode-load quickload get4k --metanode /m --seconds 5",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
    }
}
