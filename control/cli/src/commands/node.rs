//! `metanode start`, `stop` and `node run`.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _},
    net::SocketAddr,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use metanode_node::{
    Config, DataFolder, admin,
    data::{self, DataError},
};
use serde::{Deserialize, Serialize};

use crate::{
    args::{AddressOrOff, Global, NodeRun, Overrides, Start, Stop},
    exit::{Exit, Failure, Result, io},
    output::{Format, Show},
    target::{data_folder, local_folder},
};

/// Between two looks at a process that is about to end.
const PAUSE: Duration = Duration::from_millis(5);

/// What a node says when it serves: one line of JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ReadyLine {
    pub(super) quic: SocketAddr,
    pub(super) metrics: Option<SocketAddr>,
    pub(super) ticket: String,
    pub(super) pid: u32,
}

impl Show for ReadyLine {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let metrics = match self.metrics {
            Some(address) => format!("http://{address}/metrics"),
            None => "off".into(),
        };
        vec![
            ("quic", self.quic.to_string()),
            ("metrics", metrics),
            ("pid", self.pid.to_string()),
            ("ticket", self.ticket.clone()),
        ]
    }
}

pub(super) fn start(global: &Global, start: &Start) -> Result<()> {
    if start.foreground {
        return serve(global, &start.overrides, global.output);
    }
    let folder = data_folder(global)?;
    let Launched { ready, .. } = launch(&folder, &start.overrides, Life::Detached, global.timeout)?;
    global.output.print(&ready)
}

/// The role: runs in this process until it is stopped.
pub(super) fn run(global: &Global, run: &NodeRun) -> Result<()> {
    if run.with_parent {
        let signal = Some(rustix::process::Signal::TERM);
        rustix::process::set_parent_process_death_signal(signal)
            .map_err(|error| io("asking to end with the starting process")(error.into()))?;
    }
    if run.detached {
        rustix::process::setsid().map_err(|error| io("leaving the session")(error.into()))?;
    }
    serve(global, &run.overrides, if run.detached || run.with_parent { Format::Json } else { global.output })
}

fn serve(global: &Global, overrides: &Overrides, format: Format) -> Result<()> {
    let data = DataFolder::open_or_init(&data_folder(global)?)?;
    let config = in_force(data.config()?, overrides)?;
    metanode_node::logging::init(&config.log.level);
    let ended = metanode_node::run(data, config, |ready| {
        let ready =
            ReadyLine { quic: ready.quic, metrics: ready.metrics, ticket: ready.ticket.to_string(), pid: ready.pid };
        if let Err(failure) = format.print(&ready) {
            tracing::warn!("nobody reads that the node is ready: {}", failure.messages.join(": "));
        }
    });
    Ok(ended?)
}

/// The configuration with what the command line says.
pub(super) fn in_force(mut config: Config, overrides: &Overrides) -> Result<Config> {
    let Overrides { listen, metrics, shards, cores, cache, log } = overrides.clone();
    config.quic.listen = listen.unwrap_or(config.quic.listen);
    match metrics {
        Some(AddressOrOff::Address(address)) => config.metrics.listen = Some(address),
        Some(AddressOrOff::Off) => config.metrics.listen = None,
        None => {}
    }
    config.node.shards = shards.or(config.node.shards);
    config.node.cores = cores.or(config.node.cores);
    config.store.cache_bytes = cache.unwrap_or(config.store.cache_bytes);
    config.log.level = log.unwrap_or(config.log.level);
    config.validate()?;
    Ok(config)
}

/// The same on a command line.
fn to_args(overrides: &Overrides) -> Vec<String> {
    let Overrides { listen, metrics, shards, cores, cache, log } = overrides;
    let metrics = metrics.map(|metrics| match metrics {
        AddressOrOff::Address(address) => address.to_string(),
        AddressOrOff::Off => "off".into(),
    });
    let cores = cores.as_ref().map(|cores| cores.iter().map(usize::to_string).collect::<Vec<_>>().join(","));
    [
        ("--listen", listen.map(|listen| listen.to_string())),
        ("--metrics", metrics),
        ("--shards", shards.map(|shards| shards.to_string())),
        ("--cores", cores),
        ("--cache", cache.map(|cache| cache.to_string())),
        ("--log", log.clone()),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some([name.to_owned(), value?]))
    .flatten()
    .collect()
}

