//! `metanode get`.

use std::{
    os::fd::AsFd as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use metanode_client::{
    Client, ClientError, Counted, Progress, WriterSink,
    files::{self, FileIo},
    folder::{self, Contents, FolderGet, Links},
};
use metanode_types::{BlobKind, ByteRange, Hash};
use metanode_wire::{EntryKind, Manifest, RefusalCode};
use serde::Serialize;

use super::{CONNECT_AGAIN_MAX, as_file, with_client};
use crate::{
    args::{Get, Global},
    exit::{Exit, Failure, Result},
    output::{Show, bytes, count, visible},
    progress::shown,
    reference::Resolved,
};

/// What was fetched.
#[derive(Debug, Serialize)]
struct Report {
    hash: String,
    kind: &'static str,
    /// Bytes that were written.
    size: u64,
    path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    files: Option<u64>,
}

impl Show for Report {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let size = format!("{} ({} bytes), verified", bytes(self.size), count(self.size));
        let mut lines = vec![("path", self.path.display().to_string()), ("hash", self.hash.clone()), ("size", size)];
        lines.extend(self.files.map(|files| ("files", count(files))));
        lines
    }
}

/// What a reference turned out to be.
enum What {
    Blob { hash: Hash, mode: Option<u16> },
    Folder { hash: Hash, manifest: Manifest },
}

pub(super) fn run(global: &Global, get: &Get) -> Result<()> {
    let mut written = 0;
    let mut others = get.what.other_tickets().iter();
    let mut source = get.what.ticket();
    let mut again = 0;
    let report = loop {
        let before = written;
        let attempt = with_client(global, source, true, async |client, _| {
            let beside = client.beside(others.as_slice().iter().cloned());
            let client = &beside;
            let resolved = get.what.resolve(client).await?;
            let progress = Progress::default();
            let work = async {
                let what = find(client, resolved, get.raw).await?;
                fetch(client, get, what, written, &progress).await
            };
            let fetched = shown("get", global.quiet, &progress, work).await;
            written += progress.bytes();
            beside.close().await;
            fetched
        });
        match attempt {
            // What was verified stays: the next attempt goes on with it.
            Err(failure) if failure.is_of_the_connection && written > before && again < CONNECT_AGAIN_MAX => {
                eprintln!("warning: {}; connecting again", visible(&failure.to_string()));
                again += 1;
            }
            Err(failure) if failure.is_of_the_node => match others.next() {
                Some(next) => {
                    eprintln!("warning: {}; going on with the next node", visible(&failure.to_string()));
                    source = Some(next);
                    again = 0;
                }
                None => return Err(failure),
            },
            ended => break ended?,
        }
    };
    match report {
        Some(report) => global.output.print(&report),
        None => Ok(()), // the data went to standard output
    }
}

async fn find(client: &Client, resolved: Resolved, raw: bool) -> Result<What> {
    let Resolved { hash, path } = resolved;
    let Some(path) = path else {
        return match client.stat(hash).await?.kind {
            BlobKind::Folder if !raw => Ok(What::Folder { hash, manifest: folder::get_manifest(client, hash).await? }),
            BlobKind::Folder | BlobKind::Blob => Ok(What::Blob { hash, mode: None }),
        };
    };
    let manifest = super::list::manifest_of(client, hash).await?;
    let entry = folder::entry_at(&manifest, &path)?;
    match &entry.kind {
        EntryKind::File { hash, .. } => Ok(What::Blob { hash: *hash, mode: Some(entry.mode) }),
        EntryKind::Folder => Ok(What::Folder { hash, manifest: folder::subfolder(&manifest, &path) }),
        EntryKind::Link { target } => {
            Err(Failure::new(Exit::Other, format!("{path} is a link to {target:?}")).hint("fetch what it leads to"))
        }
    }
}

