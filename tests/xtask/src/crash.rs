//! Kills of the release node, by the load driver: it writes, kills, restarts, and checks what was acknowledged.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

use crate::process::{self, cargo, root, target};

/// How often.
#[derive(Args)]
pub(crate) struct Options {
    /// Kills.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// Use the binaries that are there.
    #[arg(long)]
    no_build: bool,
}

/// Builds and runs `metanode-load crash`; its exit code is this one's.
pub(crate) fn run(options: &Options) -> ExitCode {
    load(options).unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn load(options: &Options) -> Result<ExitCode> {
    if !options.no_build {
        build_release()?;
    }
    let target = target()?;
    let dir = target.join(format!("crash/{}", std::process::id()));
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut command = Command::new(target.join("release/metanode-load"));
    command.args(["crash", "--count", &options.count.to_string()]);
    command.arg("--metanode").arg(target.join("release/metanode")).arg("--dir").arg(&dir);
    eprintln!("$ {}", process::line(&command));
    let status = command.current_dir(root()).status().context("cannot run metanode-load")?;
    if status.success() {
        std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    } else {
        eprintln!("metanode-load ended with {status}; its files are kept in {}", dir.display());
    }
    // A signal has no exit code: any failure is one here.
    Ok(status.code().map_or(ExitCode::FAILURE, |code| u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)))
}

/// The release binaries of the product and of the load driver.
pub(crate) fn build_release() -> Result<()> {
    process::run(&mut cargo(["build", "--release", "-p", "metanode-cli", "-p", "metanode-bench-load", "--bins"]))
}
