//! A data folder with a node on it.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::unix::{fs::OpenOptionsExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use metanode_client::{Client, ClientConfig};
use metanode_crypto::Identity;
use metanode_wire::Ticket;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    process::{Ending, Ran, metanode, run},
    wait_for,
};

/// The longest that a node may take until it serves, on two cores that other tests keep busy.
const READY_TIME_MAX: Duration = Duration::from_secs(30);

/// The longest that a node may take from SIGTERM to its end.
const STOP_TIME_MAX: Duration = Duration::from_secs(20);

/// Small segments: a node of four shards is then there in a moment. Everything else is as shipped.
const STORE: &str = "[store]\nsegment_bytes = 8388608\ncache_bytes = 33554432\n";

/// A data folder, and the keys and configuration that are put there before a node's first start.
#[derive(Debug)]
pub struct Home {
    temp: TempDir,
    data: PathBuf,
    operator: Identity,
}

impl Home {
    /// A folder for a node whose operator is `operator()` and whose store has small segments.
    pub fn new() -> Self {
        Self::with_config("", STORE)
    }

    /// As [`Home::new`], with more lines in the configuration's `[access]` and with other sections behind it.
    pub fn with_config(access: &str, sections: &str) -> Self {
        let temp = tempfile::tempdir().expect("a temporary folder can be made");
        let data = temp.path().join("data");
        Self::at(temp, data, access, sections)
    }

    /// Nothing: the first start makes the folder, the keys and the configuration, all as shipped. Commands act for its operator;
    /// [`Home::client`] is a stranger there.
    pub fn fresh() -> Self {
        let temp = tempfile::tempdir().expect("a temporary folder can be made");
        let data = temp.path().join("data");
        Self { temp, data, operator: Identity::from_seed(&[42; 32]) }
    }

    /// As [`Home::new`], with the data folder inside `folder`, which is a mount.
    pub fn inside(folder: &Path) -> Self {
        let temp = tempfile::tempdir_in(folder).expect("a temporary folder can be made");
        let data = temp.path().join("data");
        Self::at(temp, data, "", STORE)
    }

    fn at(temp: TempDir, data: PathBuf, access: &str, sections: &str) -> Self {
        let operator = Identity::from_seed(&[42; 32]);
        fs::create_dir(&data).expect("the folder is new");
        write_key(&data.join("operator.key"), &operator);
        let writer = operator.public();
        let config = format!("[access]\nwriters = [\"{writer}\"]\n{access}\n{sections}");
        fs::write(data.join("metanode.toml"), config).expect("the folder is writable");
        Self { temp, data, operator }
    }

    /// The data folder.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// A path beside the data folder, for a test's own files.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    /// Who may write.
    pub fn operator(&self) -> &Identity {
        &self.operator
    }

    /// Starts a node and waits until it serves.
    #[track_caller]
    pub fn start(&self, shards: u16) -> Node {
        self.start_at(shards, "127.0.0.1:0")
    }

    /// As [`Home::start`], on an address.
    #[track_caller]
    pub fn start_at(&self, shards: u16, listen: &str) -> Node {
        let node = Node::spawn(&mut self.start_command(shards, listen), self.beside("node.log"));
        assert_eq!(node.ready.pid, node.child.0.id(), "the ready line names the process");
        node
    }

    /// Runs a node that is expected to end by itself, before it serves.
    #[track_caller]
    pub fn start_refused(&self, shards: u16) -> Ran {
        run(&mut self.start_command(shards, "127.0.0.1:0"), b"")
    }

    fn start_command(&self, shards: u16, listen: &str) -> Command {
        let mut command =
            metanode(["start", "--foreground", "-o", "json", "--listen", listen, "--metrics", "127.0.0.1:0"]);
        command.args(["--shards", &shards.to_string(), "--data"]).arg(&self.data);
        command
    }

    /// Connects to `node` as the operator.
    pub async fn client(&self, node: &Node, shard_aware: bool) -> Client {
        let mut config = ClientConfig::new(self.operator.clone());
        config.shard_aware = shard_aware;
        Client::connect(&node.ready.ticket, config).await.expect("the node takes connections")
    }

    /// Runs a command on this data folder; the arguments are split at spaces.
    #[track_caller]
    pub fn cli(&self, line: &str) -> Ran {
        self.cli_args(line.split(' '))
    }

    /// Runs a command on this data folder.
    #[track_caller]
    pub fn cli_args<I: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Ran {
        run(self.command(arguments).current_dir(self.temp.path()), b"")
    }

    /// A command on this data folder.
    pub fn command<I: AsRef<std::ffi::OsStr>>(&self, arguments: impl IntoIterator<Item = I>) -> Command {
        let mut command = metanode(arguments);
        command.arg("--data").arg(&self.data);
        command
    }

    /// Writes a private key beside the data folder and returns its path.
    pub fn key_file(&self, name: &str, identity: &Identity) -> PathBuf {
        let path = self.beside(name);
        write_key(&path, identity);
        path
    }
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

fn write_key(path: &Path, identity: &Identity) {
    let file = File::options().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(identity.to_pem().as_bytes())).expect("a key can be written");
}

/// What a node says when it serves.
#[derive(Debug)]
pub struct Ready {
    /// UDP address.
    pub quic: SocketAddr,
    /// TCP address of the metrics page.
    pub metrics: Option<SocketAddr>,
    /// Names the node.
    pub ticket: Ticket,
    /// Its process.
    pub pid: u32,
}

