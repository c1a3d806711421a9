//! Requests: from frames to types, and from types to answers.

use std::{rc::Rc, time::Duration};

use bytes::Bytes;
use metanode_shard::{now, run_blocking};
use metanode_store::{Fetched, PutOptions, StoreError, WHOLE_BYTES_MAX};
use metanode_types::{
    BlobKind, DurabilityClass, Hash, TagName,
    limits::{FRAME_BODY_BYTES_MAX, FRAME_HEAD_BYTES_MAX, HAVE_CHUNKS_MAX, LIST_PAGE_MAX, SUBMIT_TRANSACTIONS_MAX},
};
use metanode_wire::{
    Frame, FrameError, Kind, Refusal, RefusalCode,
    message::{
        BlobEntry, BlobPage, BlockGet, Get, Have, Hello, LedgerQuery, LedgerStatus, ListBlobs, ListTags, NodeStatus,
        OutcomesGet, Put, Remove, Stat, StatReply, Submit, TagEntry, TagGet, TagPage, TagRemove, TagSet,
        TransactionWait, Welcome,
    },
};

use crate::{
    admission::{Bound, Permit},
    ledger::{LedgerRequest, Sender},
    reply::{Reply, refusal_of},
    session::Session,
    state::AGENT,
};

/// A request that fits one frame and is answered by one.
#[derive(Debug)]
pub(crate) enum Request {
    Hello { agent: String },
    Get(Hash),
    Put { hash: Hash, class: DurabilityClass, kind: BlobKind, hold: bool, body: Bytes },
    Stat(Hash),
    Remove(Hash),
    TagSet(TagName, Hash),
    TagRemove(TagName),
    TagGet(TagName),
    ListBlobs { after: Option<Hash>, count: usize },
    ListTags { after: Option<TagName>, count: usize },
    NodeStatus,
    Have(Vec<Hash>),
    Ledger(Box<LedgerAsk>),
}

/// What is asked of the ledger.
#[derive(Debug)]
pub(crate) enum LedgerAsk {
    Submit(Bytes),
    Wait { id: [u8; 32], wait: Duration },
    Status,
    Query { kind: u8, account: [u8; 32], name: Vec<u8> },
    Block { height: u64, wait: Duration },
    Outcomes { height: u64, first: u32, wait: Duration },
}

/// Why a frame is no request.
#[derive(Debug)]
pub(crate) enum RequestError {
    /// What follows on the connection can't be trusted.
    Frame(FrameError),
    /// This request is refused, the next may be fine.
    Refused(Refusal),
}

impl From<FrameError> for RequestError {
    fn from(error: FrameError) -> Self {
        Self::Frame(error)
    }
}

impl From<Refusal> for RequestError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Request {
    /// Validates a frame.
    pub(crate) fn from_frame(frame: &Frame) -> Result<Self, RequestError> {
        if !frame.body.is_empty() && !matches!(frame.kind, Kind::Put | Kind::Submit) {
            return Err(malformed(format_args!("{:?} has no body", frame.kind)).into());
        }
        Ok(match frame.kind {
            Kind::Hello => Self::Hello { agent: frame.message::<Hello>()?.agent.as_str().to_owned() },
            Kind::Get => Self::Get(Hash(frame.message::<Get>()?.hash)),
            Kind::Put => {
                let put = frame.message::<Put>()?;
                let (class, kind) = class_and_kind(put.class, put.kind)?;
                Self::Put { hash: Hash(put.hash), class, kind, hold: put.hold, body: frame.body.clone() }
            }
            Kind::Stat => Self::Stat(Hash(frame.message::<Stat>()?.hash)),
            Kind::Remove => Self::Remove(Hash(frame.message::<Remove>()?.hash)),
            Kind::TagSet => {
                let set = frame.message::<TagSet>()?;
                Self::TagSet(tag_name(set.name.as_str())?, Hash(set.hash))
            }
            Kind::TagRemove => Self::TagRemove(tag_name(frame.message::<TagRemove>()?.name.as_str())?),
            Kind::TagGet => Self::TagGet(tag_name(frame.message::<TagGet>()?.name.as_str())?),
            Kind::ListBlobs => {
                let list = frame.message::<ListBlobs>()?;
                Self::ListBlobs {
                    after: list.after.as_ref().map(|hash| Hash(*hash)),
                    count: page(list.count.to_native()),
                }
            }
            Kind::ListTags => {
                let list = frame.message::<ListTags>()?;
                let after = list.after.as_ref().map(|name| tag_name(name.as_str())).transpose()?;
                Self::ListTags { after, count: page(list.count.to_native()) }
            }
            Kind::NodeStatus => frame.message::<NodeStatus>().map(|_| Self::NodeStatus)?,
            Kind::Have => {
                let have = frame.message::<Have>()?;
                if have.names.len() > HAVE_CHUNKS_MAX {
                    return Err(
                        malformed(format_args!("one request asks about {HAVE_CHUNKS_MAX} chunks at most")).into()
                    );
                }
                Self::Have(have.names.iter().map(|name| Hash(*name)).collect())
            }
            Kind::Submit
            | Kind::TransactionWait
            | Kind::LedgerStatus
            | Kind::LedgerQuery
            | Kind::BlockGet
            | Kind::OutcomesGet => Self::Ledger(Box::new(ledger_ask(frame)?)),
            Kind::AdminStop | Kind::AdminMaintain | Kind::AdminStoreStatus | Kind::AdminDamaged => {
                let refusal = Refusal::new(RefusalCode::NotSupported, "a node is managed over its local socket only");
                return Err(refusal.into());
            }
            other => return Err(FrameError::Unexpected(other).into()),
        })
    }

