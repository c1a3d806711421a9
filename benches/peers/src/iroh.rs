//! iroh-blobs over iroh's QUIC on loopback: no relay, no address lookup, no port mapping.
//!
//! The client pushes the objects (iroh-blobs' push request) and then gets them back, each on a stream of its own and all
//! on one connection. It does only what the protocol needs of a client: the bodies of pushes are encoded before the
//! clock starts, and a get verifies every byte, as iroh does, and then drops it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bao_tree::{ChunkRanges, io::outboard::PreOrderMemOutboard};
use bytes::Bytes;
use iroh::{
    Endpoint, EndpointAddr, RelayMode,
    endpoint::{Connection, QuicTransportConfig, VarInt, presets},
    protocol::{AcceptError, ProtocolHandler, Router},
};
use iroh_blobs::{
    ALPN, Hash,
    api::Store,
    get::fsm::{self, BlobContentNext, ConnectedNext, EndBlobNext},
    protocol::{ChunkRangesSeq, GetRequest, PushRequest, RequestType},
    provider::{
        StreamPair,
        events::{EventMask, EventSender, RequestMode},
        handle_stream,
    },
    store::{IROH_BLOCK_SIZE, fs::FsStore, mem::MemStore},
};
use noq_proto::congestion::NewRenoConfig;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::{
    Run,
    child::{self, Commands, Server, number},
    measure::{Report, closed_loop, cpu_time},
    tls,
};

/// Size of a small object.
const OBJECT_SIZE: usize = 4096;
/// Seed of the first object that the server adds by itself; the pushed objects' are below.
const ADD_SEED: u64 = 1 << 32;

/// Serves a memory store until the parent goes.
pub(crate) async fn serve_memory(commands: Commands) -> Result<()> {
    serve(commands, MemStore::new().into()).await
}

/// Serves a file store, with iroh's default options, in a temporary folder until the parent goes.
pub(crate) async fn serve_files(commands: Commands, dir: &Path) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("metanode-peers-").tempdir_in(dir)?;
    let store = FsStore::load(folder.path()).await.context("cannot open the store")?;
    serve(commands, store.into()).await?;
    folder.close().context("cannot remove the store")
}

/// The first line has the address and the endpoint's identity. `settle N` waits until N requests have been handled and
/// the store has committed them; `add COUNT CONCURRENCY SECONDS_MAX` adds objects without the network.
async fn serve(mut commands: Commands, store: Store) -> Result<()> {
    let endpoint = bind().await?;
    let address = *endpoint.bound_sockets().first().context("the endpoint has no socket")?;
    let id = endpoint.id().to_string();
    let handled = Arc::new(Handled::default());
    let protocol = Blobs { store: store.clone(), events: events(), handled: handled.clone() };
    let router = Router::builder(endpoint).accept(ALPN, protocol).spawn();

    child::answer(&json!({ "address": address.to_string(), "id": id }))?;
    while let Some(command) = commands.next().await {
        let answer = match command.split(' ').collect::<Vec<_>>()[..] {
            ["settle", count] => {
                handled.reach(count.parse()?).await;
                commit(&store).await?;
                json!({ "failed": handled.failed.load(Ordering::Relaxed) })
            }
            ["add", count, concurrency, seconds_max] => {
                add(&store, count.parse()?, concurrency.parse()?, seconds_max.parse()?).await?
            }
            _ => bail!("unknown command {command:?}"),
        };
        child::answer(&answer)?;
    }
    router.shutdown().await.ok();
    store.shutdown().await.ok();
    Ok(())
}

