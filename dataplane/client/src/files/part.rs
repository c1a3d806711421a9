//! Files and folders that are written beside their final name.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use metanode_types::Hash;
use rustix::{
    fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags},
    io::Errno,
};

use crate::ClientError;

/// A file under a temporary name; removed when dropped unpublished, unless it may be gone on with.
#[derive(Debug)]
pub(crate) struct PartFile {
    part: PathBuf,
    target: PathBuf,
    replace: bool,
    /// The file itself, locked if it can be gone on with. It is not opened by its name again: somebody else may have put another there.
    file: File,
    stays: bool,
    is_published: bool,
}

impl PartFile {
    /// Makes an empty file beside `target`. What is there already is left alone until the end, and then replaced if `replace`.
    pub(crate) fn create(target: &Path, replace: bool) -> Result<Self, ClientError> {
        check_target(target, replace, fs::FileType::is_dir, "it is a folder")?;
        let part = part_name(target)?;
        let made = File::options().read(true).write(true).create_new(true).open(&part);
        let file = made.map_err(ClientError::io(&part))?;
        Ok(Self { part, target: target.into(), replace, file, stays: false, is_published: false })
    }

    /// As [`PartFile::create`], with what an earlier attempt to fetch the blob `hash` to the same place has left, and to be left for a
    /// later one. Returns the bytes that are in it.
    ///
    /// A file of that name that is not this user's own plain file, or that somebody writes to just now, is left alone; then the part is
    /// one that can't be gone on with.
    pub(crate) fn resume(target: &Path, replace: bool, hash: &Hash) -> Result<(Self, u64), ClientError> {
        check_target(target, replace, fs::FileType::is_dir, "it is a folder")?;
        let part = resumed_name(target, hash)?;
        match lock_own(&part) {
            Ok(Some((file, bytes))) => {
                let this = Self { part, target: target.into(), replace, file, stays: true, is_published: false };
                Ok((this, bytes))
            }
            Ok(None) => Self::create(target, replace).map(|part| (part, 0)),
            Err(error) => Err(ClientError::io(&part)(error)),
        }
    }

    /// What is in it is of no use.
    pub(crate) fn discard(mut self) {
        self.stays = false;
    }

    pub(crate) fn open(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Gives the file its name. Its contents were synced before.
    pub(crate) fn publish(mut self) -> Result<(), ClientError> {
        let own = self.file.metadata().map_err(ClientError::io(&self.part))?;
        let named = fs::symlink_metadata(&self.part).map_err(ClientError::io(&self.part))?;
        if (named.dev(), named.ino()) != (own.dev(), own.ino()) {
            return Err(ClientError::Unsuitable { path: self.part.clone(), reason: "somebody else has replaced it" });
        }
        rename(&self.part, &self.target, self.replace)?;
        self.is_published = true;
        sync_parent(&self.target)
    }
}

impl Drop for PartFile {
    fn drop(&mut self) {
        let is_empty = || fs::metadata(&self.part).is_ok_and(|metadata| metadata.len() == 0);
        if !self.is_published && (!self.stays || is_empty()) {
            let _ = fs::remove_file(&self.part); // best effort: its name says what it is
        }
    }
}

/// A folder under a temporary name, closed to other users; removed with all it has when dropped unpublished.
#[derive(Debug)]
pub(crate) struct PartFolder {
    part: PathBuf,
    target: PathBuf,
    replace: bool,
}

impl PartFolder {
    pub(crate) fn create(target: &Path, replace: bool) -> Result<Self, ClientError> {
        check_target(target, replace, |kind| !kind.is_dir(), "it is not a folder")?;
        let part = part_name(target)?;
        fs::DirBuilder::new().mode(0o700).create(&part).map_err(ClientError::io(&part))?;
        let folder = Self { part, target: target.into(), replace };
        fs::create_dir(folder.path()).map_err(ClientError::io(folder.path()))?;
        Ok(folder)
    }

    /// Whether the file system takes names for equal that differ in case only.
    pub(crate) fn ignores_case(&self) -> Result<bool, ClientError> {
        let (lower, upper) = (self.part.join("case"), self.part.join("CASE"));
        File::options().write(true).create_new(true).open(&lower).map_err(ClientError::io(&lower))?;
        let ignores = upper.exists();
        fs::remove_file(&lower).map_err(ClientError::io(&lower))?;
        Ok(ignores)
    }

    /// Where to put the contents.
    pub(crate) fn path(&self) -> PathBuf {
        self.part.join("folder")
    }

