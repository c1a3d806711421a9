//! Validators on one thread: virtual time, a network that delays, loses, repeats and parts, crashes that lose what was not on disk.
//! A seed is a run; equal seeds are equal runs.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use common::{CAP, CHAIN, TestBlock, Toy, first_height, key, parameters, sign_draft};
use metanode_ibft::{
    Block, Certificate, Core, Draft, Effect, Input, Message, NewHeight, Now, Prepare, Record, Timer, View,
};
use metanode_types::{Hash, NodeKey};

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

struct Node {
    key: NodeKey,
    core: Option<Core<TestBlock>>,
    /// On disk.
    wal: Vec<Record<TestBlock>>,
    chain: Vec<(TestBlock, Certificate)>,
    timers: BTreeMap<u8, Timer>,
    evidence: usize,
}

#[derive(Debug, Clone)]
enum Event {
    Deliver(usize, Message<TestBlock>),
    Timeout(usize, Timer),
    Restart(usize),
}

/// What the network does to a message.
#[derive(Debug, Clone, Copy, Default)]
struct Weather {
    delay_ms: u64,
    /// One in so many is lost, or comes twice; 0: none.
    lost_one_in: u64,
    twice_one_in: u64,
    /// One in so many steps is a crash.
    crash_one_in: u64,
}

struct Network {
    random: Random,
    now: Duration,
    number: u64,
    events: BTreeMap<(Duration, u64), Event>,
    nodes: Vec<Node>,
    weather: Weather,
    /// Messages between the two sides are lost.
    parted: BTreeSet<usize>,
    heights: u64,
    effects: VecDeque<(usize, Effect<TestBlock>)>,
    performs: bool,
    /// These say different things to different nodes.
    byzantine: BTreeSet<usize>,
    /// The second block that was proposed in a round.
    twins: BTreeMap<View, Hash>,
}

impl Network {
    fn new(count: usize, seed: u64, weather: Weather, heights: u64) -> Self {
        let mut this = Self {
            random: Random(seed),
            now: Duration::ZERO,
            number: 0,
            events: BTreeMap::new(),
            nodes: Vec::new(),
            weather,
            parted: BTreeSet::new(),
            heights,
            effects: VecDeque::new(),
            performs: false,
            byzantine: BTreeSet::new(),
            twins: BTreeMap::new(),
        };
        for index in 0..count {
            this.nodes.push(Node {
                key: key(index),
                core: None,
                wal: Vec::new(),
                chain: Vec::new(),
                timers: BTreeMap::new(),
                evidence: 0,
            });
        }
        (0..count).for_each(|index| this.start(index));
        this
    }

    fn clock(&self) -> Now {
        Now { monotonic: self.now, unix_ms: 1_000 + self.now.as_millis() as u64 }
    }

    fn next_height(&self, index: usize) -> NewHeight {
        let first = first_height(self.nodes.len());
        match self.nodes[index].chain.last() {
            None => first,
            Some((block, _)) => NewHeight {
                height: block.height.next(),
                validators: first.validators,
                parent: block.hash(),
                parent_author: block.author,
                parent_time_ms: block.time_ms,
            },
        }
    }

    /// From its disk.
    fn start(&mut self, index: usize) {
        let at = self.next_height(index);
        let records = self.nodes[index].wal.clone();
        let (core, effects) = Core::restore(parameters(index), at, &records, true, self.clock(), &Toy);
        self.nodes[index].core = Some(core);
        self.nodes[index].timers.clear();
        self.perform(index, effects);
        let empty = Timer::Empty(self.next_height(index).height);
        self.set_timer(index, empty, Duration::from_millis(5));
        for other in 0..self.nodes.len() {
            if other != index {
                self.input(other, Input::Connected(key(index)));
            }
        }
    }

    fn at(&mut self, after: Duration, event: Event) {
        self.number += 1;
        self.events.insert((self.now + after, self.number), event);
    }

    fn set_timer(&mut self, index: usize, timer: Timer, after: Duration) {
        let kind = match timer {
            Timer::Round(_) => 0,
            Timer::Resend(_) => 1,
            Timer::Empty(_) => 2,
        };
        self.nodes[index].timers.insert(kind, timer);
        self.at(after, Event::Timeout(index, timer));
    }

