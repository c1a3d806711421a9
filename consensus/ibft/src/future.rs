//! Messages for heights that have not begun here (clause 23).

use std::collections::BTreeMap;

use metanode_types::NodeKey;

use crate::{
    justify::Refusal,
    message::{Block, ChainId, Height, Message, Round, Verifier},
    validators::ValidatorSet,
};

/// Heights ahead of which messages are kept: one is usual, since others decide a moment earlier; who is farther behind gets final blocks.
pub const HEIGHTS_AHEAD: u64 = 2;

/// Messages of one signer that are kept: of two heights, four kinds in two rounds.
pub const SHARE_MESSAGES_MAX: usize = 16;

/// Bytes of blocks in the messages of one signer that are kept: a block names its batches by digest and is small.
pub const SHARE_BYTES_MAX: usize = 1 << 20;

/// Where a message belongs, nearest first; two of one signer with the same are the same message, or equivocation, which is seen later.
type Place = (Height, Round, u8);

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Future<B> {
    shares: BTreeMap<NodeKey, BTreeMap<Place, Message<B>>>,
}

impl<B> Default for Future<B> {
    fn default() -> Self {
        Self { shares: BTreeMap::new() }
    }
}

impl<B: Block> Future<B> {
    /// Keeps a message, if its signer has signed it and has room for it.
    pub(crate) fn keep(
        &mut self,
        chain: &ChainId,
        validators: &ValidatorSet,
        verifier: &dyn Verifier,
        here: Height,
        message: Message<B>,
    ) -> Result<(), Refusal> {
        let view = message.view();
        let kind = match &message {
            Message::Proposal(_) => 0,
            Message::Prepare(_) => 1,
            Message::Commit(_) => 2,
            Message::RoundChange(_) => 3,
            Message::NewBlock(_) => 4,
        };
        // A final block has no signer: it is asked for when its height has begun, and checked then.
        let Some(signer) = message.signer() else { return Err(Refusal::TooFarAhead) };
        if !validators.contains(&signer) {
            return Err(Refusal::NotAValidator);
        }
        if !message.is_signed(chain, verifier) {
            return Err(Refusal::BadSignature);
        }
        if view.height.0 - here.0 > HEIGHTS_AHEAD {
            return Err(Refusal::TooFarAhead);
        }
        let share = self.shares.entry(signer).or_default();
        // Of round changes only the highest of a height counts (clause 17).
        let place = if kind == 3 { (view.height, Round::ZERO, kind) } else { (view.height, view.round, kind) };
        if share.get(&place).is_some_and(|before| before.view().round >= view.round) {
            return Err(Refusal::Known);
        }
        share.insert(place, message);
        // The furthest goes first, which may be the one that has just come.
        while share.len() > SHARE_MESSAGES_MAX || share.values().map(block_bytes).sum::<usize>() > SHARE_BYTES_MAX {
            let (dropped, _) = share.pop_last().expect("it is over a limit");
            if dropped == place {
                return Err(Refusal::ShareUsedUp);
            }
        }
        Ok(())
    }

    /// What was kept for a height, which begins; what was kept for earlier ones goes.
    pub(crate) fn take(&mut self, height: Height) -> Vec<Message<B>> {
        let mut taken = Vec::new();
        for share in self.shares.values_mut() {
            let later = share.split_off(&(height.next(), Round::ZERO, 0));
            let now = std::mem::replace(share, later).into_iter().filter(|((at, ..), _)| *at == height);
            taken.extend(now.map(|(_, message)| message));
        }
        self.shares.retain(|_, share| !share.is_empty());
        taken
    }
}

fn block_bytes<B: Block>(message: &Message<B>) -> usize {
    match message {
        Message::Proposal(message) => message.block.size_bytes(),
        Message::RoundChange(message) => message.block.as_ref().map_or(0, Block::size_bytes),
        Message::Prepare(_) | Message::Commit(_) | Message::NewBlock(_) => 0,
    }
}
