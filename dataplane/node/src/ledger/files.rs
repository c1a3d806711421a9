//! Where the chain's blobs are: by height, and by arrival.
//!
//! ```text
//! DIR/ledger/chain        the chain's identity, in hexadecimal: what the folder is of
//! DIR/ledger/blocks       addresses of the blocks' blobs, by height from 1
//! DIR/ledger/batches      addresses of batches that no block named when they came
//! DIR/ledger/sign/        the sign state, see `metanode-wal`
//! entry of a list:        address 32 | first 8 of BLAKE3(chain 32 | place u64 | address 32)
//! ```
//!
//! A list is read up to the first entry that does not check. What a crash takes away of it comes back: a block from the sign state or from
//! others, a batch from those who name it.

use std::{
    cell::Cell,
    io,
    path::{Path, PathBuf},
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
    /// Opens a list, or begins one, and reads what is in it.
    pub(super) async fn open(path: PathBuf, chain: ChainId) -> io::Result<(Self, Vec<Hash>)> {
        let (file, bytes) = run_blocking(move || {
            let file = PlainFile::open_or_create(&path)?;
            fs::sync_folder(path.parent().expect("a list lies in a folder"))?;
            Ok::<_, io::Error>((file, fs::read(&path)?))
        })
        .await?;
        let mut addresses = Vec::new();
        for (place, found) in bytes.chunks_exact(ENTRY).enumerate() {
            let address = Hash(found[..32].try_into().expect("it is 32 bytes"));
            if found != entry(&chain, place as u64, &address) {
                break;
            }
            addresses.push(address);
        }
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

    /// Puts others in place of all that are in it.
    pub(super) async fn replace(&self, addresses: &[Hash]) -> io::Result<()> {
        let bytes: Vec<u8> =
            addresses.iter().enumerate().flat_map(|(place, it)| entry(&self.chain, place as u64, it)).collect();
        self.count.set(addresses.len() as u64);
        let file = self.file.clone();
        run_blocking(move || {
            file.write_at(&bytes, 0)?;
            file.set_size(bytes.len() as u64)?;
            file.sync()
        })
        .await
    }

    /// Makes all of them survive a crash of the machine.
    pub(super) async fn sync(&self) -> io::Result<()> {
        let file = self.file.clone();
        run_blocking(move || file.sync()).await
    }
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