/// `written` bytes went to standard output before, from other nodes.
async fn fetch(client: &Client, get: &Get, what: What, written: u64, progress: &Progress) -> Result<Option<Report>> {
    let file_io = FileIo::probe();
    let target = get.target.clone().unwrap_or_else(|| PathBuf::from(get.what.file_name()));
    if let Some(parent) = target.parent().filter(|parent| !parent.as_os_str().is_empty() && !parent.is_dir()) {
        let missing = format!("the folder {} does not exist", parent.display());
        return Err(Failure::new(Exit::NotFound, missing).hint("make it, or name another target"));
    }
    let range = get.range.unwrap_or(ByteRange::ALL);
    match what {
        What::Blob { hash, .. } if target == Path::new("-") => {
            let stdout = as_file(std::io::stdout().as_fd())?;
            let mut sink = Counted { inner: WriterSink(stdout), progress: progress.clone() };
            let range = match written {
                0 => range,
                _ => ByteRange { offset: range.offset + written, length: range.length.saturating_sub(written) },
            };
            let fetched = files::get_into(client, hash, range, &mut sink).await;
            // Whatever ended it: what is counted must be written before another node goes on behind it.
            let flushed = tokio::io::AsyncWriteExt::flush(&mut sink.inner.0).await;
            flushed.map_err(crate::exit::io("standard output"))?;
            fetched?;
            Ok(None)
        }
        What::Blob { hash, mode } => {
            let fetched = files::get_file(client, hash, range, &target, get.force, file_io, progress).await;
            let fetched = fetched.map_err(|error| {
                let goes_on = goes_on(&error);
                let failure = in_folder(error, &target);
                if goes_on { resumable(failure, &target, &hash) } else { failure }
            })?;
            if let Some(mode) = mode {
                let mode = std::fs::Permissions::from_mode(u32::from(mode));
                std::fs::set_permissions(&target, mode).map_err(crate::exit::io(target.display()))?;
            }
            Ok(Some(Report {
                hash: hash.to_string(),
                kind: "blob",
                size: fetched.taken_bytes,
                path: target,
                files: None,
            }))
        }
        What::Folder { .. } if target == Path::new("-") => Err(Failure::usage("a folder can't go to standard output")
            .hint("name a DEST, one of its files (HASH/PATH), or --raw")),
        What::Folder { .. } if get.range.is_some() => Err(Failure::usage("a folder has no ranges of bytes")),
        What::Folder { hash, manifest } => {
            if get.force && holds_us(&target) {
                let text =
                    format!("{} holds the folder that this command runs in, so it is not replaced", target.display());
                return Err(Failure::usage(text).hint("name another target"));
            }
            let links = if get.unsafe_links { Links::All } else { Links::Inside };
            let how = FolderGet { replace: get.force, links, file_io };
            let contents = folder::get_folder(client, &manifest, &target, how, progress).await;
            let Contents { files, bytes, .. } = contents.map_err(|error| in_folder(error, &target))?;
            Ok(Some(Report { hash: hash.to_string(), kind: "folder", size: bytes, path: target, files: Some(files) }))
        }
    }
}

/// Whether the same command could end well later; otherwise the hint that the error has by itself is the better one.
fn goes_on(error: &ClientError) -> bool {
    let is_refused = error.refusal_code().is_some_and(|code| code != RefusalCode::Busy);
    !is_refused && !matches!(error, ClientError::TargetExists(_) | ClientError::HashMismatch(_))
}

/// Says what an interrupted fetch has left, and what it is good for.
fn resumable(failure: Failure, target: &Path, hash: &Hash) -> Failure {
    match files::part_of(target, hash) {
        Some((part, held)) if held > 0 => {
            let hint = format!("the same command goes on behind {} that are in {}", bytes(held), part.display());
            failure.hint(hint)
        }
        _ => failure,
    }
}

/// Whether replacing this folder would take the current one with it.
fn holds_us(target: &Path) -> bool {
    let (Ok(target), Ok(here)) = (target.canonicalize(), std::env::current_dir()) else { return false };
    here.canonicalize().unwrap_or(here).starts_with(target)
}

/// A better hint where the usual one would not help.
fn in_folder(error: ClientError, target: &Path) -> Failure {
    match &error {
        ClientError::TargetExists(_) if target.is_dir() => Failure::from(error)
            .hint("name the target inside that folder; --force replaces a folder by a folder, with all that is in it"),
        ClientError::Unsuitable { reason, .. } if reason.contains("link") => {
            Failure::from(error).hint("--unsafe-links recreates such links all the same")
        }
        _ => error.into(),
    }
}
