//! Runs of the load driver that check rather than measure: it kills the release node under load and looks what it has kept; it
//! moves a large file and looks what that took.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use clap::Args;

use crate::process::{self, Outcome, cargo, root, target};

/// How often.
#[derive(Args)]
pub(crate) struct CrashOptions {
    /// What to kill: `store`, one node; `consensus`, four validators at once.
    #[arg(default_value = "store", value_parser = ["store", "consensus"])]
    what: String,
    /// Kills.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// Use the binaries that are there.
    #[arg(long)]
    no_build: bool,
}

/// How large.
#[derive(Args)]
pub(crate) struct FileOptions {
    /// Size of the file in GiB; the disk needs room for three of them.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1024))]
    gib: u64,
    /// Use the binaries that are there.
    #[arg(long)]
    no_build: bool,
}

/// Runs `metanode-load crash`.
pub(crate) fn crash(options: &CrashOptions) -> ExitCode {
    let count = options.count.to_string();
    if options.what == "consensus" {
        return exit_code(crash_consensus(&count, options.no_build));
    }
    exit_code(scenario("crash", &["--count", &count], options.no_build))
}

/// The test that kills all validators, as often as asked for, on the release binary.
fn crash_consensus(count: &str, no_build: bool) -> Result<ExitCode> {
    if !no_build {
        build_release()?;
    }
    let test = "all_validators_are_killed_at_once_again_and_again";
    let tests = ["test", "-p", "metanode-e2e", "--test", "ledger", "--", "--exact", test, "--nocapture"];
    let mut command = cargo(tests);
    command.env("METANODE_KILLS", count).env("METANODE_BIN", target()?.join("release/metanode"));
    process::run(&mut command)?;
    Ok(ExitCode::SUCCESS)
}

/// Runs `metanode-load file`.
pub(crate) fn file(options: &FileOptions) -> ExitCode {
    exit_code(scenario("file", &["--bytes", &(options.gib << 30).to_string()], options.no_build))
}

/// Kills in the tests: enough to meet a start, a commit and a compaction.
const TEST_KILLS: &str = "50";

/// The same on the binaries that the tests have built.
pub(crate) fn crash_in_tests() -> Result<Outcome> {
    if std::thread::available_parallelism().is_ok_and(|cores| cores.get() < 2) {
        return Ok(Outcome::Skipped("node and client need a core each".to_owned()));
    }
    let ended = run("debug", "crash", &["--count", TEST_KILLS])?;
    Ok(if ended == ExitCode::SUCCESS { Outcome::Passed } else { Outcome::Failed })
}

fn exit_code(result: Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// Builds and runs a scenario; its exit code is this one's.
fn scenario(name: &str, arguments: &[&str], no_build: bool) -> Result<ExitCode> {
    if !no_build {
        build_release()?;
    }
    run("release", name, arguments)
}

/// Runs a scenario of the binaries in that folder of cargo's.
fn run(profile: &str, name: &str, arguments: &[&str]) -> Result<ExitCode> {
    let target = target()?;
    let binaries = target.join(profile);
    let dir = target.join(format!("{name}/{}", std::process::id()));
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut command = Command::new(binaries.join("metanode-load"));
    command.arg(name).args(arguments);
    command.arg("--metanode").arg(binaries.join("metanode")).arg("--dir").arg(&dir);
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
