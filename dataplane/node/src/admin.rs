//! The local socket: how the machine's own commands ask a node how it is, and stop it.
//!
//! `metanode-admin-api` has the messages and what they mean. [`status`] and [`stop`] are the client, for processes beside the
//! node; they block, and need nothing but the data folder's path.

mod client;
mod server;

pub use client::{AdminError, compact, damaged, scrub, status, stop, store_status, survey};
pub use metanode_admin_api::StoreStatus;
pub(crate) use server::{Stoppers, bind, serve};
