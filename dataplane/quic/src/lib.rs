//! A QUIC driver on shard: one endpoint a shard, one UDP port
