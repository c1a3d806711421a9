//! Connections that validators, and those who follow the chain, have opened to this node.

use std::{cell::Cell, rc::Rc, time::Duration};

use bytes::Bytes;
use metanode_ibft::{Height, Message};
use metanode_ledger::Block;
use metanode_quic::{Connection, RecvStream, SendStream};
use metanode_shard::{now, spawn_local, timeout, yield_now};
use metanode_types::{Hash, NodeKey};
use metanode_wire::{
    Frame, FrameLimits, FrameReader, Kind, Refusal, RefusalCode, Ticket, encode,
    message::{BatchGet, BlockGet, BlockReply, Data, PeerHello, PeerWelcome},
};

use super::{
    batches,
    blocks::whole,
    links::read_frame,
    route::LedgerRoute,
    validator::{Detach as _, Progress, Validator},
};
use crate::{codes, gate::Gate, session::READER_WINDOW_BYTES};

/// Bytes that a validator may have on the way here: sixteen batches.
const VALIDATOR_WINDOW_BYTES: u64 = 4 << 20;

/// Batches of one validator that are checked and stored at a time.
const BATCHES_MAX: usize = 4;

/// Connections of one key: one that is lost here and not yet there, one that takes its place, and some to spare.
const CONNECTIONS_PER_KEY_MAX: usize = 4;

/// Keys that are no validators' and have connections: those who follow the chain. Each may have some megabytes of answers on the way.
const STRANGERS_MAX: usize = 64;

/// Bytes of a frame's head that is taken from strangers: greetings and questions.
const STRANGERS_HEAD_BYTES_MAX: usize = 4 << 10;

/// How long somebody may wait for a block that is not there yet.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(20);

/// Pause before a node that is not ready is asked again.
const NOT_READY_RETRY_MS: u32 = 100;

/// A connection, as its streams share it.
struct Peer {
    validator: Rc<Validator>,
    connection: Connection,
    key: NodeKey,
    /// It is of the chain.
    is_greeted: Cell<bool>,
    /// It has been seen to be one that may say things.
    is_known: Cell<bool>,
    may_read: bool,
    batches: Gate,
    /// How many batches have come, and how many of them were taken or not.
    came: Cell<u64>,
    taken: Progress,
}

/// A connection that counts.
struct Member {
    validator: Rc<Validator>,
    key: NodeKey,
    id: u64,
}

impl Member {
    /// One more connection of a key: `None` when it has enough, or is a stranger's and there are enough of those.
    fn join(validator: &Rc<Validator>, key: NodeKey, connection: &Connection) -> Option<Self> {
        let mut incoming = validator.incoming.borrow_mut();
        let strangers = incoming.keys().filter(|key| !is_known(validator, key)).count();
        let is_stranger = !is_known(validator, &key);
        let of_key = incoming.get(&key).map_or(0, Vec::len);
        if is_stranger && of_key == 0 && strangers >= STRANGERS_MAX {
            return None;
        }
        let all = incoming.entry(key).or_default();
        if all.len() == CONNECTIONS_PER_KEY_MAX {
            // The newest is the one that its owner uses.
            all.remove(0).close(codes::BUSY, b"a newer connection of this key takes its place");
        }
        all.push(connection.clone());
        Some(Self { validator: validator.clone(), key, id: connection.id() })
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut incoming = self.validator.incoming.borrow_mut();
        if let Some(all) = incoming.get_mut(&self.key) {
            all.retain(|connection| connection.id() != self.id);
            if all.is_empty() {
                incoming.remove(&self.key);
                self.validator.links.left(&self.key);
            }
        }
    }
}

/// Who votes now or soon, or is named in the configuration.
fn is_known(validator: &Validator, key: &NodeKey) -> bool {
    validator.links.names(key) || validator.replica.borrow().chain().system().latest().contains(key)
}

