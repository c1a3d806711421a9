//! Frames: a 16-byte header, an rkyv archive (*head*), bulk bytes (*body*).
//!
//! ```text
//!  0        1        2                 4                                   8
//! +--------+--------+-----------------+-----------------------------------+
//! | version| kind   | flags (0)  u16  | request                       u32 |
//! +--------+--------+-----------------+-----------------------------------+
//! | head length in bytes          u32 | body length in bytes          u32 |
//! +-----------------------------------+-----------------------------------+
//! | head: rkyv archive of the kind's message | body: bytes as they are    |
//! +------------------------------------------+----------------------------+
//! ```
//!
//! All numbers are little-endian. The head is copied into a 16-aligned buffer, since archives are read in place; the body is
//! handed out as [`Bytes`], without a copy when it arrived in one piece.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};
use metanode_types::limits::{FRAME_BODY_BYTES_MAX, FRAME_HEAD_BYTES_MAX};
use rkyv::{rancor::Failure, util::AlignedVec};

use crate::message::Message;

/// Size of a frame header.
pub const HEADER_BYTES: usize = 16;

/// The version this build speaks.
pub const VERSION: u8 = 1;

/// What a frame carries; the numbers are the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "each is documented at its message")]
pub enum Kind {
    Hello = 0x01,
    Get = 0x02,
    GetBulk = 0x03,
    Put = 0x04,
    PutBulk = 0x05,
    Chunk = 0x06,
    PutEnd = 0x07,
    Stat = 0x08,
    Remove = 0x09,
    TagSet = 0x0a,
    TagRemove = 0x0b,
    TagGet = 0x0c,
    ListBlobs = 0x0d,
    ListTags = 0x0e,
    NodeStatus = 0x0f,
    Have = 0x10,
    KnownChunk = 0x11,
    Submit = 0x20,
    TransactionWait = 0x21,
    LedgerStatus = 0x22,
    LedgerQuery = 0x23,
    BlockGet = 0x24,
    OutcomesGet = 0x25,
    BatchGet = 0x26,
    PeerHello = 0x30,
    PeerMessage = 0x31,
    PeerBatch = 0x32,
    AdminStop = 0x40,
    AdminMaintain = 0x41,
    AdminStoreStatus = 0x42,
    AdminDamaged = 0x43,
    AppHello = 0x50,
    AppBegin = 0x51,
    AppCheck = 0x52,
    AppExecute = 0x53,
    AppCommit = 0x54,
    AppQuery = 0x55,
    AppExport = 0x56,
    AppImport = 0x57,
    Welcome = 0x81,
    Data = 0x82,
    BulkBegin = 0x83,
    Stored = 0x84,
    StatReply = 0x88,
    Done = 0x89,
    TagTarget = 0x8c,
    BlobPage = 0x8d,
    TagPage = 0x8e,
    NodeStatusReply = 0x8f,
    HaveReply = 0x90,
    Submitted = 0xa0,
    TransactionState = 0xa1,
    LedgerStatusReply = 0xa2,
    LedgerFound = 0xa3,
    BlockReply = 0xa4,
    OutcomesReply = 0xa5,
    PeerWelcome = 0xb0,
    MaintainReply = 0xc1,
    StoreStatusReply = 0xc2,
    DamagedPage = 0xc3,
    AppState = 0xd0,
    AppChecked = 0xd1,
    AppExecuted = 0xd2,
    AppFound = 0xd3,
    AppPiece = 0xd4,
    Refused = 0xff,
}

