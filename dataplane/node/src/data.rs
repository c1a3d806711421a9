//! The data folder of a node: everything it owns on disk.
//!
//! ```text
//! DIR/                 mode 0700
//!   format             "metanode-data 1": which layout this is; written last, so its presence says that the rest is there
//!   node.key           who the node is (PKCS#8 PEM, mode 0600)
//!   operator.key       who may write on a fresh node (PKCS#8 PEM, mode 0600)
//!   metanode.toml      the configuration, with every field explained
//!   lock               flock(2) held by the running node; its process number inside
//!   store/             the relay store
//!   genesis.json       the chain that the node takes part in, if any
//!   ledger/            its replica: lists of blocks and batches, the sign state
//!   admin.sock         the local socket, while a node runs
//!   admin.path         where the local socket is instead, when DIR is too long for a socket address
//! ```
//!
//! Invariants: a key is never overwritten and never accepted when others can read it; a folder of a later layout is not
//! touched; files appear whole (written aside, synced, renamed without replacing) or not at all.

mod error;
mod files;
mod lock;
mod socket;

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
};

use metanode_crypto::Identity;

pub(crate) use self::socket::SOCKET_PATH_BYTES_MAX;
pub use self::{error::DataError, lock::DataLock};
use crate::config::Config;

/// The layout that this build writes, and the latest that it reads.
pub const FORMAT: u32 = 1;

const FORMAT_FILE: &str = "format";
const FORMAT_WORD: &str = "metanode-data";
/// The genesis of a chain, by default.
pub const GENESIS_FILE: &str = "genesis.json";

const NODE_KEY_FILE: &str = "node.key";
const OPERATOR_KEY_FILE: &str = "operator.key";
const CONFIG_FILE: &str = "metanode.toml";

/// An initialised data folder. Any number of processes may hold one; [`DataFolder::lock`] is the running node's.
#[derive(Debug)]
pub struct DataFolder {
    path: PathBuf,
    node: Identity,
    operator: Identity,
}

impl DataFolder {
    /// Opens the folder at `path`, or makes it when there is nothing there (or an empty folder).
    ///
    /// A folder with other contents is refused: a mistyped path must not fill somebody's home.
    pub fn open_or_init(path: &Path) -> Result<Self, DataError> {
        match Self::open(path) {
            Err(DataError::NotADataFolder { .. }) => {
                init(path)?;
                Self::open(path)
            }
            opened => opened,
        }
    }

    /// Opens an existing folder: checks the layout's version and reads the keys. Writes nothing.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let path = match fs::canonicalize(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(DataError::NotADataFolder { path: path.to_owned(), found: "nothing is there" });
            }
            resolved => resolved.map_err(DataError::io("find", path))?,
        };
        check_format(&path)?;
        let node = files::read_key(&path.join(NODE_KEY_FILE))?;
        let operator = files::read_key(&path.join(OPERATOR_KEY_FILE))?;
        Ok(Self { path, node, operator })
    }

    /// Where it is, absolute and without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The node's key pair.
    pub fn node_identity(&self) -> &Identity {
        &self.node
    }

    /// The local operator's key pair: what the CLI shows to this machine's own node.
    pub fn operator_identity(&self) -> &Identity {
        &self.operator
    }

    /// The configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.path.join(CONFIG_FILE)
    }

    /// The configuration; the defaults with the operator as writer when the file was removed.
    pub fn config(&self) -> Result<Config, DataError> {
        let path = self.config_path();
        match path.try_exists() {
            Ok(false) => Ok(fresh_config(&self.operator)),
            _ => Ok(Config::load(&path)?),
        }
    }

    /// Puts another configuration in place of the one in the file; the node reads it at its next start.
    pub fn set_config(&self, config: &Config) -> Result<(), DataError> {
        config.validate()?;
        files::replace(&self.config_path(), config.to_toml_string().as_bytes(), 0o600)
    }

    /// Puts the genesis of a chain into the folder, under the name that [`GENESIS_FILE`] is. Another one that is there is not replaced.
    pub fn set_genesis(&self, text: &str) -> Result<(), DataError> {
        files::create(&self.path.join(GENESIS_FILE), text.as_bytes(), 0o600)
    }

    /// The folder of the relay store.
    pub fn store_path(&self) -> PathBuf {
        self.path.join("store")
    }

    /// Where the running node's local socket is, or would be.
    pub fn admin_socket(&self) -> PathBuf {
        socket::location(&self.path)
    }

    /// Takes the folder for a running node. Dropping the lock, or the end of the process however it comes, gives it back.
    pub fn lock(&self) -> Result<DataLock, DataError> {
        DataLock::acquire(&self.path)
    }

    /// Decides where this run's socket goes, and leaves word of it when that is not in the folder.
    pub(crate) fn place_admin_socket(&self) -> Result<PathBuf, DataError> {
        socket::place(&self.path)
    }
}

