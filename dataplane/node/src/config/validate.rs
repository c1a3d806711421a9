use std::{collections::HashSet, fmt::Display, ops::RangeInclusive};

use metanode_quic::{STREAMS_MAX, STREAMS_MIN};
use metanode_types::{
    NodeKey,
    limits::{CHUNK_BYTES, SHARDS_MAX},
};

use super::{
    AccessConfig, CipherSuite, Config, ConfigError, LedgerConfig, LogConfig, NodeConfig, QuicConfig, Readers,
    StoreConfig,
};
use crate::data::SOCKET_PATH_BYTES_MAX;

/// Largest CPU number: what a `cpu_set_t` names.
const CPU_MAX: usize = 1_023;

/// Peers that a node connects to: validators, and some who are to become one.
const PEERS_MAX: usize = 256;

/// Keys on one list: an allow-list is looked at by people; beyond this it wants capability tokens.
const KEYS_MAX: usize = 8_192;

pub(super) fn validate(config: &Config) -> Result<(), ConfigError> {
    let Config { node, quic, store, access, ledger, metrics: _, log } = config;
    validate_node(node)?;
    validate_quic(quic)?;
    validate_store(store)?;
    validate_access(access)?;
    validate_ledger(ledger)?;
    validate_log(log)
}

fn validate_node(node: &NodeConfig) -> Result<(), ConfigError> {
    if let Some(shards) = node.shards {
        within("node.shards", shards, 1..=SHARDS_MAX)?;
    }
    if let Some(cores) = &node.cores {
        if cores.is_empty() {
            return Err(ConfigError::field("node.cores", "names at least one CPU (leave it out for all)"));
        }
        for &core in cores {
            within("node.cores", core, 0..=CPU_MAX)?;
        }
        distinct("node.cores", cores)?;
        within("node.cores (its length)", cores.len(), 1..=usize::from(SHARDS_MAX))?;
    }
    Ok(())
}

fn validate_quic(quic: &QuicConfig) -> Result<(), ConfigError> {
    within("quic.connections_max", quic.connections_max, 1..=1_000_000)?;
    within("quic.connections_per_address_max", quic.connections_per_address_max, 1..=1_000_000)?;
    within("quic.connections_per_key_max", quic.connections_per_key_max, 1..=1_000_000)?;
    within("quic.streams_max", quic.streams_max, STREAMS_MIN..=STREAMS_MAX)?;
    within("quic.requests_max", quic.requests_max, 1..=65_536)?;
    within("quic.idle_timeout_s", quic.idle_timeout_s, 1..=3_600)?;
    within("quic.handshake_timeout_s", quic.handshake_timeout_s, 1..=60)?;
    within("quic.retry_threshold", quic.retry_threshold, 0..=1_000_000)?;
    within("quic.handshakes_max", quic.handshakes_max, 16..=1_000_000)?;
    within("quic.mtu_max", quic.mtu_max, 1_200..=8_952)?;
    if !quic.cipher_suites.contains(&CipherSuite::Aes128Gcm) {
        return Err(ConfigError::field("quic.cipher_suites", "must contain aes-128-gcm (RFC 9001 section 5.2)"));
    }
    let count = quic.cipher_suites.len();
    within("quic.cipher_suites (its length)", count, 1..=3)
}

fn validate_store(store: &StoreConfig) -> Result<(), ConfigError> {
    within("store.cache_bytes", store.cache_bytes, 1 << 20..=1 << 44)?;
    within("store.segment_bytes", store.segment_bytes, 8 << 20..=1 << 30)?;
    if !store.segment_bytes.is_multiple_of(4_096) {
        return Err(ConfigError::field("store.segment_bytes", "must be a multiple of 4096"));
    }
    within("store.index_entries_max", store.index_entries_max, 1_024..=1 << 40)?;
    within("store.uploads_bytes_max", store.uploads_bytes_max, 4 * CHUNK_BYTES as u64..=1 << 40)?;
    // A window below two chunks stalls a bulk upload on every chunk; above the shard's bound it could never be granted.
    let window_max = store.uploads_bytes_max.min(u64::from(u32::MAX));
    within("store.upload_window_bytes", store.upload_window_bytes, 2 * CHUNK_BYTES as u64..=window_max)?;
    within("store.downloads_bytes_max", store.downloads_bytes_max, 4 * CHUNK_BYTES as u64..=1 << 40)?;
    within("store.scrub_bytes_per_second", store.scrub_bytes_per_second, CHUNK_BYTES as u64..=1 << 40)
}

fn validate_access(access: &AccessConfig) -> Result<(), ConfigError> {
    key_list("access.writers", &access.writers)?;
    match &access.readers {
        Readers::Public => Ok(()),
        Readers::Keys(keys) => key_list("access.readers", keys),
    }
}

fn validate_ledger(ledger: &LedgerConfig) -> Result<(), ConfigError> {
    within("ledger.waiting_max", ledger.waiting_max, 1_024..=10_000_000)?;
    within("ledger.waiting_bytes_max", ledger.waiting_bytes_max, 1 << 20..=1 << 36)?;
    within("ledger.client_bytes_max", ledger.client_bytes_max, 1 << 20..=1 << 36)?;
    within("ledger.outcomes_max", ledger.outcomes_max, 1_024..=1_000_000_000)?;
    within("ledger.snapshot_heights", ledger.snapshot_heights, 0..=1_000_000_000)?;
    if ledger.application.len() > SOCKET_PATH_BYTES_MAX || ledger.application.contains('\0') {
        let what = format!("a socket's path has at most {SOCKET_PATH_BYTES_MAX} bytes");
        return Err(ConfigError::field("ledger.application", what));
    }
    within("ledger.peers (its length)", ledger.peers.len(), 0..=PEERS_MAX)?;
    distinct("ledger.peers", &ledger.peers.iter().map(|peer| peer.node).collect::<Vec<_>>())
}

fn validate_log(log: &LogConfig) -> Result<(), ConfigError> {
    crate::logging::parse_levels(&log.level).map(drop).map_err(|problem| ConfigError::field("log.level", problem))
}

fn key_list(field: &'static str, keys: &[NodeKey]) -> Result<(), ConfigError> {
    if keys.len() > KEYS_MAX {
        return Err(ConfigError::field(field, format!("has at most {KEYS_MAX} keys, not {}", keys.len())));
    }
    distinct(field, keys)
}

fn distinct<T: std::hash::Hash + Eq>(field: &'static str, list: &[T]) -> Result<(), ConfigError> {
    let mut seen = HashSet::new();
    match list.iter().position(|item| !seen.insert(item)) {
        Some(at) => Err(ConfigError::field(field, format!("its entry {} is there twice", at + 1))),
        None => Ok(()),
    }
}

fn within<T: PartialOrd + Display + Copy>(
    field: &'static str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), ConfigError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(ConfigError::field(field, format!("is {value}, must be {} to {}", range.start(), range.end())))
}
