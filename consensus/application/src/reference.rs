//! Payments and values by key.
//!
//! ```text
//! payload: 1 pay u8  | to 32 | amount u64
//!          2 set u8  | name length u16 | name | value length u32 | value     (no value: the name is removed)
//!          3 read u8 | owner 32 | name length u16 | name
//! state:   1 account u8 | nonce u64 | balance u64;   2 value u8 | value;   3 fees u8 | amount u64
//! ```
//!
//! A transaction is executed when its nonce is the account's next and the account can pay the fee. Then the nonce is used and the fee is
//! gone, whatever comes of the rest. Names belong to the account that sets them. What is read is answered with the hash of the value, or
//! zeros when there is none: in the order of all transactions, which is what a reader who must not be misled wants.

use std::collections::BTreeMap;

use metanode_admin_api::application::PIECE_BYTES_MAX;
use metanode_crypto::hash;
use metanode_ibft::Height;
use metanode_ledger::{Answer, Code, Genesis, Outcome, Transaction};
use metanode_state::{Key, State, Write};
use metanode_types::{Hash, NodeKey};
use metanode_wire::cursor::{Cursor, Short};

use crate::{Application, BadPiece, Found, Piece, QueryError, Question};

/// Bytes of a name at most: a path, not a text.
pub const VALUE_NAME_BYTES_MAX: usize = 256;
/// Bytes of a value at most: larger ones are blobs.
pub const VALUE_BYTES_MAX: usize = 16 << 10;

/// Bytes of an entry of a piece, beside its value.
const ENTRY: usize = 32 + 4;

/// The account can't pay the fee.
const CAN_T_PAY: Code = Code(Code::APPLICATION.0);
/// The account has less than the amount.
const TOO_LITTLE: Code = Code(Code::APPLICATION.0 + 1);
/// A name or value that is too long.
const TOO_LONG: Code = Code(Code::APPLICATION.0 + 2);
/// The receiver would have more than there can be.
const TOO_MUCH: Code = Code(Code::APPLICATION.0 + 3);

/// What a transaction wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation<'a> {
    /// Give somebody some of what the account has.
    Pay {
        /// To whom; an account that is not there is made.
        to: NodeKey,
        /// How much.
        amount: u64,
    },
    /// Put a value at a name.
    Set {
        /// Where.
        name: &'a [u8],
        /// What; empty removes it.
        value: &'a [u8],
    },
    /// Say what is there.
    Read {
        /// Whose name.
        owner: NodeKey,
        /// Which.
        name: &'a [u8],
    },
}

impl<'a> Operation<'a> {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        let with_name = |head: &[u8], name: &[u8]| [head, &(name.len() as u16).to_le_bytes(), name].concat();
        match self {
            Self::Pay { to, amount } => [&[1], &to.0[..], &amount.to_le_bytes()].concat(),
            Self::Set { name, value } => {
                [&with_name(&[2], name)[..], &(value.len() as u32).to_le_bytes(), value].concat()
            }
            Self::Read { owner, name } => with_name(&[&[3], &owner.0[..]].concat(), name),
        }
    }

    /// Reads one.
    pub fn decode(payload: &'a [u8]) -> Result<Self, Code> {
        let mut cursor = Cursor::new(payload);
        let read = |cursor: &mut Cursor<'a>| -> Result<Option<Self>, Short> {
            fn name<'a>(cursor: &mut Cursor<'a>) -> Result<&'a [u8], Short> {
                let length = cursor.u16()?;
                cursor.take(length.into())
            }
            Ok(Some(match cursor.u8()? {
                1 => Self::Pay { to: NodeKey(cursor.array()?), amount: cursor.u64()? },
                2 => {
                    let name = name(cursor)?;
                    let length = cursor.u32()?;
                    Self::Set { name, value: cursor.take(length as usize)? }
                }
                3 => Self::Read { owner: NodeKey(cursor.array()?), name: name(cursor)? },
                _ => return Ok(None),
            }))
        };
        let this = read(&mut cursor).ok().flatten().filter(|_| cursor.is_empty()).ok_or(Code::MALFORMED)?;
        match this {
            Self::Set { name, value } if name.len() > VALUE_NAME_BYTES_MAX || value.len() > VALUE_BYTES_MAX => {
                Err(TOO_LONG)
            }
            Self::Read { name, .. } if name.len() > VALUE_NAME_BYTES_MAX => Err(TOO_LONG),
            this => Ok(this),
        }
    }
}

