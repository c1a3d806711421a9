//! Transfers that take a stream for themselves: any range of any blob out, any blob in.

use std::{collections::VecDeque, io, pin::pin, time::Duration};

use bytes::{Buf as _, Bytes};
use metanode_blob::tree::{SliceDecoder, SliceError};
use metanode_types::{ByteRange, Hash, limits::CHUNK_BYTES};
use metanode_wire::{
    Frame, FrameError, FrameLimits, FrameReader, Kind, Refusal, RefusalCode, encode,
    message::{BulkBegin, Chunk, GetBulk, Have, HaveReply, KnownChunk, PutBulk, PutEnd, Stored as StoredMessage},
};
use tokio::time::{Instant, timeout};

use crate::{
    BlobSink, BlobSource, ClientError, PutOptions, Stored,
    link::{Link, Transfer, busy_pause},
};

/// Pieces taken from a stream in one go.
const PIECES_PER_READ: usize = 64;

/// How long to wait for the reason after a node has stopped a transfer.
const REASON_TIMEOUT: Duration = Duration::from_secs(2);

/// What `get` brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// Bytes of the whole blob. Proven when the range reached its end, the node's word otherwise.
    pub size_bytes: u64,
    /// Bytes that went into the sink.
    pub taken_bytes: u64,
}

/// Fetches a range into `sink`; each byte is verified before the sink sees it.
pub(crate) async fn get(
    link: &Link,
    hash: Hash,
    range: ByteRange,
    sink: &mut impl BlobSink,
    busy_patience: Duration,
) -> Result<Fetched, ClientError> {
    let begun = Instant::now();
    loop {
        match get_once(link, hash, range, sink).await {
            // Refused before the sink saw anything, so asking again is safe.
            Err((ClientError::Refused(refusal), 0))
                if refusal.code == RefusalCode::Busy && begun.elapsed() < busy_patience =>
            {
                tokio::time::sleep(busy_pause(&refusal)).await;
            }
            result => return result.map_err(|(error, _)| error),
        }
    }
}

/// As [`get`]; an error says how much the sink has taken already.
async fn get_once(
    link: &Link,
    hash: Hash,
    range: ByteRange,
    sink: &mut impl BlobSink,
) -> Result<Fetched, (ClientError, u64)> {
    let begin = |error: ClientError| (error, 0);
    let (mut send, recv, _transfer) = open(link).await.map_err(begin)?;
    let mut request = Vec::new();
    encode(&mut request, 0, &GetBulk { hash: hash.0, offset: range.offset, length: range.length }, 0);
    let asked = timeout(link.request_timeout, send.write_all(&request)).await;
    let asked = asked.map_err(|_elapsed| begin(ClientError::Timeout("asking")))?;
    asked.map_err(|error| begin(error.into()))?;
    let _ = send.finish(); // an error means that the node has answered already
    let mut incoming = Incoming::new(recv, link.request_timeout);
    let frame = incoming.frame(link).await.map_err(begin)?;
    if frame.kind == Kind::Refused {
        return Err(begin(link.refusal(&frame).map_err(begin)?.into()));
    }
    let size_bytes = link.read::<BulkBegin>(&frame).map_err(begin)?.size_bytes.to_native();
    let mut decoder = SliceDecoder::new(hash, size_bytes, range).map_err(|error| begin(slice_error(hash, error)))?;
    let mut taken_bytes = 0;
    let mut pieces = incoming.into_pieces();
    let mut scratch = Vec::new();
    loop {
        let length = decoder.expects();
        if length == 0 {
            break;
        }
        let item = match pieces.item(length, &mut scratch).await {
            Ok(Some(item)) => item,
            Ok(None) => return Err((ClientError::ConnectionLost("the transfer was cut short".into()), taken_bytes)),
            Err(error) => return Err((error, taken_bytes)),
        };
        let leaf = decoder.push(item.as_ref()).map_err(|error| (slice_error(hash, error), taken_bytes))?;
        if let Some(leaf) = leaf.filter(|leaf| leaf.take > 0) {
            let wanted = &item.as_ref()[leaf.skip..leaf.skip + leaf.take];
            sink.take(leaf.offset, wanted).await.map_err(|error| (ClientError::Stream(error), taken_bytes))?;
            taken_bytes += leaf.take as u64;
        }
    }
    match pieces.is_at_end().await {
        Ok(true) => Ok(Fetched { size_bytes, taken_bytes }),
        Ok(false) => Err((ClientError::HashMismatch(hash), taken_bytes)),
        Err(error) => Err((error, taken_bytes)),
    }
}

