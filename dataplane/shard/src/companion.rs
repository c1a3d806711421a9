//! A thread beside a shard for the system calls that are too slow to wait for and too frequent for io_uring.
//!
//! A durable commit is a write and an `fdatasync`. Through the shard's ring the two took 300 µs where plain calls take 130, since
//! each completion waits until the executor looks at I/O, and to look often costs 4 µs a look (a third of a busy shard's time,
//! measured). A companion makes plain calls, one job after the other, and its shard sees the results without any look: whenever a
//! task yields.

use std::{
    any::Any,
    cell::{Cell, RefCell},
    fmt,
    future::Future,
    io,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    task::{Context, Poll, Waker},
    thread,
};

use crate::fs::simulated;

type Job = Box<dyn FnOnce() + Send>;

/// Runs jobs in the order in which they come. Its threads have their shard's core and time slice; dropping waits for all jobs
/// that it was given.
pub struct Companion {
    jobs: Option<mpsc::Sender<Job>>,
    threads: Vec<thread::JoinHandle<()>>,
    /// Number of its queue, and of its threads.
    #[cfg(feature = "sim")]
    simulated: Option<(u64, usize)>,
}

impl fmt::Debug for Companion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Companion")
    }
}

impl Companion {
    /// Starts `threads` threads that share one queue; with one, a job begins when the one before has ended. To be called in the
    /// shard.
    pub fn start(name: &str, threads: usize) -> io::Result<Self> {
        simulated!(|world| {
            let simulated = Some((world.queue(), threads));
            Ok(Self { jobs: None, threads: Vec::new(), simulated })
        });
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let mut this = Self {
            jobs: Some(jobs),
            threads: Vec::new(),
            #[cfg(feature = "sim")]
            simulated: None,
        };
        for number in 0..threads {
            let queue = queue.clone();
            let next = move || queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let work = move || {
                while let Ok(job) = next() {
                    job();
                }
            };
            this.threads.push(thread::Builder::new().name(format!("{name}-{number}")).spawn(work)?);
        }
        Ok(this)
    }

    /// Runs `job` there and waits for its result. The job runs even when the future is dropped.
    ///
    /// # Panics
    /// When `job` does.
    pub fn run<R: Send + 'static>(
        &self,
        job: impl FnOnce() -> R + Send + 'static,
    ) -> impl Future<Output = R> + 'static {
        #[cfg(feature = "sim")]
        if let (Some(world), Some((queue, threads))) = (crate::sim::current(), self.simulated) {
            return Running::Simulated(Box::pin(world.run_job(queue, threads, job)));
        }
        let call = Arc::new(Call {
            done: AtomicBool::new(false),
            state: Mutex::new(State { result: None, waker: None }),
            ended: ENDED.with(Clone::clone),
        });
        let there = call.clone();
        let job = move || there.finish(catch_unwind(AssertUnwindSafe(job)));
        let jobs = self.jobs.as_ref().expect("taken only by drop");
        jobs.send(Box::new(job)).expect("the thread ends only when this end of its queue is dropped");
        CALLS.with_borrow_mut(|calls| calls.push(call.clone()));
        Running::Real(Wait(call))
    }
}

enum Running<R> {
    Real(Wait<R>),
    #[cfg(feature = "sim")]
    Simulated(Pin<Box<dyn Future<Output = R>>>),
}

impl<R> Future for Running<R> {
    type Output = R;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<R> {
        match &mut *self {
            Self::Real(wait) => Pin::new(wait).poll(cx),
            #[cfg(feature = "sim")]
            Self::Simulated(job) => job.as_mut().poll(cx),
        }
    }
}

impl Drop for Companion {
    fn drop(&mut self) {
        self.jobs.take();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a shard's companion thread panicked");
            }
        }
    }
}

struct Call<R> {
    done: AtomicBool,
    state: Mutex<State<R>>,
    ended: Arc<AtomicUsize>,
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
        self.ended.fetch_add(1, Ordering::Release);
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
    /// How many of this shard's calls have ended, ever.
    static ENDED: Arc<AtomicUsize> = Arc::default();
    /// The same, as of the latest look.
    static SEEN: Cell<usize> = const { Cell::new(0) };
}

/// Wakes the tasks whose calls have ended.
pub(crate) fn look() {
    let ended = ENDED.with(|ended| ended.load(Ordering::Acquire));
    if SEEN.replace(ended) != ended {
        CALLS.with_borrow_mut(|calls| calls.extract_if(.., |call| call.has_ended()).for_each(|call| call.wake()));
    }
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
