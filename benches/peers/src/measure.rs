//! Load loops, percentiles, CPU accounting and the report.

use std::{
    fs,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::thread::{CpuSet, sched_setaffinity};
use serde_json::{Map, Number, Value};
use tokio::task::JoinSet;

/// Pins the calling thread, and every thread that it starts from now on, to one core.
pub(crate) fn pin(core: usize) -> Result<()> {
    ensure!(core < CpuSet::MAX_CPU, "there is no core {core}");
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).with_context(|| format!("cannot pin to core {core}"))
}

/// CPU time of all live threads of a process, by its scheduler statistics (nanoseconds, unlike the ticks in `stat`).
///
/// A thread that ends takes its time out of the sum; the servers here keep their threads.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let mut nanos = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).context("the server is gone")? {
        let Ok(statistics) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        nanos += statistics.split(' ').next().and_then(|on_cpu| on_cpu.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanos))
}

/// Latencies of single operations.
#[derive(Default)]
pub(crate) struct Latencies(Vec<u64>);

impl Latencies {
    pub(crate) fn push(&mut self, latency: Duration) {
        self.0.push(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
    }

    /// The latency, in microseconds, that a share of the operations stayed below; 0 if there were none.
    pub(crate) fn quantile_us(&mut self, share: f64) -> f64 {
        self.0.sort_unstable();
        let index = (self.0.len() as f64 * share) as usize;
        self.0.get(index.min(self.0.len().saturating_sub(1))).map_or(0.0, |nanos| *nanos as f64 / 1e3)
    }
}

/// What a closed loop did.
pub(crate) struct Done {
    /// Operations completed: exactly those numbered below this.
    pub(crate) count: usize,
    pub(crate) elapsed: Duration,
    pub(crate) latencies: Latencies,
}

impl Done {
    pub(crate) fn rate(&self) -> f64 {
        self.count as f64 / self.elapsed.as_secs_f64()
    }
}

/// Runs operations 0, 1, 2, … with `concurrency` of them in flight until `count` are done or the deadline has passed.
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
    let start = Instant::now();
    let mut workers = JoinSet::new();
    for _ in 0..concurrency {
        let (next, operation) = (next.clone(), operation.clone());
        workers.spawn(async move {
            let mut latencies = Latencies::default();
            let mut now = Instant::now();
            while now < deadline {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= count {
                    break;
                }
                operation(index).await.with_context(|| format!("operation {index}"))?;
                let end = Instant::now();
                latencies.push(end - now);
                now = end;
            }
            anyhow::Ok(latencies)
        });
    }
    let mut latencies = Latencies::default();
    while let Some(worker) = workers.join_next().await {
        latencies.0.append(&mut worker??.0);
    }
    Ok(Done { count: latencies.0.len(), elapsed: start.elapsed(), latencies })
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

    /// Adds `NAME_ops`, `NAME_p50_us`, `NAME_p99_us` and the server's CPU time per operation, `NAME_server_us`.
    pub(crate) fn add_operations(&mut self, name: &str, done: &mut Done, server_cpu: Duration) {
        self.add(format!("{name}_ops"), done.rate());
        self.add(format!("{name}_p50_us"), done.latencies.quantile_us(0.50));
        self.add(format!("{name}_p99_us"), done.latencies.quantile_us(0.99));
        self.add(format!("{name}_server_us"), server_cpu.as_secs_f64() * 1e6 / done.count.max(1) as f64);
        self.add(format!("{name}_count"), done.count as f64);
    }

    /// Adds `NAME_mbs` (10^6 bytes a second), `NAME_mibs` (2^20) and the share of its core that the server used.
    pub(crate) fn add_transfer(&mut self, name: &str, bytes: u64, elapsed: Duration, server_cpu: Duration) {
        let rate = bytes as f64 / elapsed.as_secs_f64();
        self.add(format!("{name}_mbs"), rate / 1e6);
        self.add(format!("{name}_mibs"), rate / f64::from(1 << 20));
        self.add(format!("{name}_server_share"), server_cpu.as_secs_f64() / elapsed.as_secs_f64());
    }

    /// One line of JSON.
    pub(crate) fn to_json(&self) -> String {
        Value::Object(self.0.clone()).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_few_and_none() {
        let mut none = Latencies::default();
        assert_eq!(none.quantile_us(0.5), 0.0);
        let mut few = Latencies(vec![3_000, 1_000, 2_000]);
        assert_eq!(few.quantile_us(0.5), 2.0);
        assert_eq!(few.quantile_us(1.0), 3.0);
    }

    #[tokio::test]
    async fn closed_loop_stops_at_count_and_at_deadline() {
        let far = Instant::now() + Duration::from_secs(60);
        let done = closed_loop(10, 4, far, |_| async { Ok(()) }).await.unwrap();
        assert_eq!(done.count, 10);
        let done = closed_loop(10, 4, Instant::now(), |_| async { Ok(()) }).await.unwrap();
        assert_eq!(done.count, 0);
        assert!(closed_loop(10, 4, far, |_| async { anyhow::bail!("no") }).await.is_err());
    }
}
