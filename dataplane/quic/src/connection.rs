use std::{
    cell::{Cell, OnceCell, RefCell},
    fmt,
    future::poll_fn,
    net::{IpAddr, SocketAddr},
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Instant,
};

use bytes::Bytes;
use metanode_crypto::tls;
use metanode_types::NodeKey;
use quinn_proto::{ConnectionError, ConnectionHandle, Dir, StreamId, VarInt, crypto::rustls::HandshakeData};
use rustc_hash::FxHashMap;

use crate::{Endpoint, RecvStream, SendStream};

/// Why a connection has ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionLost {
    /// The peer's application closed it.
    #[error("closed by the peer: code {code}, {}", String::from_utf8_lossy(reason))]
    ClosedByPeer {
        /// The application's code.
        code: u64,
        /// The application's words.
        reason: Bytes,
    },
    /// This side closed it.
    #[error("closed")]
    Closed,
    /// Nothing came for the idle timeout, or the handshake took too long.
    #[error("timed out")]
    TimedOut,
    /// The peer doesn't know the connection any more: it was restarted.
    #[error("reset by the peer")]
    Reset,
    /// One of the sides violated the protocol, TLS included.
    #[error("{0}")]
    Protocol(String),
}

impl From<ConnectionError> for ConnectionLost {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => {
                Self::ClosedByPeer { code: close.error_code.into_inner(), reason: close.reason }
            }
            ConnectionError::LocallyClosed => Self::Closed,
            ConnectionError::TimedOut => Self::TimedOut,
            ConnectionError::Reset => Self::Reset,
            other => Self::Protocol(other.to_string()),
        }
    }
}

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Until then.
    Handshaking {
        deadline: Instant,
    },
    Connected,
    /// Closed by either side or failed; [`ConnectionState::lost`] says why. Packets may still be exchanged about it.
    Lost,
}

/// A connection as the endpoint keeps it.
pub(crate) struct ConnectionState {
    pub(crate) handle: ConnectionHandle,
    pub(crate) id: u64,
    /// What the limit of connections per address counts; the address may change later.
    pub(crate) first_address: IpAddr,
    pub(crate) is_server: bool,
    pub(crate) proto: RefCell<quinn_proto::Connection>,
    /// Whether it is in the endpoint's queue of connections that may have something to send.
    pub(crate) dirty: Cell<bool>,
    pub(crate) phase: Cell<Phase>,
    /// The endpoint doesn't know it any more.
    pub(crate) forgotten: Cell<bool>,
    pub(crate) lost: OnceCell<ConnectionLost>,
    pub(crate) wakers: RefCell<Wakers>,
}

/// Tasks that wait for something on a connection.
#[derive(Default)]
pub(crate) struct Wakers {
    pub(crate) readers: FxHashMap<StreamId, Waker>,
    pub(crate) writers: FxHashMap<StreamId, Waker>,
    pub(crate) stopped: FxHashMap<StreamId, Waker>,
    /// For streams to accept, streams to open, the handshake or the end.
    pub(crate) accepting: Vec<Waker>,
    pub(crate) opening: Vec<Waker>,
    pub(crate) connecting: Vec<Waker>,
    pub(crate) closing: Vec<Waker>,
}

pub(crate) fn register(wakers: &mut Vec<Waker>, cx: &Context<'_>) {
    if !wakers.iter().any(|known| known.will_wake(cx.waker())) {
        wakers.push(cx.waker().clone());
    }
}

pub(crate) fn wake_all(wakers: &mut Vec<Waker>) -> bool {
    let any = !wakers.is_empty();
    wakers.drain(..).for_each(Waker::wake);
    any
}

impl ConnectionState {
    pub(crate) fn is_lost(&self) -> bool {
        self.phase.get() == Phase::Lost
    }

    /// Ends the connection for its users; all who wait on it hear so.
    pub(crate) fn lose(&self, why: ConnectionLost) {
        self.phase.set(Phase::Lost);
        self.lost.set(why).ok(); // the first reason stays
        let mut wakers = self.wakers.borrow_mut();
        let wakers = &mut *wakers;
        for map in [&mut wakers.readers, &mut wakers.writers, &mut wakers.stopped] {
            map.drain().for_each(|(_, waker)| waker.wake());
        }
        for list in [&mut wakers.accepting, &mut wakers.opening, &mut wakers.connecting, &mut wakers.closing] {
            wake_all(list);
        }
    }

