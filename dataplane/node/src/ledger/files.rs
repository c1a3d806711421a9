//! Where the chain's blobs are: by height, and by arrival.
//!
//! ```text
//! DIR/ledger/chain        the chain's identity, in hexadecimal: what the folder is of
//! DIR/ledger/blocks       addresses of the blocks' blobs, by height from 1
//! DIR/ledger/batches-N    addresses of batches that no block named when they came; the highest N has all that matter
//! DIR/ledger/snapshot-H   what the blocks up to height H come to, see `snapshots`
//! DIR/ledger/outcomes/    what became of transactions, see `outcomes`
//! DIR/ledger/sign/        the sign state, see `metanode-wal`
//! entry of a list:        address 32 | first 8 of BLAKE3(chain 32 | place u64 | address 32)
//! ```
//!
//! The list of blocks is read up to the first entry that does not check. What a crash takes away comes back: a block from the sign state or
//! from others, a batch from those who name it.

use std::{
    cell::{Cell, RefCell},
    io,
    path::{Path, PathBuf},
    rc::Rc,
    sync::Arc,
};

use metanode_crypto::derive;
use metanode_ibft::ChainId;
use metanode_shard::{
    fs::{self, PlainFile},
    run_blocking,
};
use metanode_types::Hash;

const ENTRY: usize = 40;

/// A list of addresses that grows at its end.
#[derive(Debug)]
pub(super) struct Addresses {
    chain: ChainId,
    file: Arc<PlainFile>,
    count: Cell<u64>,
}

fn entry(chain: &ChainId, place: u64, address: &Hash) -> [u8; ENTRY] {
    let check = derive("metanode 2026 ledger address v1", &[&chain.0[..], &place.to_le_bytes(), &address.0].concat());
    let mut entry = [0; ENTRY];
    entry[..32].copy_from_slice(&address.0);
    entry[32..].copy_from_slice(&check[..8]);
    entry
}

impl Addresses {
    /// Opens a list, or begins one, and reads what is in it, up to the first entry that does not check.
    pub(super) async fn open(path: PathBuf, chain: ChainId) -> io::Result<(Self, Vec<Hash>)> {
        let (this, found) = Self::open_whole(path, chain).await?;
        let sound: Vec<Hash> = found.into_iter().map_while(|address| address).collect();
        this.count.set(sound.len() as u64);
        Ok((this, sound))
    }

    /// As [`open`](Self::open), with all entries: `None` for those that don't check. A crash may leave holes between entries that were written
    /// at the same time.
    async fn open_whole(path: PathBuf, chain: ChainId) -> io::Result<(Self, Vec<Option<Hash>>)> {
        let (file, bytes) = run_blocking(move || {
            let file = PlainFile::open_or_create(&path)?;
            fs::sync_folder(path.parent().expect("a list lies in a folder"))?;
            Ok::<_, io::Error>((file, fs::read(&path)?))
        })
        .await?;
        let check = |(place, found): (usize, &[u8])| {
            let address = Hash(found[..32].try_into().expect("it is 32 bytes"));
            (found == entry(&chain, place as u64, &address)).then_some(address)
        };
        let addresses: Vec<Option<Hash>> = bytes.chunks_exact(ENTRY).enumerate().map(check).collect();
        let count = Cell::new(addresses.len() as u64);
        Ok((Self { chain, file: Arc::new(file), count }, addresses))
    }

    /// Adds an address. A crash of the machine may lose it until [`sync`](Self::sync).
    pub(super) async fn push(&self, address: Hash) -> io::Result<()> {
        let place = self.count.get();
        self.count.set(place + 1);
        let (file, entry) = (self.file.clone(), entry(&self.chain, place, &address));
        run_blocking(move || file.write_at(&entry, place * ENTRY as u64)).await
    }

    /// Makes all of them survive a crash of the machine.
    pub(super) async fn sync(&self) -> io::Result<()> {
        let file = self.file.clone();
        run_blocking(move || file.sync()).await
    }
}

/// Batches that no block named when they came. The list begins anew now and then, so that it does not grow for ever: with those that are open
/// then.
#[derive(Debug)]
pub(super) struct Arrivals {
    folder: PathBuf,
    chain: ChainId,
    now: RefCell<(u64, Rc<Addresses>)>,
}

