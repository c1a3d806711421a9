//! Many starts of the shipped node, half of them while every core is busy.
//!
//! Each start waits for the ready line, stores and fetches through the command line, reads the metrics, and stops the node by
//! SIGTERM. glommio has a bug in which a parked executor sleeps on although it has work; the shard's timer rescues it and counts
//! that in `shard_stalls_total`. The sum is printed, so that the bug stays visible; a node that does not answer fails the run.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::{
    preflight,
    process::{Guard, cargo, root, run as run_command, stdout_within, target, wait_until},
};

/// The longest that a node may take to be ready, to answer a command, or to stop.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);
/// The longest that cores are kept busy for one start, whatever else happens.
const BUSY_TIME_MAX: Duration = Duration::from_secs(60);
/// Starts on one data folder, the first of which initialises it; then a new folder, so that both are exercised.
const STARTS_PER_FOLDER: u32 = 10;
/// Most bytes of metrics that are read.
const METRICS_BYTES_MAX: u64 = 4 << 20;
/// The counter of rescues.
const STALLS: &str = "shard_stalls_total";

/// How often.
#[derive(Args)]
pub(crate) struct Options {
    /// Starts.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    starts: u32,
    /// Use the binary that is there.
    #[arg(long)]
    no_build: bool,
    /// The binary. [default: the release build]
    #[arg(long)]
    metanode: Option<PathBuf>,
}

/// Runs all starts and prints the totals.
pub(crate) fn run(options: &Options) -> Result<()> {
    if !options.no_build && options.metanode.is_none() {
        run_command(&mut cargo(["build", "--release", "-p", "metanode-cli", "--bins"]))?;
    }
    let target = target()?;
    let binary = options.metanode.clone().unwrap_or_else(|| target.join("release/metanode"));
    let dir = target.join(format!("soak/{}", std::process::id()));
    let begin = Instant::now();
    let mut totals = Totals::default();
    for index in 0..options.starts {
        let folder = dir.join(format!("node-{}", index / STARTS_PER_FOLDER));
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let busy = index % 2 == 1;
        let spinners = busy.then(Spinners::start);
        let begin = Instant::now();
        let done = start(&binary, &folder, index);
        drop(spinners);
        totals.add(index, busy, begin.elapsed(), done);
        // A folder that nothing failed in is not evidence.
        if (index + 1) % STARTS_PER_FOLDER == 0 && totals.failures == 0 {
            std::fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
        }
    }
    totals.print(begin.elapsed())?;
    if totals.failures > 0 {
        bail!(
            "{} of {} starts failed; the data folders from the first failure on are kept in {}",
            totals.failures,
            totals.starts,
            dir.display()
        );
    }
    std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))
}

/// What happened so far.
#[derive(Default)]
struct Totals {
    starts: u32,
    failures: u32,
    stalls: u64,
    stalls_busy: u64,
    slowest: Duration,
}

impl Totals {
    fn add(&mut self, index: u32, busy: bool, time: Duration, done: Result<u64>) {
        self.starts += 1;
        self.slowest = self.slowest.max(time);
        match done {
            Ok(stalls) => {
                self.stalls += stalls;
                self.stalls_busy += if busy { stalls } else { 0 };
            }
            Err(error) => {
                self.failures += 1;
                println!(
                    "start {index}{} failed after {:.1} s: {error:#}",
                    if busy { " (busy)" } else { "" },
                    time.as_secs_f64()
                );
            }
        }
        if self.starts.is_multiple_of(25) {
            eprintln!("{} starts, {} failures, {} stalls", self.starts, self.failures, self.stalls);
        }
    }

    fn print(&self, time: Duration) -> Result<()> {
        println!(
            "soak: {} starts, {} failures, {} {STALLS} ({} of them while the cores were busy), slowest start to stop {:.2} s, {:.0} s in all; {}",
            self.starts,
            self.failures,
            self.stalls,
            self.stalls_busy,
            self.slowest.as_secs_f64(),
            time.as_secs_f64(),
            preflight::machine()?,
        );
        Ok(())
    }
}

/// One life of a node; returns its stalls.
fn start(binary: &Path, folder: &Path, index: u32) -> Result<u64> {
    let log = std::fs::File::create(folder.join("stderr.log")).context("cannot make the node's log")?;
    let data = &folder.join("data"); // a node refuses a folder with other contents
    let mut command = Command::new(binary);
    command.args(["start", "--foreground", "-o", "json", "--data"]).arg(data).current_dir(root());
    let child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().context("cannot run metanode")?;
    let mut node = Guard(child);
    let ready = ready(&mut node.0)?;
    round_trip(binary, data, index)?;
    let metrics = address(&ready["metrics"]).context("`metrics` of the ready line")?;
    let stalls = stalls(&http_get(metrics, "/metrics")?)?;
    stop(&mut node.0)?;
    Ok(stalls)
}