/// How long a started node lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// On its own, until it is stopped.
    Detached,
    /// Not longer than the thread that started it.
    WithParent,
}

pub(super) struct Launched {
    pub(super) child: Child,
    pub(super) ready: ReadyLine,
}

/// Starts this program as a node and waits until it serves. Its log goes to `node.log` in the data folder.
pub(super) fn launch(folder: &Path, overrides: &Overrides, life: Life, deadline: Duration) -> Result<Launched> {
    let folder = DataFolder::open_or_init(folder)?.path().to_path_buf();
    if let Some(pid) = data::is_locked(&folder)? {
        return Err(DataError::Locked { path: folder, pid }.into());
    }
    let log_path = folder.join("node.log");
    let log = File::options().append(true).create(true).mode(0o600).open(&log_path);
    let log = log.map_err(|source| match source.kind() {
        ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => {
            DataError::ReadOnly { path: log_path.clone(), source }.into()
        }
        _ => io(log_path.display())(source),
    })?;
    let log_begin = log.metadata().map_err(io(log_path.display()))?.len();
    let mut command = Command::new("/proc/self/exe");
    command.args(["node", "run", "--data"]).arg(&folder).args(to_args(overrides));
    command.arg(if life == Life::Detached { "--detached" } else { "--with-parent" });
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    let mut child = command.spawn().map_err(io("starting the node"))?;
    let line = first_line(&mut child, deadline);
    match line {
        Some(line) => match serde_json::from_str(&line) {
            Ok(ready) => Ok(Launched { child, ready }),
            Err(_) => {
                give_up(&mut child);
                Err(Failure::new(Exit::Other, format!("the node said {line:?} instead of being ready")))
            }
        },
        None => {
            let is_late = matches!(child.try_wait(), Ok(None)) && !ended_within(&mut child, Duration::from_millis(500));
            if is_late {
                give_up(&mut child);
                return Err(Failure::new(
                    Exit::Busy,
                    format!("the node was not ready within {} s", deadline.as_secs_f64()),
                )
                .hint(format!("{} says what it was doing; --timeout gives it longer", log_path.display())));
            }
            Err(why_it_ended(&mut child, &log_path, log_begin))
        }
    }
}

fn first_line(child: &mut Child, deadline: Duration) -> Option<String> {
    let stdout = child.stdout.take()?;
    let (give, line) = mpsc::channel();
    thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(stdout.take(64 * 1024)).read_line(&mut line);
        let _ = give.send(read.ok().filter(|n| *n > 0).map(|_| line)); // the receiver may have given up
    });
    line.recv_timeout(deadline).ok().flatten()
}

fn give_up(child: &mut Child) {
    let _ = child.kill(); // it may have ended by itself
    let _ = child.wait();
}

pub(super) fn ended_within(child: &mut Child, time: Duration) -> bool {
    let begun = Instant::now();
    loop {
        match child.try_wait() {
            Ok(None) if begun.elapsed() < time => thread::sleep(PAUSE),
            Ok(None) => return false,
            Ok(Some(_)) | Err(_) => return true,
        }
    }
}

/// The node's own error, from the end of its log.
fn why_it_ended(child: &mut Child, log: &Path, begin: u64) -> Failure {
    let code = child.wait().ok().and_then(|status| status.code());
    let mut text = String::new();
    let read = File::open(log).and_then(|mut file| {
        file.seek(SeekFrom::Start(begin))?;
        file.take(1 << 20).read_to_string(&mut text)
    });
    let error = read.ok().and_then(|_| parse_error(&text));
    match error {
        Some((messages, hint)) => {
            let exit = code.and_then(Exit::from_code).unwrap_or(Exit::Other);
            let hint = hint.or(Some(format!("the log is {}", log.display())));
            Failure { exit, messages, hint, is_of_the_node: false, is_of_the_connection: false }
        }
        None => {
            let how = code.map_or("by a signal".into(), |code| format!("with code {code}"));
            Failure::new(Exit::Other, format!("the node ended {how} before it was ready"))
                .hint(format!("the log is {}; `metanode doctor` says what this machine lacks", log.display()))
        }
    }
}

