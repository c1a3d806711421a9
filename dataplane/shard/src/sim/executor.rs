use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    future::Future,
    pin::Pin,
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

use super::{End, Inner, Network, current};

/// Steps of one run at most: a store that never comes to rest must fail, not hang.
const STEPS_MAX: u64 = 20_000_000;

/// Threads' jobs take this long where nothing else is said: what a fast disk and a wake-up take, in nanoseconds.
const JOB_NANOS: u64 = 60_000;

type Future_ = Pin<Box<dyn Future<Output = ()>>>;

/// Tasks and timers.
#[derive(Default)]
pub(super) struct Executor {
    tasks: RefCell<BTreeMap<u64, Task>>,
    next: Cell<u64>,
    ready: Arc<Ready>,
    timers: RefCell<BTreeMap<(u64, u64), Waker>>,
    /// When each thread of each queue of jobs is free again.
    queues: RefCell<BTreeMap<u64, Vec<u64>>>,
}

/// Tasks that can run.
#[derive(Default)]
struct Ready {
    tasks: Mutex<Vec<u64>>,
    /// Whoever turns the world by hand, while it does something else.
    outside: Mutex<Option<Waker>>,
}

impl Ready {
    fn tasks(&self) -> MutexGuard<'_, Vec<u64>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outside(&self) -> MutexGuard<'_, Option<Waker>> {
        self.outside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Task {
    /// Taken while it is polled.
    future: Option<Future_>,
    wake: Arc<WakeTask>,
}

struct WakeTask {
    task: u64,
    queued: AtomicBool,
    ready: Arc<Ready>,
}

impl Wake for WakeTask {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            self.ready.tasks().push(self.task);
            let outside = self.ready.outside().take();
            if let Some(outside) = outside {
                outside.wake();
            }
        }
    }
}

impl Executor {
    fn number(&self) -> u64 {
        let number = self.next.get();
        self.next.set(number + 1);
        number
    }

    /// Drops all tasks, also those that destructors spawn meanwhile.
    pub(super) fn clear(&self) {
        loop {
            let task = self.tasks.borrow_mut().pop_first();
            if task.is_none() {
                break;
            }
        }
        self.timers.take();
        self.queues.take();
        self.ready.tasks().clear();
    }
}

/// A spawned future's end.
pub(crate) struct Join<T> {
    task: u64,
    state: Rc<State<T>>,
}

struct State<T> {
    output: Cell<Option<T>>,
    ended: Cell<bool>,
    waiting: Cell<Option<Waker>>,
}

impl<T> Join<T> {
    /// Drops the future now; the output if it had ended.
    pub(crate) fn cancel(&self) -> Option<T> {
        if !self.state.ended.replace(true)
            && let Some(world) = current()
        {
            let task = world.executor.tasks.borrow_mut().remove(&self.task);
            drop(task);
        }
        self.state.output.take()
    }

    /// The output, or `None` when it was cancelled.
    pub(crate) fn poll_end(&self, cx: &Context<'_>) -> Poll<Option<T>> {
        if let Some(output) = self.state.output.take() {
            return Poll::Ready(Some(output));
        }
        if self.state.ended.get() {
            return Poll::Ready(None);
        }
        self.state.waiting.set(Some(cx.waker().clone()));
        Poll::Pending
    }
}

impl Inner {
    pub(crate) fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Join<T> {
        let task = self.executor.number();
        let state = Rc::new(State { output: Cell::new(None), ended: Cell::new(false), waiting: Cell::new(None) });
        let there = state.clone();
        let future = async move {
            let output = future.await;
            there.output.set(Some(output));
            there.ended.set(true);
            if let Some(waiting) = there.waiting.take() {
                waiting.wake();
            }
        };
        let wake = Arc::new(WakeTask { task, queued: AtomicBool::new(false), ready: self.executor.ready.clone() });
        wake.wake_by_ref();
        self.executor.tasks.borrow_mut().insert(task, Task { future: Some(Box::pin(future)), wake });
        Join { task, state }
    }

    /// Polls tasks and moves the clock until `ended` has something, the power fails, or nothing can happen any more.
    pub(super) fn drive<T>(&self, ended: &dyn Fn() -> Option<T>) -> End<T> {
        for _ in 0..STEPS_MAX {
            if let Some(output) = ended() {
                return End::Done(output);
            }
            if self.disk.borrow().has_failed() {
                return End::PowerFailed;
            }
            if !self.step() && !self.next_timer() {
                return End::Stuck;
            }
        }
        End::Endless
    }

    /// As [`drive`](Self::drive), up to a moment of the clock, with what a network delivers meanwhile; `Err` says when there will be
    /// something to do again. From then on `waker` is woken when something else has made a task ready.
    pub(super) fn turn<T>(
        &self,
        until: Duration,
        network: &Network,
        ended: &dyn Fn() -> Option<T>,
        waker: &Waker,
    ) -> Result<End<T>, Option<Duration>> {
        self.executor.ready.outside().take();
        network.set_deliverer(None);
        for _ in 0..STEPS_MAX {
            if let Some(output) = ended() {
                return Ok(End::Done(output));
            }
            if self.disk.borrow().has_failed() {
                return Ok(End::PowerFailed);
            }
            if self.step() {
                continue;
            }
            let timer = self.executor.timers.borrow().first_key_value().map(|((at, _), _)| Duration::from_nanos(*at));
            let arrival = network.next_due();
            match timer.into_iter().chain(arrival).min() {
                Some(next) if next <= until => {
                    let nanos = u64::try_from(next.as_nanos()).unwrap_or(u64::MAX);
                    self.now.set(self.now.get().max(nanos));
                    if arrival == Some(next) {
                        network.deliver();
                    } else {
                        self.next_timer();
                    }
                }
                next => {
                    let nanos = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
                    self.now.set(self.now.get().max(nanos));
                    *self.executor.ready.outside() = Some(waker.clone());
                    network.set_deliverer(Some(waker.clone()));
                    return Err(next);
                }
            }
        }
        Ok(End::Endless)
    }

