//! A counting semaphore for the tasks of one shard: first come, first served.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::Future,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

/// Lets a fixed number of tasks in at a time. How many wait is for the caller to bound.
#[derive(Debug, Clone)]
pub(crate) struct Gate(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    free: Cell<usize>,
    next_ticket: Cell<u64>,
    /// Those who wait, in order. A place that was handed over has no waker any more and counts as taken.
    waiting: RefCell<VecDeque<Waiting>>,
}

#[derive(Debug)]
struct Waiting {
    ticket: u64,
    waker: Waker,
}

/// A place inside; the next one enters when it is dropped.
#[derive(Debug)]
pub(crate) struct Place(Rc<Inner>);

impl Gate {
    pub(crate) fn new(places: usize) -> Self {
        Self(Rc::new(Inner { free: Cell::new(places), next_ticket: Cell::new(0), waiting: RefCell::default() }))
    }

    /// Waits for a place.
    pub(crate) fn enter(&self) -> Enter {
        Enter { inner: self.0.clone(), ticket: None }
    }
}

/// See [`Gate::enter`].
#[derive(Debug)]
pub(crate) struct Enter {
    inner: Rc<Inner>,
    ticket: Option<u64>,
}

impl Future for Enter {
    type Output = Place;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Place> {
        let this = &mut *self;
        let mut waiting = this.inner.waiting.borrow_mut();
        let first = waiting.front().is_none_or(|first| Some(first.ticket) == this.ticket);
        if first && this.inner.free.get() > 0 {
            this.inner.free.set(this.inner.free.get() - 1);
            if this.ticket.take().is_some() {
                waiting.pop_front();
            }
            // Several places may have become free before the first of the queue ran.
            if let (true, Some(next)) = (this.inner.free.get() > 0, waiting.front()) {
                next.waker.wake_by_ref();
            }
            return Poll::Ready(Place(this.inner.clone()));
        }
        match this.ticket {
            Some(ticket) => {
                let mine = waiting.iter_mut().find(|place| place.ticket == ticket).expect("waits until it has entered");
                mine.waker.clone_from(cx.waker());
            }
            None => {
                let ticket = this.inner.next_ticket.get();
                this.inner.next_ticket.set(ticket + 1);
                waiting.push_back(Waiting { ticket, waker: cx.waker().clone() });
                this.ticket = Some(ticket);
            }
        }
        Poll::Pending
    }
}

impl Drop for Enter {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.inner.waiting.borrow_mut().retain(|place| place.ticket != ticket);
            self.inner.wake_first();
        }
    }
}

impl Inner {
    fn wake_first(&self) {
        if let (true, Some(first)) = (self.free.get() > 0, self.waiting.borrow().front()) {
            first.waker.wake_by_ref();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.free.set(self.0.free.get() + 1);
        self.0.wake_first();
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn enters_in_order_and_the_impatient_lose_nothing_for_others() {
        let gate = Gate::new(1);
        let Poll::Ready(inside) = poll(pin!(gate.enter())) else { panic!("empty") };
        let mut first = Box::pin(gate.enter());
        let mut second = Box::pin(gate.enter());
        let mut third = Box::pin(gate.enter());
        assert!(
            poll(first.as_mut()).is_pending()
                && poll(second.as_mut()).is_pending()
                && poll(third.as_mut()).is_pending()
        );
        drop(inside);
        assert!(poll(second.as_mut()).is_pending(), "not its turn");
        drop(first);
        let Poll::Ready(inside) = poll(second.as_mut()) else { panic!("its turn") };
        assert!(poll(third.as_mut()).is_pending());
        drop(inside);
        assert!(poll(third.as_mut()).is_ready());
        assert_eq!(gate.0.free.get(), 1);
    }
}
