//! The client: which connection a request takes, and the requests.

use std::sync::Arc;

use bytes::Bytes;
use metanode_crypto::HashBatcher;
use metanode_types::{BlobKind, ByteRange, DurabilityClass, Hash, NodeKey, ShardCount, ShardId, TagName};
use metanode_wire::{
    Frame, FrameError, Message, Ticket,
    message::{
        BlobPage, Data, Done, Get, ListBlobs, ListTags, NodeStatus, NodeStatusReply, Put, Remove, Stat, StatReply,
        Stored as StoredMessage, TagGet, TagPage, TagRemove, TagSet, TagTarget, Welcome,
    },
};
use tokio::{io::AsyncRead, sync::OnceCell};

use crate::{
    BlobSink, BlobSource, ClientConfig, ClientError, Fetched, ReaderSource,
    beside::{self, Replica, Way},
    bulk::{self, Resume},
    dial::{Dialer, Dialled, STEERABLE_SHARDS_MAX},
    link::{Link, close},
    stream::Rejoined,
};

/// A connection to a node, or one per shard of it. Clones share it; when the last one goes, it is closed.
///
/// Blobs that are put without `hold` live as long as the connection they were put on, so at least as long as the client. A
/// client whose connection was lost stays lost: make another.
#[derive(Debug, Clone)]
pub struct Client {
    inner: Arc<Inner>,
    /// Other nodes that large blobs are taken from as well.
    replicas: Arc<[Replica]>,
}

#[derive(Debug)]
struct Inner {
    dialer: Dialer,
    shards: ShardCount,
    /// The connection that was made first.
    primary: ShardId,
    /// By shard; a single one when the client does not tell shards apart.
    links: Vec<OnceCell<Dialled>>,
    hashes: HashBatcher,
}

/// A blob that was fetched by [`Client::get_whole`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Got {
    /// All of it, verified.
    Whole(Bytes),
    /// Too large for one frame: fetch it by [`Client::get_range`].
    Large {
        /// Bytes, as the node says.
        size_bytes: u64,
    },
}

/// How to store a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PutOptions {
    /// When the node answers.
    pub class: DurabilityClass,
    /// What the blob is.
    pub kind: BlobKind,
    /// Whether the blob stays by itself; otherwise it lives while the connection does, and on when a folder or tag refers to it.
    pub hold: bool,
}

impl Default for PutOptions {
    fn default() -> Self {
        Self { class: DurabilityClass::Durable, kind: BlobKind::Blob, hold: true }
    }
}

/// A blob that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Its address, computed here.
    pub hash: Hash,
    /// Bytes.
    pub size_bytes: u64,
    /// Whether the node had it already.
    pub existed: bool,
}

/// What a node knows of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobInfo {
    /// Bytes.
    pub size_bytes: u64,
    /// What it is.
    pub kind: BlobKind,
    /// How it is stored.
    pub class: DurabilityClass,
    /// Whether it stays by itself.
    pub held: bool,
    /// Tags and folders that refer to it.
    pub references: u32,
}

/// One blob of a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobLine {
    /// Address.
    pub hash: Hash,
    /// Bytes.
    pub size_bytes: u64,
    /// What it is.
    pub kind: BlobKind,
    /// Whether it stays by itself.
    pub held: bool,
    /// Tags and folders that refer to it.
    pub references: u32,
}

/// A page of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<T> {
    /// In order.
    pub entries: Vec<T>,
    /// Whether more follow the last entry.
    pub more: bool,
}

/// Bytes on the wire so far, with everything that QUIC and UDP add below IP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WireCounters {
    /// UDP payload sent.
    pub sent_bytes: u64,
    /// UDP payload received.
    pub received_bytes: u64,
    /// Packets that were declared lost.
    pub lost_packets: u64,
    /// Connections open.
    pub connections: usize,
}

/// Shards that a client connects to each for itself: a connection may have 24 MiB on the way to it.
const SHARDS_DIALLED_MAX: u16 = 64;

