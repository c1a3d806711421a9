//! Plain quinn on tokio, without a store: what QUIC itself costs on this machine.
//!
//! A request is the number of bytes wanted, as eight little-endian bytes on a bidirectional stream of its own; the
//! answer is that many bytes of static memory. With [`UPLOAD`] set, so many bytes follow, and the answer is their number.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use quinn::{
    ClientConfig, Connection, Endpoint, EndpointConfig, RecvStream, SendStream, ServerConfig, TokioRuntime,
    TransportConfig, VarInt,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer},
};
use serde_json::json;
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    time::MissedTickBehavior,
};

use crate::{
    Run,
    child::{self, Commands, Server},
    measure::{Latencies, Report, closed_loop},
    tls,
};

/// What the server sends, over and over for a large object.
static CONTENT: [u8; 1 << 20] = [7; 1 << 20];
/// In a request: the bytes go the other way.
const UPLOAD: u64 = 1 << 63;
/// Size of a small object.
const OBJECT_SIZE: u64 = 4096;
/// Requests before the first timed part: MTU discovery and the congestion window settle.
const WARM_UP_COUNT: u32 = 2000;
/// Requests at low load, one each [`IDLE_GAP`].
const IDLE_COUNT: u32 = 3000;
const IDLE_GAP: Duration = Duration::from_millis(1);
/// Back-to-back requests, one at a time.
const SERIAL_COUNT: usize = 20_000;
/// The size asked of the kernel for a socket's queues (it grants up to its limit): iroh and Metanode ask for large ones.
const SOCKET_BUFFER_SIZE: usize = 8 << 20;
const ALPN: &[u8] = b"metanode-peer";
const SERVER_NAME: &str = "localhost";

/// Serves until the parent goes; the first line has the address and the certificate that the client pins.
pub(crate) async fn serve(mut commands: Commands) -> Result<()> {
    let rcgen::CertifiedKey { cert, signing_key } = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()])?;
    let key = PrivatePkcs8KeyDer::from(signing_key.serialize_der());
    let mut crypto = rustls::ServerConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key.into())?;
    crypto.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(crypto)?));
    config.transport_config(transport()?);
    let endpoint = bind(Some(config))?;
    tokio::spawn(accept(endpoint.clone()));

    let certificate: Vec<u8> = cert.der().to_vec();
    child::answer(&json!({ "address": endpoint.local_addr()?.to_string(), "certificate": certificate }))?;
    while commands.next().await.is_some() {}
    endpoint.close(VarInt::from_u32(0), b"");
    Ok(())
}

async fn accept(endpoint: Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(async move {
            let Ok(connection) = incoming.await else { return };
            while let Ok((send, receive)) = connection.accept_bi().await {
                // An error here is the client's end of the stream or connection going away: it reports its own.
                tokio::spawn(async move { respond(send, receive).await.ok() });
            }
        });
    }
}

async fn respond(mut send: SendStream, mut receive: RecvStream) -> Result<()> {
    let mut request = [0; 8];
    receive.read_exact(&mut request).await?;
    let mut left = u64::from_le_bytes(request);
    if left & UPLOAD != 0 {
        let mut taken = 0u64;
        while let Some(chunk) = receive.read_chunk(usize::MAX, true).await? {
            taken += chunk.bytes.len() as u64;
        }
        send.write_all(&taken.to_le_bytes()).await?;
        send.finish()?;
        return Ok(());
    }
    while left > 0 {
        let size = left.min(CONTENT.len() as u64);
        send.write_chunk(Bytes::from_static(&CONTENT[..size as usize])).await?;
        left -= size;
    }
    send.finish()?;
    Ok(())
}

/// Starts a server, measures it and stops it.
pub(crate) async fn run(options: &Run) -> Result<Report> {
    let (server, ready) = Server::start(options.peer, options.server_core, &options.dir).await?;
    let address: SocketAddr = child::text(&ready, "address")?.parse()?;
    let certificate: Vec<u8> = serde_json::from_value(ready["certificate"].clone()).context("no certificate")?;
    let endpoint = bind(None)?;
    let connection = endpoint.connect_with(client_config(certificate)?, address, SERVER_NAME)?.await?;
    for _ in 0..WARM_UP_COUNT {
        get(&connection, OBJECT_SIZE).await?;
    }
    let mut report = Report::default();

    // Low load: what a request costs when the server has gone to sleep before it arrives.
    let mut latencies = Latencies::default();
    let mut ticks = tokio::time::interval(IDLE_GAP);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let deadline = options.deadline();
    for _ in 0..IDLE_COUNT {
        ticks.tick().await;
        let start = Instant::now();
        if start >= deadline {
            break;
        }
        get(&connection, OBJECT_SIZE).await?;
        latencies.push(start.elapsed());
    }
    report.add("quinn_idle_p50_us", latencies.quantile_us(0.50));
    report.add("quinn_idle_p99_us", latencies.quantile_us(0.99));

    let cpu = server.cpu_time()?;
    let client = connection.clone();
    let operation = move |_| {
        let client = client.clone();
        async move { get(&client, OBJECT_SIZE).await }
    };
    let mut done = closed_loop(SERIAL_COUNT, 1, options.deadline(), operation.clone()).await?;
    report.add_operations("quinn_c1", &mut done, server.cpu_time()?.saturating_sub(cpu));

    let cpu = server.cpu_time()?;
    let mut done = closed_loop(options.count as usize, options.concurrency, options.deadline(), operation).await?;
    report.add_operations("quinn_get_4k", &mut done, server.cpu_time()?.saturating_sub(cpu));

    let (cpu, start) = (server.cpu_time()?, Instant::now());
    let received = get_until(&connection, options.bytes, options.deadline()).await?;
    report.add_transfer("quinn_1g", received, start.elapsed(), server.cpu_time()?.saturating_sub(cpu));

    connection.close(VarInt::from_u32(0), b"");
    server.stop().await?;
    Ok(report)
}

