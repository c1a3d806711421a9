//! What is said on the local socket of a node.
//!
//! The socket is a Unix stream socket, mode 0600, in the data folder: who can open it is the node's owner, so there is no
//! further authentication. It carries the frames of `metanode-wire` with empty bodies; requests are answered one after the
//! other, with the request's number.
//!
//! | request | answer | meaning |
//! |---|---|---|
//! | [`Request::Status`] | [`Reply::Status`] | sums over all shards, at most a second old |
//! | [`Request::Scrub`], [`Request::Compact`], [`Request::Survey`] | [`Reply::Begun`] with a number | the work has begun on all shards; [`StoreStatus`] says how far it is |
//! | [`Request::Damaged`] | [`Reply::Damaged`] | the blobs that the latest survey has found so far, page by page |
//! | [`Request::StoreStatus`] | [`Reply::StoreStatus`] | sums over all shards, at most a second old |
//! | [`Request::Stop`] | [`Reply::Done`], then the end of the stream | `Done`: the stop has begun. The stream ends when the last request is answered, everything is synced and the data folder's lock is released, in a process that may still take milliseconds to exit. |
//!
//! Anything else is answered by [`Reply::Refused`], and the stream ends. This crate turns frames into [`Request`] and
//! [`Reply`] and back; who reads and writes the socket is `metanode-node`.

pub mod application;
mod status;

use metanode_types::Hash;
/// How a store is: sums over all shards.
pub use metanode_wire::message::StoreStatusReply as StoreStatus;
use metanode_wire::{
    Frame, FrameError, FrameLimits, Kind, Refusal, encode,
    message::{
        AdminDamaged, AdminMaintain, AdminStop, AdminStoreStatus, DamagedPage, Done, MaintainReply, NodeStatus,
        NodeStatusReply, Refused, StoreStatusReply,
    },
};
pub use status::NodeStatusInfo;

/// What a frame on the local socket may have at most: [`DAMAGED_PAGE_MAX`] hashes, and there are no bodies.
pub const FRAME_LIMITS: FrameLimits = FrameLimits { head_bytes_max: 4_096, body_bytes_max: 0 };

/// Hashes in a [`Reply::Damaged`]: as many as leave room for the rest of the frame's 4 KiB.
pub const DAMAGED_PAGE_MAX: usize = 120;

const SCRUB: u8 = 0;
const COMPACT: u8 = 1;
const SURVEY: u8 = 2;

/// What can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// How is the node?
    Status,
    /// Read everything and compare it with its hash, at so many bytes a second (0: as fast as it goes).
    Scrub {
        /// Of the whole store.
        bytes_per_second: u64,
    },
    /// Free what can be freed.
    Compact,
    /// Look for the blobs that known damage belongs to.
    Survey,
    /// Which blobs has the latest survey found?
    Damaged {
        /// Only addresses behind this one.
        after: Option<Hash>,
    },
    /// How is the store?
    StoreStatus,
    /// Drain, sync, end.
    Stop,
}

impl Request {
    /// Appends the request as a frame.
    pub fn encode(self, out: &mut Vec<u8>, request: u32) {
        match self {
            Self::Status => encode(out, request, &NodeStatus {}, 0),
            Self::Scrub { bytes_per_second } => {
                encode(out, request, &AdminMaintain { what: SCRUB, bytes_per_second }, 0);
            }
            Self::Compact => encode(out, request, &AdminMaintain { what: COMPACT, bytes_per_second: 0 }, 0),
            Self::Survey => encode(out, request, &AdminMaintain { what: SURVEY, bytes_per_second: 0 }, 0),
            Self::Damaged { after } => encode(out, request, &AdminDamaged { after: after.map(|hash| hash.0) }, 0),
            Self::StoreStatus => encode(out, request, &AdminStoreStatus {}, 0),
            Self::Stop => encode(out, request, &AdminStop {}, 0),
        }
    }

