//! Who is let in, who is refused, and how connections end.

#![allow(clippy::unwrap_used)] // clippy's exception for tests doesn't reach helpers

mod common;

use std::time::{Duration, Instant};

use common::*;
use metanode_crypto::{Identity, tls};
use metanode_shard::ShardId;
use quinn::ConnectionError;

/// QUIC's CONNECTION_REFUSED (RFC 9000 section 20.1).
const CONNECTION_REFUSED: u64 = 0x2;
/// CRYPTO_ERROR with TLS alert 120, no_application_protocol (RFC 9001 section 4.8).
const NO_APPLICATION_PROTOCOL: u64 = 0x100 + 120;

fn close_code(error: &ConnectionError) -> Option<u64> {
    match error {
        ConnectionError::ConnectionClosed(close) => Some(close.error_code.into()),
        _ => None,
    }
}

#[tokio::test]
async fn a_client_refuses_a_node_with_another_key() {
    let node = Node::start(1);
    let config = client_tls_for(&client_identity(), Identity::from_seed(&[9; 32]).public(), tls::ALPN_RELAY);
    assert!(connect_with(node.address, config).await.is_err());
    node.until("the failure is counted", |node| node.sum(|c| c.handshakes_failed.value()) == 1).await;
    assert_eq!(node.sum(|c| c.handshakes_done.value()), 0);
    node.stop().await;
}

#[tokio::test]
async fn another_protocol_is_refused_by_name() {
    let node = Node::start(1);
    let config = client_tls_for(&client_identity(), node_identity().public(), b"other/1");
    let error = connect_with(node.address, config).await.unwrap_err();
    assert_eq!(close_code(&error), Some(NO_APPLICATION_PROTOCOL), "{error}");
    node.until("the failure is counted", |node| node.sum(|c| c.handshakes_failed.value()) == 1).await;
    node.stop().await;
}

#[tokio::test]
async fn connections_above_the_limit_are_refused() {
    let mut config = server_config();
    config.connections_max = 2;
    let node = Node::with(1, config);
    let (_one, first) = connect(node.address).await;
    let (_two, _second) = connect(node.address).await;
    let error = connect_with(node.address, client_tls()).await.unwrap_err();
    assert_eq!(close_code(&error), Some(CONNECTION_REFUSED), "{error}");
    assert!(node.sum(|c| c.refused_full.value()) >= 1); // a hello of two packets is refused twice
    echo(&first, b"unharmed").await;
    // Room again once one has gone.
    first.close(0u32.into(), b"");
    node.until("the connection drains", |node| node.sum(|c| c.connections.value()) == 1).await;
    let (_three, third) = connect(node.address).await;
    echo(&third, b"welcome").await;
    node.stop().await;
}

#[tokio::test]
async fn connections_of_one_address_are_limited() {
    let mut config = server_config();
    config.connections_per_address_max = 1;
    let node = Node::with(1, config);
    let (_one, _first) = connect(node.address).await;
    let error = connect_with(node.address, client_tls()).await.unwrap_err();
    assert_eq!(close_code(&error), Some(CONNECTION_REFUSED), "{error}");
    assert!(node.sum(|c| c.refused_address.value()) >= 1);
    node.stop().await;
}

#[tokio::test]
async fn a_client_proves_its_address_when_asked() {
    let mut config = server_config();
    config.incoming_retry_threshold = 0;
    let node = Node::with(3, config);
    for shard in [0, 1, 2] {
        // Retry stays on the shard the client asked for.
        let config = steered(client_tls(), ShardId(shard), count(3), 8);
        let (_socket, connection) = connect_with(node.address, config).await.unwrap();
        assert_eq!(shard_of(&connection).await, shard);
    }
    assert!(node.sum(|c| c.retries.value()) >= 3);
    node.stop().await;
}

#[tokio::test]
async fn a_half_open_handshake_is_given_up() {
    let mut config = server_config();
    config.handshake_timeout = Duration::from_millis(100);
    let node = Node::with(1, config);
    let relay = Relay::letting(node.address, 1).await;
    let socket = client_socket(node.address);
    let connecting = socket.connect_with(client_tls(), relay.address, tls::SERVER_NAME).unwrap();
    node.until("it is given up", |node| node.sum(|c| c.handshakes_timed_out.value()) == 1).await;
    assert_eq!(node.sum(|c| c.handshaking.value()), 0);
    node.until("it is forgotten", |node| node.sum(|c| c.connections.value()) == 0).await;
    drop(connecting);
    node.stop().await;
}

