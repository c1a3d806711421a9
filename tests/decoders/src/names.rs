//! Texts and numbers that users write: tag names, hashes, keys, ranges, kinds.

use metanode_types::{
    BlobKind, ByteRange, DurabilityClass, Hash, NodeKey, ShardCount, ShardId, TagName,
    limits::{SHARDS_MAX, TAG_NAME_BYTES_MAX},
};
use metanode_wire::RefusalCode;

use crate::script::Script;

/// `range: offset u64, length u64 | size u64 | shards u16 | hash 32 | text`
pub fn names(data: &[u8]) {
    let mut script = Script::new(data);
    let range = ByteRange { offset: script.u64(), length: script.u64() };
    let size = script.u64();
    match range.clamp(size) {
        Some((start, end)) => {
            assert!(start == range.offset && start <= end && end <= size && end - start <= range.length);
            assert!(end == size || end - start == range.length, "no shorter than it must be");
        }
        None => assert!(range.offset > size),
    }
    let shards = script.u16();
    let hash = Hash(script.array());
    match ShardCount::new(shards) {
        Some(count) => assert!(ShardId::owner_of(&hash, count).index() < usize::from(shards)),
        None => assert!(shards == 0 || shards > SHARDS_MAX),
    }
    let number = shards.to_le_bytes()[0];
    assert!(BlobKind::from_u8(number).is_none_or(|kind| kind as u8 == number));
    assert!(DurabilityClass::from_u8(number).is_none_or(|class| class as u8 == number));
    assert!(RefusalCode::from_u16(shards).is_none_or(|code| code as u16 == shards));
    let text = &String::from_utf8_lossy(script.rest())[..];
    if let Ok(hash) = text.parse::<Hash>() {
        assert_eq!(hash.to_string(), text.to_ascii_lowercase());
    }
    if let Ok(key) = text.parse::<NodeKey>() {
        assert_eq!(key.to_string(), text.to_ascii_lowercase());
    }
    if let Ok(name) = text.parse::<TagName>() {
        assert_eq!(name.as_str(), text);
        assert!((1..=TAG_NAME_BYTES_MAX).contains(&text.len()) && !text.chars().any(char::is_control));
        assert!(text.parse::<Hash>().is_err(), "a name is never taken for a hash");
    }
}
