//! One validator of four, driven by hand, clause by clause. It has key 0, and the first turn.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use common::{CHAIN, LARGE, TestBlock, Toy, first_height, key, parameters, sign};
use metanode_ibft::{
    Block, Certificate, Commit, Core, Draft, Effect, Evidence, HEIGHTS_AHEAD, HELP_INTERVAL, Height, Input,
    Justification, Message, NoQuorum, Now, Prepare, Prepared, Proposal, ProposalMessage, Record, Refusal, Round,
    RoundChange, RoundChangeMessage, SHARE_MESSAGES_MAX, Signed, Timer, View,
};
use metanode_types::Hash;

type TestMessage = Message<TestBlock>;
type TestEffect = Effect<TestBlock>;

const NOW: Now = Now { monotonic: Duration::ZERO, unix_ms: 1_000 };

fn view(round: u32) -> View {
    View { height: Height(1), round: Round(round) }
}

/// By the proposer of this round.
fn block(round: usize) -> TestBlock {
    TestBlock { height: Height(1), parent: Hash([0; 32]), author: key(round % 4), time_ms: 900, salt: round as u64 }
}

fn prepare(by: usize, round: u32, block: &TestBlock) -> Signed<Prepare> {
    sign(key(by), Prepare { view: view(round), hash: block.hash() })
}

fn commit(by: usize, round: u32, block: &TestBlock) -> Signed<Commit> {
    sign(key(by), Commit { view: view(round), hash: block.hash() })
}

fn prepares(by: &[usize], round: u32, block: &TestBlock) -> Vec<Signed<Prepare>> {
    by.iter().map(|by| prepare(*by, round, block)).collect()
}

fn round_change(by: usize, round: u32, lock: Option<(u32, &TestBlock)>) -> RoundChangeMessage<TestBlock> {
    let prepared = lock.map(|(round, block)| (Round(round), block.hash()));
    RoundChangeMessage {
        signed: sign(key(by), RoundChange { view: view(round), prepared }),
        block: lock.map(|(_, block)| block.clone()),
        prepares: lock.map(|(round, block)| prepares(&[1, 2, 3], round, block)).unwrap_or_default(),
    }
}

fn asks(by: usize, round: u32, lock: Option<(u32, &TestBlock)>) -> TestMessage {
    Message::RoundChange(Box::new(round_change(by, round, lock)))
}

fn proposal(by: usize, round: u32, block: &TestBlock, justification: Justification) -> TestMessage {
    let signed = sign(key(by), Proposal { view: view(round), hash: block.hash() });
    Message::Proposal(Box::new(ProposalMessage { signed, block: block.clone(), justification }))
}

/// A quorum that wants this round and has prepared nothing.
fn nothing_prepared(round: u32) -> Justification {
    let round_changes = [1, 2, 3].map(|by| round_change(by, round, None).signed).to_vec();
    Justification { round_changes, prepares: Vec::new() }
}

/// A quorum of which one has prepared `block` in `lock`.
fn one_prepared(round: u32, lock: u32, block: &TestBlock) -> Justification {
    let mut this = nothing_prepared(round);
    this.round_changes[1] = round_change(2, round, Some((lock, block))).signed;
    Justification { prepares: prepares(&[1, 2, 3], lock, block), ..this }
}

/// A validator that does what its shell must, and keeps what it said.
struct Validator {
    core: Core<TestBlock>,
    effects: Vec<TestEffect>,
}

impl Validator {
    fn new() -> Self {
        let mut core = Core::new(parameters(0));
        let effects = core.step(NOW, &Toy, Input::NewHeight(first_height(4)));
        Self { core, effects }
    }

    /// What follows from an input; what was cast does not come back by itself.
    fn step(&mut self, input: Input<TestBlock>) -> Vec<TestEffect> {
        let effects = self.core.step(NOW, &Toy, input);
        self.effects.extend(effects.iter().cloned());
        effects
    }

    fn hear(&mut self, message: TestMessage) -> Vec<TestEffect> {
        self.step(Input::Message(message))
    }

    fn refuses(&mut self, message: TestMessage) -> Refusal {
        match &self.hear(message)[..] {
            [.., Effect::Refused { refusal, .. }] => *refusal,
            others => panic!("{others:?}"),
        }
    }

    fn valid(&mut self, block: &TestBlock) -> Vec<TestEffect> {
        self.step(Input::Validated { hash: block.hash(), valid: true })
    }

