//! Children with deadlines, and timed steps with a table at the end.

use std::{
    ffi::OsStr,
    io::Read,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::LazyLock,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};

/// How often a child is asked whether it has ended.
const POLL: Duration = Duration::from_millis(5);
/// How long a child may take to end after SIGTERM before it is killed.
const TERM_TIME_MAX: Duration = Duration::from_secs(5);
/// Most bytes taken from a child's stdout.
const OUTPUT_BYTES_MAX: u64 = 16 << 20;

/// The workspace's root.
pub(crate) fn root() -> &'static Path {
    static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let root = Path::new(&manifest).join("../..");
        root.canonicalize().unwrap_or(root)
    });
    &ROOT
}

/// Where cargo puts what it builds, `CARGO_TARGET_DIR` and configuration included.
pub(crate) fn target() -> Result<PathBuf> {
    let metadata = cargo_metadata::MetadataCommand::new()
        .manifest_path(root().join("Cargo.toml"))
        .no_deps()
        .exec()
        .context("cargo metadata")?;
    Ok(metadata.target_directory.into_std_path_buf())
}

/// The cargo that runs this, in the workspace's root.
pub(crate) fn cargo<I: IntoIterator<Item = A>, A: AsRef<OsStr>>(arguments: I) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    // What `cargo run` told this process about its own package is none of the next package's business.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")) {
            command.env_remove(name);
        }
    }
    command
}

/// A command as one would type it.
pub(crate) fn line(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or(command.get_program());
    let words = std::iter::once(name).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Runs a command to its end with the terminal's streams; an error names it.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    eprintln!("$ {}", line(command));
    let status = command.status().with_context(|| format!("cannot run {}", line(command)))?;
    if !status.success() {
        bail!("`{}` ended with {status}", line(command));
    }
    Ok(())
}

/// Runs a command and returns its stdout without the last line break.
pub(crate) fn text(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output().with_context(|| format!("cannot run {}", line(command)))?;
    if !output.status.success() {
        bail!("`{}` ended with {}", line(command), output.status);
    }
    Ok(String::from_utf8(output.stdout)
        .with_context(|| format!("stdout of `{}`", line(command)))?
        .trim_end()
        .to_owned())
}

/// Runs a command for at most `time_max` and returns its stdout; stderr is the terminal's.
pub(crate) fn stdout_within(command: &mut Command, time_max: Duration) -> Result<Vec<u8>> {
    let name = line(command);
    let mut child = Guard(
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run {name}"))?,
    );
    let stdout = child.0.stdout.take().expect("stdout is piped");
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        stdout.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes).map(|_| bytes)
    });
    let Some(status) = wait_until(&mut child.0, Instant::now() + time_max)? else {
        child.end();
        bail!("`{name}` did not end within {} s", time_max.as_secs());
    };
    let bytes = reader.join().map_err(|_| anyhow!("the reader of `{name}` panicked"))??;
    if !status.success() {
        bail!("`{name}` ended with {status}");
    }
    Ok(bytes)
}

/// The child's exit status, or `None` at the deadline.
pub(crate) fn wait_until(child: &mut Child, deadline: Instant) -> Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for a child")? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

/// A child that does not outlive the value.
pub(crate) struct Guard(pub(crate) Child);

impl Guard {
    /// Asks it to end, then kills it. It gets the time to end its own children.
    pub(crate) fn end(&mut self) {
        self.end_within(TERM_TIME_MAX);
    }

    fn end_within(&mut self, time_max: Duration) {
        if matches!(self.0.try_wait(), Ok(Some(_))) {
            return;
        }
        let _ = rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), rustix::process::Signal::TERM);
        if !matches!(wait_until(&mut self.0, Instant::now() + time_max), Ok(Some(_))) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.end();
    }
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It did what it says.
    Passed,
    /// It was not run, for this reason.
    Skipped(String),
    /// It failed; the reason was printed when it did.
    Failed,
}

/// Steps with their times.
pub(crate) struct Steps {
    start: Instant,
    done: Vec<(&'static str, Duration, Outcome)>,
}

impl Steps {
    /// None yet; the clock of the total starts.
    pub(crate) fn new() -> Self {
        Self { start: Instant::now(), done: Vec::new() }
    }

    /// Runs a step. A failure is printed and remembered, so that later steps can say what else is wrong.
    pub(crate) fn step(&mut self, name: &'static str, step: impl FnOnce() -> Result<Outcome>) -> bool {
        eprintln!("== {name}");
        let start = Instant::now();
        let outcome = step().unwrap_or_else(|error| {
            eprintln!("error: {name}: {error:#}");
            Outcome::Failed
        });
        let passed = outcome != Outcome::Failed;
        self.done.push((name, start.elapsed(), outcome));
        passed
    }

    /// Notes a step that is not run.
    pub(crate) fn skip(&mut self, name: &'static str, reason: &str) {
        self.done.push((name, Duration::ZERO, Outcome::Skipped(reason.to_owned())));
    }

    /// Prints the table; an error names what failed.
    pub(crate) fn finish(self) -> Result<()> {
        println!("{}", self.table());
        let failed: Vec<_> =
            self.done.iter().filter(|(_, _, end)| *end == Outcome::Failed).map(|(name, ..)| *name).collect();
        if !failed.is_empty() {
            bail!("failed: {}", failed.join(", "));
        }
        Ok(())
    }

    fn table(&self) -> String {
        let mut table = String::from("\nstep          time      result\n");
        for (name, time, outcome) in &self.done {
            let outcome = match outcome {
                Outcome::Passed => "ok".to_owned(),
                Outcome::Skipped(reason) => format!("skipped: {reason}"),
                Outcome::Failed => "FAILED".to_owned(),
            };
            table += &format!("{name:<12} {:>7.1} s   {outcome}\n", time.as_secs_f64());
        }
        table + &format!("{:<12} {:>7.1} s", "total", self.start.elapsed().as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_past_its_time_is_ended() {
        let start = Instant::now();
        let error = stdout_within(Command::new("sleep").arg("60"), Duration::from_millis(20)).unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
        assert!(start.elapsed() < TERM_TIME_MAX);
    }

    #[test]
    fn a_child_that_ignores_the_signal_is_killed() {
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' TERM; echo ready; exec sleep 60"]).stdout(Stdio::piped());
        let mut child = Guard(command.spawn().unwrap());
        let mut ready = [0; 5];
        child.0.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        let start = Instant::now();
        child.end_within(Duration::from_millis(50));
        assert!(start.elapsed() >= Duration::from_millis(50), "it did not ignore the signal");
        assert!(!child.0.wait().unwrap().success());
    }

    #[test]
    fn stdout_and_failures_of_a_child_are_seen() {
        let second = Duration::from_secs(10);
        assert_eq!(stdout_within(Command::new("echo").arg("here"), second).unwrap(), b"here\n");
        assert!(stdout_within(&mut Command::new("false"), second).is_err());
        assert!(stdout_within(&mut Command::new("no-such-program-here"), second).is_err());
    }

    #[test]
    fn a_failed_step_fails_the_whole_and_the_others_still_run() {
        let mut steps = Steps::new();
        assert!(!steps.step("first", || bail!("on purpose")));
        assert!(steps.step("second", || Ok(Outcome::Passed)));
        steps.skip("third", "why not");
        let table = steps.table();
        assert!(table.contains("FAILED") && table.contains("ok") && table.contains("skipped: why not"), "{table}");
        assert_eq!(steps.finish().unwrap_err().to_string(), "failed: first");
        let mut steps = Steps::new();
        steps.step("only", || Ok(Outcome::Passed));
        steps.finish().unwrap();
    }
}
