//! What the blocks up to a height come to, so that a restart need not execute them all again.
//!
//! Every so many heights the application's state is exported, piece by piece, while blocks are executed as ever. It counts once the header that
//! carries its hash is final and stored: at a restart it is compared with that, so nothing is believed but what a quorum has signed. Two are
//! kept: should one not be readable, the one before is taken, and without any the chain is executed from its beginning.
//!
//! ```text
//! DIR/ledger/snapshot-H:  records, one behind the other
//! record:                 length u32 | first 16 of BLAKE3(chain 32 | height u64 | place u64 | bytes) | bytes
//! place 0:                root of the application's state 32 | what the ledger keeps, see `metanode_ledger::Snapshot`
//! places 1, 2, ...:       pieces of the application's state
//! last place:             nothing
//! ```

use std::{
    io,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
};

use bytes::Bytes;
use metanode_crypto::derive;
use metanode_ibft::{ChainId, Height};
use metanode_ledger::Snapshot;
use metanode_shard::{
    Companion,
    fs::{self, PlainFile},
    run_blocking,
};
use metanode_types::Hash;

use super::{
    application::Gone,
    blocks::{self, address_of},
    files,
    validator::Validator,
};

const PREFIX: &str = "snapshot-";
/// Behind the name of one that is being written.
const UNFINISHED: &str = ".new";

const CHECK: usize = 16;
const HEAD: usize = 4 + CHECK;

/// Bytes of a record at most: what the ledger keeps of a hundred thousand heights, or a piece of a state.
const RECORD_BYTES_MAX: u32 = 1 << 30;

/// That many are kept.
const KEPT: usize = 2;

/// Bytes that are written before the disk is asked to have them: one sync of all would keep it from everything else.
const SYNC_BYTES: u64 = 8 << 20;

/// Bytes of a snapshot at most: more than an application has in memory. One that goes on for ever is no state.
const BYTES_MAX: u64 = 1 << 40;

fn check(chain: &ChainId, height: Height, place: u64, bytes: &[u8]) -> [u8; CHECK] {
    let head = [&chain.0[..], &height.0.to_le_bytes(), &place.to_le_bytes()].concat();
    let all = [&head[..], bytes].concat();
    *derive("metanode 2026 ledger snapshot v1", &all).first_chunk().expect("a hash is longer")
}

fn path_of(folder: &Path, height: Height) -> PathBuf {
    folder.join(format!("{PREFIX}{}", height.0))
}

/// Removes what a former life has not finished.
pub(super) async fn clean(folder: &Path) -> io::Result<()> {
    let folder = folder.to_owned();
    run_blocking(move || {
        let is_unfinished = |name: &&std::ffi::OsString| {
            name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(UNFINISHED))
        };
        fs::names(&folder)?.iter().filter(is_unfinished).try_for_each(|name| fs::remove_file(folder.join(name)))
    })
    .await
}

/// Heights of the snapshots in a ledger's folder, the highest first.
pub(super) async fn heights(folder: &Path) -> io::Result<Vec<Height>> {
    let numbers = files::numbers(folder.to_owned(), PREFIX).await?;
    Ok(numbers.into_iter().rev().map(Height).collect())
}

/// A snapshot that is read from its beginning.
pub(super) struct Reader {
    chain: ChainId,
    height: Height,
    file: Arc<PlainFile>,
    size: u64,
    offset: u64,
    place: u64,
}

fn damaged(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Reader {
    /// Opens the one of a height: the root of the application's state, and what the ledger keeps.
    pub(super) async fn open(folder: &Path, chain: ChainId, height: Height) -> io::Result<(Self, Hash, Snapshot)> {
        let path = path_of(folder, height);
        let (file, size) = run_blocking(move || {
            let file = PlainFile::open(path)?;
            let size = file.size()?;
            Ok::<_, io::Error>((file, size))
        })
        .await?;
        let mut this = Self { chain, height, file: Arc::new(file), size, offset: 0, place: 0 };
        let first = this.record().await?;
        let (root, kept) = first.split_first_chunk::<32>().ok_or_else(|| damaged("its beginning is too short"))?;
        let snapshot = Snapshot::decode(kept).map_err(|_| damaged("what the ledger keeps can't be read"))?;
        if snapshot.height() != height {
            return Err(damaged("it is of another height than its name says"));
        }
        Ok((this, Hash(*root), snapshot))
    }

    async fn record(&mut self) -> io::Result<Bytes> {
        let (file, offset, left) = (self.file.clone(), self.offset, self.size - self.offset);
        let (found, bytes) = run_blocking(move || {
            let mut head = [0; HEAD];
            if file.read_at(&mut head, offset)? < HEAD {
                return Err(damaged("it ends too early"));
            }
            let [a, b, c, d, check @ ..] = head;
            let length = u32::from_le_bytes([a, b, c, d]);
            if length > RECORD_BYTES_MAX || u64::from(length) + HEAD as u64 > left {
                return Err(damaged("a record is longer than what is left"));
            }
            let mut bytes = vec![0; length as usize];
            file.read_at(&mut bytes, offset + HEAD as u64)?;
            Ok((check, bytes))
        })
        .await?;
        if found != check(&self.chain, self.height, self.place, &bytes) {
            return Err(damaged("a record does not check"));
        }
        self.offset += (HEAD + bytes.len()) as u64;
        self.place += 1;
        Ok(bytes.into())
    }

    /// The next piece of the application's state; `None` at the end.
    pub(super) async fn piece(&mut self) -> io::Result<Option<Bytes>> {
        Ok(Some(self.record().await?).filter(|bytes| !bytes.is_empty()))
    }
}

/// A snapshot that is being written, on a thread of its own: other files are not to wait for it.
struct Writer<'a> {
    scribe: &'a Companion,
    chain: ChainId,
    height: Height,
    path: PathBuf,
    file: Arc<PlainFile>,
    offset: u64,
    synced: u64,
    place: u64,
}