/// The first line of stdout.
fn ready(node: &mut Child) -> Result<Value> {
    let stdout = node.stdout.take().context("stdout is piped")?;
    let (send, receive) = mpsc::channel();
    // The thread ends with the node's stdout, which it drains: a node must never wait for its reader.
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let _ = send.send(line);
        }
    });
    let line = match receive.recv_timeout(ANSWER_TIME_MAX) {
        Ok(line) => line,
        Err(mpsc::RecvTimeoutError::Timeout) => bail!("not ready within {} s", ANSWER_TIME_MAX.as_secs()),
        Err(mpsc::RecvTimeoutError::Disconnected) => match wait_until(node, Instant::now() + ANSWER_TIME_MAX)? {
            Some(status) => bail!("ended with {status} before it was ready"),
            None => bail!("closed stdout before it was ready"),
        },
    };
    let ready: Value = serde_json::from_str(&line).with_context(|| format!("the ready line is not JSON: {line}"))?;
    for key in ["quic", "metrics", "ticket", "pid"] {
        ensure!(!ready[key].is_null(), "the ready line has no {key}: {line}");
    }
    Ok(ready)
}

/// Stores a small file and fetches it back, each by the command line.
fn round_trip(binary: &Path, data: &Path, index: u32) -> Result<()> {
    let (sent, received) = (data.join("soak-sent"), data.join("soak-received"));
    let contents: Vec<u8> =
        (0..1024_u32).flat_map(|word| word.wrapping_mul(2_654_435_761).wrapping_add(index).to_le_bytes()).collect();
    std::fs::write(&sent, &contents)?;
    let _ = std::fs::remove_file(&received);
    let put = Command::new(binary).args(["put", "-o", "json", "--data"]).arg(data).arg(&sent).output_in_time()?;
    let stored: Value = serde_json::from_slice(&put).context("`metanode put -o json` did not print JSON")?;
    let ticket = stored["ticket"]
        .as_str()
        .or_else(|| stored["hash"].as_str())
        .context("`metanode put` named no ticket and no hash")?;
    Command::new(binary).args(["get", "--data"]).arg(data).arg(ticket).arg(&received).output_in_time()?;
    ensure!(
        std::fs::read(&received).context("`metanode get` wrote no file")? == contents,
        "`metanode get` gave other bytes"
    );
    Ok(())
}

trait OutputInTime {
    fn output_in_time(&mut self) -> Result<Vec<u8>>;
}

impl OutputInTime for Command {
    fn output_in_time(&mut self) -> Result<Vec<u8>> {
        stdout_within(self.current_dir(root()), ANSWER_TIME_MAX)
    }
}

/// SIGTERM, and exit status 0 in time.
fn stop(node: &mut Child) -> Result<()> {
    kill_process(Pid::from_child(node), Signal::TERM).context("cannot send SIGTERM")?;
    match wait_until(node, Instant::now() + ANSWER_TIME_MAX)? {
        Some(status) if status.success() => Ok(()),
        Some(status) => bail!("ended with {status} after SIGTERM"),
        None => bail!("did not end within {} s of SIGTERM (process {})", ANSWER_TIME_MAX.as_secs(), node.id()),
    }
}

/// `127.0.0.1:9101`, or the address in `http://127.0.0.1:9101/metrics`.
fn address(value: &Value) -> Result<SocketAddr> {
    let text = value.as_str().context("not a string")?;
    let text = text.strip_prefix("http://").unwrap_or(text);
    let text = text.split_once('/').map_or(text, |(address, _)| address);
    text.parse().with_context(|| format!("not an address: {text}"))
}

/// The body of a page, over a connection of its own.
fn http_get(address: SocketAddr, path: &str) -> Result<String> {
    let mut stream =
        TcpStream::connect_timeout(&address, ANSWER_TIME_MAX).with_context(|| format!("cannot reach {address}"))?;
    stream.set_read_timeout(Some(ANSWER_TIME_MAX))?;
    stream.set_write_timeout(Some(ANSWER_TIME_MAX))?;
    // In one piece: a server may answer and close on the first.
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").as_bytes())?;
    let mut reply = String::new();
    stream
        .take(METRICS_BYTES_MAX)
        .read_to_string(&mut reply)
        .with_context(|| format!("cannot read http://{address}{path}"))?;
    let (head, body) = reply.split_once("\r\n\r\n").context("no HTTP reply")?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    ensure!(status == "200", "http://{address}{path} answered {status}");
    Ok(body.to_owned())
}

/// The sum of the counter over its labels. A node without it is a failure: zero must be said, not assumed.
fn stalls(metrics: &str) -> Result<u64> {
    let mut sum = None;
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap_or_default();
        if name.ends_with(STALLS) {
            let value = line.rsplit('}').next().unwrap_or_default().trim_start_matches(name);
            let value: f64 = value
                .split_whitespace()
                .next()
                .unwrap_or_default()
                .parse()
                .with_context(|| format!("not a count: {line}"))?;
            ensure!(value >= 0.0 && value.fract() == 0.0, "not a count: {line}");
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a whole number, not negative")]
            let value = value as u64;
            sum = Some(sum.unwrap_or(0) + value);
        }
    }
    sum.ok_or_else(|| anyhow!("the metrics have no {STALLS}"))
}

