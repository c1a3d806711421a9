//! BLAKE3 as a tree: verifiable ranges of a blob.
//!
//! The tree is BLAKE3's own (BLAKE3 paper, section 2.1), cut off at groups of 16 KiB, and a slice of it is encoded as bao with
//! chunk groups of 2⁴ does: in pre-order, 64 bytes for each node that the range touches (the chaining values of its children),
//! and the bytes of each group. Every aligned piece of 2ᵏ groups is a node of the tree, and so is what remains behind the last
//! one; chunks (256 KiB) and extents (64 MiB) are such pieces.
//!
//! What a verified slice proves: the bytes at their offsets. The *size* of the blob is proven only by a slice that contains its
//! last group; until then it is the sender's claim.

use blake3::hazmat::{
    ChainingValue, HasherExt as _, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};
use metanode_types::{
    ByteRange, Hash,
    limits::{BLOB_BYTES_MAX, GROUP_BYTES},
};

/// Size of an encoded node: two chaining values.
pub const PAIR_BYTES: usize = 64;

/// The chaining values of a node's children.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// Of the left child.
    pub left: ChainingValue,
    /// Of the right child.
    pub right: ChainingValue,
}

impl Pair {
    /// As in the encoding.
    pub fn to_bytes(self) -> [u8; PAIR_BYTES] {
        let mut bytes = [0; PAIR_BYTES];
        bytes[..32].copy_from_slice(&self.left);
        bytes[32..].copy_from_slice(&self.right);
        bytes
    }

    /// From the encoding.
    pub fn from_bytes(bytes: &[u8; PAIR_BYTES]) -> Self {
        let (left, right) = bytes.split_first_chunk::<32>().expect("64 bytes hold two values");
        Self { left: *left, right: right.try_into().expect("64 bytes hold two values") }
    }

    /// The chaining value of this node, when it is not the root.
    pub fn chaining_value(&self) -> ChainingValue {
        merge_subtrees_non_root(&self.left, &self.right, Mode::Hash)
    }

    /// The hash of the blob, when this node is its root.
    pub fn root(&self) -> Hash {
        Hash(*merge_subtrees_root(&self.left, &self.right, Mode::Hash).as_bytes())
    }
}

/// The chaining value of one group that starts at byte `offset` of a larger blob.
pub fn group_value(offset: u64, group: &[u8]) -> ChainingValue {
    debug_assert!(offset.is_multiple_of(GROUP_BYTES as u64) && group.len() <= GROUP_BYTES);
    blake3::Hasher::new().set_input_offset(offset).update(group).finalize_non_root()
}

/// Builds a tree from left to right: takes the chaining values of equal pieces (groups, or extents), emits each node's
/// [`Pair`] as soon as it is complete, which is post-order.
#[derive(Debug, Default)]
pub struct TreeBuilder {
    count: u64,
    open: Vec<ChainingValue>,
    last: Option<Pair>,
}

impl TreeBuilder {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next piece.
    pub fn push(&mut self, value: ChainingValue, emit: &mut impl FnMut(Pair)) {
        self.open.push(value);
        self.count += 1;
        for _ in 0..self.count.trailing_zeros() {
            self.merge(emit);
        }
    }

    /// Closes the tree. Returns its chaining value, and its top node, which there is when it has two pieces or more; the hash
    /// of a blob is that node's [`Pair::root`]. `None` for an empty tree.
    pub fn finish(mut self, emit: &mut impl FnMut(Pair)) -> Option<(ChainingValue, Option<Pair>)> {
        while self.open.len() > 1 {
            self.merge(emit);
        }
        Some((self.open.pop()?, self.last))
    }

    fn merge(&mut self, emit: &mut impl FnMut(Pair)) {
        let right = self.open.pop().expect("a merge takes two open nodes");
        let left = self.open.pop().expect("a merge takes two open nodes");
        let pair = Pair { left, right };
        self.open.push(pair.chaining_value());
        self.last = Some(pair);
        emit(pair);
    }
}

