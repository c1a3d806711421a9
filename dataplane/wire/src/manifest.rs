//! Folder manifests: a canonical encoding, so that equal folders have equal addresses.
//!
//! ```text
//! "MNFOLD\0\x01"                                  8 bytes
//! child count u32 | entry count u32               8 bytes
//! child hashes, sorted, distinct                 32 bytes each
//! entries, sorted by path bytes, distinct:
//!   kind u8 (0 file, 1 folder, 2 symbolic link) | mode u16 | path length u16 | path
//!   file: child index u32 | size u64        link: target length u16 | target
//! ```
//!
//! Numbers are little-endian. Hashes come first so that a node can take references to all children without understanding the
//! rest. A path is relative UTF-8 with `/` between components, none of which is empty, `.` or `..`; only one encoding of a
//! folder is accepted. Whoever writes a folder to disk applies further rules of its file system.

use metanode_types::{
    Hash,
    limits::{MANIFEST_DEPTH_MAX, MANIFEST_ENTRIES_MAX, MANIFEST_PATH_BYTES_MAX},
};

use crate::cursor::{Cursor, Short};

const MAGIC: &[u8; 8] = b"MNFOLD\0\x01";

/// Bytes before the child hashes.
pub const MANIFEST_HEADER_BYTES: usize = 16;

/// Permission bits that are kept; set-user-ID and the like are not.
const MODE_MASK: u16 = 0o777;

/// A folder: every file, folder and link below it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Manifest {
    /// In the order of their paths.
    pub entries: Vec<Entry>,
}

/// One file, folder or link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative, `/` between components.
    pub path: String,
    /// Permission bits (0o777).
    pub mode: u16,
    /// What it is.
    pub kind: EntryKind,
}

/// What an [`Entry`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File {
        /// Address of its contents.
        hash: Hash,
        /// Bytes.
        size_bytes: u64,
    },
    /// A folder.
    Folder,
    /// A symbolic link, never followed.
    Link {
        /// As stored in the link.
        target: String,
    },
}

/// Why bytes are not a manifest, or entries can't become one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Other leading bytes.
    #[error("not a folder manifest")]
    Magic,
    /// Ends too early, or has bytes left over.
    #[error("the folder manifest is cut short or has bytes left over")]
    Length,
    /// Over a limit of `metanode_types::limits`.
    #[error("the folder exceeds a limit: {0}")]
    Limit(&'static str),
    /// Hashes or entries not sorted, repeated, or a child that no file uses.
    #[error("the folder manifest is not in canonical order")]
    Order,
    /// A path that could leave the folder or can't be one.
    #[error("the folder manifest has a forbidden path: {0:?}")]
    Path(String),
    /// An unknown kind, mode or child index.
    #[error("the folder manifest has a malformed entry")]
    Entry,
    /// A file lies below something that is not a folder.
    #[error("the folder manifest puts {0:?} below something that is not a folder")]
    Parent(String),
}

impl From<Short> for ManifestError {
    fn from(Short: Short) -> Self {
        Self::Length
    }
}

/// The number of child hashes that follow the first [`MANIFEST_HEADER_BYTES`] bytes of a manifest.
pub fn child_count(header: &[u8]) -> Result<usize, ManifestError> {
    let mut cursor = Cursor::new(header);
    if cursor.take(MAGIC.len())? != MAGIC {
        return Err(ManifestError::Magic);
    }
    let children = cursor.u32()? as usize;
    let entries = cursor.u32()? as usize;
    if entries > MANIFEST_ENTRIES_MAX || children > entries {
        return Err(ManifestError::Limit("number of entries"));
    }
    Ok(children)
}

impl Manifest {
    /// The canonical bytes. Sorts the entries; refuses what [`Manifest::decode`] would refuse.
    pub fn encode(&mut self) -> Result<Vec<u8>, ManifestError> {
        if self.entries.len() > MANIFEST_ENTRIES_MAX {
            return Err(ManifestError::Limit("number of entries"));
        }
        self.entries.sort_by(|a, b| a.path.cmp(&b.path));
        let mut children: Vec<Hash> = self.files().map(|(hash, _)| hash).collect();
        children.sort_unstable();
        children.dedup();
        let mut out = MAGIC.to_vec();
        out.extend((children.len() as u32).to_le_bytes());
        out.extend((self.entries.len() as u32).to_le_bytes());
        for child in &children {
            out.extend(child.0);
        }
        for entry in &self.entries {
            check_path(&entry.path)?;
            let kind = match entry.kind {
                EntryKind::File { .. } => 0,
                EntryKind::Folder => 1,
                EntryKind::Link { .. } => 2,
            };
            out.push(kind);
            out.extend((entry.mode & MODE_MASK).to_le_bytes());
            push_text(&mut out, &entry.path)?;
            match &entry.kind {
                EntryKind::File { hash, size_bytes } => {
                    let index = children.binary_search(hash).expect("children were collected from these files");
                    out.extend((index as u32).to_le_bytes());
                    out.extend(size_bytes.to_le_bytes());
                }
                EntryKind::Folder => {}
                EntryKind::Link { target } if target.contains('\0') => return Err(ManifestError::Path(target.clone())),
                EntryKind::Link { target } => push_text(&mut out, target)?,
            }
        }
        check_tree(&self.entries)?;
        Ok(out)
    }