/// A busy thread on each core, until dropped.
struct Spinners {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Spinners {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let spin = |core: usize| {
            let stop = stop.clone();
            thread::spawn(move || {
                let mut cores = rustix::thread::CpuSet::new();
                cores.set(core);
                // Where the core is not ours, the scheduler places the thread.
                let _ = rustix::thread::sched_setaffinity(None, &cores);
                let end = Instant::now() + BUSY_TIME_MAX;
                while !stop.load(Ordering::Relaxed) && Instant::now() < end {
                    std::hint::spin_loop();
                }
            })
        };
        Self { threads: (0..cores).map(spin).collect(), stop }
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn stalls_are_summed_over_labels_and_must_be_there() {
        let page = "# HELP metanode_shard_stalls_total x\nmetanode_shard_stalls_total{shard=\"0\"} 2\n\
                    metanode_shard_stalls_total{shard=\"1\"} 3 1700000000\nother_total 9\n";
        assert_eq!(stalls(page).unwrap(), 5);
        assert_eq!(stalls("shard_stalls_total 0\n").unwrap(), 0);
        for page in ["", "other_total 1\n", "shard_stalls_total x\n", "shard_stalls_total -1\n"] {
            assert!(stalls(page).is_err(), "{page}");
        }
    }

    #[test]
    fn addresses_with_and_without_a_scheme() {
        let expected: SocketAddr = "127.0.0.1:9101".parse().unwrap();
        for text in ["127.0.0.1:9101", "http://127.0.0.1:9101/metrics", "http://127.0.0.1:9101"] {
            assert_eq!(address(&Value::from(text)).unwrap(), expected);
        }
        assert!(address(&Value::Null).is_err());
    }

    /// Answers one request with `reply`; the thread returns the request's first line.
    fn serve_once(reply: String) -> (SocketAddr, JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let head: Vec<String> =
                BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            stream.write_all(reply.as_bytes()).unwrap();
            head[0].clone()
        });
        (address, server)
    }

    #[test]
    fn pages_are_read_and_refusals_seen() {
        for (status, good) in [("200 OK", true), ("404 Not Found", false)] {
            let (address, server) = serve_once(format!("HTTP/1.1 {status}\r\nContent-Length: 4\r\n\r\nbody"));
            let page = http_get(address, "/metrics");
            assert_eq!(server.join().unwrap(), "GET /metrics HTTP/1.1");
            assert_eq!(page.is_ok_and(|body| body == "body"), good);
        }
    }

    /// A stand-in for the node and the command line, in sh, that misbehaves as told.
    fn stand_in(dir: &Path, node: &str, get: &str) -> PathBuf {
        std::fs::create_dir_all(dir).unwrap();
        let path = dir.join("metanode");
        let script = format!(
            "#!/bin/sh\ncase $1 in\nstart) mkdir -p \"$6\"; {node};;\nput) cp \"$6\" \"$5/stored\"; echo '{{\"ticket\": \"mn1x\"}}';;\nget) {get};;\nesac\n"
        );
        // Another process writes it: a file that this one has open for writing can't be executed by what it forks meanwhile.
        let mut write = Command::new("sh");
        write.args(["-c", r#"printf %s "$1" > "$2" && chmod +x "$2""#, "sh", &script]).arg(&path);
        assert!(write.status().unwrap().success());
        path
    }

    #[test]
    fn a_life_is_judged() {
        let dir = std::env::temp_dir().join(format!("metanode-soak-test-{}", std::process::id()));
        let metrics = "HTTP/1.1 200 OK\r\n\r\nshard_stalls_total 7\n";
        let (address, server) = serve_once(metrics.to_owned());
        let line = format!("echo '{{\"quic\": \"q\", \"metrics\": \"{address}\", \"ticket\": \"mn1\", \"pid\": 1}}'");
        let serve = |status: u8| format!("trap 'exit {status}' TERM; {line}; while :; do sleep 0.01; done");
        let copy = "cp \"$3/stored\" \"$5\"";
        assert_eq!(start(&stand_in(&dir, &serve(0), copy), &dir, 1).unwrap(), 7);
        server.join().unwrap();
        let fails = |node: &str, get: &str, why: &str| {
            let error = format!("{:#}", start(&stand_in(&dir, node, get), &dir, 1).unwrap_err());
            assert!(error.contains(why), "{error}");
        };
        fails("exit 3", copy, "before it was ready");
        fails("echo hello; sleep 1", copy, "not JSON");
        fails("echo '{}'; sleep 1", copy, "no quic");
        fails(&serve(0), "exit 1", "ended with");
        fails(&serve(0), "echo other > \"$5\"", "other bytes");
        fails(&serve(0), copy, "cannot reach");
        let (address, server) = serve_once(metrics.to_owned());
        let line = format!("echo '{{\"quic\": \"q\", \"metrics\": \"{address}\", \"ticket\": \"mn1\", \"pid\": 1}}'");
        fails(&format!("trap 'exit 4' TERM; {line}; while :; do sleep 0.01; done"), copy, "after SIGTERM");
        server.join().unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
