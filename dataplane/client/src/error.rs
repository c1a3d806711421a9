//! What can go wrong, by what the caller can do about it.

use std::{io, net::SocketAddr, path::PathBuf};

use metanode_crypto::tls::TlsConfigError;
use metanode_types::{Hash, NodeKey};
use metanode_wire::{FrameError, ManifestError, Refusal, RefusalCode};

/// Why an operation of the client failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No address of the ticket answered.
    #[error("no answer from the node at {}", list(.0))]
    Unreachable(Vec<(SocketAddr, String)>),
    /// Nothing came in time; the request may or may not have been carried out.
    #[error("no answer in time while {0}")]
    Timeout(&'static str),
    /// Somebody answered who does not hold the key that the ticket names.
    #[error("the node at {address} does not hold the key {expected}")]
    WrongNodeKey {
        /// Who was expected.
        expected: NodeKey,
        /// Where somebody else answered.
        address: SocketAddr,
    },
    /// The node speaks another protocol, or another version of this one.
    #[error("the node does not speak this protocol: {0}")]
    UnsupportedProtocol(String),
    /// The node said no; nothing was done.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// What arrived does not have the address that was asked for. It was dropped.
    #[error("what the node sent does not match the address {0}")]
    HashMismatch(Hash),
    /// The connection ended. What was on the way may or may not have been carried out.
    #[error("the connection was lost: {0}")]
    ConnectionLost(String),
    /// The node broke the protocol; the connection was closed.
    #[error("the node broke the protocol: {0}")]
    Protocol(#[from] FrameError),
    /// A folder's manifest is not one, or a folder can't become one.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// A file or folder of this machine.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The source or sink of a transfer failed.
    #[error("the local side of the transfer failed: {0}")]
    Stream(io::Error),
    /// The target is there already, and replacing it was not asked for.
    #[error("{} exists already", .0.display())]
    TargetExists(PathBuf),
    /// A file or folder that can't be stored or written as it is.
    #[error("{}: {reason}", path.display())]
    Unsuitable {
        /// Which.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// No socket could be made.
    #[error("no UDP socket: {0}")]
    Socket(io::Error),
    /// The configuration makes no TLS.
    #[error(transparent)]
    Tls(#[from] TlsConfigError),
}

impl ClientError {
    /// The refusal's code, if it is one.
    pub fn refusal_code(&self) -> Option<RefusalCode> {
        match self {
            Self::Refused(refusal) => Some(refusal.code),
            _ => None,
        }
    }

    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

fn list(tried: &[(SocketAddr, String)]) -> String {
    tried.iter().map(|(address, why)| format!("{address} ({why})")).collect::<Vec<_>>().join(", ")
}

/// Why a connection is of no further use; every request on it fails with a copy.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    Lost(quinn::ConnectionError),
    Protocol(FrameError),
    /// A stream that lives as long as the connection ended.
    LaneEnded,
}

impl From<Failure> for ClientError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Lost(error) => error.into(),
            Failure::Protocol(error) => Self::Protocol(error),
            Failure::LaneEnded => Self::ConnectionLost("the node ended a stream that carries requests".into()),
        }
    }
}

impl From<quinn::ConnectionError> for ClientError {
    fn from(error: quinn::ConnectionError) -> Self {
        match error {
            quinn::ConnectionError::TimedOut => Self::ConnectionLost("nothing was heard from the node".into()),
            quinn::ConnectionError::VersionMismatch => Self::UnsupportedProtocol("another QUIC version".into()),
            quinn::ConnectionError::LocallyClosed => Self::ConnectionLost("closed by this client".into()),
            quinn::ConnectionError::Reset => Self::ConnectionLost("the node has restarted".into()),
            quinn::ConnectionError::ApplicationClosed(closed) if closed.error_code.into_inner() == 0 => {
                Self::ConnectionLost("the node closed the connection".into())
            }
            quinn::ConnectionError::ApplicationClosed(closed) => refused_by_code(closed.error_code.into_inner()),
            other => Self::ConnectionLost(other.to_string()),
        }
    }
}

impl From<quinn::WriteError> for ClientError {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::ConnectionLost(lost) => lost.into(),
            quinn::WriteError::Stopped(code) => refused_by_code(code.into_inner()),
            other => Self::ConnectionLost(other.to_string()),
        }
    }
}

impl From<quinn::ReadError> for ClientError {
    fn from(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::ConnectionLost(lost) => lost.into(),
            quinn::ReadError::Reset(code) => refused_by_code(code.into_inner()),
            other => Self::ConnectionLost(other.to_string()),
        }
    }
}

/// A stream or connection that the node ends out of order carries the number of a refusal as its code.
fn refused_by_code(code: u64) -> ClientError {
    match u16::try_from(code).ok().and_then(RefusalCode::from_u16) {
        Some(code) => ClientError::Refused(code.into()),
        None => ClientError::ConnectionLost(format!("the node ended it with code {code}")),
    }
}
