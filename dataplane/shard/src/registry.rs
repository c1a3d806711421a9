//! All tasks of a shard, so that none outlives it.
//!
//! glommio keeps no list of its tasks: one that waits is held only by its wakers, and these often lie in what the task itself
//! owns (a socket's registration, a connection's table). Such a task would never be dropped, nor would its sockets and locks,
//! when the shard's main future ends or panics. So each task's future lies in a cell that this list knows too.

use std::{
    cell::RefCell,
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

thread_local! {
    static TASKS: RefCell<Slots> = const { RefCell::new(Slots { used: Vec::new(), free: Vec::new() }) };
}

struct Slots {
    used: Vec<Option<Rc<dyn Abandon>>>,
    free: Vec<usize>,
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
        match &mut *self.held.0.borrow_mut() {
            // SAFETY: the future lies in an `Rc` that is never unwrapped, and leaves its cell only by being dropped in place.
            Some(future) => unsafe { Pin::new_unchecked(future) }.poll(cx),
            None => Poll::Pending,
        }
    }
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
            Some(Some(held)) => held.abandon(),
            Some(None) => {}
            None => return,
        }
    }
}