    /// Has accepted a proposal in round 1, by key 1, and prepared it.
    fn prepared_in_round_1() -> (Self, TestBlock) {
        let mut this = Self::new();
        let block = block(1);
        this.hear(proposal(1, 1, &block, nothing_prepared(1)));
        assert!(says_prepare(&this.valid(&block)));
        (this, block)
    }
}

fn says_prepare(effects: &[TestEffect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::Cast(Draft::Prepare(_))))
}

fn says_commit(effects: &[TestEffect]) -> bool {
    effects.iter().any(|effect| matches!(effect, Effect::Cast(Draft::Commit(_))))
}

fn says_round_change(effects: &[TestEffect]) -> Option<RoundChange> {
    effects.iter().find_map(|effect| match effect {
        Effect::Cast(Draft::RoundChange { payload, .. }) => Some(*payload),
        _ => None,
    })
}

fn sets_round_timer(effects: &[TestEffect], round: u32) -> bool {
    let wanted = Timer::Round(view(round));
    effects.iter().any(|effect| matches!(effect, Effect::SetTimer { timer, .. } if *timer == wanted))
}

fn decides(effects: &[TestEffect]) -> Option<Round> {
    effects.iter().find_map(|effect| match effect {
        Effect::Decided(decided) => Some(decided.1.view.round),
        _ => None,
    })
}

#[test]
fn clause_2_signers_are_counted_not_messages_and_only_validators_with_their_signatures() {
    let (mut this, block) = Validator::prepared_in_round_1();
    this.hear(Message::Prepare(prepare(1, 1, &block)));
    assert_eq!(this.refuses(Message::Prepare(prepare(1, 1, &block))), Refusal::Known);
    assert_eq!(this.refuses(Message::Prepare(prepare(9, 1, &block))), Refusal::NotAValidator);
    let forged = Signed { signer: key(2), ..prepare(3, 1, &block) };
    assert_eq!(this.refuses(Message::Prepare(forged)), Refusal::BadSignature);
    this.hear(Message::Prepare(prepare(2, 1, &block)));
    assert!(!this.effects.iter().any(|effect| says_commit(std::slice::from_ref(effect))), "two are no quorum");
    assert!(says_commit(&this.hear(Message::Prepare(prepare(3, 1, &block)))));
}

#[test]
fn clause_3_a_message_of_another_chain_or_kind_is_not_signed() {
    let (mut this, block) = Validator::prepared_in_round_1();
    let mut signed = prepare(1, 1, &block);
    let other = metanode_ibft::ChainId([8; 32]);
    signed.signature = common::toy_signature(
        &key(1),
        <Prepare as metanode_ibft::Payload>::DOMAIN,
        &metanode_ibft::Payload::encode(&signed.payload, &other),
    );
    assert_eq!(this.refuses(Message::Prepare(signed)), Refusal::BadSignature);
    let kind = Signed { signature: commit(1, 1, &block).signature, ..prepare(1, 1, &block) };
    assert_eq!(this.refuses(Message::Prepare(kind)), Refusal::BadSignature);
}

#[test]
fn clause_4_its_own_messages_are_checked_like_all_others() {
    let (mut this, block) = Validator::prepared_in_round_1();
    let forged = Signed { signature: [0; 64], ..prepare(0, 1, &block) };
    assert_eq!(this.refuses(Message::Prepare(forged)), Refusal::BadSignature);
    this.hear(Message::Prepare(prepare(1, 1, &block)));
    assert!(!says_commit(&this.hear(Message::Prepare(prepare(2, 1, &block)))), "its own has not come back");
    assert!(says_commit(&this.hear(Message::Prepare(prepare(0, 1, &block)))));
}

#[test]
fn clause_8_one_proposal_and_one_prepare_a_round_and_nothing_below_it() {
    let (mut this, block) = Validator::prepared_in_round_1();
    let other = TestBlock { salt: 99, ..block.clone() };
    let effects = this.hear(proposal(1, 1, &other, nothing_prepared(1)));
    assert!(matches!(
        effects[..],
        [Effect::Evidence(Evidence::Proposal(_)), Effect::Refused { refusal: Refusal::Equivocation, .. }]
    ));
    assert!(!says_prepare(&this.valid(&other)) && !says_prepare(&this.valid(&block)));
    let first = common::first_height(4).validators.proposer(&first_height(4).parent_author, Round(0));
    assert_eq!(first, key(0));
    assert_eq!(this.refuses(proposal(0, 0, &self::block(0), Justification::default())), Refusal::Old);
    assert_eq!(this.refuses(Message::Prepare(prepare(1, 0, &block))), Refusal::Old);
}

