//! The requests of one connection that have no answer yet: a table with a fixed number of slots.
//!
//! A request's number is its slot, so finding the requester costs an index. A slot is taken until its answer came, even when
//! the requester has gone: its number can't be mistaken for a later one's.

use std::task::Waker;

use metanode_wire::Frame;

use crate::error::Failure;

/// What became of a request.
#[derive(Debug)]
pub(crate) enum Outcome {
    Frame(Frame),
    TimedOut,
    Failed(Failure),
}

#[derive(Debug)]
enum Slot {
    /// Unused; the next unused slot.
    Free(Option<u32>),
    Waiting {
        since: u32,
        waker: Option<Waker>,
    },
    /// The requester gave up; the answer is still to come.
    Abandoned,
    Answered(Frame),
    /// Nothing came in time; the answer may still come.
    TimedOut,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Pending {
    slots: Vec<Slot>,
    slots_max: u32,
    free: Option<u32>,
    failure: Option<Failure>,
    /// Coarse time: counts the watchdog's rounds.
    round: u32,
}

/// An answer to a number that nobody waits for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unasked;

impl Pending {
    pub(crate) fn new(slots_max: u32) -> Self {
        Self { slots: Vec::new(), slots_max, free: None, failure: None, round: 0 }
    }

    /// Takes a slot; `None` when all are taken. The caller holds a permit, so that happens only by a mistake of ours.
    pub(crate) fn begin(&mut self, waker: Waker) -> Result<Option<u32>, Failure> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        let slot = Slot::Waiting { since: self.round, waker: Some(waker) };
        if let Some(index) = self.free {
            let Slot::Free(next) = std::mem::replace(&mut self.slots[index as usize], slot) else {
                unreachable!("the free list links free slots only")
            };
            self.free = next;
            return Ok(Some(index));
        }
        if self.slots.len() >= self.slots_max as usize {
            return Ok(None);
        }
        self.slots.push(slot);
        Ok(Some(self.slots.len() as u32 - 1))
    }

    /// An answer arrived. Returns whom to wake and whether the slot is free again (its requester had gone).
    pub(crate) fn answer(&mut self, frame: Frame) -> Result<(Option<Waker>, bool), Unasked> {
        let index = frame.request;
        let slot = self.slots.get_mut(index as usize).ok_or(Unasked)?;
        match slot {
            Slot::Waiting { waker, .. } => {
                let waker = waker.take();
                *slot = Slot::Answered(frame);
                Ok((waker, false))
            }
            Slot::TimedOut => {
                // Its requester has not looked yet; it will see the answer after all.
                *slot = Slot::Answered(frame);
                Ok((None, false))
            }
            Slot::Abandoned => {
                self.release(index);
                Ok((None, true))
            }
            Slot::Free(_) | Slot::Answered(_) => Err(Unasked),
        }
    }

    /// The requester looks. `Some` ends the request; the flag says whether its slot is free again.
    pub(crate) fn poll(&mut self, index: u32, waker: &Waker) -> Option<(Outcome, bool)> {
        let slot = &mut self.slots[index as usize];
        match slot {
            Slot::Answered(_) => {
                let Slot::Answered(frame) = self.release(index) else { unreachable!("matched above") };
                Some((Outcome::Frame(frame), true))
            }
            Slot::TimedOut => {
                *slot = Slot::Abandoned;
                Some((Outcome::TimedOut, false))
            }
            Slot::Waiting { waker: registered, .. } => {
                if let Some(failure) = &self.failure {
                    return Some((Outcome::Failed(failure.clone()), false));
                }
                match registered {
                    Some(old) if old.will_wake(waker) => {}
                    other => *other = Some(waker.clone()),
                }
                None
            }
            Slot::Free(_) | Slot::Abandoned => unreachable!("a requester looks at its own slot only"),
        }
    }

    /// The requester has gone. Returns whether the slot is free again.
    pub(crate) fn abandon(&mut self, index: u32) -> bool {
        match self.slots[index as usize] {
            Slot::Answered(_) => {
                self.release(index);
                true
            }
            _ => {
                self.slots[index as usize] = Slot::Abandoned;
                false
            }
        }
    }

