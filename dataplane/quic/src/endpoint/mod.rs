//! One shard's end of the port: its connections, and the driver that moves their packets.
//!
//! * `mod` (here): state, what handlers and the node call;
//! * `driver`: the loop;
//! * `receive`: datagrams in: ownership, admission, handshakes;
//! * `transmit`: datagrams out, parked ones included;
//! * `deadlines`: timers of the connections.

mod deadlines;
mod driver;
mod receive;
mod transmit;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    fmt,
    future::poll_fn,
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    rc::Rc,
    sync::Arc,
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use deadlines::Deadlines;
use metanode_shard::{fill_random, mesh::MeshPort, now};
use metanode_types::ShardId;
use quinn_proto::{
    ClientConfig, ConnectionHandle, Dir, EndpointEvent, Event, Incoming, StreamEvent, TransportConfig, VarInt,
    crypto::rustls::QuicClientConfig,
};
use rustc_hash::FxHashMap;
use transmit::Parked;

use crate::{
    Config, Connection, ConnectionLost, Counters, ShardSocket,
    connection::{ConnectionState, Phase, Wakers, register, wake_all},
    port::WatchedSocket,
    steer::{self, Layout},
};

/// What a half-open connection has before another one may take its place: several round trips of any path on earth.
const HANDSHAKE_TIME_MIN: Duration = Duration::from_secs(1);

/// Bytes of an initial destination connection ID; RFC 9000 (section 7.2) asks for at least eight.
const INITIAL_ID_BYTES: usize = 8;

/// Round trip of a path that nothing is known of: of most; quinn's 333 ms would make a lost first packet cost a second.
const DIALLING_RTT: Duration = Duration::from_millis(100);

/// A datagram that arrived at another shard than its connection's: what travels over the mesh given to [`Endpoint::new`].
#[derive(Debug)]
pub struct Datagram {
    from: SocketAddr,
    to: Option<IpAddr>,
    ecn: Option<quinn_proto::EcnCodepoint>,
    bytes: BytesMut,
}

/// Dialling failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The dial was not even begun: a bad address, or no connection slot.
    #[error("cannot connect: {0}")]
    Refused(String),
    /// The handshake failed.
    #[error("handshake failed: {0}")]
    Lost(#[from] ConnectionLost),
}

/// One shard's QUIC endpoint. It does something only while [`Endpoint::run`] is polled.
pub struct Endpoint {
    shard: ShardId,
    layout: Layout,
    config: Config,
    /// Of connections that this side dials.
    dialling: Arc<TransportConfig>,
    counters: Arc<Counters>,
    socket: WatchedSocket,
    forward: MeshPort<Datagram>,
    proto: RefCell<quinn_proto::Endpoint>,
    /// By `ConnectionHandle`.
    connections: RefCell<Vec<Option<Rc<ConnectionState>>>>,
    connections_count: Cell<usize>,
    handshaking_count: Cell<usize>,
    per_address: RefCell<FxHashMap<IpAddr, usize>>,
    /// Handshakes that peers have begun, oldest first: when, slot, and the connection's number. Some are over.
    handshaking: RefCell<VecDeque<(Instant, usize, u64)>>,
    /// First packets that wait for their handshake's turn.
    incoming: RefCell<VecDeque<Incoming>>,
    /// Handshakes completed since the driver last looked.
    connected: RefCell<VecDeque<Connection>>,
    /// Connections that may have something to send or to tell.
    dirty: RefCell<VecDeque<Rc<ConnectionState>>>,
    deadlines: RefCell<Deadlines>,
    /// Transmits that wait for room in the socket's buffer.
    parked: RefCell<VecDeque<Parked>>,
    /// The driver's waker while it sleeps.
    driver: Cell<Option<Waker>>,
    idle_waiters: RefCell<Vec<Waker>>,
    shutting_down: Cell<bool>,
    next_id: Cell<u64>,
    /// Sends that are to fail as if the buffer were full; for tests.
    refuse_sends: Cell<u32>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("shard", &self.shard)
            .field("connections", &self.connections_count.get())
            .finish_non_exhaustive()
    }
}