fn slice_error(hash: Hash, error: SliceError) -> ClientError {
    match error {
        SliceError::BadRange { size_bytes } => {
            Refusal::new(RefusalCode::BadRange, format!("the blob has {size_bytes} bytes")).into()
        }
        // Nothing of such a size has the hash either.
        SliceError::HashMismatch { .. } | SliceError::TooLarge { .. } | SliceError::Length => {
            ClientError::HashMismatch(hash)
        }
    }
}

/// A stream for a transfer. The node permits a limited number of streams; further transfers wait here for one to end, however long that
/// takes. If there is none that could end, the node permits none.
async fn open(link: &Link) -> Result<(quinn::SendStream, quinn::RecvStream, Transfer<'_>), ClientError> {
    let mut opening = pin!(link.connection().open_bi());
    loop {
        match timeout(link.request_timeout, &mut opening).await {
            Ok(opened) => {
                let (send, recv) = opened?;
                return Ok((send, recv, link.transfer()));
            }
            Err(_elapsed) if link.has_transfers() => {}
            Err(_elapsed) => return Err(ClientError::Timeout("waiting for a stream")),
        }
    }
}

/// The receiving side of a stream while frames come.
struct Incoming {
    recv: quinn::RecvStream,
    reader: FrameReader,
    patience: Duration,
}

impl Incoming {
    fn new(recv: quinn::RecvStream, patience: Duration) -> Self {
        Self { recv, reader: FrameReader::new(FrameLimits::default()), patience }
    }

    async fn frame(&mut self, link: &Link) -> Result<Frame, ClientError> {
        let patience = self.patience;
        match timeout(patience, self.frame_whenever(link)).await {
            Ok(frame) => frame,
            Err(_elapsed) => Err(ClientError::Timeout("waiting for an answer")),
        }
    }

    async fn frame_whenever(&mut self, link: &Link) -> Result<Frame, ClientError> {
        loop {
            if let Some(frame) = self.reader.next_frame().map_err(|error| link.protocol_error(error))? {
                return Ok(frame);
            }
            match self.recv.read_chunk(usize::MAX, true).await? {
                Some(chunk) => self.reader.push(chunk.bytes),
                None => {
                    return Err(ClientError::ConnectionLost("the node ended the transfer without an answer".into()));
                }
            }
        }
    }

    fn into_pieces(self) -> Pieces {
        let held = self.reader.into_rest();
        let held_bytes = held.iter().map(Bytes::len).sum();
        Pieces { recv: self.recv, held, held_bytes, patience: self.patience }
    }
}

/// The receiving side of a stream once unframed bytes come.
struct Pieces {
    recv: quinn::RecvStream,
    held: VecDeque<Bytes>,
    held_bytes: usize,
    patience: Duration,
}

/// A run of bytes of the stream: where it arrived when that is in one piece, gathered otherwise.
enum Item<'a> {
    Whole(Bytes),
    Gathered(&'a [u8]),
}

impl AsRef<[u8]> for Item<'_> {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Whole(bytes) => bytes,
            Self::Gathered(bytes) => bytes,
        }
    }
}

