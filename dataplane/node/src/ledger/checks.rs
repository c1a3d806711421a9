//! Signatures of transactions and batches, checked beside the shard, so that votes don't wait for them.
//!
//! What comes while others are checked is checked together, which costs half of what one by one does.

use std::{cell::RefCell, collections::VecDeque, io, rc::Rc};

use bytes::Bytes;
use metanode_crypto::{Claim, verify_all};
use metanode_ibft::ChainId;
use metanode_ledger::{Batch, BatchError, TRANSACTION_DOMAIN, Transaction};
use metanode_shard::{
    Companion, Task,
    local::{Notify, Slot},
    spawn_local,
};

/// Transactions that are checked in one go, unless one batch has more: some 10 ms.
const TOGETHER_MAX: usize = 512;

/// Something with signatures.
#[derive(Debug, Clone)]
enum Work {
    /// Encoded one behind the other.
    Transactions(Bytes),
    Batch(Batch),
}

impl Work {
    fn count(&self) -> usize {
        match self {
            Self::Transactions(bytes) => bytes.len() / 200 + 1,
            Self::Batch(batch) => batch.count(),
        }
    }
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Verdict {
    /// Places of transactions whose signature does not hold.
    bad: Vec<usize>,
    /// Of a batch: its author has signed it.
    is_signed: bool,
}

type Waiting = (Work, Slot<Verdict>);

/// Checks signatures, on a thread of its own.
#[derive(Debug)]
pub(super) struct Checks {
    companion: Rc<Companion>,
    queue: Rc<Queue>,
    _task: Task<()>,
}

/// Clients' transactions don't stand before validators' batches, however many of them are forged: each round takes some of both.
#[derive(Debug, Default)]
struct Queue {
    /// Those that a block names first.
    batches: RefCell<VecDeque<Waiting>>,
    transactions: RefCell<VecDeque<Waiting>>,
    came: Notify,
}

impl Queue {
    /// What is checked next, together.
    fn next(&self) -> (Vec<Work>, Vec<Slot<Verdict>>) {
        let of_batches = if self.transactions.borrow().is_empty() { TOGETHER_MAX } else { TOGETHER_MAX / 2 };
        let mut taken = take(&mut self.batches.borrow_mut(), of_batches);
        let count: usize = taken.iter().map(|(work, _)| work.count()).sum();
        taken.extend(take(&mut self.transactions.borrow_mut(), TOGETHER_MAX.saturating_sub(count)));
        taken.into_iter().unzip()
    }
}

/// The first ones, as many as fit; one in any case.
fn take(waiting: &mut VecDeque<Waiting>, count_max: usize) -> Vec<Waiting> {
    let mut count = 0;
    let fits = waiting.iter().take_while(|(work, _)| {
        let is_first = count == 0;
        count += work.count();
        is_first || count <= count_max
    });
    let fits = fits.count();
    waiting.drain(..fits).collect()
}

impl Checks {
    pub(super) fn start(chain: ChainId) -> io::Result<Self> {
        let companion = Rc::new(Companion::start("check", 1)?);
        let queue = Rc::new(Queue::default());
        let task = spawn_local(work(chain, companion.clone(), queue.clone()));
        Ok(Self { companion, queue, _task: task })
    }

    /// Places of those whose signature does not hold. They can be read.
    pub(super) async fn transactions(&self, encoded: Bytes) -> Vec<usize> {
        let slot = Slot::new();
        self.queue.transactions.borrow_mut().push_back((Work::Transactions(encoded), slot.clone()));
        self.queue.came.notify();
        slot.wait().await.bad
    }

    /// Whether a batch's signatures hold, its author's and those in it. One that a block names is checked before others.
    pub(super) async fn batch(&self, batch: Batch, is_named: bool) -> bool {
        let slot = Slot::new();
        let waiting = (Work::Batch(batch), slot.clone());
        match is_named {
            true => self.queue.batches.borrow_mut().push_front(waiting),
            false => self.queue.batches.borrow_mut().push_back(waiting),
        }
        self.queue.came.notify();
        let verdict = slot.wait().await;
        verdict.is_signed && verdict.bad.is_empty()
    }

    /// Reads a batch.
    pub(super) async fn decode(&self, bytes: Bytes) -> Result<Batch, BatchError> {
        self.companion.run(move || Batch::decode(bytes)).await
    }

    /// Does something else that takes a while.
    pub(super) async fn beside<R: Send + 'static>(&self, job: impl FnOnce() -> R + Send + 'static) -> R {
        self.companion.run(job).await
    }
}

async fn work(chain: ChainId, companion: Rc<Companion>, queue: Rc<Queue>) {
    loop {
        let (works, slots) = queue.next();
        if works.is_empty() {
            queue.came.wait().await;
            continue;
        }
        let verdicts = companion.run(move || verdicts(&chain, &works)).await;
        slots.into_iter().zip(verdicts).for_each(|(slot, verdict)| slot.set(verdict));
    }
}

fn verdicts(chain: &ChainId, works: &[Work]) -> Vec<Verdict> {
    let mut messages = Vec::new();
    let mut verdicts = Vec::with_capacity(works.len());
    for (index, work) in works.iter().enumerate() {
        let mut add = |place: usize, transaction: Transaction<'_>| {
            if let Some(signature) = transaction.signature {
                messages.push((index, place, transaction.account, transaction.signed_message(chain), *signature));
            }
        };
        let is_signed = match work {
            Work::Transactions(bytes) => {
                all_of(bytes).enumerate().for_each(|(place, transaction)| add(place, transaction));
                true
            }
            Work::Batch(batch) => {
                batch.transactions().enumerate().for_each(|(place, transaction)| add(place, transaction));
                batch.is_signed(chain)
            }
        };
        verdicts.push(Verdict { bad: Vec::new(), is_signed });
    }
    let claims: Vec<Claim<'_>> = messages
        .iter()
        .map(|(_, _, signer, message, signature)| Claim {
            signer: *signer,
            domain: TRANSACTION_DOMAIN,
            message,
            signature,
        })
        .collect();
    if let Err(bad) = verify_all(&claims) {
        for claim in bad {
            let (index, place, ..) = messages[claim];
            verdicts[index].bad.push(place);
        }
    }
    verdicts
}

/// Transactions that lie one behind the other, as far as they can be read.
pub(super) fn all_of(mut bytes: &[u8]) -> impl Iterator<Item = Transaction<'_>> {
    std::iter::from_fn(move || {
        let (transaction, rest) = Transaction::decode_first(bytes).ok()?;
        bytes = rest;
        Some(transaction)
    })
}
