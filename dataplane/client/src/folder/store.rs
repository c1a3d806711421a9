//! From a folder to blobs.

use std::{
    collections::HashSet,
    fs::{File, Metadata},
    io::Read as _,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use metanode_types::{BlobKind, Hash};
use metanode_wire::{Entry, EntryKind, Manifest};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
};

use super::{
    Contents, FolderPut, FolderStored, LARGE_FILES_MAX, SMALL_BYTES_MAX, SMALL_FILES_MAX, joined,
    walk::{Walk, WalkFile, open_regular, walk},
};
use crate::{
    Client, ClientError, Progress, PutOptions,
    files::{CHANGED, Version, put_opened},
};

/// Threads that read and hash small files.
const READERS: usize = 2;

/// Small files that are read and wait to be sent: 4 MiB at most.
const READ_AHEAD_FILES: usize = 16;

/// A file that was opened; a small one was read as well.
struct Opened {
    index: usize,
    mode: u16,
    contents: Read,
}

enum Read {
    Small { hash: Hash, bytes: Bytes },
    Large { size_bytes: u64 },
}

/// Stores a folder with all its files. Sockets, pipes and devices are left out and counted. A file that changes while it is
/// read, or a name that is not UTF-8, is an error that names it.
pub async fn put_folder(
    client: &Client,
    root: &Path,
    how: FolderPut,
    progress: &Progress,
) -> Result<FolderStored, ClientError> {
    let path = root.to_path_buf();
    let listed = tokio::task::spawn_blocking(move || walk(&path)).await;
    let Walk { mut entries, files, bytes, skipped } = joined(listed)?;
    progress.expect(files.len() as u64, bytes);
    let files = Arc::new(files);
    entries.extend(put_files(client, &files, how, progress).await?);
    let mut manifest = Manifest { entries };
    let contents = Contents::of(&manifest);
    let bytes = Bytes::from(manifest.encode()?);
    let manifest_bytes = bytes.len() as u64;
    let options = PutOptions { class: how.class, kind: BlobKind::Folder, hold: how.hold };
    let stored = client.put_whole(bytes, options).await?;
    Ok(FolderStored { hash: stored.hash, manifest_bytes, existed: stored.existed, contents, skipped })
}

async fn put_files(
    client: &Client,
    files: &Arc<Vec<WalkFile>>,
    how: FolderPut,
    progress: &Progress,
) -> Result<Vec<Entry>, ClientError> {
    let mut opened = read_ahead(files, client.whole_bytes_max());
    // The blobs live by this connection until the manifest refers to them.
    let options = PutOptions { class: how.class, kind: BlobKind::Blob, hold: false };
    let large = Arc::new(Semaphore::new(LARGE_FILES_MAX));
    let mut sent: HashSet<Hash> = HashSet::new();
    let mut entries = Vec::with_capacity(files.len());
    let mut puts: JoinSet<Result<(Entry, u64), ClientError>> = JoinSet::new(); // dropped, and so ended, on the first error
    let mut on_the_way_bytes = 0; // of small files
    loop {
        while puts.len() >= SMALL_FILES_MAX || on_the_way_bytes >= SMALL_BYTES_MAX {
            let Some(put) = puts.join_next().await else { break };
            let (entry, bytes) = joined(put)?;
            on_the_way_bytes -= bytes;
            entries.push(entry);
        }
        let Some(next) = opened.recv().await else { break };
        let Opened { index, mode, contents } = next?;
        let entry = move |file: &WalkFile, hash, size_bytes| Entry {
            path: file.path.clone(),
            mode,
            kind: EntryKind::File { hash, size_bytes },
        };
        match contents {
            Read::Small { hash, bytes } => {
                let size_bytes = bytes.len() as u64;
                let entry = entry(&files[index], hash, size_bytes);
                let (client, progress) = (client.clone(), progress.clone());
                let is_new = sent.insert(hash);
                if !is_new {
                    progress.add_bytes(size_bytes);
                    progress.add_file();
                    entries.push(entry);
                    continue;
                }
                on_the_way_bytes += size_bytes;
                puts.spawn(async move {
                    client.put_hashed(hash, bytes, options).await?;
                    progress.add_bytes(size_bytes);
                    progress.add_file();
                    Ok((entry, size_bytes))
                });
            }
            Read::Large { size_bytes } => {
                let (client, progress, files, large) = (client.clone(), progress.clone(), files.clone(), large.clone());
                puts.spawn(async move {
                    let _permit = large.acquire().await; // never closed
                    let file = &files[index];
                    let open = || open_regular(&file.full).map(|(opened, _)| opened);
                    let stored =
                        put_opened(&client, &file.full, open, size_bytes, options, how.file_io, &progress).await?;
                    progress.add_file();
                    Ok((entry(file, stored.hash, stored.size_bytes), 0))
                });
            }
        }
    }
    while let Some(put) = puts.join_next().await {
        entries.push(joined(put)?.0);
    }
    Ok(entries)
}

/// Opens the files in turn, reads and hashes the small ones. Ends when the receiver has gone, or after an error.
fn read_ahead(files: &Arc<Vec<WalkFile>>, small_bytes_max: u32) -> mpsc::Receiver<Result<Opened, ClientError>> {
    let (give, opened) = mpsc::channel(READ_AHEAD_FILES);
    let next = Arc::new(AtomicUsize::new(0));
    for _ in 0..READERS.min(files.len()) {
        let (files, give, next) = (files.clone(), give.clone(), next.clone());
        tokio::task::spawn_blocking(move || {
            loop {
                let index = next.fetch_add(1, Relaxed);
                let Some(file) = files.get(index) else { return };
                let read = open(index, &file.full, u64::from(small_bytes_max));
                let is_error = read.is_err();
                if give.blocking_send(read).is_err() || is_error {
                    return;
                }
            }
        });
    }
    opened
}

fn open(index: usize, path: &Path, small_bytes_max: u64) -> Result<Opened, ClientError> {
    let (file, metadata) = open_regular(path)?;
    let mode = (metadata.permissions().mode() & 0o777) as u16;
    let contents = if metadata.len() > small_bytes_max {
        Read::Large { size_bytes: metadata.len() }
    } else {
        let bytes = read_small(path, &file, &metadata)?;
        Read::Small { hash: metanode_crypto::hash(&bytes), bytes }
    };
    Ok(Opened { index, mode, contents })
}

fn read_small(path: &Path, file: &File, metadata: &Metadata) -> Result<Bytes, ClientError> {
    let size = metadata.len();
    // One more than the size, so that the end is found without growing. Rounded up, since allocators keep memory by size: as many
    // sizes as files would have each thread hold some of each.
    let mut bytes = Vec::with_capacity((size as usize + 1).next_power_of_two());
    file.take(size + 1).read_to_end(&mut bytes).map_err(ClientError::io(path))?;
    let now = file.metadata().map_err(ClientError::io(path))?;
    if bytes.len() as u64 != size || Version::of(&now) != Version::of(metadata) {
        return Err(ClientError::Unsuitable { path: path.into(), reason: CHANGED });
    }
    Ok(bytes.into())
}
