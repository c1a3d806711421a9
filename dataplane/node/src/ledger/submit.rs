//! Transactions of clients: read, checked, handed to the replica.

use std::{rc::Rc, time::Duration};

use bytes::Bytes;
use metanode_ibft::{Evidence, Height};
use metanode_ledger::{Code, Kind, Names, Transaction, TransactionDraft, TransactionError, TransactionId, system};
use metanode_mempool as mempool;
use metanode_replica::SubmitRefusal;
use metanode_shard::{now, timeout};
use metanode_types::{NodeKey, limits::SUBMIT_TRANSACTIONS_MAX};
use metanode_wire::{Refusal, RefusalCode, TransactionRefusal, message::TransactionRefused};

use super::{
    checks::all_of,
    validator::{Validator, away},
};

/// How long a request waits for room, before what does not fit is refused as busy.
const ROOM_TIME_MAX: Duration = Duration::from_secs(2);

/// Who sends, and what that permits.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sender {
    pub(crate) key: NodeKey,
    /// It may write to this node.
    pub(crate) may_write: bool,
}

/// Takes transactions that lie one behind the other; those that are refused, with their places.
pub(super) async fn submit(
    this: &Rc<Validator>,
    sender: Sender,
    encoded: Bytes,
) -> Result<Vec<TransactionRefused>, Refusal> {
    if let Some(why) = this.failed.borrow().as_ref() {
        return Err(Refusal::new(RefusalCode::Storage, format!("the ledger of this node has stopped: {why}")));
    }
    if !this.replica.borrow().chain().system().latest().contains(&this.me()) {
        let why = "transactions to a node that is no validator now: send them to one (`metanode node validators`)";
        return Err(Refusal::new(RefusalCode::NotSupported, why));
    }
    let count = count(&encoded)?;
    let mut refusals: Vec<Option<TransactionRefusal>> = prefilter(this, sender, &encoded);
    // Who brings more than there is room for is slowed down before it is refused.
    let deadline = now() + ROOM_TIME_MAX;
    while refusals.iter().flatten().any(TransactionRefusal::is_busy) && now() < deadline {
        let made = this.batches_made.get();
        if timeout(deadline - now(), this.batches_made.reach(made.next())).await.is_err() {
            break;
        }
        refusals = prefilter(this, sender, &encoded);
    }
    if refusals.iter().all(Option::is_some) {
        return Ok(messages(&refusals));
    }
    if all_of(&encoded).any(|transaction| transaction.signature.is_some()) {
        for place in this.checks.transactions(encoded.clone()).await {
            refusals[place].get_or_insert(TransactionRefusal::BadSignature);
        }
    }
    let mut executed: Vec<u64> = vec![0; count];
    if all_of(&encoded).any(|transaction| transaction.kind == Kind::Application) {
        for (place, answer) in ask_application(this, &encoded).await?.into_iter().enumerate() {
            match answer {
                Ok(nonce) => executed[place] = nonce,
                Err(code) => _ = refusals[place].get_or_insert(TransactionRefusal::Application(code.0)),
            }
        }
    }
    let good = all_of(&encoded).enumerate().filter(|(place, _)| refusals[*place].is_none());
    let (places, good): (Vec<usize>, Vec<(Transaction<'_>, u64)>) =
        good.map(|(place, transaction)| (place, (transaction, executed[place]))).unzip();
    let names = Names::of(&this.chain);
    let ids: Vec<(TransactionId, Height)> = good.iter().map(|(it, _)| (names.name(it), it.expiry)).collect();
    // Before they can be executed.
    let fresh: Vec<bool> = ids.iter().map(|(id, _)| this.results.of(id).is_none()).collect();
    ids.iter().zip(&fresh).filter(|(_, fresh)| **fresh).for_each(|((id, expiry), _)| this.results.waits(*id, *expiry));
    let verdicts = this.act(|replica, now| replica.submit_all(now, sender.key, good));
    for ((place, verdict), ((id, _), fresh)) in places.into_iter().zip(verdicts).zip(ids.iter().zip(&fresh)) {
        if let Err(refusal) = verdict {
            refusals[place] = Some(of_refusal(refusal));
            if *fresh {
                this.results.does_not_wait(id);
            }
        }
    }
    Ok(messages(&refusals))
}

/// What the application says to transactions: the nonce that each one's account is to use next, or why not. It is not asked about others' than
/// its own. Refused as busy while there is no application.
async fn ask_application(this: &Validator, encoded: &Bytes) -> Result<Vec<Result<u64, Code>>, Refusal> {
    let is_its_own = |transaction: &Transaction<'_>| transaction.kind == Kind::Application;
    let count = all_of(encoded).filter(is_its_own).count();
    let its_own = match count == all_of(encoded).count() {
        true => encoded.clone(),
        false => {
            let bytes = all_of(encoded).filter(is_its_own).flat_map(|transaction| transaction.bytes().to_vec());
            bytes.collect::<Vec<u8>>().into()
        }
    };
    let verdicts = this.app()?.check(its_own, count).await.map_err(|gone| {
        this.lost_app(&gone);
        away(&gone.0)
    })?;
    let mut verdicts = verdicts.into_iter();
    let answer = |transaction: Transaction<'_>| match is_its_own(&transaction) {
        false => Ok(0),
        true => match verdicts.next().expect("one for each") {
            (0, next) => Ok(next),
            (code, _) => Err(Code(code)),
        },
    };
    Ok(all_of(encoded).map(answer).collect())
}

/// Transactions of a batch that no block will name: they wait again, as far as they may still be executed.
pub(super) async fn again(this: &Rc<Validator>, encoded: Bytes) {
    let answers = loop {
        this.app_is_here().await;
        if let Ok(answers) = ask_application(this, &encoded).await {
            break answers;
        }
    };
    let good = all_of(&encoded).zip(answers).filter_map(|(transaction, answer)| Some((transaction, answer.ok()?)));
    let me = this.me();
    let verdicts = this.act(|replica, now| replica.submit_all(now, me, good));
    let refused = verdicts.iter().filter(|verdict| verdict.is_err()).count();
    if refused > 0 {
        tracing::debug!("{refused} of {} transactions of an expired batch are over", verdicts.len());
    }
}

fn messages(refusals: &[Option<TransactionRefusal>]) -> Vec<TransactionRefused> {
    let places = refusals.iter().enumerate();
    places.filter_map(|(place, refusal)| Some((*refusal)?.to_message(place as u32))).collect()
}

/// How many there are, if all can be read.
fn count(encoded: &[u8]) -> Result<usize, Refusal> {
    let (mut rest, mut count) = (encoded, 0);
    while !rest.is_empty() {
        let malformed = |error| Refusal::new(RefusalCode::Malformed, format!("transaction {count}: {error}"));
        rest = Transaction::decode_first(rest).map_err(malformed)?.1;
        count += 1;
    }
    match count {
        0 => Err(Refusal::new(RefusalCode::Malformed, "no transaction")),
        1..=SUBMIT_TRANSACTIONS_MAX => Ok(count),
        _ => {
            let why = format!("{count} transactions; at most {SUBMIT_TRANSACTIONS_MAX} are taken at a time");
            Err(Refusal::new(RefusalCode::TooLarge, why))
        }
    }
}

/// What can be refused without much work.
fn prefilter(this: &Validator, sender: Sender, encoded: &[u8]) -> Vec<Option<TransactionRefusal>> {
    let replica = this.replica.borrow();
    let mut bytes = 0;
    let verdict = |transaction: Transaction<'_>| {
        if transaction.kind == Kind::Opaque && !sender.may_write {
            return Some(TransactionRefusal::NotPermitted);
        }
        bytes += transaction.bytes().len();
        let chain = replica.chain().check_transaction(&transaction).map_err(SubmitRefusal::Chain);
        let room = replica.waiting().has_room(&sender.key, bytes).map_err(SubmitRefusal::Waiting);
        chain.and(room).err().map(of_refusal)
    };
    all_of(encoded).map(verdict).collect()
}