/// A leader that proposes what was prepared has it at hand, and needs no answer first.
#[test]
fn clause_8_one_proposal_and_one_commit_a_round_whatever_else_comes() {
    let mut this = Validator::new();
    let locked = block(1);
    let proposes = |effects: &[TestEffect]| {
        effects.iter().filter(|effect| matches!(effect, Effect::Cast(Draft::Proposal { .. }))).count()
    };
    this.hear(asks(1, 4, Some((1, &locked))));
    this.hear(asks(2, 4, None));
    assert_eq!(this.core.view(), Some(view(4)), "its own turn, where two others already are");
    let first = this.hear(asks(3, 4, None));
    assert_eq!(proposes(&first), 1);
    let own = Message::RoundChange(Box::new(round_change(0, 4, None)));
    assert_eq!(proposes(&this.hear(own)), 0, "one more changes nothing");

    let (mut this, block) = Validator::prepared_in_round_1();
    this.hear(Message::Prepare(prepare(0, 1, &block)));
    this.hear(Message::Prepare(prepare(1, 1, &block)));
    assert!(says_commit(&this.hear(Message::Prepare(prepare(2, 1, &block)))));
    assert!(!says_commit(&this.hear(Message::Prepare(prepare(3, 1, &block)))));
}

#[test]
fn clause_9_a_later_round_needs_a_quorum_and_the_highest_lock_in_it() {
    let (old, new) = (block(1), block(2));
    let refuses = |message| Validator::new().refuses(message);
    assert_eq!(refuses(proposal(2, 2, &new, Justification::default())), Refusal::NotJustified);
    let mut few = nothing_prepared(2);
    few.round_changes.pop();
    assert_eq!(refuses(proposal(2, 2, &new, few.clone())), Refusal::NotJustified);
    few.round_changes.push(few.round_changes[0]);
    assert_eq!(refuses(proposal(2, 2, &new, few.clone())), Refusal::NotJustified, "the same twice");
    few.round_changes[2] = round_change(3, 3, None).signed;
    assert_eq!(refuses(proposal(2, 2, &new, few)), Refusal::NotJustified, "one for another round");
    assert_eq!(
        refuses(proposal(2, 2, &new, one_prepared(2, 1, &old))),
        Refusal::NotJustified,
        "another block is prepared"
    );
    let mut lock = one_prepared(2, 1, &old);
    lock.prepares.pop();
    assert_eq!(refuses(proposal(2, 2, &old, lock)), Refusal::NotJustified, "without its proof");
    let mut two = one_prepared(3, 2, &new);
    two.round_changes[0] = round_change(1, 3, Some((1, &old))).signed;
    assert_eq!(
        refuses(proposal(3, 3, &old, Justification { prepares: prepares(&[1, 2, 3], 1, &old), ..two.clone() })),
        Refusal::NotJustified
    );
    let mut this = Validator::new();
    let effects = this.hear(proposal(3, 3, &new, two));
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Validate { fresh: false, .. })), "{effects:?}");
    assert_eq!(this.core.view(), Some(view(3)));
    let mut extra = Justification::default();
    extra.round_changes.push(round_change(1, 1, None).signed);
    assert_eq!(refuses(proposal(0, 0, &block(0), extra)), Refusal::NotJustified, "round 0 carries none");
}

#[test]
fn clause_10_the_proposer_prepares_like_everyone() {
    let (mut this, block) = Validator::prepared_in_round_1();
    this.hear(Message::Prepare(prepare(0, 1, &block)));
    // Its proposal is no prepare: this is the second of three.
    assert!(!says_commit(&this.hear(Message::Prepare(prepare(2, 1, &block)))));
    assert!(says_commit(&this.hear(Message::Prepare(prepare(1, 1, &block)))));
}

