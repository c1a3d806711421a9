//! The life of a node, from the lock to the last sync.
//!
//! The control thread (the caller of [`run`](fn@run)) starts everything, then waits for a reason to stop, then takes everything down in the
//! opposite order: clients first, then the stores of all shards, then the shards. Each step is a command to every shard and an
//! answer from every shard; no step begins before all have answered the one before, since a shard may need another one's part
//! of the store until the end.

mod assemble;
mod conduct;

#[cfg(feature = "sim")]
pub(crate) use assemble::{FORWARD_CAPACITY, quic_config};

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, PoisonError},
    time::Duration,
};

use metanode_crypto::tls::TlsConfigError;
use metanode_shard::{ShardPanic, signal::install_stop_signals};
use metanode_store::{OpenError, StoreError};
use metanode_wire::Ticket;

use crate::{
    config::{Config, ConfigError},
    data::{DataError, DataFolder},
    run::{assemble::Assembly, conduct::Conductor},
};

/// Time that requests in flight have to finish when the node stops.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(3);

/// Time for the whole end. Service managers kill after some tens of seconds; until then the reason should be in the log.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);

/// How often the control thread looks for a stop over the local socket and for shards that ended.
const LOOK_PERIOD: Duration = Duration::from_millis(100);

/// What a node says when it serves.
#[derive(Debug, Clone)]
pub struct Ready {
    /// UDP address that it listens on, with the real port.
    pub quic: SocketAddr,
    /// TCP address of its metrics page, when on.
    pub metrics: Option<SocketAddr>,
    /// Names the node: its key and its addresses.
    pub ticket: Ticket,
    /// Its process number.
    pub pid: u32,
}

/// Why a node did not start, or ended otherwise than it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The data folder.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store could not be opened.
    #[error("store: {0}")]
    Store(#[from] OpenError),
    /// The store could not be closed: what was acknowledged as durable is durable, the next start has more to read.
    #[error("closing the store: {0}")]
    StoreClosing(StoreError),
    /// The ledger.
    #[error("ledger: {0}")]
    Ledger(#[from] crate::ledger::LedgerError),
    /// The TLS configuration.
    #[error(transparent)]
    Tls(#[from] TlsConfigError),
    /// QUIC limits that this build does not take.
    #[error("quic: {0}")]
    Quic(#[from] metanode_quic::ConfigError),
    /// A shard panicked: a defect of this program.
    #[error("{0}; this is a defect, please report it with the log")]
    Shard(#[from] ShardPanic),
    /// The thread that recovers the store panicked: a defect of this program.
    #[error("recovery of the store has panicked; this is a defect, please report it with the log")]
    RecoveryPanicked,
    /// A shard ended though nobody told it to.
    #[error("a shard ended by itself")]
    ShardEnded,
    /// The end took too long. What was acknowledged as durable is durable.
    #[error("the node did not {what} in time and was given up")]
    Overdue {
        /// The step: a verb.
        what: &'static str,
    },
    /// The operating system refused something.
    #[error("can't {what}: {source}")]
    Io {
        /// What was tried: a verb and its object.
        what: String,
        /// How it failed.
        source: io::Error,
    },
}

impl NodeError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// Runs a node until SIGTERM, SIGINT or a stop over the local socket; `ready` is called once, when it serves.
///
/// Call it before other threads exist: it blocks the two signals in this thread and those it starts, and waits for them here.
/// `Ok` means that everything is synced and released. After an error threads of the node may remain; end the process.
#[expect(clippy::needless_pass_by_value, reason = "the node owns its folder and configuration from here on")]
pub fn run(data: DataFolder, config: Config, ready: impl FnOnce(&Ready)) -> Result<(), NodeError> {
    let signals = install_stop_signals().map_err(NodeError::io("block the stop signals"))?;
    config.validate()?;
    let stoppers = crate::admin::Stoppers::default(); // told last: the end of their streams is the end of the node
    let lock = Arc::new(data.lock()?);
    crate::placement::raise_descriptor_limit();

    let Some(store) = assemble::open_store(&data, &config, &signals, lock.clone())? else {
        tracing::info!("stopped before the store was open");
        return Ok(());
    };
    let Assembly { state, shards, running, metrics } = assemble::assemble(&data, &config, store)?;
    let mut conductor = Conductor::new(shards, running);
    let metrics = metrics.map(|page| page.serve(&state)).transpose()?;
    if !conductor.open(&signals)? {
        return conductor.end_unserved(); // a signal came first
    }
    let socket: PathBuf = data.place_admin_socket()?;
    let admin = crate::admin::serve(&socket, state.clone(), stoppers.clone())
        .map_err(NodeError::io(format!("listen on {}", socket.display())))?;
    conductor.serve()?;

    state.mark_ready();
    tracing::info!(
        key = %state.node_key, quic = %state.quic, shards = state.shards.len(), pid = std::process::id(), "the node serves"
    );
    let ticket = assemble::ticket(state.node_key, state.quic);
    ready(&Ready { quic: state.quic, metrics: state.metrics, ticket, pid: std::process::id() });

    let reason = conductor.wait(&signals, || state.stop_requested());
    let ended = match reason {
        Ok(reason) => {
            tracing::info!("stopping: {reason}");
            conductor.shut_down()
        }
        Err(error) => conductor.abandon(error),
    };
    if let Err(error) = std::fs::remove_file(&socket) {
        tracing::warn!("{}: {error}", socket.display());
    }
    drop((admin, metrics));
    drop(lock);
    stoppers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    match &ended {
        Ok(()) => tracing::info!("stopped"),
        Err(error) => tracing::error!("stopped: {error}"),
    }
    ended
}
