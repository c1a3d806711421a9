use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt,
    rc::Rc,
};

use metanode_ibft::{
    self as ibft, Block as _, Certificate, Core, Draft, Evidence, Height, Input, Message, NoQuorum, Now, Parameters,
    Record, Refusal, Timer, Verifier, View,
};
use metanode_ledger::{
    BATCH_BYTES_MAX, Batch, BatchDraft, Block, BlockError, Chain, Done, Early, Executed, Facts, Genesis, Transaction,
    TransactionError,
};
use metanode_mempool::{self as mempool, Board, BoardLimits, BoardRefusal, Taken, Waiting, WaitingLimits};
use metanode_types::{Hash, NodeKey};

/// Heights ahead at which a batch of this validator expires, at most: a batch that was not named for so long is made again.
const BATCH_HEIGHTS: u64 = 100;

/// Heights between two looks at all that waits for what has expired.
const EXPIRE_PERIOD: u64 = 16;

/// Blocks whose verdict is open, at most: those of the rounds that count, and a final one.
const OPEN_VERDICTS_MAX: usize = 8;

/// What does not change while a node runs.
#[derive(Clone)]
pub struct Config {
    /// The validator's key; `None` for who only observes.
    pub me: Option<NodeKey>,
    /// How much of clients may wait.
    pub waiting: WaitingLimits,
    /// How much of validators may be open.
    pub board: BoardLimits,
    /// Number of this validator's next batch.
    pub batch_number: u64,
    /// Checks signatures of validators' messages: [`Zip215`](metanode_ledger::system::Zip215), or something that knows its verdicts already.
    pub verifier: Rc<dyn Verifier>,
}

/// What the shell does, in this order; see [`ibft::Effect`] for the first four.
#[derive(Debug)]
pub enum Effect {
    /// Put a record on disk.
    Persist(Record<Block>),
    /// Sign a message, put it on disk, send it to all other validators, and give it [back](Replica::message).
    Cast(Draft<Block>),
    /// Send a message to one validator, or to all others.
    Send {
        /// To whom; `None`: to all.
        to: Option<NodeKey>,
        /// What.
        message: Message<Block>,
    },
    /// Call [`Replica::timeout`] after a while; replaces the timer of this kind that was set before.
    SetTimer {
        /// Which.
        timer: Timer,
        /// When.
        after: std::time::Duration,
    },
    /// Sign a batch, put it on disk, send it to all other validators, and give it [back](Replica::batch_here).
    MakeBatch(BatchDraft),
    /// Get a batch from one of these, the first first; check it, put it on disk, and give it [back](Replica::batch_here), or say that it is
    /// [bad](Replica::batch_is_bad). It is asked for once.
    FetchBatch {
        /// Which.
        digest: Hash,
        /// Who should have it.
        from: Vec<NodeKey>,
    },
    /// A block is final: store it with its certificate.
    Store {
        /// The block.
        block: Block,
        /// Why it is final.
        certificate: Certificate,
    },
    /// Execute a block, which is stored: [`Chain::plan`], [`Plan::execute`](metanode_ledger::Plan::execute), and [`Replica::executed`].
    Execute(Block),
    /// Send a final block with its certificate to a validator that is behind.
    Help {
        /// To whom.
        to: NodeKey,
        /// Which.
        height: Height,
    },
    /// Ask a validator for a final block, and give it in as a [message](Replica::message).
    CatchUp {
        /// Whom; `None`: anybody.
        from: Option<NodeKey>,
        /// Which.
        height: Height,
    },
    /// A validator has signed two things that exclude each other: make a transaction of it.
    Accuse(Evidence),
    /// No block will ever name these batches.
    Forget(Vec<Hash>),
    /// A message counts for nothing.
    Refused {
        /// Who says to have signed it.
        signer: Option<NodeKey>,
        /// Why.
        refusal: Refusal,
    },
    /// A quorum has decided for a block that is invalid here. This node says nothing more.
    Halt(Certificate),
}

