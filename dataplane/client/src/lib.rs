//! The QUIC client of Metanode: stores and fetches content, verifies every byte that it fetches.
//!
//! Start with [`Client`]: [`Client::connect`] takes a [`Ticket`](metanode_wire::Ticket) and a [`ClientConfig`];
//! [`Client::get_whole`] and [`Client::put_whole`] carry small blobs, many at a time on a few streams; [`Client::get_range`] and
//! [`Client::put_source`] carry blobs of any size in bounded memory. [`files`] and [`folder`] connect them to a file system.
//!
//! Invariants:
//! * Bytes are handed on only after BLAKE3 has shown that they are what was asked for; nothing else reaches a caller, a sink or
//!   a file under its final name.
//! * The node is the one whose key the ticket names, or there is no connection.
//! * Memory is bounded by the configuration: windows, requests on the way, chunks in buffers.
//! * Nothing here panics on anything that a node sends.
//!
//! Inside, `link` is the hot path (one connection and its lanes), `pending` its table of requests, `bulk` the transfers that
//! take a stream for themselves, `beside` one transfer from several nodes, `dial` the way from a ticket to a connection and its shard.

mod beside;
mod bulk;
mod client;
mod config;
mod dial;
mod error;
pub mod files;
pub mod folder;
mod ledger;
mod link;
mod pending;
mod progress;
mod stream;

pub use bulk::Fetched;
pub use client::{BlobInfo, BlobLine, Client, Got, Page, PutOptions, Stored, WireCounters};
pub use config::ClientConfig;
#[doc(hidden)]
pub use config::Surroundings;
pub use error::ClientError;
pub use ledger::{ExecutedBlock, Follow, LedgerAnswer, SUBMIT_MAX, TransactionStatus};
pub use metanode_congestion::Congestion;
pub use progress::{Counted, Progress};
pub use stream::{BlobSink, BlobSource, BytesSource, FnSink, ReaderSource, VecSink, WriterSink};