/// What somebody has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Account {
    /// Transactions so far.
    pub nonce: u64,
    /// In the smallest unit.
    pub balance: u64,
}

/// The first byte of what is stored.
const ACCOUNT: u8 = 1;
const VALUE: u8 = 2;
const FEES: u8 = 3;

impl Account {
    /// As it is stored.
    pub fn encode(&self) -> [u8; 17] {
        let mut bytes = [ACCOUNT; 17];
        bytes[1..9].copy_from_slice(&self.nonce.to_le_bytes());
        bytes[9..].copy_from_slice(&self.balance.to_le_bytes());
        bytes
    }

    /// Reads one.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let mut cursor = Cursor::new(bytes);
        let mut read = || Ok::<_, Short>((cursor.u8()?, Self { nonce: cursor.u64()?, balance: cursor.u64()? }));
        let (tag, account) = read().ok()?;
        (tag == ACCOUNT && cursor.is_empty()).then_some(account)
    }
}

fn account_key(account: &NodeKey) -> Key {
    Key::of("metanode 2026 reference application account v1", &account.0)
}

fn value_key(owner: &NodeKey, name: &[u8]) -> Key {
    Key::of("metanode 2026 reference application value v1", &[&owner.0, name].concat())
}

/// What was paid in fees, by all: nobody has it any more.
fn fees_key() -> Key {
    Key::of("metanode 2026 reference application fees v1", b"")
}

/// The reference application.
#[derive(Debug, Clone)]
pub struct Reference {
    state: State,
    /// What pieces of an exported state have brought so far.
    importing: Vec<Write>,
}

/// What a block has changed so far.
struct Changes<'s> {
    state: &'s State,
    accounts: BTreeMap<Key, Account>,
    values: BTreeMap<Key, Vec<u8>>,
    fees: u64,
}

impl Changes<'_> {
    fn account(&self, key: &Key) -> Account {
        self.accounts.get(key).copied().unwrap_or_else(|| stored(self.state, key))
    }

    fn value(&self, key: &Key) -> Option<&[u8]> {
        match self.values.get(key) {
            Some(value) => (!value.is_empty()).then_some(value),
            None => self.state.get(key).map(|stored| &stored[1..]),
        }
    }

    fn execute(&mut self, transaction: &Transaction<'_>) -> Outcome {
        let key = account_key(&transaction.account);
        let mut account = self.account(&key);
        if transaction.nonce != account.nonce {
            let too_high = transaction.nonce > account.nonce;
            return Outcome::Skipped(if too_high { Code::NONCE_TOO_HIGH } else { Code::NONCE_USED });
        }
        if account.balance < transaction.fee {
            return Outcome::Skipped(CAN_T_PAY);
        }
        account.nonce += 1;
        account.balance -= transaction.fee;
        self.fees += transaction.fee; // there is less than 2^64 of everything
        self.accounts.insert(key, account);
        match self.operate(transaction, key) {
            Ok(answer) => Outcome::Done(answer),
            Err(code) => Outcome::Failed(code),
        }
    }

    fn operate(&mut self, transaction: &Transaction<'_>, key: Key) -> Result<Answer, Code> {
        match Operation::decode(transaction.payload)? {
            Operation::Pay { to, amount } => {
                let mut from = self.account(&key);
                from.balance = from.balance.checked_sub(amount).ok_or(TOO_LITTLE)?;
                let to_key = account_key(&to);
                if to_key == key {
                    return Ok(Answer::default());
                }
                let mut to = self.account(&to_key);
                to.balance = to.balance.checked_add(amount).ok_or(TOO_MUCH)?;
                self.accounts.insert(key, from);
                self.accounts.insert(to_key, to);
                Ok(Answer::default())
            }
            Operation::Set { name, value } => {
                self.values.insert(value_key(&transaction.account, name), value.to_vec());
                Ok(Answer::default())
            }
            Operation::Read { owner, name } => {
                let value = self.value(&value_key(&owner, name));
                Ok(Answer(value.map_or([0; 32], |value| hash(value).0)))
            }
        }
    }
}

