//! The step function: inputs in, effects out.

use std::{collections::BTreeMap, time::Duration};

use metanode_types::{Hash, NodeKey};

use rkyv::{Archive, Deserialize, Serialize};

use crate::{
    evidence::Evidence,
    future::Future,
    height::{AtHeight, NoQuorum, Prepared, Step, Timing},
    justify::Refusal,
    message::{
        Block, Certificate, ChainId, Commit, Height, Justification, Message, Prepare, Proposal, RoundChange, Signed,
        Verifier, View,
    },
    validators::ValidatorSet,
};

/// One signer is answered once in so long with blocks that it has missed (clause 24).
pub const HELP_INTERVAL: Duration = Duration::from_millis(100);

/// What does not change while a node runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Parameters {
    /// The chain.
    pub chain: ChainId,
    /// The node's key; `None` for one that only observes.
    pub me: Option<NodeKey>,
    /// How long rounds last.
    pub timing: Timing,
    /// How far a fresh block's time may be ahead of the clock here, in milliseconds (clause 15).
    pub clock_drift_ms_max: u64,
}

/// When a step happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Of a clock that only goes forward.
    pub monotonic: Duration,
    /// Milliseconds since 1970, as the clock on the wall has them; for the times of blocks only.
    pub unix_ms: u64,
}

/// What a height begins with. All of it comes from blocks that are final (clause 20).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct NewHeight {
    /// One above the last decided.
    pub height: Height,
    /// Who votes.
    pub validators: ValidatorSet,
    /// Hash of the block before.
    pub parent: Hash,
    /// Who made the block before (clause 19); the genesis says it for the first.
    pub parent_author: NodeKey,
    /// Time of the block before.
    pub parent_time_ms: u64,
}

/// Timers that the shell keeps: one of each kind, the last one set counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Timer {
    /// A round has lasted too long.
    Round(View),
    /// A round change is to be said again.
    Resend(View),
    /// A height has had nothing to order for long enough.
    Empty(Height),
}

/// What the core reacts to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input<B> {
    /// The height behind the last decided may begin. The application is at most as far behind as the chain allows.
    NewHeight(NewHeight),
    /// There is something to order, or an empty block is wanted.
    Work,
    /// Answer to [`Effect::Build`].
    Built {
        /// As asked.
        view: View,
        /// By this node, for that height.
        block: B,
    },
    /// Answer to [`Effect::Validate`]. `valid`: the block may be executed, and what it names is here, checked, on disk, pinned, and will
    /// be served (clause 14).
    Validated {
        /// Of the block.
        hash: Hash,
        /// Verdict.
        valid: bool,
    },
    /// From a validator, or from this node itself: what was [cast](Effect::Cast) comes back once it is signed and on disk, and is checked
    /// like anybody's (clause 4).
    Message(Message<B>),
    /// A timer has run out.
    Timeout(Timer),
    /// A validator has connected again.
    Connected(NodeKey),
    /// Whether this node may vote: not while its application is behind, nor with a sign state that is missing or old, until an operator
    /// says otherwise (clauses 22 and 25).
    MayVote(bool),
}

/// A message to be signed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Draft<B> {
    /// See [`Message`].
    Proposal {
        /// What is signed.
        payload: Proposal,
        /// Block.
        block: B,
        /// Why it may be proposed.
        justification: Justification,
    },
    /// See [`Message`].
    Prepare(Prepare),
    /// See [`Message`].
    Commit(Commit),
    /// See [`Message`].
    RoundChange {
        /// What is signed.
        payload: RoundChange,
        /// The block that was prepared.
        block: Option<B>,
        /// The quorum that prepared it.
        prepares: Vec<Signed<Prepare>>,
    },
}

/// What must survive a crash (clause 21).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub enum Record<B> {
    /// This round has begun.
    Round(View),
    /// A block that a prepare follows for.
    Block(B),
    /// The lock.
    Prepared(Prepared<B>),
    /// A signed message of this node.
    Cast(Message<B>),
    /// A final block.
    Decision(Box<(B, Certificate)>),
}

