//! A short time slice for shards.
//!
//! A busy shard never sleeps, and the kernel's own threads that finish its disk syncs run on its core. By default they would
//! wait for the end of a slice of about 3 ms (EEVDF lets the running task keep its slice), which is thirty times as long as a
//! sync takes. A task may ask for a shorter slice, without privileges (Linux 6.12, `sched_setattr(2)`, `sched_runtime`); its
//! share of the core stays the same.

use std::io;

/// The shortest slice that Linux grants.
const SLICE_NS: u64 = 100_000;

/// `struct sched_attr`, version 0 (`include/uapi/linux/sched/types.h`).
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Asks for the short slice for the calling thread and those it starts. Kernels before 6.12 ignore the wish.
pub(crate) fn shorten() -> io::Result<()> {
    let size = size_of::<SchedAttr>() as u32;
    let mut attr = SchedAttr { size, ..SchedAttr::default() };
    // SAFETY: the kernel writes at most `size` bytes into `attr`, which has them; there is no safe interface to this call.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    if attr.policy as i32 != libc::SCHED_OTHER {
        return Ok(()); // somebody has chosen another policy for us
    }
    attr.size = size;
    attr.runtime = SLICE_NS;
    // SAFETY: the kernel reads `size` bytes of `attr`, which has them; the call changes the scheduling of this thread only.
    let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_wish_is_accepted_and_keeps_the_nice_value() {
        std::thread::spawn(|| super::shorten().unwrap()).join().unwrap();
    }
}
