use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    thread,
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};

use super::DataError;

/// The lock file's name. It is never removed: a lock on a removed file would keep nobody out.
pub(super) const FILE: &str = "lock";

/// Attempts and pause before a folder counts as locked: whoever only asks ([`holder`]) has let go by then.
const ATTEMPTS: u32 = 20;
const PAUSE: Duration = Duration::from_millis(10);

/// The running node's exclusive hold on a data folder (flock(2): it ends with the process at the latest).
#[derive(Debug)]
pub struct DataLock {
    file: File,
}

impl DataLock {
    pub(super) fn acquire(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join(FILE);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(DataError::write("open", &path))?;
        for attempt in 1.. {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if attempt < ATTEMPTS => thread::sleep(PAUSE),
                Err(rustix::io::Errno::WOULDBLOCK) => {
                    return Err(DataError::Locked { path: folder.to_owned(), pid: read_pid(&mut file) });
                }
                Err(error) => return Err(DataError::io("lock", &path)(error.into())),
            }
        }
        let mut lock = Self { file };
        lock.write_pid(&std::process::id().to_string()).map_err(DataError::write("write", &path))?;
        Ok(lock)
    }

    fn write_pid(&mut self, text: &str) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(text.as_bytes())
    }
}

impl Drop for DataLock {
    fn drop(&mut self) {
        // The number would mislead; if it can't be cleared, the lock itself still says that nobody runs.
        let _ = self.write_pid("");
    }
}

/// Whether somebody holds the lock of `folder`, and who.
pub(super) fn holder(folder: &Path) -> Result<Option<Option<u32>>, DataError> {
    let path = folder.join(FILE);
    let mut file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(DataError::io("open", &path))?,
    };
    match flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(None),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(Some(read_pid(&mut file))),
        Err(error) => Err(DataError::io("lock", &path)(error.into())),
    }
}

fn read_pid(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(16).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}
