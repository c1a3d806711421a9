//! The store on real files and real shards.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    os::unix::fs::FileExt,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
        mpsc,
    },
    time::Duration,
};

use bytes::Bytes;
use metanode_blob::tree::SliceDecoder;
use metanode_shard::{ShardsConfig, sleep, start, timeout, yield_now};
use metanode_store::{Fetched, PutOptions, Store, StoreConfig, StoreError, StoreShared, mesh};
use metanode_types::{BlobKind, ByteRange, DurabilityClass, Hash, ShardCount, TagName};
use metanode_wire::{Entry, EntryKind, Manifest};

const HELD: PutOptions =
    PutOptions { class: DurabilityClass::Durable, kind: BlobKind::Blob, hold: true, keep: false, leases: None };

/// Runs `scenario` on shard 0 of a store with `count` shards, then closes it.
fn with_store<F>(folder: &Path, count: u16, scenario: impl FnOnce(Store) -> F + Send + 'static)
where
    F: Future<Output = ()> + 'static,
{
    let scenario: Scenario = Box::new(move |store| Box::pin(scenario(store)));
    with_stores(folder, count, vec![scenario]);
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

type Scenario = Box<dyn FnOnce(Store) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// Runs a scenario on each of the first shards of a store, then closes it once that on shard 0 has ended.
fn with_stores(folder: &Path, count: u16, scenarios: Vec<Scenario>) {
    let shards = ShardCount::new(count).unwrap();
    let mut config = StoreConfig::new(folder.to_owned(), shards);
    config.segment_bytes = 4 << 20;
    let shared = StoreShared::open(config).unwrap();
    let mut ports = mesh(shards).into_iter();
    let mut scenarios = scenarios.into_iter();
    let left = Arc::new(AtomicU16::new(count));
    let ended = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let running = start(&ShardsConfig::unpinned("store", shards), |shard| {
        let (shared, port, scenario) = (shared.clone(), ports.next().unwrap(), scenarios.next());
        let (left, ended) = (left.clone(), ended.clone());
        move || async move {
            // Also when it fails: the others would wait for ever.
            let gone = OnDrop(|| _ = left.fetch_sub(1, Ordering::SeqCst));
            let end = (shard.0 == 0).then(|| OnDrop(|| ended.store(true, Ordering::SeqCst)));
            let store = Store::open(shared, shard, port).await.unwrap();
            if let Some(scenario) = scenario {
                scenario(store.clone()).await;
            }
            drop(end);
            while !ended.load(Ordering::SeqCst) {
                sleep(Duration::from_millis(2)).await;
            }
            store.shutdown().await.unwrap();
            drop(gone);
            while left.load(Ordering::SeqCst) > 0 {
                sleep(Duration::from_millis(2)).await;
            }
        }
    })
    .unwrap();
    for result in running.join() {
        result.unwrap();
    }
}

fn data(length: usize, seed: u64) -> Bytes {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes.into()
}

async fn put(store: &Store, bytes: &Bytes) -> Hash {
    let hash = metanode_crypto::hash(bytes);
    assert_eq!(store.put(hash, bytes.clone(), HELD).await.unwrap().hash, hash);
    hash
}

async fn put_bulk(store: &Store, bytes: &Bytes, options: PutOptions) -> Result<Hash, StoreError> {
    let mut bulk = store.put_bulk(None, options);
    for chunk in bytes.chunks(256 * 1024) {
        bulk.push(Bytes::copy_from_slice(chunk)).await?;
    }
    bulk.finish(metanode_crypto::hash(bytes)).await.map(|stored| stored.hash)
}

async fn read(store: &Store, hash: Hash, range: ByteRange) -> Result<Bytes, StoreError> {
    let reader = store.read(hash).await?;
    let mut decoder = SliceDecoder::new(hash, reader.size_bytes(), range).map_err(|_| StoreError::BadRange)?;
    let mut slice = reader.slice(range)?;
    let (mut buffer, mut out) = (Vec::new(), Vec::new());
    while let Some(pieces) = slice.next().await? {
        buffer.extend(pieces.iter().flat_map(|piece| piece.iter().copied()));
        let mut at = 0;
        while decoder.expects() > 0 && buffer.len() - at >= decoder.expects() {
            let item = &buffer[at..at + decoder.expects()];
            at += item.len();
            if let Some(leaf) = decoder.push(item).unwrap() {
                out.extend_from_slice(&item[leaf.skip..leaf.skip + leaf.take]);
            }
        }
        buffer.drain(..at);
    }
    assert_eq!(decoder.expects(), 0, "the slice is whole");
    Ok(out.into())
}

#[test]
fn blobs_of_all_sizes_survive_restarts_with_other_shard_counts() {
    let folder = tempfile::tempdir().unwrap();
    let sizes = [0, 1, 4096, 100_000, 262_144, 262_145, 1_000_000, 3 << 20];
    let blobs: Vec<Bytes> = sizes.iter().map(|&size| data(size, size as u64)).collect();
    let mine = blobs.clone();
    with_store(folder.path(), 4, move |store| async move {
        for bytes in &mine {
            let hash = put_bulk(&store, bytes, HELD).await.unwrap();
            assert_eq!(read(&store, hash, ByteRange::ALL).await.unwrap(), *bytes);
        }
    });
    for count in [2, 4, 1] {
        let blobs = blobs.clone();
        with_store(folder.path(), count, move |store| async move {
            for bytes in &blobs {
                let hash = metanode_crypto::hash(bytes);
                assert_eq!(store.stat(hash).await.unwrap().size_bytes, bytes.len() as u64);
                assert_eq!(read(&store, hash, ByteRange::ALL).await.unwrap(), *bytes);
                let range = ByteRange { offset: bytes.len() as u64 / 3, length: 70_000 };
                let (start, end) = range.clamp(bytes.len() as u64).unwrap();
                assert_eq!(read(&store, hash, range).await.unwrap(), bytes[start as usize..end as usize]);
                match store.get(hash).await.unwrap() {
                    Fetched::Whole(whole) => assert_eq!(whole, *bytes),
                    Fetched::Large { size_bytes } => assert_eq!(size_bytes, bytes.len() as u64),
                }
            }
            let page = store.list_blobs(None, 100).await.unwrap();
            assert_eq!((page.entries.len(), page.more), (blobs.len(), false));
            let page = store.list_blobs(None, 3).await.unwrap();
            assert_eq!((page.entries.len(), page.more), (3, true));
        });
    }
}

#[test]
fn wrong_hashes_ranges_and_names_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    with_store(folder.path(), 2, |store| async move {
        let bytes = data(5000, 1);
        let wrong = Hash([7; 32]);
        assert_eq!(store.put(wrong, bytes.clone(), HELD).await, Err(StoreError::HashMismatch));
        assert_eq!(store.get(wrong).await, Err(StoreError::NotFound));
        assert_eq!(store.remove(wrong).await, Err(StoreError::NotFound));
        let name: TagName = "t".parse().unwrap();
        assert_eq!(store.tag_set(name.clone(), wrong).await, Err(StoreError::NotFound));
        assert_eq!(store.tag_get(name).await, Err(StoreError::NotFound));
        let large = data(600_000, 2);
        let mut bulk = store.put_bulk(None, HELD);
        for chunk in large.chunks(256 * 1024) {
            bulk.push(Bytes::copy_from_slice(chunk)).await.unwrap();
        }
        assert!(matches!(bulk.push(Bytes::from_static(b"x")).await, Err(StoreError::Malformed(_))));
        assert_eq!(bulk.finish(wrong).await, Err(StoreError::HashMismatch));
        let hash = put(&store, &bytes).await;
        let range = ByteRange { offset: 5001, length: 1 };
        assert_eq!(read(&store, hash, range).await, Err(StoreError::BadRange));
    });
}

#[test]
fn removed_blobs_stay_removed_and_their_space_returns() {
    let folder = tempfile::tempdir().unwrap();
    let blobs: Vec<Bytes> = (0..20).map(|i| data(1 << 20, 100 + i)).collect();
    let mine = blobs.clone();
    with_store(folder.path(), 2, move |store| async move {
        for bytes in &mine {
            put_bulk(&store, bytes, HELD).await.unwrap();
        }
        for bytes in &mine[..18] {
            store.remove(metanode_crypto::hash(bytes)).await.unwrap();
        }
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while used(&store) > 5 * (4 << 20) && std::time::Instant::now() < deadline {
            sleep(Duration::from_millis(20)).await;
        }
        assert!(used(&store) <= 5 * (4 << 20), "{:?}", store.usage());
    });
    with_store(folder.path(), 2, move |store| async move {
        for (i, bytes) in blobs.iter().enumerate() {
            let found = read(&store, metanode_crypto::hash(bytes), ByteRange::ALL).await;
            if i < 18 {
                assert_eq!(found, Err(StoreError::NotFound));
            } else {
                assert_eq!(found.unwrap(), *bytes);
            }
        }
    });
}

/// Bytes of segments of this shard's logs; the other one's are alike.
fn used(store: &Store) -> u64 {
    store.usage().segment_bytes
}

#[test]
fn folders_keep_their_children_and_leases_end() {
    let folder = tempfile::tempdir().unwrap();
    with_store(folder.path(), 2, |store| async move {
        let (kept, dropped) = (data(1000, 1), data(1000, 2));
        let leases = store.leases();
        let leased = PutOptions { hold: false, leases: Some(leases.clone()), ..HELD };
        for bytes in [&kept, &dropped] {
            store.put(metanode_crypto::hash(bytes), bytes.clone(), leased.clone()).await.unwrap();
        }
        let file = EntryKind::File { hash: metanode_crypto::hash(&kept), size_bytes: 1000 };
        let entry = Entry { path: "f".into(), mode: 0o644, kind: file };
        let manifest: Bytes = Manifest { entries: vec![entry] }.encode().unwrap().into();
        let options = PutOptions { kind: BlobKind::Folder, ..HELD };
        let root = metanode_crypto::hash(&manifest);
        store.put(root, manifest.clone(), options.clone()).await.unwrap();
        store.put(root, manifest, options.clone()).await.unwrap();
        assert_eq!(store.remove(metanode_crypto::hash(&kept)).await, Err(StoreError::InUse { references: 2 }));
        drop((leased, leases));
        wait_for_removal(&store, metanode_crypto::hash(&dropped)).await;
        assert_eq!(store.stat(metanode_crypto::hash(&kept)).await.unwrap().references, 1);
        let stranger = EntryKind::File { hash: Hash([9; 32]), size_bytes: 1 };
        let entry = Entry { path: "f".into(), mode: 0o644, kind: stranger };
        let bytes: Bytes = Manifest { entries: vec![entry] }.encode().unwrap().into();
        let missing = store.put(metanode_crypto::hash(&bytes), bytes, options).await;
        assert_eq!(missing, Err(StoreError::MissingChild(Hash([9; 32]))));
        store.remove(root).await.unwrap();
        wait_for_removal(&store, metanode_crypto::hash(&kept)).await;
    });
}

async fn wait_for_removal(store: &Store, hash: Hash) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while store.stat(hash).await != Err(StoreError::NotFound) {
        assert!(std::time::Instant::now() < deadline, "{hash} stays");
        sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn tags_move_and_protect() {
    let folder = tempfile::tempdir().unwrap();
    let name: TagName = "latest".parse().unwrap();
    let (one, two) = (data(10, 1), data(10, 2));
    let (first, second) = (metanode_crypto::hash(&one), metanode_crypto::hash(&two));
    let tag = name.clone();
    with_store(folder.path(), 2, move |store| async move {
        put(&store, &one).await;
        put(&store, &two).await;
        store.tag_set(tag.clone(), first).await.unwrap();
        assert_eq!(store.remove(first).await, Err(StoreError::InUse { references: 1 }));
        store.tag_set(tag.clone(), second).await.unwrap();
        store.tag_set(tag, second).await.unwrap();
        store.remove(first).await.unwrap();
    });
    with_store(folder.path(), 1, move |store| async move {
        assert_eq!(store.tag_get(name.clone()).await, Ok(second));
        assert_eq!(store.list_tags(None, 10).await.unwrap().entries.len(), 1);
        assert_eq!(store.remove(second).await, Err(StoreError::InUse { references: 1 }));
        store.tag_remove(name.clone()).await.unwrap();
        assert_eq!(store.tag_get(name).await, Err(StoreError::NotFound));
        store.remove(second).await.unwrap();
    });
}

/// A client that talks to each shard by a connection of its own may go on at another one as soon as it has its answer.
#[test]
fn what_a_tag_has_let_go_may_be_removed_at_once_by_way_of_another_shard() {
    let folder = tempfile::tempdir().unwrap();
    let (ask, asked) = mpsc::channel::<Hash>();
    let (answer, answered) = mpsc::channel();
    let first: Scenario = Box::new(move |store| {
        Box::pin(async move {
            for round in 0..10 {
                let hash = put(&store, &data(10, round)).await;
                let name: TagName = "latest".parse().unwrap();
                store.tag_set(name.clone(), hash).await.unwrap();
                store.tag_remove(name).await.unwrap();
                ask.send(hash).unwrap();
                loop {
                    match answered.try_recv() {
                        Ok(removed) => break assert_eq!(removed, Ok(()), "round {round}"),
                        Err(mpsc::TryRecvError::Empty) => yield_now().await,
                        Err(error) => panic!("the other shard: {error}"),
                    }
                }
            }
        })
    });
    let second: Scenario = Box::new(move |store| {
        Box::pin(async move {
            loop {
                match asked.try_recv() {
                    Ok(hash) => answer.send(store.remove(hash).await).unwrap(),
                    Err(mpsc::TryRecvError::Empty) => yield_now().await,
                    Err(mpsc::TryRecvError::Disconnected) => break,
                }
            }
        })
    });
    with_stores(folder.path(), 2, vec![first, second]);
}

#[test]
fn a_corrupt_copy_is_refused_and_healed_by_the_next_put() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = data(8192, 5);
    let hash = metanode_crypto::hash(&bytes);
    let mine = bytes.clone();
    with_store(folder.path(), 1, move |store| async move {
        put(&store, &mine).await;
        put(&store, &data(100, 77)).await; // a frame behind it, or the damage would be taken for a torn tail
    });
    flip(folder.path(), &bytes);
    with_store(folder.path(), 1, move |store| async move {
        assert_eq!(store.get(hash).await, Err(StoreError::Corrupt));
        assert!(store.put(hash, bytes.clone(), HELD).await.unwrap().existed);
        assert_eq!(store.get(hash).await, Ok(Fetched::Whole(bytes)));
    });
}

#[test]
fn a_chunk_that_rots_between_two_reads_is_refused_by_the_second() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().to_owned();
    with_store(folder.path(), 1, move |store| async move {
        let bytes = data(700_000, 6);
        let hash = put_bulk(&store, &bytes, HELD).await.unwrap();
        for _ in 0..3 {
            assert_eq!(read(&store, hash, ByteRange::ALL).await, Ok(bytes.clone()));
        }
        flip(&place, &bytes);
        assert_eq!(read(&store, hash, ByteRange::ALL).await, Err(StoreError::Corrupt));
        assert_eq!(put_bulk(&store, &bytes, HELD).await, Ok(hash));
        for _ in 0..2 {
            assert_eq!(read(&store, hash, ByteRange::ALL).await, Ok(bytes.clone()));
        }
    });
}

