//! Messages, as honest validators sign them and as others send them.

use std::{cell::RefCell, collections::HashMap};

use metanode_crypto::{Identity, hash};
use metanode_ibft::{
    ChainId, Draft, Message, Payload, Proposal, ProposalMessage, RoundChangeMessage, Signature, Signed, Verifier,
};
use metanode_ledger::{Block, system::Zip215};
use metanode_types::{Hash, NodeKey};

/// Real signatures, each checked once for all validators: it is the same for all. Those that the simulation has made are known to hold.
#[derive(Default)]
pub(crate) struct Known(RefCell<HashMap<Hash, bool>>);

impl Known {
    /// What `check` says of something, asked once.
    pub(crate) fn holds(&self, what: Hash, check: impl FnOnce() -> bool) -> bool {
        *self.0.borrow_mut().entry(what).or_insert_with(check)
    }
}

fn name(signer: &NodeKey, domain: &str, message: &[u8], signature: &Signature) -> Hash {
    hash(&[&signer.0[..], domain.as_bytes(), &[0], message, signature].concat())
}

impl Verifier for Known {
    fn verify(&self, signer: &NodeKey, domain: &str, message: &[u8], signature: &Signature) -> bool {
        self.holds(name(signer, domain, message, signature), || Zip215.verify(signer, domain, message, signature))
    }
}

fn sign<P: Payload>(known: &Known, chain: &ChainId, by: &Identity, payload: P) -> Signed<P> {
    let message = payload.encode(chain);
    let signature = by.sign(P::DOMAIN, &message);
    known.holds(name(&by.public(), P::DOMAIN, &message, &signature), || true);
    Signed { payload, signer: by.public(), signature }
}

pub(crate) fn sign_draft(known: &Known, chain: &ChainId, by: &Identity, draft: Draft<Block>) -> Message<Block> {
    match draft {
        Draft::Proposal { payload, block, justification } => {
            let signed: Signed<Proposal> = sign(known, chain, by, payload);
            Message::Proposal(Box::new(ProposalMessage { signed, block, justification }))
        }
        Draft::Prepare(payload) => Message::Prepare(sign(known, chain, by, payload)),
        Draft::Commit(payload) => Message::Commit(sign(known, chain, by, payload)),
        Draft::RoundChange { payload, block, prepares } => Message::RoundChange(Box::new(RoundChangeMessage {
            signed: sign(known, chain, by, payload),
            block,
            prepares,
        })),
    }
}

/// Its own signature does not hold.
pub(crate) fn spoil(message: &mut Message<Block>) {
    match message {
        Message::Proposal(message) => message.signed.signature[0] ^= 1,
        Message::Prepare(signed) => signed.signature[0] ^= 1,
        Message::Commit(signed) => signed.signature[0] ^= 1,
        Message::RoundChange(message) => message.signed.signature[0] ^= 1,
        Message::NewBlock(_) => {}
    }
}

/// The header stays, and with it the block's hash and what was signed.
pub(crate) fn garble(message: &mut Message<Block>) {
    let block = match message {
        Message::Proposal(message) => Some(&mut message.block),
        Message::RoundChange(message) => message.block.as_mut(),
        Message::NewBlock(decided) => Some(&mut decided.0),
        Message::Prepare(_) | Message::Commit(_) => None,
    };
    if let Some(block) = block {
        block.batches.push(Hash([3; 32]));
    }
}