impl Endpoint {
    /// The endpoint of `shard`, one of those that share a port. `forward` is this shard's port of a mesh between all of them.
    pub fn new(
        socket: ShardSocket,
        config: Config,
        shard: ShardId,
        layout: impl Into<Layout>,
        forward: MeshPort<Datagram>,
    ) -> io::Result<Rc<Self>> {
        Self::with_counters(socket, config, shard, layout, forward, Arc::default())
    }

    /// As [`new`](Self::new), with counters that were made, and shared, before the shard.
    pub fn with_counters(
        socket: ShardSocket,
        config: Config,
        shard: ShardId,
        layout: impl Into<Layout>,
        forward: MeshPort<Datagram>,
        counters: Arc<Counters>,
    ) -> io::Result<Rc<Self>> {
        let layout = layout.into();
        config.validate().map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let transport = Arc::new(config.transport());
        let server = Arc::new(config.server(transport));
        let mut dialling = config.transport();
        dialling.keep_alive_interval(config.keep_alive);
        dialling.initial_rtt(DIALLING_RTT);
        let socket = WatchedSocket::new(socket)?;
        let allow_mtu_discovery = !socket.may_fragment();
        let mut endpoint = config.endpoint(shard, layout);
        let mut seed = [0; 32];
        fill_random(&mut seed)?;
        endpoint.rng_seed(Some(seed));
        let proto = quinn_proto::Endpoint::new(Arc::new(endpoint), Some(server), allow_mtu_discovery, None);
        Ok(Rc::new(Self {
            shard,
            layout,
            config,
            dialling: Arc::new(dialling),
            counters,
            socket,
            forward,
            proto: RefCell::new(proto),
            connections: RefCell::default(),
            connections_count: Cell::new(0),
            handshaking_count: Cell::new(0),
            per_address: RefCell::default(),
            handshaking: RefCell::default(),
            incoming: RefCell::default(),
            connected: RefCell::default(),
            dirty: RefCell::default(),
            deadlines: RefCell::default(),
            parked: RefCell::default(),
            driver: Cell::default(),
            idle_waiters: RefCell::default(),
            shutting_down: Cell::new(false),
            next_id: Cell::new(0),
            refuse_sends: Cell::new(0),
        }))
    }

