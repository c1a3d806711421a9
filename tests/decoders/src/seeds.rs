//! Where fuzzing begins: small inputs that each get far into a target, made by the real encoders.

use metanode_application::{Application as _, Operation, Reference};
use metanode_blob::extent::MapBuilder;
use metanode_codec::{encode_message, encode_record};
use metanode_ibft::{
    Certificate, ChainId, Commit, Evidence, Height, Message as IbftMessage, Payload, Record, Round, RoundChange,
    RoundChangeMessage, Signed, View,
};
use metanode_ledger::{
    BatchDraft, Block, Chain, Genesis, Kind as TxKind, Outcome, Transaction, TransactionDraft, TransactionId,
    encode_certificate,
    system::{Wish, encode_evidence},
};
use metanode_types::{
    Hash, NodeKey,
    limits::{CHUNK_BYTES, GROUP_BYTES},
};
use metanode_wal::format::{Generation, Owner, encode_header, encode_records};
use metanode_wire::{
    Entry, EntryKind, HEADER_BYTES, Kind, Manifest, Message, Refusal, RefusalCode, Ticket, encode,
    message::{
        AdminDamaged, AdminMaintain, AdminStop, AdminStoreStatus, AppBegin, AppCheck, AppChecked, AppCommit,
        AppExecute, AppExecuted, AppExport, AppFound, AppHello, AppImport, AppPiece, AppQuery, AppState, BatchGet,
        BlobEntry, BlobPage, BlockGet, BlockReply, BulkBegin, Chunk, DamagedPage, Data, Done, Get, GetBulk, Have,
        HaveReply, Hello, KnownChunk, LedgerFound, LedgerQuery, LedgerStatus, LedgerStatusReply, ListBlobs, ListTags,
        MaintainReply, NodeStatus, NodeStatusReply, OutcomesGet, OutcomesReply, PeerBatch, PeerHello, PeerMessage,
        PeerWelcome, Put, PutBulk, PutEnd, Refused, Remove, Stat, StatReply, Stored, Submit, Submitted, TagEntry,
        TagGet, TagPage, TagRemove, TagSet, TagTarget, TransactionRefused, TransactionState, TransactionWait, Welcome,
    },
};

use crate::consensus::SIGN_HEADER_BYTES;

/// An input that is kept.
#[derive(Debug)]
pub struct Seed {
    /// Name in [`TARGETS`](crate::TARGETS).
    pub target: &'static str,
    /// Name of its file.
    pub name: String,
    /// What is in it.
    pub bytes: Vec<u8>,
}

/// All of them.
pub fn all() -> Vec<Seed> {
    let mut seeds = Vec::new();
    let mut add = |target, name: &str, bytes| seeds.push(Seed { target, name: format!("seed-{name}"), bytes });
    frames(&mut |name, bytes| add("frames", name, bytes));
    archives(&mut |name, bytes| add("archives", name, bytes));
    tickets(&mut |name, bytes| add("tickets", name, bytes));
    names(&mut |name, bytes| add("names", name, bytes));
    manifests(&mut |name, bytes| add("manifests", name, bytes));
    config(&mut |name, bytes| add("config", name, bytes));
    meta(&mut |name, bytes| add("meta", name, bytes));
    segments(&mut |name, bytes| add("segments", name, bytes));
    checkpoints(&mut |name, bytes| add("checkpoints", name, bytes));
    maps(&mut |name, bytes| add("maps", name, bytes));
    slices(&mut |name, bytes| add("slices", name, bytes));
    consensus(&mut |name, bytes| add("consensus", name, bytes));
    seeds
}

/// Takes the name and the bytes of a seed.
type Add<'a> = &'a mut dyn FnMut(&str, Vec<u8>);

fn frames(add: Add<'_>) {
    let mut stream = Vec::new();
    encode(&mut stream, 1, &Get { hash: [1; 32] }, 0);
    encode(&mut stream, 2, &Data { size_bytes: 20 }, 20);
    stream.extend([9; 20]);
    encode(&mut stream, 3, &Done {}, 0);
    let with = |cuts: &[u8], limits: u8| [&[cuts.len() as u8], cuts, &[limits], &stream].concat();
    add("one-piece", with(&[], 0));
    add("pieces", with(&[0, 14, 99], 0));
    add("small-limits", with(&[30], 2));
    add("cut", with(&[7], 0)[..90].to_vec());
    let mut admin = vec![0, 1];
    encode(&mut admin, 1, &NodeStatus {}, 0);
    encode(&mut admin, 2, &AdminStop {}, 0);
    add("admin", admin);
}

