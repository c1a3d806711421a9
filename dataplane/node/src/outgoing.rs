//! Answers that QUIC has and clients have not acknowledged: how much of a shard's memory they may take, and whose they may be.
//!
//! What is written to a stream stays in memory until the client acknowledges it, which a slow client does late and a hostile one never.
//! A shard has one budget for all of it. A connection may have a quarter of what is free there
//! (the *dynamic threshold* of Choudhury and Hahne, 1998, for switches that share their memory): a lone one gets a fifth of everything, many
//! get equal parts, and however many hold what they have, something is left for the next one.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use metanode_shard::sleep;

/// The part of what is free that one connection may have.
const SHARE_OF_FREE: u64 = 4;

/// Fewer bytes than this are not written while more wait: a packet's worth.
const PART_BYTES_MIN: u64 = 1024;

/// Connections that wait for what others have are woken this often, and so many at a time: a waiting stranger costs little.
const LOOK_PERIOD: Duration = Duration::from_millis(20);
const LOOKS: usize = 256;

/// The budget of a shard.
#[derive(Debug, Clone)]
pub(crate) struct Outgoing(Arc<Budget>);

// `Bytes` wants owners that may change threads, hence atomics and a lock; all of it stays on one shard.
#[derive(Debug)]
struct Budget {
    bytes_max: u64,
    bytes: AtomicU64,
    /// Connections that wait, each once.
    waiting: Mutex<VecDeque<Weak<Inner>>>,
    /// Of the task that wakes them.
    looker: Mutex<Option<Waker>>,
}

/// What one connection has of it.
#[derive(Debug, Clone)]
pub(crate) struct Account(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    budget: Arc<Budget>,
    bytes: AtomicU64,
    /// Acknowledged since the beginning.
    acknowledged_bytes: AtomicU64,
    /// Its streams that wait for that.
    waiting: Mutex<Vec<Waker>>,
    is_awaited: AtomicBool,
    /// The connection is among the waiting of the budget.
    is_listed: AtomicBool,
    /// The connection is gone: nobody waits any more.
    is_ended: AtomicBool,
}

/// Bytes that are written and not acknowledged; given back when dropped.
struct Charge {
    account: Account,
    bytes: u64,
}

/// Pieces of a write are counted together up to so many bytes, so that a slow client is seen to move.
const CHARGE_BYTES: u64 = 64 << 10;

/// The last of the pieces that are counted together. QUIC lets go of the pieces of a stream in their order.
struct Last {
    piece: Bytes,
    _charge: Charge,
}

impl AsRef<[u8]> for Last {
    fn as_ref(&self) -> &[u8] {
        &self.piece
    }
}

impl Outgoing {
    pub(crate) fn new(bytes_max: u64) -> Self {
        Self(Arc::new(Budget {
            bytes_max,
            bytes: AtomicU64::new(0),
            waiting: Mutex::default(),
            looker: Mutex::default(),
        }))
    }

    /// The part of the budget that is taken: 0 to 1.
    pub(crate) fn taken_share(&self) -> f64 {
        self.bytes() as f64 / self.0.bytes_max as f64
    }

    /// The account of one more connection.
    pub(crate) fn account(&self) -> Account {
        Account(Arc::new(Inner {
            budget: self.0.clone(),
            bytes: AtomicU64::new(0),
            acknowledged_bytes: AtomicU64::new(0),
            waiting: Mutex::default(),
            is_awaited: AtomicBool::new(false),
            is_listed: AtomicBool::new(false),
            is_ended: AtomicBool::new(false),
        }))
    }

    /// Wakes those who wait for what others have, now and then, for ever.
    pub(crate) async fn look(self) {
        loop {
            poll_fn(|cx| match lock(&self.0.waiting).is_empty() {
                false => Poll::Ready(()),
                true => {
                    *lock(&self.0.looker) = Some(cx.waker().clone());
                    Poll::Pending
                }
            })
            .await;
            sleep(LOOK_PERIOD).await;
            self.0.wake_some();
        }
    }

    /// Bytes that clients have not acknowledged.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.bytes.load(Relaxed)
    }
}

impl Budget {
    fn wake_some(&self) {
        for _ in 0..LOOKS {
            let Some(next) = lock(&self.waiting).pop_front() else { return };
            if let Some(account) = next.upgrade() {
                account.is_listed.store(false, Relaxed);
                account.wake();
            }
        }
    }
}

