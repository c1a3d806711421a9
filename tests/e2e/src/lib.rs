//! What the end to end tests share: real processes, clients, raw connections, file systems that run full.
//!
//! Start with [`Home`]: the data folder of a node with its keys and its configuration. [`Home::start`] runs
//! `metanode start --foreground` there and waits until it serves; [`Home::client`] connects to it; [`Home::cli`] runs a command
//! beside it. [`Setup`] is all three in one of the [`Layout`]s that every scenario must pass in. [`Raw`] speaks to a node below
//! the client library, for what the library would never send. [`Mount`] is a file system of a test's own.
//!
//! [`Network`] is several validators of one chain.
//!
//! # Rules
//!
//! * Nothing sleeps for an event: [`eventually`] and [`wait_for`] look again and again until a deadline, and say what was
//!   missing. [`scenario`] puts a deadline on a whole test.
//! * What a test starts ends with it, whether it passes or panics: processes are killed by number, mounts are removed, folders
//!   are temporary. A test that panics prints the end of its nodes' logs.
//! * Ports are 0, folders are a test's own: tests run side by side.
//!
//! # The binary
//!
//! `METANODE_BIN` names it; `cargo xtask test` sets that to what it has built. Otherwise it is `metanode` beside the test's own
//! build (`target/debug/metanode`), as it is there, and is built with `cargo build` when it is not: after a change to the
//! product, `cargo build -p metanode-cli` comes before `cargo test -p metanode-e2e`.

mod chain;
mod content;
mod history;
mod home;
mod mount;
mod netns;
mod process;
mod raw;
mod setup;
mod tree;
mod wait;

pub use chain::{Network, Sender, account, transaction};
pub use content::{Random, content};
pub use history::{Access, Seen, check_value};
pub use home::{Home, Node, Ready, Service};
pub use mount::{Mount, free_bytes, is_root};
pub use netns::{Halves, left_behind};
pub use process::{Ran, is_running, metanode, run};
pub use raw::{Raw, RawStream, connect_raw, frame};
pub use setup::{Layout, Setup};
pub use tree::{Item, make_tree, picture};
pub use wait::{eventually, is_large, scenario, wait_for};
