//! Batches: made of what waits here, taken from others, fetched when a block names one that is not here.

use std::{rc::Rc, time::Duration};

use bytes::Bytes;
use metanode_ibft::Height;
use metanode_ledger::{Batch, BatchDraft};
use metanode_replica::BatchRefusal;
use metanode_shard::sleep;
use metanode_store::StoreError;
use metanode_types::{Hash, NodeKey};

use super::{
    blocks::{kept, whole},
    submit,
    validator::{Progress, Validator},
};

/// Pause after all were asked in vain for a batch that a block names: as long as it does, it is asked for again.
const FETCH_PAUSE: Duration = Duration::from_millis(200);

/// Makes a batch: signed, sent, stored, given to the replica.
pub(super) async fn make(this: Rc<Validator>, draft: BatchDraft) {
    let (chain, identity) = (this.chain, this.identity.clone());
    let sign = move |domain: &str, message: &[u8]| Ok::<_, std::convert::Infallible>(identity.sign(domain, message));
    let Ok(batch) = this.checks.beside(move || draft.finish(&chain, sign)).await;
    this.links.send_batch(batch.bytes());
    match keep(&this, &batch).await {
        Ok(()) => here(&this, &batch).await,
        Err(error) => {
            tracing::error!("a batch of {} transactions is lost: {error}", batch.count());
            this.act(|replica, now| replica.batch_failed(now));
        }
    }
}

/// On disk, and there until nobody needs it.
async fn keep(this: &Validator, batch: &Batch) -> Result<(), StoreError> {
    this.store.put_verified(batch.digest(), batch.bytes().clone(), kept()).await.map(drop)
}

/// It is on disk: the replica takes it. The list has what is open then, and nothing that a block has named: a restart removes what is on the
/// list and over. (One that a crash keeps off the list is never removed, if no block names it.)
async fn here(this: &Rc<Validator>, batch: &Batch) {
    this.batches.borrow_mut().insert(batch);
    this.act(|replica, now| replica.batch_here(now, batch));
    let is_open = this.replica.borrow().board().is_open(&batch.digest());
    if is_open {
        if let Err(error) = this.arrivals.push(batch.digest()).await {
            this.fail(format!("the list of batches: {error}"));
        }
    } else if !this.replica.borrow().board().contains(&batch.digest()) {
        this.batches.borrow_mut().remove(&batch.digest()); // it came too late
    }
}

/// What came of a batch that somebody has sent.
#[derive(Debug, PartialEq, Eq)]
enum Taken {
    Here,
    /// It is not wanted, or could not be stored.
    Not,
    /// It is none, or not signed.
    Bad,
}

async fn take(this: &Rc<Validator>, bytes: Bytes, expected: Option<Hash>) -> Taken {
    match check(this, bytes, expected).await {
        Ok(batch) => {
            here(this, &batch).await;
            Taken::Here
        }
        Err(taken) => taken,
    }
}

/// Reads a batch, checks it, puts it on disk.
async fn check(this: &Rc<Validator>, bytes: Bytes, expected: Option<Hash>) -> Result<Batch, Taken> {
    let Ok(batch) = this.checks.decode(bytes).await else { return Err(Taken::Bad) };
    if expected.is_some_and(|digest| digest != batch.digest()) {
        return Err(Taken::Bad);
    }
    if expected.is_none() && batch.author() == this.me() {
        return Err(Taken::Not); // an echo: it is on its way here by itself
    }
    wanted(this, &batch)?;
    if !this.checks.batch(batch.clone(), expected.is_some()).await {
        return Err(Taken::Bad);
    }
    wanted(this, &batch)?; // still: it may have come another way, and be named and executed
    if let Err(error) = keep(this, &batch).await {
        tracing::error!("a batch is not stored: {error}");
        return Err(Taken::Not);
    }
    Ok(batch)
}

fn wanted(this: &Validator, batch: &Batch) -> Result<(), Taken> {
    let wanted = this.replica.borrow().wants_batch(&batch.digest(), &batch.facts(), batch.bytes().len());
    wanted.map_err(|refusal| {
        if let BatchRefusal::Chain(error) = refusal {
            tracing::debug!("a batch is not taken: {error}");
        }
        Taken::Not
    })
}

/// Somebody has sent a batch, as the one with this number among all that came this way. They are taken in this order: a later one may have
/// what comes behind an earlier one's.
pub(super) async fn came(this: &Rc<Validator>, bytes: Bytes, from: NodeKey, number: u64, order: &Progress) {
    let checked = check(this, bytes, None).await;
    order.reach(Height(number)).await;
    match checked {
        Ok(batch) => here(this, &batch).await,
        Err(Taken::Bad) => tracing::warn!(%from, "sent a batch whose signatures do not hold, or that is none"),
        Err(_) => {}
    }
    order.set(Height(number + 1));
}

/// Gets a batch that a block names: from the store, or from those who should have it.
pub(super) async fn fetch(this: Rc<Validator>, digest: Hash, from: Vec<NodeKey>) {
    if let Ok(bytes) = whole(&this.store, digest).await
        && take(&this, bytes, Some(digest)).await == Taken::Here
    {
        return;
    }
    for key in this.links.best_first(from) {
        if this.replica.borrow().board().contains(&digest) {
            return; // it came by itself
        }
        let Some(bytes) = this.links.batch(&key, digest).await else { continue };
        if metanode_crypto::hash(&bytes) != digest {
            tracing::warn!(from = %key, "sent something else than the batch that was asked for");
            this.links.failed(&key);
            continue;
        }
        match take(&this, bytes, Some(digest)).await {
            Taken::Here => return,
            Taken::Bad => return this.act(|replica, now| replica.batch_is_bad(now, digest)),
            Taken::Not => {}
        }
    }
    sleep(FETCH_PAUSE).await;
    this.act(|replica, now| replica.batch_is_missing(now, &digest));
}

/// No block will name these: what is in this validator's own waits again.
pub(super) async fn forget(this: Rc<Validator>, digests: Vec<Hash>) {
    for digest in digests {
        let cached = this.batches.borrow().get(&digest).cloned();
        let batch = match cached {
            Some(batch) => Some(batch),
            None => whole(&this.store, digest).await.ok().and_then(|bytes| Batch::decode(bytes).ok()),
        };
        if let Some(batch) = batch.filter(|batch| batch.author() == this.me()) {
            tracing::debug!("a batch of {} transactions has expired: they wait again", batch.count());
            let encoded: Vec<u8> = batch.transactions().flat_map(|transaction| transaction.bytes().to_vec()).collect();
            submit::again(&this, encoded.into()).await;
        }
        this.batches.borrow_mut().remove(&digest);
        match this.store.remove_kept(digest).await {
            Ok(()) | Err(StoreError::NotFound) => {}
            Err(error) => tracing::warn!("batch {digest} is not removed: {error}"),
        }
    }
}
