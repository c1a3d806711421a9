//! Ranges of a large blob.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use metanode_client::{BytesSource, PutOptions, VecSink};
use metanode_e2e::{Home, Random, content, is_large, scenario};
use metanode_types::ByteRange;

/// How many ranges, each of up to [`RANGE_BYTES_MAX`].
const RANGES: usize = 1000;
const RANGE_BYTES_MAX: u64 = 1 << 20;

#[test]
fn random_ranges_equal_the_source() {
    let home = Home::new();
    scenario(async {
        let node = home.start(2);
        let client = home.client(&node, true).await;
        let bytes = content(5, if is_large() { 1 << 30 } else { (64 << 20) + 12_345 });
        let size = bytes.len() as u64;
        let hash =
            client.put_source(&mut BytesSource(bytes.clone()), Some(size), PutOptions::default()).await.unwrap().hash;
        let mut random = Random::new(6);
        for round in 0..RANGES {
            let offset = random.below(size);
            // Every tenth goes beyond the end, where it stops.
            let length = if round % 10 == 0 { RANGE_BYTES_MAX } else { 1 + random.below(RANGE_BYTES_MAX) };
            let mut sink = VecSink { bytes: Vec::new(), bytes_max: u64::MAX };
            client.get_range(hash, ByteRange { offset, length }, &mut sink).await.unwrap();
            let end = (offset + length).min(size);
            assert!(sink.bytes == bytes[offset as usize..end as usize], "{offset}..{end} of {size}");
        }
        client.close().await;
        node.stop();
    });
}