impl Pieces {
    /// The next `length` bytes; `None` when the stream ends before.
    async fn item<'a>(&mut self, length: usize, scratch: &'a mut Vec<u8>) -> Result<Option<Item<'a>>, ClientError> {
        while self.held_bytes < length {
            if !self.read().await? {
                return Ok(None);
            }
        }
        self.held_bytes -= length;
        let first = self.held.front_mut().expect("held_bytes counts the pieces");
        if first.len() >= length {
            let item = first.split_to(length);
            if first.is_empty() {
                self.held.pop_front();
            }
            return Ok(Some(Item::Whole(item)));
        }
        scratch.clear();
        while scratch.len() < length {
            let piece = self.held.front_mut().expect("held_bytes counts the pieces");
            let n = piece.len().min(length - scratch.len());
            scratch.extend_from_slice(&piece[..n]);
            piece.advance(n);
            if piece.is_empty() {
                self.held.pop_front();
            }
        }
        Ok(Some(Item::Gathered(scratch)))
    }

    async fn is_at_end(&mut self) -> Result<bool, ClientError> {
        Ok(self.held_bytes == 0 && !self.read().await?)
    }

    /// Takes what has arrived; `false` at the end of the stream.
    async fn read(&mut self) -> Result<bool, ClientError> {
        let mut pieces = [const { Bytes::new() }; PIECES_PER_READ];
        let read = timeout(self.patience, self.recv.read_chunks(&mut pieces)).await;
        match read.map_err(|_elapsed| ClientError::Timeout("receiving"))?? {
            Some(count) => {
                for piece in &mut pieces[..count] {
                    self.held_bytes += piece.len();
                    self.held.push_back(std::mem::take(piece));
                }
                Ok(true)
            }
            None => Ok(false),
        }
    }
}

/// What an upload does about chunks that the node has already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resume {
    /// Sends them all the same.
    No,
    /// Asks for them first, and sends their names. One that has gone meanwhile ends the upload with `NotFound`; its caller begins anew.
    Ask,
}

/// Chunks asked about at once, and held in memory meanwhile: a round trip for each 4 MiB that is not sent.
const ASK_CHUNKS: usize = 16;

/// Stores what `source` gives, hashing it on the way.
pub(crate) async fn put(
    link: &Link,
    source: &mut impl BlobSource,
    size_bytes: Option<u64>,
    options: PutOptions,
    resume: Resume,
) -> Result<Stored, ClientError> {
    let (mut send, recv, _transfer) = open(link).await?;
    let mut incoming = Incoming::new(recv, link.request_timeout);
    let sent = {
        // A node may refuse before it has everything (too large, full): then sending the rest is a waste.
        let mut early = pin!(incoming.frame_whenever(link));
        let mut sending = pin!(send_all(link, &mut send, source, size_bytes, options, resume));
        tokio::select! {
            biased;
            frame = &mut early => Err(frame),
            sent = &mut sending => Ok(sent),
        }
    };
    let result = match sent {
        Err(frame) => match stored(link, &frame?) {
            Ok(_) => Err(link.protocol_error(FrameError::Unexpected(Kind::Stored))),
            Err(error) => Err(error),
        },
        Ok(Ok((hash, sent_bytes))) => {
            let stored = stored(link, &incoming.frame(link).await?)?;
            if stored.hash == hash && stored.size_bytes == sent_bytes {
                return Ok(stored);
            }
            Err(ClientError::HashMismatch(hash))
        }
        Ok(Err(SendError::Local(error))) => Err(ClientError::Stream(error)),
        Ok(Err(SendError::Asking(error))) => Err(error),
        Ok(Err(SendError::Slow)) => Err(ClientError::Timeout("sending")),
        Ok(Err(SendError::Remote(error))) => match timeout(REASON_TIMEOUT, incoming.frame_whenever(link)).await {
            // Stopped by the node: the refusal says why.
            Ok(Ok(frame)) => match stored(link, &frame) {
                Ok(_) => Err(link.protocol_error(FrameError::Unexpected(Kind::Stored))),
                Err(error) => Err(error),
            },
            _ => Err(error.into()),
        },
    };
    let _ = send.reset(0u32.into()); // nothing more comes; without this the node would see a clean end
    result
}

fn stored(link: &Link, frame: &Frame) -> Result<Stored, ClientError> {
    if frame.kind == Kind::Refused {
        return Err(link.refusal(frame)?.into());
    }
    let stored = link.read::<StoredMessage>(frame)?;
    Ok(Stored { hash: Hash(stored.hash), size_bytes: stored.size_bytes.to_native(), existed: stored.existed })
}

