//! Blocks and signatures for tests.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]

use std::time::Duration;

use metanode_ibft::{
    Block, ChainId, Draft, Height, Message, NewHeight, Parameters, Payload, ProposalMessage, RoundChangeMessage,
    SHARE_BYTES_MAX, Signature, Signed, Timing, ValidatorSet, Verifier,
};
use metanode_types::{Hash, NodeKey};

pub const CHAIN: ChainId = ChainId([7; 32]);
pub const BASE: Duration = Duration::from_millis(100);
pub const CAP: Duration = Duration::from_millis(1600);

/// See [`TestBlock::size_bytes`](Block::size_bytes).
pub const LARGE: u64 = 1 << 63;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TestBlock {
    pub height: Height,
    pub parent: Hash,
    pub author: NodeKey,
    pub time_ms: u64,
    pub salt: u64,
}

impl Block for TestBlock {
    fn hash(&self) -> Hash {
        let numbers = [self.height.0, self.time_ms, self.salt].map(u64::to_le_bytes).concat();
        metanode_crypto::hash(&[&numbers[..], &self.parent.0, &self.author.0].concat())
    }

    fn height(&self) -> Height {
        self.height
    }

    fn parent(&self) -> Hash {
        self.parent
    }

    fn author(&self) -> NodeKey {
        self.author
    }

    fn time_ms(&self) -> u64 {
        self.time_ms
    }

    /// One with this bit is large.
    fn size_bytes(&self) -> usize {
        if self.salt & LARGE == 0 { 96 } else { SHARE_BYTES_MAX / 2 }
    }
}

/// Whoever knows a key's name can sign for it: quick, and as hard to mistake as a real signature.
pub struct Toy;

pub fn toy_signature(signer: &NodeKey, domain: &str, message: &[u8]) -> Signature {
    let half = metanode_crypto::hash(&[&signer.0[..], domain.as_bytes(), &[0], message].concat()).0;
    [half, half].concat().try_into().unwrap()
}

impl Verifier for Toy {
    fn verify(&self, signer: &NodeKey, domain: &str, message: &[u8], signature: &Signature) -> bool {
        toy_signature(signer, domain, message) == *signature
    }
}

pub fn sign<P: Payload>(signer: NodeKey, payload: P) -> Signed<P> {
    let signature = toy_signature(&signer, P::DOMAIN, &payload.encode(&CHAIN));
    Signed { payload, signer, signature }
}

pub fn sign_draft(signer: NodeKey, draft: Draft<TestBlock>) -> Message<TestBlock> {
    match draft {
        Draft::Proposal { payload, block, justification } => {
            Message::Proposal(Box::new(ProposalMessage { signed: sign(signer, payload), block, justification }))
        }
        Draft::Prepare(payload) => Message::Prepare(sign(signer, payload)),
        Draft::Commit(payload) => Message::Commit(sign(signer, payload)),
        Draft::RoundChange { payload, block, prepares } => {
            Message::RoundChange(Box::new(RoundChangeMessage { signed: sign(signer, payload), block, prepares }))
        }
    }
}

pub fn key(index: usize) -> NodeKey {
    NodeKey([index as u8 + 1; 32])
}

pub fn parameters(index: usize) -> Parameters {
    let timing = Timing { base: BASE, cap: CAP, empty: Some(Duration::from_millis(5)) };
    Parameters { chain: CHAIN, me: Some(key(index)), timing, clock_drift_ms_max: 500 }
}

/// The first height: the turn begins with key 0.
pub fn first_height(count: usize) -> NewHeight {
    NewHeight {
        height: Height(1),
        validators: ValidatorSet::new((0..count).map(key).collect()).unwrap(),
        parent: Hash([0; 32]),
        parent_author: NodeKey([0; 32]),
        parent_time_ms: 0,
    }
}
