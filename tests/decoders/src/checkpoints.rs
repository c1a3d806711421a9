//! Checkpoints: a whole one gives a partition whose own checkpoint says the same; any other is refused.

use std::collections::BTreeSet;

use metanode_blob::partition::{Checkpoint, Coverage, Partition, Recovery};
use metanode_log::{SegmentIdentity, WriterLimits};
use metanode_types::{Hash, ShardCount, ShardId};

use crate::script::Script;

const MAGIC: &[u8; 8] = b"MNCKPT\0\x02";
const HEADER_BYTES: usize = 48;
const ENTRY_BYTES: usize = 48;
const SUM_BYTES: usize = 32;

/// `what u8 | a checkpoint's bytes, or those without their hash, or a header, entries and damage`
pub fn checkpoints(data: &[u8]) {
    let mut script = Script::new(data);
    match script.u8() % 3 {
        0 => check(script.rest()),
        1 => check(&hashed(script.rest())),
        _ => {
            let mut bytes = made(&mut script);
            script.damage(&mut bytes);
            check(&hashed(&bytes));
        }
    }
}

/// With the hash that it must have.
pub(crate) fn hashed(body: &[u8]) -> Vec<u8> {
    [body, blake3::hash(body).as_bytes()].concat()
}

/// `shard u16 | shards u16 | active segment u32 | boot u64 | sequence u64 | entry count u8 | entries`
fn made(script: &mut Script<'_>) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend([7; 16]);
    bytes.extend(script.array::<24>());
    for _ in 0..script.u8() % 64 {
        let kind = script.u8() % 7;
        bytes.push(kind);
        bytes.extend(script.array::<15>()); // flags, log, segment, offset, length
        bytes.extend([script.u8() % 8; 32]);
        match kind {
            1 => bytes.extend(script.array::<4>()),
            2 => bytes.extend(script.array::<8>()),
            4 | 6 => bytes.extend(script.array::<16>()),
            _ => {}
        }
    }
    bytes.push(0);
    bytes
}

fn check(file: &[u8]) {
    let header = Coverage::decode(file);
    if let Ok(coverage) = header {
        for boot in [0, coverage.boot, coverage.boot.saturating_add(1)] {
            for log in [coverage.shard, coverage.shard.wrapping_add(1)] {
                let has = |sequence| coverage.has_frame(log, (boot, sequence));
                assert!(has(0) || !has(coverage.sequence), "what is covered begins at the beginning");
                assert!(!coverage.has_segment(log, u32::MAX, boot) || coverage.has_segment(log, 0, boot));
                assert!(boot <= coverage.boot || !has(0), "the future is not covered");
            }
        }
    }
    for shards in [1, 3] {
        let count = ShardCount::new(shards).expect("1 and 3 are counts");
        let mut recoveries: Vec<Recovery> = count.iter().map(|_| Recovery::new()).collect();
        let owner = |key: &Hash| ShardId::owner_of(key, count).index();
        if Recovery::load(file, |_, _| true, owner, &mut recoveries).is_err() {
            continue;
        }
        let coverage = header.expect("a whole checkpoint has a header");
        assert_eq!(hashed(&file[..file.len() - SUM_BYTES]), file, "a damaged checkpoint was taken");
        let before = entries(file);
        let mut after = BTreeSet::new();
        for (shard, recovery) in count.iter().zip(recoveries) {
            let (written, tags) = written(recovery, &coverage, shard.0, shards);
            let here = entries(&written);
            assert!(here.iter().all(|entry| owner(&entry.key) == shard.index()), "each key is its owner's");
            after.extend(here);
            if shards > 1 {
                continue;
            }
            let mut one = [Recovery::new()];
            assert_eq!(Recovery::load(&written, |_, _| true, |_| 0, &mut one), Ok(()), "what is written can be read");
            let [one] = one;
            assert_eq!(entries(&self::written(one, &coverage, 0, 1).0), entries(&written));
            assert!(tags <= before.len());
        }
        assert!(after.is_subset(&before), "nothing is made up: {after:?} of {before:?}");
    }
}

/// The checkpoint of the partition that a recovery gives, and how many tags it has, which are not in it without their records.
fn written(recovery: Recovery, coverage: &Coverage, shard: u16, shards: u16) -> (Vec<u8>, usize) {
    let identity = SegmentIdentity { store: coverage.store, log: shard, segment: coverage.active_segment };
    let limits = WriterLimits::for_segments(1 << 20);
    let mut partition = Partition::new(identity, coverage.boot.saturating_add(1), limits, 1 << 20);
    let tags = recovery.finish(&mut partition).len();
    partition.recover_roots();
    let mut checkpoint = Checkpoint::begin(&partition, coverage.store, shard, shards);
    let mut bytes = Vec::new();
    while let Some(part) = checkpoint.next(&partition) {
        bytes.extend(part);
    }
    partition.recover_end(true);
    (bytes, tags)
}

/// What an entry says that recovery keeps.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    kind: u8,
    location: [u8; 14],
    key: Hash,
    numbers: Vec<u8>,
}

/// The entries of a checkpoint that was taken, by the layout in its documentation.
fn entries(file: &[u8]) -> BTreeSet<Entry> {
    let mut rest = &file[HEADER_BYTES..file.len() - SUM_BYTES];
    let mut entries = BTreeSet::new();
    while rest[0] != 0 {
        let (entry, tail) = rest.split_at(ENTRY_BYTES);
        let (numbers, tail) = tail.split_at(match entry[0] {
            1 => 4,
            2 => 8,
            4 | 6 => 16,
            _ => 0,
        });
        rest = tail;
        entries.insert(Entry {
            kind: entry[0],
            location: std::array::from_fn(|i| entry[2 + i]),
            key: Hash(std::array::from_fn(|i| entry[16 + i])),
            numbers: numbers.to_vec(),
        });
    }
    entries
}
