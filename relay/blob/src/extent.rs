//! The map of a blob of more than one chunk: what its chunks are, and its tree.
//!
//! A blob is cut into extents of 64 MiB, an extent into chunks of 256 KiB. Each extent has a *page*, stored like a chunk under
//! the BLAKE3 of its bytes; the blob's root record lists the pages. So a map of any size is read and built one page at a time.
//!
//! ```text
//! page:  chunk count u32 | node count u32 | chunk names (32 each) | nodes of the tree over its groups, post-order (64 each)
//! root:  for each extent: name of its page (32) | chaining value of its bytes (32)
//! ```

use blake3::hazmat::ChainingValue;
use bytes::Bytes;
use metanode_types::{
    Hash,
    limits::{CHUNK_BYTES, EXTENT_BYTES, EXTENTS_MAX, GROUP_BYTES},
};

use crate::tree::{Outboard, PAIR_BYTES, Pair, TreeBuilder, pieces, push_groups};

/// The map of one extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentPage {
    /// Names of its chunks: BLAKE3 of their bytes.
    pub chunks: Vec<Hash>,
    /// The tree over its groups.
    pub outboard: Outboard,
}

/// One line of a root record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentEntry {
    /// BLAKE3 of the page's bytes.
    pub page: Hash,
    /// Chaining value of the extent in the blob's tree.
    pub value: ChainingValue,
}

/// The bytes are not a page, or not a root record, of a blob of this size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the map of a blob is malformed")]
pub struct MalformedMap;

impl ExtentPage {
    /// Number of extent `index` of a blob of `size_bytes`: first byte, and bytes.
    pub fn place(index: usize, size_bytes: u64) -> (u64, u64) {
        let start = index as u64 * EXTENT_BYTES;
        (start, EXTENT_BYTES.min(size_bytes.saturating_sub(start)))
    }

    /// The bytes of the page.
    pub fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(8 + 32 * self.chunks.len() + PAIR_BYTES * self.outboard.pairs.len());
        out.extend((self.chunks.len() as u32).to_le_bytes());
        out.extend((self.outboard.pairs.len() as u32).to_le_bytes());
        out.extend(self.chunks.iter().flat_map(|chunk| chunk.0));
        out.extend(self.outboard.pairs.iter().flat_map(|pair| pair.to_bytes()));
        out.into()
    }

    /// Reads the page of extent `index` of a blob of `size_bytes`.
    pub fn decode(bytes: &[u8], index: usize, size_bytes: u64) -> Result<Self, MalformedMap> {
        let (start, length) = Self::place(index, size_bytes);
        let chunks = pieces(length, CHUNK_BYTES as u64) as usize;
        let nodes = pieces(length, GROUP_BYTES as u64) as usize - 1;
        let (counts, rest) = bytes.split_first_chunk::<8>().ok_or(MalformedMap)?;
        let wanted = u64::from(chunks as u32) | u64::from(nodes as u32) << 32;
        if u64::from_le_bytes(*counts) != wanted || rest.len() != 32 * chunks + PAIR_BYTES * nodes {
            return Err(MalformedMap);
        }
        let (names, pairs) = rest.split_at(32 * chunks);
        let chunks = names.as_chunks::<32>().0.iter().map(|name| Hash(*name)).collect();
        let pairs = pairs.as_chunks::<PAIR_BYTES>().0.iter().map(Pair::from_bytes).collect();
        Ok(Self { chunks, outboard: Outboard { start, length, piece: GROUP_BYTES as u64, pairs } })
    }

    /// The names in a page of which only the bytes are known; for taking and dropping references.
    pub fn chunk_names(bytes: &[u8]) -> Result<Vec<Hash>, MalformedMap> {
        let (count, rest) = bytes.split_first_chunk::<4>().ok_or(MalformedMap)?;
        let names =
            rest.get(4..).and_then(|r| r.get(..32 * u32::from_le_bytes(*count) as usize)).ok_or(MalformedMap)?;
        Ok(names.as_chunks::<32>().0.iter().map(|name| Hash(*name)).collect())
    }
}

/// Reads the payload of the root record of a blob of `size_bytes` bytes.
pub fn decode_root(payload: &[u8], size_bytes: u64) -> Result<Vec<ExtentEntry>, MalformedMap> {
    let (entries, rest) = payload.as_chunks::<64>();
    if !rest.is_empty() || entries.len() as u64 != pieces(size_bytes, EXTENT_BYTES) {
        return Err(MalformedMap);
    }
    let entry = |bytes: &[u8; 64]| {
        let Pair { left: page, right: value } = Pair::from_bytes(bytes);
        ExtentEntry { page: Hash(page), value }
    };
    Ok(entries.iter().map(entry).collect())
}

/// The tree above the extents of a blob.
pub fn upper_tree(extents: &[ExtentEntry], size_bytes: u64) -> Outboard {
    let mut builder = TreeBuilder::new();
    let mut pairs = Vec::new();
    for extent in extents {
        builder.push(extent.value, &mut |pair| pairs.push(pair));
    }
    builder.finish(&mut |pair| pairs.push(pair));
    Outboard { start: 0, length: size_bytes, piece: EXTENT_BYTES, pairs }
}

/// The blob grew over [`EXTENTS_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the blob is larger than a map can hold")]
pub struct BlobTooLarge;

/// A blob whose chunks were all seen.
#[derive(Debug, Clone)]
pub struct FinishedMap {
    /// Address of the blob.
    pub hash: Hash,
    /// Bytes of the blob.
    pub size_bytes: u64,
    /// The last page, to be stored like the others.
    pub page: Option<Bytes>,
    /// Payload of the root record.
    pub root: Bytes,
}

