//! Transactions until they are in a batch.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, VecDeque},
};

use bytes::Bytes;
use metanode_ibft::Height;
use metanode_ledger::{BatchDraft, Kind, Transaction};
use metanode_types::NodeKey;

/// A replacement must offer so much more than what it replaces, in percent: otherwise one coin would pay for endless traffic.
const REPLACEMENT_PERCENT: u64 = 10;

/// How much may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitingLimits {
    /// Transactions of all.
    pub transactions_max: usize,
    /// Their bytes.
    pub bytes_max: usize,
    /// Transactions of one account: what it sends while a block is agreed on.
    pub account_transactions_max: usize,
    /// Bytes that one client has brought.
    pub peer_bytes_max: usize,
}

impl Default for WaitingLimits {
    /// What a second of a loaded chain takes.
    fn default() -> Self {
        Self {
            transactions_max: 100_000,
            bytes_max: 128 << 20,
            account_transactions_max: 256,
            peer_bytes_max: 32 << 20,
        }
    }
}

/// Why a transaction does not wait here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Too much waits; later there is room.
    #[error("too many transactions wait")]
    Full,
    /// This client's share is used up; later there is room.
    #[error("this client's transactions that wait use up its share")]
    PeerFull,
    /// This account's share is used up; later there is room.
    #[error("this account's transactions that wait use up its share")]
    AccountFull,
    /// The account has had this nonce, or one waits in a batch.
    #[error("nonce {nonce} is used; the account's next is {next}")]
    NonceUsed {
        /// The transaction's.
        nonce: u64,
        /// What comes next.
        next: u64,
    },
    /// Farther ahead than an account's share reaches.
    #[error("nonce {nonce} is too far ahead; the account's next is {next}")]
    NonceTooHigh {
        /// The transaction's.
        nonce: u64,
        /// What comes next.
        next: u64,
    },
    /// It waits already.
    #[error("it waits already")]
    Known,
    /// Another with this nonce waits, and this one does not offer enough more.
    #[error("another transaction with this nonce waits; a fee of {needed} would replace it")]
    FeeTooLow {
        /// What would be enough.
        needed: u64,
    },
}

#[derive(Debug, Clone)]
struct Entry {
    bytes: Bytes,
    fee: u64,
    expiry: Height,
    peer: NodeKey,
}

#[derive(Debug, Clone, Default)]
struct Account {
    waiting: BTreeMap<u64, Entry>,
    /// The first nonce that is neither executed nor in a batch of this validator.
    next: u64,
    /// How many it has had, as far as is known here.
    had: u64,
    /// Batches of this validator that have its transactions and are not executed.
    in_batches: usize,
}

/// What went into a batch: to be given back when the batch is over.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Taken {
    accounts: BTreeSet<NodeKey>,
}

/// See the crate.
#[derive(Debug, Clone)]
pub struct Waiting {
    limits: WaitingLimits,
    accounts: BTreeMap<NodeKey, Account>,
    /// The first of each account that could go next.
    ready: BTreeSet<(Reverse<u64>, NodeKey)>,
    /// The ledger's own, and those without an account, in the order in which they came.
    system: VecDeque<Entry>,
    opaque: VecDeque<Entry>,
    peers: BTreeMap<NodeKey, usize>,
    count: usize,
    bytes: usize,
}

impl Waiting {
    /// Nothing waits.
    pub fn new(limits: WaitingLimits) -> Self {
        Self {
            limits,
            accounts: BTreeMap::new(),
            ready: BTreeSet::new(),
            system: VecDeque::new(),
            opaque: VecDeque::new(),
            peers: BTreeMap::new(),
            count: 0,
            bytes: 0,
        }
    }

    /// Number of transactions that wait.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Their bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether a batch could be made now.
    pub fn is_ready(&self) -> bool {
        !(self.ready.is_empty() && self.system.is_empty() && self.opaque.is_empty())
    }

