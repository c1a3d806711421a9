//! What a node refuses, how it says so, and that it goes on serving others: wrong keys and protocols, hostile bytes, clients
//! that stall or vanish.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::{
    future::{Future, poll_fn},
    os::unix::fs::PermissionsExt as _,
    pin::pin,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use metanode_client::{Client, ClientConfig, ClientError, Got, PutOptions};
use metanode_crypto::{Identity, tls::ALPN_RELAY};
use metanode_e2e::{
    Home, Mount, Node, Random, Raw, connect_raw, content, eventually, frame, is_root, metanode, run, scenario,
};
use metanode_types::{Hash, NodeKey};
use metanode_wire::{
    Frame, Kind, RefusalCode, Ticket,
    message::{Chunk, Get, Hello, ListBlobs, NodeStatus, Put, PutBulk, PutEnd, Remove, Stat, Stored, TagSet, Welcome},
};

const CHUNK: usize = 256 * 1024;

/// Long enough for anything that a node does at once or at its next tick.
const SOON: Duration = Duration::from_secs(20);

/// TLS alert "no application protocol" (RFC 8446 section 6) as a QUIC error (RFC 9001 section 4.8).
const NO_APPLICATION_PROTOCOL: u64 = 0x100 + 120;

fn stranger() -> Identity {
    Identity::from_seed(&[66; 32])
}

async fn connect(node: &Node, identity: Identity) -> Client {
    Client::connect(&node.ready.ticket, ClientConfig::new(identity)).await.unwrap()
}

async fn raw(node: &Node, home: &Home) -> Raw {
    connect_raw(&node.ready.ticket, home.operator(), ALPN_RELAY).await.unwrap()
}

fn put_bulk(size_bytes: Option<u64>) -> PutBulk {
    PutBulk { size_bytes, class: 1, kind: 0, hold: true }
}

/// Whether somebody else gets an answer.
async fn assert_serves(client: &Client, seed: u64) {
    let blob = content(seed, 3000);
    let stored = client.put_whole(blob.clone(), PutOptions::default()).await.unwrap();
    assert_eq!(client.get_whole(stored.hash).await.unwrap(), Got::Whole(blob));
}

#[test]
fn another_application_protocol_is_refused_in_the_handshake() {
    scenario(async {
        let home = Home::new();
        let node = home.start(2);
        for alpn in [&b"metanode-relay/2"[..], b"h3", b"metanode-bpi/1"] {
            match connect_raw(&node.ready.ticket, home.operator(), alpn).await.unwrap_err() {
                quinn::ConnectionError::ConnectionClosed(closed) => {
                    assert_eq!(u64::from(closed.error_code), NO_APPLICATION_PROTOCOL, "{closed}");
                }
                other => panic!("not refused by the handshake: {other}"),
            }
        }
        assert_serves(&home.client(&node, true).await, 1).await;
    });
}

#[test]
fn frames_that_break_the_protocol_close_the_connection_with_their_code() {
    scenario(async {
        let home = Home::new();
        let node = home.start(2);
        let good = frame(5, &Get { hash: [1; 32] }, b"");
        let with = |at: usize, byte: u8| {
            let mut bytes = good.to_vec();
            bytes[at] = byte;
            bytes
        };
        let mut short = vec![1, Kind::Get as u8, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];
        short.extend([1, 2, 3]);
        let cases = [
            ("version", with(0, 2), RefusalCode::UnsupportedVersion),
            ("kind", with(1, 0x77), RefusalCode::NotSupported),
            ("flags", with(2, 1), RefusalCode::NotSupported),
            ("head of 4 GiB", with(11, 0xff), RefusalCode::TooLarge),
            ("head over the limit", with(10, 0x02), RefusalCode::TooLarge),
            ("body of 4 GiB", with(15, 0xff), RefusalCode::TooLarge),
            ("an archive too short", short, RefusalCode::Malformed),
            (
                "an answer as a request",
                frame(5, &Stored { hash: [1; 32], size_bytes: 1, existed: true }, b"").to_vec(),
                RefusalCode::Malformed,
            ),
            ("a chunk without an upload", frame(5, &Chunk {}, b"").to_vec(), RefusalCode::Malformed),
        ];
        for (what, bytes, code) in cases {
            let raw = raw(&node, &home).await;
            let mut stream = raw.open().await;
            stream.write(&bytes).await;
            let (_, refusal) = stream.refusal().await;
            assert_eq!(refusal.code, code, "{what}: {refusal}");
            assert!(stream.answer().await.is_none(), "{what}: the stream ends");
            assert_eq!(raw.close_code().await, code as u64, "{what}");
        }
        assert!(node.metric("protocol_errors_total") >= 9.0);
        assert_serves(&home.client(&node, true).await, 2).await;
        node.stop();
    });
}

