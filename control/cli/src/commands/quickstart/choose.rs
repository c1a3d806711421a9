//! Which folder a quickstart stores.

use std::path::{Path, PathBuf};

use crate::exit::{Exit, Failure, Result};

/// Unless the folder was named: enough to be telling, little enough to be quick.
const BYTES_MAX: u64 = 1 << 30;
const FILES_MAX: u64 = 100_000;

/// A folder, and what it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chosen {
    pub(super) path: PathBuf,
    pub(super) files: u64,
    pub(super) bytes: u64,
}

/// The folder that was named, else sources of the cargo registry, else the current folder; of the latter two the largest part
/// that is not too large.
pub(super) fn folder(named: Option<&Path>) -> Result<Chosen> {
    if let Some(path) = named {
        if !path.is_dir() {
            return Err(Failure::new(Exit::NotFound, format!("{} is not a folder", path.display())));
        }
        return measure(path, u64::MAX, u64::MAX).ok_or_else(|| unreadable(path));
    }
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    let registry = home.map(|home| home.join("registry/src")).filter(|path| path.is_dir());
    let here = PathBuf::from(".");
    let candidates = registry.into_iter().chain([here.clone()]);
    let mut found = candidates.filter_map(|path| largest_part(&path, 3)).filter(|chosen| chosen.files > 0);
    found.next().ok_or_else(|| unreadable(&here))
}

fn unreadable(path: &Path) -> Failure {
    Failure::new(Exit::NotFound, format!("nothing to store in {}", path.display()))
        .hint("name a folder: metanode quickstart FOLDER")
}

/// The folder itself if it is not too large, else its largest subfolder that is not, down to `depth`.
fn largest_part(path: &Path, depth: u32) -> Option<Chosen> {
    if let Some(chosen) = measure(path, FILES_MAX, BYTES_MAX) {
        return Some(chosen);
    }
    let entries =
        std::fs::read_dir(path).ok()?.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let parts: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    let fitting = parts.iter().filter_map(|part| measure(part, FILES_MAX, BYTES_MAX)).max_by_key(|chosen| chosen.bytes);
    match fitting.filter(|chosen| chosen.files > 0) {
        Some(chosen) => Some(chosen),
        None if depth > 0 => parts.iter().find_map(|part| largest_part(part, depth - 1)),
        None => None,
    }
}

/// Files and bytes of a folder; `None` when it has more, or can't be read.
fn measure(path: &Path, files_max: u64, bytes_max: u64) -> Option<Chosen> {
    let mut chosen = Chosen { path: path.to_path_buf(), files: 0, bytes: 0 };
    let mut folders = vec![path.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).ok()? {
            let entry = entry.ok()?;
            let kind = entry.file_type().ok()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                chosen.files += 1;
                chosen.bytes += entry.metadata().ok()?.len();
            }
            if chosen.files > files_max || chosen.bytes > bytes_max {
                return None;
            }
        }
    }
    Some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_folder_that_is_too_large_its_largest_fitting_part_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        for (name, size) in [("small", 10), ("larger", 100), ("huge", BYTES_MAX + 1)] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            std::fs::File::create(folder.path().join(name).join("f")).unwrap().set_len(size).unwrap();
        }
        let chosen = largest_part(folder.path(), 1).unwrap();
        assert!(chosen.path.ends_with("larger") && chosen.bytes == 100);
        let named = super::folder(Some(folder.path())).unwrap();
        assert_eq!((named.files, named.bytes), (3, BYTES_MAX + 111));
    }
}