/// Adds objects through the store's own interface, in this process, and commits them. Answers with their rate and this
/// process's CPU time for each.
async fn add(store: &Store, count: usize, concurrency: u32, seconds_max: f64) -> Result<Value> {
    let seeds = ADD_SEED..ADD_SEED + count as u64;
    let objects: Arc<Vec<Bytes>> = Arc::new(seeds.map(|seed| object(seed, OBJECT_SIZE).into()).collect());
    let adder = store.clone();
    let operation = move |index: usize| {
        let (objects, adder) = (objects.clone(), adder.clone());
        async move {
            // A temporary tag: a named one would cost another write. Nothing collects garbage here.
            drop(adder.blobs().add_bytes(objects[index].clone()).temp_tag().await?);
            Ok(())
        }
    };
    let (cpu, start) = (cpu_time(process::id())?, Instant::now());
    let deadline = start + Duration::from_secs_f64(seconds_max.clamp(0.1, 60.0));
    let mut done = closed_loop(count, concurrency, deadline, operation).await?;
    commit(store).await?;
    done.elapsed = start.elapsed();
    let cpu = cpu_time(process::id())?.saturating_sub(cpu);
    Ok(json!({ "ops": done.rate(), "server_us": cpu.as_secs_f64() * 1e6 / done.count.max(1) as f64 }))
}

/// Ends the file store's current write transaction; nothing to a memory store.
async fn commit(store: &Store) -> Result<()> {
    store.sync_db().await.context("cannot commit the store")
}

/// Requests that the server is done with.
#[derive(Debug, Default)]
struct Handled {
    count: AtomicU64,
    failed: AtomicU64,
    changed: Notify,
}

impl Handled {
    fn add(&self, succeeded: bool) {
        if !succeeded {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_waiters();
    }

    async fn reach(&self, count: u64) {
        loop {
            let changed = self.changed.notified();
            if self.count.load(Ordering::Relaxed) >= count {
                return;
            }
            changed.await;
        }
    }
}

/// iroh-blobs' own `BlobsProtocol` with a count of handled requests: the loop is `provider::handle_connection`.
#[derive(Debug)]
struct Blobs {
    store: Store,
    events: EventSender,
    handled: Arc<Handled>,
}

impl ProtocolHandler for Blobs {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        while let Ok(pair) = StreamPair::accept(&connection, self.events.clone()).await {
            let (store, handled) = (self.store.clone(), self.handled.clone());
            tokio::spawn(async move { handled.add(handle_stream(pair, store).await.is_ok()) });
        }
        Ok(())
    }
}

/// Pushes are refused by default; otherwise no events, which is the cheapest.
fn events() -> EventSender {
    let mask = EventMask { push: RequestMode::None, ..EventMask::DEFAULT };
    EventSender::channel(1, mask).0
}

/// Starts a server, measures it and stops it. `name` is the peer's part of the keys.
pub(crate) async fn run(options: &Run, name: &str) -> Result<Report> {
    // The server's own folder goes in one of ours: it goes away even if the server has to be killed.
    let folder = tempfile::Builder::new().prefix("metanode-peers-").tempdir_in(&options.dir)?;
    let (server, ready) = Server::start(options.peer, options.server_core, folder.path()).await?;
    let endpoint = bind().await?;
    let id = child::text(&ready, "id")?.parse().context("the server's identity is unreadable")?;
    let address: SocketAddr = child::text(&ready, "address")?.parse()?;
    let connection = endpoint.connect(EndpointAddr::new(id).with_ip_addr(address), ALPN).await?;

    let mut session = Session { options, name, server, connection, handled: 0, report: Report::default() };
    let hashes = session.put_small().await?;
    session.get_small(hashes).await?;
    session.add_small().await?;
    let hash = session.put_large().await?;
    session.get_large(hash).await?;

    session.connection.close(VarInt::from_u32(0), b"");
    endpoint.close().await;
    session.server.stop().await?;
    Ok(session.report)
}

/// A client and its server while they are measured.
struct Session<'run> {
    options: &'run Run,
    name: &'run str,
    server: Server,
    connection: Connection,
    /// Requests that the server will have handled once those so far are done.
    handled: u64,
    report: Report,
}