/// See the crate.
pub struct Replica {
    me: Option<NodeKey>,
    verifier: Rc<dyn Verifier>,
    core: Core<Block>,
    chain: Chain,
    waiting: Waiting,
    board: Board,
    effects: VecDeque<Effect>,
    /// The height that the protocol is at.
    begun: Height,
    /// It knows that there is something to order.
    has_work: bool,
    /// The last block that named a batch.
    last_full: Height,
    /// A proposal is asked for.
    building: Option<View>,
    /// Blocks whose verdict is open.
    validating: VecDeque<Block>,
    /// Final, and not all of its batches are here: after a restart.
    undecided: Option<Box<(Block, Certificate)>>,
    /// Final, and not executed; the first is being executed.
    executing: VecDeque<Block>,
    /// Asked for.
    fetching: BTreeSet<Hash>,
    /// Batches that no honest validator has made: blocks that name them are invalid.
    bad: BTreeSet<Hash>,
    /// A batch of this validator is being written: its number, and what went into it.
    making: Option<(u64, Taken)>,
    /// Those that were made and are not over.
    made: BTreeMap<Hash, Taken>,
    batch_number: u64,
    expiry_heights: u64,
    /// Where validators say to be, if that is ahead.
    ahead: BTreeMap<NodeKey, Height>,
    asked: Height,
}

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replica").field("view", &self.view()).field("tip", self.chain.tip()).finish_non_exhaustive()
    }
}

impl Replica {
    /// Goes on with a chain, all of whose blocks are executed, from what the sign state holds. `batches` are those on disk; of them count
    /// which the next block may name.
    ///
    /// # Panics
    /// When the chain is not executed to its tip.
    pub fn restore(
        config: Config,
        genesis: &Genesis,
        chain: Chain,
        batches: &[Batch],
        records: &[Record<Block>],
        may_vote: bool,
        now: Now,
    ) -> Self {
        assert_eq!(chain.executed_height(), chain.tip().height, "the chain is executed");
        let parameters = Parameters {
            chain: *chain.id(),
            me: config.me,
            timing: genesis.timing(),
            clock_drift_ms_max: genesis.clock_drift_ms_max,
        };
        let mut board = Board::new(config.board);
        for batch in batches {
            // What the chain has named is nobody's to name again; one that is there twice is there.
            if chain.check_batch(&batch.digest(), &batch.facts()).is_ok() {
                _ = board.insert(batch);
            }
        }
        let at = chain.new_height().expect("it is executed");
        let (core, effects) = Core::restore(parameters, at, records, may_vote, now, &*config.verifier);
        let mut this = Self {
            me: config.me,
            verifier: config.verifier,
            core,
            begun: chain.tip().height.next(),
            last_full: chain.tip().height,
            chain,
            waiting: Waiting::new(config.waiting),
            board,
            effects: VecDeque::new(),
            has_work: false,
            building: None,
            validating: VecDeque::new(),
            undecided: None,
            executing: VecDeque::new(),
            fetching: BTreeSet::new(),
            bad: BTreeSet::new(),
            making: None,
            made: BTreeMap::new(),
            batch_number: config.batch_number,
            expiry_heights: genesis.expiry_heights_max.min(BATCH_HEIGHTS),
            ahead: BTreeMap::new(),
            asked: Height(0),
        };
        if let Some(after) = genesis.timing().empty {
            this.effects.push_back(Effect::SetTimer { timer: Timer::Empty(this.begun), after });
        }
        let inputs = this.absorb(effects);
        this.run(now, inputs);
        this
    }