fn stored(state: &State, key: &Key) -> Account {
    let bytes = state.get(key);
    bytes.map(|bytes| Account::decode(bytes).expect("accounts are written here only")).unwrap_or_default()
}

impl Reference {
    /// At a chain's beginning.
    pub fn new(genesis: &Genesis) -> Self {
        let mut writes: Vec<Write> = genesis
            .accounts
            .iter()
            .map(|given| {
                let account = Account { nonce: 0, balance: given.balance };
                (account_key(&given.key), Some(account.encode().into()))
            })
            .collect();
        writes.sort_unstable();
        let mut state = State::default();
        // The state's versions are one above the heights: version 0 is empty.
        state.commit(1, writes);
        Self { state, importing: Vec::new() }
    }

    /// With nothing in it.
    pub fn empty() -> Self {
        Self { state: State::default(), importing: Vec::new() }
    }

    /// What an account has.
    pub fn account(&self, account: &NodeKey) -> Account {
        stored(&self.state, &account_key(account))
    }

    /// What all have together, with what was paid in fees: it never changes.
    pub fn total(&self) -> u128 {
        let worth = |stored: &[u8]| match stored.first() {
            Some(&ACCOUNT) => Account::decode(stored).map_or(0, |account| account.balance),
            Some(&FEES) => fees_of(stored),
            _ => 0,
        };
        self.state.iter().map(|(_, stored)| u128::from(worth(stored))).sum()
    }
}

/// Whether this is what is stored here: what is read later is taken for granted.
fn is_stored(value: &[u8]) -> bool {
    match value.first() {
        Some(&ACCOUNT) => Account::decode(value).is_some(),
        Some(&VALUE) => (2..=1 + VALUE_BYTES_MAX).contains(&value.len()),
        Some(&FEES) => value.len() == 9,
        _ => false,
    }
}

fn fees_of(stored: &[u8]) -> u64 {
    u64::from_le_bytes(stored[1..].try_into().expect("fees are written here only"))
}

fn encode_fees(fees: u64) -> Box<[u8]> {
    [&[FEES], &fees.to_le_bytes()[..]].concat().into()
}

/// The state's version of a height: version 0 is empty, 1 is the beginning.
fn version(height: Height) -> u64 {
    height.0 + 1
}

impl Application for Reference {
    fn executed(&self) -> (Height, Hash) {
        (Height(self.state.version() - 1), self.state.root())
    }

    fn check(&self, transaction: &Transaction<'_>) -> Result<(), Code> {
        Operation::decode(transaction.payload)?;
        let account = self.account(&transaction.account);
        if transaction.nonce < account.nonce {
            return Err(Code::NONCE_USED);
        }
        // What others pay it meanwhile is not known; what it has now is.
        if transaction.fee > account.balance { Err(CAN_T_PAY) } else { Ok(()) }
    }

    fn next_nonce(&self, account: &NodeKey) -> u64 {
        self.account(account).nonce
    }