    /// Syncs the file system it is on and gives the folder its name.
    pub(crate) fn publish(self) -> Result<(), ClientError> {
        let path = self.path();
        // One sync for all files: one each would cost a disk flush a file.
        let opened = File::open(&path).map_err(ClientError::io(&path))?;
        rustix::fs::syncfs(&opened).map_err(|error| ClientError::io(&path)(error.into()))?;
        if self.replace && self.target.exists() {
            let old = self.part.join("old");
            fs::rename(&self.target, &old).map_err(ClientError::io(&self.target))?;
            if let Err(error) = rename(&path, &self.target, false) {
                let _ = fs::rename(&old, &self.target); // the error that is returned says what went wrong
                return Err(error);
            }
        } else {
            rename(&path, &self.target, false)?;
        }
        sync_parent(&self.target)
    }
}

impl Drop for PartFolder {
    fn drop(&mut self) {
        remove_all(&self.part);
    }
}

/// Folders inside may have lost the permission to remove from them; that is given back first.
fn remove_all(path: &Path) {
    if fs::remove_dir_all(path).is_ok() {
        return;
    }
    let mut left = vec![path.to_path_buf()];
    while let Some(folder) = left.pop() {
        let _ = fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o700));
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        left.extend(entries.filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
    }
    let _ = fs::remove_dir_all(path); // best effort: its name says what it is
}

fn check_target(
    target: &Path,
    replace: bool,
    is_unsuitable: impl Fn(&fs::FileType) -> bool,
    reason: &'static str,
) -> Result<(), ClientError> {
    match fs::symlink_metadata(target) {
        Ok(_) if !replace => Err(ClientError::TargetExists(target.into())),
        Ok(found) if is_unsuitable(&found.file_type()) => Err(ClientError::Unsuitable { path: target.into(), reason }),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(ClientError::io(target)(error)),
    }
}

/// Opens and locks a file that can be gone on with, or makes it; `None` when it must be left alone.
fn lock_own(part: &Path) -> io::Result<Option<(File, u64)>> {
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = match rustix::fs::open(part, flags, Mode::from_raw_mode(0o666)) {
        Ok(file) => File::from(file),
        Err(Errno::LOOP | Errno::ACCESS | Errno::PERM | Errno::ISDIR | Errno::NXIO | Errno::NODEV | Errno::TXTBSY) => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let metadata = file.metadata()?;
    let own = metadata.is_file() && metadata.nlink() == 1 && metadata.uid() == rustix::process::geteuid().as_raw();
    if !own || rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(None);
    }
    // Another process may have finished it, and given it its name, before it was locked.
    let named = fs::symlink_metadata(part).is_ok_and(|named| named.ino() == metadata.ino());
    Ok(named.then_some((file, metadata.len())))
}

/// The name of the part of a blob that is fetched to `target`: the same each time.
pub(super) fn resumed_name(target: &Path, hash: &Hash) -> Result<PathBuf, ClientError> {
    named_part(target, u64::from_be_bytes(*hash.0.first_chunk().expect("a hash has 32 bytes")))
}

fn part_name(target: &Path) -> Result<PathBuf, ClientError> {
    let mut random = [0; 4];
    getrandom::fill(&mut random).map_err(|error| ClientError::io(target)(io::Error::other(error)))?;
    named_part(target, u64::from(u32::from_le_bytes(random)))
}

fn named_part(target: &Path, number: u64) -> Result<PathBuf, ClientError> {
    let unsuitable = ClientError::Unsuitable { path: target.into(), reason: "it has no file name" };
    let name = target.file_name().ok_or(unsuitable)?;
    // A name has at most 255 bytes; a long one is cut, the number tells them apart.
    let name = &name.as_encoded_bytes()[..name.len().min(200)];
    let mut part = OsString::from(".");
    part.push(String::from_utf8_lossy(name).as_ref());
    part.push(format!(".metanode-part-{number:08x}"));
    Ok(target.with_file_name(part))
}

fn rename(from: &Path, to: &Path, replace: bool) -> Result<(), ClientError> {
    if replace {
        return fs::rename(from, to).map_err(ClientError::io(to));
    }
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(ClientError::TargetExists(to.into())),
        // A file system without that flag: looking first leaves a gap that only a race can hit.
        Err(Errno::INVAL | Errno::NOSYS) => match rustix::fs::statat(CWD, to, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(ClientError::TargetExists(to.into())),
            Err(_) => fs::rename(from, to).map_err(ClientError::io(to)),
        },
        Err(error) => Err(ClientError::io(to)(error.into())),
    }
}

