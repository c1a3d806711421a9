//! Blobs from and to files.
//!
//! A file that is fetched is written beside its final name, as `.NAME.metanode-part-…`, from verified bytes only; it is synced
//! and then renamed. Whoever finds a file under the final name has all of it, and the right one. What an interrupted fetch of a large
//! blob has left under the other name is gone on with by the next one to the same place.

mod part;
mod plain;
mod uring;

use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use metanode_types::{ByteRange, Hash, limits::GROUP_BYTES};
use metanode_wire::RefusalCode;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    BlobSink, BlobSource, Client, ClientError, Counted, Fetched, Got, Progress, PutOptions, Stored, link::busy_pause,
};
pub(crate) use part::{PartFile, PartFolder};

/// Bytes gathered before they go to the disk, and the number of such buffers on the way: 8 MiB a file.
const WRITE_BUFFER_BYTES: usize = 1 << 20;
const WRITE_BUFFERS: usize = 8;

/// Chunks read ahead: 2 MiB a file.
const READ_AHEAD_CHUNKS: usize = 8;

/// Files from this size on go on where an interrupted upload stopped, and are fetched into a part that can be gone on with.
const RESUMED_BYTES_MIN: u64 = 4 << 20;

/// How often a whole file is sent again when the node is busy, and how long that may take in all.
const BUSY_PATIENCE: Duration = Duration::from_secs(60);

/// How files are read and written: by io_uring on a thread of its own where the kernel allows it, by plain calls elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileIo {
    /// `read` and `write` on blocking threads.
    Plain,
    /// io_uring, through tokio-uring.
    Uring,
}

impl FileIo {
    /// Io_uring if a ring can be made here, plain calls otherwise. Containers and hardened kernels often forbid it.
    pub fn probe() -> Self {
        match uring::probe() {
            Ok(()) => Self::Uring,
            Err(_) => Self::Plain,
        }
    }

    /// Why io_uring can't be used here, if it can't.
    pub fn uring_error() -> Option<io::Error> {
        uring::probe().err()
    }
}

/// What has the contents of a file: a change of it while it is read is noticed by these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Version {
    pub(crate) size_bytes: u64,
    modified: (i64, i64),
}

impl Version {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self { size_bytes: metadata.size(), modified: (metadata.mtime(), metadata.mtime_nsec()) }
    }
}

/// A file was written to while it was read: what was read may be of no one version of it.
#[derive(Debug, thiserror::Error)]
#[error("{CHANGED}")]
pub(crate) struct ChangedWhileRead;

pub(crate) const CHANGED: &str = "it changed while it was read";

impl ChangedWhileRead {
    pub(crate) fn into_io(self) -> io::Error {
        io::Error::other(self)
    }
}

/// Names the file in an error of its transfer.
pub(crate) fn of_file(path: &Path) -> impl FnOnce(ClientError) -> ClientError {
    move |error| match error {
        ClientError::Stream(source) if source.get_ref().is_some_and(|e| e.is::<ChangedWhileRead>()) => {
            ClientError::Unsuitable { path: path.into(), reason: CHANGED }
        }
        ClientError::Stream(source) => ClientError::Io { path: path.into(), source },
        other => other,
    }
}

/// A file as a source of chunks, read ahead.
#[derive(Debug)]
pub struct FileSource {
    chunks: mpsc::Receiver<io::Result<Bytes>>,
}

impl FileSource {
    /// Starts to read `file` from its beginning. The last chunk is followed by an error if the file changed meanwhile.
    pub fn new(file: File, how: FileIo) -> io::Result<Self> {
        let version = Version::of(&file.metadata()?);
        let (give, chunks) = mpsc::channel(READ_AHEAD_CHUNKS);
        match how {
            FileIo::Plain => drop(tokio::task::spawn_blocking(move || plain::read(file, version, &give))),
            FileIo::Uring => uring::read(file, version, give)?,
        }
        Ok(Self { chunks })
    }
}

impl BlobSource for FileSource {
    async fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        self.chunks.recv().await.transpose()
    }
}

/// A file as a sink, written behind.
#[derive(Debug)]
pub struct FileSink {
    buffer: Vec<u8>,
    full: Option<mpsc::Sender<Vec<u8>>>,
    /// Buffers that were written, to be filled again.
    empty: mpsc::Receiver<Vec<u8>>,
    end: Option<oneshot::Receiver<io::Result<()>>>,
}

