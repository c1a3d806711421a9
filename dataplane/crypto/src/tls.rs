//! rustls configurations for QUIC.
//!
//! Both sides show an Ed25519 key as a raw public key (RFC 7250) and prove that they hold it. A client pins the key its ticket
//! names; a node accepts any client key in the handshake and decides by allow-list what that key may do. No session tickets
//! and no 0-RTT: a replayed first flight is not a request.

use std::sync::Arc;

use metanode_types::NodeKey;
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::{
        AlwaysResolvesClientRawPublicKeys,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{SupportedKxGroup, aws_lc_rs, verify_tls13_signature_with_raw_key},
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime},
    server::{
        AlwaysResolvesServerRawPublicKeys,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};

pub use rustls::crypto::CryptoProvider;

use crate::Identity;

/// ALPN of the relay protocol, version 1: storing and fetching.
pub const ALPN_RELAY: &[u8] = b"metanode-relay/1";

/// ALPN of the protocol among validators, version 1.
pub const ALPN_BPI: &[u8] = b"metanode-bpi/1";

/// The name sent as SNI; raw public keys make it meaningless, and QUIC wants one.
pub const SERVER_NAME: &str = "metanode";

/// AEAD suites of TLS 1.3, in order of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CipherSuite {
    /// TLS_AES_128_GCM_SHA256.
    Aes128Gcm,
    /// TLS_AES_256_GCM_SHA384.
    Aes256Gcm,
    /// TLS_CHACHA20_POLY1305_SHA256.
    ChaCha20Poly1305,
}

impl CipherSuite {
    /// The shipped preference: AES-128-GCM is fastest where AES instructions are, and its margin is ample.
    pub const DEFAULT: &[Self] = &[Self::Aes128Gcm, Self::Aes256Gcm, Self::ChaCha20Poly1305];
}

/// A configuration could not be built.
#[derive(Debug, thiserror::Error)]
pub enum TlsConfigError {
    /// rustls refused it.
    #[error("TLS configuration: {0}")]
    Rustls(#[from] Error),
    /// QUIC needs AES-128-GCM for its Initial packets (RFC 9001 section 5.2).
    #[error("TLS configuration: no cipher suite for QUIC Initial packets")]
    NoInitialCipherSuite(#[from] quinn_proto::crypto::rustls::NoInitialCipherSuite),
    /// An empty list.
    #[error("TLS configuration: at least one cipher suite is needed")]
    NoCipherSuite,
}

/// The side that listens: shows `identity`, requires a client key, speaks the given protocols.
pub fn server(
    identity: &Identity,
    suites: &[CipherSuite],
    alpn: &[&[u8]],
) -> Result<quinn_proto::crypto::rustls::QuicServerConfig, TlsConfigError> {
    server_with(provider(suites)?, identity, alpn)
}

/// As [`server`], with a [`provider`] that may have been changed: simulations bring their own random numbers.
pub fn server_with(
    provider: Arc<CryptoProvider>,
    identity: &Identity,
    alpn: &[&[u8]],
) -> Result<quinn_proto::crypto::rustls::QuicServerConfig, TlsConfigError> {
    Ok(Arc::new(server_config(provider, identity, alpn)?).try_into()?)
}

fn server_config(
    provider: Arc<CryptoProvider>,
    identity: &Identity,
    alpn: &[&[u8]],
) -> Result<rustls::ServerConfig, TlsConfigError> {
    let key = certified_key(identity)?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(AnyClientKey { provider }))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(key)));
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// The side that dials: shows `identity`, accepts only a node that proves to hold `expected`.
pub fn client(
    identity: &Identity,
    expected: NodeKey,
    suites: &[CipherSuite],
    alpn: &[&[u8]],
) -> Result<quinn_proto::crypto::rustls::QuicClientConfig, TlsConfigError> {
    client_with(provider(suites)?, identity, expected, alpn)
}

/// As [`client`], with a [`provider`] that may have been changed.
pub fn client_with(
    provider: Arc<CryptoProvider>,
    identity: &Identity,
    expected: NodeKey,
    alpn: &[&[u8]],
) -> Result<quinn_proto::crypto::rustls::QuicClientConfig, TlsConfigError> {
    Ok(Arc::new(client_config(provider, identity, expected, alpn)?).try_into()?)
}

fn client_config(
    provider: Arc<CryptoProvider>,
    identity: &Identity,
    expected: NodeKey,
    alpn: &[&[u8]],
) -> Result<rustls::ClientConfig, TlsConfigError> {
    let key = certified_key(identity)?;
    let mut config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous() // raw public keys are pinned by our own verifier; there is no chain to check
        .with_custom_certificate_verifier(Arc::new(PinnedNodeKey { expected, provider }))
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(key)));
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// The key a peer proved to hold, from what quinn calls its identity (a chain with one SubjectPublicKeyInfo in it).
pub fn peer_key(identity: Box<dyn std::any::Any>) -> Option<NodeKey> {
    let chain = identity.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    node_key(chain.first()?.as_ref())
}

/// `SubjectPublicKeyInfo { id-Ed25519, BIT STRING` (RFC 8410 section 4), then 32 bytes.
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

fn node_key(spki: &[u8]) -> Option<NodeKey> {
    spki.strip_prefix(&SPKI_PREFIX)?.try_into().ok().map(NodeKey)
}