    fn execute(&mut self, height: Height, _time_ms: u64, transactions: &[Transaction<'_>]) -> (Vec<Outcome>, Hash) {
        let mut changes = Changes { state: &self.state, accounts: BTreeMap::new(), values: BTreeMap::new(), fees: 0 };
        let outcomes = transactions.iter().map(|transaction| changes.execute(transaction)).collect();
        let Changes { accounts, values, fees, .. } = changes;
        let accounts = accounts.into_iter().map(|(key, account)| (key, Some(account.encode().into())));
        let values = values.into_iter().map(|(key, value)| {
            let stored: Option<Box<[u8]>> = (!value.is_empty()).then(|| [&[VALUE], &value[..]].concat().into());
            (key, stored)
        });
        let mut writes: Vec<Write> = accounts.chain(values).collect();
        if fees > 0 {
            let before = self.state.get(&fees_key()).map_or(0, fees_of);
            writes.push((fees_key(), Some(encode_fees(before + fees))));
        }
        writes.sort_unstable_by_key(|(key, _)| *key);
        let root = self.state.commit(version(height), writes);
        (outcomes, root)
    }

    fn query(&self, height: Height, question: &Question) -> Result<Found, QueryError> {
        let key = match question {
            Question::Account(account) => account_key(account),
            Question::Value(owner, name) => value_key(owner, name),
        };
        let proof = self.state.prove(version(height), &key).ok_or(QueryError::NoSuchHeight)?;
        Ok(Found { key, value: self.state.get(&key).map(<[u8]>::to_vec), proof })
    }

    fn commit(&mut self, keep_from: Height) {
        self.state.forget_before(version(keep_from));
    }

    /// A piece has key 32 | length u32 | value for each, in the order of the keys.
    fn export(&self, height: Height, after: &[u8]) -> Result<Piece, QueryError> {
        let from = match after {
            [] => None,
            after => Some(Key(after.try_into().map_err(|_| QueryError::NoSuchHeight)?)),
        };
        let mut values = self.state.iter_of(version(height), from).ok_or(QueryError::NoSuchHeight)?.peekable();
        let (mut bytes, mut last) = (Vec::new(), None);
        while let Some((key, value)) = values.next_if(|(_, value)| bytes.len() + ENTRY + value.len() <= PIECE_BYTES_MAX)
        {
            bytes.extend(key.0);
            bytes.extend((value.len() as u32).to_le_bytes());
            bytes.extend(value);
            last = Some(*key);
        }
        let next = values.peek().is_some().then(|| last.expect("one fits").0.to_vec());
        Ok(Piece { bytes, next })
    }

    fn import(&mut self, piece: &[u8]) -> Result<(), BadPiece> {
        let mut cursor = Cursor::new(piece);
        while !cursor.is_empty() {
            let mut read = || {
                let key = Key(cursor.array()?);
                let length = cursor.u32()?;
                Ok::<_, Short>((key, cursor.take(length as usize)?))
            };
            let (key, value) = read().map_err(|Short| BadPiece)?;
            if self.importing.last().is_some_and(|(before, _)| *before >= key) || !is_stored(value) {
                return Err(BadPiece);
            }
            self.importing.push((key, Some(value.into())));
        }
        Ok(())
    }

    fn imported(&mut self, height: Height) -> Hash {
        let writes = std::mem::take(&mut self.importing);
        let root = self.state.commit(version(height), writes);
        self.state.forget_before(version(height));
        root
    }
}

#[cfg(test)]
mod tests {
    use metanode_crypto::Identity;
    use metanode_ibft::ChainId;
    use metanode_ledger::{Kind, TransactionDraft};
    use proptest::prelude::*;

    use super::*;

    const CHAIN: ChainId = ChainId([7; 32]);

    fn key(number: u8) -> NodeKey {
        Identity::from_seed(&[number; 32]).public()
    }

    fn genesis() -> Genesis {
        let given = |number: u8, balance| metanode_ledger::Account { key: key(number), balance };
        Genesis {
            version: 1,
            name: "test".to_owned(),
            time_ms: 0,
            lag: 2,
            round_ms: 500,
            round_ms_max: 10_000,
            empty_ms: 0,
            clock_drift_ms_max: 500,
            expiry_heights_max: 100,
            opaque: false,
            validators: vec![key(1)],
            accounts: vec![given(1, 1_000), given(2, 500)],
        }
    }

    /// Not signed: whoever executes does not look at signatures.
    fn transaction(by: u8, nonce: u64, fee: u64, payload: &[u8]) -> Vec<u8> {
        let draft = TransactionDraft {
            kind: Kind::Application,
            account: key(by),
            nonce,
            fee,
            expiry: Height(u64::MAX),
            payload,
        };
        draft.encode(&CHAIN, |_, _| Ok::<_, ()>([0; 64])).unwrap()
    }

