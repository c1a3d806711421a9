//! Connections to the other validators, which this node dials: its messages and batches go there, and its questions.
//!
//! Each has two streams that live as long as the connection, messages above batches in priority, and one for each question. Their queues are
//! bounded: of messages the oldest go (the protocol says what matters again), of batches those that don't fit (a block that names one makes
//! the other side ask).

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, VecDeque},
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use metanode_crypto::{Identity, tls};
use metanode_ibft::{ChainId, Height, Message, VALIDATORS_MAX, ValidatorSet};
use metanode_ledger::{Block, decode_certificate};
use metanode_quic::{Connection, Endpoint, RecvStream, SendStream};
use metanode_shard::{Task, local::Notify, now, sleep, spawn_local, timeout};
use metanode_types::{Hash, NodeKey};
use metanode_wire::{
    Frame, FrameLimits, FrameReader, Kind, Message as _, Ticket, encode,
    message::{BatchGet, BlockGet, BlockReply, Data, PeerBatch, PeerHello, PeerMessage, PeerWelcome, Refused},
};

use super::validator::{ByKey, Validator};
use crate::counters::LedgerCounters;

/// Bytes of messages that wait for one validator: hundreds of heights of votes, tens of the largest proposals.
const MESSAGES_BYTES_MAX: usize = 4 << 20;

/// Bytes of batches that wait for one validator: what a loaded chain orders in a second.
const BATCHES_BYTES_MAX: usize = 32 << 20;

/// Nodes that are remembered in case they become validators.
const TOLD_MAX: usize = 4 * VALIDATORS_MAX;

/// Pauses between two attempts to connect.
const DIAL_PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Time for an attempt, and for one after others have failed: short, since there may be another address, and long enough for far nodes under load.
const DIAL_TIMES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

/// Time for the answer to a question, beyond what the one who is asked may wait.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);

/// For so long others are asked before somebody who has given no good answer.
const FAILED_TIME: Duration = Duration::from_secs(30);

/// Messages are sent before batches.
const MESSAGES_PRIORITY: i32 = 2;
const QUESTIONS_PRIORITY: i32 = 1;

/// Most bytes of one read.
const READ_BYTES_MAX: usize = 64 << 10;

/// What dialling takes.
pub(super) struct Dialling {
    pub(super) endpoint: Rc<Endpoint>,
    pub(super) identity: Identity,
    pub(super) crypto: Arc<tls::CryptoProvider>,
    /// How others reach this node.
    pub(super) ticket: Ticket,
    pub(super) chain: ChainId,
}

/// All of them.
pub(super) struct Links {
    dialling: Rc<Dialling>,
    links: RefCell<ByKey<Rc<Link>>>,
    validator: RefCell<Weak<Validator>>,
    /// Those of the configuration.
    configured: BTreeSet<NodeKey>,
    /// How those are reached who have greeted and are connected, whether they are validators or not.
    greeted: RefCell<ByKey<Ticket>>,
    /// How those are reached that others have told of.
    told: RefCell<ByKey<Ticket>>,
    counters: Arc<LedgerCounters>,
}

/// To one validator.
struct Link {
    key: NodeKey,
    /// Of the configuration: a way there, whatever it says itself.
    configured: Vec<SocketAddr>,
    /// Where to try, in order.
    addresses: RefCell<Vec<SocketAddr>>,
    messages: Queue,
    batches: Queue,
    connection: RefCell<Option<Connection>>,
    /// When it has last left a question without a good answer.
    failed: Cell<Option<Instant>>,
    task: RefCell<Option<Task<()>>>,
}

/// What is to be written.
#[derive(Default)]
struct Queue {
    waiting: RefCell<VecDeque<Bytes>>,
    bytes: Cell<usize>,
    came: Notify,
}

impl Queue {
    fn push(&self, bytes: Bytes) {
        self.bytes.set(self.bytes.get() + bytes.len());
        self.waiting.borrow_mut().push_back(bytes);
        self.came.notify();
    }

    fn pop(&self) -> Option<Bytes> {
        let bytes = self.waiting.borrow_mut().pop_front()?;
        self.bytes.set(self.bytes.get() - bytes.len());
        Some(bytes)
    }
}

