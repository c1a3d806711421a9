//! Load loops, percentiles, accounting of CPU and memory, and the report.

use std::{
    collections::VecDeque,
    fs,
    future::{Future, poll_fn},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use rustix::{
    thread::{CpuSet, sched_setaffinity},
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};
use serde_json::{Map, Number, Value};
use tokio::{
    io::unix::AsyncFd,
    task::{JoinSet, yield_now},
    time::MissedTickBehavior,
};

use crate::data::Random;

/// Operations of an open loop that may be on the way at once: what one connection may have unanswered. Arrivals beyond it wait
/// in line, and their waiting counts.
const OPEN_LOOP_WORKERS: usize = 1024;

/// More than this on the machine besides node and load is worth a warning.
const FOREIGN_SHARE_MAX: f64 = 0.3;

/// Latencies are told apart up to here; longer ones count as this long.
const LATENCY_NANOS_MAX: u64 = 60_000_000_000;

/// Pins the calling thread, and every thread and process that it starts from now on, to one core.
pub(crate) fn pin(core: usize) -> Result<()> {
    ensure!(core < CpuSet::MAX_CPU, "there is no core {core}");
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).with_context(|| format!("cannot pin to core {core}"))
}

/// CPU time of all live threads of a process, by its scheduler statistics (nanoseconds, unlike the ticks in `stat`).
///
/// A thread that ends takes its time out of the sum; nodes keep their threads.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let mut nanos = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).context("the process is gone")? {
        let Ok(statistics) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        nanos += statistics.split(' ').next().and_then(|on_cpu| on_cpu.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanos))
}

/// A field of `/proc/PID/status` in KiB: `VmRSS`, `VmHWM`.
pub(crate) fn memory_kib(pid: u32, field: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the process is gone")?;
    let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let value = value.and_then(|value| value.trim().strip_suffix(" kB")?.parse().ok());
    value.with_context(|| format!("/proc/{pid}/status has no {field}"))
}

/// What the processors did during a timed part.
pub(crate) struct Meter {
    pid: u32,
    begun: Instant,
    start: [Duration; 3],
}

/// CPU time by whose it was.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cpu {
    pub(crate) server: Duration,
    pub(crate) client: Duration,
    /// CPUs' worth of work that was neither side's: other processes, interrupts, what the host took away. It is there in a run
    /// that had the machine to itself as well (about 0.1), and spoils figures when there is more.
    pub(crate) foreign_share: f64,
}

impl Meter {
    /// Starts counting for the node with this process number.
    pub(crate) fn start(pid: u32) -> Result<Self> {
        Ok(Self { pid, begun: Instant::now(), start: Self::now(pid)? })
    }

    /// CPU time since the start.
    pub(crate) fn read(&self) -> Result<Cpu> {
        let now = Self::now(self.pid)?;
        let [server, client, machine] = std::array::from_fn(|index| now[index].saturating_sub(self.start[index]));
        let foreign = machine.saturating_sub(server + client);
        Ok(Cpu { server, client, foreign_share: foreign.as_secs_f64() / self.begun.elapsed().as_secs_f64() })
    }

    fn now(pid: u32) -> Result<[Duration; 3]> {
        Ok([cpu_time(pid)?, cpu_time(std::process::id())?, machine_time()?])
    }
}

/// Time that all processors of the machine were not idle, in ticks of 10 ms.
fn machine_time() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let line = text.lines().find_map(|line| line.strip_prefix("cpu ")).context("/proc/stat has no line for all")?;
    let ticks = line.split_whitespace().map_while(|field| field.parse::<u64>().ok());
    // user, nice, system, idle, iowait, irq, softirq, steal; guests are in user already (proc_stat(5)).
    let busy: u64 =
        ticks.take(8).enumerate().map(|(field, ticks)| if matches!(field, 3 | 4) { 0 } else { ticks }).sum();
    Ok(Duration::from_millis(busy * 1000 / rustix::param::clock_ticks_per_second()))
}

/// Latencies of single operations, recorded in nanoseconds with three significant digits.
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    pub(crate) fn new() -> Self {
        Self(Histogram::new_with_bounds(1, LATENCY_NANOS_MAX, 3).expect("the bounds are in order"))
    }

    pub(crate) fn push(&mut self, latency: Duration) {
        self.0.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    /// The latency, in microseconds, that a share of the operations stayed below; 0 if there were none.
    pub(crate) fn quantile_us(&self, share: f64) -> f64 {
        self.0.value_at_quantile(share) as f64 / 1e3
    }

    pub(crate) fn max_us(&self) -> f64 {
        self.0.max() as f64 / 1e3
    }
}

