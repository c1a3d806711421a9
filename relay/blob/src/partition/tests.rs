use std::collections::HashMap;

use metanode_log::{ScanStep, SegmentScan};
use metanode_types::limits::BLOB_BYTES_MAX;

use super::*;

const STORE: [u8; 16] = [5; 16];
const DURABLE: RootOptions =
    RootOptions { class: DurabilityClass::Durable, kind: BlobKind::Blob, hold: true, keep: false, lease: false };

/// A partition on a disk in memory: segments by number.
struct Bench {
    partition: Partition,
    disk: BTreeMap<u32, Vec<u8>>,
    ended: HashMap<Token, Result<Outcome, OpError>>,
    released: Vec<ReleasedRoot>,
    token: Token,
}

fn identity(segment: u32) -> SegmentIdentity {
    SegmentIdentity { store: STORE, log: 0, segment }
}

impl Bench {
    fn new(boot: u64, segment: u32, disk: BTreeMap<u32, Vec<u8>>) -> Self {
        let partition = Partition::new(identity(segment), boot, WriterLimits::for_segments(1 << 20), 1000);
        Self { partition, disk, ended: HashMap::new(), released: Vec::new(), token: 0 }
    }

    fn submit(&mut self, op: Op) -> Token {
        self.token += 1;
        self.partition.submit(self.token, op);
        self.collect();
        self.token
    }

    fn collect(&mut self) {
        for event in self.partition.take_events() {
            match event {
                Event::Ended(token, result) => assert!(self.ended.insert(token, result).is_none(), "ended once"),
                Event::Released(root) => self.released.push(root),
                Event::Unrooted(_) | Event::SpaceDied => {}
            }
        }
    }

    /// Performs one effect; `false` when there is none.
    fn step(&mut self) -> bool {
        match self.partition.poll() {
            None => return false,
            Some(Effect::Prepare { segment, .. }) => {
                self.disk.insert(segment, identity(segment).encode_header(self.partition.boot()));
                self.partition.prepared(segment, Ok(()));
            }
            Some(Effect::Commit { segment, offset, image }) => {
                let file = self.disk.get_mut(&segment).unwrap();
                file.resize((offset + image.length) as usize, 0);
                image.copy_to(&mut file[offset as usize..]);
                self.partition.committed(Ok(()));
            }
            Some(Effect::Revoke { segment, offset }) => {
                self.disk.get_mut(&segment).unwrap().truncate(offset as usize);
                self.partition.revoked(Ok(()));
            }
        }
        self.collect();
        true
    }

    fn run(&mut self) {
        while self.step() {}
    }

    fn done(&mut self, op: Op) -> Result<Outcome, OpError> {
        let token = self.submit(op);
        self.run();
        self.ended[&token].clone()
    }

    fn put(&mut self, bytes: &'static [u8], options: RootOptions) -> Result<Outcome, OpError> {
        self.done(put(bytes, options))
    }

    fn restart(self) -> Self {
        let disk = self.disk;
        let boot = self.partition.boot() + 1;
        let segment = disk.keys().max().map_or(0, |s| s + 1);
        let mut recovery = Recovery::new();
        for (&segment, file) in &disk {
            let mut scan = SegmentScan::new(identity(segment), file.len() as u32);
            loop {
                match scan.step() {
                    ScanStep::Read { offset, length } => {
                        let end = (offset as usize + length as usize).min(file.len());
                        scan.supply(offset, Bytes::copy_from_slice(&file[offset as usize..end]));
                    }
                    ScanStep::Frame { header, records } => {
                        for head in &records {
                            recovery.record(head, (header.boot, header.sequence));
                        }
                    }
                    ScanStep::Rot { .. } => panic!("no rot here"),
                    ScanStep::End { .. } => break,
                }
            }
        }
        let mut bench = Self::new(boot, segment, disk);
        for head in recovery.finish(&mut bench.partition) {
            let payload = bench.read(head.location);
            let target = bench.partition.recover_tag(&head, &payload).unwrap();
            assert!(bench.partition.recover_root_reference(&target));
        }
        bench.partition.recover_roots();
        bench.partition.recover_end(true);
        bench.run();
        bench
    }

