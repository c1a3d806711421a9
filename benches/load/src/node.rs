//! The node: a child process on a core of its own.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use metanode_client::{Client, ClientConfig};
use metanode_crypto::Identity;
use metanode_wire::Ticket;
use rustix::{
    fs::{Advice, fadvise},
    process::{Pid, Signal, kill_process},
};
use serde_json::Value;
use tokio::time::{sleep, timeout};

use crate::{Common, data, measure};

/// How long a node may take to be ready: a recovery of the largest store here takes a second or two.
const READY_TIME_MAX: Duration = Duration::from_secs(60);
/// How long a node may take to end after SIGTERM.
const STOP_TIME_MAX: Duration = Duration::from_secs(60);
/// Between two looks at a node that is about to end.
const PAUSE: Duration = Duration::from_millis(2);
/// Where a node listens unless told otherwise.
const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// Longest first line of a node.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// A folder for one scenario, with the node's data in it. Removed when dropped, unless it is to be kept.
pub(crate) struct Place {
    path: PathBuf,
    keep: bool,
}

impl Place {
    /// Makes the folder: a new one, whatever an earlier run has left.
    pub(crate) fn make(common: &Common, scenario: &str) -> Result<Self> {
        let path = common.dir.join(format!("{scenario}-{}-{:08x}", std::process::id(), data::fresh_seed()? as u32));
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let path = path.canonicalize().with_context(|| format!("cannot find {}", path.display()))?;
        Ok(Self { path, keep: false })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the folder for somebody to look at.
    pub(crate) fn keep(&mut self) {
        self.keep = true;
    }

    /// The node's data folder.
    pub(crate) fn data(&self) -> PathBuf {
        self.path.join("data")
    }

    /// The node's log.
    fn log(&self) -> PathBuf {
        self.path.join("node.log")
    }

    /// Makes a data folder's first files, so that a node starts with `config` in place of the shipped configuration. The operator
    /// may write, as on any fresh node.
    pub(crate) fn configure(&self, config: &str) -> Result<()> {
        let data = self.data();
        fs::create_dir_all(&data)?;
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
        let operator = Identity::from_seed(&seed);
        let mut key = File::options().write(true).create_new(true).mode(0o600).open(data.join("operator.key"))?;
        key.write_all(operator.to_pem().as_bytes())?;
        let config = format!("{config}\n[access]\nwriters = [\"{}\"]\n", operator.public());
        fs::write(data.join("metanode.toml"), config).context("cannot write metanode.toml")
    }

    /// The files with the node's data: segments of the log.
    pub(crate) fn segments(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        collect_files(&self.data().join("store"), &mut files)?;
        files.retain(|path| path.extension().is_some_and(|extension| extension == "seg"));
        files.sort();
        ensure!(!files.is_empty(), "the store has no segment files");
        Ok(files)
    }

    /// Has the kernel forget what it holds of the store's files in memory. No node runs.
    pub(crate) fn drop_page_cache(&self) -> Result<()> {
        let mut files = Vec::new();
        collect_files(&self.data().join("store"), &mut files)?;
        for path in files {
            let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
            file.sync_all()?; // only clean pages can be dropped
            fadvise(&file, 0, None, Advice::DontNeed).context("posix_fadvise")?;
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.keep {
            eprintln!("kept: {}", self.path.display());
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn collect_files(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => collect_files(&entry.path(), files)?,
            kind if kind.is_file() => files.push(entry.path()),
            _ => {}
        }
    }
    Ok(())
}

/// A running node. Dropping it kills the process.
pub(crate) struct Node {
    process: Process,
    ticket: Ticket,
    operator: Identity,
    page: Page,
    /// From the start of the process until it was ready.
    pub(crate) start_time: Duration,
}

impl Node {
    /// Starts a node on `place`, as a user would, but for the ports.
    pub(crate) async fn start(common: &Common, place: &Place) -> Result<Self> {
        Self::start_at(common, place, LOOPBACK).await
    }

    /// As [`Node::start`], on a loopback address.
    pub(crate) async fn start_at(common: &Common, place: &Place, listen: SocketAddr) -> Result<Self> {
        let begun = Instant::now();
        let (mut process, stdout) = spawn(common, place, listen)?;
        let line = tokio::task::spawn_blocking(move || first_line(stdout));
        let ready = match timeout(READY_TIME_MAX, line).await {
            Ok(line) => line??,
            Err(_elapsed) => bail!("the node was not ready within {} s", READY_TIME_MAX.as_secs()),
        };
        let start_time = begun.elapsed();
        if ready.is_empty() {
            let status = ended_within(&mut process.0, Duration::from_secs(1)).await?;
            let how = status.map_or_else(|| "closed its output".to_owned(), |status| format!("ended with {status}"));
            bail!("the node {how} before it was ready; the end of its log:\n{}", tail_of(&place.log()));
        }
        let ready: Value = serde_json::from_str(&ready).with_context(|| format!("the node said {ready:?}"))?;
        let text =
            |key| ready.get(key).and_then(Value::as_str).with_context(|| format!("the node's line has no {key}"));
        let ticket: Ticket = text("ticket")?.parse().context("the node's ticket")?;
        let address: SocketAddr = text("quic")?.parse().context("the node's address")?;
        ensure!(
            address.ip().is_loopback() && ticket.addresses.first() == Some(&address),
            "the node listens on {address}"
        );
        let key = place.data().join("operator.key");
        let pem = fs::read_to_string(&key).with_context(|| format!("cannot read {}", key.display()))?;
        let operator = Identity::from_pem(&pem).context("the operator's key")?;
        let page = Page(text("metrics")?.parse().context("the address of the metrics")?);
        Ok(Self { process, ticket, operator, page, start_time })
    }

    /// Starts a node and kills it after a while, ready or not.
    pub(crate) async fn start_and_kill(common: &Common, place: &Place, after: Duration) -> Result<()> {
        let (mut process, _stdout) = spawn(common, place, LOOPBACK)?; // a closed stdout would be another fault
        sleep(after).await;
        if let Some(status) = process.0.try_wait()? {
            bail!("the node ended with {status} while it started; the end of its log:\n{}", tail_of(&place.log()));
        }
        Ok(()) // dropping it kills
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.0.id()
    }

    pub(crate) fn ticket(&self) -> &Ticket {
        &self.ticket
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.ticket.addresses[0]
    }

    /// A client with the operator's key, as the library is shipped.
    pub(crate) async fn client(&self) -> Result<Client> {
        self.client_of(&self.ticket).await
    }

    /// As [`Node::client`], by way of a proxy.
    pub(crate) async fn client_at(&self, address: SocketAddr) -> Result<Client> {
        self.client_of(&Ticket { addresses: vec![address], ..self.ticket.clone() }).await
    }

    async fn client_of(&self, ticket: &Ticket) -> Result<Client> {
        let client = Client::connect(ticket, ClientConfig::new(self.operator.clone())).await?;
        ensure!(client.may_write(), "the node does not let its operator write");
        client.connect_all_shards().await?;
        Ok(client)
    }

    /// Its metrics.
    pub(crate) fn page(&self) -> Page {
        self.page
    }

    /// Peak resident memory so far, in MiB.
    pub(crate) fn hwm_mib(&self) -> Result<f64> {
        Ok(measure::memory_kib(self.pid(), "VmHWM")? / 1024.0)
    }

    /// Asks the node to end, which it must do in good order.
    pub(crate) async fn stop(mut self) -> Result<()> {
        kill_process(Pid::from_child(&self.process.0), Signal::TERM).context("the node is gone")?;
        match ended_within(&mut self.process.0, STOP_TIME_MAX).await? {
            Some(status) if status.success() => Ok(()),
            Some(status) => bail!("the node ended with {status} after SIGTERM"),
            None => bail!("the node did not end within {} s after SIGTERM", STOP_TIME_MAX.as_secs()),
        }
    }

    /// SIGKILL, now. Returns once the process is gone.
    pub(crate) fn kill(mut self) -> Result<()> {
        if let Some(status) = self.process.0.try_wait()? {
            bail!("the node had ended by itself, with {status}");
        }
        self.process.0.kill().context("cannot kill the node")?;
        self.process.0.wait().context("cannot wait for the node")?;
        Ok(())
    }
}

/// A node's page of metrics.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Page(SocketAddr);

impl Page {
    /// The sum of a metric over all shards and labels.
    pub(crate) fn metric(self, name: &str) -> Result<f64> {
        let mut stream = TcpStream::connect(self.0).context("the page of metrics")?;
        stream.set_read_timeout(Some(READY_TIME_MAX))?;
        stream
            .write_all(format!("GET /metrics HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", self.0).as_bytes())?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        let samples = page.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
        let values: Vec<f64> = samples.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
        ensure!(!values.is_empty(), "the page has no metric {name}");
        Ok(values.iter().sum())
    }
}

/// A process of ours. Dropping it kills it.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.0.try_wait(), Ok(Some(_))) {
            let _ = self.0.kill(); // it may end by itself at this moment
            let _ = self.0.wait();
        }
    }
}

