//! Folders go to a node and come back the same; what is unsafe or incomplete does not appear.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod fake_node;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::Path,
    sync::atomic::Ordering::Relaxed,
};

use fake_node::{FakeNode, Fault};
use metanode_client::{
    Client, ClientError, Progress,
    files::{self, FileIo},
    folder::{self, Contents, FolderGet, FolderPut, Links},
};
use metanode_types::{ByteRange, DurabilityClass, Hash};
use metanode_wire::{Entry, EntryKind, Manifest};

const PUT: FolderPut = FolderPut { class: DurabilityClass::Memory, hold: true, file_io: FileIo::Plain };
const GET: FolderGet = FolderGet { replace: false, links: Links::Inside, file_io: FileIo::Plain };

/// Mode and contents (or target) of everything below a folder.
fn picture(root: &Path) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut picture = BTreeMap::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let metadata = fs::symlink_metadata(&path).unwrap();
            let contents = if metadata.is_symlink() {
                fs::read_link(&path).unwrap().into_os_string().into_encoded_bytes()
            } else if metadata.is_dir() {
                folders.push(path.clone());
                b"folder".to_vec()
            } else {
                fs::read(&path).unwrap()
            };
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            picture.insert(name, (metadata.permissions().mode(), contents));
        }
    }
    picture
}

fn make(root: &Path) {
    fs::create_dir_all(root.join("a/deep/er")).unwrap();
    fs::create_dir(root.join("empty folder")).unwrap();
    fs::write(root.join("empty"), "").unwrap();
    for i in 0..300 {
        fs::write(root.join(format!("a/{i}")), i.to_string().repeat(i)).unwrap();
    }
    fs::write(root.join("a/deep/er/twin"), "7".repeat(7)).unwrap();
    fs::write(root.join("large"), vec![5; 3_000_000]).unwrap();
    fs::write(root.join("a/script"), "#!/bin/sh").unwrap();
    fs::set_permissions(root.join("a/script"), fs::Permissions::from_mode(0o751)).unwrap();
    symlink("../../empty", root.join("a/deep/link")).unwrap();
    symlink("nowhere", root.join("dangling")).unwrap();
    fs::set_permissions(root.join("a/deep"), fs::Permissions::from_mode(0o555)).unwrap();
}

async fn get(client: &Client, manifest: &Manifest, to: &Path, how: FolderGet) -> Result<Contents, ClientError> {
    folder::get_folder(client, manifest, to, how, &Progress::default()).await
}

async fn get_file(client: &Client, hash: Hash, to: &Path) -> Result<metanode_client::Fetched, ClientError> {
    files::get_file(client, hash, ByteRange::ALL, to, false, FileIo::Plain, &Progress::default()).await
}

async fn put(client: &Client, root: &Path) -> folder::FolderStored {
    folder::put_folder(client, root, PUT, &Progress::default()).await.unwrap()
}

#[tokio::test]
async fn a_folder_comes_back_as_it_was() {
    let here = tempfile::tempdir().unwrap();
    let (source, target) = (here.path().join("source"), here.path().join("target"));
    make(&source);
    let node = FakeNode::start(Fault::None);
    let client = node.client().await;
    let progress = Progress::default();
    let stored = folder::put_folder(&client, &source, PUT, &progress).await.unwrap();
    assert_eq!((stored.contents.files, stored.contents.folders, stored.contents.links), (304, 4, 2));
    assert_eq!((progress.files(), progress.bytes()), (304, stored.contents.bytes));
    // Files of equal contents travel once: a/7 and its twin.
    assert_eq!(node.state.puts.load(Relaxed), 304 - 1 + 1 - 1, "303 files (the two empty ones are one) and a manifest");
    assert_eq!(put(&client, &source).await.hash, stored.hash, "the same folder has the same address");
    let manifest = folder::get_manifest(&client, stored.hash).await.unwrap();
    let progress = Progress::default();
    let contents = folder::get_folder(&client, &manifest, &target, GET, &progress).await.unwrap();
    assert_eq!(contents, stored.contents);
    assert_eq!((progress.files(), progress.bytes()), (304, stored.contents.bytes));
    assert_eq!(picture(&target), picture(&source));
    assert_eq!(fs::read_dir(here.path()).unwrap().count(), 2, "no temporary names are left");
    // Once more: refused, and replaced when asked.
    let again = get(&client, &manifest, &target, GET).await;
    assert!(matches!(again, Err(ClientError::TargetExists(_))));
    fs::write(target.join("stale"), "").unwrap();
    let replace = FolderGet { replace: true, ..GET };
    get(&client, &manifest, &target, replace).await.unwrap();
    assert_eq!(picture(&target), picture(&source));
    // A part of it.
    let part = folder::subfolder(&manifest, "a/deep");
    // Its link leads out of the part, though not out of the whole.
    let to = here.path().join("part");
    let refused = get(&client, &part, &to, GET).await.unwrap_err();
    assert!(matches!(&refused, ClientError::Unsuitable { path, .. } if path.ends_with("link")), "{refused}");
    assert!(!to.exists());
    let all = FolderGet { links: Links::All, ..GET };
    get(&client, &part, &to, all).await.unwrap();
    assert_eq!(fs::read(to.join("er/twin")).unwrap(), b"7777777");
}