#[test]
fn clauses_7_and_11_a_claim_without_its_proof_is_ignored() {
    let block = block(1);
    let good = round_change(2, 3, Some((1, &block)));
    let refuses =
        |message: RoundChangeMessage<TestBlock>| Validator::new().refuses(Message::RoundChange(Box::new(message)));
    let few = RoundChangeMessage { prepares: prepares(&[1, 2], 1, &block), ..good.clone() };
    assert_eq!(refuses(few), Refusal::NotJustified);
    let twice = RoundChangeMessage { prepares: prepares(&[1, 2, 2], 1, &block), ..good.clone() };
    assert_eq!(refuses(twice), Refusal::NotJustified);
    let mixed = RoundChangeMessage {
        prepares: [prepares(&[1, 2], 1, &block), prepares(&[3], 2, &block)].concat(),
        ..good.clone()
    };
    assert_eq!(refuses(mixed), Refusal::NotJustified);
    assert_eq!(refuses(RoundChangeMessage { block: None, ..good.clone() }), Refusal::NotJustified);
    assert_eq!(refuses(RoundChangeMessage { block: Some(self::block(2)), ..good.clone() }), Refusal::BadBlock);
    assert_eq!(
        refuses(round_change(2, 1, Some((1, &block)))),
        Refusal::NotJustified,
        "prepared in the round that it asks for"
    );
    let bare = RoundChangeMessage { block: Some(block.clone()), ..round_change(2, 3, None) };
    assert_eq!(refuses(bare), Refusal::NotJustified, "a block without a claim");
    assert!(
        !Validator::new()
            .hear(Message::RoundChange(Box::new(good)))
            .iter()
            .any(|e| matches!(e, Effect::Refused { .. }))
    );
}

#[test]
fn clause_12_the_lock_is_in_every_later_round_change() {
    let (mut this, block) = Validator::prepared_in_round_1();
    for by in [1, 2, 3] {
        this.hear(Message::Prepare(prepare(by, 1, &block)));
    }
    for round in 1..4 {
        if round > 1 {
            for by in [1, 2, 3] {
                this.hear(asks(by, round, None)); // a quorum, so that the clock of this round runs
            }
        }
        let asked = says_round_change(&this.step(Input::Timeout(Timer::Round(view(round)))));
        assert_eq!(asked, Some(RoundChange { view: view(round + 1), prepared: Some((Round(1), block.hash())) }));
    }
}

#[test]
fn clause_13_a_quorum_of_commits_of_any_round_decides() {
    let (mut this, block) = Validator::prepared_in_round_1();
    this.step(Input::Timeout(Timer::Round(view(1))));
    assert_eq!(this.core.view(), Some(view(2)));
    for by in [1, 2] {
        assert_eq!(decides(&this.hear(Message::Commit(commit(by, 1, &block)))), None);
    }
    // One of another round does not make them three.
    assert_eq!(decides(&this.hear(Message::Commit(commit(3, 2, &block)))), None);
    assert_eq!(decides(&this.hear(Message::Commit(commit(3, 1, &block)))), Some(Round(1)));
    // Who has not seen the block asks for it, once.
    let mut this = Validator::new();
    let decided: Vec<_> =
        [1, 2, 3, 0].into_iter().flat_map(|by| this.hear(Message::Commit(commit(by, 1, &block)))).collect();
    assert!(matches!(decided[..], [Effect::Missing { .. }]), "{decided:?}");
    let commits = [1, 2, 3].map(|by| commit(by, 1, &block)).to_vec();
    let certificate = Certificate { view: view(1), hash: block.hash(), commits };
    this.hear(Message::NewBlock(Box::new((block.clone(), certificate))));
    assert_eq!(decides(&this.valid(&block)), Some(Round(1)));
}

#[test]
fn clause_14_nothing_is_prepared_that_the_application_has_not_found_valid() {
    let mut this = Validator::new();
    let block = block(1);
    assert!(!says_prepare(&this.hear(proposal(1, 1, &block, nothing_prepared(1)))));
    assert!(!says_prepare(&this.step(Input::Validated { hash: block.hash(), valid: false })));
    for by in [1, 2, 3] {
        assert!(!says_commit(&this.hear(Message::Prepare(prepare(by, 1, &block)))));
    }
}

#[test]
fn clause_15_times_bind_fresh_blocks_only() {
    let at = |time_ms| TestBlock { time_ms, ..block(1) };
    for (time_ms, fits) in [(0, false), (1, true), (1_500, true), (1_501, false)] {
        let block = at(time_ms);
        let effects = Validator::new().hear(proposal(1, 1, &block, nothing_prepared(1)));
        assert_eq!(effects.iter().any(|effect| matches!(effect, Effect::Validate { .. })), fits, "{time_ms}");
        let again = Validator::new().hear(proposal(2, 2, &block, one_prepared(2, 1, &block)));
        assert!(again.iter().any(|effect| matches!(effect, Effect::Validate { fresh: false, .. })), "{time_ms}");
    }
}

