//! Exit codes, and how errors become them and a hint.

use std::{error::Error, fmt::Display, io};

use metanode_client::ClientError;
use metanode_node::{NodeError, admin::AdminError, config::ConfigError, data::DataError, ledger::LedgerError};
use metanode_store::OpenError;
use metanode_wire::{ManifestError, Refusal, RefusalCode, TicketError};

use crate::output::visible;

/// The exit codes, as `--help` shows them. [`Exit`] has the numbers.
pub(crate) const TABLE: &str = "\
Exit codes:
  0    done
  1    another error
  2    the command line can't be understood
  3    no such blob, tag, file or entry
  4    not permitted for this key or user
  5    integrity: what arrived or is stored does not match its hash
  6    the node can't be reached, has another key or speaks another protocol
  7    busy, or no answer in time
  8    no room: disk or index full
  9    the data folder can't be used: in use, of a later version, read-only
  10   still referred to by a tag or a folder
  130  interrupted";

/// What the process ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    Other = 1,
    Usage = 2,
    NotFound = 3,
    NotPermitted = 4,
    Integrity = 5,
    Unreachable = 6,
    Busy = 7,
    NoRoom = 8,
    DataFolder = 9,
    InUse = 10,
    Interrupted = 130,
    /// Standard output was closed: as if SIGPIPE had ended the process.
    Pipe = 141,
}

impl Exit {
    /// What a process of this program ended with.
    pub(crate) fn from_code(code: i32) -> Option<Self> {
        const ALL: [Exit; 12] = [
            Exit::Other,
            Exit::Usage,
            Exit::NotFound,
            Exit::NotPermitted,
            Exit::Integrity,
            Exit::Unreachable,
            Exit::Busy,
            Exit::NoRoom,
            Exit::DataFolder,
            Exit::InUse,
            Exit::Interrupted,
            Exit::Pipe,
        ];
        ALL.into_iter().find(|exit| *exit as i32 == code)
    }
}

/// An error on its way to the user.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    /// What could not be done, then why, outermost first.
    pub(crate) messages: Vec<String>,
    pub(crate) hint: Option<String>,
    /// It is the node's doing, or the network's: another node may do better.
    pub(crate) is_of_the_node: bool,
    /// The connection has gone, which says nothing about the next one to the same node.
    pub(crate) is_of_the_connection: bool,
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn new(exit: Exit, message: impl Display) -> Self {
        Self {
            exit,
            messages: vec![message.to_string()],
            hint: None,
            is_of_the_node: false,
            is_of_the_connection: false,
        }
    }

    pub(crate) fn usage(message: impl Display) -> Self {
        Self::new(Exit::Usage, message)
    }

    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }

    /// Says first what was being done.
    pub(crate) fn context(mut self, what: impl Display) -> Self {
        self.messages.insert(0, what.to_string());
        self
    }

    fn of(error: &(dyn Error + 'static), exit: Exit) -> Self {
        let mut messages = vec![error.to_string()];
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            // Many messages end with their cause's; saying it twice helps nobody.
            if !messages.iter().any(|message| message.contains(&text)) {
                messages.push(text);
            }
            source = cause.source();
        }
        Self { exit, messages, hint: None, is_of_the_node: false, is_of_the_connection: false }
    }

    /// The lines for standard error.
    pub(crate) fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (at, message) in self.messages.iter().enumerate() {
            let message = visible(message).replace('\n', "\n  ");
            lines.push(if at == 0 { format!("error: {message}") } else { format!("  caused by: {message}") });
        }
        lines.extend(self.hint.iter().map(|hint| format!("hint: {}", visible(hint))));
        lines
    }
}

/// On one line, for the parser of the command line.
impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.messages.join(": "))?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

impl Error for Failure {}

/// For errors of the file system that name their file.
pub(crate) fn io(what: impl Display) -> impl FnOnce(io::Error) -> Failure {
    move |error| Failure::of(&error, of_io(&error)).context(what)
}

