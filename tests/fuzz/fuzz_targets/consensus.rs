//! `metanode_decoders::consensus` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| metanode_decoders::consensus(data));