/// A node of the tree by the bytes it covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

impl Span {
    /// The children; `None` for a group.
    pub fn split(self) -> Option<(Self, Self)> {
        if self.length <= GROUP_BYTES as u64 {
            return None;
        }
        let left = left_subtree_len(self.length);
        let right = Self { start: self.start + left, length: self.length - left };
        Some((Self { start: self.start, length: left }, right))
    }

    fn touches(self, start: u64, end: u64) -> bool {
        self.start < end && start < self.start + self.length
    }
}

/// Number of pieces of `piece` bytes that `length` bytes make; at least one.
pub const fn pieces(length: u64, piece: u64) -> u64 {
    if length == 0 { 1 } else { length.div_ceil(piece) }
}

/// The next item of a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// 64 bytes follow: the [`Pair`] of this node.
    Node {
        /// What it covers.
        span: Span,
        /// Whether its children follow, left and right.
        descend: (bool, bool),
    },
    /// The bytes of this group follow.
    Group(Span),
}

/// The items of the slice of a range, in pre-order.
#[derive(Debug, Clone)]
pub struct SliceWalk {
    start: u64,
    end: u64,
    stack: Vec<Span>,
}

impl SliceWalk {
    /// All items that cover bytes `start..end` of a blob of `size_bytes`.
    pub fn new(size_bytes: u64, start: u64, end: u64) -> Self {
        let whole = Span { start: 0, length: size_bytes };
        let stack = if start < end && whole.touches(start, end) { vec![whole] } else { Vec::new() };
        Self { start, end, stack }
    }

    /// The next item, without taking it.
    pub fn peek(&self) -> Option<Step> {
        let span = *self.stack.last()?;
        Some(match span.split() {
            None => Step::Group(span),
            Some((left, right)) => {
                Step::Node { span, descend: (left.touches(self.start, self.end), right.touches(self.start, self.end)) }
            }
        })
    }
}

impl Iterator for SliceWalk {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let step = self.peek()?;
        let span = self.stack.pop().expect("peek saw it");
        if let (Step::Node { descend, .. }, Some((left, right))) = (step, span.split()) {
            if descend.1 {
                self.stack.push(right);
            }
            if descend.0 {
                self.stack.push(left);
            }
        }
        Some(step)
    }
}

/// Bytes of the encoded slice of `start..end`: what a receiver will get.
pub fn slice_bytes(size_bytes: u64, start: u64, end: u64) -> u64 {
    if start >= end {
        return 0;
    }
    let group = GROUP_BYTES as u64;
    let covered = (end.div_ceil(group) * group).min(size_bytes) - start / group * group;
    covered + PAIR_BYTES as u64 * nodes(Span { start: 0, length: size_bytes }, start, end)
}

fn nodes(span: Span, start: u64, end: u64) -> u64 {
    match span.split() {
        Some(_) if start <= span.start && span.start + span.length <= end => {
            pieces(span.length, GROUP_BYTES as u64) - 1
        }
        Some((left, right)) if span.touches(start, end) => 1 + nodes(left, start, end) + nodes(right, start, end),
        _ => 0,
    }
}

/// The sender's bytes are not a slice of the blob that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SliceError {
    /// A node or group does not have the hash it must have.
    #[error("the bytes at offset {offset} do not match the blob's hash")]
    HashMismatch {
        /// Of the node or group in the blob.
        offset: u64,
    },
    /// The range starts behind the end that the sender claims.
    #[error("the range starts behind the end of the blob ({size_bytes} bytes)")]
    BadRange {
        /// As claimed.
        size_bytes: u64,
    },
    /// The sender claims more bytes than any blob has.
    #[error("no blob has {size_bytes} bytes")]
    TooLarge {
        /// As claimed.
        size_bytes: u64,
    },
    /// An item of another length than [`SliceDecoder::expects`] said; the caller's mistake.
    #[error("an item of a wrong length")]
    Length,
}

