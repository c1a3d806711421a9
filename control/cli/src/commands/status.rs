//! `metanode status`.

use std::time::Duration;

use metanode_admin_api::NodeStatusInfo;
use metanode_node::admin;
use metanode_types::NodeKey;
use metanode_wire::{Ticket, message::NodeStatusReply};
use serde::Serialize;

use super::{on_runtime, with_client};
use crate::{
    args::Global,
    exit::Result,
    output::{Show, bytes, count},
    target::{addresses_of, data_folder},
};

#[derive(Debug, Serialize)]
struct Report {
    version: String,
    node: String,
    ticket: String,
    pid: u32,
    uptime_ms: u64,
    shards: u16,
    quic: String,
    metrics: Option<String>,
    connections: u64,
    blobs: u64,
    blob_bytes: u64,
    disk_bytes: u64,
    disk_free_bytes: u64,
    cache_bytes: u64,
    cache_bytes_max: u64,
    shard_stalls: u64,
    read_only_reason: Option<String>,
}

impl Report {
    fn new(status: NodeStatusReply, ticket: &Ticket) -> Self {
        let some = |text: String| Some(text).filter(|text| !text.is_empty());
        Self {
            version: status.version,
            node: NodeKey(status.node_key).to_string(),
            ticket: ticket.to_string(),
            pid: status.pid,
            uptime_ms: status.uptime_ms,
            shards: status.shards,
            quic: status.quic_address,
            metrics: some(status.metrics_address),
            connections: status.connections,
            blobs: status.blobs,
            blob_bytes: status.blob_bytes,
            disk_bytes: status.disk_bytes,
            disk_free_bytes: status.disk_free_bytes,
            cache_bytes: status.cache_bytes,
            cache_bytes_max: status.cache_bytes_max,
            shard_stalls: status.shard_stalls,
            read_only_reason: some(status.read_only_reason),
        }
    }
}

impl Show for Report {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let writes = match &self.read_only_reason {
            Some(reason) => format!("refused: {reason}"),
            None => "taken".into(),
        };
        vec![
            ("node", self.node.clone()),
            ("version", self.version.clone()),
            ("pid", self.pid.to_string()),
            ("uptime", uptime(Duration::from_millis(self.uptime_ms))),
            ("quic", self.quic.clone()),
            ("metrics", self.metrics.as_ref().map_or("off".into(), |address| format!("http://{address}/metrics"))),
            ("shards", self.shards.to_string()),
            ("connections", count(self.connections)),
            ("blobs", format!("{} with {}", count(self.blobs), bytes(self.blob_bytes))),
            ("disk", format!("{} used, {} free", bytes(self.disk_bytes), bytes(self.disk_free_bytes))),
            ("cache", format!("{} of {}", bytes(self.cache_bytes), bytes(self.cache_bytes_max))),
            ("writes", writes),
            ("stalls", format!("{} rescues of a parked shard", self.shard_stalls)),
            ("ticket", self.ticket.clone()),
        ]
    }
}

fn uptime(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3600 % 24),
    }
}

pub(super) fn run(global: &Global) -> Result<()> {
    let report = match &global.node {
        Some(ticket) => with_client(global, None, false, async |client, _| {
            Ok(Report::new(client.status().await?, &ticket.node_only()))
        })?,
        None => {
            let folder = data_folder(global)?;
            // On a thread that may wait: a node that hangs must not keep Ctrl-C from working.
            let status: NodeStatusInfo = on_runtime(async {
                let asked = tokio::task::spawn_blocking(move || admin::status(&folder)).await;
                Ok(asked.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?)
            })?;
            let ticket = Ticket { node: status.node_key, addresses: addresses_of(status.quic), hash: None };
            Report::new(status.to_message(), &ticket)
        }
    };
    global.output.print(&report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uptimes_are_readable() {
        for (seconds, text) in [(5, "5.0 s"), (65, "1 min 5 s"), (7265, "2 h 1 min"), (90_000, "1 d 1 h")] {
            assert_eq!(uptime(Duration::from_secs(seconds)), text);
        }
    }
}
