//! The step function itself under a model checker: all that can happen among four validators, one of them Byzantine.
//!
//! Three honest validators are [`Core`]s as they ship. What is explored: what arrives where, in whatever order or never; whose timer runs
//! out; what the Byzantine one says to whom, which may be anything that it can sign or has heard. What is not: crashes (`network.rs` has
//! them), and blocks that the application refuses.
//!
//! A message stays available once it is sent, and a step of the model brings one validator the fewest messages after which it says
//! something. Votes that complete nothing where they arrive could as well have come later, together with the one that does; so nothing is left
//! out by bringing them together. Which validators make up a quorum of votes makes no difference, so one choice stands for all, with the
//! Byzantine one's only where it is needed; of round changes, which carry claims, every choice is tried.
//!
//! `cargo xtask model` explores more, and prints what it has seen.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{DefaultHasher, Hasher},
    sync::Arc,
    time::{Duration, Instant},
};

use common::{TestBlock, Toy, first_height, key, parameters, sign, sign_draft};
use metanode_ibft::{
    Block as _, Commit, Core, Draft, Effect, Height, Input, Justification, Message, Now, Payload, Prepare, Proposal,
    ProposalMessage, Round, RoundChange, RoundChangeMessage, Signed, Timer, View,
};
use metanode_types::Hash;
use stateright::{Checker, Expectation, Model, Property};

const VALIDATORS: usize = 4;
const QUORUM: usize = 3;
const NOW: Now = Now { monotonic: Duration::ZERO, unix_ms: 1_000 };

/// Which of the four is Byzantine, and up to which round the others' clocks run.
#[derive(Debug, Clone, Copy)]
struct Network {
    byzantine: usize,
    rounds_max: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Kind {
    Proposal,
    Prepare,
    Commit,
    RoundChange,
}

/// An honest validator.
#[derive(Debug, Clone)]
struct Node {
    core: Core<TestBlock>,
    timer: Option<View>,
    decided: Option<(TestBlock, View)>,
    /// Rounds whose proposal has come, and those for which the Byzantine one has asked here.
    proposed: BTreeSet<Round>,
    asked: BTreeSet<Round>,
    /// What it has said: of each kind and round at most one thing (clause 8).
    said: BTreeMap<(Kind, Round), Hash>,
    /// Of all of the above, so that a state is hashed by what changed.
    digest: u64,
}

fn digest(value: &impl std::hash::Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl Node {
    fn seal(&mut self) {
        let state = match &self.decided {
            Some(decided) => digest(decided), // it neither votes nor listens any more
            None => digest(&(&self.core, self.timer, &self.proposed, &self.asked)),
        };
        self.digest = digest(&(state, &self.said));
    }

    fn round(&self) -> Round {
        self.core.view().map_or(Round::ZERO, |view| view.round)
    }
}

/// All that was sent. It follows from what each has said.
#[derive(Debug, Clone, Default)]
struct Sent {
    blocks: BTreeMap<Hash, TestBlock>,
    proposals: BTreeMap<Round, Message<TestBlock>>,
    prepares: BTreeMap<(Round, Hash), BTreeMap<usize, Signed<Prepare>>>,
    commits: BTreeMap<(Round, Hash), BTreeMap<usize, Signed<Commit>>>,
    round_changes: BTreeMap<(usize, Round), RoundChangeMessage<TestBlock>>,
}

#[derive(Debug, Clone)]
struct State {
    /// `None`: the Byzantine one.
    nodes: Vec<Option<Arc<Node>>>,
    sent: Arc<Sent>,
    broken: Option<&'static str>,
}

impl State {
    fn node(&self, at: usize) -> &Node {
        self.nodes[at].as_ref().expect("it is honest")
    }

    fn digests(&self) -> (Vec<u64>, Option<&'static str>) {
        (self.nodes.iter().flatten().map(|node| node.digest).collect(), self.broken)
    }

    fn decided(&self) -> impl Iterator<Item = &(TestBlock, View)> {
        self.nodes.iter().flatten().filter_map(|node| node.decided.as_ref())
    }
}

impl std::hash::Hash for State {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digests().hash(state);
    }
}

impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        self.digests() == other.digests()
    }
}

/// A round change: by whom, for which round, and what it claims to have prepared, if it is the Byzantine one's.
type Asking = (usize, Round, Option<(Round, Hash)>);

