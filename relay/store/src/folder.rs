//! Names of files in a store's folder.
//!
//! ```text
//! store/meta                    format, identity, segment size, number of openings
//! store/checkpoint-0003         index of partition 3
//! store/log-0003/0000000017.seg segment 17 of log 3
//! store/log-0003/spare          a zero-filled segment to be
//! store/log-0003/reserve        space for removals when the disk is full
//! ```

use std::path::{Path, PathBuf};

/// Folder of a log.
pub(crate) fn log_path(store: &Path, log: u16) -> PathBuf {
    store.join(format!("log-{log:04}"))
}

/// File of a segment.
pub(crate) fn segment_path(store: &Path, log: u16, segment: u32) -> PathBuf {
    log_path(store, log).join(format!("{segment:010}.seg"))
}

/// Checkpoint of a partition.
pub(crate) fn checkpoint_path(store: &Path, shard: u16) -> PathBuf {
    store.join(format!("checkpoint-{shard:04}"))
}

/// Whether a file's name is that of a checkpoint.
pub(crate) fn is_checkpoint(name: &str) -> bool {
    name.strip_prefix("checkpoint-")
        .is_some_and(|digits| digits.len() == 4 && digits.bytes().all(|b| b.is_ascii_digit()))
}

/// The number in a log folder's name.
pub(crate) fn parse_log(name: &str) -> Option<u16> {
    name.strip_prefix("log-").filter(|digits| digits.len() == 4 && !digits.starts_with('+'))?.parse().ok()
}

/// The number in a segment file's name. The last one is none: no segment could follow.
pub(crate) fn parse_segment(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".seg").filter(|digits| digits.len() == 10 && !digits.starts_with('+'))?;
    digits.parse().ok().filter(|number| *number < u32::MAX)
}

/// The zero-filled segment of a log.
pub(crate) fn spare_path(store: &Path, log: u16) -> PathBuf {
    log_path(store, log).join("spare")
}

/// A spare that is not filled yet.
pub(crate) fn filling_path(store: &Path, log: u16) -> PathBuf {
    log_path(store, log).join("spare.new")
}

/// The reserve of a log.
pub(crate) fn reserve_path(store: &Path, log: u16) -> PathBuf {
    log_path(store, log).join("reserve")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        let path = segment_path(Path::new("/s"), 3, 17);
        assert_eq!(path, Path::new("/s/log-0003/0000000017.seg"));
        assert_eq!(parse_log("log-0003"), Some(3));
        assert!(is_checkpoint("checkpoint-0003") && !is_checkpoint("checkpoint-0003.new"));
        assert_eq!(parse_segment("0000000017.seg"), Some(17));
        for other in
            ["spare", "reserve", "17.seg", "log-3", "000000001x.seg", "log-+003", "+000000017.seg", "4294967295.seg"]
        {
            assert_eq!((parse_log(other), parse_segment(other)), (None, None));
        }
    }
}
