//! Counters, gauges and histograms that any thread may update and read, and their Prometheus text.
//!
//! All updates are relaxed atomic operations on memory that no other metric shares a cache line with. There is no registry:
//! whoever owns a metric passes it to a [`TextWriter`].

mod histogram;
mod text;

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;
pub use histogram::Histogram;
pub use text::{Labels, TextWriter};

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(CachePadded<AtomicU64>);

impl Counter {
    /// Adds one.
    pub fn increment(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The number.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that grows and shrinks, not below zero.
#[derive(Debug, Default)]
pub struct Gauge(CachePadded<AtomicU64>);

impl Gauge {
    /// Sets it.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// Subtracts `n`.
    pub fn sub(&self, n: u64) {
        self.0.fetch_sub(n, Ordering::Relaxed);
    }

    /// The number.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