/// What happens to one honest validator.
#[derive(Debug, Clone, PartialEq)]
enum Action {
    Timeout,
    /// An honest leader's proposal comes.
    Proposal(Round),
    /// One of the [proposals](Network::proposals) that the Byzantine one can make comes.
    Forged(Round, usize),
    /// A quorum of prepares comes.
    Prepares(Round, Hash),
    /// A quorum of commits comes, and the block with them if it was not here.
    Commits(Round, Hash),
    /// Round changes come.
    RoundChanges(Vec<Asking>),
}

fn view(round: Round) -> View {
    View { height: Height(1), round }
}

/// The block that a validator makes; the Byzantine one has two for each round.
fn block_of(author: usize, round: Round, twin: u64) -> TestBlock {
    let salt = u64::from(round.0) * 2 + twin;
    TestBlock { height: Height(1), parent: Hash([0; 32]), author: key(author), time_ms: 1, salt }
}

/// A quorum of votes, with the Byzantine one's if it must be.
fn quorum<P: Payload>(honest: &BTreeMap<usize, Signed<P>>, forged: Signed<P>) -> Option<Vec<Signed<P>>> {
    let votes: Vec<_> = honest.values().cloned().chain([forged]).take(QUORUM).collect();
    (votes.len() == QUORUM).then_some(votes)
}

impl Network {
    fn honest(&self) -> impl Iterator<Item = usize> + use<> {
        let byzantine = self.byzantine;
        (0..VALIDATORS).filter(move |index| *index != byzantine)
    }

    fn prepares(&self, sent: &Sent, round: Round, hash: Hash) -> Option<Vec<Signed<Prepare>>> {
        quorum(sent.prepares.get(&(round, hash))?, sign(key(self.byzantine), Prepare { view: view(round), hash }))
    }

    fn commits(&self, sent: &Sent, round: Round, hash: Hash) -> Option<Vec<Signed<Commit>>> {
        quorum(sent.commits.get(&(round, hash))?, sign(key(self.byzantine), Commit { view: view(round), hash }))
    }

    /// What the Byzantine one can claim to have prepared before a round.
    fn claims(&self, sent: &Sent, before: Round) -> Vec<Option<(Round, Hash)>> {
        let all = sent.prepares.keys().filter(|(round, _)| *round < before);
        let provable = all.filter(|(round, hash)| self.prepares(sent, *round, *hash).is_some());
        [None].into_iter().chain(provable.copied().map(Some)).collect()
    }

    fn round_change(&self, sent: &Sent, by: usize, round: Round, claim: Option<(Round, Hash)>) -> Message<TestBlock> {
        if by != self.byzantine {
            return Message::RoundChange(Box::new(sent.round_changes[&(by, round)].clone()));
        }
        let signed = sign(key(by), RoundChange { view: view(round), prepared: claim });
        let proof = claim.map(|(at, hash)| self.prepares(sent, at, hash).expect("it can be proven"));
        let block = claim.map(|(_, hash)| sent.blocks[&hash].clone());
        Message::RoundChange(Box::new(RoundChangeMessage { signed, block, prepares: proof.unwrap_or_default() }))
    }

    /// All that the Byzantine one can propose in a round that is its turn, with what justifies it.
    fn proposals(&self, sent: &Sent, round: Round) -> Vec<(TestBlock, Justification)> {
        let fresh = || [0, 1].map(|twin| block_of(self.byzantine, round, twin));
        if round == Round::ZERO {
            return fresh().map(|block| (block, Justification::default())).into();
        }
        let honest: Vec<Signed<RoundChange>> =
            self.honest().filter_map(|by| Some(sent.round_changes.get(&(by, round))?.signed)).collect();
        let mut quorums: Vec<Vec<Signed<RoundChange>>> = Vec::new();
        if honest.len() >= QUORUM {
            quorums.push(honest.clone());
        }
        // Two honest ones, and its own with any claim.
        for left_out in 0..=honest.len() {
            let some: Vec<_> =
                honest.iter().enumerate().filter(|(at, _)| *at != left_out).map(|(_, signed)| *signed).collect();
            if some.len() == QUORUM - 1 {
                quorums.extend(self.claims(sent, round).into_iter().map(|prepared| {
                    let own = sign(key(self.byzantine), RoundChange { view: view(round), prepared });
                    some.iter().copied().chain([own]).collect()
                }));
            }
        }
        let mut all = Vec::new();
        for round_changes in quorums {
            let claims = round_changes.iter().filter_map(|signed| signed.payload.prepared);
            match claims.max_by_key(|(round, _)| *round) {
                Some((at, hash)) => {
                    let prepares = self.prepares(sent, at, hash).expect("somebody has proven it");
                    all.push((sent.blocks[&hash].clone(), Justification { round_changes, prepares }));
                }
                None => all
                    .extend(fresh().map(|block| {
                        (block, Justification { round_changes: round_changes.clone(), prepares: vec![] })
                    })),
            }
        }
        // What justified a proposal is not looked at again.
        let mut blocks = BTreeSet::new();
        all.retain(|(block, _)| blocks.insert(block.hash()));
        all
    }

