//! Folders: a manifest of names, modes and links, and one blob for each file.
//!
//! [`put_folder`] walks a folder without following links, stores its files many at a time and then the manifest, which from then
//! on keeps them alive. [`get_folder`] builds the folder beside its final name and renames it when all of it is there.
//!
//! A link is recreated only when its target provably stays inside the folder: relative, with any `..` in front, and no more of
//! them than the link is deep. (`a/../..` is refused: `a` may be a link itself.) Every part of such a target is a real folder
//! or again such a link, so no chain of them leads out. Others are refused by name unless [`Links::All`].

mod fetch;
mod store;
mod walk;

use std::path::Path;

use bytes::Bytes;
use metanode_types::{ByteRange, DurabilityClass, Hash, limits::MANIFEST_BYTES_MAX};
use metanode_wire::{Entry, EntryKind, Manifest, Refusal, RefusalCode};

use crate::{Client, ClientError, Got, Progress, VecSink, files::FileIo};
pub use fetch::get_folder;
pub use store::put_folder;

/// Small files on the way at once.
const SMALL_FILES_MAX: usize = 64;

/// Bytes of small files on the way at once; the last one may go over it. Enough for 1 Gbit/s over 64 ms.
const SMALL_BYTES_MAX: u64 = 8 << 20;

/// Large files on the way at once: each has a stream, a thread and a few MiB of buffers.
const LARGE_FILES_MAX: usize = 4;

/// What [`put_folder`] stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FolderStored {
    /// Address of the manifest: of the folder.
    pub hash: Hash,
    /// Bytes of the manifest.
    pub manifest_bytes: u64,
    /// Whether the node had this very folder already.
    pub existed: bool,
    /// What it has.
    pub contents: Contents,
    /// Sockets, pipes and devices, which were left out.
    pub skipped: u64,
}

/// What a folder has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Contents {
    /// Regular files.
    pub files: u64,
    /// Folders below it.
    pub folders: u64,
    /// Symbolic links.
    pub links: u64,
    /// Bytes of all files.
    pub bytes: u64,
}

impl Contents {
    /// Of a manifest.
    pub fn of(manifest: &Manifest) -> Self {
        let mut contents = Self::default();
        for entry in &manifest.entries {
            match entry.kind {
                EntryKind::File { size_bytes, .. } => {
                    contents.files += 1;
                    contents.bytes = contents.bytes.saturating_add(size_bytes);
                }
                EntryKind::Folder => contents.folders += 1,
                EntryKind::Link { .. } => contents.links += 1,
            }
        }
        contents
    }
}

/// Which links to recreate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Links {
    /// Those that stay inside the folder; others are an error.
    #[default]
    Inside,
    /// All of them, wherever they lead.
    All,
}

/// How to store a folder.
#[derive(Debug, Clone, Copy)]
pub struct FolderPut {
    /// When the node answers.
    pub class: DurabilityClass,
    /// Whether the folder stays by itself.
    pub hold: bool,
    /// How its files are read.
    pub file_io: FileIo,
}

/// How to fetch a folder.
#[derive(Debug, Clone, Copy)]
pub struct FolderGet {
    /// Whether a folder that is there already is replaced.
    pub replace: bool,
    /// Which links to recreate.
    pub links: Links,
    /// How its files are written.
    pub file_io: FileIo,
}

/// Fetches and reads the manifest of a folder.
pub async fn get_manifest(client: &Client, hash: Hash) -> Result<Manifest, ClientError> {
    let bytes = match client.get_whole(hash).await? {
        Got::Whole(bytes) => bytes,
        Got::Large { size_bytes } if size_bytes > MANIFEST_BYTES_MAX => {
            return Err(metanode_wire::ManifestError::Limit("bytes of the manifest").into());
        }
        Got::Large { .. } => {
            let mut sink = VecSink { bytes: Vec::new(), bytes_max: MANIFEST_BYTES_MAX };
            client.get_range(hash, ByteRange::ALL, &mut sink).await?;
            Bytes::from(sink.bytes)
        }
    };
    Ok(Manifest::decode(&bytes)?)
}