impl Session<'_> {
    /// Pushes the small objects; returns the hashes of those that the server has.
    ///
    /// iroh-blobs does not acknowledge a push. Each operation ends when the transport has delivered it, and the clock
    /// stops when the server has handled all of them and committed its store, once.
    async fn put_small(&mut self) -> Result<Vec<Hash>> {
        let count = self.options.count as usize;
        let pushes: Vec<Push> =
            (0..count).map(|index| Push::new(&object(index as u64, OBJECT_SIZE))).collect::<Result<_>>()?;
        let mut hashes: Vec<Hash> = pushes.iter().map(|push| push.hash).collect();

        let (pushes, connection) = (Arc::new(pushes), self.connection.clone());
        let operation = move |index: usize| {
            let (pushes, connection) = (pushes.clone(), connection.clone());
            async move { pushes[index].send(&connection).await }
        };
        let (cpu, start) = (self.server.cpu_time()?, Instant::now());
        let mut done = closed_loop(count, self.options.concurrency, self.options.deadline(), operation).await?;
        self.settle(done.count).await?;
        done.elapsed = start.elapsed();
        let cpu = self.server.cpu_time()?.saturating_sub(cpu);
        self.report.add_operations(&format!("put_4k_{}", self.name), &mut done, cpu);
        hashes.truncate(done.count);
        Ok(hashes)
    }

    /// Gets each of the small objects once.
    async fn get_small(&mut self, hashes: Vec<Hash>) -> Result<()> {
        let (count, hashes, connection) = (hashes.len(), Arc::new(hashes), self.connection.clone());
        let operation = move |index: usize| {
            let (hash, connection) = (hashes[index], connection.clone());
            async move {
                let received = get(&connection, hash, None).await?;
                ensure!(received == OBJECT_SIZE as u64, "received {received} bytes of a small object");
                Ok(())
            }
        };
        let cpu = self.server.cpu_time()?;
        let mut done = closed_loop(count, self.options.concurrency, self.options.deadline(), operation).await?;
        let cpu = self.server.cpu_time()?.saturating_sub(cpu);
        self.handled += done.count as u64;
        self.report.add_operations(&format!("get_4k_{}", self.name), &mut done, cpu);
        Ok(())
    }

    /// Has the server add small objects by itself: what its store can do when nothing else uses its core.
    async fn add_small(&mut self) -> Result<()> {
        let Run { count, concurrency, seconds_max, .. } = self.options;
        let added = self.server.ask(&format!("add {count} {concurrency} {seconds_max}")).await?;
        for key in ["ops", "server_us"] {
            self.report.add(format!("add_4k_{}_{key}", self.name), number(&added, key)?);
        }
        Ok(())
    }

    /// Pushes the large object, to the commit of the store.
    async fn put_large(&mut self) -> Result<Hash> {
        let push = Push::new(&object(u64::MAX, usize::try_from(self.options.bytes)?))?;
        let (cpu, start) = (self.server.cpu_time()?, Instant::now());
        push.send(&self.connection).await?;
        self.settle(1).await?;
        let (elapsed, cpu) = (start.elapsed(), self.server.cpu_time()?.saturating_sub(cpu));
        self.report.add_transfer(&format!("put_1g_{}", self.name), self.options.bytes, elapsed, cpu);
        Ok(push.hash)
    }

    /// Gets the large object back, or as much of it as the deadline allows.
    async fn get_large(&mut self, hash: Hash) -> Result<()> {
        let (cpu, start) = (self.server.cpu_time()?, Instant::now());
        let received = get(&self.connection, hash, Some(self.options.deadline())).await?;
        let (elapsed, cpu) = (start.elapsed(), self.server.cpu_time()?.saturating_sub(cpu));
        self.report.add_transfer(&format!("get_1g_{}", self.name), received, elapsed, cpu);
        Ok(())
    }

    /// Waits until the server has handled `count` more requests and committed its store.
    async fn settle(&mut self, count: usize) -> Result<()> {
        self.handled += count as u64;
        let settled = self.server.ask(&format!("settle {}", self.handled)).await?;
        ensure!(settled["failed"] == 0, "the server failed requests: {settled}");
        Ok(())
    }
}

