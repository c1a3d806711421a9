//! Reproducible noise: contents, orders and arrival times from a seed.

use bytes::{Bytes, BytesMut};

/// xoshiro256++ (Blackman and Vigna, <https://prng.di.unimi.it/>), seeded by SplitMix64: quick enough that a gibibyte of noise
/// takes a moment, and the same everywhere. Nothing here is a secret.
#[derive(Debug, Clone)]
pub(crate) struct Random([u64; 4]);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        let mut state = seed;
        Self(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            mix(state)
        }))
    }

    pub(crate) fn next(&mut self) -> u64 {
        let state = &mut self.0;
        let result = state[0].wrapping_add(state[3]).rotate_left(23).wrapping_add(state[0]);
        let shifted = state[1] << 17;
        state[2] ^= state[0];
        state[3] ^= state[1];
        state[1] ^= state[2];
        state[0] ^= state[3];
        state[2] ^= shifted;
        state[3] = state[3].rotate_left(45);
        result
    }

    /// A number below `bound`, which is not 0. Biased by less than `bound` / 2^64.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// An index below `length`, which is not 0.
    pub(crate) fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }

    /// From a uniform distribution over (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// From an exponential distribution with mean 1: the gaps of a Poisson process.
    pub(crate) fn exponential(&mut self) -> f64 {
        -self.unit().ln()
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        let (words, rest) = bytes.as_chunks_mut::<8>();
        for word in words {
            *word = self.next().to_le_bytes();
        }
        rest.copy_from_slice(&self.next().to_le_bytes()[..rest.len()]);
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Bytes {
        let mut bytes = BytesMut::zeroed(length);
        self.fill(&mut bytes);
        bytes.freeze()
    }
}

/// The finalizer of SplitMix64.
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A seed for one of the things that depend on `seed`.
pub(crate) fn derived_seed(seed: u64, what: u64) -> u64 {
    mix(mix(seed).wrapping_add(what))
}

/// The numbers 0 to `count` - 1 in random order.
pub(crate) fn shuffled(count: u32, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    let mut order: Vec<u32> = (0..count).collect();
    for last in (1..order.len()).rev() {
        order.swap(last, random.index(last + 1));
    }
    order
}

/// A seed that the operating system draws.
pub(crate) fn fresh_seed() -> anyhow::Result<u64> {
    getrandom::u64().map_err(|error| anyhow::anyhow!("no random numbers: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_the_published_one() {
        // First outputs of the reference implementation for the state {1, 2, 3, 4}.
        let mut random = Random([1, 2, 3, 4]);
        assert_eq!([(); 3].map(|()| random.next()), [41_943_041, 58_720_359, 3_588_806_011_781_223]);
    }

    #[test]
    fn seeds_repeat_and_differ() {
        assert_eq!(Random::new(7).bytes(1_003), Random::new(7).bytes(1_003));
        assert_ne!(Random::new(7).bytes(64), Random::new(8).bytes(64));
        assert_ne!(derived_seed(1, 2), derived_seed(2, 1));
    }

    #[test]
    fn an_order_has_every_number_once() {
        let mut order = shuffled(1_000, 3);
        assert!(!order.is_sorted());
        order.sort_unstable();
        assert_eq!(order, (0..1_000).collect::<Vec<_>>());
    }

    #[test]
    fn gaps_have_the_mean_that_is_asked_for() {
        let mut random = Random::new(1);
        let mean = (0..100_000).map(|_| random.exponential()).sum::<f64>() / 100_000.0;
        assert!((mean - 1.0).abs() < 0.02, "{mean}");
        assert!((0..1_000).all(|_| random.below(3) < 3));
    }
}