/// What a loop did.
pub(crate) struct Done {
    /// Operations completed: exactly those numbered below this.
    pub(crate) count: usize,
    pub(crate) elapsed: Duration,
    pub(crate) latencies: Latencies,
    /// In an open loop, how late the latest arrival was: a stall on this side. Its latency includes it.
    pub(crate) late_max: Duration,
}

impl Done {
    pub(crate) fn rate(&self) -> f64 {
        self.count as f64 / self.elapsed.as_secs_f64()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // a worker that panicked ends the run by its own error
}

/// Runs operations 0, 1, 2, … with `concurrency` of them on the way until `count` are done or the deadline has passed.
///
/// One task a lane, none an operation; the latencies of all share one histogram, which stays in the processor's cache.
pub(crate) async fn closed_loop<Operation, Running>(
    count: usize,
    concurrency: u32,
    deadline: Instant,
    operation: Operation,
) -> Result<Done>
where
    Operation: Fn(usize) -> Running + Clone + Send + 'static,
    Running: Future<Output = Result<()>> + Send,
{
    let next = Arc::new(AtomicUsize::new(0));
    let latencies = Arc::new(Mutex::new(Latencies::new()));
    let start = Instant::now();
    let mut workers = JoinSet::new();
    for _ in 0..concurrency {
        let (next, latencies, operation) = (next.clone(), latencies.clone(), operation.clone());
        workers.spawn(async move {
            let mut done = 0;
            let mut now = Instant::now();
            while now < deadline {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    break;
                }
                operation(index).await.with_context(|| format!("operation {index}"))?;
                let end = Instant::now();
                lock(&latencies).push(end - now);
                now = end;
                done += 1;
            }
            anyhow::Ok(done)
        });
    }
    let count = finish(&mut workers).await?;
    Ok(Done { count, elapsed: start.elapsed(), latencies: taken(latencies), late_max: Duration::ZERO })
}

/// How often an open loop lets in the arrivals that have come due, as the event loop of a busy application would; their wait counts.
/// One by one, they would cost the generator a wake-up and a packet each, and it would measure itself.
pub(crate) const OPEN_LOOP_TICK: Duration = Duration::from_micros(50);

/// Runs operations that arrive at random (a Poisson process) at `rate` a second on average, whether earlier ones are done or not,
/// until `count` have arrived or the deadline has passed.
///
/// A latency counts from the moment when the operation was to arrive, so that a stall is felt by all that it held up. Arrivals
/// come 5 to 20 µs apart; those that are due are let in each `tick`, and what one waits for that counts in its latency. In
/// between, this core sleeps.
pub(crate) async fn open_loop<Operation, Running>(
    count: usize,
    rate: f64,
    tick: Duration,
    deadline: Instant,
    seed: u64,
    operation: Operation,
) -> Result<Done>
where
    Operation: Fn(usize) -> Running + Clone + Send + 'static,
    Running: Future<Output = Result<()>> + Send,
{
    let line = Arc::new(Mutex::new(Line::default()));
    let latencies = Arc::new(Mutex::new(Latencies::new()));
    let mut workers = JoinSet::new();
    for _ in 0..OPEN_LOOP_WORKERS.min(count) {
        let (line, latencies, operation) = (line.clone(), latencies.clone(), operation.clone());
        workers.spawn(async move {
            let mut done = 0;
            while let Some((due, index)) = Line::next(&line).await {
                operation(index).await.with_context(|| format!("operation {index}"))?;
                lock(&latencies).push(due.elapsed());
                done += 1;
            }
            anyhow::Ok(done)
        });
    }
    let alarm = Alarm::new()?;
    yield_now().await;
    let start = Instant::now();
    let mut random = Random::new(seed);
    let mut due = start;
    let mut now = start;
    let mut late = Duration::ZERO;
    for index in 0..count {
        due += Duration::from_secs_f64(random.exponential() / rate);
        if due >= deadline {
            break;
        }
        if now < due {
            // All that was due is in. The next look comes a tick later, or when the next one is due if that is later.
            alarm.sleep_until(due.max(now + tick)).await?;
            now = Instant::now();
        }
        late = late.max(now - due);
        lock(&line).push((due, index));
    }
    lock(&line).close();
    let count = finish(&mut workers).await?;
    Ok(Done { count, elapsed: start.elapsed(), latencies: taken(latencies), late_max: late })
}

