//! The protocol's step function under a model checker, farther than the tests go.

use anyhow::Result;
use clap::Args;

use crate::process::{self, cargo};

/// How far.
#[derive(Args)]
pub(crate) struct Options {
    /// States of the search up to round 3, for each choice of the Byzantine validator.
    #[arg(long, default_value_t = 2_000_000)]
    states: u64,
}

/// All states up to round 1, then as many as asked for up to round 3. Prints how many there were, and whether that is all.
pub(crate) fn run(options: &Options) -> Result<()> {
    let tests =
        ["test", "--release", "-p", "metanode-ibft", "--test", "model", "--", "--include-ignored", "--nocapture"];
    process::run(cargo(tests).arg("--test-threads=1").env("IBFT_STATES", options.states.to_string()))
}
