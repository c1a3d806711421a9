//! How the ledger of a node is.

use metanode_ibft::VALIDATORS_MAX;
use metanode_wire::message::LedgerStatusReply;

use super::validator::{Validator, no_quorum};

/// What a node is to its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Observes = 0,
    Votes = 1,
    Silent = 2,
    Stopped = 3,
}

/// Times that fit a reply.
const FINALITY_SENT: usize = 8_192;

pub(super) fn status(this: &Validator) -> LedgerStatusReply {
    let replica = this.replica.borrow();
    let chain = replica.chain();
    let tip = chain.tip();
    let validators = chain.system().validators(tip.height.next());
    let (role, reason) = if let Some(why) = &*this.failed.borrow() {
        (Role::Stopped, why.clone())
    } else if !validators.contains(&this.me()) {
        (Role::Observes, "this node's key is not a validator's".to_owned())
    } else if let Some(why) = this.silence() {
        (Role::Silent, why)
    } else {
        (Role::Votes, no_quorum(&replica).unwrap_or_default())
    };
    let finality = this.finality.borrow();
    let counters = &this.counters;
    LedgerStatusReply {
        name: this.genesis.name.clone(),
        chain: this.chain.0,
        lag: this.genesis.lag,
        expiry_heights_max: this.genesis.expiry_heights_max,
        node_key: this.me().0,
        role: role as u8,
        reason,
        height: tip.height.0,
        block: tip.hash.0,
        time_ms: tip.time_ms,
        executed: chain.executed_height().0,
        round: replica.view().filter(|view| view.height > tip.height).map_or(0, |view| view.round.0),
        validators: validators.iter().map(|key| key.0).collect(),
        connected: this.links.connected().into_iter().map(|key| key.0).collect(),
        waiting: replica.waiting().count() as u64,
        waiting_bytes: replica.waiting().bytes() as u64,
        batches: replica.board().open_count() as u64,
        transactions: counters.transactions.value(),
        done: counters.done.value(),
        messages: counters.messages.value(),
        message_bytes: counters.message_bytes.value(),
        signatures: counters.signatures.value(),
        timeouts: counters.timeouts.value(),
        finality_us: finality.iter().rev().take(FINALITY_SENT).rev().map(micros).collect(),
        syncs: counters.syncs.count(),
        sync_p50_us: micros(&counters.syncs.quantile(0.5)),
        guilty: chain.system().guilty().take(VALIDATORS_MAX).map(|(key, _)| key.0).collect(),
    }
}

fn micros(time: &std::time::Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}
