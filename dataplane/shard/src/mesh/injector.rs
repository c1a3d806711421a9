use std::{
    fmt,
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use crossbeam::{queue::ArrayQueue, utils::CachePadded};

use super::park::Park;

/// Sends into one shard from threads that are not shards. Replies travel through a standard channel inside the message.
pub struct Injector<M>(Arc<Shared<M>>);

/// The shard's end of an [`Injector`].
pub struct InjectorPort<M>(Arc<Shared<M>>);

struct Shared<M> {
    queue: ArrayQueue<M>,
    consumer: CachePadded<Park>,
    closed: AtomicBool,
}

impl<M> Clone for Injector<M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<M> fmt::Debug for Injector<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Injector")
    }
}

impl<M> fmt::Debug for InjectorPort<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InjectorPort")
    }
}

impl<M: Send> Injector<M> {
    /// A queue of `capacity` messages and its receiving end.
    ///
    /// # Panics
    /// When `capacity` is 0.
    #[allow(clippy::new_ret_no_self)] // both ends are made together
    pub fn new(capacity: usize) -> (Self, InjectorPort<M>) {
        let shared = Arc::new(Shared {
            queue: ArrayQueue::new(capacity),
            consumer: CachePadded::default(),
            closed: AtomicBool::new(false),
        });
        (Self(shared.clone()), InjectorPort(shared))
    }

    /// Sends without waiting, from any thread. The message comes back when the queue is full or the shard has gone.
    pub fn try_send(&self, message: M) -> Result<(), M> {
        if self.is_closed() {
            return Err(message);
        }
        self.0.queue.push(message)?;
        self.0.consumer.unpark();
        Ok(())
    }

    /// Whether the receiving end has gone.
    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Acquire)
    }
}

impl<M: Send> InjectorPort<M> {
    /// The next message, if one has arrived.
    pub fn try_recv(&self) -> Option<M> {
        self.0.queue.pop()
    }

    /// Waits for the next message. Only one task may wait at a time.
    pub async fn recv(&self) -> M {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// [`recv`](Self::recv) for futures written by hand.
    pub fn poll_recv(&self, cx: &mut Context<'_>) -> Poll<M> {
        if let Some(message) = self.try_recv() {
            return Poll::Ready(message);
        }
        self.0.consumer.park(cx.waker());
        match self.try_recv() {
            Some(message) => {
                self.0.consumer.cancel();
                Poll::Ready(message)
            }
            None => Poll::Pending,
        }
    }
}

impl<M> Drop for InjectorPort<M> {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Release);
        self.0.consumer.cancel();
        while self.0.queue.pop().is_some() {}
    }
}
