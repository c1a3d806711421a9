//! A node with a small test protocol, clients for it, and a relay between them that can misbehave.

#![allow(clippy::unwrap_used, clippy::needless_pass_by_value, dead_code, unreachable_pub)] // shared by several test binaries

use std::{
    future::Future,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use metanode_crypto::{Identity, NodeSecret, tls};
use metanode_quic::{Config, Connection, Counters, Datagram, Endpoint, PortGroup, RecvStream, SendStream, steer};
use metanode_shard::{
    ShardCount, ShardId, Shards, ShardsConfig,
    mesh::{Injector, Mesh},
    sleep, spawn_local, start, timeout,
};

/// Longest that anything here may take; reached only when something hangs.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// The code with which the node closes.
pub const CLOSE_CODE: u32 = 77;

pub fn count(n: u16) -> ShardCount {
    ShardCount::new(n).unwrap()
}

pub fn node_identity() -> Identity {
    Identity::from_seed(&[1; 32])
}

pub fn client_identity() -> Identity {
    Identity::from_seed(&[2; 32])
}

pub fn server_config() -> Config {
    let identity = node_identity();
    let server_tls = tls::server(&identity, tls::CipherSuite::DEFAULT, &[tls::ALPN_RELAY]).unwrap();
    Config::new(Arc::new(server_tls), &NodeSecret::of(&identity))
}

pub enum Command {
    BeginShutdown,
    RefuseSends(u32),
    Stop,
    /// Ends without closing anything.
    Kill,
}

pub struct Node {
    pub address: SocketAddr,
    pub counters: Vec<Arc<Counters>>,
    commands: Vec<Injector<Command>>,
    shards: Option<Shards<()>>,
}

impl Node {
    pub fn start(shards: u16) -> Self {
        Self::with(shards, server_config())
    }

    pub fn with(shards: u16, config: Config) -> Self {
        Self::bound((Ipv4Addr::LOCALHOST, 0).into(), shards, config)
    }

    pub fn bound(address: SocketAddr, shards: u16, config: Config) -> Self {
        let (address, sockets) = PortGroup::bind(address, count(shards)).unwrap();
        Self::on(address, sockets, config)
    }

    pub fn on(address: SocketAddr, sockets: Vec<metanode_quic::ShardSocket>, config: Config) -> Self {
        let shards = count(sockets.len() as u16);
        let counters: Vec<Arc<Counters>> = sockets.iter().map(|_| Arc::default()).collect();
        let mut meshes = Mesh::<Datagram>::new(shards, 1024).into_iter();
        let mut sockets = sockets.into_iter();
        let mut commands = Vec::new();
        let running = start(&ShardsConfig::unpinned("node", shards), |shard| {
            let (injector, port) = Injector::new(16);
            commands.push(injector);
            let (mesh, socket, config) = (meshes.next().unwrap(), sockets.next().unwrap(), config.clone());
            let counters = counters[shard.index()].clone();
            move || async move {
                let endpoint = Endpoint::with_counters(socket, config, shard, shards, mesh, counters).unwrap();
                let driver = spawn_local(endpoint.clone().run(move |connection| {
                    spawn_local(serve(connection, shard)).detach();
                }));
                loop {
                    match port.recv().await {
                        Command::BeginShutdown => endpoint.begin_shutdown(),
                        Command::RefuseSends(n) => endpoint.refuse_sends(n),
                        Command::Stop => break,
                        Command::Kill => return,
                    }
                }
                endpoint.close_all(CLOSE_CODE, b"stop");
                timeout(DEADLINE, endpoint.wait_idle()).await.expect("all connections drain");
                driver.cancel().await;
            }
        });
        Self { address, counters, commands, shards: Some(running.unwrap()) }
    }

    pub fn command(&self, command: impl Fn() -> Command) {
        for injector in &self.commands {
            assert!(injector.try_send(command()).is_ok());
        }
    }

    pub fn sum(&self, counter: impl Fn(&Counters) -> u64) -> u64 {
        self.counters.iter().map(|counters| counter(counters)).sum()
    }

    /// Waits until a condition on the counters holds.
    pub async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let begin = Instant::now();
        while !condition(self) {
            assert!(begin.elapsed() < DEADLINE, "{what}; counters: {:?}", self.counters);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    pub async fn stop(self) {
        self.end(|| Command::Stop).await;
    }

    pub async fn kill(self) {
        self.end(|| Command::Kill).await;
    }

    async fn end(mut self, command: impl Fn() -> Command) {
        self.command(command);
        let shards = self.shards.take().unwrap();
        let ends = tokio::task::spawn_blocking(move || shards.join()).await.unwrap();
        for end in ends {
            end.unwrap();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(shards) = self.shards.take() {
            self.commands.iter().for_each(|injector| drop(injector.try_send(Command::Stop)));
            shards.join();
        }
    }
}

async fn serve(connection: Connection, shard: ShardId) {
    assert_eq!(connection.peer_key(), Some(client_identity().public()));
    assert_eq!(connection.alpn().as_deref(), Some(tls::ALPN_RELAY));
    while let Ok((send, recv)) = connection.accept_bi().await {
        spawn_local(stream(connection.clone(), shard, send, recv)).detach();
    }
}

/// The test protocol: one letter, then what it takes.
async fn stream(connection: Connection, shard: ShardId, mut send: SendStream, mut recv: RecvStream) {
    let Ok(Some(command)) = recv.read_chunk(1).await else { return };
    match command[0] {
        b'E' => {
            while let Ok(Some(bytes)) = recv.read_chunk(usize::MAX).await {
                if send.write(bytes).await.is_err() {
                    return;
                }
            }
            send.finish().ok();
            send.stopped().await.ok();
        }
        b'G' => {
            let mut length = Vec::new();
            while length.len() < 8 {
                match recv.read_chunk(8 - length.len()).await {
                    Ok(Some(bytes)) => length.extend_from_slice(&bytes),
                    _ => return,
                }
            }
            let length = u64::from_le_bytes(length.try_into().unwrap());
            let mut at = 0;
            while at < length {
                let piece = (length - at).min(100_000);
                if send.write(pattern(at, piece as usize)).await.is_err() {
                    return;
                }
                at += piece;
            }
            send.finish().ok();
        }
        b'P' => {
            let mut at = 0u64;
            let mut intact = true;
            while let Ok(Some(bytes)) = recv.read_chunk(usize::MAX).await {
                intact &= bytes == pattern(at, bytes.len());
                at += bytes.len() as u64;
            }
            let at = if intact { at } else { u64::MAX };
            send.write(Bytes::copy_from_slice(&at.to_le_bytes())).await.ok();
            send.finish().ok();
        }
        b'S' => {
            // A slow reader: the window is full and the line silent whenever it goes on, so credit must travel on its own.
            let mut at = 0u64;
            while let Ok(Some(bytes)) = recv.read_chunk(20_000).await {
                at += bytes.len() as u64;
                sleep(Duration::from_millis(5)).await;
            }
            send.write(Bytes::copy_from_slice(&at.to_le_bytes())).await.ok();
            send.finish().ok();
        }
        b'W' => {
            send.write(Bytes::copy_from_slice(&shard.0.to_le_bytes())).await.ok();
            send.finish().ok();
        }
        b'M' => {
            send.write(Bytes::copy_from_slice(&connection.mtu().to_le_bytes())).await.ok();
            send.finish().ok();
        }
        b'L' => {
            send.write(Bytes::copy_from_slice(&connection.packets_lost().to_le_bytes())).await.ok();
            send.finish().ok();
        }
        b'O' => {
            let (mut out, mut back) = connection.open_bi().await.unwrap();
            out.write(Bytes::from_static(b"opened")).await.unwrap();
            out.finish().unwrap();
            let answer = back.read_chunk(100).await.unwrap().unwrap();
            send.write(answer).await.unwrap();
            send.finish().unwrap();
        }
        b'R' => {
            // Wait for what the client says next, then drop both halves unread and unfinished.
            recv.read_chunk(1).await.ok();
        }
        _ => connection.close(9, b"unknown command"),
    }
}

/// Bytes `at..at + len` of an endless text.
pub fn pattern(at: u64, len: usize) -> Bytes {
    (at..at + len as u64).map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

pub fn client_tls() -> quinn::ClientConfig {
    client_tls_for(&client_identity(), node_identity().public(), tls::ALPN_RELAY)
}

pub fn client_tls_for(identity: &Identity, expected: metanode_types::NodeKey, alpn: &[u8]) -> quinn::ClientConfig {
    let config = tls::client(identity, expected, tls::CipherSuite::DEFAULT, &[alpn]).unwrap();
    quinn::ClientConfig::new(Arc::new(config))
}

/// A client that speaks up even when it only listens: the node learns a new address from the packets that come from there.
pub fn keeping_alive(mut config: quinn::ClientConfig) -> quinn::ClientConfig {
    let mut transport = quinn::TransportConfig::default();
    transport.keep_alive_interval(Some(Duration::from_millis(50)));
    config.transport_config(Arc::new(transport));
    config
}

/// A client whose first packets ask for `shard`.
pub fn steered(
    mut config: quinn::ClientConfig,
    shard: ShardId,
    shards: ShardCount,
    length: usize,
) -> quinn::ClientConfig {
    config.initial_dst_cid_provider(Arc::new(move || {
        let mut id = [0; 20];
        getrandom::fill(&mut id).unwrap();
        id[0] = steer::steering_byte(shard, shards, id[0]);
        quinn::ConnectionId::new(&id[..length])
    }));
    config
}

pub fn client_socket(server: SocketAddr) -> quinn::Endpoint {
    let ip = match server {
        SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
    };
    quinn::Endpoint::client(SocketAddr::new(ip, 0)).unwrap()
}

pub async fn connect(address: SocketAddr) -> (quinn::Endpoint, quinn::Connection) {
    connect_with(address, client_tls()).await.unwrap()
}

pub async fn connect_with(
    address: SocketAddr,
    config: quinn::ClientConfig,
) -> Result<(quinn::Endpoint, quinn::Connection), quinn::ConnectionError> {
    let endpoint = client_socket(address);
    let connecting = endpoint.connect_with(config, address, tls::SERVER_NAME).unwrap();
    Ok((endpoint, within(connecting).await?))
}

pub async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future).await.expect("this ends in time")
}

pub async fn ask(connection: &quinn::Connection, request: &[u8]) -> Vec<u8> {
    let (mut send, mut recv) = within(connection.open_bi()).await.unwrap();
    send.write_all(request).await.unwrap();
    send.finish().unwrap();
    within(recv.read_to_end(1 << 20)).await.unwrap()
}

pub async fn echo(connection: &quinn::Connection, bytes: &[u8]) {
    let answer = ask(connection, &[b"E", bytes].concat()).await;
    assert_eq!(answer, bytes);
}

/// Which shard serves this connection.
pub async fn shard_of(connection: &quinn::Connection) -> u16 {
    u16::from_le_bytes(ask(connection, b"W").await.try_into().unwrap())
}

/// Downloads and checks; `at_half` is called once in the middle.
pub async fn download(connection: &quinn::Connection, length: u64, at_half: impl FnOnce()) {
    let (mut send, mut recv) = within(connection.open_bi()).await.unwrap();
    send.write_all(&[b"G", &length.to_le_bytes()[..]].concat()).await.unwrap();
    let (mut at, mut at_half) = (0, Some(at_half));
    while let Some(chunk) = within(recv.read_chunk(usize::MAX, true)).await.unwrap() {
        assert_eq!(chunk.bytes, pattern(at, chunk.bytes.len()), "at {at}");
        at += chunk.bytes.len() as u64;
        if at > length / 2
            && let Some(at_half) = at_half.take()
        {
            at_half();
        }
    }
    assert_eq!(at, length);
}

pub async fn upload(connection: &quinn::Connection, length: u64) {
    upload_to(connection, b"P", length).await;
}

/// Uploads to a reader that checks (`P`) or one that is slow (`S`).
pub async fn upload_to(connection: &quinn::Connection, command: &[u8], length: u64) {
    let (mut send, mut recv) = within(connection.open_bi()).await.unwrap();
    send.write_all(command).await.unwrap();
    let mut at = 0;
    while at < length {
        let piece = (length - at).min(77_777);
        within(send.write_chunk(pattern(at, piece as usize))).await.unwrap();
        at += piece;
    }
    send.finish().unwrap();
    let answer = within(recv.read_to_end(8)).await.unwrap();
    assert_eq!(u64::from_le_bytes(answer.try_into().unwrap()), length);
}

/// Forwards datagrams between one client and a server, from an address of its own that can change.
pub struct Relay {
    pub address: SocketAddr,
    change: tokio::sync::mpsc::UnboundedSender<Change>,
    task: tokio::task::JoinHandle<()>,
}

enum Change {
    Address,
    Silence,
}

impl Relay {
    pub async fn start(server: SocketAddr) -> Self {
        Self::letting(server, u64::MAX).await
    }

    /// Lets only the first `from_client` datagrams of the client pass.
    pub async fn letting(server: SocketAddr, mut from_client: u64) -> Self {
        let front = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = front.local_addr().unwrap();
        let (change, mut changes) = tokio::sync::mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            let mut back = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let mut client = None;
            let (mut up, mut down) = (vec![0; 65_536], vec![0; 65_536]);
            loop {
                tokio::select! {
                    Ok((len, from)) = front.recv_from(&mut up) => {
                        client = Some(from);
                        if from_client > 0 {
                            from_client -= 1;
                            back.send_to(&up[..len], server).await.ok();
                        }
                    }
                    Ok((len, _)) = back.recv_from(&mut down) => {
                        if let Some(client) = client {
                            front.send_to(&down[..len], client).await.ok();
                        }
                    }
                    Some(change) = changes.recv() => match change {
                        Change::Address => back = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap(),
                        Change::Silence => from_client = 0,
                    },
                }
            }
        });
        Self { address, change, task }
    }

    pub fn change_address(&self) {
        self.change.send(Change::Address).unwrap();
    }

    pub fn silence(&self) {
        self.change.send(Change::Silence).unwrap();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}
