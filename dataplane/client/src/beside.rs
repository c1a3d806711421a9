//! One range from several nodes at once.
//!
//! The range is cut into segments, of which each node sends a few at a time; they are handed on in order. A node that fails is left
//! out, and what it owed goes to the others; a segment that holds up all that follow it is asked of a second node. So a transfer is
//! about as fast as its nodes together, and ends well as long as one of them does.
//!
//! A node may lie about the size of a blob, which decides where the segments are: it is proven first, by the proof of the last byte.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    future::pending,
    time::Duration,
};

use bytes::Bytes;
use metanode_types::{ByteRange, Hash};
use metanode_wire::Ticket;
use tokio::{
    sync::OnceCell,
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep_until},
};

use crate::{BlobSink, Client, ClientError, Fetched, VecSink};

/// Bytes that one node is asked for at once. The round trip in which a stream begins costs a fast node some of its rate; each segment
/// is in memory until those before it are there.
const SEGMENT_BYTES: u64 = 4 << 20;

/// Segments that a node sends side by side: the second fills the round trip in which the first ends.
const SEGMENTS_A_NODE: usize = 2;

/// Segments that may be on the way or waiting for their turn, for each node: what a fast one does while a slow one sends its two. In
/// all at most 128 MiB.
const AHEAD_A_NODE: u64 = 8;
const AHEAD_MAX: u64 = 32;

/// Ranges from this size on are taken from several nodes: smaller ones are there before a second connection is.
pub(crate) const BESIDE_BYTES_MIN: u64 = 2 * SEGMENT_BYTES;

/// A segment on the way is late after this, and after this many times the mean of the others.
const LATE_MIN: Duration = Duration::from_secs(1);
const LATE_TIMES: u32 = 3;

/// Another node that may have the blob.
#[derive(Debug)]
pub(crate) struct Replica {
    pub(crate) ticket: Ticket,
    /// Made when it is first needed.
    client: OnceCell<Client>,
}

impl Replica {
    pub(crate) fn new(ticket: Ticket) -> Self {
        Self { ticket, client: OnceCell::new() }
    }

    /// The connection, if there is one.
    pub(crate) fn connected(&self) -> Option<&Client> {
        self.client.get()
    }
}

/// A node to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    /// The client's own.
    Own,
    /// The one at this place among its replicas.
    Replica(usize),
}

/// The size of the blob, proven, if `range` is one that should come from several nodes.
pub(crate) async fn proven_size(client: &Client, hash: Hash, range: ByteRange) -> Result<Option<u64>, ClientError> {
    if client.replicas().is_empty() || range.length < BESIDE_BYTES_MIN {
        return Ok(None);
    }
    let own = match size_from(client, hash, range).await {
        Err(error) => error,
        proven => return proven,
    };
    for at in 0..client.replicas().len() {
        if let Ok(other) = client.replica(at).await
            && let Ok(proven) = size_from(&other, hash, range).await
        {
            return Ok(proven);
        }
    }
    Err(own)
}

async fn size_from(client: &Client, hash: Hash, range: ByteRange) -> Result<Option<u64>, ClientError> {
    let said_bytes = client.stat(hash).await?.size_bytes;
    if range.clamp(said_bytes).is_none_or(|(start, end)| end - start < BESIDE_BYTES_MIN) {
        return Ok(None);
    }
    let last = ByteRange { offset: said_bytes - 1, length: u64::MAX };
    let mut sink = VecSink { bytes: Vec::new(), bytes_max: 1 };
    let fetched = client.get_range_alone(hash, last, &mut sink).await?;
    Ok((fetched.size_bytes == said_bytes).then_some(said_bytes))
}

