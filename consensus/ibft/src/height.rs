//! One height, from its first message to its decision.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use metanode_types::{
    Hash, NodeKey,
    sabotage::{self, Sabotage},
};

use rkyv::{Archive, Deserialize, Serialize};

use crate::{
    evidence::Evidence,
    justify::{Checks, Refusal, highest_prepared},
    machine::{Draft, Effect, NewHeight, Now, Parameters, Record, Timer},
    message::{
        Block, Certificate, Commit, Height, Justification, Message, Payload, Prepare, Proposal, ProposalMessage, Round,
        RoundChange, RoundChangeMessage, Signed, Verifier, View,
    },
    tally::Tally,
};

/// Rounds ahead of the current one whose votes are kept; proposals and round changes of any round are looked at.
pub(crate) const ROUNDS_AHEAD: u32 = 8;

/// A quorum of prepares of one round, and the block: the lock (clauses 10 and 12).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub struct Prepared<B> {
    /// Height and round.
    pub view: View,
    /// What was prepared.
    pub block: B,
    /// By distinct signers.
    pub prepares: Vec<Signed<Prepare>>,
}

/// A round that too few want to begin (clause 16).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoQuorum {
    /// Validators that have asked for it or a later one, this one included.
    pub heard: usize,
    /// How many it takes.
    pub quorum: usize,
}

/// A block that may be voted on, and what the application says of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Candidate<B> {
    block: B,
    valid: Option<bool>,
}

/// What this node has said in the current round: each at most once (clause 8).
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Said {
    proposal: bool,
    prepare: Option<Hash>,
    commit: Option<Hash>,
    round_change: bool,
    /// A block was asked for.
    asked: bool,
}

/// The state of one height.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct AtHeight<B> {
    pub(crate) at: NewHeight,
    round: Round,
    said: Said,
    /// There is something to order.
    work: bool,
    timer_runs: bool,
    /// The justified proposal of the current round.
    accepted: Option<Box<ProposalMessage<B>>>,
    candidates: BTreeMap<Hash, Candidate<B>>,
    prepares: Tally<Prepare>,
    commits: Tally<Commit>,
    /// The highest of each signer (clause 17).
    round_changes: BTreeMap<NodeKey, RoundChangeMessage<B>>,
    lock: Option<Prepared<B>>,
    /// A block that is final, by somebody else's certificate, and not yet checked.
    certified: Option<Certificate>,
    pub(crate) decided: Option<Box<(B, Certificate)>>,
    /// A decision whose block is not here was said.
    missing: BTreeSet<Hash>,
}

/// What a step works with, and where its effects go.
pub(crate) struct Step<'a, B> {
    pub(crate) parameters: &'a Parameters,
    pub(crate) may_vote: bool,
    pub(crate) now: Now,
    pub(crate) verifier: &'a dyn Verifier,
    pub(crate) effects: &'a mut Vec<Effect<B>>,
}

impl<B: Block> AtHeight<B> {
    pub(crate) fn new(at: NewHeight) -> Self {
        Self {
            at,
            round: Round::ZERO,
            said: Said::default(),
            work: false,
            timer_runs: false,
            accepted: None,
            candidates: BTreeMap::new(),
            prepares: Tally::default(),
            commits: Tally::default(),
            round_changes: BTreeMap::new(),
            lock: None,
            certified: None,
            decided: None,
            missing: BTreeSet::new(),
        }
    }

    /// Height and current round.
    pub(crate) fn view(&self) -> View {
        View { height: self.at.height, round: self.round }
    }

    pub(crate) fn height(&self) -> Height {
        self.at.height
    }

    /// See [`Core::no_quorum`](crate::Core::no_quorum).
    pub(crate) fn no_quorum(&self) -> Option<NoQuorum> {
        let waits = self.decided.is_none() && self.round > Round::ZERO && !self.timer_runs;
        waits.then(|| NoQuorum { heard: self.at_least(self.round), quorum: self.at.validators.quorum() })
    }