/// The last error among log lines, as [`Failure::lines`] writes one.
fn parse_error(text: &str) -> Option<(Vec<String>, Option<String>)> {
    let lines: Vec<_> = text.lines().collect();
    let begin = lines.iter().rposition(|line| line.starts_with("error: "))?;
    let mut messages = vec![lines[begin]["error: ".len()..].to_owned()];
    let mut hint = None;
    for line in &lines[begin + 1..] {
        // `Failure::lines` indents what continues a message.
        if let Some(cause) = line.strip_prefix("  caused by: ") {
            messages.push(cause.to_owned());
        } else if let Some(text) = line.strip_prefix("hint: ") {
            hint = Some(text.to_owned());
        } else if let (Some(text), Some(message)) = (line.strip_prefix("  "), messages.last_mut()) {
            message.push('\n');
            message.push_str(text);
        }
    }
    Some((messages, hint))
}

pub(super) fn stop(global: &Global, stop: &Stop) -> Result<()> {
    let folder = local_folder(global)?;
    let pid = admin::status(&folder)?.pid;
    admin::stop(&folder, stop.deadline)?;
    let begun = Instant::now();
    while is_running(pid) {
        if begun.elapsed() > stop.deadline {
            return Err(Failure::new(
                Exit::Busy,
                format!("the node has released its folder, but process {pid} lives on"),
            )
            .hint(format!("kill -9 {pid} ends it; everything is synced")));
        }
        thread::sleep(PAUSE);
    }
    global.output.print_or(&serde_json::json!({ "stopped": pid }), &format!("stopped (process {pid})"))
}

/// Whether a process lives; one that nobody has waited for yet does not.
fn is_running(pid: u32) -> bool {
    let stat = fs::read_to_string(PathBuf::from(format!("/proc/{pid}/stat")));
    // The name is in parentheses and may hold anything; the state is the first field behind it.
    stat.is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with(['Z', 'X'])))
}

/// Peak resident memory of a process.
pub(super) fn peak_memory_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Flushes what the process says before it goes on without a reader.
pub(super) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}"); // a closed standard error must not end the work
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_reach_the_configuration_and_a_command_line() {
        let overrides = Overrides {
            listen: Some("127.0.0.1:0".parse().unwrap()),
            metrics: Some(AddressOrOff::Off),
            shards: Some(2),
            cores: Some(vec![0, 1]),
            cache: Some(64 << 20),
            log: Some("debug".into()),
        };
        let config = in_force(Config::default(), &overrides).unwrap();
        assert_eq!((config.node.shards, config.metrics.listen, config.store.cache_bytes), (Some(2), None, 64 << 20));
        let line = to_args(&overrides).join(" ");
        assert_eq!(line, "--listen 127.0.0.1:0 --metrics off --shards 2 --cores 0,1 --cache 67108864 --log debug");
        assert!(to_args(&Overrides::default()).is_empty());
        let wrong = Overrides { shards: Some(0), ..Overrides::default() };
        assert_eq!(in_force(Config::default(), &wrong).unwrap_err().exit, Exit::Usage);
    }

    #[test]
    fn an_error_is_found_in_a_log() {
        let failure = Failure::new(Exit::DataFolder, "locked").context("starting").hint("stop it");
        let text = format!("INFO x\n{}\n", failure.lines().join("\n"));
        assert_eq!(
            parse_error(&text),
            Some((vec!["starting".to_owned(), "locked".to_owned()], Some("stop it".to_owned())))
        );
        assert_eq!(parse_error("INFO nothing wrong"), None);
    }

    #[test]
    fn running_processes_are_told_from_gone_ones() {
        assert!(is_running(std::process::id()));
        assert!(peak_memory_bytes(std::process::id()).unwrap() > 100_000);
        let mut child = Command::new("true").spawn().unwrap();
        let begun = Instant::now();
        while is_running(child.id()) {
            assert!(begun.elapsed() < Duration::from_secs(10), "a zombie counts as gone");
        }
        child.wait().unwrap();
    }
}
