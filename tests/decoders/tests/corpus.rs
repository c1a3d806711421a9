//! Every input that is kept, by the target it is kept for.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use metanode_decoders::{TARGETS, seeds};

/// Inputs are small: all of them together stay a fraction of the sources.
const CORPUS_BYTES_MAX: u64 = 300 << 10;

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz")
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn no_kept_input_breaks_its_target() {
    let mut bytes = 0;
    for (name, target) in TARGETS {
        let folder = fuzz().join("corpus").join(name);
        for file in names(&folder) {
            let input = fs::read(folder.join(&file)).unwrap();
            bytes += input.len() as u64;
            println!("{name}/{file}"); // shown when the target panics
            target(&input);
        }
    }
    assert!(bytes <= CORPUS_BYTES_MAX, "{bytes} bytes are kept");
}

#[test]
fn each_target_has_its_program_and_its_inputs() {
    let targets: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names(&fuzz().join("corpus")), targets);
    let programs: BTreeSet<String> =
        targets.iter().map(String::as_str).chain(["planted"]).map(|name| format!("{name}.rs")).collect();
    assert_eq!(names(&fuzz().join("fuzz_targets")), programs);
}

#[test]
fn seeds_are_what_the_encoders_write() {
    let mut kept = BTreeMap::new();
    for (name, _) in TARGETS {
        let folder = fuzz().join("corpus").join(name);
        for file in names(&folder).into_iter().filter(|file| file.starts_with("seed-")) {
            let bytes = fs::read(folder.join(&file)).unwrap();
            kept.insert(((*name).to_owned(), file), bytes);
        }
    }
    let made: BTreeMap<_, _> =
        seeds::all().into_iter().map(|seed| ((seed.target.to_owned(), seed.name), seed.bytes)).collect();
    let differ: Vec<_> =
        made.iter().filter(|(name, bytes)| kept.get(name) != Some(bytes)).map(|(name, _)| name).collect();
    let old: Vec<_> = kept.keys().filter(|name| !made.contains_key(name)).collect();
    assert!(
        differ.is_empty() && old.is_empty(),
        "differ: {differ:?}; no longer made: {old:?}\nhint: cargo run -p metanode-decoders -- seeds tests/fuzz/corpus"
    );
}
