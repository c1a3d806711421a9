//! All tests of the workspace, after a look at the system and at the workspace's rules.

use anyhow::Result;
use clap::Args;

use crate::{
    load, preflight,
    process::{Outcome, Steps, cargo, run as run_command, target},
    tidy,
};

/// What is tested.
#[derive(Args, Default)]
pub(crate) struct Options {
    /// Only tests whose name contains this.
    filter: Option<String>,
    /// Only the end to end tests of transfers and disks, with the sizes of real use: 2 GiB that are cut in the middle, 1,000 ranges of 1 GiB, a full
    /// file system of 1 GiB over 20 kills. Takes minutes, 12 GiB of disk and 12 GiB of memory.
    #[arg(long)]
    large: bool,
    /// For the test harness: `-- --nocapture`.
    #[arg(last = true)]
    harness: Vec<String>,
}

/// Preflight, tidy, tests; prints their times.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut steps = Steps::new();
    if !steps.step("preflight", || preflight::check(&preflight::Needs::test()).map(|()| Outcome::Passed)) {
        return steps.finish();
    }
    steps.step("tidy", || tidy::run().map(|()| Outcome::Passed));
    self::steps(&mut steps, options);
    steps.finish()
}

/// Builds the binaries, then runs unit, integration, end to end and doc tests.
///
/// Binaries and tests are built by one command over the whole workspace: `-p metanode-cli` would unify features differently and
/// compile the tree a second time. The end to end tests find the binary by `METANODE_BIN`.
pub(crate) fn steps(steps: &mut Steps, options: &Options) {
    let built = steps.step("build", || {
        run_command(&mut cargo(["build", "--workspace", "--bins", "--tests"]))?;
        Ok(Outcome::Passed)
    });
    if !built {
        return steps.skip("tests", "the build failed");
    }
    steps.step("tests", || {
        let binary = target()?.join("debug/metanode");
        let mut command = cargo(["test", "--workspace"]);
        if options.large {
            command.args(["--test", "resume", "--test", "ranges", "--test", "disk"]).env("METANODE_LARGE", "1");
        }
        command.args(&options.filter).arg("--").args(&options.harness).env("METANODE_BIN", binary);
        run_command(&mut command)?;
        Ok(Outcome::Passed)
    });
    if options.filter.is_none() && !options.large {
        steps.step("crash", load::crash_in_tests);
    }
}