    fn read(&self, location: Location) -> Vec<u8> {
        self.disk[&location.segment][location.offset as usize..(location.offset + location.length) as usize].to_vec()
    }

    fn get(&self, hash: Hash) -> Option<Vec<u8>> {
        match self.partition.blob(&hash)?.1? {
            Source::Bytes(bytes) => Some(bytes.to_vec()),
            Source::Log(location) => {
                let bytes = self.read(location);
                let checksum = identity(location.segment).payload_checksum(location.offset.into(), &bytes);
                assert_eq!(
                    self.partition.checksum(&hash, location),
                    Some(checksum),
                    "the index knows what was written"
                );
                Some(bytes)
            }
            Source::Corrupt => None,
        }
    }

    /// Moves everything live out of `segment` and deletes it, as a shell does.
    fn compact(&mut self, segment: u32, droppable: bool) {
        let file = self.disk[&segment].clone();
        let mut scan = SegmentScan::new(identity(segment), file.len() as u32);
        let mut heads = Vec::new();
        loop {
            match scan.step() {
                ScanStep::Read { offset, length } => {
                    let end = (offset as usize + length as usize).min(file.len());
                    scan.supply(offset, Bytes::copy_from_slice(&file[offset as usize..end]));
                }
                ScanStep::Frame { records, .. } => heads.extend(records),
                ScanStep::Rot { .. } => panic!("no rot here"),
                ScanStep::End { .. } => break,
            }
        }
        for head in heads {
            let payload = self.read(head.location).into();
            assert_eq!(self.done(Op::Move { head, payload, droppable }), Ok(Outcome::Done));
        }
        assert_eq!(self.partition.live(0, segment), Live::default());
        self.disk.remove(&segment);
    }
}

fn hash_of(bytes: &[u8]) -> Hash {
    Hash(*blake3::hash(bytes).as_bytes())
}

fn put(bytes: &'static [u8], options: RootOptions) -> Op {
    Op::PutWhole { hash: hash_of(bytes), bytes: Bytes::from_static(bytes), options }
}

fn tag(name: &str) -> TagName {
    name.parse().unwrap()
}

const NEW: Outcome = Outcome::Stored { existed: false, became_folder: false };
const OLD: Outcome = Outcome::Stored { existed: true, became_folder: false };

#[test]
fn a_durable_put_is_answered_after_the_sync_and_survives_a_restart() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let token = bench.submit(put(b"hello", DURABLE));
    assert!(bench.step(), "prepare");
    bench.collect();
    assert!(!bench.ended.contains_key(&token), "staged is not durable");
    assert!(bench.step(), "commit");
    assert_eq!(bench.ended[&token], Ok(NEW));
    let bench = bench.restart();
    assert_eq!(bench.get(hash_of(b"hello")).unwrap(), b"hello");
}

#[test]
fn identical_puts_join_and_a_durable_one_waits_for_a_memory_one() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let memory = RootOptions { class: DurabilityClass::Memory, ..DURABLE };
    let first = bench.submit(put(b"same", memory));
    assert_eq!(bench.ended[&first], Ok(NEW), "memory is answered at once");
    assert_eq!(bench.get(hash_of(b"same")).unwrap(), b"same", "and readable");
    let second = bench.submit(put(b"same", DURABLE));
    assert!(!bench.ended.contains_key(&second));
    bench.run();
    assert_eq!(bench.ended[&second], Ok(OLD));
    assert_eq!(bench.disk.values().map(Vec::len).max(), Some(4096 + 8192), "one frame with one record");
}

