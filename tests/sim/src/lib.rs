//! The store on a simulated machine, seed by seed; and a node with its users over a simulated network: see [`remote`].
//!
//! A seed decides everything: how many shards there are, what the disk does wrong, what clients ask for and in which order tasks
//! run, when the power fails, what is left of writes that were not synced, with how many shards the store is opened next. The
//! store's own code runs on [`metanode_shard::sim`]; the [`model`] knows what was acknowledged; [`life`] is one opening of
//! the store, from recovery to the power cut or the end; [`client`] what its users do meanwhile.
//!
//! What must hold in every seed:
//!
//! * an acknowledged durable PUT reads back equal, until its removal was asked for; so does one in memory that a durable PUT of the
//!   same blob followed;
//! * an acknowledged removal stays removed, of blobs and of tags;
//! * what was under way happened or not, not by half, and what the first look shows is then so for good;
//! * a read gives the right bytes or an error, whatever rots;
//! * the target of a tag and the children of a folder are there;
//! * torn tails are not reported as rot where nothing rotted;
//! * when everything was removed, nothing is left in the index, the files shrink to what an empty store has, and a full disk
//!   takes PUTs again;
//! * no task panics, nothing waits for ever.
//!
//! `metanode-sim --seed S` repeats a seed bit for bit and prints its trace's hash.

pub mod client;
pub mod life;
pub mod model;
pub mod plan;
pub mod remote;
mod run;

pub use run::{Report, run};
