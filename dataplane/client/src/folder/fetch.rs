//! From blobs to a folder.

use std::{
    collections::HashSet,
    fs::{self, File, Permissions},
    io::Write as _,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use metanode_types::{ByteRange, Hash};
use metanode_wire::{Entry, EntryKind, Manifest};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{Contents, FolderGet, LARGE_FILES_MAX, SMALL_BYTES_MAX, SMALL_FILES_MAX, check_links, expect, joined};
use crate::{
    Client, ClientError, Counted, Got, Progress,
    files::{FileIo, FileSink, PartFolder, of_file},
};

/// Small files that one blocking task writes, whichever is reached first: handing over one at a time would cost as much as
/// writing it.
const BATCH_FILES: usize = 32;
const BATCH_BYTES: usize = 1 << 20;

/// Batches that are being written at once.
const BATCHES_MAX: usize = 4;

/// A small file that has arrived.
struct Arrived {
    path: PathBuf,
    mode: u16,
    bytes: Bytes,
}

/// Fetches the folder that `manifest` describes to `target`, which must not exist unless `how.replace`. Nothing is there before
/// all of it is.
pub async fn get_folder(
    client: &Client,
    manifest: &Manifest,
    target: &Path,
    how: FolderGet,
    progress: &Progress,
) -> Result<Contents, ClientError> {
    check_links(manifest, how.links, target)?;
    let contents = Contents::of(manifest);
    expect(progress, &contents);
    let part = PartFolder::create(target, how.replace)?;
    check_room(&part, contents.bytes)?;
    if part.ignores_case()?
        && let Some(path) = alike(manifest)
    {
        let reason = "another name of the folder differs from it in case only, and this file system would mix them up";
        return Err(ClientError::Unsuitable { path: target.join(path), reason });
    }
    let root = part.path();
    // A manifest has a folder before what is in it.
    for entry in manifest.entries.iter().filter(|entry| entry.kind == EntryKind::Folder) {
        let path = root.join(&entry.path);
        fs::create_dir(&path).map_err(ClientError::io(&path))?;
    }
    get_files(client, manifest, &root, how.file_io, progress).await?;
    // Links come after all files, so that nothing is ever written through one.
    for entry in &manifest.entries {
        if let EntryKind::Link { target } = &entry.kind {
            let path = root.join(&entry.path);
            symlink(target, &path).map_err(ClientError::io(&path))?;
        }
    }
    // Modes of folders come last, and deepest first: one may forbid to write into it.
    for entry in manifest.entries.iter().rev().filter(|entry| entry.kind == EntryKind::Folder) {
        let path = root.join(&entry.path);
        let mode = Permissions::from_mode(u32::from(entry.mode));
        fs::set_permissions(&path, mode).map_err(ClientError::io(&path))?;
    }
    blocking(move || part.publish()).await?;
    Ok(contents)
}

/// Files are written whole, whatever the folder's author says of their sizes; but a folder that says it can't fit is not begun.
fn check_room(part: &PartFolder, bytes: u64) -> Result<(), ClientError> {
    let path = part.path();
    let disk = rustix::fs::statvfs(&path).map_err(|error| ClientError::io(&path)(error.into()))?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if bytes <= free {
        return Ok(());
    }
    let text = format!("the folder has {bytes} bytes, and {free} are free");
    Err(ClientError::io(&path)(std::io::Error::new(std::io::ErrorKind::StorageFull, text)))
}

/// The first path that differs from an earlier one in case only.
fn alike(manifest: &Manifest) -> Option<&str> {
    let mut seen = HashSet::new();
    manifest.entries.iter().map(|entry| entry.path.as_str()).find(|path| !seen.insert(path.to_lowercase()))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ClientError> + Send + 'static,
) -> Result<T, ClientError> {
    joined(tokio::task::spawn_blocking(work).await)
}

async fn get_files(
    client: &Client,
    manifest: &Manifest,
    root: &Path,
    file_io: FileIo,
    progress: &Progress,
) -> Result<(), ClientError> {
    let (mut gets, mut writes) = (JoinSet::new(), JoinSet::new());
    let got = begin_files(client, manifest, root, file_io, progress, &mut gets, &mut writes).await;
    if got.is_err() {
        // The folder is removed now: nothing may go on that makes a file in it.
        gets.shutdown().await;
        while writes.join_next().await.is_some() {}
    }
    got
}

type Gets = JoinSet<Result<Option<Arrived>, ClientError>>;
type Writes = JoinSet<Result<(), ClientError>>;

/// Fetches and writes all files. On an error some of both may still be under way.
async fn begin_files(
    client: &Client,
    manifest: &Manifest,
    root: &Path,
    file_io: FileIo,
    progress: &Progress,
    gets: &mut Gets,
    writes: &mut Writes,
) -> Result<(), ClientError> {
    let small_bytes_max = u64::from(client.whole_bytes_max());
    let large = Arc::new(Semaphore::new(LARGE_FILES_MAX));
    let mut batch: Vec<Arrived> = Vec::with_capacity(BATCH_FILES);
    let mut batch_bytes = 0;
    let mut on_the_way_bytes = 0; // of small files
    let mut files = manifest.entries.iter().filter_map(|entry| match entry.kind {
        EntryKind::File { hash, size_bytes } => Some((entry, hash, size_bytes)),
        EntryKind::Folder | EntryKind::Link { .. } => None,
    });
    loop {
        while gets.len() < SMALL_FILES_MAX
            && on_the_way_bytes < SMALL_BYTES_MAX
            && let Some((entry, hash, size_bytes)) = files.next()
        {
            let wanted = Wanted::new(root, entry, hash, size_bytes);
            let (client, progress, large) = (client.clone(), progress.clone(), large.clone());
            on_the_way_bytes += if size_bytes <= small_bytes_max { size_bytes } else { 0 };
            gets.spawn(async move {
                if size_bytes <= small_bytes_max {
                    return wanted.small(&client).await.map(Some);
                }
                let _permit = large.acquire().await; // never closed
                wanted.large(&client, file_io, &progress).await.map(|()| None)
            });
        }
        let Some(got) = gets.join_next().await else { break };
        if let Some(arrived) = joined(got)? {
            on_the_way_bytes -= arrived.bytes.len() as u64; // its size was checked against the folder's
            batch_bytes += arrived.bytes.len();
            batch.push(arrived);
        }
        if batch.len() >= BATCH_FILES || batch_bytes >= BATCH_BYTES {
            while writes.len() >= BATCHES_MAX {
                writes.join_next().await.map(joined).transpose()?;
            }
            write_batch(writes, &mut batch, progress);
            batch_bytes = 0;
        }
    }
    write_batch(writes, &mut batch, progress);
    while let Some(written) = writes.join_next().await {
        joined(written)?;
    }
    Ok(())
}

fn write_batch(writes: &mut Writes, batch: &mut Vec<Arrived>, progress: &Progress) {
    let batch = std::mem::take(batch);
    let progress = progress.clone();
    writes.spawn_blocking(move || {
        for Arrived { path, mode, bytes } in batch {
            let written = create(&path).and_then(|mut file| {
                file.write_all(&bytes)?;
                file.set_permissions(Permissions::from_mode(u32::from(mode)))
            });
            written.map_err(ClientError::io(path))?;
            progress.add_bytes(bytes.len() as u64);
            progress.add_file();
        }
        Ok(())
    });
}

fn create(path: &Path) -> std::io::Result<File> {
    File::options().write(true).create_new(true).mode(0o600).open(path)
}

/// A file to fetch.
struct Wanted {
    path: PathBuf,
    mode: u16,
    hash: Hash,
    size_bytes: u64,
}

impl Wanted {
    fn new(root: &Path, entry: &Entry, hash: Hash, size_bytes: u64) -> Self {
        Self { path: root.join(&entry.path), mode: entry.mode, hash, size_bytes }
    }

    /// The manifest's author may have lied about the size; the hash decides what the file is, and the size must fit it.
    fn check_size(&self, actual_bytes: u64) -> Result<(), ClientError> {
        if actual_bytes == self.size_bytes {
            return Ok(());
        }
        Err(ClientError::Unsuitable { path: self.path.clone(), reason: "it has another size than the folder says" })
    }

    async fn small(self, client: &Client) -> Result<Arrived, ClientError> {
        match client.get_whole(self.hash).await? {
            Got::Whole(bytes) => {
                self.check_size(bytes.len() as u64)?;
                Ok(Arrived { path: self.path, mode: self.mode, bytes })
            }
            Got::Large { size_bytes } => Err(self.check_size(size_bytes).err().unwrap_or(
                // As large as the folder says, hence small; the node calls it large all the same.
                ClientError::Protocol(metanode_wire::FrameError::Malformed),
            )),
        }
    }

    async fn large(self, client: &Client, file_io: FileIo, progress: &Progress) -> Result<(), ClientError> {
        let file = create(&self.path).map_err(ClientError::io(&self.path))?;
        file.set_permissions(Permissions::from_mode(u32::from(self.mode))).map_err(ClientError::io(&self.path))?;
        let inner = FileSink::new(file, file_io).map_err(ClientError::io(&self.path))?;
        let mut sink = Counted { inner, progress: progress.clone() };
        let fetched = client.get_range(self.hash, ByteRange::ALL, &mut sink).await.map_err(of_file(&self.path))?;
        self.check_size(fetched.size_bytes)?;
        sink.inner.finish().await.map_err(ClientError::io(&self.path))?;
        progress.add_file();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(path: &str) -> Entry {
        Entry { path: path.into(), mode: 0o755, kind: EntryKind::Folder }
    }

    #[test]
    fn names_that_differ_in_case_only_are_found() {
        let of = |paths: &[&str]| Manifest { entries: paths.iter().map(|path| folder(path)).collect() };
        assert_eq!(alike(&of(&["A", "B", "a", "b"])), Some("a"));
        assert_eq!(alike(&of(&["A", "A/x", "A/Ä", "A/ä"])), Some("A/ä"));
        assert_eq!(alike(&of(&["A", "A/x", "B", "B/x"])), None);
    }

    #[test]
    fn a_folder_that_cannot_fit_is_not_begun() {
        let folder = tempfile::tempdir().unwrap();
        let part = PartFolder::create(&folder.path().join("x"), false).unwrap();
        check_room(&part, 1).unwrap();
        match check_room(&part, u64::MAX) {
            Err(ClientError::Io { source, .. }) => assert_eq!(source.kind(), std::io::ErrorKind::StorageFull),
            other => panic!("{other:?}"),
        }
        // What this file system does, if it tells: both kinds must be answered.
        part.ignores_case().unwrap();
    }
}
