//! A node: shards, store and QUIC wired together
