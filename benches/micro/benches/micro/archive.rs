//! Validated access to archives (rkyv with bytecheck): what the trust boundary costs a message.

use std::hint::black_box;

use bytes::Bytes;
use criterion::Criterion;
use metanode_types::limits::LIST_PAGE_MAX;
use metanode_wire::{
    Frame, FrameLimits, FrameReader, Message, encode,
    message::{BlobEntry, BlobPage, Get, Welcome},
};

pub(crate) fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("archive");
    let get = frame(&Get { hash: [7; 32] });
    group.bench_function("access_get_32", |bencher| bencher.iter(|| black_box(&get).message::<Get>().is_ok()));
    let welcome = frame(&Welcome {
        agent: "metanode-node/0.1.0 ".repeat(8),
        shards: 2,
        shard: 1,
        whole_bytes_max: 262_144,
        requests_max: 128,
        may_write: true,
    });
    group.bench_function("access_welcome_200", |bencher| {
        bencher.iter(|| black_box(&welcome).message::<Welcome>().is_ok());
    });
    let page = frame(&page());
    group.bench_function("access_blob_page_full", |bencher| {
        bencher.iter(|| black_box(&page).message::<BlobPage>().is_ok());
    });
    group.finish();
}

/// The longest page that a node sends.
fn page() -> BlobPage {
    let entry = |index: usize| BlobEntry {
        hash: [index as u8; 32],
        size_bytes: index as u64,
        kind: 0,
        held: true,
        references: 0,
    };
    BlobPage { entries: (0..LIST_PAGE_MAX).map(entry).collect(), more: true }
}

/// A message as a reader holds it, its head aligned.
fn frame<M: Message>(message: &M) -> Frame {
    let mut bytes = Vec::new();
    encode(&mut bytes, 1, message, 0);
    let mut reader = FrameReader::new(FrameLimits::default());
    reader.push(Bytes::from(bytes));
    reader.next_frame().expect("it was encoded here").expect("it is whole")
}