const ARRIVALS: &str = "batches-";

impl Arrivals {
    /// Opens the lists of a folder; what is in them.
    pub(super) async fn open(folder: &Path, chain: ChainId) -> io::Result<(Self, Vec<Hash>)> {
        let numbers = numbers(folder.to_owned(), ARRIVALS).await?;
        let mut all = Vec::new();
        for number in &numbers {
            all.extend(
                Addresses::open_whole(folder.join(format!("{ARRIVALS}{number}")), chain).await?.1.into_iter().flatten(),
            );
        }
        all.sort_unstable();
        all.dedup();
        let next = numbers.last().map_or(1, |last| last + 1);
        let list = Self::begin(folder, chain, next).await?;
        Ok((Self { folder: folder.to_owned(), chain, now: RefCell::new((next, Rc::new(list))) }, all))
    }

    async fn begin(folder: &Path, chain: ChainId, number: u64) -> io::Result<Addresses> {
        Ok(Addresses::open(folder.join(format!("{ARRIVALS}{number}")), chain).await?.0)
    }

    /// One has come, and is on disk.
    pub(super) async fn push(&self, digest: Hash) -> io::Result<()> {
        loop {
            let (number, list) = self.now.borrow().clone();
            list.push(digest).await?;
            // Into the next one too, if that was begun meanwhile without it.
            if self.now.borrow().0 == number {
                return Ok(());
            }
        }
    }

    /// Begins a list with those that are open now, and removes the ones before: what they have beyond that is named by a block, or over.
    pub(super) async fn begin_anew(&self, open: impl FnOnce() -> Vec<Hash>) -> io::Result<()> {
        let number = self.now.borrow().0 + 1;
        let list = Rc::new(Self::begin(&self.folder, self.chain, number).await?);
        *self.now.borrow_mut() = (number, list.clone());
        for digest in open() {
            list.push(digest).await?;
        }
        list.sync().await?;
        let old = numbers(self.folder.clone(), ARRIVALS).await?.into_iter().filter(|old| *old < number);
        let paths: Vec<PathBuf> = old.map(|old| self.folder.join(format!("{ARRIVALS}{old}"))).collect();
        run_blocking(move || paths.iter().try_for_each(fs::remove_file)).await
    }
}

/// The numbers behind `prefix` in the names of a folder's files, the lowest first.
pub(super) async fn numbers(folder: PathBuf, prefix: &'static str) -> io::Result<Vec<u64>> {
    run_blocking(move || {
        let names = fs::names(&folder)?;
        let number = |name: &std::ffi::OsString| name.to_str()?.strip_prefix(prefix)?.parse::<u64>().ok();
        let mut numbers: Vec<u64> = names.iter().filter_map(number).collect();
        numbers.sort_unstable();
        Ok(numbers)
    })
    .await
}

/// How many addresses a list of so many bytes has at most.
pub(super) fn places(bytes: u64) -> u64 {
    bytes.div_ceil(ENTRY as u64)
}

/// The folder of a ledger in a data folder.
pub(crate) fn folder(data: &Path) -> PathBuf {
    data.join("ledger")
}

/// The folder of the sign state in a ledger's folder.
pub(crate) fn sign_folder(ledger: &Path) -> PathBuf {
    ledger.join("sign")
}

/// Makes the folder of a ledger, or sees that it is this chain's: `Err` has the chain that it is of.
pub(crate) fn claim(ledger: &Path, chain: &ChainId) -> io::Result<Result<(), String>> {
    fs::create_folders(ledger)?;
    let path = ledger.join("chain");
    let mine = Hash(chain.0).to_string();
    if fs::exists(&path) {
        let found = String::from_utf8_lossy(&fs::read(&path)?).trim().to_owned();
        return Ok(if found == mine { Ok(()) } else { Err(found) });
    }
    let aside = ledger.join("chain.new");
    let file = PlainFile::create(&aside)?;
    file.write_at(format!("{mine}\n").as_bytes(), 0)?;
    file.sync()?;
    fs::rename(&aside, &path)?;
    fs::sync_folder(ledger)?;
    Ok(Ok(()))
}
