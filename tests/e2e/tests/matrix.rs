//! What a node does with content, in every layout: one, two and four shards, and four shards that become two and four again
//! from start to start; each with a client that heeds the shard map and one that ignores it.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::{collections::BTreeMap, fs, time::Duration};

use bytes::Bytes;
use metanode_client::{
    BytesSource, Client, ClientError, Got, Progress, PutOptions, VecSink,
    files::FileIo,
    folder::{self, FolderGet, FolderPut, Links},
};
use metanode_e2e::{Home, Layout, Setup, content, eventually, make_tree, picture, scenario};
use metanode_types::{BlobKind, ByteRange, DurabilityClass, Hash, TagName};
use metanode_wire::RefusalCode;

const CHUNK: usize = 256 * 1024;
/// Long enough for what a node does at once or behind an answer.
const SOON: Duration = Duration::from_secs(20);

const MEMORY: PutOptions = PutOptions { class: DurabilityClass::Memory, kind: BlobKind::Blob, hold: true };

/// A test for each scenario in each layout: `cargo test -p metanode-e2e --test matrix four_shards::`.
macro_rules! matrix {
    ($($scenario:ident)*) => {
        matrix!(one_shard: &[1], true; $($scenario)*);
        matrix!(one_shard_unaware: &[1], false; $($scenario)*);
        matrix!(two_shards: &[2], true; $($scenario)*);
        matrix!(two_shards_unaware: &[2], false; $($scenario)*);
        matrix!(four_shards: &[4], true; $($scenario)*);
        matrix!(four_shards_unaware: &[4], false; $($scenario)*);
        matrix!(four_two_four: &[4, 2, 4], true; $($scenario)*);
        matrix!(four_two_four_unaware: &[4, 2, 4], false; $($scenario)*);
    };
    ($layout:ident: $shards:expr, $shard_aware:expr; $($scenario:ident)*) => {
        mod $layout {
            const LAYOUT: metanode_e2e::Layout = metanode_e2e::Layout { shards: $shards, shard_aware: $shard_aware };
            $(#[test] fn $scenario() { LAYOUT.run(super::$scenario); })*
        }
    };
}

matrix! {
    blobs_of_every_size_come_back
    ranges_are_exact
    listings_are_complete_and_in_order
    tags_name_move_and_protect
    what_is_removed_stays_removed
    the_same_content_is_stored_once
    memory_is_served_and_becomes_durable
    folders_come_back_as_they_were
}

async fn put(client: &Client, bytes: &Bytes, options: PutOptions) -> Hash {
    let stored = if bytes.len() <= CHUNK {
        client.put_whole(bytes.clone(), options).await.unwrap()
    } else {
        client.put_source(&mut BytesSource(bytes.clone()), Some(bytes.len() as u64), options).await.unwrap()
    };
    assert_eq!((stored.size_bytes, stored.hash), (bytes.len() as u64, metanode_crypto::hash(bytes)));
    stored.hash
}

async fn range(client: &Client, hash: Hash, offset: u64, length: u64) -> Result<Vec<u8>, ClientError> {
    let mut sink = VecSink { bytes: Vec::new(), bytes_max: u64::MAX };
    let fetched = client.get_range(hash, ByteRange { offset, length }, &mut sink).await?;
    assert_eq!(fetched.taken_bytes, sink.bytes.len() as u64);
    Ok(sink.bytes)
}

/// Fetches a blob in each way there is.
async fn assert_served(client: &Client, hash: Hash, bytes: &Bytes) {
    match client.get_whole(hash).await.unwrap() {
        Got::Whole(whole) => assert!(whole == bytes && bytes.len() <= CHUNK),
        Got::Large { size_bytes } => assert!(size_bytes == bytes.len() as u64 && bytes.len() > CHUNK),
    }
    assert!(range(client, hash, 0, u64::MAX).await.unwrap() == *bytes, "{} bytes", bytes.len());
}

fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> RefusalCode {
    let error = result.unwrap_err();
    error.refusal_code().unwrap_or_else(|| panic!("not refused, but {error}"))
}

fn tag(name: &str) -> TagName {
    name.parse().unwrap()
}

async fn blobs_of_every_size_come_back(setup: &mut Setup) {
    let blobs: Vec<Bytes> = [0, 1, 4096, CHUNK, CHUNK + 1, 5 << 20].map(|size| content(1, size)).into();
    let mut hashes = Vec::new();
    for blob in &blobs {
        let hash = put(setup.client(), blob, PutOptions::default()).await;
        assert_served(setup.client(), hash, blob).await;
        hashes.push(hash);
    }
    assert_eq!(code(setup.client().get_whole(Hash([7; 32])).await), RefusalCode::NotFound);
    assert_eq!(code(range(setup.client(), Hash([7; 32]), 0, 1).await), RefusalCode::NotFound);
    assert_eq!(code(setup.client().stat(Hash([7; 32])).await), RefusalCode::NotFound);
    for _ in 0..2 {
        setup.restart().await;
        for (hash, blob) in hashes.iter().zip(&blobs) {
            let info = setup.client().stat(*hash).await.unwrap();
            assert_eq!((info.size_bytes, info.kind), (blob.len() as u64, BlobKind::Blob));
            assert_eq!((info.class, info.held, info.references), (DurabilityClass::Durable, true, 0));
            assert_served(setup.client(), *hash, blob).await;
        }
    }
}

async fn ranges_are_exact(setup: &mut Setup) {
    let blobs = [content(2, 0), content(2, 40_000), content(2, 5 * CHUNK + 777)];
    let mut hashes = Vec::new();
    for blob in &blobs {
        hashes.push(put(setup.client(), blob, PutOptions::default()).await);
    }
    setup.restart().await;
    for (hash, blob) in hashes.into_iter().zip(blobs) {
        let size = blob.len() as u64;
        let chunk = CHUNK as u64;
        // Around the borders of groups (16 KiB), chunks and the blob.
        let edges =
            [0, 1, 16_383, 16_384, 16_385, chunk - 1, chunk, chunk + 1, 2 * chunk, size.saturating_sub(1), size];
        for offset in edges.into_iter().filter(|edge| *edge <= size) {
            for length in [0, 1, 16_384, chunk + 1, size, u64::MAX] {
                let end = offset.saturating_add(length).min(size);
                let got = range(setup.client(), hash, offset, length).await;
                let got = got.unwrap_or_else(|error| panic!("{offset} + {length} of {size}: {error}"));
                assert!(got == blob[offset as usize..end as usize], "{offset} + {length} of {size}");
            }
        }
        assert_eq!(code(range(setup.client(), hash, size + 1, 1).await), RefusalCode::BadRange);
    }
}

async fn listings_are_complete_and_in_order(setup: &mut Setup) {
    let mut expected = BTreeMap::new();
    for seed in 0..300 {
        let blob = content(seed, 100 + seed as usize);
        expected.insert(put(setup.client(), &blob, PutOptions::default()).await, blob.len() as u64);
    }
    // More than one page of tags, on one of the blobs.
    let target = *expected.keys().next().unwrap();
    let names: Vec<TagName> = (0..140).map(|number| tag(&format!("tag/{number:03}"))).collect();
    for name in &names {
        setup.client().tag_set(name, target).await.unwrap();
    }
    for restarted in [false, true] {
        if restarted {
            setup.restart().await;
        }
        for page_size in [7, 128, 1000] {
            let (mut listed, mut after, mut pages) = (Vec::new(), None, 0);
            loop {
                let page = setup.client().list_blobs(after, page_size).await.unwrap();
                assert!(page.entries.len() <= page_size as usize);
                listed.extend(page.entries.iter().map(|line| (line.hash, line.size_bytes)));
                pages += 1;
                after = listed.last().map(|line| line.0);
                if !page.more {
                    break;
                }
            }
            assert!(listed.iter().copied().eq(expected.clone()), "pages of {page_size}: {} lines", listed.len());
            assert!(pages >= 300 / page_size.min(128));
        }
        let (mut listed, mut after): (Vec<TagName>, _) = (Vec::new(), None);
        loop {
            let page = setup.client().list_tags(after.as_ref(), 50).await.unwrap();
            assert!(page.entries.iter().all(|(_, hash)| *hash == target));
            listed.extend(page.entries.into_iter().map(|(name, _)| name));
            after = listed.last().cloned();
            if !page.more {
                break;
            }
        }
        assert_eq!(listed, names);
    }
}

async fn tags_name_move_and_protect(setup: &mut Setup) {
    let (first, second) = (content(3, 1000), content(3, CHUNK + 5));
    let (a, b) = (put(setup.client(), &first, PutOptions::default()).await, put(setup.client(), &second, MEMORY).await);
    let (one, two) = (tag("one"), tag("über/two words"));
    assert_eq!(code(setup.client().tag_get(&one).await), RefusalCode::NotFound);
    assert_eq!(code(setup.client().tag_remove(&one).await), RefusalCode::NotFound);
    assert_eq!(code(setup.client().tag_set(&one, Hash([9; 32])).await), RefusalCode::NotFound);
    for name in [&one, &two] {
        setup.client().tag_set(name, a).await.unwrap();
    }
    assert_eq!(setup.client().stat(a).await.unwrap().references, 2);
    assert_eq!(code(setup.client().remove(a).await), RefusalCode::InUse);
    setup.restart().await;
    assert_eq!(setup.client().tag_get(&one).await.unwrap(), a);
    assert_eq!(code(setup.client().remove(a).await), RefusalCode::InUse);
    // Moved: the tag protects what it names now, and no longer what it named.
    setup.client().tag_set(&one, b).await.unwrap();
    setup.client().tag_set(&one, b).await.unwrap();
    assert_eq!(setup.client().stat(a).await.unwrap().references, 1);
    assert_eq!(setup.client().stat(b).await.unwrap().references, 1);
    setup.client().tag_remove(&two).await.unwrap();
    setup.client().remove(a).await.unwrap();
    assert_eq!(code(setup.client().remove(b).await), RefusalCode::InUse);
    setup.restart().await;
    let tags = setup.client().list_tags(None, 100).await.unwrap();
    assert_eq!((tags.entries, tags.more), (vec![(one.clone(), b)], false));
    assert_eq!(code(setup.client().get_whole(a).await), RefusalCode::NotFound);
    assert_served(setup.client(), b, &second).await;
    setup.client().tag_remove(&one).await.unwrap();
    setup.client().remove(b).await.unwrap();
    assert_eq!(code(setup.client().stat(b).await), RefusalCode::NotFound);
}

async fn what_is_removed_stays_removed(setup: &mut Setup) {
    let blobs: Vec<Bytes> =
        (0..24).map(|seed| content(10 + seed, if seed % 6 == 0 { 3 * CHUNK } else { 3000 })).collect();
    let mut hashes = Vec::new();
    for blob in &blobs {
        hashes.push(put(setup.client(), blob, PutOptions::default()).await);
    }
    let (removed, kept): (Vec<_>, Vec<_>) = hashes.into_iter().zip(blobs).enumerate().partition(|(at, _)| at % 2 == 0);
    for (_, (hash, _)) in &removed {
        setup.client().remove(*hash).await.unwrap();
        assert_eq!(code(setup.client().remove(*hash).await), RefusalCode::NotFound);
    }
    for _ in 0..2 {
        for (_, (hash, _)) in &removed {
            assert_eq!(code(setup.client().get_whole(*hash).await), RefusalCode::NotFound);
            assert_eq!(code(range(setup.client(), *hash, 0, 1).await), RefusalCode::NotFound);
            assert_eq!(code(setup.client().stat(*hash).await), RefusalCode::NotFound);
        }
        for (_, (hash, blob)) in &kept {
            assert_served(setup.client(), *hash, blob).await;
        }
        assert_eq!(setup.client().list_blobs(None, 128).await.unwrap().entries.len(), kept.len());
        setup.restart().await;
    }
    // Put again, it is there again.
    let (_, (hash, blob)) = &removed[0];
    assert_eq!(put(setup.client(), blob, PutOptions::default()).await, *hash);
    assert_served(setup.client(), *hash, blob).await;
}

async fn the_same_content_is_stored_once(setup: &mut Setup) {
    let blobs = [content(20, 5000), content(20, 4 * CHUNK + 9)];
    for round in 0..3 {
        for blob in &blobs {
            let client = setup.client();
            let size = Some(blob.len() as u64);
            let stored = client.put_source(&mut BytesSource(blob.clone()), size, PutOptions::default()).await.unwrap();
            assert_eq!(stored.existed, round > 0, "round {round}, {} bytes", blob.len());
        }
        let listed = setup.client().list_blobs(None, 128).await.unwrap();
        assert_eq!(listed.entries.len(), blobs.len());
        setup.restart().await;
    }
    // One after another from many requests at once, too: exactly one of them is the first.
    let blob = content(21, 10_000);
    let puts = (0..32).map(|_| {
        let (client, blob) = (setup.client().clone(), blob.clone());
        tokio::spawn(async move { client.put_whole(blob, PutOptions::default()).await.unwrap().existed })
    });
    let mut firsts = 0;
    for put in puts.collect::<Vec<_>>() {
        firsts += usize::from(!put.await.unwrap());
    }
    assert_eq!(firsts, 1);
}

async fn memory_is_served_and_becomes_durable(setup: &mut Setup) {
    for blob in [content(30, 2000), content(30, 2 * CHUNK + 1)] {
        // Acknowledged is there, whether its record has reached the disk by now (then it is durable already) or not.
        let hash = put(setup.client(), &blob, MEMORY).await;
        assert_eq!(setup.client().stat(hash).await.unwrap().size_bytes, blob.len() as u64);
        assert_served(setup.client(), hash, &blob).await;
        put(setup.client(), &blob, PutOptions::default()).await;
        assert_eq!(setup.client().stat(hash).await.unwrap().class, DurabilityClass::Durable);
        // Asking for less later does not take it back.
        put(setup.client(), &blob, MEMORY).await;
        assert_eq!(setup.client().stat(hash).await.unwrap().class, DurabilityClass::Durable);
        setup.restart().await;
        assert_served(setup.client(), hash, &blob).await;
    }
}

async fn folders_come_back_as_they_were(setup: &mut Setup) {
    let [source, target] = ["source", "target"].map(|name| setup.home().beside(name));
    fs::create_dir(&source).unwrap();
    make_tree(&source, false);
    let how = FolderPut { class: DurabilityClass::Durable, hold: true, file_io: FileIo::Plain };
    let stored = folder::put_folder(setup.client(), &source, how, &Progress::default()).await.unwrap();
    let manifest = folder::get_manifest(setup.client(), stored.hash).await.unwrap();
    let file = metanode_crypto::hash(b"#!/bin/sh\n");
    assert_eq!(code(setup.client().remove(file).await), RefusalCode::InUse);
    let how = FolderGet { replace: true, links: Links::Inside, file_io: FileIo::Plain };
    for _ in 0..3 {
        folder::get_folder(setup.client(), &manifest, &target, how, &Progress::default()).await.unwrap();
        assert!(picture(&target) == picture(&source), "another folder came back");
        assert_eq!(setup.client().stat(stored.hash).await.unwrap().kind, BlobKind::Folder);
        setup.restart().await;
    }
    // With the folder goes what only it refers to, behind its removal.
    setup.client().remove(stored.hash).await.unwrap();
    eventually("the folder's files go", SOON, async || {
        setup.client().list_blobs(None, 128).await.unwrap().entries.is_empty().then_some(())
    })
    .await;
    assert_eq!(code(setup.client().get_whole(file).await), RefusalCode::NotFound);
}

/// A frame may end at any packet: none waits for the next one to be looked at.
#[test]
fn whole_blobs_of_any_size_are_answered() {
    Layout { shards: &[2], shard_aware: true }.run(async |setup| {
        for size in (1..=CHUNK).step_by(1999) {
            let blob = content(60, size);
            let stored = tokio::time::timeout(Duration::from_secs(10), put(setup.client(), &blob, MEMORY)).await;
            let hash = stored.unwrap_or_else(|_| panic!("no answer to a put of {size} bytes"));
            assert_eq!(setup.client().get_whole(hash).await.unwrap(), Got::Whole(blob));
        }
    });
}

/// Seventy megabytes: more than one extent (64 MiB), on the most shards.
#[test]
fn a_blob_of_several_extents_comes_back() {
    Layout { shards: &[4], shard_aware: true }.run(async |setup| {
        let blob = content(40, 70 << 20);
        let hash = put(setup.client(), &blob, PutOptions::default()).await;
        setup.restart().await;
        assert!(range(setup.client(), hash, 0, u64::MAX).await.unwrap() == blob);
        let border = 64 << 20;
        let got = range(setup.client(), hash, border - 5, 10).await.unwrap();
        assert!(got == blob[border as usize - 5..border as usize + 5]);
    });
}

/// What one kind of client stores on one number of shards is there for the other kind, on any number of shards.
#[test]
fn shards_and_clients_mix() {
    scenario(async {
        let home = Home::new();
        let node = home.start(4);
        let unaware = home.client(&node, false).await;
        let mut small = Vec::new();
        for seed in 0..200 {
            let blob = content(1000 + seed, 50 + 10 * seed as usize);
            small.push((put(&unaware, &blob, PutOptions::default()).await, blob));
        }
        let large = content(50, 6 << 20);
        let large_hash = put(&unaware, &large, PutOptions::default()).await;
        let source = home.beside("source");
        fs::create_dir(&source).unwrap();
        make_tree(&source, false);
        let how = FolderPut { class: DurabilityClass::Durable, hold: false, file_io: FileIo::Plain };
        let folder = folder::put_folder(&unaware, &source, how, &Progress::default()).await.unwrap().hash;
        unaware.tag_set(&tag("the folder"), folder).await.unwrap();
        let aware = home.client(&node, true).await;
        for (hash, blob) in &small {
            assert_eq!(aware.get_whole(*hash).await.unwrap(), Got::Whole(blob.clone()));
        }
        drop((aware, unaware));
        node.stop();
        for (round, shards) in [2, 4].into_iter().enumerate() {
            let node = home.start(shards);
            for shard_aware in [true, false] {
                let client = home.client(&node, shard_aware).await;
                for (hash, blob) in &small {
                    assert_eq!(client.get_whole(*hash).await.unwrap(), Got::Whole(blob.clone()), "{shards} shards");
                }
                assert_served(&client, large_hash, &large).await;
                assert_eq!(client.tag_get(&tag("the folder")).await.unwrap(), folder);
                let manifest = folder::get_manifest(&client, folder).await.unwrap();
                let target = home.beside(&format!("target-{round}-{shard_aware}"));
                let how = FolderGet { replace: false, links: Links::Inside, file_io: FileIo::Plain };
                folder::get_folder(&client, &manifest, &target, how, &Progress::default()).await.unwrap();
                assert!(picture(&target) == picture(&source), "{shards} shards");
            }
            node.stop();
        }
    });
}
