//! A sign state on a disk that loses what was not synced, at every step of what it does.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{cell::RefCell, path::Path, rc::Rc};

use metanode_crypto::Identity;
use metanode_shard::{
    sim::{DiskFaults, End, PowerCut, Random, World},
    yield_now,
};
use metanode_wal::{FILE_BYTES_MIN, SignState, Wal, WalError, open};

const FOLDER: &str = "/consensus";

type Records = Vec<Vec<u8>>;

/// What must be there, and what may be there besides: the call that was under way.
#[derive(Default, Clone)]
struct Known {
    kept: Records,
    under_way: Option<Records>,
}

fn record(random: &mut Random) -> Vec<u8> {
    let mut record = vec![0; random.below(3000) as usize];
    random.fill(&mut record);
    record
}

/// One opening: checks what is there, then writes until it is cut off or has had enough.
async fn life(known: Rc<RefCell<Known>>, mut random: Random, calls: u64) -> Result<(), WalError> {
    let state = SignState::acquire(Path::new(FOLDER), [7; 32], Identity::from_seed(&[1; 32]))?;
    let (opening, opened) = open(state, FILE_BYTES_MIN)?;
    {
        let mut known = known.borrow_mut();
        let Known { kept, under_way } = known.clone();
        assert!(
            opened.records == kept || Some(&opened.records) == under_way.as_ref(),
            "{:?}: {} records, {} acknowledged, {:?} with what was under way",
            (opened.is_new, opened.torn),
            opened.records.len(),
            kept.len(),
            under_way.map(|records| records.len())
        );
        *known = Known { kept: opened.records, under_way: None };
    }
    let wal = Wal::start(opening)?;
    for _ in 0..calls {
        let more: Records = (0..1 + random.below(3)).map(|_| record(&mut random)).collect();
        let bytes: u64 = more.iter().map(|record| record.len() as u64 + 4).sum();
        if wal.room_bytes() < bytes || random.once_in(12) {
            known.borrow_mut().under_way = Some(more.clone());
            wal.restart(more.clone()).await?;
            *known.borrow_mut() = Known { kept: more, under_way: None };
        } else {
            let all = [known.borrow().kept.clone(), more.clone()].concat();
            known.borrow_mut().under_way = Some(all.clone());
            wal.append(&more).await?;
            *known.borrow_mut() = Known { kept: all, under_way: None };
        }
    }
    Ok(())
}

/// Clauses 21 and 22: what was acknowledged is there after any cut, what was not is there as a whole or not at all, and nothing that a
/// crash leaves is taken for damage.
#[test]
fn every_cut_leaves_what_was_acknowledged() {
    let cuts = [PowerCut::LoseAll, PowerCut::Blocks, PowerCut::Sectors, PowerCut::ProcessOnly];
    let mut cut_off = 0;
    for seed in 0..300 {
        let world = World::new(seed, DiskFaults::default());
        let known = Rc::new(RefCell::new(Known::default()));
        let mut random = Random::new(seed ^ 0x77_61_6c);
        for number in 0..12 {
            // The first steps of all are cut through one by one.
            let fails_at = if number == 0 { 1 + seed } else { 1 + random.below(60) };
            world.fail_power_at(Some(fails_at));
            let (inside, numbers) = (known.clone(), Random::new(random.next()));
            let calls = random.below(40);
            let end = world.run(move || async move {
                let result = life(inside, numbers, calls).await;
                yield_now().await; // when the power has failed meanwhile, this is the end
                result
            });
            match end {
                End::PowerFailed => cut_off += 1,
                End::Done(Ok(())) => {}
                End::Done(Err(error)) => panic!("seed {seed}, life {number}: {error}"),
                other => panic!("seed {seed}, life {number}: {other:?}"),
            }
            let cut = cuts[random.below(4) as usize];
            world.power_cut(cut);
        }
    }
    assert!(cut_off > 1000, "{cut_off} lives were cut off");
}

/// A failed sync is the end: whether the disk has it is not known, and nothing is signed on top of it.
#[test]
fn after_a_failed_sync_nothing_more_is_taken() {
    for seed in 0..40 {
        let world = World::new(seed, DiskFaults::default());
        let known = Rc::new(RefCell::new(Known::default()));
        let (inside, numbers) = (known.clone(), Random::new(seed));
        let end = world.run(move || life(inside, numbers, 3));
        assert!(matches!(end, End::Done(Ok(()))));
        world.power_cut(PowerCut::ProcessOnly);
        world.set_faults(DiskFaults { sync_error_once_in: 3, ..DiskFaults::default() });
        let end = world.run(move || async move {
            let state = SignState::acquire(Path::new(FOLDER), [7; 32], Identity::from_seed(&[1; 32]))?;
            let wal = Wal::start(open(state, FILE_BYTES_MIN)?.0)?;
            let error = loop {
                match wal.append(&[vec![1; 100]]).await {
                    Ok(()) => {}
                    Err(WalError::Full { .. }) => match wal.restart(Vec::new()).await {
                        Ok(()) => {}
                        Err(error) => break error,
                    },
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, WalError::Io { .. }), "{error}");
            assert!(matches!(wal.append(&[vec![2]]).await, Err(WalError::Failed)));
            assert!(matches!(wal.restart(vec![vec![2]]).await, Err(WalError::Failed)));
            Ok::<_, WalError>(())
        });
        assert!(matches!(end, End::Done(Ok(()))), "{end:?}");
    }
}