#[test]
fn refused_requests_leave_the_connection_as_it_is() {
    scenario(async {
        let home = Home::new();
        let node = home.start(2);
        let raw = raw(&node, &home).await;
        let mut stream = raw.open().await;
        stream.ask(1, &Hello { agent: "test".into() }, b"").await;
        let welcome = stream.answer().await.unwrap();
        assert!(welcome.message::<Welcome>().unwrap().may_write);
        // Requests that can't be: unknown class, unknown kind, a body where none belongs, a tag that is no name.
        let hash = metanode_crypto::hash(b"abc").0;
        stream.ask(2, &Put { hash, class: 9, kind: 0, hold: true }, b"abc").await;
        stream.ask(3, &Put { hash, class: 1, kind: 9, hold: true }, b"abc").await;
        stream.ask(4, &Stat { hash }, b"body").await;
        stream.ask(5, &TagSet { name: "a\nb".into(), hash }, b"").await;
        stream.ask(6, &Put { hash: [1; 32], class: 1, kind: 0, hold: true }, b"abc").await;
        stream
            .ask(7, &Put { hash: metanode_crypto::hash(b"no folder").0, class: 1, kind: 1, hold: true }, b"no folder")
            .await;
        stream.ask(8, &Put { hash, class: 1, kind: 0, hold: true }, b"abc").await;
        let mut answers: Vec<Frame> = Vec::new();
        for _ in 2..=8 {
            answers.push(stream.answer().await.unwrap());
        }
        answers.sort_by_key(|frame| frame.request);
        for (frame, (request, code)) in answers.iter().zip([
            (2, Some(RefusalCode::Malformed)),
            (3, Some(RefusalCode::Malformed)),
            (4, Some(RefusalCode::Malformed)),
            (5, Some(RefusalCode::Malformed)),
            (6, Some(RefusalCode::HashMismatch)),
            (7, Some(RefusalCode::Malformed)),
            (8, None),
        ]) {
            let found = frame.message::<metanode_wire::message::Refused>().ok().map(|refused| refused.code.to_native());
            assert_eq!((frame.request, found), (request, code.map(|code| code as u16)));
        }
        node.stop();
    });
}