/// What the shell does, in this order: nothing behind a [`Persist`](Self::Persist) or [`Cast`](Self::Cast) happens before its record is
/// durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect<B> {
    /// Put a record on disk.
    Persist(Record<B>),
    /// Sign a message, put it on disk as [`Record::Cast`], send it to all other validators, and give it back as [`Input::Message`].
    Cast(Draft<B>),
    /// Send a message that is signed already, to one validator or to all others.
    Send {
        /// To whom; `None`: to all.
        to: Option<NodeKey>,
        /// What.
        message: Message<B>,
    },
    /// Answer with [`Input::Timeout`] after a while; replaces the timer of this kind that was set before.
    SetTimer {
        /// Which.
        timer: Timer,
        /// When.
        after: Duration,
    },
    /// Make a block; answer: [`Input::Built`].
    Build {
        /// Where.
        view: View,
    },
    /// Check a block, get what it names, keep it; answer: [`Input::Validated`].
    Validate {
        /// What.
        block: B,
        /// Nobody has prepared it yet.
        fresh: bool,
    },
    /// A block is final, and on disk. What comes next is [`Input::NewHeight`].
    Decided(Box<(B, Certificate)>),
    /// A block is final, and not here: get it, and give it back as [`Message::NewBlock`].
    Missing {
        /// Where it was decided.
        view: View,
        /// Of the block.
        hash: Hash,
    },
    /// Send the final block of this height, with its certificate, to a validator that is behind (clause 24).
    Help {
        /// To whom.
        to: NodeKey,
        /// Which.
        height: Height,
    },
    /// A validator is at a later height: this node may be behind, and can ask it for final blocks.
    Behind {
        /// Who.
        signer: NodeKey,
        /// Where it is.
        height: Height,
    },
    /// A validator has signed two things that exclude each other (clause 26).
    Evidence(Evidence),
    /// A message counts for nothing.
    Refused {
        /// Who says to have signed it.
        signer: Option<NodeKey>,
        /// Why.
        refusal: Refusal,
    },
    /// A quorum has decided for a block that is invalid here: more than f are faulty, or this node is. It says nothing more.
    Halt(Certificate),
}

/// The state of a validator, or of who only observes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Core<B> {
    parameters: Parameters,
    may_vote: bool,
    halted: bool,
    current: Option<AtHeight<B>>,
    future: Future<B>,
    /// When each signer was last helped.
    helped: BTreeMap<NodeKey, Duration>,
}

impl<B: Block> Core<B> {
    /// Waits for [`Input::NewHeight`].
    pub fn new(parameters: Parameters) -> Self {
        Self {
            parameters,
            may_vote: true,
            halted: false,
            current: None,
            future: Future::default(),
            helped: BTreeMap::new(),
        }
    }

    /// Goes on where the records end, which are those of a node of the same parameters, in their order (clause 22).
    pub fn restore(
        parameters: Parameters,
        at: NewHeight,
        records: &[Record<B>],
        may_vote: bool,
        now: Now,
        verifier: &dyn Verifier,
    ) -> (Self, Vec<Effect<B>>) {
        let mut core = Self { may_vote, ..Self::new(parameters) };
        let mut effects = Vec::new();
        let mut current = AtHeight::new(at);
        records.iter().for_each(|record| current.restore(record));
        let mut step = Step { parameters: &core.parameters, may_vote, now, verifier, effects: &mut effects };
        for record in records {
            if let Record::Cast(message) = record
                && message.view().height == current.height()
            {
                current.remember(message);
                // It was right when it was said; what is older than the round counts for nothing any more.
                _ = current.take(&mut step, message.clone());
            }
        }
        current.resume(&mut step);
        core.current = Some(current);
        (core, effects)
    }

    /// Height and round, once there is one.
    pub fn view(&self) -> Option<View> {
        self.current.as_ref().map(AtHeight::view)
    }

    /// Why nothing is decided, when it is for want of validators that take part: a round has ended here, and no quorum asks for the next one.
    /// For a moment it is so at each end of a round.
    pub fn no_quorum(&self) -> Option<NoQuorum> {
        self.current.as_ref().and_then(AtHeight::no_quorum)
    }

    /// The fewest records from which [`restore`](Self::restore) goes on as this one would: what a log that begins anew begins with. `None` while
    /// something was [cast](Effect::Cast) that has not come back, or was refused here: only the log has it.
    pub fn records(&self) -> Option<Vec<Record<B>>> {
        match &self.current {
            Some(current) => current.records(self.parameters.me.as_ref()),
            None => Some(Vec::new()),
        }
    }

