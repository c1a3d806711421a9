//! What executes transactions.
//!
//! [`Application`] is the interface: the ledger orders, an application says what an order means. It must be deterministic: what it answers and
//! the root of its state follow from the transactions so far, and from nothing else. [`Reference`] is one, of payments and values by key; it
//! is what tests and benches run. [`Session`] answers for an application in a process of its own.

mod reference;
mod session;

pub use reference::{Account, Operation, Reference, VALUE_BYTES_MAX, VALUE_NAME_BYTES_MAX};
pub use session::{Maker, Session};

use metanode_ibft::Height;
use metanode_ledger::{Code, Outcome, Transaction};
use metanode_state::{Key, Proof};
use metanode_types::{Hash, NodeKey};
use metanode_wire::{Refusal, RefusalCode};

/// Executes what was ordered.
pub trait Application {
    /// The last height that was executed, and the root of the state there.
    fn executed(&self) -> (Height, Hash);

    /// Whether a transaction could be executed now, or after others of its account: what a batch should not carry is refused early. Its
    /// signature has been checked, and its kind is [`Application`](metanode_ledger::Kind::Application).
    fn check(&self, transaction: &Transaction<'_>) -> Result<(), Code>;

    /// How many transactions an account has had.
    fn next_nonce(&self, account: &NodeKey) -> u64;

    /// Executes the transactions of a height in their order, all or none of their effects visible. Heights follow each other; one without
    /// transactions is executed too. Returns an outcome for each, and the root of the state behind them.
    fn execute(&mut self, height: Height, time_ms: u64, transactions: &[Transaction<'_>]) -> (Vec<Outcome>, Hash);

    /// What is at a key of the state, with its proof at a height that is still kept.
    fn query(&self, height: Height, question: &Question) -> Result<Found, QueryError>;

    /// What was executed stays so: the node has noted what came of it. States of heights below `keep_from` are not asked for any more.
    fn commit(&mut self, keep_from: Height);

    /// A piece of the state of a height that is still kept: the first one, or the one behind another ([`Piece::next`]).
    fn export(&self, height: Height, after: &[u8]) -> Result<Piece, QueryError>;

    /// Takes a piece of an exported state, in their order. Only for one that has nothing yet.
    fn import(&mut self, piece: &[u8]) -> Result<(), BadPiece>;

    /// All pieces were there: this is the state of `height`. Returns its root, for the caller to compare.
    fn imported(&mut self, height: Height) -> Hash;
}

/// A part of a state, for who begins there. All pieces, in their order, are the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Bytes whose meaning is the application's; at most a chunk of the store.
    pub bytes: Vec<u8>,
    /// What to ask for next, never empty; `None`: that was the last.
    pub next: Option<Vec<u8>>,
}

/// A piece that can't be read, or does not follow the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadPiece;

/// What can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// What an account has.
    Account(NodeKey),
    /// A value that an account has set.
    Value(NodeKey, Vec<u8>),
}

impl Question {
    /// As it comes from a client or a node: 1 an account, 2 a value.
    pub fn of(kind: u8, account: NodeKey, name: Vec<u8>) -> Result<Self, Refusal> {
        match kind {
            1 => Ok(Self::Account(account)),
            2 if name.len() <= VALUE_NAME_BYTES_MAX => Ok(Self::Value(account, name)),
            2 => Err(Refusal::new(RefusalCode::TooLarge, "the name is too long")),
            _ => Err(Refusal::new(RefusalCode::NotSupported, format!("question {kind}"))),
        }
    }
}

/// What was found: bytes whose meaning is the question's, or nothing, and why that is so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Where in the state it is asked for.
    pub key: Key,
    /// What is there, now; at an earlier height, only its hash is known from the proof.
    pub value: Option<Vec<u8>>,
    /// Ties it to the application's root.
    pub proof: Proof,
}

/// A question that has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueryError {
    /// That height was not executed yet, or is not kept any more.
    NoSuchHeight,
}