    /// Validates a frame that came in.
    pub fn from_frame(frame: &Frame) -> Result<Self, FrameError> {
        match frame.kind {
            Kind::NodeStatus => frame.message::<NodeStatus>().map(|_| Self::Status),
            Kind::AdminMaintain => {
                let maintain = frame.message::<AdminMaintain>()?;
                match maintain.what {
                    SCRUB => Ok(Self::Scrub { bytes_per_second: maintain.bytes_per_second.to_native() }),
                    COMPACT => Ok(Self::Compact),
                    SURVEY => Ok(Self::Survey),
                    _ => Err(FrameError::Malformed),
                }
            }
            Kind::AdminStoreStatus => frame.message::<AdminStoreStatus>().map(|_| Self::StoreStatus),
            Kind::AdminDamaged => {
                let after = frame.message::<AdminDamaged>()?.after.as_ref().map(|hash| Hash(*hash));
                Ok(Self::Damaged { after })
            }
            Kind::AdminStop => frame.message::<AdminStop>().map(|_| Self::Stop),
            other => Err(FrameError::Unexpected(other)),
        }
    }
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// To [`Request::Status`].
    Status(Box<NodeStatusInfo>),
    /// To [`Request::Scrub`], [`Request::Compact`] and [`Request::Survey`]: the number of the work.
    Begun(u64),
    /// To [`Request::StoreStatus`].
    StoreStatus(Box<StoreStatus>),
    /// To [`Request::Damaged`].
    Damaged {
        /// The survey that they are of.
        survey: u64,
        /// At most [`DAMAGED_PAGE_MAX`], in order.
        hashes: Vec<Hash>,
        /// Whether there are more behind the last.
        more: bool,
    },
    /// To [`Request::Stop`].
    Done,
    /// To what is neither.
    Refused(Refusal),
}

impl Reply {
    /// Appends the reply as a frame.
    pub fn encode(&self, out: &mut Vec<u8>, request: u32) {
        match self {
            Self::Status(info) => encode(out, request, &info.to_message(), 0),
            Self::Begun(number) => encode(out, request, &MaintainReply { number: *number }, 0),
            Self::StoreStatus(status) => encode(out, request, &**status, 0),
            Self::Damaged { survey, hashes, more } => {
                let hashes = hashes.iter().map(|hash| hash.0).collect();
                encode(out, request, &DamagedPage { survey: *survey, hashes, more: *more }, 0);
            }
            Self::Done => encode(out, request, &Done {}, 0),
            Self::Refused(refusal) => encode(out, request, &refusal.to_message(), 0),
        }
    }

