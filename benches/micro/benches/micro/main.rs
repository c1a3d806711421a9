//! All micro benchmarks, in one binary: they share their dependencies' link time.

mod archive;
mod framing;
mod hashing;
mod index;
mod signing;
mod ticket;

use criterion::Criterion;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    framing::benches(&mut criterion);
    archive::benches(&mut criterion);
    hashing::benches(&mut criterion);
    index::benches(&mut criterion);
    signing::benches(&mut criterion);
    ticket::benches(&mut criterion);
    criterion.final_summary();
}

/// Bytes that no compressor and no branch predictor has an easy time with (xorshift64).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}
