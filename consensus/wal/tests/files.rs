//! A sign state on real files: who may open it, and what counts as damage.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use metanode_crypto::Identity;
use metanode_shard::{ShardsConfig, start};
use metanode_types::ShardCount;
use metanode_wal::{FILE_BYTES_MIN, Opened, SignState, Wal, WalError, format::BLOCK, open};

const CHAIN: [u8; 32] = [7; 32];

fn acquire(folder: &Path) -> SignState {
    SignState::acquire(folder, CHAIN, Identity::from_seed(&[1; 32])).unwrap()
}

fn opened(folder: &Path) -> Result<Opened, WalError> {
    open(acquire(folder), FILE_BYTES_MIN).map(|(_, opened)| opened)
}

/// Runs in a shard of its own, as a node does.
fn with_wal(folder: &Path, work: impl AsyncFnOnce(Wal) + Send + 'static) {
    let folder = folder.to_owned();
    let mut work = Some(work);
    let shards = start(&ShardsConfig::unpinned("wal-test", ShardCount::new(1).unwrap()), |_| {
        let (work, folder) = (work.take().unwrap(), folder.clone());
        move || async move {
            let (opening, _) = open(acquire(&folder), FILE_BYTES_MIN).unwrap();
            work(Wal::start(opening).unwrap()).await;
        }
    });
    shards.unwrap().join().pop().unwrap().unwrap();
}

fn file(folder: &Path, turn: usize) -> PathBuf {
    folder.join(format!("sign-{turn}.wal"))
}

fn bend(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
}

#[test]
fn records_come_back_in_their_order_and_those_that_nobody_needs_go() {
    let folder = tempfile::tempdir().unwrap();
    assert!(opened(folder.path()).unwrap().is_new);
    with_wal(folder.path(), async |wal| {
        wal.append(&[b"one".to_vec(), b"two".to_vec()]).await.unwrap();
        wal.append(&[b"three".to_vec()]).await.unwrap();
    });
    let found = opened(folder.path()).unwrap();
    assert_eq!(found, Opened { records: ["one", "two", "three"].map(Into::into).into(), is_new: false, torn: false });
    with_wal(folder.path(), async |wal| {
        wal.restart(vec![b"three".to_vec()]).await.unwrap();
        let room = wal.room_bytes();
        assert!(matches!(wal.append(&[vec![0; room as usize]]).await, Err(WalError::Full { .. })));
        wal.append(&[vec![4; room as usize - 4]]).await.unwrap();
        assert_eq!(wal.room_bytes(), 0);
        wal.restart(vec![b"five".to_vec()]).await.unwrap();
    });
    assert_eq!(opened(folder.path()).unwrap().records, [b"five"]);
}

#[test]
fn one_process_has_it_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let first = acquire(folder.path());
    let second = SignState::acquire(folder.path(), CHAIN, Identity::from_seed(&[1; 32]));
    assert!(matches!(second, Err(WalError::InUse { .. })));
    drop(first);
    acquire(folder.path());
}

#[test]
fn another_chains_or_keys_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    opened(folder.path()).unwrap();
    for (chain, seed) in [([8; 32], 1), (CHAIN, 2)] {
        let state = SignState::acquire(folder.path(), chain, Identity::from_seed(&[seed; 32])).unwrap();
        assert!(matches!(open(state, FILE_BYTES_MIN), Err(WalError::Foreign { .. })));
    }
    assert!(opened(folder.path()).unwrap().is_new);
}

/// What was said before the damage may have been more than is left: this validator does not go on by itself.
#[test]
fn damage_is_told_from_a_torn_tail() {
    let folder = tempfile::tempdir().unwrap();
    with_wal(folder.path(), async |wal| {
        for record in ["one", "two", "three"] {
            wal.append(&[record.into()]).await.unwrap();
        }
    });
    let first = file(folder.path(), 0);
    // The blocks: header, the empty frame that every generation begins with, three frames.
    bend(&first, 4 * BLOCK as u64 + 24);
    let found = opened(folder.path()).unwrap();
    assert_eq!((found.records, found.torn), (vec![b"one".to_vec(), b"two".to_vec()], true));
    let found = opened(folder.path()).unwrap();
    assert!(!found.torn, "it was cleaned");
    bend(&first, 2 * BLOCK as u64 + 24);
    assert!(matches!(opened(folder.path()), Err(WalError::Damaged { path, .. }) if path == first));
    bend(&first, 2 * BLOCK as u64 + 24);
    assert_eq!(opened(folder.path()).unwrap().records.len(), 2);
    bend(&first, 10);
    assert!(matches!(opened(folder.path()), Err(WalError::Damaged { path, .. }) if path == first));
}

/// The file that holds for nothing any more must not be believed when the newer one is lost.
#[test]
fn an_old_file_is_never_taken_for_the_truth() {
    let folder = tempfile::tempdir().unwrap();
    with_wal(folder.path(), async |wal| {
        wal.append(&[b"old".to_vec()]).await.unwrap();
        wal.restart(vec![b"new".to_vec()]).await.unwrap();
    });
    let second = file(folder.path(), 1);
    let kept = fs::read(&second).unwrap();
    for at in [10, BLOCK as u64 + 22] {
        bend(&second, at);
        assert!(matches!(opened(folder.path()), Err(WalError::Damaged { path, .. }) if path == second), "{at}");
        bend(&second, at);
    }
    fs::remove_file(&second).unwrap();
    assert!(matches!(opened(folder.path()), Err(WalError::Damaged { path, .. }) if path == second));
    fs::write(&second, kept).unwrap();
    assert_eq!(opened(folder.path()).unwrap().records, [b"new"]);
    bend(&file(folder.path(), 0), 10);
    assert_eq!(opened(folder.path()).unwrap().records, [b"new"], "the old one is not needed");
}