impl Kind {
    /// Every kind.
    pub const ALL: &[Self] = &[
        Self::Hello,
        Self::Get,
        Self::GetBulk,
        Self::Put,
        Self::PutBulk,
        Self::Chunk,
        Self::PutEnd,
        Self::Stat,
        Self::Remove,
        Self::TagSet,
        Self::TagRemove,
        Self::TagGet,
        Self::ListBlobs,
        Self::ListTags,
        Self::NodeStatus,
        Self::Have,
        Self::KnownChunk,
        Self::Submit,
        Self::TransactionWait,
        Self::LedgerStatus,
        Self::LedgerQuery,
        Self::BlockGet,
        Self::OutcomesGet,
        Self::BatchGet,
        Self::PeerHello,
        Self::PeerMessage,
        Self::PeerBatch,
        Self::AdminStop,
        Self::AdminMaintain,
        Self::AdminStoreStatus,
        Self::AdminDamaged,
        Self::AppHello,
        Self::AppBegin,
        Self::AppCheck,
        Self::AppExecute,
        Self::AppCommit,
        Self::AppQuery,
        Self::AppExport,
        Self::AppImport,
        Self::Welcome,
        Self::Data,
        Self::BulkBegin,
        Self::Stored,
        Self::StatReply,
        Self::Done,
        Self::TagTarget,
        Self::BlobPage,
        Self::TagPage,
        Self::NodeStatusReply,
        Self::HaveReply,
        Self::Submitted,
        Self::TransactionState,
        Self::LedgerStatusReply,
        Self::LedgerFound,
        Self::BlockReply,
        Self::OutcomesReply,
        Self::PeerWelcome,
        Self::MaintainReply,
        Self::StoreStatusReply,
        Self::DamagedPage,
        Self::AppState,
        Self::AppChecked,
        Self::AppExecuted,
        Self::AppFound,
        Self::AppPiece,
        Self::Refused,
    ];

    fn from_u8(value: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| *kind as u8 == value)
    }
}

/// Why bytes are not a frame, or a frame is not its message. Each of these ends the connection: what follows can't be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first byte is not [`VERSION`].
    #[error("frame version {0} is not spoken here (this build speaks {VERSION})")]
    UnsupportedVersion(u8),
    /// No such kind.
    #[error("unknown frame kind {0:#04x}")]
    UnknownKind(u8),
    /// Flags are reserved and must be zero.
    #[error("unknown frame flags {0:#06x}")]
    UnknownFlags(u16),
    /// Head or body over the limit; seen in the header, before anything is buffered.
    #[error("frame of {length} bytes is over the limit of {limit}")]
    TooLarge {
        /// As announced.
        length: u32,
        /// As permitted.
        limit: u32,
    },
    /// The archive does not validate as the kind's message.
    #[error("the frame's archive is malformed")]
    Malformed,
    /// A kind that may not appear here.
    #[error("unexpected frame {0:?}")]
    Unexpected(Kind),
}

/// What a reader takes at most.
#[derive(Debug, Clone, Copy)]
pub struct FrameLimits {
    /// Bytes of an archive.
    pub head_bytes_max: usize,
    /// Bytes of a body.
    pub body_bytes_max: usize,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self { head_bytes_max: FRAME_HEAD_BYTES_MAX, body_bytes_max: FRAME_BODY_BYTES_MAX }
    }
}

/// A whole frame; its head is not validated until [`Frame::message`].
#[derive(Debug)]
pub struct Frame {
    /// What it says it is.
    pub kind: Kind,
    /// The request it belongs to; chosen by the client, echoed by the node.
    pub request: u32,
    head: Head,
    /// Bulk bytes.
    pub body: Bytes,
}

impl Frame {
    /// The message, validated.
    pub fn message<M: Message>(&self) -> Result<&M::Archived, FrameError> {
        if self.kind != M::KIND {
            return Err(FrameError::Unexpected(self.kind));
        }
        rkyv::access::<M::Archived, Failure>(self.head.as_slice()).map_err(|_| FrameError::Malformed)
    }
}

/// Archive bytes at a 16-byte boundary; inline when short, as those of the hot paths are.
enum Head {
    Inline { bytes: Inline, length: u8 },
    Heap(AlignedVec<16>),
}

#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Inline([u8; INLINE_BYTES]);

/// Fits the archives of Get, Put, Data and Stored.
const INLINE_BYTES: usize = 112;

