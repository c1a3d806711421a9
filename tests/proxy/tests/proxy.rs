//! What the proxy does to datagrams.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use metanode_proxy::{Conditions, Counts, Proxy};

/// The longest that a datagram may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn socket(ip: IpAddr) -> UdpSocket {
    let socket = UdpSocket::bind((ip, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A server, a proxy to it and a client of the proxy.
fn path(ip: IpAddr, conditions: Conditions) -> (UdpSocket, Proxy, UdpSocket) {
    let (server, client) = (socket(ip), socket(ip));
    let proxy = Proxy::start(ip, server.local_addr().unwrap(), conditions, 7).unwrap();
    client.connect(proxy.address()).unwrap();
    (server, proxy, client)
}

fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = [0; 2048];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    (buffer[..length].to_vec(), from)
}

fn wait_for(mut event: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !event() {
        assert!(Instant::now() < deadline, "no such event in {PATIENCE:?}");
        std::thread::yield_now();
    }
}

#[test]
fn datagrams_pass_both_ways_and_clients_change_their_address() {
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        let (server, proxy, client) = path(ip, Conditions { delay: Duration::from_millis(1), ..Conditions::default() });
        client.send(b"ask").unwrap();
        let (bytes, first) = receive(&server);
        assert_eq!(bytes, b"ask");
        server.send_to(b"answer", first).unwrap();
        assert_eq!(receive(&client).0, b"answer");
        proxy.rebind();
        client.send(b"again").unwrap();
        let (bytes, mut second) = receive(&server);
        assert_eq!(bytes, b"again");
        if second == first {
            // It overtook the wish; the next one doesn't.
            wait_for(|| proxy.rebound() > 0);
            client.send(b"again").unwrap();
            second = receive(&server).1;
        }
        assert_ne!(first, second);
        server.send_to(b"to the new one", second).unwrap();
        assert_eq!(receive(&client).0, b"to the new one");
    }
}

#[test]
fn shares_are_lost_doubled_and_out_of_order() {
    const BATCH: u64 = 100;
    const SENT: u64 = 20 * BATCH;
    let conditions =
        Conditions { loss: 0.2, duplication: 0.1, jitter: Duration::from_millis(5), ..Conditions::default() };
    let (server, proxy, client) = path(Ipv4Addr::LOCALHOST.into(), conditions);
    let mut numbers = Vec::new();
    for number in 0..SENT {
        client.send(&number.to_le_bytes()).unwrap();
        if (number + 1) % BATCH != 0 {
            continue;
        }
        // A batch at a time, so that no buffer overflows.
        loop {
            let counts = proxy.counts();
            if (numbers.len() as u64) < counts.passed {
                numbers.push(u64::from_le_bytes(receive(&server).0.try_into().unwrap()));
            } else if counts.lost + counts.passed - counts.doubled > number {
                break;
            } else {
                std::thread::yield_now();
            }
        }
    }
    let counts = proxy.counts();
    let distinct: BTreeSet<_> = numbers.iter().collect();
    assert_eq!(distinct.len() as u64, SENT - counts.lost);
    assert_eq!(numbers.len() as u64, counts.passed);
    assert!((SENT / 7..SENT / 4).contains(&counts.lost) && counts.doubled > SENT / 25, "{counts:?}");
    assert!(!numbers.is_sorted(), "some overtake others");
}

#[test]
fn damaged_datagrams_are_cut_or_changed() {
    let (server, proxy, client) = path(Ipv4Addr::LOCALHOST.into(), Conditions { damage: 1.0, ..Conditions::default() });
    let (mut cut, mut changed) = (0, 0);
    for _ in 0..100 {
        client.send(&[0x55; 100]).unwrap();
        let (bytes, _) = receive(&server);
        if bytes.len() < 100 {
            cut += 1;
        } else {
            assert_eq!(bytes.iter().map(|byte| (byte ^ 0x55).count_ones()).sum::<u32>(), 1);
            changed += 1;
        }
    }
    assert!(cut > 20 && changed > 20, "{cut} cut, {changed} changed");
    assert_eq!(proxy.counts().damaged, 100);
}

#[test]
fn what_the_path_does_not_carry_vanishes() {
    let (server, proxy, client) =
        path(Ipv4Addr::LOCALHOST.into(), Conditions { mtu_bytes: 100, ..Conditions::default() });
    client.send(&[0; 101]).unwrap();
    client.send(&[0; 100]).unwrap();
    assert_eq!(receive(&server).0.len(), 100);
    // A datagram is counted after it was sent, so it may arrive before its count.
    wait_for(|| proxy.counts().passed > 0);
    assert_eq!(proxy.counts(), Counts { passed: 1, too_large: 1, ..Counts::default() });
}
