//! A ledger's folder is opened, and its chain executed from a snapshot or from the beginning.

use std::{
    collections::HashSet,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use metanode_crypto::{Identity, tls};
use metanode_ibft::{Certificate, ChainId, Height, Message, Record};
use metanode_ledger::{Batch, Block, BlockError, Chain, Genesis, GenesisError};
use metanode_mempool::{BoardLimits, WaitingLimits};
use metanode_quic::{Datagram, Endpoint, PortGroup};
use metanode_replica::{Config as ReplicaConfig, Replica};
use metanode_shard::{Companion, ShardCount, ShardId, fs, mesh::Mesh, now, sleep, spawn_local, unix_ms};
use metanode_store::{Store, StoreError};
use metanode_types::{Hash, NodeKey};
use metanode_wal::{FILE_BYTES, Opened, Opening, SignState, Wal, WalError};
use metanode_wire::Ticket;

use super::{
    application::{self, App, Watch},
    blocks::{batches_of, whole},
    checks::Checks,
    files::{self, Addresses, Arrivals},
    links::{Dialling, Links},
    outcomes::Outcomes,
    replay::{DIAL_PAUSE, ReplayError, Replayed, Sources},
    results::Results,
    snapshots,
    validator::{Counting, Detach as _, Parts, Validator, clock},
    voice::{self, Said},
    voting::Voting,
};
use crate::{
    config::{Config, LedgerConfig},
    counters::LedgerCounters,
    data::DataFolder,
};

/// A connection to a validator that says nothing for so long is lost, and made again.
const IDLE_TIME_MAX: Duration = Duration::from_secs(10);

/// A packet each so often shows that it is not.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Largest genesis file: a million accounts of some hundred bytes.
const GENESIS_BYTES_MAX: u64 = 256 << 20;

/// Why a ledger can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// A file or folder.
    #[error("can't {what} {}: {source}", path.display())]
    Io {
        /// A verb.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The genesis file.
    #[error("{}: {source}", path.display())]
    Genesis {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        source: GenesisError,
    },
    /// The folder is of another chain than the genesis.
    #[error("{} is of the chain {found}, the genesis file of {}: it was changed, or the folder is another one's", path.display(), Hash(chain.0))]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// Its chain.
        found: String,
        /// The genesis's.
        chain: ChainId,
    },
    /// The sign state.
    #[error("sign state: {0}")]
    SignState(#[from] WalError),
    /// The sign state says something that it can't.
    #[error("sign state {}: {what}", path.display())]
    Said {
        /// Where.
        path: PathBuf,
        /// What.
        what: &'static str,
    },
    /// The chain has blocks to come that this program does not know.
    #[error("{0}: a program that knows them goes on")]
    NotSupported(BlockError),
    /// The application in this process does not do what it should.
    #[error("the application: {0}")]
    Application(String),
    /// A block that is stored can't be read.
    #[error("block {height}: {why}")]
    Block {
        /// Which.
        height: u64,
        /// Why not.
        why: String,
    },
    /// A block that is stored does not follow.
    #[error("block {height} does not follow: {source}")]
    DoesNotFollow {
        /// Which.
        height: u64,
        /// Why not.
        source: BlockError,
    },
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> LedgerError + use<'a> {
    move |source| LedgerError::Io { what, path: path.to_owned(), source }
}

/// What a ledger starts with.
pub(crate) struct LedgerSeed {
    genesis: Genesis,
    folder: PathBuf,
    identity: Identity,
    sign: Option<(Opening, Opened)>,
    config: LedgerConfig,
    crypto: Arc<tls::CryptoProvider>,
    quic: metanode_quic::Config,
    listen: SocketAddr,
    ticket: Ticket,
    counters: Arc<LedgerCounters>,
    /// Of an application in a process of its own.
    socket: Option<PathBuf>,
    watch: Arc<Watch>,
}

impl LedgerSeed {
    /// What is to be seen of its application.
    pub(crate) fn watch(&self) -> Arc<Watch> {
        self.watch.clone()
    }

    /// What it will count.
    pub(crate) fn counters(&self) -> Arc<LedgerCounters> {
        self.counters.clone()
    }
}

/// Reads a genesis file.
fn read_genesis(path: &Path) -> Result<Genesis, LedgerError> {
    let size = path.metadata().map_err(io_error("read", path))?.len();
    if size > GENESIS_BYTES_MAX {
        let what = io::Error::other(format!("larger than {GENESIS_BYTES_MAX} bytes"));
        return Err(io_error("read", path)(what));
    }
    let text = std::fs::read_to_string(path).map_err(io_error("read", path))?;
    Genesis::from_json(&text).map_err(|source| LedgerError::Genesis { path: path.to_owned(), source })
}

/// Opens what must be open before a node starts; `None` when it has no ledger. Waits for the disk.
pub(crate) fn prepare(
    data: &DataFolder,
    config: &Config,
    crypto: Arc<tls::CryptoProvider>,
    quic: metanode_quic::Config,
    ticket: Ticket,
) -> Result<Option<LedgerSeed>, LedgerError> {
    if config.ledger.genesis.is_empty() {
        return Ok(None);
    }
    let genesis = read_genesis(&data.path().join(&config.ledger.genesis))?;
    let (chain, folder) = (genesis.chain(), files::folder(data.path()));
    match files::claim(&folder, &chain).map_err(io_error("open", &folder))? {
        Ok(()) => {}
        Err(found) => return Err(LedgerError::Foreign { path: folder, found, chain }),
    }
    let sign_folder = files::sign_folder(&folder);
    let sign = match is_begun(&sign_folder) {
        false => None,
        true => {
            let state = SignState::acquire(&sign_folder, chain.0, data.node_identity().clone())?;
            Some(metanode_wal::open(state, FILE_BYTES)?)
        }
    };
    let mut quic = quic;
    (quic.idle_timeout, quic.keep_alive) = (IDLE_TIME_MAX, Some(KEEP_ALIVE));
    Ok(Some(LedgerSeed {
        genesis,
        folder,
        identity: data.node_identity().clone(),
        sign,
        config: config.ledger.clone(),
        crypto,
        quic,
        listen: config.quic.listen,
        ticket,
        counters: Arc::default(),
        socket: application_socket(data, &config.ledger),
        watch: Arc::default(),
    }))
}

/// Where the application of a data folder's node listens, if it is a process of its own.
pub fn application_socket(data: &DataFolder, config: &LedgerConfig) -> Option<PathBuf> {
    (!config.application.is_empty()).then(|| data.path().join(&config.application))
}

fn is_begun(sign_folder: &Path) -> bool {
    fs::exists(sign_folder.join("sign-0.wal")) || fs::exists(sign_folder.join("sign-1.wal"))
}

/// Whether the node of a data folder has a sign state for its chain.
pub fn has_sign_state(data: &DataFolder) -> bool {
    is_begun(&files::sign_folder(&files::folder(data.path())))
}

/// Begins a sign state for the key of a data folder and the chain of a genesis: from then on it may vote. Only for a key that has never
/// signed on this chain, or whose earlier signatures can't matter any more: who forgets what it has signed can be made to contradict it.
pub fn begin_sign_state(data: &DataFolder, genesis: &Genesis) -> Result<(), LedgerError> {
    let (chain, folder) = (genesis.chain(), files::folder(data.path()));
    match files::claim(&folder, &chain).map_err(io_error("open", &folder))? {
        Ok(()) => {}
        Err(found) => return Err(LedgerError::Foreign { path: folder, found, chain }),
    }
    let state = SignState::acquire(&files::sign_folder(&folder), chain.0, data.node_identity().clone())?;
    // It knows of nothing that was signed up to here.
    let path = folder.join("blocks");
    let stored = if fs::exists(&path) { path.metadata().map_err(io_error("read", &path))?.len() } else { 0 };
    metanode_wal::create(state, FILE_BYTES, &[voice::mark(files::places(stored))])?;
    Ok(())
}

/// What the chain of a folder comes to.
struct Executed {
    replayed: Replayed,
    results: Results,
    /// Blocks that the sign state has decided, and the store does not have.
    unstored: Vec<(Block, Certificate)>,
}

/// Starts a ledger on this shard: its chain is executed first.
pub(crate) async fn start(seed: LedgerSeed, store: Store) -> Result<Rc<Validator>, LedgerError> {
    let LedgerSeed { genesis, folder, identity, sign, config, crypto, quic, listen, ticket, counters, socket, watch } =
        seed;
    let (id, began) = (genesis.chain(), now());
    let blocks_path = folder.join("blocks");
    let (block_list, addresses) =
        Addresses::open(blocks_path.clone(), id).await.map_err(io_error("open", &blocks_path))?;
    let (arrivals, arrived) = Arrivals::open(&folder, id).await.map_err(io_error("open lists in", &folder))?;
    let outcomes_path = folder.join("outcomes");
    let outcomes = Outcomes::open(outcomes_path.clone(), id).await.map_err(io_error("open", &outcomes_path))?;
    let sign_folder = files::sign_folder(&folder);
    let (wal, said) = match sign {
        None => (None, Said::default()),
        Some((opening, opened)) => {
            let said =
                voice::read(&opened.records).map_err(|what| LedgerError::Said { path: sign_folder.clone(), what })?;
            (Some(Wal::start(opening)?), said)
        }
    };
    let owner = application::owner_of(&folder).map_err(io_error("look at", &folder))?;
    let app = App::start(socket, owner, watch.clone()).map_err(io_error("start a thread for", &folder))?;
    let scribe = Companion::start("snapshot", 1).map_err(io_error("start a thread for", &folder))?;
    snapshots::clean(&folder).await.map_err(io_error("list", &folder))?;
    let checks = Checks::start(id).map_err(io_error("start a thread for", &folder))?;

    let sources = Sources {
        genesis: &genesis,
        folder: &folder,
        store: &store,
        app: &app,
        addresses: &addresses,
        snapshots_up_to: outcomes.kept().get(),
    };
    let opened = execute_all(&sources, &outcomes, &said, config.outcomes_max as usize, &watch).await?;
    watch.set_waits(None);
    let Executed { replayed: Replayed { chain, root, named, from: snapshot }, results, unstored } = opened;
    if let Err(source @ BlockError::NotSupported { .. }) = chain.validators() {
        return Err(LedgerError::NotSupported(source));
    }
    let silent = reason_for_silence(wal.is_some(), &said, addresses.len() as u64);
    if let Some(why) = &silent {
        tracing::warn!("this node says nothing on the chain: {why}");
    }
    let next = chain.tip().height.next();
    // What is about the next height is what it goes on with.
    let from = if said.height > next.0 { Height(said.height) } else { Height(0) };
    let is_alone = chain.system().validators(next).iter().all(|key| *key == identity.public());
    let commits = said.records.iter().filter_map(|record| match record {
        Record::Cast(Message::Commit(signed)) => Some(signed.payload),
        _ => None,
    });
    let voting = Voting::new(silent, from, is_alone, commits);
    let batches = open_batches(&store, &chain, &named, snapshot, &arrived).await;
    let digests = || batches.iter().map(Batch::digest).collect();
    arrivals.begin_anew(digests).await.map_err(io_error("write lists in", &folder))?;

    let endpoint = dialling_endpoint(listen, quic).map_err(io_error("make a socket for", &folder))?;
    let dialling = Dialling { endpoint, identity: identity.clone(), crypto, ticket, chain: id };
    let links = Links::new(dialling, &config.peers, counters.clone());
    let replica = Replica::restore(
        replica_config(&config, identity.public(), Rc::new(Counting(counters.clone()))),
        &genesis,
        chain,
        &batches,
        &said.records,
        false, // until it is seen that it may
        clock(began),
    );
    tracing::info!(
        chain = %Hash(id.0), name = genesis.name, snapshot = snapshot.0, height = replica.chain().tip().height.0,
        batches = batches.len(), "the ledger is open, after {:.1} s", (now() - began).as_secs_f64()
    );
    let this = Validator::new(Parts {
        genesis,
        identity,
        store,
        replica,
        wal,
        said: said.raw,
        app,
        root,
        checks,
        block_list,
        arrivals,
        block_addresses: addresses,
        links,
        results,
        outcomes,
        folder,
        snapshot_heights: config.snapshot_heights,
        scribe,
        voting,
        began,
        counters,
    });
    batches.iter().for_each(|batch| this.batches.borrow_mut().insert(batch));
    this.to_store.borrow_mut().extend(unstored);
    this.run();
    this.links.start(&this);
    Ok(this)
}

fn replica_config(config: &LedgerConfig, me: NodeKey, verifier: Rc<Counting>) -> ReplicaConfig {
    ReplicaConfig {
        me: Some(me),
        waiting: WaitingLimits {
            transactions_max: config.waiting_max as usize,
            bytes_max: config.waiting_bytes_max as usize,
            peer_bytes_max: config.client_bytes_max as usize,
            ..WaitingLimits::default()
        },
        board: BoardLimits::default(),
        batch_number: unix_ms(), // above those of former lives
        verifier,
    }
}

/// Why a node that could vote does not.
fn reason_for_silence(has_sign_state: bool, said: &Said, stored: u64) -> Option<String> {
    if !has_sign_state {
        let why = "there is no sign state for its key: what it has signed before, if anything, is not known";
        return Some(format!("{why} (`metanode ledger sign` begins one)"));
    }
    (said.height < stored).then(|| {
        format!(
            "its sign state ends at height {}, the chain here at {stored}: it is older, so what the key has signed since is not known",
            said.height
        )
    })
}

/// Executes what is stored, and what the sign state has decided beyond that. Waits for the application.
async fn execute_all(
    sources: &Sources<'_>,
    outcomes: &Outcomes,
    said: &Said,
    outcomes_max: usize,
    watch: &Watch,
) -> Result<Executed, LedgerError> {
    loop {
        let gone = match try_to_execute_all(sources, outcomes, said, outcomes_max).await {
            Ok(executed) => return Ok(executed),
            Err(ReplayError::Ledger(error)) => return Err(error),
            Err(ReplayError::Gone(gone)) => gone,
        };
        let Some(socket) = sources.app.socket() else { return Err(LedgerError::Application(gone.0)) };
        if watch.waits().as_ref() != Some(&gone.0) {
            tracing::warn!(socket = %socket.display(), "the ledger waits for its application: {}", gone.0);
            watch.set_waits(Some(gone.0));
        }
        sleep(DIAL_PAUSE).await;
    }
}

async fn try_to_execute_all(
    sources: &Sources<'_>,
    outcomes: &Outcomes,
    said: &Said,
    outcomes_max: usize,
) -> Result<Executed, ReplayError> {
    sources.app.connect(sources.genesis.chain()).await?;
    let mut replayed = sources.begin().await?;
    let results = Results::new(outcomes_max, outcomes.kept().get(), secret()?);
    let stored = Height(sources.addresses.len() as u64);
    let note = async |executed| take(&results, outcomes, executed, sources.folder).await;
    sources.follow_stored(&mut replayed, stored, note).await?;
    let mut unstored = Vec::new();
    for record in &said.records {
        if let Record::Decision(decided) = record
            && decided.0.header.height == replayed.chain.tip().height.next()
        {
            // It was decided by one who had all batches, or is to get them: then others have them still.
            if batches_of(sources.store, &decided.0, |_| None).await.is_err() {
                break;
            }
            let executed = sources.follow(&mut replayed, &decided.0).await?;
            take(&results, outcomes, executed, sources.folder).await?;
            unstored.push((**decided).clone());
        }
    }
    Ok(Executed { replayed, results, unstored })
}

/// Notes what became of transactions, on disk if there are many.
async fn take(
    results: &Results,
    outcomes: &Outcomes,
    executed: metanode_ledger::Executed,
    folder: &Path,
) -> Result<(), LedgerError> {
    let height = executed.height;
    results.add(executed);
    if results.unkept().0 {
        outcomes.want(height);
        outcomes.keep_wanted(results).await.map_err(io_error("write outcomes in", folder))?;
    }
    Ok(())
}

/// A number that nobody else knows.
fn secret() -> Result<u64, LedgerError> {
    let mut secret = [0; 8];
    metanode_shard::fill_random(&mut secret).map_err(io_error("draw a number for", Path::new("the ledger")))?;
    Ok(u64::from_le_bytes(secret))
}

/// Batches that no block has named yet and one may name still. The others are removed, as far as no block has named them.
async fn open_batches(
    store: &Store,
    chain: &Chain,
    named: &HashSet<Hash>,
    from: Height,
    arrived: &[Hash],
) -> Vec<Batch> {
    let mut open = Vec::new();
    for digest in arrived.iter().filter(|digest| !named.contains(*digest)) {
        let Ok(bytes) = whole(store, *digest).await else { continue };
        let Ok(batch) = Batch::decode(bytes) else { continue };
        match chain.check_batch(digest, &batch.facts()) {
            Ok(()) => {
                open.push(batch);
                continue;
            }
            Err(BlockError::OrderedBefore(_)) => continue,
            // A block before the snapshot might have named it. It should not be on the list then; what is removed is gone.
            Err(BlockError::ExpiredBatch(_)) if from > Height(0) => continue,
            Err(_) => {}
        }
        match store.remove_kept(*digest).await {
            Ok(()) | Err(StoreError::NotFound) => {}
            Err(error) => tracing::warn!("batch {digest} is not removed: {error}"),
        }
    }
    open
}

/// A socket to dial from.
fn dialling_endpoint(listen: SocketAddr, config: metanode_quic::Config) -> io::Result<Rc<Endpoint>> {
    let one = ShardCount::new(1).expect("one is within the limit");
    let (_, mut sockets) = PortGroup::bind(SocketAddr::new(listen.ip(), 0), one)?;
    let socket = sockets.pop().expect("one socket for one shard");
    let forward = Mesh::<Datagram>::new(one, 1).pop().expect("one port for one shard");
    let endpoint = Endpoint::new(socket, config, ShardId(0), one, forward)?;
    endpoint.begin_shutdown(); // nobody is to come in here
    spawn_local(endpoint.clone().run(|_| ())).detach_quietly();
    Ok(endpoint)
}