    fn checks<'c>(&'c self, step: &'c Step<'_, B>) -> Checks<'c> {
        let Parameters { chain, me, .. } = step.parameters;
        Checks { me: *me, chain, validators: &self.at.validators, verifier: step.verifier }
    }

    fn proposer(&self, round: Round) -> NodeKey {
        self.at.validators.proposer(&self.at.parent_author, round)
    }

    fn am_proposer(&self, step: &Step<'_, B>) -> bool {
        step.parameters.me == Some(self.proposer(self.round)) && self.votes(step)
    }

    /// Whether this node says anything at this height.
    fn votes(&self, step: &Step<'_, B>) -> bool {
        step.may_vote && step.parameters.me.is_some_and(|me| self.at.validators.contains(&me))
    }

    /// Something is to be ordered: the clock of round 0 runs from now on (clause 18).
    pub(crate) fn work(&mut self, step: &mut Step<'_, B>) {
        self.work = true;
        if self.round == Round::ZERO {
            self.start_timer(step);
        }
        self.progress(step);
    }

    pub(crate) fn built(&mut self, step: &mut Step<'_, B>, view: View, block: B) {
        if view == self.view() && self.am_proposer(step) && !self.said.proposal && self.decided.is_none() {
            let justification = self.justification().unwrap_or_default();
            // Another block may have been prepared since this one was asked for.
            if highest_prepared(&justification.round_changes).is_none() {
                self.propose(step, block, justification);
            }
        }
    }

    pub(crate) fn validated(&mut self, step: &mut Step<'_, B>, hash: &Hash, valid: bool) {
        if let Some(candidate) = self.candidates.get_mut(hash) {
            candidate.valid = Some(valid);
            self.progress(step);
        }
    }

    pub(crate) fn message(&mut self, step: &mut Step<'_, B>, message: Message<B>) -> Result<(), Refusal> {
        self.take(step, message)?;
        self.progress(step);
        Ok(())
    }

    /// Checks a message and remembers it, and draws no conclusions yet.
    pub(crate) fn take(&mut self, step: &mut Step<'_, B>, message: Message<B>) -> Result<(), Refusal> {
        match message {
            Message::Proposal(message) => self.proposal(step, message),
            Message::Prepare(signed) => self.prepare(step, signed),
            Message::Commit(signed) => self.commit(step, signed),
            Message::RoundChange(message) => self.round_change(step, *message),
            Message::NewBlock(decided) => self.new_block(step, decided.0, decided.1),
        }
    }

    fn proposal(&mut self, step: &mut Step<'_, B>, message: Box<ProposalMessage<B>>) -> Result<(), Refusal> {
        let Signed { payload: Proposal { view, hash }, signer, .. } = message.signed;
        if view.round < self.round {
            return Err(Refusal::Old); // clause 8
        }
        self.checks(step).signed(&message.signed)?;
        if signer != self.proposer(view.round) {
            return Err(Refusal::NotTheProposer);
        }
        if let Some(accepted) = self.accepted.as_ref().filter(|accepted| accepted.signed.payload.view == view) {
            if accepted.signed.payload == message.signed.payload {
                return Err(Refusal::Known);
            }
            step.effects.push(Effect::Evidence(Evidence::Proposal([accepted.signed, message.signed])));
            return Err(Refusal::Equivocation);
        }
        if view.round == self.round && self.said.prepare.is_some_and(|said| said != hash) {
            return Err(Refusal::Equivocation); // prepared before a restart
        }
        let block = &message.block;
        if block.hash() != hash || block.height() != view.height || block.parent() != self.at.parent {
            return Err(Refusal::BadBlock);
        }
        let prepared = self.checks(step).proposal(view, &message.justification)?;
        match prepared {
            Some(wanted) if wanted != hash => return Err(Refusal::NotJustified),
            Some(_) => {} // never refused for its time (clause 15)
            None if block.author() != signer => return Err(Refusal::BadBlock),
            None => {
                let latest_ms = step.now.unix_ms.saturating_add(step.parameters.clock_drift_ms_max);
                if block.time_ms() <= self.at.parent_time_ms || block.time_ms() > latest_ms {
                    return Err(Refusal::BadTime);
                }
            }
        }
        if view.round > self.round {
            self.enter(step, view.round, false); // clause 13
        }
        let block = message.block.clone();
        self.accepted = Some(message);
        self.start_timer(step);
        self.consider(step, block, prepared.is_none());
        Ok(())
    }

    fn prepare(&mut self, step: &mut Step<'_, B>, signed: Signed<Prepare>) -> Result<(), Refusal> {
        if signed.payload.view.round < self.round {
            return Err(Refusal::Old); // clause 8
        }
        self.vote(step, &signed)?;
        count(&mut self.prepares, signed, self.round, step, Evidence::Prepare)
    }

    fn commit(&mut self, step: &mut Step<'_, B>, signed: Signed<Commit>) -> Result<(), Refusal> {
        // Of any round: a quorum of one that is over decides all the same (clause 13).
        self.vote(step, &signed)?;
        count(&mut self.commits, signed, self.round, step, Evidence::Commit)
    }

    fn vote<P: Payload>(&self, step: &Step<'_, B>, signed: &Signed<P>) -> Result<(), Refusal> {
        if signed.payload.view().round.0.saturating_sub(self.round.0) > ROUNDS_AHEAD {
            return Err(Refusal::TooFarAhead);
        }
        self.checks(step).signed(signed)
    }

    fn round_change(&mut self, step: &mut Step<'_, B>, message: RoundChangeMessage<B>) -> Result<(), Refusal> {
        let Signed { payload: RoundChange { view, .. }, signer, .. } = message.signed;
        if view.round < self.round || view.round == Round::ZERO {
            return Err(Refusal::Old);
        }
        match self.round_changes.get(&signer).map(|before| before.signed) {
            Some(before) if before.payload.view.round > view.round => return Err(Refusal::Old),
            Some(before) if before.payload == message.signed.payload => return Err(Refusal::Known),
            Some(before) if before.payload.view.round == view.round => {
                self.checks(step).signed(&message.signed)?;
                step.effects.push(Effect::Evidence(Evidence::RoundChange([before, message.signed])));
                return Err(Refusal::Equivocation);
            }
            _ => {}
        }
        self.checks(step).round_change(&message, |hash| self.candidates.contains_key(hash))?;
        if let Some(block) = &message.block {
            self.candidates.entry(block.hash()).or_insert_with(|| Candidate { block: block.clone(), valid: None });
        }
        self.round_changes.insert(signer, message);
        Ok(())
    }

    /// A final block with its certificate (clauses 24 and 25).
    fn new_block(&mut self, step: &mut Step<'_, B>, block: B, certificate: Certificate) -> Result<(), Refusal> {
        if self.certified.is_some() {
            return Err(Refusal::Known);
        }
        let fits =
            block.hash() == certificate.hash && block.height() == self.height() && block.parent() == self.at.parent;
        if !fits || certificate.view.height != self.height() {
            return Err(Refusal::BadBlock);
        }
        self.checks(step).certificate(&certificate)?;
        self.certified = Some(certificate);
        self.consider(step, block, false);
        Ok(())
    }

    /// Asks the application for its verdict, if it has not been asked.
    fn consider(&mut self, step: &mut Step<'_, B>, block: B, fresh: bool) {
        let hash = block.hash();
        let asked = self.candidates.get(&hash).is_some_and(|candidate| candidate.valid.is_some());
        self.candidates.entry(hash).or_insert_with(|| Candidate { block: block.clone(), valid: None });
        if !asked {
            step.effects.push(Effect::Validate { block, fresh });
        }
    }

    /// A timer has run out; `false` when it was for another view.
    pub(crate) fn timeout(&mut self, step: &mut Step<'_, B>, timer: Timer) -> bool {
        match timer {
            Timer::Empty(height) if height == self.height() => self.work(step),
            Timer::Round(view) if view == self.view() && self.timer_runs => {
                self.enter(step, self.round.next(), true);
                self.progress(step);
            }
            Timer::Resend(view) if view == self.view() => {
                self.resend(step, None);
                let me = step.parameters.me;
                let said = me.and_then(|me| self.round_changes.get(&me)).map(|said| said.signed.payload.view);
                // With a lock of this round it would claim another thing than it did, and nobody needs to come along any more.
                match said == Some(view) || self.locked_here() {
                    true => self.arm_resend(step),
                    false => self.ask(step), // the signer has failed, or erred: what it has signed did not hold
                }
            }
            _ => return false,
        }
        true
    }

    /// Says again what holds for the current round, to one validator that has just connected, or to all (clause 16).
    pub(crate) fn resend(&self, step: &mut Step<'_, B>, to: Option<NodeKey>) {
        let Some(me) = step.parameters.me else { return };
        let mut messages = Vec::new();
        if let Some(decided) = &self.decided {
            messages.push(Message::NewBlock(decided.clone()));
        }
        messages.extend(self.round_changes.get(&me).cloned().map(|message| Message::RoundChange(Box::new(message))));
        let accepted = self.accepted.as_ref().filter(|accepted| accepted.signed.signer == me);
        messages.extend(accepted.cloned().map(Message::Proposal));
        messages.extend(self.prepares.by(&me, self.round).copied().map(Message::Prepare));
        messages.extend(self.commits.by(&me, self.round).copied().map(Message::Commit));
        step.effects.extend(messages.into_iter().map(|message| Effect::Send { to, message }));
    }

    /// Goes on to a later round; `asks`: by asking the others to come along.
    fn enter(&mut self, step: &mut Step<'_, B>, round: Round, asks: bool) {
        self.round = round;
        self.said = Said::default();
        self.timer_runs = false;
        let left = self.accepted.take().map(|accepted| accepted.signed.payload.hash);
        self.prepares.forget_below(round);
        self.forget_candidates(left);
        if asks {
            self.ask(step);
        }
    }

    fn locked_here(&self) -> bool {
        self.lock.as_ref().is_some_and(|lock| lock.view.round == self.round)
    }

    /// Asks for the current round.
    fn ask(&mut self, step: &mut Step<'_, B>) {
        if !self.votes(step) {
            return;
        }
        let view = self.view();
        let (prepared, block, prepares) = match &self.lock {
            Some(lock) => (Some((lock.view.round, lock.block.hash())), Some(lock.block.clone()), lock.prepares.clone()),
            None => (None, None, Vec::new()),
        };
        self.said.round_change = true;
        step.effects.push(Effect::Persist(Record::Round(view)));
        step.effects.push(Effect::Cast(Draft::RoundChange {
            payload: RoundChange { view, prepared },
            block,
            prepares,
        }));
        self.arm_resend(step);
    }

    /// Keeps blocks that something still names, and the one of the round just left, which may be decided yet.
    fn forget_candidates(&mut self, left: Option<Hash>) {
        let mut candidates = std::mem::take(&mut self.candidates);
        let locked = self.lock.as_ref().map(|lock| lock.block.hash());
        let claimed =
            |hash: &Hash| self.round_changes.values().any(|message| message.signed.payload.choice() == Some(*hash));
        let certified = self.certified.as_ref().map(|certificate| certificate.hash);
        candidates.retain(|hash, _| {
            let named = [locked, certified, left].contains(&Some(*hash));
            named || claimed(hash) || self.commits.names(hash)
        });
        self.candidates = candidates;
    }

    fn start_timer(&mut self, step: &mut Step<'_, B>) {
        if !std::mem::replace(&mut self.timer_runs, true) {
            let after = step.parameters.timing.round(self.round);
            step.effects.push(Effect::SetTimer { timer: Timer::Round(self.view()), after });
        }
    }

    fn arm_resend(&self, step: &mut Step<'_, B>) {
        let after = step.parameters.timing.round(self.round);
        step.effects.push(Effect::SetTimer { timer: Timer::Resend(self.view()), after });
    }

    /// All that follows from what is known.
    fn progress(&mut self, step: &mut Step<'_, B>) {
        if self.decided.is_some() || self.decide(step) {
            return;
        }
        if let Some(round) = self.round_to_join() {
            self.enter(step, round, true);
        }
        let shared = self.at_least(self.round) >= self.at.validators.quorum();
        if self.round > Round::ZERO && (shared || sabotage::is_on(Sabotage::ClockAtOnce)) {
            self.start_timer(step); // clause 16: only now
        }
        self.lead(step);
        self.say_prepare(step);
        self.say_commit(step);
    }

    /// Clause 17: f + 1 signers are ahead, so an honest one is.
    fn round_to_join(&self) -> Option<Round> {
        let ahead = self.round_changes.values().map(|message| message.signed.payload.view.round);
        let mut ahead: Vec<Round> = ahead.filter(|round| *round > self.round).collect();
        ahead.sort_unstable_by(|one, other| other.cmp(one));
        ahead.get(self.at.validators.faults()).copied()
    }

    /// Signers that want this round, or a later one.
    fn at_least(&self, round: Round) -> usize {
        self.round_changes.values().filter(|message| message.signed.payload.view.round >= round).count()
    }

    /// What allows a proposal in the current round; `None` while it is not allowed (clause 9).
    fn justification(&self) -> Option<Justification> {
        if self.round == Round::ZERO {
            return Some(Justification::default());
        }
        let here = self.round_changes.values().filter(|message| message.signed.payload.view.round == self.round);
        let here: Vec<&RoundChangeMessage<B>> = here.take(self.at.validators.quorum()).collect();
        if here.len() < self.at.validators.quorum() {
            return None;
        }
        let highest = highest_prepared(here.iter().map(|message| &message.signed));
        let proof = here.iter().find(|message| highest.is_some() && message.signed.payload.prepared == highest);
        Some(Justification {
            round_changes: here.iter().map(|message| message.signed).collect(),
            prepares: proof.map(|message| message.prepares.clone()).unwrap_or_default(),
        })
    }

    /// Proposes, or asks for a block to propose.
    fn lead(&mut self, step: &mut Step<'_, B>) {
        if !self.am_proposer(step) || self.said.proposal {
            return;
        }
        let Some(justification) = self.justification() else { return };
        match highest_prepared(&justification.round_changes) {
            Some((_, hash)) => {
                let candidate = self.candidates.get(&hash).expect("a round change brought it");
                self.propose(step, candidate.block.clone(), justification);
            }
            None if !self.said.asked && (self.work || self.round > Round::ZERO) => {
                self.said.asked = true;
                step.effects.push(Effect::Build { view: self.view() });
            }
            None => {}
        }
    }

    fn propose(&mut self, step: &mut Step<'_, B>, block: B, justification: Justification) {
        self.said.proposal = true;
        let payload = Proposal { view: self.view(), hash: block.hash() };
        step.effects.push(Effect::Cast(Draft::Proposal { payload, block, justification }));
    }

    /// Clause 14: only what the application has found valid, and holds.
    fn say_prepare(&mut self, step: &mut Step<'_, B>) {
        let Some(accepted) = &self.accepted else { return };
        let Proposal { view, hash } = accepted.signed.payload;
        let Some(Candidate { block, valid: Some(true) }) = self.candidates.get(&hash) else { return };
        if self.said.prepare.is_none() && self.votes(step) {
            self.said.prepare = Some(hash);
            step.effects.push(Effect::Persist(Record::Block(block.clone())));
            step.effects.push(Effect::Cast(Draft::Prepare(Prepare { view, hash })));
        }
    }

    /// Clauses 10, 12 and 21: a quorum of prepares is a lock, on disk before the commit leaves.
    fn say_commit(&mut self, step: &mut Step<'_, B>) {
        let Some(accepted) = &self.accepted else { return };
        let Proposal { view, hash } = accepted.signed.payload;
        let Some(Candidate { block, valid: Some(true) }) = self.candidates.get(&hash) else { return };
        let quorum = self.at.validators.quorum();
        let prepares: Vec<_> = self.prepares.of(view.round, hash).take(quorum).copied().collect();
        if prepares.len() < quorum || self.said.commit.is_some() {
            return;
        }
        // Who says nothing takes no lock either: what it says of it later would not be on disk.
        if !self.votes(step) {
            return;
        }
        self.said.commit = Some(hash);
        let lock = Prepared { view, block: block.clone(), prepares };
        self.lock = Some(lock.clone());
        step.effects.push(Effect::Persist(Record::Prepared(lock)));
        step.effects.push(Effect::Cast(Draft::Commit(Commit { view, hash })));
    }

    /// Clause 13: a quorum of commits of any one round. `false` when there is none, or its block is not known or not checked yet.
    fn decide(&mut self, step: &mut Step<'_, B>) -> bool {
        let quorum = self.at.validators.quorum();
        let mut final_ones: Vec<Certificate> = self.certified.iter().cloned().collect();
        for (round, hash) in self.commits.quorums(quorum) {
            let commits = self.commits.of(round, hash).take(quorum).copied().collect();
            final_ones.push(Certificate { view: View { round, ..self.view() }, hash, commits });
        }
        for certificate in final_ones {
            let hash = certificate.hash;
            match self.candidates.get(&hash) {
                None if self.missing.insert(hash) => {
                    step.effects.push(Effect::Missing { view: certificate.view, hash });
                }
                None => {}
                Some(Candidate { valid: None, block }) if self.missing.insert(hash) => {
                    step.effects.push(Effect::Validate { block: block.clone(), fresh: false });
                }
                Some(Candidate { valid: None, .. }) => {}
                Some(Candidate { valid: Some(false), .. }) => step.effects.push(Effect::Halt(certificate)),
                Some(Candidate { valid: Some(true), block }) => {
                    let decided = Box::new((block.clone(), certificate));
                    step.effects.push(Effect::Persist(Record::Decision(decided.clone())));
                    step.effects.push(Effect::Decided(decided.clone()));
                    self.decided = Some(decided);
                    return true;
                }
            }
        }
        false
    }

    /// What [`restore`](Self::restore) needs of what was said here.
    pub(crate) fn records(&self, me: Option<&NodeKey>) -> Option<Vec<Record<B>>> {
        if let Some(decided) = &self.decided {
            return Some(vec![Record::Decision(decided.clone())]);
        }
        let prepared = self.said.prepare.and_then(|hash| self.candidates.get(&hash));
        let mut records: Vec<Record<B>> =
            prepared.map(|candidate| Record::Block(candidate.block.clone())).into_iter().collect();
        records.extend(self.lock.clone().map(Record::Prepared));
        if self.round > Round::ZERO {
            records.push(Record::Round(self.view()));
        }
        let Some(me) = me else { return Some(records) };
        let accepted = self.accepted.as_ref().filter(|accepted| accepted.signed.signer == *me);
        let asked = self.round_changes.get(me).filter(|asked| asked.signed.payload.view.round == self.round);
        let Said { proposal, prepare, commit, round_change, .. } = self.said;
        let said = [
            (round_change, asked.cloned().map(|message| Message::RoundChange(Box::new(message)))),
            (proposal, accepted.cloned().map(Message::Proposal)),
            (prepare.is_some(), self.prepares.by(me, self.round).copied().map(Message::Prepare)),
            (commit.is_some(), self.commits.by(me, self.round).copied().map(Message::Commit)),
        ];
        if said.iter().any(|(said, message)| *said && message.is_none()) {
            return None;
        }
        records.extend(said.into_iter().filter_map(|(_, message)| message).map(Record::Cast));
        Some(records)
    }

    /// Takes what was on disk; the caller then gives back the signed messages among it (clause 22).
    pub(crate) fn restore(&mut self, record: &Record<B>) {
        let here = self.view().height;
        match record {
            Record::Round(view) if view.height == here => self.round = self.round.max(view.round),
            Record::Block(block) if block.height() == here => {
                let candidate = Candidate { block: block.clone(), valid: Some(true) };
                self.candidates.insert(block.hash(), candidate);
            }
            Record::Prepared(lock) if lock.view.height == here => {
                self.round = self.round.max(lock.view.round);
                if self.lock.as_ref().is_none_or(|before| before.view.round <= lock.view.round) {
                    self.lock = Some(lock.clone());
                }
            }
            Record::Cast(message) if message.view().height == here => self.round = self.round.max(message.view().round),
            Record::Decision(decided) if decided.0.height() == here => self.decided = Some(decided.clone()),
            _ => {}
        }
    }

    /// Remembers that this was said; only what belongs to the current round, all records being known.
    pub(crate) fn remember(&mut self, message: &Message<B>) {
        if message.view() != self.view() {
            return;
        }
        match message {
            Message::Proposal(_) => self.said.proposal = true,
            Message::Prepare(signed) => self.said.prepare = Some(signed.payload.hash),
            Message::Commit(signed) => self.said.commit = Some(signed.payload.hash),
            Message::RoundChange(_) => self.said.round_change = true,
            Message::NewBlock(_) => {}
        }
    }

    /// After a restart: says again what it has said, and goes on.
    pub(crate) fn resume(&mut self, step: &mut Step<'_, B>) {
        if let Some(decided) = &self.decided {
            step.effects.push(Effect::Decided(decided.clone()));
            return;
        }
        self.resend(step, None);
        let locked_here = self.locked_here();
        if locked_here || self.said.prepare.is_some() {
            self.start_timer(step); // its proposal had come
        }
        if self.round > Round::ZERO {
            // It may have died between the round's record and the message.
            let asked = step.parameters.me.and_then(|me| self.round_changes.get(&me)).is_some();
            match asked || locked_here {
                true => self.arm_resend(step),
                false => self.ask(step),
            }
        }
        self.progress(step);
    }
}

