//! The deaf executor (see the crate's module `stall`): provoked with a tiny preemption timer, rescued, and counted.

#![allow(clippy::unwrap_used)] // clippy's exception for tests doesn't reach the helpers here

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use metanode_shard::{ShardsConfig, fd::Readiness, start, yield_now};

/// Enough even on a slow machine: the prototype went deaf within 20,000 pings.
const PINGS_MAX: u64 = 200_000;
/// When the test gives up.
const DEADLINE: Duration = Duration::from_secs(100);
/// Well above the rescue tick, well below "never": what an answer may take.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Rescues to see: one could be luck.
const RESCUES: u64 = 5;

/// Answers each byte; the shard waits by readiness only, as the QUIC driver does. The number of pings, all answered; `None`
/// when the executor was deaf from its first turn on, which `start` reports.
fn ping_until(config: &ShardsConfig, pings_max: u64, done: impl Fn(u64) -> bool) -> Option<u64> {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    ours.set_read_timeout(Some(ANSWER_MAX)).unwrap();
    let mut theirs = Some(theirs);
    let shards = start(config, |_| {
        let socket = theirs.take().unwrap();
        move || async move {
            let ready = Readiness::new(socket).unwrap();
            let mut byte = [0];
            loop {
                ready.readable().await.unwrap();
                if ready.inner().read(&mut byte).unwrap() == 0 {
                    return;
                }
                yield_now().await;
                ready.inner().write_all(&byte).unwrap();
            }
        }
    });
    let shards = match shards {
        Err(error) if error.kind() == std::io::ErrorKind::TimedOut => return None,
        started => started.unwrap(),
    };
    let mut pings = 0;
    while pings < pings_max && !done(pings) {
        ours.write_all(b"x").unwrap();
        ours.read_exact(&mut [0]).expect("a ping was not answered: the rescue loop has not rescued");
        pings += 1;
    }
    drop(ours);
    assert!(shards.join()[0].is_ok());
    Some(pings)
}

/// Takes the core away from the shard now and then.
struct Spinners {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Spinners {
    fn on_core_0(count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..count).map(|_| {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let mut core = rustix::thread::CpuSet::new();
                core.set(0);
                rustix::thread::sched_setaffinity(None, &core).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    let begin = Instant::now();
                    while begin.elapsed() < Duration::from_micros(300) {
                        std::hint::spin_loop();
                    }
                    std::thread::sleep(Duration::from_micros(100));
                }
            })
        });
        Self { threads: threads.collect(), stop }
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

#[test]
fn a_deaf_executor_is_rescued_and_counted() {
    let begin = Instant::now();
    let (mut pings, mut rescues) = (0, 0);
    for attempt in 0u64.. {
        let mut config = ShardsConfig::new("deaf", vec![Some(0)]);
        config.preempt_timer = Duration::from_micros([20, 10, 50][attempt as usize % 3]);
        config.start_deadline = Duration::from_secs(2);
        let spinners = Spinners::on_core_0(1 + attempt as usize % 2);
        let stalls = config.stalls.clone();
        let answered =
            ping_until(&config, PINGS_MAX / 8, |_| rescues + stalls.total() >= RESCUES || begin.elapsed() > DEADLINE);
        drop(spinners);
        pings += answered.unwrap_or(0);
        rescues += stalls.total();
        if rescues >= RESCUES {
            println!("{rescues} rescues, attempt {attempt}, {pings} pings, {:?}", begin.elapsed());
            return;
        }
        assert!(pings < PINGS_MAX && begin.elapsed() < DEADLINE, "deaf only {rescues} times in {pings} pings");
    }
}

#[test]
fn a_healthy_executor_counts_nothing() {
    let config = ShardsConfig::new("well", vec![Some(0)]);
    let _spinners = Spinners::on_core_0(1);
    let begin = Instant::now();
    ping_until(&config, 20_000, |_| begin.elapsed() > Duration::from_secs(4)).unwrap();
    assert_eq!(config.stalls.total(), 0);
}
