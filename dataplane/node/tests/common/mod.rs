//! A node in this process, and a client that speaks frames by hand.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use bytes::Bytes;
use metanode_crypto::{Identity, tls};
use metanode_node::{Config, DataFolder, NodeError, Ready, admin, run};
use metanode_types::NodeKey;
use metanode_wire::{
    Frame, FrameLimits, FrameReader, Message, Refusal, encode,
    message::{Put, Refused},
};

/// No test waits longer for an event.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// A running node; stopped by [`Node::stop`], given up when dropped by a failing test.
pub(crate) struct Node {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) ready: Ready,
    pub(crate) operator: Identity,
    thread: JoinHandle<Result<(), NodeError>>,
}

impl Node {
    /// Two shards on a fresh folder and free ports, with `change` made to the configuration.
    pub(crate) fn start(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_on(tempfile::tempdir().unwrap(), change)
    }

    pub(crate) fn start_on(folder: tempfile::TempDir, change: impl FnOnce(&mut Config)) -> Self {
        let data = DataFolder::open_or_init(folder.path()).unwrap();
        let operator = data.operator_identity().clone();
        let mut config = data.config().unwrap();
        config.node.shards = Some(2);
        config.quic.listen = (Ipv4Addr::LOCALHOST, 0).into();
        config.metrics.listen = Some((Ipv4Addr::LOCALHOST, 0).into());
        config.store.cache_bytes = 16 << 20;
        change(&mut config);
        let (sender, ready) = mpsc::channel();
        let thread = thread::spawn(move || run(data, config, |ready| sender.send(ready.clone()).unwrap()));
        match ready.recv_timeout(DEADLINE) {
            Ok(ready) => Self { folder, ready, operator, thread },
            Err(_) => panic!("the node did not get ready: {:?}", thread.join()),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Stops it over the local socket; it must end in order. Gives the folder back.
    pub(crate) fn stop(self) -> tempfile::TempDir {
        admin::stop(self.path(), DEADLINE).unwrap();
        self.stopped()
    }

    /// For a node that was stopped otherwise.
    pub(crate) fn stopped(self) -> tempfile::TempDir {
        self.thread.join().unwrap().unwrap();
        self.folder
    }

    /// Its page of metrics.
    pub(crate) fn metrics(&self) -> String {
        let mut page = std::net::TcpStream::connect(self.ready.metrics.unwrap()).unwrap();
        page.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n").unwrap();
        let mut text = String::new();
        page.read_to_string(&mut text).unwrap();
        text
    }

    /// The sum of a metric over all shards and labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.metrics();
        let samples = text.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
        samples.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// A client with the operator's key.
    pub(crate) async fn client(&self) -> Client {
        Client::connect(&self.ready, &self.operator).await
    }
}

/// One connection and its first stream.
pub(crate) struct Client {
    pub(crate) connection: quinn::Connection,
    pub(crate) lane: Lane,
    _endpoint: quinn::Endpoint,
}

pub(crate) struct Lane {
    pub(crate) send: quinn::SendStream,
    pub(crate) recv: quinn::RecvStream,
    reader: FrameReader,
}

impl Client {
    pub(crate) async fn connect(ready: &Ready, identity: &Identity) -> Self {
        let client = Self::try_connect(ready, identity).await;
        let lane = Lane::open(&client.1).await;
        Self { connection: client.1, lane, _endpoint: client.0 }
    }

    /// A client that lets the node send so many bytes on each stream until it has read them.
    pub(crate) async fn connect_narrow(ready: &Ready, identity: &Identity, window_bytes: u32) -> Self {
        let mut transport = quinn::TransportConfig::default();
        transport.stream_receive_window(window_bytes.into());
        let (endpoint, connection) = Self::connect_as(ready, identity, transport).await;
        let lane = Lane::open(&connection).await;
        Self { connection, lane, _endpoint: endpoint }
    }

    /// A connection that the node may close at once.
    pub(crate) async fn try_connect(ready: &Ready, identity: &Identity) -> (quinn::Endpoint, quinn::Connection) {
        Self::connect_as(ready, identity, quinn::TransportConfig::default()).await
    }

    async fn connect_as(
        ready: &Ready,
        identity: &Identity,
        transport: quinn::TransportConfig,
    ) -> (quinn::Endpoint, quinn::Connection) {
        let endpoint = quinn::Endpoint::client(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let node: NodeKey = ready.ticket.node;
        let tls = tls::client(identity, node, tls::CipherSuite::DEFAULT, &[tls::ALPN_RELAY]).unwrap();
        let mut config = quinn::ClientConfig::new(Arc::new(tls));
        config.transport_config(Arc::new(transport));
        // One that listens on all addresses is reached by this one.
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, ready.quic.port()));
        let connecting = endpoint.connect_with(config, address, tls::SERVER_NAME).unwrap();
        let connection = tokio::time::timeout(DEADLINE, connecting).await.unwrap().unwrap();
        (endpoint, connection)
    }

    /// Waits for the end; the code that the node closed with.
    pub(crate) async fn closed_with(&self) -> u64 {
        closed_with(&self.connection).await
    }
}

/// Waits for the end of a connection; the code that the node closed with.
pub(crate) async fn closed_with(connection: &quinn::Connection) -> u64 {
    match tokio::time::timeout(DEADLINE, connection.closed()).await.unwrap() {
        quinn::ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
        other => panic!("{other}"),
    }
}

impl Lane {
    pub(crate) async fn open(connection: &quinn::Connection) -> Self {
        let (send, recv) = tokio::time::timeout(DEADLINE, connection.open_bi()).await.unwrap().unwrap();
        Self { send, recv, reader: FrameReader::new(FrameLimits::default()) }
    }

