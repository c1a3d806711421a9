//! Where transactions are executed: by the reference application in this process, or by a process of its own behind a local socket. Both are
//! asked by the same messages (`metanode_admin_api::application`), on a thread of their own, one after the other.
//!
//! An application that has gone is dialled again until it is back, and is given the state that it should have (see `replay`); until then
//! nothing is executed, so that this node soon votes no more, and says so. The node's other work goes on.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::{fs::MetadataExt as _, net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use metanode_admin_api::application::{FRAME_LIMITS, Found, Reply, Request, State};
use metanode_application::{Application, Maker, Reference, Session};
use metanode_ibft::{ChainId, Height};
use metanode_ledger::{Done, Outcome, Plan, Transaction};
use metanode_shard::{Companion, fs::FileLock};
use metanode_types::Hash;
use metanode_wire::{FrameReader, Refusal, RefusalCode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::admin::bind;

/// Versions of the application's state that are kept behind the last executed height, beyond the chain's lag: for proofs.
const VERSIONS_KEPT: u64 = 16;

/// Time for an answer. A block of the largest size takes a second or two; who needs longer is taken for stuck.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);

/// Time for a state of gigabytes to be made of its pieces, or of its genesis.
const BEGIN_TIME_MAX: Duration = Duration::from_secs(600);

/// Bytes of a value that is found, at most: with its proof it fits an answer to a client.
const VALUE_BYTES_MAX: usize = 32 << 10;

/// Hashes of a proof at most: as many as a key has bits.
const BESIDE_MAX: usize = 256;

/// Bytes of what an application calls the next piece of its state, at most.
const NEXT_BYTES_MAX: usize = 1 << 10;

/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;

/// The reference application, as this node runs it.
pub const REFERENCE: Maker<Reference> = Maker { begin: Reference::new, empty: Reference::empty };

/// What this program calls itself.
pub(crate) const AGENT: &str = concat!("metanode/", env!("CARGO_PKG_VERSION"));

/// There is no application now: why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the application: {0}")]
pub(super) struct Gone(pub(super) String);

impl From<io::Error> for Gone {
    fn from(error: io::Error) -> Self {
        Self(match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "it does not answer in time".to_owned(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => "nothing listens at its socket".to_owned(),
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                "it has ended the connection".to_owned()
            }
            _ => error.to_string(),
        })
    }
}

/// What is given to an application is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotTaken {
    /// There is none.
    #[error("{0}")]
    Gone(#[from] Gone),
    /// It has something against it.
    #[error("the application refuses: {0}")]
    Refused(Refusal),
}

/// See the module.
pub(super) struct App {
    thread: Companion,
    place: Arc<Mutex<Place>>,
    watch: Arc<Watch>,
    socket: Option<PathBuf>,
}

/// What others see of an application that is being called, and how they end it.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    has_ended: AtomicBool,
    stream: Mutex<Option<UnixStream>>,
    waits: Mutex<Option<String>>,
}

impl Watch {
    /// Why a ledger that is being opened waits for it.
    pub(crate) fn waits(&self) -> Option<String> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_waits(&self, why: Option<String>) {
        *self.waits.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// From now on nothing is asked.
    pub(crate) fn end(&self) {
        self.has_ended.store(true, Ordering::Release);
        if let Some(stream) = self.stream.lock().unwrap_or_else(PoisonError::into_inner).take() {
            _ = stream.shutdown(std::net::Shutdown::Both); // it may have been closed by the other side
        }
    }

    fn watch(&self, stream: &UnixStream) -> io::Result<()> {
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream.try_clone()?);
        match self.has_ended.load(Ordering::Acquire) {
            true => Err(io::ErrorKind::BrokenPipe.into()),
            false => Ok(()),
        }
    }
}

enum Place {
    Here(Box<Session<Reference>>),
    There(Remote),
}

impl Place {
    fn ask(&mut self, request: Request) -> Result<Reply, Gone> {
        match self {
            Self::Here(session) => Ok(session.answer(request)),
            Self::There(remote) => remote.ask(&request),
        }
    }

