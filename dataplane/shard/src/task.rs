use std::{
    cell::RefCell,
    fmt,
    future::Future,
    io::PipeReader,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use glommio::io::PollableFd;

use crate::registry::Registered;

/// A future running in this shard. Dropping it cancels the future; [`Task::detach`] lets it run on; awaiting it gives its
/// output.
#[must_use = "a dropped task is cancelled; detach it to let it run"]
pub struct Task<T>(glommio::Task<T>);

impl<T> fmt::Debug for Task<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Task")
    }
}

impl<T> Task<T> {
    /// Lets the task run to its end on its own. The handle may be dropped, or awaited for the output.
    pub fn detach(self) -> JoinHandle<T> {
        JoinHandle(self.0.detach())
    }

    /// Stops the task and waits until its future is dropped. The output, when it had finished before.
    pub async fn cancel(self) -> Option<T> {
        self.0.cancel().await
    }
}

impl<T> Future for Task<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        Pin::new(&mut self.0).poll(cx)
    }
}

/// The end of a detached task: its output, or `None` when it was cancelled.
pub struct JoinHandle<T>(glommio::task::JoinHandle<T>);

impl<T> fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinHandle")
    }
}

impl<T> JoinHandle<T> {
    /// Asks the task to stop; it is dropped when it would run next.
    pub fn cancel(&self) {
        self.0.cancel();
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        Pin::new(&mut self.0).poll(cx)
    }
}

/// Runs a future in this shard, until it ends or the shard does. A panic in it takes the whole shard down: see [`ShardPanic`](crate::ShardPanic).
pub fn spawn_local<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    Task(glommio::spawn_local(Registered::new(future)))
}

/// Lets the other runnable tasks run first, those among them whose [`Companion`](crate::Companion) has answered. I/O, timers and
/// other shards are *not* looked at: a loop that awaits nothing else starves them until the preemption timer, so such a loop
/// calls [`yield_queue_now`] now and then.
pub async fn yield_now() {
    crate::companion::look();
    glommio::executor().yield_now().await;
}

thread_local! {
    /// A pipe without a writer is always readable.
    static ALWAYS_READY: RefCell<Option<Rc<PollableFd<PipeReader>>>> = const { RefCell::new(None) };
}

/// Lets the other runnable tasks run, then the executor look at I/O, timers and other shards, whatever there is to do. About
/// 4 µs.
///
/// It waits for a descriptor that is always ready: glommio's own yields stay inside its task queue, and it looks at I/O only
/// once that is empty or its preemption timer has expired.
pub async fn yield_queue_now() {
    let ready = ALWAYS_READY.with_borrow_mut(|ready| match ready {
        Some(ready) => Some(ready.clone()),
        slot => {
            let reader = std::io::pipe().ok()?.0;
            Some(slot.insert(Rc::new(PollableFd::new(reader).ok()?)).clone())
        }
    });
    match ready {
        Some(ready) => drop(crate::notice::Noticed::new(ready.readable()).await),
        // No descriptor left for a pipe: do what can be done.
        None => glommio::executor().yield_task_queue_now().await,
    }
}

/// Whether this task has run long enough that it should yield.
pub fn need_preempt() -> bool {
    glommio::executor().need_preempt()
}

/// Runs `f` on this shard's blocking thread: for system calls that io_uring lacks (statvfs, a folder's fsync), not for
/// computation. Requests of one shard run one after the other.
pub async fn run_blocking<R: Send + 'static>(f: impl FnOnce() -> R + Send + 'static) -> R {
    crate::notice::Noticed::new(glommio::executor().spawn_blocking(f)).await
}