    /// Whether a peer with these rights may ask so.
    pub(crate) fn is_permitted(&self, session: &Session) -> bool {
        match self {
            Self::Hello { .. } => true,
            Self::Get(_)
            | Self::Stat(_)
            | Self::TagGet(_)
            | Self::ListBlobs { .. }
            | Self::ListTags { .. }
            | Self::NodeStatus
            | Self::Ledger(_) => session.rights.read,
            Self::Put { .. } | Self::Remove(_) | Self::TagSet(..) | Self::TagRemove(_) | Self::Have(_) => {
                session.rights.write
            }
        }
    }
}

fn ledger_ask(frame: &Frame) -> Result<LedgerAsk, FrameError> {
    let millis = |wait: u32| Duration::from_millis(wait.into());
    Ok(match frame.kind {
        Kind::Submit => frame.message::<Submit>().map(|_| LedgerAsk::Submit(frame.body.clone()))?,
        Kind::TransactionWait => {
            let wait = frame.message::<TransactionWait>()?;
            LedgerAsk::Wait { id: wait.id, wait: millis(wait.wait_ms.to_native()) }
        }
        Kind::LedgerStatus => frame.message::<LedgerStatus>().map(|_| LedgerAsk::Status)?,
        Kind::LedgerQuery => {
            let query = frame.message::<LedgerQuery>()?;
            LedgerAsk::Query { kind: query.kind, account: query.account, name: query.name.to_vec() }
        }
        Kind::BlockGet => {
            let get = frame.message::<BlockGet>()?;
            LedgerAsk::Block { height: get.height.to_native(), wait: millis(get.wait_ms.to_native()) }
        }
        Kind::OutcomesGet => {
            let get = frame.message::<OutcomesGet>()?;
            let wait = millis(get.wait_ms.to_native());
            LedgerAsk::Outcomes { height: get.height.to_native(), first: get.first.to_native(), wait }
        }
        other => return Err(FrameError::Unexpected(other)),
    })
}

/// Class and kind of an upload.
pub(crate) fn class_and_kind(class: u8, kind: u8) -> Result<(DurabilityClass, BlobKind), Refusal> {
    let class = DurabilityClass::from_u8(class).ok_or_else(|| malformed(format_args!("durability class {class}")))?;
    let kind = BlobKind::from_u8(kind).ok_or_else(|| malformed(format_args!("blob kind {kind}")))?;
    Ok((class, kind))
}

pub(crate) fn malformed(what: std::fmt::Arguments<'_>) -> Refusal {
    Refusal::new(RefusalCode::Malformed, what.to_string())
}

fn tag_name(text: &str) -> Result<TagName, Refusal> {
    text.parse().map_err(|error| malformed(format_args!("{error}")))
}

fn page(count: u32) -> usize {
    (count as usize).clamp(1, LIST_PAGE_MAX)
}