/// Starts a node on the server's core, as a user would, but for the ports.
fn spawn(common: &Common, place: &Place, listen: SocketAddr) -> Result<(Process, ChildStdout)> {
    let log = File::options().append(true).create(true).open(place.log()).context("cannot open the node's log")?;
    let mut command = Command::new(&common.metanode);
    command.args(["start", "--foreground", "-o", "json", "--listen", &listen.to_string(), "--metrics", "127.0.0.1:0"]);
    command.arg("--data").arg(place.data());
    // The shipped configuration is that of the folder, whatever this process's environment says.
    for name in ["METANODE_DATA", "METANODE_NODE", "METANODE_KEY", "METANODE_LOG"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    // A child inherits the affinity of the thread that starts it, and a node runs one shard for each core that it may use.
    measure::pin(common.server_core)?;
    let spawned = command.spawn();
    measure::pin(common.client_core)?;
    let mut process = Process(spawned.with_context(|| format!("cannot start {}", common.metanode.display()))?);
    let stdout = process.0.stdout.take().context("the node has no stdout")?;
    Ok((process, stdout))
}

/// The line by which a node says that it serves; empty when it closed its output instead.
fn first_line(stdout: ChildStdout) -> std::io::Result<String> {
    let mut line = String::new();
    BufReader::new(stdout.take(LINE_BYTES_MAX)).read_line(&mut line)?;
    Ok(line)
}

async fn ended_within(child: &mut Child, time: Duration) -> Result<Option<ExitStatus>> {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().context("cannot wait for the node")? {
            return Ok(Some(status));
        }
        if begun.elapsed() >= time {
            return Ok(None);
        }
        sleep(PAUSE).await;
    }
}

/// The last lines of a log.
fn tail_of(log: &Path) -> String {
    const LINES: usize = 20;
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
