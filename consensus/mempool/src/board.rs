//! Batches that are here.

use std::collections::{BTreeMap, BTreeSet};

use metanode_ibft::Height;
use metanode_ledger::{BATCHES_MAX, Batch, Facts};
use metanode_types::{
    Hash, NodeKey,
    sabotage::{self, Sabotage},
};

/// How long a batch is kept for others after it was executed: who is farther behind gets it as a blob of the chain, if that is kept.
pub const BATCH_RETENTION_HEIGHTS: u64 = 64;

/// How much may be open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BoardLimits {
    /// Bytes of one author's batches that no block names yet.
    pub author_bytes_max: usize,
    /// Number of them.
    pub author_count_max: usize,
}

impl Default for BoardLimits {
    /// Two full blocks of one author's.
    fn default() -> Self {
        Self { author_bytes_max: 32 << 20, author_count_max: 1024 }
    }
}

/// Why a batch is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BoardRefusal {
    /// It is here.
    #[error("it is here")]
    Known,
    /// Its author's open batches use up its share.
    #[error("the author's batches that no block names use up its share")]
    AuthorFull,
}

#[derive(Debug, Clone)]
struct Entry {
    author: NodeKey,
    bytes: usize,
    expiry: Height,
    place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// No block names it; the number says when it came.
    Open(u64),
    /// The block of this height names it.
    Ordered(Height),
}

#[derive(Debug, Clone, Copy, Default)]
struct Share {
    bytes: usize,
    count: usize,
}

/// See the crate.
#[derive(Debug, Clone)]
pub struct Board {
    limits: BoardLimits,
    batches: BTreeMap<Hash, Entry>,
    /// Open ones, in the order in which they came.
    open: BTreeMap<u64, Hash>,
    ordered: BTreeSet<(Height, Hash)>,
    shares: BTreeMap<NodeKey, Share>,
    next: u64,
}

impl Board {
    /// Empty.
    pub fn new(limits: BoardLimits) -> Self {
        Self {
            limits,
            batches: BTreeMap::new(),
            open: BTreeMap::new(),
            ordered: BTreeSet::new(),
            shares: BTreeMap::new(),
            next: 0,
        }
    }

    /// Whether a batch is here, checked and on disk.
    pub fn contains(&self, digest: &Hash) -> bool {
        self.batches.contains_key(digest)
    }

    /// What a block's rules ask of a batch that is here.
    pub fn facts(&self, digest: &Hash) -> Option<Facts> {
        self.batches.get(digest).map(|entry| Facts { author: entry.author, expiry: entry.expiry })
    }

    /// Whether a batch is here and no block names it.
    pub fn is_open(&self, digest: &Hash) -> bool {
        self.batches.get(digest).is_some_and(|entry| matches!(entry.place, Place::Open(_)))
    }

    /// Batches that no block names, in the order in which they came.
    pub fn open(&self) -> impl Iterator<Item = Hash> {
        self.open.values().copied()
    }

    /// How many there are.
    pub fn open_count(&self) -> usize {
        self.open.len()
    }

    /// Whether an author's batch of so many bytes would be taken: asked before it is checked and written. What a block names is taken in
    /// any case.
    pub fn has_room(&self, author: &NodeKey, bytes: usize) -> Result<(), BoardRefusal> {
        let Share { bytes: used, count } = self.shares.get(author).copied().unwrap_or_default();
        let fits = used + bytes <= self.limits.author_bytes_max && count < self.limits.author_count_max;
        if fits { Ok(()) } else { Err(BoardRefusal::AuthorFull) }
    }

    /// A batch is checked and on disk. Whoever writes it has asked [`has_room`](Self::has_room), or a block names it.
    pub fn insert(&mut self, batch: &Batch) -> Result<(), BoardRefusal> {
        let digest = batch.digest();
        if self.contains(&digest) {
            return Err(BoardRefusal::Known);
        }
        let entry = Entry {
            author: batch.author(),
            bytes: batch.bytes().len(),
            expiry: batch.expiry(),
            place: Place::Open(self.next),
        };
        let share = self.shares.entry(entry.author).or_default();
        share.bytes += entry.bytes;
        share.count += 1;
        self.open.insert(self.next, digest);
        self.next += 1;
        self.batches.insert(digest, entry);
        Ok(())
    }

    /// What the next block may name, in the order in which it came, no more than a block takes.
    pub fn propose(&self, next: Height) -> Vec<Hash> {
        let fresh = self.open.values().filter(|digest| self.batches[digest].expiry >= next);
        fresh.take(BATCHES_MAX).copied().collect()
    }