impl Peer {
    /// Who votes now or soon, or is named in the configuration, may say things here.
    fn may_speak(&self) -> bool {
        let may = self.is_greeted.get() && is_known(&self.validator, &self.key);
        if may && !self.is_known.replace(true) {
            self.connection.set_receive_window(VALIDATOR_WINDOW_BYTES);
        }
        may
    }
}

/// Serves a connection until it ends.
pub(crate) async fn serve(route: Rc<LedgerRoute>, connection: Connection, may_read: bool) {
    let (Some(key), Some(validator)) = (connection.peer_key(), route.here()) else {
        let why = "the ledger is not ready, is not here, or on another shard";
        return connection.close(codes::BUSY, why.as_bytes());
    };
    let Some(_member) = Member::join(&validator, key, &connection) else {
        return connection.close(codes::BUSY, b"too many connections of this key, or of strangers");
    };
    connection.set_receive_window(READER_WINDOW_BYTES);
    let peer = Rc::new(Peer {
        validator,
        connection: connection.clone(),
        key,
        is_greeted: Cell::new(false),
        is_known: Cell::new(false),
        may_read,
        batches: Gate::new(BATCHES_MAX),
        came: Cell::new(0),
        taken: Progress::default(),
    });
    while let Ok((send, recv)) = connection.accept_bi().await {
        spawn_local(stream(peer.clone(), send, recv)).detach_quietly();
    }
}

async fn stream(peer: Rc<Peer>, mut send: SendStream, mut recv: RecvStream) {
    // What strangers have to say is short.
    let limits = match is_known(&peer.validator, &peer.key) {
        true => FrameLimits::default(),
        false => FrameLimits { head_bytes_max: STRANGERS_HEAD_BYTES_MAX, body_bytes_max: 0 },
    };
    let mut reader = FrameReader::new(limits);
    while let Some(frame) = read_frame(&mut recv, &mut reader).await {
        let mut out = Vec::new();
        let answer = match frame.kind {
            Kind::PeerHello => hello(&peer, &frame, &mut out).map(|()| Bytes::new()),
            Kind::PeerMessage if peer.may_speak() => {
                message(&peer, &frame);
                yield_now().await; // others' turn: it may go on for a whole window
                continue;
            }
            Kind::PeerBatch if peer.may_speak() => {
                let place = peer.batches.enter().await;
                let (peer, body, number) = (peer.clone(), frame.body, peer.came.get());
                peer.came.set(number + 1);
                spawn_local(async move {
                    batches::came(&peer.validator, body, peer.key, number, &peer.taken).await;
                    drop(place);
                })
                .detach_quietly();
                continue;
            }
            // Who is not known to vote yet, and perhaps will soon: it says it again. An answer would find nobody who reads it.
            Kind::PeerMessage | Kind::PeerBatch if peer.is_greeted.get() => continue,
            Kind::BlockGet | Kind::BatchGet if !(peer.may_read || peer.is_greeted.get()) => {
                Err(RefusalCode::Forbidden.into())
            }
            Kind::BlockGet => block(&peer, &frame, &mut out).await.map(|()| Bytes::new()),
            Kind::BatchGet => batch(&peer, &frame, &mut out).await,
            other => {
                Err(Refusal::new(RefusalCode::Forbidden, format!("{other:?} before a greeting, or from a stranger")))
            }
        };
        let body = match answer {
            Ok(body) => body,
            Err(refusal) => {
                out.clear();
                encode(&mut out, frame.request, &refusal.to_message(), 0);
                Bytes::new()
            }
        };
        if send.write_chunks(&mut [out.into(), body]).await.is_err() {
            return;
        }
    }
    send.finish().ok(); // the connection may have ended
}

fn malformed(error: impl std::fmt::Display) -> Refusal {
    Refusal::new(RefusalCode::Malformed, error.to_string())
}

