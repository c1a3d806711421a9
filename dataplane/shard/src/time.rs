use std::{
    fmt,
    future::{Future, poll_fn},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use crate::{fs::simulated, notice::Notice};

/// The time was up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the time limit has passed")]
pub struct Elapsed;

/// The time by this shard's clock. What decides anything asks here, so that a simulated clock can answer.
pub fn now() -> Instant {
    simulated!(|world| world.instant());
    Instant::now()
}

/// The time on the wall, in milliseconds since 1970. It may jump.
pub fn unix_ms() -> u64 {
    simulated!(|world| SIMULATED_EPOCH_MS + (world.instant() - crate::sim::epoch()).as_millis() as u64);
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64) // a clock before 1970 is one that was never set
}

/// Where a simulated clock begins: 2026-01-01.
#[cfg(feature = "sim")]
const SIMULATED_EPOCH_MS: u64 = 1_767_225_600_000;

/// Waits. Expect 30 µs to 1.5 ms more than asked.
pub async fn sleep(duration: Duration) {
    simulated!(|_world| crate::sim::Sleep::after(duration).await);
    let mut timer = Timer::after(duration);
    poll_fn(|cx| timer.poll_expired(cx)).await;
}

/// Runs `future` for at most `duration`; it is dropped when the time is up. One that completes just then has completed.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Result<F::Output, Elapsed> {
    let mut future = pin!(future);
    #[cfg(feature = "sim")]
    if crate::sim::current().is_some() {
        let mut timer = crate::sim::Sleep::after(duration);
        return poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Ok(output)),
            Poll::Pending => timer.poll_expired(cx).map(|()| Err(Elapsed)),
        })
        .await;
    }
    let mut timer = Timer::after(duration);
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Ok(output)),
        Poll::Pending => timer.poll_expired(cx).map(|()| Err(Elapsed)),
    })
    .await
}

/// A deadline that can be moved and polled by hand. Polling it many times before it expires costs nothing.
pub struct Timer {
    deadline: Instant,
    inner: Inner,
}

enum Inner {
    Real(Armable),
    #[cfg(feature = "sim")]
    Simulated(crate::sim::Sleep),
}

struct Armable {
    timer: glommio::timer::Timer,
    armed: bool,
    notice: Arc<Notice>,
    waker: Waker,
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timer").field("deadline", &self.deadline).finish_non_exhaustive()
    }
}

impl Timer {
    /// Expires `duration` from now.
    pub fn after(duration: Duration) -> Self {
        let deadline = now() + duration;
        simulated!(|_world| Self { deadline, inner: Inner::Simulated(crate::sim::Sleep::at(deadline)) });
        let notice = Arc::new(Notice::default());
        let timer = glommio::timer::Timer::new(duration);
        let armable = Armable { timer, armed: false, waker: Waker::from(notice.clone()), notice };
        Self { deadline, inner: Inner::Real(armable) }
    }

    /// Expires at `deadline`.
    pub fn at(deadline: Instant) -> Self {
        Self::after(deadline.saturating_duration_since(now()))
    }

    /// When it expires.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Moves the deadline; also revives an expired timer.
    pub fn reset_at(&mut self, deadline: Instant) {
        if deadline == self.deadline {
            return;
        }
        self.deadline = deadline;
        match &mut self.inner {
            Inner::Real(armable) => {
                armable.timer.reset(deadline.saturating_duration_since(Instant::now()));
                armable.armed = false;
            }
            #[cfg(feature = "sim")]
            Inner::Simulated(sleep) => *sleep = crate::sim::Sleep::at(deadline),
        }
    }

    /// Moves the deadline to `duration` from now.
    pub fn reset_after(&mut self, duration: Duration) {
        self.reset_at(now() + duration);
    }

    /// Ready once the deadline has passed, and from then on.
    pub fn poll_expired(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.inner {
            Inner::Real(armable) => armable.poll_expired(cx),
            #[cfg(feature = "sim")]
            Inner::Simulated(sleep) => sleep.poll_expired(cx),
        }
    }
}

impl Armable {
    fn poll_expired(&mut self, cx: &Context<'_>) -> Poll<()> {
        if self.armed && !self.notice.take_fired() {
            self.notice.register(cx.waker());
            return Poll::Pending;
        }
        self.notice.register(cx.waker());
        let expired = Pin::new(&mut self.timer).poll(&mut Context::from_waker(&self.waker));
        self.armed = expired.is_pending();
        expired.map(drop)
    }
}
