//! Where the local socket lies. A socket address has room for 107 bytes, a path for 4096.

use std::{
    ffi::OsStr,
    fs,
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
};

use super::{DataError, files};

const SOCKET_FILE: &str = "admin.sock";
const LOCATION_FILE: &str = "admin.path";

/// Longest socket path in bytes that is used: some below `sun_path`'s 108.
pub(crate) const SOCKET_PATH_BYTES_MAX: usize = 100;

/// Where the node of `folder` listens: as it left word, else in the folder, else where it would be placed.
pub(super) fn location(folder: &Path) -> PathBuf {
    let inside = folder.join(SOCKET_FILE);
    if fits(&inside) {
        return inside;
    }
    match files::read_small(&folder.join(LOCATION_FILE)) {
        Ok(text) if !text.trim().is_empty() => PathBuf::from(text.trim()),
        _ => outside(folder),
    }
}

/// Decides for this run; writes [`LOCATION_FILE`] when the socket lies elsewhere.
pub(super) fn place(folder: &Path) -> Result<PathBuf, DataError> {
    let inside = folder.join(SOCKET_FILE);
    if fits(&inside) {
        return Ok(inside);
    }
    let path = outside(folder);
    let word = folder.join(LOCATION_FILE);
    fs::write(&word, path.as_os_str().as_bytes()).map_err(DataError::write("write", &word))?;
    Ok(path)
}

fn fits(path: &Path) -> bool {
    path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX
}

/// A short path that belongs to `folder` alone. In `/tmp` anybody may take the name first: the client therefore checks that
/// the folder's owner answers, and the node fails to bind rather than share.
fn outside(folder: &Path) -> PathBuf {
    let [a, b, c, d, e, f, ..] =
        metanode_crypto::derive("metanode 2026 admin socket v1", folder.as_os_str().as_bytes());
    let name = format!("metanode-{:016x}.sock", u64::from_be_bytes([0, 0, a, b, c, d, e, f]));
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(|folder| PathBuf::from(&folder).join(&name));
    match runtime {
        Some(path) if path.is_absolute() && fits(&path) && path.parent().is_some_and(Path::is_dir) => path,
        _ => Path::new(OsStr::new("/tmp")).join(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_folders_get_a_short_socket_that_clients_find() {
        let temp = tempfile::tempdir().unwrap();
        let short = temp.path().join("d");
        assert_eq!(location(&short), short.join(SOCKET_FILE));
        let long = temp.path().join("x".repeat(90));
        fs::create_dir(&long).unwrap();
        let placed = place(&long).unwrap();
        assert!(fits(&placed) && !placed.starts_with(&long), "{placed:?}");
        assert_eq!(location(&long), placed);
        fs::write(long.join(LOCATION_FILE), "/run/elsewhere.sock").unwrap();
        assert_eq!(location(&long), Path::new("/run/elsewhere.sock"), "the running node's word goes first");
    }
}
