//! Commands: the binary under test, with a deadline and with nothing of the user's environment.

use std::{
    io::{Read, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    thread,
    time::Duration,
};

use serde_json::Value;

use crate::{wait::stretched, wait_for};

/// The longest that a command may take.
const COMMAND_TIME_MAX: Duration = Duration::from_secs(60);

/// What a command left behind.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: String,
    line: String,
}

impl Ran {
    /// It ended with 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{}\n{}", self.line, self.stderr);
        self
    }

    /// It ended with `code`, printed no data, and said why.
    #[track_caller]
    pub fn failed(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{}\n{}", self.line, self.stderr);
        assert!(self.stdout.is_empty(), "{}: data in spite of an error: {}", self.line, self.text());
        assert!(self.stderr.contains("error: "), "{}: no error is named: {}", self.line, self.stderr);
        self
    }

    /// As [`Ran::failed`], with a hint on the last line.
    #[track_caller]
    pub fn refused(self, code: i32) -> Self {
        let this = self.failed(code);
        let last = this.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("hint: "), "{}: the last line is no hint: {}", this.line, this.stderr);
        this
    }

    /// Standard output as text.
    #[track_caller]
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("text is UTF-8")
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|error| panic!("{}: {error}: {}", self.line, self.text()))
    }
}

/// The binary under test; see the crate's documentation.
fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("METANODE_BIN") {
            let path = PathBuf::from(path);
            assert!(path.is_file(), "METANODE_BIN: {} is no file", path.display());
            return path;
        }
        let test = std::env::current_exe().expect("a test knows its own file"); // target/debug/deps/name-hash
        let path = test.ancestors().nth(2).expect("tests lie in target/PROFILE/deps").join("metanode");
        if !path.is_file() {
            let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
            let built = Command::new(cargo).args(["build", "-p", "metanode-cli", "--bins"]).status();
            assert!(built.is_ok_and(|status| status.success()), "the binary under test can't be built");
        }
        path
    })
}

/// A command of the binary under test. It sees none of the user's variables that it would heed, and a home that is not there.
pub fn metanode<I: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = I>) -> Command {
    let mut command = Command::new(binary());
    command.args(arguments).stdin(Stdio::null());
    for name in ["METANODE_DATA", "METANODE_NODE", "METANODE_KEY", "METANODE_LOG", "XDG_DATA_HOME", "XDG_RUNTIME_DIR"] {
        command.env_remove(name);
    }
    command.env("HOME", "/nonexistent").env("NO_COLOR", "1").env("RUST_BACKTRACE", "0");
    command
}

/// Runs a command to its end, feeding it `stdin`.
///
/// # Panics
///
/// When it can't be started, takes too long, or ends by a signal.
#[track_caller]
pub fn run(command: &mut Command, stdin: &[u8]) -> Ran {
    let line = format!("{command:?}");
    let pipe_in = if stdin.is_empty() { Stdio::null() } else { Stdio::piped() };
    let child = command.stdin(pipe_in).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut child = Ending(child.unwrap_or_else(|error| panic!("{line}: {error}")));
    let (input, output, errors) = (child.0.stdin.take(), child.0.stdout.take(), child.0.stderr.take());
    let (stdout, stderr, status) = thread::scope(|scope| {
        if let Some(mut input) = input {
            scope.spawn(move || {
                let _ = input.write_all(stdin); // a command that has seen enough closes its end
            });
        }
        let stdout = scope.spawn(|| read_all(output));
        let stderr = scope.spawn(|| read_all(errors));
        let status = wait_for(stretched(COMMAND_TIME_MAX), || child.0.try_wait().expect("a child can be waited for"));
        if status.is_none() {
            let _ = child.0.kill(); // ends the reading threads
        }
        let text = "reading a pipe does not panic";
        (stdout.join().expect(text), stderr.join().expect(text), status)
    });
    let stderr = String::from_utf8_lossy(&stderr).into_owned();
    let status = status.unwrap_or_else(|| panic!("{line}: not done within {COMMAND_TIME_MAX:?}\n{stderr}"));
    let code = status.code().unwrap_or_else(|| panic!("{line}: ended with {status}\n{stderr}"));
    assert!(!stderr.contains("panicked at"), "{line}: {stderr}");
    Ran { code, stdout, stderr, line }
}

fn read_all(pipe: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    pipe.expect("it is piped").read_to_end(&mut bytes).expect("a pipe can be read");
    bytes
}

/// A process that does not outlive its test.
pub(crate) struct Ending(pub(crate) Child);

impl Drop for Ending {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.0.kill(); // it may end at this moment
            let _ = self.0.wait();
        }
    }
}

/// Whether a process lives; one that has ended and that nobody has waited for does not.
pub fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    // The name is in parentheses and may hold anything; the state is the first field behind it.
    stat.is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with(['Z', 'X'])))
}
