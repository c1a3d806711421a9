//! A waker that remembers that it was used, and tells the stall detector.
//!
//! glommio's registrations (poll sources, timers) gather one more waker at each poll, so a future that is polled again for
//! other reasons while it waits would grow a list. A [`Notice`] is registered once per wait; the futures of this crate ask it,
//! not the registration, whether anything happened.

use std::{
    cell::Cell,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use crate::stall;

#[derive(Default)]
pub(crate) struct Notice {
    fired: AtomicBool,
    task: Mutex<Option<Waker>>,
}

impl Notice {
    /// Whether it was woken since the last call.
    pub(crate) fn take_fired(&self) -> bool {
        self.fired.swap(false, Ordering::Acquire)
    }

    /// The task to wake next.
    pub(crate) fn register(&self, waker: &Waker) {
        let mut task = self.task.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *task {
            Some(known) if known.will_wake(waker) => {}
            slot => *slot = Some(waker.clone()),
        }
    }
}

impl Wake for Notice {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        stall::task_woken();
        self.fired.store(true, Ordering::Release);
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            task.wake();
        }
    }
}

thread_local! {
    static IN_FLIGHT: Cell<usize> = const { Cell::new(0) };
}

/// How many file operations and blocking calls of this shard are under way. They start, and are seen to be done, only when the
/// executor looks at I/O: a task that keeps it busy asks here how often to let it ([`yield_queue_now`](crate::yield_queue_now)).
pub fn io_in_flight() -> usize {
    IN_FLIGHT.get()
}

/// Polls `future` with a [`Notice`] as its waker, so that its wakes count in the stall detector.
pub(crate) struct Noticed<F> {
    future: Pin<Box<F>>,
    notice: Arc<Notice>,
    waker: Waker,
}

impl<F: Future> Noticed<F> {
    pub(crate) fn new(future: F) -> Self {
        let notice = Arc::new(Notice::default());
        IN_FLIGHT.set(IN_FLIGHT.get() + 1);
        Self { future: Box::pin(future), waker: Waker::from(notice.clone()), notice }
    }
}

impl<F> Drop for Noticed<F> {
    fn drop(&mut self) {
        IN_FLIGHT.set(IN_FLIGHT.get() - 1);
    }
}

impl<F: Future> Future for Noticed<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        this.notice.register(cx.waker());
        this.future.as_mut().poll(&mut Context::from_waker(&this.waker))
    }
}
