//! Networks that lose, delay, reorder, double and damage packets, strangers that send again what they have recorded, and clients that come from another address in the middle of a transfer.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::{
    fs,
    net::IpAddr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use metanode_e2e::{Home, Node, content, wait_for};
use metanode_proxy::{Conditions, Proxy};
use metanode_wire::Ticket;

/// The longest that a transfer may take on two busy cores, unoptimised.
const TIME_MAX: Duration = Duration::from_secs(90);

const FAMILIES: [&str; 2] = ["127.0.0.1", "::1"];

/// A node, a proxy to it, and the ticket that leads through the proxy.
fn behind_a_proxy(home: &Home, ip: &str, shards: u16, conditions: Conditions) -> (Node, Proxy, String) {
    let ip: IpAddr = ip.parse().unwrap();
    let node = home.start_at(shards, &std::net::SocketAddr::new(ip, 0).to_string());
    let proxy = Proxy::start(ip, node.ready.quic, conditions, 11).unwrap();
    let ticket = Ticket { addresses: vec![proxy.address()], ..node.ready.ticket.clone() };
    (node, proxy, ticket.to_string())
}

fn same(a: &Path, b: &Path) -> bool {
    fs::read(a).unwrap() == fs::read(b).unwrap()
}

#[test]
fn a_bad_path_carries_a_blob_both_ways() {
    let conditions = Conditions {
        loss: 0.02,
        duplication: 0.02,
        damage: 0.02,
        delay: Duration::from_millis(5),
        jitter: Duration::from_millis(4),
        mtu_bytes: 1472,
        ..Conditions::default()
    };
    for ip in FAMILIES {
        let home = Home::new();
        let (node, proxy, ticket) = behind_a_proxy(&home, ip, 2, conditions);
        let (file, target) = (home.beside("source"), home.beside("target"));
        fs::write(&file, content(1, 4 << 20)).unwrap();
        home.cli_args(["put", file.to_str().unwrap(), "--tag", "x", "--node", &ticket]).ok();
        home.cli_args(["get", "x", target.to_str().unwrap(), "--node", &ticket]).ok();
        assert!(same(&file, &target), "{ip}");
        let counts = proxy.counts();
        assert!(counts.lost > 50 && counts.doubled > 50 && counts.damaged > 50, "{counts:?}");
        node.stop();
    }
}

#[test]
fn a_recorded_connection_that_is_sent_again_does_nothing() {
    let home = Home::new();
    let (node, proxy, ticket) = behind_a_proxy(&home, FAMILIES[0], 1, Conditions::default());
    let file = home.beside("source");
    fs::write(&file, content(1, 100_000)).unwrap();
    proxy.record();
    let put = home.cli_args(["put", file.to_str().unwrap(), "-o", "json", "--node", &ticket]).ok();
    let hash = put.json()["hash"].as_str().unwrap().to_owned();
    let recorded = proxy.recorded();
    assert!(recorded.len() > 10, "{} datagrams", recorded.len());
    home.cli_args(["rm", &hash, "--node", &ticket]).ok();

    let (puts, heard) = (node.metric("requests_total"), node.metric("quic_datagrams_received_total"));
    let attacker = std::net::UdpSocket::bind((FAMILIES[0], 0)).unwrap();
    for datagram in &recorded {
        attacker.send_to(datagram, node.ready.quic).unwrap();
    }
    let all = heard + recorded.len() as f64;
    wait_for(TIME_MAX, || (node.metric("quic_datagrams_received_total") >= all).then_some(())).expect("they arrive");
    assert_eq!(node.metric("requests_total"), puts, "no request was in them");
    home.cli_args(["stat", &hash, "--node", &ticket]).failed(3); // not there
    node.stop();
}

/// Runs a command, and gives its client a new address whenever `moved` has grown by a fifth of the blob.
#[track_caller]
fn with_new_addresses(mut command: Command, proxy: &Proxy, bytes: usize, moved: impl Fn() -> f64) {
    let before = moved();
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    for fifth in 1..5 {
        let there = before + (fifth * bytes / 5) as f64;
        let reached = wait_for(TIME_MAX, || (moved() >= there).then_some(()));
        assert!(reached.is_some(), "{fifth} fifths of the transfer within {TIME_MAX:?}");
        assert!(child.try_wait().unwrap().is_none(), "it was over before its address changed");
        let rebound = proxy.rebound();
        proxy.rebind();
        wait_for(TIME_MAX, || (proxy.rebound() > rebound).then_some(())).expect("the proxy takes new sockets");
    }
    let status = wait_for(TIME_MAX, || child.try_wait().unwrap()).expect("the command ends");
    assert!(status.success(), "{status}");
}

#[test]
fn a_client_with_a_new_address_goes_on_without_a_new_connection() {
    const BYTES: usize = 48 << 20;
    // So narrow that it lasts long enough for its address to change.
    let conditions = Conditions { delay: Duration::from_millis(2), rate: 24e6, ..Conditions::default() };
    for ip in FAMILIES {
        let home = Home::new();
        let (node, proxy, ticket) = behind_a_proxy(&home, ip, 2, conditions);
        let (file, target) = (home.beside("source"), home.beside("target"));
        fs::write(&file, content(1, BYTES)).unwrap();
        let command = |arguments: &[&str]| home.command(arguments.iter().copied().chain(["--node", &ticket]));

        let put = command(&["put", file.to_str().unwrap(), "--tag", "x"]);
        with_new_addresses(put, &proxy, BYTES, || node.metric("received_bytes_total"));
        let received = node.metric("quic_bytes_received_total");
        assert!(received < 1.2 * BYTES as f64, "{ip}: it was sent again: {received}");
        let handshakes = node.metric("quic_handshakes_begun_total");
        assert!(handshakes <= 2.0, "{ip}: one a shard at most, {handshakes} were begun");

        let sent = node.metric("quic_bytes_sent_total");
        let get = command(&["get", "x", target.to_str().unwrap()]);
        with_new_addresses(get, &proxy, BYTES, || node.metric("sent_bytes_total"));
        assert!(same(&file, &target), "{ip}");
        let sent = node.metric("quic_bytes_sent_total") - sent;
        assert!(sent < 1.2 * BYTES as f64, "{ip}: it was sent again: {sent}");
        let begun = node.metric("quic_handshakes_begun_total") - handshakes;
        assert!(begun <= 2.0, "{ip}: one a shard at most, {begun} were begun");
        node.stop();
    }
}
