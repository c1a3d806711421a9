//! What all threads of a node may look at.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use metanode_admin_api::{NodeStatusInfo, StoreStatus};
use metanode_shard::Stalls;
use metanode_store::{StoreCounters, StoreShared};
use metanode_types::NodeKey;

use crate::{
    config::Config,
    counters::{LedgerCounters, ShardCounters},
    memory::{self, Present},
};

/// Version in every report.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What this node calls itself in `Welcome`.
pub(crate) const AGENT: &str = concat!("metanode-node/", env!("CARGO_PKG_VERSION"));

/// Facts and counters of the running node. Reading never waits for a shard.
#[derive(Debug)]
pub(crate) struct NodeState {
    pub(crate) node_key: NodeKey,
    /// When it began to serve.
    pub(crate) ready: OnceLock<Instant>,
    pub(crate) quic: SocketAddr,
    pub(crate) metrics: Option<SocketAddr>,
    pub(crate) config: Arc<Config>,
    /// Where the disk's room is asked for.
    pub(crate) data_path: PathBuf,
    /// One a shard, in order.
    pub(crate) shards: Vec<Arc<ShardCounters>>,
    /// Of a node with a ledger.
    pub(crate) ledger: Option<Arc<LedgerCounters>>,
    pub(crate) stalls: Stalls,
    pub(crate) store: StoreShared,
    /// Set once the node is to stop; the control thread looks at it.
    pub(crate) stop: AtomicBool,
}

impl NodeState {
    /// Asks for an orderly end.
    pub(crate) fn request_stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// Whether an orderly end was asked for.
    pub(crate) fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// From now on the node serves.
    pub(crate) fn mark_ready(&self) {
        self.ready.get_or_init(Instant::now);
    }

    /// Since it serves.
    pub(crate) fn uptime(&self) -> Duration {
        self.ready.get().map(Instant::elapsed).unwrap_or_default()
    }

    /// Sums over all shards. statvfs(2) of a local file system answers from memory.
    pub(crate) fn status(&self) -> NodeStatusInfo {
        let sum = |of: fn(&ShardCounters) -> u64| self.shards.iter().map(|shard| of(shard)).sum();
        NodeStatusInfo {
            version: VERSION.to_owned(),
            node_key: self.node_key,
            pid: std::process::id(),
            uptime: self.uptime(),
            shards: u16::try_from(self.shards.len()).unwrap_or(u16::MAX),
            quic: self.quic,
            metrics: self.metrics,
            connections: sum(|shard| shard.connections.value()),
            blobs: sum(|shard| shard.usage.blobs.value()),
            blob_bytes: sum(|shard| shard.usage.blob_bytes.value()),
            disk_bytes: sum(|shard| shard.usage.segment_bytes.value()),
            disk_free_bytes: self.disk_free_bytes(),
            cache_bytes: sum(|shard| shard.usage.cache_bytes.value()),
            cache_bytes_max: self.config.store.cache_bytes,
            shard_stalls: self.stalls.total(),
            read_only_reason: self.store.read_only_reason(),
        }
    }

    /// Bytes of memory that the node stays below, with the connections and blobs that there are.
    pub(crate) fn memory_limit_bytes(&self) -> u64 {
        let sum = |of: fn(&ShardCounters) -> u64| self.shards.iter().map(|shard| of(shard)).sum();
        let present = Present {
            connections: sum(|shard| shard.connections.value()),
            blobs: sum(|shard| shard.usage.blobs.value()),
            blob_bytes: sum(|shard| shard.usage.blob_bytes.value()),
        };
        memory::limit_bytes(&self.config, self.shards.len() as u64, present)
    }

    /// The store's numbers, summed over all shards. Work that was asked for is done when the last shard has done it.
    pub(crate) fn store_status(&self) -> StoreStatus {
        let counters: Vec<_> = self.store.shards().iter().map(|shard| self.store.counters(shard)).collect();
        let sum = |of: fn(&StoreCounters) -> u64| counters.iter().map(|shard| of(shard)).sum();
        let least = |of: fn(&StoreCounters) -> u64| counters.iter().map(|shard| of(shard)).min().unwrap_or(0);
        StoreStatus {
            blobs: sum(|c| c.blobs.value()),
            blob_bytes: sum(|c| c.blob_bytes.value()),
            segments: sum(|c| c.segments.value()),
            segment_bytes: sum(|c| c.segment_bytes.value()),
            orphan_bytes: sum(|c| c.orphan_bytes.value()),
            compacted_segments: sum(|c| c.compacted_segments.value()),
            compact_done: least(|c| c.compact_done.value()),
            scrubbing_shards: sum(|c| c.scrub_running.value()),
            scrub_done: least(|c| c.scrub_done.value()),
            scrub_bytes: sum(|c| c.scrub_bytes.value()),
            scrub_corrupt: sum(|c| c.scrub_corrupt.value()),
            corrupt_reads: sum(|c| c.corrupt_reads.value()),
            survey_done: least(|c| c.survey_done.value()),
        }
    }

    /// Bytes that the data folder's file system has left for us; 0 when it can't say.
    pub(crate) fn disk_free_bytes(&self) -> u64 {
        rustix::fs::statvfs(&self.data_path).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}
