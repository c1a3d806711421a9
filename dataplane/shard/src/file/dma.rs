use std::fmt;

/// What O_DIRECT asks of buffers, offsets and lengths on every device we know; also the unit in which logs are padded.
pub const ALIGNMENT: usize = 4096;

/// Memory aligned for O_DIRECT, filled from the front.
///
/// It is written as a whole, so its filled length must be a multiple of [`ALIGNMENT`] by then: [`pad`](Self::pad).
pub struct DmaBuffer {
    inner: glommio::io::DmaBuffer,
    filled: usize,
}

impl fmt::Debug for DmaBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaBuffer").field("len", &self.filled).field("capacity", &self.capacity()).finish()
    }
}

impl DmaBuffer {
    /// `len` zero bytes, to be changed through [`as_mut_slice`](Self::as_mut_slice).
    pub fn alloc(len: usize) -> Self {
        let mut buffer = Self::with_capacity(len);
        buffer.resize(len);
        buffer
    }

    /// An empty buffer with room for `capacity` bytes, rounded up to the alignment; none of them is touched yet.
    pub fn with_capacity(capacity: usize) -> Self {
        let capacity = capacity.max(1).next_multiple_of(ALIGNMENT);
        Self { inner: glommio::allocate_dma_buffer_global(capacity), filled: 0 }
    }

    /// Bytes that fit.
    pub fn capacity(&self) -> usize {
        self.inner.len()
    }

    /// Bytes filled so far.
    pub fn len(&self) -> usize {
        self.filled
    }

    /// Whether nothing is filled.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// The filled bytes.
    pub fn as_slice(&self) -> &[u8] {
        &self.inner.as_bytes()[..self.filled]
    }

    /// The filled bytes, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.inner.as_bytes_mut()[..self.filled]
    }

    /// Appends `bytes`.
    ///
    /// # Panics
    /// When they don't fit.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        let end = self.filled + bytes.len();
        self.inner.as_bytes_mut()[self.filled..end].copy_from_slice(bytes);
        self.filled = end;
    }

    /// Appends zeros up to `len`, or forgets what lies behind it.
    ///
    /// # Panics
    /// When `len` is above the capacity.
    pub fn resize(&mut self, len: usize) {
        if len > self.filled {
            self.inner.as_bytes_mut()[self.filled..len].fill(0);
        }
        self.filled = len;
    }

    /// Appends zeros up to the next multiple of [`ALIGNMENT`].
    pub fn pad(&mut self) {
        self.resize(self.filled.next_multiple_of(ALIGNMENT));
    }

    /// glommio's buffer with exactly the filled bytes.
    pub(super) fn into_inner(mut self) -> glommio::io::DmaBuffer {
        self.inner.trim_to_size(self.filled);
        self.inner
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_and_pads_with_zeros() {
        let mut buffer = DmaBuffer::with_capacity(5000);
        assert_eq!(buffer.capacity(), 8192);
        buffer.extend_from_slice(&[7; 4097]);
        buffer.pad();
        assert_eq!(buffer.len(), 8192);
        assert_eq!(buffer.as_slice().as_ptr().align_offset(ALIGNMENT), 0);
        assert!(buffer.as_slice()[4097..].iter().all(|&byte| byte == 0));
        assert!(DmaBuffer::alloc(10).as_mut_slice().iter().all(|&byte| byte == 0));
    }
}