    fn send(&mut self, from: usize, to: usize, message: &Message<TestBlock>) {
        if from == to {
            return self.at(Duration::ZERO, Event::Deliver(to, message.clone()));
        }
        if self.parted.contains(&from) != self.parted.contains(&to) {
            return;
        }
        let Weather { delay_ms, lost_one_in, twice_one_in, .. } = self.weather;
        if lost_one_in > 0 && self.random.one_in(lost_one_in) {
            return;
        }
        let times = 1 + usize::from(twice_one_in > 0 && self.random.one_in(twice_one_in));
        for _ in 0..times {
            let delay = Duration::from_micros(100 + self.random.below(1000 * delay_ms + 1));
            self.at(delay, Event::Deliver(to, message.clone()));
        }
    }

    fn input(&mut self, index: usize, input: Input<TestBlock>) {
        let now = self.clock();
        let Some(core) = &mut self.nodes[index].core else { return };
        let effects = core.step(now, &Toy, input);
        self.perform(index, effects);
        if !self.performs {
            self.shorten_log(index);
        }
    }

    /// A log that begins anew, as it does when it is full: with the fewest records.
    fn shorten_log(&mut self, index: usize) {
        let records = self.nodes[index].core.as_ref().and_then(Core::records);
        if self.effects.is_empty()
            && self.random.one_in(8)
            && let Some(records) = records
        {
            self.nodes[index].wal = records;
        }
    }

    /// In their order, those of later inputs behind those of earlier ones.
    fn perform(&mut self, index: usize, effects: Vec<Effect<TestBlock>>) {
        self.effects.extend(effects.into_iter().map(|effect| (index, effect)));
        if std::mem::replace(&mut self.performs, true) {
            return;
        }
        while let Some((index, effect)) = self.effects.pop_front() {
            let crash_one_in = self.weather.crash_one_in;
            if crash_one_in > 0 && self.random.one_in(crash_one_in) {
                // Whatever was not done yet is lost.
                self.nodes[index].core = None;
                self.effects.retain(|(of, _)| *of != index);
                let pause = Duration::from_millis(1 + self.random.below(300));
                self.at(pause, Event::Restart(index));
                continue;
            }
            self.effect(index, effect);
        }
        self.performs = false;
    }

    fn effect(&mut self, index: usize, effect: Effect<TestBlock>) {
        let me = key(index);
        match effect {
            Effect::Persist(record) => self.nodes[index].wal.push(record),
            Effect::Cast(draft) if self.byzantine.contains(&index) => self.say_two_things(index, draft),
            Effect::Cast(draft) => {
                let message = sign_draft(me, draft);
                self.nodes[index].wal.push(Record::Cast(message.clone()));
                (0..self.nodes.len()).for_each(|to| self.send(index, to, &message));
            }
            Effect::Send { to: Some(to), message } => {
                self.send(index, usize::from(to.0[0]) - 1, &message);
            }
            Effect::Send { to: None, message } => {
                (0..self.nodes.len()).filter(|to| *to != index).for_each(|to| self.send(index, to, &message));
            }
            Effect::SetTimer { timer, after } => self.set_timer(index, timer, after),
            Effect::Build { view } => {
                let at = self.next_height(index);
                let block = TestBlock {
                    height: view.height,
                    parent: at.parent,
                    author: me,
                    time_ms: self.clock().unix_ms.max(at.parent_time_ms + 1),
                    salt: self.random.next(),
                };
                self.input(index, Input::Built { view, block });
            }
            Effect::Validate { block, .. } => self.input(index, Input::Validated { hash: block.hash(), valid: true }),
            Effect::Decided(decided) => {
                let (block, certificate) = *decided;
                if self.nodes[index].chain.last().is_none_or(|(last, _)| last.height < block.height) {
                    assert_eq!(block.height.0, self.nodes[index].chain.len() as u64 + 1);
                    self.nodes[index].chain.push((block, certificate));
                }
                if self.nodes[index].chain.len() as u64 != self.heights {
                    let at = self.next_height(index);
                    self.input(index, Input::NewHeight(at));
                }
            }
            Effect::Help { to, height } => {
                if let Some(decided) = self.nodes[index].chain.get(height.0 as usize - 1).cloned() {
                    self.send(index, usize::from(to.0[0]) - 1, &Message::NewBlock(Box::new(decided)));
                }
            }
            Effect::Evidence(evidence) => {
                assert!(evidence.verify(&CHAIN, &Toy));
                self.nodes[index].evidence += 1;
            }
            Effect::Missing { .. } | Effect::Behind { .. } | Effect::Refused { .. } => {}
            Effect::Halt(certificate) => panic!("{certificate:?}"),
        }
    }