impl Links {
    pub(super) fn new(dialling: Dialling, peers: &[Ticket], counters: Arc<LedgerCounters>) -> Self {
        let this = Self {
            dialling: Rc::new(dialling),
            links: RefCell::default(),
            validator: RefCell::default(),
            configured: peers.iter().map(|peer| peer.node).collect(),
            greeted: RefCell::default(),
            told: RefCell::default(),
            counters,
        };
        peers.iter().for_each(|peer| this.add(peer, &peer.addresses));
        this
    }

    /// Whether the configuration names it.
    pub(super) fn names(&self, key: &NodeKey) -> bool {
        self.configured.contains(key)
    }

    /// From now on connections are made and kept.
    pub(super) fn start(&self, validator: &Rc<Validator>) {
        *self.validator.borrow_mut() = Rc::downgrade(validator);
        for link in self.links.borrow().values() {
            self.keep(link);
        }
    }

    /// Somebody to be connected to, or another address of theirs.
    fn add(&self, ticket: &Ticket, configured: &[SocketAddr]) {
        if ticket.node == self.dialling.identity.public() || ticket.addresses.is_empty() {
            return;
        }
        if let Some(link) = self.links.borrow().get(&ticket.node) {
            // What it says itself may be newer, or be true only where it is.
            let mut addresses = ticket.addresses.clone();
            addresses.extend(link.configured.iter().filter(|address| !ticket.addresses.contains(address)));
            *link.addresses.borrow_mut() = addresses;
            return;
        }
        let link = Rc::new(Link {
            key: ticket.node,
            configured: configured.to_vec(),
            addresses: RefCell::new(ticket.addresses.clone()),
            messages: Queue::default(),
            batches: Queue::default(),
            connection: RefCell::default(),
            failed: Cell::default(),
            task: RefCell::default(),
        });
        self.links.borrow_mut().insert(ticket.node, link.clone());
        if self.validator.borrow().upgrade().is_some() {
            self.keep(&link);
        }
    }

    /// Somebody says how it is reached, and has proven to be itself. That is known as long as it is connected.
    pub(super) fn greeted(&self, ticket: &Ticket) {
        self.greeted.borrow_mut().insert(ticket.node, ticket.clone());
        if self.links.borrow().contains_key(&ticket.node) {
            self.add(ticket, &[]);
        }
    }

    /// The last connection of somebody has ended.
    pub(super) fn left(&self, key: &NodeKey) {
        self.greeted.borrow_mut().remove(key);
    }

    /// Others say how somebody is reached. No more are remembered than there can be validators, several times over; those who are none go first.
    pub(super) fn told(&self, ticket: &Ticket, validators: &ValidatorSet) {
        let mut told = self.told.borrow_mut();
        if told.len() >= TOLD_MAX && !told.contains_key(&ticket.node) {
            let Some(other) = told.keys().find(|key| !validators.contains(key)).copied() else { return };
            told.remove(&other);
        }
        told.insert(ticket.node, ticket.clone());
    }

    /// Connects to those of a set that it knows how to reach.
    pub(super) fn reach(&self, validators: &ValidatorSet) {
        for key in validators.iter() {
            if self.links.borrow().contains_key(key) {
                continue;
            }
            let ticket = self.greeted.borrow().get(key).cloned();
            let ticket = ticket.or_else(|| self.told.borrow().get(key).cloned());
            ticket.into_iter().for_each(|ticket| self.add(&ticket, &[]));
        }
    }

    /// Lets go of those who vote no more, unless the configuration names them.
    pub(super) fn leave(&self, vote: impl Fn(&NodeKey) -> bool) {
        let gone = |key: &NodeKey, _: &mut Rc<Link>| !vote(key) && !self.configured.contains(key);
        let gone: Vec<_> = self.links.borrow_mut().extract_if(.., gone).collect();
        for (key, link) in gone {
            tracing::info!(validator = %key, "votes no more: it is not dialled any more");
            link.task.take();
            if let Some(connection) = link.connection.take() {
                connection.close(crate::codes::DONE, b"you vote no more");
                self.counters.connected.sub(1);
            }
        }
    }

