//! `metanode ls`.

use metanode_client::{BlobLine, Client, folder};
use metanode_types::{BlobKind, Hash, TagName, limits::LIST_PAGE_MAX};
use metanode_wire::{Entry, EntryKind, Manifest};
use serde::Serialize;

use super::with_client;
use crate::{
    args::{Global, Ls},
    exit::{Exit, Failure, Result},
    output::{Row, bytes},
    reference::{Reference, Resolved},
};

const HASH_WIDTH: isize = 64;

#[derive(Debug, Serialize)]
struct BlobRow {
    hash: String,
    size: u64,
    kind: &'static str,
    held: bool,
    references: u32,
}

impl Row for BlobRow {
    const COLUMNS: &'static [(&'static str, isize)] =
        &[("HASH", HASH_WIDTH), ("SIZE", -10), ("KIND", 6), ("HELD", 4), ("REFERENCES", 0)];

    fn cells(&self) -> Vec<String> {
        let held = if self.held { "yes" } else { "no" };
        vec![self.hash.clone(), bytes(self.size), self.kind.into(), held.into(), self.references.to_string()]
    }
}

#[derive(Debug, Serialize)]
struct TagRow {
    name: String,
    hash: String,
}

impl Row for TagRow {
    const COLUMNS: &'static [(&'static str, isize)] = &[("HASH", HASH_WIDTH), ("NAME", 0)];

    fn cells(&self) -> Vec<String> {
        vec![self.hash.clone(), self.name.clone()]
    }
}

/// An entry of a folder; `stat` prints one too.
#[derive(Debug, Serialize)]
pub(super) struct EntryRow {
    pub(super) path: String,
    pub(super) kind: &'static str,
    /// As `chmod` takes it.
    pub(super) mode: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) hash: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) target: Option<String>,
}

impl EntryRow {
    pub(super) fn of(entry: &Entry) -> Self {
        let mut row = Self {
            path: entry.path.clone(),
            kind: "folder",
            mode: format!("{:04o}", entry.mode),
            size: None,
            hash: None,
            target: None,
        };
        match &entry.kind {
            EntryKind::Folder => {}
            EntryKind::File { hash, size_bytes } => {
                row.kind = "file";
                row.size = Some(*size_bytes);
                row.hash = Some(hash.to_string());
            }
            EntryKind::Link { target } => {
                row.kind = "link";
                row.target = Some(target.clone());
            }
        }
        row
    }
}

impl Row for EntryRow {
    const COLUMNS: &'static [(&'static str, isize)] = &[("KIND", 6), ("MODE", 4), ("SIZE", -10), ("PATH", 0)];

    fn cells(&self) -> Vec<String> {
        let size = self.size.map(bytes).unwrap_or_default();
        let path = match &self.target {
            Some(target) => format!("{} -> {target}", self.path),
            None => self.path.clone(),
        };
        vec![self.kind.into(), self.mode.clone(), size, path]
    }
}

pub(super) fn kind_name(kind: BlobKind) -> &'static str {
    match kind {
        BlobKind::Blob => "blob",
        BlobKind::Folder => "folder",
    }
}

pub(super) fn run(global: &Global, ls: &Ls) -> Result<()> {
    if ls.tags {
        return tags(global, ls.limit, ls.after.as_deref());
    }
    let limit = ls.limit.unwrap_or(u64::MAX);
    match &ls.folder {
        Some(reference) => with_client(global, reference.ticket(), false, async |client, _| {
            entries(global, client, reference, limit, ls.after.as_deref()).await
        }),
        None => {
            with_client(global, None, false, async |client, _| blobs(global, client, limit, ls.after.as_deref()).await)
        }
    }
}

async fn blobs(global: &Global, client: &Client, mut left: u64, after: Option<&str>) -> Result<()> {
    let mut after: Option<Hash> = after
        .map(|text| text.parse().map_err(|error| Failure::usage(format!("--after {text}: {error}"))))
        .transpose()?;
    let mut list = global.output.list()?;
    while left > 0 {
        let page = client.list_blobs(after, left.min(LIST_PAGE_MAX as u64) as u32).await?;
        for BlobLine { hash, size_bytes, kind, held, references } in page.entries.iter().take(left as usize) {
            let (hash, kind) = (hash.to_string(), kind_name(*kind));
            list.push(&BlobRow { hash, size: *size_bytes, kind, held: *held, references: *references })?;
        }
        left = left.saturating_sub(page.entries.len() as u64);
        match page.entries.last() {
            Some(last) if page.more => after = Some(last.hash),
            _ => break,
        }
    }
    list.end()
}

pub(super) fn tags(global: &Global, limit: Option<u64>, after: Option<&str>) -> Result<()> {
    let mut after: Option<TagName> = after
        .map(|text| text.parse().map_err(|error| Failure::usage(format!("--after {text}: {error}"))))
        .transpose()?;
    with_client(global, None, false, async |client, _| {
        let mut left = limit.unwrap_or(u64::MAX);
        let mut list = global.output.list()?;
        while left > 0 {
            let page = client.list_tags(after.as_ref(), left.min(LIST_PAGE_MAX as u64) as u32).await?;
            for (name, hash) in page.entries.iter().take(left as usize) {
                list.push(&TagRow { name: name.to_string(), hash: hash.to_string() })?;
            }
            left = left.saturating_sub(page.entries.len() as u64);
            match page.entries.into_iter().last() {
                Some((last, _)) if page.more => after = Some(last),
                _ => break,
            }
        }
        list.end()
    })
}

/// What a folder holds. A blob that is none is said to be so, rather than to be a damaged folder.
pub(super) async fn manifest_of(client: &Client, hash: Hash) -> Result<Manifest> {
    match client.stat(hash).await?.kind {
        BlobKind::Folder => Ok(folder::get_manifest(client, hash).await?),
        BlobKind::Blob => {
            let what = Failure::new(Exit::NotFound, format!("{hash} is a blob, not a folder: it has no entries"));
            Err(what.hint("`metanode stat` says what a blob is; `metanode get` fetches it"))
        }
    }
}

async fn entries(
    global: &Global,
    client: &Client,
    reference: &Reference,
    limit: u64,
    after: Option<&str>,
) -> Result<()> {
    let Resolved { hash, path } = reference.resolve(client).await?;
    let mut manifest = manifest_of(client, hash).await?;
    if let Some(path) = path {
        let entry = folder::entry_at(&manifest, &path)?;
        if entry.kind != EntryKind::Folder {
            let mut list = global.output.list()?;
            list.push(&EntryRow::of(entry))?;
            return list.end();
        }
        manifest = folder::subfolder(&manifest, &path);
    }
    let mut list = global.output.list()?;
    let behind = manifest.entries.iter().filter(|entry| after.is_none_or(|after| entry.path.as_str() > after));
    for entry in behind.take(usize::try_from(limit).unwrap_or(usize::MAX)) {
        list.push(&EntryRow::of(entry))?;
    }
    list.end()
}
