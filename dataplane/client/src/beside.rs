//! One range from several nodes at once.
//!
//! The range is cut into segments, of which each node sends a few at a time; they are handed on in order. A node that fails is left
//! out, and what it owed goes to the others; a segment that holds up all that follow it is asked of one more node, and of another after that.
//! A node that others overtake again and again is left out as well. So a transfer is about as fast as its good nodes together, and ends well as
//! long as one of them does. Connecting to a node holds up nobody.
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
    time::{Instant, sleep_until, timeout},
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

/// A node that was overtaken so often is left out; each segment that it sends in time makes up for one.
const OVERTAKEN_MAX: u32 = 3;

/// What a node has to prove the size of a blob, before others are asked.
const PROOF_TIME_MAX: Duration = Duration::from_secs(10);

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

/// Where a range comes from.
pub(crate) enum Way {
    /// From one node, as it is small.
    Alone(Client),
    /// From all of them. The size is proven.
    Beside { size_bytes: u64, start: u64, end: u64 },
}

/// How to fetch a range.
pub(crate) async fn way(client: &Client, hash: Hash, range: ByteRange) -> Result<Way, ClientError> {
    if client.replicas().is_empty() || range.length < BESIDE_BYTES_MIN {
        return Ok(Way::Alone(client.clone()));
    }
    let own = match way_by(client, hash, range).await {
        Err(error) => error,
        found => return found,
    };
    for at in 0..client.replicas().len() {
        if let Ok(other) = client.replica(at).await
            && let Ok(found) = way_by(&other, hash, range).await
        {
            return Ok(found);
        }
    }
    Err(own)
}