fn archives(add: Add<'_>) {
    let hash = [3; 32];
    let text = |text: &str| text.to_owned();
    archive(add, &Hello { agent: text("metanode-client/0.1.0") });
    let welcome = Welcome {
        agent: text("node"),
        shards: 2,
        shard: 1,
        whole_bytes_max: CHUNK_BYTES as u32,
        requests_max: 1_024,
        may_write: true,
    };
    archive(add, &welcome);
    archive(add, &Get { hash });
    archive(add, &Data { size_bytes: 5 });
    archive(add, &GetBulk { hash, offset: 1, length: u64::MAX });
    archive(add, &BulkBegin { size_bytes: 1 << 30 });
    archive(add, &Put { hash, class: 1, kind: 0, hold: true });
    archive(add, &PutBulk { size_bytes: Some(7), class: 0, kind: 1, hold: false });
    archive(add, &Chunk {});
    archive(add, &PutEnd { hash });
    archive(add, &Stored { hash, size_bytes: 4, existed: true });
    archive(add, &Stat { hash });
    archive(add, &StatReply { size_bytes: 4, kind: 1, class: 1, held: true, references: 2 });
    archive(add, &Remove { hash });
    archive(add, &TagSet { name: text("backup/today"), hash });
    archive(add, &TagRemove { name: text("short") });
    archive(add, &TagGet { name: text("a name that is not inline") });
    archive(add, &TagTarget { hash });
    archive(add, &Done {});
    archive(add, &ListBlobs { after: Some(hash), count: 128 });
    let blob = BlobEntry { hash, size_bytes: 9, kind: 0, held: true, references: 1 };
    archive(add, &BlobPage { entries: vec![blob.clone(), blob], more: true });
    archive(add, &ListTags { after: Some(text("behind this one")), count: 3 });
    let tag = |name: &str| TagEntry { name: text(name), hash };
    archive(add, &TagPage { entries: vec![tag("a"), tag("another that is long")], more: false });
    archive(add, &NodeStatus {});
    archive(add, &status());
    archive(add, &Have { names: vec![hash; 3] });
    archive(add, &HaveReply { have: vec![true, false, true] });
    archive(add, &KnownChunk { name: hash });
    ledger_archives(add, hash);
    archive(add, &AdminMaintain { what: 0, bytes_per_second: 1 << 20 });
    archive(add, &MaintainReply { number: 2 });
    archive(add, &AdminStoreStatus {});
    archive(add, &AdminDamaged { after: Some(hash) });
    archive(add, &DamagedPage { survey: 3, hashes: vec![hash; 2], more: true });
    archive(add, &AdminStop {});
    app_archives(add, hash);
    archive(add, &Refusal { retry_after_ms: 50, ..Refusal::new(RefusalCode::Busy, "too much work") }.to_message());
    archive(add, &Refused { code: 999, retry_after_ms: 1, detail: "x".repeat(600) });
}

fn app_archives(add: Add<'_>, hash: [u8; 32]) {
    archive(add, &AppHello { agent: "metanode/0.1.0".to_owned(), chain: hash });
    archive(add, &AppBegin { more: true });
    archive(add, &AppCheck {});
    archive(add, &AppExecute { height: 1, time_ms: 2 });
    archive(add, &AppCommit { keep_from: 3 });
    archive(add, &AppQuery { kind: 2, account: hash, name: b"name".to_vec() });
    archive(add, &AppExport { height: 4, after: hash.to_vec() });
    archive(add, &AppImport { height: 5, more: true });
    archive(add, &AppState { agent: "reference".to_owned(), begun: true, height: 6, root: hash });
    archive(add, &AppChecked {});
    archive(add, &AppExecuted { root: hash });
    let (beside, found) = (vec![hash; 2], Some((hash, hash)));
    archive(add, &AppFound { height: 7, key: hash, value: Some(vec![1]), beside, found });
    archive(add, &AppPiece { next: Some(hash.to_vec()) });
}