#[test]
fn rot_in_the_last_frame_of_a_segment_is_no_torn_tail_once_another_segment_follows() {
    let folder = tempfile::tempdir().unwrap();
    let blobs: Vec<Bytes> = (0..40).map(|i| data(200_000, 500 + i)).collect();
    let stored = blobs.clone();
    with_store(folder.path(), 1, move |store| async move {
        for blob in &stored {
            put(&store, blob).await;
        }
    });
    // The checkpoint would spare the segment.
    std::fs::remove_file(folder.path().join("checkpoint-0000")).unwrap();
    let first = std::fs::read(folder.path().join("log-0000").join("0000000000.seg")).unwrap();
    let holds = |blob: &Bytes| first.windows(100).any(|window| window == &blob[4000..4100]);
    let last = (0..blobs.len()).rfind(|&index| holds(&blobs[index])).unwrap();
    assert!(last + 1 < blobs.len(), "a segment follows");
    flip(folder.path(), &blobs[last]);
    let found = metanode_store::check(folder.path()).unwrap();
    assert!(found.damages > 0, "{found:?}");
    with_store(folder.path(), 1, move |store| async move {
        for (index, blob) in blobs.iter().enumerate() {
            let hash = metanode_crypto::hash(blob);
            let expected = if index == last { Err(StoreError::Corrupt) } else { Ok(Fetched::Whole(blob.clone())) };
            assert_eq!(store.get(hash).await, expected, "{index}");
        }
    });
}

