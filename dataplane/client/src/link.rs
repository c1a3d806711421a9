//! One connection: its lanes and the requests on them.
//!
//! A *lane* is a bidirectional stream that lives as long as the connection and carries small requests, with one task that
//! writes and one that reads. A request costs no task and no timer of its own: the requester encodes its frame into the lane's
//! buffer, the writer sends all frames that have piled up at once, the reader hands every answer it finds in a wake-up to the
//! [`Pending`] table, and a watchdog looks for requests that have waited too long.

use std::{
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use metanode_types::limits::FRAME_BODY_BYTES_MAX;
use metanode_wire::{
    Frame, FrameError, FrameLimits, FrameReader, Kind, Message, Refusal, RefusalCode, encode,
    message::{Hello, Refused, Welcome},
};
use tokio::{sync::Semaphore, time::Instant};

use crate::{
    ClientConfig, ClientError,
    error::Failure,
    pending::{Outcome, Pending},
};

/// Bodies up to this size are copied behind their frame's head; larger ones are sent from where they lie. A copy of 8 KiB
/// costs less than the bookkeeping of one more piece.
const BODY_COPY_BYTES_MAX: usize = 8 * 1024;

/// Pieces taken from a stream in one go: a wake-up after a burst of datagrams finds about as many.
const PIECES_PER_READ: usize = 64;

/// Rounds of the watchdog in one request timeout: it fires up to an eighth late.
const WATCHDOG_ROUNDS: u32 = 8;

/// Close codes of this client.
pub(crate) mod close {
    pub(crate) const DONE: u32 = 0;
    pub(crate) const PROTOCOL: u32 = 1;
}

/// A connection and what the node said of itself.
#[derive(Debug)]
pub(crate) struct Link {
    shared: Arc<Shared>,
    pub(crate) welcome: Welcome,
    busy_patience: Duration,
    pub(crate) request_timeout: Duration,
    transfers: AtomicUsize,
}

#[derive(Debug)]
struct Shared {
    connection: quinn::Connection,
    state: Mutex<State>,
    /// One permit for each free slot of the table.
    permits: Semaphore,
}

#[derive(Debug)]
struct State {
    pending: Pending,
    lanes: Vec<Outgoing>,
}

/// What a lane has to send.
#[derive(Debug, Default)]
struct Outgoing {
    pieces: Vec<Bytes>,
    tail: Vec<u8>,
    writer: Option<Waker>,
}

impl Outgoing {
    fn push<M: Message>(&mut self, request: u32, message: &M, body: Bytes) {
        encode(&mut self.tail, request, message, body.len());
        if body.len() <= BODY_COPY_BYTES_MAX {
            self.tail.extend_from_slice(&body);
        } else {
            self.pieces.push(std::mem::take(&mut self.tail).into());
            self.pieces.push(body);
        }
    }

    fn is_empty(&self) -> bool {
        self.pieces.is_empty() && self.tail.is_empty()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under the lock is a mistake of ours; what it guards stays consistent between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, failure: Failure) {
        let mut wake = Vec::new();
        {
            let mut state = self.lock();
            state.pending.fail(failure, &mut wake);
            wake.extend(state.lanes.iter_mut().filter_map(|lane| lane.writer.take()));
        }
        self.permits.close();
        wake.into_iter().for_each(Waker::wake);
    }

    /// The node broke the protocol: nothing that follows can be trusted.
    fn protocol_error(&self, error: FrameError) {
        self.connection.close(close::PROTOCOL.into(), error.to_string().as_bytes());
        self.fail(Failure::Protocol(error));
    }

    fn failure(&self) -> ClientError {
        let failure = self.lock().pending.failure().cloned();
        failure.unwrap_or(Failure::Lost(quinn::ConnectionError::LocallyClosed)).into()
    }
}

impl Link {
    /// Opens the lanes of a fresh connection and greets.
    pub(crate) async fn open(connection: quinn::Connection, config: &ClientConfig) -> Result<Self, ClientError> {
        let lanes = config.lanes.max(1);
        let slots_max = config.requests_max.max(1);
        let state = State {
            pending: Pending::new(slots_max),
            lanes: std::iter::repeat_with(Outgoing::default).take(lanes).collect(),
        };
        let shared = Arc::new(Shared { connection, state: Mutex::new(state), permits: Semaphore::new(1) });
        for lane in 0..lanes {
            let (send, recv) = shared.connection.open_bi().await?;
            tokio::spawn(write_lane(shared.clone(), lane, send));
            tokio::spawn(read_lane(shared.clone(), recv));
        }
        tokio::spawn(watch(Arc::downgrade(&shared), config.request_timeout / WATCHDOG_ROUNDS));
        let mut link = Self {
            shared,
            welcome: Welcome {
                agent: String::new(),
                shards: 1,
                shard: 0,
                whole_bytes_max: 0,
                requests_max: 1,
                may_write: false,
            },
            busy_patience: config.busy_patience,
            request_timeout: config.request_timeout,
            transfers: AtomicUsize::new(0),
        };
        let frame = link.call(&Hello { agent: config.agent.clone() }, Bytes::new()).await?;
        let welcome = link.read::<Welcome>(&frame)?;
        link.welcome = Welcome {
            agent: welcome.agent.as_str().to_owned(),
            shards: welcome.shards.to_native(),
            shard: welcome.shard.to_native(),
            whole_bytes_max: welcome.whole_bytes_max.to_native().min(FRAME_BODY_BYTES_MAX as u32),
            requests_max: welcome.requests_max.to_native(),
            may_write: welcome.may_write,
        };
        let requests_max = link.welcome.requests_max.clamp(1, slots_max);
        link.shared.permits.add_permits(requests_max as usize - 1);
        Ok(link)
    }

    /// Sends a request and waits for its answer, which is not a refusal. Waits while too many are unanswered, and for a while
    /// when the node is busy.
    pub(crate) async fn call<M: Message>(&self, message: &M, body: Bytes) -> Result<Frame, ClientError> {
        let frame = self.call_once(message, body.clone()).await?;
        if frame.kind != Kind::Refused {
            return Ok(frame);
        }
        let mut refusal = self.refusal(&frame)?;
        let begun = Instant::now();
        while refusal.code == RefusalCode::Busy && begun.elapsed() < self.busy_patience {
            tokio::time::sleep(busy_pause(&refusal)).await;
            let frame = self.call_once(message, body.clone()).await?;
            if frame.kind != Kind::Refused {
                return Ok(frame);
            }
            refusal = self.refusal(&frame)?;
        }
        Err(refusal.into())
    }

    async fn call_once<M: Message>(&self, message: &M, body: Bytes) -> Result<Frame, ClientError> {
        let permit = match self.shared.permits.try_acquire() {
            Ok(permit) => permit,
            Err(_) => self.wait_for_permit().await?,
        };
        let mut body = Some(body);
        let mut permit = Some(permit);
        let mut call = Call { shared: &self.shared, slot: None };
        poll_fn(|cx| {
            if let Some(permit) = permit.take() {
                permit.forget(); // the slot stands for it now, and gives it back when it is free again
                call.begin(cx, message, body.take().unwrap_or_default())
            } else {
                call.poll(cx)
            }
        })
        .await
    }

    async fn wait_for_permit(&self) -> Result<tokio::sync::SemaphorePermit<'_>, ClientError> {
        match tokio::time::timeout(self.request_timeout, self.shared.permits.acquire()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_closed)) => Err(self.shared.failure()),
            Err(_elapsed) => Err(ClientError::Timeout("waiting for earlier requests to be answered")),
        }
    }

    /// The message of an answer. Another kind, or a malformed archive, ends the connection.
    pub(crate) fn read<'a, M: Message>(&self, frame: &'a Frame) -> Result<&'a M::Archived, ClientError> {
        frame.message::<M>().map_err(|error| self.protocol_error(error))
    }

    /// The node broke the protocol. Closes the connection; gives the error to return.
    pub(crate) fn protocol_error(&self, error: FrameError) -> ClientError {
        self.shared.protocol_error(error);
        error.into()
    }

    pub(crate) fn refusal(&self, frame: &Frame) -> Result<Refusal, ClientError> {
        Ok(Refusal::from_message(self.read::<Refused>(frame)?))
    }

    /// Counts a transfer.
    pub(crate) fn transfer(&self) -> Transfer<'_> {
        self.transfers.fetch_add(1, Ordering::Relaxed);
        Transfer(&self.transfers)
    }

    /// Whether a transfer runs.
    pub(crate) fn has_transfers(&self) -> bool {
        self.transfers.load(Ordering::Relaxed) > 0
    }

    pub(crate) fn connection(&self) -> &quinn::Connection {
        &self.shared.connection
    }
}

