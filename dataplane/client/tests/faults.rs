//! A node that breaks the protocol, lies or refuses: each is an error of its own, and nothing unverified gets through.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod fake_node;

use std::time::{Duration, Instant};

use bytes::Bytes;
use fake_node::{FakeNode, Fault, config};
use metanode_client::{BytesSource, ClientError, FnSink, Got, PutOptions, VecSink};
use metanode_types::{ByteRange, Hash, NodeKey};
use metanode_wire::{FrameError, RefusalCode};

fn sink() -> VecSink {
    VecSink { bytes: Vec::new(), bytes_max: u64::MAX }
}

fn large() -> Vec<u8> {
    (0..1_000_003u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

#[tokio::test]
async fn blobs_of_all_sizes_round_trip() {
    let node = FakeNode::start(Fault::None);
    let client = node.client().await;
    let data = large();
    for size in [0, 1, 4096, 200_000, 262_143, 262_144, 262_145, data.len()] {
        let bytes = Bytes::copy_from_slice(&data[..size]);
        let stored =
            client.put_source(&mut BytesSource(bytes.clone()), Some(size as u64), PutOptions::default()).await.unwrap();
        assert_eq!((stored.hash, stored.size_bytes), (metanode_crypto::hash(&bytes), size as u64));
        let mut got = sink();
        match client.get_whole(stored.hash).await.unwrap() {
            Got::Whole(whole) => assert_eq!(whole, bytes),
            Got::Large { size_bytes } => assert_eq!(size_bytes, size as u64),
        }
        client.get_range(stored.hash, ByteRange::ALL, &mut got).await.unwrap();
        assert!(got.bytes == bytes, "{size}");
    }
    let hash = metanode_crypto::hash(&data);
    for (offset, length) in [(0, 1), (16_383, 2), (500_000, 123_456), (1_000_000, u64::MAX), (1_000_003, 5)] {
        let mut got = sink();
        client.get_range(hash, ByteRange { offset, length }, &mut got).await.unwrap();
        let end = (offset.saturating_add(length)).min(data.len() as u64) as usize;
        assert!(got.bytes == data[offset as usize..end], "{offset} {length}");
    }
    let past = client.get_range(hash, ByteRange { offset: 1_000_004, length: 1 }, &mut sink()).await;
    assert_eq!(past.unwrap_err().refusal_code(), Some(RefusalCode::BadRange));
    client.close().await;
}

#[tokio::test]
async fn many_requests_share_a_connection_and_wait_for_their_turn() {
    let node = FakeNode::start_with(Fault::None, &[b"metanode-relay/1"], 1, 4);
    let client = node.client().await;
    let mut tasks = tokio::task::JoinSet::new();
    for i in 0..500u32 {
        let client = client.clone();
        tasks.spawn(async move {
            let bytes = Bytes::from(i.to_le_bytes().repeat(i as usize));
            let stored = client.put_whole(bytes.clone(), PutOptions::default()).await.unwrap();
            assert_eq!(client.get_whole(stored.hash).await.unwrap(), Got::Whole(bytes));
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(node.state.connections.load(std::sync::atomic::Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_shard_aware_client_makes_one_connection_a_shard_when_it_needs_it() {
    let node = FakeNode::start_with(Fault::None, &[b"metanode-relay/1"], 3, 64);
    let client = node.client().await;
    for i in 0..50u32 {
        let stored = client.put_whole(Bytes::copy_from_slice(&i.to_le_bytes()), PutOptions::default()).await.unwrap();
        assert!(matches!(client.get_whole(stored.hash).await, Ok(Got::Whole(_))));
    }
    assert_eq!(client.wire_counters().connections, 3);
    let mut plain = config();
    plain.shard_aware = false;
    let client = node.try_client(plain).await.unwrap();
    for i in 0..50u32 {
        assert!(client.get_whole(metanode_crypto::hash(&i.to_le_bytes())).await.is_ok());
    }
    assert_eq!((client.wire_counters().connections, client.shards()), (1, 3));
}

#[tokio::test]
async fn another_key_is_refused_before_anything_is_asked() {
    let mut node = FakeNode::start(Fault::None);
    node.ticket.node = NodeKey(metanode_crypto::Identity::from_seed(&[8; 32]).public().0);
    let error = node.try_client(config()).await.unwrap_err();
    assert!(matches!(error, ClientError::WrongNodeKey { expected, .. } if expected == node.ticket.node), "{error:?}");
}

#[tokio::test]
async fn another_protocol_is_named() {
    let node = FakeNode::start_with(Fault::None, &[b"metanode-relay/99"], 1, 64);
    let error = node.try_client(config()).await.unwrap_err();
    assert!(matches!(error, ClientError::UnsupportedProtocol(_)), "{error:?}");
}

#[tokio::test]
async fn a_silent_address_is_unreachable_and_the_next_one_is_tried() {
    let mut node = FakeNode::start(Fault::None);
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut config = config();
    config.connect_timeout = Duration::from_millis(300);
    node.ticket.addresses.insert(0, silent.local_addr().unwrap());
    let client = node.try_client(config.clone()).await.unwrap();
    assert_eq!(client.ticket(None).addresses, node.ticket.addresses[1..]);
    node.ticket.addresses.truncate(1);
    let error = node.try_client(config).await.unwrap_err();
    assert!(matches!(&error, ClientError::Unreachable(tried) if tried.len() == 1), "{error:?}");
}

#[tokio::test]
async fn data_that_does_not_match_never_reaches_the_caller() {
    let node = FakeNode::start(Fault::FlippedBit);
    let small = node.hold(vec![1; 4096]);
    let large = node.hold(large());
    let client = node.client().await;
    assert!(matches!(client.get_whole(small).await, Err(ClientError::HashMismatch(h)) if h == small));
    let mut taken = 0;
    let mut sink = FnSink(|_, data: &[u8]| taken += data.len());
    let error = client.get_range(large, ByteRange::ALL, &mut sink).await.unwrap_err();
    assert!(matches!(error, ClientError::HashMismatch(h) if h == large), "{error:?}");
    assert!(taken < 1_000_003, "the last group is the wrong one, and was withheld");
    assert!(taken >= 900_000, "what was right before it was handed on");
}

#[tokio::test]
async fn refusals_arrive_as_they_are() {
    for code in [RefusalCode::NotFound, RefusalCode::Forbidden, RefusalCode::DiskFull, RefusalCode::TooLarge] {
        let node = FakeNode::start(Fault::Refuse(code));
        let client = node.client().await;
        let whole = client.get_whole(Hash([0; 32])).await.unwrap_err();
        assert!(matches!(&whole, ClientError::Refused(r) if r.code == code && r.detail == "as told"), "{whole:?}");
        let put = client.put_stream(&large()[..], None, PutOptions::default()).await.unwrap_err();
        assert_eq!(put.refusal_code(), Some(code), "{put:?}");
        let bulk = client.get_range(Hash([0; 32]), ByteRange::ALL, &mut sink()).await.unwrap_err();
        assert_eq!(bulk.refusal_code(), Some(RefusalCode::NotFound), "{bulk:?}");
    }
}

#[tokio::test]
async fn a_busy_node_is_asked_again_or_not_as_configured() {
    let node = FakeNode::start(Fault::BusyAtFirst);
    let hash = node.hold(&b"x"[..]);
    assert!(matches!(node.client().await.get_whole(hash).await, Ok(Got::Whole(_))));
    let node = FakeNode::start(Fault::BusyAtFirst);
    let mut config = config();
    config.busy_patience = Duration::ZERO;
    let client = node.try_client(config).await.unwrap();
    let error = client.get_whole(Hash([0; 32])).await.unwrap_err();
    assert_eq!(error.refusal_code(), Some(RefusalCode::Busy));
}

#[tokio::test]
async fn breaches_of_the_protocol_end_the_connection_with_a_typed_error() {
    let get = async |fault| {
        let node = FakeNode::start(fault);
        let client = node.client().await;
        let first = client.get_whole(Hash([0; 32])).await.unwrap_err();
        let second = client.get_whole(Hash([0; 32])).await.unwrap_err();
        assert_eq!(first.to_string(), second.to_string(), "later requests fail with the same reason");
        first
    };
    let error = get(Fault::OversizedFrame).await;
    assert!(matches!(error, ClientError::Protocol(FrameError::TooLarge { length: u32::MAX, .. })), "{error:?}");
    let error = get(Fault::MalformedArchive).await;
    assert!(matches!(error, ClientError::Protocol(FrameError::Malformed)), "{error:?}");
    let error = get(Fault::WrongNumber).await;
    assert!(matches!(error, ClientError::Protocol(FrameError::Unexpected(_))), "{error:?}");
    let error = get(Fault::Hangup).await;
    assert!(matches!(error, ClientError::ConnectionLost(_)), "{error:?}");
}

#[tokio::test]
async fn a_silent_node_is_a_timeout() {
    let node = FakeNode::start(Fault::Silent);
    let mut config = config();
    config.request_timeout = Duration::from_millis(200);
    config.requests_max = 1;
    let client = node.try_client(config).await.unwrap();
    let begin = Instant::now();
    assert!(matches!(client.get_whole(Hash([0; 32])).await, Err(ClientError::Timeout(_))));
    // The slot is still taken: the node may yet answer. Waiting for it is bounded as well.
    assert!(matches!(client.get_whole(Hash([0; 32])).await, Err(ClientError::Timeout(_))));
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn bulk_transfers_that_end_badly_say_how() {
    let get = async |fault| {
        let node = FakeNode::start(fault);
        let hash = node.hold(large());
        node.client().await.get_range(hash, ByteRange::ALL, &mut sink()).await.unwrap_err()
    };
    let error = get(Fault::CutBulk).await;
    assert!(matches!(error, ClientError::ConnectionLost(_)), "{error:?}");
    let error = get(Fault::LongBulk).await;
    assert!(matches!(error, ClientError::HashMismatch(_)), "{error:?}");
    let error = get(Fault::ResetBulk(RefusalCode::Corrupt)).await;
    assert_eq!(error.refusal_code(), Some(RefusalCode::Corrupt), "{error:?}");
}

#[tokio::test]
async fn a_source_that_fails_stores_nothing() {
    struct Failing(u32);
    impl metanode_client::BlobSource for Failing {
        async fn next_chunk(&mut self) -> std::io::Result<Option<Bytes>> {
            self.0 += 1;
            if self.0 < 3 { Ok(Some(vec![0; 262_144].into())) } else { Err(std::io::ErrorKind::TimedOut.into()) }
        }
    }
    let node = FakeNode::start(Fault::None);
    let client = node.client().await;
    let error = client.put_source(&mut Failing(0), None, PutOptions::default()).await.unwrap_err();
    assert!(matches!(error, ClientError::Stream(_)), "{error:?}");
    assert!(node.state.blobs.lock().unwrap().is_empty());
    assert!(client.put_whole(Bytes::from_static(b"x"), PutOptions::default()).await.is_ok(), "the connection lives");
}

#[tokio::test]
async fn requests_that_are_dropped_leave_the_connection_usable() {
    let node = FakeNode::start_with(Fault::None, &[b"metanode-relay/1"], 1, 8);
    let hash = node.hold(vec![3; 100_000]);
    let client = node.client().await;
    for _ in 0..100 {
        let _ = tokio::time::timeout(Duration::from_micros(50), client.get_whole(hash)).await;
    }
    assert!(matches!(client.get_whole(hash).await, Ok(Got::Whole(_))));
}

#[tokio::test]
async fn a_listing_that_does_not_advance_is_a_breach() {
    let node = FakeNode::start(Fault::EndlessList);
    for i in 0..5u8 {
        node.hold(vec![i]);
    }
    let client = node.client().await;
    let page = client.list_blobs(None, 2).await.unwrap();
    let last = page.entries.last().unwrap().hash;
    assert!(matches!(client.list_blobs(Some(last), 2).await, Err(ClientError::Protocol(_))));
}