impl Head {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Inline { bytes, length } => &bytes.0[..usize::from(*length)],
            Self::Heap(bytes) => bytes,
        }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        match self {
            Self::Inline { bytes, length } => &mut bytes.0[..usize::from(*length)],
            Self::Heap(bytes) => bytes,
        }
    }

    fn zeroed(length: usize) -> Self {
        if length <= INLINE_BYTES {
            Self::Inline { bytes: Inline([0; INLINE_BYTES]), length: length as u8 }
        } else {
            let mut bytes = AlignedVec::with_capacity(length);
            bytes.resize(length, 0);
            Self::Heap(bytes)
        }
    }
}

impl std::fmt::Debug for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Head({} B)", self.as_slice().len())
    }
}

/// Appends a frame's header and head to `out`. The caller sends `body_bytes` bytes behind them.
pub fn encode<M: Message>(out: &mut Vec<u8>, request: u32, message: &M, body_bytes: usize) {
    encode_within(FrameLimits::default(), out, request, message, body_bytes);
}

/// As [`encode`], for a stream whose reader has these limits.
pub fn encode_within<M: Message>(limits: FrameLimits, out: &mut Vec<u8>, request: u32, message: &M, body_bytes: usize) {
    thread_local! {
        /// Archives are built at an aligned position of their own, then copied: their padding depends on it.
        static SCRATCH: std::cell::RefCell<AlignedVec<16>> = std::cell::RefCell::new(AlignedVec::new());
    }
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.clear();
        let archive = rkyv::api::high::to_bytes_in::<_, Failure>(message, std::mem::take(scratch))
            .expect("messages hold only plain data, which always serializes into memory");
        assert!(archive.len() <= limits.head_bytes_max, "a message is kept under the frame limit by its constructors");
        assert!(body_bytes <= limits.body_bytes_max, "a body is kept under the frame limit by who makes it");
        out.reserve(HEADER_BYTES + archive.len());
        out.extend_from_slice(&[VERSION, M::KIND as u8, 0, 0]);
        out.extend_from_slice(&request.to_le_bytes());
        out.extend_from_slice(&(archive.len() as u32).to_le_bytes());
        out.extend_from_slice(&(body_bytes as u32).to_le_bytes());
        out.extend_from_slice(&archive);
        *scratch = archive;
    });
}

/// Pieces that a reader may keep while it waits for the rest of a frame.
const PIECES_MAX: usize = 4;

/// Turns the bytes of a stream into frames. Holds at most one frame's announced length beyond what was pushed.
#[derive(Debug)]
pub struct FrameReader {
    limits: FrameLimits,
    /// What was [compacted](Self::compact); comes before the pieces.
    gathered: BytesMut,
    pieces: VecDeque<Bytes>,
    buffered_bytes: usize,
    header: Option<Header>,
}

#[derive(Debug, Clone, Copy)]
struct Header {
    kind: Kind,
    request: u32,
    head_bytes: usize,
    body_bytes: usize,
}

impl FrameReader {
    /// A reader at the start of a stream.
    pub fn new(limits: FrameLimits) -> Self {
        Self { limits, gathered: BytesMut::new(), pieces: VecDeque::new(), buffered_bytes: 0, header: None }
    }