impl Client {
    /// Connects to the node that `ticket` names, at the first of its addresses that leads there.
    pub async fn connect(ticket: &Ticket, config: ClientConfig) -> Result<Self, ClientError> {
        let dialer = Dialer::new(ticket.node, config)?;
        let first = dialer.first_of(&ticket.addresses).await?;
        let Welcome { shards, shard, .. } = first.link.welcome;
        let malformed = || first.link.protocol_error(FrameError::Malformed);
        let count = ShardCount::new(shards).filter(|_| shard < shards).ok_or_else(malformed)?;
        // Beyond the steerable number a connection can't ask for its shard, and one serves them all; beyond ours, a node that has so many, or
        // says so, would have us hold as many windows.
        let aware = dialer.config.shard_aware && shards <= STEERABLE_SHARDS_MAX.min(SHARDS_DIALLED_MAX);
        let shards = if aware { count } else { ShardCount::new(1).expect("1 is within the limit") };
        let primary = if aware { ShardId(shard) } else { ShardId(0) };
        let links: Vec<_> = shards.iter().map(|_| OnceCell::new()).collect();
        let _ = links[primary.index()].set(first); // empty so far
        let inner = Arc::new(Inner { dialer, shards, primary, links, hashes: HashBatcher::default() });
        Ok(Self { inner, replicas: Arc::default() })
    }

    /// As this client, but ranges of 8 MiB and more are taken from the nodes of `tickets` as well, side by side. They are connected to when
    /// that is first needed; one that can't be reached, has not the blob or sends something else is left out. Everything else
    /// is asked of this client's own node.
    #[must_use]
    pub fn beside(&self, tickets: impl IntoIterator<Item = Ticket>) -> Self {
        let mut known = vec![self.node()];
        let mut replicas = Vec::new();
        for ticket in tickets {
            if !known.contains(&ticket.node) {
                known.push(ticket.node);
                replicas.push(Replica::new(ticket));
            }
        }
        Self { inner: self.inner.clone(), replicas: replicas.into() }
    }

    pub(crate) fn replicas(&self) -> &[Replica] {
        &self.replicas
    }

    pub(crate) fn config(&self) -> &ClientConfig {
        &self.inner.dialer.config
    }

    /// Makes the connections to all shards now, rather than when each is first needed.
    pub async fn connect_all_shards(&self) -> Result<(), ClientError> {
        for shard in self.inner.shards.iter() {
            self.link(shard).await?;
        }
        Ok(())
    }

    /// The node's key, which it has proven to hold.
    pub fn node(&self) -> NodeKey {
        self.inner.dialer.node
    }

    /// A ticket for this node at the address that worked, and for `hash`.
    pub fn ticket(&self, hash: Option<Hash>) -> Ticket {
        Ticket { node: self.node(), addresses: vec![self.primary().address], hash }
    }

    /// Shards of the node; the owner of a hash is `ShardId::owner_of(hash, shards)`.
    pub fn shards(&self) -> u16 {
        self.primary().link.welcome.shards
    }

    /// Whether the node lets this client write and delete.
    pub fn may_write(&self) -> bool {
        self.primary().link.welcome.may_write
    }

    /// Largest blob that [`Client::get_whole`] and [`Client::put_whole`] carry.
    pub fn whole_bytes_max(&self) -> u32 {
        self.primary().link.welcome.whole_bytes_max
    }

    /// Traffic of all connections to this client's own node.
    pub fn wire_counters(&self) -> WireCounters {
        let mut sum = WireCounters::default();
        for dialled in self.inner.links.iter().filter_map(OnceCell::get) {
            let stats = dialled.link.connection().stats();
            sum.sent_bytes += stats.udp_tx.bytes;
            sum.received_bytes += stats.udp_rx.bytes;
            sum.lost_packets += stats.path.lost_packets;
            sum.connections += 1;
        }
        sum
    }

