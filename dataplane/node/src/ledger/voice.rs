//! What a validator says, on disk before it leaves (clause 21 of the protocol's checklist).
//!
//! Effects come in an order, and pile up while the disk works. All that have come are taken at once: messages are signed, and with the
//! records go to the sign state with one sync; then messages leave, in their order, and come back to the replica as anybody's do.
//!
//! ```text
//! record of the sign state:   0 u8 | height u64: it was begun anew at this height;   1 u8 | archive of `metanode-codec`
//! ```
//!
//! A sign state that is half full is begun anew, with the fewest records that are needed, once the blocks that it has decided are in the
//! store for good.

use std::rc::Rc;

use metanode_codec::{decode_record, encode_record};
use metanode_ibft::{Draft, Height, Message, Payload, ProposalMessage, Record, RoundChangeMessage, Signed};
use metanode_ledger::Block;
use metanode_shard::now;
use metanode_wal::{FILE_BYTES, SignState, SignerError, WalError};

use super::{
    blocks,
    validator::{Detach as _, Ordered, Validator},
};

const MARK: u8 = 0;
const RECORD: u8 = 1;

/// What the sign state had.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// In their order.
    pub(super) records: Vec<Record<Block>>,
    /// The highest height that it is about.
    pub(super) height: Height0,
}

/// A height, 0 when there is none.
pub(super) type Height0 = u64;

/// Reads what the sign state had.
pub(super) fn read(records: &[Vec<u8>]) -> Result<Said, &'static str> {
    let mut said = Said::default();
    for record in records {
        match record.split_first() {
            Some((&MARK, height)) => {
                let height = height.try_into().map_err(|_| "a mark of another length")?;
                said.height = said.height.max(u64::from_le_bytes(height));
            }
            Some((&RECORD, archive)) => {
                let record = decode_record(archive).map_err(|_| "a record that can't be read")?;
                said.height = said.height.max(height_of(&record).0);
                said.records.push(record);
            }
            _ => return Err("a record of another kind"),
        }
    }
    Ok(said)
}

fn height_of(record: &Record<Block>) -> Height {
    match record {
        Record::Round(view) => view.height,
        Record::Block(block) => block.header.height,
        Record::Prepared(prepared) => prepared.block.header.height,
        Record::Cast(message) => message.view().height,
        Record::Decision(decided) => decided.0.header.height,
    }
}

/// A record that says that nothing is known of what was signed up to a height.
pub(super) fn mark(height: u64) -> Vec<u8> {
    [&[MARK][..], &height.to_le_bytes()].concat()
}

fn record(record: &Record<Block>) -> Vec<u8> {
    [&[RECORD][..], &encode_record(record)].concat()
}

/// Does what comes, in order.
pub(super) async fn run(this: Rc<Validator>) {
    loop {
        this.ordered_came.wait().await;
        loop {
            let run: Vec<Ordered> = this.ordered.borrow_mut().drain(..).collect();
            if run.is_empty() {
                break;
            }
            if let Err(error) = speak(&this, run).await {
                return this.fail(format!("sign state: {error}"));
            }
        }
        if let Err(error) = shorten(&this).await {
            return this.fail(format!("sign state: {error}"));
        }
    }
}

async fn speak(this: &Rc<Validator>, run: Vec<Ordered>) -> Result<(), WalError> {
    let (mut records, mut messages) = (Vec::new(), Vec::new());
    for ordered in &run {
        match ordered {
            Ordered::Persist(kept) => records.push(record(kept)),
            Ordered::Cast(draft) => {
                let wal = this.wal.as_ref().filter(|_| this.is_sound());
                match wal.map(|wal| sign(this, wal.sign_state(), draft.clone())) {
                    Some(Ok(message)) => {
                        records.push(record(&Record::Cast(message.clone())));
                        messages.push(Some(message));
                    }
                    Some(Err(error)) => {
                        tracing::error!("{error}: a message is not said");
                        messages.push(None);
                    }
                    None => messages.push(None),
                }
            }
            _ => {}
        }
    }
    if let Some(wal) = this.wal.as_ref().filter(|_| !records.is_empty()) {
        let since = now();
        wal.append(&records).await?;
        this.counters.syncs.record(now() - since);
    }
    let mut messages = messages.into_iter();
    for ordered in run {
        match ordered {
            Ordered::Persist(_) => {}
            Ordered::Cast(_) => {
                if let Some(message) = messages.next().expect("one for each") {
                    this.send(None, &message);
                    this.act(|replica, now| replica.message(now, message));
                }
            }
            Ordered::Send { to, message } => this.send(to, &message),
            Ordered::Help { to, height } => {
                metanode_shard::spawn_local(blocks::help(this.clone(), to, height)).detach_quietly();
            }
            Ordered::Store { block, certificate } => {
                this.to_store.borrow_mut().push_back((block, certificate));
                this.to_store_came.notify();
            }
            Ordered::Execute(block) => {
                this.to_execute.borrow_mut().push_back(block);
                this.to_execute_came.notify();
            }
        }
    }
    Ok(())
}

/// Begins the sign state anew when it is half full and that is safe now.
async fn shorten(this: &Rc<Validator>) -> Result<(), WalError> {
    let Some(wal) = this.wal.as_ref().filter(|wal| wal.room_bytes() < FILE_BYTES / 2) else { return Ok(()) };
    let decided = this.decided.get();
    this.stored.reach(decided).await;
    if let Err(error) = this.block_list.sync().await {
        this.fail(format!("the list of blocks: {error}"));
        return Ok(());
    }
    let is_quiet = this.ordered.borrow().is_empty() && this.decided.get() == decided;
    let records = this.replica.borrow().records().filter(|_| is_quiet);
    match records {
        Some(records) => {
            let records = records.iter().map(record);
            wal.restart([mark(decided.next().0)].into_iter().chain(records).collect()).await
        }
        None => Ok(()), // soon
    }
}

fn sign(this: &Validator, state: &SignState, draft: Draft<Block>) -> Result<Message<Block>, SignerError> {
    fn signed<P: Payload>(this: &Validator, state: &SignState, payload: P) -> Result<Signed<P>, SignerError> {
        let signature = state.sign(P::DOMAIN, &payload.encode(&this.chain))?;
        Ok(Signed { payload, signer: this.me(), signature })
    }
    Ok(match draft {
        Draft::Proposal { payload, block, justification } => {
            Message::Proposal(Box::new(ProposalMessage { signed: signed(this, state, payload)?, block, justification }))
        }
        Draft::Prepare(payload) => Message::Prepare(signed(this, state, payload)?),
        Draft::Commit(payload) => Message::Commit(signed(this, state, payload)?),
        Draft::RoundChange { payload, block, prepares } => Message::RoundChange(Box::new(RoundChangeMessage {
            signed: signed(this, state, payload)?,
            block,
            prepares,
        })),
    })
}
