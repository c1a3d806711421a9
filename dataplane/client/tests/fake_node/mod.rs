//! A tiny node in memory that speaks the relay protocol, and breaks it on request.

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use metanode_blob::tree::{Outboard, SliceWalk, Step};
use metanode_client::{Client, ClientConfig, ClientError};
use metanode_crypto::{
    Identity,
    tls::{ALPN_RELAY, CipherSuite, server},
};
use metanode_types::{ByteRange, Hash};
use metanode_wire::{
    Frame, FrameLimits, FrameReader, Kind, Message, Refusal, RefusalCode, Ticket, encode,
    message::{
        ArchivedListBlobs, BlobEntry, BlobPage, BulkBegin, Data, Done, Get, GetBulk, ListBlobs, Put, PutBulk, PutEnd,
        Stored, TagGet, TagSet, TagTarget, Welcome,
    },
};

/// What the node does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "each test crate uses some")]
pub(crate) enum Fault {
    None,
    /// Flips a bit of all data that it sends.
    FlippedBit,
    /// Refuses every request after the greeting.
    Refuse(RefusalCode),
    /// Refuses the first few requests as busy.
    BusyAtFirst,
    /// Announces a frame over the limit.
    OversizedFrame,
    /// Sends an archive that does not validate.
    MalformedArchive,
    /// Answers another request than was asked.
    WrongNumber,
    /// Answers nothing after the greeting.
    Silent,
    /// Ends a bulk transfer in the middle.
    CutBulk,
    /// Sends more than the slice.
    LongBulk,
    /// Resets a bulk transfer in the middle, with a reason.
    ResetBulk(RefusalCode),
    /// Closes the connection when asked for something.
    Hangup,
    /// Lists the same page for ever.
    EndlessList,
}

pub(crate) const WHOLE_BYTES_MAX: usize = 256 * 1024;

pub(crate) struct FakeNode {
    pub(crate) ticket: Ticket,
    pub(crate) state: Arc<State>,
    _endpoint: quinn::Endpoint,
}

pub(crate) struct State {
    pub(crate) fault: Fault,
    pub(crate) blobs: Mutex<HashMap<Hash, Bytes>>,
    pub(crate) tags: Mutex<BTreeMap<String, Hash>>,
    pub(crate) puts: AtomicU32,
    pub(crate) connections: AtomicU32,
    pub(crate) requests_max: u32,
    shards: u16,
    busy_left: AtomicU32,
}

impl FakeNode {
    pub(crate) fn start(fault: Fault) -> Self {
        Self::start_with(fault, &[ALPN_RELAY], 1, 64)
    }

    pub(crate) fn start_with(fault: Fault, alpn: &[&[u8]], shards: u16, requests_max: u32) -> Self {
        let identity = Identity::from_seed(&[9; 32]);
        let crypto = server(&identity, CipherSuite::DEFAULT, alpn).unwrap();
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        let mut transport = quinn::TransportConfig::default();
        let mut mtu = quinn::MtuDiscoveryConfig::default();
        mtu.upper_bound(6550);
        transport.max_concurrent_bidi_streams(16u32.into()).mtu_discovery_config(Some(mtu)).send_window(16 << 20);
        config.transport_config(Arc::new(transport));
        let mut endpoint = quinn::EndpointConfig::default();
        endpoint.max_udp_payload_size(8952).unwrap();
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let endpoint = quinn::Endpoint::new(endpoint, Some(config), socket, Arc::new(quinn::TokioRuntime)).unwrap();
        let ticket = Ticket { node: identity.public(), addresses: vec![endpoint.local_addr().unwrap()], hash: None };
        let state = Arc::new(State {
            fault,
            blobs: Mutex::default(),
            tags: Mutex::default(),
            puts: AtomicU32::new(0),
            connections: AtomicU32::new(0),
            requests_max,
            shards,
            busy_left: AtomicU32::new(3),
        });
        tokio::spawn(accept(endpoint.clone(), state.clone()));
        Self { ticket, state, _endpoint: endpoint }
    }

    pub(crate) fn hold(&self, bytes: impl Into<Bytes>) -> Hash {
        let bytes = bytes.into();
        let hash = metanode_crypto::hash(&bytes);
        self.state.blobs.lock().unwrap().insert(hash, bytes);
        hash
    }