    /// Asks for something that can't be refused for a good reason.
    fn demand(&mut self, request: Request) -> Result<Reply, Gone> {
        match self.ask(request)? {
            Reply::Refused(refusal) => Err(Gone(format!("it refuses: {refusal}"))),
            reply => Ok(reply),
        }
    }

    fn state(&mut self, request: Request) -> Result<State, Gone> {
        match self.demand(request)? {
            Reply::State(state) => Ok(state),
            _ => Err(unexpected()),
        }
    }
}

fn hello(chain: ChainId) -> Request {
    Request::Hello { agent: AGENT.to_owned(), chain: chain.0 }
}

fn unexpected() -> Gone {
    Gone("it answers something else than was asked".to_owned())
}

impl App {
    /// The reference application in this process, or whoever listens at `socket`.
    pub(super) fn start(socket: Option<PathBuf>, owner: u32, watch: Arc<Watch>) -> io::Result<Self> {
        let place = match &socket {
            None => Place::Here(Box::new(Session::new(AGENT.to_owned(), REFERENCE))),
            Some(socket) => Place::There(Remote { socket: socket.clone(), owner, watch: watch.clone(), open: None }),
        };
        let thread = Companion::start("execute", 1)?;
        Ok(Self { thread, place: Arc::new(Mutex::new(place)), watch, socket })
    }

    /// Where it listens, if it is a process of its own.
    pub(super) fn socket(&self) -> Option<&Path> {
        self.socket.as_deref()
    }

    /// Nothing is asked from now on.
    pub(super) fn end(&self) {
        self.watch.end();
    }

    async fn run<R: Send + 'static>(&self, work: impl FnOnce(&mut Place) -> R + Send + 'static) -> R {
        let place = self.place.clone();
        self.thread.run(move || work(&mut place.lock().unwrap_or_else(PoisonError::into_inner))).await
    }

    /// Dials it, if it is a process of its own, and hears where it is.
    pub(super) async fn connect(&self, chain: ChainId) -> Result<State, Gone> {
        self.run(move |place| {
            if let Place::There(remote) = place {
                remote.dial()?;
            }
            place.state(hello(chain))
        })
        .await
    }

    /// Gives it a part of a genesis or of a state.
    pub(super) async fn give(&self, request: Request) -> Result<State, NotTaken> {
        self.run(move |place| match place.ask(request)? {
            Reply::State(state) => Ok(state),
            Reply::Refused(refusal) => Err(NotTaken::Refused(refusal)),
            _ => Err(unexpected().into()),
        })
        .await
    }

    /// What was begun to be given is given up.
    pub(super) async fn give_up(&self, chain: ChainId) -> Result<(), Gone> {
        self.run(move |place| place.state(hello(chain)).map(drop)).await
    }

    /// What it says to transactions: for each a code (0: nothing against it), and the nonce that its account is to use next.
    pub(super) async fn check(&self, transactions: Bytes, count: usize) -> Result<Vec<(u16, u64)>, Gone> {
        self.run(move |place| check(place, transactions, count)).await
    }

    /// Executes a block. States are kept from `keep_from` on, or from where proofs are asked for, whichever is lower.
    pub(super) async fn execute(&self, plan: Plan, lag: u64, keep_from: Option<Height>) -> Result<Executed, Gone> {
        self.run(move |place| execute(place, plan, lag, keep_from)).await
    }

    /// What is there.
    pub(super) async fn query(&self, request: Request) -> Result<Result<Found, Refusal>, Gone> {
        self.run(move |place| match place.ask(request)? {
            Reply::Found(Found { value: Some(value), .. }) if value.len() > VALUE_BYTES_MAX => {
                let why = format!("a value of {} bytes: {VALUE_BYTES_MAX} fit an answer", value.len());
                Ok(Err(Refusal::new(RefusalCode::NotSupported, why)))
            }
            Reply::Found(found) if found.beside.len() > BESIDE_MAX => Err(unexpected()),
            Reply::Found(found) => Ok(Ok(found)),
            Reply::Refused(refusal) => Ok(Err(refusal)),
            _ => Err(unexpected()),
        })
        .await
    }

    /// A piece of the state of a height, and what to ask for next.
    pub(super) async fn export(&self, height: Height, after: Vec<u8>) -> Result<(Bytes, Option<Vec<u8>>), Gone> {
        self.run(move |place| match place.demand(Request::Export { height: height.0, after: after.clone() })? {
            Reply::Piece { piece, next } => match &next {
                // One that does not go on would have a snapshot grow for ever.
                Some(next) if piece.is_empty() || *next == after || next.len() > NEXT_BYTES_MAX => Err(unexpected()),
                _ => Ok((piece, next)),
            },
            _ => Err(unexpected()),
        })
        .await
    }
}

