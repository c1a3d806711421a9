//! The store's index: a table of hashes that grows in steps.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput};
use metanode_log::{Location, Table};
use metanode_types::Hash;

/// Entries of a table that is looked up: more than the processor's caches hold.
const ENTRIES: usize = 1 << 20;
/// Operations of one measurement.
const BATCH: usize = 1 << 10;

pub(crate) fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("index");
    group.throughput(Throughput::Elements(BATCH as u64));
    let hashes: Vec<Hash> = crate::noise((ENTRIES + BATCH) * 32)
        .chunks_exact(32)
        .map(|bytes| Hash(bytes.try_into().expect("32 bytes")))
        .collect();
    let (present, absent) = hashes.split_at(ENTRIES);
    let location = |index: usize| Location { log: 0, segment: 2, offset: index as u32, length: 4096 };
    let mut table = Table::default();
    for (index, hash) in present.iter().enumerate() {
        table.insert(*hash, location(index));
    }
    // Far apart, as requests are.
    let asked: Vec<Hash> = present.iter().step_by(ENTRIES / BATCH).copied().collect();
    group.bench_function("get_of_1m", |bencher| {
        bencher.iter(|| asked.iter().filter(|hash| black_box(&table).get(hash).is_some()).count());
    });
    group.bench_function("get_absent_of_1m", |bencher| {
        bencher.iter(|| absent.iter().filter(|hash| black_box(&table).get(hash).is_some()).count());
    });
    group.bench_function("insert_and_remove_of_1m", |bencher| {
        bencher.iter(|| {
            for (index, hash) in absent.iter().enumerate() {
                table.insert(*hash, location(index));
            }
            absent.iter().filter(|hash| table.remove(hash).is_some()).count()
        });
    });
    group.bench_function("insert_into_empty", |bencher| {
        let fill = |mut table: Table<Location>| {
            for (index, hash) in absent.iter().enumerate() {
                table.insert(*hash, location(index));
            }
            table
        };
        bencher.iter_batched(Table::default, fill, BatchSize::SmallInput);
    });
    group.finish();
}