#[test]
fn clause_16_the_clock_of_a_later_round_starts_with_a_quorum_or_a_proposal() {
    let mut this = Validator::new();
    this.step(Input::Work);
    assert!(says_round_change(&this.step(Input::Timeout(Timer::Round(view(0))))).is_some());
    assert!(!sets_round_timer(&this.effects, 1));
    this.hear(asks(0, 1, None));
    this.hear(asks(1, 1, None));
    assert!(!sets_round_timer(&this.effects, 1), "two of three");
    assert_eq!(this.core.no_quorum(), Some(NoQuorum { heard: 2, quorum: 3 }), "and it says so");
    let resent = this.step(Input::Timeout(Timer::Resend(view(1))));
    assert!(matches!(
        resent[..],
        [Effect::Send { to: None, message: Message::RoundChange(_) }, Effect::SetTimer { .. }]
    ));
    assert_eq!(this.step(Input::Connected(key(3))).len(), 1, "and to who comes back");
    // One that its signer has spoilt, or not made at all, is made again.
    let mut spoilt = Validator::new();
    spoilt.step(Input::Work);
    spoilt.step(Input::Timeout(Timer::Round(view(0))));
    assert_eq!(
        says_round_change(&spoilt.step(Input::Timeout(Timer::Resend(view(1))))).map(|said| said.view),
        Some(view(1))
    );
    this.hear(asks(2, 2, None));
    assert!(sets_round_timer(&this.effects, 1), "three want this round or a later one");
    assert_eq!(this.core.no_quorum(), None);
    let mut other = Validator::new();
    other.hear(proposal(3, 3, &block(3), nothing_prepared(3)));
    assert!(sets_round_timer(&other.effects, 3));
}

#[test]
fn clause_17_f_plus_1_ahead_are_followed_to_the_lowest_of_their_highest() {
    let mut this = Validator::new();
    assert_eq!(says_round_change(&this.hear(asks(1, 7, None))), None, "one may lie");
    let joined = says_round_change(&this.hear(asks(2, 5, None)));
    assert_eq!(joined, Some(RoundChange { view: view(5), prepared: None }));
    assert_eq!(this.refuses(asks(1, 6, None)), Refusal::Old, "the highest of each is kept");
}

#[test]
fn clause_18_the_first_clock_starts_with_work() {
    let mut this = Validator::new();
    assert!(!sets_round_timer(&this.effects, 0));
    let effects = this.step(Input::Work);
    assert!(sets_round_timer(&effects, 0));
    assert!(matches!(effects[..], [Effect::SetTimer { .. }, Effect::Build { .. }]), "and it is its turn");
    let mut idle = Validator::new();
    assert!(sets_round_timer(&idle.step(Input::Timeout(Timer::Empty(Height(1)))), 0));
}

#[test]
fn clause_21_what_is_said_is_on_disk_before() {
    let (mut this, block) = Validator::prepared_in_round_1();
    for by in [1, 2, 3] {
        this.hear(Message::Prepare(prepare(by, 1, &block)));
    }
    this.step(Input::Timeout(Timer::Round(view(1))));
    let at = |wanted: &dyn Fn(&TestEffect) -> bool| this.effects.iter().position(wanted).unwrap();
    let persists = |wanted: &dyn Fn(&Record<TestBlock>) -> bool| {
        at(&|effect| matches!(effect, Effect::Persist(record) if wanted(record)))
    };
    let block_at = persists(&|record| matches!(record, Record::Block(_)));
    let prepared_at = persists(&|record| matches!(record, Record::Prepared(_)));
    let round_at = persists(&|record| matches!(record, Record::Round(_)));
    assert!(block_at < at(&|effect| says_prepare(std::slice::from_ref(effect))));
    assert!(prepared_at < at(&|effect| says_commit(std::slice::from_ref(effect))));
    assert!(round_at < at(&|effect| says_round_change(std::slice::from_ref(effect)).is_some()));
    let (mut this, block) = Validator::prepared_in_round_1();
    let decided: Vec<_> =
        [1, 2, 3].into_iter().flat_map(|by| this.hear(Message::Commit(commit(by, 1, &block)))).collect();
    assert!(matches!(decided[..], [Effect::Persist(Record::Decision(_)), Effect::Decided(_)]), "{decided:?}");
}

fn restored(records: &[Record<TestBlock>], may_vote: bool) -> Validator {
    let (core, effects) = Core::restore(parameters(0), first_height(4), records, may_vote, NOW, &Toy);
    Validator { core, effects }
}

