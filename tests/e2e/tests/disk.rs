//! Disks that run full, bytes that rot, processes that are killed.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use metanode_client::{BytesSource, Client, ClientError, Got, PutOptions, VecSink};
use metanode_e2e::{Home, Mount, content, eventually, free_bytes, is_large, scenario};
use metanode_types::{BlobKind, ByteRange, DurabilityClass, Hash};
use metanode_wire::RefusalCode;

const CHUNK: usize = 256 * 1024;

/// A small file system is full in a moment and still holds some segments for each shard.
fn disk_bytes() -> u64 {
    if is_large() { 1 << 30 } else { 64 << 20 }
}

/// What is put until the disk is full.
const PIECE: usize = 200_000;

/// The longest that compaction may take to give space back.
const COMPACTION_TIME_MAX: Duration = Duration::from_secs(60);

async fn range(client: &Client, hash: Hash, offset: u64, length: u64) -> Result<Vec<u8>, ClientError> {
    let mut sink = VecSink { bytes: Vec::new(), bytes_max: u64::MAX };
    client.get_range(hash, ByteRange { offset, length }, &mut sink).await?;
    Ok(sink.bytes)
}

#[track_caller]
fn refused_as<T: std::fmt::Debug>(result: Result<T, ClientError>, code: RefusalCode) -> bool {
    match result {
        Ok(_) => false,
        Err(error) => {
            assert_eq!(error.refusal_code(), Some(code), "{error}");
            true
        }
    }
}

#[test]
fn a_full_disk_reads_and_removes_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mount) = Mount::tmpfs(folder.path(), disk_bytes()) else { return };
    let home = Home::inside(mount.path());
    scenario(async {
        let node = home.start(2);
        let client = home.client(&node, true).await;
        // Each shard writes a log of its own: full is when a run of contents finds no place at all.
        let (mut stored, mut seed, mut refused) = (Vec::new(), 0, 0);
        while refused < 16 {
            let result = client.put_whole(content(seed, PIECE), PutOptions::default()).await;
            if refused_as(result, RefusalCode::DiskFull) {
                refused += 1;
            } else {
                stored.push((seed, metanode_crypto::hash(&content(seed, PIECE))));
                refused = 0;
            }
            seed += 1;
            assert!(seed < 2 * disk_bytes() / PIECE as u64, "more was stored than the disk has");
        }
        let bytes = (stored.len() * PIECE) as u64;
        assert!(bytes > disk_bytes() / 4, "full with {bytes} bytes only");
        // A large blob finds no place either, and leaves nothing.
        let large = content(7, 4 * CHUNK);
        let result = client.put_source(&mut BytesSource(large.clone()), None, PutOptions::default()).await;
        assert!(refused_as(result, RefusalCode::DiskFull), "four chunks fit a full disk");
        let large_hash = metanode_crypto::hash(&large);
        assert!(refused_as(client.stat(large_hash).await, RefusalCode::NotFound));
        // By the command line: exit code 8. The file lies elsewhere: this disk is full.
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), &large).unwrap();
        home.cli_args(["put", file.path().to_str().unwrap()]).refused(8);
        // Everything can be read while it is full, from the disk as well as from the cache.
        for (seed, hash) in &stored {
            assert_eq!(client.get_whole(*hash).await.unwrap(), Got::Whole(content(*seed, PIECE)));
        }
        // Half of it goes, from everywhere. Moving what is left together gives room for as much again, less what the logs need.
        let full_free = free_bytes(mount.path());
        let (mut removed, mut kept): (Vec<_>, Vec<_>) = stored.into_iter().partition(|(seed, _)| seed % 2 == 0);
        for (_, hash) in &removed {
            client.remove(*hash).await.unwrap();
        }
        eventually("space comes back", COMPACTION_TIME_MAX, async || {
            (free_bytes(mount.path()) > full_free).then_some(())
        })
        .await;
        let (wanted, mut seed) = (kept.len() + removed.len() / 2, 1_000_000);
        eventually("puts succeed again", COMPACTION_TIME_MAX, async || {
            while kept.len() < wanted {
                let blob = content(seed, PIECE);
                let hash = metanode_crypto::hash(&blob);
                if refused_as(client.put_whole(blob, PutOptions::default()).await, RefusalCode::DiskFull) {
                    return None;
                }
                kept.push((seed, hash));
                seed += 1;
            }
            Some(())
        })
        .await;
        // Nearly all of it goes: the file system has its space back, not only the node.
        removed.extend(kept.drain(20..));
        for (_, hash) in &removed {
            let _ = client.remove(*hash).await; // a part has gone before
        }
        eventually("the file system gets its space back", COMPACTION_TIME_MAX, async || {
            (free_bytes(mount.path()) > disk_bytes() / 2).then_some(())
        })
        .await;
        drop(client);
        node.stop();
        // No restart brings back what was removed, or loses what was not, however the node ends.
        for _ in 0..if is_large() { 20 } else { 2 } {
            let node = home.start(2);
            let client = home.client(&node, true).await;
            for (_, hash) in &removed {
                assert!(refused_as(client.get_whole(*hash).await, RefusalCode::NotFound));
            }
            for (seed, hash) in &kept {
                assert_eq!(client.get_whole(*hash).await.unwrap(), Got::Whole(content(*seed, PIECE)));
            }
            node.kill();
        }
    });
    drop(home); // before the file system that it is on
}

