//! Waiting on a descriptor that the runtime did not make: a UDP socket, an eventfd, a pipe.

use std::{
    cell::RefCell,
    fmt,
    future::poll_fn,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    task::{Context, Poll, Waker},
};

use glommio::io::{PollState, PollableFd};

use crate::{error::io_error, notice::Notice};

/// Tells when a descriptor is readable or writable.
///
/// Use it *after* a call on the non-blocking descriptor returned `EAGAIN`. Arming checks the level, so data that arrived in
/// between is not missed; one registration is kept across polls until it fires. Not for hot loops: while calls succeed, make
/// them directly.
pub struct Readiness<T> {
    inner: T,
    pollable: PollableFd<OwnedFd>,
    read: RefCell<Direction>,
    write: RefCell<Direction>,
}

struct Direction {
    state: PollState,
    armed: bool,
    notice: Arc<Notice>,
    waker: Waker,
}

impl Direction {
    fn new() -> Self {
        let notice = Arc::new(Notice::default());
        Self { state: PollState::new(), armed: false, waker: Waker::from(notice.clone()), notice }
    }
}

impl<T: fmt::Debug> fmt::Debug for Readiness<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readiness").field("inner", &self.inner).finish_non_exhaustive()
    }
}

impl<T: AsFd> Readiness<T> {
    /// Watches `inner` from this shard. The registration is on a duplicate: closing or moving `inner` can't confuse it.
    pub fn new(inner: T) -> io::Result<Self> {
        let duplicate = inner.as_fd().try_clone_to_owned()?;
        let pollable = PollableFd::new(duplicate).map_err(io_error)?;
        Ok(Self { inner, pollable, read: RefCell::new(Direction::new()), write: RefCell::new(Direction::new()) })
    }

    /// What is watched.
    pub fn inner(&self) -> &T {
        &self.inner
    }

    /// Ready when a read would not block (or would report an error or the end). One task at a time may wait.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut direction = self.read.borrow_mut();
        direction.poll(cx, |cx, state| self.pollable.poll_readable(cx, state))
    }

    /// Ready when a write would not block (or would report an error). One task at a time may wait.
    pub fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut direction = self.write.borrow_mut();
        direction.poll(cx, |cx, state| self.pollable.poll_writable(cx, state))
    }

    /// Waits until a read would not block.
    pub async fn readable(&self) -> io::Result<()> {
        poll_fn(|cx| self.poll_readable(cx)).await
    }

    /// Waits until a write would not block.
    pub async fn writable(&self) -> io::Result<()> {
        poll_fn(|cx| self.poll_writable(cx)).await
    }
}

impl Direction {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        poll: impl FnOnce(&mut Context<'_>, &mut PollState) -> Poll<Result<(), glommio::GlommioError<()>>>,
    ) -> Poll<io::Result<()>> {
        self.notice.register(cx.waker());
        if self.armed && !self.notice.take_fired() {
            return Poll::Pending;
        }
        let ready = poll(&mut Context::from_waker(&self.waker), &mut self.state);
        self.armed = ready.is_pending();
        ready.map_err(io_error)
    }
}