    /// Half of the nodes hear one thing, the others another.
    fn say_two_things(&mut self, index: usize, draft: Draft<TestBlock>) {
        let me = key(index);
        let (view, block) = match &draft {
            Draft::Proposal { payload, block, .. } => (payload.view, Some(block.clone())),
            Draft::Prepare(payload) => (payload.view, None),
            Draft::Commit(payload) => (payload.view, None),
            Draft::RoundChange { payload, .. } => (payload.view, None),
        };
        let other = match (draft.clone(), block) {
            (Draft::Proposal { mut payload, justification, .. }, Some(mut block)) => {
                block.salt ^= 1;
                payload.hash = block.hash();
                self.twins.insert(view, payload.hash);
                Draft::Proposal { payload, block, justification }
            }
            (Draft::Prepare(payload), _) => {
                Draft::Prepare(Prepare { hash: self.twins.get(&view).copied().unwrap_or(payload.hash), ..payload })
            }
            (Draft::Commit(mut payload), _) => {
                payload.hash = self.twins.get(&view).copied().unwrap_or(payload.hash);
                Draft::Commit(payload)
            }
            (Draft::RoundChange { mut payload, .. }, _) => {
                payload.prepared = None;
                Draft::RoundChange { payload, block: None, prepares: Vec::new() }
            }
            (draft, _) => draft,
        };
        for (half, draft) in [draft, other].into_iter().enumerate() {
            let message = sign_draft(me, draft);
            (0..self.nodes.len()).filter(|to| to % 2 == half).for_each(|to| self.send(index, to, &message));
            // Some hear both.
            if self.random.one_in(3) {
                let to = self.random.below(self.nodes.len() as u64) as usize;
                self.send(index, to, &message);
            }
        }
    }

    /// Until all that run have decided all heights, or time is over.
    fn run(&mut self, until: Duration) -> bool {
        while let Some(entry) = self.events.first_entry().filter(|entry| entry.key().0 <= until) {
            let ((at, _), event) = entry.remove_entry();
            self.now = at;
            match event {
                Event::Deliver(to, message) => self.input(to, Input::Message(message)),
                Event::Timeout(index, timer) => {
                    if self.nodes[index].timers.values().any(|set| *set == timer) {
                        self.input(index, Input::Timeout(timer));
                    }
                }
                Event::Restart(index) => self.start(index),
            }
            self.check();
            if self.is_done() {
                return true;
            }
        }
        self.is_done()
    }

    fn is_done(&self) -> bool {
        let runs = self
            .nodes
            .iter()
            .enumerate()
            .filter(|(index, node)| node.core.is_some() && !self.byzantine.contains(index));
        runs.into_iter().all(|(_, node)| node.chain.len() as u64 >= self.heights)
    }

    /// Nobody has another block where somebody has one.
    fn check(&self) {
        let honest = || self.nodes.iter().enumerate().filter(|(index, _)| !self.byzantine.contains(index));
        let longest = honest().map(|(_, node)| &node.chain).max_by_key(|chain| chain.len()).unwrap();
        for (_, node) in honest() {
            let Some((last, _)) = node.chain.last() else { continue };
            assert_eq!(*last, longest[node.chain.len() - 1].0, "two blocks of a height at {:?}", node.key);
        }
    }

    /// Of each node: blocks, view, timers.
    fn state(&self) -> Vec<(usize, Option<View>, Vec<Timer>)> {
        let state = |node: &Node| {
            (node.chain.len(), node.core.as_ref().and_then(Core::view), node.timers.values().copied().collect())
        };
        self.nodes.iter().map(state).collect()
    }

