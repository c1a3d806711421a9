//! What follows from the blocks so far.
//!
//! A block is *decided* first and *executed* after, by way of the application: [`Chain::plan`] has all that it takes, [`Plan::execute`]
//! does it, on whatever thread, and [`Chain::executed`] takes what came of it. The two run apart by at most the lag: the header of h carries the results of h − lag, so who
//! has not executed that far can neither make nor check it.

use std::collections::{BTreeMap, BTreeSet};

use metanode_crypto::hash;
use metanode_ibft::{Block as _, ChainId, Height, NewHeight, ValidatorSet};
use metanode_types::{Hash, NodeKey};
use metanode_wire::cursor::Cursor;

use crate::{
    DecodeError,
    batch::Batch,
    block::{BATCHES_MAX, Block, Header, batches_root},
    genesis::Genesis,
    system::{System, validators_hash},
    transaction::{Code, Kind, Names, Outcome, Transaction, TransactionError, TransactionId},
    tree,
};

/// The last decided block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tip {
    /// Its place; 0 at the beginning.
    pub height: Height,
    /// Its hash; at the beginning the chain's identity.
    pub hash: Hash,
    /// Who made it; at the beginning the last validator in key order, so that the first has the turn.
    pub author: NodeKey,
    /// Its time; at the beginning the genesis's.
    pub time_ms: u64,
}

/// What a block did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executed {
    /// Its place.
    pub height: Height,
    /// The state behind it.
    pub app_hash: Hash,
    /// Over what became of its transactions.
    pub results_root: Hash,
    /// What became of each, in their order.
    pub outcomes: Vec<(TransactionId, Outcome)>,
}

/// A block that is to be executed, with all that this takes: it can go to another thread.
#[derive(Debug)]
pub struct Plan {
    chain: ChainId,
    height: Height,
    time_ms: u64,
    batches: Vec<Batch>,
    system: System,
    acts_at: Height,
    /// The latest expiry that a transaction of the ledger may have: until then it is remembered.
    expiry_max: Height,
}

/// A block that was executed: for [`Chain::executed`].
#[derive(Debug)]
pub struct Done {
    executed: Executed,
    system: System,
    /// How many transactions accounts have had, as far as this block tells.
    had: Vec<(NodeKey, u64)>,
    early: Vec<Early>,
}

/// A transaction that was skipped since others of its account come first. Who has taken it in may put it into another batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Early {
    /// The validator that has taken it in.
    pub taken_by: NodeKey,
    /// Whose transaction it is.
    pub account: NodeKey,
    /// Its encoding.
    pub bytes: Vec<u8>,
    /// The nonce that its account is to use next, behind the block.
    pub next: u64,
}

