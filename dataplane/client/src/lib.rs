//! The QUIC client library of Metanode