#[test]
fn removal_is_durable_and_a_later_put_brings_the_blob_back() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let hash = hash_of(b"x");
    assert_eq!(bench.put(b"x", DURABLE), Ok(NEW));
    assert_eq!(bench.done(Op::Remove { hash }), Ok(Outcome::Removed));
    assert_eq!(bench.done(Op::Remove { hash }), Err(OpError::NotFound));
    let mut bench = bench.restart();
    assert_eq!(bench.get(hash), None);
    assert_eq!(bench.put(b"x", DURABLE), Ok(NEW));
    let bench = bench.restart();
    assert_eq!(bench.get(hash).unwrap(), b"x");
}

#[test]
fn tags_refer_and_removal_is_refused_while_they_do() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let hash = hash_of(b"x");
    bench.put(b"x", DURABLE).unwrap();
    assert_eq!(bench.done(Op::Refer { hash }), Ok(Outcome::Done));
    assert_eq!(bench.done(Op::TagSet { name: tag("t"), target: hash }), Ok(Outcome::Untagged(None)));
    assert_eq!(bench.done(Op::Remove { hash }), Err(OpError::InUse { references: 1 }));
    let mut bench = bench.restart();
    assert_eq!(bench.partition.tag(&tag("t")), Some(hash));
    assert_eq!(bench.done(Op::Remove { hash }), Err(OpError::InUse { references: 1 }));
    assert_eq!(bench.done(Op::TagRemove { name: tag("t") }), Ok(Outcome::Untagged(Some(hash))));
    bench.partition.release_root(&hash);
    assert_eq!(bench.done(Op::Remove { hash }), Ok(Outcome::Removed));
    let bench = bench.restart();
    assert_eq!(bench.partition.tag(&tag("t")), None);
    assert_eq!(bench.get(hash), None);
}

/// What the node needs is removed by the node alone, also when somebody has put it before, and after a restart.
#[test]
fn a_kept_root_is_removed_by_the_node_alone() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    bench.put(b"a", DURABLE).unwrap();
    let kept = RootOptions { keep: true, ..DURABLE };
    bench.put(b"a", kept).unwrap();
    bench.put(b"b", kept).unwrap();
    bench.put(b"b", DURABLE).unwrap();
    let mut bench = bench.restart();
    for content in [b"a", b"b"] {
        let hash = hash_of(content);
        assert_eq!(bench.done(Op::Remove { hash }), Err(OpError::Kept));
        assert_eq!(bench.done(Op::RemoveKept { hash }), Ok(Outcome::Removed));
        assert_eq!(bench.done(Op::Remove { hash }), Err(OpError::NotFound));
    }
}

#[test]
fn a_leased_root_goes_with_its_lease_and_stays_when_it_is_held_meanwhile() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let leased = RootOptions { hold: false, lease: true, ..DURABLE };
    bench.put(b"a", leased).unwrap();
    bench.put(b"b", leased).unwrap();
    assert_eq!(bench.done(Op::Remove { hash: hash_of(b"a") }), Err(OpError::InUse { references: 1 }));
    assert_eq!(bench.put(b"b", DURABLE), Ok(OLD));
    for bytes in [b"a", b"b"] {
        bench.partition.release_lease(&hash_of(bytes));
        bench.run();
    }
    assert_eq!(bench.get(hash_of(b"a")), None);
    let bench = bench.restart();
    assert_eq!(bench.get(hash_of(b"a")), None);
    assert_eq!(bench.get(hash_of(b"b")).unwrap(), b"b");
}

#[test]
fn an_unheld_root_that_nobody_refers_to_is_dropped_by_the_next_start() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    bench.put(b"a", RootOptions { hold: false, lease: true, ..DURABLE }).unwrap();
    let bench = bench.restart();
    assert_eq!(bench.get(hash_of(b"a")), None);
    assert_eq!(bench.partition.live_segments().map(|(_, live)| live.records).sum::<u32>(), 1, "its tombstone");
}

