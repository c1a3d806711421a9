//! `metanode_decoders::meta` under libFuzzer.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| metanode_decoders::meta(data));