impl FileSink {
    /// Starts to write `file` from its beginning.
    pub fn new(file: File, how: FileIo) -> io::Result<Self> {
        Self::from(file, 0, how)
    }

    /// Starts to write `file` from byte `offset` on.
    pub fn from(file: File, offset: u64, how: FileIo) -> io::Result<Self> {
        let (full, take_full) = mpsc::channel(WRITE_BUFFERS - 2);
        let (give_empty, empty) = mpsc::channel(WRITE_BUFFERS);
        let (tell, end) = oneshot::channel();
        match how {
            FileIo::Plain => drop(tokio::task::spawn_blocking(move || {
                let _ = tell.send(plain::write(file, offset, take_full, &give_empty)); // nobody waits after a failed transfer
            })),
            FileIo::Uring => uring::write(file, offset, take_full, give_empty, tell)?,
        }
        Ok(Self { buffer: Vec::with_capacity(WRITE_BUFFER_BYTES), full: Some(full), empty, end: Some(end) })
    }

    /// Everything is in the file, and synced, when this returns.
    pub async fn finish(mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            self.flush().await?;
        }
        self.full = None; // the writer sees the end
        self.ended().await
    }

    async fn flush(&mut self) -> io::Result<()> {
        let next = self.empty.try_recv().unwrap_or_else(|_| Vec::with_capacity(WRITE_BUFFER_BYTES));
        let buffer = std::mem::replace(&mut self.buffer, next);
        let full = self.full.as_ref().expect("only the end takes it away");
        match full.send(buffer).await {
            Ok(()) => Ok(()),
            // The writer has gone, and says why.
            Err(_) => self.ended().await.and(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    async fn ended(&mut self) -> io::Result<()> {
        match self.end.take() {
            Some(end) => end.await.unwrap_or_else(|_| Err(io::Error::other("the writing thread ended early"))),
            None => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

impl BlobSink for FileSink {
    async fn take(&mut self, _offset: u64, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let n = data.len().min(WRITE_BUFFER_BYTES - self.buffer.len());
            self.buffer.extend_from_slice(&data[..n]);
            data = &data[n..];
            if self.buffer.len() == WRITE_BUFFER_BYTES {
                self.flush().await?;
            }
        }
        Ok(())
    }
}

/// Stores a regular file (or what a link to one leads to).
pub async fn put_file(
    client: &Client,
    path: &Path,
    options: PutOptions,
    how: FileIo,
    progress: &Progress,
) -> Result<Stored, ClientError> {
    // Asked before it is opened: opening a pipe would wait for a writer.
    let metadata = std::fs::metadata(path).map_err(ClientError::io(path))?;
    if !metadata.is_file() {
        return Err(ClientError::Unsuitable { path: path.into(), reason: "it is not a regular file" });
    }
    let open = || File::open(path).map_err(ClientError::io(path));
    progress.expect(1, metadata.len());
    let stored = put_opened(client, path, open, metadata.len(), options, how, progress).await?;
    progress.add_file();
    Ok(stored)
}

/// Stores what `open` opens; opens it again when the node was busy.
pub(crate) async fn put_opened(
    client: &Client,
    path: &Path,
    open: impl Fn() -> Result<File, ClientError>,
    size_bytes: u64,
    options: PutOptions,
    how: FileIo,
    progress: &Progress,
) -> Result<Stored, ClientError> {
    let begun = Instant::now();
    // Of a file that is sent in a moment, asking would take as long.
    let mut may_ask = size_bytes >= RESUMED_BYTES_MIN;
    loop {
        let inner = FileSource::new(open()?, how).map_err(ClientError::io(path))?;
        let mut source = Counted { inner, progress: progress.clone() };
        let stored = match may_ask {
            true => client.put_again(&mut source, Some(size_bytes), options).await,
            false => client.put_source(&mut source, Some(size_bytes), options).await,
        };
        match stored {
            Err(ClientError::Refused(refusal)) if refusal.code == RefusalCode::NotFound && may_ask => may_ask = false,
            Err(ClientError::Refused(refusal))
                if refusal.code == RefusalCode::Busy && begun.elapsed() < BUSY_PATIENCE =>
            {
                tokio::time::sleep(busy_pause(&refusal)).await;
            }
            result => return result.map_err(of_file(path)),
        }
    }
}

/// Fetches a range of a blob into `sink`; a small whole blob in one round trip.
pub async fn get_into(
    client: &Client,
    hash: Hash,
    range: ByteRange,
    sink: &mut impl BlobSink,
) -> Result<Fetched, ClientError> {
    if range == ByteRange::ALL
        && let Got::Whole(bytes) = client.get_whole(hash).await?
    {
        sink.take(0, &bytes).await.map_err(ClientError::Stream)?;
        let size_bytes = bytes.len() as u64;
        return Ok(Fetched { size_bytes, taken_bytes: size_bytes });
    }
    client.get_range(hash, range, sink).await
}

/// Fetches a range of a blob into the file `target`, which must not exist unless `replace`. All of a large blob goes on where an
/// earlier attempt stopped.
pub async fn get_file(
    client: &Client,
    hash: Hash,
    range: ByteRange,
    target: &Path,
    replace: bool,
    how: FileIo,
    progress: &Progress,
) -> Result<Fetched, ClientError> {
    let mut whole = None;
    if range == ByteRange::ALL {
        match client.get_whole(hash).await? {
            Got::Large { size_bytes } if size_bytes >= RESUMED_BYTES_MIN => {
                return get_resumed(client, hash, size_bytes, target, replace, how, progress).await;
            }
            Got::Large { .. } => {}
            Got::Whole(bytes) => whole = Some(bytes),
        }
    }
    let part = PartFile::create(target, replace)?;
    let file = part.open().map_err(ClientError::io(target))?;
    let inner = FileSink::new(file, how).map_err(ClientError::io(target))?;
    let mut sink = Counted { inner, progress: progress.clone() };
    let fetched = match whole {
        Some(bytes) => {
            sink.take(0, &bytes).await.map_err(ClientError::Stream).map_err(of_file(target))?;
            let size_bytes = bytes.len() as u64;
            Fetched { size_bytes, taken_bytes: size_bytes }
        }
        None => client.get_range(hash, range, &mut sink).await.map_err(of_file(target))?,
    };
    sink.inner.finish().await.map_err(ClientError::io(target))?;
    part.publish()?;
    progress.add_file();
    Ok(fetched)
}

/// What a blob is fetched to when it is fetched to `target`, and stays when that is interrupted; `None` when nothing has stayed.
pub fn part_of(target: &Path, hash: &Hash) -> Option<(PathBuf, u64)> {
    let part = part::resumed_name(target, hash).ok()?;
    let bytes = std::fs::symlink_metadata(&part).ok().filter(Metadata::is_file)?.len();
    Some((part, bytes))
}

/// Fetches all of a large blob, beginning behind what an earlier attempt has left.
async fn get_resumed(
    client: &Client,
    hash: Hash,
    size_bytes: u64,
    target: &Path,
    replace: bool,
    how: FileIo,
    progress: &Progress,
) -> Result<Fetched, ClientError> {
    let mut trust_part = true;
    let mut lies = false;
    loop {
        let (part, found_bytes) = match lies {
            false => PartFile::resume(target, replace, &hash)?,
            true => (PartFile::create(target, replace)?, 0),
        };
        let file = part.open().map_err(ClientError::io(target))?;
        // Buffers are written side by side: behind the first that is missing, a killed process may have left others.
        let certain_bytes = found_bytes.saturating_sub((WRITE_BUFFERS * WRITE_BUFFER_BYTES) as u64);
        let held_bytes = if trust_part { certain_bytes / GROUP_BYTES as u64 * GROUP_BYTES as u64 } else { 0 };
        if held_bytes >= size_bytes {
            // What is certain ends before the blob does, so one of the two is wrong, and the size is the node's word: what is held is not
            // given up for it. Otherwise the end is fetched, and its proof is one of the size.
            lies = true;
            continue;
        }
        file.set_len(held_bytes).map_err(ClientError::io(target))?;
        progress.expect(1, size_bytes);
        progress.add_bytes(held_bytes);
        let inner = FileSink::from(file, held_bytes, how).map_err(ClientError::io(target))?;
        let mut sink = Counted { inner, progress: progress.clone() };
        let rest = ByteRange { offset: held_bytes, length: u64::MAX };
        let fetched = client.get_range(hash, rest, &mut sink).await;
        // What has been verified is for the next attempt, whatever ended this one.
        let written = sink.inner.finish().await;
        let fetched = fetched.map_err(of_file(target))?;
        written.map_err(ClientError::io(target))?;
        // The proof of the rest does not say that the part held the blob's beginning.
        if held_bytes > 0 && hash_file(&part).await.map_err(ClientError::io(target))? != hash {
            part.discard();
            if std::mem::replace(&mut trust_part, false) {
                continue;
            }
            return Err(ClientError::HashMismatch(hash));
        }
        part.publish()?;
        progress.add_file();
        return Ok(Fetched { size_bytes: fetched.size_bytes, taken_bytes: size_bytes });
    }
}

/// The hash of what is in a file.
async fn hash_file(part: &PartFile) -> io::Result<Hash> {
    let mut file = part.open()?;
    let hash = tokio::task::spawn_blocking(move || {
        let mut hasher = blake3::Hasher::new();
        io::Seek::rewind(&mut file)?;
        hasher.update_reader(file)?;
        Ok(Hash(*hasher.finalize().as_bytes()))
    });
    hash.await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use metanode_types::limits::CHUNK_BYTES;

    use super::*;

    fn both() -> Vec<FileIo> {
        let mut both = vec![FileIo::Plain];
        both.extend((FileIo::probe() == FileIo::Uring).then_some(FileIo::Uring));
        both
    }

    #[tokio::test]
    async fn what_a_sink_took_a_source_gives_back() {
        let folder = tempfile::tempdir().unwrap();
        for how in both() {
            for size in [0, 1, CHUNK_BYTES, WRITE_BUFFER_BYTES, 9 * WRITE_BUFFER_BYTES + 77] {
                let path = folder.path().join("file");
                let data: Vec<u8> = (0..size).map(|i| (i / 3 % 251) as u8).collect();
                let mut sink = FileSink::new(File::create(&path).unwrap(), how).unwrap();
                for (at, piece) in data.chunks(16_000).enumerate() {
                    sink.take(at as u64 * 16_000, piece).await.unwrap();
                }
                sink.finish().await.unwrap();
                assert!(std::fs::read(&path).unwrap() == data, "{how:?} {size}");
                let mut source = FileSource::new(File::open(&path).unwrap(), how).unwrap();
                let mut read = Vec::new();
                while let Some(chunk) = source.next_chunk().await.unwrap() {
                    assert!(chunk.len() == CHUNK_BYTES || read.len() + chunk.len() == size);
                    read.extend_from_slice(&chunk);
                }
                assert!(read == data, "{how:?} {size}");
            }
        }
    }

    #[tokio::test]
    async fn a_file_that_grows_while_it_is_read_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        for how in both() {
            let path = folder.path().join("file");
            // More than is read ahead, so that the end is read after the change.
            std::fs::write(&path, vec![1; (READ_AHEAD_CHUNKS + 8) * CHUNK_BYTES]).unwrap();
            let mut source = FileSource::new(File::open(&path).unwrap(), how).unwrap();
            source.next_chunk().await.unwrap();
            use std::io::Write as _;
            File::options().append(true).open(&path).unwrap().write_all(b"more").unwrap();
            let end = loop {
                match source.next_chunk().await {
                    Ok(Some(_)) => {}
                    other => break other,
                }
            };
            let error = of_file(&path)(ClientError::Stream(end.unwrap_err()));
            assert!(matches!(error, ClientError::Unsuitable { reason: CHANGED, .. }), "{how:?}: {error}");
        }
    }

    #[tokio::test]
    async fn a_failing_disk_is_an_error_of_the_sink() {
        for how in both() {
            let full = File::options().write(true).open("/dev/full").unwrap();
            let mut sink = FileSink::new(full, how).unwrap();
            let data = vec![0; WRITE_BUFFER_BYTES];
            let mut result = Ok(());
            for at in 0..20 {
                result = sink.take(at, &data).await;
                if result.is_err() {
                    break;
                }
            }
            let result = match result {
                Ok(()) => sink.finish().await,
                failed => failed,
            };
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::StorageFull, "{how:?}");
        }
    }
}