    /// Fetches a blob of up to [`Client::whole_bytes_max`] bytes and verifies it; says so when it is larger.
    pub async fn get_whole(&self, hash: Hash) -> Result<Got, ClientError> {
        let link = self.link_of(&hash).await?;
        let frame = link.call(&Get { hash: hash.0 }, Bytes::new()).await?;
        let size_bytes = link.read::<Data>(&frame)?.size_bytes.to_native();
        if frame.body.len() as u64 == size_bytes {
            if self.inner.hashes.hash(&frame.body).await != hash {
                return Err(ClientError::HashMismatch(hash));
            }
            Ok(Got::Whole(frame.body))
        } else if frame.body.is_empty() {
            Ok(Got::Large { size_bytes })
        } else {
            Err(link.protocol_error(FrameError::Malformed))
        }
    }

    /// Stores a blob of up to [`Client::whole_bytes_max`] bytes.
    pub async fn put_whole(&self, bytes: Bytes, options: PutOptions) -> Result<Stored, ClientError> {
        let hash = self.inner.hashes.hash(&bytes).await;
        self.put_hashed(hash, bytes, options).await
    }

    /// As [`Client::put_whole`], for a caller that knows the hash. The node checks it; another one is refused.
    pub async fn put_hashed(&self, hash: Hash, bytes: Bytes, options: PutOptions) -> Result<Stored, ClientError> {
        let size_bytes = bytes.len() as u64;
        let link = self.link_of(&hash).await?;
        if size_bytes > u64::from(link.welcome.whole_bytes_max) {
            return bulk::put(link, &mut crate::BytesSource(bytes), Some(size_bytes), options, Resume::No).await;
        }
        let request = Put { hash: hash.0, class: options.class as u8, kind: options.kind as u8, hold: options.hold };
        let frame = link.call(&request, bytes).await?;
        let stored = link.read::<StoredMessage>(&frame)?;
        if stored.hash != hash.0 || stored.size_bytes != size_bytes {
            return Err(ClientError::HashMismatch(hash));
        }
        Ok(Stored { hash, size_bytes, existed: stored.existed })
    }

    /// Fetches a range of a blob of any size into `sink`, which sees verified bytes only. A connection that is lost on the way,
    /// or bytes that don't match, leave in the sink what was verified before. From several nodes at once when the client knows of them
    /// ([`Client::beside`]).
    pub async fn get_range(
        &self,
        hash: Hash,
        range: ByteRange,
        sink: &mut impl BlobSink,
    ) -> Result<Fetched, ClientError> {
        match beside::way(self, hash, range).await? {
            Way::Alone(client) => client.get_range_alone(hash, range, sink).await,
            Way::Beside { size_bytes, start, end } => beside::get(self, hash, size_bytes, (start, end), sink).await,
        }
    }

    /// As [`Client::get_range`], from this client's own node.
    pub(crate) async fn get_range_alone(
        &self,
        hash: Hash,
        range: ByteRange,
        sink: &mut impl BlobSink,
    ) -> Result<Fetched, ClientError> {
        let link = self.link_of(&hash).await?;
        bulk::get(link, hash, range, sink, self.config().busy_patience).await
    }

    /// Stores a blob of any size; `size_bytes`, when known, lets the node refuse early. Holds a few chunks in memory.
    pub async fn put_source(
        &self,
        source: &mut impl BlobSource,
        size_bytes: Option<u64>,
        options: PutOptions,
    ) -> Result<Stored, ClientError> {
        self.put_chunks(source, size_bytes, options, Resume::No).await
    }

    /// As [`Client::put_source`], from a source that can be opened again: chunks that the node has, because an earlier upload
    /// of the same bytes was interrupted or because other blobs have them, are not sent. `NotFound` says that one of them has gone
    /// meanwhile: begin anew with [`Client::put_source`].
    pub async fn put_again(
        &self,
        source: &mut impl BlobSource,
        size_bytes: Option<u64>,
        options: PutOptions,
    ) -> Result<Stored, ClientError> {
        self.put_chunks(source, size_bytes, options, Resume::Ask).await
    }

    async fn put_chunks(
        &self,
        source: &mut impl BlobSource,
        size_bytes: Option<u64>,
        options: PutOptions,
        resume: Resume,
    ) -> Result<Stored, ClientError> {
        let link = self.link(self.inner.primary).await?;
        let first = source.next_chunk().await.map_err(ClientError::Stream)?;
        // A chunk shorter than a whole one is the last: the blob is small and goes to the shard that owns it.
        match first {
            None => self.put_whole(Bytes::new(), options).await,
            Some(chunk) if chunk.len() < metanode_types::limits::CHUNK_BYTES => self.put_whole(chunk, options).await,
            first => bulk::put(link, &mut Rejoined { first, rest: source }, size_bytes, options, resume).await,
        }
    }

