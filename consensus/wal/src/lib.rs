//! What a validator has signed, on disk before anybody sees it (clauses 21 and 22 of the protocol's checklist).
//!
//! A validator that forgets what it has said can be made to contradict it. So every signed message, with what it rests on, goes through
//! here, and leaves only when [`Wal::append`] has returned. After a restart [`open`] gives the records back, in their order, and the
//! protocol goes on where they end.
//!
//! * Two files in a folder of their own, written in turns: [`format`](mod@format) has every byte. Records that nobody needs any more go with
//!   [`Wal::restart`], at a new height or when little room is left.
//! * A torn tail, which a crash leaves, is cut off: nothing in it has left. Anything else that does not check, whichever file it is in, is
//!   [damage](WalError::Damaged): what was said there is not known, so this validator must not go on by itself.
//! * [`SignState`] is the right to sign: the key, and the lock on the folder. One process has it at a time.
//! * A failed write or sync ends it: whether the disk has the records is not known, so nothing may leave any more until a restart.
//!
//! What can't be seen here is a folder that was removed, or put back from a copy. Who runs the protocol compares the records with the
//! chain, and only observes when they are missing or older.

pub mod format;
mod signer;
mod wal;

pub use signer::{SignState, Signer, SignerError};
pub use wal::{FILE_BYTES, FILE_BYTES_MIN, Opened, Opening, Wal, WalError, create, open};
