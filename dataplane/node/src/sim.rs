//! A node on a simulated machine and network.
//!
//! Inside a [`World`](metanode_shard::sim::World) everything from a datagram to the disk is the node's own code: the QUIC driver,
//! sessions, lanes, transfers, budgets, the store. What is missing is what surrounds them in a process: threads, signals, the local
//! socket, the metrics page, the data folder with its keys.

use std::{path::PathBuf, rc::Rc, sync::Arc, time::Duration};

use metanode_crypto::{Identity, tls::CryptoProvider};
use metanode_quic::{Datagram, Endpoint, ShardSocket};
use metanode_shard::{ShardCount, Stalls, Task, mesh::Mesh, now};
use metanode_store::{Store, StoreShared};

use crate::{
    Config, NodeError,
    counters::ShardCounters,
    run::{FORWARD_CAPACITY, quic_config},
    session::Shard,
    shard::{drain, look_after, serve},
    state::NodeState,
};

/// What a node is made of.
#[derive(Debug)]
pub struct Parts {
    /// Who it is.
    pub identity: Identity,
    /// What TLS computes with.
    pub crypto: Arc<CryptoProvider>,
    /// What an operator can set. Where to listen and what the store is told is decided by the other parts.
    pub config: Config,
    /// What its stores share.
    pub store: StoreShared,
    /// One a shard, in order.
    pub stores: Vec<Store>,
    /// One a shard, in order.
    pub sockets: Vec<ShardSocket>,
}

/// A node that serves, until this is dropped.
pub struct Serving {
    shards: Vec<(Rc<Shard>, Rc<Endpoint>)>,
    _lookers: Vec<[Task<()>; 2]>,
}

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Serving({} shards)", self.shards.len())
    }
}

impl Serving {
    /// Starts to serve.
    ///
    /// # Panics
    /// When there is no shard, or not as many sockets as stores.
    pub fn start(parts: Parts) -> Result<Self, NodeError> {
        let Parts { identity, crypto, config, store, stores, sockets } = parts;
        assert_eq!(stores.len(), sockets.len(), "one socket a shard");
        let count = u16::try_from(stores.len()).ok().and_then(ShardCount::new).expect("there are shards");
        let failed = || NodeError::io("start a simulated node");
        let quic = quic_config(&identity, crypto, &config.quic, config.store.upload_window_bytes, false, count)?;
        let config = Arc::new(config);
        let state = Arc::new(NodeState {
            node_key: identity.public(),
            ready: Default::default(),
            quic: sockets[0].local_address().map_err(failed())?,
            metrics: None,
            config: config.clone(),
            data_path: PathBuf::new(),
            shards: count.iter().map(|_| Arc::new(ShardCounters::default())).collect(),
            ledger: None,
            stalls: Stalls::new(count),
            store,
            stop: Default::default(),
        });
        let forward = Mesh::<Datagram>::new(count, FORWARD_CAPACITY);
        let mut serving = Self { shards: Vec::new(), _lookers: Vec::new() };
        for (((store, socket), forward), shard) in stores.into_iter().zip(sockets).zip(forward).zip(count.iter()) {
            let this = Shard::new(store, state.clone(), &config, None);
            serving._lookers.push(look_after(&this));
            let endpoint = Endpoint::new(socket, quic.clone(), shard, count, forward).map_err(failed())?;
            serve(&this, endpoint.clone());
            serving.shards.push((this, endpoint));
        }
        Ok(serving)
    }

    /// Ends in order: what is begun has this time, then connections and stores are closed.
    pub async fn stop(self, patience: Duration) {
        for (shard, endpoint) in &self.shards {
            drain(shard, endpoint, now() + patience).await;
        }
        for (shard, _) in &self.shards {
            if let Err(error) = shard.store.shutdown().await {
                tracing::warn!(%error, "a store was not closed in order");
            }
        }
    }
}
