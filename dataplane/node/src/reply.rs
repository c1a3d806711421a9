//! Replies, and how many of them become one write.

use bytes::Bytes;
use metanode_types::{Hash, limits::FRAME_BODY_BYTES_MAX};
use metanode_wire::{
    Message, Refusal, RefusalCode, encode,
    message::{
        BlobPage, Data, Done, HaveReply, NodeStatusReply, OutcomesReply, StatReply, Stored as StoredMessage, Submitted,
        TagPage, TagTarget, Welcome,
    },
};

use metanode_store::{StoreError, Stored};

use crate::ledger::LedgerReply;

/// Milliseconds that a client waits when the store was busy: about one group commit.
const STORE_BUSY_RETRY_MS: u32 = 10;

/// Bodies up to this size are copied behind their head: a copy is cheaper than one more reference-counted piece.
const INLINE_BODY_BYTES_MAX: usize = 512;

/// A larger buffer for heads is given back once it is empty: one lane in thousands needs it.
const HEADS_BYTES_KEPT: usize = 64 << 10;

/// An answer to one request.
#[derive(Debug)]
pub(crate) enum Reply {
    Welcome(Box<Welcome>),
    /// A whole blob.
    Whole(Bytes),
    /// A blob that goes by a bulk transfer only.
    Large(u64),
    Stored(Stored),
    Stat(StatReply),
    Done,
    TagTarget(Hash),
    Blobs(BlobPage),
    Tags(TagPage),
    Status(Box<NodeStatusReply>),
    Have(Vec<bool>),
    Ledger(LedgerReply),
    Refused(Refusal),
}

impl From<Refusal> for Reply {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<RefusalCode> for Reply {
    fn from(code: RefusalCode) -> Self {
        Self::Refused(code.into())
    }
}

/// How the store's errors are refused. Details only where they say more than the code does.
pub(crate) fn refusal_of(error: &StoreError) -> Refusal {
    let detailed = |code| Refusal::new(code, error.to_string());
    match error {
        StoreError::NotFound => RefusalCode::NotFound.into(),
        StoreError::HashMismatch => RefusalCode::HashMismatch.into(),
        StoreError::InUse { .. } | StoreError::Kept => detailed(RefusalCode::InUse),
        StoreError::TooLarge => RefusalCode::TooLarge.into(),
        StoreError::DiskFull => RefusalCode::DiskFull.into(),
        StoreError::IndexFull => RefusalCode::IndexFull.into(),
        StoreError::ReadOnly(reason) => Refusal::new(RefusalCode::ReadOnly, reason.as_str()),
        StoreError::Storage(reason) => Refusal::new(RefusalCode::Storage, reason.as_str()),
        StoreError::Corrupt => RefusalCode::Corrupt.into(),
        StoreError::BadRange => RefusalCode::BadRange.into(),
        StoreError::MissingChild(hash) => Refusal::new(RefusalCode::MissingChild, hash.to_string()),
        StoreError::Malformed(_) => detailed(RefusalCode::Malformed),
        StoreError::Busy => Refusal::busy(STORE_BUSY_RETRY_MS),
        StoreError::ShuttingDown => RefusalCode::ShuttingDown.into(),
    }
}

pub(crate) fn stored_message(stored: &Stored) -> StoredMessage {
    StoredMessage { hash: stored.hash.0, size_bytes: stored.size_bytes, existed: stored.existed }
}

/// Frames that leave in one write: heads in one reused buffer, bodies by reference.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    heads: Vec<u8>,
    /// Bodies, each with the length of `heads` that goes before it.
    bodies: Vec<(usize, Bytes)>,
    body_bytes: usize,
    pieces: Vec<Bytes>,
}

impl Batch {
    /// Adds the frame of a message with a body.
    pub(crate) fn push<M: Message>(&mut self, request: u32, message: &M, body: Bytes) {
        encode(&mut self.heads, request, message, body.len());
        if body.len() <= INLINE_BODY_BYTES_MAX {
            self.heads.extend_from_slice(&body);
        } else {
            self.body_bytes += body.len();
            self.bodies.push((self.heads.len(), body));
        }
    }

