//! The text of the page.

use std::{fmt::Write as _, sync::Arc};

use metanode_shard::{
    ShardId,
    metrics::{Histogram, TextWriter},
};

use crate::{
    counters::{LedgerCounters, Operation, ShardCounters},
    state::{NodeState, VERSION},
};

/// A metric that each shard has: name, help, value.
type Column = (&'static str, &'static str, fn(&ShardCounters) -> u64);

/// Where the page's numbers come from.
pub(crate) struct PageSource {
    pub(crate) state: Arc<NodeState>,
    /// By shard.
    pub(crate) quic: Vec<Arc<metanode_quic::Counters>>,
}

impl PageSource {
    /// The page as of now.
    pub(crate) fn text(&self) -> String {
        let mut writer = TextWriter::new();
        self.node(&mut writer);
        self.shards(&mut writer);
        if let Some(counters) = &self.state.ledger {
            ledger(counters, &mut writer);
        }
        let quic: Vec<_> =
            self.quic.iter().enumerate().map(|(shard, counters)| (shard_id(shard), &**counters)).collect();
        metanode_quic::Counters::write(&quic, &mut writer);
        for shard in self.state.store.shards().iter() {
            self.state.store.counters(shard).write(&mut writer, &shard.to_string());
        }
        group_families(&writer.finish())
    }

    fn node(&self, to: &mut TextWriter) {
        let state = &self.state;
        to.gauge_value("node_build_info", "Version of the node, as a label.", &[("version", VERSION)], 1.0);
        to.gauge_value("node_uptime_seconds", "Since the node was ready.", &[], state.uptime().as_secs_f64());
        to.gauge_value("node_shards", "Executors.", &[], state.shards.len() as f64);
        if let Some(bytes) = resident_bytes() {
            to.gauge_value("process_resident_memory_bytes", "Resident memory of the process.", &[], bytes as f64);
        }
        let free = state.disk_free_bytes();
        to.gauge_value("node_disk_free_bytes", "Room on the file system of the data folder.", &[], free as f64);
        let read_only = f64::from(u8::from(state.store.read_only_reason().is_some()));
        to.gauge_value("node_read_only", "1 when the store takes no writes.", &[], read_only);
        let limit = state.memory_limit_bytes() as f64;
        let help = "What the resident memory stays below, by the configuration and what is there.";
        to.gauge_value("node_memory_limit_bytes", help, &[], limit);
        let cache_max = state.config.store.cache_bytes as f64;
        to.gauge_value("store_cache_bytes_max", "Limit of the memory cache, all shards together.", &[], cache_max);
    }

    fn shards(&self, to: &mut TextWriter) {
        let labels: Vec<(String, &ShardCounters)> =
            self.state.shards.iter().enumerate().map(|(shard, counters)| (shard.to_string(), &**counters)).collect();
        for (at, (shard, _)) in labels.iter().enumerate() {
            let help = "Times an executor was found parked with runnable tasks and was rescued.";
            let stalls = self.state.stalls.of(shard_id(at));
            to.counter_value("shard_stalls_total", help, &[("shard", shard)], stalls);
        }
        for &operation in Operation::ALL {
            // One histogram for the node: a series for each shard would be 14,000 lines on 64 of them.
            let sum = Histogram::default();
            labels.iter().for_each(|(_, counters)| sum.merge(&counters.seconds[operation]));
            let help = "From a request's arrival to the hand-over of its answer to QUIC; bulk transfers to their end.";
            to.histogram("request_seconds", help, &[("operation", operation.name())], &sum);
        }
        for (shard, counters) in &labels {
            for &operation in Operation::ALL {
                let labels = [("shard", shard.as_str()), ("operation", operation.name())];
                let count = counters.seconds[operation].count();
                to.counter_value("requests_total", "Requests answered, refusals included.", &labels, count);
            }
        }
        for (shard, counters) in &labels {
            for (code, count) in counters.refusals() {
                let name = snake_case(&format!("{code:?}"));
                let labels = [("shard", shard.as_str()), ("code", name.as_str())];
                to.counter_value("requests_refused_total", "Requests refused, by code.", &labels, count);
            }
        }
        let counters: &[Column] = &[
            ("received_bytes_total", "Bytes of frames and bulk data received.", |c| c.bytes_in.value()),
            ("sent_bytes_total", "Bytes of frames and bulk data handed to QUIC.", |c| c.bytes_out.value()),
            ("cached_gets_total", "GETs answered from the shard's own cache without a task.", |c| {
                c.cached_gets.value()
            }),
            ("protocol_errors_total", "Streams that violated the protocol.", |c| c.protocol_errors.value()),
            ("connections_accepted_total", "Connections accepted.", |c| c.connections_accepted.value()),
            ("connections_stalled_total", "Connections closed since they kept memory and did not move.", |c| {
                c.stalled.value()
            }),
        ];
        for (name, help, value) in counters {
            for (shard, counters) in &labels {
                to.counter_value(name, help, &[("shard", shard)], value(counters));
            }
        }
        let gauges: &[Column] = &[
            ("connections_open", "Connections that are open.", |c| c.connections.value()),
            ("requests_waiting", "Requests that wait for the store.", |c| c.requests_waiting.value()),
            ("upload_bytes", "Bytes of uploads not yet stored.", |c| c.upload_bytes.value()),
            ("download_bytes", "Bytes of answers that clients have not taken.", |c| c.download_bytes.value()),
            ("bulk_transfers", "Bulk transfers that run.", |c| c.bulk_transfers.value()),
        ];
        for (name, help, value) in gauges {
            for (shard, counters) in &labels {
                to.gauge_value(name, help, &[("shard", shard)], value(counters) as f64);
            }
        }
    }
}

