//! A validator as a core: the protocol, the chain and what waits, together. What happens goes in through methods; what is to be done comes
//! out of [`Replica::poll`]. No clock, no I/O; signatures are made and batches checked by the shell.
//!
//! # A transaction's way
//!
//! 1. A client's transaction, checked by the shell, [waits](Replica::submit). As soon as no batch of this validator is being written, what
//!    waits is made into one ([`Effect::MakeBatch`]): the busier the disk, the larger the batches.
//! 2. The shell signs it, puts it on disk, sends it to all validators and gives it [back](Replica::batch_here). They check it, put it on
//!    disk, and take it in the same way. None of this waits for a block.
//! 3. Whose turn it is proposes a block of what it has. A validator that lacks a batch [fetches](Effect::FetchBatch) it, from the
//!    proposer first. It prepares when all are there and the chain's rules hold: the header's results are those that it has itself.
//! 4. A final block is [stored](Effect::Store), then [executed](Effect::Execute), in order, beside the protocol, which is at most the chain's
//!    lag ahead.
//!
//! A height begins when there is something to order, or when results of transactions wait for the header that carries them; otherwise an
//! empty block is made only as often as the genesis says.

mod replica;

pub use replica::{BatchRefusal, Config, Effect, Replica, SubmitRefusal};
