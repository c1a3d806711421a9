//! The proxy's thread.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
    io::{self, Read as _},
    net::{IpAddr, SocketAddr, UdpSocket},
    os::unix::net::UnixStream,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::sockopt,
};

use crate::{QUEUE_BYTES_MAX, Shared, random::Random};

/// Kernel buffers of each socket; the kernel may grant less.
const SOCKET_BUFFER_BYTES: usize = 8 << 20;

/// The largest UDP payload.
const DATAGRAM_BYTES_MAX: usize = 65_535;

/// Datagrams taken from one socket before the others' turn.
const TAKEN_MAX: usize = 64;

/// Clients that the proxy remembers; the first datagram of a further one is dropped. A flood of addresses needs no more.
const CLIENTS_MAX: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Towards {
    Server,
    Client,
}

/// A datagram on its way. Ordered by when it is due, then by arrival.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Flying {
    due: Instant,
    number: u64,
    towards: Towards,
    client: usize,
    is_double: bool,
    bytes: Vec<u8>,
}

struct Client {
    address: SocketAddr,
    /// Where the server sees it.
    back: UdpSocket,
}

pub(crate) struct Relay {
    front: UdpSocket,
    server: SocketAddr,
    woken: UnixStream,
    shared: Arc<Shared>,
    random: Random,
    clients: Vec<Client>,
    by_address: HashMap<SocketAddr, usize>,
    flying: BinaryHeap<Reverse<Flying>>,
    flying_bytes: usize,
    /// When the link has sent what waits for it, in each direction.
    link_free: [Instant; 2],
    next_number: u64,
    buffer: Vec<u8>,
}

impl Relay {
    pub(crate) fn new(
        front: UdpSocket,
        server: SocketAddr,
        woken: UnixStream,
        shared: Arc<Shared>,
        seed: u64,
    ) -> io::Result<Self> {
        prepare(&front)?;
        Ok(Self {
            front,
            server,
            woken,
            shared,
            random: Random(seed),
            clients: Vec::new(),
            by_address: HashMap::new(),
            flying: BinaryHeap::new(),
            flying_bytes: 0,
            link_free: [Instant::now(); 2],
            next_number: 0,
            buffer: vec![0; DATAGRAM_BYTES_MAX],
        })
    }

    pub(crate) fn run(&mut self) {
        loop {
            let timeout = self.flying.peek().map(|next| next.0.due.saturating_duration_since(Instant::now()));
            let Some(ready) = self.wait(timeout) else { return };
            if ready[1] && self.owner_has_gone() {
                return;
            }
            self.rebind();
            if ready[0] {
                self.take_from_clients();
            }
            for (client, is_ready) in ready[2..].iter().enumerate() {
                if *is_ready {
                    self.take_from_server(client);
                }
            }
            self.deliver();
        }
    }

