//! Whether two folders are the same, byte for byte.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::Path,
};

use crate::exit::{Exit, Failure, Result, io as io_failure};

/// Compares names, kinds, modes, link targets and every byte of every file; what is neither file, folder nor link was not stored.
pub(super) fn identical(source: &Path, copy: &Path) -> Result<()> {
    let mut folders = vec![(source.to_path_buf(), copy.to_path_buf())];
    while let Some((left, right)) = folders.pop() {
        let names = names(&left)?;
        if names != self::names(&right)? {
            return Err(differs(&left, "its entries"));
        }
        for name in names {
            let (left, right) = (left.join(&name), right.join(&name));
            let of_left = fs::symlink_metadata(&left).map_err(io_failure(left.display()))?;
            let of_right = fs::symlink_metadata(&right).map_err(io_failure(right.display()))?;
            if of_left.file_type() != of_right.file_type() {
                return Err(differs(&left, "its kind"));
            }
            if of_left.is_symlink() {
                let target = |path: &Path| fs::read_link(path).map_err(io_failure(path.display()));
                if target(&left)? != target(&right)? {
                    return Err(differs(&left, "its target"));
                }
                continue;
            }
            if of_left.permissions().mode() & 0o777 != of_right.permissions().mode() & 0o777 {
                return Err(differs(&left, "its mode"));
            }
            if of_left.is_dir() {
                folders.push((left, right));
            } else if !same_bytes(&left, &right).map_err(io_failure(left.display()))? {
                return Err(differs(&left, "its contents"));
            }
        }
    }
    Ok(())
}

fn differs(path: &Path, what: &str) -> Failure {
    Failure::new(Exit::Integrity, format!("{}: {what} came back different", path.display()))
        .hint("if nothing wrote to it meanwhile, this is a defect: please report it")
}

fn names(folder: &Path) -> Result<Vec<std::ffi::OsString>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(io_failure(folder.display()))? {
        let entry = entry.map_err(io_failure(folder.display()))?;
        let kind = entry.file_type().map_err(io_failure(folder.display()))?;
        if kind.is_dir() || kind.is_file() || kind.is_symlink() {
            names.push(entry.file_name());
        }
    }
    names.sort();
    Ok(names)
}

fn same_bytes(left: &Path, right: &Path) -> io::Result<bool> {
    let (mut left, mut right) = (File::open(left)?, File::open(right)?);
    if left.metadata()?.len() != right.metadata()?.len() {
        return Ok(false);
    }
    let (mut a, mut b) = (vec![0; 1 << 18], vec![0; 1 << 18]);
    loop {
        let n = left.read(&mut a)?;
        if n == 0 {
            return Ok(right.read(&mut b)? == 0);
        }
        match right.read_exact(&mut b[..n]) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            read => read?,
        }
        if a[..n] != b[..n] {
            return Ok(false);
        }
    }
}

/// Gives back the permission to remove what is in folders that were restored without it.
pub(super) fn make_removable(folder: &Path) {
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        // What fails here shows when the folder is removed.
        let _ = fs::set_permissions(&folder, fs::Permissions::from_mode(0o700));
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        folders.extend(entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_difference_is_found() {
        let here = tempfile::tempdir().unwrap();
        let (a, b) = (here.path().join("a"), here.path().join("b"));
        let make = |root: &Path| {
            fs::create_dir_all(root.join("d")).unwrap();
            fs::write(root.join("d/f"), vec![7; 600_000]).unwrap();
            std::os::unix::fs::symlink("f", root.join("d/l")).unwrap();
        };
        make(&a);
        for change in [
            (|_: &Path| {}) as fn(&Path),
            |root| fs::write(root.join("new"), "").unwrap(),
            |root| fs::remove_file(root.join("d/f")).unwrap(),
            |root| fs::set_permissions(root.join("d/f"), fs::Permissions::from_mode(0o600)).unwrap(),
            |root| {
                let mut bytes = fs::read(root.join("d/f")).unwrap();
                bytes[500_000] ^= 1;
                fs::write(root.join("d/f"), bytes).unwrap();
            },
            |root| {
                fs::remove_file(root.join("d/l")).unwrap();
                std::os::unix::fs::symlink("g", root.join("d/l")).unwrap();
            },
        ]
        .into_iter()
        .enumerate()
        {
            let (at, change) = change;
            make(&b);
            change(&b);
            assert_eq!(identical(&a, &b).is_ok(), at == 0, "change {at}");
            fs::remove_dir_all(&b).unwrap();
        }
    }
}
