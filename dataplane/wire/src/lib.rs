//! The only door from bytes to types.
//!
//! * [`frame`]: the 16-byte header, [`FrameReader`] (incremental, bounded) and [`encode`].
//! * [`message`]: what the relay protocol says, as rkyv archives that `bytecheck` validates before anything reads them.
//! * [`ticket`]: one string that names a node key, its addresses and a blob.
//! * [`manifest`]: the canonical encoding of a folder.
//!
//! Invariants: length and version are checked before anything is decoded; no input makes this crate panic or allocate more than
//! the stated limits; archived bytes are never signed (they are a transport form), canonical encodings are.
//!
//! # The relay protocol, version 1 (ALPN `metanode-relay/1`)
//!
//! A client opens bidirectional streams. On a stream it sends request frames and gets reply frames that carry the request's
//! number; replies come in any order. Two requests take a stream for themselves: [`message::GetBulk`] is answered by
//! [`message::BulkBegin`] and then, unframed, by the bao encoding of the range (16 KiB groups) up to the end of the stream;
//! [`message::PutBulk`] is followed by [`message::Chunk`] frames and one [`message::PutEnd`]. Every refusal is a
//! [`message::Refused`] with a [`RefusalCode`].
//!
//! A node with a ledger answers [`message::Submit`], [`message::TransactionWait`], [`message::LedgerStatus`], [`message::LedgerQuery`], [`message::BlockGet`] and
//! [`message::OutcomesGet`] as well. Batches are blobs: their digests are their addresses.
//!
//! # The protocol among validators, version 1 (ALPN `metanode-bpi/1`)
//!
//! Each dials each other; on a connection the one who dialled speaks and asks, the other answers. Who speaks begins a stream with [`message::PeerHello`], and sends
//! [`message::PeerMessage`] frames behind it; [`message::PeerBatch`] frames have a stream of their own. [`message::BlockGet`] and [`message::BatchGet`] are questions, each on
//! a stream of its own, which a node that is no validator may ask too.

pub mod cursor;
pub mod frame;
pub mod manifest;
pub mod message;
mod refusal;
pub mod ticket;

pub use frame::{Frame, FrameError, FrameLimits, FrameReader, HEADER_BYTES, Kind, encode, encode_within};
pub use manifest::{Entry, EntryKind, Manifest, ManifestError};
pub use message::Message;
pub use refusal::{Refusal, RefusalCode, TransactionRefusal};
pub use ticket::{Ticket, TicketError};
