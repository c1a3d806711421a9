//! Open segment files of a shard, for reading.

use std::{cell::RefCell, collections::HashMap, io, path::PathBuf, rc::Rc};

use bytes::Bytes;
use metanode_log::Location;
use metanode_shard::file::{CachedFile, DirectFile, OpenMode};

use crate::folder::segment_path;

/// Files a shard keeps open for reading; two descriptors each. 1,000 segments of 64 MiB are 62 GiB of data at hand.
const OPEN_MAX: usize = 1000;

/// Payloads up to this size are read past the page cache: they are cached as blobs, and a page cache copy would be a second one.
const DIRECT_BYTES_MAX: u32 = 64 * 1024;

/// Reads payloads, whatever shard wrote them.
#[derive(Debug)]
pub(crate) struct Files {
    store: PathBuf,
    open: RefCell<HashMap<(u16, u32), Rc<Open>>>,
}

#[derive(Debug)]
struct Open {
    direct: DirectFile,
    cached: CachedFile,
}

impl Files {
    pub(crate) fn new(store: PathBuf) -> Self {
        Self { store, open: RefCell::default() }
    }

    /// The bytes at `location`; fewer only where the file ends.
    pub(crate) async fn read(&self, location: Location) -> io::Result<Bytes> {
        let file = self.file(location.log, location.segment).await?;
        let (offset, length) = (u64::from(location.offset), location.length as usize);
        if location.length <= DIRECT_BYTES_MAX {
            file.direct.read_at(offset, length).await
        } else {
            file.cached.read_at(offset, length).await
        }
    }

    /// The same past the page cache. A page that was read ahead of a direct write can be stale, so a copy that looks corrupt is looked
    /// at on the device before anybody believes it.
    pub(crate) async fn read_again(&self, location: Location) -> io::Result<Bytes> {
        let file = self.file(location.log, location.segment).await?;
        let (offset, length) = (u64::from(location.offset), location.length as usize);
        file.cached.advise_dontneed(offset, location.length.into())?;
        file.direct.read_at(offset, length).await
    }

    /// Bytes of a segment for a scan.
    pub(crate) async fn read_raw(&self, log: u16, segment: u32, offset: u32, length: u32) -> io::Result<Bytes> {
        self.file(log, segment).await?.cached.read_at(offset.into(), length as usize).await
    }

    /// Closes a file that is to be deleted: its space returns when nobody has it open.
    pub(crate) fn forget(&self, log: u16, segment: u32) {
        self.open.borrow_mut().remove(&(log, segment));
    }

    async fn file(&self, log: u16, segment: u32) -> io::Result<Rc<Open>> {
        if let Some(file) = self.open.borrow().get(&(log, segment)) {
            return Ok(file.clone());
        }
        let path = segment_path(&self.store, log, segment);
        let direct = DirectFile::open(&path, OpenMode::Read).await?;
        let file = Rc::new(Open { direct, cached: CachedFile::open(&path).await? });
        let mut open = self.open.borrow_mut();
        if open.len() >= OPEN_MAX
            && let Some(oldest) = open.keys().min_by_key(|(_, segment)| *segment).copied()
        {
            open.remove(&oldest);
        }
        open.insert((log, segment), file.clone());
        Ok(file)
    }
}
