//! Mutants of the protocol, by clause. Clause 20 is about what is given to the core: it is the ledger's to break.

use super::Mutant;

macro_rules! mutants {
    ($($clause:literal $package:ident $file:ident $what:literal: $from:expr => $to:expr;)*) => {
        &[$(Mutant {
            clause: $clause,
            what: $what,
            package: stringify!($package),
            file: concat!("src/", stringify!($file), ".rs"),
            from: $from,
            to: $to,
        }),*]
    };
}

pub(super) const MUTANTS: &[Mutant] = mutants! {
    1 ibft validators "a quorum is rounded down": "(2 * self.len()).div_ceil(3)" => "2 * self.len() / 3";
    1 ibft validators "one more may be faulty": "(self.len() - 1) / 3" => "self.len() / 3";
    2 ibft justify "messages are counted, not signers": "let mut signers = BTreeSet::<NodeKey>::new();\n        for signed in all {\n            self.signed(signed)?;\n            signers.insert(signed.signer);\n        }\n" => "let _ = BTreeSet::<NodeKey>::new();\n        let mut signers = Vec::new();\n        for signed in all {\n            self.signed(signed)?;\n            signers.push(signed.signer);\n        }\n";
    2 ibft justify "signatures are believed": "(trusted || signed.verify(self.chain, self.verifier)).then_some(())" => "(trusted || signed.verify(self.chain, self.verifier) || true).then_some(())";
    2 ibft justify "strangers vote": "if !self.validators.contains(&signed.signer) {" => "if false {";
    3 ibft message "the chain is not signed": "let mut out = chain.0.to_vec();" => "let mut out = vec![chain.0[0] & 0; 32];";
    3 ibft message "a prepare passes for a commit": "\"metanode ibft prepare v1\"" => "\"metanode ibft commit v1\"";
    4 ibft height "own votes are trusted": "        self.checks(step).signed(signed)\n" => "        if step.parameters.me == Some(signed.signer) { Ok(()) } else { self.checks(step).signed(signed) }\n";
    5 ibft height "a proposal comes without its justification": "Draft::Proposal { payload, block, justification }" => "Draft::Proposal { payload, block, justification: Justification { prepares: Vec::new(), ..justification } }";
    5 ibft height "a round change comes without its prepares": "(Some((lock.view.round, lock.block.hash())), Some(lock.block.clone()), lock.prepares.clone())" => "(Some((lock.view.round, lock.block.hash())), Some(lock.block.clone()), Vec::new())";
    6 ibft message "the round is not signed": "        out.extend(self.view().round.0.to_le_bytes());\n" => "";
    6 ibft justify "commits of several rounds make a certificate": "signed.payload != Commit { view: *view, hash: *hash }" => "signed.payload.hash != *hash";
    7 ibft justify "a claim may be half": "let bare = message.block.is_none() && message.prepares.is_empty();" => "let bare = true;";
    8 ibft height "prepares twice in a round": "if self.said.prepare.is_none() && self.votes(step)" => "if self.votes(step)";
    8 ibft height "proposes twice in a round": "if !self.am_proposer(step) || self.said.proposal {" => "if !self.am_proposer(step) {";
    8 ibft height "commits twice in a round": "if prepares.len() < quorum || self.said.commit.is_some() {" => "if prepares.len() < quorum {";
    8 ibft height "takes proposals of rounds that are over": "        if view.round < self.round {\n            return Err(Refusal::Old); // clause 8\n        }\n        self.checks(step).signed(&message.signed)?;" => "        self.checks(step).signed(&message.signed)?;";
    9 ibft justify "the lowest lock is proposed again": "false => claims.max_by_key(|(round, _)| *round)," => "false => claims.min_by_key(|(round, _)| *round),";
    9 ibft justify "no quorum needs to want the round": "        self.quorum(round_changes.iter())?;\n" => "";
    9 ibft justify "round changes for another round count": "payload.view == view && payload.prepared" => "payload.view.height == view.height && payload.prepared";
    9 ibft height "another block than the locked one is taken": "Some(wanted) if wanted != hash => return Err(Refusal::NotJustified)," => "Some(wanted) if wanted != hash && false => return Err(Refusal::NotJustified),";
    9 ibft justify "round 0 may be justified": "return if bare { Ok(None) } else { Err(Refusal::NotJustified) };" => "return if bare || true { Ok(None) } else { Err(Refusal::NotJustified) };";
    10 ibft height "commits with one prepare too few": "if prepares.len() < quorum || self.said" => "if prepares.len() + 1 < quorum || self.said";
    11 ibft justify "a claim of the same round": "        if round >= view.round {\n            return Err(Refusal::NotJustified);\n        }\n" => "";
    11 ibft justify "a claim needs no prepares": "self.prepared(View { round, ..view }, hash, &message.prepares)" => "{ let _ = round; Ok(()) }";
    11 ibft justify "a claim comes with any block": "Some(block) if block.hash() != hash || block.height() != view.height => return Err(Refusal::BadBlock)," => "";
    12 ibft height "the lock is forgotten with its round": "        self.prepares.forget_below(round);\n" => "        self.prepares.forget_below(round);\n        self.lock = None;\n";
    12 ibft height "an older lock replaces a newer one at a restart": "before.view.round <= lock.view.round" => "before.view.round >= lock.view.round";
    13 ibft height "commits of rounds that are over count no more": "        // Of any round: a quorum of one that is over decides all the same (clause 13).\n" => "        if signed.payload.view.round < self.round {\n            return Err(Refusal::Old);\n        }\n";
    13 ibft height "a justified proposal of a later round moves nobody": "        if view.round > self.round {\n            self.enter(step, view.round, false); // clause 13\n        }\n" => "        if view.round > self.round {\n            return Err(Refusal::TooFarAhead);\n        }\n";
    14 ibft height "prepares before the application has answered": "        let Some(Candidate { block, valid: Some(true) }) = self.candidates.get(&hash) else { return };\n        if self.said.prepare" => "        let Some(Candidate { block, .. }) = self.candidates.get(&hash) else { return };\n        if self.said.prepare";
    15 ibft height "a block of any time is taken": "if block.time_ms() <= self.at.parent_time_ms || block.time_ms() > latest_ms {" => "if false && block.time_ms() > latest_ms {";
    15 ibft height "a block that was prepared is refused for its time": "            Some(_) => {} // never refused for its time (clause 15)\n" => "            Some(_) if block.time_ms() > step.now.unix_ms => return Err(Refusal::BadTime),\n            Some(_) => {}\n";
    16 ibft height "the next round's clock starts at once": "let shared = self.at_least(self.round) >= self.at.validators.quorum();" => "let shared = true;";
    16 ibft height "a round change is said once": "                self.resend(step, None);\n                let me" => "                let me";
    16 ibft height "rounds do not get longer": "1u32.checked_shl(round.0).unwrap_or(u32::MAX)" => "1u32.checked_shl(round.0.min(0)).unwrap_or(u32::MAX)";
    16 ibft height "rounds get longer without an end": ").min(self.cap)" => ").max(self.cap.min(Duration::ZERO))";
    16 ibft height "a round change that was not signed well is not said again": "match said == Some(view) || self.locked_here() {" => "match said == Some(view) || true {";
    17 ibft height "nobody is followed": "ahead.get(self.at.validators.faults()).copied()" => "ahead.get(self.at.validators.len()).copied()";
    17 ibft height "one alone is followed": "ahead.get(self.at.validators.faults()).copied()" => "ahead.first().copied()";
    17 ibft height "a signer's older round change replaces a newer one": "            Some(before) if before.payload.view.round > view.round => return Err(Refusal::Old),\n" => "";
    18 ibft height "round 0's clock waits for a proposal": "        if self.round == Round::ZERO {\n            self.start_timer(step);\n        }\n" => "";
    18 ibft machine "round 0's clock starts with the height": "            effects.push(Effect::SetTimer { timer: Timer::Empty(height), after });\n" => "            effects.push(Effect::SetTimer { timer: Timer::Empty(height), after });\n            effects.push(Effect::SetTimer { timer: Timer::Round(View { height, round: crate::Round::ZERO }), after });\n";
    19 ibft validators "the same author has the turn again": "key <= previous_author" => "key < previous_author";
    19 ibft validators "the turn does not pass with the round": "(next + round.0 as usize % self.len()) % self.len()" => "(next + round.0 as usize * 0) % self.len()";
    20 ledger chain "a change acts before all have executed it": "acts_at: Height(height.0 + self.lag + 1)," => "acts_at: Height(height.0 + self.lag),";
    20 ledger chain "who has not executed far enough votes all the same": "if self.executed < needed {" => "if self.executed < needed && false {";
    20 ledger chain "the header says who votes now where it should say who votes next": "next_validators_hash: validators_hash(self.system_validators(height.next()))" => "next_validators_hash: validators_hash(self.system_validators(height))";
    21 ibft height "the block of a prepare is not on disk": "            step.effects.push(Effect::Persist(Record::Block(block.clone())));\n" => "            let _ = block;\n";
    21 ibft height "the lock is not on disk": "        step.effects.push(Effect::Persist(Record::Prepared(lock)));\n" => "        let _ = lock;\n";
    21 ibft height "a lock is taken in silence, and never written": "        if !self.votes(step) {\n            return;\n        }\n        self.said.commit = Some(hash);" => "        if !self.votes(step) {\n            self.lock = Some(Prepared { view, block: block.clone(), prepares });\n            return;\n        }\n        self.said.commit = Some(hash);";
    21 ibft height "the round is not on disk": "        step.effects.push(Effect::Persist(Record::Round(view)));\n" => "";
    21 ibft height "a decision is not on disk": "                    step.effects.push(Effect::Persist(Record::Decision(decided.clone())));\n" => "";
    22 ibft height "what was said is forgotten at a restart": "            Message::Prepare(signed) => self.said.prepare = Some(signed.payload.hash),\n" => "            Message::Prepare(_) => {}\n";
    22 ibft height "nothing is said again after a restart": "        self.resend(step, None);\n        let locked_here" => "        let locked_here";
    22 ibft height "a log that begins anew forgets the lock": "        records.extend(self.lock.clone().map(Record::Prepared));\n" => "";
    22 ibft height "a log that begins anew forgets what was said": "        records.extend(said.into_iter().filter_map(|(_, message)| message).map(Record::Cast));\n" => "";
    22 ibft height "a log begins anew while something has not come back": "if said.iter().any(|(said, message)| *said && message.is_none()) {" => "if false {";
    22 ibft height "a log that begins anew forgets the round": "        if self.round > Round::ZERO {\n            records.push(Record::Round(self.view()));\n        }\n" => "";
    23 ibft future "heights of any distance are kept": "if view.height.0 - here.0 > HEIGHTS_AHEAD {" => "if false && view.height.0 - here.0 > HEIGHTS_AHEAD {";
    23 ibft future "one signer uses another's share": "self.shares.entry(signer).or_default()" => "self.shares.entry(NodeKey([0; 32])).or_default()";
    23 ibft future "any number is kept": "share.len() > SHARE_MESSAGES_MAX || " => "";
    23 ibft future "any number of bytes is kept": " || share.values().map(block_bytes).sum::<usize>() > SHARE_BYTES_MAX" => "";
    23 ibft future "the nearest goes first": "share.pop_last()" => "share.pop_first()";
    23 ibft tally "votes of any number of rounds are kept": "if rounds.len() >= ROUNDS_MAX {" => "if false && rounds.len() >= ROUNDS_MAX {";
    23 ibft height "votes of any round are kept": "if signed.payload.view().round.0.saturating_sub(self.round.0) > ROUNDS_AHEAD {" => "if false {";
    24 ibft machine "nobody is helped": "        effects.push(Effect::Help { to: signer, height });\n" => "";
    24 ibft machine "help has no limit": "self.helped.get(&signer).is_none_or(|last| now.monotonic >= *last + HELP_INTERVAL)" => "self.helped.get(&signer).is_none_or(|_| now.monotonic + HELP_INTERVAL > Duration::ZERO)";
    25 ibft height "a certificate is believed": "        self.checks(step).certificate(&certificate)?;\n" => "";
    25 ibft height "a final block is not checked": "        self.certified = Some(certificate);\n        self.consider(step, block, false);\n" => "        self.certified = Some(certificate);\n        let valid = Some(true);\n        self.candidates.insert(block.hash(), Candidate { block, valid });\n";
    25 ibft height "who must not vote does": "step.may_vote && step.parameters.me.is_some_and" => "step.parameters.me.is_some_and";
    26 ibft evidence "one message twice is evidence": "same_place && one.payload != other.payload && " => "same_place && ";
    26 ibft evidence "messages of two views are evidence": "one.signer == other.signer && one.payload.view() == other.payload.view()" => "one.signer == other.signer";
    26 ibft height "two votes go unnoticed": "        step.effects.extend(before.map(|before| Effect::Evidence(evidence([before, signed]))));\n" => "        let _ = (before, signed, &step.effects, &evidence);\n";
    26 ibft height "two proposals go unnoticed": "            step.effects.push(Effect::Evidence(Evidence::Proposal([accepted.signed, message.signed])));\n" => "";
};
