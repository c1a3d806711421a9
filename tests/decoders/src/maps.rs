//! Maps of large blobs: pages and root records are what their blob's size makes them, and their trees have every node.

use metanode_blob::{
    extent::{ExtentPage, decode_root, upper_tree},
    tree::{SliceWalk, Step, pieces},
};
use metanode_types::limits::{CHUNK_BYTES, EXTENT_BYTES, GROUP_BYTES};

use crate::script::Script;

/// `what u8 | size u64 | extent u16 | bytes of a page or of a root record`
pub fn maps(data: &[u8]) {
    let mut script = Script::new(data);
    let what = script.u8();
    let size_bytes = script.u64();
    let index = usize::from(script.u16());
    let bytes = script.rest();
    if what.is_multiple_of(2) { page(bytes, index, size_bytes) } else { root(bytes, size_bytes) }
}

fn page(bytes: &[u8], index: usize, size_bytes: u64) {
    let names = ExtentPage::chunk_names(bytes);
    let Ok(page) = ExtentPage::decode(bytes, index, size_bytes) else { return };
    assert_eq!(page.encode(), bytes);
    assert_eq!(names.as_ref(), Ok(&page.chunks), "what references are taken from names the same chunks");
    let (start, length) = ExtentPage::place(index, size_bytes);
    assert!(length <= EXTENT_BYTES && start.saturating_add(length) <= size_bytes.max(start));
    assert_eq!(page.chunks.len() as u64, pieces(length, CHUNK_BYTES as u64));
    let mut nodes = 0;
    for step in SliceWalk::new(length, 0, length) {
        if let Step::Node { mut span, .. } = step {
            span.start += start;
            assert!(page.outboard.pair(span).is_some(), "{span:?}");
            nodes += 1;
        }
    }
    assert_eq!(nodes, page.outboard.pairs.len());
    assert_eq!(nodes as u64, pieces(length, GROUP_BYTES as u64) - 1);
}

fn root(bytes: &[u8], size_bytes: u64) {
    let Ok(extents) = decode_root(bytes, size_bytes) else { return };
    assert_eq!(extents.len() as u64, pieces(size_bytes, EXTENT_BYTES));
    let again: Vec<u8> = extents.iter().flat_map(|extent| [extent.page.0, extent.value]).flatten().collect();
    assert_eq!(again, bytes);
    let tree = upper_tree(&extents, size_bytes);
    assert_eq!(tree.pairs.len(), extents.len() - 1);
    let mut nodes = 0;
    for step in SliceWalk::new(size_bytes, 0, size_bytes).take(1 << 12) {
        match step {
            Step::Node { span, .. } if span.length > EXTENT_BYTES => {
                assert!(tree.pair(span).is_some(), "{span:?}");
                nodes += 1;
            }
            _ => {}
        }
    }
    assert!(nodes <= tree.pairs.len());
}
