//! Load for the QUIC driver: a shard on one core against a stock quinn client on another, in one process.
//!
//! `echo_load <get|bulk|put|handshake> [seconds=3] [streams=1] [in_flight=64] [mtu=1452] [connections=1] [server_core=0] [client_core=1]`
//!
//! * `get`: requests of 64 bytes, answers of 4 KiB, `in_flight` at a time spread over `streams` long-lived streams;
//! * `bulk`: one endless download; `put`: one endless upload; `handshake`: connections one after the other.
//!
//! Prints rates, the latency of `get`, and the CPU time that the shard and the client have used, per operation or per megabyte.

#![allow(clippy::unwrap_used)] // a measuring program: any failure ends it

use std::{
    collections::{BTreeMap, VecDeque},
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use metanode_crypto::{Identity, NodeSecret, tls};
use metanode_quic::{Config, Connection, Counters, Datagram, Endpoint, PortGroup, RecvStream, SendStream};
use metanode_shard::{
    ShardCount, ShardsConfig,
    mesh::{Injector, Mesh},
    metrics::Histogram,
    spawn_local, start,
};

const REQUEST_BYTES: usize = 64;
const ANSWER_BYTES: usize = 4096;
static ANSWER: [u8; 1 << 20] = [7; 1 << 20];

/// The CPU time of this thread.
fn thread_cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

enum Command {
    Cpu(mpsc::Sender<Duration>),
    Stop,
}

fn main() {
    let mut arguments: BTreeMap<String, u64> = BTreeMap::new();
    let mode = std::env::args().nth(1).expect("a mode: get, bulk, put or handshake");
    for argument in std::env::args().skip(2) {
        let (key, value) = argument.split_once('=').expect("key=value");
        arguments.insert(key.to_owned(), value.parse().expect("a number"));
    }
    let argument = |key: &str, default| arguments.get(key).copied().unwrap_or(default);
    let mtu = argument("mtu", 1452) as u16;

    let identity = Identity::from_seed(&[1; 32]);
    let server_tls = tls::server(&identity, tls::CipherSuite::DEFAULT, &[tls::ALPN_RELAY]).unwrap();
    let mut config = Config::new(Arc::new(server_tls), &NodeSecret::of(&identity));
    config.mtu_initial = mtu;
    config.mtu_max = mtu.max(8952);
    let one = ShardCount::new(1).unwrap();
    let (address, mut sockets) = PortGroup::bind((Ipv4Addr::LOCALHOST, 0).into(), one).unwrap();
    let (commands, port) = Injector::new(4);
    let mut once = Some((sockets.pop().unwrap(), Mesh::<Datagram>::new(one, 1024).pop().unwrap(), port));
    let counters = Arc::new(Counters::default());
    let shards_config = ShardsConfig::new("load", vec![Some(argument("server_core", 0) as usize)]);
    let shards = start(&shards_config, |shard| {
        let (socket, mesh, port) = once.take().unwrap();
        let (config, counters) = (config.clone(), counters.clone());
        move || async move {
            let endpoint = Endpoint::with_counters(socket, config, shard, one, mesh, counters).unwrap();
            spawn_local(endpoint.clone().run(|connection| {
                spawn_local(serve(connection)).detach();
            }))
            .detach();
            loop {
                match port.recv().await {
                    Command::Cpu(reply) => reply.send(thread_cpu()).unwrap(),
                    Command::Stop => return,
                }
            }
        }
    })
    .unwrap();
    let server_cpu = || {
        let (sender, receiver) = mpsc::channel();
        assert!(commands.try_send(Command::Cpu(sender)).is_ok());
        receiver.recv().unwrap()
    };

    let mut core = rustix::thread::CpuSet::new();
    core.set(argument("client_core", 1) as usize);
    rustix::thread::sched_setaffinity(None, &core).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut socket_config = quinn::EndpointConfig::default();
        socket_config.max_udp_payload_size(mtu.max(1472)).unwrap();
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = quinn::Endpoint::new(socket_config, None, udp, Arc::new(quinn::TokioRuntime)).unwrap();
        let mut transport = quinn::TransportConfig::default();
        transport.initial_mtu(mtu).receive_window((64u32 << 20).into()).stream_receive_window((16u32 << 20).into());
        let client = tls::client(&Identity::from_seed(&[2; 32]), identity.public(), tls::CipherSuite::DEFAULT, &[tls::ALPN_RELAY]);
        let mut client = quinn::ClientConfig::new(Arc::new(client.unwrap()));
        client.transport_config(Arc::new(transport));
        let connect = async || socket.connect_with(client.clone(), address, tls::SERVER_NAME).unwrap().await.unwrap();

        let stop = Arc::new(AtomicBool::new(false));
        let latency = Arc::new(Histogram::default());
        let mut tasks = Vec::new();
        for _ in 0..argument("connections", 1) {
            if mode == "handshake" {
                break;
            }
            let connection = connect().await;
            for _ in 0..argument("streams", 1) {
                let in_flight = (argument("in_flight", 64) / argument("streams", 1)).max(1) as usize;
                let (connection, stop, latency) = (connection.clone(), stop.clone(), latency.clone());
                tasks.push(match mode.as_str() {
                    "get" => tokio::spawn(get(connection, in_flight, stop, latency)),
                    "bulk" => tokio::spawn(bulk(connection, stop)),
                    "put" => tokio::spawn(put(connection, stop)),
                    other => panic!("unknown mode {other}"),
                });
            }
        }
        let seconds = Duration::from_secs(argument("seconds", 3));
        let (begin, ours, theirs) = (Instant::now(), thread_cpu(), server_cpu());
        let mut handshakes = 0u64;
        if mode == "handshake" {
            while begin.elapsed() < seconds {
                connect().await.close(0u32.into(), b"");
                handshakes += 1;
            }
        } else {
            tokio::time::sleep(seconds).await;
        }
        stop.store(true, Ordering::Relaxed);
        let (elapsed, ours, theirs) = (begin.elapsed(), thread_cpu() - ours, server_cpu() - theirs);
        let mut total = handshakes;
        for task in tasks {
            total += task.await.unwrap();
        }
        let (unit, amount) = match mode.as_str() {
            "bulk" | "put" => ("MB", total as f64 / 1e6),
            _ => ("op", total as f64),
        };
        println!(
            "{mode} mtu {mtu}: {:.0} {unit}/s, server {:.3} us/{unit} ({:.0} % busy), client {:.3} us/{unit}, p50 {:?} p99 {:?}",
            amount / elapsed.as_secs_f64(),
            theirs.as_secs_f64() * 1e6 / amount,
            theirs.as_secs_f64() * 100.0 / elapsed.as_secs_f64(),
            ours.as_secs_f64() * 1e6 / amount,
            latency.quantile(0.5),
            latency.quantile(0.99),
        );
        println!(
            "  server: {} datagrams in {} calls, {} datagrams out {} calls, {} parks, {} send errors, {} parked; stalls {}",
            counters.datagrams_received.value(),
            counters.receive_calls.value(),
            counters.datagrams_sent.value(),
            counters.send_calls.value(),
            counters.parks.value(),
            counters.send_errors.value(),
            counters.transmits_parked.value(),
            shards_config.stalls.total(),
        );
    });
    assert!(commands.try_send(Command::Stop).is_ok());
    assert!(shards.join()[0].is_ok());
}