/// Sleeps more exactly than to tokio's millisecond.
struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    #[expect(
        deprecated,
        reason = "what replaces it is unsafe, for types that lie about their descriptor; `OwnedFd` doesn't"
    )]
    fn new() -> Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        Ok(Self(AsyncFd::new(timer)?))
    }

    async fn sleep_until(&self, time: Instant) -> Result<()> {
        let wait = time.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1)); // 0 would disarm it
        let once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let wait = Itimerspec { it_interval: once, it_value: Timespec::try_from(wait)? };
        timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &wait)?;
        loop {
            let mut ready = self.0.readable().await?;
            if let Ok(read) = ready.try_io(|timer| Ok(rustix::io::read(timer, &mut [0; 8])?)) {
                return read.map(drop).context("the timer");
            } // else it was not ready after all
        }
    }
}

/// Runs operations one at a time, at most one each `gap`: what a lone user feels.
pub(crate) async fn paced_loop<Operation, Running>(
    count: usize,
    gap: Duration,
    deadline: Instant,
    operation: Operation,
) -> Result<Done>
where
    Operation: Fn(usize) -> Running,
    Running: Future<Output = Result<()>>,
{
    let mut latencies = Latencies::new();
    let mut ticks = tokio::time::interval(gap);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let begun = Instant::now();
    let mut done = 0;
    while done < count {
        ticks.tick().await;
        let start = Instant::now();
        if start >= deadline {
            break;
        }
        operation(done).await.with_context(|| format!("operation {done}"))?;
        latencies.push(start.elapsed());
        done += 1;
    }
    Ok(Done { count: done, elapsed: begun.elapsed(), latencies, late_max: Duration::ZERO })
}

async fn finish(workers: &mut JoinSet<Result<usize>>) -> Result<usize> {
    let mut count = 0;
    while let Some(worker) = workers.join_next().await {
        count += worker??;
    }
    Ok(count)
}

