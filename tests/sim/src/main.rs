//! Runs seeds, or one seed to look at.

use std::{
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use clap::{Parser, ValueEnum};
use metanode_sim::{Report, remote, run};
use metanode_types::sabotage::Sabotage;

/// Simulations, seed by seed: the store on a failing machine, a node and its users over a failing network
#[derive(Parser)]
#[command(version)]
struct Options {
    /// One seed: run twice, its trace's hash printed
    #[arg(long)]
    seed: Option<u64>,
    /// Seeds to run, from 0 on, or from --seed on
    #[arg(long)]
    count: Option<u64>,
    /// Break a rule on purpose, by its name in `metanode_types::sabotage`
    #[arg(long, value_parser = parse_sabotage)]
    sabotage: Option<Sabotage>,
    /// One kind of simulation [default: both]
    #[arg(long)]
    only: Option<Kind>,
    /// Print what the store logs, and what becomes of each opening
    #[arg(long)]
    log: bool,
    /// Print the trace of each seed of many, to find one that two runs see differently
    #[arg(long)]
    traces: bool,
    /// Threads [default: one a core]
    #[arg(long)]
    threads: Option<usize>,
}

fn parse_sabotage(name: &str) -> Result<Sabotage, String> {
    let all = Sabotage::STORE.map(|sabotage| format!("{sabotage:?}"));
    let found = Sabotage::STORE.into_iter().find(|sabotage| format!("{sabotage:?}").eq_ignore_ascii_case(name));
    found.ok_or_else(|| format!("one of {}", all.join(", ")))
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.log {
        let filter = tracing_subscriber::filter::LevelFilter::TRACE;
        tracing_subscriber::fmt().with_max_level(filter).without_time().with_writer(std::io::stderr).init();
    }
    let mut code = ExitCode::SUCCESS;
    for kind in Kind::ALL.into_iter().filter(|kind| options.only.is_none_or(|only| only == *kind)) {
        let passed = match (options.seed, options.count) {
            (Some(seed), None) => one(kind, seed, options.sabotage),
            _ => many(kind, &options),
        };
        if !passed {
            code = ExitCode::FAILURE;
        }
    }
    code
}

/// What is simulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// The store on a machine whose disk, clock and power fail
    Store,
    /// A node and its users over a network that fails too
    Remote,
}

impl Kind {
    const ALL: [Self; 2] = [Self::Store, Self::Remote];

    fn name(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::Remote => "remote",
        }
    }

    fn run(self, seed: u64, broken: Option<Sabotage>) -> Report {
        match self {
            Self::Store => run(seed, broken),
            Self::Remote => remote::run(seed, broken),
        }
    }

    fn plan(self, seed: u64) -> String {
        match self {
            Self::Store => format!("{:#?}", metanode_sim::plan::Plan::of(seed)),
            Self::Remote => format!("{:#?}", remote::Plan::of(seed)),
        }
    }
}

fn one(kind: Kind, seed: u64, broken: Option<Sabotage>) -> bool {
    let report = kind.run(seed, broken);
    println!(
        "{}
{report:#?}",
        kind.plan(seed)
    );
    let again = kind.run(seed, broken);
    println!("{} seed {seed}: trace {:016x}, again {:016x}", kind.name(), report.trace, again.trace);
    if report != again {
        println!("two runs of one seed differ");
    }
    report.violations.is_empty() && report == again
}

fn many(kind: Kind, options: &Options) -> bool {
    let first = options.seed.unwrap_or(0);
    let count = options.count.unwrap_or(500);
    let threads = options.threads.or_else(|| std::thread::available_parallelism().ok().map(usize::from)).unwrap_or(1);
    let next = AtomicU64::new(first);
    let totals = Mutex::new((0u64, 0u64, 0u64, 0u64, 0u64, Vec::<Report>::new()));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    let report = kind.run(seed, options.sabotage);
                    let mut totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
                    if options.traces {
                        println!("{} seed {seed}: trace {:016x}", kind.name(), report.trace);
                    }
                    totals.0 += report.openings as u64;
                    totals.1 += report.cuts as u64;
                    totals.2 += report.answered;
                    totals.3 += report.disk_changes;
                    // In any order of seeds the same.
                    totals.4 ^= report.trace.rotate_left((seed % 64) as u32);
                    if let Some(violation) = report.violations.first() {
                        println!("{} seed {seed}: {violation}", kind.name());
                        totals.5.push(report);
                    }
                }
            });
        }
    });
    let totals = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (openings, cuts, answered, changes, trace, failed) = totals;
    println!(
        "{}: {count} seeds from {first}: {openings} openings, {cuts} power cuts, {answered} operations, {changes} changes of disks, \
         {} failed; traces {trace:016x}; {:.1} s",
        kind.name(),
        failed.len(),
        begun.elapsed().as_secs_f64()
    );
    if let Some(report) = failed.first() {
        println!("repeat one with: cargo xtask sim --only {} --seed {}", kind.name(), report.seed);
    }
    failed.is_empty()
}
