//! The product beside its peers, on the same machine, in the same minutes.
//!
//! Each round runs every scenario and every peer once, rivals next to each other, in an order that turns around from round to round,
//! so that a machine that slows down or warms up treats them alike. A figure is the median over the rounds. What each scenario
//! measures is described where it is measured: `benches/load` and `benches/peers`.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::{
    floors::{self, Figures, Floor},
    load::build_release,
    preflight,
    process::{self, cargo, root, stdout_within, target, text},
};

/// The longest that one scenario or peer may take.
const PROGRAM_TIME_MAX: Duration = Duration::from_secs(600);

/// What is measured, and how.
#[derive(Args)]
pub(crate) struct Options {
    /// The set of scenarios.
    #[arg(value_enum, default_value_t = Suite::Relay)]
    suite: Suite,
    /// Rounds; each figure is the median over them.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// The core of every server.
    #[arg(long, default_value_t = 0)]
    server_core: usize,
    /// The core of every client.
    #[arg(long, default_value_t = 1)]
    client_core: usize,
    /// Where stores are put: a folder on a disk, since durable figures of a memory file system mean nothing.
    /// [default: bench/data in cargo's target folder]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Print Markdown for the README.
    #[arg(long)]
    readme: bool,
    /// Use the binaries that are there.
    #[arg(long)]
    no_build: bool,
}

/// A set of scenarios.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Storing and fetching, beside iroh-blobs and plain quinn.
    Relay,
    /// One blob over a bad path, by IPv4 and IPv6, beside plain quinn.
    Network,
    /// A client's gets while strangers flood the node with handshakes and streams.
    Flood,
    /// Ten times the load that a node can do, for a minute.
    Overload,
    /// Validators of one chain on this machine: finality, and transactions a second.
    Consensus,
}

impl Suite {
    /// What its file is called.
    fn name(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Network => "network",
            Self::Flood => "flood",
            Self::Overload => "overload",
            Self::Consensus => "consensus",
        }
    }

    fn programs(self) -> &'static [Program] {
        match self {
            Self::Relay => RELAY,
            Self::Network => NETWORK,
            Self::Flood => FLOOD,
            Self::Overload => OVERLOAD,
            Self::Consensus => CONSENSUS,
        }
    }

    fn floors(self) -> &'static [Floor] {
        match self {
            Self::Relay => floors::RELAY,
            Self::Network => floors::NETWORK,
            Self::Flood => floors::FLOOD,
            Self::Overload => floors::OVERLOAD,
            Self::Consensus => floors::CONSENSUS,
        }
    }
}

/// Something that prints one flat JSON object of numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Program {
    /// A scenario of `metanode-load`.
    Load(&'static str),
    /// A peer of `metanode-peers`.
    Peer(&'static str),
}

impl Program {
    fn name(self) -> &'static str {
        let (Self::Load(name) | Self::Peer(name)) = self;
        name
    }
}

/// Rivals stand next to each other.
const RELAY: &[Program] = &[
    Program::Peer("iroh-mem"),
    Program::Load("small"),
    Program::Peer("quinn"),
    Program::Load("connections"),
    Program::Load("bulk"),
    Program::Peer("iroh-fs"),
];

const NETWORK: &[Program] = &[Program::Peer("quinn-lossy"), Program::Load("network")];

const FLOOD: &[Program] = &[Program::Load("flood")];

const OVERLOAD: &[Program] = &[Program::Load("overload")];

const CONSENSUS: &[Program] = &[Program::Load("consensus")];

/// What the peer moves over a bad path, in bytes: at its 0.4 MB/s, 256 MiB would take 12 minutes each way, for the same rate.
const LOSSY_PEER_BYTES: u64 = 16 << 20;

