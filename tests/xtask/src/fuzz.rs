//! Every decoder under libFuzzer: the programs of `tests/fuzz`, which are a workspace of their own and want a nightly compiler.
//!
//! A search that finds nothing proves little until it is shown to find something. So `planted` goes first, a decoder with a length
//! bug that bytes at random don't reach: when it is not found from nothing in [`PLANTED_TIME_MAX`], the run has failed.

use std::{
    fmt::Write as _,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::{Map, Value};

use crate::process::{self, Guard, root, target, wait_until};

/// The program with the bug.
const PLANTED: &str = "planted";
/// Where libFuzzer begins with it, so that a run says something about the next one.
const PLANTED_SEED: u32 = 1;
/// It takes about a second; a busy machine may be slower.
const PLANTED_TIME_MAX: Duration = Duration::from_secs(60);

/// Bytes of an input: several frames, records or lines of each format, and a page of a map.
const INPUT_BYTES_MAX: u32 = 4_096;
/// Seconds that one input may take; the slowest are megabytes of segment, which take milliseconds.
const INPUT_TIME_MAX_S: u32 = 10;
/// MiB of memory of a program, its corpus and the sanitizer's shadow included.
const MEMORY_MIB_MAX: u32 = 2_048;
/// MiB of one allocation: an input of 4 KiB that asks for more has found a length that nobody held to a limit.
const ALLOCATION_MIB_MAX: u32 = 64;
/// What a program may take beyond its time, to load its corpus and to end.
const GRACE: Duration = Duration::from_secs(120);

/// How long, and what.
#[derive(Args)]
pub(crate) struct Options {
    /// Seconds for each target.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    seconds: u32,
    /// Targets [default: all].
    targets: Vec<String>,
}

/// Builds the programs, shows that the search finds what is planted, then searches each target.
pub(crate) fn run(options: &Options) -> Result<()> {
    let programs = programs()?;
    let mut targets: Vec<&str> = programs.iter().map(String::as_str).filter(|name| *name != PLANTED).collect();
    if let Some(unknown) = options.targets.iter().find(|name| !targets.contains(&name.as_str())) {
        bail!("there is no target {unknown}: {}", targets.join(", "));
    }
    targets.retain(|name| options.targets.is_empty() || options.targets.iter().any(|wanted| wanted == name));
    let fuzz = Fuzz::build()?;
    let mut figures = Map::new();
    figures.insert("seconds".into(), options.seconds.into());

    let planted = fuzz.find_planted()?;
    println!("planted length bug: found in {:.1} s, {} executions", planted.time.as_secs_f64(), planted.figures.execs);
    figures.insert("planted_ms".into(), u64::try_from(planted.time.as_millis()).unwrap_or(u64::MAX).into());
    figures.insert("planted_execs".into(), planted.figures.execs.into());

    let mut table = format!(
        "\n{:<12} {:>12} {:>10} {:>7} {:>7} {:>6}   result\n",
        "target", "executions", "a second", "edges", "corpus", "kept"
    );
    let mut findings = Vec::new();
    for name in targets {
        let search = fuzz.search(name, options.seconds)?;
        let Search { figures: Figures { execs, edges, corpus }, finding, kept, .. } = &search;
        let rate = (*execs as f64 / search.time.as_secs_f64()) as u64;
        let result = if finding.is_some() { "FOUND" } else { "nothing found" };
        writeln!(table, "{name:<12} {execs:>12} {rate:>10} {edges:>7} {corpus:>7} {kept:>6}   {result}")?;
        let found = u64::from(finding.is_some());
        for (figure, value) in
            [("execs", *execs), ("execs_per_s", rate), ("edges", *edges), ("corpus", *corpus), ("findings", found)]
        {
            figures.insert(format!("{name}_{figure}"), value.into());
        }
        findings.extend(finding.iter().map(|finding| (name, finding.clone())));
    }
    println!("{table}");
    write_json(&fuzz.target.join("bench/fuzz.json"), &Value::Object(figures))?;
    for (name, Finding { input, says }) in &findings {
        let input = input.strip_prefix(root()).unwrap_or(input).display();
        eprintln!("{name}: {says}\n  input:  {input}\n  repeat: cargo run -p metanode-decoders -- {name} {input}");
        eprintln!("  keep:   cp {input} tests/fuzz/corpus/{name}/found-WHAT, with the test of what is mended");
    }
    ensure!(findings.is_empty(), "{} of the targets have a finding", findings.len());
    Ok(())
}

/// The programs of the workspace, in the order of its manifest.
fn programs() -> Result<Vec<String>> {
    let manifest = root().join("tests/fuzz/Cargo.toml");
    let text = fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    let names = text.lines().skip_while(|line| *line != "[[bin]]").filter_map(|line| line.strip_prefix("name = "));
    Ok(names.map(|name| name.trim_matches('"').to_owned()).collect())
}

/// The programs, built.
struct Fuzz {
    /// Where cargo puts what it builds.
    target: PathBuf,
    /// Where the programs are.
    programs: PathBuf,
}

/// What a search did.
struct Search {
    figures: Figures,
    time: Duration,
    /// Inputs of the kept corpus.
    kept: usize,
    finding: Option<Finding>,
}

/// An input that breaks its target.
#[derive(Debug, Clone)]
struct Finding {
    input: PathBuf,
    /// The panic's words, or libFuzzer's.
    says: String,
}

impl Fuzz {
    fn build() -> Result<Self> {
        let version = nightly(["rustc", "-vV"]).stderr(Stdio::null()).output();
        let version = version.ok().filter(|output| output.status.success()).context(
            "fuzzing needs a nightly compiler, which is not installed\n  hint: rustup toolchain install nightly --profile minimal",
        )?;
        let version = String::from_utf8_lossy(&version.stdout);
        let host = version.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
        let tool = nightly(["cargo", "fuzz", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        ensure!(
            tool.is_ok_and(|status| status.success()),
            "fuzzing needs cargo-fuzz, which is not installed\n  hint: cargo install cargo-fuzz --locked"
        );
        let target = target()?;
        let built = target.join("fuzz");
        // Without `--cfg fuzzing`, under which some dependencies do other things than in what ships.
        let mut build = nightly(["cargo", "fuzz", "build", "--no-cfg-fuzzing", "--codegen-units", "16", "--fuzz-dir"]);
        build.arg("tests/fuzz").args(["--target", host]).arg("--target-dir").arg(&built);
        process::run(&mut build)?;
        Ok(Self { programs: built.join(host).join("release"), target })
    }

    /// From no corpus, with a fixed seed; an error when it is not found, or when what was found does not repeat.
    fn find_planted(&self) -> Result<Search> {
        let folder = self.target.join("fuzz/planted");
        if folder.exists() {
            fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
        let corpus = made(folder.join("corpus"))?;
        let mut command = self.program(PLANTED);
        command.arg(format!("-seed={PLANTED_SEED}")).arg(&corpus);
        let search = self.run(command, &made(folder)?, PLANTED_TIME_MAX)?;
        let Some(finding) = &search.finding else {
            let execs = search.figures.execs;
            bail!(
                "the planted length bug was not found in {execs} executions: what this search doesn't find proves nothing"
            );
        };
        let repeated =
            self.program(PLANTED).arg(&finding.input).stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        ensure!(!repeated.success(), "what was found in the planted decoder does not repeat");
        Ok(search)
    }

    /// From the kept corpus and what earlier runs have added to it under the target folder.
    fn search(&self, name: &str, seconds: u32) -> Result<Search> {
        let kept = root().join("tests/fuzz/corpus").join(name);
        let count = fs::read_dir(&kept).with_context(|| format!("{name} has no corpus"))?.count();
        let grown = made(self.target.join("fuzz/corpus").join(name))?;
        let mut command = self.program(name);
        command.arg(&grown).arg(&kept);
        let search = self.run(
            command,
            &made(self.target.join("fuzz/findings").join(name))?,
            Duration::from_secs(seconds.into()),
        )?;
        Ok(Search { kept: count, ..search })
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.programs.join(name));
        command.current_dir(root()).stdin(Stdio::null());
        command
    }

    /// Searches for `time`; what it says is kept in `folder`, with its finding.
    fn run(&self, mut command: Command, folder: &Path, time: Duration) -> Result<Search> {
        let log = folder.join("log");
        let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        command.arg(format!("-max_total_time={}", time.as_secs())).arg("-print_final_stats=1");
        command.arg(format!("-max_len={INPUT_BYTES_MAX}")).arg(format!("-timeout={INPUT_TIME_MAX_S}"));
        command.arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}")).arg(format!("-malloc_limit_mb={ALLOCATION_MIB_MAX}"));
        command.arg(format!("-artifact_prefix={}/", folder.display()));
        eprintln!("$ {}", process::line(&command));
        let start = Instant::now();
        let mut child = Guard(
            command
                .stdout(output.try_clone()?)
                .stderr(output)
                .spawn()
                .with_context(|| format!("cannot run {}", process::line(&command)))?,
        );
        let status = wait_until(&mut child.0, start + time + GRACE)?;
        let elapsed = start.elapsed();
        child.end();
        let said = fs::read(&log).with_context(|| format!("cannot read {}", log.display()))?;
        let said = String::from_utf8_lossy(&said);
        let status = status.with_context(|| format!("it did not end in time; see {}", log.display()))?;
        let finding = (!status.success()).then(|| finding(&said)).flatten();
        ensure!(status.success() || finding.is_some(), "it ended with {status}; see {}", log.display());
        // An input of the corpus that breaks its target does so before anything is counted.
        let nothing = || finding.is_some().then(Figures::default);
        let figures = Figures::parse(&said).or_else(nothing);
        let figures = figures.with_context(|| format!("it measured nothing; see {}", log.display()))?;
        Ok(Search { figures, time: elapsed, kept: 0, finding })
    }
}

/// A command of the nightly toolchain, whatever cargo runs this.
fn nightly<const N: usize>(arguments: [&str; N]) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly"]).args(arguments).current_dir(root());
    for (name, _) in std::env::vars_os() {
        let ours = |name: &str| {
            name == "CARGO"
                || name == "RUSTUP_TOOLCHAIN"
                || name.starts_with("CARGO_PKG_")
                || name.starts_with("CARGO_MANIFEST_")
        };
        if name.to_str().is_some_and(ours) {
            command.env_remove(name);
        }
    }
    command
}

fn made(folder: PathBuf) -> Result<PathBuf> {
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// What libFuzzer counts.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    execs: u64,
    /// Edges of the program's control flow that some input has taken.
    edges: u64,
    /// Inputs, each of which does something that no other does.
    corpus: u64,
}

impl Figures {
    /// From the last of its lines, as `#512 DONE cov: 68 ft: 70 corp: 4/9b lim: 4 exec/s: 0 rss: 30Mb`, and its statistics.
    fn parse(said: &str) -> Option<Self> {
        let last = said.lines().rfind(|line| line.starts_with('#') && line.contains(" cov: "))?;
        let number = |name: &str| {
            let digits = last.split_once(name)?.1.split(|c: char| !c.is_ascii_digit()).next()?;
            digits.parse::<u64>().ok().filter(|number| *number > 0)
        };
        let execs = said.lines().rev().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?;
        Some(Self { execs: execs.trim().parse().ok()?, edges: number(" cov: ")?, corpus: number(" corp: ")? })
    }
}

/// Where the input is, and what was said of it.
fn finding(said: &str) -> Option<Finding> {
    let input = said.lines().find_map(|line| line.split_once("Test unit written to ")).map(|(_, path)| path.into())?;
    let mut lines = said.lines();
    let panic = lines.find(|line| line.contains("panicked at")).and_then(|place| {
        let (_, place) = place.split_once("panicked at ")?;
        Some(format!("{} {}", place, lines.next().unwrap_or_default()))
    });
    let error = said.lines().find(|line| line.contains("ERROR: ")).unwrap_or("it ended");
    Some(Finding { input, says: panic.unwrap_or_else(|| error.to_owned()) })
}

fn write_json(path: &Path, figures: &Value) -> Result<()> {
    made(path.parent().context("it lies in a folder")?.to_owned())?;
    let mut json = serde_json::to_vec_pretty(figures)?;
    json.push(b'\n');
    fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "INFO: seed corpus: files: 3 min: 1b max: 9b total: 13b rss: 41Mb\n\
        #4\tINITED cov: 60 ft: 61 corp: 1/1b exec/s: 0 rss: 42Mb\n\
        #512\tREDUCE cov: 68 ft: 70 corp: 4/9b lim: 4 exec/s: 0 rss: 43Mb L: 2/3 MS: 1 EraseBytes-\n";

    #[test]
    fn figures_are_of_the_last_line() {
        let done = format!("{SAID}stat::number_of_executed_units: 900\nstat::average_exec_per_sec:     90\n");
        assert_eq!(Figures::parse(&done), Some(Figures { execs: 900, edges: 68, corpus: 4 }));
        assert_eq!(Figures::parse(SAID), None, "it has not ended");
        assert_eq!(Figures::parse(&done.replace("cov: 68", "cov: 0")), None, "nothing is instrumented");
        assert_eq!(Figures::parse("stat::number_of_executed_units: 900\n"), None);
    }

    #[test]
    fn a_finding_names_its_input_and_its_reason() {
        let panic = "thread '<unnamed>' (7) panicked at src/frame.rs:3:1:\nrange end 9\nnote: run\n==7== ERROR: libFuzzer: deadly signal\n";
        let written = "artifact_prefix='x/'; Test unit written to x/crash-1\n";
        let found = finding(&format!("{SAID}{panic}{written}")).unwrap();
        assert_eq!((found.input, &*found.says), ("x/crash-1".into(), "src/frame.rs:3:1: range end 9"));
        let slow = "==7== ERROR: libFuzzer: timeout after 10 seconds\n";
        assert_eq!(finding(&format!("{slow}{written}")).unwrap().says, slow.trim_end());
        assert!(finding(SAID).is_none());
    }

    #[test]
    fn the_planted_bug_is_among_the_programs() {
        let programs = programs().unwrap();
        assert_eq!(programs.first().map(String::as_str), Some(PLANTED));
        assert!(programs.len() > 10, "{programs:?}");
    }
}