#[test]
fn chunks_live_by_references_and_a_root_of_one_shares_them() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let name = hash_of(b"chunk");
    let chunk = || Op::PutChunk { name, bytes: Bytes::from_static(b"chunk") };
    assert_eq!(bench.done(chunk()), Ok(Outcome::Done));
    assert_eq!(bench.partition.blob(&name).map(|b| b.0), None, "a chunk is no blob");
    assert_eq!(bench.put(b"chunk", DURABLE), Ok(NEW));
    bench.partition.release_chunk(&name);
    assert_eq!(bench.get(name).unwrap(), b"chunk");
    assert_eq!(bench.done(Op::Remove { hash: name }), Ok(Outcome::Removed));
    assert!(matches!(bench.partition.chunk(&name), Source::Corrupt));
}

#[test]
fn a_pinned_root_keeps_its_content_after_removal() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let hash = hash_of(b"x");
    bench.put(b"x", DURABLE).unwrap();
    bench.partition.pin(hash).unwrap();
    assert_eq!(bench.done(Op::Remove { hash }), Ok(Outcome::Removed));
    assert!(matches!(bench.partition.chunk(&hash), Source::Log(_)));
    bench.partition.unpin(hash);
    assert!(matches!(bench.partition.chunk(&hash), Source::Corrupt));
}

#[test]
fn the_roots_of_larger_blobs_report_their_release() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let hash = Hash([9; 32]);
    let payload = Bytes::from(vec![1; 64]);
    let size_bytes = CHUNK_BYTES as u64 + 1;
    let op = Op::PutRoot { hash, size_bytes, payload: payload.clone(), options: DURABLE };
    assert_eq!(bench.done(op.clone()), Ok(NEW));
    assert_eq!(bench.done(op), Ok(OLD));
    let mut bench = bench.restart();
    let root = *bench.partition.root(&hash).unwrap();
    assert_eq!(bench.read(root.location), payload);
    assert_eq!(bench.done(Op::Remove { hash }), Ok(Outcome::Removed));
    assert_eq!(bench.released, [ReleasedRoot { hash, entry: root }]);
}

#[test]
fn compaction_keeps_what_counts_and_tombstones_until_they_may_go() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    for bytes in [&b"keep"[..], b"drop"] {
        bench.put(bytes, DURABLE).unwrap();
    }
    bench.done(Op::Refer { hash: hash_of(b"keep") }).unwrap();
    bench.done(Op::TagSet { name: tag("t"), target: hash_of(b"keep") }).unwrap();
    let mut bench = bench.restart();
    assert_eq!(bench.done(Op::Remove { hash: hash_of(b"drop") }), Ok(Outcome::Removed));
    let mut bench = bench.restart();
    let segments: Vec<u32> = bench.disk.keys().copied().collect();
    // The tombstone's segment first: the blob is still in an older one, so the tombstone must move.
    bench.compact(segments[1], false);
    let mut bench = bench.restart();
    assert_eq!(bench.get(hash_of(b"drop")), None);
    bench.compact(segments[0], false);
    let bench = bench.restart();
    assert_eq!(bench.get(hash_of(b"keep")).unwrap(), b"keep");
    assert_eq!(bench.partition.tag(&tag("t")), Some(hash_of(b"keep")));
    assert_eq!(bench.get(hash_of(b"drop")), None);
}

#[test]
fn a_corrupt_chunk_is_replaced_by_the_next_put() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let hash = hash_of(b"x");
    bench.put(b"x", DURABLE).unwrap();
    let Source::Log(location) = bench.partition.chunk(&hash) else { panic!() };
    bench.partition.mark_corrupt(&hash, location);
    assert_eq!(bench.get(hash), None);
    assert_eq!(bench.put(b"x", DURABLE), Ok(OLD));
    let mut bench = bench.restart();
    assert_eq!(bench.get(hash).unwrap(), b"x");
    assert_eq!(bench.done(Op::Remove { hash }), Ok(Outcome::Removed));
    assert!(matches!(bench.partition.chunk(&hash), Source::Corrupt), "one reference, not two");
}