    /// Whether there could be room for one of a client's, before its signature is checked.
    pub fn has_room(&self, peer: &NodeKey, bytes: usize) -> Result<(), Refusal> {
        let Limits { transactions, total, of_peer } = self.limits(peer);
        if transactions == 0 || total < bytes {
            return Err(Refusal::Full);
        }
        if of_peer < bytes { Err(Refusal::PeerFull) } else { Ok(()) }
    }

    fn limits(&self, peer: &NodeKey) -> Limits {
        let used = self.peers.get(peer).copied().unwrap_or(0);
        Limits {
            transactions: self.limits.transactions_max.saturating_sub(self.count),
            total: self.limits.bytes_max.saturating_sub(self.bytes),
            of_peer: self.limits.peer_bytes_max.saturating_sub(used),
        }
    }

    /// Takes a transaction of a client, which was checked; `executed` is how many its account has had.
    pub fn insert(&mut self, peer: NodeKey, transaction: &Transaction<'_>, executed: u64) -> Result<(), Refusal> {
        let bytes = transaction.bytes();
        let entry =
            Entry { bytes: Bytes::copy_from_slice(bytes), fee: transaction.fee, expiry: transaction.expiry, peer };
        match transaction.kind {
            Kind::Application => {}
            Kind::Opaque | Kind::Validators | Kind::Evidence => {
                self.has_room(&peer, bytes.len())?;
                self.entered(&entry);
                match transaction.kind {
                    Kind::Opaque => self.opaque.push_back(entry),
                    _ => self.system.push_back(entry),
                }
                return Ok(());
            }
        }
        let (key, nonce) = (transaction.account, transaction.nonce);
        let (next, known, length) = match self.accounts.get(&key) {
            Some(account) => (account.next.max(executed), account.waiting.get(&nonce), account.waiting.len()),
            None => (executed, None, 0),
        };
        if nonce < next {
            return Err(Refusal::NonceUsed { nonce, next });
        }
        if nonce - next >= self.limits.account_transactions_max as u64 {
            return Err(Refusal::NonceTooHigh { nonce, next });
        }
        match known {
            Some(known) if known.bytes == entry.bytes => return Err(Refusal::Known),
            Some(known) => {
                let needed = known.fee.saturating_add(known.fee / (100 / REPLACEMENT_PERCENT)).saturating_add(1);
                if entry.fee < needed {
                    return Err(Refusal::FeeTooLow { needed });
                }
            }
            None if length >= self.limits.account_transactions_max => return Err(Refusal::AccountFull),
            None => {}
        }
        self.has_room(&peer, bytes.len())?;
        self.entered(&entry);
        self.unready(&key);
        let account = self.accounts.entry(key).or_default();
        account.next = next;
        account.had = account.had.max(executed);
        if let Some(replaced) = account.waiting.insert(nonce, entry) {
            self.left(&replaced);
        }
        self.make_ready(&key);
        Ok(())
    }

    /// Takes back a transaction that was in a batch of this validator and could not be executed, since others of its account come first;
    /// `next` is what the account is to use next. Its account goes on from there, though later ones of it may be in batches.
    pub fn take_back(&mut self, peer: NodeKey, transaction: &Transaction<'_>, next: u64) {
        let (key, nonce) = (transaction.account, transaction.nonce);
        if nonce < next || self.accounts.get(&key).is_some_and(|account| account.waiting.contains_key(&nonce)) {
            return; // it is over, or another took its place
        }
        let bytes = Bytes::copy_from_slice(transaction.bytes());
        let entry = Entry { bytes, fee: transaction.fee, expiry: transaction.expiry, peer };
        self.entered(&entry);
        self.unready(&key);
        let account = self.accounts.entry(key).or_insert_with(|| Account { next, ..Account::default() });
        account.had = account.had.max(next);
        account.next = account.next.min(nonce);
        account.waiting.insert(nonce, entry);
        self.make_ready(&key);
    }

    fn entered(&mut self, entry: &Entry) {
        self.count += 1;
        self.bytes += entry.bytes.len();
        *self.peers.entry(entry.peer).or_default() += entry.bytes.len();
    }