#[tokio::test]
async fn nothing_appears_when_a_file_can_not_be_fetched() {
    let here = tempfile::tempdir().unwrap();
    let (source, target) = (here.path().join("source"), here.path().join("target"));
    make(&source);
    let node = FakeNode::start(Fault::None);
    let client = node.client().await;
    let stored = put(&client, &source).await;
    node.state.blobs.lock().unwrap().remove(&metanode_crypto::hash(b"#!/bin/sh"));
    let manifest = folder::get_manifest(&client, stored.hash).await.unwrap();
    let error = get(&client, &manifest, &target, GET).await.unwrap_err();
    assert!(error.refusal_code().is_some(), "{error}");
    assert_eq!(fs::read_dir(here.path()).unwrap().count(), 1, "neither the target nor a temporary name");
}

/// Files that have arrived may still be written when another one fails; what writes them must not outlive the folder.
#[tokio::test]
async fn nothing_appears_either_while_others_are_written() {
    let here = tempfile::tempdir().unwrap();
    let (source, target) = (here.path().join("source"), here.path().join("target"));
    fs::create_dir(&source).unwrap();
    for number in 0..300u32 {
        fs::write(source.join(format!("{number:03}")), number.to_le_bytes().repeat(2_000)).unwrap();
    }
    let node = FakeNode::start(Fault::None);
    let client = node.client().await;
    let stored = put(&client, &source).await;
    let manifest = folder::get_manifest(&client, stored.hash).await.unwrap();
    for missing in [40u32, 80, 120, 160, 200, 240, 280, 299] {
        let bytes = missing.to_le_bytes().repeat(2_000);
        node.state.blobs.lock().unwrap().remove(&metanode_crypto::hash(&bytes));
        get(&client, &manifest, &target, GET).await.unwrap_err();
        let names: Vec<_> = fs::read_dir(here.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["source"], "{missing}");
        node.hold(bytes);
    }
}

#[tokio::test]
async fn a_manifest_that_lies_about_a_size_is_caught() {
    let here = tempfile::tempdir().unwrap();
    let node = FakeNode::start(Fault::None);
    let client = node.client().await;
    for (actual, told) in [(10, 11), (400_000, 400_001), (400_000, 10), (10, 400_000)] {
        let hash = node.hold(vec![1; actual]);
        let kind = EntryKind::File { hash, size_bytes: told };
        let manifest = Manifest { entries: vec![Entry { path: "f".into(), mode: 0o644, kind }] };
        let target = here.path().join("x");
        let got = get(&client, &manifest, &target, GET).await;
        assert!(matches!(got, Err(ClientError::Unsuitable { .. })), "{actual} {told}: {got:?}");
    }
    assert_eq!(fs::read_dir(here.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn something_that_is_no_manifest_is_an_error() {
    let node = FakeNode::start(Fault::None);
    let client = node.client().await;
    for bytes in [b"hello".to_vec(), b"MNFOLD\0\x01\xff\xff\xff\xff\xff\xff\xff\xff".to_vec()] {
        let hash = node.hold(bytes);
        assert!(matches!(folder::get_manifest(&client, hash).await, Err(ClientError::Manifest(_))));
    }
}

#[tokio::test]
async fn an_empty_folder_is_a_folder() {
    let here = tempfile::tempdir().unwrap();
    let source = here.path().join("source");
    fs::create_dir(&source).unwrap();
    let node = FakeNode::start(Fault::None);
    let client = node.client().await;
    let stored = put(&client, &source).await;
    assert_eq!(stored.contents, Contents::default());
    let manifest = folder::get_manifest(&client, stored.hash).await.unwrap();
    let target = here.path().join("target");
    get(&client, &manifest, &target, GET).await.unwrap();
    assert_eq!(fs::read_dir(target).unwrap().count(), 0);
}

#[tokio::test]
async fn files_are_whole_or_absent() {
    let here = tempfile::tempdir().unwrap();
    let path = here.path().join("file");
    let data: Vec<u8> = (0..5_000_000u32).map(|i| (i / 7) as u8).collect();
    fs::write(&path, &data).unwrap();
    let node = FakeNode::start(Fault::None);
    let client = node.client().await;
    let target = here.path().join("copy");
    for how in [FileIo::Plain, FileIo::probe()] {
        let progress = Progress::default();
        let stored = files::put_file(&client, &path, Default::default(), how, &progress).await.unwrap();
        assert_eq!(stored.hash, metanode_crypto::hash(&data));
        assert_eq!(progress.bytes(), data.len() as u64);
        files::get_file(&client, stored.hash, ByteRange::ALL, &target, true, how, &progress).await.unwrap();
        assert!(fs::read(&target).unwrap() == data);
        let range = ByteRange { offset: 1_000_001, length: 99 };
        files::get_file(&client, stored.hash, range, &target, true, how, &progress).await.unwrap();
        assert!(fs::read(&target).unwrap() == data[1_000_001..1_000_100]);
    }
    assert!(get_file(&client, Hash([4; 32]), &here.path().join("missing")).await.unwrap_err().refusal_code().is_some());
    assert_eq!(fs::read_dir(here.path()).unwrap().count(), 2, "file and copy");
    let bad = FakeNode::start(Fault::FlippedBit);
    let hash = bad.hold(data.clone());
    let target = here.path().join("bad");
    let got = get_file(&bad.client().await, hash, &target).await;
    assert!(matches!(got, Err(ClientError::HashMismatch(_))));
    assert!(!target.exists());
    // What was verified before the wrong byte stays beside it, and another node goes on from there.
    if let Some((part, held)) = files::part_of(&target, &hash) {
        assert!(fs::read(part).unwrap() == data[..held as usize], "only what was verified stays");
    }
    let good = FakeNode::start(Fault::None);
    assert_eq!(good.hold(data.clone()), hash);
    get_file(&good.client().await, hash, &target).await.unwrap();
    assert!(fs::read(&target).unwrap() == data);
    assert_eq!(fs::read_dir(here.path()).unwrap().count(), 3, "what was wrong left nothing");
}
