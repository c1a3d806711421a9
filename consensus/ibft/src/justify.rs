//! When a quorum of signatures proves something. Pure checks: everything a message carries is verified here and nowhere else.

use std::collections::BTreeSet;

use metanode_types::{
    Hash, NodeKey,
    sabotage::{self, Sabotage},
};

use crate::{
    message::{
        Block, Certificate, ChainId, Commit, Justification, Payload, Prepare, Round, RoundChange, RoundChangeMessage,
        Signed, Verifier, View,
    },
    validators::ValidatorSet,
};

/// Why a message counts for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// Its signer does not vote at this height.
    #[error("the signer is no validator of this height")]
    NotAValidator,
    /// A signature is not the signer's, or is for another chain, kind or version.
    #[error("a signature does not verify")]
    BadSignature,
    /// The round's proposer is somebody else.
    #[error("the signer is not the proposer of this round")]
    NotTheProposer,
    /// Below the current round, or for a height that is decided.
    #[error("the height or round is over")]
    Old,
    /// Farther ahead than what is kept.
    #[error("too far ahead")]
    TooFarAhead,
    /// What the signer may have kept for later is used up by messages that are nearer.
    #[error("the signer's share of the buffer is used up by nearer messages")]
    ShareUsedUp,
    /// Received already.
    #[error("received already")]
    Known,
    /// The same signer has signed another message of this kind for this view.
    #[error("the signer has signed another message of this kind for this view")]
    Equivocation,
    /// A proposal or round change lacks the quorum that it needs, or carries what it must not.
    #[error("not justified")]
    NotJustified,
    /// The block is not the one that is named, or does not fit the chain.
    #[error("the block does not fit")]
    BadBlock,
    /// A fresh block is not younger than its parent, or too far in the future.
    #[error("the block's time is out of bounds")]
    BadTime,
}

/// What every check needs.
pub(crate) struct Checks<'a> {
    pub(crate) me: Option<NodeKey>,
    pub(crate) chain: &'a ChainId,
    pub(crate) validators: &'a ValidatorSet,
    pub(crate) verifier: &'a dyn Verifier,
}

impl Checks<'_> {
    /// A signature by a validator (clauses 2 and 3).
    pub(crate) fn signed<P: Payload>(&self, signed: &Signed<P>) -> Result<(), Refusal> {
        if !self.validators.contains(&signed.signer) {
            return Err(Refusal::NotAValidator);
        }
        let trusted = sabotage::is_on(Sabotage::TrustOwnMessages) && self.me == Some(signed.signer);
        (trusted || signed.verify(self.chain, self.verifier)).then_some(()).ok_or(Refusal::BadSignature)
    }

    /// Distinct validators, all with valid signatures, as many as a quorum (clauses 1 and 2).
    fn quorum<'m, P: Payload + 'm>(&self, all: impl Iterator<Item = &'m Signed<P>>) -> Result<(), Refusal> {
        let all: Vec<_> = all.collect();
        if all.len() > self.validators.len() {
            return Err(Refusal::NotJustified); // before anything is checked: each check costs as much as a hundred votes are long
        }
        let mut signers = BTreeSet::<NodeKey>::new();
        for signed in all {
            self.signed(signed)?;
            signers.insert(signed.signer);
        }
        if signers.len() >= self.validators.quorum() { Ok(()) } else { Err(Refusal::NotJustified) }
    }

    /// A quorum that prepared `hash` in `round` of a height (clause 10).
    pub(crate) fn prepared(&self, view: View, hash: Hash, prepares: &[Signed<Prepare>]) -> Result<(), Refusal> {
        if prepares.iter().any(|signed| signed.payload != Prepare { view, hash }) {
            return Err(Refusal::NotJustified);
        }
        self.quorum(prepares.iter())
    }

    /// A certificate of finality: a quorum of commits of one round (clauses 6 and 25).
    pub(crate) fn certificate(&self, certificate: &Certificate) -> Result<(), Refusal> {
        let Certificate { view, hash, commits } = certificate;
        if commits.iter().any(|signed| signed.payload != Commit { view: *view, hash: *hash }) {
            return Err(Refusal::NotJustified);
        }
        self.quorum(commits.iter())
    }

    /// A round change with the proof of its claim (clauses 7 and 11). `known` says whether a block can be had by its hash.
    pub(crate) fn round_change<B: Block>(
        &self,
        message: &RoundChangeMessage<B>,
        known: impl Fn(&Hash) -> bool,
    ) -> Result<(), Refusal> {
        self.signed(&message.signed)?;
        let RoundChange { view, prepared } = message.signed.payload;
        let Some((round, hash)) = prepared else {
            let bare = message.block.is_none() && message.prepares.is_empty();
            return if bare { Ok(()) } else { Err(Refusal::NotJustified) };
        };
        if round >= view.round {
            return Err(Refusal::NotJustified);
        }
        match &message.block {
            Some(block) if block.hash() != hash || block.height() != view.height => return Err(Refusal::BadBlock),
            None if !known(&hash) => return Err(Refusal::NotJustified),
            _ => {}
        }
        self.prepared(View { round, ..view }, hash, &message.prepares)
    }

    /// What a proposal for `view` must propose (clause 9): `Some` block that was prepared, or any valid one of the round's proposer.
    pub(crate) fn proposal(&self, view: View, justification: &Justification) -> Result<Option<Hash>, Refusal> {
        let Justification { round_changes, prepares } = justification;
        if view.round == Round::ZERO {
            let bare = round_changes.is_empty() && prepares.is_empty();
            return if bare { Ok(None) } else { Err(Refusal::NotJustified) };
        }
        let fits = |payload: &RoundChange| {
            payload.view == view && payload.prepared.is_none_or(|(round, _)| round < view.round)
        };
        if round_changes.iter().any(|signed| !fits(&signed.payload)) {
            return Err(Refusal::NotJustified);
        }
        self.quorum(round_changes.iter())?;
        match highest_prepared(round_changes) {
            None if prepares.is_empty() => Ok(None),
            None => Err(Refusal::NotJustified),
            Some((round, hash)) => {
                self.prepared(View { round, ..view }, hash, prepares)?;
                Ok(Some(hash))
            }
        }
    }
}

impl Certificate {
    /// Whether it proves that its block is final on a chain, if these are the validators of its height: for whoever was given it (clause 25).
    pub fn verify(&self, chain: &ChainId, validators: &ValidatorSet, verifier: &dyn Verifier) -> Result<(), Refusal> {
        Checks { me: None, chain, validators, verifier }.certificate(self)
    }
}

/// The claim with the highest round (clause 9).
pub(crate) fn highest_prepared<'m>(
    round_changes: impl IntoIterator<Item = &'m Signed<RoundChange>>,
) -> Option<(Round, Hash)> {
    let claims = round_changes.into_iter().filter_map(|signed| signed.payload.prepared);
    match sabotage::is_on(Sabotage::LowestLock) {
        false => claims.max_by_key(|(round, _)| *round),
        true => claims.min_by_key(|(round, _)| *round),
    }
}