fn ledger_archives(add: Add<'_>, hash: [u8; 32]) {
    archive(add, &Submit {});
    archive(add, &Submitted { refused: vec![TransactionRefused { index: 1, code: 11, number: 2, other: 3 }; 2] });
    archive(add, &TransactionWait { id: hash, wait_ms: 5 });
    archive(add, &TransactionState { state: 2, height: 3, outcome: 1, code: 257, answer: hash });
    archive(add, &LedgerStatus {});
    archive(add, &ledger_status(hash));
    archive(add, &LedgerQuery { kind: 2, account: hash, name: b"name".to_vec() });
    let (beside, found) = (vec![hash; 3], Some((hash, hash)));
    archive(add, &LedgerFound { height: 4, key: hash, value: Some(vec![1, 2]), beside, found, system: hash });
    archive(add, &BlockGet { height: 5, wait_ms: 1_000 });
    archive(add, &BlockReply { block: vec![1; 20], certificate: vec![2; 30] });
    archive(add, &OutcomesGet { height: 6, first: 7, wait_ms: 0 });
    archive(add, &OutcomesReply { count: 8 });
    archive(add, &BatchGet { digest: hash });
    archive(add, &PeerHello { chain: hash, ticket: "mn1aaaa".to_owned() });
    archive(add, &PeerWelcome { height: 9, peers: vec!["mn1aaaa".to_owned()] });
    archive(add, &PeerMessage {});
    archive(add, &PeerBatch {});
}

fn ledger_status(hash: [u8; 32]) -> LedgerStatusReply {
    LedgerStatusReply {
        name: "test".to_owned(),
        chain: hash,
        lag: 2,
        expiry_heights_max: 1_000,
        node_key: hash,
        role: 1,
        reason: String::new(),
        height: 3,
        block: hash,
        time_ms: 4,
        executed: 5,
        round: 1,
        validators: vec![hash; 4],
        connected: vec![hash; 3],
        waiting: 6,
        waiting_bytes: 7,
        batches: 8,
        transactions: 9,
        done: 8,
        messages: 13,
        message_bytes: 14,
        signatures: 15,
        timeouts: 10,
        finality_us: vec![900, 1_100],
        syncs: 11,
        sync_p50_us: 12,
        guilty: vec![hash],
    }
}

fn status() -> NodeStatusReply {
    NodeStatusReply {
        version: "0.1.0".to_owned(),
        node_key: [1; 32],
        pid: 2,
        uptime_ms: 3,
        shards: 4,
        quic_address: "127.0.0.1:4433".to_owned(),
        metrics_address: "[::1]:9101".to_owned(),
        connections: 5,
        blobs: 6,
        blob_bytes: 7,
        disk_bytes: 8,
        disk_free_bytes: 9,
        cache_bytes: 10,
        cache_bytes_max: 11,
        shard_stalls: 12,
        read_only_reason: "a sync failed".to_owned(),
    }
}

fn archive<M: Message>(add: Add<'_>, message: &M) {
    let index = Kind::ALL.iter().position(|kind| *kind == M::KIND).expect("every kind is listed");
    let mut frame = Vec::new();
    encode(&mut frame, 0, message, 0);
    let name = format!("{:?}-{}", M::KIND, frame.len() - HEADER_BYTES).to_lowercase();
    add(&name, [&[index as u8], &frame[HEADER_BYTES..]].concat());
}

fn tickets(add: Add<'_>) {
    let ticket = Ticket {
        node: NodeKey([1; 32]),
        addresses: vec![([127, 0, 0, 1], 4433).into(), ([0, 0, 0, 0, 0, 0, 0, 1], 4433).into()],
        hash: Some(Hash([2; 32])),
    };
    let text = |ticket: &Ticket| [b"\0", ticket.to_string().as_bytes()].concat();
    add("text", text(&ticket));
    add("text-node", text(&ticket.node_only()));
    add("text-upper", [b"\0 ", ticket.to_string().to_uppercase().as_bytes(), b"\n"].concat());
    let body = [&[1; 32][..], &[1, 4, 127, 0, 0, 1, 81, 17, 1], &[2; 32]].concat();
    assert!(crate::tickets::signed(&body).parse::<Ticket>().is_ok(), "the seed is a ticket");
    add("body", [&[1], &body[..]].concat());
    add("made", [&[2], &[1; 32][..], &[1], &[2; 32], &[2, 0, 10, 0, 0, 1, 1, 2, 1], &[9; 16], &[3, 4, 0]].concat());
}

fn names(add: Add<'_>) {
    let head = |offset: u64, length: u64, size: u64, shards: u16| {
        let numbers = [offset, length, size].map(u64::to_le_bytes).concat();
        [&numbers[..], &shards.to_le_bytes(), &[0xff; 32]].concat()
    };
    let key = NodeKey([0xab; 32]).to_string();
    add("tag", [&head(3, 2, 7, 1)[..], "backup/2026 ä".as_bytes()].concat());
    add("hash", [&head(3, u64::MAX, 7, 1_024)[..], &key.as_bytes()[8..]].concat());
    add("key", [&head(8, 1, 7, 0)[..], key.as_bytes()].concat());
}

