//! Streams, transfers, shards and paths, against stock quinn clients.

#![allow(clippy::unwrap_used)] // clippy's exception for tests doesn't reach helpers

mod common;

use std::{
    net::{Ipv6Addr, SocketAddr},
    sync::Arc,
};

use common::*;
use metanode_crypto::tls;
use metanode_quic::{Config, Datagram, Endpoint, PortGroup};
use metanode_shard::{ShardId, ShardsConfig, mesh::Mesh, spawn_local, start, timeout};

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn echoes_over_many_streams() {
    let node = Node::start(1);
    let (_socket, connection) = connect(node.address).await;
    // More streams than may be open at a time, so that credit for new ones has to flow.
    let echoes = (0..100u64).map(|i| {
        let connection = connection.clone();
        tokio::spawn(async move { echo(&connection, &pattern(i, 1 + i as usize * 700)).await })
    });
    for echo in echoes.collect::<Vec<_>>() {
        echo.await.unwrap();
    }
    echo(&connection, b"").await;
    assert_eq!(node.sum(|c| c.handshakes_done.value()), 1);
    drop(connection);
    node.stop().await;
}

#[tokio::test]
async fn speaks_ipv6() {
    let node = Node::bound(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0), 2, server_config());
    let (_socket, connection) = connect(node.address).await;
    echo(&connection, &pattern(0, 50_000)).await;
    download(&connection, 4 * MIB, || ()).await;
    node.stop().await;
}

#[tokio::test]
async fn large_transfers_arrive_intact() {
    // Windows much smaller than the transfer: flow-control credit must flow both ways.
    let mut config = server_config();
    config.stream_receive_window = 100_000;
    config.receive_window = 150_000;
    config.send_window = 200_000;
    let node = Node::with(1, config);
    let (_socket, connection) = connect(node.address).await;
    download(&connection, 24 * MIB, || ()).await;
    upload(&connection, 24 * MIB).await;
    upload_to(&connection, b"S", MIB / 2).await;
    let both = tokio::join!(download(&connection, 8 * MIB, || ()), upload(&connection, 8 * MIB));
    assert_eq!(both, ((), ()));
    node.stop().await;
}

#[tokio::test]
async fn a_client_gets_the_shard_it_asks_for() {
    for shards in [1, 2, 4] {
        let node = Node::start(shards);
        for shard in count(shards).iter() {
            for cid_length in [8, 20] {
                let config = steered(client_tls(), shard, count(shards), cid_length);
                let (_socket, connection) = connect_with(node.address, config).await.unwrap();
                assert_eq!(shard_of(&connection).await, shard.0);
                echo(&connection, &pattern(0, 100_000)).await;
            }
        }
        assert_eq!(node.sum(|c| c.forwarded_out.value()), 0);
        node.stop().await;
    }
}

#[tokio::test]
async fn a_client_that_knows_nothing_of_shards_works() {
    let node = Node::start(4);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..32 {
        let (_socket, connection) = connect(node.address).await;
        echo(&connection, &pattern(0, 10_000)).await;
        seen.insert(shard_of(&connection).await);
    }
    assert!(seen.len() > 1, "32 random connections reached only {seen:?}");
    node.stop().await;
}

#[tokio::test]
async fn packets_that_arrive_at_another_shard_are_forwarded() {
    // Without the steering program the kernel places by addresses, so most connections live on another shard than their
    // packets arrive at, and a change of address moves them once more.
    let (address, sockets) = PortGroup::bind_unsteered((std::net::Ipv4Addr::LOCALHOST, 0).into(), count(4)).unwrap();
    let node = Node::on(address, sockets, server_config());
    for shard in count(4).iter() {
        let relay = Relay::start(node.address).await;
        let config = steered(keeping_alive(client_tls()), shard, count(4), 8);
        let (_socket, connection) = connect_with(relay.address, config).await.unwrap();
        assert_eq!(shard_of(&connection).await, shard.0);
        download(&connection, 2 * MIB, || relay.change_address()).await;
        relay.change_address();
        upload(&connection, MIB).await;
        assert_eq!(shard_of(&connection).await, shard.0);
    }
    assert!(node.sum(|c| c.forwarded_out.value()) > 100, "{:?}", node.counters);
    assert_eq!(node.sum(|c| c.resets_sent.value()), 0);
    node.stop().await;
}

