use std::{fs::Permissions, os::unix::fs::PermissionsExt as _};

use super::*;

fn fresh() -> (tempfile::TempDir, PathBuf) {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("a/b");
    (temp, path)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn init_makes_what_open_takes_and_a_second_init_keeps_it() {
    let (_temp, path) = fresh();
    assert!(matches!(DataFolder::open(&path), Err(DataError::NotADataFolder { .. })));
    let first = DataFolder::open_or_init(&path).unwrap();
    let second = DataFolder::open_or_init(&path).unwrap();
    assert_eq!(first.node_identity().public(), second.node_identity().public());
    assert_eq!(first.operator_identity().public(), second.operator_identity().public());
    assert_ne!(first.node_identity().public(), first.operator_identity().public());
    assert_eq!(second.config().unwrap().access.writers, [first.operator_identity().public()]);
    assert_eq!(mode(&path), 0o700);
    assert_eq!(mode(&path.join(NODE_KEY_FILE)), 0o600);
    assert_eq!(mode(&path.join(OPERATOR_KEY_FILE)), 0o600);
}

#[test]
fn an_interrupted_init_is_completed_and_keeps_the_key() {
    let (_temp, path) = fresh();
    let key = DataFolder::open_or_init(&path).unwrap().node_identity().public();
    for file in [FORMAT_FILE, CONFIG_FILE, OPERATOR_KEY_FILE] {
        fs::remove_file(path.join(file)).unwrap();
        fs::write(path.join(format!("{file}.new")), "torn").unwrap();
    }
    assert_eq!(DataFolder::open_or_init(&path).unwrap().node_identity().public(), key);
}

#[test]
fn a_folder_with_other_things_is_left_alone() {
    let (_temp, path) = fresh();
    fs::create_dir_all(&path).unwrap();
    fs::write(path.join("thesis.tex"), "").unwrap();
    assert!(matches!(DataFolder::open_or_init(&path), Err(DataError::NotADataFolder { .. })));
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1);
    let file = path.join("thesis.tex");
    assert!(matches!(DataFolder::open_or_init(&file), Err(DataError::NotADataFolder { .. })));
}

#[test]
fn a_later_layout_is_refused_and_nonsense_too() {
    let (_temp, path) = fresh();
    drop(DataFolder::open_or_init(&path).unwrap());
    fs::write(path.join(FORMAT_FILE), "metanode-data 2\n").unwrap();
    let refused = DataFolder::open_or_init(&path);
    assert!(matches!(refused, Err(DataError::NewerFormat { found: 2, supported: 1 })), "{refused:?}");
    for nonsense in ["metanode-data 0", "metanode-data", "cat-data 1", ""] {
        fs::write(path.join(FORMAT_FILE), nonsense).unwrap();
        assert!(matches!(DataFolder::open_or_init(&path), Err(DataError::BadFormat { .. })), "{nonsense}");
    }
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let (_temp, path) = fresh();
    drop(DataFolder::open_or_init(&path).unwrap());
    let key = path.join(OPERATOR_KEY_FILE);
    for loose in [0o640, 0o604, 0o620, 0o700] {
        fs::set_permissions(&key, Permissions::from_mode(loose)).unwrap();
        match DataFolder::open(&path) {
            Err(DataError::KeyMode { path, mode }) => {
                assert_eq!((path, mode), (fs::canonicalize(&key).unwrap(), loose));
            }
            other => panic!("{other:?}"),
        }
    }
    fs::set_permissions(&key, Permissions::from_mode(0o400)).unwrap();
    assert!(DataFolder::open(&path).is_ok(), "stricter than 0600 is fine");
    fs::set_permissions(&key, Permissions::from_mode(0o600)).unwrap();
    fs::write(&key, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n").unwrap();
    assert!(matches!(DataFolder::open(&path), Err(DataError::Key { .. })));
}

#[test]
fn one_node_at_a_time() {
    let (_temp, path) = fresh();
    let data = DataFolder::open_or_init(&path).unwrap();
    assert_eq!(is_locked(&path).unwrap(), None);
    let lock = data.lock().unwrap();
    // Another open file description: for flock(2) the same as another process.
    match DataFolder::open(&path).unwrap().lock() {
        Err(DataError::Locked { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
        other => panic!("{other:?}"),
    }
    assert_eq!(is_locked(&path).unwrap(), Some(Some(std::process::id())));
    drop(lock);
    assert_eq!(is_locked(&path).unwrap(), None);
    drop(data.lock().unwrap());
}

#[test]
fn many_at_once_make_one_folder() {
    let (_temp, path) = fresh();
    let keys: Vec<_> = std::thread::scope(|scope| {
        let open = || DataFolder::open_or_init(&path).unwrap().node_identity().public();
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(keys.iter().all(|key| *key == keys[0]), "{keys:?}");
}

#[test]
fn a_folder_that_cannot_be_written_says_so() {
    let (temp, path) = fresh();
    fs::set_permissions(temp.path(), Permissions::from_mode(0o500)).unwrap();
    let refused = DataFolder::open_or_init(&path);
    fs::set_permissions(temp.path(), Permissions::from_mode(0o700)).unwrap();
    if rustix::process::geteuid().is_root() {
        // Modes don't bind root. /proc does: nothing can be made there, whoever asks.
        let refused = DataFolder::open_or_init(Path::new("/proc/self/fdinfo/metanode"));
        assert!(refused.is_err(), "{refused:?}");
        eprintln!("skipped: modes don't bind root, so a folder without write permission can't be shown");
        return;
    }
    assert!(matches!(refused, Err(DataError::ReadOnly { .. })), "{refused:?}");
}
