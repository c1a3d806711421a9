//! Frames of the hot path: a Get of 4 KiB and the Data that answers it.

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput};
use metanode_wire::{
    FrameLimits, FrameReader, encode,
    message::{Data, Get},
};

const BODY_BYTES: usize = 4096;
/// Frames that arrive in one datagram's worth of stream bytes, or more.
const FRAMES: usize = 16;

pub(crate) fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("framing");
    let get = Get { hash: [7; 32] };
    let data = Data { size_bytes: BODY_BYTES as u64 };

    let mut out = Vec::with_capacity(1024);
    group.bench_function("encode_get", |bencher| {
        bencher.iter(|| {
            out.clear();
            encode(&mut out, black_box(1), black_box(&get), 0);
            out.len()
        });
    });
    group.bench_function("encode_data_4k_head", |bencher| {
        bencher.iter(|| {
            out.clear();
            encode(&mut out, black_box(1), black_box(&data), BODY_BYTES);
            out.len()
        });
    });

    group.throughput(Throughput::Elements(FRAMES as u64));
    group.bench_function("read_16_gets", |bencher| {
        let mut stream = Vec::new();
        for request in 0..FRAMES {
            encode(&mut stream, request as u32, &get, 0);
        }
        let stream = Bytes::from(stream);
        bencher.iter_batched(reader, |reader| read::<Get>(reader, [stream.clone()]), BatchSize::SmallInput);
    });
    group.bench_function("read_16_data_4k_whole", |bencher| {
        let stream = Bytes::from(replies(&data));
        bencher.iter_batched(reader, |reader| read::<Data>(reader, [stream.clone()]), BatchSize::SmallInput);
    });
    // As QUIC delivers them: pieces of a datagram, in which heads and bodies begin and end anywhere.
    group.bench_function("read_16_data_4k_in_datagrams", |bencher| {
        let pieces: Vec<Bytes> = replies(&data).chunks(1162).map(Bytes::copy_from_slice).collect();
        bencher.iter_batched(reader, |reader| read::<Data>(reader, pieces.iter().cloned()), BatchSize::SmallInput);
    });
    group.finish();
}

fn replies(data: &Data) -> Vec<u8> {
    let body = crate::noise(BODY_BYTES);
    let mut stream = Vec::new();
    for request in 0..FRAMES {
        encode(&mut stream, request as u32, data, body.len());
        stream.extend_from_slice(&body);
    }
    stream
}

fn reader() -> FrameReader {
    FrameReader::new(FrameLimits::default())
}

/// Reads all frames and validates their messages, as a connection does.
fn read<M: metanode_wire::Message>(mut reader: FrameReader, pieces: impl IntoIterator<Item = Bytes>) -> usize {
    let mut frames = 0;
    for piece in pieces {
        reader.push(piece);
        while let Some(frame) = reader.next_frame().expect("the stream was encoded here") {
            black_box(frame.message::<M>().expect("the message was encoded here"));
            black_box(&frame.body);
            frames += 1;
        }
    }
    assert_eq!(frames, FRAMES);
    frames
}
