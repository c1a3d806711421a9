//! QUIC on shards: quinn-proto's state machine, quinn-udp's socket calls and a driver that belongs to one executor.
//!
//! Every shard has one socket of one REUSEPORT group, one [`Endpoint`] and one driver task. Nothing here is `Send` once it
//! runs, and no lock is taken on the way of a packet.
//!
//! * [`PortGroup`] binds the sockets and attaches the program that steers each packet to its shard;
//! * [`steer`] is the rule that the program, the endpoints and shard-aware clients share;
//! * [`Endpoint`] admits connections and drives them ([`Config`] has the limits);
//! * [`Connection`], [`SendStream`] and [`RecvStream`] are what a handler works with;
//! * [`Counters`] count what was done and what was dropped, and why.
//!
//! *Invariant*: a packet of a connection that lives on another shard is forwarded over the mesh, never answered with a reset.
//! Steering is an optimisation (GRO batches mix, addresses change, clients may know nothing of shards); forwarding is what
//! makes it correct.
//!
//! *Invariant*: what quinn-proto has handed out as sent reaches the socket. A full send buffer parks the bytes and waits.
//!
//! *Invariant*: memory is bounded by [`Config`]: connections, streams a connection, windows.

mod config;
mod connection;
mod counters;
mod endpoint;
mod port;
pub mod steer;
mod stream;

pub use config::{Config, ConfigError, STREAMS_MAX, STREAMS_MIN};
pub use connection::{Connection, ConnectionLost};
pub use counters::{Counters, Metric, StaticLabels};
pub use endpoint::{ConnectError, Datagram, Endpoint};
pub use port::{PortGroup, ShardSocket};
pub use stream::{ReadError, RecvStream, SendStream, TryRead, WriteError};