/// A transfer that has a stream for itself, while it lives.
pub(crate) struct Transfer<'a>(&'a AtomicUsize);

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How long to wait before a busy node is asked again.
pub(crate) fn busy_pause(refusal: &Refusal) -> Duration {
    Duration::from_millis(u64::from(refusal.retry_after_ms.clamp(5, 1000)))
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.connection.close(close::DONE.into(), b"");
    }
}

/// A request on its way; dropping it leaves its slot taken until the answer came.
struct Call<'a> {
    shared: &'a Shared,
    slot: Option<u32>,
}

impl Call<'_> {
    fn begin<M: Message>(&mut self, cx: &Context<'_>, message: &M, body: Bytes) -> Poll<Result<Frame, ClientError>> {
        let mut state = self.shared.lock();
        let slot = match state.pending.begin(cx.waker().clone()) {
            Ok(Some(slot)) => slot,
            Ok(None) => unreachable!("there are as many permits as slots"),
            Err(failure) => return Poll::Ready(Err(failure.into())),
        };
        self.slot = Some(slot);
        let lane = slot as usize % state.lanes.len();
        let lane = &mut state.lanes[lane];
        lane.push(slot, message, body);
        let writer = lane.writer.take();
        drop(state);
        if let Some(writer) = writer {
            writer.wake();
        }
        Poll::Pending
    }

    fn poll(&mut self, cx: &Context<'_>) -> Poll<Result<Frame, ClientError>> {
        let slot = self.slot.expect("polled between its beginning and its end");
        let Some((outcome, is_free)) = self.shared.lock().pending.poll(slot, cx.waker()) else {
            return Poll::Pending;
        };
        self.slot = None;
        if is_free {
            self.shared.permits.add_permits(1);
        }
        Poll::Ready(match outcome {
            Outcome::Frame(frame) => Ok(frame),
            Outcome::TimedOut => Err(ClientError::Timeout("waiting for an answer")),
            Outcome::Failed(failure) => Err(failure.into()),
        })
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot
            && self.shared.lock().pending.abandon(slot)
        {
            self.shared.permits.add_permits(1);
        }
    }
}

