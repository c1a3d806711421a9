use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// Buckets of one octave: each spans at most 12.5 % of its lower bound.
const SUB_BUCKETS: usize = 8;
/// 2^10 ns ≈ 1 µs: what is faster lands in the first bucket. A clock read and a cache miss are below that.
const FIRST_OCTAVE: u32 = 10;
/// Up to 2^36 ns ≈ 68.7 s: what is slower lands in the last bucket. No request outlives its 60 s deadline.
const OCTAVES: usize = 26;
const BUCKETS: usize = 1 + OCTAVES * SUB_BUCKETS + 1;

/// How durations are distributed: log-linear buckets, 12.5 % wide, from 1 µs to 68 s. 1.7 KiB.
pub struct Histogram {
    buckets: Box<[AtomicU64; BUCKETS]>,
    sum_ns: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { buckets: Box::new([const { AtomicU64::new(0) }; BUCKETS]), sum_ns: AtomicU64::new(0) }
    }
}

impl fmt::Debug for Histogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Histogram").field("count", &self.count()).field("p50", &self.quantile(0.5)).finish()
    }
}

impl Histogram {
    /// Adds one observation.
    pub fn record(&self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(ns)].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// Observations so far.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }

    /// Their sum.
    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum_ns.load(Ordering::Relaxed))
    }

    /// An upper bound, at most 12.5 % too high, of what the fraction `quantile` (0 to 1) of observations stayed below; zero
    /// without observations.
    pub fn quantile(&self, quantile: f64) -> Duration {
        let counts = self.counts();
        let rank = (counts.iter().sum::<u64>() as f64 * quantile.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return Duration::from_nanos(upper_bound_ns(index));
            }
        }
        Duration::ZERO
    }

    /// Adds the observations of `other`, as when shards are summed.
    pub fn merge(&self, other: &Self) {
        for (mine, theirs) in self.buckets.iter().zip(other.buckets.iter()) {
            mine.fetch_add(theirs.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.sum_ns.fetch_add(other.sum_ns.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Observations up to each octave's end: (seconds, cumulative count). The last entry has all but the slowest.
    pub(super) fn cumulative_octaves(&self) -> impl Iterator<Item = (f64, u64)> {
        let counts = self.counts();
        let mut seen = counts[0];
        let first = std::iter::once((octave_end_seconds(0), seen));
        let rest: Vec<_> = counts[1..BUCKETS - 1]
            .chunks(SUB_BUCKETS)
            .enumerate()
            .map(|(octave, counts)| {
                seen += counts.iter().sum::<u64>();
                (octave_end_seconds(octave + 1), seen)
            })
            .collect();
        first.chain(rest)
    }

    fn counts(&self) -> [u64; BUCKETS] {
        std::array::from_fn(|index| self.buckets[index].load(Ordering::Relaxed))
    }
}

fn octave_end_seconds(octave: usize) -> f64 {
    (1u64 << (FIRST_OCTAVE as usize + octave)) as f64 / 1e9
}

fn bucket_of(ns: u64) -> usize {
    let octave = ns.max(1).ilog2();
    if octave < FIRST_OCTAVE {
        return 0;
    }
    let octave_index = (octave - FIRST_OCTAVE) as usize;
    if octave_index >= OCTAVES {
        return BUCKETS - 1;
    }
    let sub = (ns >> (octave - SUB_BUCKETS.ilog2())) as usize % SUB_BUCKETS;
    1 + octave_index * SUB_BUCKETS + sub
}

/// The first value that lies behind the bucket; the last bucket has none, so its lower bound stands in.
fn upper_bound_ns(index: usize) -> u64 {
    let Some(index) = index.checked_sub(1) else {
        return 1 << FIRST_OCTAVE;
    };
    let index = index.min(OCTAVES * SUB_BUCKETS - 1);
    let octave = FIRST_OCTAVE as usize + index / SUB_BUCKETS;
    let step = (1u64 << octave) / SUB_BUCKETS as u64;
    (1u64 << octave) + step * (index % SUB_BUCKETS + 1) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bucket_holds_what_its_bounds_say() {
        let mut ns = 1u64;
        while ns < 1 << 40 {
            let bucket = bucket_of(ns);
            if bucket < BUCKETS - 1 {
                assert!(ns < upper_bound_ns(bucket), "{ns}");
                assert!(bucket == 0 || ns >= upper_bound_ns(bucket - 1), "{ns}");
            }
            if (1..BUCKETS - 1).contains(&bucket) {
                assert!(upper_bound_ns(bucket) as f64 <= ns as f64 * 1.125 + 1.0, "{ns}");
            }
            ns += ns / 7 + 1;
        }
        assert_eq!(bucket_of(0), 0);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_within_an_eighth() {
        let histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), Duration::ZERO);
        for micros in 1..=10_000 {
            histogram.record(Duration::from_micros(micros));
        }
        for (quantile, exact) in [(0.0, 1.0), (0.5, 5_000.0), (0.99, 9_900.0), (1.0, 10_000.0)] {
            let micros = histogram.quantile(quantile).as_secs_f64() * 1e6;
            assert!((exact..=exact * 1.13).contains(&micros), "{quantile}: {micros}");
        }
        assert_eq!(histogram.count(), 10_000);
        assert_eq!(histogram.sum(), Duration::from_micros(10_000 * 10_001 / 2));
        let other = Histogram::default();
        other.merge(&histogram);
        assert_eq!(other.quantile(0.5), histogram.quantile(0.5));
    }
}
