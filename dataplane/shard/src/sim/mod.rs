//! A simulated machine: executor, clock and disk in one thread, driven by one seed.
//!
//! Inside [`World::run`] everything that this crate offers to the store (tasks, time, companions, files, names in folders) is
//! answered by the simulation instead of the operating system, so the store's own code runs unchanged. Which task runs next, how
//! long an operation takes, when the power fails and what it leaves of writes that were not synced: all of it comes from
//! the seed. Two runs of a seed do the same, step by step, and end with the same [`trace`](World::trace).
//!
//! A world may also be turned by hand ([`World::start`]), beside something with an executor of its own: then both live by one clock, and
//! talk over a [`Network`].
//!
//! Only with the feature `sim`, which nothing that ships switches on. The mesh, buffers and metrics are plain memory and need
//! no simulation; signals and foreign descriptors have none.
//!
//! Start reading at [`World::run`], then [`DiskFaults`] for what a disk may do.

mod disk;
mod executor;
mod net;

use std::{
    cell::{Cell, RefCell},
    fmt,
    future::Future,
    hash::{Hash as _, Hasher as _},
    rc::Rc,
    task::Waker,
    time::{Duration, Instant},
};

use disk::Disk;
pub use disk::{DiskFaults, PowerCut};
pub(crate) use disk::{Handle, Mode};
use executor::Executor;
pub(crate) use executor::{Join, Sleep};
pub use net::{Conditions, Network, SimSocket};

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End<T> {
    /// The main future returned.
    Done(T),
    /// The power failed; [`World::power_cut`] says what is left.
    PowerFailed,
    /// Every task waits for another: nothing would ever happen again.
    Stuck,
    /// More steps than a run may take.
    Endless,
}

/// A simulated machine. It keeps its disk and its clock from one run to the next.
pub struct World(Rc<Inner>);

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").field("now", &self.now()).finish_non_exhaustive()
    }
}

pub(crate) struct Inner {
    /// Nanoseconds since the beginning.
    now: Cell<u64>,
    /// What instants are counted from; no decision depends on it.
    base: Instant,
    random: RefCell<Random>,
    trace: RefCell<std::hash::DefaultHasher>,
    executor: Executor,
    disk: RefCell<Disk>,
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Inner>>> = const { RefCell::new(None) };
}

/// The world that this thread runs in, if it does.
pub(crate) fn current() -> Option<Rc<Inner>> {
    CURRENT.with_borrow(Clone::clone)
}

/// The same, for what an open file of a world is asked; outside of it the file means nothing.
pub(crate) fn world() -> std::io::Result<Rc<Inner>> {
    current().ok_or_else(|| std::io::Error::from_raw_os_error(libc::EBADF))
}

/// What the instants of this thread's world are counted from.
///
/// # Panics
/// Outside of a world.
pub fn epoch() -> Instant {
    current().expect("in a world").base
}

/// Leaves the world also when a task of it panics.
struct Entered;

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.with_borrow_mut(|current| *current = None);
    }
}

impl World {
    /// A machine with an empty disk.
    pub fn new(seed: u64, faults: DiskFaults) -> Self {
        Self(Rc::new(Inner {
            now: Cell::new(0),
            base: Instant::now(),
            random: RefCell::new(Random::new(seed)),
            trace: RefCell::default(),
            executor: Executor::default(),
            disk: RefCell::new(Disk::new(faults)),
        }))
    }

    /// Runs a future, and what it spawns, until it returns or the power fails. What is left of tasks is dropped then; their
    /// destructors find a disk that does nothing more.
    ///
    /// # Panics
    /// When a task does, and when the thread is in a world already.
    pub fn run<T: 'static, F: Future<Output = T> + 'static>(&self, main: impl FnOnce() -> F) -> End<T> {
        let run = self.start(main);
        let entered = self.enter();
        let end = self.0.drive(&|| run.result.take());
        drop(entered);
        end
    }

    /// Begins a run that its caller turns by hand.
    pub fn start<T: 'static, F: Future<Output = T> + 'static>(&self, main: impl FnOnce() -> F) -> Run<T> {
        let _entered = self.enter();
        let result = Rc::new(Cell::new(None));
        let there = result.clone();
        let main = main();
        let join = self.0.spawn(async move { there.set(Some(main.await)) });
        Run { world: Self(self.0.clone()), result, join: Some(join) }
    }

