use std::{
    any::Any,
    cell::Cell,
    fmt,
    future::{Future, poll_fn},
    io,
    pin::Pin,
    sync::mpsc,
    task::Poll,
    thread,
    time::Duration,
};

use glommio::{LocalExecutor, LocalExecutorBuilder, Placement};
use metanode_types::{ShardCount, ShardId};

use crate::{
    error::io_error,
    registry::{abandon_all, poll_panic},
    slice, spawn_local, stall, yield_now,
};

/// Bytes of registered I/O memory an executor takes. It is registered in three rings and counts against `ulimit -l` (8 MiB on
/// a usual machine): glommio's default of 10 MiB pins nothing there, below 512 KiB is an error. Larger reads fall back to
/// ordinary memory.
const IO_MEMORY_BYTES: usize = 1 << 20;

/// Entries of each submission ring: deep enough for a full batch of file operations at queue depth 64 beside timers and polls.
const RING_DEPTH: usize = 512;

/// How long an executor may take to run its first task. Until then no rescue timer is set, so one that loses its core for longer
/// than the preemption timer in its very first turn would sleep for ever; better to fail the start.
const START_DEADLINE: Duration = Duration::from_secs(10);

/// How shards are started.
#[derive(Debug, Clone)]
pub struct ShardsConfig {
    /// One entry a shard: the core it is pinned to, or `None` for a thread that the kernel places.
    pub cores: Vec<Option<usize>>,
    /// Threads are called `<name>-<shard>`.
    pub name: String,
    /// Counts rescues; clone it before the start to publish it.
    pub stalls: stall::Stalls,
    /// Period of the rescue timer, 10 to 20 ms.
    #[doc(hidden)]
    pub rescue_tick: Duration,
    /// How long executors may take to run their first task; see [`start`].
    #[doc(hidden)]
    pub start_deadline: Duration,
    /// For tests that provoke the stall; see the module `stall`.
    #[doc(hidden)]
    pub preempt_timer: Duration,
}

impl ShardsConfig {
    /// Shards on the given cores.
    ///
    /// # Panics
    /// When `cores` is empty or longer than [`SHARDS_MAX`](metanode_types::limits::SHARDS_MAX).
    pub fn new(name: impl Into<String>, cores: Vec<Option<usize>>) -> Self {
        let count = u16::try_from(cores.len()).ok().and_then(ShardCount::new).expect("1 to SHARDS_MAX shards");
        Self {
            cores,
            name: name.into(),
            stalls: stall::Stalls::new(count),
            rescue_tick: stall::RESCUE_TICK,
            start_deadline: START_DEADLINE,
            preempt_timer: stall::PREEMPT_TIMER,
        }
    }

    /// `count` shards that the kernel places.
    pub fn unpinned(name: impl Into<String>, count: ShardCount) -> Self {
        Self::new(name, vec![None; usize::from(count.get())])
    }

    /// How many shards these are.
    pub fn count(&self) -> ShardCount {
        u16::try_from(self.cores.len()).ok().and_then(ShardCount::new).expect("1 to SHARDS_MAX shards")
    }
}

/// A shard's main future, or a task in it, panicked; the shard is gone, its destructors have run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("shard {shard} panicked: {message}")]
pub struct ShardPanic {
    /// Which one.
    pub shard: ShardId,
    /// The panic's message.
    pub message: String,
}

/// Running shards.
pub struct Shards<T> {
    threads: Vec<thread::JoinHandle<Result<T, ShardPanic>>>,
}

impl<T> fmt::Debug for Shards<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shards").field("count", &self.threads.len()).finish()
    }
}

impl<T> Shards<T> {
    /// Waits until every shard's main future is done.
    pub fn join(self) -> Vec<Result<T, ShardPanic>> {
        self.threads
            .into_iter()
            .enumerate()
            .map(|(index, thread)| thread.join().unwrap_or_else(|panic| Err(shard_panic(index, &*panic))))
            .collect()
    }

    /// Whether any shard has ended, be it by return or panic.
    pub fn any_finished(&self) -> bool {
        self.threads.iter().any(thread::JoinHandle::is_finished)
    }
}

thread_local! {
    static CURRENT: Cell<Option<ShardId>> = const { Cell::new(None) };
}

/// The shard this thread is, if it is one.
pub fn current_shard() -> Option<ShardId> {
    CURRENT.get()
}

