//! BLAKE3 of an object, a chunk and a mebibyte, and of many objects side by side.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};

pub(crate) fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("blake3");
    for (name, length) in [("4k", 4 << 10), ("256k", 256 << 10), ("1m", 1 << 20)] {
        let bytes = crate::noise(length);
        group.throughput(Throughput::Bytes(length as u64));
        group.bench_with_input(BenchmarkId::from_parameter(name), &bytes, |bencher, bytes| {
            bencher.iter(|| metanode_crypto::hash(black_box(bytes)));
        });
    }
    for count in [1, 8, 16, 32] {
        let bytes = crate::noise(count * 4096);
        let inputs: Vec<&[u8]> = bytes.chunks_exact(4096).collect();
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_with_input(BenchmarkId::new("4k_together", count), &inputs, |bencher, inputs| {
            bencher.iter(|| metanode_crypto::hash_all(black_box(inputs)));
        });
    }
    group.finish();
}
