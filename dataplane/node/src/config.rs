//! The configuration of a node: one typed file, `metanode.toml` in the data folder.
//!
//! Every field has a default, a unit in its name or its documentation, a reason, and a range that [`Config::validate`] holds.
//! A key that is not known is refused by name: a typing error never silently means the default.
//! [`Config::to_toml_string`] writes the file that a fresh data folder gets, with each field's documentation above it.

mod error;
mod render;
mod text;
mod validate;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
};

use metanode_congestion::Congestion;
use metanode_crypto::tls;
use metanode_mempool::WaitingLimits;
use metanode_types::NodeKey;
use metanode_wire::Ticket;
use serde::{Deserialize, Serialize};

pub use error::ConfigError;

/// Largest configuration file in bytes: thousands of keys on the lists fit; anything larger is not a configuration.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// A node's configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Executors.
    pub node: NodeConfig,
    /// The QUIC endpoint.
    pub quic: QuicConfig,
    /// The store.
    pub store: StoreConfig,
    /// Who may do what.
    pub access: AccessConfig,
    /// The ledger.
    pub ledger: LedgerConfig,
    /// The metrics page.
    pub metrics: MetricsConfig,
    /// The log on stderr.
    pub log: LogConfig,
}

/// `[node]`: executors and where they run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeConfig {
    /// Executors, each with its own part of the store and its own endpoint. Default: one a CPU of `cores`. More than CPUs is
    /// allowed, for tests: they take turns.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<u16>,
    /// CPU numbers to pin shards to, in order. Default: the process's affinity mask, so that `taskset` and cpusets are obeyed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cores: Option<Vec<usize>>,
}

/// `[quic]`: one UDP port for all shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuicConfig {
    /// UDP address. A fresh node serves its own machine only; `0.0.0.0:4433` or `[::]:4433` opens it. Port 0: any free one.
    pub listen: SocketAddr,
    /// Connections of the node, an even part for each shard; more are refused in the handshake. One costs about 32 KiB, so
    /// that 10,000 take 310 MiB.
    pub connections_max: u32,
    /// Connections from one IPv4 address or IPv6 /64 to one shard: keeps one host from taking all of them. Not applied by a
    /// node that listens on loopback, where all clients have one address.
    pub connections_per_address_max: u32,
    /// Connections of one client key to one shard, from whatever addresses. Not applied by a node that listens on loopback, where
    /// all are the operator's.
    pub connections_per_key_max: u32,
    /// Streams that a client may have open on a connection, 16 to 128. quinn-proto allocates for each permitted one: 16 cost
    /// 20 KiB a connection, 4096 cost 355 KiB.
    pub streams_max: u16,
    /// Requests that a connection may have unanswered; above it the node stops reading its streams until it has answered.
    pub requests_max: u32,
    /// Seconds without a packet after which a connection is dropped.
    pub idle_timeout_s: u32,
    /// Seconds that a handshake may take: bounds what a half-open connection can hold.
    pub handshake_timeout_s: u32,
    /// Handshakes in progress, on one shard, from which on a client must first prove its address (RFC 9000 section 8.1.2), at
    /// the price of a round trip: spoofed floods then cost no memory. 0: always.
    pub retry_threshold: u32,
    /// Half-open handshakes of one shard, some 40 KiB each. A further one takes the place of the oldest when that is a second old;
    /// before, its packets are dropped, and its client repeats them. Above `retry_threshold`.
    pub handshakes_max: u32,
    /// Largest UDP payload in bytes that path MTU discovery tries: jumbo frames (9,000) less IPv6 and UDP headers. 1200 turns
    /// discovery off.
    pub mtu_max: u16,
    /// What decides how fast the node sends: `"tolerant"` is CUBIC that takes up to 2 % of lost packets for the path's own fault;
    /// `"cubic"` (RFC 9438) slows down for each, which on a path of 50 ms that loses 1 % leaves 0.4 MB/s.
    #[serde(with = "text::CongestionName")]
    pub congestion: Congestion,
    /// AEAD suites of TLS 1.3 in order of preference. aes-128-gcm must be among them: QUIC's first packets use it (RFC 9001
    /// section 5.2).
    pub cipher_suites: Vec<CipherSuite>,
}

/// An AEAD suite of TLS 1.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum CipherSuite {
    /// TLS_AES_128_GCM_SHA256.
    #[serde(rename = "aes-128-gcm")]
    Aes128Gcm,
    /// TLS_AES_256_GCM_SHA384.
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
    /// TLS_CHACHA20_POLY1305_SHA256.
    #[serde(rename = "chacha20-poly1305")]
    ChaCha20Poly1305,
}

