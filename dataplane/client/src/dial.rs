//! From a ticket to a connection.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::Arc,
};

use metanode_crypto::tls::{ALPN_RELAY, SERVER_NAME, client, client_with};
use metanode_types::{NodeKey, ShardCount, ShardId};

use crate::{ClientConfig, ClientError, link::Link};

/// A shard is named by the first byte of a connection ID, so a client can choose among this many.
pub(crate) const STEERABLE_SHARDS_MAX: u16 = 256;

/// Bytes of an initial destination connection ID; RFC 9000 (section 7.2) asks for at least eight.
const INITIAL_CID_BYTES: usize = 8;

/// What every connection to one node has in common.
#[derive(Debug)]
pub(crate) struct Dialer {
    pub(crate) config: ClientConfig,
    pub(crate) node: NodeKey,
    quic: quinn::ClientConfig,
}

/// A connection with the socket it has for itself: the node steers by the first packet of a batch, so that connections to
/// different shards must not share one.
#[derive(Debug)]
pub(crate) struct Dialled {
    pub(crate) link: Link,
    pub(crate) endpoint: quinn::Endpoint,
    pub(crate) address: SocketAddr,
}

impl Dialer {
    pub(crate) fn new(node: NodeKey, config: ClientConfig) -> Result<Self, ClientError> {
        let crypto = match &config.surroundings {
            Some(surroundings) => client_with(surroundings.crypto.clone(), &config.identity, node, &[ALPN_RELAY])?,
            None => client(&config.identity, node, &config.cipher_suites, &[ALPN_RELAY])?,
        };
        let mut quic = quinn::ClientConfig::new(Arc::new(crypto));
        quic.transport_config(config.transport());
        Ok(Self { config, node, quic })
    }

    /// The first address that leads to the node.
    pub(crate) async fn first_of(&self, addresses: &[SocketAddr]) -> Result<Dialled, ClientError> {
        let mut tried = Vec::new();
        let mut telling = None;
        for &address in addresses {
            match self.dial(address, None).await {
                Ok(dialled) => return Ok(dialled),
                Err(ClientError::Unreachable(reasons)) => tried.extend(reasons),
                // Says more than that another address was silent, but that one may still be right.
                Err(error) => telling = telling.or(Some(error)),
            }
        }
        Err(telling.unwrap_or(ClientError::Unreachable(tried)))
    }

    /// Connects to one address, and to one shard of the node there when it is named.
    pub(crate) async fn dial(
        &self,
        address: SocketAddr,
        shard: Option<(ShardId, ShardCount)>,
    ) -> Result<Dialled, ClientError> {
        let endpoint = self.endpoint(address).map_err(ClientError::Socket)?;
        let mut config = self.quic.clone();
        let numbers = self.config.clone();
        config.initial_dst_cid_provider(Arc::new(move || initial_cid(shard, |bytes| numbers.fill_random(bytes))));
        let unreachable = |why: String| ClientError::Unreachable(vec![(address, why)]);
        let connecting =
            endpoint.connect_with(config, address, SERVER_NAME).map_err(|error| unreachable(error.to_string()))?;
        let timeout = self.config.connect_timeout;
        let connection = match tokio::time::timeout(timeout, connecting).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => return Err(self.classify(error, address)),
            Err(_elapsed) => return Err(unreachable(format!("no answer within {timeout:?}"))),
        };
        match tokio::time::timeout(timeout, Link::open(connection, &self.config)).await {
            Ok(link) => Ok(Dialled { link: link?, endpoint, address }),
            Err(_elapsed) => Err(ClientError::Timeout("waiting for the node's greeting")),
        }
    }

    fn endpoint(&self, towards: SocketAddr) -> std::io::Result<quinn::Endpoint> {
        let runtime = Arc::new(quinn::TokioRuntime);
        if let Some(surroundings) = &self.config.surroundings {
            let socket = (surroundings.sockets)(towards.ip())?;
            return quinn::Endpoint::new_with_abstract_socket(self.config.endpoint(), None, socket, runtime);
        }
        let local: SocketAddr = match towards {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = UdpSocket::bind(local)?;
        // The kernel grants what its own limit allows; less only makes losses under load likelier.
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, self.config.socket_buffer_bytes);
        let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, self.config.socket_buffer_bytes);
        quinn::Endpoint::new(self.config.endpoint(), None, socket, runtime)
    }

    /// Why a handshake failed. TLS alerts (RFC 8446 section 6) travel as QUIC crypto errors (RFC 9001 section 4.8).
    fn classify(&self, error: quinn::ConnectionError, address: SocketAddr) -> ClientError {
        const ACCESS_DENIED: u8 = 49; // what our verifier of the node's key answers with
        const NO_APPLICATION_PROTOCOL: u8 = 120;
        let alert = quinn::TransportErrorCode::crypto;
        match &error {
            quinn::ConnectionError::TransportError(local) if local.code == alert(ACCESS_DENIED) => {
                ClientError::WrongNodeKey { expected: self.node, address }
            }
            quinn::ConnectionError::TransportError(local) if local.code == alert(NO_APPLICATION_PROTOCOL) => {
                ClientError::UnsupportedProtocol("no common application protocol".into())
            }
            quinn::ConnectionError::ConnectionClosed(remote) if remote.error_code == alert(NO_APPLICATION_PROTOCOL) => {
                ClientError::UnsupportedProtocol("it does not offer metanode-relay/1".into())
            }
            quinn::ConnectionError::VersionMismatch | quinn::ConnectionError::ApplicationClosed(_) => error.into(),
            other => ClientError::Unreachable(vec![(address, other.to_string())]),
        }
    }
}

/// A random connection ID; when a shard of so many is to be reached, its first byte modulo their count is that shard.
fn initial_cid(shard: Option<(ShardId, ShardCount)>, fill_random: impl Fn(&mut [u8])) -> quinn::ConnectionId {
    let mut bytes = [0; INITIAL_CID_BYTES];
    fill_random(&mut bytes);
    if let Some((shard, count)) = shard {
        bytes[0] = steering_byte(shard, count, bytes[0]);
    }
    quinn::ConnectionId::new(&bytes)
}

/// Among the bytes that lead to `shard`, the one that `random` picks.
fn steering_byte(shard: ShardId, count: ShardCount, random: u8) -> u8 {
    let (shard, count) = (u32::from(shard.0), u32::from(count.get()));
    assert!(shard < count && count <= u32::from(STEERABLE_SHARDS_MAX), "callers choose among steerable shards");
    let choices = (255 - shard) / count + 1;
    (shard + count * (u32::from(random) % choices)) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_steering_byte_leads_to_its_shard() {
        for count in [1u16, 2, 3, 5, 7, 64, 255, 256] {
            for shard in 0..count {
                for random in 0..=255 {
                    let byte = steering_byte(ShardId(shard), ShardCount::new(count).unwrap(), random);
                    assert_eq!(u16::from(byte) % count, shard, "{count} shards");
                }
            }
        }
    }

    #[test]
    fn initial_connection_ids_are_long_enough_and_differ() {
        let count = ShardCount::new(4).unwrap();
        let random = |bytes: &mut [u8]| getrandom::fill(bytes).unwrap();
        let [a, b] = [0; 2].map(|_| initial_cid(Some((ShardId(3), count)), random));
        assert!(a.len() >= 8 && a[0] % 4 == 3);
        assert_ne!(&a[..], &b[..]);
    }
}
