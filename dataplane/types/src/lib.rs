//! Identifiers, sizes, hashes and limits that every other crate shares.
//!
//! This is the lowest crate: it has no I/O, no clock, no randomness and imports nothing of ours. Start with [`struct@Hash`] (the
//! address of a blob), [`limits`] (every bound of the data plane, each with its reason) and [`ShardId::owner_of`] (which shard
//! a hash belongs to).

mod class;
mod hash;
mod key;
pub mod limits;
mod range;
pub mod sabotage;
mod shard;
mod tag;

pub use class::{BlobKind, DurabilityClass};
pub use hash::{Hash, ParseHashError};
pub use key::{NodeKey, ParseKeyError};
pub use range::ByteRange;
pub use shard::{ShardCount, ShardId};
pub use tag::{TagName, TagNameError};
