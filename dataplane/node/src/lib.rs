//! A node: shards, store and QUIC wired together.
//!
//! [`run`](fn@run) takes a [`DataFolder`] and a [`Config`], calls back when the node serves, and returns when it has stopped. The CLI
//! and the thin binary `metanoded` are both callers of it. Threads of a running node:
//!
//! * the *control thread*, the caller of `run`: signals, the order of start and end (`run`);
//! * one thread a *shard*, with its part of the store and its QUIC endpoint (`shard`); a connection is a task there
//!   (`session`), a stream too (`lane`, or `bulk` when a transfer takes it over), and so is each request that the memory cache
//!   can't answer (`request`);
//! * two threads for local clients: the admin socket ([`admin`]) and the metrics page (`metrics`). They read counters and ask
//!   no shard.
//!
//! *Invariant*: a shard never waits for another thread while it serves: what others want to know it publishes (`counters`,
//! `state`), what it is told comes as a command.
//!
//! *Invariant*: whatever a client sends, memory stays within the configuration: bodies and windows of uploads, answers that
//! are not taken, frames in pieces (`admission`), unanswered requests, reads at a time (`session`). At a bound the answer is
//! `Busy` with a hint, or the node stops reading.
//!
//! *Invariant*: a node that stops answers what it has begun before it closes connections, and no shard closes its store while
//! another one may still ask it.
//!
//! Reading order: `run`, `shard`, `session`, `lane`. What an operator can set is [`config`], what lies on disk is [`data`],
//! the numbers with which connections are closed are [`codes`].

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
pub mod ledger;
pub mod logging;
mod memory;
mod metrics;
mod outgoing;
mod peers;
mod placement;
mod reply;
mod request;
mod run;
mod session;
mod shard;
#[cfg(feature = "sim")]
pub mod sim;
mod state;

pub use config::Config;
pub use data::DataFolder;
pub use run::{NodeError, Ready, run};
