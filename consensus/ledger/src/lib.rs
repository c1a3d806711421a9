//! What a chain is made of, and when a block may follow another. A core: no I/O, no clock, no randomness.
//!
//! * [`Genesis`]: what all validators of a chain agree on beforehand. Its hash *is* the chain's identity.
//! * [`Transaction`]: what somebody wants to happen, signed, once. [`Batch`]: many of them, signed by the validator that took them in.
//! * [`Block`]: a [`Header`] and the digests of the batches that it orders. Validators agree on blocks; the batches are where they agree, on
//!   disk, before they vote.
//! * [`Chain`]: what follows from the blocks so far: who votes on the next one, and what its header must say. Order comes first, execution
//!   after: the header of height h carries the results of height h − k, k being the genesis's [`lag`](Genesis::lag).
//! * [`tree`]: Merkle trees, so that a header proves a result.
//! * [`system`]: the transactions that the ledger itself executes: votes on validators, rotated keys, evidence.
//!
//! Everything that is signed or hashed has one encoding ([`Transaction`], [`Batch`], [`Header`]: see there for the bytes), little-endian,
//! without anything behind its end.
//!
//! Start reading in `chain.rs`.

mod batch;
mod block;
mod chain;
mod genesis;
pub mod system;
mod transaction;
pub mod tree;

pub use batch::{BATCH_BYTES_MAX, BATCH_TRANSACTIONS_MAX, Batch, BatchDraft, BatchError};
pub use block::{BATCHES_MAX, Block, Header, decode_certificate, encode_certificate};
pub use chain::{BlockError, Chain, Done, Early, Executed, Facts, Plan, Snapshot, Tip, state_hash};
pub use genesis::{Account, Genesis, GenesisError, LAG_MAX};
pub use transaction::{
    Answer, Code, Kind, Names, Outcome, PAYLOAD_BYTES_MAX, TRANSACTION_DOMAIN, Transaction, TransactionDraft,
    TransactionError, TransactionId,
};

use metanode_wire::cursor::Short;

/// Bytes that are no encoding of what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// They end too early.
    #[error("the encoding ends too early")]
    Short,
    /// They go on behind the end.
    #[error("{0} bytes too many")]
    Long(usize),
    /// A version or kind that this program does not know.
    #[error("unknown {0}")]
    Unknown(&'static str),
    /// More than there may be.
    #[error("too many {0}")]
    TooMany(&'static str),
}

impl From<Short> for DecodeError {
    fn from(_: Short) -> Self {
        Self::Short
    }
}
