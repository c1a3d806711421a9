use std::{sync::Arc, time::Duration};

use metanode_congestion::Congestion;
use metanode_crypto::{CidKey, NodeSecret};
use metanode_types::ShardId;
use quinn_proto::{
    EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
    crypto::{HandshakeTokenKey, HmacKey, rustls::QuicServerConfig},
};

use crate::steer::{Layout, ShardCids};

/// Fewest streams a peer may have open: below, one connection can't keep a disk busy.
pub const STREAMS_MIN: u16 = 16;
/// Most streams a peer may have open: quinn-proto allocates for each permitted one (16 cost 19.5 KiB a connection, 4096 cost
/// 355 KiB).
pub const STREAMS_MAX: u16 = 128;

/// What every IPv4 and IPv6 path carries (RFC 9000 section 14.1); discovery raises it.
const INITIAL_MTU: u16 = 1200;
/// A jumbo frame of 9000 bytes less IPv6 and UDP headers: where discovery ends.
const JUMBO_MTU: u16 = 8952;

/// Bytes kept for one handshake that waits for its turn, its first packet aside; quinn's default is 10 MiB.
const INCOMING_BUFFER_BYTES: u64 = 16 << 10;
/// The same for all of them; quinn's default is 100 MiB.
const INCOMING_BUFFERS_BYTES: u64 = 4 << 20;

/// When the path seems to have shrunk, how long until larger packets are tried again. A burst that overflowed a receive buffer
/// looks the same, so quinn's minute would often be a minute at 1,200 bytes for nothing.
const MTU_COOLDOWN: Duration = Duration::from_secs(10);

/// How an [`Endpoint`](crate::Endpoint) behaves. All limits are for one shard.
#[derive(Clone)]
pub struct Config {
    /// TLS of the accepting side: identity, cipher suites, protocols.
    pub server_tls: Arc<QuicServerConfig>,
    /// Streams that a peer may have open at a time: [`STREAMS_MIN`] to [`STREAMS_MAX`].
    pub max_concurrent_bidi_streams: u16,
    /// A connection without packets for this long is dropped.
    pub idle_timeout: Duration,
    /// After so long without a packet, one is sent on connections that this side has dialled, so that they stay.
    pub keep_alive: Option<Duration>,
    /// A handshake that takes longer is given up, so that half-open connections don't pile up.
    pub handshake_timeout: Duration,
    /// Connections, half-open and draining ones included; further ones are refused. About 20 KiB each, plus windows in use.
    pub connections_max: usize,
    /// Connections from one IPv4 address or one IPv6 /64.
    pub connections_per_address_max: usize,
    /// From this many half-open connections on, a client must first prove its address (Retry).
    pub incoming_retry_threshold: usize,
    /// Half-open connections: some 40 KiB each. A further one takes the place of the oldest, when that has had a second; else its
    /// packets are dropped, and its client repeats them.
    pub handshakes_max: usize,
    /// Unread bytes a peer may send on one stream.
    pub stream_receive_window: u32,
    /// Unread bytes a peer may send on one connection.
    pub receive_window: u32,
    /// Unacknowledged bytes kept for one connection.
    pub send_window: u64,
    /// How fast this side sends.
    pub congestion: Congestion,
    /// UDP payload that a path carries without being asked; at least 1200.
    pub mtu_initial: u16,
    /// Largest UDP payload that discovery tries and that is accepted.
    pub mtu_max: u16,
    keys: Keys,
}

#[derive(Clone)]
struct Keys {
    reset: Arc<dyn HmacKey>,
    token: Arc<dyn HandshakeTokenKey>,
    cid: CidKey,
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Config").field("connections_max", &self.connections_max).finish_non_exhaustive()
    }
}

/// A limit is outside what the protocol or this implementation allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// [`Config::max_concurrent_bidi_streams`].
    #[error("max_concurrent_bidi_streams must be {STREAMS_MIN} to {STREAMS_MAX}")]
    Streams,
    /// [`Config::mtu_initial`] or [`Config::mtu_max`].
    #[error("the MTU must be 1200 to 65527, and the first one not above the largest")]
    Mtu,
    /// [`Config::idle_timeout`] or [`Config::handshake_timeout`].
    #[error("timeouts must be at least a millisecond")]
    Timeout,
}

impl Config {
    /// The defaults, with keys that all shards and all lives of the node share.
    pub fn new(server_tls: Arc<QuicServerConfig>, secret: &NodeSecret) -> Self {
        Self {
            server_tls,
            max_concurrent_bidi_streams: STREAMS_MIN,
            idle_timeout: Duration::from_secs(60),
            keep_alive: None,
            handshake_timeout: Duration::from_secs(10),
            connections_max: 4096,
            connections_per_address_max: 1024,
            incoming_retry_threshold: 256,
            handshakes_max: 512,
            stream_receive_window: 2 << 20,
            receive_window: 8 << 20,
            send_window: 8 << 20,
            congestion: Congestion::default(),
            mtu_initial: INITIAL_MTU,
            mtu_max: JUMBO_MTU,
            keys: Keys { reset: secret.reset_key(), token: secret.token_key(), cid: secret.cid_key() },
        }
    }

    /// Whether all limits are allowed.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !(STREAMS_MIN..=STREAMS_MAX).contains(&self.max_concurrent_bidi_streams) {
            return Err(ConfigError::Streams);
        }
        if !(INITIAL_MTU..=self.mtu_max).contains(&self.mtu_initial) || self.mtu_max > 65_527 {
            return Err(ConfigError::Mtu);
        }
        if self.idle_timeout.as_millis() == 0 || self.handshake_timeout.as_millis() == 0 {
            return Err(ConfigError::Timeout);
        }
        Ok(())
    }

    pub(crate) fn transport(&self) -> TransportConfig {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(self.mtu_max).black_hole_cooldown(MTU_COOLDOWN);
        let idle_ms = u32::try_from(self.idle_timeout.as_millis()).unwrap_or(u32::MAX);
        let mut transport = TransportConfig::default();
        transport
            .max_concurrent_bidi_streams(self.max_concurrent_bidi_streams.into())
            .max_concurrent_uni_streams(0u8.into()) // nobody uses them
            .datagram_receive_buffer_size(None) // nor datagrams
            .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(idle_ms))))
            .stream_receive_window(self.stream_receive_window.into())
            .receive_window(self.receive_window.into())
            .send_window(self.send_window)
            .initial_mtu(self.mtu_initial)
            .congestion_controller_factory(self.congestion.factory())
            .mtu_discovery_config(Some(discovery));
        transport
    }

    pub(crate) fn server(&self, transport: Arc<TransportConfig>) -> ServerConfig {
        let mut server = ServerConfig::new(self.server_tls.clone(), self.keys.token.clone());
        server.transport_config(transport);
        // A client's hello is two datagrams, and nothing else comes before an answer.
        server.incoming_buffer_size(INCOMING_BUFFER_BYTES).incoming_buffer_size_total(INCOMING_BUFFERS_BYTES);
        server
    }

    pub(crate) fn endpoint(&self, shard: ShardId, layout: Layout) -> EndpointConfig {
        let mut endpoint = EndpointConfig::new(self.keys.reset.clone());
        let key = self.keys.cid.clone();
        endpoint
            .cid_generator(move || Box::new(ShardCids { shard, layout, key: key.clone() }))
            .max_udp_payload_size(self.mtu_max)
            .expect("the MTU was validated");
        endpoint
    }
}