    fn rounds(&self) -> Vec<View> {
        self.nodes[0].chain.iter().map(|(_, certificate)| certificate.view).collect()
    }
}

/// `IBFT_SEEDS` runs more.
fn seeds(usual: u64) -> u64 {
    std::env::var("IBFT_SEEDS").map_or(usual, |seeds| seeds.parse().unwrap())
}

#[test]
fn without_faults_each_height_takes_one_round_and_the_turn_goes_round() {
    for count in [1, 2, 3, 4, 5, 7] {
        let mut network = Network::new(count, 1, Weather::default(), 12);
        assert!(network.run(Duration::from_secs(2)), "{count}");
        assert!(network.rounds().iter().all(|view| view.round.0 == 0), "{:?}", network.rounds());
        for (index, (block, _)) in network.nodes[0].chain.iter().enumerate() {
            assert_eq!(block.author, key(index % count));
        }
    }
}

#[test]
fn f_that_are_dead_cost_their_turns_and_no_more() {
    let mut network = Network::new(4, 2, Weather { delay_ms: 1, ..Weather::default() }, 9);
    network.nodes[2].core = None;
    assert!(network.run(Duration::from_secs(5)), "{:?}", network.rounds());
    assert!(network.rounds().iter().all(|view| view.round.0 <= 1), "{:?}", network.rounds());
}

/// Clause 13 and 16: without a quorum on either side nothing is decided; healed, all go on.
#[test]
fn a_parted_network_decides_nothing_and_goes_on_when_it_is_whole_again() {
    for seed in 0..20 {
        let mut network = Network::new(4, seed, Weather { delay_ms: 2, ..Weather::default() }, 3);
        network.parted = BTreeSet::from([0, 1]);
        assert!(!network.run(Duration::from_secs(20)));
        assert_eq!(network.nodes.iter().map(|node| node.chain.len()).max(), Some(0));
        network.parted.clear();
        let healed = network.now;
        for (one, other) in [(0, 2), (0, 3), (1, 2), (1, 3)] {
            network.input(one, Input::Connected(key(other)));
            network.input(other, Input::Connected(key(one)));
        }
        network.run(healed + 2 * CAP + Duration::from_secs(1));
        assert!(network.nodes.iter().all(|node| !node.chain.is_empty()), "{seed}: {:?}", network.now);
    }
}

#[test]
fn bad_weather_and_crashes_part_nobody_from_the_chain() {
    for seed in 0..seeds(300) {
        let count = [4, 4, 5, 7][seed as usize % 4];
        let weather = Weather {
            delay_ms: 1 + seed % 120,
            lost_one_in: if seed % 3 == 0 { 12 } else { 0 },
            twice_one_in: 8,
            crash_one_in: if seed % 2 == 0 { 400 } else { 0 },
        };
        let mut network = Network::new(count, seed, weather, 8);
        network.run(Duration::from_secs(30));
        // From now on it is fine.
        network.weather = Weather { delay_ms: 1, ..Weather::default() };
        let from = network.now;
        for index in 0..count {
            if network.nodes[index].core.is_none() {
                network.start(index);
            }
        }
        assert!(network.run(from + Duration::from_secs(60)), "seed {seed}: {:?} at {:?}", network.state(), network.now);
    }
}

/// Clauses 8 and 26: f that say different things to different nodes neither part the chain nor stop it, and are found out.
#[test]
fn equivocation_parts_nobody_and_is_found() {
    let mut found = 0;
    let runs = seeds(200);
    for seed in 0..runs {
        let count = if seed % 2 == 0 { 4 } else { 7 };
        let mut network = Network::new(count, seed, Weather { delay_ms: 1 + seed % 40, ..Weather::default() }, 8);
        network.byzantine = (0..(count - 1) / 3).map(|index| (index + seed as usize) % count).collect();
        assert!(network.run(Duration::from_secs(120)), "seed {seed}: {:?} at {:?}", network.state(), network.now);
        found += usize::from(network.nodes.iter().any(|node| node.evidence > 0));
    }
    assert!(found as u64 > runs * 3 / 4, "evidence in {found} of {runs} runs");
}
