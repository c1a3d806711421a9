//! What became of the latest transactions, in memory; of earlier ones see `outcomes`.

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, Hasher},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use hashbrown::hash_table::{Entry, HashTable};
use metanode_ibft::Height;
use metanode_ledger::{Executed, Outcome, TransactionId};

/// What is known of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// It waits, or is in a batch.
    Waits,
    /// The block of this height has it.
    Executed(Height, Outcome),
}

/// Names of transactions are hashes already: the table needs no other, only a secret, so that nobody can choose names that meet.
#[derive(Debug, Clone)]
struct Secret(u64);

impl BuildHasher for Secret {
    type Hasher = OfName;

    fn build_hasher(&self) -> OfName {
        OfName { secret: self.0, hash: 0 }
    }
}

/// See [`Secret`].
#[derive(Debug)]
struct OfName {
    secret: u64,
    hash: u64,
}

impl Hasher for OfName {
    fn write(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.hash ^= u64::from_le_bytes(word);
        }
    }

    fn write_usize(&mut self, _length: usize) {} // all names have one

    fn finish(&self) -> u64 {
        let product = u128::from(self.hash ^ self.secret) * u128::from(self.secret | 1);
        (product >> 64) as u64 ^ product as u64
    }
}

impl Secret {
    fn tag(&self, id: &TransactionId) -> Tag {
        let hash = self.hash_one(id);
        Tag((hash >> 32) as u32 ^ hash as u32)
    }
}

type ByName<T> = HashMap<TransactionId, T, Secret>;

/// A part of a name's hash, from which its place in a table follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tag(u32);