#[tokio::test]
async fn a_change_of_address_in_mid_transfer_is_survived() {
    let node = Node::start(2);
    let relay = Relay::start(node.address).await;
    let (_socket, connection) = connect_with(relay.address, keeping_alive(client_tls())).await.unwrap();
    download(&connection, 4 * MIB, || relay.change_address()).await;
    upload(&connection, MIB).await;
    assert_eq!(node.sum(|c| c.resets_sent.value()), 0);
    node.stop().await;
}

#[tokio::test]
async fn a_parked_transmit_is_not_a_lost_one() {
    let node = Node::start(1);
    let (_socket, connection) = connect(node.address).await;
    for round in 1..=20 {
        node.command(|| Command::RefuseSends(2));
        let begin = std::time::Instant::now();
        while node.sum(|c| c.transmits_parked.value()) < round {
            assert!(begin.elapsed() < DEADLINE, "nothing is parked");
            // Small enough that nothing overflows anywhere.
            echo(&connection, &pattern(0, 20_000)).await;
        }
    }
    assert_eq!(ask(&connection, b"L").await, 0u64.to_le_bytes());
    node.stop().await;
}

#[tokio::test]
async fn a_full_send_buffer_parks_and_loses_nothing() {
    let (address, sockets) = PortGroup::bind((std::net::Ipv4Addr::LOCALHOST, 0).into(), count(1)).unwrap();
    sockets[0].set_send_buffer(4096).unwrap();
    let node = Node::on(address, sockets, server_config());
    node.command(|| Command::RefuseSends(3)); // the handshake too
    let (_socket, connection) = connect(node.address).await;
    for n in [1, 10, 100] {
        download(&connection, 4 * MIB, || node.command(|| Command::RefuseSends(n))).await;
    }
    upload(&connection, MIB).await;
    assert!(node.sum(|c| c.transmits_parked.value()) > 3, "{:?}", node.counters);
    node.stop().await;
}

#[tokio::test]
async fn mtu_discovery_goes_as_far_as_both_sides_allow() {
    let node = Node::start(1);
    let mtu_of =
        async |connection: &quinn::Connection| u16::from_le_bytes(ask(connection, b"M").await.try_into().unwrap());

    // Little is said meanwhile: a burst that overflows a socket's buffer looks like a path that has shrunk.
    // A stock client accepts 1,472 bytes and tries 1,452.
    let (_socket, connection) = connect(node.address).await;
    let begin = std::time::Instant::now();
    let mut mtu = 0;
    while mtu < 1452 {
        assert!(begin.elapsed() < DEADLINE, "discovery stopped at {mtu}");
        mtu = mtu_of(&connection).await;
    }
    assert!(mtu <= 1472, "{mtu}");
    assert!(connection.stats().path.current_mtu <= 1472);

    // One that is configured for jumbo frames.
    let mut socket_config = quinn::EndpointConfig::default();
    socket_config.max_udp_payload_size(8952).unwrap();
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let socket = quinn::Endpoint::new(socket_config, None, udp, Arc::new(quinn::TokioRuntime)).unwrap();
    let mut discovery = quinn::MtuDiscoveryConfig::default();
    discovery.upper_bound(8952);
    let mut transport = quinn::TransportConfig::default();
    transport.mtu_discovery_config(Some(discovery));
    let mut config = client_tls();
    config.transport_config(Arc::new(transport));
    let connection = within(socket.connect_with(config, node.address, tls::SERVER_NAME).unwrap()).await.unwrap();
    let near_jumbo = 8952 - 20; // discovery ends within its minimum step of 20 bytes
    let begin = std::time::Instant::now();
    let (mut ours, mut theirs) = (0, 0);
    while ours < near_jumbo || theirs < near_jumbo {
        assert!(begin.elapsed() < DEADLINE, "discovery stopped at {ours} and {theirs}");
        (ours, theirs) = (connection.stats().path.current_mtu, mtu_of(&connection).await);
    }
    download(&connection, 8 * MIB, || ()).await;
    upload(&connection, 8 * MIB).await;
    node.stop().await;
}

