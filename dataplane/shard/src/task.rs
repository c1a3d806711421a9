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

use crate::{fs::simulated, registry::Registered};

/// A future running in this shard. Dropping it cancels the future; [`Task::detach`] lets it run on; awaiting it gives its
/// output.
#[must_use = "a dropped task is cancelled; detach it to let it run"]
pub struct Task<T>(Spawned<T>);

enum Spawned<T> {
    Real(glommio::Task<T>),
    /// `None` once it is detached.
    #[cfg(feature = "sim")]
    Simulated(Owned<T>),
}

/// Cancels its task when it is dropped.
#[cfg(feature = "sim")]
struct Owned<T>(Option<crate::sim::Join<T>>);

#[cfg(feature = "sim")]
impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if let Some(join) = &self.0 {
            join.cancel();
        }
    }
}

impl<T> fmt::Debug for Task<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Task")
    }
}

impl<T> Task<T> {
    /// Lets the task run to its end on its own. The handle may be dropped, or awaited for the output.
    pub fn detach(self) -> JoinHandle<T> {
        match self.0 {
            Spawned::Real(task) => JoinHandle(Detached::Real(task.detach())),
            #[cfg(feature = "sim")]
            Spawned::Simulated(mut owned) => {
                JoinHandle(Detached::Simulated(owned.0.take().expect("it is detached once")))
            }
        }
    }

    /// Stops the task and waits until its future is dropped. The output, when it had finished before.
    pub async fn cancel(self) -> Option<T> {
        match self.0 {
            Spawned::Real(task) => task.cancel().await,
            #[cfg(feature = "sim")]
            Spawned::Simulated(owned) => owned.0.as_ref().and_then(crate::sim::Join::cancel),
        }
    }
}

impl<T> Future for Task<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        match &mut self.0 {
            Spawned::Real(task) => Pin::new(task).poll(cx),
            #[cfg(feature = "sim")]
            Spawned::Simulated(owned) => {
                let join = owned.0.as_ref().expect("it was not detached");
                join.poll_end(cx).map(|output| output.expect("only its owner cancels it"))
            }
        }
    }
}

/// The end of a detached task: its output, or `None` when it was cancelled.
pub struct JoinHandle<T>(Detached<T>);

enum Detached<T> {
    Real(glommio::task::JoinHandle<T>),
    #[cfg(feature = "sim")]
    Simulated(crate::sim::Join<T>),
}

impl<T> fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinHandle")
    }
}

impl<T> JoinHandle<T> {
    /// Asks the task to stop; it is dropped when it would run next.
    pub fn cancel(&self) {
        match &self.0 {
            Detached::Real(task) => task.cancel(),
            #[cfg(feature = "sim")]
            Detached::Simulated(join) => drop(join.cancel()),
        }
    }
}

impl<T> Future for JoinHandle<T> {
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        match &mut self.0 {
            Detached::Real(task) => Pin::new(task).poll(cx),
            #[cfg(feature = "sim")]
            Detached::Simulated(join) => join.poll_end(cx),
        }
    }
}

/// Runs a future in this shard, until it ends or the shard does. A panic in it takes the whole shard down: see [`ShardPanic`](crate::ShardPanic).
pub fn spawn_local<T: 'static>(future: impl Future<Output = T> + 'static) -> Task<T> {
    simulated!(|world| Task(Spawned::Simulated(Owned(Some(world.spawn(future))))));
    Task(Spawned::Real(glommio::spawn_local(Registered::new(future))))
}

/// Lets the other runnable tasks run first, those among them whose [`Companion`](crate::Companion) has answered. I/O, timers and
/// other shards are *not* looked at: a loop that awaits nothing else starves them until the preemption timer, so such a loop
/// calls [`yield_queue_now`] now and then.
pub async fn yield_now() {
    simulated!(|_world| give_way().await);
    crate::companion::look();
    glommio::executor().yield_now().await;
}

#[cfg(feature = "sim")]
async fn give_way() {
    let mut waited = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Fills `bytes` with what nobody can guess.
pub fn fill_random(bytes: &mut [u8]) -> std::io::Result<()> {
    simulated!(|world| {
        world.fill_random(bytes);
        Ok(())
    });
    let mut filled = 0;
    while filled < bytes.len() {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
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
    simulated!(|_world| give_way().await);
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
    simulated!(|_world| false);
    glommio::executor().need_preempt()
}

/// Whether to look for work for a moment before going to sleep can be worth while. Not where the clock stands still meanwhile.
pub fn may_linger() -> bool {
    simulated!(|_world| false);
    true
}

/// Runs `f` on this shard's blocking thread: for system calls that io_uring lacks (statvfs, a folder's fsync), not for
/// computation. Requests of one shard run one after the other.
pub async fn run_blocking<R: Send + 'static>(f: impl FnOnce() -> R + Send + 'static) -> R {
    simulated!(|world| world.run_job(0, 1, f).await);
    crate::notice::Noticed::new(glommio::executor().spawn_blocking(f)).await
}