fn of_io(error: &io::Error) -> Exit {
    match error.kind() {
        io::ErrorKind::NotFound => Exit::NotFound,
        io::ErrorKind::PermissionDenied => Exit::NotPermitted,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Exit::NoRoom,
        io::ErrorKind::BrokenPipe => Exit::Pipe,
        _ => Exit::Other,
    }
}

fn of_refusal(refusal: &Refusal) -> (Exit, Option<String>) {
    let (exit, hint) = match refusal.code {
        RefusalCode::NotFound => {
            (Exit::NotFound, "`metanode ls` shows what the node has, `metanode ls --tags` its tags")
        }
        RefusalCode::Forbidden => (
            Exit::NotPermitted,
            "the node's operator adds your key (`metanode id`) to `access` in its metanode.toml and restarts it",
        ),
        RefusalCode::TooLarge => (Exit::Other, "split it: a blob has at most 4 TiB, a folder a million entries"),
        RefusalCode::HashMismatch => (Exit::Integrity, "the source may have changed meanwhile: put it again"),
        RefusalCode::Corrupt => (Exit::Integrity, "putting the same content again replaces the bad copy"),
        RefusalCode::InUse => (
            Exit::InUse,
            "remove what refers to it first: tags (`metanode ls --tags`) with `metanode tag rm`, folders with `metanode rm`; what the ledger needs stays",
        ),
        RefusalCode::DiskFull => (
            Exit::NoRoom,
            "free space on the node's disk, or remove blobs (`metanode rm`): reading and removing still work",
        ),
        RefusalCode::IndexFull => {
            (Exit::NoRoom, "raise `store.index_entries_max` in the node's metanode.toml and restart it")
        }
        RefusalCode::ReadOnly => (Exit::DataFolder, "`metanode status` says why; reads still work"),
        RefusalCode::Storage => (Exit::Other, "look at the node's log (node.log in its data folder) and at its disk"),
        RefusalCode::BadRange => (Exit::Usage, "`metanode stat` shows the size"),
        RefusalCode::MissingChild => (
            Exit::NotFound,
            "put the folder again as a whole: its files were removed before the folder referred to them",
        ),
        RefusalCode::UnsupportedVersion | RefusalCode::Malformed | RefusalCode::NotSupported => (
            Exit::Unreachable,
            "this node does not do that, or client and node differ in version (`metanode --version` on both)",
        ),
        RefusalCode::ShuttingDown => (Exit::Unreachable, "start the node again with `metanode start`"),
        RefusalCode::Busy => {
            let again =
                format!("the node has too much to do: try again in {} ms or later", refusal.retry_after_ms.max(100));
            return (Exit::Busy, Some(again));
        }
    };
    (exit, Some(hint.into()))
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let (exit, hint): (_, Option<String>) = match &error {
            ClientError::Unreachable(_) => (
                Exit::Unreachable,
                Some("is the node running (`metanode status` there), and does the way to it let UDP through?".into()),
            ),
            ClientError::Timeout(_) => {
                (Exit::Busy, Some("try again; `metanode status` shows whether the node lives".into()))
            }
            ClientError::WrongNodeKey { .. } => (
                Exit::Unreachable,
                Some("another node has that address now: get a fresh ticket from its operator".into()),
            ),
            ClientError::UnsupportedProtocol(_) | ClientError::Protocol(_) => (
                Exit::Unreachable,
                Some("client and node differ in version: `metanode --version` on both machines".into()),
            ),
            ClientError::Refused(refusal) => of_refusal(refusal),
            ClientError::HashMismatch(_) => (
                Exit::Integrity,
                Some(
                    "nothing wrong was written; try another node that has it, and tell the operator of this one".into(),
                ),
            ),
            ClientError::ConnectionLost(_) => {
                (Exit::Unreachable, Some("the same command again goes on where it stopped".into()))
            }
            ClientError::Manifest(ManifestError::Magic) => {
                (Exit::Other, Some("it is a plain blob, so it has no paths in it: name it alone".into()))
            }
            ClientError::Manifest(_) => (Exit::Integrity, None),
            ClientError::Io { source, .. } => (of_io(source), None),
            ClientError::Stream(source) => (of_io(source), None),
            ClientError::TargetExists(_) => {
                (Exit::Other, Some("name another target, or replace it with --force".into()))
            }
            ClientError::Unsuitable { .. } => (Exit::Other, None),
            ClientError::Socket(source) => (of_io(source), None),
            ClientError::Tls(_) => (Exit::Other, None),
        };
        let is_of_the_connection = matches!(&error, ClientError::ConnectionLost(_) | ClientError::Timeout(_));
        let is_of_the_node = match &error {
            ClientError::Unreachable(_)
            | ClientError::Timeout(_)
            | ClientError::WrongNodeKey { .. }
            | ClientError::UnsupportedProtocol(_)
            | ClientError::Protocol(_)
            | ClientError::Refused(_)
            | ClientError::HashMismatch(_)
            | ClientError::ConnectionLost(_) => true,
            ClientError::Manifest(_)
            | ClientError::Io { .. }
            | ClientError::Stream(_)
            | ClientError::TargetExists(_)
            | ClientError::Unsuitable { .. }
            | ClientError::Socket(_)
            | ClientError::Tls(_) => false,
        };
        Self { hint, is_of_the_node, is_of_the_connection, ..Self::of(&error, exit) }
    }
}