impl<'a> Writer<'a> {
    async fn begin(scribe: &'a Companion, folder: &Path, chain: ChainId, height: Height) -> io::Result<Self> {
        let path = path_of(folder, height);
        let aside = aside(&path);
        let file = Arc::new(scribe.run(move || PlainFile::create(aside)).await?);
        Ok(Self { scribe, chain, height, path, file, offset: 0, synced: 0, place: 0 })
    }

    async fn record(&mut self, bytes: Bytes) -> io::Result<()> {
        let (chain, height, place) = (self.chain, self.height, self.place);
        let (file, offset) = (self.file.clone(), self.offset);
        self.offset += (HEAD + bytes.len()) as u64;
        self.place += 1;
        if self.offset > BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {BYTES_MAX} bytes")));
        }
        let syncs = self.offset - self.synced >= SYNC_BYTES;
        if syncs {
            self.synced = self.offset;
        }
        let write = move || {
            let check = check(&chain, height, place, &bytes);
            let head = [&(bytes.len() as u32).to_le_bytes()[..], &check].concat();
            file.write_at(&head, offset)?;
            file.write_at(&bytes, offset + HEAD as u64)?;
            if syncs { file.sync() } else { Ok(()) }
        };
        self.scribe.run(write).await
    }

    /// From now on it counts.
    async fn finish(mut self) -> io::Result<()> {
        self.record(Bytes::new()).await?;
        let (file, path) = (self.file, self.path);
        let finish = move || {
            file.sync()?;
            fs::rename(aside(&path), &path)?;
            fs::sync_folder(path.parent().expect("it lies in a folder"))
        };
        self.scribe.run(finish).await
    }
}

fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(UNFINISHED);
    name.into()
}

/// Why there is no snapshot of a height.
#[derive(Debug, thiserror::Error)]
enum NotMade {
    #[error("{0}")]
    Gone(#[from] Gone),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Block(#[from] blocks::ReadError),
    #[error("it is not what the header of height {} says", .0.0)]
    NotCarried(Height),
}

/// Makes the one of a height that was executed just now. Until it is exported, the application keeps the state of that height.
pub(super) async fn make(this: Rc<Validator>, snapshot: Snapshot, root: Hash) {
    let height = snapshot.height();
    let made = write(&this, snapshot, root).await;
    this.exporting.set(None);
    this.snapshotting.set(false);
    match made {
        Ok(()) => tracing::debug!(height = height.0, "a snapshot"),
        Err(error) => {
            tracing::warn!("no snapshot of height {}: {error}", height.0);
            let aside = aside(&path_of(&this.folder, height));
            this.scribe.run(move || fs::remove_file(aside)).await.ok(); // it may not be there; if it is, a restart removes it
        }
    }
}

async fn write(this: &Rc<Validator>, snapshot: Snapshot, root: Hash) -> Result<(), NotMade> {
    let height = snapshot.height();
    // Whoever goes on from here knows what blocks above the snapshot name, and could not tell what blocks below it have named.
    this.arrivals.begin_anew(|| this.replica.borrow().board().open().collect()).await?;
    let mut writer = Writer::begin(&this.scribe, &this.folder, this.chain, height).await?;
    writer.record([&root.0[..], &snapshot.encode()].concat().into()).await?;
    let mut after = Vec::new();
    loop {
        let (piece, next) = this.app.export(height, after).await?;
        if !piece.is_empty() {
            writer.record(piece).await?;
        }
        match next {
            Some(next) => after = next,
            None => break,
        }
    }
    this.exporting.set(None);
    let carrier = Height(height.0 + this.genesis.lag);
    this.stored.reach(carrier).await;
    let address = address_of(this, carrier).expect("it is stored");
    let (block, _) = blocks::read(&this.store, address).await?;
    if !snapshot.is_carried_by(this.genesis.lag, &root, &block.header) {
        return Err(NotMade::NotCarried(carrier));
    }
    // Whoever begins behind it knows of what came before by these.
    this.outcomes.keep_up_to(height).await;
    this.block_list.sync().await?;
    writer.finish().await?;
    let old = heights(&this.folder).await?.into_iter().skip(KEPT).map(|height| path_of(&this.folder, height));
    let old: Vec<PathBuf> = old.collect();
    Ok(run_blocking(move || old.iter().try_for_each(fs::remove_file)).await?)
}