    /// Adds a whole blob as the answer to a `Get`.
    pub(crate) fn push_whole(&mut self, request: u32, bytes: Bytes) {
        debug_assert!(bytes.len() <= FRAME_BODY_BYTES_MAX, "the store calls larger blobs large");
        self.push(request, &Data { size_bytes: bytes.len() as u64 }, bytes);
    }

    /// Adds any reply.
    pub(crate) fn push_reply(&mut self, request: u32, reply: Reply) {
        match reply {
            Reply::Welcome(message) => self.push(request, &*message, Bytes::new()),
            Reply::Whole(bytes) => self.push_whole(request, bytes),
            Reply::Large(size_bytes) => self.push(request, &Data { size_bytes }, Bytes::new()),
            Reply::Stored(stored) => self.push(request, &stored_message(&stored), Bytes::new()),
            Reply::Stat(message) => self.push(request, &message, Bytes::new()),
            Reply::Done => self.push(request, &Done {}, Bytes::new()),
            Reply::TagTarget(hash) => self.push(request, &TagTarget { hash: hash.0 }, Bytes::new()),
            Reply::Blobs(page) => self.push(request, &page, Bytes::new()),
            Reply::Tags(page) => self.push(request, &page, Bytes::new()),
            Reply::Status(message) => self.push(request, &*message, Bytes::new()),
            Reply::Have(have) => self.push(request, &HaveReply { have }, Bytes::new()),
            Reply::Ledger(reply) => match reply {
                LedgerReply::Submitted(refused) => self.push(request, &Submitted { refused }, Bytes::new()),
                LedgerReply::Transaction(state) => self.push(request, &state, Bytes::new()),
                LedgerReply::Status(status) => self.push(request, &*status, Bytes::new()),
                LedgerReply::Found(found) => self.push(request, &*found, Bytes::new()),
                LedgerReply::Block(block) => self.push(request, &*block, Bytes::new()),
                LedgerReply::Outcomes { count, body } => self.push(request, &OutcomesReply { count }, body),
            },
            Reply::Refused(refusal) => self.push(request, &refusal.to_message(), Bytes::new()),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// Bytes that it has.
    pub(crate) fn bytes(&self) -> usize {
        self.heads.len() + self.body_bytes
    }

    /// The pieces to write, in order; the batch is empty afterwards and keeps its buffers.
    pub(crate) fn take(&mut self) -> &mut [Bytes] {
        self.pieces.clear();
        let heads = Bytes::copy_from_slice(&self.heads);
        let mut begin = 0;
        for (end, body) in self.bodies.drain(..) {
            self.pieces.push(heads.slice(begin..end));
            self.pieces.push(body);
            begin = end;
        }
        if begin < heads.len() {
            self.pieces.push(heads.slice(begin..));
        }
        self.heads.clear();
        if self.heads.capacity() > HEADS_BYTES_KEPT {
            self.heads = Vec::new();
        }
        self.body_bytes = 0;
        &mut self.pieces
    }
}

#[cfg(test)]
mod tests {
    use metanode_wire::{FrameLimits, FrameReader};

    use super::*;

    #[test]
    fn a_batch_is_its_frames_in_order() {
        let bodies = [0usize, 1, INLINE_BODY_BYTES_MAX, INLINE_BODY_BYTES_MAX + 1, FRAME_BODY_BYTES_MAX];
        let mut batch = Batch::default();
        for round in 0..2 {
            assert!(batch.is_empty());
            for (request, size) in bodies.iter().enumerate() {
                batch.push_whole(request as u32, vec![request as u8; *size].into());
            }
            batch.push_reply(9, Reply::Refused(Refusal::busy(round)));
            let bytes = batch.bytes();
            let mut reader = FrameReader::new(FrameLimits::default());
            let pieces = batch.take();
            assert_eq!(pieces.iter().map(Bytes::len).sum::<usize>(), bytes);
            assert!(pieces.iter().all(|piece| !piece.is_empty()));
            pieces.iter().for_each(|piece| reader.push(piece.clone()));
            for (request, size) in bodies.iter().enumerate() {
                let frame = reader.next_frame().unwrap().unwrap();
                assert_eq!((frame.request, frame.body.len()), (request as u32, *size));
                assert_eq!(frame.message::<Data>().unwrap().size_bytes.to_native(), *size as u64);
            }
            assert_eq!(reader.next_frame().unwrap().unwrap().request, 9);
            assert!(!reader.is_mid_frame());
        }
    }
}