impl From<DataError> for Failure {
    fn from(error: DataError) -> Self {
        let (exit, hint) = match &error {
            DataError::Locked { .. } => (
                Exit::DataFolder,
                "a node is running there: use it, stop it (`metanode stop`), or name another folder (--data)",
            ),
            DataError::NewerFormat { .. } => {
                (Exit::DataFolder, "use a later version of metanode, or another folder (--data)")
            }
            DataError::NotADataFolder { .. } => {
                (Exit::DataFolder, "`metanode start --data DIR` makes one of an empty or missing folder")
            }
            DataError::BadFormat { .. } => {
                (Exit::DataFolder, "restore the file from a backup, or name another folder (--data)")
            }
            DataError::ReadOnly { .. } => {
                (Exit::DataFolder, "make it writable for this user, or name another folder (--data)")
            }
            DataError::KeyMode { .. } => {
                (Exit::DataFolder, "chmod 600 the file; if others may have read it, make a new key")
            }
            DataError::Key { .. } => (Exit::DataFolder, "restore the key from a backup"),
            DataError::Config(config) => return Self::from(config.clone()),
            DataError::Random(_) => return Self::of(&error, Exit::Other),
            DataError::Io { source, .. } => match of_io(source) {
                Exit::NoRoom => (Exit::NoRoom, "free some space on its file system"),
                _ => (Exit::DataFolder, "name another folder with --data"),
            },
        };
        Self::of(&error, exit).hint(hint)
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        Self::of(&error, Exit::Usage)
            .hint("the metanode.toml that `metanode start` writes into a fresh data folder explains every field")
    }
}

impl From<AdminError> for Failure {
    fn from(error: AdminError) -> Self {
        match error {
            AdminError::Data(data) => data.into(),
            AdminError::Refused(refusal) => {
                let (exit, hint) = of_refusal(&refusal);
                Self { hint, ..Self::of(&refusal, exit) }
            }
            AdminError::NotRunning { .. } => Self::of(&error, Exit::Unreachable)
                .hint("`metanode start` starts one; --data DIR or --node TICKET name another"),
            AdminError::Timeout { .. } => Self::of(&error, Exit::Busy).hint("look at node.log in the data folder"),
            AdminError::Impostor { .. } => {
                Self::of(&error, Exit::Unreachable).hint("remove that socket and start the node again")
            }
            AdminError::Protocol(_) => Self::of(&error, Exit::Unreachable)
                .hint("command and node differ in version: stop the node and start it again"),
            AdminError::Io { ref source, .. } => {
                let exit = of_io(source);
                Self::of(&error, exit).hint("run the command as the user that owns the data folder")
            }
        }
    }
}

