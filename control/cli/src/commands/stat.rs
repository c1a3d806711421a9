//! `metanode stat`, `tag` and `rm`.

use metanode_client::{BlobInfo, folder};
use metanode_types::{DurabilityClass, Hash, TagName};
use metanode_wire::EntryKind;
use serde::Serialize;

use super::{
    list::{self, EntryRow, kind_name},
    with_client,
};
use crate::{
    args::{Global, Rm, Stat, Tag},
    exit::{Failure, Result},
    output::{Show, bytes, count},
    reference::Resolved,
};

#[derive(Debug, Serialize)]
struct BlobReport {
    hash: String,
    size: u64,
    kind: &'static str,
    class: &'static str,
    held: bool,
    references: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mode: Option<String>,
}

impl Show for BlobReport {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![
            ("hash", self.hash.clone()),
            ("size", format!("{} ({} bytes)", bytes(self.size), count(self.size))),
            ("kind", self.kind.into()),
            ("class", self.class.into()),
            ("held", if self.held { "yes" } else { "no: only by what refers to it" }.into()),
            ("references", self.references.to_string()),
        ];
        lines.extend(self.path.iter().map(|path| ("path", path.clone())));
        lines.extend(self.mode.iter().map(|mode| ("mode", mode.clone())));
        lines
    }
}

impl Show for EntryRow {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![("path", self.path.clone()), ("kind", self.kind.into()), ("mode", self.mode.clone())];
        lines.extend(self.target.iter().map(|target| ("target", target.clone())));
        lines
    }
}

pub(super) fn run(global: &Global, stat: &Stat) -> Result<()> {
    with_client(global, stat.what.ticket(), false, async |client, _| {
        let Resolved { mut hash, path } = stat.what.resolve(client).await?;
        let (mut path_in_folder, mut mode) = (None, None);
        if let Some(path) = path {
            let manifest = folder::get_manifest(client, hash).await?;
            let found = folder::entry_at(&manifest, &path)?;
            let row = EntryRow::of(found);
            match found.kind {
                EntryKind::File { hash: file, .. } => hash = file,
                // No blobs of their own.
                EntryKind::Folder | EntryKind::Link { .. } => return global.output.print(&row),
            }
            (path_in_folder, mode) = (Some(row.path), Some(row.mode));
        }
        let BlobInfo { size_bytes, kind, class, held, references } = client.stat(hash).await?;
        let class = match class {
            DurabilityClass::Durable => "durable",
            DurabilityClass::Memory => "memory",
        };
        let kind = if mode.is_some() { "file" } else { kind_name(kind) };
        let (hash, size) = (hash.to_string(), size_bytes);
        global.output.print(&BlobReport { hash, size, kind, class, held, references, path: path_in_folder, mode })
    })
}

#[derive(Debug, Serialize)]
struct TagReport {
    name: String,
    hash: String,
}

impl TagReport {
    fn new(name: &TagName, hash: Hash) -> Self {
        Self { name: name.to_string(), hash: hash.to_string() }
    }
}

pub(super) fn tag(global: &Global, tag: Tag) -> Result<()> {
    match tag {
        Tag::Ls { limit, after } => list::tags(global, limit, after.as_deref()),
        Tag::Set { name, what } => with_client(global, what.ticket(), false, async |client, _| {
            let Resolved { hash, path } = what.resolve(client).await?;
            if let Some(path) = path {
                let why = format!("a tag names a blob, not an entry of a folder ({path})");
                return Err(Failure::usage(why).hint("`metanode stat` prints the hash of an entry"));
            }
            client.tag_set(&name, hash).await?;
            global.output.print_or(&TagReport::new(&name, hash), &format!("{name} -> {hash}"))
        }),
        Tag::Get { name } => with_client(global, None, false, async |client, _| {
            let hash = client.tag_get(&name).await?;
            global.output.print_or(&TagReport::new(&name, hash), &hash.to_string())
        }),
        Tag::Rm { name } => with_client(global, None, false, async |client, _| {
            client.tag_remove(&name).await?;
            global.output.print_or(&serde_json::json!({ "removed": name.as_str() }), &format!("removed tag {name}"))
        }),
    }
}

pub(super) fn remove(global: &Global, rm: &Rm) -> Result<()> {
    with_client(global, None, false, async |client, _| {
        let mut removed = Vec::new();
        for hash in &rm.hashes {
            let result = client.remove(*hash).await;
            result.map_err(|error| Failure::from(error).context(format!("removing {hash}")))?;
            removed.push(hash.to_string());
        }
        let text: String = removed.iter().map(|hash| format!("removed {hash}\n")).collect();
        global.output.print_or(&serde_json::json!({ "removed": removed }), &text)
    })
}
