//! The file system of the data folder.

use std::{
    fs::File,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::{FallocateFlags, OFlags, fallocate, statfs, statvfs};

use super::{Check, State};
use crate::output::bytes;

/// Less is too little for a segment of each shard and what deleting and compacting needs.
const FREE_MIN: u64 = 1 << 30;

/// What direct access must be aligned to, on any disk we know.
const BLOCK: usize = 4096;

/// The folder, or the nearest one above it that exists.
fn existing(data: &Path) -> PathBuf {
    let absolute = std::path::absolute(data).unwrap_or_else(|_| data.to_path_buf());
    let mut at = absolute.as_path();
    while !at.is_dir() {
        match at.parent() {
            Some(parent) => at = parent,
            None => break,
        }
    }
    at.to_path_buf()
}

pub(crate) fn free_bytes(data: &Path) -> Option<u64> {
    let stat = statvfs(existing(data)).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

pub(super) fn free(data: &Path) -> Check {
    let place = existing(data);
    match free_bytes(data) {
        Some(free) if free >= FREE_MIN => {
            Check::ok("disk space", format!("{} free at {}", bytes(free), place.display()))
        }
        Some(free) => Check::bad(
            "disk space",
            State::Degraded,
            format!("{} free at {}", bytes(free), place.display()),
            "puts are refused when it is full; reads and removals go on",
            "free some, or name another data folder with --data",
        ),
        None => {
            Check::bad("disk space", State::NotProbed, format!("{} can't be examined", place.display()), "unknown", "")
        }
    }
}

/// Tries what the store does to its files, on a file that is gone afterwards.
pub(super) fn features(data: &Path) -> Vec<Check> {
    let place = existing(data);
    let kind = statfs(&place).map_or("unknown".into(), |stat| kind_name(stat.f_type as u64));
    let path = place.join(format!(".metanode-doctor-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&path);
    let file = match file {
        Ok(file) => file,
        Err(error) => {
            let found = format!("nothing can be made in {}: {error}", place.display());
            let fix = "run it as the user that owns the folder, or name another with --data";
            return vec![Check::bad("data folder", State::NotProbed, found, "unknown", fix)];
        }
    };
    let allocated = fallocate(&file, FallocateFlags::empty(), 0, 1 << 20);
    let direct = try_direct(&path);
    let _ = std::fs::remove_file(&path); // its name says what it is
    let on = format!("on {kind} at {}", place.display());
    vec![
        match allocated {
            Ok(()) => Check::ok("fallocate", on.clone()),
            Err(error) => Check::bad(
                "fallocate",
                State::Degraded,
                format!("{on}: {error}"),
                "segments grow as they are written: slower syncs, and a full disk shows late",
                "keep the data folder on ext4 or XFS",
            ),
        },
        match direct {
            Ok(()) => Check::ok("direct access", on),
            Err(error) => Check::bad(
                "direct access",
                State::Degraded,
                format!("{on}: {error}"),
                "writes go through the page cache: less throughput, more memory",
                "keep the data folder on ext4 or XFS",
            ),
        },
    ]
}

/// Writes and reads one aligned block past the page cache.
fn try_direct(path: &Path) -> std::io::Result<()> {
    let flags = OFlags::DIRECT.bits() as i32;
    let file = File::options().read(true).write(true).custom_flags(flags).open(path)?;
    let mut memory = vec![7u8; 2 * BLOCK];
    let skip = memory.as_ptr().align_offset(BLOCK);
    let block = memory.get_mut(skip..skip + BLOCK).ok_or(std::io::ErrorKind::InvalidInput)?;
    file.write_all_at(block, 0)?;
    block.fill(0);
    file.read_exact_at(block, 0)?;
    if block.iter().all(|byte| *byte == 7) { Ok(()) } else { Err(std::io::ErrorKind::InvalidData.into()) }
}

/// By the magic numbers of statfs(2).
fn kind_name(number: u64) -> String {
    let name = match number {
        0xef53 => "ext4",
        0x5846_5342 => "XFS",
        0x9123_683e => "btrfs",
        0x0102_1994 => "tmpfs",
        0x794c_7630 => "overlayfs",
        0x2fc1_2fc1 => "ZFS",
        0x6969 => "NFS",
        0xf2f5_2010 => "F2FS",
        0x6573_5546 => "FUSE",
        other => return format!("a file system of type {other:#x}"),
    };
    name.into()
}