    #[allow(dead_code, reason = "each test crate uses some")]
    pub(crate) async fn client(&self) -> Client {
        self.try_client(config()).await.unwrap()
    }

    pub(crate) async fn try_client(&self, config: ClientConfig) -> Result<Client, ClientError> {
        Client::connect(&self.ticket, config).await
    }
}

pub(crate) fn config() -> ClientConfig {
    ClientConfig::new(Identity::from_seed(&[1; 32]))
}

async fn accept(endpoint: quinn::Endpoint, state: Arc<State>) {
    while let Some(incoming) = endpoint.accept().await {
        let state = state.clone();
        tokio::spawn(async move {
            let Ok(connection) = incoming.await else { return };
            let shard = (state.connections.fetch_add(1, Relaxed) % u32::from(state.shards)) as u16;
            while let Ok((send, recv)) = connection.accept_bi().await {
                tokio::spawn(serve(connection.clone(), state.clone(), shard, send, recv));
            }
        });
    }
}

async fn serve(
    connection: quinn::Connection,
    state: Arc<State>,
    shard: u16,
    mut send: quinn::SendStream,
    mut recv: quinn::RecvStream,
) {
    let mut reader = FrameReader::new(FrameLimits::default());
    let mut out = Vec::new();
    let mut upload: Option<Vec<u8>> = None;
    while let Ok(Some(chunk)) = recv.read_chunk(usize::MAX, true).await {
        reader.push(chunk.bytes);
        while let Some(frame) = reader.next_frame().expect("the client frames well") {
            if frame.kind == Kind::GetBulk {
                return bulk(&state, &frame, send).await;
            }
            if state.fault == Fault::Hangup && frame.kind != Kind::Hello {
                return connection.close(0u32.into(), b"");
            }
            state.answer(&frame, shard, &mut upload, &mut out);
        }
        if send.write_all(&out).await.is_err() {
            return;
        }
        out.clear();
    }
}