    fn run(app: &mut Reference, transactions: &[Vec<u8>]) -> Vec<Outcome> {
        let next = app.executed().0.next();
        let transactions: Vec<Transaction<'_>> =
            transactions.iter().map(|bytes| Transaction::decode(bytes).unwrap()).collect();
        app.execute(next, 0, &transactions).0
    }

    fn pay(by: u8, nonce: u64, fee: u64, to: u8, amount: u64) -> Vec<u8> {
        transaction(by, nonce, fee, &Operation::Pay { to: key(to), amount }.encode())
    }

    #[test]
    fn payments_move_what_is_there() {
        let mut app = Reference::new(&genesis());
        let outcomes = run(
            &mut app,
            &[
                pay(1, 0, 1, 2, 100),
                pay(1, 1, 1, 3, 900), // one too much, after the fees
                pay(1, 2, 0, 3, 898),
                pay(3, 0, 8, 3, 5),
                pay(2, 7, 0, 1, 1),
                pay(2, 0, 601, 1, 1),
                pay(1, 0, 0, 2, 1),
            ],
        );
        assert_eq!(
            outcomes,
            [
                Outcome::DONE,
                Outcome::Failed(TOO_LITTLE),
                Outcome::DONE,
                Outcome::DONE,
                Outcome::Skipped(Code::NONCE_TOO_HIGH),
                Outcome::Skipped(CAN_T_PAY),
                Outcome::Skipped(Code::NONCE_USED),
            ]
        );
        assert_eq!(app.account(&key(1)), Account { nonce: 3, balance: 0 });
        assert_eq!(app.account(&key(2)), Account { nonce: 0, balance: 600 });
        assert_eq!(app.account(&key(3)), Account { nonce: 1, balance: 890 });
        assert_eq!(app.total(), 1_500);
    }

    #[test]
    fn values_belong_to_who_sets_them_and_reads_are_ordered() {
        let mut app = Reference::new(&genesis());
        let set = |by, nonce, value: &[u8]| transaction(by, nonce, 0, &Operation::Set { name: b"n", value }.encode());
        let read =
            |by, nonce, owner| transaction(by, nonce, 0, &Operation::Read { owner: key(owner), name: b"n" }.encode());
        let outcomes = run(
            &mut app,
            &[
                read(1, 0, 2),
                set(2, 0, b"v"),
                read(1, 1, 2),
                set(1, 2, b"w"),
                read(1, 3, 2),
                set(2, 1, b""),
                read(1, 4, 2),
            ],
        );
        let (nothing, v) = (Outcome::DONE, Outcome::Done(Answer(hash(b"v").0)));
        assert_eq!(outcomes, [nothing, Outcome::DONE, v, Outcome::DONE, v, Outcome::DONE, nothing]);
        let outcomes = run(&mut app, &[read(1, 5, 1), read(1, 6, 2)]);
        assert_eq!(outcomes, [Outcome::Done(Answer(hash(b"w").0)), nothing], "a block later too");
        let (height, root) = app.executed();
        let found = app.query(height, &Question::Value(key(1), b"n".to_vec())).unwrap();
        assert_eq!(found.proof.verify(&root, &found.key), Ok(Some(hash(&found.value.unwrap()))));
        let found = app.query(height, &Question::Value(key(2), b"n".to_vec())).unwrap();
        assert_eq!((found.proof.verify(&root, &found.key), found.value), (Ok(None), None));
        assert_eq!(app.query(Height(9), &Question::Account(key(1))), Err(QueryError::NoSuchHeight));
        app.commit(height);
        assert_eq!(app.query(Height(0), &Question::Account(key(1))), Err(QueryError::NoSuchHeight));
    }

