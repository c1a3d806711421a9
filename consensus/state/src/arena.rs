//! Slots by number, in pieces that never move: growing costs no copy of what is there.

/// Slots of one piece.
const PIECE: usize = 1 << 14;

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Arena<T> {
    pieces: Vec<Vec<T>>,
    free: Vec<u32>,
}

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Self { pieces: Vec::new(), free: Vec::new() }
    }
}

impl<T> Arena<T> {
    pub(crate) fn get(&self, slot: u32) -> &T {
        &self.pieces[slot as usize / PIECE][slot as usize % PIECE]
    }

    pub(crate) fn put(&mut self, value: T) -> u32 {
        if let Some(slot) = self.free.pop() {
            self.pieces[slot as usize / PIECE][slot as usize % PIECE] = value;
            return slot;
        }
        if self.pieces.last().is_none_or(|piece| piece.len() == PIECE) {
            self.pieces.push(Vec::with_capacity(PIECE));
        }
        let pieces = self.pieces.len();
        let piece = self.pieces.last_mut().expect("one was made if there was none");
        piece.push(value);
        ((pieces - 1) * PIECE + piece.len() - 1) as u32
    }

    /// Its value stays until the slot is used again.
    pub(crate) fn release(&mut self, slot: u32) {
        self.free.push(slot);
    }

    /// Slots in use.
    pub(crate) fn used(&self) -> usize {
        self.pieces.iter().map(Vec::len).sum::<usize>() - self.free.len()
    }
}
