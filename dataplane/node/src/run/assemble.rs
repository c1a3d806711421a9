//! Puts the parts of a node together.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use metanode_crypto::{Identity, NodeSecret, tls};
use metanode_quic::{Datagram, PortGroup, steer::Layout};
use metanode_shard::{
    ShardCount, Shards, ShardsConfig,
    mesh::{Injector, Mesh},
    signal::StopSignals,
};
use metanode_store::{StoreConfig, StoreShared};
use metanode_types::NodeKey;
use metanode_wire::Ticket;

use super::{LOOK_PERIOD, NodeError, conduct::look};
use crate::{
    acceptor::Acceptor,
    config::{Config, LedgerShard, QuicConfig},
    counters::ShardCounters,
    data::{DataFolder, DataLock},
    ledger::{self, LedgerSeed},
    metrics::{self, PageSource},
    placement,
    session::{READER_WINDOW_BYTES, RECEIVE_WINDOW_BYTES},
    shard::{self, Command, Event, Seed},
    state::NodeState,
};

/// Datagrams on their way from one shard to another: a few milliseconds of a busy connection that changed its address.
pub(crate) const FORWARD_CAPACITY: usize = 1024;

/// Commands that a shard has not taken: all there are.
const COMMANDS_CAPACITY: usize = 8;

/// Everything that runs, and the page that does not yet.
pub(super) struct Assembly {
    pub(super) state: Arc<NodeState>,
    pub(super) shards: Shards<()>,
    pub(super) running: Running,
    pub(super) metrics: Option<MetricsPage>,
}

/// The ways to the shards and back.
pub(super) struct Running {
    pub(super) commands: Vec<Injector<Command>>,
    pub(super) events: mpsc::Receiver<Event>,
}

/// The metrics page before it is served.
pub(super) struct MetricsPage {
    listener: TcpListener,
    quic: Vec<Arc<metanode_quic::Counters>>,
}

/// The store's shared part, recovered, and where the shards will run.
pub(super) struct OpenStore {
    shared: StoreShared,
    shards: ShardsConfig,
    layout: Layout,
}