impl Plan {
    /// Executes it. The ledger's own transactions are executed here, the others, in their order, by `application`, which answers with an
    /// outcome for each and the hash of its state.
    ///
    /// # Panics
    /// When there are not as many outcomes as there were transactions.
    pub fn execute<E>(
        self,
        application: impl FnOnce(Height, u64, &[Transaction<'_>]) -> Result<(Vec<Outcome>, Hash), E>,
    ) -> Result<Done, E> {
        let Self { chain, height, time_ms, batches, mut system, acts_at, expiry_max } = self;
        system.forget_before(height);
        let names = Names::of(&chain);
        let (mut transactions, mut outcomes) = (Vec::new(), Vec::new());
        let mut authors = Vec::new();
        let all =
            batches.iter().flat_map(|batch| batch.transactions().map(|transaction| (batch.author(), transaction)));
        for (author, transaction) in all {
            let outcome = if transaction.expiry < height {
                Some(Outcome::Skipped(Code::EXPIRED))
            } else {
                match transaction.kind {
                    Kind::Application => None,
                    Kind::Opaque => Some(Outcome::DONE),
                    Kind::Validators | Kind::Evidence if transaction.expiry > expiry_max => {
                        Some(Outcome::Skipped(Code::EXPIRES_TOO_LATE))
                    }
                    Kind::Validators | Kind::Evidence => Some(system.execute(&chain, &transaction, height, acts_at)),
                }
            };
            if outcome.is_none() {
                transactions.push(transaction);
                authors.push(author);
            }
            outcomes.push((names.name(&transaction), outcome));
        }
        let (of_application, state) = application(height, time_ms, &transactions)?;
        assert_eq!(of_application.len(), transactions.len(), "each has an outcome");
        let (mut had, mut early): (Vec<(NodeKey, u64)>, Vec<Early>) = Default::default();
        for ((transaction, outcome), author) in transactions.iter().zip(&of_application).zip(authors) {
            let count = match outcome {
                Outcome::Done(_) | Outcome::Failed(_) => transaction.nonce.saturating_add(1),
                Outcome::Skipped(Code::NONCE_TOO_HIGH) => {
                    let (account, bytes) = (transaction.account, transaction.bytes().to_vec());
                    early.push(Early { taken_by: author, account, bytes, next: 0 });
                    continue;
                }
                Outcome::Skipped(_) => continue,
            };
            match had.last_mut() {
                Some((account, most)) if *account == transaction.account => *most = count,
                _ => had.push((transaction.account, count)),
            }
        }
        let mut of_application = of_application.into_iter();
        let outcomes: Vec<(TransactionId, Outcome)> = outcomes
            .into_iter()
            .map(|(id, outcome)| (id, outcome.unwrap_or_else(|| of_application.next().expect("they were counted"))))
            .collect();
        let leaves: Vec<Hash> = outcomes.iter().map(|(id, outcome)| tree::leaf(&outcome.encode(id))).collect();
        let results_root = tree::root(&leaves);
        let app_hash = app_hash(&system, &state);
        Ok(Done { executed: Executed { height, app_hash, results_root, outcomes }, system, had, early })
    }
}

impl Done {
    /// What it did.
    pub fn executed(&self) -> &Executed {
        &self.executed
    }

    /// Transactions that were too early.
    pub fn early(&self) -> &[Early] {
        &self.early
    }

    /// Says what the account of each of those is to use next, as the application knows, in their order.
    pub fn note_nonces(&mut self, next: impl IntoIterator<Item = u64>) {
        for (early, next) in self.early.iter_mut().zip(next) {
            early.next = next;
        }
    }

    /// How many transactions accounts have had: of each that had one in the block, perhaps more than once, the last counts.
    pub fn had(&self) -> &[(NodeKey, u64)] {
        &self.had
    }
}

/// Why a block can't follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// It is for another place.
    #[error("height {} where {} comes next", found.0, expected.0)]
    Height {
        /// Its.
        found: Height,
        /// What comes next.
        expected: Height,
    },
    /// This node has not executed far enough to tell.
    #[error("height {} is not executed yet", .0.0)]
    NotExecuted(Height),
    /// A part of the header is not what the chain says.
    #[error("its {0} is not what the chain says")]
    Differs(&'static str),
    /// More batches than a block may have.
    #[error("{0} batches; at most {BATCHES_MAX} are allowed")]
    TooManyBatches(usize),
    /// A batch is there twice.
    #[error("batch {0} is there twice")]
    Twice(Hash),
    /// It names a batch whose time is over, or too far ahead.
    #[error("batch {0} has expired, or expires too late")]
    ExpiredBatch(Hash),
    /// It names a batch whose author does not vote on it.
    #[error("batch {0} is by somebody who is no validator")]
    StrangersBatch(Hash),
    /// It names a batch that an earlier block has named.
    #[error("batch {0} is in an earlier block")]
    OrderedBefore(Hash),
    /// The validators have decided on a form of blocks that this program does not know.
    #[error("not supported: blocks of version {version}, which the chain has from height {} on", from.0)]
    NotSupported {
        /// The form.
        version: u32,
        /// The first block that has it.
        from: Height,
    },
}

/// What a block's rules ask of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Its author.
    pub author: NodeKey,
    /// The last height whose block may name it.
    pub expiry: Height,
}

impl Batch {
    /// What a block's rules ask of it.
    pub fn facts(&self) -> Facts {
        Facts { author: self.author(), expiry: self.expiry() }
    }
}

/// A batch that a block has named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ordered {
    expiry: Height,
    named_at: Height,
}

/// A chain, as far as a node knows it.
#[derive(Debug, Clone)]
pub struct Chain {
    id: ChainId,
    lag: u64,
    expiry_heights_max: u64,
    opaque: bool,
    tip: Tip,
    executed: Height,
    system: System,
    /// Batches that blocks have named and that could be named again: the last height at which they could, and which block has named them.
    ordered: BTreeMap<Hash, Ordered>,
    /// The same, by that last height.
    expiries: BTreeSet<(Height, Hash)>,
    /// Application hash and results root of what later headers carry.
    results: BTreeMap<Height, (Hash, Hash)>,
}

