//! What a node and an application's process say to each other.
//!
//! The application listens on a Unix stream socket in the node's data folder, mode 0600; the node dials it. Frames are those of
//! `metanode-wire`, with larger bodies ([`FRAME_LIMITS`]); the node asks, one request after the other, and the application answers.
//!
//! | request | answer | meaning |
//! |---|---|---|
//! | [`Request::Hello`] | [`Reply::State`] | first, on each connection |
//! | [`Request::Begin`] | [`Reply::State`] | the state of a chain's beginning, whatever there is; the genesis may come in parts |
//! | [`Request::Import`] | [`Reply::State`] | a state that was exported, in pieces; the last one makes it the application's |
//! | [`Request::Check`] | [`Reply::Checked`] | what a batch should not carry is refused early |
//! | [`Request::Execute`] | [`Reply::Executed`] | the next height |
//! | [`Request::Commit`] | [`Reply::Done`] | what was executed is noted by the node; how far back states are asked for |
//! | [`Request::Query`] | [`Reply::Found`] | what is there, with proof |
//! | [`Request::Export`] | [`Reply::Piece`] | a piece of the state of a height |
//!
//! What can't be done is answered by [`Reply::Refused`]; nothing of it was done. Who gets something that is no request ends the connection.
//!
//! Who has the state for good is the node, by its blocks and snapshots: an application that has lost its own, or is at another height than the
//! node, is given it again. So an application needs no disk of its own.

use bytes::Bytes;
use metanode_types::Hash;
use metanode_wire::{
    Frame, FrameError, FrameLimits, Kind, Refusal, encode_within,
    message::{
        AppBegin, AppCheck, AppChecked, AppCommit, AppExecute, AppExecuted, AppExport, AppFound, AppHello, AppImport,
        AppPiece, AppQuery, AppState, Done, Message, Refused,
    },
};

/// What a frame may have at most. A block has 64 batches of 256 KiB, with 8,192 transactions each; an outcome of one has 35 bytes.
pub const FRAME_LIMITS: FrameLimits = FrameLimits { head_bytes_max: 128 << 10, body_bytes_max: 32 << 20 };

/// Bytes of a piece of a state, or of a part of a genesis, at most: one chunk of the store.
pub const PIECE_BYTES_MAX: usize = metanode_types::limits::CHUNK_BYTES;

/// What a node asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// Which chain it is about.
    Hello {
        /// What asks.
        agent: String,
        /// The chain's identity.
        chain: [u8; 32],
    },
    /// Begin at the beginning.
    Begin {
        /// The genesis's text, or a part of it.
        genesis: Bytes,
        /// There is more of it.
        more: bool,
    },
    /// Take a piece of a state.
    Import {
        /// The state's height.
        height: u64,
        /// The piece.
        piece: Bytes,
        /// There are more.
        more: bool,
    },
    /// May these be executed?
    Check {
        /// Transactions, one behind the other.
        transactions: Bytes,
    },
    /// Execute a height.
    Execute {
        /// Which.
        height: u64,
        /// The block's time, in milliseconds since 1970.
        time_ms: u64,
        /// Transactions, one behind the other.
        transactions: Bytes,
    },
    /// What was executed stays so.
    Commit {
        /// States of heights below it are not asked for any more.
        keep_from: u64,
    },
    /// What is there?
    Query {
        /// 1: an account; 2: a value that an account has set.
        kind: u8,
        /// The account.
        account: [u8; 32],
        /// The value's name.
        name: Vec<u8>,
    },
    /// A piece of a state.
    Export {
        /// The state's height.
        height: u64,
        /// What the piece before said; empty for the first.
        after: Vec<u8>,
    },
}

impl Request {
    /// Appends the request's head as a frame; its body is to be sent behind.
    pub fn encode(&self, out: &mut Vec<u8>, request: u32) -> Bytes {
        match self {
            Self::Hello { agent, chain } => {
                framed(out, request, &AppHello { agent: agent.clone(), chain: *chain }, &Bytes::new())
            }
            Self::Begin { genesis, more } => framed(out, request, &AppBegin { more: *more }, genesis),
            Self::Import { height, piece, more } => {
                framed(out, request, &AppImport { height: *height, more: *more }, piece)
            }
            Self::Check { transactions } => framed(out, request, &AppCheck {}, transactions),
            Self::Execute { height, time_ms, transactions } => {
                framed(out, request, &AppExecute { height: *height, time_ms: *time_ms }, transactions)
            }
            Self::Commit { keep_from } => framed(out, request, &AppCommit { keep_from: *keep_from }, &Bytes::new()),
            Self::Query { kind, account, name } => {
                let query = AppQuery { kind: *kind, account: *account, name: name.clone() };
                framed(out, request, &query, &Bytes::new())
            }
            Self::Export { height, after } => {
                framed(out, request, &AppExport { height: *height, after: after.clone() }, &Bytes::new())
            }
        }
    }

