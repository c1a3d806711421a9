//! What a shard holds at most of each sort of thing, and how its connections share that.
//!
//! What is admitted holds a [`Permit`] until it is gone. At a bound the answer is `Busy`, never a queue. Where strangers can take places,
//! a connection may have as many as are left (the dynamic threshold, see [`outgoing`](crate::outgoing)): a lone one half of them all, a
//! hundred that want ever more a hundredth each. Those who keep what they have and don't move are closed when little is left
//! ([`Shard::close_stuck`](crate::session::Shard::close_stuck)): they would leave half of what is left to each next one.

use std::{cell::Cell, rc::Rc};

use crate::session::Session;

/// Milliseconds after which what was refused should come again: a group commit takes a few, and a spread of clients that
/// come back at once is worse than an idle millisecond.
pub(crate) const RETRY_AFTER_MS_MIN: u32 = 5;

/// The hint grows to this while more is asked for than fits.
const RETRY_AFTER_MS_MAX: u32 = 100;

/// What is bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bound {
    /// Bytes: bodies of uploads, and windows of bulk uploads. First come, first served: only who may write has any.
    Uploads,
    /// Bytes of frames of which a part has arrived.
    Partial,
    /// Requests that the store has not answered.
    Requests,
    /// Fetches that read from the disk, or wait for it.
    Reads,
    /// Bytes of answers that are not yet written to their streams.
    Answers,
    /// Bytes that bulk fetches read ahead.
    Fetches,
}

/// One `T` for each bound.
#[derive(Debug, Default)]
pub(crate) struct PerBound<T>([T; 6]);

impl<T> std::ops::Index<Bound> for PerBound<T> {
    type Output = T;

    fn index(&self, bound: Bound) -> &T {
        &self.0[bound as usize]
    }
}

/// What of a bound is taken.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    most: u64,
    taken: Cell<u64>,
}

/// A part of a bound, given back when dropped.
pub(crate) struct Permit {
    session: Rc<Session>,
    bound: Bound,
    amount: u64,
}

impl PerBound<Budget> {
    pub(crate) fn new(most: impl Fn(Bound) -> u64) -> Self {
        use Bound::{Answers, Fetches, Partial, Reads, Requests, Uploads};
        let all = [Uploads, Partial, Requests, Reads, Answers, Fetches];
        Self(all.map(|bound| Budget { most: most(bound), taken: Cell::new(0) }))
    }
}

impl Budget {
    /// What is taken.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.get()
    }

    /// The part of it that is taken: 0 to 1, more when it is exceeded.
    pub(crate) fn taken_share(&self) -> f64 {
        self.taken.get() as f64 / self.most as f64
    }

    /// Whether someone who has `own` may have `amount` more. What is larger than the whole bound is admitted when nothing else is: all
    /// sorts are bounded for themselves, so it is exceeded by one at most.
    fn has_room(&self, bound: Bound, own: u64, amount: u64) -> bool {
        let left = self.most.saturating_sub(self.taken.get());
        let threshold = if bound == Bound::Uploads { 0 } else { own };
        self.taken.get() == 0 || threshold + amount <= left
    }

    fn retry_after_ms(&self, amount: u64) -> u32 {
        if amount > self.most / 4 { RETRY_AFTER_MS_MAX } else { RETRY_AFTER_MS_MIN }
    }
}

impl Session {
    /// Room for so much, or the milliseconds to wait.
    pub(crate) fn admit(self: &Rc<Self>, bound: Bound, amount: u64) -> Result<Permit, u32> {
        let mut permit = Permit { session: self.clone(), bound, amount: 0 };
        permit.extend(amount)?;
        Ok(permit)
    }
}

impl Permit {
    /// Takes so much more, or says how many milliseconds to wait.
    pub(crate) fn extend(&mut self, amount: u64) -> Result<(), u32> {
        let (budget, own) = self.both();
        if !budget.has_room(self.bound, own.get(), amount) {
            return Err(match self.bound {
                Bound::Reads | Bound::Answers => self.session.shard.read_retry_after_ms(),
                _ => budget.retry_after_ms(amount),
            });
        }
        budget.taken.set(budget.taken.get() + amount);
        own.set(own.get() + amount);
        self.amount += amount;
        Ok(())
    }

    /// Gives back all but `amount`.
    pub(crate) fn shrink(&mut self, amount: u64) {
        let spare = self.amount.saturating_sub(amount);
        let (budget, own) = self.both();
        budget.taken.set(budget.taken.get() - spare);
        own.set(own.get() - spare);
        self.amount -= spare;
    }

    fn both(&self) -> (&Budget, &Cell<u64>) {
        (&self.session.shard.budgets[self.bound], &self.session.held[self.bound])
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_have_much_leave_something_for_the_next() {
        let budget = Budget { most: 1_000, taken: Cell::new(0) };
        let mut own = [0; 20];
        for _ in 0..1_000 {
            for own in &mut own {
                if budget.has_room(Bound::Answers, *own, 10) {
                    *own += 10;
                    budget.taken.set(budget.taken.get() + 10);
                }
            }
        }
        assert!(own.iter().all(|own| (40..=50).contains(own)), "{own:?}");
        assert!(budget.has_room(Bound::Answers, 0, 40));
        assert!(budget.has_room(Bound::Uploads, 900, 40) && !budget.has_room(Bound::Uploads, 0, 400));
    }

    #[test]
    fn a_lone_one_gets_half_and_the_first_whatever_it_is() {
        let budget = Budget { most: 1_000, taken: Cell::new(0) };
        assert!(budget.has_room(Bound::Fetches, 0, 5_000), "one that is larger than the bound");
        budget.taken.set(500);
        assert!(!budget.has_room(Bound::Fetches, 500, 1) && budget.has_room(Bound::Fetches, 0, 500));
        assert_eq!([budget.retry_after_ms(10), budget.retry_after_ms(500)], [RETRY_AFTER_MS_MIN, RETRY_AFTER_MS_MAX]);
    }
}