    fn left(&mut self, entry: &Entry) {
        self.count -= 1;
        self.bytes -= entry.bytes.len();
        let used = self.peers.get_mut(&entry.peer).expect("it was counted when it came");
        *used -= entry.bytes.len();
        if *used == 0 {
            self.peers.remove(&entry.peer);
        }
    }

    fn first_fee(&self, key: &NodeKey) -> Option<u64> {
        let account = self.accounts.get(key)?;
        account.waiting.get(&account.next).map(|entry| entry.fee)
    }

    fn unready(&mut self, key: &NodeKey) {
        if let Some(fee) = self.first_fee(key) {
            self.ready.remove(&(Reverse(fee), *key));
        }
    }

    fn make_ready(&mut self, key: &NodeKey) {
        if let Some(fee) = self.first_fee(key) {
            self.ready.insert((Reverse(fee), *key));
        }
    }

    /// Fills a batch: the ledger's own first, then by fee, then the opaque ones. What has expired at `next`, the next height, is dropped.
    pub fn fill(&mut self, batch: &mut BatchDraft, next: Height) -> Taken {
        let mut taken = Taken::default();
        let is_full = self.fill_from(batch, next, |this| &mut this.system);
        if is_full {
            return taken;
        }
        while let Some((fee, key)) = self.ready.pop_first() {
            let account = self.accounts.get_mut(&key).expect("who is ready is there");
            let entry = account.waiting.get(&account.next).expect("who is ready has its next");
            if entry.expiry >= next && !batch.push(&read(&entry.bytes)) {
                self.ready.insert((fee, key));
                return taken;
            }
            let entry = account.waiting.remove(&account.next).expect("it was there");
            if entry.expiry >= next {
                account.next += 1;
                if taken.accounts.insert(key) {
                    account.in_batches += 1;
                }
            }
            self.left(&entry);
            self.make_ready(&key);
            self.tidy(&key);
        }
        self.fill_from(batch, next, |this| &mut this.opaque);
        taken
    }

    /// `true` when the batch is full.
    fn fill_from(
        &mut self,
        batch: &mut BatchDraft,
        next: Height,
        queue: impl Fn(&mut Self) -> &mut VecDeque<Entry>,
    ) -> bool {
        while let Some(entry) = queue(self).pop_front() {
            if entry.expiry >= next && !batch.push(&read(&entry.bytes)) {
                queue(self).push_front(entry);
                return true;
            }
            self.left(&entry);
        }
        false
    }

    /// An account has had so many transactions, whoever has ordered them.
    pub fn executed(&mut self, key: &NodeKey, had: u64) {
        if let Some(account) = self.accounts.get_mut(key) {
            account.had = account.had.max(had);
            let next = account.next.max(account.had);
            self.go_on_from(key, next);
        }
    }

    /// A batch is executed, or will never be: its accounts go on from what they have had by now.
    pub fn settle(&mut self, taken: &Taken) {
        for key in &taken.accounts {
            let Some(account) = self.accounts.get_mut(key) else { continue };
            account.in_batches = account.in_batches.saturating_sub(1);
            let next = if account.in_batches == 0 { account.had } else { account.next.max(account.had) };
            self.go_on_from(key, next);
        }
    }

    fn go_on_from(&mut self, key: &NodeKey, next: u64) {
        self.unready(key);
        let account = self.accounts.get_mut(key).expect("the caller has seen it");
        account.next = next;
        let rest = account.waiting.split_off(&next);
        let used = std::mem::replace(&mut account.waiting, rest);
        used.values().for_each(|entry| self.left(entry));
        self.make_ready(key);
        self.tidy(key);
    }

