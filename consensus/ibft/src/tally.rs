//! Votes of a height, by signer and round: each signer has a share of its own, and keeps what is nearest to the current round (clause 23).

use std::collections::BTreeMap;

use metanode_types::{Hash, NodeKey};

use crate::{
    justify::Refusal,
    message::{Payload, Round, Signed},
};

/// Rounds of which one signer's votes are kept. Votes of a quorum are never farther apart than their round changes bring them, and a decision
/// that is older comes as a final block.
pub(crate) const ROUNDS_MAX: usize = 16;

/// Votes of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Tally<P> {
    votes: BTreeMap<NodeKey, BTreeMap<Round, Signed<P>>>,
}

impl<P> Default for Tally<P> {
    fn default() -> Self {
        Self { votes: BTreeMap::new() }
    }
}

impl<P: Payload> Tally<P> {
    /// Counts a verified vote. `Err` with the vote before when the signer has voted otherwise in this round.
    pub(crate) fn insert(&mut self, signed: Signed<P>, current: Round) -> Result<(), (Refusal, Option<Signed<P>>)> {
        let round = signed.payload.view().round;
        let rounds = self.votes.entry(signed.signer).or_default();
        if let Some(before) = rounds.get(&round) {
            return match before.payload == signed.payload {
                true => Err((Refusal::Known, None)),
                false => Err((Refusal::Equivocation, Some(before.clone()))),
            };
        }
        if rounds.len() >= ROUNDS_MAX {
            let distance = |round: &Round| round.0.abs_diff(current.0);
            let furthest = *rounds.keys().max_by_key(|round| distance(round)).expect("it is full");
            if distance(&round) >= distance(&furthest) {
                return Err((Refusal::ShareUsedUp, None));
            }
            rounds.remove(&furthest);
        }
        rounds.insert(round, signed);
        Ok(())
    }

    /// The votes of a round for one block, in the order of their signers.
    pub(crate) fn of(&self, round: Round, hash: Hash) -> impl Iterator<Item = &Signed<P>> {
        let votes = self.votes.values().filter_map(move |rounds| rounds.get(&round));
        votes.filter(move |signed| signed.payload.choice() == Some(hash))
    }

    /// One signer's vote of a round.
    pub(crate) fn by(&self, signer: &NodeKey, round: Round) -> Option<&Signed<P>> {
        self.votes.get(signer)?.get(&round)
    }

    /// The rounds and blocks that `quorum` signers have voted for.
    pub(crate) fn quorums(&self, quorum: usize) -> Vec<(Round, Hash)> {
        let mut counts = BTreeMap::<(Round, Hash), usize>::new();
        for signed in self.votes.values().flat_map(BTreeMap::values) {
            let choice = signed.payload.choice().expect("votes are for blocks");
            *counts.entry((signed.payload.view().round, choice)).or_default() += 1;
        }
        counts.into_iter().filter(|(_, count)| *count >= quorum).map(|(at, _)| at).collect()
    }

    /// Whether anybody has voted for this block.
    pub(crate) fn names(&self, hash: &Hash) -> bool {
        self.votes.values().flat_map(BTreeMap::values).any(|signed| signed.payload.choice() == Some(*hash))
    }

    /// Forgets what is below `round`.
    pub(crate) fn forget_below(&mut self, round: Round) {
        for rounds in self.votes.values_mut() {
            *rounds = rounds.split_off(&round);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Height, Prepare, View};

    fn vote(round: u32) -> Signed<Prepare> {
        let view = View { height: Height(1), round: Round(round) };
        Signed { payload: Prepare { view, hash: Hash([1; 32]) }, signer: NodeKey([1; 32]), signature: [0; 64] }
    }

    /// Clause 23: of one signer only so many rounds are kept, the nearest.
    #[test]
    fn a_signer_has_so_many_rounds_and_keeps_the_nearest() {
        let mut tally = Tally::default();
        let last = 10 + ROUNDS_MAX as u32;
        (10..last).for_each(|round| tally.insert(vote(round), Round(9)).unwrap());
        assert_eq!(tally.insert(vote(last), Round(9)), Err((Refusal::ShareUsedUp, None)));
        tally.insert(vote(9), Round(9)).unwrap();
        assert!(tally.by(&NodeKey([1; 32]), Round(last - 1)).is_none(), "the furthest has gone");
        assert!(tally.by(&NodeKey([1; 32]), Round(9)).is_some());
    }
}
