use std::{
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::Poll,
};

use bytes::Bytes;
use metanode_types::Hash;

/// Larger inputs gain nothing.
const BATCHED_BYTES_MAX: usize = 16 * 1024;

/// Inputs of one batch: what the widest vector units take twice over. Of 4 KiB, their hashes take 13 µs, of 16 KiB 50, during which
/// others wait.
const BATCH_MAX: usize = 32;

/// Hashes together what tasks of one executor ask for in one turn.
///
/// A task puts its bytes into the open batch and lets the other tasks that can run have their turn; whichever is resumed first
/// computes all hashes of the batch with [`hash_all`](crate::hash_all), which costs a third of computing them one by one.
#[derive(Debug, Default)]
pub struct HashBatcher {
    open: Mutex<Arc<Mutex<Batch>>>,
}

#[derive(Debug, Default)]
struct Batch {
    inputs: Vec<Bytes>,
    /// As many as there were inputs, once they are computed.
    hashes: Vec<Hash>,
}

/// A panic under one of these locks is a mistake of ours; what they guard stays consistent between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HashBatcher {
    /// The BLAKE3 hash of `bytes`. Of larger inputs it is computed at once, as that is as fast.
    pub async fn hash(&self, bytes: &Bytes) -> Hash {
        if bytes.len() > BATCHED_BYTES_MAX {
            return crate::hash(bytes);
        }
        let (batch, index) = self.join(bytes.clone());
        let mut yielded = false;
        poll_fn(|cx| {
            if yielded {
                return Poll::Ready(());
            }
            yielded = true;
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
        self.hash_of(&batch, index)
    }

    fn join(&self, bytes: Bytes) -> (Arc<Mutex<Batch>>, usize) {
        let mut open = lock(&self.open);
        let batch = open.clone();
        let mut this = lock(&batch);
        let index = this.inputs.len();
        this.inputs.push(bytes);
        drop(this);
        if index + 1 == BATCH_MAX {
            *open = Arc::default();
        }
        (batch, index)
    }

    fn hash_of(&self, batch: &Arc<Mutex<Batch>>, index: usize) -> Hash {
        if let Some(hash) = lock(batch).hashes.get(index) {
            return *hash;
        }
        {
            // Nobody joins a batch that is not open; the order of the two locks is that of `join`.
            let mut open = lock(&self.open);
            if Arc::ptr_eq(&open, batch) {
                *open = Arc::default();
            }
        }
        let mut this = lock(batch);
        if this.hashes.is_empty() {
            let inputs: Vec<&[u8]> = this.inputs.iter().map(|input| &input[..]).collect();
            this.hashes = crate::hash_all(&inputs);
            this.inputs = Vec::new();
        }
        this.hashes[index]
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::Future,
        pin::{Pin, pin},
        task::{Context, Waker},
    };

    use super::*;

    #[test]
    fn tasks_of_one_turn_share_a_batch_and_each_gets_its_own_hash() {
        let batcher = HashBatcher::default();
        let inputs: Vec<Bytes> = (0..100u8).map(|i| Bytes::from(vec![i; 1024 << (i % 6)])).collect();
        let mut tasks: Vec<Pin<Box<_>>> = inputs.iter().map(|input| Box::pin(batcher.hash(input))).collect();
        let mut cx = Context::from_waker(Waker::noop());
        let mut hashes = vec![None; inputs.len()];
        for turn in 0..2 {
            // The other way round the second time, and some have gone by then.
            for (i, task) in tasks.iter_mut().enumerate().filter(|(i, _)| turn == 0 || i % 7 != 3).rev() {
                if hashes[i].is_none()
                    && let Poll::Ready(hash) = task.as_mut().poll(&mut cx)
                {
                    hashes[i] = Some(hash);
                }
            }
        }
        for (i, input) in inputs.iter().enumerate() {
            let gone = i % 7 == 3 && input.len() <= BATCHED_BYTES_MAX;
            assert_eq!(hashes[i], (!gone).then(|| crate::hash(input)), "{i}");
        }
        let again = pin!(batcher.hash(&inputs[0]));
        assert!(again.poll(&mut cx).is_pending(), "a new batch");
    }
}
