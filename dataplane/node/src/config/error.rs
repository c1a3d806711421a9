use std::{
    fs::File,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use super::CONFIG_BYTES_MAX;

/// Why a configuration is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("configuration {}: {reason}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// As the operating system says it, or that it is over [`CONFIG_BYTES_MAX`].
        reason: String,
    },
    /// Not TOML, an unknown key, or a value of another type.
    #[error("configuration{}: {reason}", display_of(path.as_deref()))]
    Parse {
        /// Which file, when it was one.
        path: Option<PathBuf>,
        /// Line, column and cause.
        reason: String,
    },
    /// A value outside its range.
    #[error("configuration{}: {field}: {problem}", display_of(path.as_deref()))]
    Field {
        /// Which file, when it was one.
        path: Option<PathBuf>,
        /// Section and key: `quic.streams_max`.
        field: &'static str,
        /// What it must be.
        problem: String,
    },
}

fn display_of(path: Option<&Path>) -> String {
    path.map(|path| format!(" {}", path.display())).unwrap_or_default()
}

impl ConfigError {
    pub(super) fn parse(error: &toml::de::Error) -> Self {
        Self::Parse { path: None, reason: error.to_string().trim_end().to_owned() }
    }

    pub(super) fn field(field: &'static str, problem: impl Into<String>) -> Self {
        Self::Field { path: None, field, problem: problem.into() }
    }

    pub(super) fn in_file(mut self, file: &Path) -> Self {
        match &mut self {
            Self::Read { .. } => {}
            Self::Parse { path, .. } | Self::Field { path, .. } => *path = Some(file.to_owned()),
        }
        self
    }
}

pub(super) fn read(path: &Path) -> Result<String, ConfigError> {
    let read = || -> io::Result<String> {
        let mut text = String::new();
        File::open(path)?.take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text)?;
        if text.len() as u64 > CONFIG_BYTES_MAX {
            return Err(io::Error::other(format!("larger than {CONFIG_BYTES_MAX} bytes")));
        }
        Ok(text)
    };
    read().map_err(|error| ConfigError::Read { path: path.to_owned(), reason: error.to_string() })
}