    /// As [`Client::put_source`], from a reader.
    pub async fn put_stream(
        &self,
        reader: impl AsyncRead + Unpin + Send,
        size_bytes: Option<u64>,
        options: PutOptions,
    ) -> Result<Stored, ClientError> {
        self.put_source(&mut ReaderSource(reader), size_bytes, options).await
    }

    /// What the node knows of a blob.
    pub async fn stat(&self, hash: Hash) -> Result<BlobInfo, ClientError> {
        let link = self.link_of(&hash).await?;
        let frame = link.call(&Stat { hash: hash.0 }, Bytes::new()).await?;
        let reply = link.read::<StatReply>(&frame)?;
        let malformed = || link.protocol_error(FrameError::Malformed);
        Ok(BlobInfo {
            size_bytes: reply.size_bytes.to_native(),
            kind: BlobKind::from_u8(reply.kind).ok_or_else(malformed)?,
            class: DurabilityClass::from_u8(reply.class).ok_or_else(malformed)?,
            held: reply.held,
            references: reply.references.to_native(),
        })
    }

    /// Removes a blob to which no tag and no folder refers; durable when this returns.
    pub async fn remove(&self, hash: Hash) -> Result<(), ClientError> {
        let link = self.link_of(&hash).await?;
        self.done(link, &Remove { hash: hash.0 }).await
    }

    /// Points a tag to a blob; durable when this returns.
    pub async fn tag_set(&self, name: &TagName, hash: Hash) -> Result<(), ClientError> {
        self.done(&self.primary().link, &TagSet { name: name.as_str().into(), hash: hash.0 }).await
    }

    /// Removes a tag; durable when this returns.
    pub async fn tag_remove(&self, name: &TagName) -> Result<(), ClientError> {
        self.done(&self.primary().link, &TagRemove { name: name.as_str().into() }).await
    }

    /// Where a tag points.
    pub async fn tag_get(&self, name: &TagName) -> Result<Hash, ClientError> {
        let (link, frame) = self.ask(&TagGet { name: name.as_str().into() }).await?;
        Ok(Hash(link.read::<TagTarget>(&frame)?.hash))
    }

    /// Up to `count` blobs behind `after`, in the order of their addresses.
    pub async fn list_blobs(&self, after: Option<Hash>, count: u32) -> Result<Page<BlobLine>, ClientError> {
        let (link, frame) = self.ask(&ListBlobs { after: after.map(|hash| hash.0), count }).await?;
        let page = link.read::<BlobPage>(&frame)?;
        let entries = page.entries.iter().map(|entry| {
            Ok(BlobLine {
                hash: Hash(entry.hash),
                size_bytes: entry.size_bytes.to_native(),
                kind: BlobKind::from_u8(entry.kind).ok_or(FrameError::Malformed)?,
                held: entry.held,
                references: entry.references.to_native(),
            })
        });
        let entries: Vec<_> = entries.collect::<Result<_, _>>().map_err(|error| link.protocol_error(error))?;
        let advances = entries.is_sorted_by(|a, b| a.hash < b.hash)
            && entries.first().is_none_or(|first| after.is_none_or(|after| after < first.hash));
        page_of(link, entries, page.more, advances)
    }

    /// Up to `count` tags behind `after`, in the order of their names.
    pub async fn list_tags(&self, after: Option<&TagName>, count: u32) -> Result<Page<(TagName, Hash)>, ClientError> {
        let (link, frame) = self.ask(&ListTags { after: after.map(|name| name.as_str().into()), count }).await?;
        let page = link.read::<TagPage>(&frame)?;
        let entries = page.entries.iter().map(|entry| {
            let name: TagName = entry.name.as_str().parse().map_err(|_| FrameError::Malformed)?;
            Ok((name, Hash(entry.hash)))
        });
        let entries: Vec<_> = entries.collect::<Result<_, _>>().map_err(|error| link.protocol_error(error))?;
        let advances = entries.is_sorted_by(|(a, _), (b, _)| a < b)
            && entries.first().is_none_or(|(first, _)| after.is_none_or(|after| after < first));
        page_of(link, entries, page.more, advances)
    }

