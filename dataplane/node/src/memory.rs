//! What a node may take of the machine's memory: the sum of the bounds that its configuration sets, so that an operator can compare.
//!
//! Most of it is there only under the load that a bound is made for. A node that stands above is leaking or has been misjudged here: a
//! mistake of ours either way, and `cargo xtask bench overload` looks for it.

use metanode_types::limits::CHUNK_BYTES;

use crate::{
    config::Config,
    session::{READER_WINDOW_BYTES, READS_MAX, REQUESTS_WAITING_MAX},
};

/// The program, its threads, and what the allocator keeps for each.
const PROCESS_BYTES: u64 = 48 << 20;

/// Of a shard: rings, the log's buffer, buffers for reading, datagrams on their way, half-open handshakes.
const SHARD_BYTES: u64 = 40 << 20;

/// A request that waits: its task (1.9 KiB), its guard, its place in tables. A test holds it to that.
pub(crate) const REQUEST_BYTES: u64 = 3 << 10;

/// An open connection that does nothing (measured; see `idle_conn_kib` in the README), and what its 16 streams may hold of small answers that
/// there is no room to send. Who sends one byte a packet can make QUIC keep ten times its window; few connections of one address can.
const CONNECTION_BYTES: u64 = (32 + 128) << 10;

/// An entry of the index.
const ENTRY_BYTES: u64 = 64;

/// Of the ledger: batches in memory until they are executed, what is under way in checks and execution, outcomes that are being sorted and merged
/// (a run of 24 MiB, some megabytes of each that is merged), a piece of a snapshot. The application's state comes on top.
const LEDGER_BYTES: u64 = (160 + 64) << 20;

/// A transaction that waits, besides its bytes: its place in tables, its account's.
const WAITING_BYTES: u64 = 512;

/// An outcome that is kept, with its place in a table.
const OUTCOME_BYTES: u64 = 192;

/// A validator: what waits for it, what comes from it, its batches that no block names.
const VALIDATOR_BYTES: u64 = (4 + 32 + 4 + 16) << 20;

/// Buffers of a small read that is under way: the disk's blocks, before they are copied to where they stay.
const READ_BYTES: u64 = 72 << 10;

/// The cache's entries are charged with their bookkeeping; this is for what the allocator rounds up.
const CACHE_ROUNDING: u64 = 16;

/// What is there at the moment.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Present {
    pub(crate) connections: u64,
    pub(crate) blobs: u64,
    pub(crate) blob_bytes: u64,
}

/// Bytes that a node stays below, whatever its clients do, with so many shards, and as many connections and blobs as there are.
pub(crate) fn limit_bytes(config: &Config, shards: u64, present: Present) -> u64 {
    let store = &config.store;
    let shard = SHARD_BYTES
        + 2 * store.uploads_bytes_max // whole ones, and frames of which a part has come
        + 3 * store.downloads_bytes_max // read, read ahead, and not acknowledged
        + READS_MAX as u64 * READ_BYTES
        + u64::from(REQUESTS_WAITING_MAX) * REQUEST_BYTES;
    // A whole blob has an entry for itself and one for its only chunk.
    let ledger = match config.ledger.genesis.is_empty() {
        true => 0,
        false => {
            let ledger = &config.ledger;
            LEDGER_BYTES
                + 2 * ledger.waiting_bytes_max
                + u64::from(ledger.waiting_max) * WAITING_BYTES
                + u64::from(ledger.outcomes_max) * OUTCOME_BYTES
                + (ledger.peers.len() as u64 + 1) * VALIDATOR_BYTES
        }
    };
    let entries = 2 * present.blobs + present.blob_bytes / CHUNK_BYTES as u64;
    PROCESS_BYTES
        + ledger
        + shards * shard
        + store.cache_bytes
        + store.cache_bytes / CACHE_ROUNDING
        + present.connections * (CONNECTION_BYTES + READER_WINDOW_BYTES)
        + entries * ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_configured_and_what_is_there_count() {
        let mut config = Config::default();
        let limit = |config: &Config, shards, present| limit_bytes(config, shards, present) >> 20;
        let empty = Present::default();
        let one = limit(&config, 1, empty);
        assert!((800..1_000).contains(&one), "{one} MiB");
        let present = Present { connections: 10_240, blobs: 1 << 20, blob_bytes: 1 << 40 };
        assert_eq!(limit(&config, 1, present) - one, 2_240 + 128 + 256);
        config.store.cache_bytes += 256 << 20;
        assert_eq!(limit(&config, 1, empty) - one, 256 + 16);
        config.store.downloads_bytes_max += 1 << 20;
        assert_eq!(limit(&config, 2, empty) - limit(&config, 1, empty), one - 48 - 416 - 26 + 3);
    }
}