/// A block that was executed.
#[derive(Debug)]
pub(super) struct Executed {
    /// For the chain.
    pub(super) done: Done,
    /// Root of the application's state behind it.
    pub(super) root: Hash,
}

fn check(place: &mut Place, transactions: Bytes, count: usize) -> Result<Vec<(u16, u64)>, Gone> {
    match place.demand(Request::Check { transactions })? {
        Reply::Checked(verdicts) if verdicts.len() == count => Ok(verdicts),
        _ => Err(unexpected()),
    }
}

fn execute(place: &mut Place, plan: Plan, lag: u64, keep_from: Option<Height>) -> Result<Executed, Gone> {
    let mut root = Hash([0; 32]);
    let mut done = plan.execute(|height, time_ms, transactions| {
        let (outcomes, state) = execute_on(place, height, time_ms, transactions)?;
        root = state;
        Ok::<_, Gone>((outcomes, state))
    })?;
    if !done.early().is_empty() {
        let encoded: Vec<u8> = done.early().iter().flat_map(|early| early.bytes.iter().copied()).collect();
        let verdicts = check(place, encoded.into(), done.early().len())?;
        done.note_nonces(verdicts.into_iter().map(|(_, next)| next));
    }
    let executed = done.executed().height;
    let proofs_from = Height(executed.0.saturating_sub(lag + VERSIONS_KEPT));
    let keep_from = keep_from.map_or(proofs_from, |height| height.min(proofs_from));
    match place.demand(Request::Commit { keep_from: keep_from.0 })? {
        Reply::Done => Ok(Executed { done, root }),
        _ => Err(unexpected()),
    }
}

