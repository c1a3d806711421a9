//! `metanode store`: what rots is found, what was removed gives its space back, and a store can be checked without a node.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::{
    fs::{self, File},
    os::unix::fs::FileExt as _,
    path::PathBuf,
};

use metanode_e2e::{Home, content};

const USAGE: i32 = 2;
const INTEGRITY: i32 = 5;
const IN_USE: i32 = 9;

/// Flips a bit of the stored copy of `bytes`, which some segment holds as they are.
#[track_caller]
fn flip(home: &Home, bytes: &[u8]) {
    let store = home.data().join("store");
    let logs = fs::read_dir(store).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let files: Vec<PathBuf> =
        logs.flat_map(|log| fs::read_dir(log).unwrap().map(|entry| entry.unwrap().path())).collect();
    let needle = &bytes[..64];
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "seg")) {
        let held = fs::read(file).unwrap();
        if let Some(at) = held.windows(needle.len()).position(|window| window == needle) {
            let flipped = [held[at + 10] ^ 4];
            File::options().write(true).open(file).unwrap().write_all_at(&flipped, at as u64 + 10).unwrap();
            return;
        }
    }
    panic!("no segment holds it");
}

fn put(home: &Home, seed: u64, size: usize) -> String {
    let file = home.beside("blob");
    fs::write(&file, content(seed, size)).unwrap();
    home.cli_args(["put", file.to_str().unwrap(), "-o", "json"]).ok().json()["hash"].as_str().unwrap().to_owned()
}

#[test]
fn a_scrub_finds_rot_and_a_put_heals_it() {
    let home = Home::new();
    let node = home.start(2);
    for seed in 0..20 {
        put(&home, seed, 50_000);
    }
    put(&home, 100, 1_000_000);
    let clean = home.cli("store scrub -o json").ok().json();
    assert_eq!((clean["done"].as_bool(), clean["damaged"].as_u64()), (Some(true), Some(0)));
    assert!(clean["read_bytes"].as_u64().unwrap() >= 2_000_000, "{clean}");
    flip(&home, &content(3, 50_000));
    flip(&home, &content(100, 1_000_000)[600_000..]);
    let ran = home.cli("store scrub -o json");
    assert_eq!(ran.code, INTEGRITY, "{}", ran.stderr);
    assert_eq!(ran.json()["damaged"].as_u64(), Some(2));
    put(&home, 3, 50_000);
    put(&home, 100, 1_000_000);
    assert_eq!(home.cli("store check -o json").ok().json()["damaged"].as_u64(), Some(0));
    let status = home.cli("store status -o json").ok().json();
    assert_eq!((status["blobs"].as_u64(), status["scrub_corrupt"].as_u64()), (Some(21), Some(2)));
    node.stop();
}

#[test]
fn a_repair_fetches_what_is_damaged_and_nothing_else() {
    const LARGE: usize = 9_000_000;
    let (home, other_home) = (Home::new(), Home::new());
    let (node, other) = (home.start(2), other_home.start(1));
    let large = put(&home, 100, LARGE);
    for seed in [3, 4] {
        put(&home, seed, 50_000);
    }
    put(&other_home, 100, LARGE);
    put(&other_home, 3, 50_000);
    let clean = home.cli("store check --repair -o json").ok().json();
    assert_eq!((clean["damaged"].as_u64(), clean["damaged_blobs"].as_u64()), (Some(0), Some(0)), "{clean}");

    for (seed, size, at) in [(3, 50_000, 0), (4, 50_000, 0), (100, LARGE, 5_000_000)] {
        flip(&home, &content(seed, size)[at..]);
    }
    let alone = home.cli("store check --repair -o json");
    assert_eq!(alone.code, INTEGRITY, "{}", alone.stderr);
    let alone = alone.json();
    assert_eq!((alone["damaged"].as_u64(), alone["damaged_blobs"].as_u64()), (Some(3), Some(3)), "{alone}");
    assert_eq!(alone["left"].as_array().unwrap().len(), 3, "nobody else was asked: {alone}");

    let again = home.cli("store check -o json");
    assert_eq!(again.code, INTEGRITY, "{}", again.stderr);
    let again = again.json();
    let left = again["left"].as_array().unwrap().len();
    assert_eq!((again["damaged"].as_u64(), left), (Some(0), 3), "known damage is damage: {again}");

    let sent = other.metric("sent_bytes_total");
    let ticket = other.ready.ticket.to_string();
    home.cli_args(["store", "status", "--node", &ticket]).failed(USAGE);
    home.cli_args(["stop", "--node", &ticket]).failed(USAGE);
    let ran = home.cli_args(["store", "check", "--repair", "--from", &ticket, "-o", "json"]);
    assert_eq!(ran.code, INTEGRITY, "{}", ran.stderr);
    let report = ran.json();
    let left: Vec<_> = report["left"].as_array().unwrap().iter().map(|left| left["hash"].as_str().unwrap()).collect();
    assert_eq!(
        left,
        [metanode_crypto::hash(&content(4, 50_000)).to_string()],
        "only this one is nowhere else: {report}"
    );
    assert_eq!(report["repaired_blobs"].as_u64(), Some(2), "{report}");
    let sent = other.metric("sent_bytes_total") - sent;
    assert!(sent < 500_000.0, "a chunk and a blob of 50 kB are damaged, {sent} bytes were sent");
    other.stop();

    put(&home, 4, 50_000);
    let whole = home.cli("store check --repair -o json").ok().json();
    assert_eq!((whole["damaged"].as_u64(), whole["damaged_blobs"].as_u64()), (Some(0), Some(0)), "{whole}");
    let target = home.beside("target");
    home.cli_args(["get", &large, target.to_str().unwrap()]).ok();
    assert!(fs::read(&target).unwrap() == content(100, LARGE));
    node.stop();
    let offline = home.cli("store check --offline --repair -o json").ok().json();
    assert_eq!((offline["replaced"].as_u64(), offline["damages"].as_u64()), (Some(3), Some(0)), "{offline}");
}