    /// Validates a frame that came in.
    pub fn from_frame(frame: &Frame) -> Result<Self, FrameError> {
        match frame.kind {
            Kind::NodeStatusReply => {
                let info = NodeStatusInfo::from_message(frame.message::<NodeStatusReply>()?);
                info.map(|info| Self::Status(Box::new(info))).ok_or(FrameError::Malformed)
            }
            Kind::MaintainReply => Ok(Self::Begun(frame.message::<MaintainReply>()?.number.to_native())),
            Kind::StoreStatusReply => {
                let reply = frame.message::<StoreStatusReply>()?;
                Ok(Self::StoreStatus(Box::new(StoreStatus {
                    blobs: reply.blobs.to_native(),
                    blob_bytes: reply.blob_bytes.to_native(),
                    segments: reply.segments.to_native(),
                    segment_bytes: reply.segment_bytes.to_native(),
                    orphan_bytes: reply.orphan_bytes.to_native(),
                    compacted_segments: reply.compacted_segments.to_native(),
                    compact_done: reply.compact_done.to_native(),
                    scrubbing_shards: reply.scrubbing_shards.to_native(),
                    scrub_done: reply.scrub_done.to_native(),
                    scrub_bytes: reply.scrub_bytes.to_native(),
                    scrub_corrupt: reply.scrub_corrupt.to_native(),
                    corrupt_reads: reply.corrupt_reads.to_native(),
                    survey_done: reply.survey_done.to_native(),
                })))
            }
            Kind::DamagedPage => {
                let page = frame.message::<DamagedPage>()?;
                let hashes: Vec<_> = page.hashes.iter().map(|hash| Hash(*hash)).collect();
                // One that promises more and is empty, or goes backwards, would have a reader ask for ever.
                if !hashes.is_sorted_by(|a, b| a < b) || (page.more && hashes.is_empty()) {
                    return Err(FrameError::Malformed);
                }
                Ok(Self::Damaged { survey: page.survey.to_native(), hashes, more: page.more })
            }
            Kind::Done => frame.message::<Done>().map(|_| Self::Done),
            Kind::Refused => frame.message::<Refused>().map(|message| Self::Refused(Refusal::from_message(message))),
            other => Err(FrameError::Unexpected(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use metanode_wire::{FrameReader, RefusalCode};

    use super::*;

    fn frame(encode: impl FnOnce(&mut Vec<u8>)) -> Frame {
        let mut bytes = Vec::new();
        encode(&mut bytes);
        let mut reader = FrameReader::new(FRAME_LIMITS);
        reader.push(bytes.into());
        reader.next_frame().unwrap().unwrap()
    }

    #[test]
    fn requests_and_replies_round_trip() {
        let scrub = Request::Scrub { bytes_per_second: 5 };
        let damaged = [None, Some(Hash([7; 32]))].map(|after| Request::Damaged { after });
        let others = [Request::Status, scrub, Request::Compact, Request::Survey, Request::StoreStatus, Request::Stop];
        for request in others.into_iter().chain(damaged) {
            let frame = frame(|out| request.encode(out, 7));
            assert_eq!((frame.request, Request::from_frame(&frame)), (7, Ok(request)));
        }
        let status = Reply::Status(Box::new(status::example()));
        let store = StoreStatus {
            blobs: 1,
            blob_bytes: 2,
            segments: 3,
            segment_bytes: 4,
            orphan_bytes: 5,
            compacted_segments: 6,
            compact_done: 7,
            scrubbing_shards: 8,
            scrub_done: 9,
            scrub_bytes: 10,
            scrub_corrupt: 11,
            corrupt_reads: 12,
            survey_done: 13,
        };
        let store = Reply::StoreStatus(Box::new(store));
        let hashes = (0..DAMAGED_PAGE_MAX as u8).map(|byte| Hash([byte; 32])).collect();
        let damaged = Reply::Damaged { survey: 4, hashes, more: true };
        for reply in [
            status,
            store,
            damaged,
            Reply::Begun(3),
            Reply::Done,
            Reply::Refused(Refusal::new(RefusalCode::Malformed, "what?")),
        ] {
            let frame = frame(|out| reply.encode(out, 9));
            assert_eq!((frame.request, Reply::from_frame(&frame)), (9, Ok(reply)));
        }
    }

    #[test]
    fn what_is_no_request_is_no_request() {
        let frame = frame(|out| Reply::Done.encode(out, 0));
        assert_eq!(Request::from_frame(&frame), Err(FrameError::Unexpected(Kind::Done)));
    }

    #[test]
    fn a_page_without_an_end_is_malformed() {
        for hashes in [vec![], vec![[2; 32], [1; 32]]] {
            let frame = frame(|out| metanode_wire::encode(out, 0, &DamagedPage { survey: 1, hashes, more: true }, 0));
            assert_eq!(Reply::from_frame(&frame), Err(FrameError::Malformed));
        }
    }

    #[test]
    fn an_address_that_is_none_is_malformed() {
        let wrong = NodeStatusReply { quic_address: "here".to_owned(), ..status::example().to_message() };
        let frame = frame(|out| metanode_wire::encode(out, 0, &wrong, 0));
        assert_eq!(Reply::from_frame(&frame), Err(FrameError::Malformed));
    }
}
