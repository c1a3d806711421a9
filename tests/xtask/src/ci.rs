//! Everything that must hold before a commit. Steps go on after a failure, so that one run shows all that is wrong.

use std::process::{Command, Stdio};

use anyhow::Result;

use crate::{
    preflight,
    process::{Outcome, Steps, cargo, run as run_command},
    test, tidy,
};

/// Runs all steps and prints their times.
pub(crate) fn run() -> Result<()> {
    let mut steps = Steps::new();
    if !steps.step("preflight", || preflight::check(&preflight::Needs::ci()).map(|()| Outcome::Passed)) {
        return steps.finish();
    }
    steps.step("format", || command(&["fmt", "--all", "--check"], &[]));
    steps.step("tidy", || tidy::run().map(|()| Outcome::Passed));
    steps.step("clippy", || command(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[]));
    steps.step("docs", || command(&["doc", "--workspace", "--no-deps"], &[("RUSTDOCFLAGS", "-D warnings")]));
    steps.step("licences", licences);
    test::steps(&mut steps, &test::Options::default());
    steps.finish()
}

fn command(arguments: &[&str], environment: &[(&str, &str)]) -> Result<Outcome> {
    run_command(cargo(arguments).envs(environment.iter().copied()))?;
    Ok(Outcome::Passed)
}

/// deny.toml, where the tool that reads it is installed.
fn licences() -> Result<Outcome> {
    let installed = Command::new("cargo-deny").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if !installed.is_ok_and(|status| status.success()) {
        return Ok(Outcome::Skipped("cargo-deny is not installed".to_owned()));
    }
    // Advisories need a database from the network; the other checks do not.
    command(&["deny", "--workspace", "check", "licenses", "bans", "sources"], &[])
}