/// Makes a new key pair at `path` (mode 0600), unless there is something already.
pub fn create_key(path: &Path) -> Result<(), DataError> {
    files::create_key(path)
}

/// Reads a key pair; refuses a file that others than its owner can use.
pub fn read_key(path: &Path) -> Result<Identity, DataError> {
    files::read_key(path)
}

/// Whether a node holds the lock of the folder at `path`, and the number of its process if it left one.
///
/// Asks by a shared lock of a microsecond; a node that starts at that moment tries again, see [`DataLock`].
pub fn is_locked(path: &Path) -> Result<Option<Option<u32>>, DataError> {
    lock::holder(path)
}

/// Where the local socket of the data folder at `path` is, without reading its keys.
pub(crate) fn admin_socket_of(path: &Path) -> Result<PathBuf, DataError> {
    match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(socket::location(path)),
        resolved => Ok(socket::location(&resolved.map_err(DataError::io("find", path))?)),
    }
}

fn check_format(path: &Path) -> Result<(), DataError> {
    let file = path.join(FORMAT_FILE);
    let text = match files::read_small(&file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(DataError::NotADataFolder { path: path.to_owned(), found: "there is no `format` file in it" });
        }
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(DataError::NotADataFolder { path: path.to_owned(), found: "it is not a folder" });
        }
        read => read.map_err(DataError::io("read", &file))?,
    };
    let number = text.strip_prefix(FORMAT_WORD).map(str::trim).and_then(|number| number.parse::<u32>().ok());
    match number {
        Some(found) if found > FORMAT => Err(DataError::NewerFormat { found, supported: FORMAT }),
        Some(1..=FORMAT) => Ok(()),
        _ => Err(DataError::BadFormat { path: file }),
    }
}

/// Makes a folder, or completes one whose making was interrupted. Two at once take turns by the lock.
fn init(path: &Path) -> Result<(), DataError> {
    let made = match fs::DirBuilder::new().mode(0o700).recursive(true).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(DataError::NotADataFolder { path: path.to_owned(), found: "it is not a folder" });
        }
        made => made,
    };
    made.map_err(DataError::write("make", path))?;
    refuse_foreign_contents(path)?;
    let _turn = DataLock::acquire(path)?;
    if path.join(FORMAT_FILE).exists() {
        return Ok(()); // another process was faster
    }
    files::create_key(&path.join(NODE_KEY_FILE))?;
    files::create_key(&path.join(OPERATOR_KEY_FILE))?;
    let operator = files::read_key(&path.join(OPERATOR_KEY_FILE))?;
    files::create(&path.join(CONFIG_FILE), fresh_config(&operator).to_toml_string().as_bytes(), 0o600)?;
    files::create(&path.join(FORMAT_FILE), format!("{FORMAT_WORD} {FORMAT}\n").as_bytes(), 0o600)
}

fn fresh_config(operator: &Identity) -> Config {
    let mut config = Config::default();
    config.access.writers.push(operator.public());
    config
}

/// Only what an interrupted `init` leaves may be there.
fn refuse_foreign_contents(path: &Path) -> Result<(), DataError> {
    let own = [FORMAT_FILE, NODE_KEY_FILE, OPERATOR_KEY_FILE, CONFIG_FILE, lock::FILE, "lost+found"];
    for entry in fs::read_dir(path).map_err(DataError::io("list", path))? {
        let name = entry.map_err(DataError::io("list", path))?.file_name();
        let name = name.to_string_lossy();
        if !own.iter().any(|own| *own == name || files::is_aside_of(&name, own)) {
            let found = "it is not empty and no data folder";
            return Err(DataError::NotADataFolder { path: path.to_owned(), found });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