/// What an admitted request holds.
pub(crate) struct Admitted {
    /// Until the store has answered: its place, and room for its bytes or a place at the disk.
    pub(crate) request: (Permit, Option<Permit>),
    /// Until the answer is written: its bytes.
    pub(crate) answer: Permit,
}

/// Bytes that an answer without contents is counted for.
const ANSWER_BYTES: u64 = 256;

/// Bytes of an entry in a page of blobs, and of one in a page of tags (a name, a hash, what holds them).
const BLOB_ENTRY_BYTES: u64 = 64;
const TAG_ENTRY_BYTES: u64 = 384;

impl Request {
    /// Room for the request and its answer, or the refusal.
    pub(crate) fn admit(&self, session: &Rc<Session>) -> Result<Admitted, Refusal> {
        let place = session.admit(Bound::Requests, 1).map_err(Refusal::busy)?;
        let extra = match self {
            Self::Put { body, .. } => Some((Bound::Uploads, body.len() as u64)),
            Self::Get(_) => Some((Bound::Reads, 1)),
            Self::Ledger(ask) => match &**ask {
                LedgerAsk::Submit(body) => Some((Bound::Uploads, body.len() as u64)),
                _ => None,
            },
            _ => None,
        };
        let extra = extra.map(|(bound, amount)| session.admit(bound, amount)).transpose().map_err(Refusal::busy)?;
        let answer_bytes = match self {
            Self::ListBlobs { count, .. } => *count as u64 * BLOB_ENTRY_BYTES,
            Self::ListTags { count, .. } => *count as u64 * TAG_ENTRY_BYTES,
            Self::Ledger(ask) => match &**ask {
                LedgerAsk::Outcomes { .. } => FRAME_BODY_BYTES_MAX as u64,
                LedgerAsk::Submit(_) => SUBMIT_TRANSACTIONS_MAX as u64 * 24, // a refusal for each
                LedgerAsk::Status | LedgerAsk::Query { .. } | LedgerAsk::Block { .. } => FRAME_HEAD_BYTES_MAX as u64,
                LedgerAsk::Wait { .. } => 0,
            },
            _ => 0, // the bytes of a blob are admitted when it is to be read
        };
        let answer = session.admit(Bound::Answers, ANSWER_BYTES + answer_bytes).map_err(Refusal::busy)?;
        Ok(Admitted { request: (place, extra), answer })
    }
}

/// Answers a permitted request. What the answer holds in memory is to be kept until it is written.
pub(crate) async fn answer(session: &Session, request: Request, admitted: Admitted) -> (Reply, Permit) {
    let Admitted { request: _held, mut answer } = admitted;
    let answered = match request {
        Request::Hello { agent } => Ok(welcome(session, &agent)),
        Request::Get(hash) => get(session, hash, &mut answer).await,
        other => perform(session, other).await,
    };
    (answered.unwrap_or_else(|error| Reply::Refused(refusal_of(&error))), answer)
}

/// Reads a blob that is not in the memory of this shard.
async fn get(session: &Session, hash: Hash, answer: &mut Permit) -> Result<Reply, StoreError> {
    let shard = &session.shard;
    let arrived = now();
    let _place = shard.reads.enter().await;
    shard.read_wait.set(now() - arrived);
    // The size is known here only if this shard has the blob; then the rest is given back.
    let most = shard.store.size_here(&hash).map_or(WHOLE_BYTES_MAX as u64, |size| size.min(WHOLE_BYTES_MAX as u64));
    if let Err(retry_after_ms) = answer.extend(most) {
        return Ok(Reply::Refused(Refusal::busy(retry_after_ms)));
    }
    let fetched = shard.store.get(hash).await;
    answer.shrink(ANSWER_BYTES + fetched.as_ref().map_or(0, Fetched::bytes_here));
    Ok(match fetched? {
        Fetched::Whole(bytes) => Reply::Whole(bytes),
        Fetched::Large { size_bytes } => Reply::Large(size_bytes),
    })
}

fn welcome(session: &Session, agent: &str) -> Reply {
    tracing::debug!(peer = ?session.peer, agent, "hello");
    let shard = &session.shard;
    Reply::Welcome(Box::new(Welcome {
        agent: AGENT.to_owned(),
        shards: shard.store.shards().get(),
        shard: shard.store.shard().0,
        whole_bytes_max: WHOLE_BYTES_MAX as u32,
        requests_max: shard.limits.requests_max,
        may_write: session.rights.write,
    }))
}