impl State {
    fn answer(&self, frame: &Frame, shard: u16, upload: &mut Option<Vec<u8>>, out: &mut Vec<u8>) {
        let request = frame.request;
        if frame.kind == Kind::Hello {
            let welcome = Welcome {
                agent: "fake".into(),
                shards: self.shards,
                shard,
                whole_bytes_max: WHOLE_BYTES_MAX as u32,
                requests_max: self.requests_max,
                may_write: true,
            };
            return encode(out, request, &welcome, 0);
        }
        match self.fault {
            Fault::Silent => return,
            Fault::Refuse(code) => return encode(out, request, &Refusal::new(code, "as told").to_message(), 0),
            Fault::BusyAtFirst if self.busy_left.load(Relaxed) > 0 => {
                self.busy_left.fetch_sub(1, Relaxed);
                return encode(out, request, &Refusal::busy(5).to_message(), 0);
            }
            Fault::OversizedFrame => {
                out.extend([1, Kind::Data as u8, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
                return;
            }
            Fault::MalformedArchive => {
                out.extend([1, Kind::Data as u8, 0, 0]);
                out.extend(request.to_le_bytes());
                return out.extend([3, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3]);
            }
            Fault::WrongNumber => return encode(out, request + 7, &Done {}, 0),
            _ => {}
        }
        match frame.kind {
            Kind::Get => match self.blob(frame.message::<Get>().unwrap().hash) {
                Some(bytes) if bytes.len() > WHOLE_BYTES_MAX => {
                    encode(out, request, &Data { size_bytes: bytes.len() as u64 }, 0);
                }
                Some(bytes) => {
                    encode(out, request, &Data { size_bytes: bytes.len() as u64 }, bytes.len());
                    out.extend_from_slice(&bytes);
                    if self.fault == Fault::FlippedBit {
                        *out.last_mut().unwrap() ^= 1;
                    }
                }
                None => refuse(out, request, RefusalCode::NotFound),
            },
            Kind::Put => {
                assert_eq!(metanode_crypto::hash(&frame.body).0, frame.message::<Put>().unwrap().hash);
                self.store(request, &frame.body, out);
            }
            Kind::PutBulk => {
                frame.message::<PutBulk>().unwrap();
                *upload = Some(Vec::new());
            }
            Kind::Chunk => upload.as_mut().unwrap().extend_from_slice(&frame.body),
            Kind::PutEnd => {
                let bytes = upload.take().unwrap();
                assert_eq!(metanode_crypto::hash(&bytes).0, frame.message::<PutEnd>().unwrap().hash);
                self.store(request, &bytes, out);
            }
            Kind::TagSet => {
                let set = frame.message::<TagSet>().unwrap();
                self.tags.lock().unwrap().insert(set.name.as_str().into(), Hash(set.hash));
                encode(out, request, &Done {}, 0);
            }
            Kind::TagGet => match self.tags.lock().unwrap().get(frame.message::<TagGet>().unwrap().name.as_str()) {
                Some(hash) => encode(out, request, &TagTarget { hash: hash.0 }, 0),
                None => refuse(out, request, RefusalCode::NotFound),
            },
            Kind::ListBlobs => self.list(request, frame.message::<ListBlobs>().unwrap(), out),
            _ => refuse(out, request, RefusalCode::NotSupported),
        }
    }

    fn list(&self, request: u32, asked: &ArchivedListBlobs, out: &mut Vec<u8>) {
        let after = asked.after.as_ref().map(|hash| Hash(*hash)).filter(|_| self.fault != Fault::EndlessList);
        let mut hashes: Vec<_> =
            self.blobs.lock().unwrap().keys().copied().filter(|hash| after.is_none_or(|a| *hash > a)).collect();
        hashes.sort();
        let count = asked.count.to_native() as usize;
        let entry = |hash: &Hash| BlobEntry { hash: hash.0, size_bytes: 1, kind: 0, held: true, references: 0 };
        let entries = hashes.iter().take(count).map(entry).collect();
        encode(out, request, &BlobPage { entries, more: hashes.len() > count }, 0);
    }

    fn blob(&self, hash: [u8; 32]) -> Option<Bytes> {
        self.blobs.lock().unwrap().get(&Hash(hash)).cloned()
    }

    fn store(&self, request: u32, bytes: &[u8], out: &mut Vec<u8>) {
        self.puts.fetch_add(1, Relaxed);
        let hash = metanode_crypto::hash(bytes);
        let existed = self.blobs.lock().unwrap().insert(hash, Bytes::copy_from_slice(bytes)).is_some();
        encode(out, request, &Stored { hash: hash.0, size_bytes: bytes.len() as u64, existed }, 0);
    }
}

fn refuse(out: &mut Vec<u8>, request: u32, code: RefusalCode) {
    encode(out, request, &Refusal::from(code).to_message(), 0);
}

async fn bulk(state: &State, frame: &Frame, mut send: quinn::SendStream) {
    let get = frame.message::<GetBulk>().unwrap();
    let mut out = Vec::new();
    let (Some(data), true) = (state.blob(get.hash), !matches!(state.fault, Fault::Refuse(_))) else {
        refuse(&mut out, frame.request, RefusalCode::NotFound);
        let _ = send.write_all(&out).await;
        return;
    };
    let range = ByteRange { offset: get.offset.to_native(), length: get.length.to_native() };
    write(&mut out, frame.request, &BulkBegin { size_bytes: data.len() as u64 });
    if let Some((start, end)) = range.clamp(data.len() as u64) {
        slice(&data, start, end, &mut out);
    }
    match state.fault {
        Fault::FlippedBit => *out.last_mut().unwrap() ^= 1,
        Fault::CutBulk => out.truncate(out.len() / 2),
        Fault::LongBulk => out.push(0),
        Fault::ResetBulk(code) => {
            let _ = send.write_all(&out[..out.len() / 2]).await;
            let _ = send.reset((code as u32).into());
            return;
        }
        _ => {}
    }
    let _ = send.write_all(&out).await;
    let _ = send.finish();
}

fn write<M: Message>(out: &mut Vec<u8>, request: u32, message: &M) {
    encode(out, request, message, 0);
}

fn slice(data: &[u8], start: u64, end: u64, out: &mut Vec<u8>) {
    let tree = Outboard::of(0, data);
    for step in SliceWalk::new(data.len() as u64, start, end) {
        match step {
            Step::Node { span, .. } => out.extend(tree.pair(span).unwrap().to_bytes()),
            Step::Group(span) => out.extend_from_slice(&data[span.start as usize..(span.start + span.length) as usize]),
        }
    }
}