    /// How those of a set are reached, as far as it knows, itself included.
    pub(super) fn tickets(&self, validators: &ValidatorSet) -> Vec<Ticket> {
        let links = self.links.borrow();
        let own = std::iter::once(&self.dialling.ticket).filter(|own| validators.contains(&own.node)).cloned();
        let others = validators.iter().filter_map(|key| {
            let addresses = links.get(key)?.addresses.borrow().clone();
            Some(Ticket { node: *key, addresses, hash: None })
        });
        own.chain(others).collect()
    }

    fn keep(&self, link: &Rc<Link>) {
        let task = spawn_local(keep(self.dialling.clone(), link.clone(), self.validator.borrow().clone()));
        *link.task.borrow_mut() = Some(task);
    }

    /// Ends all of them.
    pub(super) fn stop(&self) {
        for link in self.links.take().into_values() {
            link.task.take();
            if let Some(connection) = link.connection.take() {
                connection.close(crate::codes::SHUTTING_DOWN, b"the node is stopping");
            }
        }
    }

    /// Who this node is connected to.
    pub(super) fn connected(&self) -> Vec<NodeKey> {
        let links = self.links.borrow();
        links.values().filter(|link| link.connection.borrow().is_some()).map(|link| link.key).collect()
    }

    /// All, in an order that begins with `first`, or with anybody.
    pub(super) fn some_first(&self, first: Option<NodeKey>) -> Vec<NodeKey> {
        let mut keys: Vec<NodeKey> = self.links.borrow().keys().copied().collect();
        let mut random = [0; 4];
        if first.is_none() && !keys.is_empty() && metanode_shard::fill_random(&mut random).is_ok() {
            let count = keys.len();
            keys.rotate_left(u32::from_le_bytes(random) as usize % count);
        }
        keys.sort_by_key(|key| (self.has_failed(key), Some(*key) != first));
        keys
    }

    /// These, but those who have failed lately last.
    pub(super) fn best_first(&self, mut keys: Vec<NodeKey>) -> Vec<NodeKey> {
        keys.sort_by_key(|key| self.has_failed(key));
        keys
    }

    fn has_failed(&self, key: &NodeKey) -> bool {
        let links = self.links.borrow();
        let since = links.get(key).and_then(|link| link.failed.get());
        since.is_some_and(|since| now() - since < FAILED_TIME)
    }

    /// It has given no good answer: others are asked first for a while.
    pub(super) fn failed(&self, key: &NodeKey) {
        if let Some(link) = self.links.borrow().get(key) {
            link.failed.set(Some(now()));
        }
    }

    /// Sends an encoded message to one, or to all.
    pub(super) fn send(&self, to: Option<NodeKey>, message: &Bytes) {
        let links = self.links.borrow();
        let receivers = links.values().filter(|link| to.is_none_or(|key| key == link.key));
        let count = receivers.inspect(|link| link.send(message.clone())).count() as u64;
        self.counters.messages.add(count);
        self.counters.message_bytes.add(count * message.len() as u64);
    }

    /// Sends a batch to all.
    pub(super) fn send_batch(&self, batch: &Bytes) {
        for link in self.links.borrow().values() {
            // Who is not connected asks for it once a block names it: an old one is of no use to anybody.
            if link.connection.borrow().is_some() && link.batches.bytes.get() + batch.len() <= BATCHES_BYTES_MAX {
                link.batches.push(batch.clone());
            }
        }
    }

    /// A final block of somebody's.
    pub(super) async fn block(&self, key: &NodeKey, height: Height, wait: Duration) -> Option<Message<Block>> {
        let question = BlockGet { height: height.0, wait_ms: wait.as_millis() as u32 };
        let frame = self.ask(key, &question, wait + ANSWER_TIME_MAX).await?;
        let reply = frame.message::<BlockReply>().ok()?;
        let block = Block::decode(&reply.block).ok()?;
        let certificate = decode_certificate(&reply.certificate).ok()?;
        Some(Message::NewBlock(Box::new((block, certificate))))
    }

