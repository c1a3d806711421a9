//! Reads of the index.

use super::*;

impl Partition {
    /// A root.
    pub fn root(&self, hash: &Hash) -> Option<&RootEntry> {
        self.roots.get(hash)
    }

    /// Whether a key has a record on its way.
    pub fn is_pending(&self, key: &Hash) -> bool {
        self.pending.contains_key(key)
    }

    /// Leases of a root.
    pub fn leases(&self, hash: &Hash) -> u32 {
        self.leases.get(hash).copied().unwrap_or(0)
    }

    /// Size of a blob and, of one of at most one chunk, where its bytes are.
    pub fn blob(&self, hash: &Hash) -> Option<(u64, Option<Source>)> {
        if let Some(Pending { whole: Some((bytes, options)), .. }) = self.pending.get(hash)
            && (options.class == DurabilityClass::Memory || self.roots.get(hash).is_some())
        {
            return Some((bytes.len() as u64, Some(Source::Bytes(bytes.clone()))));
        }
        let root = self.roots.get(hash)?;
        let source = match (root.is_whole(), root.size_bytes) {
            (true, 0) => Some(Source::Bytes(Bytes::new())),
            (true, _) => Some(self.chunk(hash)),
            (false, _) => None,
        };
        Some((root.size_bytes, source))
    }

    /// Where the bytes of a chunk are.
    pub fn chunk(&self, name: &Hash) -> Source {
        match self.chunks.get(name) {
            Some(chunk) if !chunk.corrupt => Source::Log(chunk.location),
            Some(_) | None => match self.pending.get(name) {
                Some(Pending { chunk: Some(bytes), .. } | Pending { whole: Some((bytes, _)), .. }) => {
                    Source::Bytes(bytes.clone())
                }
                _ => Source::Corrupt,
            },
        }
    }

    /// The checksum of this chunk's bytes at `location`; `None` when it is not there any more.
    pub fn checksum(&self, name: &Hash, location: Location) -> Option<u32> {
        self.chunks.get(name).filter(|chunk| chunk.location == location).map(|chunk| chunk.checksum)
    }

    /// The bytes at `location` are not this chunk's; unless it has moved, the next PUT replaces them.
    pub fn mark_corrupt(&mut self, name: &Hash, location: Location) {
        if let Some(chunk) = self.chunks.get_mut(name).filter(|chunk| chunk.location == location) {
            chunk.corrupt = true;
        }
    }

    /// What the root of a larger blob lists can't be read, or is not there: the next PUT of the blob writes it anew. References that
    /// the old one has to what is there stay counted until the next start.
    pub fn mark_damaged(&mut self, hash: &Hash) {
        if let Some(root) = self.roots.get_mut(hash).filter(|root| !root.is_whole()) {
            root.damaged = true;
        }
    }

    /// Where a tag points.
    pub fn tag(&self, name: &TagName) -> Option<Hash> {
        self.tags.get(name).map(|tag| tag.target)
    }

    /// A part of 1/1024 of what a scrub looks at: chunks that are not known to be corrupt, in the order of their places, and the maps of
    /// larger blobs with the size of each blob.
    #[expect(clippy::type_complexity, reason = "two lists, used once")]
    pub fn scrub_part(&self, part: usize) -> (Vec<(Hash, Location)>, Vec<(Hash, u64, Location)>) {
        let chunks = self.chunks.part(part).filter(|(_, chunk)| !chunk.corrupt);
        let mut chunks: Vec<_> = chunks.map(|(name, chunk)| (*name, chunk.location)).collect();
        chunks.sort_unstable_by_key(|(_, location)| *location);
        let maps = self.roots.part(part).filter(|(_, root)| !root.is_whole() && !root.damaged);
        (chunks, maps.map(|(hash, root)| (*hash, root.size_bytes, root.location)).collect())
    }

    /// A part of 1/1024 of the roots, in no order: for a walk in steps, between which they may change.
    pub fn roots_part(&self, part: usize) -> Vec<(Hash, RootEntry)> {
        self.roots.part(part).map(|(hash, root)| (*hash, *root)).collect()
    }

    /// Roots behind `after`, in order.
    pub fn roots_page(&self, after: Option<&Hash>, count: usize) -> Vec<(Hash, RootEntry)> {
        self.roots.page(after, count).into_iter().map(|(hash, root)| (hash, *root)).collect()
    }

    /// Tags behind `after`, in order.
    pub fn tags_page(&self, after: Option<&TagName>, count: usize) -> Vec<(TagName, Hash)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.tags
            .range::<TagName, _>((from, Bound::Unbounded))
            .take(count)
            .map(|(name, tag)| (name.clone(), tag.target))
            .collect()
    }

    /// Number of blobs, and bytes of their contents.
    pub fn blobs(&self) -> (u64, u64) {
        (self.roots.len() as u64, self.blob_bytes)
    }

    /// What of a segment still counts here.
    pub fn live(&self, log: u16, segment: u32) -> Live {
        self.live.get(&(log, segment)).copied().unwrap_or_default()
    }

    /// Whether a record in a segment is what counts for its key.
    pub fn counts(&self, head: &RecordHead) -> bool {
        let (key, here) = (&head.key, head.location);
        match head.kind {
            RecordKind::Chunk | RecordKind::Whole | RecordKind::Root => {
                self.chunks.get(key).is_some_and(|chunk| chunk.location == here)
                    || self.roots.get(key).is_some_and(|root| root.location == here)
            }
            RecordKind::Tag => true, // known by name only; the move decides
            RecordKind::Unroot | RecordKind::Untag => self.tombstones.get(key).is_some_and(|t| t.location == here),
        }
    }
}
