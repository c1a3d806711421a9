use std::{net::SocketAddr, time::Duration};

use metanode_types::NodeKey;
use metanode_wire::message::{ArchivedNodeStatusReply, NodeStatusReply};

/// How a node is: sums over all its shards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeStatusInfo {
    /// Version of the node.
    pub version: String,
    /// Its key.
    pub node_key: NodeKey,
    /// Process number.
    pub pid: u32,
    /// Since it was ready; whole milliseconds.
    pub uptime: Duration,
    /// Shards.
    pub shards: u16,
    /// UDP address that it listens on.
    pub quic: SocketAddr,
    /// TCP address of its metrics page, when on.
    pub metrics: Option<SocketAddr>,
    /// Connections that are open.
    pub connections: u64,
    /// Blobs it holds.
    pub blobs: u64,
    /// Bytes of their contents.
    pub blob_bytes: u64,
    /// Bytes of its files.
    pub disk_bytes: u64,
    /// Bytes its file system has left.
    pub disk_free_bytes: u64,
    /// Bytes in the memory cache.
    pub cache_bytes: u64,
    /// Limit of the memory cache.
    pub cache_bytes_max: u64,
    /// Rescues of a parked executor with runnable tasks.
    pub shard_stalls: u64,
    /// Why it takes no writes; `None` when it does.
    pub read_only_reason: Option<String>,
}

impl NodeStatusInfo {
    /// As a message.
    pub fn to_message(&self) -> NodeStatusReply {
        NodeStatusReply {
            version: self.version.clone(),
            node_key: self.node_key.0,
            pid: self.pid,
            uptime_ms: u64::try_from(self.uptime.as_millis()).unwrap_or(u64::MAX),
            shards: self.shards,
            quic_address: self.quic.to_string(),
            metrics_address: self.metrics.map(|address| address.to_string()).unwrap_or_default(),
            connections: self.connections,
            blobs: self.blobs,
            blob_bytes: self.blob_bytes,
            disk_bytes: self.disk_bytes,
            disk_free_bytes: self.disk_free_bytes,
            cache_bytes: self.cache_bytes,
            cache_bytes_max: self.cache_bytes_max,
            shard_stalls: self.shard_stalls,
            read_only_reason: self.read_only_reason.clone().unwrap_or_default(),
        }
    }

    /// From a message; `None` when an address in it is none.
    pub fn from_message(message: &ArchivedNodeStatusReply) -> Option<Self> {
        let metrics = match message.metrics_address.as_str() {
            "" => None,
            text => Some(text.parse().ok()?),
        };
        let read_only_reason = message.read_only_reason.as_str();
        Some(Self {
            version: message.version.as_str().to_owned(),
            node_key: NodeKey(message.node_key),
            pid: message.pid.to_native(),
            uptime: Duration::from_millis(message.uptime_ms.to_native()),
            shards: message.shards.to_native(),
            quic: message.quic_address.as_str().parse().ok()?,
            metrics,
            connections: message.connections.to_native(),
            blobs: message.blobs.to_native(),
            blob_bytes: message.blob_bytes.to_native(),
            disk_bytes: message.disk_bytes.to_native(),
            disk_free_bytes: message.disk_free_bytes.to_native(),
            cache_bytes: message.cache_bytes.to_native(),
            cache_bytes_max: message.cache_bytes_max.to_native(),
            shard_stalls: message.shard_stalls.to_native(),
            read_only_reason: (!read_only_reason.is_empty()).then(|| read_only_reason.to_owned()),
        })
    }
}

#[cfg(test)]
pub(crate) fn example() -> NodeStatusInfo {
    NodeStatusInfo {
        version: "0.1.0".to_owned(),
        node_key: NodeKey([1; 32]),
        pid: 2,
        uptime: Duration::from_millis(3),
        shards: 4,
        quic: "127.0.0.1:4433".parse().unwrap(),
        metrics: None,
        connections: 5,
        blobs: 6,
        blob_bytes: 7,
        disk_bytes: 8,
        disk_free_bytes: 9,
        cache_bytes: 10,
        cache_bytes_max: 11,
        shard_stalls: 12,
        read_only_reason: Some("sync failed".to_owned()),
    }
}
