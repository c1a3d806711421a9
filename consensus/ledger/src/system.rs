//! The transactions that the ledger itself executes.
//!
//! * **Votes on validators.** A validator votes for adding or removing a key with a transaction. Once as many of the present validators as decide
//!   on a block have voted for the same change, it is made. A vote counts for [`VOTE_HEIGHTS_MAX`] heights. A key that is to be added has signed
//!   for it ([`proof_message`]): nobody is voted in against their will, or with a key that nobody has.
//! * **Rotated keys.** A validator replaces its own key by another, which has signed for it too. No vote is needed.
//! * **Evidence** that a validator has signed two things that exclude each other. It is recorded; what follows from it is for an application.
//!
//! Only validators send them. They cost no fee and have no nonce: what has been executed is remembered until it expires, and an expiry is never far.
//!
//! ```text
//! validators payload: 1 add u8 | key 32 | proof 64;   2 remove u8 | key 32;   3 rotate u8 | new key 32 | proof 64
//! evidence payload:   1 proposal, 2 prepare, 3 commit u8 | signer 32 | height u64 | round u32 | (hash 32 | signature 64) twice
//!                     4 round change u8 | signer 32 | height u64 | round u32 | (0 u8, or 1 u8 | round u32 | hash 32; signature 64) twice
//! ```

use std::collections::{BTreeMap, BTreeSet};

use metanode_crypto::{Claim, hash};
use metanode_ibft::{
    ChainId, Commit, Evidence, Height, Payload, Prepare, Proposal, Round, RoundChange, Signature, Signed, ValidatorSet,
    Verifier, View,
};
use metanode_types::{Hash, NodeKey};
use metanode_wire::cursor::Cursor;

use crate::{
    DecodeError,
    transaction::{Code, Kind, Outcome, Transaction, TransactionId},
};

/// How long a vote counts. Operators vote by hand, some of them tomorrow.
pub const VOTE_HEIGHTS_MAX: u64 = 100_000;

/// Separates a key's signature for becoming a validator from all others.
pub const PROOF_DOMAIN: &str = "metanode validator key v1";

/// What a key signs, under [`PROOF_DOMAIN`], to become a validator of a chain.
pub fn proof_message(chain: &ChainId, key: &NodeKey) -> [u8; 64] {
    let mut message = [0; 64];
    message[..32].copy_from_slice(&chain.0);
    message[32..].copy_from_slice(&key.0);
    message
}

/// Ed25519 by the rules of ZIP-215, which all validators share.
#[derive(Debug, Clone, Copy)]
pub struct Zip215;

impl Verifier for Zip215 {
    fn verify(&self, signer: &NodeKey, domain: &str, message: &[u8], signature: &Signature) -> bool {
        Claim { signer: *signer, domain, message, signature }.holds()
    }
}

/// A change of the validators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Change {
    /// One more.
    Add(NodeKey),
    /// One less.
    Remove(NodeKey),
}

/// What a validators' transaction asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// A vote for adding a key, with the key's signature.
    Add(NodeKey, [u8; 64]),
    /// A vote for removing one.
    Remove(NodeKey),
    /// Another key for the one that signs.
    Rotate(NodeKey, [u8; 64]),
}

impl Wish {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Add(key, proof) => [&[1], &key.0[..], proof].concat(),
            Self::Remove(key) => [&[2], &key.0[..]].concat(),
            Self::Rotate(key, proof) => [&[3], &key.0[..], proof].concat(),
        }
    }

    /// Reads one.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(payload);
        let kind = cursor.u8()?;
        let key = NodeKey(cursor.array()?);
        let wish = match kind {
            1 => Self::Add(key, cursor.array()?),
            2 => Self::Remove(key),
            3 => Self::Rotate(key, cursor.array()?),
            _ => return Err(DecodeError::Unknown("kind of change")),
        };
        if cursor.is_empty() { Ok(wish) } else { Err(DecodeError::Long(cursor.left())) }
    }
}

/// Evidence as a payload.
pub fn encode_evidence(evidence: &Evidence) -> Vec<u8> {
    fn pair<P: Payload>(kind: u8, pair: &[Signed<P>; 2]) -> Vec<u8> {
        let view = pair[0].payload.view();
        let mut bytes = vec![kind];
        bytes.extend(pair[0].signer.0);
        bytes.extend(view.height.0.to_le_bytes());
        bytes.extend(view.round.0.to_le_bytes());
        for signed in pair {
            signed.payload.encode_rest(&mut bytes);
            bytes.extend(signed.signature);
        }
        bytes
    }
    match evidence {
        Evidence::Proposal(two) => pair(1, two),
        Evidence::Prepare(two) => pair(2, two),
        Evidence::Commit(two) => pair(3, two),
        Evidence::RoundChange(two) => pair(4, two),
    }
}