#[test]
fn clause_22_a_restart_says_the_same_and_nothing_else() {
    let (one, other) = (block(1), TestBlock { salt: 99, ..block(1) });
    let records = [Record::Block(one.clone()), Record::Cast(Message::Prepare(prepare(0, 1, &one)))];
    let mut this = restored(&records, true);
    assert_eq!(this.core.view(), Some(view(1)));
    assert!(this.effects.iter().any(|e| matches!(e, Effect::Send { message: Message::Prepare(_), .. })));
    assert_eq!(this.refuses(proposal(1, 1, &other, nothing_prepared(1))), Refusal::Equivocation);
    this.hear(proposal(1, 1, &one, nothing_prepared(1)));
    assert!(!says_prepare(&this.valid(&one)), "it is said");
    this.hear(Message::Prepare(prepare(1, 1, &one)));
    assert!(says_commit(&this.hear(Message::Prepare(prepare(2, 1, &one)))));
    // With a lock, and dead between the record of a round and its message.
    let lock = Prepared { view: view(1), block: one.clone(), prepares: prepares(&[0, 1, 2], 1, &one) };
    let this = restored(&[Record::Prepared(lock), Record::Round(view(2))], true);
    let asked = says_round_change(&this.effects);
    assert_eq!(asked, Some(RoundChange { view: view(2), prepared: Some((Round(1), one.hash())) }));
    // Of two locks the newer one holds.
    let lock = |round| {
        let prepares = prepares(&[0, 1, 2], round, &one);
        Record::Prepared(Prepared { view: view(round), block: one.clone(), prepares })
    };
    let this = restored(&[lock(1), lock(2), Record::Round(view(3))], true);
    let asked = says_round_change(&this.effects).unwrap();
    assert_eq!(asked.prepared, Some((Round(2), one.hash())));
    // One that may not vote says nothing at all, and still learns what is decided.
    let mut silent = restored(&[], false);
    silent.hear(proposal(1, 1, &one, nothing_prepared(1)));
    assert!(!says_prepare(&silent.valid(&one)));
    silent.step(Input::Timeout(Timer::Round(view(1))));
    assert_eq!(says_round_change(&silent.effects), None);
    // A lock that it could have taken meanwhile is on disk before it says anything of it (clause 21).
    let mut unlocked = restored(&[Record::Round(view(1))], false);
    unlocked.hear(proposal(1, 1, &one, nothing_prepared(1)));
    unlocked.valid(&one);
    for by in [1, 2, 3] {
        assert!(!says_commit(&unlocked.hear(Message::Prepare(prepare(by, 1, &one)))));
    }
    let effects = unlocked.step(Input::MayVote(true));
    let at = |what: &dyn Fn(&Effect<TestBlock>) -> bool| effects.iter().position(what).unwrap();
    let says = |effect: &Effect<TestBlock>| {
        let one = std::slice::from_ref(effect);
        says_commit(one) || says_round_change(one).is_some_and(|change| change.prepared.is_some())
    };
    assert!(at(&|effect| matches!(effect, Effect::Persist(Record::Prepared(_)))) < at(&says));
    // Nor does it claim one that it could have taken in a round that is over: it is not on disk.
    let mut late = restored(&[Record::Round(view(1))], false);
    late.hear(proposal(1, 1, &one, nothing_prepared(1)));
    late.valid(&one);
    for by in [1, 2, 3] {
        late.hear(Message::Prepare(prepare(by, 1, &one)));
    }
    late.step(Input::Timeout(Timer::Round(view(1))));
    let asked = says_round_change(&late.step(Input::MayVote(true)));
    assert_eq!(asked, Some(RoundChange { view: view(2), prepared: None }));
    // Once it may, it says what it would have said; and nothing more when it may not any longer.
    let mut later = restored(&[Record::Round(view(1))], false);
    later.hear(proposal(1, 1, &one, nothing_prepared(1)));
    assert!(!says_prepare(&later.valid(&one)));
    assert!(says_prepare(&later.step(Input::MayVote(true))));
    assert!(later.step(Input::MayVote(false)).is_empty());
    later.hear(Message::Prepare(prepare(1, 1, &one)));
    later.hear(Message::Prepare(prepare(2, 1, &one)));
    assert!(!says_commit(&later.hear(Message::Prepare(prepare(3, 1, &one)))));
}

