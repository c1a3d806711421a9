//! A bad network on loopback: a UDP proxy that loses, delays, reorders, doubles and damages datagrams, and gives its clients new addresses.
//!
//! [`Proxy::start`] listens on a free port and passes what it gets on to one server, from a socket of its own for each client, as
//! a NAT does. What becomes of a datagram is drawn from a seed, in the order of arrival. [`Proxy::rebind`] is a NAT that has
//! forgotten everything: from then on the server sees every client at a new address, and what it sends to the old one is lost.
//!
//! One thread, which sleeps in poll(2) until a datagram comes or is due. The program `metanode-proxy` is the same for peers that are
//! measured in other processes.

mod random;
mod relay;

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::unix::net::UnixStream,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// What happens to datagrams on their way, in each direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Conditions {
    /// Share that is lost: 0 to 1.
    pub loss: f64,
    /// Share that arrives twice: 0 to 1.
    pub duplication: f64,
    /// Share that arrives damaged, cut short or with one bit changed: 0 to 1.
    pub damage: f64,
    /// Time that each takes.
    pub delay: Duration,
    /// Each takes up to this time longer, drawn for itself: those that follow closely overtake each other.
    pub jitter: Duration,
    /// Bytes a second that the narrowest link of the path carries. What comes faster waits in front of it.
    pub rate: f64,
    /// How long a datagram may wait there: the link's buffer. One that would wait longer is dropped.
    pub buffer: Duration,
    /// Largest UDP payload in bytes that the path carries; larger ones vanish, as on a path without ICMP.
    pub mtu_bytes: usize,
}

impl Default for Conditions {
    /// A path without faults.
    fn default() -> Self {
        Self {
            loss: 0.0,
            duplication: 0.0,
            damage: 0.0,
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            rate: f64::INFINITY,
            buffer: Duration::MAX,
            mtu_bytes: usize::MAX,
        }
    }
}

/// What became of the datagrams so far, both directions together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Passed on, doubles included.
    pub passed: u64,
    /// Passed on a second time.
    pub doubled: u64,
    /// Lost by the draw.
    pub lost: u64,
    /// Damaged by the draw.
    pub damaged: u64,
    /// Too large for the path.
    pub too_large: u64,
    /// Lost because the link's buffer was full, more than [`QUEUE_BYTES_MAX`] were on the way, or a socket's buffer was full.
    pub overflowed: u64,
}

/// Bytes that may be on the way at once: 100 MB/s over 1.28 s. What a path of such a delay would hold; beyond, it drops.
pub const QUEUE_BYTES_MAX: usize = 128 << 20;

/// A running proxy. Dropping it ends it.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

/// What the proxy's owner and its thread share.
#[derive(Debug, Default)]
struct Shared {
    conditions: Mutex<Conditions>,
    /// How often clients were to get new addresses.
    rebinds: AtomicU64,
    /// How often they got them.
    rebound: AtomicU64,
    passed: AtomicU64,
    doubled: AtomicU64,
    lost: AtomicU64,
    damaged: AtomicU64,
    /// What clients have sent since recording began.
    record: Mutex<Option<Vec<Vec<u8>>>>,
    too_large: AtomicU64,
    overflowed: AtomicU64,
}

impl Proxy {
    /// A proxy to `server`, on a free port of `listen`, which is of the server's family.
    pub fn start(listen: IpAddr, server: SocketAddr, conditions: Conditions, seed: u64) -> io::Result<Self> {
        let front = UdpSocket::bind((listen, 0))?;
        let address = front.local_addr()?;
        let (wake, woken) = UnixStream::pair()?;
        woken.set_nonblocking(true)?;
        let shared = Arc::new(Shared { conditions: Mutex::new(conditions), ..Shared::default() });
        let mut relay = relay::Relay::new(front, server, woken, shared.clone(), seed)?;
        let thread = thread::Builder::new().name("proxy".to_owned()).spawn(move || relay.run())?;
        Ok(Self { address, shared, wake, thread: Some(thread) })
    }

    /// Where clients send to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what happens to datagrams that come from now on.
    pub fn set(&self, conditions: Conditions) {
        *self.shared.conditions.lock().unwrap_or_else(PoisonError::into_inner) = conditions;
    }

    /// Gives every client a new address before its next datagram is passed on.
    pub fn rebind(&self) {
        self.shared.rebinds.fetch_add(1, Ordering::Relaxed);
        // It sees the byte, or is awake already because others are in the pipe.
        let _ = io::Write::write(&mut &self.wake, &[0]);
    }

    /// How often clients have got new addresses.
    pub fn rebound(&self) -> u64 {
        self.shared.rebound.load(Ordering::Relaxed)
    }

    /// Keeps a copy of every datagram that clients send from now on.
    pub fn record(&self) {
        *self.shared.record.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }

    /// Ends the recording; what clients have sent meanwhile, in order.
    pub fn recorded(&self) -> Vec<Vec<u8>> {
        self.shared.record.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default()
    }

    /// What became of the datagrams.
    pub fn counts(&self) -> Counts {
        let shared = &self.shared;
        Counts {
            passed: shared.passed.load(Ordering::Acquire),
            doubled: shared.doubled.load(Ordering::Relaxed),
            lost: shared.lost.load(Ordering::Relaxed),
            damaged: shared.damaged.load(Ordering::Relaxed),
            too_large: shared.too_large.load(Ordering::Relaxed),
            overflowed: shared.overflowed.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // The thread sees the end of the pair; a shutdown of a connected pair does not fail.
        let _ = self.wake.shutdown(std::net::Shutdown::Both);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            panic!("the proxy's thread has panicked");
        }
    }
}
