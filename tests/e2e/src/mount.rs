//! File systems of a test's own. They need root and `mount`(8); a test that gets none says so and is skipped.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::wait_for;

/// The longest that a file system may stay busy after its last process has ended.
const UNMOUNT_TIME_MAX: Duration = Duration::from_secs(10);

/// A mounted file system. Dropping it removes the mount, and fails the test when that does not work.
#[derive(Debug)]
pub struct Mount {
    path: PathBuf,
}

impl Mount {
    /// A file system in memory with room for `bytes`, at the folder `path`; `None`, with a line on standard error, where this
    /// process may not mount.
    pub fn tmpfs(path: &Path, bytes: u64) -> Option<Self> {
        let size = format!("size={bytes}");
        Self::make(&["-t", "tmpfs", "-o", &size, "metanode-e2e"], path)
    }

    /// The folder `path` as it is, but read-only.
    pub fn read_only(path: &Path) -> Option<Self> {
        let mount = Self::make(&["--bind", &path.display().to_string()], path)?;
        let done = Command::new("mount").args(["-o", "remount,bind,ro"]).arg(path).status();
        assert!(done.is_ok_and(|status| status.success()), "a bind mount can be made read-only");
        Some(mount)
    }

    fn make(arguments: &[&str], path: &Path) -> Option<Self> {
        let path = path.canonicalize().expect("the mount point is there");
        assert!(!is_mounted(&path));
        let skip = |why: String| {
            eprintln!("skipped: no file system of its own for this test: {why}");
            None
        };
        if !is_root() {
            return skip("not root".into());
        }
        match Command::new("mount").args(arguments).arg(&path).output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => return skip(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            Err(error) => return skip(format!("mount: {error}")),
        }
        assert!(is_mounted(&path));
        Some(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmount = |flags: &[&str]| Command::new("umount").args(flags).arg(&self.path).output();
        let gone = wait_for(UNMOUNT_TIME_MAX, || {
            let _ = unmount(&[]); // busy as long as a killed process is on its way out
            (!is_mounted(&self.path)).then_some(())
        });
        if gone.is_none() {
            let _ = unmount(&["--lazy"]);
        }
        let left = is_mounted(&self.path);
        if !std::thread::panicking() {
            assert!(gone.is_some() && !left, "{} was still busy", self.path.display());
        }
    }
}

/// Whether this process may do everything.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Bytes that are free on the file system of `path`.
pub fn free_bytes(path: &Path) -> u64 {
    let disk = rustix::fs::statvfs(path).expect("the folder is there");
    disk.f_bavail * disk.f_frsize
}

fn is_mounted(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("proc is mounted");
    mounts.lines().any(|line| line.split(' ').nth(4) == path.to_str())
}
