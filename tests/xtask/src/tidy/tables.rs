//! What the rules permit. A line is added here together with the code that needs it, and with its reason.

/// The layer of each member outside [`UNLAYERED`]; imports run to lower numbers.
pub(super) const LAYERS: &[(&str, u8)] = &[
    ("metanode-types", 0),
    ("metanode-crypto", 0),
    ("metanode-wire", 0),
    ("metanode-admin-api", 0),
    ("metanode-congestion", 1),
    ("metanode-ibft", 1),
    ("metanode-ledger", 1),
    ("metanode-codec", 1),
    ("metanode-replica", 1),
    ("metanode-mempool", 1),
    ("metanode-application", 1),
    ("metanode-state", 1),
    ("metanode-log", 1),
    ("metanode-blob", 1),
    ("metanode-shard", 2),
    ("metanode-quic", 2),
    ("metanode-client", 2),
    ("metanode-store", 2),
    ("metanode-wal", 2),
    ("metanode-node", 3),
    ("metanode-cli", 4),
];

/// Folders whose packages import what they like and are imported by nobody.
pub(super) const UNLAYERED: &[&str] = &["tests/", "benches/"];

/// Imports inside a layer: importer, imported, why.
pub(super) const EDGES: &[(&str, &str, &str)] = &[
    ("metanode-crypto", "metanode-types", "types is the base of L0: keys and hashes are its newtypes"),
    ("metanode-wire", "metanode-types", "types is the base of L0: messages are made of its identifiers and limits"),
    ("metanode-wire", "metanode-crypto", "a ticket's checksum and a manifest's address are BLAKE3"),
    ("metanode-admin-api", "metanode-types", "types is the base of L0"),
    ("metanode-admin-api", "metanode-wire", "the local socket carries the same frames as the network"),
    ("metanode-blob", "metanode-log", "a partition answers where a record lies: positions and sequences are the log's"),
    ("metanode-application", "metanode-ibft", "heights are the protocol's"),
    ("metanode-application", "metanode-ledger", "it executes the ledger's transactions and answers with its outcomes"),
    ("metanode-application", "metanode-state", "its state is the authenticated map"),
    ("metanode-replica", "metanode-ibft", "it drives the protocol"),
    ("metanode-replica", "metanode-ledger", "and says by the chain's rules what is valid and what comes next"),
    ("metanode-replica", "metanode-mempool", "and proposes what waits"),
    ("metanode-codec", "metanode-ibft", "the messages are the protocol's"),
    ("metanode-codec", "metanode-ledger", "the blocks in them are the ledger's"),
    ("metanode-mempool", "metanode-ibft", "heights are the protocol's"),
    ("metanode-mempool", "metanode-ledger", "it keeps the ledger's transactions and batches"),
    ("metanode-ledger", "metanode-ibft", "a block is what the protocol agrees on; evidence and certificates are its"),
    ("metanode-quic", "metanode-shard", "shard is the base of L2: the driver runs on its executors and readiness"),
    ("metanode-wal", "metanode-shard", "shard is the base of L2: the sign state is written by a companion"),
    ("metanode-store", "metanode-shard", "shard is the base of L2: effects are performed on its files and executors"),
];

/// What may not be reached through any number of imports: from, to, why. An entry is a package, or a folder with its slash.
pub(super) const NO_PATHS: &[(&str, &str, &str)] = &[
    ("dataplane/", "control/", "a node stores and fetches without a control plane"),
    ("relay/", "control/", "a node stores and fetches without a control plane"),
    ("metanode-client", "metanode-shard", "users link the client; it runs on their tokio, without a node's executors"),
    ("metanode-client", "metanode-quic", "users link the client; quinn is its driver"),
    ("metanode-client", "metanode-store", "users link the client; what a node keeps is not theirs"),
];

/// Crates that few packages may name: the crate and its aliases, who, why. Development dependencies count.
pub(super) const NAMERS: &[(&[&str], &[&str], &str)] = &[
    (&["glommio-ng", "glommio"], &["metanode-shard"], "the runtime is replaced in one place"),
    (&["quinn-udp"], &["metanode-quic"], "sockets with GSO and GRO are the driver's"),
    (
        &["quinn-proto"],
        &["metanode-quic", "metanode-congestion", "metanode-crypto", "metanode-client", "metanode-bench-load"],
        "the driver, the congestion controller, the keys and TLS configuration, the connection IDs that a client chooses, and a flood",
    ),
    (
        &["rustls"],
        &["metanode-crypto", "metanode-client", "tests/"],
        "who may connect is decided in crypto; tests play strangers",
    ),
];

/// What L0 and L1 may not import.
pub(super) const CORE_REFUSES: &[&str] = &[
    "crossbeam",
    "getrandom",
    "glommio-ng",
    "io-uring",
    "libc",
    "mio",
    "quinn",
    "quinn-udp",
    "rand",
    "rustix",
    "socket2",
    "tempfile",
    "tokio",
    "tokio-uring",
];

/// Packages that may hold unsafe code.
pub(super) const UNSAFE: &[&str] = &["metanode-shard", "metanode-quic"];

/// Beginnings of paths that exist on one machine only.
pub(super) const MACHINE_PATHS: &[&str] =
    &[concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/Us", "ers/"), concat!("/wo", "rk/"), concat!("C:", "\\")];
