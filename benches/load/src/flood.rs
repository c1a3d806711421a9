//! An established client while strangers flood the node: half-open handshakes that prove their address when asked, and streams that are
//! opened, begun and given up as fast as the node permits.
//!
//! The floods run on threads of their own, on the client's core, at a lower priority than the client that is measured: what it feels
//! is the node's doing.

use std::{
    net::UdpSocket,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::BytesMut;
use metanode_client::PutOptions;
use metanode_crypto::{
    Identity,
    tls::{self, ALPN_RELAY, CipherSuite, SERVER_NAME},
};
use quinn_proto::{DatagramEvent, EndpointConfig};

use crate::{
    Flood, data,
    measure::{Meter, Report, memory_kib, paced_loop},
    node::{Node, Place},
    small::OBJECT_BYTES,
};

/// Requests of the established client in each part, one each [`GET_GAP`].
const GET_COUNT: usize = 10_000;
const GET_GAP: Duration = Duration::from_millis(1);
/// Time over which the half-open handshakes are spread: less than the requests take.
const SPREAD: Duration = Duration::from_secs(8);
/// Priority of the floods: as little as there is beside the client, and all that it leaves.
const FLOOD_NICE: i32 = 10;
/// How long the node may take to free what the floods took: a handshake's time and then some.
const FREED_TIME_MAX: Duration = Duration::from_secs(30);
/// Between two looks at the node.
const LOOK: Duration = Duration::from_millis(100);
/// The largest datagram that is expected.
const DATAGRAM_BYTES_MAX: usize = 2048;
/// Retry's type in the first byte of a long header (RFC 9000 section 17.2.5).
const RETRY_BITS: u8 = 0xf0;

pub(crate) async fn run(options: &Flood) -> Result<Report> {
    let common = &options.common;
    let place = Place::make(common, "flood")?;
    let mut report = Report::default();
    let node = Node::start(common, &place).await?;
    let client = node.client().await?;
    let object = data::Random::new(data::fresh_seed()?).bytes(OBJECT_BYTES);
    let hash = client.put_whole(object, PutOptions::default()).await?.hash;
    let get = |_| async {
        client.get_whole(hash).await?;
        Ok(())
    };
    let handshakes = HalfOpen::prepare(&node, options.half_open)?;
    paced_loop(100, GET_GAP, common.deadline(), get).await?;
    let deadline = || Instant::now() + Duration::from_secs(120);
    let quiet = paced_loop(GET_COUNT, GET_GAP, deadline(), get).await?;
    report.add_latencies("flood_quiet_get", &quiet.latencies);
    let connections = node.page().metric("quic_connections")?;
    let before_kib = memory_kib(node.pid(), "VmRSS")?;

    let stop = Arc::new(AtomicBool::new(false));
    let watch = watch(&node, stop.clone())?;
    let streams = flood_streams(&node, stop.clone())?;
    let handshakes = handshakes.start()?;
    let meter = Meter::start(node.pid())?;
    let flooded = paced_loop(GET_COUNT, GET_GAP, deadline(), get).await?;
    let cpu = meter.read()?;
    report.add_latencies("flood_get", &flooded.latencies);
    report.add("flood_server_share", cpu.server.as_secs_f64() / flooded.elapsed.as_secs_f64());
    let (sent, proven) = joined(handshakes)?;
    stop.store(true, Ordering::Relaxed);
    let opened = joined(streams)?;
    let (most_kib, most_handshaking) = joined(watch)?;
    report.add("flood_half_open", sent as f64);
    report.add("flood_proven", proven as f64);
    report.add("flood_streams", opened as f64);
    report.add("flood_handshaking_max", most_handshaking);
    report.add("flood_rss_growth_mib", (most_kib - before_kib).max(0.0) / 1024.0);
    report.add("flood_retries", node.page().metric("quic_retries_total")?);

    // Everything is freed, and the established client has never noticed.
    let begun = Instant::now();
    loop {
        let (left, handshaking) =
            (node.page().metric("quic_connections")?, node.page().metric("quic_connections_handshaking")?);
        if left <= connections && handshaking == 0.0 {
            break;
        }
        ensure!(
            begun.elapsed() < FREED_TIME_MAX,
            "{left} connections, {handshaking} half-open, {FREED_TIME_MAX:?} after the flood; there were {connections}"
        );
        tokio::time::sleep(LOOK).await;
    }
    report.add("flood_freed_s", begun.elapsed().as_secs_f64());
    report.add("flood_rss_left_mib", (memory_kib(node.pid(), "VmRSS")? - before_kib).max(0.0) / 1024.0);
    ensure!(opened > 0 && sent == u64::from(options.half_open), "the floods did not run");
    client.get_whole(hash).await?;
    client.close().await;
    node.stop().await?;
    Ok(report)
}

fn behind_the_client() -> Result<()> {
    rustix::process::setpriority_process(Some(rustix::thread::gettid()), FLOOD_NICE).context("no priority")
}

fn joined<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow::anyhow!("a thread of the flood has panicked"))?
}

fn stranger(node: &Node) -> Result<quinn_proto::crypto::rustls::QuicClientConfig> {
    Ok(tls::client(&Identity::from_seed(&[8; 32]), node.ticket().node, CipherSuite::DEFAULT, &[ALPN_RELAY])?)
}