    /// Reads canonical bytes; the whole of them, and no other encoding of the same folder.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let children = child_count(bytes.get(..MANIFEST_HEADER_BYTES).ok_or(ManifestError::Length)?)?;
        let mut cursor = Cursor::new(&bytes[MAGIC.len() + 4..]);
        let count = cursor.u32()? as usize;
        let (hashes, _) = cursor.take(children * 32)?.as_chunks::<32>();
        if !hashes.is_sorted_by(|a, b| a < b) {
            return Err(ManifestError::Order);
        }
        let mut used = vec![false; children];
        let mut entries: Vec<Entry> = Vec::new();
        for _ in 0..count {
            let kind = cursor.u8()?;
            let mode = cursor.u16()?;
            let path = text(&mut cursor)?;
            check_path(&path)?;
            if mode & !MODE_MASK != 0 {
                return Err(ManifestError::Entry);
            }
            let kind = match kind {
                0 => {
                    let index = cursor.u32()? as usize;
                    *used.get_mut(index).ok_or(ManifestError::Entry)? = true;
                    EntryKind::File { hash: Hash(hashes[index]), size_bytes: cursor.u64()? }
                }
                1 => EntryKind::Folder,
                2 => EntryKind::Link { target: text(&mut cursor)? },
                _ => return Err(ManifestError::Entry),
            };
            entries.push(Entry { path, mode, kind });
        }
        if !cursor.is_empty() {
            return Err(ManifestError::Length);
        }
        if used.contains(&false) {
            return Err(ManifestError::Order);
        }
        check_tree(&entries)?;
        Ok(Self { entries })
    }

    /// Address and size of every file.
    pub fn files(&self) -> impl Iterator<Item = (Hash, u64)> {
        self.entries.iter().filter_map(|entry| match entry.kind {
            EntryKind::File { hash, size_bytes } => Some((hash, size_bytes)),
            EntryKind::Folder | EntryKind::Link { .. } => None,
        })
    }

    /// The entry with this path.
    pub fn find(&self, path: &str) -> Option<&Entry> {
        self.entries.binary_search_by(|entry| entry.path.as_str().cmp(path)).ok().map(|at| &self.entries[at])
    }
}

fn push_text(out: &mut Vec<u8>, text: &str) -> Result<(), ManifestError> {
    if text.len() > MANIFEST_PATH_BYTES_MAX {
        return Err(ManifestError::Limit("length of a path"));
    }
    out.extend((text.len() as u16).to_le_bytes());
    out.extend(text.as_bytes());
    Ok(())
}

fn text(cursor: &mut Cursor<'_>) -> Result<String, ManifestError> {
    let length = usize::from(cursor.u16()?);
    if length > MANIFEST_PATH_BYTES_MAX {
        return Err(ManifestError::Limit("length of a path"));
    }
    let bytes = cursor.take(length)?;
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(ManifestError::Path(String::from_utf8_lossy(bytes).into_owned())),
    }
}

/// Relative, inside the folder, and representable.
pub fn check_path(path: &str) -> Result<(), ManifestError> {
    if path.len() > MANIFEST_PATH_BYTES_MAX {
        return Err(ManifestError::Limit("length of a path"));
    }
    if path.split('/').count() > MANIFEST_DEPTH_MAX {
        return Err(ManifestError::Limit("depth of a path"));
    }
    let forbidden = |part: &str| part.is_empty() || part == "." || part == ".." || part.len() > 255;
    if path.contains('\0') || path.split('/').any(forbidden) {
        return Err(ManifestError::Path(path.to_owned()));
    }
    Ok(())
}

