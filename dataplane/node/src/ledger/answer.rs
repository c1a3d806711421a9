//! What clients ask of the ledger.

use std::{rc::Rc, time::Duration};

use bytes::Bytes;
use metanode_admin_api::application::Request;
use metanode_application::Question;
use metanode_ibft::Height;
use metanode_ledger::{Outcome, TransactionId};
use metanode_shard::timeout;
use metanode_types::NodeKey;
use metanode_wire::{
    Refusal, RefusalCode,
    message::{LedgerFound, TransactionState},
};

use super::{
    incoming::{WAIT_MAX, block_bytes},
    results::Known,
    route::{LedgerReply, LedgerRequest},
    status::status,
    submit::submit,
    validator::{Validator, away},
};

/// Time for the replica to hear of what the application has executed.
const HEARD_TIME_MAX: Duration = Duration::from_secs(1);

/// Outcomes in one reply: they fit a frame's body.
const OUTCOMES_MAX: usize = metanode_types::limits::FRAME_BODY_BYTES_MAX / Outcome::BYTES;

/// Answers one request.
pub(super) async fn answer(this: &Rc<Validator>, request: LedgerRequest) -> Result<LedgerReply, Refusal> {
    Ok(match request {
        LedgerRequest::Submit { sender, encoded } => LedgerReply::Submitted(submit(this, sender, encoded).await?),
        LedgerRequest::Wait { id, wait } => LedgerReply::Transaction(wait_for(this, TransactionId(id), wait).await?),
        LedgerRequest::Status => LedgerReply::Status(Box::new(status(this))),
        LedgerRequest::Query { kind, account, name } => {
            LedgerReply::Found(Box::new(query(this, kind, account, name).await?))
        }
        LedgerRequest::Block { height, wait } => {
            LedgerReply::Block(Box::new(block_bytes(this, Height(height), wait).await?))
        }
        LedgerRequest::Outcomes { height, first, wait } => outcomes(this, Height(height), first, wait).await?,
    })
}

async fn wait_for(this: &Validator, id: TransactionId, wait: Duration) -> Result<TransactionState, Refusal> {
    let mut known = this.results.of(&id);
    // What memory does not have, or has as skipped, may have been executed long ago.
    if matches!(known, None | Some(Known::Executed(_, Outcome::Skipped(_)))) {
        let found = this.outcomes.of(id).await;
        let found = found.map_err(|error| Refusal::new(RefusalCode::Storage, error.to_string()))?;
        known = match (known, found) {
            (Some(Known::Executed(..)), Some((_, Outcome::Skipped(_)))) => known,
            (known, None) => known,
            (_, Some((height, outcome))) => Some(Known::Executed(height, outcome)),
        };
    }
    let known = match known {
        Some(Known::Executed(..)) => known,
        known => timeout(wait.min(WAIT_MAX), this.results.executed(id)).await.ok().or(known),
    };
    // What had not come when it was asked for may have come since.
    let known = known.or_else(|| this.results.of(&id));
    let mut state = TransactionState { state: 0, height: 0, outcome: 0, code: 0, answer: [0; 32] };
    match known {
        None => {}
        Some(Known::Waits) => state.state = 1,
        Some(Known::Executed(height, outcome)) => {
            (state.state, state.height) = (2, height.0);
            match outcome {
                Outcome::Done(answer) => state.answer = answer.0,
                Outcome::Failed(code) => (state.outcome, state.code) = (1, code.0),
                Outcome::Skipped(code) => (state.outcome, state.code) = (2, code.0),
            }
        }
    }
    Ok(state)
}

async fn query(this: &Validator, kind: u8, account: [u8; 32], name: Vec<u8>) -> Result<LedgerFound, Refusal> {
    Question::of(kind, NodeKey(account), name.clone())?; // it is one
    let found = this.app()?.query(Request::Query { kind, account, name }).await.map_err(|gone| {
        this.lost_app(&gone);
        away(&gone.0)
    })??;
    let height = Height(found.height);
    // The ledger's part is as of the same height once the replica has heard of it, which may take a moment.
    _ = timeout(HEARD_TIME_MAX, this.executed.reach(height)).await; // it has, or there is no such height
    let (executed, system) = {
        let replica = this.replica.borrow();
        (replica.chain().executed_height(), replica.chain().system().hash())
    };
    if executed != height {
        return Err(Refusal::busy(1)); // another block was executed meanwhile, and the ledger's part is gone
    }
    Ok(LedgerFound {
        height: proven_at(this, height).0,
        key: found.key,
        value: found.value,
        beside: found.beside.iter().map(|hash| hash.0).collect(),
        found: found.found.map(|(key, hash)| (key, hash.0)),
        system: system.0,
    })
}

/// A height at which the state was the same as at this one, and whose hash a final block carries already, if there is one: where no empty blocks
/// are made, the block that would carry this one's comes with the next transaction.
fn proven_at(this: &Validator, height: Height) -> Height {
    let hash_at = |height| this.results.block(height).map(|executed| executed.app_hash);
    let Some(now) = hash_at(height) else { return height };
    let carried = Height(this.decided.get().0.saturating_sub(this.genesis.lag));
    let between = (carried.0..height.0).map(Height);
    if between.into_iter().all(|height| hash_at(height) == Some(now)) { height.min(carried) } else { height }
}

async fn outcomes(this: &Validator, height: Height, first: u32, wait: Duration) -> Result<LedgerReply, Refusal> {
    _ = timeout(wait.min(WAIT_MAX), this.executed.reach(height)).await; // there or not
    let executed = this.results.block(height).ok_or(RefusalCode::NotFound)?;
    let count = executed.outcomes.len();
    let from = (first as usize).min(count);
    let to = (from + OUTCOMES_MAX).min(count);
    let mut body = Vec::with_capacity((to - from) * Outcome::BYTES);
    executed.outcomes[from..to].iter().for_each(|(id, outcome)| body.extend(outcome.encode(id)));
    Ok(LedgerReply::Outcomes { count: count as u32, body: Bytes::from(body) })
}
