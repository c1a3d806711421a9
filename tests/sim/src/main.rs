//! Runs seeds, or one seed to look at.

use std::{
    process::ExitCode,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use clap::Parser;
use metanode_sim::{Report, run};
use metanode_types::sabotage::Sabotage;

/// The store on a machine whose disk, clock and power fail, seed by seed
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
    /// Print what the store logs, and what becomes of each opening
    #[arg(long)]
    log: bool,
    /// Threads [default: one a core]
    #[arg(long)]
    threads: Option<usize>,
}

fn parse_sabotage(name: &str) -> Result<Sabotage, String> {
    let all = Sabotage::ALL.map(|sabotage| format!("{sabotage:?}"));
    let found = Sabotage::ALL.into_iter().find(|sabotage| format!("{sabotage:?}").eq_ignore_ascii_case(name));
    found.ok_or_else(|| format!("one of {}", all.join(", ")))
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.log {
        let filter = tracing_subscriber::filter::LevelFilter::TRACE;
        tracing_subscriber::fmt().with_max_level(filter).without_time().with_writer(std::io::stderr).init();
    }
    if let (Some(seed), None) = (options.seed, options.count) {
        return one(seed, options.sabotage);
    }
    many(&options)
}

fn one(seed: u64, sabotage: Option<Sabotage>) -> ExitCode {
    let report = run(seed, sabotage);
    println!("{:#?}\n{report:#?}", metanode_sim::plan::Plan::of(seed));
    let again = run(seed, sabotage);
    println!("seed {seed}: trace {:016x}, again {:016x}", report.trace, again.trace);
    if report != again {
        println!("two runs of one seed differ");
    }
    if report.violations.is_empty() && report == again { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn many(options: &Options) -> ExitCode {
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
                    let report = run(seed, options.sabotage);
                    let mut totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
                    totals.0 += report.openings as u64;
                    totals.1 += report.cuts as u64;
                    totals.2 += report.answered;
                    totals.3 += report.disk_changes;
                    // In any order of seeds the same.
                    totals.4 ^= report.trace.rotate_left((seed % 64) as u32);
                    if let Some(violation) = report.violations.first() {
                        println!("seed {seed}: {violation}");
                        totals.5.push(report);
                    }
                }
            });
        }
    });
    let totals = totals.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (openings, cuts, answered, changes, trace, failed) = totals;
    println!(
        "{count} seeds from {first}: {openings} openings, {cuts} power cuts, {answered} operations, {changes} changes of disks, \
         {} failed; traces {trace:016x}; {:.1} s",
        failed.len(),
        begun.elapsed().as_secs_f64()
    );
    if let Some(report) = failed.first() {
        println!("repeat one with: cargo xtask sim --seed {}", report.seed);
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