#[test]
fn a_compaction_gives_all_space_back() {
    let home = Home::new();
    let node = home.start(1);
    let hashes: Vec<String> = (0..100).map(|seed| put(&home, seed, 300_000)).collect();
    // Of each segment a third goes: none is worth moving by itself.
    let gone: Vec<&str> =
        hashes.iter().enumerate().filter(|(at, _)| at % 3 == 0).map(|(_, hash)| hash.as_str()).collect();
    home.cli_args(std::iter::once("rm").chain(gone.iter().copied())).ok();
    let before = home.cli("store status -o json").ok().json()["segment_bytes"].as_u64().unwrap();
    let report = home.cli("store compact -o json").ok().json();
    assert!(report["freed_segments"].as_u64().unwrap() >= 1, "{report}");
    let after = report["segment_bytes"].as_u64().unwrap();
    assert!(after < before, "{before} {after}");
    for hash in hashes.iter().enumerate().filter(|(at, _)| at % 3 != 0).map(|(_, hash)| hash) {
        home.cli_args(["stat", hash]).ok();
    }
    assert_eq!(home.cli("store scrub -o json").ok().json()["damaged"].as_u64(), Some(0));
    node.stop();
}

#[test]
fn a_store_is_checked_without_a_node() {
    let home = Home::new();
    let node = home.start(2);
    let folder = home.beside("folder");
    fs::create_dir(&folder).unwrap();
    for name in 0..5u64 {
        fs::write(folder.join(name.to_string()), content(name, 20_000)).unwrap();
    }
    home.cli_args(["put", folder.to_str().unwrap(), "--tag", "f"]).ok();
    put(&home, 50, 700_000);
    home.cli("store check --offline").failed(IN_USE);
    node.stop();
    let clean = home.cli("store check --offline -o json").ok().json();
    let counts = ["blobs", "tags", "damages"].map(|name| clean[name].as_u64().unwrap());
    assert_eq!(counts, [7, 1, 0], "{clean}");
    // Twice the same: a check changes nothing.
    assert_eq!(home.cli("store check --offline -o json").ok().json(), clean);
    flip(&home, &content(2, 20_000));
    let ran = home.cli("store check --offline -o json");
    assert_eq!(ran.code, INTEGRITY, "{}", ran.stderr);
    let damaged = ran.json();
    assert!(damaged["damages"].as_u64().unwrap() >= 2, "the payload, and the blob: {damaged}");
    assert_eq!(home.cli("store check --offline --repair").code, INTEGRITY);
    let hash = metanode_crypto::hash(&content(2, 20_000)).to_string();
    let findings: Vec<&str> =
        damaged["findings"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    assert!(findings.iter().any(|finding| finding.contains(&hash)), "{findings:?}");
    home.cli("store status").failed(6);
}