    fn enter(&self) -> Entered {
        CURRENT.with_borrow_mut(|current| {
            assert!(current.is_none(), "worlds don't nest");
            *current = Some(self.0.clone());
        });
        Entered
    }

    /// Settles the disk after a run: what was synced stays; of the rest, what the power cut leaves.
    pub fn power_cut(&self, cut: PowerCut) {
        let random = &mut *self.0.random.borrow_mut();
        self.0.disk.borrow_mut().settle(cut, random);
    }

    /// Fails the power at the `count`th change of the disk from now on (writes, syncs, changes of names and lengths).
    pub fn fail_power_at(&self, count: Option<u64>) {
        self.0.disk.borrow_mut().fail_at(count);
    }

    /// Changes of the disk so far.
    pub fn disk_changes(&self) -> u64 {
        self.0.disk.borrow().changes()
    }

    /// Changes what the disk does wrong from now on.
    pub fn set_faults(&self, faults: DiskFaults) {
        self.0.disk.borrow_mut().faults = faults;
    }

    /// Flips bits of up to `count` blocks that were durable, in files whose names end so. Returns how many it hit.
    pub fn rot(&self, suffix: &str, count: usize) -> usize {
        let random = &mut *self.0.random.borrow_mut();
        self.0.disk.borrow_mut().rot(suffix, count, random)
    }

    /// Bytes of the disk that are in use.
    pub fn used_bytes(&self) -> u64 {
        self.0.disk.borrow().used_bytes()
    }

    /// A number from the world's seed.
    pub fn random(&self) -> u64 {
        self.0.random.borrow_mut().next()
    }

    /// Time since the beginning.
    pub fn now(&self) -> Duration {
        Duration::from_nanos(self.0.now.get())
    }

    /// A hash of everything that has happened, in its order.
    pub fn trace(&self) -> u64 {
        self.0.trace.borrow().finish()
    }

    /// Adds to the trace what the caller has seen.
    pub fn note(&self, what: impl std::hash::Hash + fmt::Debug) {
        self.0.note(what);
    }
}

/// A run that is turned by hand. When it is dropped the power fails: see [`World::power_cut`].
pub struct Run<T> {
    world: World,
    result: Rc<Cell<Option<T>>>,
    join: Option<Join<()>>,
}

impl<T> fmt::Debug for Run<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").field("world", &self.world).finish_non_exhaustive()
    }
}

impl<T> Run<T> {
    /// Does everything until this moment of the world's clock, datagrams of `network` included. `Err` says when there is more to do, if by
    /// itself; until then `waker` is woken when something from outside has made a task ready.
    pub fn turn(&self, until: Duration, network: &Network, waker: &Waker) -> Result<End<T>, Option<Duration>> {
        let _entered = self.world.enter();
        self.world.0.turn(until, network, &|| self.result.take(), waker)
    }
}

impl<T> Drop for Run<T> {
    fn drop(&mut self) {
        let _entered = self.world.enter();
        self.world.0.disk.borrow_mut().stop();
        self.join = None;
        self.world.0.executor.clear();
    }
}

impl Inner {
    pub(crate) fn instant(&self) -> Instant {
        self.base + Duration::from_nanos(self.now.get())
    }

    pub(crate) fn fill_random(&self, bytes: &mut [u8]) {
        self.random.borrow_mut().fill(bytes);
    }

    fn note(&self, what: impl std::hash::Hash + fmt::Debug) {
        tracing::trace!(nanos = self.now.get(), ?what);
        let trace = &mut *self.trace.borrow_mut();
        self.now.get().hash(trace);
        what.hash(trace);
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 bits.
    #[expect(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Any number of bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for piece in bytes.chunks_mut(8) {
            piece.copy_from_slice(&self.next().to_le_bytes()[..piece.len()]);
        }
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True once in `of` times; never for 0.
    pub fn once_in(&mut self, of: u64) -> bool {
        of > 0 && self.below(of) == 0
    }
}
