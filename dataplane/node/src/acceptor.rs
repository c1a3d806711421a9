//! A thread that accepts connections of local clients and serves them one at a time.
//!
//! For the local socket and the metrics page: few clients, short exchanges, no executor. The thread sleeps in poll(2) on the
//! listener and on a socket pair whose other end stops it.

use std::{
    io,
    net::{TcpListener, TcpStream},
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, poll};

/// Pause after an accept that failed for want of descriptors or memory.
const PAUSE: Duration = Duration::from_millis(100);

/// A listening socket.
pub(crate) trait Listener: AsFd + Send + 'static {
    /// Its connections.
    type Stream;

    fn accept_one(&self) -> io::Result<Self::Stream>;
    fn not_blocking(&self) -> io::Result<()>;
}

impl Listener for UnixListener {
    type Stream = UnixStream;

    fn accept_one(&self) -> io::Result<UnixStream> {
        self.accept().map(|(stream, _)| stream)
    }

    fn not_blocking(&self) -> io::Result<()> {
        self.set_nonblocking(true)
    }
}

impl Listener for TcpListener {
    type Stream = TcpStream;

    fn accept_one(&self) -> io::Result<TcpStream> {
        self.accept().map(|(stream, _)| stream)
    }

    fn not_blocking(&self) -> io::Result<()> {
        self.set_nonblocking(true)
    }
}

/// The running thread. Dropping it ends the thread, after the connection that it serves.
#[derive(Debug)]
pub(crate) struct Acceptor {
    thread: Option<JoinHandle<()>>,
    stop: UnixStream,
}

impl Acceptor {
    /// Serves connections of `listener` with `serve`, which bounds its own time.
    pub(crate) fn start<L: Listener>(
        name: &str,
        listener: L,
        mut serve: impl FnMut(L::Stream) + Send + 'static,
    ) -> io::Result<Self> {
        // poll(2) may report a client that has gone again; accept must not wait for the next.
        listener.not_blocking()?;
        let (stop, stopped) = UnixStream::pair()?;
        let name_of_log = name.to_owned();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            while wait(&listener, &stopped) {
                match listener.accept_one() {
                    Ok(stream) => serve(stream),
                    Err(error) if is_gone(&error) => {}
                    Err(error) => {
                        tracing::warn!("{name_of_log}: accept: {error}");
                        thread::sleep(PAUSE);
                    }
                }
            }
        })?;
        Ok(Self { thread: Some(thread), stop })
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        // The thread sees the end of the pair; a shutdown of a connected pair does not fail.
        let _ = self.stop.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread that serves local clients has panicked");
        }
    }
}

/// Until there is a connection (true) or the end (false).
fn wait(listener: &impl AsFd, stopped: &UnixStream) -> bool {
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(stopped, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return false,
            Ok(_) if !fds[0].revents().is_empty() => return true,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!("poll: {error}");
                return false;
            }
        }
    }
}

/// The client left before it was accepted.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted)
}