fn hello(peer: &Peer, frame: &Frame, out: &mut Vec<u8>) -> Result<(), Refusal> {
    let hello = frame.message::<PeerHello>().map_err(malformed)?;
    let this = &peer.validator;
    if hello.chain != this.chain.0 {
        let (mine, other) = (Hash(this.chain.0), Hash(hello.chain));
        tracing::warn!(peer = %peer.key, "refused: it is of the chain {other}");
        let why = format!("this node is of the chain {mine}, not of {other}: the genesis files differ");
        return Err(Refusal::new(RefusalCode::Forbidden, why));
    }
    if !this.is_sound() {
        return Err(Refusal::new(RefusalCode::Busy, "the ledger of this node has stopped"));
    }
    let ticket: Ticket = hello.ticket.as_str().parse().map_err(malformed)?;
    if ticket.node != peer.key {
        return Err(malformed("the ticket is of another node"));
    }
    peer.is_greeted.set(true);
    let latest = this.replica.borrow().chain().system().latest().clone();
    this.links.greeted(&ticket);
    this.links.reach(&latest);
    let peers = this.links.tickets(&latest).iter().map(Ticket::to_string).collect();
    encode(out, frame.request, &PeerWelcome { height: this.decided.get().0, peers }, 0);
    Ok(())
}

fn message(peer: &Peer, frame: &Frame) {
    match metanode_codec::decode_message(&frame.body) {
        Ok(message) if speaks_for_itself(&message, &peer.key) => {
            peer.validator.act(|replica, now| replica.message(now, message));
        }
        Ok(message) => tracing::warn!(peer = %peer.key, signer = ?message.signer(), "a message of somebody else's"),
        Err(error) => tracing::warn!(peer = %peer.key, "a message that is none: {error}"),
    }
}

/// Validators say their own things, and pass final blocks on.
fn speaks_for_itself(message: &Message<Block>, peer: &NodeKey) -> bool {
    message.signer().is_none_or(|signer| signer == *peer)
}

/// A final block, once it is there.
pub(super) async fn block_bytes(this: &Validator, height: Height, wait: Duration) -> Result<BlockReply, Refusal> {
    let deadline = now() + wait.min(WAIT_MAX);
    _ = timeout(deadline - now(), this.stored.reach(height)).await; // there or not
    let address = super::blocks::address_of(this, height).ok_or(RefusalCode::NotFound)?;
    let bytes = whole(&this.store, address).await.map_err(|error| crate::reply::refusal_of(&error))?;
    let (block, certificate) = super::blocks::split(&bytes).map_err(malformed)?;
    Ok(BlockReply { block: block.to_vec(), certificate: certificate.to_vec() })
}

async fn block(peer: &Peer, frame: &Frame, out: &mut Vec<u8>) -> Result<(), Refusal> {
    let get = frame.message::<BlockGet>().map_err(malformed)?;
    let (height, wait) = (Height(get.height.to_native()), Duration::from_millis(get.wait_ms.to_native().into()));
    encode(out, frame.request, &block_bytes(&peer.validator, height, wait).await?, 0);
    Ok(())
}

async fn batch(peer: &Peer, frame: &Frame, out: &mut Vec<u8>) -> Result<Bytes, Refusal> {
    let digest = Hash(frame.message::<BatchGet>().map_err(malformed)?.digest);
    let this = &peer.validator;
    let cached = this.batches.borrow().get(&digest).map(|batch| batch.bytes().clone());
    let bytes = match cached {
        Some(bytes) => bytes,
        None => {
            let bytes = whole(&this.store, digest).await.map_err(|error| crate::reply::refusal_of(&error))?;
            // The store has other things too, which are not asked for here.
            this.checks.decode(bytes.clone()).await.map_err(|_| RefusalCode::NotFound)?;
            bytes
        }
    };
    encode(out, frame.request, &Data { size_bytes: bytes.len() as u64 }, bytes.len());
    Ok(bytes)
}

/// What is said while the chain is read.
pub(super) fn not_ready() -> Refusal {
    Refusal { detail: "the ledger of this node reads its chain".to_owned(), ..Refusal::busy(NOT_READY_RETRY_MS) }
}