/// All that is known behind a block, but for the application's state: enough to go on from there.
///
/// ```text
/// version 1 u32 | height u64 | count u64 | (batch 32 | expiry u64 | named at u64) each
/// | count u64 | (height u64 | application hash 32 | results root 32) each | what the ledger keeps, see [`System::encode`]
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    height: Height,
    ordered: BTreeMap<Hash, Ordered>,
    results: BTreeMap<Height, (Hash, Hash)>,
    system: System,
}

/// The form of snapshots that this program makes and takes.
const SNAPSHOT_VERSION: u32 = 1;

impl Snapshot {
    /// The last executed height.
    pub fn height(&self) -> Height {
        self.height
    }

    /// Whether a header says that the state behind [`Snapshot::height`] is this one, with `application` as the root of the application's. It
    /// is the header of that height + lag, of a block that is final.
    pub fn is_carried_by(&self, lag: u64, application: &Hash, header: &Header) -> bool {
        let says = (header.app_hash, header.results_root);
        header.height.0 == self.height.0 + lag
            && self.results.get(&self.height) == Some(&says)
            && says.0 == app_hash(&self.system, application)
    }

    /// All of it.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = SNAPSHOT_VERSION.to_le_bytes().to_vec();
        bytes.extend(self.height.0.to_le_bytes());
        bytes.extend((self.ordered.len() as u64).to_le_bytes());
        for (digest, Ordered { expiry, named_at }) in &self.ordered {
            bytes.extend(digest.0);
            bytes.extend(expiry.0.to_le_bytes());
            bytes.extend(named_at.0.to_le_bytes());
        }
        bytes.extend((self.results.len() as u64).to_le_bytes());
        for (height, (app_hash, results_root)) in &self.results {
            bytes.extend(height.0.to_le_bytes());
            bytes.extend(app_hash.0);
            bytes.extend(results_root.0);
        }
        bytes.extend(self.system.encode());
        bytes
    }

    /// Reads one.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        if cursor.u32()? != SNAPSHOT_VERSION {
            return Err(DecodeError::Unknown("version of a snapshot"));
        }
        let height = Height(cursor.u64()?);
        let (mut ordered, mut results) = (BTreeMap::new(), BTreeMap::new());
        for _ in 0..cursor.u64()? {
            let digest = Hash(cursor.array()?);
            ordered.insert(digest, Ordered { expiry: Height(cursor.u64()?), named_at: Height(cursor.u64()?) });
        }
        for _ in 0..cursor.u64()? {
            results.insert(Height(cursor.u64()?), (Hash(cursor.array()?), Hash(cursor.array()?)));
        }
        let system = System::decode(cursor.take(cursor.left())?)?;
        Ok(Self { height, ordered, results, system })
    }
}

/// The state's hash, as headers carry it: of the ledger's part, hashed, and of the application's.
pub fn state_hash(system: &Hash, application: &Hash) -> Hash {
    hash(&[b"metanode state v1\0", &system.0[..], &application.0].concat())
}

fn app_hash(system: &System, application: &Hash) -> Hash {
    state_hash(&system.hash(), application)
}

impl Chain {
    /// At its beginning, with the application's hash there. The genesis must have been [checked](Genesis::check).
    pub fn new(genesis: &Genesis, application: &Hash) -> Self {
        let id = genesis.chain();
        let validators = genesis.validator_set().expect("the genesis was checked");
        let last = *validators.iter().last().expect("a set is never empty");
        let tip = Tip { height: Height(0), hash: Hash(id.0), author: last, time_ms: genesis.time_ms };
        let system = System::new(validators);
        let results = BTreeMap::from([(Height(0), (app_hash(&system, application), tree::root(&[])))]);
        Self {
            id,
            lag: genesis.lag,
            expiry_heights_max: genesis.expiry_heights_max,
            opaque: genesis.opaque,
            tip,
            executed: Height(0),
            system,
            ordered: BTreeMap::new(),
            expiries: BTreeSet::new(),
            results,
        }
    }

    /// Which chain.
    pub fn id(&self) -> &ChainId {
        &self.id
    }

    /// The last decided block.
    pub fn tip(&self) -> &Tip {
        &self.tip
    }

    /// The last executed height.
    pub fn executed_height(&self) -> Height {
        self.executed
    }

    /// What the ledger keeps, as of the last executed height.
    pub fn system(&self) -> &System {
        &self.system
    }

    /// The height whose results the header of `height` carries; the beginning's for the first ones.
    fn carried(&self, height: Height) -> Height {
        Height(height.0.saturating_sub(self.lag))
    }

    /// The height whose header carries the results of `height`.
    pub fn carried_by(&self, height: Height) -> Height {
        Height(height.0.saturating_add(self.lag))
    }

