//! All tasks of a shard, so that none outlives it.
//!
//! glommio keeps no list of its tasks: one that waits is held only by its wakers, and these often lie in what the task itself
//! owns (a socket's registration, a connection's table). Such a task would never be dropped, nor would its sockets and locks,
//! when the shard's main future ends or panics. So each task's future lies in a cell that this list knows too.
//!
//! glommio's executor is also of no use after a panic has passed through it, so panics are caught here and handed to whoever runs the
//! shard ([`poll_panic`]), which then ends it in order.

use std::{
    any::Any,
    cell::RefCell,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

thread_local! {
    static PANICKED: RefCell<Panicked> = const { RefCell::new(Panicked { payload: None, waiting: None }) };
    static TASKS: RefCell<Slots> = const { RefCell::new(Slots { used: Vec::new(), free: Vec::new() }) };
}

struct Slots {
    used: Vec<Option<Rc<dyn Abandon>>>,
    free: Vec<usize>,
}

struct Panicked {
    /// Of the first task that panicked.
    payload: Option<Box<dyn Any + Send>>,
    waiting: Option<Waker>,
}

trait Abandon {
    fn abandon(&self);
}

struct Held<F>(RefCell<Option<F>>);

impl<F> Abandon for Held<F> {
    fn abandon(&self) {
        // A future that is being polled right now can only be this call's own caller; it ends by itself.
        if let Ok(mut future) = self.0.try_borrow_mut() {
            *future = None;
        }
    }
}

/// A future that is dropped when its task ends or when [`abandon_all`] is called, whichever comes first.
pub(crate) struct Registered<F> {
    held: Rc<Held<F>>,
    slot: usize,
}

impl<F: Future + 'static> Registered<F> {
    pub(crate) fn new(future: F) -> Self {
        let held = Rc::new(Held(RefCell::new(Some(future))));
        let slot = TASKS.with_borrow_mut(|slots| {
            let slot = slots.free.pop().unwrap_or_else(|| {
                slots.used.push(None);
                slots.used.len() - 1
            });
            slots.used[slot] = Some(held.clone());
            slot
        });
        Self { held, slot }
    }
}

impl<F: Future> Future for Registered<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let mut held = self.held.0.borrow_mut();
        let Some(future) = &mut *held else {
            return Poll::Pending;
        };
        // SAFETY: the future lies in an `Rc` that is never unwrapped, and leaves its cell only by being dropped in place.
        let future = unsafe { Pin::new_unchecked(future) };
        // What the panic leaves behind is dropped, unseen, when the shard ends.
        match catch_unwind(AssertUnwindSafe(|| future.poll(cx))) {
            Ok(polled) => polled,
            Err(payload) => {
                PANICKED.with_borrow_mut(|panicked| {
                    panicked.payload.get_or_insert(payload);
                    panicked.waiting.take().into_iter().for_each(Waker::wake);
                });
                Poll::Pending
            }
        }
    }
}

/// Ready when a task of this thread has panicked.
pub(crate) fn poll_panic(cx: &Context<'_>) -> Poll<Box<dyn Any + Send>> {
    PANICKED.with_borrow_mut(|panicked| match panicked.payload.take() {
        Some(payload) => Poll::Ready(payload),
        None => {
            panicked.waiting = Some(cx.waker().clone());
            Poll::Pending
        }
    })
}

impl<F> Drop for Registered<F> {
    fn drop(&mut self) {
        // Without the list, the thread is ending. What is taken out is dropped after the list was released, as its destructor may spawn.
        let held = TASKS.try_with(|tasks| {
            let mut slots = tasks.borrow_mut();
            slots.free.push(self.slot);
            slots.used[self.slot].take()
        });
        drop(held);
    }
}

/// Drops the futures of all tasks of this thread, also those that destructors spawn meanwhile.
pub(crate) fn abandon_all() {
    for slot in 0.. {
        let held = TASKS.with_borrow(|slots| slots.used.get(slot).cloned());
        match held {
            Some(Some(held)) => {
                if catch_unwind(AssertUnwindSafe(|| held.abandon())).is_err() {
                    tracing::error!("the destructor of a task panicked at the end of its shard");
                }
            }
            Some(None) => {}
            None => return,
        }
    }
}
