//! The transactions that the ledger itself executes.
//!
//! * **Votes on validators.** A validator votes for adding or removing a key with a transaction. Once as many of the present validators as decide
//!   on a block have voted for the same change, it is made. A vote counts for [`VOTE_HEIGHTS_MAX`] heights. A key that is to be added has signed
//!   for it ([`proof_message`]): nobody is voted in against their will, or with a key that nobody has.
//! * **Rotated keys.** A validator replaces its own key by another, which has signed for it too. No vote is needed.
//! * **Votes on the form of blocks.** From a height on, blocks are to have another version. Who does not know that version stops before it, by
//!   name, instead of refusing what the others say.
//! * **Evidence** that a validator has signed two things that exclude each other. It is recorded; what follows from it is for an application.
//!
//! Only validators send them. They cost no fee and have no nonce: what has been executed is remembered until it expires, and an expiry is never far.
//!
//! ```text
//! validators payload: 1 add u8 | key 32 | proof 64;   2 remove u8 | key 32;   3 rotate u8 | new key 32 | proof 64
//!                     4 upgrade u8 | version u32 | from height u64
//! evidence payload:   1 proposal, 2 prepare, 3 commit u8 | signer 32 | height u64 | round u32 | (hash 32 | signature 64) twice
//!                     4 round change u8 | signer 32 | height u64 | round u32 | (0 u8, or 1 u8 | round u32 | hash 32; signature 64) twice
//! ```

use std::collections::BTreeMap;

use metanode_crypto::{Claim, hash};
use metanode_ibft::{
    ChainId, Commit, Evidence, Height, Payload, Prepare, Proposal, Round, RoundChange, Signature, Signed, ValidatorSet,
    Verifier, View,
};
use metanode_types::{Hash, NodeKey};
use metanode_wire::cursor::Cursor;

use crate::{
    DecodeError,
    block::VERSION,
    transaction::{Code, Kind, Outcome, Transaction, TransactionId},
};

/// How long a vote counts. Operators vote by hand, some of them tomorrow.
pub const VOTE_HEIGHTS_MAX: u64 = 100_000;

/// Changes that a validator's votes wait for at most. Operators vote by hand; a validator that lies would fill the state with wishes.
pub const OPEN_VOTES_MAX: usize = 64;

/// Transactions of the ledger that a validator may have sent before the first of them expires: they cost nothing, and all that were sent are
/// hashed with every block.
pub const SENT_MAX: usize = 256;

/// Heights from one rotation of a validator's key to the next: each leaves a set of validators behind that is remembered for long.
pub const ROTATE_HEIGHTS_MIN: u64 = 1_000;

/// How long sets of validators that are over are known, for evidence against those who were in them. Whoever left longer ago is nobody's
/// concern here any more.
pub const SETS_KEPT_HEIGHTS: u64 = 100_000;

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

/// A change that is voted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Change {
    /// One validator more.
    Add(NodeKey),
    /// One less.
    Remove(NodeKey),
    /// Another form of blocks from a height on.
    Upgrade {
        /// The form.
        version: u32,
        /// The first block that has it.
        from: Height,
    },
}

impl Change {
    fn encode(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Add(key) => bytes.extend([&[1], &key.0[..]].concat()),
            Self::Remove(key) => bytes.extend([&[2], &key.0[..]].concat()),
            Self::Upgrade { version, from } => {
                bytes.push(4);
                bytes.extend(version.to_le_bytes());
                bytes.extend(from.0.to_le_bytes());
            }
        }
    }

    fn read(cursor: &mut Cursor<'_>) -> Result<Self, DecodeError> {
        match cursor.u8()? {
            1 => Ok(Self::Add(NodeKey(cursor.array()?))),
            2 => Ok(Self::Remove(NodeKey(cursor.array()?))),
            4 => Ok(Self::Upgrade { version: cursor.u32()?, from: Height(cursor.u64()?) }),
            _ => Err(DecodeError::Unknown("kind of change")),
        }
    }
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
    /// A vote for another form of blocks from a height on.
    Upgrade {
        /// The form, above the present one.
        version: u32,
        /// The first block that has it: far enough ahead that all validators can be given a program that knows it.
        from: Height,
    },
}