/// `[store]`: memory and disk of the relay store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// Bytes of the memory cache, all shards together. 416 MiB hold 100,000 blobs of 4 KiB and keep a whole node under 500 MB.
    pub cache_bytes: u64,
    /// Bytes of one segment file, a multiple of 4096. Small enough that compaction moves little at a time, large enough that a
    /// terabyte is 16,384 files.
    pub segment_bytes: u64,
    /// Chunks that the index may hold, all shards together; the next one is refused as "index full". A bound on memory: an
    /// entry takes about 64 bytes, so 8,388,608 take 512 MiB once they exist, and cover 2 TiB of full chunks.
    pub index_entries_max: u64,
    /// Bytes of uploads that one shard holds while they are not yet stored; above it uploads are answered "busy" with a hint.
    pub uploads_bytes_max: u64,
    /// Bytes of the receive window that one bulk upload gets while it runs: the bandwidth-delay product of 1 GB/s and 4 ms.
    /// It counts in `uploads_bytes_max`.
    pub upload_window_bytes: u64,
    /// Bytes of answers that one shard holds: so many each that were read and wait to be sent, that bulk fetches read ahead, and that
    /// clients have not acknowledged. Above it fetches that are not in the memory cache are answered "busy" with a hint, and what is
    /// written waits.
    pub downloads_bytes_max: u64,
    /// Hours between two scrubs, which read everything and compare it with its hash; the first comes so long after a start. 0: none
    /// but those that `metanode store scrub` asks for.
    pub scrub_hours: u16,
    /// Bytes a second that such a scrub reads, all shards together: a terabyte takes 35 hours, and a disk hardly notices.
    pub scrub_bytes_per_second: u64,
}

/// `[access]`: what a client key may do. The key is the one the client proves in the TLS handshake.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AccessConfig {
    /// Keys (`ed25519:<64 hex digits>`) that may write and delete. The operator's key of a fresh node is put here. A writer
    /// may also read. Empty: nobody writes.
    #[serde(with = "text::keys")]
    pub writers: Vec<NodeKey>,
    /// `"public"`: every key may read. Or a list of keys that may.
    pub readers: Readers,
}

/// Who may read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Readers {
    /// Every key.
    #[default]
    Public,
    /// These keys, and those that may write.
    Keys(Vec<NodeKey>),
}

/// Which shard a ledger runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LedgerShard {
    /// One of its own on a node of four or more: a quarter of such a machine is much, and votes wait for nobody there.
    Auto,
    /// One of its own, which takes no clients but those who ask for none: the last of `node.shards`.
    Own,
    /// One that serves clients too.
    Shared,
}

/// `[ledger]`: the chain that the node takes part in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LedgerConfig {
    /// File of the chain's genesis, in the data folder; empty: the node has no ledger.
    pub genesis: String,
    /// Tickets of the other validators, `mn1...`. Those that are not named here are reached once they have come by themselves.
    #[serde(with = "text::tickets")]
    pub peers: Vec<Ticket>,
    /// Transactions that may wait in memory.
    pub waiting_max: u32,
    /// Bytes of them.
    pub waiting_bytes_max: u64,
    /// Bytes of them that one client may have brought.
    pub client_bytes_max: u64,
    /// Executed transactions whose outcome is kept in memory, for those who ask; about 128 bytes each. Of earlier ones it is on disk.
    pub outcomes_max: u32,
    /// Heights from one snapshot of the state to the next; a restart executes the blocks behind the latest. 0: none is made.
    pub snapshot_heights: u64,
    /// Which shard it runs on.
    pub shard: LedgerShard,
    /// Socket of the application's process, in the data folder or an absolute path; empty: the reference application runs in the node.
    pub application: String,
}

/// `[metrics]`: Prometheus text over HTTP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    /// TCP address of `GET /metrics`, or `"off"`. It has no access control, hence loopback. When the port is taken, any free
    /// one is used and the node says which.
    #[serde(with = "text::address_or_off")]
    pub listen: Option<SocketAddr>,
}

/// `[log]`: the log on stderr.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Level (`error`, `warn`, `info`, `debug`, `trace`), and levels of single crates: `"info,metanode_quic=warn"`. The
    /// environment's `METANODE_LOG` goes first.
    pub level: String,
}

impl Default for QuicConfig {
    fn default() -> Self {
        Self {
            listen: (Ipv4Addr::LOCALHOST, 4433).into(),
            connections_max: 16_384,
            connections_per_address_max: 1_024,
            connections_per_key_max: 1_024,
            streams_max: 16,
            requests_max: 1_024,
            idle_timeout_s: 30,
            handshake_timeout_s: 5,
            retry_threshold: 256,
            handshakes_max: 512,
            mtu_max: 8_952,
            congestion: Congestion::default(),
            cipher_suites: vec![CipherSuite::Aes128Gcm, CipherSuite::Aes256Gcm, CipherSuite::ChaCha20Poly1305],
        }
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            cache_bytes: 416 << 20,
            segment_bytes: 64 << 20,
            index_entries_max: 8 << 20,
            uploads_bytes_max: 64 << 20,
            upload_window_bytes: 4 << 20,
            downloads_bytes_max: 64 << 20,
            scrub_hours: 168,
            scrub_bytes_per_second: 8 << 20,
        }
    }
}