    /// The messages that an action brings.
    fn messages(&self, state: &State, to: usize, action: &Action) -> Vec<Message<TestBlock>> {
        let sent = &state.sent;
        match action {
            Action::Timeout => Vec::new(),
            Action::Proposal(round) => vec![sent.proposals[round].clone()],
            Action::Forged(round, number) => {
                let (block, justification) = self.proposals(sent, *round).swap_remove(*number);
                let signed = sign(key(self.byzantine), Proposal { view: view(*round), hash: block.hash() });
                vec![Message::Proposal(Box::new(ProposalMessage { signed, block, justification }))]
            }
            Action::Prepares(round, hash) => {
                let quorum = self.prepares(sent, *round, *hash).expect("there is one");
                quorum.into_iter().map(Message::Prepare).collect()
            }
            Action::Commits(round, hash) => {
                let commits = self.commits(sent, *round, *hash).expect("there is one");
                let block = sent.blocks[hash].clone();
                let certificate =
                    metanode_ibft::Certificate { view: view(*round), hash: *hash, commits: commits.clone() };
                let fetched = Message::NewBlock(Box::new((block, certificate)));
                commits.into_iter().map(Message::Commit).chain([fetched]).collect()
            }
            Action::RoundChanges(all) => {
                debug_assert!(all.iter().all(|(by, ..)| *by != to));
                all.iter().map(|(by, round, claim)| self.round_change(sent, *by, *round, *claim)).collect()
            }
        }
    }

    /// The smallest sets of round changes after which a validator says or does something.
    fn round_changes(&self, state: &State, to: usize, actions: &mut Vec<Action>) {
        let node = state.node(to);
        let from = node.round().max(Round(1));
        let mut choices: Vec<Vec<Asking>> = Vec::new();
        for by in (0..VALIDATORS).filter(|by| *by != to) {
            let rounds = (from.0..=self.rounds_max).map(Round);
            choices.push(match by == self.byzantine {
                false => rounds
                    .filter(|round| state.sent.round_changes.contains_key(&(by, *round)))
                    .map(|round| (by, round, None))
                    .collect(),
                true => rounds
                    .filter(|round| !node.asked.contains(round))
                    .flat_map(|round| self.claims(&state.sent, round).into_iter().map(move |claim| (by, round, claim)))
                    .collect(),
            });
        }
        // In the last round only its leader looks at round changes again, so to any other one set that brings it there is like any other.
        let leads = self.rounds_max as usize % VALIDATORS == to;
        let mut seen_last = false;
        let mut open: VecDeque<(Core<TestBlock>, Vec<_>, usize)> = VecDeque::from([(node.core.clone(), vec![], 0)]);
        while let Some((core, chosen, next)) = open.pop_front() {
            for (place, options) in choices.iter().enumerate().skip(next) {
                for &(by, round, claim) in options {
                    let mut core = core.clone();
                    let message = self.round_change(&state.sent, by, round, claim);
                    let effects = core.step(NOW, &Toy, Input::Message(message));
                    if effects.iter().any(|effect| matches!(effect, Effect::Refused { .. })) {
                        continue; // it has this one, or a later one
                    }
                    let chosen = [&chosen[..], &[(by, round, claim)]].concat();
                    if !effects.iter().any(|effect| self.matters(effect)) {
                        open.push_back((core, chosen, place + 1));
                    } else if leads || !seen_last || chosen.iter().any(|(_, round, _)| round.0 < self.rounds_max) {
                        seen_last |= chosen.iter().all(|(_, round, _)| round.0 == self.rounds_max);
                        actions.push(Action::RoundChanges(chosen));
                    }
                }
            }
        }
    }

    fn matters(&self, effect: &Effect<TestBlock>) -> bool {
        match effect {
            Effect::SetTimer { timer: Timer::Round(view), .. } => view.round.0 < self.rounds_max,
            Effect::Cast(_) | Effect::Build { .. } | Effect::Validate { .. } | Effect::Decided(_) => true,
            _ => false,
        }
    }

