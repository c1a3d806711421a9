//! Waiting: for an event until a deadline, never for a time to pass.

use std::{
    future::Future,
    thread,
    time::{Duration, Instant},
};

/// Whether tests use the sizes of real use in place of small ones: `METANODE_LARGE`, which `cargo xtask test --large` sets.
pub fn is_large() -> bool {
    std::env::var_os("METANODE_LARGE").is_some()
}

/// Times that are many times what is needed for small sizes, stretched when sizes are large.
pub(crate) fn stretched(time: Duration) -> Duration {
    if is_large() { 10 * time } else { time }
}

/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// A whole test: many times what it takes on two busy cores, so that only a hang runs into it.
const SCENARIO_TIME_MAX: Duration = Duration::from_secs(120);

/// Runs an asynchronous test on a runtime of its own, within a deadline: one that hangs fails, and its processes end.
///
/// # Panics
///
/// When the deadline passes.
pub fn scenario<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime starts");
    let result = runtime.block_on(async { tokio::time::timeout(stretched(SCENARIO_TIME_MAX), Box::pin(test)).await });
    runtime.shutdown_background(); // a thread that reads from a process may be stuck
    result.unwrap_or_else(|_| panic!("the test did not end within {SCENARIO_TIME_MAX:?}"))
}

/// Looks until there is something.
///
/// # Panics
///
/// When there is nothing by the deadline; `what` says what was awaited.
pub async fn eventually<T>(what: &str, deadline: Duration, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begun.elapsed() < deadline, "{what}: not within {deadline:?}");
        tokio::time::sleep(PAUSE).await;
    }
}

/// As [`eventually`], in a thread that may wait; `None` when the deadline passes.
pub fn wait_for<T>(deadline: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let begun = Instant::now();
    loop {
        match look() {
            Some(found) => return Some(found),
            None if begun.elapsed() > deadline => return None,
            None => thread::sleep(PAUSE),
        }
    }
}
