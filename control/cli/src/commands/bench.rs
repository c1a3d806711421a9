//! `metanode bench`: a quick look at the node in use. Comparisons and claims come from the project's benches, not from here.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use hdrhistogram::Histogram;
use metanode_client::{BytesSource, Client, ClientError, FnSink, Got, PutOptions};
use metanode_types::{BlobKind, ByteRange, DurabilityClass, Hash};
use serde::Serialize;
use tokio::task::JoinSet;

use super::with_client;
use crate::{
    args::{Bench, Global},
    exit::{Exit, Failure, Result},
    output::{Row, count},
};

const SMALL_BYTES: usize = 4096;
const LARGE_BYTES: usize = 64 << 20;

/// Small blobs that are read back: what was put, but not more than this.
const READ_SET_MAX: usize = 10_000;

#[derive(Debug, Serialize)]
struct Line {
    what: &'static str,
    class: &'static str,
    concurrency: u32,
    operations: u64,
    per_second: f64,
    mb_per_second: f64,
    p50_us: u64,
    p99_us: u64,
    note: &'static str,
}

impl Row for Line {
    const COLUMNS: &'static [(&'static str, isize)] = &[
        ("WHAT", 14),
        ("CLASS", 7),
        ("AT ONCE", -7),
        ("OPS/S", -9),
        ("RATE", -11),
        ("P50", -9),
        ("P99", -9),
        ("NOTE", 0),
    ];

    fn cells(&self) -> Vec<String> {
        let single = self.operations == 1;
        let time = |us: u64| if single { "-".into() } else { format!("{} us", count(us)) };
        vec![
            self.what.into(),
            self.class.into(),
            self.concurrency.to_string(),
            if single { "-".into() } else { count(self.per_second as u64) },
            format!("{:.0} MB/s", self.mb_per_second),
            time(self.p50_us),
            time(self.p99_us),
            self.note.into(),
        ]
    }
}

pub(super) fn run(global: &Global, bench: &Bench) -> Result<()> {
    let lines = with_client(global, None, true, async |client, _| {
        client.connect_all_shards().await?;
        if !client.may_write() {
            return Err(Failure::new(Exit::NotPermitted, "the bench stores blobs, and this key may not write")
                .hint("the node's operator adds your key (`metanode id`) to `access` in its metanode.toml"));
        }
        let mut lines = Vec::new();
        let hashes = small_puts(client, bench, &mut lines).await?;
        small_gets(client, bench, hashes, &mut lines).await?;
        large(client, bench, &mut lines).await?;
        Ok(lines)
    })?;
    let mut list = global.output.list()?;
    for line in &lines {
        list.push(line)?;
    }
    list.end()?;
    super::node::say(
        "closed loop: each request waits for an earlier one, so times under load are not to be read as latencies of an open service; \
         what was stored is given up with the connection",
    );
    Ok(())
}

/// Blobs of the bench live as long as its connection.
fn options(bench: &Bench) -> PutOptions {
    PutOptions { class: bench.class.into(), kind: BlobKind::Blob, hold: false }
}

fn class_name(bench: &Bench) -> &'static str {
    match bench.class.into() {
        DurabilityClass::Durable => "durable",
        DurabilityClass::Memory => "memory",
    }
}

/// 4 KiB that nobody else has.
fn unlike(seed: [u8; 32], number: u64) -> Bytes {
    let mut bytes = vec![0; SMALL_BYTES];
    let begin = metanode_crypto::derive("metanode 2026 cli bench v1", &[&seed[..], &number.to_le_bytes()].concat());
    for (at, piece) in bytes.chunks_mut(32).enumerate() {
        piece.copy_from_slice(&begin);
        piece[0] ^= at as u8;
    }
    bytes.into()
}

fn seed() -> Result<[u8; 32]> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| Failure::new(Exit::Other, error))?;
    Ok(seed)
}