    /// What is to be done next.
    pub fn poll(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// The chain.
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Height and round.
    pub fn view(&self) -> Option<View> {
        self.core.view()
    }

    /// Why nothing is decided, when it is for want of validators that take part.
    pub fn no_quorum(&self) -> Option<NoQuorum> {
        self.core.no_quorum()
    }

    /// What waits.
    pub fn waiting(&self) -> &Waiting {
        &self.waiting
    }

    /// Batches that are here.
    pub fn board(&self) -> &Board {
        &self.board
    }

    /// The fewest records that a sign state needs, if they are all there is; see [`Core::records`].
    pub fn records(&self) -> Option<Vec<Record<Block>>> {
        self.core.records()
    }

    /// A message of a validator, or one of this node's own that was cast.
    pub fn message(&mut self, now: Now, message: Message<Block>) {
        self.run(now, [Input::Message(message)].into());
    }

    /// A timer has run out.
    pub fn timeout(&mut self, now: Now, timer: Timer) {
        self.run(now, [Input::Timeout(timer)].into());
    }

    /// A validator has connected again.
    pub fn connected(&mut self, now: Now, peer: NodeKey) {
        self.run(now, [Input::Connected(peer)].into());
    }

    /// Whether this node may vote, as far as its operator says.
    pub fn may_vote(&mut self, now: Now, may_vote: bool) {
        self.run(now, [Input::MayVote(may_vote)].into());
    }

    /// Takes a transaction of a client. Its signature was checked, and the application has nothing against it; `executed` is how many its
    /// account has had.
    pub fn submit(
        &mut self,
        now: Now,
        peer: NodeKey,
        transaction: &Transaction<'_>,
        executed: u64,
    ) -> Result<(), SubmitRefusal> {
        self.submit_all(now, peer, [(*transaction, executed)]).pop().expect("one for each")
    }

    /// Takes many, so that they can go into one batch. A verdict for each.
    pub fn submit_all<'a>(
        &mut self,
        now: Now,
        peer: NodeKey,
        transactions: impl IntoIterator<Item = (Transaction<'a>, u64)>,
    ) -> Vec<Result<(), SubmitRefusal>> {
        let insert = |(transaction, executed): (Transaction<'a>, u64)| {
            self.chain.check_transaction(&transaction)?;
            Ok(self.waiting.insert(peer, &transaction, executed)?)
        };
        let verdicts = transactions.into_iter().map(insert).collect();
        self.run(now, VecDeque::new());
        verdicts
    }

    /// Whether a batch of a validator would be taken, before it is checked and written.
    pub fn wants_batch(&self, digest: &Hash, facts: &Facts, bytes: usize) -> Result<(), BatchRefusal> {
        if self.board.contains(digest) {
            return Err(BoardRefusal::Known.into());
        }
        if self.chain.has_ordered(digest) {
            return Err(BlockError::OrderedBefore(*digest).into());
        }
        if self.fetching.contains(digest) {
            return Ok(()); // a block names it
        }
        match self.chain.check_batch(digest, facts) {
            // Who votes on the next block is known soon; who voted last is known now. What a block names is checked again.
            Err(BlockError::NotExecuted(_)) if self.chain.system().latest().contains(&facts.author) => {}
            checked => checked?,
        }
        Ok(self.board.has_room(&facts.author, bytes)?)
    }

    /// A batch is checked and on disk: one of this validator's, or another's.
    pub fn batch_here(&mut self, now: Now, batch: &Batch) {
        let digest = batch.digest();
        if Some(batch.author()) == self.me
            && let Some((_, taken)) = self.making.take_if(|(number, _)| *number == batch.number())
        {
            self.made.insert(digest, taken);
        }
        self.fetching.remove(&digest);
        // It may have come twice, also so late that the board has it no more: what a block has named is nobody's to name again.
        if !self.chain.has_ordered(&digest) {
            _ = self.board.insert(batch);
        }
        self.run(now, VecDeque::new());
    }

    /// This validator's batch could not be made: what was in it is lost.
    pub fn batch_failed(&mut self, now: Now) {
        if let Some((_, taken)) = self.making.take() {
            self.waiting.settle(&taken);
        }
        self.run(now, VecDeque::new());
    }

    /// A batch that a block names is not one: its signature, or one in it, does not hold.
    pub fn batch_is_bad(&mut self, now: Now, digest: Hash) {
        if self.fetching.remove(&digest) {
            self.bad.insert(digest);
        }
        self.run(now, VecDeque::new());
    }

    /// A batch could not be had now; it is asked for again as long as a block needs it.
    pub fn batch_is_missing(&mut self, now: Now, digest: &Hash) {
        self.fetching.remove(digest);
        self.run(now, VecDeque::new());
    }

    /// What came of [`Effect::Execute`].
    pub fn executed(&mut self, now: Now, done: Done) -> Executed {
        let block = self.executing.pop_front().expect("it was asked for");
        for (account, had) in done.had() {
            self.waiting.executed(account, *had);
        }
        let early: Vec<Early> = done.early().iter().filter(|it| Some(it.taken_by) == self.me).cloned().collect();
        let executed = self.chain.executed(done);
        for taken in block.batches.iter().filter_map(|digest| self.made.remove(digest)) {
            self.waiting.settle(&taken);
        }
        self.take_again(&early);
        let next = self.chain.tip().height.next();
        let expired = self.board.forget(executed.height, next);
        for taken in expired.iter().filter_map(|digest| self.made.remove(digest)) {
            self.waiting.settle(&taken);
        }
        // Who comes to the front is looked at there; this is for those who never do.
        if next.0.is_multiple_of(EXPIRE_PERIOD) {
            self.waiting.expire(next);
        }
        if !expired.is_empty() {
            self.effects.push_back(Effect::Forget(expired));
        }
        self.execute_next();
        self.run(now, VecDeque::new());
        executed
    }

    /// What was too early waits again, as if this validator had brought it.
    fn take_again(&mut self, early: &[Early]) {
        for Early { taken_by, account: _, bytes, next } in early {
            let transaction = Transaction::decode(bytes).expect("it was executed");
            if self.chain.check_transaction(&transaction).is_ok() {
                self.waiting.take_back(*taken_by, &transaction, *next);
            }
        }
    }

    fn execute_next(&mut self) {
        if let Some(block) = self.executing.front() {
            self.effects.push_back(Effect::Execute(block.clone()));
        }
    }

    /// Gives inputs to the protocol, and does what follows from them until nothing does.
    fn run(&mut self, now: Now, mut inputs: VecDeque<Input<Block>>) {
        loop {
            while let Some(input) = inputs.pop_front() {
                let effects = self.core.step(now, &*self.verifier, input);
                inputs.extend(self.absorb(effects));
            }
            match self.next_input(now) {
                Some(input) => inputs.push_back(input),
                None => break,
            }
        }
        self.make_batch();
    }

    /// Passes on the protocol's effects; what it asks of the chain is remembered.
    fn absorb(&mut self, effects: Vec<ibft::Effect<Block>>) -> VecDeque<Input<Block>> {
        for effect in effects {
            let effect = match effect {
                ibft::Effect::Persist(record) => Effect::Persist(record),
                ibft::Effect::Cast(draft) => Effect::Cast(draft),
                ibft::Effect::Send { to, message } => Effect::Send { to, message },
                ibft::Effect::SetTimer { timer, after } => Effect::SetTimer { timer, after },
                ibft::Effect::Help { to, height } => Effect::Help { to, height },
                ibft::Effect::Evidence(evidence) => Effect::Accuse(evidence),
                ibft::Effect::Refused { signer, refusal } => Effect::Refused { signer, refusal },
                ibft::Effect::Halt(certificate) => Effect::Halt(certificate),
                ibft::Effect::Missing { view, .. } => Effect::CatchUp { from: None, height: view.height },
                ibft::Effect::Build { view } => {
                    self.building = Some(view);
                    continue;
                }
                ibft::Effect::Validate { block, .. } => {
                    if self.validating.len() == OPEN_VERDICTS_MAX {
                        self.validating.pop_front();
                    }
                    self.validating.push_back(block);
                    continue;
                }
                ibft::Effect::Decided(decided) => {
                    self.undecided = Some(decided);
                    continue;
                }
                ibft::Effect::Behind { signer, height } => {
                    let known = self.ahead.entry(signer).or_insert(height);
                    *known = height.max(*known);
                    continue;
                }
            };
            self.effects.push_back(effect);
        }
        VecDeque::new()
    }

    /// What follows from the chain and from what is here.
    fn next_input(&mut self, now: Now) -> Option<Input<Block>> {
        if let Some(decided) = self.undecided.take() {
            match self.facts(&decided.0) {
                Some(named) => self.decide(&decided.0, decided.1, &named),
                None => self.undecided = Some(decided),
            }
        }
        if let Some(view) = self.building.filter(|view| view.height == self.chain.tip().height.next()) {
            let me = self.me.expect("only who proposes builds");
            let wanted = self.board.propose(view.height);
            let fits = |digest: &Hash| {
                self.board.facts(digest).is_some_and(|facts| self.chain.check_batch(digest, &facts).is_ok())
            };
            let batches = wanted.into_iter().filter(fits).collect();
            if let Ok(block) = self.chain.make(me, now.unix_ms, batches) {
                self.building = None;
                return Some(Input::Built { view, block });
            }
        }
        if let Some((place, valid)) = self.verdict() {
            let block = self.validating.remove(place).expect("it is there");
            return Some(Input::Validated { hash: block.hash(), valid });
        }
        let next = self.chain.tip().height.next();
        if self.begun < next
            && self.undecided.is_none()
            && let Ok(at) = self.chain.new_height()
        {
            self.begun = next;
            self.has_work = false;
            return Some(Input::NewHeight(at));
        }
        self.catch_up();
        if self.begun == next && !self.has_work && self.wants_block() {
            self.has_work = true;
            return Some(Input::Work);
        }
        None
    }

    /// What the chain's rules ask of a block's batches, if all are here.
    fn facts(&mut self, block: &Block) -> Option<Vec<Facts>> {
        let facts: Option<Vec<Facts>> = block.batches.iter().map(|digest| self.board.facts(digest)).collect();
        if facts.is_none() {
            for digest in &block.batches {
                if !self.board.contains(digest) && !self.bad.contains(digest) && self.fetching.insert(*digest) {
                    let others = self.chain.validators().map(|set| set.iter().copied().collect::<Vec<_>>());
                    let others = others.unwrap_or_default().into_iter();
                    let others = others.filter(|key| *key != block.header.author && Some(*key) != self.me);
                    let from = [block.header.author].into_iter().chain(others).collect();
                    self.effects.push_back(Effect::FetchBatch { digest: *digest, from });
                }
            }
        }
        facts
    }

    /// The first block whose verdict is known now.
    fn verdict(&mut self) -> Option<(usize, bool)> {
        let next = self.chain.tip().height.next();
        self.validating.retain(|block| block.header.height == next);
        for place in 0..self.validating.len() {
            let block = self.validating[place].clone();
            let is_bad = |digest: &Hash| self.bad.contains(digest) || self.chain.has_ordered(digest);
            if block.batches.iter().any(is_bad) {
                return Some((place, false));
            }
            let Some(named) = self.facts(&block) else { continue };
            match self.chain.check(&block, &named) {
                Ok(()) => return Some((place, true)),
                Err(BlockError::NotExecuted(_)) => {} // later
                Err(_) => return Some((place, false)),
            }
        }
        None
    }

    fn decide(&mut self, block: &Block, certificate: Certificate, named: &[Facts]) {
        self.chain.decided(block, named);
        self.board.decided(block.header.height, &block.batches);
        if !block.batches.is_empty() {
            self.last_full = block.header.height;
        }
        self.bad.clear();
        self.effects.push_back(Effect::Store { block: block.clone(), certificate });
        self.executing.push_back(block.clone());
        if self.executing.len() == 1 {
            self.execute_next();
        }
    }

    /// Whether the next block is wanted now: there are batches, or results that no header carries yet.
    fn wants_block(&self) -> bool {
        let next = self.chain.tip().height.next();
        let uncertified = self.last_full > Height(0) && next <= self.chain.carried_by(self.last_full);
        uncertified || self.board.open_count() > 0
    }

    /// Asks for the next block, once for each, when more validators than can be faulty say to be ahead: one of them, who is not the farthest.
    fn catch_up(&mut self) {
        let next = self.chain.tip().height.next();
        self.ahead.retain(|_, height| *height > next);
        if self.ahead.is_empty() || self.asked >= next {
            return;
        }
        let Ok(validators) = self.chain.validators() else { return };
        let mut ahead: Vec<(Height, NodeKey)> = self.ahead.iter().map(|(key, height)| (*height, *key)).collect();
        ahead.retain(|(_, key)| validators.contains(key));
        ahead.sort_unstable_by_key(|(height, _)| std::cmp::Reverse(*height));
        if let Some((_, from)) = ahead.get(validators.faults()) {
            self.asked = next;
            self.effects.push_back(Effect::CatchUp { from: Some(*from), height: next });
        }
    }

    fn make_batch(&mut self) {
        let Some(me) = self.me else { return };
        let is_validator = self.chain.validators().is_ok_and(|set| set.contains(&me));
        let room = self.board.has_room(&me, BATCH_BYTES_MAX).is_ok();
        if self.making.is_some() || !is_validator || !room || !self.waiting.is_ready() {
            return;
        }
        let next = self.chain.tip().height.next();
        let mut draft = BatchDraft::new(me, self.batch_number, Height(next.0 + self.expiry_heights));
        let taken = self.waiting.fill(&mut draft, next);
        if draft.count() > 0 {
            self.making = Some((self.batch_number, taken));
            self.batch_number += 1;
            self.effects.push_back(Effect::MakeBatch(draft));
        }
    }
}

/// Why a transaction is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubmitRefusal {
    /// By the chain's rules.
    Chain(TransactionError),
    /// There is no room, or its nonce is taken.
    Waiting(mempool::Refusal),
}

impl From<TransactionError> for SubmitRefusal {
    fn from(error: TransactionError) -> Self {
        Self::Chain(error)
    }
}

impl From<mempool::Refusal> for SubmitRefusal {
    fn from(refusal: mempool::Refusal) -> Self {
        Self::Waiting(refusal)
    }
}

/// Why a batch is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchRefusal {
    /// By the chain's rules.
    Chain(BlockError),
    /// It is here, or there is no room.
    Board(BoardRefusal),
}

impl From<BlockError> for BatchRefusal {
    fn from(error: BlockError) -> Self {
        Self::Chain(error)
    }
}

impl From<BoardRefusal> for BatchRefusal {
    fn from(refusal: BoardRefusal) -> Self {
        Self::Board(refusal)
    }
}