impl Tag {
    /// The table looks at the highest bits and at the lowest ones.
    fn spread(self) -> u64 {
        u64::from(self.0).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

/// Where a transaction is. Its name is there, and not here once more: a table of a million names would be three times as large, and grow for
/// tenths of a second.
#[derive(Debug, Clone, Copy)]
struct Place {
    height: Height,
    place: u32,
    tag: Tag,
}

/// Outcomes of the latest blocks, and the names of transactions that wait.
#[derive(Debug)]
pub(super) struct Results(RefCell<Inner>);

#[derive(Debug)]
struct Inner {
    outcomes_max: usize,
    /// Outcomes up to this height are on disk too.
    kept: Height,
    /// Outcomes of later heights.
    unkept: usize,
    /// By height, the latest last; they follow each other.
    blocks: VecDeque<Arc<Executed>>,
    count: usize,
    places: HashTable<Place>,
    secret: Secret,
    /// Until this height.
    waiting: ByName<Height>,
    askers: ByName<Vec<(u64, Waker)>>,
    next_ticket: u64,
}

impl Results {
    /// None yet. At most `outcomes_max` stay, and those that are not on disk yet; outcomes up to `kept` are.
    pub(super) fn new(outcomes_max: usize, kept: Height, secret: u64) -> Self {
        let secret = Secret(secret);
        Self(RefCell::new(Inner {
            outcomes_max,
            kept,
            unkept: 0,
            blocks: VecDeque::new(),
            count: 0,
            places: HashTable::new(),
            waiting: HashMap::with_hasher(secret.clone()),
            askers: HashMap::with_hasher(secret.clone()),
            secret,
            next_ticket: 0,
        }))
    }

    /// A transaction waits from now on.
    pub(super) fn waits(&self, id: TransactionId, expiry: Height) {
        self.0.borrow_mut().waiting.insert(id, expiry);
    }

    /// It was not taken.
    pub(super) fn does_not_wait(&self, id: &TransactionId) {
        self.0.borrow_mut().waiting.remove(id);
    }

    /// A block was executed.
    pub(super) fn add(&self, executed: Executed) {
        let mut this = self.0.borrow_mut();
        let this = &mut *this;
        let height = executed.height;
        let executed = Arc::new(executed);
        this.blocks.push_back(executed.clone());
        for (place, (id, outcome)) in executed.outcomes.iter().enumerate() {
            // What was skipped may have been executed before, or be executed later.
            let is_final = !matches!(outcome, Outcome::Skipped(_));
            let here = Place { height, place: place as u32, tag: this.secret.tag(id) };
            let is_it = |there: &Place| there.tag == here.tag && name(&this.blocks, there) == id;
            match this.places.entry(here.tag.spread(), is_it, |there| there.tag.spread()) {
                Entry::Occupied(mut there) if is_final => *there.get_mut() = here,
                Entry::Occupied(_) => {}
                Entry::Vacant(free) => _ = free.insert(here),
            }
            if !this.waiting.is_empty() {
                this.waiting.remove(id);
            }
            if !this.askers.is_empty()
                && let Some(askers) = this.askers.remove(id)
            {
                askers.into_iter().for_each(|(_, waker)| waker.wake());
            }
        }
        this.count += executed.outcomes.len();
        if height > this.kept {
            this.unkept += executed.outcomes.len();
        }
        this.forget();
        if height.0.is_multiple_of(EXPIRY_PERIOD) {
            this.waiting.retain(|_, expiry| *expiry > height);
        }
    }

    /// Outcomes of these heights, as far as they are here, of so many transactions or of one block.
    pub(super) fn blocks(&self, from: Height, to: Height, transactions_max: usize) -> Vec<Arc<Executed>> {
        let this = self.0.borrow();
        let mut found: Vec<Arc<Executed>> = Vec::new();
        let mut count = 0;
        for block in this.blocks.iter().skip_while(|block| block.height < from).take_while(|block| block.height <= to) {
            count += block.outcomes.len();
            if count > transactions_max && !found.is_empty() {
                break;
            }
            found.push(block.clone());
        }
        found
    }

    /// Outcomes up to a height are on disk.
    pub(super) fn kept_up_to(&self, height: Height) {
        let mut this = self.0.borrow_mut();
        let of_block = |block: &Arc<Executed>| block.outcomes.len();
        let before = this.kept;
        let newly = this.blocks.iter().filter(|block| block.height > before && block.height <= height);
        let newly: usize = newly.map(of_block).sum();
        this.unkept -= newly;
        this.kept = height;
        this.forget();
    }

    /// Whether so many are not on disk that they should be put there, and whether they are too many.
    pub(super) fn unkept(&self) -> (bool, bool) {
        let this = self.0.borrow();
        (this.unkept >= (this.outcomes_max / 4).min(RUN), this.unkept > this.outcomes_max)
    }

    /// What is known of a transaction.
    pub(super) fn of(&self, id: &TransactionId) -> Option<Known> {
        self.0.borrow().of(id)
    }

    /// Waits until a transaction is executed.
    pub(super) fn executed(&self, id: TransactionId) -> Asking<'_> {
        Asking { results: self, id, ticket: None }
    }

    /// The outcomes of a block, if they are kept.
    pub(super) fn block(&self, height: Height) -> Option<Arc<Executed>> {
        let this = self.0.borrow();
        let first = this.blocks.front()?.height;
        this.blocks.get(usize::try_from(height.0.checked_sub(first.0)?).ok()?).cloned()
    }
}

/// See [`Results::executed`].
pub(super) struct Asking<'a> {
    results: &'a Results,
    id: TransactionId,
    ticket: Option<u64>,
}

impl Future for Asking<'_> {
    type Output = Known;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Known> {
        let mut this = self.results.0.borrow_mut();
        if let Some(known @ Known::Executed(..)) = this.of(&self.id) {
            return Poll::Ready(known);
        }
        let ticket = self.ticket.unwrap_or(this.next_ticket);
        let askers = this.askers.entry(self.id).or_default();
        match askers.iter_mut().find(|(number, _)| *number == ticket) {
            Some((_, waker)) => waker.clone_from(cx.waker()),
            None => {
                askers.push((ticket, cx.waker().clone()));
                this.next_ticket = this.next_ticket.max(ticket + 1);
            }
        }
        drop(this);
        self.ticket = Some(ticket);
        Poll::Pending
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let Some(ticket) = self.ticket else { return };
        let mut this = self.results.0.borrow_mut();
        if let Some(askers) = this.askers.get_mut(&self.id) {
            askers.retain(|(number, _)| *number != ticket);
            if askers.is_empty() {
                this.askers.remove(&self.id);
            }
        }
    }
}

/// Outcomes that are put on disk together, if memory has room for four times as many.
const RUN: usize = 1 << 18;

/// How many blocks apart it is looked for those that wait for ever.
const EXPIRY_PERIOD: u64 = 64;

