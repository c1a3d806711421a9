//! The ledger of a node: a replica of the chain, and a validator if the node's key is one. It lives on one shard: on larger machines one of its
//! own, otherwise one that serves clients too.
//!
//! `metanode-replica` decides; here is what it decides done:
//!
//! * `validator`: what the tasks share; `Validator::act` gives the replica an input, and has its effects done;
//! * `voting`: whether this node says something at all; `voice`: what must be on disk before it leaves: records and messages, in order, as many with one sync as there are;
//! * `blocks`: final blocks are stored, and executed;
//! * `application`: where transactions are executed, in this process or behind a socket; `replay`: how an application and a chain come to where
//!   they were; `snapshots`: so that not all is executed again;
//! * `batches`: batches are made, checked on a thread of their own, stored, fetched;
//! * `links`: connections to the other validators, which this node dials; `incoming`: those that it accepts;
//! * `submit`: transactions of clients; `results`: what became of the latest, in memory, and `outcomes`: of all, on disk; `answer`: what else
//!   clients ask;
//! * `route`: from the other shards to the ledger's and back;
//! * `open`: a ledger's folder, and the chain that it has; `files`: what lies there.
//!
//! *Invariant*: nothing is said before the sign state has it on disk, and a block's effects are shown to nobody before its decision is there.
//!
//! *Invariant*: each connection to a validator has its own queues, all bounded; who does not read them loses what is oldest, and asks.

mod answer;
mod application;
mod batches;
mod blocks;
mod checks;
mod files;
mod incoming;
mod links;
mod open;
mod outcomes;
mod replay;
mod results;
mod route;
mod snapshots;
mod status;
mod submit;
mod validator;
mod voice;
mod voting;

pub use application::{REFERENCE, serve_application};
pub use open::{LedgerError, application_socket, begin_sign_state, has_sign_state};

pub(crate) use incoming::serve as serve_peer;
pub(crate) use open::{LedgerSeed, prepare, start};
pub(crate) use route::{LedgerPort, LedgerReply, LedgerRequest, LedgerRoute, home, mesh};
pub(crate) use submit::Sender;