impl Inner {
    fn wake(&self) {
        if self.is_awaited.swap(false, Relaxed) {
            let waiting = std::mem::take(&mut *lock(&self.waiting));
            waiting.into_iter().for_each(Waker::wake);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Account {
    /// Bytes that this connection may write now.
    pub(crate) fn room(&self) -> u64 {
        let budget = &self.0.budget;
        let free = budget.bytes_max.saturating_sub(budget.bytes.load(Relaxed));
        (free / SHARE_OF_FREE).saturating_sub(self.0.bytes.load(Relaxed))
    }

    fn poll_room(&self, cx: &Context<'_>, wanted: u64) -> Poll<Option<u64>> {
        if self.0.is_ended.load(Relaxed) {
            return Poll::Ready(None);
        }
        let room = self.room();
        if room >= wanted.min(PART_BYTES_MIN) {
            return Poll::Ready(Some(room));
        }
        let mut waiting = lock(&self.0.waiting);
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        self.0.is_awaited.store(true, Relaxed);
        if !self.0.is_listed.swap(true, Relaxed) {
            lock(&self.0.budget.waiting).push_back(Arc::downgrade(&self.0));
            let looker = lock(&self.0.budget.looker).take();
            looker.into_iter().for_each(Waker::wake);
        }
        Poll::Pending
    }

    /// Waits until some of the `wanted` bytes may be written: how many, or more. `None`: the connection has ended.
    pub(crate) async fn room_for(&self, wanted: u64) -> Option<u64> {
        poll_fn(|cx| self.poll_room(cx, wanted)).await
    }

    /// The connection is gone: whoever waits is told.
    pub(crate) fn end(&self) {
        self.0.is_ended.store(true, Relaxed);
        self.0.wake();
    }

    /// Counts pieces that are about to be written to one stream, until QUIC lets go of them.
    pub(crate) fn charge(&self, pieces: &mut [Bytes]) {
        let Some(last) = pieces.iter().rposition(|piece| !piece.is_empty()) else { return };
        let mut bytes = 0;
        for (at, piece) in pieces[..=last].iter_mut().enumerate() {
            bytes += piece.len() as u64;
            if at < last && bytes < CHARGE_BYTES {
                continue;
            }
            self.0.bytes.fetch_add(bytes, Relaxed);
            self.0.budget.bytes.fetch_add(bytes, Relaxed);
            let charge = Charge { account: self.clone(), bytes };
            *piece = Bytes::from_owner(Last { piece: std::mem::take(piece), _charge: charge });
            bytes = 0;
        }
    }

    /// Bytes that the client has not acknowledged.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.bytes.load(Relaxed)
    }

    /// Bytes that the client has acknowledged since the beginning.
    pub(crate) fn acknowledged_bytes(&self) -> u64 {
        self.0.acknowledged_bytes.load(Relaxed)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let account = &*self.account.0;
        account.bytes.fetch_sub(self.bytes, Relaxed);
        account.budget.bytes.fetch_sub(self.bytes, Relaxed);
        account.acknowledged_bytes.fetch_add(self.bytes, Relaxed);
        account.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(account: &Account, bytes: u64) -> Vec<Bytes> {
        let mut pieces = vec![Bytes::from(vec![1; bytes as usize - 1]), Bytes::from(vec![2]), Bytes::new()];
        account.charge(&mut pieces);
        assert_eq!(pieces.concat().len() as u64, bytes);
        pieces
    }

    #[test]
    fn a_lone_connection_gets_a_fifth_and_many_leave_something_for_the_next() {
        let outgoing = Outgoing::new(100_000);
        let lone = outgoing.account();
        let mut kept = Vec::new();
        while lone.room() > 100 {
            kept.push(written(&lone, 100));
        }
        assert_eq!(outgoing.bytes(), 20_000);
        let others: Vec<_> = (0..50).map(|_| outgoing.account()).collect();
        for _ in 0..100 {
            for other in others.iter().filter(|other| other.room() > 100) {
                kept.push(written(other, 100));
            }
        }
        assert!((80_000..95_000).contains(&outgoing.bytes()), "{}", outgoing.bytes());
        assert!(outgoing.account().room() > PART_BYTES_MIN);
        drop(kept);
        assert_eq!(outgoing.bytes(), 0);
        assert_eq!(lone.room(), 25_000);
    }

    #[test]
    fn a_long_write_is_given_back_in_parts() {
        let account = Outgoing::new(10 << 20).account();
        let mut pieces = vec![Bytes::from(vec![1; 16 << 10]); 16];
        account.charge(&mut pieces);
        assert_eq!(account.bytes(), 256 << 10);
        pieces.drain(..5);
        assert_eq!((account.bytes(), account.acknowledged_bytes()), (192 << 10, 64 << 10));
        drop(pieces);
        assert_eq!((account.bytes(), account.acknowledged_bytes()), (0, 256 << 10));
    }

    #[test]
    fn acknowledgements_give_room_and_wake() {
        let outgoing = Outgoing::new(10_000);
        let [holder, waiter] = [(); 2].map(|()| outgoing.account());
        let mut pieces = written(&holder, 9_000);
        let cx = &Context::from_waker(Waker::noop());
        assert_eq!(waiter.poll_room(cx, 200), Poll::Ready(Some(250)));
        for account in [&waiter, &holder, &holder] {
            assert!(account.poll_room(cx, 2_000).is_pending());
        }
        assert_eq!(lock(&outgoing.0.waiting).len(), 2, "each once");
        pieces.remove(0);
        assert_eq!(outgoing.bytes(), 9_000, "until the last piece is acknowledged");
        drop(pieces);
        assert!(lock(&holder.0.waiting).is_empty(), "woken");
        assert_eq!(lock(&waiter.0.waiting).len(), 1, "for others' bytes it is woken by the next look");
        outgoing.0.wake_some();
        assert!(lock(&waiter.0.waiting).is_empty() && lock(&outgoing.0.waiting).is_empty());
        assert_eq!(waiter.poll_room(cx, 2_000), Poll::Ready(Some(2_500)));
        waiter.end();
        assert_eq!(waiter.poll_room(cx, 2_000), Poll::Ready(None));
        assert_eq!((holder.acknowledged_bytes(), holder.bytes()), (9_000, 0));
    }
}