    fn input(&self, state: &mut State, at: usize, node: &mut Node, input: Input<TestBlock>) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            for effect in node.core.step(NOW, &Toy, input) {
                self.perform(state, node, at, effect, &mut inputs);
            }
        }
    }

    fn perform(
        &self,
        state: &mut State,
        node: &mut Node,
        at: usize,
        effect: Effect<TestBlock>,
        inputs: &mut VecDeque<Input<TestBlock>>,
    ) {
        match effect {
            Effect::Cast(draft) => {
                let (kind, round, hash) = match &draft {
                    Draft::Proposal { payload, .. } => (Kind::Proposal, payload.view.round, payload.hash),
                    Draft::Prepare(payload) => (Kind::Prepare, payload.view.round, payload.hash),
                    Draft::Commit(payload) => (Kind::Commit, payload.view.round, payload.hash),
                    Draft::RoundChange { payload, .. } => {
                        (Kind::RoundChange, payload.view.round, payload.prepared.map_or(Hash([0; 32]), |at| at.1))
                    }
                };
                if node.said.insert((kind, round), hash).is_some_and(|before| before != hash) {
                    state.broken = Some("an honest one has said two things");
                }
                let message = sign_draft(key(at), draft);
                let sent = Arc::make_mut(&mut state.sent);
                match &message {
                    Message::Proposal(proposal) => {
                        sent.blocks.insert(hash, proposal.block.clone());
                        sent.proposals.insert(round, message.clone());
                    }
                    Message::Prepare(signed) => _ = sent.prepares.entry((round, hash)).or_default().insert(at, *signed),
                    Message::Commit(signed) => _ = sent.commits.entry((round, hash)).or_default().insert(at, *signed),
                    Message::RoundChange(message) => {
                        sent.round_changes.insert((at, round), (**message).clone());
                    }
                    Message::NewBlock(_) => {}
                }
                inputs.push_back(Input::Message(message));
            }
            Effect::Build { view } => {
                inputs.push_back(Input::Built { view, block: block_of(at, view.round, 0) });
            }
            Effect::Validate { block, .. } => {
                inputs.push_back(Input::Validated { hash: block.hash(), valid: true });
            }
            Effect::SetTimer { timer: Timer::Round(view), .. } => node.timer = Some(view),
            Effect::Decided(decided) => node.decided = Some((decided.0, decided.1.view)),
            Effect::Halt(_) => state.broken = Some("an honest one has halted"),
            // Nothing crashes, is said again or is slow in being fetched here.
            Effect::Persist(_)
            | Effect::Send { .. }
            | Effect::SetTimer { .. }
            | Effect::Missing { .. }
            | Effect::Help { .. }
            | Effect::Behind { .. }
            | Effect::Evidence(_)
            | Effect::Refused { .. } => {}
        }
    }
}

impl Model for Network {
    type State = State;
    type Action = (usize, Action);

    fn init_states(&self) -> Vec<State> {
        let mut sent = Sent::default();
        for round in (0..=self.rounds_max).map(Round) {
            for block in [0, 1].map(|twin| block_of(self.byzantine, round, twin)) {
                sent.blocks.insert(block.hash(), block);
            }
        }
        let mut state = State { nodes: vec![None; VALIDATORS], sent: Arc::new(sent), broken: None };
        for at in self.honest() {
            let mut node = Node {
                core: Core::new(parameters(at)),
                timer: None,
                decided: None,
                proposed: BTreeSet::new(),
                asked: BTreeSet::new(),
                said: BTreeMap::new(),
                digest: 0,
            };
            // The turn begins with validator 0.
            self.input(&mut state, at, &mut node, Input::NewHeight(first_height(VALIDATORS)));
            self.input(&mut state, at, &mut node, Input::Work);
            node.seal();
            state.nodes[at] = Some(Arc::new(node));
        }
        vec![state]
    }

    fn actions(&self, state: &State, actions: &mut Vec<(usize, Action)>) {
        if state.broken.is_some() {
            return;
        }
        let sent = &state.sent;
        for to in self.honest() {
            let node = state.node(to);
            if node.decided.is_some() {
                continue;
            }
            let here = node.round();
            let mut these = Vec::new();
            if node.timer == Some(view(here)) && here.0 < self.rounds_max {
                these.push(Action::Timeout);
            }
            for round in (here.0..=self.rounds_max).map(Round).filter(|round| !node.proposed.contains(round)) {
                if sent.proposals.contains_key(&round) && !node.said.contains_key(&(Kind::Proposal, round)) {
                    these.push(Action::Proposal(round));
                }
                if round.0 as usize % VALIDATORS == self.byzantine {
                    these.extend((0..self.proposals(sent, round).len()).map(|number| Action::Forged(round, number)));
                }
            }
            // What it waits for: it has accepted a proposal, and prepared it.
            if let Some(hash) = node.said.get(&(Kind::Prepare, here))
                && !node.said.contains_key(&(Kind::Commit, here))
                && self.prepares(sent, here, *hash).is_some()
            {
                these.push(Action::Prepares(here, *hash));
            }
            let decisions = sent.commits.keys().filter(|(round, hash)| self.commits(sent, *round, *hash).is_some());
            these.extend(decisions.map(|(round, hash)| Action::Commits(*round, *hash)));
            self.round_changes(state, to, &mut these);
            actions.extend(these.into_iter().map(|action| (to, action)));
        }
    }