#[test]
fn bytes_that_do_not_match_their_hash_are_not_stored() {
    scenario(async {
        let home = Home::new();
        let node = home.start(2);
        let client = home.client(&node, true).await;
        let blob = content(5, 1000);
        let wrong = Hash([5; 32]);
        let error = client.put_hashed(wrong, blob.clone(), PutOptions::default()).await.unwrap_err();
        assert_eq!(error.refusal_code(), Some(RefusalCode::HashMismatch), "{error}");
        // In a bulk transfer it shows at the end.
        let raw = raw(&node, &home).await;
        let large = content(6, 3 * CHUNK);
        for announced in [None, Some(large.len() as u64)] {
            let mut stream = raw.open().await;
            stream.ask(0, &put_bulk(announced), b"").await;
            for chunk in large.chunks(CHUNK) {
                stream.ask(0, &Chunk {}, chunk).await;
            }
            stream.ask(0, &PutEnd { hash: wrong.0 }, b"").await;
            assert_eq!(stream.refusal().await.1.code, RefusalCode::HashMismatch);
        }
        // Other lies about the size.
        let [whole, part] = [&large[..CHUNK], &large[..10]];
        type Lie<'a> = (Option<u64>, &'a [&'a [u8]], RefusalCode);
        let lies: [Lie<'_>; 6] = [
            (Some(10), &[whole], RefusalCode::TooLarge),
            (Some(u64::MAX), &[], RefusalCode::TooLarge),
            (Some(CHUNK as u64 + 1), &[whole], RefusalCode::Malformed),
            (None, &[part, whole], RefusalCode::Malformed),
            (None, &[part, part], RefusalCode::Malformed),
            (None, &[b""], RefusalCode::Malformed),
        ];
        for (announced, chunks, code) in lies {
            let mut stream = raw.open().await;
            stream.ask(0, &put_bulk(announced), b"").await;
            for chunk in chunks {
                // A node that has refused takes no more.
                let _ = stream.send.write_all(&frame(0, &Chunk {}, chunk)).await;
            }
            let hash = metanode_crypto::hash(&chunks.concat());
            let _ = stream.send.write_all(&frame(0, &PutEnd { hash: hash.0 }, b"")).await;
            let (_, refusal) = stream.refusal().await;
            assert_eq!(refusal.code, code, "{announced:?}, {} chunks: {refusal}", chunks.len());
        }
        for hash in [wrong, metanode_crypto::hash(&blob), metanode_crypto::hash(&large)] {
            assert_eq!(client.get_whole(hash).await.unwrap_err().refusal_code(), Some(RefusalCode::NotFound));
        }
        assert_eq!(client.list_blobs(None, 10).await.unwrap().entries, []);
        // The connection is as good as before.
        let mut stream = raw.open().await;
        stream.ask(7, &NodeStatus {}, b"").await;
        assert_eq!(stream.answer().await.unwrap().kind, Kind::NodeStatusReply);
        node.stop();
    });
}

#[test]
fn a_node_with_another_key_is_not_the_one_of_the_ticket() {
    scenario(async {
        let home = Home::new();
        let node = home.start(1);
        let expected = Identity::from_seed(&[7; 32]).public();
        let ticket = Ticket { node: expected, ..node.ready.ticket.clone() };
        match Client::connect(&ticket, ClientConfig::new(stranger())).await.unwrap_err() {
            ClientError::WrongNodeKey { expected: named, address } => {
                assert_eq!((named, address), (expected, node.ready.quic));
            }
            other => panic!("{other}"),
        }
        let refused = home.cli_args(["ls", "--node", &ticket.to_string()]).refused(6);
        assert!(refused.stderr.contains(&expected.to_string()), "{}", refused.stderr);
        // Nobody at all is the same exit code, without a wrong accusation.
        let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let ticket = Ticket { addresses: vec![nobody.local_addr().unwrap()], ..node.ready.ticket.clone() };
        let refused = home.cli_args(["ls", "--timeout", "1", "--node", &ticket.to_string()]).refused(6);
        assert!(!refused.stderr.contains("does not hold"), "{}", refused.stderr);
    });
}

#[test]
fn only_listed_keys_write() {
    scenario(async {
        let home = Home::new();
        let node = home.start(2);
        let operator = home.client(&node, true).await;
        let blob = content(8, 100);
        let hash = operator.put_whole(blob.clone(), PutOptions::default()).await.unwrap().hash;
        let client = connect(&node, stranger()).await;
        assert!(operator.may_write() && !client.may_write());
        assert_eq!(client.get_whole(hash).await.unwrap(), Got::Whole(blob));
        assert_eq!(client.list_blobs(None, 10).await.unwrap().entries.len(), 1);
        client.status().await.unwrap();
        let name = "name".parse().unwrap();
        let large = &mut metanode_client::BytesSource(content(9, 2 * CHUNK));
        for refused in [
            client.put_whole(Bytes::from_static(b"x"), PutOptions::default()).await.map(drop),
            client.put_source(large, None, PutOptions::default()).await.map(drop),
            client.remove(hash).await,
            client.tag_set(&name, hash).await,
            client.tag_remove(&name).await,
        ] {
            assert_eq!(refused.unwrap_err().refusal_code(), Some(RefusalCode::Forbidden));
        }
        // By the command line.
        let key = home.key_file("stranger.key", &stranger());
        let key = key.to_str().unwrap();
        std::fs::write(home.beside("file"), "x").unwrap();
        home.cli_args(["put", "file", "--key", key]).refused(4);
        home.cli_args(["rm", &hash.to_string(), "--key", key]).refused(4);
        home.cli_args(["tag", "set", "name", &hash.to_string(), "--key", key]).refused(4);
        home.cli_args(["get", &hash.to_string(), "-", "--key", key]).ok();
        assert_eq!(operator.list_blobs(None, 10).await.unwrap().entries.len(), 1);
        node.stop();
    });
}

#[test]
fn with_a_list_of_readers_only_those_read() {
    let reader = Identity::from_seed(&[3; 32]);
    let home = Home::with_config(&format!("readers = [\"{}\"]", reader.public()), "");
    scenario(async {
        let node = home.start(2);
        let operator = home.client(&node, true).await;
        let hash = operator.put_whole(content(9, 100), PutOptions::default()).await.unwrap().hash;
        operator.get_whole(hash).await.unwrap();
        let reading = connect(&node, reader.clone()).await;
        reading.get_whole(hash).await.unwrap();
        let refused = reading.remove(hash).await.unwrap_err();
        assert_eq!(refused.refusal_code(), Some(RefusalCode::Forbidden));
        let client = connect(&node, stranger()).await;
        for refused in [
            client.get_whole(hash).await.map(drop),
            client
                .get_range(hash, metanode_types::ByteRange::ALL, &mut metanode_client::FnSink(|_, _: &[u8]| {}))
                .await
                .map(drop),
            client.stat(hash).await.map(drop),
            client.list_blobs(None, 1).await.map(drop),
            client.list_tags(None, 1).await.map(drop),
            client.tag_get(&"x".parse().unwrap()).await.map(drop),
            client.status().await.map(drop),
        ] {
            assert_eq!(refused.unwrap_err().refusal_code(), Some(RefusalCode::Forbidden));
        }
        let key = home.key_file("stranger.key", &stranger());
        home.cli_args(["get", &hash.to_string(), "-", "--key", key.to_str().unwrap()]).refused(4);
        // A stranger without any key of its own is one, too.
        let ticket = Ticket { hash: Some(hash), ..node.ready.ticket.clone() }.to_string();
        run(&mut metanode(["get", &ticket, "-"]), b"").refused(4);
        node.stop();
    });
}

#[test]
fn folders_that_can_not_be_used_are_refused() {
    let home = Home::new();
    home.start(2).stop();
    // Of a later version: nothing of it is touched.
    let format = home.data().join("format");
    let good = std::fs::read(&format).unwrap();
    std::fs::write(&format, "metanode-data 7\n").unwrap();
    let refused = home.start_refused(2).refused(9);
    assert!(refused.stderr.contains('7') && refused.stderr.contains("up to 1"), "{}", refused.stderr);
    home.cli("start").refused(9);
    std::fs::write(&format, "something else\n").unwrap();
    home.start_refused(2).refused(9);
    std::fs::write(&format, good).unwrap();
    // A key that others can read.
    let key = home.data().join("node.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o640)).unwrap();
    home.start_refused(2).refused(9);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    // In use.
    let node = home.start(2);
    let refused = home.start_refused(2).refused(9);
    assert!(refused.stderr.contains(&node.pid().to_string()), "{}", refused.stderr);
    home.cli("status").ok();
    node.stop();
    // No data folder, but somebody's.
    let other = Home::fresh();
    std::fs::create_dir(other.data()).unwrap();
    std::fs::write(other.data().join("thesis.txt"), "").unwrap();
    other.start_refused(1).refused(9);
    assert_eq!(std::fs::read_dir(other.data()).unwrap().count(), 1);
}

#[test]
fn a_read_only_folder_is_refused() {
    let home = Home::new();
    home.start(2).stop();
    let set_mode = |mode| std::fs::set_permissions(home.data(), std::fs::Permissions::from_mode(mode)).unwrap();
    let _mount;
    if is_root() {
        let Some(mount) = Mount::read_only(home.data()) else { return };
        _mount = mount;
    } else {
        set_mode(0o500); // root would write all the same
        std::fs::set_permissions(home.data().join("lock"), std::fs::Permissions::from_mode(0o400)).unwrap();
    }
    let refused = home.start_refused(2).refused(9);
    assert!(refused.stderr.contains(home.data().to_str().unwrap()), "{}", refused.stderr);
    home.cli("start").refused(9);
    if !is_root() {
        set_mode(0o700);
    }
}

#[test]
fn half_frames_and_full_connections_hold_nobody_else_up() {
    scenario(async {
        let home = Home::new();
        let node = home.start(2);
        let others = home.client(&node, true).await;
        let stalling = raw(&node, &home).await;
        let whole = frame(1, &Put { hash: [1; 32], class: 1, kind: 0, hold: true }, &content(10, CHUNK));
        // As many streams as the node permits, each with a part of a frame.
        let mut streams = Vec::new();
        for part in [1, 7, 16, 40, 70, 5000, 9000, 20_000].into_iter().cycle().take(16) {
            let mut stream = stalling.open().await;
            stream.write(&whole[..part]).await;
            streams.push(stream);
        }
        let mut one_more = pin!(stalling.connection.open_bi());
        assert!(poll_once(one_more.as_mut()).await.is_none(), "the node permits 16 streams");
        for seed in 100..120 {
            assert_serves(&others, seed).await;
        }
        assert!(poll_once(one_more.as_mut()).await.is_none());
        assert!(stalling.connection.close_reason().is_none(), "a slow client is not thrown out at once");
        // Those that end make room for others, although they were cut in the middle of a frame. quinn-proto permits new streams
        // when more than an eighth of the limit has become free.
        for stream in &mut streams[8..] {
            stream.send.finish().unwrap();
            assert!(stream.answer().await.is_none());
        }
        tokio::time::timeout(SOON, one_more).await.expect("a stream has become free").unwrap();
        // The rest goes on where it was; the hash is wrong, which shows that all bytes are looked at.
        streams[1].write(&whole[7..]).await;
        assert_eq!(streams[1].refusal().await.1.code, RefusalCode::HashMismatch);
        node.stop();
    });
}

/// What a future says when it is asked once.
async fn poll_once<T>(mut future: std::pin::Pin<&mut impl Future<Output = T>>) -> Option<T> {
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

#[test]
fn uploads_that_are_given_up_are_released() {
    // Whoever vanishes without a word is noticed after the idle time.
    let home = Home::with_config("", "[quic]\nidle_timeout_s = 5\n[store]\nsegment_bytes = 8388608\n");
    scenario(async {
        let node = home.start(2);
        let begin = async |raw: &Raw, seed: u64| {
            let mut stream = raw.open().await;
            stream.ask(0, &put_bulk(None), b"").await;
            for chunk in content(seed, 6 * CHUNK).chunks(CHUNK) {
                stream.ask(0, &Chunk {}, chunk).await;
            }
            stream
        };
        let uploads_of = async |count: f64| {
            eventually(&format!("{count} uploads"), SOON, async || {
                (node.metric("bulk_transfers") == count).then_some(())
            })
            .await;
        };
        // The connection is closed; the stream is reset; the stream ends without a PutEnd.
        let closed = raw(&node, &home).await;
        let _stream = begin(&closed, 1).await;
        uploads_of(1.0).await;
        closed.connection.close(0u32.into(), b"");
        uploads_of(0.0).await;
        let raw = raw(&node, &home).await;
        let mut reset = begin(&raw, 2).await;
        let mut ended = begin(&raw, 3).await;
        uploads_of(2.0).await;
        reset.send.reset(0u32.into()).unwrap();
        ended.send.finish().unwrap();
        uploads_of(0.0).await;
        assert!(ended.answer().await.is_none(), "nothing was stored");
        // The process of the client dies: here, its runtime with its sockets does.
        let (ticket, operator) = (node.ready.ticket.clone(), home.operator().clone());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                let vanishing = runtime.block_on(async {
                    let raw = connect_raw(&ticket, &operator, ALPN_RELAY).await.unwrap();
                    let mut stream = raw.open().await;
                    stream.ask(0, &put_bulk(None), b"").await;
                    stream.ask(0, &Chunk {}, &content(4, CHUNK)).await;
                    eventually("one upload", SOON, async || (node.metric("bulk_transfers") == 1.0).then_some(())).await;
                    (raw, stream)
                });
                runtime.shutdown_background();
                drop(vanishing); // says goodbye to nobody: the socket has gone
            });
        });
        uploads_of(0.0).await;
        for gauge in ["upload_bytes", "requests_waiting"] {
            eventually(gauge, SOON, async || (node.metric(gauge) == 0.0).then_some(())).await;
        }
        let client = home.client(&node, true).await;
        assert_serves(&client, 5).await;
        assert_eq!(client.list_blobs(None, 10).await.unwrap().entries.len(), 1, "of the uploads nothing is there");
        // What the four left behind is not in the way of the same content.
        for (seed, size) in [(1, 6 * CHUNK), (4, CHUNK)] {
            let blob = content(seed, size);
            let stored =
                client.put_source(&mut metanode_client::BytesSource(blob), None, PutOptions::default()).await.unwrap();
            assert!(!stored.existed);
        }
        node.stop();
    });
}