/// A verified group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// Where in the blob the wanted part starts.
    pub offset: u64,
    /// Bytes of the item in front of the wanted part.
    pub skip: usize,
    /// Bytes of the wanted part.
    pub take: usize,
}

/// Verifies the encoded slice of a range, item by item. Feed it items of exactly [`expects`](Self::expects) bytes until that
/// is 0.
#[derive(Debug)]
pub struct SliceDecoder {
    walk: SliceWalk,
    size_bytes: u64,
    /// What the spans on the walk's stack must hash to; the root's is of another kind.
    expected: Vec<[u8; 32]>,
}

impl SliceDecoder {
    /// For `range` of the blob `root`, which the sender says has `size_bytes`.
    pub fn new(root: Hash, size_bytes: u64, range: ByteRange) -> Result<Self, SliceError> {
        // The tree of a blob near 2⁶⁴ bytes can't be computed; a sender who also chose the hash could go on from there.
        if size_bytes > BLOB_BYTES_MAX {
            return Err(SliceError::TooLarge { size_bytes });
        }
        let (start, end) = range.clamp(size_bytes).ok_or(SliceError::BadRange { size_bytes })?;
        if size_bytes == 0 && blake3::hash(b"") != root.0 {
            return Err(SliceError::HashMismatch { offset: 0 });
        }
        Ok(Self { walk: SliceWalk::new(size_bytes, start, end), size_bytes, expected: vec![root.0] })
    }

    /// Bytes of the next item; 0 at the end.
    pub fn expects(&self) -> usize {
        match self.walk.peek() {
            Some(Step::Node { .. }) => PAIR_BYTES,
            Some(Step::Group(span)) => span.length as usize,
            None => 0,
        }
    }

    /// Checks the next item; for a group says which part of it was asked for.
    pub fn push(&mut self, item: &[u8]) -> Result<Option<Leaf>, SliceError> {
        if item.is_empty() || item.len() != self.expects() {
            return Err(SliceError::Length);
        }
        let step = self.walk.next().ok_or(SliceError::Length)?;
        let expected = self.expected.pop().expect("one value for each span on the walk's stack");
        match step {
            Step::Node { span, descend } => {
                let pair = Pair::from_bytes(item.try_into().map_err(|_| SliceError::Length)?);
                let actual = if self.is_root(span) { pair.root().0 } else { pair.chaining_value() };
                if actual != expected {
                    return Err(SliceError::HashMismatch { offset: span.start });
                }
                if descend.1 {
                    self.expected.push(pair.right);
                }
                if descend.0 {
                    self.expected.push(pair.left);
                }
                Ok(None)
            }
            Step::Group(span) => {
                let actual =
                    if self.is_root(span) { *blake3::hash(item).as_bytes() } else { group_value(span.start, item) };
                if actual != expected {
                    return Err(SliceError::HashMismatch { offset: span.start });
                }
                let from = self.walk.start.max(span.start);
                let to = self.walk.end.min(span.start + span.length);
                Ok(Some(Leaf { offset: from, skip: (from - span.start) as usize, take: (to - from) as usize }))
            }
        }
    }

    fn is_root(&self, span: Span) -> bool {
        span.length == self.size_bytes
    }
}

/// The tree over equal pieces of a part of a blob, all nodes in post-order: over the groups of a chunk or an extent, or over the
/// extents of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outboard {
    /// First byte of the part in the blob.
    pub start: u64,
    /// Bytes of the part.
    pub length: u64,
    /// Bytes of a piece: a power of two, at least a group.
    pub piece: u64,
    /// Its nodes, post-order.
    pub pairs: Vec<Pair>,
}

