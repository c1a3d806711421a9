//! Reusable buffers within a byte budget.

use std::{
    cell::RefCell,
    fmt,
    future::poll_fn,
    ops::{Deref, DerefMut},
    rc::Rc,
    task::{Poll, Waker},
};

/// Buffers of one size, reused, of which no more exist than a budget allows. Cloning shares the pool.
#[derive(Clone)]
pub struct BufferPool(Rc<Inner>);

struct Inner {
    buffer_bytes: usize,
    buffers_max: usize,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    idle: Vec<Vec<u8>>,
    in_use: usize,
    waiting: Vec<Waker>,
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferPool")
            .field("buffer_bytes", &self.0.buffer_bytes)
            .field("buffers_max", &self.0.buffers_max)
            .field("in_use", &self.in_use())
            .finish()
    }
}

impl BufferPool {
    /// Buffers with a capacity of `buffer_bytes`, as many as fit `budget_bytes` but at least one.
    pub fn new(buffer_bytes: usize, budget_bytes: usize) -> Self {
        let buffers_max = (budget_bytes / buffer_bytes.max(1)).max(1);
        Self(Rc::new(Inner { buffer_bytes, buffers_max, state: RefCell::default() }))
    }

    /// An empty buffer, or `None` when the budget is spent.
    pub fn try_take(&self) -> Option<PooledBuffer> {
        let mut state = self.0.state.borrow_mut();
        if state.in_use == self.0.buffers_max {
            return None;
        }
        state.in_use += 1;
        let buffer = state.idle.pop().unwrap_or_else(|| Vec::with_capacity(self.0.buffer_bytes));
        Some(PooledBuffer { buffer, pool: self.0.clone() })
    }

    /// An empty buffer, once the budget allows.
    pub async fn take(&self) -> PooledBuffer {
        poll_fn(|cx| match self.try_take() {
            Some(buffer) => Poll::Ready(buffer),
            None => {
                self.0.state.borrow_mut().waiting.push(cx.waker().clone());
                Poll::Pending
            }
        })
        .await
    }

    /// Buffers that are out.
    pub fn in_use(&self) -> usize {
        self.0.state.borrow().in_use
    }

    /// Bytes held by the pool, out or idle.
    pub fn held_bytes(&self) -> usize {
        let state = self.0.state.borrow();
        (state.in_use + state.idle.len()) * self.0.buffer_bytes
    }
}

/// A buffer that returns to its pool when dropped. It starts empty, with the pool's capacity.
pub struct PooledBuffer {
    buffer: Vec<u8>,
    pool: Rc<Inner>,
}

impl fmt::Debug for PooledBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PooledBuffer").field("len", &self.buffer.len()).finish()
    }
}

impl Deref for PooledBuffer {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.buffer
    }
}

impl DerefMut for PooledBuffer {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        let mut buffer = std::mem::take(&mut self.buffer);
        let waiting = {
            let mut state = self.pool.state.borrow_mut();
            state.in_use -= 1;
            // One that its user grew or took apart would break the budget's arithmetic.
            if buffer.capacity() == self.pool.buffer_bytes {
                buffer.clear();
                state.idle.push(buffer);
            }
            std::mem::take(&mut state.waiting)
        };
        for waker in waiting {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_bounds_and_buffers_are_reused() {
        let pool = BufferPool::new(1024, 2500);
        let mut first = pool.try_take().unwrap();
        first.extend_from_slice(b"used");
        let at = first.as_ptr();
        let second = pool.try_take().unwrap();
        assert!(pool.try_take().is_none());
        drop(first);
        let again = pool.try_take().unwrap();
        assert!(again.is_empty());
        assert_eq!(again.as_ptr(), at);
        drop((second, again));
        assert_eq!((pool.in_use(), pool.held_bytes()), (0, 2048));
    }

    #[test]
    fn a_grown_buffer_is_not_kept() {
        let pool = BufferPool::new(16, 16);
        pool.try_take().unwrap().extend_from_slice(&[0; 64]);
        assert_eq!(pool.held_bytes(), 0);
        assert_eq!(pool.try_take().unwrap().capacity(), 16);
    }
}
