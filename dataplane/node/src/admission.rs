//! How many bytes of one sort (uploads, answers that wait, frames in pieces) a shard holds at a time.

use std::{cell::Cell, rc::Rc};

/// A bound on bytes: what is admitted holds a [`Permit`] until it is stored. At the bound the answer is `Busy`, never a queue.
#[derive(Debug, Clone)]
pub(crate) struct Admission(Rc<Budget>);

#[derive(Debug)]
struct Budget {
    bytes_max: u64,
    bytes: Cell<u64>,
}

/// Bytes of the budget, given back when dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    budget: Rc<Budget>,
    bytes: u64,
}

/// Milliseconds after which what was refused should come again: a group commit takes a few, and a spread of clients that
/// come back at once is worse than an idle millisecond.
pub(crate) const RETRY_AFTER_MS_MIN: u32 = 5;

/// The hint grows to this while more is asked for than fits.
const RETRY_AFTER_MS_MAX: u32 = 100;

impl Admission {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self(Rc::new(Budget { bytes_max, bytes: Cell::new(0) }))
    }

    /// Room for `bytes`, or the milliseconds to wait. A request larger than the whole bound is admitted when nothing else is:
    /// frames are bounded, so it exceeds the bound by one frame at most.
    pub(crate) fn admit(&self, bytes: u64) -> Result<Permit, u32> {
        let held = self.0.bytes.get();
        if held > 0 && held + bytes > self.0.bytes_max {
            return Err(if bytes > self.0.bytes_max / 4 { RETRY_AFTER_MS_MAX } else { RETRY_AFTER_MS_MIN });
        }
        self.0.bytes.set(held + bytes);
        Ok(Permit { budget: self.0.clone(), bytes })
    }

    /// Whether the bound is reached.
    pub(crate) fn is_full(&self) -> bool {
        self.0.bytes.get() >= self.0.bytes_max
    }

    /// Bytes that are held.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.bytes.get()
    }
}

impl Permit {
    /// Gives back all but `bytes`.
    pub(crate) fn shrink(&mut self, bytes: u64) {
        let spare = self.bytes.saturating_sub(bytes);
        self.bytes -= spare;
        self.budget.bytes.set(self.budget.bytes.get() - spare);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.bytes.set(self.budget.bytes.get() - self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_at_the_bound_and_gives_back() {
        let admission = Admission::new(100);
        let first = admission.admit(60).unwrap();
        let second = admission.admit(40).unwrap();
        assert_eq!(admission.admit(1).unwrap_err(), RETRY_AFTER_MS_MIN);
        assert_eq!(admission.admit(50).unwrap_err(), RETRY_AFTER_MS_MAX);
        drop(first);
        let third = admission.admit(60).unwrap();
        drop((second, third));
        assert_eq!(admission.bytes(), 0);
        assert!(admission.admit(1_000).is_ok(), "alone, anything that fits a frame is admitted");
        let mut guessed = admission.admit(100).unwrap();
        assert!(admission.is_full() && admission.admit(1).is_err());
        guessed.shrink(30);
        guessed.shrink(40);
        assert_eq!(admission.bytes(), 30);
        drop(guessed);
        assert_eq!(admission.bytes(), 0);
    }
}