impl Outboard {
    /// Computes the tree over the groups of `data`, which starts at byte `start` of its blob. Never for a part of one group that
    /// is a whole blob: that one has a root, no chaining value.
    pub fn of(start: u64, data: &[u8]) -> Self {
        let mut builder = TreeBuilder::new();
        let mut pairs = Vec::new();
        push_groups(&mut builder, start, data, &mut |pair| pairs.push(pair));
        builder.finish(&mut |pair| pairs.push(pair));
        Self { start, length: data.len() as u64, piece: GROUP_BYTES as u64, pairs }
    }

    /// The node that covers `span`, which must be a node of this part above its pieces.
    pub fn pair(&self, span: Span) -> Option<Pair> {
        let mut node = Span { start: self.start, length: self.length };
        let mut first = 0;
        while node.length > self.piece {
            let (left, right) = node.split()?;
            let left_nodes = pieces(left.length, self.piece) - 1;
            let right_nodes = pieces(right.length, self.piece) - 1;
            if node == span {
                return self.pairs.get((first + left_nodes + right_nodes) as usize).copied();
            } else if span.start < right.start {
                node = left;
            } else {
                node = right;
                first += left_nodes;
            }
        }
        None
    }
}

/// Adds the groups of `data`, which starts at byte `start` of its blob.
pub fn push_groups(builder: &mut TreeBuilder, start: u64, data: &[u8], emit: &mut impl FnMut(Pair)) {
    let mut at = start;
    for group in data.chunks(GROUP_BYTES) {
        builder.push(group_value(at, group), emit);
        at += group.len() as u64;
    }
}

#[cfg(test)]
mod tests {
    use bao_tree::{BaoTree, BlockSize, ChunkRanges, io::outboard::PostOrderMemOutboard};
    use proptest::prelude::*;

    use super::*;

