//! Criterion micro benchmarks: what one operation costs, apart from networks and disks.
//!
//! `cargo bench -p metanode-bench-micro` runs them; `-- framing` chooses. They live in `benches/micro`, one module a subject; this
//! library is empty. Figures that users see come from `cargo xtask bench`, never from here.