    /// Takes the next bytes of the stream.
    pub fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.buffered_bytes += bytes.len();
            self.pieces.push_back(bytes);
        }
    }

    /// The next whole frame, or `None` until more bytes are pushed. After an error the stream is useless.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let header = match self.header {
            Some(header) => header,
            None if self.buffered_bytes < HEADER_BYTES => return Ok(None),
            None => {
                let mut bytes = [0; HEADER_BYTES];
                self.copy_out(&mut bytes);
                *self.header.insert(self.parse(&bytes)?)
            }
        };
        if self.buffered_bytes < header.head_bytes + header.body_bytes {
            return Ok(None);
        }
        let mut head = Head::zeroed(header.head_bytes);
        self.copy_out(head.as_mut_slice());
        let body = self.take(header.body_bytes);
        self.header = None;
        Ok(Some(Frame { kind: header.kind, request: header.request, head, body }))
    }

    /// Whether bytes of an unfinished frame are held: at the end of a stream that means it was cut.
    pub fn is_mid_frame(&self) -> bool {
        self.header.is_some() || self.buffered_bytes > 0
    }

    /// Copies what is held into one buffer, if it is in many pieces: a piece of one byte keeps the datagram that it came in. For a reader that
    /// will wait for the rest of a frame; costs a copy of what has come since the last time.
    pub fn compact(&mut self) {
        if self.pieces.len() > PIECES_MAX {
            self.pieces.drain(..).for_each(|piece| self.gathered.extend_from_slice(&piece));
            self.pieces.shrink_to(2 * PIECES_MAX);
        }
    }

    /// Gives back what was pushed and not consumed: the unframed rest of a stream that a bulk reply turned into.
    pub fn into_rest(mut self) -> VecDeque<Bytes> {
        if !self.gathered.is_empty() {
            self.pieces.push_front(self.gathered.freeze());
        }
        self.pieces
    }

    fn parse(&self, bytes: &[u8; HEADER_BYTES]) -> Result<Header, FrameError> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes[0] != VERSION {
            return Err(FrameError::UnsupportedVersion(bytes[0]));
        }
        let within = |length: u32, limit: usize| {
            if length as usize > limit {
                Err(FrameError::TooLarge { length, limit: limit as u32 })
            } else {
                Ok(length as usize)
            }
        };
        let head_bytes = within(word(8), self.limits.head_bytes_max)?;
        let body_bytes = within(word(12), self.limits.body_bytes_max)?;
        let flags = u16::from_le_bytes([bytes[2], bytes[3]]);
        if flags != 0 {
            return Err(FrameError::UnknownFlags(flags));
        }
        let kind = Kind::from_u8(bytes[1]).ok_or(FrameError::UnknownKind(bytes[1]))?;
        Ok(Header { kind, request: word(4), head_bytes, body_bytes })
    }

    fn copy_out(&mut self, mut out: &mut [u8]) {
        self.buffered_bytes -= out.len();
        let gathered = self.gathered.len().min(out.len());
        let (now, rest) = out.split_at_mut(gathered);
        self.gathered.copy_to_slice(now);
        out = rest;
        while !out.is_empty() {
            let piece = self.pieces.front_mut().expect("buffered_bytes counts the pieces");
            let n = piece.len().min(out.len());
            let (now, rest) = out.split_at_mut(n);
            piece.copy_to_slice(now);
            out = rest;
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
    }

    /// Without a copy when one piece holds it all.
    fn take(&mut self, length: usize) -> Bytes {
        if length == 0 {
            return Bytes::new();
        }
        if self.gathered.is_empty()
            && let Some(first) = self.pieces.front_mut()
            && first.len() >= length
        {
            let body = first.split_to(length);
            self.buffered_bytes -= length;
            if first.is_empty() {
                self.pieces.pop_front();
            }
            return body;
        }
        let mut joined = BytesMut::with_capacity(length);
        joined.extend_from_slice(&self.gathered.split_to(self.gathered.len().min(length)));
        if self.gathered.is_empty() {
            self.gathered = BytesMut::new();
        }
        while joined.len() < length {
            let piece = self.pieces.front_mut().expect("buffered_bytes counts the pieces");
            let n = piece.len().min(length - joined.len());
            joined.extend_from_slice(&piece[..n]);
            piece.advance(n);
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
        self.buffered_bytes -= length;
        joined.freeze()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::{Data, Get};

    fn get() -> Get {
        Get { hash: [0x11; 32] }
    }

    fn read_all(reader: &mut FrameReader) -> Result<Vec<Frame>, FrameError> {
        let mut frames = Vec::new();
        while let Some(frame) = reader.next_frame()? {
            frames.push(frame);
        }
        Ok(frames)
    }

    #[test]
    fn golden_bytes_of_a_get() {
        let mut out = Vec::new();
        encode(&mut out, 0x0403_0201, &get(), 0);
        let mut golden = vec![1, 0x02, 0, 0, 1, 2, 3, 4, 32, 0, 0, 0, 0, 0, 0, 0];
        golden.extend([0x11; 32]);
        assert_eq!(out, golden);
    }

    #[test]
    fn golden_bytes_of_data() {
        let mut out = Vec::new();
        encode(&mut out, 7, &Data { size_bytes: 0x0102 }, 0x0102);
        assert_eq!(out, [1, 0x82, 0, 0, 7, 0, 0, 0, 8, 0, 0, 0, 2, 1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn kind_numbers_are_distinct_and_parse_back() {
        for kind in Kind::ALL {
            assert_eq!(Kind::from_u8(*kind as u8), Some(*kind));
        }
        assert_eq!(Kind::from_u8(0), None);
    }

    #[test]
    fn hostile_headers_are_refused_before_anything_is_buffered() {
        let mut good = Vec::new();
        encode(&mut good, 1, &get(), 0);
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            let mut reader = FrameReader::new(FrameLimits::default());
            reader.push(bytes.into());
            read_all(&mut reader).map(|frames| frames.len())
        };
        assert_eq!(with(0, 2), Err(FrameError::UnsupportedVersion(2)));
        assert_eq!(with(1, 0x77), Err(FrameError::UnknownKind(0x77)));
        assert_eq!(with(2, 1), Err(FrameError::UnknownFlags(1)));
        assert!(matches!(with(11, 0xff), Err(FrameError::TooLarge { .. })));
        assert!(matches!(with(15, 0xff), Err(FrameError::TooLarge { .. })));
    }

    #[test]
    fn a_wrong_archive_is_malformed_and_another_kind_unexpected() {
        let mut bytes = vec![1, Kind::Get as u8, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend([1, 2, 3]);
        let mut reader = FrameReader::new(FrameLimits::default());
        reader.push(bytes.into());
        let frame = reader.next_frame().unwrap().unwrap();
        assert!(matches!(frame.message::<Get>(), Err(FrameError::Malformed)));
        assert!(matches!(frame.message::<Data>(), Err(FrameError::Unexpected(Kind::Get))));
    }

    proptest! {
        #[test]
        fn any_split_of_the_stream_gives_the_same_frames(
            bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2000), 1..6),
            cuts in prop::collection::vec(1usize..500, 1..40),
        ) {
            let mut stream = Vec::new();
            for (i, body) in bodies.iter().enumerate() {
                encode(&mut stream, i as u32, &Data { size_bytes: body.len() as u64 }, body.len());
                stream.extend_from_slice(body);
            }
            let mut reader = FrameReader::new(FrameLimits::default());
            let mut rest = Bytes::from(stream);
            let mut frames = Vec::new();
            let mut cut = cuts.iter().cycle();
            while !rest.is_empty() {
                let n = (*cut.next().unwrap()).min(rest.len());
                reader.push(rest.split_to(n));
                frames.extend(read_all(&mut reader).unwrap());
                if n % 3 > 0 {
                    reader.compact();
                    prop_assert!(reader.pieces.len() <= PIECES_MAX);
                }
            }
            prop_assert!(!reader.is_mid_frame() && reader.gathered.is_empty());
            prop_assert_eq!(frames.len(), bodies.len());
            for (i, (frame, body)) in frames.iter().zip(&bodies).enumerate() {
                prop_assert_eq!(frame.request, i as u32);
                prop_assert_eq!(&frame.body[..], &body[..]);
                prop_assert_eq!(frame.message::<Data>().unwrap().size_bytes.to_native(), body.len() as u64);
            }
        }

        #[test]
        fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut reader = FrameReader::new(FrameLimits::default());
            reader.push(bytes.into());
            while let Ok(Some(frame)) = reader.next_frame() {
                let _ = frame.message::<Get>();
                let _ = frame.message::<crate::message::BlobPage>();
            }
        }
    }
}
