//! Reusable aligned buffers.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::{Arc, Mutex, PoisonError},
};

use crate::file::AlignedBuffer;

/// Buffers that come back when they are dropped, on whatever thread, and are taken again. Cloning shares the pool.
///
/// Fresh memory for a read of 256 KiB costs the kernel as much as the read. The pool keeps at most a fixed number of idle buffers; how
/// many are out is the business of its users' own limits.
#[derive(Clone)]
pub struct BufferPool(Arc<Inner>);

struct Inner {
    idle_max: usize,
    buffer_bytes_max: usize,
    idle: Mutex<Vec<AlignedBuffer>>,
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferPool").field("idle", &self.idle()).finish_non_exhaustive()
    }
}

impl BufferPool {
    /// A pool that keeps `idle_max` buffers of up to `buffer_bytes_max` bytes while nobody uses them.
    pub fn new(idle_max: usize, buffer_bytes_max: usize) -> Self {
        Self(Arc::new(Inner { idle_max, buffer_bytes_max, idle: Mutex::default() }))
    }

    /// An empty buffer.
    pub fn take(&self) -> PooledBuffer {
        let idle = self.0.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        PooledBuffer { buffer: idle.unwrap_or_default(), pool: self.0.clone() }
    }

    /// Buffers that wait to be taken.
    pub fn idle(&self) -> usize {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

/// A buffer of a [`BufferPool`].
#[derive(Debug)]
pub struct PooledBuffer {
    buffer: AlignedBuffer,
    pool: Arc<Inner>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Inner")
    }
}

impl Deref for PooledBuffer {
    type Target = AlignedBuffer;

    fn deref(&self) -> &AlignedBuffer {
        &self.buffer
    }
}

impl DerefMut for PooledBuffer {
    fn deref_mut(&mut self) -> &mut AlignedBuffer {
        &mut self.buffer
    }
}

impl AsRef<[u8]> for PooledBuffer {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_slice()
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.clear(self.pool.buffer_bytes_max);
        let mut idle = self.pool.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if buffer.capacity() > 0 && idle.len() < self.pool.idle_max {
            idle.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn buffers_come_back_empty_and_no_more_than_wanted_are_kept() {
        let pool = BufferPool::new(2, 8192);
        let mut buffers: Vec<_> = (0..3).map(|_| pool.take()).collect();
        for buffer in &mut buffers {
            buffer.extend_from_slice(&[7; 5000]);
        }
        let place = buffers[2].as_slice().as_ptr();
        let kept = Bytes::from_owner(buffers.pop().unwrap());
        assert_eq!(kept[..], [7; 5000]);
        let half = kept.slice(100..200);
        drop(kept);
        assert_eq!(pool.idle(), 0, "a part of it is in use");
        std::thread::spawn(move || drop(half)).join().unwrap();
        assert_eq!(pool.idle(), 1);
        let mut again = pool.take();
        assert!(again.as_slice().is_empty());
        again.extend_from_slice(&[8; 10]);
        assert_eq!(again.as_slice().as_ptr(), place);
        again.reserve(10_000); // too large to be kept
        drop(again);
        assert_eq!(pool.idle(), 0);
        drop(buffers);
        assert_eq!(pool.idle(), 2);
        drop((pool.take(), pool.take(), pool.take()));
        assert_eq!(pool.idle(), 2, "nothing to keep in a buffer that was not filled");
    }
}
