//! Archives of every message: what validates can be read whole, and says the same when it is written again.

use std::fmt::Debug;

use metanode_admin_api::{NodeStatusInfo, Reply, Request, application as app};
use metanode_types::limits::REFUSAL_DETAIL_BYTES_MAX;
use metanode_wire::{
    Frame, FrameError, FrameLimits, FrameReader, HEADER_BYTES, Kind, Message, Refusal, encode, frame::VERSION, message,
};
use rkyv::{Deserialize, api::high::HighDeserializer, rancor::Failure};

/// `kind (number in Kind::ALL) u8 | archive`
pub fn archives(data: &[u8]) {
    let Some((kind, archive)) = data.split_first() else { return };
    let kind = Kind::ALL[usize::from(*kind) % Kind::ALL.len()];
    let mut bytes = vec![VERSION, kind as u8, 0, 0, 7, 0, 0, 0];
    bytes.extend((archive.len() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(archive);
    let Some(frame) = frame(bytes) else { return };
    assert_eq!((frame.kind, frame.request), (kind, 7));
    let _ = (Request::from_frame(&frame), Reply::from_frame(&frame));
    every_message(&frame);
    application(&frame);
    if let Ok(message) = frame.message::<message::Refused>() {
        let refusal = Refusal::from_message(message);
        assert!(refusal.detail.len() <= REFUSAL_DETAIL_BYTES_MAX, "a refusal is a sentence");
        let again = written(&refusal.to_message());
        let again = again.message::<message::Refused>().expect("it was written here");
        assert_eq!(Refusal::from_message(again), refusal);
    }
    if let Ok(message) = frame.message::<message::NodeStatusReply>()
        && let Some(info) = NodeStatusInfo::from_message(message)
    {
        let again = written(&info.to_message());
        let again = again.message::<message::NodeStatusReply>().expect("it was written here");
        assert_eq!(NodeStatusInfo::from_message(again), Some(info));
    }
}

/// What a node and its application say to each other is read the same when it is written again.
fn application(frame: &Frame) {
    let again = |encode: &dyn Fn(&mut Vec<u8>) -> bytes::Bytes| {
        let mut bytes = Vec::new();
        let body = encode(&mut bytes);
        let mut reader = FrameReader::new(app::FRAME_LIMITS);
        reader.push(bytes.into());
        reader.push(body);
        reader.next_frame().expect("it was written here").expect("it is whole")
    };
    if let Ok(request) = app::Request::from_frame(frame) {
        let again = again(&|out| request.encode(out, 7));
        assert_eq!(app::Request::from_frame(&again), Ok(request));
    }
    if let Ok(reply) = app::Reply::from_frame(frame) {
        let again = again(&|out| reply.encode(out, 7));
        assert_eq!(app::Reply::from_frame(&again), Ok(reply));
    }
}

macro_rules! every_message {
    ($($name:ident)*) => {
        fn every_message(frame: &Frame) {
            let mut fits = 0;
            $(fits += usize::from(check::<message::$name>(frame));)*
            assert_eq!(fits, 1, "each kind has its message");
        }

        #[cfg(test)]
        const MESSAGES: usize = [$(stringify!($name)),*].len();
    };
}

every_message! {
    Hello Welcome Get Data GetBulk BulkBegin Put PutBulk Chunk PutEnd Stored Stat StatReply Remove TagSet TagRemove TagGet
    TagTarget Done ListBlobs BlobPage ListTags TagPage NodeStatus NodeStatusReply Have HaveReply KnownChunk AdminStop AdminMaintain
    Submit Submitted TransactionWait TransactionState LedgerStatus LedgerStatusReply LedgerQuery LedgerFound BlockGet BlockReply
    OutcomesGet OutcomesReply BatchGet PeerHello PeerWelcome PeerMessage PeerBatch
    MaintainReply AdminStoreStatus StoreStatusReply AdminDamaged DamagedPage Refused
    AppHello AppBegin AppCheck AppExecute AppCommit AppQuery AppExport AppImport AppState AppChecked AppExecuted AppFound AppPiece
}

/// Whether it is the frame's message.
fn check<M>(frame: &Frame) -> bool
where
    M: Message + Debug + PartialEq,
    M::Archived: Debug + Deserialize<M, HighDeserializer<Failure>>,
{
    let message = match frame.message::<M>() {
        Ok(archived) => {
            let _ = format!("{archived:?}"); // reads every field
            read::<M>(archived)
        }
        Err(FrameError::Malformed) => return true,
        Err(error) => {
            assert!(error == FrameError::Unexpected(frame.kind) && frame.kind != M::KIND);
            return false;
        }
    };
    let again = written(&message);
    assert_eq!(read::<M>(again.message::<M>().expect("it was written here")), message);
    true
}

fn read<M>(archived: &M::Archived) -> M
where
    M: Message,
    M::Archived: Deserialize<M, HighDeserializer<Failure>>,
{
    rkyv::deserialize::<M, Failure>(archived).expect("plain data can be read")
}

fn written<M: Message>(message: &M) -> Frame {
    let mut bytes = Vec::new();
    encode(&mut bytes, 7, message, 0);
    frame(bytes).expect("it was written here")
}

/// `None` when the head is over the limit.
fn frame(bytes: Vec<u8>) -> Option<Frame> {
    let head_bytes = bytes.len() - HEADER_BYTES;
    let mut reader = FrameReader::new(FrameLimits::default());
    reader.push(bytes.into());
    let read = reader.next_frame();
    assert_eq!(read.is_ok(), head_bytes <= FrameLimits::default().head_bytes_max);
    Some(read.ok()?.expect("it is whole"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_checked() {
        assert_eq!(MESSAGES, Kind::ALL.len());
    }
}
