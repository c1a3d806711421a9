//! The text of a configuration file: each field under its explanation.
//!
//! serde gives the values, so the text can't differ from what is parsed; [`FIELDS`] gives order and explanation. A test holds
//! that the two name the same fields.

use super::Config;

/// Section, key, example for a field that is left out, explanation.
struct Field(&'static str, &'static str, Option<&'static str>, &'static str);

const FIELDS: &[Field] = &[
    Field("node", "shards", Some("2"), "Executors. Default: one a CPU of `cores`."),
    Field("node", "cores", Some("[0, 1]"), "CPUs to pin them to. Default: the affinity mask of the process."),
    Field(
        "quic",
        "listen",
        None,
        "UDP address. Loopback serves this machine only; \"0.0.0.0:4433\" opens the node. Port 0: any.",
    ),
    Field("quic", "connections_max", None, "Connections of the node, an even part for each shard; about 32 KiB each."),
    Field(
        "quic",
        "connections_per_address_max",
        None,
        "Connections from one IPv4 address or IPv6 /64 to one shard; not applied on loopback.",
    ),
    Field(
        "quic",
        "connections_per_key_max",
        None,
        "Connections of one client key to one shard, from whatever addresses; not applied on loopback.",
    ),
    Field(
        "quic",
        "streams_max",
        None,
        "Streams a client may have open on a connection (16 to 128); memory is reserved for each.",
    ),
    Field(
        "quic",
        "requests_max",
        None,
        "Unanswered requests of a connection; above it the node stops reading from it.",
    ),
    Field("quic", "idle_timeout_s", None, "Seconds of silence after which a connection is dropped."),
    Field("quic", "handshake_timeout_s", None, "Seconds that a handshake may take."),
    Field(
        "quic",
        "retry_threshold",
        None,
        "Handshakes in progress on a shard from which on clients prove their address first.",
    ),
    Field("quic", "handshakes_max", None, "Half-open handshakes of a shard; about 40 KiB each."),
    Field("quic", "mtu_max", None, "Largest UDP payload that MTU discovery tries, in bytes (1200 to 8952)."),
    Field(
        "quic",
        "congestion",
        None,
        "What decides how fast the node sends: \"tolerant\" (losses of more than 2 %) or \"cubic\" (each loss).",
    ),
    Field("quic", "cipher_suites", None, "TLS 1.3 suites by preference; aes-128-gcm must be among them."),
    Field(
        "store",
        "cache_bytes",
        None,
        "Memory cache of all shards. 416 MiB hold 100,000 blobs of 4 KiB; the node stays under 500 MB.",
    ),
    Field("store", "segment_bytes", None, "Size of one segment file, a multiple of 4096."),
    Field(
        "store",
        "index_entries_max",
        None,
        "Chunks that the index may hold; about 64 bytes of memory each, once they exist.",
    ),
    Field(
        "store",
        "uploads_bytes_max",
        None,
        "Bytes of uploads in flight on one shard; above it uploads are answered \"busy\".",
    ),
    Field(
        "store",
        "upload_window_bytes",
        None,
        "Receive window of one bulk upload, in bytes; counts in uploads_bytes_max.",
    ),
    Field(
        "store",
        "downloads_bytes_max",
        None,
        "Bytes of answers that one shard holds until clients take them; above it fetches that miss the cache are \"busy\".",
    ),
    Field("store", "scrub_hours", None, "Hours between two scrubs, counted from the start; 0: only those asked for."),
    Field(
        "store",
        "scrub_bytes_per_second",
        None,
        "Bytes a second that such a scrub reads: a terabyte takes 35 hours at 8 MiB.",
    ),
    Field(
        "access",
        "writers",
        None,
        "Keys that may write and delete. The first is the local operator's (operator.key).",
    ),
    Field("access", "readers", None, "\"public\", or a list of keys that may read."),
    Field("ledger", "genesis", None, "File of the chain's genesis, in this folder; empty: the node has no ledger."),
    Field("ledger", "peers", None, "Tickets of the other validators."),
    Field("ledger", "waiting_max", None, "Transactions that may wait in memory; more are refused as busy."),
    Field("ledger", "waiting_bytes_max", None, "Bytes of them."),
    Field("ledger", "client_bytes_max", None, "Bytes of them that one client may have brought."),
    Field(
        "ledger",
        "outcomes_max",
        None,
        "Executed transactions whose outcome is kept in memory; about 128 bytes each. Of earlier ones it is on disk.",
    ),
    Field(
        "ledger",
        "snapshot_heights",
        None,
        "Heights from one snapshot of the state to the next: a restart executes what comes behind it. 0: none is made.",
    ),
    Field(
        "ledger",
        "shard",
        None,
        "Which shard it runs on: \"own\" (the last of node.shards, for it alone), \"shared\", or \"auto\": own from four shards on.",
    ),
    Field(
        "ledger",
        "application",
        None,
        "Socket of the application's process (`metanode ledger application`); empty: the node runs the reference application.",
    ),
    Field(
        "metrics",
        "listen",
        None,
        "TCP address of GET /metrics, or \"off\". A taken port is replaced by a free one.",
    ),
    Field(
        "log",
        "level",
        None,
        "error, warn, info, debug or trace; per crate: \"info,metanode_quic=warn\". METANODE_LOG goes first.",
    ),
];

pub(super) fn render(config: &Config) -> String {
    let table = toml::Table::try_from(config).expect("a configuration is made of TOML's own types");
    let mut text = String::from("# Configuration of a Metanode node. Read once, at start. Unknown keys are refused.\n");
    let mut open = "";
    for Field(section, key, example, explanation) in FIELDS {
        if *section != open {
            text += &format!("\n[{section}]\n");
            open = section;
        }
        text += &format!("# {explanation}\n");
        match (table.get(*section).and_then(|fields| fields.get(key)), example) {
            (Some(value), _) => text += &format!("{key} = {}\n", display(value)),
            (None, Some(example)) => text += &format!("# {key} = {example}\n"),
            (None, None) => unreachable!("only fields with an example can be left out"),
        }
    }
    text
}

/// Lists of texts get a line each: keys are long, and an added key is then an added line.
fn display(value: &toml::Value) -> String {
    match value.as_array() {
        Some(list) if list.len() > 1 || list.iter().any(|item| item.to_string().len() > 40) => {
            let lines: String = list.iter().map(|item| format!("    {item},\n")).collect();
            format!("[\n{lines}]")
        }
        _ => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NodeConfig;

    #[test]
    fn every_field_has_its_explanation() {
        let full = Config { node: NodeConfig { shards: Some(1), cores: Some(vec![0]) }, ..Config::default() };
        let table = toml::Table::try_from(&full).unwrap();
        let mut named: Vec<_> = FIELDS.iter().map(|Field(section, key, ..)| format!("{section}.{key}")).collect();
        let mut present: Vec<_> = table
            .iter()
            .flat_map(|(section, fields)| fields.as_table().unwrap().keys().map(move |key| format!("{section}.{key}")))
            .collect();
        named.sort();
        present.sort();
        assert_eq!(named, present);
    }
}
