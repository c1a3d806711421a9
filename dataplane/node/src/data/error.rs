use std::{
    io,
    path::{Path, PathBuf},
};

use metanode_crypto::KeyFileError;

use crate::config::ConfigError;

/// Why a data folder can't be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// Not a data folder, and not one that may be made into one.
    #[error("{}: not a data folder: {found}", path.display())]
    NotADataFolder {
        /// The folder.
        path: PathBuf,
        /// What is there instead.
        found: &'static str,
    },
    /// Written by a later version; nothing was touched.
    #[error(
        "the data folder has layout {found}, this build knows up to {supported}: use the version that wrote it, or later"
    )]
    NewerFormat {
        /// Its layout.
        found: u32,
        /// The latest that this build knows.
        supported: u32,
    },
    /// The `format` file says something else.
    #[error("{}: not a format file of a data folder", path.display())]
    BadFormat {
        /// The file.
        path: PathBuf,
    },
    /// A node runs on it.
    #[error("{}: in use by a running node{}", path.display(), display_pid(*pid))]
    Locked {
        /// The folder.
        path: PathBuf,
        /// The node's process number, if it left one.
        pid: Option<u32>,
    },
    /// It can't be written.
    #[error("{}: can't be written: {source}", path.display())]
    ReadOnly {
        /// What was to be written.
        path: PathBuf,
        /// `EROFS`, `EACCES` or `EPERM`.
        source: io::Error,
    },
    /// Others than its owner can read a key.
    #[error("{}: mode {mode:04o} lets others at a private key; it must be 0600", path.display())]
    KeyMode {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A key file without a key.
    #[error("{}: {source}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: KeyFileError,
    },
    /// The configuration is not taken.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The operating system gave no random numbers for a key.
    #[error("no random numbers from the operating system: {0}")]
    Random(getrandom::Error),
    /// Anything else.
    #[error("can't {operation} {}: {source}", path.display())]
    Io {
        /// What was tried: a verb.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// How it failed.
        source: io::Error,
    },
}

fn display_pid(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

impl DataError {
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }

    /// Like [`DataError::io`], for what writes: tells "can't be written" from other failures.
    pub(super) fn write(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| match source.kind() {
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Self::ReadOnly { path, source },
            _ => Self::Io { operation, path, source },
        }
    }
}