#[test]
fn the_index_cap_refuses_and_failures_answer_everybody() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    bench.partition.entries_max = 2;
    assert_eq!(bench.put(b"a", DURABLE), Ok(NEW));
    assert_eq!(bench.put(b"b", DURABLE), Err(OpError::IndexFull));
    assert_eq!(bench.put(b"a", DURABLE), Ok(OLD));
    bench.partition.entries_max = 100;
    let first = bench.submit(put(b"c", DURABLE));
    let second = bench.submit(put(b"c", DURABLE));
    assert!(matches!(bench.partition.poll(), Some(Effect::Commit { .. })));
    bench.partition.committed(Err(Failure::Io));
    bench.collect();
    assert!(!bench.ended.contains_key(&first), "it may still be on disk");
    assert!(bench.step());
    assert_eq!(bench.ended[&first], Err(OpError::Log(Failure::Io)));
    bench.run();
    assert_eq!(bench.ended[&second], Ok(NEW), "decided anew, in the next segment");
}

#[test]
fn a_checkpoint_written_while_the_partition_changes_and_the_log_behind_it_give_the_same_state() {
    for changes_at in [0, 1, 500, 1024, 1025] {
        let mut bench = Bench::new(1, 0, BTreeMap::new());
        let early: Vec<&'static [u8]> = vec![b"a", b"b", b"c", b"d"];
        for bytes in &early {
            bench.put(bytes, DURABLE).unwrap();
        }
        bench.done(Op::Remove { hash: hash_of(b"b") }).unwrap();
        bench.done(Op::Refer { hash: hash_of(b"a") }).unwrap();
        bench.done(Op::TagSet { name: tag("t"), target: hash_of(b"a") }).unwrap();
        let mut checkpoint = Checkpoint::begin(&bench.partition, STORE, 0, 1);
        let mut bytes = Vec::new();
        for step in 0.. {
            if step == changes_at {
                bench.done(Op::Remove { hash: hash_of(b"c") }).unwrap();
                bench.put(b"e", DURABLE).unwrap();
                bench.put(b"b", DURABLE).unwrap();
            }
            match checkpoint.next(&bench.partition) {
                Some(part) => bytes.extend(part),
                None => break,
            }
        }
        let coverage = Coverage::decode(&bytes).unwrap();
        assert_eq!((coverage.boot, coverage.sequence), (1, 6));
        let mut recoveries = [Recovery::new()];
        Recovery::load(&bytes, |_, _| true, |_| 0, &mut recoveries).unwrap();
        let [mut recovery] = recoveries;
        for (&segment, file) in &bench.disk {
            if coverage.has_segment(0, segment, 1) {
                continue;
            }
            let mut scan = SegmentScan::new(identity(segment), file.len() as u32);
            loop {
                match scan.step() {
                    ScanStep::Read { offset, length } => {
                        let end = (offset as usize + length as usize).min(file.len());
                        scan.supply(offset, Bytes::copy_from_slice(&file[offset as usize..end]));
                    }
                    ScanStep::Frame { header, records } => {
                        let order = (header.boot, header.sequence);
                        if !coverage.has_frame(0, order) {
                            records.iter().for_each(|head| recovery.record(head, order));
                        }
                    }
                    ScanStep::Rot { .. } => panic!("no rot here"),
                    ScanStep::End { .. } => break,
                }
            }
        }
        let mut after = Bench::new(2, 9, bench.disk.clone());
        for head in recovery.finish(&mut after.partition) {
            let target = after.partition.recover_tag(&head, &after.read(head.location)).unwrap();
            assert!(after.partition.recover_root_reference(&target));
        }
        after.partition.recover_roots();
        after.partition.recover_end(true);
        for (bytes, there) in [(&b"a"[..], true), (b"b", true), (b"c", false), (b"d", true), (b"e", true)] {
            assert_eq!(after.get(hash_of(bytes)).is_some(), there, "{bytes:?} at {changes_at}");
        }
        assert_eq!(after.partition.tag(&tag("t")), Some(hash_of(b"a")));
        let mut damaged = bytes.clone();
        damaged[100] ^= 1;
        assert_eq!(Recovery::load(&damaged, |_, _| true, |_| 0, &mut [Recovery::new()]), Err(MalformedCheckpoint));
        assert_eq!(
            Recovery::load(&bytes[..bytes.len() - 1], |_, _| true, |_| 0, &mut [Recovery::new()]),
            Err(MalformedCheckpoint)
        );
    }
}

