//! SIGTERM and SIGINT as something a control thread waits for, instead of a handler that may do almost nothing.

use std::{io, mem::MaybeUninit, ptr, time::Duration};

/// What asked the process to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopSignal {
    /// SIGTERM: a service manager.
    Terminate,
    /// SIGINT: a terminal.
    Interrupt,
}

/// The two stop signals, blocked in every thread and delivered here.
#[derive(Debug)]
pub struct StopSignals(());

/// Blocks SIGTERM and SIGINT in this thread and in all threads it starts from now on. Call it in `main`, before shards and
/// other threads exist: a thread that was started earlier would still die of them. Child processes inherit the mask.
pub fn install_stop_signals() -> io::Result<StopSignals> {
    let set = stop_set();
    // SAFETY: `set` is an initialised signal set and the old mask is not asked for.
    let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
    match error {
        0 => Ok(StopSignals(())),
        number => Err(io::Error::from_raw_os_error(number)),
    }
}

impl StopSignals {
    /// Waits for the next one.
    pub fn wait(&self) -> io::Result<StopSignal> {
        loop {
            if let Some(signal) = self.wait_timeout(Duration::from_secs(3600))? {
                return Ok(signal);
            }
        }
    }

    /// Waits for at most `timeout`.
    pub fn wait_timeout(&self, timeout: Duration) -> io::Result<Option<StopSignal>> {
        let set = stop_set();
        let time = libc::timespec {
            tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        // SAFETY: set and time are initialised; the signal's details are not asked for.
        let signal = unsafe { libc::sigtimedwait(&raw const set, ptr::null_mut(), &raw const time) };
        match signal {
            libc::SIGTERM => Ok(Some(StopSignal::Terminate)),
            libc::SIGINT => Ok(Some(StopSignal::Interrupt)),
            _ => match io::Error::last_os_error() {
                error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => Ok(None),
                error => Err(error),
            },
        }
    }
}

fn stop_set() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set; both signal numbers are valid, so none of the calls can fail.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGTERM);
        libc::sigaddset(set.as_mut_ptr(), libc::SIGINT);
        set.assume_init()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_signal_is_delivered_to_the_waiter() {
        // In a thread of its own, so that the mask doesn't leak into other tests; the signal goes to that thread alone.
        let waited = std::thread::spawn(|| {
            let signals = install_stop_signals().unwrap();
            assert_eq!(signals.wait_timeout(Duration::ZERO).unwrap(), None);
            // SAFETY: signals this very thread, which has SIGTERM blocked.
            unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGTERM) };
            signals.wait().unwrap()
        });
        assert_eq!(waited.join().unwrap(), StopSignal::Terminate);
    }
}
