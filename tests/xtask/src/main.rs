//! `cargo xtask`: what the project runs on itself.
//!
//! * [`tidy`]: the rules of the workspace (layers, who may name which crate, `unsafe`, sources, documents), each with its reason.
//! * [`test`](mod@test) and [`ci`]: the tests, and everything that must hold before a commit.
//! * [`bench`](mod@bench) with [`floors`]: the product beside its peers, in interleaved rounds, against the floors that it must keep.
//! * [`sim`]: the store on a simulated machine, seed by seed.
//! * [`model`] and [`mutants`]: every order of events in the consensus protocol, and whether tests notice each broken rule.
//! * [`fuzz`]: every decoder under libFuzzer.
//! * [`soak`] and [`load`]: many starts, many kills, one large file.
//! * [`preflight`]: what the system lacks for any of them; [`process`]: children with deadlines, timed steps.
//!
//! Nothing here is part of the product. It compiles from few dependencies, since it is the first thing that a newcomer builds.

mod bench;
mod ci;
mod floors;
mod fuzz;
mod load;
mod model;
mod mutants;
mod preflight;
mod process;
mod sim;
mod soak;
mod test;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Checks, tests and measures Metanode.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Format, tidy, clippy, docs, licences, then all tests; a table of times at the end.
    Ci,
    /// Checks the system, then runs tidy and all tests.
    Test(test::Options),
    /// The rules of the workspace; prints each breach with its reason.
    Tidy,
    /// Measures the product beside its peers and compares with the floors.
    Bench(bench::Options),
    /// Runs the store on a machine whose disk, clock and power fail, seed by seed.
    Sim(sim::Options),
    /// Explores the consensus protocol with a model checker: all states up to round 1, some millions up to round 3.
    Model(model::Options),
    /// Breaks each rule of a package on purpose and fails when no test notices.
    Mutants(mutants::Options),
    /// Searches every decoder for inputs that break it, after it has shown that it finds a planted bug.
    Fuzz(fuzz::Options),
    /// Starts and stops the release node many times, half of them under load.
    Soak(soak::Options),
    /// Kills the release node many times and checks that nothing acknowledged is lost.
    Crash(load::CrashOptions),
    /// Moves a large file in and out through the command line; fails when a process takes 256 MiB of memory.
    File(load::FileOptions),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Ci => ci::run(),
        Command::Test(options) => test::run(&options),
        Command::Tidy => tidy::run(),
        Command::Bench(options) => bench::run(&options),
        Command::Sim(options) => return sim::run(&options),
        Command::Model(options) => model::run(&options),
        Command::Mutants(options) => mutants::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Soak(options) => soak::run(&options),
        Command::Crash(options) => return load::crash(&options),
        Command::File(options) => return load::file(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