    fn next_state(&self, state: &State, (to, action): (usize, Action)) -> Option<State> {
        let mut state = state.clone();
        let mut node = state.node(to).clone();
        let messages = self.messages(&state, to, &action);
        match &action {
            Action::Timeout => {
                let timer = Timer::Round(node.timer.expect("it runs"));
                self.input(&mut state, to, &mut node, Input::Timeout(timer));
            }
            Action::Proposal(round) | Action::Forged(round, _) => _ = node.proposed.insert(*round),
            Action::RoundChanges(all) => {
                node.asked.extend(all.iter().filter(|(by, ..)| *by == self.byzantine).map(|(_, round, _)| *round));
            }
            Action::Prepares(..) | Action::Commits(..) => {}
        }
        for message in messages {
            self.input(&mut state, to, &mut node, Input::Message(message));
        }
        node.seal();
        state.nodes[to] = Some(Arc::new(node));
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("nobody decides for another block", |_, state: &State| {
                let mut blocks = state.decided().map(|(block, _)| block);
                let first = blocks.next();
                blocks.all(|block| Some(block) == first)
            }),
            Property::always("the honest keep the rules", |_, state: &State| state.broken.is_none()),
            Property::sometimes("all decide in round 0", |_, state: &State| {
                state.decided().filter(|(_, view)| view.round == Round::ZERO).count() == QUORUM
            }),
        ];
        if self.rounds_max > 0 {
            properties.push(Property::sometimes("a later round decides", |_, state: &State| {
                state.decided().any(|(_, view)| view.round > Round::ZERO)
            }));
            properties.push(Property::sometimes(
                "a later round decides for an earlier round's block",
                |_, state: &State| {
                    let first = [0, 1].map(|twin| block_of(0, Round::ZERO, twin));
                    state.decided().any(|(block, view)| view.round > Round::ZERO && first.contains(block))
                },
            ));
        }
        properties
    }
}

/// A number from the environment.
fn number(name: &str, usual: usize) -> usize {
    std::env::var(name).map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Explores everything, or with a bound so many states, the nearest to the beginning first.
fn explore(network: Network, states_max: Option<usize>) {
    let begun = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let checker = network.checker().threads(threads);
    match states_max {
        None => report(network, &checker.spawn_dfs().join(), "complete", begun),
        Some(states) => report(network, &checker.target_state_count(states).spawn_bfs().join(), "bounded", begun),
    }
}

fn report(network: Network, checker: &impl Checker<Network>, how: &str, begun: Instant) {
    println!(
        "model: 4 validators, validator {} Byzantine, rounds 0 to {}: {} states, {} of them different, depth {}, {how}, {:.1} s",
        network.byzantine,
        network.rounds_max,
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        begun.elapsed().as_secs_f64()
    );
    for (property, path) in checker.discoveries() {
        println!("  {property}: after {} steps", path.into_actions().len());
    }
    if how == "complete" {
        assert!(checker.is_done());
        checker.assert_properties();
    } else {
        for property in network.properties().iter().filter(|property| property.expectation == Expectation::Always) {
            checker.assert_no_discovery(property.name);
        }
    }
}

#[test]
fn without_a_round_change_nothing_parts_the_honest() {
    for byzantine in 0..VALIDATORS {
        explore(Network { byzantine, rounds_max: 0 }, None);
    }
}

/// `IBFT_STATES` looks farther.
#[test]
fn nothing_parts_the_honest_in_later_rounds_as_far_as_patience_goes() {
    for byzantine in 0..VALIDATORS {
        explore(Network { byzantine, rounds_max: 3 }, Some(number("IBFT_STATES", 20_000)));
    }
}

/// Millions of states: `cargo xtask model`.
#[test]
#[ignore = "takes minutes; `cargo xtask model` runs it"]
fn with_one_round_change_nothing_parts_the_honest() {
    for byzantine in 0..VALIDATORS {
        explore(Network { byzantine, rounds_max: 1 }, None);
    }
}
