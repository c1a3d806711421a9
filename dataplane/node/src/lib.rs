//! A node: shards, store and QUIC wired together.
//!
//! Start with [`run`](fn@run): it takes a [`DataFolder`] and a [`Config`] and returns when the node has stopped.

mod acceptor;
mod access;
pub mod admin;
mod admission;
mod bulk;
pub mod codes;
pub mod config;
mod counters;
pub mod data;
mod gate;
mod lane;
pub mod logging;
mod metrics;
mod placement;
mod reply;
mod request;
mod run;
mod session;
mod shard;
mod state;

pub use config::Config;
pub use data::DataFolder;
pub use run::{NodeError, Ready, run};