/// Bytes that no client of ours would send, from seeds that are the same in every run.
fn hostile(random: &mut Random) -> Vec<u8> {
    let hash = [random.below(256) as u8; 32];
    let number = random.word() as u32;
    let valid = |random: &mut Random| -> Vec<u8> {
        match random.below(7) {
            0 => frame(number, &Get { hash }, b""),
            1 => frame(number, &Put { hash, class: 1, kind: 0, hold: true }, &random.bytes(500)),
            2 => frame(number, &put_bulk(Some(1000)), b""),
            3 => frame(number, &TagSet { name: "name".into(), hash }, b""),
            4 => frame(number, &ListBlobs { after: Some(hash), count: 100 }, b""),
            5 => frame(number, &Remove { hash }, b""),
            _ => frame(number, &PutEnd { hash }, b""),
        }
        .to_vec()
    };
    match random.below(5) {
        0 => {
            let size = 1 + random.below(3000) as usize;
            random.bytes(size)
        }
        // A header that is right, around nonsense.
        1 => {
            let kind = Kind::ALL[random.below(Kind::ALL.len() as u64) as usize];
            let (head, body) = (random.below(300) as usize, random.below(2000) as usize);
            let mut bytes = vec![1, kind as u8, 0, 0];
            bytes.extend(number.to_le_bytes());
            bytes.extend((head as u32).to_le_bytes());
            bytes.extend((body as u32).to_le_bytes());
            bytes.extend(random.bytes(head + body));
            bytes
        }
        // A flipped bit.
        2 => {
            let mut bytes = valid(random);
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << random.below(8);
            bytes
        }
        // A frame that is cut.
        3 => {
            let mut bytes = valid(random);
            bytes.truncate(random.below(bytes.len() as u64) as usize);
            bytes
        }
        // Frames in any order.
        _ => (0..1 + random.below(8)).flat_map(|_| valid(random)).collect(),
    }
}

