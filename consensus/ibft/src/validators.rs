//! Who votes at a height, how many votes decide, and whose turn it is.

use metanode_types::NodeKey;

use crate::message::Round;

/// Validators of a height at most: a certificate has some hundred bytes for each, a proposal of a later round three times as many.
pub const VALIDATORS_MAX: usize = 128;

/// The validators of one height, in the order of their keys.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ValidatorSet(Vec<NodeKey>);

/// These keys are no set of validators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadValidatorSet {
    /// There are none, or more than [`VALIDATORS_MAX`].
    #[error("{0} validators; there must be 1 to {VALIDATORS_MAX}")]
    Count(usize),
    /// One is there twice.
    #[error("{0} is there twice")]
    Twice(NodeKey),
}

impl ValidatorSet {
    /// A set of distinct keys, given in any order.
    pub fn new(mut keys: Vec<NodeKey>) -> Result<Self, BadValidatorSet> {
        if keys.is_empty() || keys.len() > VALIDATORS_MAX {
            return Err(BadValidatorSet::Count(keys.len()));
        }
        keys.sort_unstable();
        match keys.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(BadValidatorSet::Twice(pair[0])),
            None => Ok(Self(keys)),
        }
    }

    /// n: how many there are.
    #[expect(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether this key votes.
    pub fn contains(&self, key: &NodeKey) -> bool {
        self.0.binary_search(key).is_ok()
    }

    /// All keys, in order.
    pub fn iter(&self) -> impl Iterator<Item = &NodeKey> {
        self.0.iter()
    }

    /// f = ⌊(n−1)/3⌋: how many may be Byzantine (clause 1).
    pub fn faults(&self) -> usize {
        (self.len() - 1) / 3
    }

    /// q = ⌈2n/3⌉: how many distinct signers decide; any two quorums share f + 1 (clause 1).
    pub fn quorum(&self) -> usize {
        (2 * self.len()).div_ceil(3)
    }

    /// Who proposes in `round` of the height behind a block that `previous_author` made: the next in key order, wherever that author's
    /// own place would be, and one further for each round (clause 19).
    pub fn proposer(&self, previous_author: &NodeKey, round: Round) -> NodeKey {
        let next = self.0.partition_point(|key| key <= previous_author);
        self.0[(next + round.0 as usize % self.len()) % self.len()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(byte: u8) -> NodeKey {
        NodeKey([byte; 32])
    }

    fn set(bytes: &[u8]) -> ValidatorSet {
        ValidatorSet::new(bytes.iter().copied().map(key).collect()).unwrap()
    }

    /// Clause 1: two quorums share at least f + 1 members, and a quorum can be had without the faulty ones.
    #[test]
    fn two_quorums_share_an_honest_member() {
        for n in 1..=100u8 {
            let set = set(&(1..=n).collect::<Vec<_>>());
            let (n, f, q) = (usize::from(n), set.faults(), set.quorum());
            assert!(2 * q > n + f, "{n}");
            assert!(q <= n - f, "{n}");
            assert!(3 * f < n && n <= 3 * f + 3, "{n}");
        }
        assert_eq!([4, 5, 6, 7].map(|n| set(&(1..=n).collect::<Vec<_>>()).quorum()), [3, 4, 4, 5]);
    }

    #[test]
    fn a_set_is_sorted_and_has_each_key_once() {
        assert_eq!(set(&[3, 1, 2]).iter().copied().collect::<Vec<_>>(), [key(1), key(2), key(3)]);
        assert_eq!(ValidatorSet::new(vec![key(1), key(2), key(1)]), Err(BadValidatorSet::Twice(key(1))));
        assert_eq!(ValidatorSet::new(Vec::new()), Err(BadValidatorSet::Count(0)));
        let many = (0..=VALIDATORS_MAX).map(|i| NodeKey([i as u8; 32])).collect();
        assert_eq!(ValidatorSet::new(many), Err(BadValidatorSet::Count(VALIDATORS_MAX + 1)));
    }

    /// Clause 19: the next in key order behind the author of the block before, also when that author has been removed.
    #[test]
    fn the_turn_goes_round_in_key_order() {
        let set = set(&[10, 20, 30, 40]);
        let turn = |author, round| set.proposer(&key(author), Round(round)).0[0];
        assert_eq!([turn(10, 0), turn(20, 0), turn(30, 0), turn(40, 0)], [20, 30, 40, 10]);
        assert_eq!([turn(10, 1), turn(10, 2), turn(10, 3), turn(10, 4)], [30, 40, 10, 20]);
        assert_eq!([turn(25, 0), turn(5, 0), turn(99, 0)], [30, 10, 10], "an author who is no longer there");
        assert_eq!(turn(10, u32::MAX), [20, 30, 40, 10][(u32::MAX % 4) as usize]);
    }
}