/// Every file below a folder.
fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

/// Flips a bit in the middle of the only place in the data folder where `bytes` stand.
fn rot(home: &Home, bytes: &[u8]) {
    let mut found = Vec::new();
    for path in files_below(&home.data().join("store")) {
        let file = fs::read(&path).unwrap();
        let marker = &bytes[..32];
        found.extend(
            file.windows(32).enumerate().filter(|(_, window)| *window == marker).map(|(at, _)| (path.clone(), at)),
        );
    }
    assert_eq!(found.len(), 1, "the bytes stand in one place: {found:?}");
    let (path, at) = &found[0];
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let at = (at + bytes.len() / 2) as u64;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn rot_is_found_named_and_healed() {
    scenario(async {
        let home = Home::new();
        let node = home.start(2);
        let client = home.client(&node, true).await;
        let (small, large) = (content(1, 4000), content(2, 4 * CHUNK));
        let hash = client.put_whole(small.clone(), PutOptions::default()).await.unwrap().hash;
        let large_hash =
            client.put_source(&mut BytesSource(large.clone()), None, PutOptions::default()).await.unwrap().hash;
        // What comes behind them in each log shows that they were not the torn end of it.
        let mut behind = Vec::new();
        for seed in 10..30 {
            let stored = client.put_whole(content(seed, 4000), PutOptions::default()).await.unwrap();
            behind.push((stored.hash, content(seed, 4000)));
        }
        drop(client);
        node.stop();
        rot(&home, &small);
        rot(&home, &large[2 * CHUNK..3 * CHUNK]);
        let node = home.start(2);
        let client = home.client(&node, true).await;
        assert!(refused_as(client.get_whole(hash).await, RefusalCode::Corrupt));
        assert!(refused_as(range(&client, hash, 0, u64::MAX).await, RefusalCode::Corrupt));
        assert!(refused_as(range(&client, large_hash, 0, u64::MAX).await, RefusalCode::Corrupt));
        for name in [hash, large_hash] {
            home.cli(&format!("get {name} copy")).refused(5);
            assert!(!home.beside("copy").exists(), "nothing appears under the final name");
        }
        // The good parts are served, and everything else.
        assert_eq!(range(&client, large_hash, 0, 2 * CHUNK as u64).await.unwrap(), large[..2 * CHUNK]);
        assert_eq!(range(&client, large_hash, 3 * CHUNK as u64, 9).await.unwrap(), large[3 * CHUNK..3 * CHUNK + 9]);
        for (hash, bytes) in &behind {
            assert_eq!(client.get_whole(*hash).await.unwrap(), Got::Whole(bytes.clone()));
        }
        // The same content, put again, heals.
        client.put_whole(small.clone(), PutOptions::default()).await.unwrap();
        client.put_source(&mut BytesSource(large.clone()), None, PutOptions::default()).await.unwrap();
        drop(client);
        let mut node = Some(node);
        for restarted in [false, true] {
            if restarted {
                node.take().unwrap().stop();
                node = Some(home.start(2));
            }
            let client = home.client(node.as_ref().unwrap(), true).await;
            assert_eq!(client.get_whole(hash).await.unwrap(), Got::Whole(small.clone()));
            assert!(range(&client, large_hash, 0, u64::MAX).await.unwrap() == large);
        }
        node.unwrap().stop();
    });
}

/// What was acknowledged as durable before the node was killed.
#[derive(Default)]
struct Acknowledged {
    blobs: Mutex<Vec<Blob>>,
    removed: Mutex<Vec<Hash>>,
    count: AtomicU64,
}

/// Hash, seed and size of a blob.
type Blob = (Hash, u64, usize);

impl Acknowledged {
    /// What must be there, and what must not.
    fn so_far(&self) -> (Vec<Blob>, Vec<Hash>) {
        (self.blobs.lock().unwrap().clone(), self.removed.lock().unwrap().clone())
    }
}

/// Puts and removes until the node has gone.
async fn work(client: Client, acknowledged: Arc<Acknowledged>, worker: u64, round: u64) {
    for step in 0.. {
        let seed = (round << 40) | (worker << 20) | step;
        let size = if step % 16 == 15 { 2 * CHUNK + 11 } else { 500 + (step % 7) as usize * 9000 };
        let blob = content(seed, size);
        let put = if size > CHUNK {
            client.put_source(&mut BytesSource(blob), None, PutOptions::default()).await
        } else {
            client.put_whole(blob, PutOptions::default()).await
        };
        let Ok(stored) = put else { return };
        // Every fifth is removed again; between request and answer nothing is promised.
        if step % 5 == 4 {
            if client.remove(stored.hash).await.is_err() {
                return;
            }
            acknowledged.removed.lock().unwrap().push(stored.hash);
        } else {
            acknowledged.blobs.lock().unwrap().push((stored.hash, seed, size));
        }
        acknowledged.count.fetch_add(1, Relaxed);
    }
}

#[test]
fn what_was_acknowledged_survives_a_kill() {
    scenario(async {
        let home = Home::new();
        let acknowledged = Arc::new(Acknowledged::default());
        for (round, shards) in [2, 4, 1, 2, 4].into_iter().enumerate() {
            let node = home.start(shards);
            let client = home.client(&node, true).await;
            let (blobs, removed) = acknowledged.so_far();
            for (hash, seed, size) in blobs {
                let bytes = content(seed, size);
                assert!(range(&client, hash, 0, u64::MAX).await.unwrap() == bytes, "round {round}, {size} bytes");
            }
            for hash in removed {
                assert!(refused_as(client.stat(hash).await, RefusalCode::NotFound), "round {round}");
            }
            let workers: Vec<_> = (0..12)
                .map(|worker| tokio::spawn(work(client.clone(), acknowledged.clone(), worker, round as u64)))
                .collect();
            // Never twice after as many.
            let enough = acknowledged.count.load(Relaxed) + 40 + 17 * round as u64;
            eventually("puts are acknowledged", Duration::from_secs(30), async || {
                (acknowledged.count.load(Relaxed) >= enough).then_some(())
            })
            .await;
            node.kill();
            drop(client);
            for worker in workers {
                worker.abort(); // its answers will not come
                let _ = worker.await;
            }
        }
        let node = home.start(2);
        let client = home.client(&node, false).await;
        for (hash, seed, size) in acknowledged.so_far().0 {
            assert!(range(&client, hash, 0, u64::MAX).await.unwrap() == content(seed, size));
        }
        node.stop();
    });
}

/// The counterpart: what is only in memory may go with the process, and what is left is whole.
#[test]
fn a_kill_may_lose_memory_but_tears_nothing() {
    scenario(async {
        let home = Home::new();
        let node = home.start(2);
        let client = home.client(&node, true).await;
        let options = PutOptions { class: DurabilityClass::Memory, kind: BlobKind::Blob, hold: true };
        let blobs: Vec<Bytes> = (0..40).map(|seed| content(seed, 5000)).collect();
        for blob in &blobs {
            client.put_whole(blob.clone(), options).await.unwrap();
        }
        node.kill();
        drop(client);
        let node = home.start(2);
        let client = home.client(&node, true).await;
        for blob in &blobs {
            let hash = metanode_crypto::hash(blob);
            match client.get_whole(hash).await {
                Ok(got) => assert_eq!(got, Got::Whole(blob.clone())),
                lost => assert!(refused_as(lost, RefusalCode::NotFound)),
            }
            client.put_whole(blob.clone(), PutOptions::default()).await.unwrap();
            assert_eq!(client.get_whole(hash).await.unwrap(), Got::Whole(blob.clone()));
        }
        node.stop();
    });
}
