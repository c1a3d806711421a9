//! The server process: how `run` starts, asks and stops it, and how `serve` listens to its parent.
//!
//! The server prints one line of JSON when it is ready, and one for each line that it reads from stdin. Closing its
//! stdin ends it, so a server never outlives the run that started it.

use std::{io::Write, path::Path, process::Stdio, thread, time::Duration};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    time::timeout,
};

use crate::{Peer, measure};

/// How long a server may take to become ready, and then to answer or to end. A large upload may still be on its way
/// to the disk when the parent asks.
const REPLY_TIME_MAX: Duration = Duration::from_secs(60);
/// How long a server may take to remove its files once its stdin has closed.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);

/// A running server. Dropping it kills the process.
pub(crate) struct Server {
    process: Child,
    pid: u32,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Server {
    /// Starts this executable's `serve` on a core of its own; also returns the line that says how to reach it.
    pub(crate) async fn start(peer: Peer, core: usize, dir: &Path) -> Result<(Self, Value)> {
        let mut process = Command::new(std::env::current_exe()?)
            .args(["serve", peer.name(), "--core", &core.to_string(), "--dir"])
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the server")?;
        let pid = process.id().context("the server ended at once")?;
        let stdin = process.stdin.take().context("the server has no stdin")?;
        let stdout = process.stdout.take().context("the server has no stdout")?;
        let mut server = Self { process, pid, stdin, lines: BufReader::new(stdout).lines() };
        let ready = server.line().await?;
        Ok((server, ready))
    }

    /// CPU time that the server has used.
    pub(crate) fn cpu_time(&self) -> Result<Duration> {
        measure::cpu_time(self.pid)
    }

    /// Sends a line and awaits the answer.
    pub(crate) async fn ask(&mut self, command: &str) -> Result<Value> {
        self.stdin.write_all(format!("{command}\n").as_bytes()).await.context("cannot write to the server")?;
        self.stdin.flush().await.context("cannot write to the server")?;
        self.line().await
    }

    /// Closes the server's stdin and waits for it to remove its files; kills it if it does not end.
    pub(crate) async fn stop(self) -> Result<()> {
        let Self { mut process, stdin, .. } = self;
        drop(stdin);
        match timeout(STOP_TIME_MAX, process.wait()).await {
            Ok(status) => {
                let status = status.context("cannot wait for the server")?;
                if !status.success() {
                    bail!("the server ended with {status}");
                }
            }
            Err(_) => process.kill().await.context("cannot kill the server")?,
        }
        Ok(())
    }

    async fn line(&mut self) -> Result<Value> {
        let line = timeout(REPLY_TIME_MAX, self.lines.next_line()).await.context("the server does not answer")?;
        let line = line.context("cannot read from the server")?.context("the server ended early")?;
        serde_json::from_str(&line).context("the server's answer is not JSON")
    }
}

/// What the parent asks of a server.
pub(crate) struct Commands(mpsc::Receiver<String>);

impl Commands {
    /// Reads stdin in a thread of its own, so that the runtime's thread never waits for it.
    pub(crate) fn from_stdin() -> Result<Self> {
        let (sender, receiver) = mpsc::channel(16);
        let read = move || {
            for line in std::io::stdin().lines().map_while(Result::ok) {
                if sender.blocking_send(line).is_err() {
                    break;
                }
            }
        };
        thread::Builder::new().name("stdin".to_owned()).spawn(read).context("cannot start a thread")?;
        Ok(Self(receiver))
    }

    /// The next line, or `None` once stdin has closed or a signal asks the process to end.
    pub(crate) async fn next(&mut self) -> Option<String> {
        tokio::select! {
            line = self.0.recv() => line,
            () = terminated() => None,
        }
    }
}

/// Prints one answer.
pub(crate) fn answer(value: &Value) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{value}").and_then(|()| stdout.flush()).context("the parent is gone")
}

/// A text field of a server's line.
pub(crate) fn text<'line>(line: &'line Value, key: &str) -> Result<&'line str> {
    line.get(key).and_then(Value::as_str).with_context(|| format!("the server's line has no {key}"))
}

/// A number of a server's line.
pub(crate) fn number(line: &Value, key: &str) -> Result<f64> {
    line.get(key).and_then(Value::as_f64).with_context(|| format!("the server's line has no {key}"))
}

/// Returns when SIGTERM or SIGINT arrives.
pub(crate) async fn terminated() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