    /// Drops what has expired, of whoever does not come to the front.
    pub fn expire(&mut self, next: Height) {
        let keys: Vec<NodeKey> = self.accounts.keys().copied().collect();
        for key in keys {
            self.unready(&key);
            let account = self.accounts.get_mut(&key).expect("it is there");
            let expired: Vec<Entry> =
                account.waiting.extract_if(.., |_, entry| entry.expiry < next).map(|(_, entry)| entry).collect();
            expired.iter().for_each(|entry| self.left(entry));
            self.make_ready(&key);
            self.tidy(&key);
        }
    }

    /// Forgets an account that has nothing here.
    fn tidy(&mut self, key: &NodeKey) {
        if self.accounts.get(key).is_some_and(|account| account.waiting.is_empty() && account.in_batches == 0) {
            self.accounts.remove(key);
        }
    }
}

struct Limits {
    transactions: usize,
    total: usize,
    of_peer: usize,
}

fn read(bytes: &[u8]) -> Transaction<'_> {
    Transaction::decode(bytes).expect("it was read before")
}

#[cfg(test)]
mod tests {
    use metanode_crypto::Identity;
    use metanode_ibft::ChainId;
    use metanode_ledger::{Batch, TransactionDraft};

    use super::*;

    const CHAIN: ChainId = ChainId([7; 32]);

    fn key(number: u8) -> NodeKey {
        NodeKey([number; 32])
    }

    fn encoded(kind: Kind, by: u8, nonce: u64, fee: u64, expiry: u64) -> Vec<u8> {
        let draft = TransactionDraft {
            kind,
            account: key(by),
            nonce,
            fee,
            expiry: Height(expiry),
            payload: &[by, nonce as u8],
        };
        draft.encode(&CHAIN, |_, _| Ok::<_, ()>([0; 64])).unwrap()
    }

    fn add(pool: &mut Waiting, by: u8, nonce: u64, fee: u64) -> Result<(), Refusal> {
        let bytes = encoded(Kind::Application, by, nonce, fee, 100);
        pool.insert(key(100 + by), &Transaction::decode(&bytes).unwrap(), 0)
    }

    fn batch(pool: &mut Waiting, next: u64) -> (Vec<(u8, u64)>, Taken) {
        let author = Identity::from_seed(&[1; 32]);
        let mut draft = BatchDraft::new(author.public(), 0, Height(50));
        let taken = pool.fill(&mut draft, Height(next));
        let made: Batch = draft.finish(&CHAIN, |domain, message| Ok::<_, ()>(author.sign(domain, message))).unwrap();
        (made.transactions().map(|it| (it.account.0[0], it.nonce)).collect(), taken)
    }

    fn small() -> WaitingLimits {
        WaitingLimits { transactions_max: 8, bytes_max: 4096, account_transactions_max: 4, peer_bytes_max: 600 }
    }

    #[test]
    fn fees_decide_then_keys_and_nonces_are_kept_in_order() {
        let mut pool = Waiting::new(WaitingLimits::default());
        for (by, nonce, fee) in [(1, 1, 90), (1, 0, 1), (3, 0, 5), (2, 0, 5), (2, 2, 99), (4, 0, 7)] {
            add(&mut pool, by, nonce, fee).unwrap();
        }
        let vote = encoded(Kind::Validators, 9, 0, 0, 100);
        pool.insert(key(9), &Transaction::decode(&vote).unwrap(), 0).unwrap();
        let opaque = TransactionDraft::encode_opaque(b"x");
        pool.insert(key(9), &Transaction::decode(&opaque).unwrap(), 0).unwrap();
        let (made, taken) = batch(&mut pool, 1);
        assert_eq!(made, [(9, 0), (4, 0), (2, 0), (3, 0), (1, 0), (1, 1), (0, 0)]);
        assert_eq!((pool.count(), pool.is_ready()), (1, false), "2 waits for its nonce 1");
        assert_eq!(add(&mut pool, 2, 0, 50), Err(Refusal::NonceUsed { nonce: 0, next: 1 }));
        add(&mut pool, 2, 1, 1).unwrap();
        assert_eq!(batch(&mut pool, 2).0, [(2, 1), (2, 2)]);
        for by in [1, 2, 3, 4] {
            pool.executed(&key(by), 1);
        }
        pool.settle(&taken);
        assert_eq!(pool.bytes(), 0);
    }

