//! What a client can be told to do differently.

use std::{fmt, io, net::IpAddr, sync::Arc, time::Duration};

use metanode_congestion::Congestion;
use metanode_crypto::{Identity, NodeSecret, tls::CipherSuite};

/// Largest UDP payload that is sent. quinn hands up to ten datagrams to the kernel at once, which takes 65,507 bytes: more is
/// refused with EMSGSIZE, and quinn takes that for a probe of the path that was too large, so that whole batches vanish. A batch
/// that reaches 65,536 bytes with its headers (62 for IPv6) is cut up before it is sent, which makes a node receive 10 datagrams
/// where it would receive one.
const SEND_MTU_BYTES_MAX: u16 = (65_535 - 62) / 10;

/// Options of a client.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// Who the client is; a node decides by this key what it may do.
    pub identity: Identity,
    /// Whether to keep one connection per shard of the node and to send each request to the shard that owns its hash.
    /// Connections beyond the first are made when they are first needed.
    pub shard_aware: bool,
    /// TLS suites, in order of preference.
    pub cipher_suites: Vec<CipherSuite>,
    /// Streams of a connection that carry small requests. On a link without loss their number makes no difference; with two, a
    /// lost packet delays half of what is on the way.
    pub lanes: usize,
    /// Requests of one connection that may be unanswered; the node's own limit applies as well. More wait.
    pub requests_max: u32,
    /// How long to try one address.
    pub connect_timeout: Duration,
    /// How long to wait for an answer, or for the next bytes of one.
    pub request_timeout: Duration,
    /// How long to repeat a request that the node refuses as busy; zero to pass the refusal on at once.
    pub busy_patience: Duration,
    /// Bytes a stream may have on the way to this client.
    pub stream_window_bytes: u32,
    /// Bytes a connection may have on the way to this client.
    pub receive_window_bytes: u32,
    /// Bytes a connection may have on the way to the node.
    pub send_window_bytes: u64,
    /// Buffers of the UDP socket in the kernel, in each direction; the kernel may grant less.
    pub socket_buffer_bytes: usize,
    /// Largest UDP payload to take. 8,952 fills a jumbo frame; loopback carries it too. Packets to the node stay below 6,550.
    pub mtu_bytes_max: u16,
    /// How fast bytes are sent to the node; how fast they come is the node's choice.
    pub congestion: Congestion,
    /// A connection without traffic for this long is lost.
    pub idle_timeout: Duration,
    /// What the client calls itself in the node's log.
    pub agent: String,
    /// Where sockets and random numbers come from when not from the operating system: simulations have both of their own.
    #[doc(hidden)]
    pub surroundings: Option<Surroundings>,
}

/// See [`ClientConfig::surroundings`].
#[doc(hidden)]
#[derive(Clone)]
pub struct Surroundings {
    /// Makes sockets.
    pub sockets: Arc<MakeSocket>,
    /// Fills bytes with numbers.
    pub numbers: Arc<FillRandom>,
    /// What TLS computes with, in place of [`ClientConfig::cipher_suites`].
    pub crypto: Arc<rustls::crypto::CryptoProvider>,
}

/// Connection IDs out of [`Surroundings::numbers`].
struct NumberedCids(Arc<FillRandom>);

/// As long as quinn's own.
const CID_BYTES: usize = 8;

impl quinn::ConnectionIdGenerator for NumberedCids {
    fn generate_cid(&mut self) -> quinn::ConnectionId {
        let mut bytes = [0; CID_BYTES];
        (self.0)(&mut bytes);
        quinn::ConnectionId::new(&bytes)
    }

    fn cid_len(&self) -> usize {
        CID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Makes a socket that can reach an address of this kind.
type MakeSocket = dyn Fn(IpAddr) -> io::Result<Arc<dyn quinn::AsyncUdpSocket>> + Send + Sync;
type FillRandom = dyn Fn(&mut [u8]) + Send + Sync;

impl fmt::Debug for Surroundings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Surroundings")
    }
}

impl ClientConfig {
    /// The shipped values for `identity`.
    pub fn new(identity: Identity) -> Self {
        Self {
            identity,
            shard_aware: true,
            cipher_suites: CipherSuite::DEFAULT.to_vec(),
            lanes: 2,
            requests_max: 1024,
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(30),
            busy_patience: Duration::from_secs(10),
            // 8 MiB fills 1 Gbit/s over 64 ms; a connection's windows together bound what a slow disk can pile up here.
            stream_window_bytes: 8 << 20,
            receive_window_bytes: 24 << 20,
            send_window_bytes: 12 << 20,
            socket_buffer_bytes: 8 << 20,
            mtu_bytes_max: 8952,
            congestion: Congestion::default(),
            idle_timeout: Duration::from_secs(30),
            agent: concat!("metanode-client/", env!("CARGO_PKG_VERSION")).into(),
            surroundings: None,
        }
    }

    pub(crate) fn transport(&self) -> Arc<quinn::TransportConfig> {
        let mut mtu = quinn::MtuDiscoveryConfig::default();
        mtu.upper_bound(self.mtu_bytes_max.min(SEND_MTU_BYTES_MAX));
        let mut transport = quinn::TransportConfig::default();
        transport
            .max_concurrent_bidi_streams(0u32.into()) // a node opens no streams
            .max_concurrent_uni_streams(0u32.into())
            .stream_receive_window(self.stream_window_bytes.into())
            .receive_window(self.receive_window_bytes.into())
            .send_window(self.send_window_bytes)
            .datagram_receive_buffer_size(None)
            .initial_rtt(Duration::from_millis(50)) // of most links; 333 ms would make a lost first packet cost a second
            .max_idle_timeout(self.idle_timeout.try_into().ok())
            .keep_alive_interval(Some(self.idle_timeout / 3))
            .congestion_controller_factory(self.congestion.factory())
            .mtu_discovery_config(Some(mtu));
        Arc::new(transport)
    }

    pub(crate) fn endpoint(&self) -> quinn::EndpointConfig {
        let mut endpoint = match &self.surroundings {
            Some(Surroundings { numbers, .. }) => {
                let mut endpoint = quinn::EndpointConfig::new(NodeSecret::of(&self.identity).reset_key());
                let numbers = numbers.clone();
                endpoint.cid_generator(move || Box::new(NumberedCids(numbers.clone())));
                endpoint
            }
            None => quinn::EndpointConfig::default(),
        };
        // Clamped: QUIC wants at least 1,200 (RFC 9000 section 18.2), which is all that can make this fail.
        let _ = endpoint.max_udp_payload_size(self.mtu_bytes_max.max(1200));
        let mut seed = [0; 32];
        self.fill_random(&mut seed);
        endpoint.rng_seed(Some(seed));
        endpoint
    }

    pub(crate) fn fill_random(&self, bytes: &mut [u8]) {
        match &self.surroundings {
            Some(surroundings) => (surroundings.numbers)(bytes),
            None => getrandom::fill(bytes).expect("the operating system's generator works: TLS needs it too"),
        }
    }
}
