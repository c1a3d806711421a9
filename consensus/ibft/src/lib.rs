//! IBFT consensus as a core: an input and the time go in, effects come out. No clock, no randomness, no I/O.
//!
//! The protocol is IBFT 2.0 (Saltini & Hyland-Wood, arXiv 1909.10194) with the justification of round changes that its successor QBFT
//! has (Moniz, *The Istanbul BFT Consensus Algorithm*, arXiv 2002.03613, and the QBFT formal specification): the proposer sends a
//! prepare like everyone. "Clause" is a numbered rule of the checklist below, which tests cite by number.
//!
//! # Rules
//!
//! * f = ⌊(n−1)/3⌋ may be Byzantine; q = ⌈2n/3⌉ *distinct* validators decide, each signature checked, one's own messages included (1–4).
//! * Round 0's proposer is the next in key order behind the author of the block before; each round passes the turn on (19).
//! * A validator **prepares** a proposal that the rules justify, once the application has found its block valid and holds all it names,
//!   on disk (8, 9, 14). q prepares of one round are a **lock**: the validator **commits**, and names the lock in every round change
//!   from then on, until the height is over (10–12). q commits of *any* one round decide (13).
//! * When a round lasts too long, a validator asks for the next one and keeps asking. The clock of a later round starts only when q
//!   want it, or with its justified proposal (16). f + 1 who are ahead are followed (17).
//! * A later round's proposal carries q round changes, and proposes the block with the highest lock among them, with q prepares as
//!   its proof; without any lock, a new block (9, 11).
//! * What a validator says is on disk before it leaves; a restart says the same again, and nothing that contradicts it (21, 22).
//! * What is kept of others is bounded for each of them (23). Who is behind gets final blocks with certificates (24, 25). Two signed
//!   messages that exclude each other are evidence (26).
//!
//! Safety needs of the shell: effects in their order, records durable before what follows them. Liveness needs: timers, messages said
//! again when a connection comes back ([`Input::Connected`]).
//!
//! # Start reading
//!
//! `machine.rs` ([`Core::step`]), then `height.rs`, which has the protocol, and `justify.rs`, which has what proves what.

mod evidence;
mod future;
mod height;
mod justify;
mod machine;
mod message;
mod tally;
mod validators;

pub use machine::{Core, Draft, Effect, HELP_INTERVAL, Input, NewHeight, Now, Parameters, Record, Timer};

pub use evidence::Evidence;
pub use future::{HEIGHTS_AHEAD, SHARE_BYTES_MAX, SHARE_MESSAGES_MAX};
pub use height::{NoQuorum, Prepared, Timing};
pub use justify::Refusal;
pub use message::{
    Block, Certificate, ChainId, Commit, Height, Justification, Message, Payload, Prepare, Proposal, ProposalMessage,
    Round, RoundChange, RoundChangeMessage, Signature, Signed, Verifier, View,
};
pub use validators::{BadValidatorSet, VALIDATORS_MAX, ValidatorSet};