    /// A round of the watchdog has passed: whoever waits for `rounds_max` of them or more has waited too long.
    pub(crate) fn tick(&mut self, rounds_max: u32, wake: &mut Vec<Waker>) {
        self.round = self.round.wrapping_add(1);
        for slot in &mut self.slots {
            if let Slot::Waiting { since, waker } = slot
                && self.round.wrapping_sub(*since) >= rounds_max
            {
                wake.extend(waker.take());
                *slot = Slot::TimedOut;
            }
        }
    }

    /// The connection is of no further use: everybody hears of it, and so does whoever asks later.
    pub(crate) fn fail(&mut self, failure: Failure, wake: &mut Vec<Waker>) {
        self.failure.get_or_insert(failure);
        for slot in &mut self.slots {
            if let Slot::Waiting { waker, .. } = slot {
                wake.extend(waker.take());
            }
        }
    }

    pub(crate) fn failure(&self) -> Option<&Failure> {
        self.failure.as_ref()
    }

    fn release(&mut self, index: u32) -> Slot {
        let slot = std::mem::replace(&mut self.slots[index as usize], Slot::Free(self.free));
        self.free = Some(index);
        slot
    }
}

#[cfg(test)]
mod tests {
    use metanode_wire::{FrameLimits, FrameReader, message::Done};

    use super::*;

    fn done(request: u32) -> Frame {
        let mut bytes = Vec::new();
        metanode_wire::encode(&mut bytes, request, &Done {}, 0);
        let mut reader = FrameReader::new(FrameLimits::default());
        reader.push(bytes.into());
        reader.next_frame().unwrap().unwrap()
    }

    fn begin(pending: &mut Pending) -> u32 {
        pending.begin(Waker::noop().clone()).unwrap().unwrap()
    }

    #[test]
    fn answers_find_their_requests_and_slots_are_used_again() {
        let mut pending = Pending::new(2);
        let (a, b) = (begin(&mut pending), begin(&mut pending));
        assert!(pending.begin(Waker::noop().clone()).unwrap().is_none(), "two slots");
        assert!(pending.answer(done(b)).is_ok());
        assert!(pending.poll(a, Waker::noop()).is_none());
        assert!(matches!(pending.poll(b, Waker::noop()), Some((Outcome::Frame(f), true)) if f.request == b));
        assert_eq!(begin(&mut pending), b);
    }

    #[test]
    fn a_number_is_not_used_again_before_its_answer_came() {
        let mut pending = Pending::new(1);
        let a = begin(&mut pending);
        assert!(!pending.abandon(a));
        assert!(pending.begin(Waker::noop().clone()).unwrap().is_none());
        assert!(matches!(pending.answer(done(a)), Ok((None, true))));
        assert_eq!(begin(&mut pending), a);
    }

    #[test]
    fn unasked_and_repeated_answers_are_refused() {
        let mut pending = Pending::new(4);
        assert_eq!(pending.answer(done(0)).err(), Some(Unasked));
        let a = begin(&mut pending);
        assert!(pending.answer(done(a)).is_ok());
        assert_eq!(pending.answer(done(a)).err(), Some(Unasked));
        assert_eq!(pending.answer(done(u32::MAX)).err(), Some(Unasked));
    }

    #[test]
    fn a_request_times_out_after_its_rounds_and_its_late_answer_is_taken() {
        let mut pending = Pending::new(1);
        let a = begin(&mut pending);
        let mut wake = Vec::new();
        pending.tick(2, &mut wake);
        assert!(pending.poll(a, Waker::noop()).is_none());
        pending.tick(2, &mut wake);
        assert!(matches!(pending.poll(a, Waker::noop()), Some((Outcome::TimedOut, false))));
        assert!(matches!(pending.answer(done(a)), Ok((None, true))));
    }

    #[test]
    fn a_failure_reaches_those_who_wait_and_those_who_come() {
        let mut pending = Pending::new(2);
        let a = begin(&mut pending);
        let mut wake = Vec::new();
        pending.fail(Failure::LaneEnded, &mut wake);
        assert_eq!(wake.len(), 1);
        assert!(matches!(pending.poll(a, Waker::noop()), Some((Outcome::Failed(_), _))));
        assert!(pending.begin(Waker::noop().clone()).is_err());
    }
}