fn manifests(add: Add<'_>) {
    let file = |path: &str, byte| Entry {
        path: path.into(),
        mode: 0o644,
        kind: EntryKind::File { hash: Hash([byte; 32]), size_bytes: 5 },
    };
    let folder = |path: &str| Entry { path: path.into(), mode: 0o755, kind: EntryKind::Folder };
    let link = Entry { path: "a/l".into(), mode: 0o777, kind: EntryKind::Link { target: "../f".into() } };
    let entries = vec![folder("a"), file("a/f", 9), link, folder("a/b"), file("c", 8), file("d", 9)];
    let bytes = Manifest { entries }.encode().expect("the seed is a folder");
    add("bytes", [&[0], &bytes[..]].concat());
    add("empty", [&[0], &Manifest::default().encode().expect("an empty folder is one")[..]].concat());
    let folder = [1, 0xed, 1, 255, 1, b'a'];
    let file = [&[0, 0xa4, 1, 0, 1, b'f', 7][..], &5u64.to_le_bytes()].concat();
    let link = [2, 0xff, 1, 0, 1, b'l', 3, b'.', b'.', b'/'];
    add("made", [&[1, 3], &folder[..], &file, &link].concat());
    add("damaged", [&[1, 3], &folder[..], &file, &link, &[0, 20, 0, 0, 0, 1]].concat());
    let file = |name: u8, child: u8| [&[0, 0xa4, 1, 1, name, child][..], &5u64.to_le_bytes()].concat();
    add("parts", [&[3, 3, 5, 6, 7][..], &file(b'a', 0), &file(b'b', 2), &file(b'c', 1)].concat());
}

fn config(add: Add<'_>) {
    add("default", metanode_node::Config::default().to_toml_string().into());
    let key = NodeKey([1; 32]);
    let every = format!(
        "[node]\nshards = 3\ncores = [0, 5]\n[quic]\nlisten = \"[::1]:0\"\nstreams_max = 128\nmtu_max = 1200\n\
         cipher_suites = [\"chacha20-poly1305\", \"aes-128-gcm\"]\n[store]\nsegment_bytes = 8388608\n\
         [access]\nwriters = [\"{key}\"]\nreaders = [\"{key}\"]\n[metrics]\nlisten = \"off\"\n\
         [log]\nlevel = \"warn,metanode_quic=debug\"\n"
    );
    add("every-section", every.into());
    add("inline", b"quic = { idle_timeout_s = 0x1e, listen = '0.0.0.0:4433' }\nlog.level = 'trace'\n".to_vec());
}

fn meta(add: Add<'_>) {
    let text = "metanode-store 1\nstore 000102030405060708090a0b0c0d0e0f\nsegment_bytes 67108864\nboot 4\n";
    add("meta", text.into());
    add("last-opening", text.replace("boot 4", "boot 18446744073709551615").into());
    add("last-but-one", text.replace("boot 4", "boot 18446744073709551614").into());
}

fn segments(add: Add<'_>) {
    // Seven frames with a record of each kind; what is missing, and the blocks behind, are zero.
    let record = |kind: u8, key: u8, length: u16, size: u64| {
        [&[kind, 1, key], &length.to_le_bytes()[..], &size.to_le_bytes()].concat()
    };
    let frame = |sequence: u8, records: &[Vec<u8>]| [vec![1, sequence, records.len() as u8], records.concat()].concat();
    let frames = [
        vec![5],
        frame(0, &[record(2, 1, 5_000, 5_000), record(0, 2, 4_096, 0)]),
        frame(1, &[record(1, 3, 64, 1 << 20)]),
        frame(2, &[]),
        frame(3, &[record(3, 1, 0, 0), record(4, 5, 40, 0), record(5, 6, 0, 0)]),
        frame(4, &[record(2, 9, 100, 100)]),
    ]
    .concat();
    let with = |what: u8, missing: u16, behind: u8, damage: &[u8]| {
        [&[what], &missing.to_le_bytes()[..], &[behind], &frames, damage].concat()
    };
    add("sound", with(1, 0, 0, &[]));
    add("behind", with(1 | 4, 0, 7, &[]));
    add("short", with(1 | 4 | 8, 5_000, 3, &[]));
    add("rot", with(1, 0, 0, &[0, 5, 70, 0, 1]));
    add("torn", with(1, 0, 0, &[2, 11, 0, 0]));
    add("hostile-length", with(1 | 2, 0, 0, &[1, 0, 68, 0, 255, 255, 0, 0]));
    add("copied", with(1, 0, 0, &[3, 2, 0, 0, 0]));
    add("raw", [&[0, 0, 0, 0], &b"MNFR"[..], &[1, 0, 0, 0, 0, 16]].concat());
}