fn execute_on(
    place: &mut Place,
    height: Height,
    time_ms: u64,
    transactions: &[Transaction<'_>],
) -> Result<(Vec<Outcome>, Hash), Gone> {
    let mut encoded = Vec::with_capacity(transactions.iter().map(|transaction| transaction.bytes().len()).sum());
    transactions.iter().for_each(|transaction| encoded.extend_from_slice(transaction.bytes()));
    let request = Request::Execute { height: height.0, time_ms, transactions: encoded.into() };
    let Reply::Executed { root, outcomes } = place.demand(request)? else { return Err(unexpected()) };
    let (outcomes, rest) = outcomes.as_chunks::<{ Outcome::BARE_BYTES }>();
    if outcomes.len() != transactions.len() || !rest.is_empty() {
        let (found, asked) = (outcomes.len(), transactions.len());
        return Err(Gone(format!("it answers with {found} outcomes for {asked} transactions")));
    }
    let outcomes: Result<Vec<Outcome>, _> = outcomes.iter().map(Outcome::decode_bare).collect();
    Ok((outcomes.map_err(|error| Gone(format!("an outcome: {error}")))?, root))
}

/// An application behind a socket.
struct Remote {
    socket: PathBuf,
    /// Whose process may answer, beside root's.
    owner: u32,
    watch: Arc<Watch>,
    open: Option<Open>,
}

struct Open {
    stream: UnixStream,
    reader: FrameReader,
    number: u32,
    /// Where it is read to.
    piece: Vec<u8>,
}

impl Remote {
    fn dial(&mut self) -> Result<(), Gone> {
        self.open = None;
        let stream = connect(&self.socket)?;
        let peer = rustix::net::sockopt::socket_peercred(&stream).map_err(io::Error::from)?;
        let uid = peer.uid.as_raw();
        if uid != self.owner && uid != 0 {
            return Err(Gone(format!(
                "the process that answers belongs to user {uid}, not to the data folder's owner"
            )));
        }
        stream.set_write_timeout(Some(ANSWER_TIME_MAX))?;
        self.watch.watch(&stream)?;
        let reader = FrameReader::new(FRAME_LIMITS);
        self.open = Some(Open { stream, reader, number: 0, piece: vec![0; READ_BYTES] });
        Ok(())
    }

    fn ask(&mut self, request: &Request) -> Result<Reply, Gone> {
        let Some(open) = &mut self.open else { return Err(Gone("there is no connection".to_owned())) };
        let answer = open.ask(request);
        if answer.is_err() {
            self.open = None; // what comes there now answers nothing any more
        }
        answer
    }
}

/// Connects without a wait: who has a full queue of connections is not there.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

impl Open {
    fn ask(&mut self, request: &Request) -> Result<Reply, Gone> {
        self.number = self.number.wrapping_add(1);
        let mut out = Vec::new();
        let body = request.encode(&mut out, self.number);
        self.stream.write_all(&out)?;
        self.stream.write_all(&body)?;
        let time = match request {
            Request::Begin { .. } | Request::Import { .. } => BEGIN_TIME_MAX,
            _ => ANSWER_TIME_MAX,
        };
        let deadline = Instant::now() + time;
        let malformed = |error| Gone(format!("what it answers can't be read: {error}"));
        loop {
            if let Some(frame) = self.reader.next_frame().map_err(malformed)? {
                if frame.request != self.number {
                    return Err(unexpected());
                }
                return Reply::from_frame(&frame).map_err(malformed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            self.stream.set_read_timeout(Some(left))?;
            if !read_some(&mut self.stream, &mut self.reader, &mut self.piece)? {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
    }
}

/// Reads what there is; whether the stream goes on.
fn read_some(stream: &mut UnixStream, reader: &mut FrameReader, piece: &mut [u8]) -> io::Result<bool> {
    loop {
        match stream.read(piece) {
            Ok(count) => {
                reader.push(Bytes::copy_from_slice(&piece[..count]));
                return Ok(count > 0);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Serves an application at `socket` (mode 0600), one connection after the other, for as long as the process lives. `ready` is called once the
/// socket is there, and says whether to go on. Only one process does so: another one gets [`io::ErrorKind::AddrInUse`].
pub fn serve_application<A: Application>(
    socket: &Path,
    mut session: Session<A>,
    ready: impl FnOnce() -> bool,
) -> io::Result<std::convert::Infallible> {
    let mut lock = socket.as_os_str().to_owned();
    lock.push(".lock");
    let Some(_lock) = FileLock::try_acquire(PathBuf::from(lock))? else {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process serves it"));
    };
    let listener = bind(socket)?;
    if !ready() {
        return Err(io::ErrorKind::Interrupted.into());
    }
    loop {
        let (stream, _) = listener.accept()?;
        if let Err(error) = converse(stream, &mut session) {
            tracing::info!("the connection of a node has ended: {error}");
        }
    }
}

fn converse<A: Application>(mut stream: UnixStream, session: &mut Session<A>) -> io::Result<()> {
    stream.set_write_timeout(Some(ANSWER_TIME_MAX))?;
    let mut reader = FrameReader::new(FRAME_LIMITS);
    let mut piece = vec![0; READ_BYTES];
    let malformed = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    loop {
        while let Some(frame) = reader.next_frame().map_err(malformed)? {
            let number = frame.request;
            let reply = session.answer(Request::from_frame(&frame).map_err(malformed)?);
            let mut out = Vec::new();
            let body = reply.encode(&mut out, number);
            stream.write_all(&out)?;
            stream.write_all(&body)?;
        }
        if !read_some(&mut stream, &mut reader, &mut piece)? {
            return Ok(());
        }
    }
}

/// Who owns a folder.
pub(super) fn owner_of(folder: &Path) -> io::Result<u32> {
    Ok(folder.metadata()?.uid())
}
