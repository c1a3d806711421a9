//! Peers that `cargo xtask bench relay` measures beside Metanode: iroh-blobs (memory and file store) and plain quinn.
//!
//! `metanode-peers run PEER` starts `metanode-peers serve PEER` as a child on one core, drives the load from another
//! core and prints one flat JSON object of numbers on stdout. README.md says what each number is and why it is fair.
//!
//! Where to start reading: [`measure`] holds the load loops and CPU accounting, [`iroh`] and [`quinn`] one peer each,
//! [`child`] the server process and the lines exchanged with it, [`tls`] the cryptography that all peers share.

#![forbid(unsafe_code)]

mod child;
mod iroh;
mod measure;
mod quinn;
mod tls;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use measure::Report;
use tokio::runtime::Runtime;

/// Every peer uses the product's allocator: none is slower with it.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The longest that one `run` may take, whatever its options say.
const RUN_TIME_MAX: Duration = Duration::from_secs(180);

/// Peers measured beside Metanode.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve one peer on loopback until stdin closes or a signal arrives; the first line on stdout says how to reach it.
    Serve(Serve),
    /// Start a server, measure it, print one JSON object of numbers.
    Run(Run),
}

/// What is measured.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// iroh-blobs with its memory store.
    IrohMem,
    /// iroh-blobs with its file store.
    IrohFs,
    /// quinn on tokio, no store.
    Quinn,
    /// The same over a bad network.
    QuinnLossy,
}

impl Peer {
    /// The name that the command line knows this peer by.
    fn name(self) -> &'static str {
        match self {
            Self::IrohMem => "iroh-mem",
            Self::IrohFs => "iroh-fs",
            Self::Quinn => "quinn",
            Self::QuinnLossy => "quinn-lossy",
        }
    }
}

#[derive(Args)]
struct Serve {
    peer: Peer,
    /// The core that every thread of this process is pinned to.
    #[arg(long, default_value_t = 0)]
    core: usize,
    /// Where the file store makes a folder of its own, removed at the end.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
}

/// A run's options: what bounds the load and where it runs.
#[derive(Args, Clone)]
struct Run {
    peer: Peer,
    /// The core that the server is pinned to.
    #[arg(long, default_value_t = 0)]
    server_core: usize,
    /// The core that this process, the client, is pinned to.
    #[arg(long, default_value_t = 1)]
    client_core: usize,
    /// Distinct 4 KiB objects, and so operations, in each timed part at most.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    count: u32,
    /// Operations in flight.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    concurrency: u32,
    /// Size of the large object.
    #[arg(long, default_value_t = 1 << 30, value_parser = clap::value_parser!(u64).range(1 << 20..=4 << 30))]
    bytes: u64,
    /// The program `metanode-proxy`, for the peer that wants a bad network
    #[arg(long, value_name = "PATH")]
    proxy: Option<PathBuf>,
    /// Percent of the datagrams that it loses, in each direction
    #[arg(long, default_value_t = 1.0)]
    loss: f64,
    /// Milliseconds that a datagram takes through it, one way
    #[arg(long, default_value_t = 25.0)]
    delay_ms: f64,
    /// Largest UDP payload that it carries: Ethernet, IP and UDP
    #[arg(long, default_value_t = 1472)]
    mtu: usize,
    /// Seconds after which a timed part starts no further operation; the rate is that of what was done. The upload of
    /// the large object is one operation and runs to its end.
    #[arg(long, default_value_t = 3.0)]
    seconds_max: f64,
    /// Where the file store makes a folder of its own, removed at the end.
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
}

impl Run {
    /// The moment when a timed part that begins now starts no further operation.
    fn deadline(&self) -> std::time::Instant {
        std::time::Instant::now() + Duration::from_secs_f64(self.seconds_max.clamp(0.1, 60.0))
    }
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Serve(options) => serve(&options),
        Command::Run(options) => run(&options),
    }
}

/// Both ends run on one thread: with one core each, a second thread only adds wake-ups between threads.
fn runtime() -> Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")
}

fn serve(options: &Serve) -> Result<()> {
    measure::pin(options.core)?; // before any thread starts: threads inherit the affinity
    let runtime = runtime()?;
    let served = runtime.block_on(async {
        let commands = child::Commands::from_stdin()?;
        match options.peer {
            Peer::IrohMem => iroh::serve_memory(commands).await,
            Peer::IrohFs => iroh::serve_files(commands, &options.dir).await,
            Peer::Quinn | Peer::QuinnLossy => quinn::serve(commands).await,
        }
    });
    runtime.shutdown_background();
    served
}

fn run(options: &Run) -> Result<()> {
    measure::pin(options.client_core)?;
    let runtime = runtime()?;
    let report = runtime.block_on(async {
        let measured = async {
            match options.peer {
                Peer::IrohMem => iroh::run(options, "iroh").await,
                Peer::IrohFs => iroh::run(options, "iroh_fs").await,
                Peer::Quinn => quinn::run(options).await,
                Peer::QuinnLossy => quinn::run_lossy(options).await,
            }
        };
        // Dropping the run drops the server's handle, which kills it, and the temporary folder.
        tokio::select! {
            report = tokio::time::timeout(RUN_TIME_MAX, measured) => report.context("the run took too long")?,
            () = child::terminated() => bail!("interrupted"),
        }
    });
    runtime.shutdown_background();
    let report: Report = report?;
    println!("{}", report.to_json());
    Ok(())
}