/// Sorted and distinct; what has a parent in the list has a folder as parent; a parent that is not in the list is refused too,
/// so that modes are never guessed.
fn check_tree(entries: &[Entry]) -> Result<(), ManifestError> {
    if !entries.is_sorted_by(|a, b| a.path < b.path) {
        return Err(ManifestError::Order);
    }
    let folders: std::collections::HashSet<&str> =
        entries.iter().filter(|e| e.kind == EntryKind::Folder).map(|e| e.path.as_str()).collect();
    for entry in entries {
        if let Some((parent, _)) = entry.path.rsplit_once('/')
            && !folders.contains(parent)
        {
            return Err(ManifestError::Parent(entry.path.clone()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(path: &str, byte: u8) -> Entry {
        Entry { path: path.into(), mode: 0o644, kind: EntryKind::File { hash: Hash([byte; 32]), size_bytes: 5 } }
    }

    fn folder(path: &str) -> Entry {
        Entry { path: path.into(), mode: 0o755, kind: EntryKind::Folder }
    }

    #[test]
    fn golden_bytes() {
        let link = Entry { path: "a/l".into(), mode: 0o777, kind: EntryKind::Link { target: "f".into() } };
        let mut manifest = Manifest { entries: vec![file("a/f", 9), folder("a"), link] };
        let bytes = manifest.encode().unwrap();
        let mut golden = b"MNFOLD\0\x01\x01\0\0\0\x03\0\0\0".to_vec();
        golden.extend([9; 32]);
        golden.extend(b"\x01\xed\x01\x01\0a");
        golden.extend(b"\x00\xa4\x01\x03\0a/f\0\0\0\0\x05\0\0\0\0\0\0\0");
        golden.extend(b"\x02\xff\x01\x03\0a/l\x01\0f");
        assert_eq!(bytes, golden);
        assert_eq!(Manifest::decode(&bytes), Ok(manifest.clone()));
        assert_eq!(manifest.find("a/f"), Some(&file("a/f", 9)));
    }

    #[test]
    fn an_empty_folder_is_fine() {
        let bytes = Manifest::default().encode().unwrap();
        assert_eq!(Manifest::decode(&bytes), Ok(Manifest::default()));
    }

    #[test]
    fn a_million_entries_are_taken_and_one_more_is_refused() {
        let mut manifest =
            Manifest { entries: (0..MANIFEST_ENTRIES_MAX).map(|i| file(&format!("{i:07}"), 1)).collect() };
        let mut bytes = manifest.encode().unwrap();
        assert!(bytes.len() as u64 <= metanode_types::limits::MANIFEST_BYTES_MAX);
        assert_eq!(Manifest::decode(&bytes).unwrap().entries.len(), MANIFEST_ENTRIES_MAX);
        manifest.entries.push(file("x", 1));
        assert_eq!(manifest.encode(), Err(ManifestError::Limit("number of entries")));
        // A count that the bytes don't have costs nothing.
        bytes[12..16].copy_from_slice(&(MANIFEST_ENTRIES_MAX as u32 + 1).to_le_bytes());
        assert_eq!(Manifest::decode(&bytes), Err(ManifestError::Limit("number of entries")));
        bytes.truncate(MANIFEST_HEADER_BYTES);
        bytes[8..12].copy_from_slice(&(MANIFEST_ENTRIES_MAX as u32).to_le_bytes());
        bytes[12..16].copy_from_slice(&(MANIFEST_ENTRIES_MAX as u32).to_le_bytes());
        assert_eq!(Manifest::decode(&bytes), Err(ManifestError::Length));
    }

    #[test]
    fn hostile_paths_and_trees_are_refused() {
        for path in ["", "/a", "a/", "a//b", "..", "../a", "a/../b", ".", "a/.", "a\0b"] {
            let mut manifest = Manifest { entries: vec![folder("a"), file(path, 1)] };
            assert!(manifest.encode().is_err(), "{path:?}");
        }
        let link = Entry { path: "l".into(), mode: 0o777, kind: EntryKind::Link { target: "a\0b".into() } };
        assert_eq!(Manifest { entries: vec![link] }.encode(), Err(ManifestError::Path("a\0b".into())));
        let deep = vec!["d"; MANIFEST_DEPTH_MAX + 1].join("/");
        assert_eq!(check_path(&deep), Err(ManifestError::Limit("depth of a path")));
        let below_file = Manifest { entries: vec![file("a", 1), file("a/b", 1)] }.encode();
        assert_eq!(below_file, Err(ManifestError::Parent("a/b".into())));
        assert_eq!(Manifest { entries: vec![file("a", 1), file("a", 2)] }.encode(), Err(ManifestError::Order));
    }

    proptest! {
        #[test]
        fn no_input_panics_and_what_decodes_is_canonical(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let count = bytes.len().min(MAGIC.len());
            bytes[..count].copy_from_slice(&MAGIC[..count]);
            if let Ok(mut manifest) = Manifest::decode(&bytes) {
                prop_assert_eq!(manifest.encode().unwrap(), bytes);
            }
        }

        #[test]
        fn flipping_a_byte_never_panics(at in 0usize..400, bit in 0u8..8) {
            let mut manifest = Manifest { entries: vec![folder("a"), file("a/f", 9), file("b", 8), folder("c")] };
            let mut bytes = manifest.encode().unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            if let Ok(mut other) = Manifest::decode(&bytes) {
                prop_assert_eq!(other.encode().unwrap(), bytes);
            }
        }
    }
}
