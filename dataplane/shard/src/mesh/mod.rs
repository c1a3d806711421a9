//! Bounded rings between shards.
//!
//! Each ordered pair of shards has one ring with a single producer and a single consumer; what is sent is moved, not copied.
//! A full ring refuses ([`MeshPort::try_send`]) or makes the sender wait ([`MeshPort::send`]): nothing grows without bound.
//! A sleeping consumer is woken once for a batch. A hop costs tens of microseconds of latency and little throughput, so route
//! work to its owner before it arrives and treat the mesh as the exception.
//!
//! **Wakes.** A consumer that found nothing publishes its waker, raises `sleeping`, executes a sequentially consistent fence and looks
//! again; a producer pushes, executes the fence and then reads `sleeping`. Whichever fence comes first in the total order, either the
//! consumer's second look sees the message or the producer sees the flag (Dekker). The flag is taken with a swap, so only one
//! producer pays for the wake. Waiting for room is the same with the roles exchanged.

mod injector;
mod park;

/// What [`park`] is made of.
mod sync {
    pub(super) use std::sync::{
        Mutex,
        atomic::{AtomicBool, Ordering, fence},
    };
}

use std::{
    cell::Cell,
    fmt,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use crossbeam::{queue::ArrayQueue, utils::CachePadded};
pub use injector::{Injector, InjectorPort};
use metanode_types::{ShardCount, ShardId};
use park::Park;

/// Messages taken from one ring before the next one's turn, so that a busy neighbour doesn't starve the others.
const BURST: u32 = 32;

/// The rings of one mesh; see [`Mesh::new`].
#[derive(Debug)]
pub struct Mesh<M> {
    ports: Vec<MeshPort<M>>,
}

impl<M: Send> Mesh<M> {
    /// One port a shard, in order, with rings of `capacity` messages between all of them (a shard may also send to itself).
    ///
    /// # Panics
    /// When `capacity` is 0.
    #[allow(clippy::new_ret_no_self)] // a mesh is nothing but its ports
    pub fn new(count: ShardCount, capacity: usize) -> Vec<MeshPort<M>> {
        let inboxes: Vec<Arc<Inbox<M>>> = count
            .iter()
            .map(|_| {
                let rings = count.iter().map(|_| Ring::new(capacity)).collect();
                Arc::new(Inbox { rings, consumer: CachePadded::default(), closed: AtomicBool::new(false) })
            })
            .collect();
        let ports = count.iter().map(|me| MeshPort {
            me,
            outboxes: inboxes.clone(),
            inbox: inboxes[me.index()].clone(),
            cursor: Cell::new(0),
            burst: Cell::new(0),
        });
        Self { ports: ports.collect() }.ports
    }
}

/// What one shard receives from.
struct Inbox<M> {
    /// By sender.
    rings: Box<[Ring<M>]>,
    consumer: CachePadded<Park>,
    closed: AtomicBool,
}

struct Ring<M> {
    queue: ArrayQueue<M>,
    /// Senders that wait for room.
    producer: CachePadded<Park>,
}

impl<M> Ring<M> {
    fn new(capacity: usize) -> Self {
        Self { queue: ArrayQueue::new(capacity), producer: CachePadded::default() }
    }
}

/// One shard's end of a mesh. `Send`, so that it can be moved into its shard; used there through `&self`, by any number of
/// tasks that send and one that receives.
pub struct MeshPort<M> {
    me: ShardId,
    outboxes: Vec<Arc<Inbox<M>>>,
    inbox: Arc<Inbox<M>>,
    /// The ring to look at next, and how many messages it gave in a row.
    cursor: Cell<usize>,
    burst: Cell<u32>,
}

impl<M> fmt::Debug for MeshPort<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MeshPort").field("me", &self.me).field("shards", &self.outboxes.len()).finish()
    }
}

impl<M: Send> MeshPort<M> {
    /// The shard this port belongs to.
    pub fn shard(&self) -> ShardId {
        self.me
    }