/// A name lasts once its folder is synced.
fn sync_parent(path: &Path) -> Result<(), ClientError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(parent).and_then(|folder| folder.sync_all()).map_err(ClientError::io(parent))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn nothing_is_under_the_final_name_before_the_end_and_nothing_is_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        let part = PartFile::create(&target, false).unwrap();
        part.open().unwrap().write_all(b"half").unwrap();
        assert!(!target.exists());
        assert!(names(folder.path())[0].starts_with(".x.metanode-part-"));
        drop(part);
        assert!(names(folder.path()).is_empty());
        let part = PartFile::create(&target, false).unwrap();
        part.open().unwrap().write_all(b"whole").unwrap();
        part.publish().unwrap();
        assert_eq!(names(folder.path()), ["x"]);
        assert_eq!(fs::read(&target).unwrap(), b"whole");
    }

    #[test]
    fn a_target_that_exists_is_replaced_only_when_asked() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        fs::write(&target, "old").unwrap();
        assert!(matches!(PartFile::create(&target, false), Err(ClientError::TargetExists(_))));
        PartFile::create(&target, true).unwrap().publish().unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"");
        // One that appears in between is not overwritten either.
        let late = folder.path().join("late");
        let part = PartFile::create(&late, false).unwrap();
        fs::write(&late, "somebody else's").unwrap();
        assert!(matches!(part.publish(), Err(ClientError::TargetExists(_))));
        assert_eq!(fs::read(&late).unwrap(), b"somebody else's");
        assert_eq!(names(folder.path()), ["late", "x"]);
    }

    #[test]
    fn folders_replace_folders_and_read_only_ones_are_cleaned_up() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("f");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("old"), "").unwrap();
        let part = PartFolder::create(&target, true).unwrap();
        fs::write(part.path().join("new"), "").unwrap();
        part.publish().unwrap();
        assert_eq!(names(&target), ["new"]);
        let part = PartFolder::create(&target, true).unwrap();
        let locked = part.path().join("locked");
        fs::create_dir(&locked).unwrap();
        fs::write(locked.join("file"), "").unwrap();
        fs::set_permissions(&locked, std::os::unix::fs::PermissionsExt::from_mode(0o500)).unwrap();
        drop(part);
        assert_eq!(names(folder.path()), ["f"]);
    }

    #[test]
    fn a_part_is_gone_on_with_by_one_at_a_time_and_only_if_it_is_ours() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        let hash = Hash([7; 32]);
        let (part, held) = PartFile::resume(&target, false, &hash).unwrap();
        assert_eq!(held, 0);
        part.open().unwrap().write_all(b"half").unwrap();
        let (other, held) = PartFile::resume(&target, false, &hash).unwrap();
        assert_eq!(held, 0, "it is being written");
        assert_ne!(other.part, part.part);
        drop(other);
        let path = part.part.clone();
        drop(part);
        assert!(path.exists());
        let (part, held) = PartFile::resume(&target, false, &hash).unwrap();
        assert_eq!((held, &part.part), (4, &path));
        let (different, held) = PartFile::resume(&target, false, &Hash([8; 32])).unwrap();
        assert_eq!(held, 0, "another blob");
        drop(different); // nothing in it: it goes
        part.publish().unwrap();
        assert_eq!(names(folder.path()), ["x"]);
        assert_eq!(fs::read(&target).unwrap(), b"half");
        // What somebody else has put there.
        let secret = folder.path().join("secret");
        fs::write(&secret, "s").unwrap();
        for link in [fs::hard_link, |from: &PathBuf, to: &PathBuf| std::os::unix::fs::symlink(from, to)] {
            link(&secret, &path).unwrap();
            let (part, held) = PartFile::resume(&target, true, &hash).unwrap();
            assert_eq!(held, 0);
            assert_ne!(part.part, path);
            part.publish().unwrap();
            fs::remove_file(&path).unwrap();
        }
        assert_eq!(fs::read(&secret).unwrap(), b"s");
        let (part, _) = PartFile::resume(&target, true, &hash).unwrap();
        part.open().unwrap().write_all(b"x").unwrap();
        part.discard();
        assert_eq!(names(folder.path()), ["secret", "x"]);
    }

    #[test]
    fn a_long_name_still_has_a_part() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("n".repeat(255));
        PartFile::create(&target, false).unwrap().publish().unwrap();
        assert!(target.exists());
    }
}