    /// Validates a frame that came in.
    pub fn from_frame(frame: &Frame) -> Result<Self, FrameError> {
        Ok(match frame.kind {
            Kind::AppHello => {
                let hello = frame.message::<AppHello>()?;
                Self::Hello { agent: hello.agent.as_str().to_owned(), chain: hello.chain }
            }
            Kind::AppBegin => {
                let more = frame.message::<AppBegin>()?.more;
                Self::Begin { genesis: frame.body.clone(), more }
            }
            Kind::AppImport => {
                let import = frame.message::<AppImport>()?;
                let (height, more) = (import.height.to_native(), import.more);
                Self::Import { height, piece: frame.body.clone(), more }
            }
            Kind::AppCheck => {
                frame.message::<AppCheck>()?;
                Self::Check { transactions: frame.body.clone() }
            }
            Kind::AppExecute => {
                let execute = frame.message::<AppExecute>()?;
                let (height, time_ms) = (execute.height.to_native(), execute.time_ms.to_native());
                Self::Execute { height, time_ms, transactions: frame.body.clone() }
            }
            Kind::AppCommit => Self::Commit { keep_from: frame.message::<AppCommit>()?.keep_from.to_native() },
            Kind::AppQuery => {
                let query = frame.message::<AppQuery>()?;
                Self::Query { kind: query.kind, account: query.account, name: query.name.to_vec() }
            }
            Kind::AppExport => {
                let export = frame.message::<AppExport>()?;
                Self::Export { height: export.height.to_native(), after: export.after.to_vec() }
            }
            other => return Err(FrameError::Unexpected(other)),
        })
    }
}

/// Where an application is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// What answers.
    pub agent: String,
    /// It has a state of the chain that was named.
    pub begun: bool,
    /// The last executed height.
    pub height: u64,
    /// The root of the state there.
    pub root: Hash,
}

/// What is at a place of the state, with its proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// As of this height.
    pub height: u64,
    /// Where in the state.
    pub key: [u8; 32],
    /// What is there.
    pub value: Option<Vec<u8>>,
    /// Hashes beside the way down, the root's child first.
    pub beside: Vec<Hash>,
    /// What is at the end of the way: key and hash.
    pub found: Option<([u8; 32], Hash)>,
}

/// What an application answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// To [`Request::Hello`], [`Request::Begin`] and [`Request::Import`].
    State(State),
    /// To [`Request::Check`]: for each, a code (0: nothing against it) and the nonce that its account is to use next.
    Checked(Vec<(u16, u64)>),
    /// To [`Request::Execute`].
    Executed {
        /// The root of the state behind it.
        root: Hash,
        /// Outcomes, 35 bytes each, as the ledger encodes them.
        outcomes: Bytes,
    },
    /// To [`Request::Commit`].
    Done,
    /// To [`Request::Query`].
    Found(Found),
    /// To [`Request::Export`].
    Piece {
        /// The piece.
        piece: Bytes,
        /// What to ask for next; `None`: that was the last.
        next: Option<Vec<u8>>,
    },
    /// It can't be done.
    Refused(Refusal),
}

/// Bytes of a verdict in [`Reply::Checked`].
const CHECKED_BYTES: usize = 2 + 8;

impl Reply {
    /// Appends the reply's head as a frame; its body is to be sent behind.
    pub fn encode(&self, out: &mut Vec<u8>, request: u32) -> Bytes {
        let none = Bytes::new();
        match self {
            Self::State(State { agent, begun, height, root }) => {
                let state = AppState { agent: agent.clone(), begun: *begun, height: *height, root: root.0 };
                framed(out, request, &state, &none)
            }
            Self::Checked(verdicts) => {
                let mut body = Vec::with_capacity(verdicts.len() * CHECKED_BYTES);
                for (code, next) in verdicts {
                    body.extend(code.to_le_bytes());
                    body.extend(next.to_le_bytes());
                }
                framed(out, request, &AppChecked {}, &body.into())
            }
            Self::Executed { root, outcomes } => framed(out, request, &AppExecuted { root: root.0 }, outcomes),
            Self::Done => framed(out, request, &Done {}, &none),
            Self::Found(Found { height, key, value, beside, found }) => {
                let found = AppFound {
                    height: *height,
                    key: *key,
                    value: value.clone(),
                    beside: beside.iter().map(|hash| hash.0).collect(),
                    found: found.map(|(key, hash)| (key, hash.0)),
                };
                framed(out, request, &found, &none)
            }
            Self::Piece { piece, next } => framed(out, request, &AppPiece { next: next.clone() }, piece),
            Self::Refused(refusal) => framed(out, request, &refusal.to_message(), &none),
        }
    }