    /// A batch of somebody's.
    pub(super) async fn batch(&self, key: &NodeKey, digest: Hash) -> Option<Bytes> {
        let frame = self.ask(key, &BatchGet { digest: digest.0 }, ANSWER_TIME_MAX).await?;
        (frame.kind == Data::KIND).then_some(frame.body)
    }

    async fn ask<M: metanode_wire::Message>(&self, key: &NodeKey, question: &M, time: Duration) -> Option<Frame> {
        let link = self.links.borrow().get(key).cloned()?;
        let connection = link.connection.borrow().clone()?;
        let asking = async {
            let (mut send, mut recv) = connection.open_bi().await.ok()?;
            send.set_priority(QUESTIONS_PRIORITY);
            let mut out = Vec::new();
            encode(&mut out, 0, question, 0);
            send.write(out.into()).await.ok()?;
            send.finish().ok()?;
            read_frame(&mut recv, &mut FrameReader::new(FrameLimits::default())).await
        };
        let Some(frame) = timeout(time, asking).await.ok().flatten() else {
            link.failed.set(Some(now()));
            return None;
        };
        if frame.kind == Kind::Refused {
            let refused = frame.message::<Refused>().ok().map(metanode_wire::Refusal::from_message);
            tracing::debug!(%key, ?refused, "a question was refused");
            return None;
        }
        Some(frame)
    }
}

impl Link {
    fn send(&self, message: Bytes) {
        while self.messages.bytes.get() + message.len() > MESSAGES_BYTES_MAX && self.messages.pop().is_some() {}
        self.messages.push(message);
    }
}

/// The next frame of a stream; `None` at its end, or when it is none.
pub(super) async fn read_frame(recv: &mut RecvStream, reader: &mut FrameReader) -> Option<Frame> {
    loop {
        match reader.next_frame() {
            Ok(Some(frame)) => return Some(frame),
            Ok(None) => reader.compact(),
            Err(error) => {
                tracing::debug!("a validator's stream: {error}");
                return None;
            }
        }
        reader.push(recv.read_chunk(READ_BYTES_MAX).await.ok()??);
    }
}

/// Connects, again and again.
async fn keep(dialling: Rc<Dialling>, link: Rc<Link>, validator: Weak<Validator>) {
    let (least, most) = DIAL_PAUSES;
    let (mut pause, mut time) = (least, DIAL_TIMES.0);
    loop {
        let addresses = link.addresses.borrow().clone();
        for address in addresses {
            match timeout(time, greet(&dialling, &link.key, address)).await {
                Ok(Ok((connection, send, height, peers))) => {
                    if let Some(validator) = validator.upgrade() {
                        validator.welcomed(link.key, height);
                        let latest = validator.replica.borrow().chain().system().latest().clone();
                        peers.iter().for_each(|peer| validator.links.told(peer, &latest));
                        validator.reach_validators();
                    }
                    (pause, time) = (least, DIAL_TIMES.0);
                    tracing::info!(validator = %link.key, %address, "connected");
                    serve(&link, connection, send, &validator).await;
                    tracing::info!(validator = %link.key, "disconnected");
                }
                Ok(Err(why)) => tracing::debug!(validator = %link.key, %address, "not connected: {why}"),
                Err(_) => tracing::debug!(validator = %link.key, %address, "no answer in time"),
            }
        }
        sleep(pause).await;
        (pause, time) = ((pause * 2).min(most), (time * 2).min(DIAL_TIMES.1));
    }
}

