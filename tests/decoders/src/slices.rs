//! Slices: a decoder takes the items of the blob and no others, whatever size the sender claims.

use metanode_blob::tree::{Outboard, Pair, SliceDecoder, SliceError, SliceWalk, Span, Step, group_value, slice_bytes};
use metanode_types::{ByteRange, Hash, limits::GROUP_BYTES};

use crate::script::{Random, Script};

/// Blobs that are made have less than this: five groups, so three levels of nodes.
const BLOB_BYTES_MAX: u32 = 5 * GROUP_BYTES as u32;

/// Items that are fed to a decoder.
const ITEMS_MAX: usize = 256;

/// Bytes of a range in a blob of which only the size is known, so that a slice has few groups.
const RANGE_BYTES_MAX: u64 = 3 * GROUP_BYTES as u64;

/// `what u8 | size u64 | range: offset u64, length u64 | items, or damage to a slice, or content`
pub fn slices(data: &[u8]) {
    let mut script = Script::new(data);
    let what = script.u8();
    let size_bytes = script.u64();
    let range = ByteRange { offset: script.u64(), length: script.u64() };
    match what % 3 {
        0 => any_items(&mut script, size_bytes, range),
        1 => damaged(&mut script, (size_bytes % u64::from(BLOB_BYTES_MAX)) as usize, range),
        _ => consistent(&mut script, size_bytes, ByteRange { length: range.length % RANGE_BYTES_MAX, ..range }),
    }
}

/// Any items: one of another length is refused, one that has the hash that is asked for is taken, whatever follows it.
fn any_items(script: &mut Script<'_>, size_bytes: u64, range: ByteRange) {
    for _ in 0..ITEMS_MAX {
        let Ok(mut decoder) = SliceDecoder::new(Hash([0; 32]), size_bytes, range) else { return };
        let length = decoder.expects();
        assert!(length <= GROUP_BYTES);
        assert_eq!(decoder.push(&vec![0; length + 1]), Err(SliceError::Length));
        if length == 0 || script.is_empty() {
            return;
        }
        let mut item = script.bytes(length).to_vec();
        item.resize(length, 0);
        let root = match item.as_array() {
            Some(pair) if size_bytes > GROUP_BYTES as u64 => Pair::from_bytes(pair).root(),
            _ => Hash(*blake3::hash(&item).as_bytes()),
        };
        let mut decoder = SliceDecoder::new(root, size_bytes, range).expect("as before");
        assert!(decoder.push(&item).is_ok(), "it has the hash that was asked for");
        let _ = decoder.push(&vec![1; decoder.expects()]);
    }
}

/// The slice of a blob, with changes: what is taken is as it was before them.
fn damaged(script: &mut Script<'_>, size: usize, range: ByteRange) {
    let blob = Random::new(size as u64).bytes(size);
    let root = Hash(*blake3::hash(&blob).as_bytes());
    let range = ByteRange { offset: range.offset % (size as u64 + 2), ..range };
    let Some((start, end)) = range.clamp(size as u64) else {
        let refused = SliceDecoder::new(root, size as u64, range).map(drop);
        return assert_eq!(refused, Err(SliceError::BadRange { size_bytes: size as u64 }));
    };
    let outboard = Outboard::of(0, &blob);
    let items: Vec<Vec<u8>> = SliceWalk::new(size as u64, start, end)
        .map(|step| match step {
            Step::Node { span, .. } => outboard.pair(span).expect("the tree has every node").to_bytes().to_vec(),
            Step::Group(span) => blob[span.start as usize..(span.start + span.length) as usize].to_vec(),
        })
        .collect();
    let bytes: usize = items.iter().map(Vec::len).sum();
    assert_eq!(bytes as u64, slice_bytes(size as u64, start, end));
    let (which, at, change) = (usize::from(script.u8()), usize::from(script.u16()), script.u8());
    let mut decoder = SliceDecoder::new(root, size as u64, range).expect("the range is in the blob");
    let mut wanted = start;
    for (index, item) in items.iter().enumerate() {
        let mut sent = item.clone();
        assert_eq!(decoder.expects(), sent.len());
        if index == which {
            sent[at % item.len()] ^= change;
        }
        match decoder.push(&sent) {
            Ok(leaf) => {
                assert_eq!(&sent, item, "a changed item was taken");
                if let Some(leaf) = leaf {
                    assert_eq!(leaf.offset, wanted);
                    let (from, to) = (wanted as usize, wanted as usize + leaf.take);
                    assert_eq!(sent[leaf.skip..leaf.skip + leaf.take], blob[from..to]);
                    wanted += leaf.take as u64;
                }
            }
            Err(error) => {
                assert!(matches!(error, SliceError::HashMismatch { .. }) && &sent != item, "{error}");
                return;
            }
        }
    }
    assert_eq!((decoder.expects(), wanted), (0, end));
}

/// A slice that fits together, of a blob that need not exist: its sender chose hash and size.
fn consistent(script: &mut Script<'_>, size_bytes: u64, range: ByteRange) {
    let Ok(decoder) = SliceDecoder::new(Hash([0; 32]), size_bytes, range) else { return };
    if decoder.expects() == 0 {
        return;
    }
    let (start, end) = range.clamp(size_bytes).expect("the decoder took it");
    let whole = Span { start: 0, length: size_bytes };
    let fill = script.u8();
    let mut items = Vec::new();
    let root = subtree(whole, start..end, fill, true, &mut items);
    let mut decoder = SliceDecoder::new(Hash(root), size_bytes, range).expect("as before");
    let mut wanted = start;
    for item in items {
        let leaf = decoder.push(&item).expect("it fits the hash above it");
        if let Some(leaf) = leaf {
            assert_eq!(leaf.offset, wanted);
            assert!(leaf.skip + leaf.take <= item.len());
            wanted += leaf.take as u64;
        }
    }
    assert_eq!((decoder.expects(), wanted), (0, end));
}

/// Appends the items of a node in pre-order; returns its hash.
fn subtree(span: Span, wanted: std::ops::Range<u64>, fill: u8, root: bool, items: &mut Vec<Vec<u8>>) -> [u8; 32] {
    if span.start >= wanted.end || span.start + span.length <= wanted.start {
        return [fill; 32];
    }
    let Some((left, right)) = span.split() else {
        let group = vec![fill; span.length as usize];
        let value = if root { *blake3::hash(&group).as_bytes() } else { group_value(span.start, &group) };
        items.push(group);
        return value;
    };
    let place = items.len();
    items.push(Vec::new());
    let left = subtree(left, wanted.clone(), fill, false, items);
    let right = subtree(right, wanted, fill, false, items);
    let pair = Pair { left, right };
    items[place] = pair.to_bytes().to_vec();
    if root { pair.root().0 } else { pair.chaining_value() }
}