fn checkpoints(add: Add<'_>) {
    let header = |boot: u64, sequence: u64| {
        let numbers = [boot, sequence].map(u64::to_le_bytes).concat();
        [&1u16.to_le_bytes()[..], &2u16.to_le_bytes(), &3u32.to_le_bytes(), &numbers].concat()
    };
    let entry = |kind: u8, key: u8, rest: &[u8]| {
        let location = [1, 0, 2, 0, 0, 0, 0, 16, 0, 0, 100, 0, 0, 0];
        [&[kind, 1], &location[..], &[key], rest].concat()
    };
    let numbers = |numbers: &[u64]| numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>();
    let entries = [
        entry(1, 1, &[9, 8, 7, 6]),
        entry(2, 1, &numbers(&[100])),
        entry(2, 2, &numbers(&[1 << 20])),
        entry(5, 3, &[]),
        entry(4, 4, &numbers(&[1, 2])),
        entry(6, 5, &numbers(&[2, 0])),
    ];
    let made = |boot, sequence| [vec![2], header(boot, sequence), vec![entries.len() as u8], entries.concat()].concat();
    add("made", made(3, 4));
    add("first-frame", made(1, 0));
    let damage = [made(3, 4), vec![0, 60, 0, 0, 0, 1]].concat();
    add("damaged", damage);
    // The same as a file, and as one without its hash.
    let key = |entry: &[u8]| [&entry[..16], &[entry[16]; 32], &entry[17..]].concat();
    let body = [&b"MNCKPT\0\x02"[..], &[7; 16], &header(3, 4), &key(&entries[0]), &key(&entries[1]), &[0]].concat();
    add("file", [&[0], &crate::checkpoints::hashed(&body)[..]].concat());
    add("body", [&[1], &body[..]].concat());
}

fn maps(add: Add<'_>) {
    let mut builder = MapBuilder::new();
    builder.push(&vec![1; CHUNK_BYTES]).expect("two chunks are not too many");
    builder.push(&[2]).expect("two chunks are not too many");
    let map = builder.finish().expect("it has chunks");
    let with = |what: u8, index: u16, bytes: &[u8]| {
        [&[what], &map.size_bytes.to_le_bytes()[..], &index.to_le_bytes(), bytes].concat()
    };
    add("page", with(0, 0, &map.page.expect("it has one extent")));
    add("root", with(1, 0, &map.root));
    let three = 3u64 << 26;
    add("root-three", [&[1], &three.to_le_bytes()[..], &[0; 2], &[5; 192]].concat());
    add("page-one-group", [&[0], &100u64.to_le_bytes()[..], &[0; 2], &[1, 0, 0, 0, 0, 0, 0, 0], &[4; 32]].concat());
}

fn slices(add: Add<'_>) {
    let with = |what: u8, size: u64, offset: u64, length: u64, rest: &[u8]| {
        [&[what], &[size, offset, length].map(u64::to_le_bytes).concat()[..], rest].concat()
    };
    let group = GROUP_BYTES as u64;
    add("items", with(0, 3 * group, 0, u64::MAX, &[1; 200]));
    add("one-group", with(0, 10, 2, 3, b"0123456789"));
    add("empty", with(1, 0, 0, u64::MAX, &[]));
    add("whole", with(1, 4 * group + 9, 0, u64::MAX, &[255]));
    add("damaged-node", with(1, 4 * group + 9, group + 1, 2 * group, &[1, 40, 0, 1]));
    add("damaged-group", with(1, 3 * group, group - 1, 2, &[3, 0, 9, 128]));
    add("consistent", with(2, 1 << 40, 1 << 39, 2 * group, &[7]));
}

