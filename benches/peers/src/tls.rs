//! The cryptography that every peer and the product share: TLS 1.3 by aws-lc-rs, X25519, AES-128-GCM preferred.

use std::sync::Arc;

use rustls::{CipherSuite, NamedGroup, crypto::CryptoProvider};

/// rustls's aws-lc-rs provider with AES-128-GCM in front: the cheapest suite with AES instructions, so it favours the
/// peers over their default AES-256-GCM. Only X25519 is offered for the key exchange, which is outside the timed parts.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider.kx_groups.retain(|group| group.name() == NamedGroup::X25519);
    Arc::new(provider)
}