    /// Waits for a datagram, for the owner, or until the time is over. Which descriptors are ready: front, owner, clients; `None`
    /// when waiting is impossible.
    fn wait(&self, timeout: Option<Duration>) -> Option<Vec<bool>> {
        let mut fds = vec![PollFd::new(&self.front, PollFlags::IN), PollFd::new(&self.woken, PollFlags::IN)];
        fds.extend(self.clients.iter().map(|client| PollFd::new(&client.back, PollFlags::IN)));
        let timeout = timeout.map(|time| Timespec {
            tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Some(fds.iter().map(|fd| !fd.revents().is_empty()).collect()),
            Err(error) => {
                eprintln!("proxy: poll: {error}");
                None
            }
        }
    }

    fn owner_has_gone(&mut self) -> bool {
        matches!(self.woken.read(&mut [0; 64]), Ok(0))
    }

    /// New addresses for all clients, if that was asked for.
    fn rebind(&mut self) {
        let asked = self.shared.rebinds.load(Ordering::Relaxed);
        if self.shared.rebound.load(Ordering::Relaxed) == asked {
            return;
        }
        for client in &mut self.clients {
            match back(self.server) {
                Ok(back) => client.back = back,
                Err(error) => eprintln!("proxy: no new address for a client: {error}"),
            }
        }
        self.shared.rebound.store(asked, Ordering::Relaxed);
    }

    fn take_from_clients(&mut self) {
        for _ in 0..TAKEN_MAX {
            let (length, address) = match self.front.recv_from(&mut self.buffer) {
                Ok(taken) => taken,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => continue, // an ICMP message about something sent earlier
            };
            let client = match self.by_address.get(&address) {
                Some(&client) => client,
                None if self.clients.len() == CLIENTS_MAX => {
                    self.shared.overflowed.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                None => match back(self.server) {
                    Ok(back) => {
                        self.clients.push(Client { address, back });
                        self.by_address.insert(address, self.clients.len() - 1);
                        self.clients.len() - 1
                    }
                    Err(error) => {
                        eprintln!("proxy: no address for a client: {error}");
                        continue;
                    }
                },
            };
            self.send_off(Towards::Server, client, length);
        }
    }

    fn take_from_server(&mut self, client: usize) {
        for _ in 0..TAKEN_MAX {
            match self.clients[client].back.recv(&mut self.buffer) {
                Ok(length) => self.send_off(Towards::Client, client, length),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {} // as above
            }
        }
    }

    /// Decides about the datagram in the buffer.
    fn send_off(&mut self, towards: Towards, client: usize, length: usize) {
        let conditions = *self.shared.conditions.lock().unwrap_or_else(PoisonError::into_inner);
        if towards == Towards::Server
            && let Some(record) = &mut *self.shared.record.lock().unwrap_or_else(PoisonError::into_inner)
        {
            record.push(self.buffer[..length].to_vec());
        }
        if length > conditions.mtu_bytes {
            self.shared.too_large.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if self.random.share() < conditions.loss {
            self.shared.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let copies = if self.random.share() < conditions.duplication { 2 } else { 1 };
        for copy in 0..copies {
            if self.flying_bytes + length > QUEUE_BYTES_MAX {
                self.shared.overflowed.fetch_add(1, Ordering::Relaxed);
                return;
            }
            let now = Instant::now();
            let free = &mut self.link_free[towards as usize];
            let begins = now.max(*free);
            if begins - now > conditions.buffer {
                self.shared.overflowed.fetch_add(1, Ordering::Relaxed);
                return;
            }
            *free = begins + Duration::from_secs_f64(length as f64 / conditions.rate);
            let due = *free + conditions.delay + conditions.jitter.mul_f64(self.random.share());
            let mut bytes = self.buffer[..length].to_vec();
            if self.random.share() < conditions.damage {
                self.shared.damaged.fetch_add(1, Ordering::Relaxed);
                damage(&mut bytes, self.random.share(), self.random.share());
            }
            self.flying_bytes += bytes.len();
            let number = self.next_number;
            self.flying.push(Reverse(Flying { due, number, towards, client, is_double: copy > 0, bytes }));
            self.next_number += 1;
        }
    }

    /// Passes on what is due.
    fn deliver(&mut self) {
        let now = Instant::now();
        while self.flying.peek().is_some_and(|next| next.0.due <= now) {
            let Some(Reverse(datagram)) = self.flying.pop() else { return };
            self.flying_bytes -= datagram.bytes.len();
            let client = &self.clients[datagram.client];
            let sent = match datagram.towards {
                Towards::Server => client.back.send(&datagram.bytes),
                Towards::Client => self.front.send_to(&datagram.bytes, client.address),
            };
            // A full buffer, or a port that nobody listens on: the network has lost it.
            if sent.is_err() {
                self.shared.overflowed.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            self.shared.doubled.fetch_add(datagram.is_double.into(), Ordering::Relaxed);
            self.shared.passed.fetch_add(1, Ordering::Release); // whoever sees it sees the others
        }
    }
}

/// Cuts a datagram short or changes one bit of it; `place` and `how` are from 0 to 1.
fn damage(bytes: &mut Vec<u8>, place: f64, how: f64) {
    let at = ((bytes.len() as f64 * place) as usize).min(bytes.len().saturating_sub(1));
    match bytes.get_mut(at) {
        Some(byte) if how < 0.5 => *byte ^= 1 << (how * 16.0) as u32,
        _ => bytes.truncate(at),
    }
}

/// A socket on which the server sees a client.
fn back(server: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(server)?;
    prepare(&socket)?;
    Ok(socket)
}

fn prepare(socket: &UdpSocket) -> io::Result<()> {
    // The kernel grants what its own limits allow.
    let _ = sockopt::set_socket_recv_buffer_size(socket, SOCKET_BUFFER_BYTES);
    let _ = sockopt::set_socket_send_buffer_size(socket, SOCKET_BUFFER_BYTES);
    socket.set_nonblocking(true)
}
