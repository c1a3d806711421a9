/// A range of bytes in a blob: `offset` and `length`; `u64::MAX` as length means "to the end".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes, or `u64::MAX` for all that follow.
    pub length: u64,
}

impl ByteRange {
    /// The whole blob.
    pub const ALL: Self = Self { offset: 0, length: u64::MAX };

    /// The part of this range that lies in a blob of `size_bytes`, as (start, end); `None` when it starts behind the end.
    ///
    /// A range that starts exactly at the end is empty and allowed, so that an empty blob can be read.
    pub const fn clamp(self, size_bytes: u64) -> Option<(u64, u64)> {
        if self.offset > size_bytes {
            return None;
        }
        let end = self.offset.saturating_add(self.length);
        Some((self.offset, if end < size_bytes { end } else { size_bytes }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clamps_without_overflow() {
        assert_eq!(ByteRange::ALL.clamp(0), Some((0, 0)));
        assert_eq!(ByteRange::ALL.clamp(7), Some((0, 7)));
        assert_eq!(ByteRange { offset: 3, length: 2 }.clamp(7), Some((3, 5)));
        assert_eq!(ByteRange { offset: 3, length: u64::MAX }.clamp(7), Some((3, 7)));
        assert_eq!(ByteRange { offset: 7, length: 1 }.clamp(7), Some((7, 7)));
        assert_eq!(ByteRange { offset: 8, length: 1 }.clamp(7), None);
    }
}