/// Sends what piles up in a lane, all of it at once.
async fn write_lane(shared: Arc<Shared>, lane: usize, mut send: quinn::SendStream) {
    let (mut pieces, mut tail) = (Vec::new(), Vec::new());
    loop {
        let is_open = poll_fn(|cx| {
            let mut state = shared.lock();
            if state.pending.failure().is_some() {
                return Poll::Ready(false);
            }
            let out = &mut state.lanes[lane];
            if out.is_empty() {
                out.writer = Some(cx.waker().clone());
                return Poll::Pending;
            }
            std::mem::swap(&mut out.pieces, &mut pieces);
            std::mem::swap(&mut out.tail, &mut tail);
            Poll::Ready(true)
        })
        .await;
        if !is_open {
            return;
        }
        let sent = async {
            send.write_all_chunks(&mut pieces).await?;
            send.write_all(&tail).await
        };
        if let Err(error) = sent.await {
            shared.fail(match error {
                quinn::WriteError::ConnectionLost(lost) => Failure::Lost(lost),
                _ => Failure::LaneEnded,
            });
            return;
        }
        pieces.clear();
        tail.clear();
    }
}

/// Hands the answers on a lane to those who wait for them.
async fn read_lane(shared: Arc<Shared>, mut recv: quinn::RecvStream) {
    let mut reader = FrameReader::new(FrameLimits::default());
    let mut pieces = [const { Bytes::new() }; PIECES_PER_READ];
    let mut frames = Vec::new();
    let mut wake = Vec::new();
    loop {
        let count = match recv.read_chunks(&mut pieces).await {
            Ok(Some(count)) => count,
            Ok(None) => return shared.fail(Failure::LaneEnded),
            Err(quinn::ReadError::ConnectionLost(lost)) => return shared.fail(Failure::Lost(lost)),
            Err(_) => return shared.fail(Failure::LaneEnded),
        };
        for piece in &mut pieces[..count] {
            reader.push(std::mem::take(piece));
        }
        loop {
            match reader.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break reader.compact(),
                Err(error) => return shared.protocol_error(error),
            }
        }
        let mut freed = 0;
        let mut unasked = None;
        {
            let mut state = shared.lock();
            for frame in frames.drain(..) {
                let kind = frame.kind;
                match state.pending.answer(frame) {
                    Ok((waker, is_free)) => {
                        wake.extend(waker);
                        freed += usize::from(is_free);
                    }
                    Err(_) => unasked = Some(kind),
                }
            }
        }
        if freed > 0 {
            shared.permits.add_permits(freed);
        }
        wake.drain(..).for_each(Waker::wake);
        if let Some(kind) = unasked {
            return shared.protocol_error(FrameError::Unexpected(kind));
        }
    }
}

/// Ends requests that have waited too long, until the link is gone.
async fn watch(shared: Weak<Shared>, round: Duration) {
    let mut rounds = tokio::time::interval(round.max(Duration::from_millis(1)));
    rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    rounds.tick().await; // the first one is immediate
    loop {
        rounds.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        let mut wake = Vec::new();
        {
            let mut state = shared.lock();
            if state.pending.failure().is_some() {
                return;
            }
            state.pending.tick(WATCHDOG_ROUNDS, &mut wake);
        }
        if !wake.is_empty() {
            tracing::warn!(requests = wake.len(), stats = ?shared.connection.stats(), "no answer in time");
        }
        wake.into_iter().for_each(Waker::wake);
    }
}