impl Inner {
    /// Forgets what is too much and on disk.
    fn forget(&mut self) {
        while self.count > self.outcomes_max && self.blocks.len() > 1 && self.blocks[0].height <= self.kept {
            let oldest = self.blocks.pop_front().expect("there are two at least");
            self.count -= oldest.outcomes.len();
            for (id, _) in &oldest.outcomes {
                let is_it =
                    |there: &Place| there.height == oldest.height && oldest.outcomes[there.place as usize].0 == *id;
                if let Ok(there) = self.places.find_entry(self.secret.tag(id).spread(), is_it) {
                    there.remove();
                }
            }
        }
    }

    fn of(&self, id: &TransactionId) -> Option<Known> {
        let tag = self.secret.tag(id);
        let is_it = |there: &Place| there.tag == tag && name(&self.blocks, there) == id;
        if let Some(place) = self.places.find(tag.spread(), is_it) {
            return Some(Known::Executed(place.height, outcome(&self.blocks, place).1));
        }
        self.waiting.contains_key(id).then_some(Known::Waits)
    }
}

/// What is at a place, which is in one of these blocks.
fn outcome<'a>(blocks: &'a VecDeque<Arc<Executed>>, at: &Place) -> &'a (TransactionId, Outcome) {
    let first = blocks.front().expect("a place is in a block").height;
    &blocks[(at.height.0 - first.0) as usize].outcomes[at.place as usize]
}

fn name<'a>(blocks: &'a VecDeque<Arc<Executed>>, at: &Place) -> &'a TransactionId {
    &outcome(blocks, at).0
}

#[cfg(test)]
mod tests {
    use metanode_ledger::Code;
    use metanode_types::Hash;

    use super::*;

    fn id(number: u8) -> TransactionId {
        TransactionId([number; 32])
    }

    fn executed(height: u64, outcomes: Vec<(TransactionId, Outcome)>) -> Executed {
        Executed { height: Height(height), app_hash: Hash([0; 32]), results_root: Hash([0; 32]), outcomes }
    }

    #[test]
    fn the_latest_are_kept_and_what_was_executed_beats_what_was_skipped() {
        let results = Results::new(3, Height(0), 7);
        results.waits(id(1), Height(9));
        assert_eq!(results.of(&id(1)), Some(Known::Waits));
        let skipped = Outcome::Skipped(Code::NONCE_TOO_HIGH);
        results.add(executed(1, vec![(id(1), skipped), (id(2), Outcome::DONE)]));
        assert_eq!(results.of(&id(1)), Some(Known::Executed(Height(1), skipped)));
        results.add(executed(2, vec![(id(1), Outcome::DONE)]));
        assert_eq!(results.of(&id(1)), Some(Known::Executed(Height(2), Outcome::DONE)));
        let late = Outcome::Skipped(Code::NONCE_USED);
        results.add(executed(3, vec![(id(1), late)]));
        assert_eq!(results.of(&id(1)), Some(Known::Executed(Height(2), Outcome::DONE)));
        assert!(results.block(Height(1)).is_some(), "it is not on disk yet");
        assert_eq!(results.unkept(), (true, true));
        let of = |blocks: Vec<Arc<Executed>>| blocks.iter().map(|block| block.height.0).collect::<Vec<_>>();
        assert_eq!(of(results.blocks(Height(2), Height(3), 10)), [2, 3]);
        assert_eq!(of(results.blocks(Height(1), Height(3), 1)), [1], "one in any case");
        results.kept_up_to(Height(2));
        assert_eq!(results.unkept(), (true, false));
        assert_eq!((results.of(&id(2)), results.block(Height(1))), (None, None), "too long ago");
        assert_eq!(results.block(Height(3)).unwrap().outcomes, [(id(1), late)]);
        assert_eq!(results.block(Height(4)), None);
    }

    #[test]
    fn many_are_found_until_they_are_forgotten_while_the_table_grows() {
        let name = |number: u64| TransactionId(metanode_crypto::hash(&number.to_le_bytes()).0);
        let results = Results::new(1_000, Height(0), 7);
        for height in 1..=20 {
            let of_block = (height * 100..height * 100 + 100).map(|number| (name(number), Outcome::DONE));
            results.add(executed(height, of_block.collect()));
        }
        let known = |number| results.of(&name(number));
        assert!((100..2_100).all(|number| known(number) == Some(Known::Executed(Height(number / 100), Outcome::DONE))));
        results.kept_up_to(Height(20));
        assert!((100..2_100).all(|number| known(number).is_some() == (number >= 1_100)));
        assert_eq!(results.0.borrow().places.len(), 1_000);
    }
}