async fn perform(session: &Session, request: Request) -> Result<Reply, StoreError> {
    let store = &session.shard.store;
    Ok(match request {
        Request::Hello { .. } | Request::Get(_) => unreachable!("answered by the caller"),
        Request::Put { hash, class, kind, hold, body } => {
            let options = PutOptions { class, kind, hold, keep: false, leases: Some(session.leases.clone()) };
            Reply::Stored(store.put(hash, body, options).await?)
        }
        // The futures of all others are larger, and each waiting request would take the room of the largest.
        rare => Box::pin(perform_rare(session, rare)).await?,
    })
}

async fn perform_rare(session: &Session, request: Request) -> Result<Reply, StoreError> {
    let store = &session.shard.store;
    Ok(match request {
        Request::Hello { .. } | Request::Get(_) | Request::Put { .. } => unreachable!("performed by the caller"),
        Request::Stat(hash) => {
            let stat = store.stat(hash).await?;
            Reply::Stat(StatReply {
                size_bytes: stat.size_bytes,
                kind: stat.kind as u8,
                class: stat.class as u8,
                held: stat.held,
                references: stat.references,
            })
        }
        Request::Remove(hash) => store.remove(hash).await.map(|()| Reply::Done)?,
        Request::TagSet(name, hash) => store.tag_set(name, hash).await.map(|()| Reply::Done)?,
        Request::TagRemove(name) => store.tag_remove(name).await.map(|()| Reply::Done)?,
        Request::TagGet(name) => Reply::TagTarget(store.tag_get(name).await?),
        Request::ListBlobs { after, count } => {
            let _place = session.shard.listings.enter().await;
            let page = store.list_blobs(after, count).await?;
            let entries = page.entries.into_iter().map(|line| BlobEntry {
                hash: line.hash.0,
                size_bytes: line.size_bytes,
                kind: line.kind as u8,
                held: line.held,
                references: line.references,
            });
            Reply::Blobs(BlobPage { entries: entries.collect(), more: page.more })
        }
        Request::ListTags { after, count } => {
            let _place = session.shard.listings.enter().await;
            let page = store.list_tags(after, count).await?;
            let entries = page.entries.into_iter();
            let entries = entries.map(|line| TagEntry { name: line.name.as_str().to_owned(), hash: line.hash.0 });
            Reply::Tags(TagPage { entries: entries.collect(), more: page.more })
        }
        Request::Ledger(ask) => ledger(session, *ask).await,
        Request::Have(names) => Reply::Have(store.have_chunks(&names).await?),
        Request::NodeStatus => {
            let _place = session.shard.listings.enter().await;
            let state = session.shard.state.clone();
            // statvfs(2) may wait when the data folder is on a network file system.
            Reply::Status(Box::new(run_blocking(move || state.status().to_message()).await))
        }
    })
}

async fn ledger(session: &Session, ask: LedgerAsk) -> Reply {
    let Some(route) = &session.shard.ledger else {
        return Refusal::new(RefusalCode::NotSupported, "this node has no ledger").into();
    };
    let request = match ask {
        LedgerAsk::Submit(encoded) => match session.peer {
            Some(key) => LedgerRequest::Submit { sender: Sender { key, may_write: session.rights.write }, encoded },
            None => return RefusalCode::Forbidden.into(),
        },
        LedgerAsk::Wait { id, wait } => LedgerRequest::Wait { id, wait },
        LedgerAsk::Status => LedgerRequest::Status,
        LedgerAsk::Query { kind, account, name } => LedgerRequest::Query { kind, account, name },
        LedgerAsk::Block { height, wait } => LedgerRequest::Block { height, wait },
        LedgerAsk::Outcomes { height, first, wait } => LedgerRequest::Outcomes { height, first, wait },
    };
    match route.ask(request).await {
        Ok(reply) => Reply::Ledger(reply),
        Err(refusal) => refusal.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::REQUEST_BYTES;

    /// Bytes of the future that a function returns.
    fn size<'a, F: Future>(_: impl FnOnce(&'a Session, Request, Admitted) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_waiting_request_takes_what_the_limit_counts() {
        let task = size(answer);
        // The task's own bookkeeping, the guard, the answer's place.
        assert!(task + 512 <= REQUEST_BYTES as usize, "{task} bytes");
    }
}