fn consensus(add: Add<'_>) {
    let signer = metanode_crypto::Identity::from_seed(&[1; 32]);
    let key = signer.public();
    let chain = ChainId([7; 32]);
    let view = View { height: Height(3), round: Round(1) };
    let hash = Hash([5; 32]);
    let sign = |domain: &str, message: &[u8]| Ok::<_, std::convert::Infallible>(signer.sign(domain, message));
    let mut with = |kind: u8, name: &str, bytes: Vec<u8>| add(name, [&[kind], &bytes[..]].concat());

    let payload = Operation::Pay { to: key, amount: 9 }.encode();
    let draft = TransactionDraft {
        kind: TxKind::Application,
        account: key,
        nonce: 1,
        fee: 2,
        expiry: Height(9),
        payload: &payload,
    };
    let Ok(transaction) = draft.encode(&chain, sign);
    let opaque = TransactionDraft::encode_opaque(b"opaque");
    let mut batch = BatchDraft::new(key, 1, Height(9));
    for bytes in [&transaction, &opaque] {
        batch.push(&Transaction::decode(bytes).expect("it was just made"));
    }
    let Ok(batch) = batch.finish(&chain, sign);
    with(0, "transaction", transaction);
    with(0, "opaque", opaque);
    with(1, "batch", batch.bytes().to_vec());

    let header = metanode_ledger::Header {
        height: view.height,
        time_ms: 4,
        parent: hash,
        author: key,
        batches_root: hash,
        app_hash: hash,
        results_root: hash,
        validators_hash: hash,
        next_validators_hash: hash,
    };
    let mut block = Block { header, batches: vec![batch.digest()] };
    block.header.batches_root = block.batches_root();
    let commit = |hash| {
        let payload = Commit { view, hash };
        Signed { payload, signer: key, signature: signer.sign(Commit::DOMAIN, &payload.encode(&chain)) }
    };
    let certificate = Certificate { view, hash, commits: vec![commit(hash)] };
    with(2, "block", block.encode());
    with(3, "certificate", encode_certificate(&certificate));
    with(4, "evidence", encode_evidence(&Evidence::Commit([commit(hash), commit(Hash([6; 32]))])));
    with(5, "add", Wish::Add(key, [1; 64]).encode());
    with(5, "remove", Wish::Remove(key).encode());
    with(5, "upgrade", Wish::Upgrade { version: 2, from: Height(9) }.encode());
    with(6, "pay", payload);
    with(6, "set", Operation::Set { name: b"name", value: b"value" }.encode());
    with(6, "read", Operation::Read { owner: key, name: b"name" }.encode());
    with(7, "outcome", Outcome::DONE.encode(&TransactionId([3; 32])).to_vec());
    let genesis = Genesis {
        version: 1,
        name: "seed".to_owned(),
        time_ms: 1,
        lag: 2,
        round_ms: 100,
        round_ms_max: 1_000,
        empty_ms: 0,
        clock_drift_ms_max: 500,
        expiry_heights_max: 100,
        opaque: true,
        validators: vec![key],
        accounts: vec![metanode_ledger::Account { key, balance: 5 }],
    };
    with(8, "genesis", genesis.to_json().into_bytes());
    let app = Reference::new(&genesis);
    let chain_there = Chain::new(&genesis, &app.executed().1);
    with(12, "snapshot", chain_there.snapshot().encode());
    with(13, "piece", app.export(Height(0), &[]).expect("it is kept").bytes);

    let change = RoundChange { view, prepared: Some((Round(0), hash)) };
    let asked = RoundChangeMessage {
        signed: Signed { payload: change, signer: key, signature: [1; 64] },
        block: Some(block.clone()),
        prepares: Vec::new(),
    };
    let messages = [
        ("commit", IbftMessage::Commit(commit(hash))),
        ("round-change", IbftMessage::RoundChange(Box::new(asked))),
        ("new-block", IbftMessage::NewBlock(Box::new((block.clone(), certificate)))),
    ];
    for (name, message) in messages {
        with(9, name, encode_message(&message));
        with(10, &format!("record-{name}"), encode_record(&Record::Cast(message)));
    }
    with(10, "record-round", encode_record(&Record::<Block>::Round(view)));
    let generation = Generation { number: 2, salt: 3 };
    let file = encode_header(&Owner { chain: chain.0, key }, generation).to_vec();
    let frame = encode_records(generation, file.len() as u64, 1, &[encode_record(&Record::<Block>::Round(view))]);
    with(11, "sign-state", [&file[..SIGN_HEADER_BYTES], &frame[..200]].concat());
    with(11, "sign-state-empty", file[..SIGN_HEADER_BYTES].to_vec());
}