/// The checkpoint of nothing in partition 0 of 1, with the hash that it must have; `cut` bytes of it are missing.
fn whole_checkpoint(entries: &[u8], cut: usize) -> Vec<u8> {
    let mut bytes = b"MNCKPT\0\x02".to_vec();
    bytes.extend([7; 16]);
    bytes.extend([0, 0, 1, 0, 0, 0, 0, 0]);
    bytes.extend([1u64, 0].map(u64::to_le_bytes).concat());
    bytes.extend(entries);
    bytes.push(0);
    bytes.truncate(bytes.len() - cut);
    let sum = blake3::hash(&bytes);
    bytes.extend(sum.as_bytes());
    bytes
}

fn load(bytes: &[u8]) -> Result<Recovery, MalformedCheckpoint> {
    let mut recoveries = [Recovery::new()];
    Recovery::load(bytes, |_, _| true, |_| 0, &mut recoveries)?;
    let [recovery] = recoveries;
    Ok(recovery)
}

#[test]
fn a_checkpoint_whose_hash_is_right_may_still_be_none() {
    assert!(load(&whole_checkpoint(&[], 0)).is_ok());
    for cut in 1..=41 {
        assert_eq!(load(&whole_checkpoint(&[], cut)).err(), Some(MalformedCheckpoint), "{cut}");
    }
    let mut header = whole_checkpoint(&[], 1)[..48].to_vec();
    header[32] = 0;
    assert_eq!(Coverage::decode(&header), Err(MalformedCheckpoint), "there is no opening 0");
}

#[test]
fn a_blob_larger_than_any_makes_no_checkpoint() {
    let root = |key: u8, size: u64| [&[2, 0][..], &[0; 14], &[key; 32], &size.to_le_bytes()].concat();
    assert_eq!(load(&whole_checkpoint(&root(1, BLOB_BYTES_MAX + 1), 0)).err(), Some(MalformedCheckpoint));
    let recovery = load(&whole_checkpoint(&[root(1, BLOB_BYTES_MAX), root(2, 7)].concat(), 0)).unwrap();
    let mut bench = Bench::new(2, 0, BTreeMap::new());
    recovery.finish(&mut bench.partition);
    assert_eq!(bench.partition.blobs(), (2, BLOB_BYTES_MAX + 7));
}

#[test]
fn a_put_replaces_a_damaged_root_and_the_new_one_takes_the_references() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let (hash, chunk, page) = (Hash([1; 32]), hash_of(b"chunk"), hash_of(b"page"));
    let upload = |bench: &mut Bench| {
        for (name, bytes) in [(chunk, &b"chunk"[..]), (page, b"page")] {
            let bytes = Bytes::from_static(bytes);
            assert_eq!(bench.done(Op::PutChunk { name, bytes }), Ok(Outcome::Done));
        }
        let payload = Bytes::from(vec![7; 64]);
        bench.done(Op::PutRoot { hash, size_bytes: CHUNK_BYTES as u64 + 1, payload, options: DURABLE })
    };
    assert_eq!(upload(&mut bench), Ok(NEW));
    assert_eq!(upload(&mut bench), Ok(OLD));
    bench.partition.release_chunk(&chunk); // as an upload does that met its root
    bench.partition.release_chunk(&page);
    let before = bench.partition.root(&hash).unwrap().location;
    bench.partition.mark_damaged(&hash);
    assert_eq!(upload(&mut bench), Ok(NEW), "its references pass to the new root");
    let root = *bench.partition.root(&hash).unwrap();
    assert!(root.location != before && !root.damaged);
    assert_eq!(upload(&mut bench), Ok(OLD));
}

