//! The deaf executor: how it happens, how it is rescued, how the rescue is counted.
//!
//! glommio's loop is: collect I/O completions and expired timers (which wakes tasks), run tasks, and when none ran, park. It
//! takes "none ran" from a function that also returns so when the preemption timer has *already* expired at its first check,
//! that is when the thread lost its core for longer than `preempt_timer` between collecting and running. The executor then
//! parks with runnable tasks and sleeps until some other event arrives: for a server whose client waits for an answer, never.
//!
//! Two measures: `preempt_timer` is long ([`PREEMPT_TIMER`]), and every executor runs [`rescue_loop`], whose timer ends
//! such a sleep after one tick. As the turn that handles the expiry may go past its tasks as well, before the loop could set
//! its next timer, [`RESCUE_TIMERS`] are always set in a row.
//!
//! **Detection.** glommio keeps two statistics that give the bug away: it counts each choice of a task queue, and it adds up
//! its own running time once a turn of the loop, after running tasks and before parking. A turn that runs tasks, or finds
//! none, makes at least one choice first; a turn that hits the bug makes none. So a wake that comes from the reactor through
//! our primitives notes both ([`task_woken`]). When the rescue timer expires (its waker runs in the reactor, before any task), and the
//! running time has grown since that wake while no choice was made, then the executor went past its tasks to sleep: a stall.
//! A long-running task doesn't look like one (choosing it counted), nor does a thread that lost its core for a while (its
//! running time is added up only after the choice). Wakes from other threads are not noted, as they pass no code of ours on
//! this thread: a stall that delays only those is ended but not counted.

use std::{
    cell::Cell,
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

use metanode_types::{ShardCount, ShardId};

use crate::{executor, metrics::Counter};

/// How long a task may run before glommio's `need_preempt` asks it to yield, and the length of a lost time slice from which
/// the executor goes deaf: 0 of 300 starts at 100 ms against 2 of 350 at 1 ms, on busy cores.
pub(crate) const PREEMPT_TIMER: Duration = Duration::from_millis(100);

/// Period of the rescue timer: the longest a deaf executor stays so. At 15 ms its cost (about 10 µs a tick) is below 0.1 %.
pub(crate) const RESCUE_TICK: Duration = Duration::from_millis(15);

/// Rescue timers set at any time, a tick apart. An executor is lost only if it goes deaf in as many turns in a row.
const RESCUE_TIMERS: usize = 8;

/// Times each shard was found parked with runnable tasks: `shard_stalls_total`.
#[derive(Debug, Clone)]
pub struct Stalls(Arc<[Counter]>);

impl Stalls {
    /// One counter a shard.
    pub fn new(count: ShardCount) -> Self {
        Self(count.iter().map(|_| Counter::default()).collect())
    }

    /// Rescues of `shard` so far.
    pub fn of(&self, shard: ShardId) -> u64 {
        self.0[shard.index()].value()
    }

    /// Rescues of all shards so far.
    pub fn total(&self) -> u64 {
        self.0.iter().map(Counter::value).sum()
    }

    pub(crate) fn counter(&self, shard: ShardId) -> &Counter {
        &self.0[shard.index()]
    }
}

/// glommio's statistics since the executor's start.
#[derive(Clone, Copy)]
struct Statistics {
    /// Choices of a task queue.
    choices: u64,
    /// Time spent outside sleep, as of the latest turn of the loop.
    running: Duration,
}

thread_local! {
    static TOTAL: Cell<Statistics> = const { Cell::new(Statistics { choices: 0, running: Duration::ZERO }) };
    /// As of the first wake since the latest choice.
    static FIRST_WAKE: Cell<Option<Statistics>> = const { Cell::new(None) };
}

/// glommio hands its statistics out once and starts from zero; this adds them up. No other code may ask for them.
fn statistics() -> Statistics {
    let new = glommio::executor().executor_stats();
    let old = TOTAL.get();
    let total = Statistics { choices: old.choices + new.scheduler_runs(), running: old.running + new.total_runtime() };
    TOTAL.set(total);
    total
}

/// Notes that the reactor has woken a task. Ignored outside a shard.
pub(crate) fn task_woken() {
    if executor::current_shard().is_none() {
        return;
    }
    let now = statistics();
    if FIRST_WAKE.get().is_none_or(|noted| noted.choices != now.choices) {
        FIRST_WAKE.set(Some(now));
    }
}

/// Whether a turn of the loop has gone past a woken task.
fn is_stalled() -> bool {
    let now = statistics();
    FIRST_WAKE.get().is_some_and(|noted| noted.choices == now.choices && noted.running < now.running)
}

/// Ends any sleep of this executor after `tick`, for as long as it lives.
pub(crate) async fn rescue_loop(tick: Duration, stalls: Stalls, shard: ShardId) {
    let mut timers: VecDeque<Timer> = VecDeque::new();
    let mut last = Instant::now();
    poll_fn(|cx| {
        let rescue = Arc::new(Rescue { stalls: stalls.clone(), shard, task: cx.waker().clone() });
        let waker = Waker::from(rescue);
        let mut cx = Context::from_waker(&waker);
        let now = Instant::now();
        while timers.front_mut().is_some_and(|(timer, at)| *at <= now && Pin::new(timer).poll(&mut cx).is_ready()) {
            timers.pop_front();
        }
        while timers.len() < RESCUE_TIMERS {
            last = last.max(now) + tick;
            let mut timer = glommio::timer::Timer::new(last - now);
            // Not ready: it lies in the future. Polling sets it.
            if Pin::new(&mut timer).poll(&mut cx).is_pending() {
                timers.push_back((timer, last));
            }
        }
        Poll::<()>::Pending
    })
    .await;
}

/// A rescue timer and when it expires.
type Timer = (glommio::timer::Timer, Instant);

/// The rescue timer's waker; it runs in the reactor.
struct Rescue {
    stalls: Stalls,
    shard: ShardId,
    task: Waker,
}

impl Wake for Rescue {
    fn wake(self: Arc<Self>) {
        if executor::current_shard() == Some(self.shard) && is_stalled() {
            self.stalls.counter(self.shard).increment();
        }
        self.task.wake_by_ref();
    }
}
