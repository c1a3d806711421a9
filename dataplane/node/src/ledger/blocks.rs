//! Final blocks: stored, executed, given to others, got from others.
//!
//! ```text
//! blob of a block: block length u32 | block | certificate     (as `metanode-ledger` encodes them)
//! ```

use std::{rc::Rc, time::Duration};

use bytes::Bytes;
use metanode_crypto::hash;
use metanode_ibft::{Certificate, Height, Message};
use metanode_ledger::{
    Batch, BatchError, Block, BlockError, DecodeError, Outcome, decode_certificate, encode_certificate,
};
use metanode_shard::{sleep, spawn_local, timeout};
use metanode_store::{Fetched, PutOptions, Store, StoreError};
use metanode_types::{BlobKind, DurabilityClass, Hash, NodeKey};

use super::{
    application::Executed,
    snapshots,
    validator::{Detach as _, Validator},
};

/// Blocks whose storing may lag behind their execution.
const STORING_BEHIND_MAX: u64 = 16;

/// Pause after all were asked in vain for a block.
const ASK_PAUSE: Duration = Duration::from_millis(200);

/// A block that was asked for and has come is final here within this time, or it is asked for again.
const ARRIVAL_TIME_MAX: Duration = Duration::from_secs(2);

/// How often a validator looks whether it is one.
const LOOK_PERIOD: Duration = Duration::from_secs(1);

/// How long somebody who is asked waits for a block that is not there yet.
const WAIT: Duration = Duration::from_secs(10);

/// Why a block can't be read here.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    /// The store.
    #[error("the store: {0}")]
    Store(#[from] StoreError),
    /// It is no block.
    #[error("the blob of a block: {0}")]
    Block(#[from] DecodeError),
    /// It names something that is no batch.
    #[error("the blob of a batch: {0}")]
    Batch(#[from] BatchError),
}

/// Durable, and there until the ledger removes it: nobody else can.
pub(super) fn kept() -> PutOptions {
    PutOptions { class: DurabilityClass::Durable, kind: BlobKind::Blob, hold: true, keep: true, leases: None }
}

/// A blob of one chunk.
pub(super) async fn whole(store: &Store, address: Hash) -> Result<Bytes, StoreError> {
    match store.get(address).await? {
        Fetched::Whole(bytes) => Ok(bytes),
        Fetched::Large { .. } => Err(StoreError::TooLarge),
    }
}

pub(super) fn encode(block: &Block, certificate: &Certificate) -> Vec<u8> {
    let encoded = block.encode();
    let mut bytes = (encoded.len() as u32).to_le_bytes().to_vec();
    bytes.extend(encoded);
    bytes.extend(encode_certificate(certificate));
    bytes
}

/// The two encodings in a blob.
pub(super) fn split(bytes: &[u8]) -> Result<(&[u8], &[u8]), DecodeError> {
    let (length, rest) = bytes.split_first_chunk::<4>().ok_or(DecodeError::Short)?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or(DecodeError::Short)
}

/// The block at an address, and its certificate.
pub(super) async fn read(store: &Store, address: Hash) -> Result<(Block, Certificate), ReadError> {
    let bytes = whole(store, address).await?;
    let (block, certificate) = split(&bytes)?;
    Ok((Block::decode(block)?, decode_certificate(certificate)?))
}

/// The batches that a block names, from memory or the store.
pub(super) async fn batches_of(
    store: &Store,
    block: &Block,
    cached: impl Fn(&Hash) -> Option<Batch>,
) -> Result<Vec<Batch>, ReadError> {
    let mut batches = Vec::with_capacity(block.batches.len());
    for digest in &block.batches {
        batches.push(match cached(digest) {
            Some(batch) => batch,
            None => Batch::decode(whole(store, *digest).await?)?,
        });
    }
    Ok(batches)
}

/// Stores what is final, in order.
pub(super) async fn store(this: Rc<Validator>) {
    loop {
        let next = this.to_store.borrow_mut().pop_front();
        let Some((block, certificate)) = next else {
            this.to_store_came.wait().await;
            continue;
        };
        if block.header.height <= this.stored.get() {
            continue; // the sign state had it, and the store too
        }
        let bytes = Bytes::from(encode(&block, &certificate));
        let address = hash(&bytes);
        if let Err(error) = this.store.put_verified(address, bytes, kept()).await {
            return this.fail(format!("block {} is not stored: {error}", block.header.height.0));
        }
        if let Err(error) = this.block_list.push(address).await {
            return this.fail(format!("the list of blocks: {error}"));
        }
        this.block_addresses.borrow_mut().push(address);
        this.stored.set(block.header.height);
    }
}

/// Executes what is final, in order.
pub(super) async fn execute(this: Rc<Validator>) {
    loop {
        let next = this.to_execute.borrow_mut().pop_front();
        let Some(block) = next else {
            this.to_execute_came.wait().await;
            continue;
        };
        let height = block.header.height;
        this.stored.reach(Height(height.0.saturating_sub(STORING_BEHIND_MAX))).await;
        let batches = match batches_of(&this.store, &block, |digest| this.batches.borrow().get(digest).cloned()).await {
            Ok(batches) => batches,
            Err(error) => return this.fail(format!("block {} can't be executed: {error}", height.0)),
        };
        let Executed { done, root } = loop {
            this.app_is_here().await;
            let plan = this.replica.borrow().chain().plan(&block, batches.clone());
            match this.app.execute(plan, this.genesis.lag, this.exporting.get()).await {
                Ok(executed) => break executed,
                Err(gone) => this.lost_app(&gone),
            }
        };
        this.app_root.set(root);
        let executed = this.act(|replica, now| replica.executed(now, done));
        block.batches.iter().for_each(|digest| this.batches.borrow_mut().remove(digest));
        note(&this, executed);
        snapshot(&this, height, root);
        this.reach_validators();
        this.publish_role();
        let supported = this.replica.borrow().chain().validators().err();
        if let Some(error @ BlockError::NotSupported { .. }) = supported {
            return this.fail(error.to_string());
        }
        // Memory has room for so many that the disk does not have yet.
        while this.results.unkept().1 {
            this.outcomes.kept().reach(this.outcomes.kept().get().next()).await;
        }
    }
}

/// Makes a snapshot, when it is time for one.
fn snapshot(this: &Rc<Validator>, height: Height, root: Hash) {
    let is_due = this.snapshot_heights > 0 && height.0.is_multiple_of(this.snapshot_heights);
    if is_due && !this.snapshotting.replace(true) {
        this.exporting.set(Some(height));
        let snapshot = this.replica.borrow().chain().snapshot();
        spawn_local(snapshots::make(this.clone(), snapshot, root)).detach_quietly();
    }
}

fn note(this: &Validator, executed: metanode_ledger::Executed) {
    this.counters.transactions.add(executed.outcomes.len() as u64);
    let done = executed.outcomes.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Done(_))).count();
    this.counters.done.add(done as u64);
    let height = executed.height;
    this.results.add(executed);
    this.executed.set(height);
    if this.results.unkept().0 {
        this.outcomes.want(height);
    }
}

