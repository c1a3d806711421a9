//! A thread beside a shard for the system calls that are too slow to wait for and too frequent for io_uring.
//!
//! A durable commit is a write and an `fdatasync`. Through the shard's ring the two took 300 µs where plain calls take 130, since
//! each completion waits until the executor looks at I/O, and to look often costs 4 µs a look (a third of a busy shard's time,
//! measured). A companion makes plain calls, one job after the other, and its shard sees the results without any look: whenever a
//! task yields.

use std::{
    any::Any,
    cell::RefCell,
    fmt,
    future::Future,
    io,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    task::{Context, Poll, Waker},
    thread,
};

type Job = Box<dyn FnOnce() + Send>;

/// Runs jobs one after the other. The thread has its shard's core and time slice; dropping waits for what was started.
pub struct Companion {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl fmt::Debug for Companion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Companion")
    }
}

impl Companion {
    /// Starts the thread. To be called in the shard.
    pub fn start(name: &str) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || queue.iter().for_each(|job| job()))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Runs `job` there and waits for its result. The job runs even when the future is dropped.
    ///
    /// # Panics
    /// When `job` does.
    pub fn run<R: Send + 'static>(
        &self,
        job: impl FnOnce() -> R + Send + 'static,
    ) -> impl Future<Output = R> + 'static {
        let call =
            Arc::new(Call { done: AtomicBool::new(false), state: Mutex::new(State { result: None, waker: None }) });
        let there = call.clone();
        let job = move || there.finish(catch_unwind(AssertUnwindSafe(job)));
        let jobs = self.jobs.as_ref().expect("taken only by drop");
        jobs.send(Box::new(job)).expect("the thread ends only when this end of its queue is dropped");
        CALLS.with_borrow_mut(|calls| calls.push(call.clone()));
        Wait(call)
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        self.jobs.take();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("a shard's companion thread panicked");
        }
    }
}

struct Call<R> {
    done: AtomicBool,
    state: Mutex<State<R>>,
}

struct State<R> {
    result: Option<thread::Result<R>>,
    waker: Option<Waker>,
}

impl<R> Call<R> {
    fn finish(&self, result: thread::Result<R>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.result = Some(result);
        self.done.store(true, Ordering::Release);
        // For a shard that sleeps. One that is awake usually looks before this arrives.
        if let Some(waker) = &state.waker {
            waker.wake_by_ref();
        }
    }
}

trait Ended {
    fn has_ended(&self) -> bool;
    fn wake(&self);
}

impl<R> Ended for Call<R> {
    fn has_ended(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    fn wake(&self) {
        let waker = self.state.lock().unwrap_or_else(PoisonError::into_inner).waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

thread_local! {
    /// This shard's calls that are under way.
    static CALLS: RefCell<Vec<Arc<dyn Ended>>> = const { RefCell::new(Vec::new()) };
}

/// Wakes the tasks whose calls have ended.
pub(crate) fn look() {
    CALLS.with_borrow_mut(|calls| {
        if calls.iter().any(|call| call.has_ended()) {
            calls.extract_if(.., |call| call.has_ended()).for_each(|call| call.wake());
        }
    });
}

struct Wait<R>(Arc<Call<R>>);

impl<R> Future for Wait<R> {
    type Output = R;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<R> {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result: Option<Result<R, Box<dyn Any + Send>>> = state.result.take();
        match result {
            Some(Ok(result)) => Poll::Ready(result),
            Some(Err(panic)) => {
                drop(state);
                resume_unwind(panic)
            }
            None => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}