    /// A state that is taken elsewhere in pieces is the same there, whatever has come since.
    #[test]
    fn a_state_is_exported_and_imported() {
        let mut app = Reference::new(&genesis());
        let set = |nonce: u64| {
            let (name, value) = (nonce.to_le_bytes(), vec![nonce as u8; VALUE_BYTES_MAX]);
            transaction(1, nonce, 1, &Operation::Set { name: &name, value: &value }.encode())
        };
        run(&mut app, &(0..100).map(set).collect::<Vec<_>>());
        let (height, root) = app.executed();
        run(&mut app, &(100..200).map(set).collect::<Vec<_>>());
        let (mut pieces, mut after) = (Vec::new(), Vec::new());
        while let Piece { bytes, next: Some(next) } = app.export(height, &after).unwrap() {
            assert!(bytes.len() <= PIECE_BYTES_MAX);
            pieces.push(bytes);
            after = next;
        }
        pieces.push(app.export(height, &after).unwrap().bytes);
        assert!(pieces.len() > 5);
        assert_eq!(app.export(Height(9), &[]), Err(QueryError::NoSuchHeight));
        let mut other = Reference::empty();
        pieces.iter().for_each(|piece| other.import(piece).unwrap());
        assert_eq!(other.imported(height), root);
        assert_eq!(other.total(), 1_500);
        let next: Vec<_> = (100..200).map(set).collect();
        run(&mut other, &next);
        assert_eq!(other.executed(), app.executed());
        let mut wrong = Reference::empty();
        wrong.import(&pieces[1]).unwrap();
        assert_eq!(wrong.import(&pieces[0]), Err(BadPiece), "out of order");
        assert_eq!(Reference::empty().import(&pieces[0][..50]), Err(BadPiece), "cut");
        let strange = [&[7; 32], &2u32.to_le_bytes()[..], &[ACCOUNT, 1]].concat();
        assert_eq!(Reference::empty().import(&strange), Err(BadPiece), "no account");
    }

    #[test]
    fn payloads_that_are_none_cost_the_fee_and_do_nothing() {
        let mut app = Reference::new(&genesis());
        let long = vec![0; VALUE_NAME_BYTES_MAX + 1];
        let payloads = [
            b"".to_vec(),
            vec![9],
            [&Operation::Pay { to: key(2), amount: 1 }.encode()[..], &[0]].concat(),
            Operation::Set { name: &long, value: b"" }.encode(),
            Operation::Set { name: b"", value: &vec![0; VALUE_BYTES_MAX + 1] }.encode(),
        ];
        let all: Vec<Vec<u8>> =
            payloads.iter().enumerate().map(|(nonce, payload)| transaction(1, nonce as u64, 2, payload)).collect();
        let failed = Outcome::Failed;
        let codes = [Code::MALFORMED, Code::MALFORMED, Code::MALFORMED, TOO_LONG, TOO_LONG];
        assert_eq!(run(&mut app, &all), codes.map(failed));
        assert_eq!(app.account(&key(1)), Account { nonce: 5, balance: 990 });
        for (bytes, code) in all.iter().zip(codes) {
            assert_eq!(Reference::new(&genesis()).check(&Transaction::decode(bytes).unwrap()), Err(code));
        }
        assert_eq!(app.check(&Transaction::decode(&pay(1, 4, 0, 2, 1)).unwrap()), Err(Code::NONCE_USED));
        assert_eq!(app.check(&Transaction::decode(&pay(1, 9, 991, 2, 1)).unwrap()), Err(CAN_T_PAY));
        assert_eq!(app.check(&Transaction::decode(&pay(1, 9, 990, 2, 1)).unwrap()), Ok(()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Nothing is made and nothing is lost; and however blocks are cut, the state is the same.
        #[test]
        fn totals_hold_and_cuts_do_not_matter(
            all in proptest::collection::vec((1u8..5, 0u64..4, 0u64..3, 1u8..6, 0u64..600), 0..40),
            cut in 1usize..10,
        ) {
            let all: Vec<Vec<u8>> = all.iter().map(|(by, nonce, fee, to, amount)| pay(*by, *nonce, *fee, *to, *amount)).collect();
            let (mut one, mut other) = (Reference::new(&genesis()), Reference::new(&genesis()));
            let together = run(&mut one, &all);
            let apart: Vec<Outcome> = all.chunks(cut).flat_map(|some| run(&mut other, some)).collect();
            prop_assert_eq!(together, apart);
            prop_assert_eq!(one.executed().1, other.executed().1);
            prop_assert_eq!(one.total(), 1_500);
        }
    }
}
