use std::{sync::PoisonError, task::Waker};

// The standard library's, or loom's in `tests/park.rs`, which tries every order of what two threads do here.
use super::sync::{AtomicBool, Mutex, Ordering, fence};

/// Where one side of a queue sleeps until the other has done something. The mutex is taken only to fall asleep and to wake.
#[derive(Debug, Default)]
pub(super) struct Park {
    parked: AtomicBool,
    /// One entry unless several tasks of a shard wait for room in the same ring.
    wakers: Mutex<Vec<Waker>>,
}

impl Park {
    /// Announces a sleep. The caller looks at the queue once more afterwards, and sleeps only if that look finds nothing.
    pub(super) fn park(&self, waker: &Waker) {
        {
            let mut wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
            if !wakers.iter().any(|known| known.will_wake(waker)) {
                wakers.push(waker.clone());
            }
        }
        self.parked.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Takes the announcement back.
    pub(super) fn cancel(&self) {
        self.parked.store(false, Ordering::Relaxed);
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether the other side may be asleep; only a hint.
    pub(super) fn is_parked_hint(&self) -> bool {
        self.parked.load(Ordering::Relaxed)
    }

    /// Wakes the other side if it has announced a sleep. Called after the queue was changed.
    pub(super) fn unpark(&self) {
        fence(Ordering::SeqCst);
        if self.parked.load(Ordering::Relaxed) && self.parked.swap(false, Ordering::AcqRel) {
            // Collected first: waking under the lock would make the woken side wait for it.
            let wakers = std::mem::take(&mut *self.wakers.lock().unwrap_or_else(PoisonError::into_inner));
            for waker in wakers {
                waker.wake();
            }
        }
    }
}