/// One object as it goes over the wire.
struct Push {
    hash: Hash,
    message: Bytes,
}

impl Push {
    /// Encodes the request (one byte of type, then the length-prefixed request), the size (8 bytes, little-endian) and
    /// the object with the inner hashes that verify it, as `iroh_blobs::api::remote::Remote::execute_push` sends them.
    fn new(object: &[u8]) -> Result<Self> {
        let outboard = PreOrderMemOutboard::create(object, IROH_BLOCK_SIZE);
        let hash = Hash::from(outboard.root);
        let request = postcard::to_stdvec(&PushRequest::new(hash, ChunkRangesSeq::root()))?;
        let mut message = Vec::with_capacity(128 + object.len() + outboard.data.len());
        message.push(RequestType::Push as u8);
        message.append(&mut postcard::to_stdvec(request.as_slice())?); // a slice is its length, then its bytes
        message.extend_from_slice(&(object.len() as u64).to_le_bytes());
        bao_tree::io::sync::encode_ranges(object, &outboard, &ChunkRanges::all(), &mut message)?;
        Ok(Self { hash, message: message.into() })
    }

    /// Sends it and waits until the transport has delivered it.
    async fn send(&self, connection: &Connection) -> Result<()> {
        let (mut send, _receive) = connection.open_bi().await?;
        send.write_chunk(self.message.clone()).await?;
        send.finish()?;
        send.stopped().await?;
        Ok(())
    }
}

/// Gets an object, verifies it and drops it; gives up on the rest at the deadline. Returns the verified bytes.
async fn get(connection: &Connection, hash: Hash, deadline: Option<Instant>) -> Result<u64> {
    let connected = fsm::start(connection.clone(), GetRequest::blob(hash), Default::default()).next().await?;
    let ConnectedNext::StartRoot(root) = connected.next().await? else { bail!("not a blob") };
    let (mut content, _size) = root.next().next().await?;
    let end = loop {
        match content.next().await {
            BlobContentNext::More((rest, item)) => {
                item?;
                if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    return Ok(rest.stats().payload_bytes_read);
                }
                content = rest;
            }
            BlobContentNext::Done(end) => break end,
        }
    };
    let EndBlobNext::Closing(closing) = end.next() else { bail!("more than a blob") };
    Ok(closing.next().await?.payload_bytes_read)
}

/// Pseudo-random content (xorshift64*), different for each seed.
fn object(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut object = Vec::with_capacity(size + 8);
    while object.len() < size {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        object.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    object.truncate(size);
    object
}

/// An endpoint on a free port of the loopback interface, with streams enough for any concurrency that the command line
/// admits and the congestion controller that measured fastest; the rest, the windows too, is iroh's defaults.
async fn bind() -> Result<Endpoint> {
    let transport = QuicTransportConfig::builder()
        .max_concurrent_bidi_streams(VarInt::from_u32(2048))
        .congestion_controller_factory(Arc::new(NewRenoConfig::default()))
        .build();
    let endpoint = Endpoint::builder(presets::Minimal)
        .crypto_provider(tls::provider())
        .relay_mode(RelayMode::Disabled)
        .transport_config(transport)
        .clear_ip_transports()
        .bind_addr((Ipv4Addr::LOCALHOST, 0))?
        .bind()
        .await?;
    Ok(endpoint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_differ_and_are_random() {
        let (one, other) = (object(1, OBJECT_SIZE), object(2, OBJECT_SIZE));
        assert_eq!(one.len(), OBJECT_SIZE);
        assert_ne!(one, other);
        assert_ne!(object(0, OBJECT_SIZE), one); // 0 and 1 must not share a state
        assert_eq!(object(1, 13), one[..13]);
    }
}