    pub(crate) async fn send<M: Message>(&mut self, request: u32, message: &M, body: &[u8]) {
        let mut out = Vec::new();
        encode(&mut out, request, message, body.len());
        out.extend_from_slice(body);
        tokio::time::timeout(DEADLINE, self.send.write_all(&out)).await.unwrap().unwrap();
    }

    pub(crate) async fn put(&mut self, request: u32, hash: [u8; 32], body: &[u8]) {
        self.send(request, &Put { hash, class: 1, kind: 0, hold: true }, body).await;
    }

    /// The next frame; `None` at the end of the stream.
    pub(crate) async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.reader.next_frame().unwrap() {
                return Some(frame);
            }
            let chunk = tokio::time::timeout(DEADLINE, self.recv.read_chunk(1 << 16, true)).await.unwrap();
            self.reader.push(chunk.ok()??.bytes);
        }
    }

    /// Asks and waits for the answer.
    pub(crate) async fn ask<M: Message>(&mut self, request: u32, message: &M) -> Frame {
        self.send(request, message, &[]).await;
        let frame = self.next().await.expect("an answer");
        assert_eq!(frame.request, request);
        frame
    }

    /// As [`Lane::ask`], again as long as the node is busy.
    pub(crate) async fn ask_again<M: Message>(&mut self, request: u32, message: &M, body: &[u8]) -> Frame {
        let deadline = std::time::Instant::now() + DEADLINE;
        loop {
            self.send(request, message, body).await;
            let answer = self.next().await.expect("an answer");
            if answer.kind != metanode_wire::Kind::Refused {
                return answer;
            }
            let refused = refusal(&answer);
            assert!(
                refused.code == metanode_wire::RefusalCode::Busy && refused.retry_after_ms > 0,
                "refused: {refused}"
            );
            assert!(std::time::Instant::now() < deadline, "busy for {DEADLINE:?}");
            tokio::time::sleep(Duration::from_millis(refused.retry_after_ms.into())).await;
        }
    }

    /// What is left of the stream behind the frames that were read.
    pub(crate) async fn rest(mut self) -> Vec<u8> {
        let mut rest: Vec<u8> = self.reader.into_rest().into_iter().flatten().collect();
        let more = tokio::time::timeout(DEADLINE, self.recv.read_to_end(64 << 20)).await.unwrap().unwrap();
        rest.extend(more);
        rest
    }
}

pub(crate) fn refusal(frame: &Frame) -> Refusal {
    Refusal::from_message(frame.message::<Refused>().unwrap_or_else(|_| panic!("{:?} is no refusal", frame.kind)))
}

/// `size` bytes that no other seed has, and their address.
pub(crate) fn blob(seed: u64, size: usize) -> ([u8; 32], Bytes) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(size)
    .collect();
    (metanode_crypto::hash(&bytes).0, bytes.into())
}