    fn data(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    fn encode(data: &[u8], start: u64, end: u64) -> Vec<u8> {
        let outboard = Outboard::of(0, data);
        let mut out = Vec::new();
        for step in SliceWalk::new(data.len() as u64, start, end) {
            match step {
                Step::Node { span, .. } => out.extend(outboard.pair(span).unwrap().to_bytes()),
                Step::Group(span) => {
                    out.extend_from_slice(&data[span.start as usize..(span.start + span.length) as usize]);
                }
            }
        }
        out
    }

    fn decode(root: Hash, size: u64, range: ByteRange, mut bytes: &[u8]) -> Result<Vec<u8>, SliceError> {
        let mut decoder = SliceDecoder::new(root, size, range)?;
        let mut out = Vec::new();
        while decoder.expects() > 0 {
            let (item, rest) = bytes.split_at_checked(decoder.expects()).ok_or(SliceError::Length)?;
            if let Some(leaf) = decoder.push(item)? {
                assert_eq!(leaf.offset, range.offset + out.len() as u64);
                out.extend_from_slice(&item[leaf.skip..leaf.skip + leaf.take]);
            }
            bytes = rest;
        }
        assert!(bytes.is_empty(), "the whole slice is used");
        Ok(out)
    }

    const SIZES: &[usize] =
        &[1, 1024, 16_383, 16_384, 16_385, 32_768, 40_000, 262_143, 262_144, 262_145, 600_000, 1_048_576, 1_100_001];

    #[test]
    fn outboard_and_slices_are_baos() {
        let group = BlockSize::from_chunk_log(4);
        for &size in SIZES {
            let data = data(size);
            let theirs = PostOrderMemOutboard::create(&data, group);
            let ours = Outboard::of(0, &data);
            let bytes: Vec<u8> = ours.pairs.iter().flat_map(|p| p.to_bytes()).collect();
            assert_eq!(bytes, theirs.data, "{size}");
            if let Some(top) = ours.pairs.last() {
                assert_eq!(top.root().0, *theirs.root.as_bytes(), "{size}");
            }
            let mut encoded = Vec::new();
            let tree = BaoTree::new(size as u64, group);
            bao_tree::io::sync::encode_ranges_validated(&data, &theirs, &ChunkRanges::all(), &mut encoded).unwrap();
            assert_eq!(encode(&data, 0, size as u64), encoded, "{size} {tree:?}");
            assert_eq!(slice_bytes(size as u64, 0, size as u64), encoded.len() as u64);
        }
    }

    #[test]
    fn an_empty_blob_is_verified_too() {
        let empty = Hash(*blake3::hash(b"").as_bytes());
        assert_eq!(SliceDecoder::new(empty, 0, ByteRange::ALL).unwrap().expects(), 0);
        assert!(SliceDecoder::new(Hash([0; 32]), 0, ByteRange::ALL).is_err());
        assert!(matches!(
            SliceDecoder::new(empty, 0, ByteRange { offset: 1, length: 1 }),
            Err(SliceError::BadRange { .. })
        ));
    }

    #[test]
    fn a_size_that_no_blob_has_is_refused_before_its_tree_is_walked() {
        for size_bytes in [BLOB_BYTES_MAX + 1, u64::MAX] {
            let refused = SliceDecoder::new(Hash([0; 32]), size_bytes, ByteRange::ALL).map(drop);
            assert_eq!(refused, Err(SliceError::TooLarge { size_bytes }));
        }
        let decoder = SliceDecoder::new(Hash([0; 32]), BLOB_BYTES_MAX, ByteRange::ALL).unwrap();
        assert_eq!(decoder.expects(), PAIR_BYTES);
    }

    #[test]
    fn an_empty_range_has_no_items() {
        let data = data(100_000);
        let root = Hash(*blake3::hash(&data).as_bytes());
        for offset in [0, 1, 50_000, 100_000] {
            assert_eq!(encode(&data, offset, offset), b"");
            assert_eq!(decode(root, 100_000, ByteRange { offset, length: 0 }, b""), Ok(Vec::new()));
        }
    }

    #[test]
    fn a_piece_in_the_middle_has_the_values_of_the_whole_tree() {
        let data = data(1_100_001);
        let whole = Outboard::of(0, &data);
        let piece = Outboard::of(262_144, &data[262_144..524_288]);
        for step in SliceWalk::new(data.len() as u64, 262_144, 524_288) {
            if let Step::Node { span, .. } = step
                && span.start >= 262_144
                && span.length <= 262_144
            {
                assert_eq!(piece.pair(span), whole.pair(span));
            }
        }
    }

    proptest! {
        #[test]
        fn any_range_round_trips_and_any_flipped_bit_is_caught(
            size in 1usize..700_000, offset in 0u64..700_000, length in 0u64..300_000, flip in any::<prop::sample::Index>(),
        ) {
            let data = data(size);
            let root = Hash(*blake3::hash(&data).as_bytes());
            let range = ByteRange { offset: offset % size as u64, length };
            let (start, end) = range.clamp(size as u64).unwrap();
            let mut encoded = encode(&data, start, end);
            prop_assert_eq!(slice_bytes(size as u64, start, end), encoded.len() as u64);
            let decoded = decode(root, size as u64, range, &encoded).unwrap();
            prop_assert_eq!(&decoded[..], &data[start as usize..end as usize]);
            if !encoded.is_empty() {
                let at = flip.index(encoded.len());
                encoded[at] ^= 1;
                prop_assert!(decode(root, size as u64, range, &encoded).is_err());
            }
        }

        #[test]
        fn a_lie_about_the_size_is_caught_when_the_end_is_fetched(size in 2usize..300_000, delta in 1u64..70_000) {
            let data = data(size);
            let root = Hash(*blake3::hash(&data).as_bytes());
            let shorter = size as u64 - delta.min(size as u64 - 1);
            let encoded = encode(&data[..shorter as usize], 0, shorter);
            prop_assert!(decode(root, shorter, ByteRange::ALL, &encoded).is_err());
        }
    }
}