/// A connection that is greeted, its stream for messages, how far the chain is there, and how others are reached.
async fn greet(
    dialling: &Dialling,
    key: &NodeKey,
    address: SocketAddr,
) -> Result<(Connection, SendStream, Height, Vec<Ticket>), String> {
    let config = tls::client_with(dialling.crypto.clone(), &dialling.identity, *key, &[tls::ALPN_BPI]);
    let config = config.map_err(|error| error.to_string())?;
    let connected = dialling.endpoint.connect(Arc::new(config), address, tls::SERVER_NAME).await;
    let connection = connected.map_err(|error| error.to_string())?;
    let unless_greeted = CloseUnlessGreeted(Some(connection.clone()));
    let greeting = async {
        let (mut send, mut recv) = connection.open_bi().await.map_err(|error| error.to_string())?;
        send.set_priority(MESSAGES_PRIORITY);
        let mut out = Vec::new();
        encode(&mut out, 0, &PeerHello { chain: dialling.chain.0, ticket: dialling.ticket.to_string() }, 0);
        send.write(out.into()).await.map_err(|error| error.to_string())?;
        let mut reader = FrameReader::new(FrameLimits::default());
        let frame = read_frame(&mut recv, &mut reader).await.ok_or("no greeting came back")?;
        match frame.kind {
            Kind::PeerWelcome => match frame.message::<PeerWelcome>() {
                Ok(welcome) => {
                    let peers = welcome.peers.iter().take(VALIDATORS_MAX).filter_map(|peer| peer.as_str().parse().ok());
                    Ok((send, Height(welcome.height.to_native()), peers.collect::<Vec<Ticket>>()))
                }
                Err(error) => Err(error.to_string()),
            },
            Kind::Refused => {
                let refused = frame.message::<Refused>().map_err(|error| error.to_string())?;
                Err(metanode_wire::Refusal::from_message(refused).to_string())
            }
            other => Err(format!("greeted by {other:?}")),
        }
    };
    match greeting.await {
        Ok((send, height, peers)) => {
            unless_greeted.keep();
            Ok((connection, send, height, peers))
        }
        Err(why) => Err(why),
    }
}

/// Closes a connection that was given up in the middle of its greeting: it would live on by itself.
struct CloseUnlessGreeted(Option<Connection>);

impl CloseUnlessGreeted {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for CloseUnlessGreeted {
    fn drop(&mut self) {
        if let Some(connection) = &self.0 {
            connection.close(crate::codes::DONE, b"");
        }
    }
}

/// Writes what is to be written, until the connection ends.
async fn serve(link: &Rc<Link>, connection: Connection, messages: SendStream, validator: &Weak<Validator>) {
    // What was said while nobody listened is said again, as far as it still matters.
    while link.messages.pop().is_some() {}
    while link.batches.pop().is_some() {}
    *link.connection.borrow_mut() = Some(connection.clone());
    let counted = validator.upgrade().map(|validator| validator.counters.clone());
    if let Some(counters) = &counted {
        counters.connected.add(1);
    }
    let (speaking, of_connection) = (link.clone(), connection.clone());
    let of_messages = spawn_local(async move {
        write(speaking, messages, |link| &link.messages, message_frame).await;
        of_connection.close(crate::codes::DONE, b"the other side does not listen"); // and is dialled again
    });
    let batches = connection.clone();
    let writing = link.clone();
    let of_batches = spawn_local(async move {
        if let Ok((send, _recv)) = batches.open_bi().await {
            write(writing, send, |link| &link.batches, batch_frame).await;
        }
        batches.close(crate::codes::DONE, b"the other side does not listen");
    });
    if let Some(validator) = validator.upgrade() {
        validator.act(|replica, now| replica.connected(now, link.key));
    }
    connection.closed().await;
    *link.connection.borrow_mut() = None;
    if let Some(counters) = &counted {
        counters.connected.sub(1);
    }
    drop((of_messages, of_batches));
}

fn message_frame(out: &mut Vec<u8>, bytes: usize) {
    encode(out, 0, &PeerMessage {}, bytes);
}

fn batch_frame(out: &mut Vec<u8>, bytes: usize) {
    encode(out, 0, &PeerBatch {}, bytes);
}

async fn write(link: Rc<Link>, mut send: SendStream, queue: impl Fn(&Link) -> &Queue, frame: fn(&mut Vec<u8>, usize)) {
    loop {
        let Some(bytes) = queue(&link).pop() else {
            queue(&link).came.wait().await;
            continue;
        };
        let mut head = Vec::new();
        frame(&mut head, bytes.len());
        if send.write_chunks(&mut [head.into(), bytes]).await.is_err() {
            return; // the connection has ended, or ends
        }
    }
}