impl Default for LedgerConfig {
    fn default() -> Self {
        let waiting = WaitingLimits::default();
        Self {
            genesis: String::new(),
            peers: Vec::new(),
            waiting_max: waiting.transactions_max as u32,
            waiting_bytes_max: waiting.bytes_max as u64,
            client_bytes_max: waiting.peer_bytes_max as u64,
            outcomes_max: 1_000_000,
            snapshot_heights: 2_000,
            shard: LedgerShard::Auto,
            application: String::new(),
        }
    }
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self { listen: Some((Ipv4Addr::LOCALHOST, 9101).into()) }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".to_owned() }
    }
}

impl Config {
    /// Reads and validates a file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = error::read(path)?;
        Self::from_toml_str(&text).map_err(|error| error.in_file(path))
    }

    /// Parses and validates the text of a file.
    pub fn from_toml_str(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::parse(&error))?;
        config.validate()?;
        Ok(config)
    }

    /// The text of a file that says the same, with every field's documentation.
    pub fn to_toml_string(&self) -> String {
        render::render(self)
    }

    /// Holds every field to its range; the error names the field.
    pub fn validate(&self) -> Result<(), ConfigError> {
        validate::validate(self)
    }
}

impl From<CipherSuite> for tls::CipherSuite {
    fn from(suite: CipherSuite) -> Self {
        match suite {
            CipherSuite::Aes128Gcm => Self::Aes128Gcm,
            CipherSuite::Aes256Gcm => Self::Aes256Gcm,
            CipherSuite::ChaCha20Poly1305 => Self::ChaCha20Poly1305,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_written_file_says_what_was_meant() {
        let mut config = Config::default();
        assert_eq!(Config::from_toml_str(&config.to_toml_string()), Ok(config.clone()));
        assert_eq!(Config::from_toml_str(""), Ok(config.clone()), "every field has its default");
        config.node = NodeConfig { shards: Some(3), cores: Some(vec![0, 5]) };
        config.quic.listen = "[::1]:0".parse().unwrap();
        config.quic.congestion = Congestion::Cubic;
        config.quic.cipher_suites = vec![CipherSuite::ChaCha20Poly1305, CipherSuite::Aes128Gcm];
        config.access.writers = vec![NodeKey([1; 32]), NodeKey([2; 32])];
        config.access.readers = Readers::Keys(vec![NodeKey([3; 32])]);
        config.metrics.listen = None;
        config.log.level = "warn,metanode_quic=debug".to_owned();
        assert_eq!(Config::from_toml_str(&config.to_toml_string()), Ok(config));
    }

    #[test]
    fn refusals_name_what_is_wrong() {
        let refused = |text: &str| Config::from_toml_str(text).expect_err(text).to_string();
        for (text, named) in [
            ("[quic]\nlissten = '127.0.0.1:1'", "lissten"),
            ("[quick]\n", "quick"),
            ("[quic]\nlisten = 'localhost'", "listen"),
            ("[quic]\nstreams_max = 0", "quic.streams_max"),
            ("[quic]\nstreams_max = 4096", "quic.streams_max"),
            ("[quic]\nmtu_max = 1199", "quic.mtu_max"),
            ("[quic]\ncipher_suites = ['aes-256-gcm']", "quic.cipher_suites"),
            ("[quic]\ncipher_suites = ['rc4']", "rc4"),
            ("[quic]\ncongestion = 'reno'", "reno"),
            ("[quic]\nidle_timeout_s = 0", "quic.idle_timeout_s"),
            ("[node]\nshards = 0", "node.shards"),
            ("[node]\ncores = []", "node.cores"),
            ("[node]\ncores = [1, 1]", "node.cores"),
            ("[store]\nsegment_bytes = 67108865", "store.segment_bytes"),
            ("[store]\ncache_bytes = 0", "store.cache_bytes"),
            ("[store]\nupload_window_bytes = 1073741824", "store.upload_window_bytes"),
            ("[access]\nwriters = ['ed25519:zz']", "ed25519:"),
            ("[access]\nreaders = 'everybody'", "public"),
            ("[metrics]\nlisten = 'of'", "off"),
            ("[log]\nlevel = 'info,=,='", "log.level"),
            ("[log]\nlevel = 'loud'", "log.level"),
        ] {
            let message = refused(text);
            assert!(message.contains(named), "{text}: {message}");
        }
    }
}