fn of_store(error: &OpenError) -> (Exit, &'static str) {
    match error {
        OpenError::NewerFormat { .. } => {
            (Exit::DataFolder, "use a later version of metanode, or another folder (--data)")
        }
        OpenError::ReadOnly(_) => (Exit::DataFolder, "make it writable for this user, or name another folder (--data)"),
        OpenError::DiskFull(_) => (Exit::NoRoom, "free some space on its file system"),
        OpenError::Damaged { .. } => (Exit::Integrity, "nothing was changed; restore that file from a backup"),
        OpenError::Io { .. } => (Exit::DataFolder, "look at the disk and at the permissions of the data folder"),
    }
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        let (exit, hint) = of_store(&error);
        Self::of(&error, exit).hint(hint)
    }
}

impl From<NodeError> for Failure {
    fn from(error: NodeError) -> Self {
        match error {
            NodeError::Data(data) => data.into(),
            NodeError::Config(config) => config.into(),
            NodeError::Ledger(ledger) => ledger.into(),
            NodeError::Store(ref store) => {
                let (exit, hint) = of_store(store);
                Self::of(&error, exit).hint(hint)
            }
            NodeError::Io { ref source, .. } => {
                let hint = match source.kind() {
                    io::ErrorKind::AddrInUse => {
                        "another process has that address: name another with --listen, port 0 for any"
                    }
                    io::ErrorKind::AddrNotAvailable => "this machine has no such address: name another with --listen",
                    _ => "`metanode doctor` says what this machine lacks",
                };
                Self::of(&error, of_io(source)).hint(hint)
            }
            other => {
                Self::of(&other, Exit::Other).hint("`metanode doctor` says what this machine lacks; the log has more")
            }
        }
    }
}

impl From<LedgerError> for Failure {
    fn from(error: LedgerError) -> Self {
        Self::of(&error, Exit::DataFolder)
    }
}

impl From<TicketError> for Failure {
    fn from(error: TicketError) -> Self {
        Self::of(&error, Exit::Usage).hint("`metanode status` on the node's machine prints its ticket: copy all of it")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_an_exit_code_and_a_hint() {
        for code in RefusalCode::ALL {
            let failure = Failure::from(ClientError::Refused((*code).into()));
            assert!(failure.hint.is_some() && failure.lines().last().unwrap().starts_with("hint: "), "{code:?}");
        }
        assert_eq!(Failure::from(ClientError::Refused(RefusalCode::InUse.into())).exit as u8, 10);
        assert_eq!(Failure::from(ClientError::Refused(RefusalCode::NotFound.into())).exit as u8, 3);
        assert_eq!(Failure::from(ClientError::Unreachable(vec![])).exit as u8, 6);
    }

    #[test]
    fn the_table_names_every_code() {
        for exit in [
            Exit::Other,
            Exit::Usage,
            Exit::NotFound,
            Exit::NotPermitted,
            Exit::Integrity,
            Exit::Unreachable,
            Exit::Busy,
            Exit::NoRoom,
            Exit::DataFolder,
            Exit::InUse,
            Exit::Interrupted,
        ] {
            assert!(TABLE.lines().any(|line| line.trim_start().starts_with(&format!("{} ", exit as u8))), "{exit:?}");
        }
    }

    #[test]
    fn causes_are_not_said_twice() {
        let error = ClientError::Io { path: "x".into(), source: io::ErrorKind::PermissionDenied.into() };
        let failure = Failure::from(error).context("putting x");
        assert_eq!(failure.exit, Exit::NotPermitted);
        assert_eq!(failure.lines(), ["error: putting x", "  caused by: x: permission denied"]);
    }
}