/// Reads it; whether it proves anything is asked separately.
pub fn decode_evidence(payload: &[u8]) -> Result<Evidence, DecodeError> {
    let mut cursor = Cursor::new(payload);
    let kind = cursor.u8()?;
    let signer = NodeKey(cursor.array()?);
    let view = View { height: Height(cursor.u64()?), round: Round(cursor.u32()?) };
    fn two<P>(
        cursor: &mut Cursor<'_>,
        signer: NodeKey,
        mut payload: impl FnMut(&mut Cursor<'_>) -> Result<P, DecodeError>,
    ) -> Result<[Signed<P>; 2], DecodeError> {
        let mut one = || Ok::<_, DecodeError>(Signed { payload: payload(cursor)?, signer, signature: cursor.array()? });
        Ok([one()?, one()?])
    }
    let hash = |cursor: &mut Cursor<'_>| Ok::<_, DecodeError>(Hash(cursor.array()?));
    let evidence = match kind {
        1 => Evidence::Proposal(two(&mut cursor, signer, |cursor| Ok(Proposal { view, hash: hash(cursor)? }))?),
        2 => Evidence::Prepare(two(&mut cursor, signer, |cursor| Ok(Prepare { view, hash: hash(cursor)? }))?),
        3 => Evidence::Commit(two(&mut cursor, signer, |cursor| Ok(Commit { view, hash: hash(cursor)? }))?),
        4 => Evidence::RoundChange(two(&mut cursor, signer, |cursor| {
            let prepared = match cursor.u8()? {
                0 => None,
                1 => Some((Round(cursor.u32()?), hash(cursor)?)),
                _ => return Err(DecodeError::Unknown("claim of a round change")),
            };
            Ok(RoundChange { view, prepared })
        })?),
        _ => return Err(DecodeError::Unknown("kind of evidence")),
    };
    if cursor.is_empty() { Ok(evidence) } else { Err(DecodeError::Long(cursor.left())) }
}

/// What the ledger keeps. All of it follows from the blocks, and a hash of it is part of every application hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct System {
    /// Sets of validators, by the first height that each votes on.
    sets: BTreeMap<Height, ValidatorSet>,
    /// Who has voted for what, and when.
    votes: BTreeMap<Change, BTreeMap<NodeKey, Height>>,
    /// Who has signed two things, and where that was first shown: once is enough.
    guilty: BTreeMap<NodeKey, View>,
    /// What was executed, until it expires.
    executed: BTreeSet<(Height, TransactionId)>,
}

impl System {
    /// At the beginning.
    pub fn new(validators: ValidatorSet) -> Self {
        Self {
            sets: BTreeMap::from([(Height(0), validators)]),
            votes: BTreeMap::new(),
            guilty: BTreeMap::new(),
            executed: BTreeSet::new(),
        }
    }

    /// Who votes at a height, as far as what was executed says.
    pub fn validators(&self, height: Height) -> &ValidatorSet {
        self.sets.range(..=height).next_back().expect("a set for height 0 is always there").1
    }

    /// Who has signed two things that exclude each other, and where that was first shown.
    pub fn guilty(&self) -> impl Iterator<Item = (&NodeKey, &View)> {
        self.guilty.iter()
    }

    /// The latest set that is known, whenever it begins to vote.
    pub fn latest(&self) -> &ValidatorSet {
        self.sets.last_key_value().expect("there is always one").1
    }

    /// Executes a transaction of the ledger's at `height`; a change of the validators acts at `acts_at`.
    pub(crate) fn execute(
        &mut self,
        chain: &ChainId,
        transaction: &Transaction<'_>,
        height: Height,
        acts_at: Height,
    ) -> Outcome {
        let id = transaction.id(chain);
        if !self.executed.insert((transaction.expiry, id)) {
            return Outcome::Skipped(Code::KNOWN);
        }
        let is_validator = self.latest().contains(&transaction.account);
        let done = match transaction.kind {
            // They cost no fee, so that strangers could fill the chain with them.
            _ if !is_validator => Err(Code::NOT_A_VALIDATOR),
            Kind::Validators => self.wish(chain, transaction, height, acts_at),
            Kind::Evidence => self.evidence(chain, transaction.payload),
            Kind::Application | Kind::Opaque => unreachable!("the caller gives the ledger's only"),
        };
        match done {
            Ok(()) => Outcome::DONE,
            Err(code) => Outcome::Failed(code),
        }
    }

