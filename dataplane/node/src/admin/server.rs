use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use metanode_admin_api::{DAMAGED_PAGE_MAX, FRAME_LIMITS, Reply, Request};
use metanode_wire::{Frame, FrameReader, Refusal};
use rustix::{
    fs::Mode,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType},
};

use crate::{acceptor::Acceptor, codes, state::NodeState};

/// A client that says nothing for so long is left: the next one waits for its turn.
const SILENCE_MAX: Duration = Duration::from_secs(1);

/// Clients that may wait in the queue of the listener.
const BACKLOG: i32 = 16;

/// Clients that asked for a stop and are told the end of it by the end of their stream. Others are told at once.
const STOPPERS_MAX: usize = 16;

/// Streams whose end says that the node has ended.
pub(crate) type Stoppers = Arc<Mutex<Vec<UnixStream>>>;

/// Listens at `path` (mode 0600) until the acceptor is dropped. Whatever socket lies there is a former life's: the caller
/// holds the folder's lock.
pub(crate) fn serve(path: &Path, state: Arc<NodeState>, stoppers: Stoppers) -> io::Result<Acceptor> {
    let listener = bind(path)?;
    Acceptor::start("admin", listener, move |stream| {
        if let Err(error) = converse(stream, &state, &stoppers) {
            tracing::debug!("local socket: {error}");
        }
    })
}

/// A listening socket at `path`, mode 0600, in place of whatever socket lies there.
pub(crate) fn bind(path: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The file gets the socket's mode, so there is no moment in which others could open it.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

fn converse(mut stream: UnixStream, state: &NodeState, stoppers: &Stoppers) -> io::Result<()> {
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    let mut reader = FrameReader::new(FRAME_LIMITS);
    let mut out = Vec::new();
    loop {
        out.clear();
        match next_frame(&mut stream, &mut reader)? {
            None => return Ok(()),
            Some(Ok((number, Request::Status))) => {
                Reply::Status(Box::new(state.status())).encode(&mut out, number);
                stream.write_all(&out)?;
            }
            Some(Ok((number, Request::Scrub { bytes_per_second }))) => {
                let begun = state.store.maintenance().scrub(bytes_per_second);
                Reply::Begun(begun).encode(&mut out, number);
                stream.write_all(&out)?;
            }
            Some(Ok((number, Request::Compact))) => {
                Reply::Begun(state.store.maintenance().compact()).encode(&mut out, number);
                stream.write_all(&out)?;
            }
            Some(Ok((number, Request::Survey))) => {
                Reply::Begun(state.store.maintenance().survey()).encode(&mut out, number);
                stream.write_all(&out)?;
            }
            Some(Ok((number, Request::Damaged { after }))) => {
                let (survey, hashes, more) = state.store.maintenance().damaged(after.as_ref(), DAMAGED_PAGE_MAX);
                Reply::Damaged { survey, hashes, more }.encode(&mut out, number);
                stream.write_all(&out)?;
            }
            Some(Ok((number, Request::StoreStatus))) => {
                Reply::StoreStatus(Box::new(state.store_status())).encode(&mut out, number);
                stream.write_all(&out)?;
            }
            Some(Ok((number, Request::Stop))) => {
                tracing::info!("asked to stop over the local socket");
                state.request_stop();
                Reply::Done.encode(&mut out, number);
                stream.write_all(&out)?;
                let mut waiting = stoppers.lock().unwrap_or_else(PoisonError::into_inner);
                if waiting.len() < STOPPERS_MAX {
                    waiting.push(stream);
                }
                return Ok(());
            }
            Some(Err((number, refusal))) => {
                Reply::Refused(refusal).encode(&mut out, number);
                return stream.write_all(&out);
            }
        }
    }
}

/// The next request, or how it is refused; `None` at the end of the stream.
#[expect(clippy::type_complexity, reason = "three outcomes, used once")]
fn next_frame(
    stream: &mut UnixStream,
    reader: &mut FrameReader,
) -> io::Result<Option<Result<(u32, Request), (u32, Refusal)>>> {
    let mut piece = [0; 1024];
    let refused = |number, error| (number, Refusal::new(codes::of_frame_error(error), error.to_string()));
    let checked = |frame: &Frame| match Request::from_frame(frame) {
        Ok(request) => Ok((frame.request, request)),
        Err(error) => Err(refused(frame.request, error)),
    };
    loop {
        match reader.next_frame() {
            Ok(Some(frame)) => return Ok(Some(checked(&frame))),
            Ok(None) => {}
            Err(error) => return Ok(Some(Err(refused(0, error)))),
        }
        match stream.read(&mut piece)? {
            0 => return Ok(None),
            count => reader.push(bytes::Bytes::copy_from_slice(&piece[..count])),
        }
    }
}
