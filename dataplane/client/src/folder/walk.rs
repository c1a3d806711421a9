//! What a folder has, without following links.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use metanode_types::limits::MANIFEST_ENTRIES_MAX;
use metanode_wire::{Entry, EntryKind, ManifestError, manifest::check_path};

use crate::ClientError;

/// A folder before its files are read.
#[derive(Debug, Default)]
pub(super) struct Walk {
    /// Folders and links, complete.
    pub(super) entries: Vec<Entry>,
    /// Regular files, still without hashes.
    pub(super) files: Vec<WalkFile>,
    /// Bytes of all files, as of now.
    pub(super) bytes: u64,
    /// Sockets, pipes and devices.
    pub(super) skipped: u64,
}

/// A regular file.
#[derive(Debug)]
pub(super) struct WalkFile {
    /// As it will stand in the manifest.
    pub(super) path: String,
    /// Where it is.
    pub(super) full: PathBuf,
}

/// Lists `root` and all below it.
pub(super) fn walk(root: &Path) -> Result<Walk, ClientError> {
    let mut walk = Walk::default();
    let metadata = fs::metadata(root).map_err(ClientError::io(root))?; // what is named may be a link to a folder
    if !metadata.is_dir() {
        return Err(ClientError::Unsuitable { path: root.into(), reason: "it is not a folder" });
    }
    let mut folders = vec![(root.to_path_buf(), String::new())];
    while let Some((folder, prefix)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(ClientError::io(&folder))? {
            let full = entry.map_err(ClientError::io(&folder))?.path();
            let path = path_of(&prefix, &full)?;
            let metadata = fs::symlink_metadata(&full).map_err(ClientError::io(&full))?;
            let mode = (metadata.permissions().mode() & 0o777) as u16;
            if metadata.is_dir() {
                walk.entries.push(Entry { path: path.clone(), mode, kind: EntryKind::Folder });
                folders.push((full, path));
            } else if metadata.is_symlink() {
                let target = fs::read_link(&full).map_err(ClientError::io(&full))?;
                let target = target.into_os_string().into_string();
                let target = target.map_err(|_| unsuitable(&full, "its target is not UTF-8"))?;
                walk.entries.push(Entry { path, mode: 0o777, kind: EntryKind::Link { target } });
            } else if metadata.is_file() {
                walk.bytes += metadata.size();
                walk.files.push(WalkFile { path, full });
            } else {
                walk.skipped += 1;
            }
            if walk.entries.len() + walk.files.len() > MANIFEST_ENTRIES_MAX {
                return Err(ManifestError::Limit("number of entries").into());
            }
        }
    }
    Ok(walk)
}

fn path_of(prefix: &str, full: &Path) -> Result<String, ClientError> {
    let name = full.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| unsuitable(full, "its name is not UTF-8"))?;
    let path = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
    check_path(&path)?;
    Ok(path)
}

fn unsuitable(path: &Path, reason: &'static str) -> ClientError {
    ClientError::Unsuitable { path: path.into(), reason }
}

/// Opens a file that was a regular one when it was listed: not if it is a link by now, and without waiting if it is a pipe.
pub(super) fn open_regular(path: &Path) -> Result<(fs::File, fs::Metadata), ClientError> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    let file = fs::File::from(opened.map_err(|error| ClientError::io(path)(io::Error::from(error)))?);
    let metadata = file.metadata().map_err(ClientError::io(path))?;
    if metadata.is_file() { Ok((file, metadata)) } else { Err(unsuitable(path, crate::files::CHANGED)) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::{ffi::OsStrExt as _, fs::symlink, net::UnixListener};

    use super::*;

    #[test]
    fn lists_everything_once_and_follows_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        fs::create_dir_all(root.join("a/b")).unwrap();
        fs::write(root.join("a/b/f"), "abc").unwrap();
        fs::write(root.join("g"), "").unwrap();
        symlink("..", root.join("a/up")).unwrap();
        let _socket = UnixListener::bind(root.join("socket")).unwrap();
        let walk = walk(root).unwrap();
        let mut entries: Vec<_> = walk.entries.iter().map(|e| e.path.as_str()).collect();
        entries.sort_unstable();
        assert_eq!(entries, ["a", "a/b", "a/up"]);
        let mut files: Vec<_> = walk.files.iter().map(|f| f.path.as_str()).collect();
        files.sort_unstable();
        assert_eq!(files, ["a/b/f", "g"]);
        assert_eq!((walk.bytes, walk.skipped), (3, 1));
    }

    #[test]
    fn names_that_are_not_utf_8_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let name = std::ffi::OsStr::from_bytes(b"bad\xff");
        fs::write(folder.path().join(name), "").unwrap();
        let error = walk(folder.path()).unwrap_err();
        assert!(matches!(&error, ClientError::Unsuitable { path, .. } if path.ends_with(name)), "{error}");
    }

    #[test]
    fn a_file_that_became_a_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        symlink("/etc/passwd", &path).unwrap();
        assert!(open_regular(&path).is_err());
    }
}