/// Measures, prints, writes SUITE.json; an error when a floor is not kept or something did not run.
pub(crate) fn run(options: &Options) -> Result<()> {
    let suite = options.suite;
    ensure!(options.server_core != options.client_core, "server and client need a core each");
    let target = target()?;
    let out = target.join("bench");
    let dir = options.dir.clone().unwrap_or_else(|| out.join("data"));
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    std::fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    refuse_memory_file_system(&dir)?;
    let about = about(options)?;
    if !options.no_build {
        build_release()?;
        process::run(&mut cargo(["build", "--release", "-p", "metanode-proxy"]))?;
        // Minutes, which a suite without peers need not wait for.
        if suite.programs().iter().any(|program| matches!(program, Program::Peer(_))) {
            process::run(&mut cargo(["build", "--release", "--manifest-path", "benches/peers/Cargo.toml"]))?;
        }
    }

    let start = Instant::now();
    let mut bench =
        Bench { options, binaries: Binaries::find(&target), dir, rounds: Vec::new(), failed: BTreeMap::new() };
    for round in 0..options.rounds {
        bench.round(round);
    }
    let figures = medians(&bench.rounds);
    let rows = floors::judge(suite.floors(), &figures);

    write_json(&out.join(format!("{}.json", suite.name())), &figures)?;
    // The rounds one by one, to see how far they lie apart.
    std::fs::write(out.join(format!("{}-rounds.json", suite.name())), serde_json::to_vec_pretty(&bench.rounds)?)?;
    let table = if options.readme { floors::markdown(&rows) } else { floors::table(&rows) };
    println!("{table}\n{about}; {:.0} s", start.elapsed().as_secs_f64());

    let missing: Vec<_> = floors::required(suite.floors()).filter(|key| !figures.contains_key(*key)).collect();
    let below = rows.iter().filter(|row| !row.is_kept()).count();
    for (program, error) in &bench.failed {
        eprintln!("error: {} did not run: {error}", program.name());
    }
    ensure!(bench.failed.is_empty(), "{} of {} programs did not run", bench.failed.len(), suite.programs().len());
    ensure!(missing.is_empty(), "not measured: {}", missing.join(", "));
    ensure!(below == 0, "{below} of {} floors are not kept", rows.len());
    Ok(())
}

struct Bench<'a> {
    options: &'a Options,
    binaries: Binaries,
    dir: PathBuf,
    rounds: Vec<Figures>,
    /// Programs that failed, with the reason; they are not run again.
    failed: BTreeMap<Program, String>,
}

struct Binaries {
    metanode: PathBuf,
    load: PathBuf,
    proxy: PathBuf,
    peers: PathBuf,
}

impl Binaries {
    fn find(target: &Path) -> Self {
        // The peers are a workspace of their own, and put what they build into it unless the environment says otherwise.
        let peers = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(_) => target.to_owned(),
            None => root().join("benches/peers/target"),
        };
        Self {
            metanode: target.join("release/metanode"),
            load: target.join("release/metanode-load"),
            proxy: target.join("release/metanode-proxy"),
            peers: peers.join("release/metanode-peers"),
        }
    }
}

impl Bench<'_> {
    /// Runs every program once.
    fn round(&mut self, round: u32) {
        let mut programs = self.options.suite.programs().to_vec();
        if round % 2 == 1 {
            programs.reverse();
        }
        let mut figures = Figures::new();
        for program in programs {
            if self.failed.contains_key(&program) {
                continue;
            }
            let start = Instant::now();
            match self.measure(program) {
                Ok(measured) => figures.extend(measured),
                Err(error) => {
                    eprintln!("error: {}: {error:#}", program.name());
                    self.failed.insert(program, format!("{error:#}"));
                }
            }
            let (round, rounds, time) = (round + 1, self.options.rounds, start.elapsed());
            eprintln!("round {round}/{rounds}: {} took {:.1} s", program.name(), time.as_secs_f64());
        }
        self.rounds.push(figures);
    }

    /// Runs a program in a folder of its own.
    fn measure(&self, program: Program) -> Result<Figures> {
        let dir = self.dir.join(program.name());
        remove(&dir)?;
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let mut command = self.command(program);
        command.args(["--server-core", &self.options.server_core.to_string()]);
        command.args(["--client-core", &self.options.client_core.to_string()]);
        command.arg("--dir").arg(&dir);
        let printed = stdout_within(&mut command, PROGRAM_TIME_MAX);
        remove(&dir)?;
        parse(&printed?).with_context(|| format!("stdout of `{}`", process::line(&command)))
    }

    fn command(&self, program: Program) -> Command {
        let mut command = match program {
            Program::Load(scenario) => {
                let mut command = Command::new(&self.binaries.load);
                command.arg(scenario).arg("--metanode").arg(&self.binaries.metanode);
                command
            }
            Program::Peer(peer) => {
                let mut command = Command::new(&self.binaries.peers);
                command.args(["run", peer]);
                command
            }
        };
        if NETWORK.contains(&program) {
            command.arg("--proxy").arg(&self.binaries.proxy);
        }
        if CONSENSUS.contains(&program) {
            command.arg("--seven");
        }
        if program == Program::Peer("quinn-lossy") {
            command.args(["--bytes", &LOSSY_PEER_BYTES.to_string()]);
        }
        command
    }
}