    /// Polls a task that can run; `false` when there is none.
    fn step(&self) -> bool {
        let next = {
            let mut ready = self.executor.ready.tasks();
            let count = ready.len() as u64;
            (count > 0).then(|| {
                // Mostly in order, as executors do it; sometimes not.
                let mut random = self.random.borrow_mut();
                let index = if random.once_in(4) { random.below(count) } else { 0 };
                ready.remove(index as usize)
            })
        };
        if let Some(task) = next {
            self.poll(task);
        }
        next.is_some()
    }

    fn poll(&self, task: u64) {
        let (mut future, wake) = {
            let mut tasks = self.executor.tasks.borrow_mut();
            let Some(this) = tasks.get_mut(&task) else { return };
            this.wake.queued.store(false, Ordering::Relaxed);
            let Some(future) = this.future.take() else { return };
            (future, this.wake.clone())
        };
        let waker = Waker::from(wake);
        let pending = future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending();
        let mut tasks = self.executor.tasks.borrow_mut();
        if pending {
            // Cancelled meanwhile: dropped, once the table is released.
            if let Some(this) = tasks.get_mut(&task) {
                this.future = Some(future);
                return;
            }
        } else {
            tasks.remove(&task);
        }
        drop(tasks);
        drop(future);
    }

    /// Moves the clock to the next timer; `false` without one.
    fn next_timer(&self) -> bool {
        let Some(((at, _), waker)) = self.executor.timers.borrow_mut().pop_first() else { return false };
        self.now.set(self.now.get().max(at));
        waker.wake();
        true
    }

    /// Runs a job as a thread of `queue` would that has `threads` of them: after those before it, all at one moment, and
    /// some time passes before and behind it. It runs also when the future is dropped.
    pub(crate) fn run_job<R: 'static>(
        &self,
        queue: u64,
        threads: usize,
        job: impl FnOnce() -> R + 'static,
    ) -> impl Future<Output = R> + 'static {
        let (begin, end) = {
            let mut queues = self.executor.queues.borrow_mut();
            let free = queues.entry(queue).or_insert_with(|| vec![0; threads]);
            let thread = (0..threads).min_by_key(|&thread| free[thread]).expect("a queue has a thread");
            let begin = self.now.get().max(free[thread]) + self.pause();
            let end = begin + self.pause();
            free[thread] = end;
            (begin, end)
        };
        let join = self.spawn(async move {
            Sleep::until(begin).await;
            let result = job();
            Sleep::until(end).await;
            result
        });
        std::future::poll_fn(move |cx| join.poll_end(cx).map(|output| output.expect("jobs are not cancelled")))
    }

    /// A new queue of jobs.
    pub(crate) fn queue(&self) -> u64 {
        1 + self.executor.number()
    }

    /// How long something of the disk's takes now.
    pub(crate) fn pause(&self) -> u64 {
        let slow = self.disk.borrow().faults.slow_once_in;
        let random = &mut *self.random.borrow_mut();
        let usual = JOB_NANOS / 4 + random.below(JOB_NANOS);
        if random.once_in(slow) { usual * (1 + random.below(2000)) } else { usual }
    }
}

/// A moment of the simulated clock.
pub(crate) struct Sleep {
    until: u64,
    /// The timer that was set, and the waker that it has.
    set: Option<((u64, u64), Waker)>,
}

impl Sleep {
    pub(crate) fn after(duration: Duration) -> Self {
        let now = current().map_or(0, |world| world.now.get());
        Self { until: now.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)), set: None }
    }

    pub(super) fn until(until: u64) -> Self {
        Self { until, set: None }
    }

    /// Until a moment of the world's clock.
    pub(crate) fn at(deadline: Instant) -> Self {
        let nanos = current().map_or(0, |world| deadline.saturating_duration_since(world.base).as_nanos());
        Self { until: u64::try_from(nanos).unwrap_or(u64::MAX), set: None }
    }

    fn unset(&mut self) {
        if let (Some((key, _)), Some(world)) = (self.set.take(), current()) {
            world.executor.timers.borrow_mut().remove(&key);
        }
    }

    pub(crate) fn poll_expired(&mut self, cx: &Context<'_>) -> Poll<()> {
        let Some(world) = current() else { return Poll::Ready(()) };
        if world.now.get() >= self.until {
            self.unset();
            return Poll::Ready(());
        }
        if self.set.as_ref().is_none_or(|(_, waker)| !waker.will_wake(cx.waker())) {
            self.unset();
            let key = (self.until, world.executor.number());
            world.executor.timers.borrow_mut().insert(key, cx.waker().clone());
            self.set = Some((key, cx.waker().clone()));
        }
        Poll::Pending
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_expired(cx)
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.unset();
    }
}
