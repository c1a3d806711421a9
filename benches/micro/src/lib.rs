//! Criterion micro benchmarks