fn ledger(of: &LedgerCounters, to: &mut TextWriter) {
    let gauges = [
        ("ledger_height", "Last final height.", &of.height),
        ("ledger_executed_height", "Last executed height.", &of.executed),
        ("ledger_round", "Round that the next height is in.", &of.round),
        ("ledger_votes", "1 when this node votes.", &of.votes),
        (
            "ledger_quorum_lacks",
            "Validators that lack to a quorum, when a round can't begin for want of it.",
            &of.quorum_lacks,
        ),
        ("ledger_connected", "Validators and peers that this node has a connection to.", &of.connected),
        ("ledger_waiting_transactions", "Transactions that wait for a batch.", &of.waiting),
        ("ledger_waiting_bytes", "Their bytes.", &of.waiting_bytes),
        ("ledger_open_batches", "Batches that no block names.", &of.batches),
    ];
    for (name, help, gauge) in gauges {
        to.gauge_value(name, help, &[], gauge.value() as f64);
    }
    let counters = [
        ("ledger_transactions_total", "Transactions that were executed.", &of.transactions),
        ("ledger_transactions_done_total", "Of them those that did what they should.", &of.done),
        ("ledger_round_timeouts_total", "Rounds that ended without a block.", &of.timeouts),
        ("ledger_messages_sent_total", "Messages of the protocol, one for each receiver.", &of.messages),
        ("ledger_message_bytes_sent_total", "Their bytes.", &of.message_bytes),
        ("ledger_messages_refused_total", "Messages that counted for nothing.", &of.refused),
        ("ledger_signatures_checked_total", "Signatures of validators' messages.", &of.signatures),
    ];
    for (name, help, counter) in counters {
        to.counter_value(name, help, &[], counter.value());
    }
    let help = "From this node's proposals to their quorums of commits.";
    to.histogram("ledger_finality_seconds", help, &[], &of.finality);
    to.histogram("ledger_sign_sync_seconds", "Syncs of the sign state.", &[], &of.syncs);
}

fn shard_id(index: usize) -> ShardId {
    ShardId(u16::try_from(index).expect("at most SHARDS_MAX shards"))
}

/// Brings the samples of each metric together: the format wants them in one group, and parts are written shard by shard.
fn group_families(text: &str) -> String {
    let mut families: Vec<(&str, String)> = Vec::new();
    let mut at = 0;
    let mut repeated = false;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("# HELP ").and_then(|rest| rest.split(' ').next()) {
            let known = families.iter().position(|(family, _)| *family == name);
            repeated = known.is_some();
            at = known.unwrap_or(families.len());
            if !repeated {
                families.push((name, String::new()));
            }
        }
        if !(repeated && line.starts_with('#')) {
            writeln!(families[at].1, "{line}").expect("writing to a string does not fail");
        }
    }
    families.into_iter().map(|(_, text)| text).collect()
}

/// `NotFound` as `not_found`.
fn snake_case(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 4);
    for character in name.chars() {
        if character.is_ascii_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.push(character.to_ascii_lowercase());
    }
    out
}

/// Resident memory of this process: the second number of `statm`, in pages.
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_of_a_metric_come_together() {
        let part = |shard: &str| {
            let mut writer = TextWriter::new();
            writer.counter_value("a_total", "A.", &[("shard", shard)], 1);
            writer.counter_value("b_total", "B.", &[("shard", shard)], 2);
            writer.finish()
        };
        let expected = concat!(
            "# HELP a_total A.\n# TYPE a_total counter\n",
            "a_total{shard=\"0\"} 1\na_total{shard=\"1\"} 1\n",
            "# HELP b_total B.\n# TYPE b_total counter\n",
            "b_total{shard=\"0\"} 2\nb_total{shard=\"1\"} 2\n",
        );
        assert_eq!(group_families(&(part("0") + &part("1"))), expected);
    }

    #[test]
    fn this_process_takes_memory() {
        assert!(resident_bytes().is_some_and(|bytes| bytes > 100_000));
        assert_eq!(snake_case("HashMismatch"), "hash_mismatch");
    }
}
