//! The wake protocol of the mesh under loom: every order of the steps of a consumer that falls asleep and a producer that pushes.

#![allow(dead_code, reason = "the module is the product's; this test needs a part of it")]

#[path = "../src/mesh/park.rs"]
mod park;

mod sync {
    pub(crate) use loom::sync::{
        Mutex,
        atomic::{AtomicBool, Ordering, fence},
    };
}

use std::{
    sync::atomic::{AtomicU32 as Plain, Ordering::SeqCst},
    task::{Wake, Waker},
};

use loom::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};
use park::Park;

/// Counts its wakes; not part of what loom permutes.
#[derive(Default)]
struct Counting(Plain);

impl Wake for Counting {
    fn wake(self: std::sync::Arc<Self>) {
        self.0.fetch_add(1, SeqCst);
    }
}

/// A queue as far as the protocol sees it: a number that is published by release and read by acquire.
#[derive(Default)]
struct Side {
    queue: AtomicUsize,
    park: Park,
}

#[test]
fn whoever_falls_asleep_is_woken_by_a_push_that_its_last_look_missed() {
    loom::model(|| {
        let side = Arc::new(Side::default());
        let wakes = std::sync::Arc::new(Counting::default());
        let producer = {
            let side = side.clone();
            thread::spawn(move || {
                side.queue.store(1, Ordering::Release);
                side.park.unpark();
            })
        };
        let mut slept = false;
        if side.queue.load(Ordering::Acquire) == 0 {
            side.park.park(&Waker::from(wakes.clone()));
            if side.queue.load(Ordering::Acquire) == 0 {
                slept = true;
            } else {
                side.park.cancel();
            }
        }
        producer.join().unwrap();
        assert!(!slept || wakes.0.load(SeqCst) == 1, "it sleeps for ever");
    });
}

#[test]
fn of_two_producers_one_pays_for_the_wake() {
    loom::model(|| {
        let side = Arc::new(Side::default());
        let wakes = std::sync::Arc::new(Counting::default());
        side.park.park(&Waker::from(wakes.clone()));
        let producers: Vec<_> = (0..2)
            .map(|_| {
                let side = side.clone();
                thread::spawn(move || {
                    side.queue.fetch_add(1, Ordering::Release);
                    side.park.unpark();
                })
            })
            .collect();
        producers.into_iter().for_each(|producer| producer.join().unwrap());
        assert_eq!(wakes.0.load(SeqCst), 1);
    });
}