enum SendError {
    Local(io::Error),
    Asking(ClientError),
    Remote(quinn::WriteError),
    Slow,
}

async fn send_all(
    link: &Link,
    send: &mut quinn::SendStream,
    source: &mut impl BlobSource,
    size_bytes: Option<u64>,
    options: PutOptions,
    resume: Resume,
) -> Result<(Hash, u64), SendError> {
    let patience = link.request_timeout;
    let mut head = Vec::new();
    let begin = PutBulk { size_bytes, class: options.class as u8, kind: options.kind as u8, hold: options.hold };
    encode(&mut head, 0, &begin, 0);
    let mut hasher = blake3::Hasher::new();
    let mut sent_bytes = 0;
    let mut is_last = false;
    let mut asking = resume == Resume::Ask;
    let mut window: VecDeque<(Bytes, Option<Hash>)> = VecDeque::new();
    loop {
        if window.is_empty() {
            let chunks = if asking { ASK_CHUNKS } else { 1 };
            while window.len() < chunks
                && let Some(chunk) = source.next_chunk().await.map_err(SendError::Local)?
            {
                assert!(!is_last && !chunk.is_empty() && chunk.len() <= CHUNK_BYTES, "a source keeps its contract");
                is_last = chunk.len() < CHUNK_BYTES;
                window.push_back((chunk, None));
            }
            if asking {
                // Where nothing is known, nothing behind is: an upload stops somewhere, and so do questions.
                asking = mark_known(link, &mut window).await.map_err(SendError::Asking)?;
            }
        }
        let Some((chunk, known)) = window.pop_front() else { break };
        hasher.update(&chunk);
        sent_bytes += chunk.len() as u64;
        let written = if let Some(name) = known {
            encode(&mut head, 0, &KnownChunk { name: name.0 }, 0);
            let mut pieces = [std::mem::take(&mut head).into()];
            timeout(patience, send.write_all_chunks(&mut pieces)).await
        } else {
            encode(&mut head, 0, &Chunk {}, chunk.len());
            let mut pieces = [std::mem::take(&mut head).into(), chunk];
            timeout(patience, send.write_all_chunks(&mut pieces)).await
        };
        written.map_err(|_elapsed| SendError::Slow)?.map_err(SendError::Remote)?;
    }
    let hash = Hash(*hasher.finalize().as_bytes());
    encode(&mut head, 0, &PutEnd { hash: hash.0 }, 0);
    let written = timeout(patience, send.write_all(&head)).await;
    written.map_err(|_elapsed| SendError::Slow)?.map_err(SendError::Remote)?;
    let _ = send.finish(); // an error means that the node has stopped the stream, and answered
    Ok((hash, sent_bytes))
}

/// Notes the names of the full chunks that the node has; `false` when it has none.
async fn mark_known(link: &Link, window: &mut VecDeque<(Bytes, Option<Hash>)>) -> Result<bool, ClientError> {
    let full = || window.iter().filter(|(chunk, _)| chunk.len() == CHUNK_BYTES);
    let names: Vec<[u8; 32]> = full().map(|(chunk, _)| *blake3::hash(chunk).as_bytes()).collect();
    if names.is_empty() {
        return Ok(false);
    }
    let frame = match link.call(&Have { names: names.clone() }, Bytes::new()).await {
        // The question saves bytes; without an answer they are sent.
        Err(ClientError::Refused(_)) => return Ok(false),
        answered => answered?,
    };
    let reply = link.read::<HaveReply>(&frame)?;
    if reply.have.len() != names.len() {
        return Err(link.protocol_error(FrameError::Malformed));
    }
    let full = window.iter_mut().filter(|(chunk, _)| chunk.len() == CHUNK_BYTES);
    for ((_, known), (name, have)) in full.zip(names.iter().zip(reply.have.iter())) {
        *known = have.then_some(Hash(*name));
    }
    Ok(reply.have.iter().any(|have| *have))
}