#[test]
fn a_node_survives_hostile_bytes() {
    scenario(async {
        let home = Home::new();
        let node = home.start(2);
        let others = home.client(&node, true).await;
        let mut connection = None;
        for seed in 0..200u64 {
            let mut random = Random::new(seed);
            let (attacker, identity) = match connection.take() {
                Some(known) => known,
                None => {
                    // Those who may write reach further.
                    let identity = if seed % 4 == 0 { stranger() } else { home.operator().clone() };
                    (connect_raw(&node.ready.ticket, &identity, ALPN_RELAY).await.unwrap(), identity)
                }
            };
            if let Some(mut stream) = attacker.try_open().await {
                let bytes = hostile(&mut random);
                // The node may close at any byte.
                let _ = stream.send.write_all(&bytes).await;
                let _ = stream.send.finish();
                // Whatever it was, the node ends the stream (or the connection), and says only frames until then.
                while stream.answer().await.is_some() {}
                if attacker.connection.close_reason().is_none() {
                    connection = Some((attacker, identity));
                }
            }
            if seed % 20 == 0 {
                assert_serves(&others, 1_000_000 + seed).await;
            }
        }
        assert!(node.metric("protocol_errors_total") > 20.0, "the bytes were hostile");
        for seed in (0..200).step_by(20) {
            let blob = content(1_000_000 + seed, 3000);
            let hash = metanode_crypto::hash(&blob);
            assert_eq!(others.get_whole(hash).await.unwrap(), Got::Whole(blob));
        }
        assert_ne!(others.status().await.unwrap().node_key, NodeKey([0; 32]).0);
        node.stop();
    });
}