/// Flips a bit in the middle of these bytes, wherever they are.
fn flip(folder: &Path, bytes: &Bytes) {
    let needle = &bytes[4000..4100];
    for entry in std::fs::read_dir(folder.join("log-0000")).unwrap() {
        let path = entry.unwrap().path();
        let content = std::fs::read(&path).unwrap();
        if let Some(at) = content.windows(needle.len()).position(|window| window == needle) {
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.write_all_at(&[content[at] ^ 1], at as u64).unwrap();
            return;
        }
    }
    panic!("the bytes are not on disk");
}

#[test]
fn damaged_headers_cost_nothing_and_stale_ones_hold_no_segment() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = data(5000, 1);
    let hash = metanode_crypto::hash(&bytes);
    let stored = bytes.clone();
    with_store(folder.path(), 1, |store| async move {
        put(&store, &stored).await;
    });
    let log = folder.path().join("log-0000");
    let name = |segment: u32| log.join(format!("{segment:010}.seg"));
    let written: Vec<u32> = (0..10).filter(|segment| name(*segment).exists()).collect();
    // Checkpoints would spare the segments.
    std::fs::remove_file(folder.path().join("checkpoint-0000")).unwrap();
    // What a crash leaves between the new name of a recycled file and its new header.
    let stale = written.last().unwrap() + 5;
    let header = std::fs::read(name(written[0])).unwrap()[..4096].to_vec();
    std::fs::write(name(stale), [header.clone(), vec![0; 1 << 20]].concat()).unwrap();
    // Rot in the header block: the frames behind it are whole.
    let mut rotten = std::fs::read(name(written[0])).unwrap();
    rotten[9] ^= 1;
    std::fs::write(name(written[0]), rotten).unwrap();
    with_store(folder.path(), 1, move |store| async move {
        assert_eq!(store.get(hash).await.unwrap(), Fetched::Whole(bytes));
    });
    assert!(!name(stale).exists(), "it never held a frame");
    // A header that is nobody's, and nothing behind it: not ours to delete.
    std::fs::write(name(stale), vec![9; 1 << 20]).unwrap();
    std::fs::remove_file(folder.path().join("checkpoint-0000")).unwrap();
    let shared = StoreShared::open(StoreConfig::new(folder.path().into(), ShardCount::new(1).unwrap())).unwrap();
    assert!(shared.recovery().rot_bytes >= 1 << 20);
    assert!(name(stale).exists());
}

