//! Contents that look random and are the same in every run.

use bytes::Bytes;

/// SplitMix64 (Steele, Lea, Flood 2014): a seed is all there is to a sequence.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.word() % end
    }

    /// Bytes.
    pub fn bytes(&mut self, size: usize) -> Vec<u8> {
        let words = std::iter::from_fn(|| Some(self.word().to_le_bytes()));
        words.take(size.div_ceil(8)).flatten().take(size).collect()
    }
}

/// `size` bytes that depend on both arguments, so that no two calls give blobs with a common beginning.
pub fn content(seed: u64, size: usize) -> Bytes {
    Random::new(seed ^ ((size as u64) << 32)).bytes(size).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_repeat_and_differ() {
        assert_eq!(content(1, 1000), content(1, 1000));
        assert_ne!(content(1, 1000), content(2, 1000));
        assert_ne!(content(1, 1000)[..9], content(1, 9)[..]);
        assert_eq!(content(7, 13).len(), 13);
        assert!(Random::new(3).below(5) < 5);
    }
}