#[tokio::test]
async fn the_oldest_half_open_handshake_gives_way() {
    let mut config = server_config();
    config.handshakes_max = 2;
    let node = Node::with(1, config);
    let relays = [Relay::letting(node.address, 1).await, Relay::letting(node.address, 1).await];
    let sockets = relays.each_ref().map(|_| client_socket(node.address));
    let connecting =
        [0, 1].map(|i| sockets[i].connect_with(client_tls(), relays[i].address, tls::SERVER_NAME).unwrap());
    node.until("both are half-open", |node| node.sum(|c| c.handshaking.value()) == 2).await;
    // Its first packets are dropped as long as both are young; it repeats them.
    let (_socket, connection) = connect(node.address).await;
    echo(&connection, b"hello").await;
    assert_eq!(node.sum(|c| c.handshakes_timed_out.value()), 1);
    assert_eq!(node.sum(|c| c.handshaking.value()), 1);
    assert!(node.sum(|c| c.dropped_handshakes_max.value()) >= 1);
    assert_eq!(node.sum(|c| c.connections.value()), 2, "the one that was given up is gone");
    drop(connecting);
    node.stop().await;
}

#[tokio::test]
async fn a_silent_peer_times_out() {
    let mut config = server_config();
    config.idle_timeout = Duration::from_millis(200);
    let node = Node::with(1, config);
    let relay = Relay::start(node.address).await;
    let (_socket, connection) = connect(relay.address).await;
    echo(&connection, b"here").await;
    relay.silence();
    node.until("it times out", |node| node.sum(|c| c.lost_timed_out.value()) == 1).await;
    node.until("it is forgotten", |node| node.sum(|c| c.connections.value()) == 0).await;
    node.stop().await;
}

#[tokio::test]
async fn closing_says_why_on_both_sides() {
    let node = Node::start(2);
    let (_one, first) = connect(node.address).await;
    echo(&first, b"x").await;
    first.close(5u32.into(), b"bye");
    node.until("the client's close arrives", |node| node.sum(|c| c.lost_by_peer.value()) == 1).await;
    let (_two, second) = connect(node.address).await;
    echo(&second, b"x").await;
    // A handler closes.
    let (mut send, _recv) = second.open_bi().await.unwrap();
    send.write_all(b"?").await.unwrap();
    let closed = within(second.closed()).await;
    assert!(
        matches!(&closed, ConnectionError::ApplicationClosed(close) if close.error_code == 9u32.into()),
        "{closed}"
    );
    // The node stops: new ones are refused, present ones are told.
    let (_three, third) = connect(node.address).await;
    echo(&third, b"x").await;
    node.command(|| Command::BeginShutdown);
    let begin = Instant::now();
    loop {
        let Err(error) = connect_with(node.address, client_tls()).await else {
            assert!(begin.elapsed() < DEADLINE);
            continue; // the command had not arrived yet
        };
        assert_eq!(close_code(&error), Some(CONNECTION_REFUSED), "{error}");
        break;
    }
    echo(&third, b"present connections go on").await;
    node.stop().await; // waits until all are drained
    let closed = within(third.closed()).await;
    assert!(
        matches!(&closed, ConnectionError::ApplicationClosed(close) if close.error_code == CLOSE_CODE.into()),
        "{closed}"
    );
}

#[tokio::test]
async fn garbage_changes_nothing() {
    let node = Node::start(2);
    let (_socket, connection) = connect(node.address).await;
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut random = vec![0; 1500];
    for round in 0..3000usize {
        getrandom::fill(&mut random).unwrap();
        let mut length = round % 1500;
        match round % 5 {
            0 => random[0] |= 0x80,
            1 => random[0] = 0x40 | random[0] & 0x3f,
            // Like an Initial: version 1, connection IDs of 8 bytes.
            2 => {
                random[0] = 0xc0 | random[0] & 0x0f;
                random[1..6].copy_from_slice(&[0, 0, 0, 1, 8]);
                random[14] = 8;
                length = length.max(1200);
            }
            // A version nobody speaks: answered with version negotiation.
            3 => {
                random[0] |= 0xc0;
                random[1..6].copy_from_slice(&[0x1a, 0x2a, 0x3a, 0x4a, 8]);
                random[14] = 8;
                length = length.max(1200);
            }
            _ => {}
        }
        udp.send_to(&random[..length], node.address).unwrap();
        if round % 500 == 0 {
            echo(&connection, b"fine").await;
        }
    }
    echo(&connection, &pattern(0, 100_000)).await;
    assert_eq!(node.sum(|c| c.resets_sent.value()), 0, "noise is not answered with resets");
    node.stop().await;
}

#[tokio::test]
async fn a_restarted_node_resets_connections_of_its_former_life() {
    let node = Node::start(2);
    let address = node.address;
    let (_socket, connection) = connect(address).await;
    echo(&connection, b"x").await;
    // It dies without a word: the relay-less client learns of it from the reset that the next life sends.
    node.kill().await;
    let node = Node::bound(address, 2, server_config());
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    send.write_all(&pattern(0, 1000)).await.unwrap();
    let closed = within(connection.closed()).await;
    assert_eq!(closed, ConnectionError::Reset);
    assert!(node.sum(|c| c.resets_sent.value()) > 0);
    node.stop().await;
}