/// Does `work` again and again on `concurrency` tasks until the time is over.
async fn repeat<F>(
    bench: &Bench,
    work: impl Fn(u64) -> F + Clone + Send + 'static,
) -> std::result::Result<(u64, Duration, Histogram<u64>), ClientError>
where
    F: Future<Output = std::result::Result<(), ClientError>> + Send + 'static,
{
    let next = Arc::new(AtomicU64::new(0));
    let (begun, time) = (Instant::now(), bench.time);
    let mut tasks = JoinSet::new();
    for _ in 0..bench.concurrency {
        let (next, work) = (next.clone(), work.clone());
        tasks.spawn(async move {
            let mut times = histogram();
            while begun.elapsed() < time {
                let begun = Instant::now();
                work(next.fetch_add(1, Relaxed)).await?;
                times.saturating_record(begun.elapsed().as_micros() as u64);
            }
            Ok::<_, ClientError>(times)
        });
    }
    let mut all = histogram();
    while let Some(done) = tasks.join_next().await {
        let times = done.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        all.add(&times).expect("all histograms have the same limits");
    }
    Ok((all.len(), begun.elapsed(), all))
}

/// Microseconds up to a minute.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("the bounds are in order and 3 digits are within the limits")
}

fn small_line(
    what: &'static str,
    class: &'static str,
    bench: &Bench,
    (operations, time, times): &(u64, Duration, Histogram<u64>),
    note: &'static str,
) -> Line {
    let per_second = *operations as f64 / time.as_secs_f64();
    Line {
        what,
        class,
        concurrency: bench.concurrency,
        operations: *operations,
        per_second,
        mb_per_second: per_second * SMALL_BYTES as f64 / 1e6,
        p50_us: times.value_at_quantile(0.5),
        p99_us: times.value_at_quantile(0.99),
        note,
    }
}

async fn small_puts(client: &Client, bench: &Bench, lines: &mut Vec<Line>) -> Result<Vec<Hash>> {
    let seed = seed()?;
    let options = options(bench);
    let client = client.clone();
    let measured = repeat(bench, move |number| {
        let client = client.clone();
        async move { client.put_whole(unlike(seed, number), options).await.map(drop) }
    });
    let measured = measured.await?;
    lines.push(small_line("put 4 KiB", class_name(bench), bench, &measured, "each blob is new"));
    let count = measured.0.min(READ_SET_MAX as u64);
    Ok((0..count).map(|number| metanode_crypto::hash(&unlike(seed, number))).collect())
}

async fn small_gets(client: &Client, bench: &Bench, hashes: Vec<Hash>, lines: &mut Vec<Line>) -> Result<()> {
    let hashes = Arc::new(hashes);
    let client = client.clone();
    let measured = repeat(bench, move |number| {
        let (client, hashes) = (client.clone(), hashes.clone());
        async move {
            match client.get_whole(hashes[number as usize % hashes.len()]).await? {
                Got::Whole(_) => Ok(()),
                Got::Large { .. } => Err(ClientError::Timeout("fetching a small blob as one")),
            }
        }
    });
    let measured = measured.await?;
    lines.push(small_line("get 4 KiB", "-", bench, &measured, "verified; just put, so most likely from memory"));
    Ok(())
}

async fn large(client: &Client, bench: &Bench, lines: &mut Vec<Line>) -> Result<()> {
    let seed = seed()?;
    let data: Vec<u8> = (0..(LARGE_BYTES / SMALL_BYTES) as u64).flat_map(|number| unlike(seed, number)).collect();
    let begun = Instant::now();
    let mut source = BytesSource(data.into());
    let stored = client.put_source(&mut source, Some(LARGE_BYTES as u64), options(bench)).await?;
    lines.push(large_line("put 64 MiB", class_name(bench), begun.elapsed(), "one stream, hashed here and there"));
    let begun = Instant::now();
    client.get_range(stored.hash, ByteRange::ALL, &mut FnSink(|_, _: &[u8]| {})).await?;
    lines.push(large_line("get 64 MiB", "-", begun.elapsed(), "one stream, verified, not written"));
    Ok(())
}

fn large_line(what: &'static str, class: &'static str, time: Duration, note: &'static str) -> Line {
    Line {
        what,
        class,
        concurrency: 1,
        operations: 1,
        per_second: 1.0 / time.as_secs_f64(),
        mb_per_second: LARGE_BYTES as f64 / time.as_secs_f64() / 1e6,
        p50_us: time.as_micros() as u64,
        p99_us: time.as_micros() as u64,
        note,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_of_the_bench_differ() {
        let seed = [1; 32];
        assert_ne!(unlike(seed, 1), unlike(seed, 2));
        assert_eq!(unlike(seed, 1), unlike(seed, 1));
        assert_eq!(unlike(seed, 1).len(), SMALL_BYTES);
    }
}