/// Fetches bytes `start` to `end` of a blob of `size_bytes` into `sink`.
pub(crate) async fn get(
    client: &Client,
    hash: Hash,
    size_bytes: u64,
    (start, end): (u64, u64),
    sink: &mut impl BlobSink,
) -> Result<Fetched, ClientError> {
    let mut transfer = Transfer::new(client, hash, size_bytes, (start, end));
    let mut taken_bytes = 0;
    while transfer.next < transfer.count {
        transfer.ask();
        if let Some(bytes) = transfer.arrived.remove(&transfer.next) {
            let offset = transfer.range_of(transfer.next).offset;
            sink.take(offset, &bytes).await.map_err(ClientError::Stream)?;
            taken_bytes += bytes.len() as u64;
            transfer.next += 1;
            continue;
        }
        transfer.wait().await?;
    }
    Ok(Fetched { size_bytes, taken_bytes })
}

/// A segment that a node has been asked for.
#[derive(Debug)]
struct Asked {
    segment: u64,
    node: Node,
    since: Instant,
    abort: AbortHandle,
}

struct Transfer<'a> {
    client: &'a Client,
    hash: Hash,
    size_bytes: u64,
    start: u64,
    end: u64,
    /// Segments in all, and the first that has not been handed on.
    count: u64,
    next: u64,
    /// The first that was not asked for, and those before it that have to be asked for again.
    fresh: u64,
    again: BinaryHeap<Reverse<u64>>,
    arrived: BTreeMap<u64, Bytes>,
    asked: Vec<Asked>,
    tasks: JoinSet<Result<Bytes, ClientError>>,
    /// Nodes that have not failed.
    nodes: Vec<Node>,
    /// Why the own node has failed, or else the first of the others.
    failure: Option<(Node, ClientError)>,
    /// Duration of a segment, as a moving mean.
    usual: Option<Duration>,
}

impl<'a> Transfer<'a> {
    fn new(client: &'a Client, hash: Hash, size_bytes: u64, (start, end): (u64, u64)) -> Self {
        let mut nodes = vec![Node::Own];
        nodes.extend((0..client.replicas().len()).map(Node::Replica));
        let count = end.div_ceil(SEGMENT_BYTES) - start / SEGMENT_BYTES;
        Self {
            client,
            hash,
            size_bytes,
            start,
            end,
            count,
            next: 0,
            fresh: 0,
            again: BinaryHeap::new(),
            arrived: BTreeMap::new(),
            asked: Vec::new(),
            tasks: JoinSet::new(),
            nodes,
            failure: None,
            usual: None,
        }
    }

    /// Segments lie at multiples of their size, so that a chunk belongs to one of them.
    fn range_of(&self, segment: u64) -> ByteRange {
        let from = (self.start / SEGMENT_BYTES + segment) * SEGMENT_BYTES;
        let (offset, end) = (from.max(self.start), (from + SEGMENT_BYTES).min(self.end));
        ByteRange { offset, length: end - offset }
    }

    /// Gives every node what it may have on the way; one segment each in turn.
    fn ask(&mut self) {
        for side_by_side in 1..=SEGMENTS_A_NODE {
            for at in 0..self.nodes.len() {
                let node = self.nodes[at];
                if self.asked.iter().filter(|asked| asked.node == node).count() >= side_by_side {
                    continue;
                }
                match self.choose(node) {
                    Some(segment) => self.ask_for(segment, node),
                    None => return,
                }
            }
        }
    }

