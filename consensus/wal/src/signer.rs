//! The right to sign for a validator.

use std::path::{Path, PathBuf};

use metanode_crypto::Identity;
use metanode_shard::fs::{self, FileLock};
use metanode_types::NodeKey;

use crate::{WalError, format::Owner, wal::failed};

/// Signs for one validator. The key may be elsewhere (a file's is in memory; a security module's never is).
pub trait Signer: std::fmt::Debug {
    /// Whose signatures they are.
    fn key(&self) -> NodeKey;

    /// Signs `domain ‖ 0 ‖ message`.
    fn sign(&self, domain: &str, message: &[u8]) -> Result<[u8; 64], SignerError>;
}

/// A signature could not be had. Nothing was said; the protocol goes on without it.
#[derive(Debug, Clone, thiserror::Error)]
#[error("can't sign: {0}")]
pub struct SignerError(pub String);

/// A key whose file was read.
impl Signer for Identity {
    fn key(&self) -> NodeKey {
        self.public()
    }

    fn sign(&self, domain: &str, message: &[u8]) -> Result<[u8; 64], SignerError> {
        Ok(Identity::sign(self, domain, message))
    }
}

/// A key, what it has said, and the exclusive right to go on: while this lives, no other process has the folder.
#[derive(Debug)]
pub struct SignState {
    folder: PathBuf,
    chain: [u8; 32],
    signer: Box<dyn Signer + Send + Sync>,
    _lock: FileLock,
}

impl SignState {
    /// Takes the folder, which is made if it is not there.
    pub fn acquire(
        folder: &Path,
        chain: [u8; 32],
        signer: impl Signer + Send + Sync + 'static,
    ) -> Result<Self, WalError> {
        if !fs::exists(folder) {
            fs::create_folders(folder).map_err(failed("make", folder))?;
            // A folder that a power cut takes away would take with it what was said.
            for around in folder.ancestors().skip(1).filter(|around| !around.as_os_str().is_empty()) {
                fs::sync_folder(around).map_err(failed("sync", around))?;
            }
        }
        let path = folder.join("lock");
        let lock = FileLock::try_acquire(&path).map_err(failed("lock", &path))?;
        let Some(lock) = lock else { return Err(WalError::InUse { path: folder.to_owned() }) };
        Ok(Self { folder: folder.to_owned(), chain, signer: Box::new(signer), _lock: lock })
    }

    /// Where it lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whose it is.
    pub fn owner(&self) -> Owner {
        Owner { chain: self.chain, key: self.signer.key() }
    }

    /// Signs. The caller puts it on disk before it leaves.
    pub fn sign(&self, domain: &str, message: &[u8]) -> Result<[u8; 64], SignerError> {
        self.signer.sign(domain, message)
    }
}
