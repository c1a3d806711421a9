//! Many idle connections: what each costs the node, how quickly they are made, and what others feel of them.

use std::{
    net::{Ipv4Addr, UdpSocket},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use metanode_client::PutOptions;
use metanode_crypto::{
    Identity,
    tls::{self, ALPN_RELAY, CipherSuite, SERVER_NAME},
};
use metanode_wire::{
    FrameLimits, FrameReader, encode,
    message::{Hello, Welcome},
};
use quinn::{Connection, Endpoint, EndpointConfig, RecvStream, SendStream, TokioRuntime, TransportConfig};

use crate::{
    Connections, data,
    measure::{Meter, Report, closed_loop, memory_kib, paced_loop},
    node::{Node, Place},
    small::OBJECT_BYTES,
};

/// Sockets that share the connections: one would drown in its own answers.
const SOCKETS: usize = 8;
/// Asked of the kernel for each socket's queues; it grants up to its limit.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// A third of the time after which a shipped node drops a silent connection, as the client library has it.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections made and closed before anything is counted: what a node allocates once is not a cost of each.
const WARM_UP_CONNECTIONS: usize = 64;
/// Until the node's memory is read: acknowledgements are out and handshake state is dropped (RFC 9001 section 4.9).
const SETTLE_TIME: Duration = Duration::from_secs(2);
/// Requests of another client meanwhile, one each [`GET_GAP`].
const GET_COUNT: usize = 3_000;
const GET_GAP: Duration = Duration::from_millis(1);

pub(crate) async fn run(options: &Connections) -> Result<Report> {
    let common = &options.common;
    let place = Place::make(common, "connections")?;
    let mut report = Report::default();
    let node = Node::start(common, &place).await?;
    let client = node.client().await?;
    let object = data::Random::new(data::fresh_seed()?).bytes(OBJECT_BYTES);
    let hash = client.put_whole(object, PutOptions::default()).await?.hash;
    let get = |_| async {
        client.get_whole(hash).await?;
        Ok(())
    };
    paced_loop(100, GET_GAP, common.deadline(), get).await?;

    let crowd = Arc::new(Crowd::new(&node)?);
    let dial = {
        let crowd = crowd.clone();
        move |index| crowd.clone().dial(index)
    };
    closed_loop(WARM_UP_CONNECTIONS, options.concurrency, common.deadline(), dial.clone()).await?;
    crowd.close();
    tokio::time::sleep(SETTLE_TIME).await;

    let before_kib = memory_kib(node.pid(), "VmRSS")?;
    let count = options.count as usize;
    let meter = Meter::start(node.pid())?;
    // All of them are needed, however long that takes: no deadline but the idle timeout, from which keep-alive guards them.
    let deadline = Instant::now() + Duration::from_secs(120);
    let done = closed_loop(count, options.concurrency, deadline, dial).await?;
    let cpu = meter.read()?;
    ensure!(done.count == count, "only {} of {count} connections were made in time", done.count);
    report.add("handshakes_ops", done.rate());
    report.add_latencies("handshakes", &done.latencies);
    report.add("handshakes_server_us", cpu.server.as_secs_f64() * 1e6 / count as f64);
    report.add("handshakes_client_us", cpu.client.as_secs_f64() * 1e6 / count as f64);
    report.add_foreign("handshakes", cpu);
    // A connection of the client library is greeted and keeps its stream: so do these.
    let greet = {
        let crowd = crowd.clone();
        move |index| crowd.clone().greet(index)
    };
    closed_loop(count, options.concurrency, deadline, greet).await?;
    tokio::time::sleep(SETTLE_TIME).await;
    let after_kib = memory_kib(node.pid(), "VmRSS")?;
    report.add("idle_conn_kib", (after_kib - before_kib) / count as f64);
    report.add("idle_conns", count as f64);

    let meter = Meter::start(node.pid())?;
    let done = paced_loop(GET_COUNT, GET_GAP, common.deadline(), get).await?;
    let cpu = meter.read()?;
    report.add_latencies("idle_conns_get", &done.latencies);
    report.add("idle_conns_server_share", cpu.server.as_secs_f64() / done.elapsed.as_secs_f64());
    let alive = client.status().await?.connections;
    ensure!(alive > options.count.into(), "only {alive} connections of {count} and one were alive at the end");
    report.add("connections_node_hwm_mib", node.hwm_mib()?);

    crowd.close();
    client.close().await;
    node.stop().await?;
    Ok(report)
}

/// Connections by plain quinn: the client library gives each a socket and tasks of its own, which this process could not afford.
struct Crowd {
    endpoints: Vec<Endpoint>,
    config: quinn::ClientConfig,
    address: std::net::SocketAddr,
    connections: Mutex<Vec<Member>>,
}

struct Member {
    connection: Connection,
    /// Open as long as the connection.
    lane: Option<(SendStream, RecvStream)>,
}

impl Crowd {
    fn new(node: &Node) -> Result<Self> {
        // Reads are public: any key will do.
        let identity = Identity::from_seed(&[7; 32]);
        let crypto = tls::client(&identity, node.ticket().node, CipherSuite::DEFAULT, &[ALPN_RELAY])?;
        let mut transport = TransportConfig::default();
        transport
            .max_concurrent_bidi_streams(0u32.into())
            .max_concurrent_uni_streams(0u32.into())
            .datagram_receive_buffer_size(None)
            .max_idle_timeout(Some(IDLE_TIMEOUT.try_into()?))
            .keep_alive_interval(Some(KEEP_ALIVE));
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport));
        let endpoints = (0..SOCKETS).map(|_| endpoint()).collect::<Result<_>>()?;
        let address = *node.ticket().addresses.first().context("the ticket has no address")?;
        Ok(Self { endpoints, config, address, connections: Mutex::default() })
    }

    async fn dial(self: Arc<Self>, index: usize) -> Result<()> {
        let endpoint = &self.endpoints[index % SOCKETS];
        let connection = endpoint.connect_with(self.config.clone(), self.address, SERVER_NAME)?.await?;
        self.lock().push(Member { connection, lane: None });
        Ok(())
    }

    /// Asks the node who it is, as the client library does first.
    async fn greet(self: Arc<Self>, index: usize) -> Result<()> {
        let connection = self.lock()[index].connection.clone();
        let (mut send, mut receive) = connection.open_bi().await?;
        let mut request = Vec::new();
        encode(&mut request, 0, &Hello { agent: "metanode-load".into() }, 0);
        send.write_chunk(Bytes::from(request)).await?;
        let mut reader = FrameReader::new(FrameLimits::default());
        let frame = loop {
            if let Some(frame) = reader.next_frame()? {
                break frame;
            }
            let chunk = receive.read_chunk(usize::MAX, true).await?.context("the node ended the stream")?;
            reader.push(chunk.bytes);
        };
        frame.message::<Welcome>()?;
        self.lock()[index].lane = Some((send, receive));
        Ok(())
    }

    fn close(&self) {
        for member in self.lock().drain(..) {
            member.connection.close(0u32.into(), b"");
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Member>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn endpoint() -> Result<Endpoint> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    // The kernel grants what its own limit allows.
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    Ok(Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(TokioRuntime))?)
}