/// Builds the map of a blob of two chunks or more, from its chunks in order. Holds one extent's page and 64 bytes for each
/// extent before.
#[derive(Debug, Default)]
pub struct MapBuilder {
    size_bytes: u64,
    chunks: Vec<Hash>,
    pairs: Vec<Pair>,
    groups: TreeBuilder,
    extents: Vec<ExtentEntry>,
}

impl MapBuilder {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes so far.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Adds the next chunk: [`CHUNK_BYTES`], or less if it is the last. Returns its name, and a page when one is complete.
    pub fn push(&mut self, chunk: &[u8]) -> Result<(Hash, Option<Bytes>), BlobTooLarge> {
        debug_assert!(!chunk.is_empty() && chunk.len() <= CHUNK_BYTES);
        let page =
            if self.size_bytes.is_multiple_of(EXTENT_BYTES) { self.close_extent().map(|(page, _)| page) } else { None };
        if self.extents.len() >= EXTENTS_MAX {
            return Err(BlobTooLarge);
        }
        let name = Hash(*blake3::hash(chunk).as_bytes());
        self.chunks.push(name);
        push_groups(&mut self.groups, self.size_bytes, chunk, &mut |pair| self.pairs.push(pair));
        self.size_bytes += chunk.len() as u64;
        Ok((name, page))
    }

    /// Closes the blob.
    pub fn finish(mut self) -> Option<FinishedMap> {
        let size_bytes = self.size_bytes;
        let (page, top) = self.close_extent()?;
        let hash =
            if self.extents.len() == 1 { top? } else { *upper_tree(&self.extents, size_bytes).pairs.last()? }.root();
        let root: Vec<u8> =
            self.extents.iter().flat_map(|e| Pair { left: e.page.0, right: e.value }.to_bytes()).collect();
        Some(FinishedMap { hash, size_bytes, page: Some(page), root: root.into() })
    }

    fn close_extent(&mut self) -> Option<(Bytes, Option<Pair>)> {
        let groups = std::mem::take(&mut self.groups);
        let (value, top) = groups.finish(&mut |pair| self.pairs.push(pair))?;
        let (start, length) = ExtentPage::place(self.extents.len(), self.size_bytes);
        let pairs = std::mem::take(&mut self.pairs);
        let outboard = Outboard { start, length, piece: GROUP_BYTES as u64, pairs };
        let page = ExtentPage { chunks: std::mem::take(&mut self.chunks), outboard }.encode();
        self.extents.push(ExtentEntry { page: Hash(*blake3::hash(&page).as_bytes()), value });
        Some((page, top))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{SliceWalk, Step};

    fn data(length: usize) -> Vec<u8> {
        (0..length).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
    }

    #[test]
    fn maps_have_the_blobs_hash_and_hold_every_node() {
        let extent = EXTENT_BYTES as usize;
        for size in [CHUNK_BYTES + 1, 3 * CHUNK_BYTES, extent, extent + 1, 2 * extent, 2 * extent + 700_000] {
            let data = data(size);
            let mut builder = MapBuilder::new();
            let mut pages = Vec::new();
            for chunk in data.chunks(CHUNK_BYTES) {
                pages.extend(builder.push(chunk).unwrap().1);
            }
            let map = builder.finish().unwrap();
            pages.extend(map.page);
            assert_eq!(map.hash.0, *blake3::hash(&data).as_bytes(), "{size}");
            let extents = decode_root(&map.root, size as u64).unwrap();
            let upper = upper_tree(&extents, size as u64);
            let whole = Outboard::of(0, &data);
            let pages: Vec<_> =
                pages.iter().enumerate().map(|(i, p)| ExtentPage::decode(p, i, size as u64).unwrap()).collect();
            assert_eq!(pages.len(), extents.len());
            for step in SliceWalk::new(size as u64, 0, size as u64) {
                if let Step::Node { span, .. } = step {
                    let pair = if span.length > EXTENT_BYTES {
                        upper.pair(span)
                    } else {
                        pages[(span.start / EXTENT_BYTES) as usize].outboard.pair(span)
                    };
                    assert_eq!(pair, whole.pair(span), "{size} {span:?}");
                }
            }
        }
    }

    #[test]
    fn malformed_maps_are_refused() {
        let mut builder = MapBuilder::new();
        builder.push(&data(CHUNK_BYTES)).unwrap();
        builder.push(b"x").unwrap();
        let map = builder.finish().unwrap();
        let page = map.page.unwrap();
        assert!(ExtentPage::decode(&page, 0, map.size_bytes).is_ok());
        assert_eq!(ExtentPage::decode(&page, 0, map.size_bytes + CHUNK_BYTES as u64), Err(MalformedMap));
        assert_eq!(ExtentPage::decode(&page[..page.len() - 1], 0, map.size_bytes), Err(MalformedMap));
        assert_eq!(ExtentPage::decode(&[], 0, map.size_bytes), Err(MalformedMap));
        assert_eq!(ExtentPage::chunk_names(&page).unwrap().len(), 2);
        assert_eq!(ExtentPage::chunk_names(&[255; 40]), Err(MalformedMap));
        assert_eq!(decode_root(&map.root[..63], map.size_bytes), Err(MalformedMap));
        assert_eq!(decode_root(&map.root, EXTENT_BYTES + 1), Err(MalformedMap));
    }
}
