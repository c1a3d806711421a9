//! The file `meta` of a store: what is read can be counted on by one, and is the same when it is written and read again.

/// The file's text.
pub fn meta(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Some(next) = metanode_store::decoders::meta(&text) else { return };
    assert_eq!(store(&text).to_ascii_lowercase(), store(&next), "the identity is all of its line");
    let Some(after) = metanode_store::decoders::meta(&next) else {
        return assert_eq!(boot(&next), u64::MAX, "openings are counted to the last number: {next}");
    };
    let lines =
        |text: &str| text.lines().filter(|line| !line.starts_with("boot ")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!((lines(&after), boot(&after)), (lines(&next), boot(&next) + 1));
}

fn store(text: &str) -> &str {
    text.lines().find_map(|line| line.strip_prefix("store ")).expect("it was taken")
}

fn boot(text: &str) -> u64 {
    let number = text.lines().find_map(|line| line.strip_prefix("boot ")).and_then(|number| number.parse().ok());
    number.expect("it was written here")
}