#[tokio::test]
async fn the_node_opens_streams_too() {
    let node = Node::start(1);
    let (_socket, connection) = connect(node.address).await;
    let other = connection.clone();
    let accepting = tokio::spawn(async move {
        let (mut send, mut recv) = within(other.accept_bi()).await.unwrap();
        assert_eq!(within(recv.read_to_end(100)).await.unwrap(), b"opened");
        send.write_all(b"answered").await.unwrap();
        send.finish().unwrap();
        within(send.stopped()).await.unwrap();
    });
    assert_eq!(ask(&connection, b"O").await, b"answered");
    accepting.await.unwrap();
    node.stop().await;
}

#[tokio::test]
async fn dropped_streams_tell_the_peer() {
    let node = Node::start(1);
    let (_socket, connection) = connect(node.address).await;
    let (mut send, mut recv) = within(connection.open_bi()).await.unwrap();
    send.write_all(b"R").await.unwrap();
    send.write_all(&pattern(0, 100_000)).await.unwrap();
    assert_eq!(within(send.stopped()).await.unwrap(), Some(0u32.into()));
    let reset = within(recv.read_to_end(10)).await.unwrap_err();
    let expected = quinn::ReadError::Reset(0u32.into());
    assert!(matches!(&reset, quinn::ReadToEndError::Read(error) if *error == expected), "{reset:?}");
    // The other way: a client that gives its stream up.
    let (mut send, mut recv) = within(connection.open_bi()).await.unwrap();
    send.write_all(b"G").await.unwrap();
    send.write_all(&(64 * MIB).to_le_bytes()).await.unwrap();
    within(recv.read_chunk(1, true)).await.unwrap().unwrap();
    recv.stop(5u32.into()).unwrap();
    send.reset(6u32.into()).unwrap();
    echo(&connection, b"still alive").await;
    node.stop().await;
}

#[tokio::test]
async fn shards_dial_out() {
    let node = Node::start(2);
    let address = node.address;
    let config: Config = server_config();
    let client =
        tls::client(&client_identity(), node_identity().public(), tls::CipherSuite::DEFAULT, &[tls::ALPN_RELAY]);
    let client = Arc::new(client.unwrap());
    let stranger = client_identity().public();
    let wrong = tls::client(&client_identity(), stranger, tls::CipherSuite::DEFAULT, &[tls::ALPN_RELAY]);
    let wrong = Arc::new(wrong.unwrap());
    let dialler = start(&ShardsConfig::unpinned("dialler", count(1)), |_| {
        let (client, wrong, config) = (client.clone(), wrong.clone(), config.clone());
        move || async move {
            let (_, mut sockets) = PortGroup::bind((std::net::Ipv4Addr::LOCALHOST, 0).into(), count(1)).unwrap();
            let mesh = Mesh::<Datagram>::new(count(1), 16).pop().unwrap();
            let endpoint = Endpoint::new(sockets.pop().unwrap(), config, ShardId(0), count(1), mesh).unwrap();
            let driver = spawn_local(endpoint.clone().run(|_| ()));
            let test = async {
                let connection = endpoint.connect(client, address, tls::SERVER_NAME).await.unwrap();
                assert_eq!(connection.peer_key(), Some(node_identity().public()));
                let (mut send, mut recv) = connection.open_bi().await.unwrap();
                send.write(bytes::Bytes::from_static(b"Ehello")).await.unwrap();
                send.finish().unwrap();
                let mut answer = Vec::new();
                while let Some(bytes) = recv.read_chunk(3).await.unwrap() {
                    answer.extend_from_slice(&bytes);
                }
                assert_eq!(answer, b"hello");
                assert_eq!(send.stopped().await, Ok(None));
                connection.close(3, b"done");
                assert_eq!(connection.closed().await, metanode_quic::ConnectionLost::Closed);
                assert!(endpoint.connect(wrong, address, tls::SERVER_NAME).await.is_err());
                endpoint.wait_idle().await;
            };
            timeout(DEADLINE, Box::pin(test)).await.unwrap();
            driver.cancel().await;
        }
    });
    let ends = tokio::task::spawn_blocking(move || dialler.unwrap().join()).await.unwrap();
    assert_eq!(ends, [Ok(())]);
    node.until("the close arrives", |node| node.sum(|c| c.lost_by_peer.value()) == 1).await;
    node.stop().await;
}