/// Counts a vote, or shows that its signer has voted twice.
fn count<P: Payload, B>(
    tally: &mut Tally<P>,
    signed: Signed<P>,
    current: Round,
    step: &mut Step<'_, B>,
    evidence: impl Fn([Signed<P>; 2]) -> Evidence,
) -> Result<(), Refusal> {
    tally.insert(signed.clone(), current).map_err(|(refusal, before)| {
        step.effects.extend(before.map(|before| Effect::Evidence(evidence([before, signed]))));
        refusal
    })
}

/// How long rounds last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Timing {
    /// Of round 0; each further one doubles it.
    pub base: Duration,
    /// At most.
    pub cap: Duration,
    /// How long a height waits for something to order before an empty block is proposed; `None`: for ever.
    pub empty: Option<Duration>,
}

impl Timing {
    /// base · 2^round, capped (clause 16).
    pub fn round(&self, round: Round) -> Duration {
        self.base.saturating_mul(1u32.checked_shl(round.0).unwrap_or(u32::MAX)).min(self.cap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Clause 16: each round is twice as long as the one before, up to the cap.
    #[test]
    fn rounds_double_up_to_the_cap() {
        let ms = Duration::from_millis;
        let timing = Timing { base: ms(100), cap: ms(1000), empty: None };
        assert_eq!(
            [0, 1, 2, 3, 4, 40, u32::MAX].map(|round| timing.round(Round(round))),
            [100, 200, 400, 800, 1000, 1000, 1000].map(ms)
        );
    }
}