/// What one node says about it.
async fn way_by(node: &Client, hash: Hash, range: ByteRange) -> Result<Way, ClientError> {
    let proven = async {
        let said_bytes = node.stat(hash).await?.size_bytes;
        let Some((start, end)) = range.clamp(said_bytes).filter(|(start, end)| end - start >= BESIDE_BYTES_MIN) else {
            return Ok(Way::Alone(node.clone()));
        };
        let last = ByteRange { offset: said_bytes - 1, length: u64::MAX };
        let mut sink = VecSink { bytes: Vec::new(), bytes_max: 1 };
        let fetched = node.get_range_alone(hash, last, &mut sink).await?;
        match fetched.size_bytes == said_bytes {
            true => Ok(Way::Beside { size_bytes: said_bytes, start, end }),
            false => Err(ClientError::HashMismatch(hash)),
        }
    };
    timeout(PROOF_TIME_MAX, proven).await.unwrap_or(Err(ClientError::Timeout("asking for the size")))
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

/// A node that can be asked.
#[derive(Debug)]
struct Node {
    /// 0 is the client's own, others are behind their places among its replicas.
    number: usize,
    client: Client,
    /// How often another one has sent first what this one was asked for first.
    overtaken: u32,
}

/// A segment that a node has been asked for.
#[derive(Debug)]
struct Asked {
    segment: u64,
    /// Its number.
    node: usize,
    since: Instant,
    abort: AbortHandle,
}

struct Transfer {
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
    /// Segments, each with the time that it took.
    tasks: JoinSet<Result<(Bytes, Duration), ClientError>>,
    /// Nodes that have not failed.
    nodes: Vec<Node>,
    /// Those that are being connected to.
    connecting: JoinSet<(usize, Result<Client, ClientError>)>,
    /// Why the own node has failed, or else the first of the others.
    failure: Option<(usize, ClientError)>,
    /// Duration of a segment, as a moving mean.
    usual: Option<Duration>,
}

impl Transfer {
    fn new(client: &Client, hash: Hash, size_bytes: u64, (start, end): (u64, u64)) -> Self {
        let mut connecting = JoinSet::new();
        for at in 0..client.replicas().len() {
            let client = client.clone();
            connecting.spawn(async move { (at + 1, client.replica(at).await) });
        }
        let count = end.div_ceil(SEGMENT_BYTES) - start / SEGMENT_BYTES;
        Self {
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
            nodes: vec![Node { number: 0, client: client.clone(), overtaken: 0 }],
            connecting,
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

    fn on_the_way(&self, node: usize) -> usize {
        self.asked.iter().filter(|asked| asked.node == node).count()
    }

    /// What a node may have on the way now.
    fn places(node: &Node) -> usize {
        if node.overtaken == 0 { SEGMENTS_A_NODE } else { 1 }
    }

    /// Gives every node what it may have on the way; one segment each in turn.
    fn ask(&mut self) {
        for side_by_side in 1..=SEGMENTS_A_NODE {
            for at in 0..self.nodes.len() {
                let node = &self.nodes[at];
                let number = node.number;
                if self.on_the_way(number) < side_by_side.min(Self::places(node))
                    && let Some(segment) = self.choose(number)
                {
                    self.ask_for(segment, at);
                }
            }
        }
    }

    /// What to ask a node for: what another one has failed to send, else something new, else what is late.
    fn choose(&mut self, node: usize) -> Option<u64> {
        if let Some(Reverse(segment)) = self.again.pop() {
            return Some(segment);
        }
        if self.fresh < self.count && self.fresh - self.next < AHEAD_MAX.min(AHEAD_A_NODE * self.nodes.len() as u64) {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        (self.late_at(node)? <= Instant::now()).then_some(self.next)
    }

    /// When the next segment to hand on will be late with all who were asked for it, and then worth asking `node` for as well.
    fn late_at(&self, node: usize) -> Option<Instant> {
        let on_the_way = || self.asked.iter().filter(|asked| asked.segment == self.next);
        if on_the_way().any(|asked| asked.node == node) {
            return None;
        }
        let latest = on_the_way().map(|asked| asked.since).max()?;
        Some(latest + LATE_MIN.max(self.usual.unwrap_or_default() * LATE_TIMES))
    }

    fn ask_for(&mut self, segment: u64, at: usize) {
        let (hash, size_bytes, range) = (self.hash, self.size_bytes, self.range_of(segment));
        let Node { number, client, .. } = &self.nodes[at];
        let (node, client) = (*number, client.clone());
        let abort = self.tasks.spawn(async move {
            let begun = Instant::now();
            let mut sink = VecSink { bytes: Vec::with_capacity(range.length as usize), bytes_max: range.length };
            let fetched = client.get_range_alone(hash, range, &mut sink).await?;
            if fetched.size_bytes != size_bytes || fetched.taken_bytes != range.length {
                return Err(ClientError::HashMismatch(hash)); // of no blob with this hash
            }
            Ok((sink.bytes.into(), begun.elapsed()))
        });
        self.asked.push(Asked { segment, node, since: Instant::now(), abort });
    }

    /// Waits until a segment has arrived, a node has failed or can be asked, or a segment is late.
    async fn wait(&mut self) -> Result<(), ClientError> {
        let idle = self.nodes.iter().filter(|node| self.on_the_way(node.number) < Self::places(node));
        let late = idle.filter_map(|node| self.late_at(node.number)).min();
        let late = async {
            match late {
                Some(at) => sleep_until(at).await,
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            Some(joined) = self.tasks.join_next_with_id() => {
                let (id, got) = match joined {
                    Ok((id, got)) => (id, got),
                    Err(error) => (error.id(), Err(ClientError::Stream(std::io::Error::other(error)))),
                };
                // Otherwise it was no longer wanted.
                if let Some(at) = self.asked.iter().position(|asked| asked.abort.id() == id) {
                    let asked = self.asked.remove(at);
                    match got {
                        Ok((bytes, took)) => self.keep(&asked, bytes, took),
                        Err(error) => self.failed(asked.node, Some(asked.segment), error),
                    }
                }
            }
            Some(joined) = self.connecting.join_next() => match joined {
                Ok((number, Ok(client))) => self.nodes.push(Node { number, client, overtaken: 0 }),
                Ok((number, Err(error))) => self.failed(number, None, error),
                Err(error) => self.failed(usize::MAX, None, ClientError::Stream(std::io::Error::other(error))),
            },
            () = late => {}
        }
        match self.nodes.is_empty() && self.connecting.is_empty() {
            true => Err(self.give_up()),
            false => Ok(()),
        }
    }

    fn keep(&mut self, asked: &Asked, bytes: Bytes, took: Duration) {
        self.usual = Some(self.usual.map_or(took, |usual| (usual * 7 + took) / 8));
        self.arrived.insert(asked.segment, bytes);
        if let Some(node) = self.nodes.iter_mut().find(|node| node.number == asked.node) {
            node.overtaken = node.overtaken.saturating_sub(1);
        }
        let mut overtaken = Vec::new();
        self.asked.retain(|other| {
            let is_wanted = other.segment != asked.segment;
            if !is_wanted {
                other.abort.abort();
                overtaken.extend((other.since < asked.since).then_some(other.node));
            }
            is_wanted
        });
        for number in overtaken {
            let Some(node) = self.nodes.iter_mut().find(|node| node.number == number) else { continue };
            node.overtaken += 1;
            if node.overtaken >= OVERTAKEN_MAX && self.nodes.len() > 1 {
                self.failed(number, None, ClientError::Timeout("receiving"));
            }
        }
    }

    /// Leaves a node out. What it was asked for goes to the others.
    fn failed(&mut self, node: usize, segment: Option<u64>, error: ClientError) {
        self.nodes.retain(|other| other.number != node);
        if self.failure.is_none() || node == 0 {
            self.failure = Some((node, error));
        }
        let mut owed: Vec<u64> = segment.into_iter().collect();
        self.asked.retain(|other| {
            let is_its = other.node == node;
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