    /// How the node is.
    pub async fn status(&self) -> Result<NodeStatusReply, ClientError> {
        let (link, frame) = self.ask(&NodeStatus {}).await?;
        let reply = link.read::<NodeStatusReply>(&frame)?;
        Ok(NodeStatusReply {
            version: reply.version.as_str().into(),
            node_key: reply.node_key,
            pid: reply.pid.to_native(),
            uptime_ms: reply.uptime_ms.to_native(),
            shards: reply.shards.to_native(),
            quic_address: reply.quic_address.as_str().into(),
            metrics_address: reply.metrics_address.as_str().into(),
            connections: reply.connections.to_native(),
            blobs: reply.blobs.to_native(),
            blob_bytes: reply.blob_bytes.to_native(),
            disk_bytes: reply.disk_bytes.to_native(),
            disk_free_bytes: reply.disk_free_bytes.to_native(),
            cache_bytes: reply.cache_bytes.to_native(),
            cache_bytes_max: reply.cache_bytes_max.to_native(),
            shard_stalls: reply.shard_stalls.to_native(),
            read_only_reason: reply.read_only_reason.as_str().into(),
        })
    }

    /// Closes all connections, those to other nodes too, and gives the last packets a moment to leave.
    pub async fn close(self) {
        let others = self.replicas.iter().filter_map(Replica::connected);
        let clients = std::iter::once(&self).chain(others);
        let endpoints: Vec<_> =
            clients.flat_map(|client| client.inner.links.iter().filter_map(OnceCell::get)).collect();
        for dialled in &endpoints {
            dialled.link.connection().close(close::DONE.into(), b"");
        }
        let idle = async {
            for dialled in &endpoints {
                dialled.endpoint.wait_idle().await;
            }
        };
        // Draining lasts three probe timeouts; the close itself leaves at once.
        let _ = tokio::time::timeout(std::time::Duration::from_millis(10), idle).await;
    }

    fn primary(&self) -> &Dialled {
        self.inner.links[self.inner.primary.index()].get().expect("the primary connection is made first")
    }

    async fn link_of(&self, hash: &Hash) -> Result<&Link, ClientError> {
        self.link(ShardId::owner_of(hash, self.inner.shards)).await
    }

    /// A node has its ledger on the first shard; others pass questions on.
    pub(crate) async fn link_of_ledger(&self) -> Result<&Link, ClientError> {
        self.link(ShardId(0)).await
    }

    async fn link(&self, shard: ShardId) -> Result<&Link, ClientError> {
        let inner = &*self.inner;
        let cell = &inner.links[shard.index()];
        if let Some(dialled) = cell.get() {
            return Ok(&dialled.link);
        }
        let address = self.primary().address;
        let dialled =
            cell.get_or_try_init(|| Box::pin(inner.dialer.dial(address, Some((shard, inner.shards))))).await?;
        Ok(&dialled.link)
    }

    async fn ask<M: Message>(&self, message: &M) -> Result<(&Link, Frame), ClientError> {
        let link = &self.primary().link;
        let frame = link.call(message, Bytes::new()).await?;
        Ok((link, frame))
    }

    async fn done<M: Message>(&self, link: &Link, message: &M) -> Result<(), ClientError> {
        let frame = link.call(message, Bytes::new()).await?;
        link.read::<Done>(&frame).map(|_| ())
    }
}

/// A page that goes backwards, or promises more and is empty, would have a caller ask for ever.
fn page_of<T>(link: &Link, entries: Vec<T>, more: bool, advances: bool) -> Result<Page<T>, ClientError> {
    if !advances || (more && entries.is_empty()) {
        return Err(link.protocol_error(FrameError::Malformed));
    }
    Ok(Page { entries, more })
}
