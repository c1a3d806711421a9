//! A simulated network: what becomes of a datagram on its way is drawn from a seed.
//!
//! Sockets of a [`Network`] may be used inside a world, by what is simulated there, and outside of it, by what runs beside it
//! in the same thread. Whoever turns the world also delivers: [`Run::turn`](super::Run::turn) does both, in the order of time.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use super::Random;

/// What the network does to datagrams. Shares are one in so many; 0 is never.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conditions {
    /// Vanish.
    pub loss_once_in: u64,
    /// Arrive twice.
    pub double_once_in: u64,
    /// Arrive with a bit changed, or cut short.
    pub damage_once_in: u64,
    /// What each takes at least.
    pub delay: Duration,
    /// And up to this time longer, so that they overtake each other.
    pub jitter: Duration,
    /// Largest UDP payload; larger ones vanish.
    pub mtu_bytes: usize,
    /// Nothing arrives at all.
    pub cut: bool,
}

impl Default for Conditions {
    /// A fast network that loses nothing.
    fn default() -> Self {
        Self {
            loss_once_in: 0,
            double_once_in: 0,
            damage_once_in: 0,
            delay: Duration::from_micros(100),
            jitter: Duration::ZERO,
            mtu_bytes: 65_527,
            cut: false,
        }
    }
}

/// Datagrams that a socket keeps for its reader: 8 MiB of a kernel's buffer, in large ones.
const QUEUE_MAX: usize = 1024;

/// A network. Clones are the same one.
#[derive(Clone)]
pub struct Network(Arc<Mutex<Net>>);

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Network")
    }
}

struct Net {
    conditions: Conditions,
    random: Random,
    trace: DefaultHasher,
    /// Sockets by address. Several may share one; a rule of theirs says which gets a datagram.
    bound: BTreeMap<SocketAddr, Vec<Arc<Mutex<Queue>>>>,
    steer: fn(&[u8], usize) -> Option<usize>,
    flying: BTreeMap<(Duration, u64), Flying>,
    next: u64,
    port: u16,
    /// Whoever delivers, while it does something else.
    deliverer: Option<Waker>,
}

struct Flying {
    from: SocketAddr,
    to: SocketAddr,
    bytes: Vec<u8>,
}