    /// What to ask a node for: what another one has failed to send, else something new, else what is late.
    fn choose(&mut self, node: Node) -> Option<u64> {
        if let Some(Reverse(segment)) = self.again.pop() {
            return Some(segment);
        }
        if self.fresh < self.count && self.fresh - self.next < AHEAD_MAX.min(AHEAD_A_NODE * self.nodes.len() as u64) {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        let late = self.late_at(node)?;
        (late <= Instant::now()).then_some(self.next)
    }

    /// When the next segment to hand on will be late, and then worth asking `node` for as well.
    fn late_at(&self, node: Node) -> Option<Instant> {
        let mut on_the_way = self.asked.iter().filter(|asked| asked.segment == self.next);
        let only = on_the_way.next().filter(|asked| asked.node != node)?;
        if on_the_way.next().is_some() {
            return None;
        }
        Some(only.since + LATE_MIN.max(self.usual? * LATE_TIMES))
    }

    fn ask_for(&mut self, segment: u64, node: Node) {
        let (client, hash, size_bytes, range) =
            (self.client.clone(), self.hash, self.size_bytes, self.range_of(segment));
        let abort = self.tasks.spawn(async move {
            let from = match node {
                Node::Own => client,
                Node::Replica(at) => client.replica(at).await?,
            };
            let mut sink = VecSink { bytes: Vec::with_capacity(range.length as usize), bytes_max: range.length };
            let fetched = from.get_range_alone(hash, range, &mut sink).await?;
            if fetched.size_bytes != size_bytes || fetched.taken_bytes != range.length {
                return Err(ClientError::HashMismatch(hash)); // of no blob with this hash
            }
            Ok(sink.bytes.into())
        });
        self.asked.push(Asked { segment, node, since: Instant::now(), abort });
    }

    /// Waits until a segment has arrived, a node has failed, or a segment is late.
    async fn wait(&mut self) -> Result<(), ClientError> {
        let idle = self
            .nodes
            .iter()
            .filter(|node| self.asked.iter().filter(|asked| asked.node == **node).count() < SEGMENTS_A_NODE);
        let late = idle.filter_map(|node| self.late_at(*node)).min();
        let late = async {
            match late {
                Some(at) => sleep_until(at).await,
                None => pending().await,
            }
        };
        let joined = tokio::select! {
            biased;
            joined = self.tasks.join_next_with_id() => joined,
            () = late => return Ok(()),
        };
        let (id, got) = match joined {
            Some(Ok((id, got))) => (id, got),
            Some(Err(error)) => (error.id(), Err(ClientError::Stream(std::io::Error::other(error)))),
            None => return Err(self.give_up()),
        };
        let Some(at) = self.asked.iter().position(|asked| asked.abort.id() == id) else {
            return Ok(()); // it was no longer wanted
        };
        let asked = self.asked.remove(at);
        match got {
            Ok(bytes) => self.keep(&asked, bytes),
            Err(error) => self.failed(&asked, error),
        }
        match self.nodes.is_empty() {
            true => Err(self.give_up()),
            false => Ok(()),
        }
    }

    fn keep(&mut self, asked: &Asked, bytes: Bytes) {
        let took = asked.since.elapsed();
        self.usual = Some(self.usual.map_or(took, |usual| (usual * 7 + took) / 8));
        self.arrived.insert(asked.segment, bytes);
        self.asked.retain(|other| {
            let is_wanted = other.segment != asked.segment;
            if !is_wanted {
                other.abort.abort();
            }
            is_wanted
        });
    }

    fn failed(&mut self, asked: &Asked, error: ClientError) {
        self.nodes.retain(|node| *node != asked.node);
        if self.failure.is_none() || asked.node == Node::Own {
            self.failure = Some((asked.node, error));
        }
        // What else it was asked for may still come, but nobody waits for that.
        let mut owed = vec![asked.segment];
        self.asked.retain(|other| {
            let is_its = other.node == asked.node;
            if is_its {
                other.abort.abort();
                owed.push(other.segment);
            }
            !is_its
        });
        let on_the_way = |segment| self.asked.iter().any(|other| other.segment == segment);
        owed.retain(|segment| *segment >= self.next && !self.arrived.contains_key(segment) && !on_the_way(*segment));
        self.again.extend(owed.into_iter().map(Reverse));
    }

    fn give_up(&mut self) -> ClientError {
        match self.failure.take() {
            Some((_, error)) => error,
            None => ClientError::ConnectionLost("no node is left to ask".into()),
        }
    }
}

impl Client {
    /// The client of another node of those it was told of.
    async fn replica(&self, at: usize) -> Result<Client, ClientError> {
        let replica = &self.replicas()[at];
        let connecting = || Box::pin(Client::connect(&replica.ticket, self.config().clone()));
        replica.client.get_or_try_init(connecting).await.cloned()
    }
}
