//! Folders to store and to compare.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::{
        fs::{PermissionsExt as _, symlink},
        net::UnixListener,
    },
    path::Path,
};

use crate::content;

/// One thing in a folder, as far as the product keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A regular file: permission bits and contents.
    File(u32, Vec<u8>),
    /// A folder: permission bits.
    Folder(u32),
    /// A symbolic link and its target.
    Link(String),
}

/// Makes a folder with names that need care, modes, links, empty and nested folders, empty and large files. With `special`, also
/// a socket, which can't be stored.
pub fn make_tree(root: &Path, special: bool) {
    let file = |path: &str, bytes: &[u8], mode: u32| {
        let path = root.join(path);
        fs::write(&path, bytes).expect("the folder is writable");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("the file is ours");
    };
    for folder in ["nested/deeper/deepest", "empty", "with space/ünïcode", "private"] {
        fs::create_dir_all(root.join(folder)).expect("the folder is writable");
    }
    file("empty file", b"", 0o644);
    file("script", b"#!/bin/sh\n", 0o755);
    file("private/key", &content(1, 119), 0o600);
    file("nested/one byte", b"1", 0o644);
    file("nested/deeper/chunk", &content(2, 256 * 1024), 0o644);
    file("nested/deeper/chunk and one", &content(3, 256 * 1024 + 1), 0o640);
    file("nested/deeper/deepest/large", &content(4, 3 << 20), 0o444);
    file("nested/deeper/deepest/twin of chunk", &content(2, 256 * 1024), 0o644);
    file("with space/ünïcode/-leading dash", b"-", 0o644);
    file("with space/ünïcode/日本語", &content(5, 5000), 0o644);
    for number in 0..40 {
        file(&format!("nested/{number}"), &content(100 + number, 50 * number as usize), 0o644);
    }
    symlink("../script", root.join("nested/to script")).expect("the file system has links");
    symlink("nowhere", root.join("dangling")).expect("the file system has links");
    fs::set_permissions(root.join("private"), fs::Permissions::from_mode(0o700)).expect("the folder is ours");
    if special {
        // The socket's file stays when the listener goes.
        UnixListener::bind(root.join("socket")).expect("the path is short enough");
    }
}

/// Everything below a folder that the product keeps, by path.
pub fn picture(root: &Path) -> BTreeMap<String, Item> {
    let mut picture = BTreeMap::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the folder can be listed") {
            let path = entry.expect("the folder can be listed").path();
            let metadata = fs::symlink_metadata(&path).expect("what is listed is there");
            let mode = metadata.permissions().mode() & 0o777;
            let item = if metadata.is_symlink() {
                let target = fs::read_link(&path).expect("a link can be read");
                Item::Link(target.to_str().expect("targets are UTF-8").to_owned())
            } else if metadata.is_dir() {
                folders.push(path.clone());
                Item::Folder(mode)
            } else if metadata.is_file() {
                Item::File(mode, fs::read(&path).expect("a file can be read"))
            } else {
                continue;
            };
            let name = path.strip_prefix(root).expect("it lies below").to_str().expect("names are UTF-8");
            picture.insert(name.to_owned(), item);
        }
    }
    picture
}
