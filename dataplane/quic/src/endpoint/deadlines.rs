use std::time::Instant;

/// The next deadline of each connection, earliest first: a binary heap with one entry a connection that knows where it stands,
/// so that a connection which moves its deadline ten thousand times a second doesn't leave entries behind.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    heap: Vec<(Instant, usize)>,
    /// By connection slot: its place in the heap, or [`ABSENT`].
    places: Vec<usize>,
}

const ABSENT: usize = usize::MAX;

impl Deadlines {
    /// Sees to it that `slot` is due at `deadline` at the latest. A later deadline than the present one is not stored: the slot
    /// comes up early and asks again, which is cheaper than moving it at each packet.
    pub(super) fn at_latest(&mut self, slot: usize, deadline: Instant) {
        if self.places.len() <= slot {
            self.places.resize(slot + 1, ABSENT);
        }
        match self.places[slot] {
            ABSENT => {
                self.heap.push((deadline, slot));
                self.places[slot] = self.heap.len() - 1;
                self.up(self.heap.len() - 1);
            }
            place if deadline < self.heap[place].0 => {
                self.heap[place].0 = deadline;
                self.up(place);
            }
            _ => {}
        }
    }

    /// The earliest deadline.
    pub(super) fn next(&self) -> Option<Instant> {
        self.heap.first().map(|(deadline, _)| *deadline)
    }

    /// Takes out one slot that is due.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<usize> {
        let (deadline, slot) = *self.heap.first()?;
        if deadline > now {
            return None;
        }
        self.remove(slot);
        Some(slot)
    }

    /// Forgets a slot.
    pub(super) fn remove(&mut self, slot: usize) {
        let Some(&place) = self.places.get(slot).filter(|place| **place != ABSENT) else {
            return;
        };
        self.places[slot] = ABSENT;
        self.heap.swap_remove(place);
        if place < self.heap.len() {
            self.places[self.heap[place].1] = place;
            self.down(place);
            self.up(place);
        }
    }

    fn up(&mut self, mut place: usize) {
        while place > 0 {
            let parent = (place - 1) / 2;
            if self.heap[parent].0 <= self.heap[place].0 {
                return;
            }
            self.swap(parent, place);
            place = parent;
        }
    }

    fn down(&mut self, mut place: usize) {
        loop {
            let children = [2 * place + 1, 2 * place + 2].into_iter().filter(|child| *child < self.heap.len());
            match children.min_by_key(|child| self.heap[*child].0) {
                Some(child) if self.heap[child].0 < self.heap[place].0 => {
                    self.swap(child, place);
                    place = child;
                }
                _ => return,
            }
        }
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        self.places[self.heap[a].1] = a;
        self.places[self.heap[b].1] = b;
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;

    #[test]
    fn agrees_with_a_map_under_random_operations() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        let mut deadlines = Deadlines::default();
        let mut model: BTreeMap<usize, Instant> = BTreeMap::new();
        for now in 0..20_000 {
            let slot = random(50) as usize;
            match random(4) {
                0 => {
                    deadlines.remove(slot);
                    model.remove(&slot);
                }
                1 => {
                    while let Some(slot) = deadlines.pop_due(at(now)) {
                        let was = model.remove(&slot).unwrap();
                        assert!(was <= at(now) && model.values().all(|other| *other >= was));
                    }
                    assert!(model.values().all(|other| *other > at(now)));
                }
                _ => {
                    let deadline = at(now + random(300));
                    deadlines.at_latest(slot, deadline);
                    let entry = model.entry(slot).or_insert(deadline);
                    *entry = deadline.min(*entry);
                }
            }
            assert_eq!(deadlines.next(), model.values().min().copied());
        }
    }
}