    /// A block is final.
    pub fn decided(&mut self, height: Height, digests: &[Hash]) {
        for digest in digests {
            let Some(entry) = self.batches.get_mut(digest) else { continue };
            match entry.place {
                Place::Open(number) => {
                    self.open.remove(&number);
                    let entry = entry.clone();
                    self.give_back(&entry);
                }
                Place::Ordered(before) => _ = self.ordered.remove(&(before, *digest)),
            }
            self.batches.get_mut(digest).expect("it is there").place = Place::Ordered(height);
            self.ordered.insert((height, *digest));
        }
    }

    fn give_back(&mut self, entry: &Entry) {
        let share = self.shares.get_mut(&entry.author).expect("it was counted when it came");
        share.bytes -= entry.bytes;
        share.count -= 1;
        if share.count == 0 {
            self.shares.remove(&entry.author);
        }
    }

    /// Drops what nobody needs here: what was executed [so long](BATCH_RETENTION_HEIGHTS) ago, which the chain has, and open ones that no
    /// block may name any more, which are returned: nobody needs them anywhere.
    pub fn forget(&mut self, executed: Height, next: Height) -> Vec<Hash> {
        while let Some(&(height, digest)) = self.ordered.first() {
            if height.0 + BATCH_RETENTION_HEIGHTS > executed.0 {
                break;
            }
            self.ordered.pop_first();
            self.batches.remove(&digest);
        }
        let expired: Vec<(u64, Hash)> = self
            .open
            .iter()
            .filter(|(_, digest)| self.batches[*digest].expiry < next || sabotage::is_on(Sabotage::DropBatches))
            .map(|(number, digest)| (*number, *digest))
            .collect();
        for (number, digest) in &expired {
            self.open.remove(number);
            let entry = self.batches.remove(digest).expect("it is open");
            self.give_back(&entry);
        }
        expired.into_iter().map(|(_, digest)| digest).collect()
    }
}

#[cfg(test)]
mod tests {
    use metanode_crypto::Identity;
    use metanode_ibft::ChainId;
    use metanode_ledger::BatchDraft;

    use super::*;

    fn batch(author: u8, number: u64, expiry: u64) -> Batch {
        let author = Identity::from_seed(&[author; 32]);
        let draft = BatchDraft::new(author.public(), number, Height(expiry));
        draft.finish(&ChainId([7; 32]), |domain, message| Ok::<_, ()>(author.sign(domain, message))).unwrap()
    }

    #[test]
    fn open_then_ordered_then_forgotten() {
        let mut board = Board::new(BoardLimits::default());
        let all: Vec<Batch> = (0..3).map(|number| batch(1, number, 10)).collect();
        for batch in &all {
            board.insert(batch).unwrap();
        }
        let digests: Vec<Hash> = all.iter().map(Batch::digest).collect();
        assert_eq!(board.insert(&all[0]), Err(BoardRefusal::Known));
        assert_eq!(board.propose(Height(10)), digests);
        assert!(board.propose(Height(11)).is_empty());
        board.decided(Height(4), &digests[1..2]);
        assert_eq!(board.propose(Height(5)), [digests[0], digests[2]]);
        assert!(board.forget(Height(3 + BATCH_RETENTION_HEIGHTS), Height(5)).is_empty());
        assert!(board.contains(&digests[1]));
        let expired = board.forget(Height(4 + BATCH_RETENTION_HEIGHTS), Height(11));
        assert_eq!(expired, [digests[0], digests[2]]);
        assert!(board.batches.is_empty() && board.shares.is_empty() && board.ordered.is_empty());
    }

    #[test]
    fn each_author_has_a_share_that_blocks_give_back() {
        let bytes = batch(1, 0, 10).bytes().len();
        let limits = BoardLimits { author_bytes_max: 2 * bytes, author_count_max: 8 };
        let mut board = Board::new(limits);
        for number in 0..2 {
            let batch = batch(1, number, 10);
            board.has_room(&batch.author(), bytes).unwrap();
            board.insert(&batch).unwrap();
        }
        let author = batch(1, 0, 10).author();
        assert_eq!(board.has_room(&author, bytes), Err(BoardRefusal::AuthorFull));
        assert_eq!(board.has_room(&batch(2, 0, 10).author(), bytes), Ok(()));
        board.decided(Height(1), &[batch(1, 0, 10).digest()]);
        assert_eq!(board.has_room(&author, bytes), Ok(()));
        let few = Board::new(BoardLimits { author_count_max: 0, ..limits });
        assert_eq!(few.has_room(&author, bytes), Err(BoardRefusal::AuthorFull));
    }

    #[test]
    fn a_block_names_so_many() {
        let mut board = Board::new(BoardLimits::default());
        for number in 0..70 {
            board.insert(&batch(1, number, 10)).unwrap();
        }
        assert_eq!(board.propose(Height(1)).len(), BATCHES_MAX);
        assert_eq!(board.open_count(), 70);
    }
}