/// The fewest records do what all of them do.
#[test]
fn clause_22_a_log_that_begins_anew_says_the_same() {
    let sends = |this: &Validator| -> Vec<TestMessage> {
        let sent = this.effects.iter().filter_map(|effect| match effect {
            Effect::Send { to: None, message } => Some(message.clone()),
            _ => None,
        });
        sent.collect()
    };
    let (mut this, block) = Validator::prepared_in_round_1();
    assert_eq!(this.core.records(), None, "its prepare has not come back: only the log has it");
    this.hear(Message::Prepare(prepare(0, 1, &block)));
    let anew = restored(&this.core.records().unwrap(), true);
    assert_eq!(anew.core.view(), Some(view(1)));
    assert_eq!(sends(&anew), [Message::Prepare(prepare(0, 1, &block))]);

    this.hear(Message::Prepare(prepare(1, 1, &block)));
    assert!(says_commit(&this.hear(Message::Prepare(prepare(2, 1, &block)))));
    this.hear(Message::Commit(commit(0, 1, &block)));
    let mut anew = restored(&this.core.records().unwrap(), true);
    assert_eq!(sends(&anew), [Message::Prepare(prepare(0, 1, &block)), Message::Commit(commit(0, 1, &block))]);
    assert!(!says_commit(&anew.hear(proposal(1, 1, &block, nothing_prepared(1)))));
    let claim = Some((Round(1), block.hash()));
    let asked = says_round_change(&anew.step(Input::Timeout(Timer::Round(view(1)))));
    assert_eq!(asked, Some(RoundChange { view: view(2), prepared: claim }));

    this.step(Input::Timeout(Timer::Round(view(1))));
    let own = round_change(0, 2, Some((1, &block)));
    this.hear(Message::RoundChange(Box::new(own.clone())));
    let anew = restored(&this.core.records().unwrap(), true);
    assert_eq!((anew.core.view(), sends(&anew)), (Some(view(2)), vec![Message::RoundChange(Box::new(own))]));
    // Where nothing was said in a round, the round itself is all there is.
    let mut late = Validator::new();
    late.hear(proposal(1, 1, &block, nothing_prepared(1)));
    assert_eq!(restored(&late.core.records().unwrap(), true).core.view(), Some(view(1)));

    for by in [1, 2, 3] {
        this.hear(Message::Commit(commit(by, 1, &block)));
    }
    assert_eq!(decides(&restored(&this.core.records().unwrap(), true).effects), Some(Round(1)));
}

#[test]
fn clause_23_each_signer_has_a_share_of_what_is_kept_for_later() {
    let mut this = Validator::new();
    let later = |by: usize, height: u64, round: u32| {
        let view = View { height: Height(height), round: Round(round) };
        Message::Prepare(sign(key(by), Prepare { view, hash: Hash([1; 32]) }))
    };
    assert_eq!(this.refuses(later(1, 2 + HEIGHTS_AHEAD, 0)), Refusal::TooFarAhead);
    let far = this.hear(later(1, 2 + HEIGHTS_AHEAD, 0));
    assert!(matches!(far[..], [Effect::Behind { .. }, _]), "what is too far ahead says that this one is behind");
    for round in 0..SHARE_MESSAGES_MAX as u32 {
        assert!(matches!(this.hear(later(1, 3, 10 + round))[..], [Effect::Behind { .. }]));
    }
    assert_eq!(this.refuses(later(1, 3, 99)), Refusal::ShareUsedUp, "the furthest goes first");
    assert!(matches!(this.hear(later(1, 3, 0))[..], [Effect::Behind { .. }]), "a nearer one takes its place");
    assert!(matches!(this.hear(later(2, 3, 99))[..], [Effect::Behind { .. }]), "another's share is its own");
    assert_eq!(this.refuses(Message::Prepare(prepare(1, 9, &block(1)))), Refusal::TooFarAhead);
    // Bytes are counted too.
    let large = |round: u32| {
        let block = TestBlock { height: Height(3), salt: LARGE | u64::from(round), ..block(0) };
        let view = View { height: Height(3), round: Round(round) };
        let signed = sign(key(3), Proposal { view, hash: block.hash() });
        Message::Proposal(Box::new(ProposalMessage { signed, block, justification: Justification::default() }))
    };
    assert!(matches!(this.hear(large(1))[..], [Effect::Behind { .. }]));
    assert!(matches!(this.hear(large(2))[..], [Effect::Behind { .. }]));
    assert_eq!(this.refuses(large(3)), Refusal::ShareUsedUp);
    assert!(matches!(this.hear(large(0))[..], [Effect::Behind { .. }]), "a nearer one takes its place");
}

