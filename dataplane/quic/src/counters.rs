use metanode_shard::metrics::{Counter, Gauge, TextWriter};
use metanode_types::ShardId;

/// One metric as [`Counters::visit`] shows it.
#[derive(Debug, Clone, Copy)]
pub enum Metric<'a> {
    /// Only grows.
    Counter(&'a Counter),
    /// Grows and shrinks.
    Gauge(&'a Gauge),
}

/// Label names and values of a metric.
pub type StaticLabels = &'static [(&'static str, &'static str)];

macro_rules! counters {
    ($(#[doc = $doc:literal] $field:ident: $kind:ident = $name:literal, $labels:expr;)*) => {
        /// What one shard's endpoint did. Any thread may read; only the shard writes.
        #[derive(Debug, Default)]
        pub struct Counters {
            $(#[doc = $doc] pub $field: $kind,)*
        }

        impl Counters {
            /// Shows every metric: name, help, labels, metric. Those of one name follow each other.
            pub fn visit(&self, mut visit: impl FnMut(&'static str, &'static str, StaticLabels, Metric<'_>)) {
                $(visit($name, $doc.trim_ascii(), $labels, Metric::$kind(&self.$field));)*
            }
        }
    };
}

counters! {
    /// UDP datagrams received.
    datagrams_received: Counter = "quic_datagrams_received_total", &[];
    /// UDP datagrams sent.
    datagrams_sent: Counter = "quic_datagrams_sent_total", &[];
    /// Bytes of UDP payload received.
    bytes_received: Counter = "quic_bytes_received_total", &[];
    /// Bytes of UDP payload sent.
    bytes_sent: Counter = "quic_bytes_sent_total", &[];
    /// System calls that received.
    receive_calls: Counter = "quic_receive_calls_total", &[];
    /// System calls that sent.
    send_calls: Counter = "quic_send_calls_total", &[];
    /// Times the driver had nothing to do and waited.
    parks: Counter = "quic_driver_parks_total", &[];
    /// Datagrams handed to the shard they belong to.
    forwarded_out: Counter = "quic_forwarded_out_total", &[];
    /// Datagrams received from other shards.
    forwarded_in: Counter = "quic_forwarded_in_total", &[];
    /// Datagrams that belonged to no connection and got no answer, or wait with the first packet of a queued handshake.
    ignored: Counter = "quic_datagrams_ignored_total", &[];
    /// Datagrams dropped.
    dropped_forward_full: Counter = "quic_datagrams_dropped_total", &[("reason", "forward_full")];
    /// Datagrams dropped.
    dropped_handshake_queue: Counter = "quic_datagrams_dropped_total", &[("reason", "handshake_queue_full")];
    /// Datagrams dropped.
    dropped_handshakes_max: Counter = "quic_datagrams_dropped_total", &[("reason", "handshakes_max")];
    /// Datagrams dropped.
    dropped_responses: Counter = "quic_datagrams_dropped_total", &[("reason", "response_queue_full")];
    /// Connections that exist, half-open and draining ones included.
    connections: Gauge = "quic_connections", &[];
    /// Connections whose handshake is under way.
    handshaking: Gauge = "quic_connections_handshaking", &[];
    /// Handshakes begun.
    handshakes_begun: Counter = "quic_handshakes_begun_total", &[];
    /// Handshakes ended.
    handshakes_done: Counter = "quic_handshakes_total", &[("result", "done")];
    /// Handshakes ended.
    handshakes_failed: Counter = "quic_handshakes_total", &[("result", "failed")];
    /// Handshakes ended.
    handshakes_timed_out: Counter = "quic_handshakes_total", &[("result", "timed_out")];
    /// First packets refused; a client's hello has one or two.
    refused_full: Counter = "quic_connections_refused_total", &[("reason", "connections_max")];
    /// First packets refused; a client's hello has one or two.
    refused_address: Counter = "quic_connections_refused_total", &[("reason", "connections_per_address_max")];
    /// First packets refused; a client's hello has one or two.
    refused_shutdown: Counter = "quic_connections_refused_total", &[("reason", "shutdown")];
    /// First packets answered with a demand to prove the address.
    retries: Counter = "quic_retries_total", &[];
    /// Stateless resets sent.
    resets_sent: Counter = "quic_stateless_resets_sent_total", &[];
    /// Connections lost.
    lost_by_peer: Counter = "quic_connections_lost_total", &[("reason", "closed_by_peer")];
    /// Connections lost.
    lost_closed: Counter = "quic_connections_lost_total", &[("reason", "closed")];
    /// Connections lost.
    lost_timed_out: Counter = "quic_connections_lost_total", &[("reason", "timed_out")];
    /// Connections lost.
    lost_reset: Counter = "quic_connections_lost_total", &[("reason", "reset")];
    /// Connections lost.
    lost_error: Counter = "quic_connections_lost_total", &[("reason", "protocol_error")];
    /// Transmits that met a full send buffer and waited for room.
    transmits_parked: Counter = "quic_transmits_parked_total", &[];
    /// Transmits that the kernel refused for another reason.
    send_errors: Counter = "quic_send_errors_total", &[];
    /// Receives that failed.
    receive_errors: Counter = "quic_receive_errors_total", &[];
}

impl Counters {
    /// Writes the counters of several shards, each sample with a label `shard`.
    pub fn write(all: &[(ShardId, &Self)], writer: &mut TextWriter) {
        // The format wants all samples of a name in one run: first the names, then every shard for each.
        let mut names: Vec<&'static str> = Vec::new();
        all.iter().take(1).for_each(|(_, counters)| counters.visit(|name, _, _, _| names.push(name)));
        names.dedup();
        for wanted in names {
            for (shard, counters) in all {
                let shard = shard.to_string();
                counters.visit(|name, help, labels, metric| {
                    if name != wanted {
                        return;
                    }
                    let labels = [&[("shard", shard.as_str())], labels].concat();
                    match metric {
                        Metric::Counter(counter) => writer.counter(name, help, &labels, counter),
                        Metric::Gauge(gauge) => writer.gauge(name, help, &labels, gauge),
                    }
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_in_one_run_with_all_shards() {
        let (a, b) = (Counters::default(), Counters::default());
        a.refused_full.add(2);
        b.connections.set(5);
        let mut writer = TextWriter::new();
        Counters::write(&[(ShardId(0), &a), (ShardId(1), &b)], &mut writer);
        let text = writer.finish();
        assert!(text.contains("quic_connections_refused_total{shard=\"0\",reason=\"connections_max\"} 2\n"), "{text}");
        assert!(text.contains(
            "# TYPE quic_connections gauge\nquic_connections{shard=\"0\"} 0\nquic_connections{shard=\"1\"} 5\n"
        ));
        let helps = text.lines().filter(|line| line.starts_with("# HELP quic_connections_refused_total ")).count();
        assert_eq!(helps, 1);
    }
}
