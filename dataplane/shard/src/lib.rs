//! Executors, mesh, buffers, timers, files and readiness: what every part of the node that performs I/O stands on.
//!
//! A *shard* is one thread, usually pinned to one core, that runs one glommio executor. Everything inside a shard is `!Send`
//! and needs no lock; shards talk only through the [`mesh`]. This is the only crate that names glommio, so that replacing the
//! runtime is a change of this crate alone.
//!
//! Start reading at [`start`], then:
//!
//! * [`spawn_local`], [`sleep`], [`timeout`], [`yield_now`]: tasks and time inside a shard;
//! * [`mesh`]: bounded rings between shards, and [`mesh::Injector`] into a shard from a foreign thread;
//! * [`file`](mod@file): O_DIRECT files for logs, direct and page-cache files for reads, [`run_blocking`] for the rest of the file
//!   system ([`fs`](mod@fs)); a [`Companion`] for system calls that wait and are frequent;
//! * [`fd::Readiness`]: waiting on a descriptor the runtime did not make;
//! * [`local`]: waiting for another task of the same shard;
//! * [`buffer::BufferPool`]: reusable aligned buffers;
//! * [`metrics`]: counters, gauges and histograms for any thread, and their Prometheus text;
//! * [`signal`]: SIGTERM and SIGINT as something a control thread waits for.
//!
//! *Invariant*: no executor stays parked for longer than a tick with tasks it could run. Both published versions of glommio
//! break it; the rescue loop started in every shard restores it and counts each rescue ([`Stalls`]). The module `stall`
//! describes cause and detection.
//!
//! *Invariant*: a shard's end, by return or by panic, drops all its tasks, so that sockets, files and locks are released.
//!
//! *Invariant*: errors of the operating system keep their number (`std::io::Error::raw_os_error`), so that a full disk and a
//! broken one can be told apart.

pub mod buffer;
mod companion;
mod error;
mod executor;
pub mod fd;
pub mod file;
pub mod fs;
pub mod local;
pub mod mesh;
pub mod metrics;
mod notice;
mod registry;
pub mod signal;
#[cfg(feature = "sim")]
pub mod sim;
mod slice;
mod stall;
mod task;
mod time;

pub use companion::Companion;
pub use executor::{ShardPanic, Shards, ShardsConfig, current_shard, start};
pub use metanode_types::{ShardCount, ShardId};
pub use notice::io_in_flight;
pub use stall::Stalls;
pub use task::{
    JoinHandle, Task, fill_random, may_linger, need_preempt, run_blocking, spawn_local, yield_now, yield_queue_now,
};
pub use time::{Elapsed, Timer, now, sleep, timeout, unix_ms};
