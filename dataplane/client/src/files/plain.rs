//! Files by `read` and `write`, on a blocking thread.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
};

use bytes::Bytes;
use metanode_types::limits::CHUNK_BYTES;
use tokio::sync::mpsc;

use super::{ChangedWhileRead, Version};

pub(super) fn read(mut file: File, version: Version, give: &mpsc::Sender<io::Result<Bytes>>) {
    let mut left = version.size_bytes;
    let result = loop {
        if left == 0 {
            break unchanged(&file, version);
        }
        let length = left.min(CHUNK_BYTES as u64);
        let mut chunk = Vec::with_capacity(length as usize);
        match (&mut file).take(length).read_to_end(&mut chunk) {
            Ok(n) if (n as u64) < length => break Err(ChangedWhileRead.into_io()),
            Ok(_) => {}
            Err(error) => break Err(error),
        }
        left -= length;
        if left == 0
            && let Err(error) = unchanged(&file, version)
        {
            break Err(error); // instead of the last chunk, so that nobody takes the file for complete
        }
        if give.blocking_send(Ok(chunk.into())).is_err() {
            return; // nobody wants it any more
        }
        if left == 0 {
            return;
        }
    };
    if let Err(error) = result {
        let _ = give.blocking_send(Err(error)); // nobody wants it any more
    }
}

pub(super) fn unchanged(file: &File, version: Version) -> io::Result<()> {
    if Version::of(&file.metadata()?) == version { Ok(()) } else { Err(ChangedWhileRead.into_io()) }
}

pub(super) fn write(
    mut file: File,
    offset: u64,
    mut full: mpsc::Receiver<Vec<u8>>,
    empty: &mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    if offset > 0 {
        file.seek(SeekFrom::Start(offset))?; // which pipes can't
    }
    while let Some(mut buffer) = full.blocking_recv() {
        file.write_all(&buffer)?;
        buffer.clear();
        let _ = empty.try_send(buffer); // there are enough already
    }
    sync(&file)
}

/// Pipes and devices have nothing to sync, and say so.
pub(super) fn sync(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        result => result,
    }
}
