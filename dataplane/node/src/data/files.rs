//! Files that appear whole or not at all, and keys.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use metanode_crypto::Identity;
use rustix::fs::{CWD, RenameFlags};

use super::DataError;

/// Largest file read here: a PEM key has 120 bytes, the format file 16.
const SMALL_BYTES_MAX: u64 = 4_096;

const ASIDE: &str = ".new";

/// Whether `name` is what an interrupted [`create`] of `own` leaves behind.
pub(super) fn is_aside_of(name: &str, own: &str) -> bool {
    name.strip_suffix(ASIDE) == Some(own)
}

/// The text of a small file.
pub(super) fn read_small(path: &Path) -> io::Result<String> {
    read_bounded(File::open(path)?)
}

fn read_bounded(file: File) -> io::Result<String> {
    let mut text = String::new();
    file.take(SMALL_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > SMALL_BYTES_MAX {
        return Err(io::Error::other(format!("larger than {SMALL_BYTES_MAX} bytes")));
    }
    Ok(text)
}

/// Makes `path` with `contents` durably, unless it is there already. The caller holds the folder's lock.
pub(super) fn create(path: &Path, contents: &[u8], mode: u32) -> Result<(), DataError> {
    if path.try_exists().map_err(DataError::io("look for", path))? {
        return Ok(());
    }
    let aside = write_aside(path, contents, mode)?;
    match rustix::fs::renameat_with(CWD, &aside, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        // File systems without RENAME_NOREPLACE (NFS): the lock keeps others out.
        Err(rustix::io::Errno::INVAL) => fs::rename(&aside, path).map_err(DataError::write("name", path))?,
        Err(error) => return Err(DataError::write("name", path)(error.into())),
    }
    sync_folder_of(path)
}

/// Makes `path` with `contents` durably, in place of what is there.
pub(super) fn replace(path: &Path, contents: &[u8], mode: u32) -> Result<(), DataError> {
    let aside = write_aside(path, contents, mode)?;
    fs::rename(&aside, path).map_err(DataError::write("name", path))?;
    sync_folder_of(path)
}

fn write_aside(path: &Path, contents: &[u8], mode: u32) -> Result<PathBuf, DataError> {
    let mut name = path.file_name().expect("names a file").to_owned();
    name.push(ASIDE);
    let aside = path.with_file_name(name);
    match fs::remove_file(&aside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(DataError::write("remove", &aside)(error)),
        _ => {}
    }
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&aside)?;
        file.write_all(contents)?;
        file.sync_all()
    };
    write().map_err(DataError::write("write", &aside))?;
    Ok(aside)
}

fn sync_folder_of(path: &Path) -> Result<(), DataError> {
    let folder = path.parent().expect("a file lies in a folder");
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(DataError::write("sync", folder))
}

/// Makes a new key pair at `path`, unless one is there already.
pub(super) fn create_key(path: &Path) -> Result<(), DataError> {
    let mut seed = zeroize::Zeroizing::new([0; 32]);
    getrandom::fill(&mut *seed).map_err(DataError::Random)?;
    create(path, Identity::from_seed(&seed).to_pem().as_bytes(), 0o600)
}

/// Reads a key pair; refuses a file that others than its owner can use.
pub(super) fn read_key(path: &Path) -> Result<Identity, DataError> {
    let file = File::open(path).map_err(DataError::io("read", path))?;
    let mode = file.metadata().map_err(DataError::io("read", path))?.permissions().mode() & 0o7777;
    if mode & 0o177 != 0 {
        return Err(DataError::KeyMode { path: path.to_owned(), mode });
    }
    let text = zeroize::Zeroizing::new(read_bounded(file).map_err(DataError::io("read", path))?);
    Identity::from_pem(&text).map_err(|source| DataError::Key { path: path.to_owned(), source })
}