fn remove(dir: &Path) -> Result<()> {
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    Ok(())
}

/// One flat JSON object of numbers; `null` is a number that could not be measured, and left out.
fn parse(stdout: &[u8]) -> Result<Figures> {
    let Value::Object(object) = serde_json::from_slice(stdout).context("not JSON")? else { bail!("not an object") };
    let mut figures = Figures::new();
    for (key, value) in object {
        match value {
            Value::Null => {}
            Value::Number(number) => {
                figures.insert(key, number.as_f64().context("a number that is not a float")?);
            }
            other => bail!("{key} is {other}, not a number"),
        }
    }
    Ok(figures)
}

/// The median of each key over the rounds that have it; of an even count, the mean of the middle two.
fn medians(rounds: &[Figures]) -> Figures {
    let mut values: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for (key, value) in rounds.iter().flatten() {
        values.entry(key).or_default().push(*value);
    }
    values.into_iter().map(|(key, mut values)| (key.to_owned(), median(&mut values))).collect()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2])
}

fn write_json(path: &Path, figures: &Figures) -> Result<()> {
    let mut json = serde_json::to_vec_pretty(figures)?;
    json.push(b'\n');
    std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))
}

/// Machine, commit and command: what a figure is worth nothing without.
fn about(options: &Options) -> Result<String> {
    let git = |arguments: &[&str]| text(Command::new("git").args(arguments).current_dir(root()));
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|_| "unknown".to_owned());
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_ok_and(|changes| !changes.is_empty());
    let changed = if changed { " with changes" } else { "" };
    Ok(format!(
        "{}; commit {commit}{changed}; `cargo xtask bench {} --rounds {} --server-core {} --client-core {}`",
        preflight::machine()?,
        options.suite.name(),
        options.rounds,
        options.server_core,
        options.client_core,
    ))
}

/// On a file system without a disk, `durable` costs nothing.
fn refuse_memory_file_system(dir: &Path) -> Result<()> {
    /// `TMPFS_MAGIC` and `RAMFS_MAGIC` (Linux `magic.h`).
    const MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
    let found = rustix::fs::statfs(dir).with_context(|| format!("cannot look at {}", dir.display()))?;
    #[expect(clippy::cast_sign_loss, reason = "a magic number's type has a sign on some architectures only")]
    let kind = found.f_type as u64 & 0xffff_ffff;
    ensure!(
        !MEMORY.contains(&kind),
        "{} lies in memory, where durable writes cost nothing\nhint: --dir names a folder on a disk",
        dir.display()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figures(pairs: &[(&str, f64)]) -> Figures {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect()
    }

    #[test]
    fn medians_are_of_each_key() {
        let rounds = [figures(&[("a", 3.0), ("b", 1.0)]), figures(&[("a", 1.0)]), figures(&[("a", 100.0), ("b", 2.0)])];
        assert_eq!(medians(&rounds), figures(&[("a", 3.0), ("b", 1.5)]));
        assert_eq!(medians(&[]), Figures::new());
    }

    #[test]
    fn only_a_flat_object_of_numbers_is_taken() {
        assert_eq!(parse(br#"{"a": 1, "b": 2.5, "c": null}"#).unwrap(), figures(&[("a", 1.0), ("b", 2.5)]));
        for text in ["", "[]", "1", r#"{"a": "1"}"#, r#"{"a": {"b": 1}}"#, "{} {}"] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn every_figure_of_the_floors_has_one_program() {
        let all: Vec<_> = RELAY.iter().chain(NETWORK).chain(FLOOD).chain(OVERLOAD).chain(CONSENSUS).collect();
        assert_eq!(all.len(), all.iter().collect::<std::collections::BTreeSet<_>>().len());
    }

    #[test]
    fn memory_file_systems_are_refused() {
        if Path::new("/dev/shm").exists() {
            assert!(refuse_memory_file_system(Path::new("/dev/shm")).is_err());
        }
        refuse_memory_file_system(root()).unwrap();
    }
}
