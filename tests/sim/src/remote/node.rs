//! One life of the node, inside its world.

use std::{cell::RefCell, path::PathBuf, rc::Rc, time::Duration};

use metanode_crypto::Identity;
use metanode_node::{
    Config,
    sim::{Parts, Serving},
};
use metanode_quic::ShardSocket;
use metanode_shard::{sim::Network, yield_now};
use metanode_store::{Store, StoreConfig, StoreShared, mesh};
use metanode_types::{NodeKey, ShardCount};
use tokio::sync::oneshot;

use super::{NODE_ADDRESS, tls};
use crate::{model::Model, plan::SEGMENT_BYTES};

/// Little, so that reads come from the disk as well.
const CACHE_BYTES: u64 = 512 << 10;

/// A disk that fails now and then may fail a start that often in a row.
const STARTS_MAX: usize = 40;

/// What requests that are under way have when the node is stopped.
const STOP_PATIENCE: Duration = Duration::from_secs(3);

pub(super) struct Setting {
    pub(super) identity: Identity,
    pub(super) writers: Vec<NodeKey>,
    pub(super) shards: ShardCount,
    pub(super) stopped: oneshot::Receiver<()>,
}

/// Opens the store, serves until it is told to stop, and closes in order.
pub(super) async fn live(setting: Setting, network: &Network, model: &Rc<RefCell<Model>>) {
    let Setting { identity, writers, shards, stopped } = setting;
    let mut store_config = StoreConfig::new(PathBuf::from("/store"), shards);
    store_config.segment_bytes = SEGMENT_BYTES;
    store_config.cache_bytes_max = CACHE_BYTES;
    let store = match (0..STARTS_MAX).map(|_| StoreShared::open(store_config.clone())).find(Result::is_ok) {
        Some(Ok(store)) => store,
        _ => {
            yield_now().await; // when the power has failed meanwhile, this is the end
            // No disk of these fails for ever.
            return model.borrow_mut().violation("the store can't be opened".to_owned());
        }
    };
    let recovery = store.recovery();
    if recovery.rot_bytes > 0 || recovery.damaged_blobs > 0 {
        model.borrow_mut().violation(format!("nothing rotted, and recovery reports {recovery:?}"));
    }
    let mut stores = Vec::new();
    for (port, shard) in mesh(shards).into_iter().zip(shards.iter()) {
        match Store::open(store.clone(), shard, port).await {
            Ok(store) => stores.push(store),
            Err(error) => return model.borrow_mut().violation(format!("a partition could not be opened: {error}")),
        }
    }
    let mut config = Config::default();
    config.access.writers = writers;
    config.quic.listen = NODE_ADDRESS.parse().expect("a constant");
    let sockets = network.bind(config.quic.listen, shards.get().into());
    let sockets = sockets.into_iter().map(ShardSocket::simulated).collect();
    match Serving::start(Parts { identity, crypto: tls::crypto(), config, store, stores, sockets }) {
        Ok(serving) => {
            let _ = stopped.await; // nobody tells it when its life ends otherwise
            serving.stop(STOP_PATIENCE).await;
        }
        Err(error) => model.borrow_mut().violation(format!("the node could not be started: {error}")),
    }
}