#[test]
fn a_start_that_reads_the_whole_log_leaves_no_older_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    with_store(folder.path(), 2, |store| async move {
        put(&store, &data(5000, 1)).await;
    });
    let checkpoint = |shard: u16| folder.path().join(format!("checkpoint-{shard:04}"));
    assert!(checkpoint(0).exists() && checkpoint(1).exists());
    std::fs::remove_file(checkpoint(0)).unwrap();
    drop(StoreShared::open(StoreConfig::new(folder.path().into(), ShardCount::new(2).unwrap())).unwrap());
    assert!(!checkpoint(1).exists(), "with a newer one of shard 0 it would be used again");
}

#[test]
fn concurrent_puts_of_many_blobs_share_frames() {
    let folder = tempfile::tempdir().unwrap();
    with_store(folder.path(), 1, |store| async move {
        let tasks: Vec<_> = (0..256)
            .map(|i| {
                let store = store.clone();
                metanode_shard::spawn_local(async move { put(&store, &data(4096, 1000 + i)).await })
            })
            .collect();
        for task in tasks {
            let hash = task.await;
            assert!(matches!(store.get(hash).await, Ok(Fetched::Whole(_))));
        }
        let counters = store.counters();
        assert!(counters.frames.value() < 100, "{} frames", counters.frames.value());
    });
}