    /// Who votes at the next height. `Err` says which height must be executed first (clause 20: nothing later is asked).
    pub fn validators(&self) -> Result<&ValidatorSet, BlockError> {
        let next = self.tip.height.next();
        self.ready(next)?;
        Ok(self.system_validators(next))
    }

    fn system_validators(&self, height: Height) -> &ValidatorSet {
        self.system.validators(height)
    }

    fn ready(&self, height: Height) -> Result<(), BlockError> {
        let needed = self.carried(height);
        if self.executed < needed {
            return Err(BlockError::NotExecuted(needed));
        }
        match self.system.unknown_versions().find(|(from, _)| *from <= height) {
            Some((from, version)) => Err(BlockError::NotSupported { version, from }),
            None => Ok(()),
        }
    }

    /// All that is known behind the last executed block, but for the application's state.
    pub fn snapshot(&self) -> Snapshot {
        let at = self.executed;
        let ordered = self.ordered.iter().filter(|(_, ordered)| ordered.named_at <= at);
        Snapshot {
            height: at,
            ordered: ordered.map(|(digest, ordered)| (*digest, *ordered)).collect(),
            results: self.results.clone(),
            system: self.system.clone(),
        }
    }

    /// Goes on behind a snapshot, whose last block is `block`.
    ///
    /// What it says is believed but for what the block says too; see [`Snapshot::is_carried_by`].
    pub fn restore(genesis: &Genesis, snapshot: Snapshot, block: &Block) -> Result<Self, BlockError> {
        let Snapshot { height, ordered, results, system } = snapshot;
        let Header { height: found, author, time_ms, .. } = block.header;
        if found != height {
            return Err(BlockError::Height { found, expected: height });
        }
        let tip = Tip { height, hash: block.hash(), author, time_ms };
        let this = Self {
            id: genesis.chain(),
            lag: genesis.lag,
            expiry_heights_max: genesis.expiry_heights_max,
            opaque: genesis.opaque,
            tip,
            executed: height,
            system,
            expiries: ordered.iter().map(|(digest, ordered)| (ordered.expiry, *digest)).collect(),
            ordered,
            results,
        };
        let carries = |height: Height| this.results.contains_key(&height);
        if !(this.carried(height.next()).0..=height.0).map(Height).all(carries) {
            return Err(BlockError::Differs("results of the last blocks"));
        }
        if validators_hash(this.system_validators(height)) != block.header.validators_hash {
            return Err(BlockError::Differs("validators hash"));
        }
        Ok(this)
    }

    /// What the protocol's next height begins with.
    pub fn new_height(&self) -> Result<NewHeight, BlockError> {
        Ok(NewHeight {
            height: self.tip.height.next(),
            validators: self.validators()?.clone(),
            parent: self.tip.hash,
            parent_author: self.tip.author,
            parent_time_ms: self.tip.time_ms,
        })
    }

    /// The next block, of these batches. Its time is above its parent's, whatever the clock says.
    pub fn make(&self, author: NodeKey, unix_ms: u64, batches: Vec<Hash>) -> Result<Block, BlockError> {
        let height = self.tip.height.next();
        self.ready(height)?;
        let (app_hash, results_root) = self.results[&self.carried(height)];
        let header = Header {
            height,
            time_ms: unix_ms.max(self.tip.time_ms + 1),
            parent: self.tip.hash,
            author,
            batches_root: batches_root(&batches),
            app_hash,
            results_root,
            validators_hash: validators_hash(self.system_validators(height)),
            next_validators_hash: validators_hash(self.system_validators(height.next())),
        };
        Ok(Block { header, batches })
    }