/// Starts a server behind a bad network, moves an object out and in, and stops it.
pub(crate) async fn run_lossy(options: &Run) -> Result<Report> {
    let (server, ready) = Server::start(options.peer, options.server_core, &options.dir).await?;
    let address: SocketAddr = child::text(&ready, "address")?.parse()?;
    let certificate: Vec<u8> = serde_json::from_value(ready["certificate"].clone()).context("no certificate")?;
    let proxy = Proxy::start(options, address).await?;
    let endpoint = bind(None)?;
    let connection = endpoint.connect_with(client_config(certificate)?, proxy.address, SERVER_NAME)?.await?;
    let mut report = Report::default();

    let (cpu, start) = (server.cpu_time()?, Instant::now());
    put(&connection, options.bytes).await?;
    report.add_transfer("quinn_lossy_put", options.bytes, start.elapsed(), server.cpu_time()?.saturating_sub(cpu));

    let (cpu, start) = (server.cpu_time()?, Instant::now());
    get(&connection, options.bytes).await?;
    report.add_transfer("quinn_lossy_get", options.bytes, start.elapsed(), server.cpu_time()?.saturating_sub(cpu));

    connection.close(VarInt::from_u32(0), b"");
    drop(proxy);
    server.stop().await?;
    Ok(report)
}

/// Sends a whole object.
async fn put(connection: &Connection, size: u64) -> Result<()> {
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&(size | UPLOAD).to_le_bytes()).await?;
    let mut left = size;
    while left > 0 {
        let piece = left.min(CONTENT.len() as u64);
        send.write_chunk(Bytes::from_static(&CONTENT[..piece as usize])).await?;
        left -= piece;
    }
    send.finish()?;
    let mut taken = [0; 8];
    receive.read_exact(&mut taken).await?;
    ensure!(u64::from_le_bytes(taken) == size, "{} of {size} bytes arrived", u64::from_le_bytes(taken));
    Ok(())
}

/// The bad network: a process on this one's core. Dropping it kills it.
struct Proxy {
    _process: tokio::process::Child,
    address: SocketAddr,
}

impl Proxy {
    async fn start(options: &Run, server: SocketAddr) -> Result<Self> {
        let program = options.proxy.as_ref().context("this peer needs --proxy")?;
        let mut command = tokio::process::Command::new(program);
        command.args(["--server", &server.to_string(), "--loss", &options.loss.to_string()]);
        command.args(["--delay-ms", &options.delay_ms.to_string(), "--mtu", &options.mtu.to_string()]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn().with_context(|| format!("cannot start {}", program.display()))?;
        let stdout = process.stdout.take().context("the proxy has no stdout")?;
        let line = BufReader::new(stdout).lines().next_line().await?.context("the proxy ended at once")?;
        let address = line.parse().with_context(|| format!("the proxy said {line:?}"))?;
        Ok(Self { _process: process, address })
    }
}

/// One request for a whole object.
async fn get(connection: &Connection, size: u64) -> Result<()> {
    let received = get_until(connection, size, None).await?;
    ensure!(received == size, "received {received} of {size} bytes");
    Ok(())
}

/// One request; gives up on the rest of the answer at the deadline. Returns the bytes received.
async fn get_until(connection: &Connection, size: u64, deadline: impl Into<Option<Instant>>) -> Result<u64> {
    let deadline = deadline.into();
    let (mut send, mut receive) = connection.open_bi().await?;
    send.write_all(&size.to_le_bytes()).await?;
    send.finish()?;
    let mut received = 0;
    while let Some(chunk) = receive.read_chunk(usize::MAX, true).await? {
        received += chunk.bytes.len() as u64;
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            break; // dropping the stream asks the server to stop
        }
    }
    Ok(received)
}

/// A client that trusts the server's certificate and nothing else.
fn client_config(certificate: Vec<u8>) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(certificate))?;
    let mut crypto = rustls::ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots)
        .with_no_client_auth();
    crypto.alpn_protocols = vec![ALPN.to_vec()];
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(crypto)?));
    config.transport_config(transport()?);
    Ok(config)
}

/// quinn's defaults, with windows that loopback cannot fill and streams enough for any concurrency that the command
/// line admits.
fn transport() -> Result<Arc<TransportConfig>> {
    let mut config = TransportConfig::default();
    config.stream_receive_window(VarInt::from_u32(8 << 20));
    config.receive_window(VarInt::from_u32(32 << 20));
    config.send_window(16 << 20);
    config.max_concurrent_bidi_streams(VarInt::from_u32(2048));
    Ok(Arc::new(config))
}

/// An endpoint on a free port of the loopback interface.
fn bind(server: Option<ServerConfig>) -> Result<Endpoint> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER_SIZE)?;
    socket.set_send_buffer_size(SOCKET_BUFFER_SIZE)?;
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    Ok(Endpoint::new(EndpointConfig::default(), server, socket.into(), Arc::new(TokioRuntime))?)
}