/// Starts one executor a core. `make` is called here, once a shard, and returns what runs in that shard's thread: a closure
/// that may own `Send` things (mesh ports, sockets) and produces the shard's `!Send` main future. The shard ends with it.
///
/// Returns once all executors run. If one can't be made (no such core, no io_uring), none runs anything.
pub fn start<T, M, F, Fut>(config: &ShardsConfig, mut make: M) -> io::Result<Shards<T>>
where
    T: Send + 'static,
    M: FnMut(ShardId) -> F,
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = T> + 'static,
{
    glommio::early_init();
    let (made_sender, made) = mpsc::channel::<io::Result<()>>();
    let (running_sender, running) = mpsc::channel::<()>();
    let mut go_senders = Vec::new();
    let mut threads = Vec::new();
    for (shard, core) in config.count().iter().zip(&config.cores) {
        let (go_sender, go) = mpsc::channel::<()>();
        let (made_sender, running_sender) = (made_sender.clone(), running_sender.clone());
        let setup = Setup { shard, core: *core, config: config.clone() };
        let main = make(shard);
        let thread = thread::Builder::new().name(format!("{}-{shard}", config.name)).spawn(move || {
            // Before the executor: the kernel's threads for its rings inherit the slice.
            if let Err(error) = slice::shorten() {
                tracing::debug!(%error, "shards keep the default time slice; disk syncs wait longer for a busy core");
            }
            let executor = match setup.executor() {
                Ok(executor) => executor,
                Err(error) => {
                    let gone = shard_panic(shard.index(), &"the executor could not be made");
                    made_sender.send(Err(error)).ok();
                    return Err(gone);
                }
            };
            made_sender.send(Ok(())).ok();
            match go.recv() {
                Ok(()) => setup.run(&executor, &running_sender, main),
                Err(mpsc::RecvError) => Err(shard_panic(shard.index(), &"another executor could not be made")),
            }
        })?;
        go_senders.push(go_sender);
        threads.push(thread);
    }
    for _ in &threads {
        made.recv().map_err(|_| io::Error::other("a shard's thread died while starting"))??;
    }
    for go in go_senders {
        go.send(()).map_err(|_| io::Error::other("a shard's thread died while starting"))?;
    }
    for _ in &threads {
        running.recv_timeout(config.start_deadline).map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                "a shard's executor does not run; it has gone deaf at its first turn",
            )
        })?;
    }
    Ok(Shards { threads })
}

/// What one shard's thread needs to make and run its executor.
struct Setup {
    shard: ShardId,
    core: Option<usize>,
    config: ShardsConfig,
}

impl Setup {
    fn executor(&self) -> io::Result<LocalExecutor> {
        let placement = self.core.map_or(Placement::Unbound, Placement::Fixed);
        LocalExecutorBuilder::new(placement)
            .name(&format!("{}-{}", self.config.name, self.shard))
            .io_memory(IO_MEMORY_BYTES)
            .ring_depth(RING_DEPTH)
            .preempt_timer(self.config.preempt_timer)
            .make()
            .map_err(io_error)
    }

    fn run<T, F, Fut>(self, executor: &LocalExecutor, running: &mpsc::Sender<()>, main: F) -> Result<T, ShardPanic>
    where
        T: 'static,
        F: FnOnce() -> Fut + 'static,
        Fut: Future<Output = T> + 'static,
    {
        CURRENT.set(Some(self.shard));
        let rescue = stall::rescue_loop(self.config.rescue_tick, self.config.stalls, self.shard);
        let running = running.clone();
        let end = executor.run(async move {
            glommio::spawn_local(rescue).detach();
            yield_now().await; // the rescue timers are set now
            running.send(()).ok();
            let mut main = spawn_local(async move { main().await });
            let end = poll_fn(|cx| match poll_panic(cx) {
                Poll::Ready(panic) => Poll::Ready(Err(panic)),
                Poll::Pending => Pin::new(&mut main).poll(cx).map(Ok),
            });
            let end = end.await;
            abandon_all();
            end
        });
        end.map_err(|panic| shard_panic(self.shard.index(), &*panic))
    }
}

fn shard_panic(shard: usize, panic: &(dyn Any + Send)) -> ShardPanic {
    let message = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "not a text".to_owned());
    ShardPanic { shard: ShardId(shard as u16), message }
}