fn certified_key(identity: &Identity) -> Result<Arc<CertifiedKey>, Error> {
    let pkcs8 = PrivatePkcs8KeyDer::from(identity.to_pkcs8().to_vec());
    let key = aws_lc_rs::sign::any_eddsa_type(&pkcs8)?;
    let spki = [&SPKI_PREFIX[..], identity.public().as_bytes()].concat();
    Ok(Arc::new(CertifiedKey::new(vec![CertificateDer::from(spki)], key)))
}

/// The cryptography of these suites, with hybrid post-quantum key exchange preferred.
pub fn provider(suites: &[CipherSuite]) -> Result<Arc<CryptoProvider>, TlsConfigError> {
    if suites.is_empty() {
        return Err(TlsConfigError::NoCipherSuite);
    }
    let cipher_suites = suites
        .iter()
        .map(|suite| match suite {
            CipherSuite::Aes128Gcm => aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            CipherSuite::Aes256Gcm => aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
            CipherSuite::ChaCha20Poly1305 => aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        })
        .collect();
    let kx_groups: Vec<&'static dyn SupportedKxGroup> =
        vec![aws_lc_rs::kx_group::X25519MLKEM768, aws_lc_rs::kx_group::X25519];
    Ok(Arc::new(CryptoProvider { cipher_suites, kx_groups, ..aws_lc_rs::default_provider() }))
}

/// Accepts one key and no other.
#[derive(Debug)]
struct PinnedNodeKey {
    expected: NodeKey,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedNodeKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match node_key(end_entity.as_ref()) {
            Some(key) if key == self.expected => Ok(ServerCertVerified::assertion()),
            Some(_) => Err(Error::InvalidCertificate(rustls::CertificateError::ApplicationVerificationFailure)),
            None => Err(Error::InvalidCertificate(rustls::CertificateError::BadEncoding)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        raw_key_signature(&self.provider, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// Accepts every Ed25519 key whose holder signs the handshake: authentication here, authorization in the node.
#[derive(Debug)]
struct AnyClientKey {
    provider: Arc<CryptoProvider>,
}

impl ClientCertVerifier for AnyClientKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        match node_key(end_entity.as_ref()) {
            Some(_) => Ok(ClientCertVerified::assertion()),
            None => Err(Error::InvalidCertificate(rustls::CertificateError::BadEncoding)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        raw_key_signature(&self.provider, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

fn raw_key_signature(
    provider: &CryptoProvider,
    message: &[u8],
    cert: &CertificateDer<'_>,
    dss: &DigitallySignedStruct,
) -> Result<HandshakeSignatureValid, Error> {
    let spki = SubjectPublicKeyInfoDer::from(cert.as_ref());
    verify_tls13_signature_with_raw_key(message, &spki, dss, &provider.signature_verification_algorithms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builds_for_every_suite_order_that_quic_allows() {
        let identity = Identity::from_seed(&[3; 32]);
        assert!(server(&identity, CipherSuite::DEFAULT, &[ALPN_RELAY]).is_ok());
        assert!(client(&identity, identity.public(), CipherSuite::DEFAULT, &[ALPN_RELAY]).is_ok());
        assert!(matches!(server(&identity, &[], &[ALPN_RELAY]), Err(TlsConfigError::NoCipherSuite)));
        assert!(matches!(
            server(&identity, &[CipherSuite::ChaCha20Poly1305], &[ALPN_RELAY]),
            Err(TlsConfigError::NoInitialCipherSuite(_))
        ));
    }

    #[test]
    fn a_client_that_wants_early_data_gets_none() {
        use rustls::quic::{ClientConnection, ServerConnection, Version};
        let identity = Identity::from_seed(&[3; 32]);
        let shipped = || provider(CipherSuite::DEFAULT).unwrap();
        let server = Arc::new(server_config(shipped(), &identity, &[ALPN_RELAY]).unwrap());
        let mut client = client_config(shipped(), &identity, identity.public(), &[ALPN_RELAY]).unwrap();
        client.resumption = rustls::client::Resumption::in_memory_sessions(8);
        client.enable_early_data = true;
        let client = Arc::new(client);
        for _ in 0..2 {
            let name = ServerName::try_from(SERVER_NAME).unwrap();
            let mut client = ClientConnection::new(client.clone(), Version::V1, name, Vec::new()).unwrap();
            let mut server = ServerConnection::new(server.clone(), Version::V1, Vec::new()).unwrap();
            assert!(client.zero_rtt_keys().is_none(), "a ticket was kept");
            // Four rounds of the handshake, and time for tickets.
            for _ in 0..8 {
                // One level of encryption at a time, as QUIC does.
                let mut flight = Vec::new();
                client.write_hs(&mut flight);
                server.read_hs(&flight).unwrap();
                flight.clear();
                server.write_hs(&mut flight);
                client.read_hs(&flight).unwrap();
            }
            assert!(!client.is_handshaking() && !server.is_handshaking());
            assert!(server.zero_rtt_keys().is_none() && !client.is_early_data_accepted());
        }
    }

    #[test]
    fn peer_key_reads_a_raw_public_key_and_nothing_else() {
        let key = Identity::from_seed(&[3; 32]).public();
        let spki = [&SPKI_PREFIX[..], key.as_bytes()].concat();
        assert_eq!(peer_key(Box::new(vec![CertificateDer::from(spki)])), Some(key));
        assert_eq!(peer_key(Box::new(vec![CertificateDer::from(vec![1, 2, 3])])), None);
        assert_eq!(peer_key(Box::new(())), None);
    }
}