#[test]
fn closing_under_load_ends_and_keeps_what_was_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..3 {
        let acknowledged = Arc::new(std::sync::Mutex::new(Vec::new()));
        let stored = acknowledged.clone();
        with_store(folder.path(), 1, move |store| async move {
            let puts: Vec<_> = (0..400)
                .map(|i| {
                    let store = store.clone();
                    let bytes = data(20_000, 1_000_000 * round + i);
                    metanode_shard::spawn_local(async move {
                        let hash = metanode_crypto::hash(&bytes);
                        store.put(hash, bytes, HELD).await.map(|_| hash)
                    })
                })
                .collect();
            sleep(Duration::from_millis(2 * round)).await; // some are staged, some on their way, a spare is being filled
            timeout(Duration::from_secs(60), store.shutdown()).await.expect("the store closes").unwrap();
            for put in puts {
                match put.await {
                    Ok(hash) => stored.lock().unwrap().push(hash),
                    Err(error) => assert_eq!(error, StoreError::ShuttingDown),
                }
            }
            let late = data(100, round);
            let late = store.put(metanode_crypto::hash(&late), late, HELD).await;
            assert_eq!(late, Err(StoreError::ShuttingDown));
        });
        let acknowledged = std::mem::take(&mut *acknowledged.lock().unwrap());
        assert!(round == 0 || !acknowledged.is_empty());
        with_store(folder.path(), 1, |store| async move {
            for hash in acknowledged {
                assert!(matches!(store.get(hash).await, Ok(Fetched::Whole(_))), "{hash} was acknowledged");
            }
        });
    }
}
