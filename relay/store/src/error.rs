use std::{io, path::PathBuf};

use metanode_blob::partition::OpError;
use metanode_log::Failure;
use metanode_types::Hash;

/// Why the store did not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No such blob or tag.
    #[error("not found")]
    NotFound,
    /// The bytes have another hash than they were announced with.
    #[error("the bytes do not match the hash")]
    HashMismatch,
    /// Tags, folders or uploads in progress refer to it.
    #[error("{references} references are left")]
    InUse {
        /// How many.
        references: u32,
    },
    /// The node itself needs it.
    #[error("the node itself needs it")]
    Kept,
    /// Larger than a blob can be.
    #[error("larger than a blob can be")]
    TooLarge,
    /// No room; reads and removals work.
    #[error("the disk is full")]
    DiskFull,
    /// The index has reached its cap.
    #[error("the index is full")]
    IndexFull,
    /// No writes, and why.
    #[error("the store is read-only: {0}")]
    ReadOnly(String),
    /// The disk failed, and how.
    #[error("the disk failed: {0}")]
    Storage(String),
    /// What is on disk does not have its hash.
    #[error("the stored copy is corrupt")]
    Corrupt,
    /// The range starts behind the end.
    #[error("the range starts behind the end")]
    BadRange,
    /// A folder names a blob that is not here.
    #[error("a folder refers to {0}, which is not stored")]
    MissingChild(Hash),
    /// The request makes no sense.
    #[error("{0}")]
    Malformed(String),
    /// Too much at once.
    #[error("busy")]
    Busy,
    /// The store is being closed.
    #[error("the node is stopping")]
    ShuttingDown,
}

impl From<OpError> for StoreError {
    fn from(error: OpError) -> Self {
        match error {
            OpError::NotFound => Self::NotFound,
            OpError::InUse { references } => Self::InUse { references },
            OpError::Kept => Self::Kept,
            OpError::IndexFull => Self::IndexFull,
            OpError::Log(Failure::NoSpace) => Self::DiskFull,
            OpError::Log(Failure::Io) => Self::Storage("a write to the log failed".into()),
            OpError::Log(Failure::Unknown) => {
                Self::Storage("a write to the log failed; whether it counts shows after a restart".into())
            }
            OpError::Log(Failure::ReadOnly) => Self::ReadOnly("writes to the log failed repeatedly".into()),
        }
    }
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Written by a later version.
    #[error("the store has format {found}, this build reads up to {supported}")]
    NewerFormat {
        /// In the folder.
        found: u32,
        /// Here.
        supported: u32,
    },
    /// The folder can't be written.
    #[error("the folder {} is read-only", .0.display())]
    ReadOnly(PathBuf),
    /// No room for the first segments.
    #[error("no room in {}", .0.display())]
    DiskFull(PathBuf),
    /// A file is not what it must be.
    #[error("{}: {what}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// Anything else the operating system said.
    #[error("{}: {error}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// What it said.
        error: io::Error,
    },
}

impl OpenError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |error| match error.kind() {
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied => Self::ReadOnly(path),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull(path),
            _ => Self::Io { path, error },
        }
    }
}

/// What a failed write means to the log.
pub(crate) fn failure(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Failure::NoSpace,
        _ => Failure::Io,
    }
}