    /// Takes an input.
    pub fn step(&mut self, now: Now, verifier: &dyn Verifier, input: Input<B>) -> Vec<Effect<B>> {
        let mut effects = Vec::new();
        if self.halted {
            return effects;
        }
        match input {
            Input::NewHeight(at) => self.begin(now, verifier, at, &mut effects),
            Input::MayVote(may_vote) => {
                let before = std::mem::replace(&mut self.may_vote, may_vote);
                if may_vote
                    && !before
                    && let Some(current) = self.current.as_mut().filter(|current| current.decided.is_none())
                {
                    let parameters = &self.parameters;
                    current.resume(&mut Step { parameters, may_vote, now, verifier, effects: &mut effects });
                }
            }
            Input::Message(message) => self.message(now, verifier, message, &mut effects),
            input => {
                let Some(current) = &mut self.current else { return effects };
                let mut step = Step {
                    parameters: &self.parameters,
                    may_vote: self.may_vote,
                    now,
                    verifier,
                    effects: &mut effects,
                };
                match input {
                    Input::Connected(peer) => current.resend(&mut step, Some(peer)),
                    _ if current.decided.is_some() => {}
                    Input::Work => current.work(&mut step),
                    Input::Built { view, block } => current.built(&mut step, view, block),
                    Input::Validated { hash, valid } => current.validated(&mut step, &hash, valid),
                    Input::Timeout(timer) => _ = current.timeout(&mut step, timer),
                    Input::NewHeight(_) | Input::MayVote(_) | Input::Message(_) => unreachable!("handled above"),
                }
            }
        }
        self.halted = effects.iter().any(|effect| matches!(effect, Effect::Halt(_)));
        effects
    }

    fn begin(&mut self, now: Now, verifier: &dyn Verifier, at: NewHeight, effects: &mut Vec<Effect<B>>) {
        if let Some(current) = &self.current {
            assert!(current.decided.is_some(), "a height begins when the one before is decided");
            assert_eq!(at.height, current.height().next(), "heights follow each other");
        }
        let height = at.height;
        self.current = Some(AtHeight::new(at));
        if let Some(after) = self.parameters.timing.empty {
            effects.push(Effect::SetTimer { timer: Timer::Empty(height), after });
        }
        for message in self.future.take(height) {
            self.message(now, verifier, message, effects);
        }
    }

    fn message(&mut self, now: Now, verifier: &dyn Verifier, message: Message<B>, effects: &mut Vec<Effect<B>>) {
        let signer = message.signer();
        let Some(current) = &mut self.current else { return };
        let (height, here) = (message.view().height, current.height());
        let result = if height > here {
            let kept = self.future.keep(&self.parameters.chain, &current.at.validators, verifier, here, message);
            // Whether there is room for it or not: its signer has said where it is.
            let is_signed = !matches!(kept, Err(Refusal::NotAValidator | Refusal::BadSignature));
            effects.extend(signer.filter(|_| is_signed).map(|signer| Effect::Behind { signer, height }));
            kept
        } else if height < here || current.decided.is_some() {
            self.help(now, verifier, &message, effects)
        } else {
            let mut step = Step { parameters: &self.parameters, may_vote: self.may_vote, now, verifier, effects };
            current.message(&mut step, message)
        };
        if let Err(refusal) = result {
            effects.push(Effect::Refused { signer, refusal });
        }
    }

    /// Clause 24: who is still at a height that is over gets its block. A vote for the last one needs no answer: it is late, or its signer
    /// will ask for another round.
    fn help(
        &mut self,
        now: Now,
        verifier: &dyn Verifier,
        message: &Message<B>,
        effects: &mut Vec<Effect<B>>,
    ) -> Result<(), Refusal> {
        let (Some(signer), height) = (message.signer(), message.view().height) else { return Err(Refusal::Old) };
        let here = self.current.as_ref().map_or(height, AtHeight::height);
        if !matches!(message, Message::RoundChange(_)) && here <= height.next() {
            return Err(Refusal::Old);
        }
        let due = self.helped.get(&signer).is_none_or(|last| now.monotonic >= *last + HELP_INTERVAL);
        let is_validator = self.current.as_ref().is_some_and(|current| current.at.validators.contains(&signer));
        if self.parameters.me == Some(signer) || !due || !is_validator {
            return Err(Refusal::Old);
        }
        if !message.is_signed(&self.parameters.chain, verifier) {
            return Err(Refusal::BadSignature);
        }
        self.helped.insert(signer, now.monotonic);
        effects.push(Effect::Help { to: signer, height });
        Ok(())
    }
}