    /// What this endpoint has done.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// The port's address.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.socket.local_address()
    }

    /// Connections that exist, half-open and draining ones included.
    pub fn connections(&self) -> usize {
        self.connections_count.get()
    }

    /// Dials a node's shard [apart](steer::APART_BYTE), or the one in its place; the node must prove the key that `tls` expects. Meant for private sockets: stateless resets that come
    /// in carry random bytes and would be steered anywhere on a shared port.
    pub async fn connect(
        self: &Rc<Self>,
        tls: Arc<QuicClientConfig>,
        address: SocketAddr,
        server_name: &str,
    ) -> Result<Connection, ConnectError> {
        let mut client = ClientConfig::new(tls);
        client.transport_config(self.dialling.clone());
        let mut initial_id = [0; INITIAL_ID_BYTES];
        fill_random(&mut initial_id).map_err(|error| ConnectError::Refused(error.to_string()))?;
        initial_id[0] = steer::APART_BYTE;
        client.initial_dst_cid_provider(Arc::new(move || quinn_proto::ConnectionId::new(&initial_id)));
        let dialled = self.proto.borrow_mut().connect(now(), client, address, server_name);
        let (handle, proto) = dialled.map_err(|error| ConnectError::Refused(error.to_string()))?;
        let state = self.add(handle, proto, false);
        self.mark(&state);
        poll_fn(|cx| match (state.phase.get(), state.why_lost()) {
            (Phase::Connected, _) => Poll::Ready(Ok(Connection { state: state.clone(), endpoint: self.clone() })),
            (_, Some(why)) => Poll::Ready(Err(why.into())),
            _ => {
                register(&mut state.wakers.borrow_mut().connecting, cx);
                Poll::Pending
            }
        })
        .await
    }

    /// From now on new connections are refused.
    pub fn begin_shutdown(&self) {
        self.shutting_down.set(true);
    }

    /// Closes all connections.
    pub fn close_all(&self, code: u32, reason: &[u8]) {
        let reason = Bytes::copy_from_slice(reason);
        let all: Vec<_> = self.connections.borrow().iter().flatten().cloned().collect();
        for state in all {
            self.close(&state, code.into(), reason.clone());
        }
    }

    /// Waits until no connection is left: all were closed and their peers had time to hear of it.
    pub async fn wait_idle(&self) {
        poll_fn(|cx| {
            if self.connections_count.get() == 0 && self.incoming.borrow().is_empty() {
                return Poll::Ready(());
            }
            register(&mut self.idle_waiters.borrow_mut(), cx);
            Poll::Pending
        })
        .await;
    }

    /// Makes the next `count` sends fail as if the socket's buffer were full.
    #[doc(hidden)]
    pub fn refuse_sends(&self, count: u32) {
        self.refuse_sends.set(count);
    }

    pub(crate) fn close(&self, state: &Rc<ConnectionState>, code: VarInt, reason: Bytes) {
        if !state.is_lost() {
            state.proto.borrow_mut().close(now(), code, reason);
            self.lose(state, ConnectionLost::Closed);
            self.mark(state);
        }
    }

    /// Notes that a connection may have something to send.
    pub(crate) fn mark(&self, state: &Rc<ConnectionState>) {
        if !state.dirty.replace(true) {
            self.dirty.borrow_mut().push_back(state.clone());
        }
        if let Some(driver) = self.driver.take() {
            driver.wake();
        }
    }

    fn add(&self, handle: ConnectionHandle, proto: quinn_proto::Connection, is_server: bool) -> Rc<ConnectionState> {
        let deadline = now() + self.config.handshake_timeout;
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let state = Rc::new(ConnectionState {
            handle,
            id,
            first_address: limit_key(proto.remote_address().ip()),
            is_server,
            proto: RefCell::new(proto),
            dirty: Cell::new(false),
            phase: Cell::new(Phase::Handshaking { deadline }),
            forgotten: Cell::new(false),
            lost: Default::default(),
            wakers: RefCell::new(Wakers::default()),
        });
        let mut connections = self.connections.borrow_mut();
        if connections.len() <= handle.0 {
            connections.resize(handle.0 + 1, None);
        }
        connections[handle.0] = Some(state.clone());
        drop(connections);
        if is_server {
            let mut handshaking = self.handshaking.borrow_mut();
            while handshaking.front().is_some_and(|(_, slot, id)| self.half_open(*slot, *id).is_none()) {
                handshaking.pop_front();
            }
            handshaking.push_back((now(), handle.0, id));
        }
        *self.per_address.borrow_mut().entry(state.first_address).or_default() += 1;
        self.connections_count.set(self.connections_count.get() + 1);
        self.handshaking_count.set(self.handshaking_count.get() + 1);
        self.counters.handshakes_begun.increment();
        self.show_gauges();
        state
    }

    /// Forgets a connection about which no packet will be exchanged any more.
    fn remove(&self, state: &ConnectionState) {
        self.connections.borrow_mut()[state.handle.0] = None;
        self.deadlines.borrow_mut().remove(state.handle.0);
        let mut per_address = self.per_address.borrow_mut();
        if let Some(count) = per_address.get_mut(&state.first_address) {
            *count -= 1;
            if *count == 0 {
                per_address.remove(&state.first_address);
            }
        }
        self.connections_count.set(self.connections_count.get() - 1);
        self.show_gauges();
        if self.connections_count.get() == 0 {
            wake_all(&mut self.idle_waiters.borrow_mut());
        }
    }

    /// The connection of that slot and number, while its handshake is under way.
    fn half_open(&self, slot: usize, id: u64) -> Option<Rc<ConnectionState>> {
        let connections = self.connections.borrow();
        let state = connections.get(slot)?.as_ref()?;
        (state.id == id && matches!(state.phase.get(), Phase::Handshaking { .. })).then(|| state.clone())
    }

    /// Gives the oldest half-open connection up, when it has had [`HANDSHAKE_TIME_MIN`].
    fn give_up_oldest(&self, proto: &mut quinn_proto::Endpoint) -> bool {
        loop {
            let Some((begun, slot, id)) = self.handshaking.borrow().front().copied() else { return false };
            let state = self.half_open(slot, id);
            if state.is_some() && now() - begun < HANDSHAKE_TIME_MIN {
                return false;
            }
            self.handshaking.borrow_mut().pop_front();
            if let Some(state) = state {
                self.forget(&state, proto);
                return true;
            }
        }
    }

    /// Gives a half-open connection up, and frees it at once: nobody has proven to be there, so nobody is told. (A closed
    /// connection stays for three probe timeouts, a second at least: a flood would fill memory with them.)
    fn forget(&self, state: &ConnectionState, proto: &mut quinn_proto::Endpoint) {
        self.lose(state, ConnectionLost::TimedOut);
        state.forgotten.set(true);
        proto.handle_event(state.handle, EndpointEvent::drained());
        self.remove(state);
    }

    fn show_gauges(&self) {
        self.counters.connections.set(self.connections_count.get() as u64);
        self.counters.handshaking.set(self.handshaking_count.get() as u64);
    }

    /// The handshake is over, one way or the other.
    fn handshake_over(&self) {
        self.handshaking_count.set(self.handshaking_count.get() - 1);
        self.show_gauges();
    }

    fn lose(&self, state: &ConnectionState, why: ConnectionLost) {
        let counters = &self.counters;
        match state.phase.get() {
            Phase::Lost => return,
            Phase::Handshaking { .. } => {
                self.handshake_over();
                match why {
                    ConnectionLost::TimedOut => counters.handshakes_timed_out.increment(),
                    _ => counters.handshakes_failed.increment(),
                }
            }
            Phase::Connected => match why {
                ConnectionLost::ClosedByPeer { .. } => counters.lost_by_peer.increment(),
                ConnectionLost::Closed => counters.lost_closed.increment(),
                ConnectionLost::TimedOut => counters.lost_timed_out.increment(),
                ConnectionLost::Reset => counters.lost_reset.increment(),
                ConnectionLost::Protocol(_) => counters.lost_error.increment(),
            },
        }
        state.lose(why);
    }

    /// Passes a connection's events on: to quinn-proto's endpoint, and to the tasks that wait. Whether any task was woken.
    fn dispatch(self: &Rc<Self>, state: &Rc<ConnectionState>) -> bool {
        let mut woke = false;
        if state.forgotten.get() {
            return woke; // its slot may be another's
        }
        let mut proto = state.proto.borrow_mut();
        while let Some(event) = proto.poll_endpoint_events() {
            let is_drained = event.is_drained();
            if let Some(answer) = self.proto.borrow_mut().handle_event(state.handle, event) {
                proto.handle_event(answer);
            }
            if is_drained {
                self.remove(state);
            }
        }
        while let Some(event) = proto.poll() {
            let mut wakers = state.wakers.borrow_mut();
            let waker = match event {
                Event::Stream(StreamEvent::Readable { id }) => wakers.readers.remove(&id),
                Event::Stream(StreamEvent::Writable { id }) => wakers.writers.remove(&id),
                Event::Stream(StreamEvent::Finished { id }) => wakers.stopped.remove(&id),
                Event::Stream(StreamEvent::Stopped { id, .. }) => {
                    if let Some(stopped) = wakers.stopped.remove(&id) {
                        stopped.wake();
                        woke = true;
                    }
                    wakers.writers.remove(&id)
                }
                Event::Stream(StreamEvent::Opened { dir: Dir::Bi }) => {
                    woke |= wake_all(&mut wakers.accepting);
                    None
                }
                Event::Stream(StreamEvent::Available { dir: Dir::Bi }) => {
                    woke |= wake_all(&mut wakers.opening);
                    None
                }
                Event::Connected => {
                    if let Phase::Handshaking { .. } = state.phase.get() {
                        state.phase.set(Phase::Connected);
                        self.handshake_over();
                        self.counters.handshakes_done.increment();
                        wake_all(&mut wakers.connecting);
                        if state.is_server {
                            let connection = Connection { state: state.clone(), endpoint: self.clone() };
                            self.connected.borrow_mut().push_back(connection);
                        }
                        woke = true;
                    }
                    None
                }
                Event::ConnectionLost { reason } => {
                    drop(wakers);
                    self.lose(state, reason.into());
                    woke = true;
                    None
                }
                Event::Stream(_) | Event::HandshakeDataReady | Event::DatagramReceived | Event::DatagramsUnblocked => {
                    None
                }
            };
            if let Some(waker) = waker {
                waker.wake();
                woke = true;
            }
        }
        woke
    }
}

/// What the limit of connections per address counts: an IPv4 address, or the /64 that one IPv6 host commands.
fn limit_key(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX))),
    }
}