impl Wish {
    /// The payload.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Add(key, proof) => [&[1], &key.0[..], proof].concat(),
            Self::Remove(key) => [&[2], &key.0[..]].concat(),
            Self::Rotate(key, proof) => [&[3], &key.0[..], proof].concat(),
            Self::Upgrade { version, from } => [&[4], &version.to_le_bytes()[..], &from.0.to_le_bytes()].concat(),
        }
    }

    /// Reads one.
    pub fn decode(payload: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(payload);
        let wish = match cursor.u8()? {
            1 => Self::Add(NodeKey(cursor.array()?), cursor.array()?),
            2 => Self::Remove(NodeKey(cursor.array()?)),
            3 => Self::Rotate(NodeKey(cursor.array()?), cursor.array()?),
            4 => Self::Upgrade { version: cursor.u32()?, from: Height(cursor.u64()?) },
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
    /// What validators have sent, until it expires.
    executed: BTreeMap<(Height, TransactionId), NodeKey>,
    /// Forms of blocks, by the first height that each is for.
    versions: BTreeMap<Height, u32>,
    /// Keys that have taken another's place in the last [`ROTATE_HEIGHTS_MIN`] heights, and when.
    rotated: BTreeMap<NodeKey, Height>,
    /// How many each has sent, of those in `executed`.
    sent: BTreeMap<NodeKey, usize>,
}

impl System {
    /// At the beginning.
    pub fn new(validators: ValidatorSet) -> Self {
        Self {
            sets: BTreeMap::from([(Height(0), validators)]),
            votes: BTreeMap::new(),
            guilty: BTreeMap::new(),
            executed: BTreeMap::new(),
            versions: BTreeMap::from([(Height(0), VERSION)]),
            rotated: BTreeMap::new(),
            sent: BTreeMap::new(),
        }
    }

    /// The form of the block of a height, as far as what was executed says.
    pub fn version(&self, height: Height) -> u32 {
        *self.versions.range(..=height).next_back().expect("a form for height 0 is always there").1
    }

    /// Forms of blocks that were decided on and that this program does not know: the first height of each.
    pub fn unknown_versions(&self) -> impl Iterator<Item = (Height, u32)> {
        self.versions.iter().filter(|(_, version)| **version > VERSION).map(|(height, version)| (*height, *version))
    }

    /// Who votes at a height, as far as what was executed says.
    ///
    /// # Panics
    /// When the height is [too long ago](SETS_KEPT_HEIGHTS).
    pub fn validators(&self, height: Height) -> &ValidatorSet {
        self.known_validators(height).expect("sets of heights to come are known")
    }

    fn known_validators(&self, height: Height) -> Option<&ValidatorSet> {
        self.sets.range(..=height).next_back().map(|(_, set)| set)
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
        // They cost no fee, so that strangers could fill the state with them.
        if !self.latest().contains(&transaction.account) {
            return Outcome::Failed(Code::NOT_A_VALIDATOR);
        }
        let place = (transaction.expiry, transaction.id(chain));
        if self.executed.contains_key(&place) {
            return Outcome::Skipped(Code::KNOWN);
        }
        let sent = self.sent.entry(transaction.account).or_default();
        if *sent >= SENT_MAX {
            return Outcome::Skipped(Code::TOO_MANY);
        }
        *sent += 1;
        self.executed.insert(place, transaction.account);
        let done = match transaction.kind {
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
        let left = self.executed.split_off(&(height, TransactionId([0; 32])));
        for sender in std::mem::replace(&mut self.executed, left).values() {
            if let Some(sent) = self.sent.get_mut(sender) {
                *sent -= 1;
            }
        }
        self.sent.retain(|_, sent| *sent > 0);
        self.rotated.retain(|_, at| height.0 - at.0 < ROTATE_HEIGHTS_MIN);
        for votes in self.votes.values_mut() {
            votes.retain(|_, at| height.0 - at.0 <= VOTE_HEIGHTS_MAX);
        }
        self.votes.retain(|_, votes| !votes.is_empty());
        // The last set that began before all that is remembered still voted then.
        let from = Height(height.0.saturating_sub(SETS_KEPT_HEIGHTS));
        if let Some(first) = self.sets.range(..=from).next_back().map(|(first, _)| *first) {
            self.sets = self.sets.split_off(&first);
        }
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
            Wish::Upgrade { version, from } => Change::Upgrade { version, from },
            Wish::Rotate(key, proof) => {
                if self.rotated.contains_key(&voter) {
                    return Err(Code::TOO_SOON);
                }
                proven(&key, &proof)?;
                let keys = latest.iter().map(|old| if *old == voter { key } else { *old });
                let set = ValidatorSet::new(keys.collect()).map_err(|_| Code::NO_CHANGE)?;
                self.sets.insert(acts_at, set);
                self.take_place(voter, key, height);
                return Ok(());
            }
        };
        let outcome = match change {
            // Whoever has not executed the decision yet must not have voted on a block that it is about.
            Change::Upgrade { version, from } => {
                let last = self.versions.last_key_value().expect("there is always one");
                (version > *last.1 && from >= acts_at && from > *last.0).then_some(Outcoming::Version(from, version))
            }
            Change::Add(_) | Change::Remove(_) => changed(&latest, change).map(Outcoming::Set),
        };
        let outcome = outcome.ok_or(Code::NO_CHANGE)?;
        let is_open = |votes: &&BTreeMap<NodeKey, Height>| votes.contains_key(&voter);
        if self.votes.values().filter(is_open).count() >= OPEN_VOTES_MAX && !self.votes.contains_key(&change) {
            return Err(Code::TOO_MANY);
        }
        let votes = self.votes.entry(change).or_default();
        if votes.insert(voter, height).is_some() {
            return Err(Code::KNOWN);
        }
        if votes.keys().filter(|voter| latest.contains(voter)).count() >= latest.quorum() {
            self.votes.remove(&change);
            match outcome {
                Outcoming::Set(set) => {
                    // Who has no vote any more has given none.
                    self.votes.values_mut().for_each(|votes| votes.retain(|voter, _| set.contains(voter)));
                    self.votes.retain(|_, votes| !votes.is_empty());
                    self.sets.insert(acts_at, set);
                }
                Outcoming::Version(from, version) => _ = self.versions.insert(from, version),
            }
        }
        Ok(())
    }

    /// A key takes another's place, with its votes and all that it has sent: a validator with many keys is one.
    fn take_place(&mut self, old: NodeKey, new: NodeKey, height: Height) {
        self.executed.values_mut().filter(|sender| **sender == old).for_each(|sender| *sender = new);
        if let Some(sent) = self.sent.remove(&old) {
            *self.sent.entry(new).or_default() += sent;
        }
        for votes in self.votes.values_mut() {
            if let Some(at) = votes.remove(&old) {
                votes.insert(new, at);
            }
        }
        self.rotated.insert(new, height);
    }

    fn evidence(&mut self, chain: &ChainId, payload: &[u8]) -> Result<(), Code> {
        let evidence = decode_evidence(payload).map_err(|_| Code::MALFORMED)?;
        let (signer, view) = evidence.of();
        if self.guilty.contains_key(&signer) {
            return Err(Code::KNOWN);
        }
        let was_one = self.known_validators(view.height).is_some_and(|set| set.contains(&signer));
        if !was_one || !evidence.verify(chain, &Zip215) {
            return Err(Code::NO_EVIDENCE);
        }
        self.guilty.insert(signer, view);
        Ok(())
    }

    /// A hash of all of it.
    pub fn hash(&self) -> Hash {
        hash(&[b"metanode ledger state v1\0", &self.encode()[..]].concat())
    }

    /// All of it.
    ///
    /// ```text
    /// sets:     count u64 | (from height u64 | count u64 | keys 32 each) each
    /// votes:    count u64 | (change, as in the payload but for its proof | count u64 | (voter 32 | height u64) each) each
    /// guilty:   count u64 | (key 32 | height u64 | round u32) each
    /// executed: count u64 | (expiry u64 | transaction 32 | sender 32) each
    /// versions: count u64 | (from height u64 | version u32) each
    /// rotated:  count u64 | (key 32 | height u64) each
    /// ```
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let number = |bytes: &mut Vec<u8>, number: usize| bytes.extend((number as u64).to_le_bytes());
        number(&mut bytes, self.sets.len());
        for (height, set) in &self.sets {
            bytes.extend(height.0.to_le_bytes());
            number(&mut bytes, set.len());
            set.iter().for_each(|key| bytes.extend(key.0));
        }
        number(&mut bytes, self.votes.len());
        for (change, votes) in &self.votes {
            change.encode(&mut bytes);
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
        for ((height, id), sender) in &self.executed {
            bytes.extend(height.0.to_le_bytes());
            bytes.extend(id.0);
            bytes.extend(sender.0);
        }
        number(&mut bytes, self.versions.len());
        for (height, version) in &self.versions {
            bytes.extend(height.0.to_le_bytes());
            bytes.extend(version.to_le_bytes());
        }
        number(&mut bytes, self.rotated.len());
        for (key, height) in &self.rotated {
            bytes.extend(key.0);
            bytes.extend(height.0.to_le_bytes());
        }
        bytes
    }

    /// Reads what [`System::encode`] wrote. What it says is believed: whoever has it from others compares its hash.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let mut this = Self {
            sets: BTreeMap::new(),
            votes: BTreeMap::new(),
            guilty: BTreeMap::new(),
            executed: BTreeMap::new(),
            versions: BTreeMap::new(),
            rotated: BTreeMap::new(),
            sent: BTreeMap::new(),
        };
        for _ in 0..cursor.u64()? {
            let from = Height(cursor.u64()?);
            let mut keys = Vec::new();
            for _ in 0..cursor.u64()? {
                keys.push(NodeKey(cursor.array()?));
            }
            let set = ValidatorSet::new(keys).map_err(|_| DecodeError::Unknown("set of validators"))?;
            this.sets.insert(from, set);
        }
        for _ in 0..cursor.u64()? {
            let change = Change::read(&mut cursor)?;
            let votes = this.votes.entry(change).or_default();
            for _ in 0..cursor.u64()? {
                votes.insert(NodeKey(cursor.array()?), Height(cursor.u64()?));
            }
        }
        for _ in 0..cursor.u64()? {
            let key = NodeKey(cursor.array()?);
            this.guilty.insert(key, View { height: Height(cursor.u64()?), round: Round(cursor.u32()?) });
        }
        for _ in 0..cursor.u64()? {
            let place = (Height(cursor.u64()?), TransactionId(cursor.array()?));
            let sender = NodeKey(cursor.array()?);
            if this.executed.insert(place, sender).is_none() {
                *this.sent.entry(sender).or_default() += 1;
            }
        }
        for _ in 0..cursor.u64()? {
            this.versions.insert(Height(cursor.u64()?), cursor.u32()?);
        }
        for _ in 0..cursor.u64()? {
            this.rotated.insert(NodeKey(cursor.array()?), Height(cursor.u64()?));
        }
        if !cursor.is_empty() {
            return Err(DecodeError::Long(cursor.left()));
        }
        if this.sets.is_empty() || this.versions.is_empty() {
            return Err(DecodeError::Short);
        }
        Ok(this)
    }
}

/// What a change leads to once enough have voted for it.
enum Outcoming {
    Set(ValidatorSet),
    Version(Height, u32),
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
        Change::Upgrade { .. } => return None,
    }
    ValidatorSet::new(keys).ok()
}

/// A hash over the keys of a set.
pub fn validators_hash(set: &ValidatorSet) -> Hash {
    let keys: Vec<u8> = set.iter().flat_map(|key| key.0).collect();
    hash(&[b"metanode validators v1\0", &keys[..]].concat())
}