/// Looks for the peak of the node's memory in KiB, and of its half-open connections.
fn watch(node: &Node, stop: Arc<AtomicBool>) -> Result<JoinHandle<Result<(f64, f64)>>> {
    let (pid, page) = (node.pid(), node.page());
    let run = move || {
        let mut most = (0.0, 0.0);
        while !stop.load(Ordering::Relaxed) {
            most.0 = memory_kib(pid, "VmRSS")?.max(most.0);
            most.1 = page.metric("quic_connections_handshaking")?.max(most.1);
            thread::sleep(LOOK);
        }
        Ok(most)
    };
    Ok(thread::Builder::new().name("watch".into()).spawn(run)?)
}

/// Handshakes whose first flight is made ahead of time, and which answer nothing but a Retry.
struct HalfOpen {
    endpoint: quinn_proto::Endpoint,
    connections: Vec<quinn_proto::Connection>,
    /// Of each connection.
    first: Vec<Vec<Vec<u8>>>,
    socket: UdpSocket,
}

impl HalfOpen {
    fn prepare(node: &Node, count: u32) -> Result<Self> {
        let socket = UdpSocket::bind((node.address().ip(), 0))?;
        socket.connect(node.address())?;
        socket.set_nonblocking(true)?;
        let mut endpoint = quinn_proto::Endpoint::new(Arc::new(EndpointConfig::default()), None, true, None);
        let config = quinn_proto::ClientConfig::new(Arc::new(stranger(node)?));
        let (mut connections, mut first) = (Vec::new(), Vec::new());
        for index in 0..count as usize {
            let made = endpoint.connect(Instant::now(), config.clone(), node.address(), SERVER_NAME);
            let (handle, mut connection) = made.context("a connection")?;
            ensure!(handle.0 == index, "connections are numbered as they are made");
            first.push(datagrams(&mut connection));
            connections.push(connection);
        }
        Ok(Self { endpoint, connections, first, socket })
    }

    /// Sends all first flights over [`SPREAD`]. How many were sent, and how many addresses were proven.
    fn start(mut self) -> Result<JoinHandle<Result<(u64, u64)>>> {
        let run = move || {
            behind_the_client()?;
            let begun = Instant::now();
            let (mut sent, mut proven) = (0, 0);
            let flights = std::mem::take(&mut self.first);
            let pause = SPREAD / u32::try_from(flights.len())?;
            for (index, flight) in flights.into_iter().enumerate() {
                flight.iter().for_each(|datagram| send(&self.socket, datagram));
                sent += 1;
                proven += self.answer_retries();
                thread::sleep((begun + pause * index as u32).saturating_duration_since(Instant::now()));
            }
            Ok((sent, proven))
        };
        Ok(thread::Builder::new().name("half-open".into()).spawn(run)?)
    }

    /// Proves the address where that is asked for, and drops every other packet: no handshake goes on.
    fn answer_retries(&mut self) -> u64 {
        let mut buffer = [0; DATAGRAM_BYTES_MAX];
        let mut proven = 0;
        while let Ok(length) = self.socket.recv(&mut buffer) {
            if buffer[0] & RETRY_BITS != RETRY_BITS {
                continue;
            }
            let (now, bytes) = (Instant::now(), BytesMut::from(&buffer[..length]));
            let Ok(from) = self.socket.peer_addr() else { continue };
            let event = self.endpoint.handle(now, from, None, None, bytes, &mut Vec::new());
            if let Some(DatagramEvent::ConnectionEvent(handle, event)) = event {
                let connection = &mut self.connections[handle.0];
                connection.handle_event(event);
                let flight = datagrams(connection);
                proven += u64::from(!flight.is_empty());
                flight.iter().for_each(|datagram| send(&self.socket, datagram));
            }
        }
        proven
    }
}

fn datagrams(connection: &mut quinn_proto::Connection) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    loop {
        let mut buffer = Vec::new();
        match connection.poll_transmit(Instant::now(), 1, &mut buffer) {
            Some(transmit) => all.push(buffer[..transmit.size].to_vec()),
            None => return all,
        }
    }
}

fn send(socket: &UdpSocket, datagram: &[u8]) {
    let _ = socket.send(datagram); // a full buffer loses it, as a network would
}

/// Connections that open streams, begin a frame on each, and give it up. How many streams that were.
fn flood_streams(node: &Node, stop: Arc<AtomicBool>) -> Result<JoinHandle<Result<u64>>> {
    let config = quinn::ClientConfig::new(Arc::new(stranger(node)?));
    let address = node.address();
    let run = move || {
        behind_the_client()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let opened = AtomicU64::new(0);
        runtime.block_on(async {
            let endpoint = quinn::Endpoint::client((address.ip(), 0).into())?;
            let one = async || -> Result<()> {
                let connection = endpoint.connect_with(config.clone(), address, SERVER_NAME)?.await?;
                while !stop.load(Ordering::Relaxed) {
                    let (mut send, _receive) = connection.open_bi().await?;
                    send.write_all(b"not a frame").await?;
                    send.reset(1u32.into())?;
                    opened.fetch_add(1, Ordering::Relaxed);
                }
                connection.close(0u32.into(), b"");
                Ok(())
            };
            tokio::try_join!(one(), one(), one(), one())?;
            endpoint.wait_idle().await;
            anyhow::Ok(())
        })?;
        Ok(opened.into_inner())
    };
    Ok(thread::Builder::new().name("streams".into()).spawn(run)?)
}
