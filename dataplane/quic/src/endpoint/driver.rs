//! The loop that moves packets.
//!
//! A round: receive (bounded), let timers expire, wake the tasks whose streams changed, yield so that they write, then send for each
//! connection that has something. As the tasks have all written by then, small answers share packets. Between rounds the
//! driver only yields while there is more to do, calling `recvmmsg` directly: waiting for readiness would let acknowledgements
//! starve. Yielding doesn't look at I/O, so that a busy driver does so itself every [`REACTOR_PERIOD`].
//!
//! Sleeping is expensive (seven `io_uring_enter`, a `membarrier` and a wake-up, some 30 µs of latency), so that under load the driver
//! stays awake for a moment: see [`Linger`].

use std::{
    future::poll_fn,
    rc::Rc,
    task::Poll,
    time::{Duration, Instant},
};

use metanode_shard::{Timer, io_in_flight, may_linger, now, yield_now, yield_queue_now};

use super::{Datagram, Endpoint, receive::Receiver};
use crate::{Connection, ConnectionLost};

/// How long a busy driver keeps the executor from looking at timers and other shards. A look costs about 4 µs.
const REACTOR_PERIOD: Duration = Duration::from_micros(200);

/// The same while file operations are under way: they are submitted, and answered, only by such a look.
const REACTOR_PERIOD_FILES: Duration = Duration::from_micros(25);

/// How long a driver with nothing to do stays awake, if that is worth while: about what sleeping and waking cost.
const LINGER_MAX: Duration = Duration::from_micros(25);

/// Staying awake is worth while if the latest work came within this time of falling idle: what lingering can catch, plus the
/// latency of a sleep that was too early.
const LINGER_WORTH: Duration = Duration::from_micros(75);

/// Timer of a driver without deadlines: any time that is long.
const FAR: Duration = Duration::from_secs(3600);

/// Room for a full GSO batch.
const SEND_BUFFER_BYTES: usize = 65_536;

fn reactor_period() -> Duration {
    if io_in_flight() == 0 { REACTOR_PERIOD } else { REACTOR_PERIOD_FILES }
}

/// Whether to stay awake for what comes next. Measured against always sleeping: 64 requests in flight cost 14 % less CPU and go
/// 30 % faster, a single one 40 % less at half the latency. A driver whose work is sparse sleeps at once.
#[derive(Default)]
struct Linger {
    idle_since: Option<Instant>,
    is_worthwhile: bool,
}

impl Linger {
    /// There is work.
    fn busy(&mut self) {
        if let Some(since) = self.idle_since.take() {
            self.is_worthwhile = now() - since <= LINGER_WORTH && may_linger();
        }
    }

    /// There is none. Whether to stay awake.
    fn idle(&mut self) -> bool {
        let since = *self.idle_since.get_or_insert_with(now);
        self.is_worthwhile && now() - since < LINGER_MAX
    }
}

/// Ends all connections for their handlers when the driver is dropped: nobody would ever wake them.
struct Abandon<'a>(&'a Endpoint);

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        let all: Vec<_> = self.0.connections.borrow().iter().flatten().cloned().collect();
        for state in all {
            self.0.lose(&state, ConnectionLost::Closed);
        }
    }
}

impl Endpoint {
    /// Drives the endpoint until the future is dropped. `on_connection` is called for each connection that a peer has opened,
    /// once its handshake is complete; it spawns what handles it.
    pub async fn run(self: Rc<Self>, mut on_connection: impl FnMut(Connection) + 'static) {
        let _abandon = Abandon(&self);
        let mut receiver = Receiver::new();
        let mut send_buffer = Vec::with_capacity(SEND_BUFFER_BYTES);
        let mut timer = Timer::after(FAR);
        let mut reactor_seen = now();
        let mut forwarded = None;
        let mut linger = Linger::default();
        loop {
            let drained = self.receive(&mut receiver);
            self.receive_forwarded(forwarded.take(), &mut receiver);
            self.begin_handshakes(&mut receiver);
            let looked = now();
            self.expire(looked);
            if !self.dirty.borrow().is_empty() {
                linger.busy();
            }
            if self.wake_handlers(&mut on_connection) {
                yield_now().await;
            }
            let sent = self.transmit_all(&mut send_buffer);
            send_buffer.reserve(SEND_BUFFER_BYTES); // it went with a parked transmit

            let idle = drained && self.incoming.borrow().is_empty() && (self.dirty.borrow().is_empty() || !sent);
            if idle && !linger.idle() {
                self.counters.parks.increment();
                forwarded = self.wait(&mut timer).await;
                reactor_seen = now();
            } else if looked - reactor_seen >= reactor_period() {
                yield_queue_now().await;
                reactor_seen = now();
            } else {
                yield_now().await;
            }
        }
    }

    /// Passes events to the tasks that wait for them. Whether any task has been woken.
    fn wake_handlers(self: &Rc<Self>, on_connection: &mut impl FnMut(Connection)) -> bool {
        let mut woke = false;
        let count = self.dirty.borrow().len();
        for index in 0..count {
            let state = self.dirty.borrow()[index].clone();
            woke |= self.dispatch(&state);
        }
        loop {
            let Some(connection) = self.connected.borrow_mut().pop_front() else {
                return woke;
            };
            on_connection(connection);
            woke = true;
        }
    }

    /// Waits until there is something to do: a packet, a deadline, a handler that wrote, room for a parked transmit, or a
    /// datagram from another shard, which is returned.
    async fn wait(&self, timer: &mut Timer) -> Option<Datagram> {
        let deadline = self.deadlines.borrow().next().unwrap_or_else(|| now() + FAR);
        // One that is too early only wakes the driver once more; moving it at each wait would cost more.
        if deadline < timer.deadline() || timer.deadline() <= now() {
            timer.reset_at(deadline);
        }
        let forwarded = poll_fn(|cx| {
            let parked = self.has_parked();
            if !parked && !self.dirty.borrow().is_empty() {
                return Poll::Ready(None);
            }
            if let Poll::Ready((_, datagram)) = self.forward.poll_recv(cx) {
                return Poll::Ready(Some(datagram));
            }
            let readable = self.socket.poll_readable(cx).is_ready();
            let writable = parked && self.socket.poll_writable(cx).is_ready();
            if readable || writable || timer.poll_expired(cx).is_ready() {
                return Poll::Ready(None);
            }
            self.driver.set(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
        self.driver.take();
        forwarded
    }
}
