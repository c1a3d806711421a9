//! TLS that takes its random numbers from the seed.
//!
//! What an undamaged packet says decides what a damaged one is taken for: a flipped bit turns one kind of header into the other, whose
//! lengths then lie in what was a connection ID or a cipher text. So that a seed repeats bit for bit, every byte must.
//!
//! Key exchange is the one part that rustls leaves to a library with numbers of its own. Here it has the sizes of X25519MLKEM768, and
//! keeps nothing secret: whoever sees both shares knows the key.

use std::{cell::RefCell, sync::Arc};

use metanode_crypto::{
    hash,
    tls::{CipherSuite, CryptoProvider, provider},
};
use metanode_shard::sim::Random;
use rustls::{
    Error, NamedGroup, PeerMisbehaved,
    crypto::{ActiveKeyExchange, CompletedKeyExchange, GetRandomFailed, SecureRandom, SharedSecret, SupportedKxGroup},
    ffdhe_groups::FfdheGroup,
};

/// An encapsulation key of ML-KEM-768, and a share of X25519.
const CLIENT_BYTES: usize = 1184 + 32;
/// A cipher text of ML-KEM-768, and a share of X25519.
const SERVER_BYTES: usize = 1088 + 32;

thread_local! {
    static NUMBERS: RefCell<Random> = RefCell::new(Random::new(0));
}

/// Starts this thread's numbers anew.
pub(super) fn seed(seed: u64) {
    NUMBERS.set(Random::new(seed));
}

/// What both sides compute with.
pub(super) fn crypto() -> Arc<CryptoProvider> {
    let shipped = provider(CipherSuite::DEFAULT).expect("the shipped suites make a TLS");
    Arc::new(CryptoProvider { kx_groups: vec![&Exchange], secure_random: &Numbers, ..(*shipped).clone() })
}

#[derive(Debug)]
struct Numbers;

impl SecureRandom for Numbers {
    fn fill(&self, bytes: &mut [u8]) -> Result<(), GetRandomFailed> {
        NUMBERS.with_borrow_mut(|numbers| numbers.fill(bytes));
        Ok(())
    }
}

fn share(length: usize) -> Vec<u8> {
    let mut share = vec![0; length];
    NUMBERS.with_borrow_mut(|numbers| numbers.fill(&mut share));
    share
}

fn secret(client: &[u8], server: &[u8]) -> SharedSecret {
    SharedSecret::from(&hash(&[client, server].concat()).0[..])
}

fn checked(share: &[u8], length: usize) -> Result<(), Error> {
    if share.len() == length { Ok(()) } else { Err(PeerMisbehaved::InvalidKeyShare.into()) }
}

#[derive(Debug)]
struct Exchange;

impl SupportedKxGroup for Exchange {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        Ok(Box::new(Begun(share(CLIENT_BYTES))))
    }

    fn start_and_complete(&self, client: &[u8]) -> Result<CompletedKeyExchange, Error> {
        checked(client, CLIENT_BYTES)?;
        let server = share(SERVER_BYTES);
        Ok(CompletedKeyExchange { group: self.name(), secret: secret(client, &server), pub_key: server })
    }

    fn ffdhe_group(&self) -> Option<FfdheGroup<'static>> {
        None
    }

    fn name(&self) -> NamedGroup {
        NamedGroup::X25519MLKEM768
    }
}

/// A client's half.
struct Begun(Vec<u8>);

impl ActiveKeyExchange for Begun {
    fn complete(self: Box<Self>, server: &[u8]) -> Result<SharedSecret, Error> {
        checked(server, SERVER_BYTES)?;
        Ok(secret(&self.0, server))
    }

    fn pub_key(&self) -> &[u8] {
        &self.0
    }

    fn ffdhe_group(&self) -> Option<FfdheGroup<'static>> {
        None
    }

    fn group(&self) -> NamedGroup {
        NamedGroup::X25519MLKEM768
    }
}