    /// Whether a block may follow, whose batches are all here: `named` has what is asked of each, in their order. Its time is the protocol's
    /// to see.
    pub fn check(&self, block: &Block, named: &[Facts]) -> Result<(), BlockError> {
        assert_eq!(named.len(), block.batches.len(), "all batches are here");
        let (found, expected) = (block.header.height, self.tip.height.next());
        if found != expected {
            return Err(BlockError::Height { found, expected });
        }
        if block.batches.len() > BATCHES_MAX {
            return Err(BlockError::TooManyBatches(block.batches.len()));
        }
        let mut batches = block.batches.clone();
        batches.sort_unstable();
        if let Some(pair) = batches.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(BlockError::Twice(pair[0]));
        }
        for (digest, facts) in block.batches.iter().zip(named) {
            self.check_batch(digest, facts)?;
        }
        let right = self.make(block.header.author, block.header.time_ms, block.batches.clone())?.header;
        let differs = [
            ("parent", right.parent != block.header.parent),
            ("time", right.time_ms != block.header.time_ms),
            ("batches root", right.batches_root != block.header.batches_root),
            ("application hash", right.app_hash != block.header.app_hash),
            ("results root", right.results_root != block.header.results_root),
            ("validators hash", right.validators_hash != block.header.validators_hash),
            ("next validators hash", right.next_validators_hash != block.header.next_validators_hash),
        ];
        match differs.iter().find(|(_, differs)| *differs) {
            Some((what, _)) => Err(BlockError::Differs(what)),
            None => Ok(()),
        }
    }

    /// Whether a batch may be named by the next block.
    pub fn check_batch(&self, digest: &Hash, facts: &Facts) -> Result<(), BlockError> {
        let next = self.tip.height.next();
        let (from, to) = (next.0, next.0 + self.expiry_heights_max);
        // Also while it is not known yet who votes: whoever asks may take that for no answer.
        if self.has_ordered(digest) {
            return Err(BlockError::OrderedBefore(*digest));
        }
        if !(from..=to).contains(&facts.expiry.0) {
            return Err(BlockError::ExpiredBatch(*digest));
        }
        match self.validators()?.contains(&facts.author) {
            true => Ok(()),
            false => Err(BlockError::StrangersBatch(*digest)),
        }
    }

    /// Whether a block has named a batch that could be named again.
    pub fn has_ordered(&self, digest: &Hash) -> bool {
        self.ordered.contains_key(digest)
    }

    /// Whether a transaction may go into a batch now. Its signature is checked elsewhere, many at a time.
    pub fn check_transaction(&self, transaction: &Transaction<'_>) -> Result<(), TransactionError> {
        if transaction.kind == Kind::Opaque {
            return if self.opaque { Ok(()) } else { Err(TransactionError::Unsigned) };
        }
        let next = self.tip.height.next();
        if transaction.expiry < next {
            return Err(TransactionError::Expired(transaction.expiry));
        }
        if transaction.expiry.0 - next.0 > self.expiry_heights_max {
            return Err(TransactionError::ExpiresTooLate(transaction.expiry));
        }
        let is_system = transaction.kind != Kind::Application;
        if is_system && !self.system.latest().contains(&transaction.account) {
            return Err(TransactionError::NotAValidator);
        }
        Ok(())
    }

    /// A block is final.
    ///
    /// # Panics
    /// When it was not [checked](Self::check).
    pub fn decided(&mut self, block: &Block, named: &[Facts]) {
        assert_eq!(block.header.height, self.tip.height.next(), "heights follow each other");
        assert_eq!(block.header.parent, self.tip.hash, "blocks follow each other");
        let Header { height, author, time_ms, .. } = block.header;
        self.tip = Tip { height, hash: block.hash(), author, time_ms };
        for (digest, facts) in block.batches.iter().zip(named) {
            self.ordered.insert(*digest, Ordered { expiry: facts.expiry, named_at: height });
            self.expiries.insert((facts.expiry, *digest));
        }
        let left = self.expiries.split_off(&(height.next(), Hash([0; 32])));
        for (_, digest) in std::mem::replace(&mut self.expiries, left) {
            self.ordered.remove(&digest);
        }
    }

    /// What it takes to execute the next block that was not; the batches are those that it names, in their order.
    ///
    /// # Panics
    /// When it is another block, or one that is not final.
    pub fn plan(&self, block: &Block, batches: Vec<Batch>) -> Plan {
        let height = block.header.height;
        assert!(height == self.executed.next() && height <= self.tip.height, "blocks are executed in their order");
        assert!(batches.iter().map(Batch::digest).eq(block.batches.iter().copied()), "the batches are the block's");
        Plan {
            chain: self.id,
            height,
            time_ms: block.header.time_ms,
            batches,
            system: self.system.clone(),
            acts_at: Height(height.0 + self.lag + 1),
            expiry_max: Height(height.0.saturating_add(self.expiry_heights_max)),
        }
    }

    /// A block was executed.
    ///
    /// # Panics
    /// When it is not the next one.
    pub fn executed(&mut self, done: Done) -> Executed {
        let Done { executed, system, had: _, early: _ } = done;
        assert_eq!(executed.height, self.executed.next(), "blocks are executed in their order");
        self.system = system;
        self.executed = executed.height;
        self.results.insert(executed.height, (executed.app_hash, executed.results_root));
        // What no header to come carries.
        self.results = self.results.split_off(&self.carried(self.executed.next()));
        executed
    }
}