    /// Forgets what can't come again.
    pub(crate) fn forget_before(&mut self, height: Height) {
        self.executed = self.executed.split_off(&(height, TransactionId([0; 32])));
        for votes in self.votes.values_mut() {
            votes.retain(|_, at| height.0 - at.0 <= VOTE_HEIGHTS_MAX);
        }
        self.votes.retain(|_, votes| !votes.is_empty());
    }

    fn wish(
        &mut self,
        chain: &ChainId,
        transaction: &Transaction<'_>,
        height: Height,
        acts_at: Height,
    ) -> Result<(), Code> {
        let wish = Wish::decode(transaction.payload).map_err(|_| Code::MALFORMED)?;
        let latest = self.latest().clone();
        let voter = transaction.account;
        let proven = |key: &NodeKey, proof: &[u8; 64]| {
            let message = proof_message(chain, key);
            let claim = Claim { signer: *key, domain: PROOF_DOMAIN, message: &message, signature: proof };
            claim.holds().then_some(()).ok_or(Code::NO_PROOF_OF_KEY)
        };
        let change = match wish {
            Wish::Add(key, proof) => {
                proven(&key, &proof)?;
                Change::Add(key)
            }
            Wish::Remove(key) => Change::Remove(key),
            Wish::Rotate(key, proof) => {
                proven(&key, &proof)?;
                let keys = latest.iter().map(|old| if *old == voter { key } else { *old });
                let set = ValidatorSet::new(keys.collect()).map_err(|_| Code::NO_CHANGE)?;
                self.sets.insert(acts_at, set);
                return Ok(());
            }
        };
        let set = changed(&latest, change).ok_or(Code::NO_CHANGE)?;
        let votes = self.votes.entry(change).or_default();
        if votes.insert(voter, height).is_some() {
            return Err(Code::KNOWN);
        }
        if votes.keys().filter(|voter| latest.contains(voter)).count() >= latest.quorum() {
            self.votes.remove(&change);
            self.sets.insert(acts_at, set);
        }
        Ok(())
    }

    fn evidence(&mut self, chain: &ChainId, payload: &[u8]) -> Result<(), Code> {
        let evidence = decode_evidence(payload).map_err(|_| Code::MALFORMED)?;
        let (signer, view) = evidence.of();
        if self.guilty.contains_key(&signer) {
            return Err(Code::KNOWN);
        }
        if !self.validators(view.height).contains(&signer) || !evidence.verify(chain, &Zip215) {
            return Err(Code::NO_EVIDENCE);
        }
        self.guilty.insert(signer, view);
        Ok(())
    }

    /// A hash of all of it.
    pub fn hash(&self) -> Hash {
        let mut bytes = b"metanode ledger state v1\0".to_vec();
        let number = |bytes: &mut Vec<u8>, number: usize| bytes.extend((number as u64).to_le_bytes());
        number(&mut bytes, self.sets.len());
        for (height, set) in &self.sets {
            bytes.extend(height.0.to_le_bytes());
            bytes.extend(validators_hash(set).0);
        }
        number(&mut bytes, self.votes.len());
        for (change, votes) in &self.votes {
            let (kind, key) = match change {
                Change::Add(key) => (1, key),
                Change::Remove(key) => (2, key),
            };
            bytes.push(kind);
            bytes.extend(key.0);
            number(&mut bytes, votes.len());
            for (voter, height) in votes {
                bytes.extend(voter.0);
                bytes.extend(height.0.to_le_bytes());
            }
        }
        number(&mut bytes, self.guilty.len());
        for (key, view) in &self.guilty {
            bytes.extend(key.0);
            bytes.extend(view.height.0.to_le_bytes());
            bytes.extend(view.round.0.to_le_bytes());
        }
        number(&mut bytes, self.executed.len());
        for (height, id) in &self.executed {
            bytes.extend(height.0.to_le_bytes());
            bytes.extend(id.0);
        }
        hash(&bytes)
    }
}

/// The set after a change; `None` when that changes nothing, or leaves nobody or too many.
fn changed(set: &ValidatorSet, change: Change) -> Option<ValidatorSet> {
    let mut keys: Vec<NodeKey> = set.iter().copied().collect();
    match change {
        Change::Add(key) => keys.push(key), // twice is no set
        Change::Remove(key) => {
            let before = keys.len();
            keys.retain(|other| *other != key);
            if keys.len() == before {
                return None;
            }
        }
    }
    ValidatorSet::new(keys).ok()
}

/// A hash over the keys of a set.
pub fn validators_hash(set: &ValidatorSet) -> Hash {
    let keys: Vec<u8> = set.iter().flat_map(|key| key.0).collect();
    hash(&[b"metanode validators v1\0", &keys[..]].concat())
}
