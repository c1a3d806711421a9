//! Seeds of the simulations, by the release build of `tests/sim`.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

use crate::process::{self, cargo, root, target};

/// Which seeds.
#[derive(Args)]
pub(crate) struct Options {
    /// The first seed; alone, it is run twice and its trace's hash is printed.
    #[arg(long)]
    seed: Option<u64>,
    /// Seeds [default: 500].
    #[arg(long)]
    count: Option<u64>,
    /// One kind: `store` or `remote` [default: both].
    #[arg(long)]
    only: Option<String>,
    /// A rule to break on purpose.
    #[arg(long)]
    sabotage: Option<String>,
    /// Print the trace of each seed of many.
    #[arg(long)]
    traces: bool,
    /// Print what the store logs.
    #[arg(long)]
    log: bool,
}

/// Builds and runs it; its exit code is this one's.
pub(crate) fn run(options: &Options) -> ExitCode {
    let ended = start(options);
    ended.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn start(options: &Options) -> Result<ExitCode> {
    process::run(&mut cargo(["build", "--release", "-p", "metanode-sim"]))?;
    let mut command = Command::new(target()?.join("release/metanode-sim"));
    for (flag, number) in [("--seed", options.seed), ("--count", options.count)] {
        if let Some(number) = number {
            command.args([flag, &number.to_string()]);
        }
    }
    for (flag, text) in [("--only", &options.only), ("--sabotage", &options.sabotage)] {
        if let Some(text) = text {
            command.args([flag, text]);
        }
    }
    for (flag, on) in [("--traces", options.traces), ("--log", options.log)] {
        if on {
            command.arg(flag);
        }
    }
    eprintln!("$ {}", process::line(&command));
    let status = command.current_dir(root()).status().context("cannot run metanode-sim")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
