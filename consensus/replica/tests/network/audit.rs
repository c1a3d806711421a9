//! The rules that an honest validator keeps, whatever happens to it.

use std::collections::{BTreeMap, BTreeSet};

use metanode_ibft::{Draft, Height, Message, Round, View};
use metanode_ledger::Block;
use metanode_types::{Hash, NodeKey};

/// What an honest validator has said and heard, whatever its disk has of it: the rules are kept across crashes.
#[derive(Default)]
pub(crate) struct Audit {
    said: BTreeMap<(u8, View), Hash>,
    asked: BTreeMap<Height, Round>,
    committed: BTreeMap<Height, Round>,
    pub(crate) announced: usize,
    heard: BTreeMap<Height, BTreeMap<NodeKey, Round>>,
    proposals: BTreeSet<View>,
}

impl Audit {
    pub(crate) fn says(&mut self, me: NodeKey, draft: &Draft<Block>) {
        let (kind, view, choice) = match draft {
            Draft::Proposal { payload, justification, .. } => {
                let claims = justification.round_changes.iter().filter_map(|signed| signed.payload.prepared);
                if let Some((_, highest)) = claims.max_by_key(|(round, _)| *round) {
                    assert_eq!(payload.hash, highest, "clause 9: the highest lock is proposed again");
                }
                (0, payload.view, payload.hash)
            }
            Draft::Prepare(payload) => (1, payload.view, payload.hash),
            Draft::Commit(payload) => {
                let round = self.committed.entry(payload.view.height).or_insert(payload.view.round);
                *round = payload.view.round.max(*round);
                (2, payload.view, payload.hash)
            }
            Draft::RoundChange { payload, .. } => {
                let (height, round) = (payload.view.height, payload.view.round);
                self.asked.insert(height, round);
                self.heard.entry(height).or_default().insert(me, round); // from its disk, if it dies before it hears itself
                let claimed = payload.prepared.map(|(round, _)| round);
                assert!(claimed >= self.committed.get(&height).copied(), "clause 12: the lock survives");
                (3, payload.view, payload.prepared.map_or(Hash([0; 32]), |(_, hash)| hash))
            }
        };
        let asked = self.asked.get(&view.height).copied().unwrap_or(Round::ZERO);
        assert!(view.round >= asked, "clause 8: nothing below the round that it has asked for");
        let before = *self.said.entry((kind, view)).or_insert(choice);
        assert_eq!(before, choice, "clause 8: one thing in a round, kind {kind} at {view:?}");
    }

    pub(crate) fn hears(&mut self, message: &Message<Block>) {
        match message {
            Message::RoundChange(message) => {
                let view = message.signed.payload.view;
                let heard =
                    self.heard.entry(view.height).or_default().entry(message.signed.signer).or_insert(view.round);
                *heard = view.round.max(*heard);
            }
            Message::Proposal(message) => _ = self.proposals.insert(message.signed.payload.view),
            _ => {}
        }
    }

    pub(crate) fn starts_clock(&self, view: View, quorum: usize) {
        let heard = self.heard.get(&view.height);
        let shared = heard.map_or(0, |heard| heard.values().filter(|round| **round >= view.round).count());
        let started = view.round == Round::ZERO || shared >= quorum || self.proposals.contains(&view);
        assert!(started, "clause 16: the clock of a later round starts with a quorum, or its proposal");
    }
}
