//! What the system lacks: installed when that is possible without asking, named otherwise.
//!
//! That this runs at all proves cargo and a linker; a compiler may still lack the C headers that aws-lc and mimalloc include.

use std::{
    fmt,
    io::Write,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Resource, Rlimit, geteuid, getrlimit, setrlimit};

/// The oldest kernel whose io_uring has what the node's executors use.
const KERNEL_MIN: (u32, u32) = (5, 19);
/// What glommio's reactor asks of `RLIMIT_MEMLOCK` (glommio-ng 0.12 `sys/uring.rs`).
const MEMLOCK_BYTES_MIN: u64 = 512 * 1024;
/// Descriptors that the tests use at once, with the nodes that they start.
const DESCRIPTORS_MIN: u64 = 1024;

/// Soft limits are raised to this at most: containers have hard limits of a thousand million.
const LIMIT_RAISED_MAX: u64 = 1 << 30;

/// What is asked of the system.
pub(crate) struct Needs {
    /// A ring of the kernel, locked memory and descriptors: to run nodes.
    nodes: bool,
    /// rustup components, as `(cargo subcommand, component)`.
    components: &'static [(&'static str, &'static str)],
}

impl Needs {
    /// To build and test.
    pub(crate) const fn test() -> Self {
        Self { nodes: true, components: &[] }
    }

    /// To build, test and check the sources.
    pub(crate) const fn ci() -> Self {
        Self { nodes: true, components: &[("fmt", "rustfmt"), ("clippy", "clippy")] }
    }
}

/// Something missing, and what helps.
#[derive(Debug, PartialEq, Eq)]
struct Missing {
    what: String,
    hint: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  hint: {}", self.what, self.hint)
    }
}

/// Looks at everything, mends what it may, and fails with a list of the rest.
pub(crate) fn check(needs: &Needs) -> Result<()> {
    let mut missing = Vec::new();
    missing.extend(compiler().err());
    for (subcommand, component) in needs.components {
        missing.extend(rustup_component(subcommand, component).err());
    }
    if needs.nodes {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        missing.extend(kernel(&release).err());
        missing.extend(ring().err());
        missing.extend(limit("locked memory", Resource::Memlock, MEMLOCK_BYTES_MIN, "ulimit -l").err());
        missing.extend(limit("open files", Resource::Nofile, DESCRIPTORS_MIN, "ulimit -n").err());
    }
    if missing.is_empty() {
        return Ok(());
    }
    for item in &missing {
        eprintln!("missing: {item}");
    }
    bail!(
        "{} missing",
        if missing.len() == 1 { "1 thing is".to_owned() } else { format!("{} things are", missing.len()) }
    );
}

/// A C compiler with headers: tried on a small program, installed when root may.
fn compiler() -> Result<(), Missing> {
    if compiles() || (install("build-essential") && compiles()) {
        return Ok(());
    }
    Err(Missing {
        what: "a C compiler with its headers (`cc`): aws-lc, mimalloc and blake3 are C in part".to_owned(),
        hint: "apt-get install build-essential (Debian, Ubuntu), as root".to_owned(),
    })
}

fn compiles() -> bool {
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let mut command = Command::new(compiler);
    command.args(["-x", "c", "-fsyntax-only", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else { return false };
    let program = b"#include <stdio.h>\n#include <linux/io_uring.h>\nint main(void) { return 0; }\n";
    let written = child.stdin.take().is_some_and(|mut stdin| stdin.write_all(program).is_ok());
    child.wait().is_ok_and(|status| status.success()) && written
}

/// Installs a Debian package when this process is root on a system that has apt-get. Nothing is asked.
fn install(package: &str) -> bool {
    if !geteuid().is_root() {
        return false;
    }
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null()).stdout(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    eprintln!("installing {package} with apt-get");
    let install = ["install", "--yes", "--no-install-recommends", package];
    apt(&install) || (apt(&["update"]) && apt(&install))
}

fn rustup_component(subcommand: &str, component: &str) -> Result<(), Missing> {
    let works = || {
        let mut command = crate::process::cargo([subcommand, "--version"]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    let add = || {
        eprintln!("installing {component} with rustup");
        Command::new("rustup").args(["component", "add", component]).status().is_ok_and(|status| status.success())
    };
    if works() || (add() && works()) {
        return Ok(());
    }
    Err(Missing { what: format!("cargo {subcommand}"), hint: format!("rustup component add {component}") })
}

fn kernel(release: &str) -> Result<(), Missing> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= KERNEL_MIN {
        return Ok(());
    }
    Err(Missing {
        what: format!("Linux {}.{} or later (this is {release})", KERNEL_MIN.0, KERNEL_MIN.1),
        hint: "apt-get install linux-image-generic-hwe-22.04 (Ubuntu 22.04), or a newer distribution".to_owned(),
    })
}

/// Whether the kernel hands this process a ring: a container's seccomp filter refuses what the kernel's version promises.
fn ring() -> Result<(), Missing> {
    let Err(error) = io_uring::IoUring::new(8) else { return Ok(()) };
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let hint = match disabled.trim() {
        "1" | "2" => "sysctl -w kernel.io_uring_disabled=0, as root",
        _ => "in a container: a seccomp profile that allows io_uring (docker run --security-opt seccomp=unconfined)",
    };
    Err(Missing { what: format!("io_uring ({error})"), hint: hint.to_owned() })
}

/// Raises a soft limit as far as its hard one lets, within reason; the children inherit it.
fn limit(name: &str, resource: Resource, least: u64, command: &str) -> Result<(), Missing> {
    let Rlimit { current, maximum } = getrlimit(resource);
    let wanted = maximum.unwrap_or(LIMIT_RAISED_MAX).min(LIMIT_RAISED_MAX);
    if current.is_some_and(|current| current < wanted) {
        // A refusal leaves the old limit, which is judged next.
        let _ = setrlimit(resource, Rlimit { current: Some(wanted), maximum });
    }
    let current = getrlimit(resource).current;
    if current.is_none_or(|current| current >= least) {
        return Ok(());
    }
    let current = current.map_or_else(String::new, |current| current.to_string());
    Err(Missing {
        what: format!("a limit of {least} for {name} (it is {current})"),
        hint: format!("`{command}` in this shell, or /etc/security/limits.conf"),
    })
}

/// The processor's name, how many cores this process may use, and the kernel: what stands beside every measured figure.
pub(crate) fn machine() -> Result<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
    let model = info.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(": unknown processor");
    let cores = std::thread::available_parallelism().context("cannot count cores")?;
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    Ok(format!("{}, {cores} cores, Linux {kernel}", model.trim_start_matches([' ', '\t', ':'])))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_refused_by_number() {
        for release in ["5.19.0-50-generic", "6.1.0-18-amd64", "6.18.1", "10.0"] {
            assert_eq!(kernel(release), Ok(()), "{release}");
        }
        for release in ["5.15.0-100-generic", "4.19.0", "5.18", "", "unknown"] {
            assert!(kernel(release).is_err(), "{release}");
        }
    }

    #[test]
    fn a_limit_that_the_hard_one_forbids_is_named() {
        let missing = limit("open files", Resource::Nofile, u64::MAX - 1, "ulimit -n").unwrap_err();
        assert!(missing.to_string().contains("ulimit -n"), "{missing}");
        assert_eq!(limit("open files", Resource::Nofile, 1, "ulimit -n"), Ok(()));
    }
}