fn of_refusal(refusal: SubmitRefusal) -> TransactionRefusal {
    match refusal {
        SubmitRefusal::Chain(error) => match error {
            TransactionError::Malformed(_) => TransactionRefusal::Malformed,
            TransactionError::TooLarge(bytes) => TransactionRefusal::TooLarge(bytes as u64),
            TransactionError::Unsigned => TransactionRefusal::Unsigned,
            TransactionError::BadSignature => TransactionRefusal::BadSignature,
            TransactionError::NotAValidator => TransactionRefusal::NotAValidator,
            TransactionError::Expired(height) => TransactionRefusal::Expired(height.0),
            TransactionError::ExpiresTooLate(height) => TransactionRefusal::ExpiresTooLate(height.0),
        },
        SubmitRefusal::Waiting(refusal) => match refusal {
            mempool::Refusal::Full => TransactionRefusal::Full,
            mempool::Refusal::PeerFull => TransactionRefusal::PeerFull,
            mempool::Refusal::AccountFull => TransactionRefusal::AccountFull,
            mempool::Refusal::NonceUsed { nonce, next } => TransactionRefusal::NonceUsed { nonce, next },
            mempool::Refusal::NonceTooHigh { nonce, next } => TransactionRefusal::NonceTooHigh { nonce, next },
            mempool::Refusal::Known => TransactionRefusal::Known,
            mempool::Refusal::FeeTooLow { needed } => TransactionRefusal::FeeTooLow(needed),
        },
    }
}

/// Puts evidence on the chain.
pub(super) async fn accuse(this: Rc<Validator>, evidence: Evidence, expiry: Height) {
    let payload = system::encode_evidence(&evidence);
    let draft =
        TransactionDraft { kind: Kind::Evidence, account: this.me(), nonce: 0, fee: 0, expiry, payload: &payload };
    let sign = |domain: &str, message: &[u8]| Ok::<_, std::convert::Infallible>(this.identity.sign(domain, message));
    let Ok(encoded) = draft.encode(&this.chain, sign);
    let me = Sender { key: this.me(), may_write: true };
    match submit(&this, me, encoded.into()).await {
        Ok(refused) if refused.is_empty() => {}
        Ok(refused) => tracing::warn!(?refused, "evidence was not taken"),
        Err(refusal) => tracing::warn!(%refusal, "evidence was not taken"),
    }
}
