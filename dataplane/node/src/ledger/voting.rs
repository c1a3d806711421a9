//! Whether this node says something on the chain (clause 22 of the protocol's checklist).
//!
//! Who has signed something and does not know it any more can be made to contradict it. So a node votes when it has a sign state, when its chain
//! is as far as that, and as far as others say that they are: what the key has signed at heights that are final can do no harm. And it stops when
//! the chain has a vote of its key that its sign state knows nothing of: then that is a copy from earlier, or another node has the key too.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
};

use metanode_ibft::{Certificate, Commit, Height, View};
use metanode_types::{Hash, NodeKey};

use super::validator::ByKey;

/// Votes of this key that are remembered: those of heights that may still become final, several times over.
const COMMITS_KEPT: usize = 64;

/// See the module.
#[derive(Debug)]
pub(super) struct Voting {
    /// Why it says nothing, as long as it lives.
    never: RefCell<Option<String>>,
    /// It votes once this height is final here.
    from: Cell<Height>,
    /// How far others say to be, until enough have said so.
    heard: RefCell<Option<ByKey<Height>>>,
    may: Cell<bool>,
    /// What this key has voted for last.
    commits: RefCell<VecDeque<(View, Hash)>>,
}

impl Voting {
    /// Says nothing yet. `never` says why it won't; its sign state is about heights up to `from`; it is not `alone` if others vote too.
    pub(super) fn new(
        never: Option<String>,
        from: Height,
        alone: bool,
        commits: impl IntoIterator<Item = Commit>,
    ) -> Self {
        let this = Self {
            never: RefCell::new(never),
            from: Cell::new(from),
            heard: RefCell::new((!alone).then(ByKey::default)),
            may: Cell::new(false),
            commits: RefCell::default(),
        };
        commits.into_iter().for_each(|commit| this.voted(&commit));
        this
    }

    /// Why it says nothing.
    pub(super) fn why_not(&self) -> Option<String> {
        if let Some(why) = &*self.never.borrow() {
            return Some(why.clone());
        }
        match (self.may.get(), &*self.heard.borrow()) {
            (true, _) => None,
            (false, Some(_)) => Some("it has not heard yet how far the others are".to_owned()),
            (false, None) => {
                let from = self.from.get().0;
                Some(format!("its sign state, or others, are at height {from}: it votes once the chain here is as far"))
            }
        }
    }

    /// A validator says how far it is; of `needed` of them, one at least is honest.
    pub(super) fn heard(&self, key: NodeKey, height: Height, needed: usize) {
        let mut heard = self.heard.borrow_mut();
        let Some(heights) = heard.as_mut() else { return };
        heights.insert(key, height);
        if heights.len() >= needed {
            let mut heights: Vec<Height> = heights.values().copied().collect();
            heights.sort_unstable_by(|a, b| b.cmp(a));
            self.from.set(self.from.get().max(heights[needed - 1]));
            *heard = None;
        }
    }

    /// Whether it votes from now on, with the chain up to `tip`: true once.
    pub(super) fn begins(&self, tip: Height) -> bool {
        let begins =
            !self.may.get() && self.never.borrow().is_none() && self.heard.borrow().is_none() && tip >= self.from.get();
        if begins {
            self.may.set(true);
        }
        begins
    }

    /// This node has voted for a block.
    pub(super) fn voted(&self, commit: &Commit) {
        let mut commits = self.commits.borrow_mut();
        if commits.len() == COMMITS_KEPT {
            commits.pop_front();
        }
        commits.push_back((commit.view, commit.hash));
    }

    /// A block is final. Whether one of the votes for it is this key's, and this node knows nothing of it: then it says nothing more.
    pub(super) fn has_forgotten(&self, me: &NodeKey, certificate: &Certificate) -> bool {
        let is_mine = certificate.commits.iter().any(|commit| commit.signer == *me);
        if !is_mine || self.commits.borrow().contains(&(certificate.view, certificate.hash)) {
            return false;
        }
        let why = format!(
            "the block of height {} has a vote of its key that its sign state knows nothing of: that is older than what the key has signed, or \
             another node has the key too",
            certificate.view.height.0
        );
        self.may.set(false);
        self.never.borrow_mut().get_or_insert(why);
        true
    }
}

#[cfg(test)]
mod tests {
    use metanode_ibft::{Round, Signed};

    use super::*;

    fn key(number: u8) -> NodeKey {
        NodeKey([number; 32])
    }

    fn commit(height: u64) -> Commit {
        Commit { view: View { height: Height(height), round: Round(0) }, hash: Hash([height as u8; 32]) }
    }

    #[test]
    fn it_votes_once_it_is_as_far_as_its_sign_state_and_one_honest_other() {
        let voting = Voting::new(None, Height(5), false, []);
        assert!(!voting.begins(Height(9)));
        assert!(voting.why_not().unwrap().contains("not heard"));
        voting.heard(key(1), Height(1_000_000), 2);
        voting.heard(key(1), Height(1_000_000), 2);
        assert!(!voting.begins(Height(9)), "one may lie");
        voting.heard(key(2), Height(12), 2);
        assert!(!voting.begins(Height(11)));
        assert!(voting.why_not().unwrap().contains("height 12"));
        assert!(voting.begins(Height(12)) && !voting.begins(Height(12)));
        assert_eq!(voting.why_not(), None);
        let alone = Voting::new(None, Height(5), true, []);
        assert!(!alone.begins(Height(4)) && alone.begins(Height(5)));
        let silent = Voting::new(Some("lost".to_owned()), Height(0), true, []);
        assert!(!silent.begins(Height(9)));
        assert_eq!(silent.why_not().unwrap(), "lost");
    }

    #[test]
    fn a_vote_that_it_does_not_know_of_makes_it_silent() {
        let certificate = |height, signers: &[u8]| {
            let payload = commit(height);
            let commits = signers.iter().map(|number| Signed { payload, signer: key(*number), signature: [0; 64] });
            Certificate { view: payload.view, hash: payload.hash, commits: commits.collect() }
        };
        let voting = Voting::new(None, Height(0), true, [commit(1)]);
        assert!(voting.begins(Height(0)));
        voting.voted(&commit(2));
        assert!(!voting.has_forgotten(&key(1), &certificate(1, &[1, 2])));
        assert!(!voting.has_forgotten(&key(1), &certificate(2, &[1, 2])));
        assert!(!voting.has_forgotten(&key(1), &certificate(3, &[2, 3])));
        assert_eq!(voting.why_not(), None);
        assert!(voting.has_forgotten(&key(1), &certificate(4, &[1, 3])));
        assert!(voting.why_not().unwrap().contains("height 4"));
        assert!(!voting.begins(Height(9)));
    }
}
