//! What a client sees of a node, over real QUIC.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking; the helpers are outside of test functions")]

mod common;

use std::{collections::HashSet, time::Duration};

use common::{Client, DEADLINE, Lane, Node, blob, closed_with, refusal};
use metanode_crypto::Identity;
use metanode_node::{admin, codes, config::Readers};
use metanode_wire::{
    Kind, RefusalCode,
    message::{
        AdminStop, BlobPage, BulkBegin, Chunk, Data, Get, GetBulk, Hello, ListBlobs, ListTags, NodeStatus,
        NodeStatusReply, PutBulk, PutEnd, Remove, Stat, StatReply, Stored, TagGet, TagPage, TagRemove, TagSet,
        TagTarget, Welcome,
    },
};

fn block_on(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

#[test]
fn every_request_of_one_frame_is_answered() {
    let node = Node::start(|_| ());
    block_on(async {
        let mut client = node.client().await;
        let lane = &mut client.lane;
        let hello = lane.ask(1, &Hello { agent: "test".to_owned() }).await;
        let welcome = hello.message::<Welcome>().unwrap();
        assert_eq!((welcome.shards.to_native(), welcome.whole_bytes_max.to_native()), (2, 262_144));
        assert!(welcome.may_write && welcome.requests_max.to_native() == 1_024);

        let (hash, bytes) = blob(1, 5_000);
        lane.put(2, hash, &bytes).await;
        let stored = lane.next().await.unwrap();
        let stored = stored.message::<Stored>().unwrap();
        assert_eq!((stored.hash, stored.size_bytes.to_native(), stored.existed), (hash, 5_000, false));
        let data = lane.ask(3, &Get { hash }).await;
        assert_eq!(data.message::<Data>().unwrap().size_bytes.to_native(), 5_000);
        assert_eq!(data.body, bytes);
        let stat = lane.ask(4, &Stat { hash }).await;
        assert!(stat.message::<StatReply>().unwrap().held);

        let name = "backup/1".to_owned();
        assert_eq!(lane.ask(5, &TagSet { name: name.clone(), hash }).await.kind, Kind::Done);
        assert_eq!(lane.ask(6, &TagGet { name: name.clone() }).await.message::<TagTarget>().unwrap().hash, hash);
        let tags = lane.ask(7, &ListTags { after: None, count: 0 }).await;
        assert_eq!(tags.message::<TagPage>().unwrap().entries.len(), 1);
        let page = lane.ask(8, &ListBlobs { after: None, count: u32::MAX }).await;
        assert_eq!(page.message::<BlobPage>().unwrap().entries[0].hash, hash);
        assert_eq!(refusal(&lane.ask(9, &Remove { hash }).await).code, RefusalCode::InUse);
        assert_eq!(lane.ask(10, &TagRemove { name: name.clone() }).await.kind, Kind::Done);
        assert_eq!(lane.ask(11, &Remove { hash }).await.kind, Kind::Done);
        assert_eq!(refusal(&lane.ask(12, &Get { hash }).await).code, RefusalCode::NotFound);
        assert_eq!(refusal(&lane.ask(13, &TagGet { name }).await).code, RefusalCode::NotFound);
        assert_eq!(refusal(&lane.ask(14, &TagGet { name: "\n".to_owned() }).await).code, RefusalCode::Malformed);
        lane.put(15, [0; 32], &bytes).await;
        assert_eq!(refusal(&lane.next().await.unwrap()).code, RefusalCode::HashMismatch);
        assert_eq!(refusal(&lane.ask(16, &AdminStop {}).await).code, RefusalCode::NotSupported);
        let status = lane.ask(17, &NodeStatus {}).await;
        let status = status.message::<NodeStatusReply>().unwrap();
        assert_eq!(status.quic_address.as_str(), node.ready.quic.to_string());
        assert_eq!(status.connections.to_native(), 1);
        lane.send.finish().unwrap();
        assert!(lane.next().await.is_none(), "the node ends a stream that the client has ended");
    });
    node.stop();
}

#[test]
fn many_requests_at_once_are_all_answered_once() {
    let node = Node::start(|config| config.quic.requests_max = 8);
    block_on(async {
        let mut client = node.client().await;
        let blobs: Vec<_> = (0..40).map(|seed| blob(seed, 100 + 700 * seed as usize)).collect();
        for (request, (hash, bytes)) in blobs.iter().enumerate() {
            client.lane.put(request as u32, *hash, bytes).await;
        }
        let mut stored = [false; 40];
        for _ in 0..40 {
            let frame = client.lane.next().await.unwrap();
            assert_eq!(frame.message::<Stored>().unwrap().hash, blobs[frame.request as usize].0);
            assert!(!std::mem::replace(&mut stored[frame.request as usize], true));
        }
        // Cached and foreign ones mixed, on a second stream, with the end of the stream right behind the last.
        let mut lane = Lane::open(&client.connection).await;
        let rounds = 3_000u32;
        let mut wanted = vec![1u8; rounds as usize];
        let Lane { send, .. } = &mut lane;
        let mut out = Vec::new();
        for request in 0..rounds {
            metanode_wire::encode(&mut out, request, &Get { hash: blobs[request as usize % 40].0 }, 0);
        }
        send.write_all(&out).await.unwrap();
        send.finish().unwrap();
        while let Some(frame) = lane.next().await {
            assert_eq!(frame.body, blobs[frame.request as usize % 40].1);
            wanted[frame.request as usize] -= 1;
        }
        assert!(wanted.iter().all(|left| *left == 0));
    });
    node.stop();
}

#[test]
fn rights_follow_the_key() {
    let [reader, stranger] = [1, 2].map(|seed| Identity::from_seed(&[seed; 32]));
    let (hash, bytes) = blob(1, 600_000);
    let (small, _) = blob(1, 100);
    let listed = reader.public();
    for readers in [Readers::Public, Readers::Keys(vec![listed])] {
        let public = readers == Readers::Public;
        let node = Node::start(|config| config.access.readers = readers);
        block_on(async {
            for (identity, may_read) in [(&reader, true), (&stranger, public)] {
                let mut client = Client::connect(&node.ready, identity).await;
                let lane = &mut client.lane;
                let welcome = lane.ask(0, &Hello { agent: String::new() }).await;
                assert!(!welcome.message::<Welcome>().unwrap().may_write);
                lane.put(1, small, b"x").await;
                assert_eq!(refusal(&lane.next().await.unwrap()).code, RefusalCode::Forbidden);
                let name = "a".to_owned();
                for refused in [
                    lane.ask(2, &Remove { hash }).await,
                    lane.ask(3, &TagSet { name: name.clone(), hash }).await,
                    lane.ask(4, &TagRemove { name: name.clone() }).await,
                ] {
                    assert_eq!(refusal(&refused).code, RefusalCode::Forbidden);
                }
                let expected = if may_read { RefusalCode::NotFound } else { RefusalCode::Forbidden };
                let mut bulk = Lane::open(&client.connection).await;
                for refused in [
                    lane.ask(5, &Get { hash }).await,
                    lane.ask(6, &Stat { hash }).await,
                    lane.ask(7, &TagGet { name }).await,
                    bulk.ask(8, &GetBulk { hash, offset: 0, length: 1 }).await,
                ] {
                    assert_eq!(refusal(&refused).code, expected);
                }
                let mut bulk = Lane::open(&client.connection).await;
                bulk.send(9, &PutBulk { size_bytes: None, class: 1, kind: 0, hold: true }, &[]).await;
                assert_eq!(refusal(&bulk.next().await.unwrap()).code, RefusalCode::Forbidden);
                // The rest is not wanted: the stream is stopped, with the same number.
                let stopped = tokio::time::timeout(DEADLINE, bulk.send.stopped()).await.unwrap().unwrap();
                assert_eq!(stopped.map(quinn::VarInt::into_inner), Some(RefusalCode::Forbidden as u64));
                assert_eq!(client.connection.close_reason(), None, "a refusal costs nobody the connection");
            }
        });
        drop(bytes.clone());
        node.stop();
    }
}

#[test]
fn bytes_that_are_no_frames_end_the_connection_and_say_why() {
    let node = Node::start(|_| ());
    let frame = |version: u8, kind: u8, head: u32, body: u32| {
        let mut bytes = vec![version, kind, 0, 0, 7, 0, 0, 0];
        bytes.extend(head.to_le_bytes());
        bytes.extend(body.to_le_bytes());
        bytes.resize(16 + (head as usize).min(64), 0xff);
        bytes
    };
    let cases = [
        (frame(9, Kind::Get as u8, 0, 0), RefusalCode::UnsupportedVersion),
        (frame(1, 0x33, 0, 0), RefusalCode::NotSupported),
        (frame(1, Kind::Get as u8, 1 << 20, 0), RefusalCode::TooLarge),
        (frame(1, Kind::Put as u8, 0, u32::MAX), RefusalCode::TooLarge),
        (frame(1, Kind::Get as u8, 3, 0), RefusalCode::Malformed),
        (frame(1, Kind::ListTags as u8, 64, 0), RefusalCode::Malformed),
        (frame(1, Kind::Welcome as u8, 0, 0), RefusalCode::Malformed),
        (frame(1, Kind::PutEnd as u8, 0, 0), RefusalCode::Malformed),
        (frame(1, Kind::GetBulk as u8, 1, 0), RefusalCode::Malformed),
    ];
    block_on(async {
        for (bytes, code) in cases {
            let mut client = node.client().await;
            client.lane.send.write_all(&bytes).await.unwrap();
            if bytes[1] != Kind::GetBulk as u8 {
                let said = client.lane.next().await.expect("a refusal goes before the end");
                assert_eq!(refusal(&said).code, code, "{bytes:?}");
            }
            assert_eq!(client.closed_with().await, code as u64, "{bytes:?}");
        }
        // A bulk transfer on a stream that is in use.
        let mut client = node.client().await;
        client.lane.ask(1, &Hello { agent: String::new() }).await;
        client.lane.send(2, &GetBulk { hash: [0; 32], offset: 0, length: 1 }, &[]).await;
        assert_eq!(refusal(&client.lane.next().await.unwrap()).code, RefusalCode::Malformed);
        assert_eq!(client.closed_with().await, RefusalCode::Malformed as u64);
        // And the node is none the worse.
        let mut client = node.client().await;
        assert_eq!(client.lane.ask(1, &Hello { agent: String::new() }).await.kind, Kind::Welcome);
    });
    node.stop();
}

#[test]
fn unfinished_frames_are_bounded() {
    let node = Node::start(|config| {
        config.node.shards = Some(1);
        config.store.uploads_bytes_max = 1 << 20;
        config.store.upload_window_bytes = 1 << 20;
    });
    let (hash, bytes) = blob(1, 262_144);
    block_on(async {
        let client = node.client().await;
        let mut whole = Vec::new();
        metanode_wire::encode(
            &mut whole,
            1,
            &metanode_wire::message::Put { hash, class: 0, kind: 0, hold: true },
            bytes.len(),
        );
        whole.extend_from_slice(&bytes);
        let mut lanes = Vec::new();
        for _ in 0..8 {
            let mut lane = Lane::open(&client.connection).await;
            // All but one byte; the fifth goes over the bound.
            if lane.send.write_all(&whole[..whole.len() - 1]).await.is_err() {
                break;
            }
            lanes.push(lane);
        }
        assert_eq!(client.closed_with().await, u64::from(codes::BUSY));
        let mut client = node.client().await;
        client.lane.put(1, hash, &bytes).await;
        assert_eq!(client.lane.next().await.unwrap().kind, Kind::Stored, "the bytes were given back");
    });
    node.stop();
}

#[test]
fn clients_that_do_not_read_hold_little_and_leave_room_for_others() {
    const BOUND: u64 = 1 << 20;
    let node = Node::start(|config| {
        config.node.shards = Some(1);
        config.store.downloads_bytes_max = BOUND;
    });
    block_on(async {
        let mut honest = node.client().await;
        let blobs: Vec<_> = (0..40).map(|seed| blob(seed, 200_000)).collect();
        for (request, (hash, bytes)) in blobs.iter().enumerate() {
            honest.lane.put(request as u32, *hash, bytes).await;
            assert_eq!(honest.lane.next().await.unwrap().kind, Kind::Stored);
        }
        let (small, bytes) = blob(99, 10_000);
        honest.lane.put(0, small, &bytes).await;
        assert_eq!(honest.lane.next().await.unwrap().kind, Kind::Stored);
        let mut slow = Vec::new();
        for _ in 0..30 {
            let mut client = Client::connect_narrow(&node.ready, &node.operator, 10_000).await;
            for (request, (hash, _)) in blobs.iter().enumerate() {
                client.lane.send(request as u32, &Get { hash: *hash }, &[]).await;
            }
            slow.push(client);
        }
        // Until all of them are stuck, or closed since they were: nothing more is sent to them.
        let (mut sent, mut most) = (0.0, 0f64);
        let deadline = std::time::Instant::now() + DEADLINE;
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await; // the node publishes each second
            let held = node.metric("download_bytes");
            most = most.max(held);
            // What was read and waits, and what is not acknowledged, are bounded each; a read that was under way comes on top.
            assert!(held <= (2 * BOUND + 2 * 262_144) as f64, "{held} bytes");
            let now = node.metric("quic_bytes_sent_total");
            if most > 100_000.0 && now - sent < 100_000.0 {
                break;
            }
            assert!(std::time::Instant::now() < deadline, "they held {most} bytes, and were sent {now}");
            sent = now;
        }
        assert_eq!(honest.lane.ask_again(1, &Get { hash: small }, &[]).await.body, bytes);
        for client in &slow {
            client.connection.close(0u32.into(), b"");
        }
        let deadline = std::time::Instant::now() + DEADLINE;
        while node.metric("download_bytes") > 0.0 {
            assert!(std::time::Instant::now() < deadline, "{} bytes", node.metric("download_bytes"));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    node.stop();
}

#[test]
fn strangers_that_take_no_answers_leave_room_for_others() {
    let node = Node::start(|config| {
        config.node.shards = Some(1);
        config.store.cache_bytes = 1 << 20;
        config.store.downloads_bytes_max = 1 << 20;
    });
    block_on(async {
        let mut honest = node.client().await;
        let blobs: Vec<_> = (0..40).map(|seed| blob(seed, 200_000)).collect();
        for (request, (hash, bytes)) in blobs.iter().enumerate() {
            honest.lane.put(request as u32, *hash, bytes).await;
            assert_eq!(honest.lane.next().await.unwrap().kind, Kind::Stored);
        }
        // More requests than a shard lets wait, from keys that cost nothing: half ask for little, half for blobs from the disk.
        let mut deaf = Vec::new();
        for number in 0..24u8 {
            let mut client = Client::connect_narrow(&node.ready, &Identity::from_seed(&[100 + number; 32]), 0).await;
            let mut out = Vec::new();
            for request in 0..1_000 {
                let (hash, _) = blobs[request as usize % blobs.len()];
                match number % 2 {
                    0 => metanode_wire::encode(&mut out, request, &Stat { hash }, 0),
                    _ => metanode_wire::encode(&mut out, request, &Get { hash }, 0),
                }
            }
            client.lane.send.write_all(&out).await.unwrap();
            deaf.push(client);
        }
        // The first packet of each; more is not read of who takes no answers.
        let received = 24.0 * 1_000.0;
        let deadline = std::time::Instant::now() + DEADLINE;
        while node.metric("received_bytes_total") < received {
            assert!(std::time::Instant::now() < deadline, "the node does not read");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // The first attempts may be too early: who keeps everything is closed some seconds later.
        let (hash, bytes) = blob(99, 5_000);
        let put = metanode_wire::message::Put { hash, class: 1, kind: 0, hold: true };
        assert_eq!(honest.lane.ask_again(1, &put, &bytes).await.kind, Kind::Stored);
        honest.lane.ask_again(2, &Stat { hash }, &[]).await.message::<StatReply>().unwrap();
        // From the disk: the cache is small, and others came through it.
        let (hash, bytes) = &blobs[0];
        assert_eq!(honest.lane.ask_again(3, &Get { hash: *hash }, &[]).await.body, *bytes);
        let deadline = std::time::Instant::now() + DEADLINE;
        while node.metric("connections_stalled_total") == 0.0 {
            assert!(std::time::Instant::now() < deadline, "nobody was closed");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    node.stop();
}

#[test]
fn strangers_have_no_bodies_to_send() {
    let node = Node::start(|config| config.node.shards = Some(1));
    block_on(async {
        let mut stranger = Client::connect(&node.ready, &Identity::from_seed(&[5; 32])).await;
        let (hash, bytes) = blob(1, 16_000);
        stranger.lane.put(1, hash, &bytes).await;
        assert_eq!(refusal(&stranger.lane.next().await.unwrap()).code, RefusalCode::Forbidden);
        let mut head = Vec::new();
        metanode_wire::encode(
            &mut head,
            2,
            &metanode_wire::message::Put { hash, class: 0, kind: 0, hold: true },
            262_144,
        );
        stranger.lane.send.write_all(&head).await.unwrap();
        assert_eq!(refusal(&stranger.lane.next().await.unwrap()).code, RefusalCode::Forbidden);
        assert_eq!(stranger.closed_with().await, RefusalCode::Forbidden as u64, "and nothing of the body is read");
    });
    node.stop();
}

#[test]
fn a_key_has_so_many_connections_and_no_more() {
    let node = Node::start(|config| {
        config.node.shards = Some(1);
        config.quic.listen = (std::net::Ipv4Addr::UNSPECIFIED, 0).into();
        config.quic.connections_per_key_max = 3;
    });
    block_on(async {
        let mut clients = Vec::new();
        for _ in 0..3 {
            let mut client = node.client().await;
            client.lane.ask(1, &Hello { agent: String::new() }).await;
            clients.push(client);
        }
        let (_endpoint, fourth) = Client::try_connect(&node.ready, &node.operator).await;
        assert_eq!(closed_with(&fourth).await, u64::from(codes::BUSY));
        let mut other = Client::connect(&node.ready, &Identity::from_seed(&[5; 32])).await;
        other.lane.ask(1, &Hello { agent: String::new() }).await;
        clients.pop().unwrap().connection.close(0u32.into(), b"");
        let deadline = std::time::Instant::now() + DEADLINE;
        loop {
            let (_endpoint, again) = Client::try_connect(&node.ready, &node.operator).await;
            let mut lane = Lane::open(&again).await;
            lane.send(1, &Hello { agent: String::new() }, &[]).await;
            if lane.next().await.is_some() {
                break;
            }
            assert!(std::time::Instant::now() < deadline, "the place did not come back");
        }
    });
    node.stop();
}

#[test]
fn a_client_that_asks_for_too_much_at_once_waits() {
    // Four uploads fit the bound on their bytes with ease; sixteen at once would be refused as "busy".
    let node = Node::start(|config| {
        config.node.shards = Some(1);
        config.quic.requests_max = 4;
        config.store.uploads_bytes_max = 1 << 20;
        config.store.upload_window_bytes = 1 << 20;
    });
    block_on(async {
        let mut client = node.client().await;
        let uploads = 100;
        let Lane { send, .. } = &mut client.lane;
        let mut out = Vec::new();
        for request in 0..uploads {
            let (hash, bytes) = blob(u64::from(request), 100_000);
            let put = metanode_wire::message::Put { hash, class: 1, kind: 0, hold: true };
            metanode_wire::encode(&mut out, request, &put, bytes.len());
            out.extend_from_slice(&bytes);
        }
        send.write_all(&out).await.unwrap();
        for _ in 0..uploads {
            assert_eq!(client.lane.next().await.unwrap().kind, Kind::Stored);
        }
    });
    node.stop();
}

#[test]
fn bulk_transfers_go_in_and_out() {
    let node = Node::start(|_| ());
    let (hash, bytes) = blob(7, 3 * 262_144 + 1_000);
    block_on(async {
        let mut client = node.client().await;
        let mut lane = Lane::open(&client.connection).await;
        lane.send(3, &PutBulk { size_bytes: Some(bytes.len() as u64), class: 1, kind: 0, hold: true }, &[]).await;
        for chunk in bytes.chunks(262_144) {
            lane.send(3, &Chunk {}, chunk).await;
        }
        lane.send(3, &PutEnd { hash }, &[]).await;
        let stored = lane.next().await.unwrap();
        assert_eq!((stored.request, stored.message::<Stored>().unwrap().hash), (3, hash));
        assert!(lane.next().await.is_none());

        let large = client.lane.ask(4, &Get { hash }).await;
        assert_eq!(large.message::<Data>().unwrap().size_bytes.to_native(), bytes.len() as u64);
        assert!(large.body.is_empty());

        let mut lane = Lane::open(&client.connection).await;
        lane.send(5, &GetBulk { hash, offset: 0, length: u64::MAX }, &[]).await;
        lane.send.finish().unwrap();
        let begin = lane.next().await.unwrap();
        assert_eq!(begin.message::<BulkBegin>().unwrap().size_bytes.to_native(), bytes.len() as u64);
        let groups = bytes.len().div_ceil(16_384);
        assert_eq!(lane.rest().await.len(), bytes.len() + 64 * (groups - 1), "all groups and the tree between them");

        for (length, code) in [(u64::MAX, RefusalCode::BadRange), (0, RefusalCode::BadRange)] {
            let mut lane = Lane::open(&client.connection).await;
            let behind = GetBulk { hash, offset: bytes.len() as u64 + 1, length };
            assert_eq!(refusal(&lane.ask(6, &behind).await).code, code);
        }
    });
    node.stop();
}

#[test]
fn bulk_uploads_that_break_the_rules_are_refused() {
    let node = Node::start(|_| ());
    block_on(async {
        let client = node.client().await;
        let begin = |size_bytes| PutBulk { size_bytes, class: 1, kind: 0, hold: true };
        let full = vec![1; 262_144];
        let cases: [(_, &[&[u8]], _); 5] = [
            (begin(Some(u64::MAX)), &[], RefusalCode::TooLarge),
            (begin(Some(3)), &[b"four"], RefusalCode::TooLarge),
            (begin(None), &[b"short", b"then more"], RefusalCode::Malformed),
            (begin(None), &[&full, b""], RefusalCode::Malformed),
            (PutBulk { class: 9, ..begin(None) }, &[], RefusalCode::Malformed),
        ];
        for (request, chunks, code) in cases {
            let mut lane = Lane::open(&client.connection).await;
            lane.send(1, &request, &[]).await;
            for chunk in chunks {
                lane.send(1, &Chunk {}, chunk).await;
            }
            assert_eq!(refusal(&lane.next().await.unwrap()).code, code, "{request:?}");
        }
        let mut lane = Lane::open(&client.connection).await;
        lane.send(1, &begin(Some(5)), &[]).await;
        lane.send(1, &Chunk {}, b"four").await;
        lane.send(1, &PutEnd { hash: [0; 32] }, &[]).await;
        assert_eq!(refusal(&lane.next().await.unwrap()).code, RefusalCode::Malformed, "fewer than announced");
        let mut lane = Lane::open(&client.connection).await;
        lane.send(1, &begin(None), &[]).await;
        lane.send(1, &Chunk {}, b"four").await;
        lane.send(1, &PutEnd { hash: [0; 32] }, &[]).await;
        assert_eq!(refusal(&lane.next().await.unwrap()).code, RefusalCode::HashMismatch);
        // Given up by the client: nobody is answered, and the connection lives on.
        let mut lane = Lane::open(&client.connection).await;
        lane.send(1, &begin(None), &[]).await;
        lane.send.finish().unwrap();
        assert!(lane.next().await.is_none());
        assert_eq!(client.connection.close_reason(), None);
    });
    node.stop();
}

#[test]
fn what_was_put_survives_a_stop_and_clients_hear_of_it() {
    let node = Node::start(|_| ());
    let (hash, bytes) = blob(1, 10_000);
    let key = node.ready.ticket.node;
    let client = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let connected = client.block_on(async {
        let mut connected = node.client().await;
        connected.lane.put(1, hash, &bytes).await;
        assert_eq!(connected.lane.next().await.unwrap().kind, Kind::Stored);
        connected
    });
    let status = admin::status(node.path()).unwrap();
    assert_eq!((status.node_key, status.shards, status.connections), (key, 2, 1));
    assert!(status.disk_free_bytes > 0 && status.read_only_reason.is_none());
    assert_eq!(status.metrics, node.ready.metrics);
    let folder = node.stop();
    assert_eq!(client.block_on(connected.closed_with()), u64::from(codes::SHUTTING_DOWN));
    assert!(matches!(admin::status(folder.path()), Err(admin::AdminError::NotRunning { .. })));

    let node = Node::start_on(folder, |config| config.node.shards = Some(1));
    assert_eq!(node.ready.ticket.node, key);
    client.block_on(async {
        let mut again = node.client().await;
        assert_eq!(again.lane.ask(1, &Get { hash }).await.body, bytes);
    });
    node.stop();
}

#[test]
fn a_stop_lets_begun_work_finish_and_refuses_new_work() {
    let node = Node::start(|_| ());
    let (hash, bytes) = blob(3, 262_144 + 9);
    let path = node.path().to_owned();
    block_on(async {
        let mut client = node.client().await;
        assert_eq!(client.lane.ask(1, &Hello { agent: String::new() }).await.kind, Kind::Welcome);
        let mut upload = Lane::open(&client.connection).await;
        upload.send(1, &PutBulk { size_bytes: None, class: 1, kind: 0, hold: true }, &[]).await;
        upload.send(1, &Chunk {}, &bytes[..262_144]).await;
        // Its first chunk has arrived once something sent behind it is answered.
        assert_eq!(refusal(&client.lane.ask(2, &Get { hash: [1; 32] }).await).code, RefusalCode::NotFound);
        let stopping = tokio::task::spawn_blocking(move || admin::stop(&path, DEADLINE));
        while refusal(&client.lane.ask(3, &Get { hash: [1; 32] }).await).code != RefusalCode::ShuttingDown {}
        upload.send(1, &Chunk {}, &bytes[262_144..]).await;
        upload.send(1, &PutEnd { hash }, &[]).await;
        assert_eq!(upload.next().await.expect("an answer").kind, Kind::Stored);
        assert_eq!(client.closed_with().await, u64::from(codes::SHUTTING_DOWN));
        stopping.await.unwrap().unwrap();
    });
    let folder = node.stopped();
    let node = Node::start_on(folder, |_| ());
    block_on(async {
        let mut client = node.client().await;
        let large = client.lane.ask(1, &Get { hash }).await;
        assert_eq!(large.message::<Data>().unwrap().size_bytes.to_native(), bytes.len() as u64);
    });
    node.stop();
}

#[test]
fn the_metrics_page_is_what_prometheus_takes() {
    let node = Node::start(|_| ());
    block_on(async {
        let mut client = node.client().await;
        client.lane.ask(1, &Hello { agent: String::new() }).await;
        client.lane.ask(2, &Get { hash: [1; 32] }).await;
    });
    let text = node.metrics();
    let (head, text) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let series: Vec<&str> =
        text.lines().filter(|l| !l.starts_with('#')).map(|l| l.rsplit_once(' ').unwrap().0).collect();
    let distinct: HashSet<&str> = series.iter().copied().collect();
    assert_eq!(series.len(), distinct.len(), "a series is there once");
    let families: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("# TYPE ")).collect();
    assert_eq!(families.len(), families.iter().collect::<HashSet<_>>().len(), "a family is there once");
    for wanted in [
        "shard_stalls_total{shard=\"1\"} ",
        "request_seconds_count{operation=\"get\"} 1\n",
        "quic_connections{shard=\"0\"} ",
        "store_cache_misses_total{shard=\"0\"} ",
        "store_fsyncs_total{shard=\"0\"} ",
        "process_resident_memory_bytes ",
        "node_build_info{version=",
    ] {
        assert!(text.contains(wanted), "{wanted} is not in {text}");
    }
    node.stop();
}

#[test]
fn a_second_node_on_the_folder_is_refused() {
    let node = Node::start(|_| ());
    let data = metanode_node::DataFolder::open(node.path()).unwrap();
    let config = data.config().unwrap();
    let refused = metanode_node::run(data, config, |_| panic!("two nodes on one folder"));
    assert!(
        matches!(&refused, Err(metanode_node::NodeError::Data(metanode_node::data::DataError::Locked { pid, .. }))
            if *pid == Some(std::process::id())),
        "{refused:?}"
    );
    node.stop();
}