async fn serve(connection: Connection) {
    while let Ok((send, recv)) = connection.accept_bi().await {
        spawn_local(answer(send, recv)).detach();
    }
}

/// The first byte says what the stream is for.
async fn answer(mut send: SendStream, mut recv: RecvStream) {
    let mut pending = 0;
    let mut answers: Vec<Bytes> = Vec::new();
    while let Ok(Some(bytes)) = recv.read_chunk(usize::MAX).await {
        match bytes[0] {
            b'B' => {
                while send.write(Bytes::from_static(&ANSWER)).await.is_ok() {}
                return;
            }
            b'P' => {}
            _ => {
                pending += bytes.len();
                answers.clear();
                answers.resize(pending / REQUEST_BYTES, Bytes::from_static(&ANSWER[..ANSWER_BYTES]));
                pending %= REQUEST_BYTES;
                if send.write_chunks(&mut answers).await.is_err() {
                    return;
                }
            }
        }
    }
}

async fn get(connection: quinn::Connection, in_flight: usize, stop: Arc<AtomicBool>, latency: Arc<Histogram>) -> u64 {
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    let request = [b'G'; REQUEST_BYTES];
    let mut sent: VecDeque<Instant> = VecDeque::new();
    let (mut done, mut bytes) = (0, 0);
    for _ in 0..in_flight {
        sent.push_back(Instant::now());
        send.write_all(&request).await.unwrap();
    }
    while !stop.load(Ordering::Relaxed) {
        bytes += recv.read_chunk(usize::MAX, true).await.unwrap().unwrap().bytes.len();
        let (now, finished) = (Instant::now(), bytes / ANSWER_BYTES);
        bytes %= ANSWER_BYTES;
        for _ in 0..finished {
            latency.record(now - sent.pop_front().unwrap());
            sent.push_back(now);
            send.write_all(&request).await.unwrap();
            done += 1;
        }
    }
    done
}

async fn bulk(connection: quinn::Connection, stop: Arc<AtomicBool>) -> u64 {
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(b"B").await.unwrap();
    let mut bytes = 0;
    while !stop.load(Ordering::Relaxed) {
        bytes += recv.read_chunk(usize::MAX, true).await.unwrap().unwrap().bytes.len() as u64;
    }
    bytes
}

async fn put(connection: quinn::Connection, stop: Arc<AtomicBool>) -> u64 {
    let (mut send, _recv) = connection.open_bi().await.unwrap();
    send.write_all(b"P").await.unwrap();
    let piece = Bytes::from_static(&[b'P'; 1 << 16]);
    let mut bytes = 0;
    while !stop.load(Ordering::Relaxed) {
        send.write_chunk(piece.clone()).await.unwrap();
        bytes += piece.len() as u64;
    }
    bytes
}
