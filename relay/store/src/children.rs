//! The addresses that a folder's manifest lists, from the front of its bytes.

use metanode_types::Hash;
use metanode_wire::manifest::{MANIFEST_HEADER_BYTES, child_count};

use crate::StoreError;

/// Collects them from the bytes of a manifest as they come.
#[derive(Debug, Default)]
pub(crate) struct ChildNames {
    bytes: Vec<u8>,
    needed: Option<usize>,
}

impl ChildNames {
    /// Takes the next bytes; `true` when all names are there and the rest does not matter.
    pub(crate) fn push(&mut self, mut bytes: &[u8]) -> Result<bool, StoreError> {
        loop {
            let needed = self.needed.unwrap_or(MANIFEST_HEADER_BYTES);
            let take = needed.saturating_sub(self.bytes.len()).min(bytes.len());
            self.bytes.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.bytes.len() < needed {
                return Ok(false);
            }
            if self.needed.is_some() {
                return Ok(true);
            }
            let count = child_count(&self.bytes).map_err(|error| StoreError::Malformed(error.to_string()))?;
            self.needed = Some(MANIFEST_HEADER_BYTES + 32 * count);
        }
    }

    /// The names.
    pub(crate) fn finish(self) -> Result<Vec<Hash>, StoreError> {
        if self.needed != Some(self.bytes.len()) {
            return Err(StoreError::Malformed("the folder manifest is cut short".into()));
        }
        let names = self.bytes[MANIFEST_HEADER_BYTES..].as_chunks::<32>().0;
        Ok(names.iter().map(|name| Hash(*name)).collect())
    }
}

/// All names in a manifest that is here whole.
pub(crate) fn children(manifest: &[u8]) -> Result<Vec<Hash>, StoreError> {
    let mut names = ChildNames::default();
    names.push(manifest)?;
    names.finish()
}

#[cfg(test)]
mod tests {
    use metanode_wire::{Entry, EntryKind, Manifest};

    use super::*;

    #[test]
    fn names_are_found_in_any_pieces() {
        let file = |path: &str, byte| Entry {
            path: path.into(),
            mode: 0o644,
            kind: EntryKind::File { hash: Hash([byte; 32]), size_bytes: 1 },
        };
        let bytes = Manifest { entries: vec![file("a", 2), file("b", 1)] }.encode().unwrap();
        for piece in [1, 7, 16, 40, 1000] {
            let mut names = ChildNames::default();
            for part in bytes.chunks(piece) {
                if names.push(part).unwrap() {
                    break;
                }
            }
            assert_eq!(names.finish().unwrap(), [Hash([1; 32]), Hash([2; 32])]);
        }
        assert!(children(&bytes[..50]).is_err());
        assert!(children(b"not a manifest at all").is_err());
    }
}
