//! What must hold of every decoder for every input.
//!
//! A target takes any bytes and panics when a decoder breaks its word: not only by a panic of its own, but by taking what it must
//! refuse, by reading two things from one input, or by writing what it does not read. `cargo xtask fuzz` looks for such inputs with
//! libFuzzer (the programs are in `tests/fuzz`); the test beside this crate gives each target every input that is kept in
//! `tests/fuzz/corpus`, so that what was once found stays found. `metanode-decoders TARGET FILE…` repeats an input without a
//! nightly compiler.
//!
//! Where plain bytes would never get past a checksum, a target builds a sound file from its input, damages it as the input says,
//! and can make the checksums right again ([`segments`], [`checkpoints`], [`tickets`]). An input that begins so is a *script*:
//! numbers are taken from its front, and are zero behind its end.

mod archives;
mod checkpoints;
mod config;
mod consensus;
mod frames;
mod manifests;
mod maps;
mod meta;
mod names;
mod planted;
mod script;
pub mod seeds;
mod segments;
mod slices;
mod tickets;

pub use archives::archives;
pub use checkpoints::checkpoints;
pub use config::config;
pub use consensus::consensus;
pub use frames::frames;
pub use manifests::manifests;
pub use maps::maps;
pub use meta::meta;
pub use names::names;
pub use planted::planted;
pub use segments::segments;
pub use slices::slices;
pub use tickets::tickets;

/// A target's name, which is that of its program and its folder of inputs, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// Every target of a decoder; [`planted`] is none.
pub const TARGETS: &[Target] = &[
    ("frames", frames),
    ("archives", archives),
    ("tickets", tickets),
    ("names", names),
    ("manifests", manifests),
    ("config", config),
    ("meta", meta),
    ("segments", segments),
    ("checkpoints", checkpoints),
    ("maps", maps),
    ("slices", slices),
    ("consensus", consensus),
];