    pub(crate) fn why_lost(&self) -> Option<ConnectionLost> {
        if self.is_lost() { self.lost.get().cloned() } else { None }
    }
}

/// A connection whose handshake is complete. Cloning shares it; it lives until one side closes it or it times out, not until
/// the last clone is dropped.
#[derive(Clone)]
pub struct Connection {
    pub(crate) state: Rc<ConnectionState>,
    pub(crate) endpoint: Rc<Endpoint>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("id", &self.state.id).finish_non_exhaustive()
    }
}

impl Connection {
    /// A number that no other connection of this shard has or had.
    pub fn id(&self) -> u64 {
        self.state.id
    }

    /// The key that the peer has proved to hold.
    pub fn peer_key(&self) -> Option<NodeKey> {
        tls::peer_key(self.state.proto.borrow().crypto_session().peer_identity()?)
    }

    /// The protocol agreed on.
    pub fn alpn(&self) -> Option<Vec<u8>> {
        let data = self.state.proto.borrow().crypto_session().handshake_data()?;
        data.downcast::<HandshakeData>().ok()?.protocol
    }

    /// Where the peer's packets come from; it may change.
    pub fn remote_address(&self) -> SocketAddr {
        self.state.proto.borrow().remote_address()
    }

    /// Bytes of UDP payload that the path is known to carry.
    pub fn mtu(&self) -> u16 {
        self.state.proto.borrow().current_mtu()
    }

    /// The smoothed round-trip time.
    pub fn rtt(&self) -> std::time::Duration {
        self.state.proto.borrow().rtt()
    }

    /// Packets that were sent and declared lost, MTU probes not counted.
    pub fn packets_lost(&self) -> u64 {
        self.state.proto.borrow().stats().path.lost_packets
    }

    /// Waits for a stream that the peer opens.
    pub async fn accept_bi(&self) -> Result<(SendStream, RecvStream), ConnectionLost> {
        poll_fn(|cx| self.poll_accept_bi(cx)).await
    }

    fn poll_accept_bi(&self, cx: &mut Context<'_>) -> Poll<Result<(SendStream, RecvStream), ConnectionLost>> {
        if let Some(why) = self.state.why_lost() {
            return Poll::Ready(Err(why));
        }
        let accepted = self.state.proto.borrow_mut().streams().accept(Dir::Bi);
        match accepted {
            Some(id) => {
                self.endpoint.mark(&self.state); // the peer may get credit for another stream
                Poll::Ready(Ok(self.streams(id)))
            }
            None => {
                register(&mut self.state.wakers.borrow_mut().accepting, cx);
                Poll::Pending
            }
        }
    }

    /// Opens a stream, waiting until the peer permits one.
    pub async fn open_bi(&self) -> Result<(SendStream, RecvStream), ConnectionLost> {
        poll_fn(|cx| {
            if let Some(why) = self.state.why_lost() {
                return Poll::Ready(Err(why));
            }
            let opened = self.state.proto.borrow_mut().streams().open(Dir::Bi);
            match opened {
                Some(id) => Poll::Ready(Ok(self.streams(id))),
                None => {
                    register(&mut self.state.wakers.borrow_mut().opening, cx);
                    Poll::Pending
                }
            }
        })
        .await
    }

    fn streams(&self, id: StreamId) -> (SendStream, RecvStream) {
        (SendStream::new(self.clone(), id), RecvStream::new(self.clone(), id))
    }

    /// Closes the connection at once: what was not acknowledged may be lost. The peer is told `code` and `reason`.
    pub fn close(&self, code: u32, reason: &[u8]) {
        self.endpoint.close(&self.state, code.into(), Bytes::copy_from_slice(reason));
    }

    /// Waits for the end.
    pub async fn closed(&self) -> ConnectionLost {
        poll_fn(|cx| match self.state.why_lost() {
            Some(why) => Poll::Ready(why),
            None => {
                register(&mut self.state.wakers.borrow_mut().closing, cx);
                Poll::Pending
            }
        })
        .await
    }

    /// Changes how many unread bytes the peer may send on this connection, as when memory is short. What was granted stays
    /// granted.
    pub fn set_receive_window(&self, bytes: u64) {
        let bytes = VarInt::from_u64(bytes).unwrap_or(VarInt::MAX);
        self.state.proto.borrow_mut().set_receive_window(bytes);
        self.endpoint.mark(&self.state);
    }
}