impl Default for Ready {
    /// Of a node that has said nothing yet.
    fn default() -> Self {
        let nowhere: SocketAddr = (std::net::Ipv4Addr::UNSPECIFIED, 0).into();
        let ticket = Ticket { node: metanode_types::NodeKey([0; 32]), addresses: vec![nowhere], hash: None };
        Self { quic: nowhere, metrics: None, ticket, pid: 0 }
    }
}

impl Ready {
    /// From the line of JSON.
    ///
    /// # Panics
    ///
    /// When it is not one, or has not all its fields.
    #[track_caller]
    pub fn parse(line: &str) -> Self {
        let value: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("the ready line: {error}: {line}"));
        let text = |name: &str| value[name].as_str().unwrap_or_else(|| panic!("the ready line has no {name}: {line}"));
        Self {
            quic: text("quic").parse().expect("quic is an address"),
            metrics: value["metrics"].as_str().map(|text| text.parse().expect("metrics is an address")),
            ticket: text("ticket").parse().expect("ticket is a ticket"),
            pid: value["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).expect("pid is a process number"),
        }
    }
}

/// The first line that a child prints: it is ready.
#[track_caller]
fn first_line(child: &mut Ending) -> String {
    let stdout = child.0.stdout.take().expect("it is piped");
    let (give, line) = mpsc::channel();
    // Ends with the child, whose standard output it drains.
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let _ = give.send(line); // only the first one is awaited
        }
    });
    match line.recv_timeout(READY_TIME_MAX) {
        Ok(line) => line,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("not ready within {READY_TIME_MAX:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => panic!("ended before it was ready: {:?}", child.0.wait()),
    }
}

/// A process that serves something else than a node does. Dropping it kills it.
pub struct Service(Ending);

impl Service {
    /// Starts it, and waits until it prints that it is ready.
    #[track_caller]
    pub(crate) fn spawn(command: &mut Command) -> Self {
        let child = command.stdout(Stdio::piped()).spawn().expect("the binary under test can be run");
        let mut this = Self(Ending(child));
        first_line(&mut this.0);
        this
    }

    /// SIGKILL.
    #[track_caller]
    pub fn kill(mut self) {
        self.0.0.kill().expect("it lives");
        let status = self.0.0.wait().expect("a child can be waited for");
        assert_eq!(status.signal(), Some(9), "it lived until it was killed");
    }
}

/// A running node. Dropping it kills it.
pub struct Node {
    child: Ending,
    /// What it said.
    pub ready: Ready,
    log_path: PathBuf,
}

impl Node {
    /// Starts a node that logs there, and waits until it serves.
    #[track_caller]
    pub(crate) fn spawn(command: &mut Command, log_path: PathBuf) -> Self {
        let log = File::options().create(true).append(true).open(&log_path).expect("the log can be written");
        let child = command.stdout(Stdio::piped()).stderr(log).spawn().expect("the binary under test can be run");
        let mut node = Self { child: Ending(child), ready: Ready::default(), log_path };
        let line = first_line(&mut node.child);
        node.ready = Ready::parse(&line);
        node
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.ready.pid
    }

    /// Whether it lives.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.0.try_wait(), Ok(None))
    }

    /// SIGTERM, and exit code 0 in time.
    #[track_caller]
    pub fn stop(mut self) {
        kill_process(Pid::from_child(&self.child.0), Signal::TERM).expect("the node lives");
        let status = self.ended();
        assert_eq!(status.code(), Some(0), "{status}");
    }

    /// SIGKILL, as a crash of the process.
    #[track_caller]
    pub fn kill(mut self) {
        self.child.0.kill().expect("the node lives");
        assert_eq!(self.ended().signal(), Some(9), "it lived until it was killed");
    }

    /// Waits for its end.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        let child: &mut Child = &mut self.child.0;
        let status = wait_for(STOP_TIME_MAX, || child.try_wait().expect("a child can be waited for"));
        status.unwrap_or_else(|| panic!("the node has not ended within {STOP_TIME_MAX:?}"))
    }

    /// What it has logged so far, former nodes on the same folder included.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log_path).unwrap_or_default()).into_owned()
    }

    /// The metrics page, by HTTP.
    #[track_caller]
    pub fn metrics(&self) -> String {
        let address = self.ready.metrics.expect("the metrics page is on");
        let mut stream = TcpStream::connect(address).expect("the metrics page takes connections");
        stream.set_read_timeout(Some(READY_TIME_MAX)).expect("the time is not zero");
        let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("the page takes a request");
        let mut reply = String::new();
        stream.read_to_string(&mut reply).expect("the page answers");
        let (head, body) = reply.split_once("\r\n\r\n").expect("an answer has a head");
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        body.to_owned()
    }

    /// The sum of a metric over all shards.
    ///
    /// # Panics
    ///
    /// When the page does not have it.
    #[track_caller]
    pub fn metric(&self, name: &str) -> f64 {
        let page = self.metrics();
        let samples: Vec<f64> = page
            .lines()
            .filter(|line| {
                line.split(['{', ' ']).next().is_some_and(|found| found == name || found == format!("metanode_{name}"))
            })
            .map(|line| {
                line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a sample ends with a number")
            })
            .collect();
        assert!(!samples.is_empty(), "no metric {name} in\n{page}");
        samples.iter().sum()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let log = self.log();
        if thread::panicking() {
            let tail: Vec<_> = log.lines().rev().take(40).collect();
            eprintln!("--- the end of the log of process {}:", self.child.0.id());
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        } else {
            assert!(!log.contains("panicked at"), "a node has panicked:\n{log}");
        }
    }
}
