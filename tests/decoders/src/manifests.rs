//! Folder manifests: one encoding for each folder, and what is written can be read.

use metanode_types::{Hash, limits::MANIFEST_ENTRIES_MAX};
use metanode_wire::{
    Entry, EntryKind, Manifest, ManifestError,
    manifest::{MANIFEST_HEADER_BYTES, check_path, child_count},
};

use crate::script::Script;

/// `what u8 | a manifest's bytes, or entries and then damage to their encoding`
pub fn manifests(data: &[u8]) {
    let mut script = Script::new(data);
    if script.u8().is_multiple_of(2) {
        return check(script.rest());
    }
    let mut manifest = made(&mut script);
    let Ok(mut bytes) = manifest.encode() else { return };
    manifest.entries.iter_mut().for_each(|entry| entry.mode &= 0o777);
    assert_eq!(Manifest::decode(&bytes), Ok(manifest), "what is written can be read");
    script.damage(&mut bytes);
    check(&bytes);
}

fn check(bytes: &[u8]) {
    // What a node looks at, in pieces and whole.
    let children = metanode_store::decoders::children([bytes]);
    assert_eq!(metanode_store::decoders::children(bytes.chunks(7)), children);
    let header = bytes.get(..MANIFEST_HEADER_BYTES).ok_or(ManifestError::Length).and_then(child_count);
    assert!(header.is_ok() || children.is_none());
    let Ok(mut manifest) = Manifest::decode(bytes) else { return };
    assert!(manifest.entries.len() <= MANIFEST_ENTRIES_MAX);
    let mut names: Vec<Hash> = manifest.files().map(|(hash, _)| hash).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(children, Some(names), "a node takes references to the files, and to nothing else");
    for entry in &manifest.entries {
        assert_eq!(check_path(&entry.path), Ok(()));
        let leaves = |part: &str| part.is_empty() || part == "." || part == ".." || part.contains('\0');
        assert!(!entry.path.split('/').any(leaves), "no path leaves the folder");
        assert_eq!(manifest.find(&entry.path), Some(entry));
    }
    assert_eq!(manifest.encode().as_deref(), Ok(bytes), "there is no other encoding of it");
}

/// `count u8 | entries: kind u8 | mode u16 | folder that it lies in u8 | name | hash u8, size u64, or target`
fn made(script: &mut Script<'_>) -> Manifest {
    let count = script.u8() % 16;
    let mut entries: Vec<Entry> = Vec::new();
    for _ in 0..count {
        let (kind, mode, parent) = (script.u8(), script.u16(), usize::from(script.u8()));
        let name = script.text();
        let path = match entries.get(parent) {
            Some(parent) => format!("{}/{name}", parent.path),
            None => name,
        };
        let kind = match kind % 3 {
            0 => EntryKind::File { hash: Hash([script.u8(); 32]), size_bytes: script.u64() },
            1 => EntryKind::Folder,
            _ => EntryKind::Link { target: script.text() },
        };
        entries.push(Entry { path, mode, kind });
    }
    Manifest { entries }
}