struct Queue {
    address: SocketAddr,
    waiting: VecDeque<(SocketAddr, Vec<u8>)>,
    reader: Option<Waker>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Network {
    /// A network whose datagrams go, where several sockets share an address, to the one of that many that `steer` names, and to a
    /// drawn one when it names none.
    pub fn new(seed: u64, steer: fn(&[u8], usize) -> Option<usize>) -> Self {
        Self(Arc::new(Mutex::new(Net {
            conditions: Conditions::default(),
            random: Random::new(seed),
            trace: DefaultHasher::new(),
            bound: BTreeMap::new(),
            steer,
            flying: BTreeMap::new(),
            next: 0,
            port: 40_000,
            deliverer: None,
        })))
    }

    /// Changes what happens to datagrams that are sent from now on.
    pub fn set(&self, conditions: Conditions) {
        lock(&self.0).conditions = conditions;
    }

    /// Sockets that share an address that nobody has.
    ///
    /// # Panics
    /// When somebody has it.
    pub fn bind(&self, address: SocketAddr, count: usize) -> Vec<SimSocket> {
        let mut net = lock(&self.0);
        let queue = || Arc::new(Mutex::new(Queue { address, waiting: VecDeque::new(), reader: None }));
        let queues: Vec<_> = (0..count).map(|_| queue()).collect();
        let before = net.bound.insert(address, queues.clone());
        assert!(before.is_none(), "{address} is in use");
        queues.into_iter().map(|queue| SimSocket { network: self.clone(), queue }).collect()
    }

    /// A socket on a free port of `ip`.
    pub fn bind_any(&self, ip: std::net::IpAddr) -> SimSocket {
        let port = {
            let mut net = lock(&self.0);
            net.port += 1;
            net.port
        };
        self.bind(SocketAddr::new(ip, port), 1).pop().expect("one was asked for")
    }

    /// A hash of everything that was sent, and of what became of it.
    pub fn trace(&self) -> u64 {
        lock(&self.0).trace.finish()
    }

    /// Gives every socket of `ip` another port, as a NAT does that has forgotten them all: what is sent to the old ones is lost.
    pub fn move_all(&self, ip: std::net::IpAddr) {
        let mut net = lock(&self.0);
        let here: Vec<_> = net.bound.keys().filter(|address| address.ip() == ip).copied().collect();
        for address in here {
            let sockets = net.bound.remove(&address).unwrap_or_default();
            net.port += 1;
            let moved = SocketAddr::new(ip, net.port);
            for socket in &sockets {
                lock(socket).address = moved;
            }
            net.bound.insert(moved, sockets);
        }
    }

    /// Delivers all that is on its way, to those who are still there.
    pub fn settle(&self) {
        while self.next_due().is_some() {
            self.deliver();
        }
    }

    /// Wakes `waker` when something is sent, or nobody.
    pub(super) fn set_deliverer(&self, waker: Option<Waker>) {
        lock(&self.0).deliverer = waker;
    }

    /// When the next datagram arrives.
    pub(super) fn next_due(&self) -> Option<Duration> {
        lock(&self.0).flying.first_key_value().map(|((due, _), _)| *due)
    }

    /// Delivers the datagram that arrives next.
    pub(super) fn deliver(&self) {
        let mut net = lock(&self.0);
        let Some((_, Flying { from, to, bytes })) = net.flying.pop_first() else { return };
        let Some(queues) = net.bound.get(&to).cloned() else { return }; // nobody is there any more
        let steer = net.steer;
        let at = match steer(&bytes, queues.len()) {
            Some(at) => at,
            None => net.random.below(queues.len() as u64) as usize,
        };
        drop(net);
        let mut queue = lock(&queues[at]);
        if queue.waiting.len() < QUEUE_MAX {
            queue.waiting.push_back((from, bytes));
        }
        let reader = queue.reader.take();
        drop(queue);
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}

impl Net {
    fn send(&mut self, now: Duration, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        let Conditions { loss_once_in, double_once_in, damage_once_in, delay, jitter, mtu_bytes, cut } =
            self.conditions;
        // Drawn for each, whatever becomes of it, so that one datagram more or less of a kind does not change the fate of others.
        let lost = self.random.once_in(loss_once_in) || cut || bytes.len() > mtu_bytes;
        let copies = if self.random.once_in(double_once_in) { 2 } else { 1 };
        (now, from, to, bytes, lost, copies).hash(&mut self.trace);
        if lost {
            return;
        }
        for _ in 0..copies {
            let mut bytes = bytes.to_vec();
            if self.random.once_in(damage_once_in) && !bytes.is_empty() {
                let at = self.random.below(bytes.len() as u64) as usize;
                match self.random.below(2) {
                    0 => bytes[at] ^= 1 << self.random.below(8),
                    _ => bytes.truncate(at),
                }
            }
            let late = self.random.below(1 + u64::try_from(jitter.as_nanos()).unwrap_or(u64::MAX));
            let due = now + delay + Duration::from_nanos(late);
            self.next += 1;
            self.flying.insert((due, self.next), Flying { from, to, bytes });
        }
    }
}

/// A UDP socket of a [`Network`].
pub struct SimSocket {
    network: Network,
    queue: Arc<Mutex<Queue>>,
}

impl fmt::Debug for SimSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimSocket({})", self.address())
    }
}

impl SimSocket {
    /// Where it is reached.
    pub fn address(&self) -> SocketAddr {
        lock(&self.queue).address
    }

    /// Sends what is cut into segments of a size, the last of which may be shorter, at a time that the sender's clock says.
    pub fn send(&self, now: Duration, to: SocketAddr, contents: &[u8], segment_bytes: Option<usize>) {
        let from = self.address();
        let mut net = lock(&self.network.0);
        for datagram in contents.chunks(segment_bytes.unwrap_or(contents.len()).max(1)) {
            net.send(now, from, to, datagram);
        }
        let deliverer = net.deliverer.take();
        drop(net);
        if let Some(deliverer) = deliverer {
            deliverer.wake();
        }
    }

    /// The next datagram that has arrived, and from where.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let (from, bytes) = lock(&self.queue).waiting.pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        let length = bytes.len().min(buffer.len());
        buffer[..length].copy_from_slice(&bytes[..length]);
        Ok((length, from))
    }

    /// Ready when there is one.
    pub fn poll_readable(&self, cx: &Context<'_>) -> Poll<()> {
        let mut queue = lock(&self.queue);
        if !queue.waiting.is_empty() {
            return Poll::Ready(());
        }
        queue.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for SimSocket {
    fn drop(&mut self) {
        let address = self.address();
        let mut net = lock(&self.network.0);
        if let Some(queues) = net.bound.get_mut(&address) {
            queues.retain(|queue| !Arc::ptr_eq(queue, &self.queue));
            if queues.is_empty() {
                net.bound.remove(&address);
            }
        }
    }
}