/// The entry of a folder at `path`; a typed refusal when there is none.
pub fn entry_at<'a>(manifest: &'a Manifest, path: &str) -> Result<&'a Entry, ClientError> {
    let path = path.trim_matches('/');
    let missing = || Refusal::new(RefusalCode::NotFound, format!("the folder has no {path:?}"));
    Ok(manifest.find(path).ok_or_else(missing)?)
}

/// The folder at `path` inside a folder, as a manifest of its own.
pub fn subfolder(manifest: &Manifest, path: &str) -> Manifest {
    let prefix = format!("{}/", path.trim_matches('/'));
    let below = manifest.entries.iter().filter_map(|entry| {
        let path = entry.path.strip_prefix(&prefix)?.to_owned();
        Some(Entry { path, ..entry.clone() })
    });
    Manifest { entries: below.collect() }
}

/// Whether the link at `path` provably leads to something inside the folder; see the module.
fn stays_inside(path: &str, target: &str) -> bool {
    let mut depth = path.matches('/').count(); // folders above the link, below the root
    let mut has_descended = false;
    for part in target.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part != ".." {
            has_descended = true;
        } else if has_descended || depth == 0 {
            return false;
        } else {
            depth -= 1;
        }
    }
    !target.is_empty() && !target.starts_with('/')
}

/// Checks the links before anything is fetched, so that a refusal costs nothing.
fn check_links(manifest: &Manifest, links: Links, target: &Path) -> Result<(), ClientError> {
    let leads_out = |entry: &&Entry| match &entry.kind {
        EntryKind::Link { target } => !stays_inside(&entry.path, target),
        EntryKind::File { .. } | EntryKind::Folder => false,
    };
    match manifest.entries.iter().find(leads_out) {
        Some(entry) if links == Links::Inside => Err(ClientError::Unsuitable {
            path: target.join(&entry.path),
            reason: "this link may lead out of the folder (unsafe links are recreated only when asked for)",
        }),
        _ => Ok(()),
    }
}

/// The end of a task that nobody cancels while somebody waits for it: what remains is a panic, which goes on here.
fn joined<T>(joined: Result<T, tokio::task::JoinError>) -> T {
    joined.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}

fn expect(progress: &Progress, contents: &Contents) {
    progress.expect(contents.files, contents.bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_inside_are_told_from_links_that_may_lead_out() {
        for (path, target) in
            [("l", "f"), ("l", "./f"), ("l", "a/b"), ("a/l", "../f"), ("a/b/l", "../../f"), ("a/l", ".."), ("l", ".")]
        {
            assert!(stays_inside(path, target), "{path} -> {target}");
        }
        for (path, target) in [
            ("l", ".."),
            ("l", "../f"),
            ("l", "/etc/passwd"),
            ("l", ""),
            ("a/l", "../../f"),
            ("a/l", "b/../../../f"),
            ("l", "a/../f"), // a may be a link: /x/a/.. is not /x
            ("a/l", "./../../f"),
        ] {
            assert!(!stays_inside(path, target), "{path} -> {target}");
        }
    }

    #[test]
    fn a_subfolder_is_a_folder() {
        let folder = |path: &str| Entry { path: path.into(), mode: 0o755, kind: EntryKind::Folder };
        let mut manifest = Manifest { entries: vec![folder("a"), folder("a/b"), folder("a/b/c"), folder("ab")] };
        manifest.encode().unwrap();
        let mut sub = subfolder(&manifest, "a/");
        assert_eq!(sub.entries.iter().map(|e| e.path.as_str()).collect::<Vec<_>>(), ["b", "b/c"]);
        assert!(sub.encode().is_ok());
        assert_eq!(entry_at(&manifest, "/a/b/").unwrap().path, "a/b");
        assert_eq!(entry_at(&manifest, "nothing").unwrap_err().refusal_code(), Some(RefusalCode::NotFound));
    }
}