    /// Validates a frame that came in.
    pub fn from_frame(frame: &Frame) -> Result<Self, FrameError> {
        Ok(match frame.kind {
            Kind::AppState => {
                let state = frame.message::<AppState>()?;
                Self::State(State {
                    agent: state.agent.as_str().to_owned(),
                    begun: state.begun,
                    height: state.height.to_native(),
                    root: Hash(state.root),
                })
            }
            Kind::AppChecked => {
                frame.message::<AppChecked>()?;
                let (verdicts, rest) = frame.body.as_chunks::<CHECKED_BYTES>();
                if !rest.is_empty() {
                    return Err(FrameError::Malformed);
                }
                let verdict = |bytes: &[u8; CHECKED_BYTES]| {
                    let [a, b, next @ ..] = *bytes;
                    (u16::from_le_bytes([a, b]), u64::from_le_bytes(next))
                };
                Self::Checked(verdicts.iter().map(verdict).collect())
            }
            Kind::AppExecuted => {
                let root = Hash(frame.message::<AppExecuted>()?.root);
                Self::Executed { root, outcomes: frame.body.clone() }
            }
            Kind::Done => frame.message::<Done>().map(|_| Self::Done)?,
            Kind::AppFound => {
                let found = frame.message::<AppFound>()?;
                Self::Found(Found {
                    height: found.height.to_native(),
                    key: found.key,
                    value: found.value.as_ref().map(|value| value.to_vec()),
                    beside: found.beside.iter().map(|hash| Hash(*hash)).collect(),
                    found: found.found.as_ref().map(|found| (found.0, Hash(found.1))),
                })
            }
            Kind::AppPiece => {
                let next = frame.message::<AppPiece>()?.next.as_ref().map(|next| next.to_vec());
                // One that promises more from the beginning would have a reader ask for ever.
                if next.as_ref().is_some_and(Vec::is_empty) {
                    return Err(FrameError::Malformed);
                }
                Self::Piece { piece: frame.body.clone(), next }
            }
            Kind::Refused => frame.message::<Refused>().map(|message| Self::Refused(Refusal::from_message(message)))?,
            other => return Err(FrameError::Unexpected(other)),
        })
    }
}

fn framed<M: Message>(out: &mut Vec<u8>, request: u32, message: &M, body: &Bytes) -> Bytes {
    encode_within(FRAME_LIMITS, out, request, message, body.len());
    body.clone()
}

#[cfg(test)]
mod tests {
    use metanode_wire::{FrameReader, RefusalCode};

    use super::*;

    fn frame(encode: impl FnOnce(&mut Vec<u8>) -> Bytes) -> Frame {
        let mut bytes = Vec::new();
        let body = encode(&mut bytes);
        let mut reader = FrameReader::new(FRAME_LIMITS);
        reader.push(bytes.into());
        reader.push(body);
        reader.next_frame().unwrap().unwrap()
    }

    #[test]
    fn requests_round_trip() {
        let body = Bytes::from_static(b"body");
        for request in [
            Request::Hello { agent: "node".to_owned(), chain: [1; 32] },
            Request::Begin { genesis: body.clone(), more: true },
            Request::Import { height: 2, piece: body.clone(), more: false },
            Request::Check { transactions: body.clone() },
            Request::Execute { height: 3, time_ms: 4, transactions: vec![5; 16 << 20].into() },
            Request::Commit { keep_from: 6 },
            Request::Query { kind: 2, account: [7; 32], name: b"name".to_vec() },
            Request::Export { height: 8, after: vec![9; 32] },
        ] {
            let frame = frame(|out| request.encode(out, 7));
            assert_eq!((frame.request, Request::from_frame(&frame)), (7, Ok(request)));
        }
        let reply = frame(|out| Reply::Done.encode(out, 0));
        assert_eq!(Request::from_frame(&reply), Err(FrameError::Unexpected(Kind::Done)));
    }

    #[test]
    fn replies_round_trip() {
        let found = Found {
            height: 1,
            key: [2; 32],
            value: Some(vec![3]),
            beside: vec![Hash([4; 32]); 256],
            found: Some(([5; 32], Hash([6; 32]))),
        };
        for reply in [
            Reply::State(State { agent: "app".to_owned(), begun: true, height: 3, root: Hash([4; 32]) }),
            Reply::Checked(vec![(0, 1), (300, u64::MAX)]),
            Reply::Executed { root: Hash([5; 32]), outcomes: vec![6; 64 * 8_192 * 35].into() },
            Reply::Done,
            Reply::Found(found.clone()),
            Reply::Found(Found { value: None, found: None, beside: Vec::new(), ..found }),
            Reply::Piece { piece: vec![7; PIECE_BYTES_MAX].into(), next: Some(vec![8]) },
            Reply::Piece { piece: Bytes::new(), next: None },
            Reply::Refused(Refusal::new(RefusalCode::NotFound, "no such height")),
        ] {
            let frame = frame(|out| reply.encode(out, 9));
            assert_eq!((frame.request, Reply::from_frame(&frame)), (9, Ok(reply)));
        }
    }

    #[test]
    fn bodies_that_are_none_are_malformed() {
        let half = frame(|out| framed(out, 0, &AppChecked {}, &Bytes::from_static(&[0; CHECKED_BYTES + 1])));
        assert_eq!(Reply::from_frame(&half), Err(FrameError::Malformed));
        let endless = frame(|out| framed(out, 0, &AppPiece { next: Some(Vec::new()) }, &Bytes::new()));
        assert_eq!(Reply::from_frame(&endless), Err(FrameError::Malformed));
    }
}