/// Rot took the root, and left two tags of it.
#[test]
fn references_to_a_root_that_is_lost_count_again_when_it_is_stored_again() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let hash = hash_of(b"x");
    assert!(!bench.partition.recover_root_reference(&hash));
    assert!(!bench.partition.recover_root_reference(&hash));
    bench.partition.release_root(&hash);
    assert_eq!(bench.put(b"x", RootOptions { hold: false, ..DURABLE }), Ok(NEW));
    assert_eq!(bench.done(Op::Remove { hash }), Err(OpError::InUse { references: 1 }));
    bench.partition.release_root(&hash);
    bench.run();
    assert_eq!(bench.get(hash), None, "with its last reference it goes");
    bench.put(b"x", DURABLE).unwrap();
    bench.partition.release_root(&hash); // by a folder that had not taken it
    assert_eq!(bench.done(Op::Remove { hash }), Ok(Outcome::Removed));
}

#[test]
fn a_root_that_had_lost_its_chunk_refers_to_the_one_that_a_put_brings_back() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let hash = hash_of(b"x");
    assert_eq!(bench.put(b"x", DURABLE), Ok(NEW));
    bench.partition.chunks.remove(&hash); // as recovery leaves it when the chunk's frame has rotted and the root has another record
    assert_eq!(bench.put(b"x", DURABLE), Ok(OLD));
    assert_eq!(bench.get(hash).unwrap(), b"x");
    assert_eq!(bench.done(Op::Remove { hash }), Ok(Outcome::Removed));
    assert!(matches!(bench.partition.chunk(&hash), Source::Corrupt), "its only reference went with the root");
}

fn chunk(bytes: &'static [u8]) -> Op {
    Op::PutChunk { name: hash_of(bytes), bytes: Bytes::from_static(bytes) }
}

#[test]
fn orphans_stay_through_a_turn_and_an_upload_takes_them_up() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let name = hash_of(b"left");
    bench.done(chunk(b"left")).unwrap();
    bench.partition.abandon_chunk(&name);
    bench.partition.abandon_chunk(&name); // one too many
    assert_eq!(bench.partition.orphan_bytes(), 4);
    let mut bench = bench.restart();
    assert_eq!(bench.partition.orphan_bytes(), 4, "a start finds it");
    bench.partition.age_orphans();
    bench.done(chunk(b"left")).unwrap(); // taken up
    assert_eq!(bench.partition.orphan_bytes(), 0);
    bench.partition.abandon_chunk(&name); // and left again: its turn begins anew
    bench.partition.age_orphans();
    assert!(!matches!(bench.partition.chunk(&name), Source::Corrupt));
    bench.partition.age_orphans();
    assert!(matches!(bench.partition.chunk(&name), Source::Corrupt));
    assert_eq!(bench.partition.orphan_bytes(), 0);
}

#[test]
fn room_that_is_made_for_a_blob_is_not_made_of_the_blob() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let hash = hash_of(b"both");
    bench.done(chunk(b"both")).unwrap();
    bench.partition.abandon_chunk(&hash);
    bench.partition.entries_max = 1; // full with the orphan
    assert_eq!(bench.put(b"both", DURABLE), Ok(NEW));
    assert_eq!(bench.get(hash).unwrap(), b"both");
    let bench = bench.restart();
    assert_eq!(bench.get(hash).unwrap(), b"both");
}

#[test]
fn a_chunk_that_comes_back_by_a_large_blob_counts_for_the_small_one_too() {
    let mut bench = Bench::new(1, 0, BTreeMap::new());
    let hash = hash_of(b"x");
    bench.put(b"x", DURABLE).unwrap();
    bench.partition.chunks.remove(&hash); // its frame has rotted, that of the root has not
    bench.done(chunk(b"x")).unwrap();
    bench.partition.release_chunk(&hash); // the large blob goes
    assert_eq!(bench.get(hash).unwrap(), b"x");
    assert_eq!(bench.done(Op::Remove { hash }), Ok(Outcome::Removed));
    bench.partition.release_chunk(&hash); // what was never counted is not counted down
    assert!(matches!(bench.partition.chunk(&hash), Source::Corrupt));
}