    /// Sends without waiting. The message comes back when the ring is full or the receiver has gone.
    pub fn try_send(&self, to: ShardId, message: M) -> Result<(), M> {
        let inbox = &self.outboxes[to.index()];
        if inbox.closed.load(Ordering::Relaxed) {
            return Err(message);
        }
        inbox.rings[self.me.index()].queue.push(message)?;
        inbox.consumer.unpark();
        Ok(())
    }

    /// Sends, waiting for room. The message comes back only when the receiver has gone. Dropping the future before it is done
    /// sends nothing.
    pub async fn send(&self, to: ShardId, message: M) -> Result<(), M> {
        let inbox = &self.outboxes[to.index()];
        let ring = &inbox.rings[self.me.index()];
        let mut message = Some(message);
        poll_fn(|cx| {
            let mut attempt = || match self.try_send(to, message.take().expect("not polled after its end")) {
                Ok(()) => true,
                Err(unsent) => {
                    message = Some(unsent);
                    inbox.closed.load(Ordering::Acquire)
                }
            };
            if attempt() {
                return Poll::Ready(());
            }
            ring.producer.park(cx.waker());
            if attempt() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        message.map_or(Ok(()), Err)
    }

    /// The next message and its sender, if one has arrived.
    pub fn try_recv(&self) -> Option<(ShardId, M)> {
        let rings = &self.inbox.rings;
        let mut from = self.cursor.get();
        if self.burst.get() >= BURST {
            self.burst.set(0);
            from = (from + 1) % rings.len();
        }
        for _ in 0..rings.len() {
            let ring = &rings[from];
            if let Some(message) = ring.queue.pop() {
                if ring.producer.is_parked_hint() {
                    ring.producer.unpark();
                }
                self.burst.set(if from == self.cursor.get() { self.burst.get() + 1 } else { 1 });
                self.cursor.set(from);
                return Some((ShardId(from as u16), message));
            }
            from = (from + 1) % rings.len();
        }
        None
    }

    /// Waits for the next message. Only one task of the shard may wait at a time.
    pub async fn recv(&self) -> (ShardId, M) {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// [`recv`](Self::recv) for futures written by hand.
    pub fn poll_recv(&self, cx: &mut Context<'_>) -> Poll<(ShardId, M)> {
        if let Some(received) = self.try_recv() {
            return Poll::Ready(received);
        }
        // Nothing came: make sure that no sender sleeps on a ring that has become empty, then announce our own sleep.
        for ring in &self.inbox.rings {
            ring.producer.unpark();
        }
        self.inbox.consumer.park(cx.waker());
        match self.try_recv() {
            Some(received) => {
                self.inbox.consumer.cancel();
                Poll::Ready(received)
            }
            None => Poll::Pending,
        }
    }
}

impl<M> Drop for MeshPort<M> {
    fn drop(&mut self) {
        self.inbox.closed.store(true, Ordering::Release);
        self.inbox.consumer.cancel();
        for ring in &self.inbox.rings {
            ring.producer.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_ring_gives_the_message_back_and_rings_are_served_in_turn() {
        let count = ShardCount::new(3).unwrap();
        let ports = Mesh::<u32>::new(count, 64);
        for n in 0..64 {
            assert_eq!(ports[0].try_send(ShardId(2), n), Ok(()));
        }
        assert_eq!(ports[0].try_send(ShardId(2), 64), Err(64));
        assert_eq!(ports[1].try_send(ShardId(2), 1000), Ok(()));
        let senders: Vec<u16> = std::iter::from_fn(|| ports[2].try_recv()).map(|(from, _)| from.0).collect();
        assert_eq!(senders.len(), 65);
        let turn = senders.iter().position(|&from| from == 1).unwrap();
        assert!(turn <= BURST as usize, "the second sender waited for {turn} messages of the first");
    }

    #[test]
    fn a_port_that_has_gone_refuses() {
        let mut ports = Mesh::<String>::new(ShardCount::new(2).unwrap(), 4);
        drop(ports.pop());
        assert_eq!(ports[0].try_send(ShardId(1), "lost".into()), Err("lost".into()));
        assert_eq!(ports[0].try_send(ShardId(0), "self".into()), Ok(()));
    }
}
