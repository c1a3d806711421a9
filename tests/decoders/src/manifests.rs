//! Folder manifests: one encoding for each folder, and what is written can be read.

use metanode_types::{Hash, limits::MANIFEST_ENTRIES_MAX};
use metanode_wire::{
    Entry, EntryKind, Manifest, ManifestError,
    manifest::{MANIFEST_HEADER_BYTES, check_path, child_count},
};

use crate::script::Script;

/// `what u8 | a manifest's bytes, or its parts as they are, or entries and then damage to their encoding`
pub fn manifests(data: &[u8]) {
    let mut script = Script::new(data);
    match script.u8() % 4 {
        0 | 2 => return check(script.rest()),
        1 => {}
        _ => return check(&assembled(&mut script)),
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

/// The right header before any children and any entries.
///
/// `child count u8 | children: hash u8 | entries: kind u8 | mode u16 | path | child u8, size u64, or target`
fn assembled(script: &mut Script<'_>) -> Vec<u8> {
    let children: Vec<u8> = (0..script.u8() % 16).flat_map(|_| [script.u8(); 32]).collect();
    let mut entries = Vec::new();
    let mut count = 0u32;
    while !script.is_empty() {
        let (kind, mode, path) = (script.u8() % 4, script.u16(), script.text());
        entries.push(kind);
        entries.extend(mode.to_le_bytes());
        entries.extend((path.len() as u16).to_le_bytes());
        entries.extend(path.as_bytes());
        match kind {
            0 => {
                entries.extend(u32::from(script.u8()).to_le_bytes());
                entries.extend(script.array::<8>());
            }
            1 => {}
            _ => {
                let target = script.text();
                entries.extend((target.len() as u16).to_le_bytes());
                entries.extend(target.as_bytes());
            }
        }
        count += 1;
    }
    let counts = [(children.len() / 32) as u32, count].map(u32::to_le_bytes).concat();
    [&b"MNFOLD\0\x01"[..], &counts, &children, &entries].concat()
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