/// A validator that has decided height 1 and begun height 2.
fn at_height_2() -> Validator {
    let (mut this, block) = Validator::prepared_in_round_1();
    for by in [1, 2, 3] {
        this.hear(Message::Commit(commit(by, 1, &block)));
    }
    let mut next = first_height(4);
    (next.height, next.parent, next.parent_author, next.parent_time_ms) = (Height(2), block.hash(), block.author, 900);
    this.step(Input::NewHeight(next));
    this
}

#[test]
fn clause_24_who_is_behind_gets_the_block_now_and_then() {
    let mut this = at_height_2();
    let help = this.hear(asks(2, 3, None));
    assert_eq!(help, [Effect::Help { to: key(2), height: Height(1) }]);
    assert_eq!(this.refuses(asks(2, 4, None)), Refusal::Old, "not twice at once");
    let later = Now { monotonic: HELP_INTERVAL, ..NOW };
    let help = this.core.step(later, &Toy, Input::Message(asks(2, 4, None)));
    assert_eq!(help, [Effect::Help { to: key(2), height: Height(1) }]);
    let forged = RoundChangeMessage {
        signed: Signed { signature: [0; 64], ..round_change(3, 3, None).signed },
        ..round_change(3, 3, None)
    };
    assert_eq!(this.refuses(Message::RoundChange(Box::new(forged))), Refusal::BadSignature);
}

#[test]
fn clause_25_a_final_block_needs_its_certificate_and_a_verdict() {
    let block = block(2);
    let certificate = |by: &[usize]| Certificate {
        view: view(2),
        hash: block.hash(),
        commits: by.iter().map(|by| commit(*by, 2, &block)).collect(),
    };
    let new_block = |certificate| Message::NewBlock(Box::new((block.clone(), certificate)));
    let mut this = Validator::new();
    assert_eq!(this.refuses(new_block(certificate(&[1, 2]))), Refusal::NotJustified);
    assert_eq!(this.refuses(new_block(certificate(&[1, 2, 2]))), Refusal::NotJustified);
    assert_eq!(this.refuses(new_block(certificate(&[1, 2, 9]))), Refusal::NotAValidator);
    let mut mixed = certificate(&[1, 2, 3]);
    mixed.commits[2] = commit(3, 1, &block);
    assert_eq!(this.refuses(new_block(mixed)), Refusal::NotJustified, "of one round");
    assert_eq!(decides(&this.hear(new_block(certificate(&[1, 2, 3])))), None);
    assert_eq!(decides(&this.valid(&block)), Some(Round(2)));
    let mut this = Validator::new();
    this.hear(new_block(certificate(&[1, 2, 3])));
    let halts = this.step(Input::Validated { hash: block.hash(), valid: false });
    assert!(matches!(halts[..], [Effect::Halt(_)]));
    assert!(this.step(Input::Work).is_empty(), "it says nothing more");
}

#[test]
fn clause_26_two_votes_of_one_round_are_evidence() {
    let (mut this, block) = Validator::prepared_in_round_1();
    let other = TestBlock { salt: 99, ..block.clone() };
    this.hear(Message::Prepare(prepare(3, 1, &block)));
    this.hear(Message::Prepare(prepare(3, 1, &other)));
    this.hear(Message::Commit(commit(3, 1, &block)));
    this.hear(Message::Commit(commit(3, 1, &other)));
    this.hear(asks(3, 2, None));
    this.hear(asks(3, 2, Some((1, &block))));
    let found: Vec<&Evidence> = this
        .effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Evidence(evidence) => Some(evidence),
            _ => None,
        })
        .collect();
    assert!(matches!(found[..], [Evidence::Prepare(_), Evidence::Commit(_), Evidence::RoundChange(_)]), "{found:?}");
    for evidence in found {
        assert_eq!(evidence.of().0, key(3));
        assert!(evidence.verify(&CHAIN, &Toy));
        assert!(!evidence.verify(&metanode_ibft::ChainId([8; 32]), &Toy));
    }
    // Of two rounds, or by two signers, or the same twice, they are none.
    for pair in [
        [prepare(3, 1, &block), prepare(3, 2, &other)],
        [prepare(3, 1, &block), prepare(2, 1, &other)],
        [prepare(3, 1, &block), prepare(3, 1, &block)],
    ] {
        assert!(!Evidence::Prepare(pair).verify(&CHAIN, &Toy));
    }
    let same = Evidence::Prepare([prepare(3, 1, &block); 2]);
    assert!(!same.verify(&CHAIN, &Toy), "saying the same twice is none");
}
