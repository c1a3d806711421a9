use std::{
    io::{self, Read as _, Write as _},
    os::unix::{fs::MetadataExt as _, net::UnixStream},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use metanode_admin_api::{FRAME_LIMITS, NodeStatusInfo, Reply, Request, StoreStatus};
use metanode_types::Hash;
use metanode_wire::{FrameError, FrameReader, Refusal};

use crate::data::{self, DataError};

/// Time for the answer to a question that the node answers from memory.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);

/// Pause between two looks at the lock of a node that has closed its socket.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Why a node could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Nothing listens: no node runs on this data folder.
    #[error("{}: no node is running on this data folder", path.display())]
    NotRunning {
        /// The data folder.
        path: PathBuf,
    },
    /// The socket belongs to somebody else than the folder's owner.
    #[error("{}: the process that answers belongs to user {uid}, not to the data folder's owner", path.display())]
    Impostor {
        /// The socket.
        path: PathBuf,
        /// Whose process answers.
        uid: u32,
    },
    /// Not done in time.
    #[error("the node did not {what} within {} ms", after.as_millis())]
    Timeout {
        /// What was waited for: a verb.
        what: &'static str,
        /// How long.
        after: Duration,
    },
    /// The node refused.
    #[error("the node refused: {0}")]
    Refused(Refusal),
    /// What came back is no answer.
    #[error("the node's answer can't be read: {0}")]
    Protocol(#[from] FrameError),
    /// The socket failed.
    #[error("local socket {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// How.
        source: io::Error,
    },
    /// The data folder.
    #[error(transparent)]
    Data(#[from] DataError),
}

/// Asks the node that runs on the data folder at `path` how it is.
pub fn status(path: &Path) -> Result<NodeStatusInfo, AdminError> {
    let mut talk = Talk::open(path, ANSWER_TIME_MAX)?;
    match talk.ask(Request::Status)? {
        Reply::Status(info) => Ok(*info),
        other => Err(unexpected(other)),
    }
}

/// Stops the node that runs on the data folder at `path`, and waits until it has ended: answered, synced, lock released.
///
/// After [`AdminError::Timeout`] the stop goes on.
pub fn stop(path: &Path, deadline: Duration) -> Result<(), AdminError> {
    let mut talk = Talk::open(path, deadline)?;
    match talk.ask(Request::Stop)? {
        Reply::Done => {}
        other => return Err(unexpected(other)),
    }
    talk.wait_for_end()?;
    while data::is_locked(path)?.is_some() {
        talk.time_left("end")?;
        thread::sleep(LOCK_PAUSE);
    }
    Ok(())
}

/// Begins a scrub of the store; its number.
pub fn scrub(path: &Path, bytes_per_second: u64) -> Result<u64, AdminError> {
    begin(path, Request::Scrub { bytes_per_second })
}

/// Begins to free what can be freed; the number of the work.
pub fn compact(path: &Path) -> Result<u64, AdminError> {
    begin(path, Request::Compact)
}

/// Begins to look for the blobs that known damage belongs to; the number of the work.
pub fn survey(path: &Path) -> Result<u64, AdminError> {
    begin(path, Request::Survey)
}

/// All blobs that a survey has found; `None` when another one was begun since.
pub fn damaged(path: &Path, number: u64) -> Result<Option<Vec<Hash>>, AdminError> {
    let mut all: Vec<Hash> = Vec::new();
    loop {
        // A conversation for each page: they are short.
        match Talk::open(path, ANSWER_TIME_MAX)?.ask(Request::Damaged { after: all.last().copied() })? {
            Reply::Damaged { survey, .. } if survey != number => return Ok(None),
            Reply::Damaged { hashes, more, .. } => {
                if hashes.first().is_some_and(|first| all.last().is_some_and(|last| first <= last)) {
                    return Err(FrameError::Malformed.into());
                }
                all.extend(hashes);
                if !more {
                    return Ok(Some(all));
                }
            }
            other => return Err(unexpected(other)),
        }
    }
}

fn begin(path: &Path, request: Request) -> Result<u64, AdminError> {
    match Talk::open(path, ANSWER_TIME_MAX)?.ask(request)? {
        Reply::Begun(number) => Ok(number),
        other => Err(unexpected(other)),
    }
}

/// Asks how the store of the running node is.
pub fn store_status(path: &Path) -> Result<StoreStatus, AdminError> {
    match Talk::open(path, ANSWER_TIME_MAX)?.ask(Request::StoreStatus)? {
        Reply::StoreStatus(status) => Ok(*status),
        other => Err(unexpected(other)),
    }
}

fn unexpected(reply: Reply) -> AdminError {
    match reply {
        Reply::Refused(refusal) => AdminError::Refused(refusal),
        Reply::Status(_) | Reply::Begun(_) | Reply::StoreStatus(_) | Reply::Damaged { .. } | Reply::Done => {
            AdminError::Protocol(FrameError::Malformed)
        }
    }
}

/// One conversation with a node.
struct Talk {
    stream: UnixStream,
    socket: PathBuf,
    reader: FrameReader,
    begun: Instant,
    time_max: Duration,
}

impl Talk {
    fn open(folder: &Path, time_max: Duration) -> Result<Self, AdminError> {
        let socket = data::admin_socket_of(folder)?;
        let failed = |source| AdminError::Io { path: socket.clone(), source };
        let stream = match UnixStream::connect(&socket) {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Err(AdminError::NotRunning { path: folder.to_owned() });
            }
            connected => connected.map_err(failed)?,
        };
        let uid = rustix::net::sockopt::socket_peercred(&stream).map_err(|error| failed(error.into()))?.uid.as_raw();
        let owner = folder.metadata().map_err(DataError::io("look at", folder))?.uid();
        if uid != owner && uid != 0 {
            return Err(AdminError::Impostor { path: socket, uid });
        }
        Ok(Self { stream, socket, reader: FrameReader::new(FRAME_LIMITS), begun: Instant::now(), time_max })
    }

    fn ask(&mut self, request: Request) -> Result<Reply, AdminError> {
        let mut out = Vec::new();
        request.encode(&mut out, 1);
        let left = self.time_left("answer")?;
        let sent = self.stream.set_write_timeout(Some(left)).and_then(|()| self.stream.write_all(&out));
        sent.map_err(|source| self.failed(source))?;
        loop {
            if let Some(frame) = self.reader.next_frame()? {
                return Ok(Reply::from_frame(&frame)?);
            }
            match self.read("answer")? {
                Some(bytes) => self.reader.push(bytes),
                None => return Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
            }
        }
    }

    fn wait_for_end(&mut self) -> Result<(), AdminError> {
        while self.read("end")?.is_some() {}
        Ok(())
    }

    /// The next bytes; `None` when the node has closed, in whatever way.
    fn read(&mut self, what: &'static str) -> Result<Option<bytes::Bytes>, AdminError> {
        let left = self.time_left(what)?;
        let mut piece = [0; 1024];
        match self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.read(&mut piece)) {
            Ok(0) => Ok(None),
            Ok(count) => Ok(Some(bytes::Bytes::copy_from_slice(&piece[..count]))),
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionReset => Ok(None),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Err(self.late(what)),
                io::ErrorKind::Interrupted => self.read(what),
                _ => Err(self.failed(error)),
            },
        }
    }

    fn time_left(&self, what: &'static str) -> Result<Duration, AdminError> {
        let left = self.time_max.saturating_sub(self.begun.elapsed());
        if left.is_zero() { Err(self.late(what)) } else { Ok(left) }
    }

    fn late(&self, what: &'static str) -> AdminError {
        AdminError::Timeout { what, after: self.time_max }
    }

    fn failed(&self, source: io::Error) -> AdminError {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => self.late("answer"),
            _ => AdminError::Io { path: self.socket.clone(), source },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use metanode_wire::RefusalCode;

    use super::*;
    use crate::data::DataFolder;

    /// A folder, and a node that answers one request with `reply` and closes.
    fn imitate(reply: impl FnOnce(&mut Vec<u8>) + Send + 'static) -> (tempfile::TempDir, thread::JoinHandle<()>) {
        let temp = tempfile::tempdir().unwrap();
        let data = DataFolder::open_or_init(temp.path()).unwrap();
        let listener = UnixListener::bind(data.admin_socket()).unwrap();
        let node = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut out = Vec::new();
            reply(&mut out);
            stream.read_exact(&mut [0; 16]).unwrap();
            stream.write_all(&out).unwrap();
        });
        (temp, node)
    }

    #[test]
    fn without_a_node_it_is_said_that_none_runs() {
        let temp = tempfile::tempdir().unwrap();
        let data = DataFolder::open_or_init(temp.path()).unwrap();
        assert!(matches!(status(temp.path()), Err(AdminError::NotRunning { .. })));
        drop(UnixListener::bind(data.admin_socket()).unwrap());
        assert!(data.admin_socket().exists(), "left behind, as by a crash");
        assert!(matches!(status(temp.path()), Err(AdminError::NotRunning { .. })));
        assert!(matches!(stop(temp.path(), ANSWER_TIME_MAX), Err(AdminError::NotRunning { .. })));
        let nowhere = temp.path().join("nowhere");
        assert!(matches!(status(&nowhere), Err(AdminError::NotRunning { .. })), "{:?}", status(&nowhere));
    }

    #[test]
    fn refusals_and_nonsense_are_told_apart() {
        let refusal = Refusal::new(RefusalCode::NotSupported, "later");
        let (temp, node) = imitate(move |out| Reply::Refused(refusal).encode(out, 1));
        assert!(matches!(status(temp.path()), Err(AdminError::Refused(refusal)) if refusal.detail == "later"));
        node.join().unwrap();
        let (temp, node) = imitate(|out| out.extend([9; 16]));
        let answer = status(temp.path());
        assert!(matches!(answer, Err(AdminError::Protocol(FrameError::UnsupportedVersion(9)))), "{answer:?}");
        node.join().unwrap();
        let (temp, node) = imitate(|_| ());
        assert!(matches!(status(temp.path()), Err(AdminError::Io { .. })));
        node.join().unwrap();
    }

    #[test]
    fn a_stop_waits_for_the_lock() {
        let (temp, node) = imitate(|out| Reply::Done.encode(out, 1));
        let lock = DataFolder::open(temp.path()).unwrap().lock().unwrap();
        let deadline = Duration::from_millis(300);
        let late = stop(temp.path(), deadline);
        assert!(matches!(late, Err(AdminError::Timeout { what: "end", .. })), "{late:?}");
        node.join().unwrap();
        drop(lock);
    }
}
