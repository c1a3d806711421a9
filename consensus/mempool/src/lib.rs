//! What waits to be ordered. A core.
//!
//! * [`Waiting`]: transactions of this validator's clients, until they go into a batch of its own. Those of an account go in the order of their
//!   nonces; among accounts the higher fee goes first, then the lower key. Each client and account has a share of its own.
//! * [`Board`]: batches of all validators that are here, checked and on disk: first open, then named by a block, then forgotten.
//!
//! Signatures are checked before anything comes here.

mod board;
mod waiting;

pub use board::{BATCH_RETENTION_HEIGHTS, Board, BoardLimits, BoardRefusal};
pub use waiting::{Refusal, Taken, Waiting, WaitingLimits};
