//! Proof that a validator has signed two things of which an honest one signs at most one (clause 26).

use metanode_types::NodeKey;

use crate::message::{ChainId, Commit, Payload, Prepare, Proposal, RoundChange, Signed, Verifier, View};

/// Two signed messages of one signer, kind and view that differ. Anybody can check it, without the chain.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Evidence {
    /// Two proposals.
    Proposal([Signed<Proposal>; 2]),
    /// Two prepares.
    Prepare([Signed<Prepare>; 2]),
    /// Two commits.
    Commit([Signed<Commit>; 2]),
    /// Two round changes with different claims.
    RoundChange([Signed<RoundChange>; 2]),
}

impl Evidence {
    /// Who did it, and where.
    pub fn of(&self) -> (NodeKey, View) {
        match self {
            Self::Proposal([one, _]) => (one.signer, one.payload.view),
            Self::Prepare([one, _]) => (one.signer, one.payload.view),
            Self::Commit([one, _]) => (one.signer, one.payload.view),
            Self::RoundChange([one, _]) => (one.signer, one.payload.view),
        }
    }

    /// Whether it proves what it says. Who checks it decides whether the signer was a validator there.
    pub fn verify(&self, chain: &ChainId, verifier: &dyn Verifier) -> bool {
        match self {
            Self::Proposal(pair) => differ(pair, chain, verifier),
            Self::Prepare(pair) => differ(pair, chain, verifier),
            Self::Commit(pair) => differ(pair, chain, verifier),
            Self::RoundChange(pair) => differ(pair, chain, verifier),
        }
    }
}

fn differ<P: Payload>([one, other]: &[Signed<P>; 2], chain: &ChainId, verifier: &dyn Verifier) -> bool {
    let same_place = one.signer == other.signer && one.payload.view() == other.payload.view();
    same_place && one.payload != other.payload && one.verify(chain, verifier) && other.verify(chain, verifier)
}