    #[test]
    fn each_has_a_share() {
        let mut pool = Waiting::new(small());
        assert_eq!(add(&mut pool, 1, 4, 0), Err(Refusal::NonceTooHigh { nonce: 4, next: 0 }));
        for nonce in 0..4 {
            add(&mut pool, 1, nonce, 0).unwrap();
        }
        assert_eq!(add(&mut pool, 1, 0, 0), Err(Refusal::Known));
        // Another's account, by the same client.
        let bytes = encoded(Kind::Application, 2, 0, 0, 100);
        let transaction = Transaction::decode(&bytes).unwrap();
        assert_eq!(pool.insert(key(101), &transaction, 0), Err(Refusal::PeerFull));
        assert_eq!(pool.insert(key(102), &transaction, 0), Ok(()));
        for by in 3..6 {
            add(&mut pool, by, 0, 0).unwrap();
        }
        assert_eq!(add(&mut pool, 7, 0, 0), Err(Refusal::Full));
        let (made, _) = batch(&mut pool, 1);
        assert_eq!((made.len(), pool.count(), pool.bytes()), (8, 0, 0));
        assert!(pool.peers.is_empty());
    }

    #[test]
    fn a_better_offer_replaces() {
        let mut pool = Waiting::new(WaitingLimits::default());
        add(&mut pool, 1, 0, 100).unwrap();
        assert_eq!(add(&mut pool, 1, 0, 110), Err(Refusal::FeeTooLow { needed: 111 }));
        let bytes = pool.bytes();
        add(&mut pool, 1, 0, 111).unwrap();
        assert_eq!((pool.count(), pool.bytes()), (1, bytes));
        assert_eq!(batch(&mut pool, 1).0, [(1, 0)]);
    }

    /// A batch that is never ordered leaves its accounts where they are.
    #[test]
    fn accounts_go_on_from_what_was_executed() {
        let mut pool = Waiting::new(WaitingLimits::default());
        add(&mut pool, 1, 0, 0).unwrap();
        let (_, first) = batch(&mut pool, 1);
        add(&mut pool, 1, 1, 0).unwrap();
        let (_, second) = batch(&mut pool, 1);
        add(&mut pool, 1, 2, 0).unwrap();
        pool.executed(&key(1), 1);
        pool.settle(&first);
        assert!(pool.is_ready(), "2 follows what the second batch has");
        pool.settle(&second);
        assert!(!pool.is_ready(), "1 was lost with it");
        add(&mut pool, 1, 1, 0).unwrap();
        let (made, third) = batch(&mut pool, 1);
        assert_eq!(made, [(1, 1), (1, 2)]);
        pool.executed(&key(1), 3);
        pool.settle(&third);
        assert!(pool.accounts.is_empty() && pool.ready.is_empty());
    }

    #[test]
    fn what_expires_goes() {
        let mut pool = Waiting::new(WaitingLimits::default());
        for (nonce, expiry) in [(0, 5), (1, 9), (3, 5)] {
            let bytes = encoded(Kind::Application, 1, nonce, 0, expiry);
            pool.insert(key(1), &Transaction::decode(&bytes).unwrap(), 0).unwrap();
        }
        pool.expire(Height(6));
        assert_eq!((pool.count(), pool.is_ready()), (1, false));
        let bytes = encoded(Kind::Application, 1, 0, 0, 7);
        pool.insert(key(1), &Transaction::decode(&bytes).unwrap(), 0).unwrap();
        assert!(batch(&mut pool, 8).0.is_empty(), "expired at the front");
        let vote = encoded(Kind::Validators, 9, 0, 0, 7);
        pool.insert(key(9), &Transaction::decode(&vote).unwrap(), 0).unwrap();
        assert!(batch(&mut pool, 8).0.is_empty());
        assert_eq!(pool.count(), 1);
    }
}