/// Sends a final block to who is behind.
pub(super) async fn help(this: Rc<Validator>, to: NodeKey, height: Height) {
    if let Some(decided) = stored(&this, height).await {
        this.send(Some(to), &Message::NewBlock(Box::new(decided)));
    }
}

/// A final block, once it is stored.
async fn stored(this: &Validator, height: Height) -> Option<(Block, Certificate)> {
    let address = address_of(this, height)?;
    match read(&this.store, address).await {
        Ok(decided) => Some(decided),
        Err(error) => {
            tracing::warn!("block {} can't be read: {error}", height.0);
            None
        }
    }
}

/// Where a final block is, if it is stored.
pub(super) fn address_of(this: &Validator, height: Height) -> Option<Hash> {
    let place = usize::try_from(height.0.checked_sub(1)?).ok()?;
    this.block_addresses.borrow().get(place).copied()
}

/// Gets blocks that others have, one after the other. Who does not vote hears of none by itself, and waits at somebody's for the next.
pub(super) async fn catch_up(this: Rc<Validator>) {
    loop {
        let is_validator = {
            let replica = this.replica.borrow();
            let next = replica.chain().tip().height.next();
            replica.chain().system().validators(next).contains(&this.me())
        };
        if is_validator {
            // Looks now and then whether it still is one: who is none any more is told nothing.
            if timeout(LOOK_PERIOD, this.behind_came.wait()).await.is_err() {
                continue;
            }
        }
        let next = this.decided.get().next();
        let (first, wanted) = this.behind.get().unwrap_or((None, next));
        if wanted < next {
            this.behind.take();
            continue;
        }
        // What comes too early for the replica is taken for nothing.
        this.executed.reach(Height(next.0.saturating_sub(this.genesis.lag))).await;
        // One that is known to exist is not waited for.
        let wait = if this.behind.get().is_some() { Duration::ZERO } else { WAIT };
        let mut asked = false;
        for key in this.links.some_first(first) {
            let Some(message) = this.links.block(&key, next, wait).await else { continue };
            asked = true;
            this.act(|replica, now| replica.message(now, message));
            if timeout(ARRIVAL_TIME_MAX, this.decided.reach(next)).await.is_ok() {
                break;
            }
            this.links.failed(&key);
        }
        if this.decided.get() >= wanted {
            this.behind.take();
        } else if !asked {
            this.behind.take(); // nobody has it: who says so lies, or can't be reached now, and says so again
            sleep(ASK_PAUSE).await;
        }
        if this.behind.get().is_some() {
            this.behind_came.notify(); // there is more
        }
    }
}