/// Opens the store. Recovery reads what the last life left, so a signal may come first: `None`. The thread that recovers then
/// goes on until it is done or the process ends, and keeps the folder locked as long.
pub(super) fn open_store(
    data: &DataFolder,
    config: &Config,
    signals: &StopSignals,
    lock: Arc<DataLock>,
) -> Result<Option<OpenStore>, NodeError> {
    let cores = placement::cores(&config.node).map_err(NodeError::io("place the shards"))?;
    let shards = ShardsConfig::new("shard", cores.into_iter().map(Some).collect());
    let layout = layout(config, shards.count()).map_err(NodeError::io("place the shards"))?;
    let store_config = store_config(data, config, layout.shards());
    let (done, opened) = mpsc::channel();
    let opening = move || {
        done.send(StoreShared::open(store_config)).ok();
        drop(lock);
    };
    thread::Builder::new().name("recovery".to_owned()).spawn(opening).map_err(NodeError::io("start a thread"))?;
    let shared = loop {
        match opened.recv_timeout(LOOK_PERIOD) {
            Ok(opened) => break opened?,
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(NodeError::RecoveryPanicked),
            Err(mpsc::RecvTimeoutError::Timeout) if look(signals)?.is_some() => return Ok(None),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
    };
    tracing::info!(recovery = ?shared.recovery(), "the store is open");
    Ok(Some(OpenStore { shared, shards, layout }))
}

/// Binds the ports and starts the shards; they begin to open their parts of the store.
pub(super) fn assemble(data: &DataFolder, config: &Config, store: OpenStore) -> Result<Assembly, NodeError> {
    let OpenStore { shared: store, shards: started, layout } = store;
    let count = layout.all();

    let (quic_address, sockets) = PortGroup::bind(config.quic.listen, layout)
        .map_err(NodeError::io(format!("listen on {}", config.quic.listen)))?;
    let metrics_listener = match config.metrics.listen {
        None => None,
        Some(address) => Some(metrics::bind(address).map_err(NodeError::io(format!("serve metrics on {address}")))?),
    };
    let metrics_address = metrics_listener.as_ref().map(TcpListener::local_addr).transpose();

    let crypto = tls::provider(&cipher_suites(&config.quic))?;
    let window_bytes = config.store.upload_window_bytes;
    let has_ledger = !config.ledger.genesis.is_empty();
    let quic =
        quic_config(data.node_identity(), crypto.clone(), &config.quic, window_bytes, has_ledger, layout.shards())?;
    let ticket = ticket(data.node_identity().public(), quic_address);
    let mut ledger = ledger::prepare(data, config, crypto, quic.clone(), ticket)?;
    let quic_counters: Vec<Arc<metanode_quic::Counters>> = count.iter().map(|_| Arc::default()).collect();
    let config = Arc::new(config.clone());
    let state = Arc::new(NodeState {
        node_key: data.node_identity().public(),
        ready: Default::default(),
        quic: quic_address,
        metrics: metrics_address.map_err(NodeError::io("find the metrics port"))?,
        config: config.clone(),
        data_path: data.path().to_owned(),
        shards: count.iter().map(|_| Arc::new(ShardCounters::default())).collect(),
        ledger: ledger.as_ref().map(LedgerSeed::counters),
        stalls: started.stalls.clone(),
        store: store.clone(),
        stop: Default::default(),
    });

    let (events_sender, events) = mpsc::channel();
    let mut commands = Vec::new();
    let forward = Mesh::<Datagram>::new(count, FORWARD_CAPACITY);
    let ledger_ports: Vec<Option<_>> = match has_ledger {
        true => ledger::mesh(layout).into_iter().map(Some).collect(),
        false => count.iter().map(|_| None).collect(),
    };
    let mut parts = sockets.into_iter().zip(forward).zip(metanode_store::mesh(count)).zip(ledger_ports);
    let shards = metanode_shard::start(&started, |shard| {
        let (((socket, forward), store_port), ledger_port) = parts.next().expect("one part a shard");
        let (injector, commands_port) = Injector::new(COMMANDS_CAPACITY);
        commands.push(injector);
        let seed = Seed {
            shard,
            layout,
            config: config.clone(),
            quic: quic.clone(),
            quic_counters: quic_counters[shard.index()].clone(),
            socket,
            forward,
            store: store.clone(),
            store_port,
            ledger: if shard == ledger::home(layout) { ledger.take() } else { None },
            ledger_port,
            state: state.clone(),
            commands: commands_port,
            events: events_sender.clone(),
        };
        move || shard::run(seed)
    })
    .map_err(NodeError::io("start the shards (io_uring is needed)"))?;

    let metrics = metrics_listener.map(|listener| MetricsPage { listener, quic: quic_counters });
    Ok(Assembly { state, shards, running: Running { commands, events }, metrics })
}

impl MetricsPage {
    pub(super) fn serve(self, state: &Arc<NodeState>) -> Result<Acceptor, NodeError> {
        let source = PageSource { state: state.clone(), quic: self.quic };
        metrics::serve(self.listener, source).map_err(NodeError::io("serve metrics"))
    }
}

/// Shards from which on the ledger has one of its own, unless the configuration says otherwise.
const OWN_SHARD_FROM: u16 = 4;

/// Which shards share the clients, and which one the ledger has for itself.
fn layout(config: &Config, shards: ShardCount) -> io::Result<Layout> {
    let has_ledger = !config.ledger.genesis.is_empty();
    let is_apart = match config.ledger.shard {
        LedgerShard::Auto => shards.get() >= OWN_SHARD_FROM,
        LedgerShard::Own => true,
        LedgerShard::Shared => false,
    };
    if !has_ledger || !is_apart {
        return Ok(shards.into());
    }
    let others = ShardCount::new(shards.get() - 1).ok_or_else(|| {
        let why = "ledger.shard: a shard of its own takes two shards at least (node.shards)";
        io::Error::new(io::ErrorKind::InvalidInput, why)
    })?;
    Ok(Layout::with_apart(others))
}

fn store_config(data: &DataFolder, config: &Config, count: ShardCount) -> StoreConfig {
    let mut store = StoreConfig::new(data.store_path(), count);
    store.cache_bytes_max = config.store.cache_bytes;
    store.segment_bytes = config.store.segment_bytes;
    store.index_entries_max = config.store.index_entries_max;
    store.scrub_period =
        (config.store.scrub_hours > 0).then(|| Duration::from_secs(3600 * u64::from(config.store.scrub_hours)));
    store.scrub_bytes_per_second = config.store.scrub_bytes_per_second;
    store
}

pub(crate) fn cipher_suites(config: &QuicConfig) -> Vec<tls::CipherSuite> {
    config.cipher_suites.iter().map(|suite| (*suite).into()).collect()
}

pub(crate) fn quic_config(
    identity: &Identity,
    crypto: Arc<tls::CryptoProvider>,
    config: &QuicConfig,
    window_bytes: u64,
    has_ledger: bool,
    count: ShardCount,
) -> Result<metanode_quic::Config, NodeError> {
    let protocols: &[&[u8]] = if has_ledger { &[tls::ALPN_RELAY, tls::ALPN_BPI] } else { &[tls::ALPN_RELAY] };
    let tls = tls::server_with(crypto, identity, protocols)?;
    let mut quic = metanode_quic::Config::new(Arc::new(tls), &NodeSecret::of(identity));
    quic.max_concurrent_bidi_streams = config.streams_max;
    quic.idle_timeout = Duration::from_secs(config.idle_timeout_s.into());
    quic.handshake_timeout = Duration::from_secs(config.handshake_timeout_s.into());
    quic.connections_max = config.connections_max.div_ceil(count.get().into()) as usize;
    quic.connections_per_address_max = if config.listen.ip().is_loopback() {
        quic.connections_max
    } else {
        config.connections_per_address_max as usize
    };
    quic.incoming_retry_threshold = config.retry_threshold as usize;
    quic.handshakes_max = config.handshakes_max as usize;
    quic.mtu_max = config.mtu_max;
    quic.congestion = config.congestion;
    // A stream may use all that its connection may; the connection's window is what is widened.
    quic.stream_receive_window = u32::try_from(window_bytes.max(RECEIVE_WINDOW_BYTES)).unwrap_or(u32::MAX);
    quic.receive_window = u32::try_from(READER_WINDOW_BYTES).expect("a constant that fits");
    quic.validate()?;
    Ok(quic)
}

/// Names the node by addresses that clients can use: a wildcard address is none.
pub(super) fn ticket(node: NodeKey, listening: SocketAddr) -> Ticket {
    let port = listening.port();
    let addresses = if !listening.ip().is_unspecified() {
        vec![listening]
    } else {
        let (any, loopback, far): (IpAddr, IpAddr, IpAddr) = match listening {
            SocketAddr::V4(_) => (
                Ipv4Addr::UNSPECIFIED.into(),
                Ipv4Addr::LOCALHOST.into(),
                Ipv4Addr::new(192, 0, 2, 1).into(), // RFC 5737
            ),
            SocketAddr::V6(_) => (
                Ipv6Addr::UNSPECIFIED.into(),
                Ipv6Addr::LOCALHOST.into(),
                Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into(), // RFC 3849
            ),
        };
        let own = source_address(any, far).filter(|ip| !ip.is_loopback() && !ip.is_unspecified());
        own.into_iter().chain([loopback]).map(|ip| SocketAddr::new(ip, port)).collect()
    };
    Ticket { node, addresses, hash: None }
}

/// The address that this machine would send to `far` from. Connecting a UDP socket sends nothing.
fn source_address(any: IpAddr, far: IpAddr) -> Option<IpAddr> {
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((far, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_never_names_a_wildcard() {
        let key = NodeKey([1; 32]);
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        assert_eq!(ticket(key, address("10.0.0.1:5")).addresses, [address("10.0.0.1:5")]);
        for (wildcard, loopback) in [("0.0.0.0:5", "127.0.0.1:5"), ("[::]:5", "[::1]:5")] {
            let addresses = ticket(key, address(wildcard)).addresses;
            assert!(addresses.contains(&address(loopback)), "{addresses:?}");
            assert!(addresses.iter().all(|address| !address.ip().is_unspecified()), "{addresses:?}");
        }
    }
}