fn taken(latencies: Arc<Mutex<Latencies>>) -> Latencies {
    let latencies = Arc::into_inner(latencies).expect("all workers have ended");
    latencies.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Arrivals that no worker has taken, and workers without one. At most one of the two is not empty.
#[derive(Default)]
struct Line {
    arrivals: VecDeque<(Instant, usize)>,
    idle: Vec<Waker>,
    is_closed: bool,
}

impl Line {
    fn push(&mut self, arrival: (Instant, usize)) {
        self.arrivals.push_back(arrival);
        // The one that became idle last: its task is still in the cache.
        if let Some(worker) = self.idle.pop() {
            worker.wake();
        }
    }

    fn close(&mut self) {
        self.is_closed = true;
        self.idle.drain(..).for_each(Waker::wake);
    }

    async fn next(line: &Mutex<Self>) -> Option<(Instant, usize)> {
        poll_fn(|cx| {
            let mut line = lock(line);
            match line.arrivals.pop_front() {
                Some(arrival) => Poll::Ready(Some(arrival)),
                None if line.is_closed => Poll::Ready(None),
                None => {
                    line.idle.push(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

/// The numbers of one run, in the order in which they were measured.
#[derive(Default)]
pub(crate) struct Report(Map<String, Value>);

impl Report {
    /// Adds a number, to three decimals, and shows it on stderr.
    pub(crate) fn add(&mut self, key: impl Into<String>, value: f64) {
        let key = key.into();
        let rounded = (value * 1e3).round() / 1e3;
        eprintln!("{key} {rounded}");
        self.0.insert(key, Number::from_f64(rounded).map_or(Value::Null, Value::Number));
    }

    /// Adds `NAME_p50_us`, `NAME_p99_us` and `NAME_p999_us`.
    pub(crate) fn add_latencies(&mut self, name: &str, latencies: &Latencies) {
        for (suffix, share) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999)] {
            self.add(format!("{name}_{suffix}_us"), latencies.quantile_us(share));
        }
    }

    /// Adds `NAME_ops`, the latencies, and the CPU time of both sides per operation: `NAME_server_us`, `NAME_client_us`.
    pub(crate) fn add_operations(&mut self, name: &str, done: &Done, cpu: Cpu) {
        self.add(format!("{name}_ops"), done.rate());
        self.add_latencies(name, &done.latencies);
        let per_operation = |time: Duration| time.as_secs_f64() * 1e6 / done.count.max(1) as f64;
        self.add(format!("{name}_server_us"), per_operation(cpu.server));
        self.add(format!("{name}_client_us"), per_operation(cpu.client));
        self.add(format!("{name}_count"), done.count as f64);
        self.add_foreign(name, cpu);
    }

    /// Adds `NAME_mbs` (10^6 bytes a second) and the share of its core that each side used.
    pub(crate) fn add_transfer(&mut self, name: &str, bytes: u64, elapsed: Duration, cpu: Cpu) {
        self.add(format!("{name}_mbs"), bytes as f64 / elapsed.as_secs_f64() / 1e6);
        self.add(format!("{name}_server_share"), cpu.server.as_secs_f64() / elapsed.as_secs_f64());
        self.add(format!("{name}_client_share"), cpu.client.as_secs_f64() / elapsed.as_secs_f64());
        self.add_foreign(name, cpu);
    }

    /// Adds `NAME_foreign_share`: CPUs' worth of work on the machine that was neither side's.
    pub(crate) fn add_foreign(&mut self, name: &str, cpu: Cpu) {
        self.add(format!("{name}_foreign_share"), cpu.foreign_share);
        if cpu.foreign_share > FOREIGN_SHARE_MAX {
            eprintln!("warning: others used {:.2} CPUs meanwhile: {name} is not what it would be", cpu.foreign_share);
        }
    }

    /// One line of JSON.
    pub(crate) fn to_json(&self) -> String {
        Value::Object(self.0.clone()).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn far() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn quantiles_of_few_and_none() {
        let mut latencies = Latencies::new();
        assert_eq!(latencies.quantile_us(0.5), 0.0);
        for micros in [3, 1, 2] {
            latencies.push(Duration::from_micros(micros));
        }
        assert_eq!(latencies.quantile_us(0.5).round(), 2.0);
        assert_eq!(latencies.quantile_us(1.0).round(), 3.0);
        latencies.push(Duration::from_secs(3_600));
        assert!(latencies.max_us() >= 59e6);
    }

    #[tokio::test]
    async fn a_closed_loop_stops_at_count_and_at_deadline() {
        let done = closed_loop(10, 4, far(), |_| async { Ok(()) }).await.unwrap();
        assert_eq!(done.count, 10);
        let done = closed_loop(10, 4, Instant::now(), |_| async { Ok(()) }).await.unwrap();
        assert_eq!(done.count, 0);
        assert!(closed_loop(10, 4, far(), |_| async { anyhow::bail!("no") }).await.is_err());
    }

    #[tokio::test]
    async fn an_open_loop_feels_a_stall_that_it_did_not_cause() {
        // 200 arrivals within 20 ms or so; the first one holds the only thread for 100 ms. A closed loop would see one slow
        // operation; here, half of all wait.
        let done = open_loop(200, 10_000.0, OPEN_LOOP_TICK, far(), 1, |index| async move {
            if index == 0 {
                std::thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        });
        let done = done.await.unwrap();
        assert_eq!(done.count, 200);
        assert!(done.latencies.quantile_us(0.5) > 50e3, "{}", done.latencies.quantile_us(0.5));
    }

    #[tokio::test]
    async fn an_open_loop_keeps_its_rate_and_its_deadline() {
        let deadline = Instant::now() + Duration::from_millis(200);
        let done = open_loop(usize::MAX, 5_000.0, OPEN_LOOP_TICK, deadline, 2, |_| async { Ok(()) }).await.unwrap();
        assert!((700..1_300).contains(&done.count), "{}", done.count);
        assert!(open_loop(5, 1e5, OPEN_LOOP_TICK, far(), 3, |_| async { anyhow::bail!("no") }).await.is_err());
    }

    #[tokio::test]
    async fn a_paced_loop_leaves_gaps() {
        let begun = Instant::now();
        let done = paced_loop(5, Duration::from_millis(2), far(), |_| async { Ok(()) }).await.unwrap();
        assert_eq!(done.count, 5);
        assert!(begun.elapsed() >= Duration::from_millis(8));
    }

    #[test]
    fn this_process_has_memory_and_cpu_time() {
        let pid = std::process::id();
        assert!(memory_kib(pid, "VmRSS").unwrap() > 100.0);
        assert!(memory_kib(pid, "VmHWM").unwrap() >= memory_kib(pid, "VmRSS").unwrap() / 2.0);
        assert!(memory_kib(pid, "VmNone").is_err());
        assert!(Meter::start(pid).unwrap().read().is_ok());
    }
}
