//! What a validator says, on disk before it leaves (clause 21 of the protocol's checklist).
//!
//! Effects come in an order, and pile up while the disk works. All that have come are taken at once: messages are signed, and with the
//! records go to the sign state with one sync; then messages leave, in their order, and come back to the replica as anybody's do.
//!
//! ```text
//! record of the sign state:   0 u8 | height u64: it was begun anew at this height;   1 u8 | archive of `metanode-codec`
//! ```
//!
//! A sign state that is half full is begun anew, with the records of all heights whose blocks are not in the store for good: those of heights
//! that are over are not needed any more.

use std::{collections::VecDeque, rc::Rc};

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
    /// As they lie there, each with its height.
    pub(super) raw: VecDeque<(u64, Vec<u8>)>,
    /// The highest height that it is about; 0 when there is none.
    pub(super) height: u64,
}

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
                let decoded = decode_record(archive).map_err(|_| "a record that can't be read")?;
                let height = height_of(&decoded).0;
                said.height = said.height.max(height);
                said.raw.push_back((height, record.clone()));
                said.records.push(decoded);
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
            if let Err(error) = shorten(&this).await {
                return this.fail(format!("sign state: {error}"));
            }
        }
    }
}

async fn speak(this: &Rc<Validator>, run: Vec<Ordered>) -> Result<(), WalError> {
    let (mut records, mut messages) = (Vec::new(), Vec::new());
    for ordered in &run {
        match ordered {
            Ordered::Persist(kept) => records.push((height_of(kept).0, record(kept))),
            Ordered::Cast(draft) => {
                let wal = this.wal.as_ref().filter(|_| this.is_sound());
                match wal.map(|wal| sign(this, wal.sign_state(), draft.clone())) {
                    Some(Ok(message)) => {
                        if let Message::Commit(signed) = &message {
                            this.voting.voted(&signed.payload);
                        }
                        records.push((message.view().height.0, record(&Record::Cast(message.clone()))));
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
        let bytes: Vec<Vec<u8>> = records.iter().map(|(_, record)| record.clone()).collect();
        wal.append(&bytes).await?;
        this.said.borrow_mut().extend(records);
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

/// Begins the sign state anew when it is half full.
async fn shorten(this: &Rc<Validator>) -> Result<(), WalError> {
    let Some(wal) = this.wal.as_ref().filter(|wal| wal.room_bytes() < FILE_BYTES / 2) else { return Ok(()) };
    // What is stored now is there for good once the list is.
    let stored = this.stored.get().0;
    if let Err(error) = this.block_list.sync().await {
        this.fail(format!("the list of blocks: {error}"));
        return Ok(());
    }
    this.said.borrow_mut().retain(|(height, _)| *height > stored);
    let kept: Vec<Vec<u8>> = this.said.borrow().iter().map(|(_, record)| record.clone()).collect();
    if kept.iter().map(Vec::len).sum::<usize>() as u64 > FILE_BYTES / 4 {
        return Ok(()); // once more is stored
    }
    wal.restart([mark(stored)].into_iter().chain(kept).collect()).await
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
