//! `metanode put`.

use std::{os::fd::AsFd as _, path::Path};

use metanode_client::{
    Client, Counted, Progress, PutOptions, ReaderSource, Stored,
    files::{self, FileIo},
    folder::{self, FolderPut, FolderStored},
};
use metanode_types::{BlobKind, DurabilityClass};
use serde::Serialize;

use super::{CONNECT_AGAIN_MAX, as_file, with_client};
use crate::{
    args::{Global, Put},
    exit::Result,
    output::{Show, bytes, count, visible},
    progress::shown,
};

const CLASS_MEMORY: &str = "memory";

/// What was stored.
#[derive(Debug, Serialize)]
struct Report {
    hash: String,
    /// Bytes of the contents: of the blob, or of all files of the folder.
    size: u64,
    kind: &'static str,
    /// When the node answered: when it was on disk, or before.
    class: &'static str,
    existed: bool,
    ticket: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    tag: Option<String>,
    #[serde(flatten)]
    folder: Option<FolderReport>,
}

#[derive(Debug, Serialize)]
struct FolderReport {
    files: u64,
    folders: u64,
    links: u64,
    skipped: u64,
    manifest_size: u64,
}

impl Show for Report {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![
            ("hash", self.hash.clone()),
            ("size", format!("{} ({} bytes)", bytes(self.size), count(self.size))),
            ("kind", self.kind.into()),
        ];
        if let Some(folder) = &self.folder {
            let FolderReport { files, folders, links, skipped, .. } = folder;
            lines.push(("entries", format!("{files} files, {folders} folders, {links} links")));
            if *skipped > 0 {
                lines.push(("skipped", format!("{skipped} sockets, pipes or devices")));
            }
        }
        if self.existed {
            lines.push(("existed", "yes: the node had it already".into()));
        }
        if self.class == CLASS_MEMORY {
            lines.push(("class", "memory: not on disk yet, a crash of the node now may lose it".into()));
        }
        lines.extend(self.tag.iter().map(|tag| ("tag", tag.clone())));
        lines.push(("ticket", self.ticket.clone()));
        lines
    }
}

pub(super) fn run(global: &Global, put: &Put) -> Result<()> {
    let mut again = 0;
    let report = loop {
        let progress = Progress::default();
        match attempt(global, put, &progress) {
            // The node has what came before, and is asked for it. Standard input can't be read again.
            Err(failure)
                if failure.is_of_the_connection
                    && progress.bytes() > 0
                    && put.source != Path::new("-")
                    && again < CONNECT_AGAIN_MAX =>
            {
                eprintln!("warning: {}; connecting again", visible(&failure.to_string()));
                again += 1;
            }
            ended => break ended?,
        }
    };
    global.output.print(&report)
}

fn attempt(global: &Global, put: &Put, progress: &Progress) -> Result<Report> {
    with_client(global, None, put.source.is_dir(), async |client, target| {
        let stored = shown("put", global.quiet, progress, store(client, put, progress)).await;
        let stored = stored.map_err(|failure| failure.context(format!("putting {}", put.source.display())))?;
        let hash = stored.hash();
        if let Some(tag) = &put.tag {
            client.tag_set(tag, hash).await?;
        }
        let ticket = target.ticket_for(hash).to_string();
        let class = match DurabilityClass::from(put.class) {
            DurabilityClass::Durable => "durable",
            DurabilityClass::Memory => CLASS_MEMORY,
        };
        Ok(stored.report(ticket, put.tag.as_ref().map(ToString::to_string), class))
    })
}

enum What {
    Blob(Stored),
    Folder(FolderStored),
}

async fn store(client: &Client, put: &Put, progress: &Progress) -> Result<What> {
    let options = PutOptions { class: put.class.into(), kind: BlobKind::Blob, hold: true };
    if put.source == Path::new("-") {
        let stdin = as_file(std::io::stdin().as_fd())?;
        let mut source = Counted { inner: ReaderSource(stdin), progress: progress.clone() };
        return Ok(What::Blob(client.put_source(&mut source, None, options).await?));
    }
    let file_io = FileIo::probe();
    if put.source.is_dir() {
        let how = FolderPut { class: options.class, hold: true, file_io };
        return Ok(What::Folder(folder::put_folder(client, &put.source, how, progress).await?));
    }
    Ok(What::Blob(files::put_file(client, &put.source, options, file_io, progress).await?))
}

impl What {
    fn hash(&self) -> metanode_types::Hash {
        match self {
            Self::Blob(stored) => stored.hash,
            Self::Folder(stored) => stored.hash,
        }
    }

    fn report(self, ticket: String, tag: Option<String>, class: &'static str) -> Report {
        let hash = self.hash().to_string();
        match self {
            Self::Blob(stored) => Report {
                hash,
                size: stored.size_bytes,
                kind: "blob",
                class,
                existed: stored.existed,
                ticket,
                tag,
                folder: None,
            },
            Self::Folder(FolderStored { manifest_bytes, existed, contents, skipped, .. }) => Report {
                hash,
                size: contents.bytes,
                kind: "folder",
                class,
                existed,
                ticket,
                tag,
                folder: Some(FolderReport {
                    files: contents.files,
                    folders: contents.folders,
                    links: contents.links,
                    skipped,
                    manifest_size: manifest_bytes,
                }),
            },
        }
    }
}
