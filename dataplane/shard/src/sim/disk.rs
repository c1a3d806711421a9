//! A disk with a file system, in memory, that does what the real ones are allowed to do.
//!
//! * A write is durable when its file was synced after it; before that, a power cut leaves each of its blocks as it was, as it was
//!   to be, or torn between sectors, whatever became of blocks that were written earlier.
//! * A name is durable when its folder was synced; before that, changes of one folder's names survive in order or not at all, and
//!   those of different folders independently of each other.
//! * After a sync that failed, what it was to make durable may be lost although reads still see it, and a later sync that succeeds
//!   says nothing about it.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    rc::Rc,
    time::Duration,
};

use bytes::Bytes;

use super::{Random, Sleep, current};

const BLOCK_BYTES: usize = 4096;

/// What a device writes whole or not at all.
const SECTOR_BYTES: usize = 512;

/// What a disk does wrong.
#[derive(Debug, Clone, Copy, Default)]
pub struct DiskFaults {
    /// Bytes of the disk; 0 is more than anybody needs.
    pub capacity_bytes: u64,
    /// A sync fails (EIO) once in so many; 0 is never.
    pub sync_error_once_in: u64,
    /// A write fails (EIO) once in so many; 0 is never.
    pub write_error_once_in: u64,
    /// An operation takes up to 2,000 times as long once in so many; 0 is never.
    pub slow_once_in: u64,
}

impl DiskFaults {
    /// Whether writes may fail, so that what waits for one is refused.
    pub fn loses_writes(&self) -> bool {
        self.capacity_bytes > 0 || self.sync_error_once_in > 0 || self.write_error_once_in > 0
    }
}

/// What is left of what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerCut {
    /// All of it: only the process died.
    ProcessOnly,
    /// Nothing.
    LoseAll,
    /// Each block whole or not.
    Blocks,
    /// Each block whole, not, or torn between its sectors.
    Sectors,
}

type Block = Rc<[u8; BLOCK_BYTES]>;

/// Contents: blocks that are not there are zeros.
#[derive(Debug, Clone, Default)]
struct Contents {
    blocks: BTreeMap<u64, Block>,
    bytes: u64,
}

#[derive(Debug, Default)]
struct Inode {
    /// What reads see.
    seen: Contents,
    /// What a power cut can't take.
    durable: Contents,
    /// Blocks written since, in order; a block may come up more than once.
    unsynced: Vec<(u64, Option<Block>)>,
    /// The same, behind a sync that failed.
    doomed: Vec<(u64, Option<Block>)>,
    names: u32,
    open: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    File(u64),
    Folder,
}

/// A change of a folder's names, of which a power cut leaves all or nothing.
#[derive(Debug, Clone)]
struct Change {
    folder: PathBuf,
    /// Names, and what they mean from then on.
    names: Vec<(PathBuf, Option<Entry>)>,
}

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// It must be there.
    Existing,
    /// It must not.
    New,
    /// Either.
    Either,
    /// Either; it is empty afterwards.
    Empty,
}

#[derive(Debug)]
pub(super) struct Disk {
    pub(super) faults: DiskFaults,
    inodes: BTreeMap<u64, Inode>,
    next: u64,
    names: BTreeMap<PathBuf, Entry>,
    durable_names: BTreeMap<PathBuf, Entry>,
    changes_of_names: Vec<Change>,
    changes: u64,
    fail_at: Option<u64>,
    failed: bool,
    /// Handles of an earlier run mean nothing.
    life: u64,
}

fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

impl Disk {
    pub(super) fn new(faults: DiskFaults) -> Self {
        let root = BTreeMap::from([(PathBuf::from("/"), Entry::Folder)]);
        Self {
            faults,
            inodes: BTreeMap::new(),
            next: 1,
            names: root.clone(),
            durable_names: root,
            changes_of_names: Vec::new(),
            changes: 0,
            fail_at: None,
            failed: false,
            life: 0,
        }
    }

    pub(super) fn fail_at(&mut self, count: Option<u64>) {
        self.fail_at = count.map(|count| self.changes + count);
    }

    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Nothing takes effect from now on.
    pub(super) fn stop(&mut self) {
        self.failed = true;
    }

    pub(super) fn used_bytes(&self) -> u64 {
        self.inodes.values().map(|inode| inode.seen.bytes.next_multiple_of(BLOCK_BYTES as u64)).sum()
    }

    /// Before anything else of an operation that changes the disk.
    fn change(&mut self) -> io::Result<()> {
        self.alive()?;
        self.changes += 1;
        if self.fail_at == Some(self.changes) {
            self.failed = true;
            return Err(errno(libc::EIO));
        }
        Ok(())
    }

    fn alive(&self) -> io::Result<()> {
        if self.failed { Err(errno(libc::EIO)) } else { Ok(()) }
    }

    fn room(&self, more: u64) -> io::Result<()> {
        let capacity = self.faults.capacity_bytes;
        if capacity > 0 && more > 0 && self.used_bytes() + more > capacity { Err(errno(libc::ENOSPC)) } else { Ok(()) }
    }

    fn inode(&mut self, number: u64) -> io::Result<&mut Inode> {
        self.inodes.get_mut(&number).ok_or_else(|| errno(libc::EBADF))
    }

    fn file(&self, path: &Path) -> io::Result<u64> {
        match self.names.get(path) {
            Some(Entry::File(number)) => Ok(*number),
            Some(Entry::Folder) => Err(errno(libc::EISDIR)),
            None => Err(errno(libc::ENOENT)),
        }
    }

    fn set_name(&mut self, path: &Path, entry: Option<Entry>) -> io::Result<()> {
        let folder = path.parent().ok_or_else(|| errno(libc::EINVAL))?.to_owned();
        if self.names.get(&folder) != Some(&Entry::Folder) {
            return Err(errno(libc::ENOENT));
        }
        let before = match entry {
            Some(entry) => self.names.insert(path.to_owned(), entry),
            None => self.names.remove(path),
        };
        if let Some(Entry::File(number)) = entry {
            self.inode(number)?.names += 1;
        }
        if let Some(Entry::File(number)) = before {
            self.inode(number)?.names -= 1;
            self.forget(number);
        }
        self.changes_of_names.push(Change { folder, names: vec![(path.to_owned(), entry)] });
        Ok(())
    }

    fn named_later(&self, number: u64) -> bool {
        let mut names = self.changes_of_names.iter().flat_map(|change| &change.names);
        names.any(|(_, entry)| *entry == Some(Entry::File(number)))
    }

    /// Frees a file without name and user. One that a power cut may bring back only keeps no space: it is freed as the name's
    /// removal becomes durable at the latest.
    fn forget(&mut self, number: u64) {
        let Some(inode) = self.inodes.get(&number) else { return };
        let named =
            || self.durable_names.values().any(|entry| *entry == Entry::File(number)) || self.named_later(number);
        if inode.names == 0 && inode.open == 0 && !named() {
            self.inodes.remove(&number);
        }
    }

    pub(super) fn settle(&mut self, cut: PowerCut, random: &mut Random) {
        if cut == PowerCut::ProcessOnly {
            self.durable_names = self.names.clone();
        } else {
            self.settle_names(cut, random);
        }
        self.changes_of_names.clear();
        self.names = self.durable_names.clone();
        let mut named: BTreeMap<u64, u32> = BTreeMap::new();
        for entry in self.names.values() {
            if let Entry::File(number) = entry {
                *named.entry(*number).or_default() += 1;
            }
        }
        self.inodes.retain(|number, _| named.contains_key(number));
        for (number, inode) in &mut self.inodes {
            inode.settle(cut, random);
            inode.names = named[number];
        }
        self.failed = false;
        self.fail_at = None;
        self.life += 1;
    }

    fn settle_names(&mut self, cut: PowerCut, random: &mut Random) {
        // How many changes of each folder survive.
        let mut survive: BTreeMap<PathBuf, u64> = BTreeMap::new();
        for change in &self.changes_of_names {
            *survive.entry(change.folder.clone()).or_default() += 1;
        }
        for count in survive.values_mut() {
            *count = if cut == PowerCut::LoseAll { 0 } else { random.below(*count + 1) };
        }
        for change in std::mem::take(&mut self.changes_of_names) {
            let left = survive.get_mut(&change.folder).expect("counted above");
            if *left > 0 {
                *left -= 1;
                self.keep(change);
            }
        }
        // What lies in a folder that was lost is lost.
        let lost = |path: &Path, names: &BTreeMap<PathBuf, Entry>| {
            path.ancestors().skip(1).any(|folder| names.get(folder) != Some(&Entry::Folder))
        };
        let names = self.durable_names.clone();
        self.durable_names.retain(|path, _| path.parent().is_none() || !lost(path, &names));
    }

    /// Makes a change durable. Returns what its names meant before.
    fn keep(&mut self, change: Change) -> Vec<Entry> {
        let names = change.names.into_iter();
        names
            .filter_map(|(path, entry)| match entry {
                Some(entry) => self.durable_names.insert(path, entry),
                None => self.durable_names.remove(&path),
            })
            .collect()
    }

    pub(super) fn rot(&mut self, suffix: &str, count: usize, random: &mut Random) -> usize {
        let mut places = Vec::new();
        for (path, entry) in &self.names {
            if let Entry::File(number) = entry
                && path.to_string_lossy().ends_with(suffix)
            {
                places.extend(self.inodes[number].durable.blocks.keys().map(|block| (*number, *block)));
            }
        }
        let mut hit = 0;
        for _ in 0..count.min(places.len()) {
            let (number, block) = places.swap_remove(random.below(places.len() as u64) as usize);
            let inode = self.inodes.get_mut(&number).expect("named above");
            let mut bytes = *inode.durable.blocks[&block];
            for _ in 0..=random.below(8) {
                bytes[random.below(BLOCK_BYTES as u64) as usize] ^= 1 << random.below(8);
            }
            let bytes = Rc::new(bytes);
            inode.durable.blocks.insert(block, bytes.clone());
            inode.seen.blocks.insert(block, bytes);
            hit += 1;
        }
        hit
    }
}

impl Contents {
    fn set(&mut self, block: u64, bytes: Option<Block>) {
        match bytes {
            Some(bytes) => self.blocks.insert(block, bytes),
            None => self.blocks.remove(&block),
        };
    }

    fn cut(&mut self, bytes: u64) {
        self.bytes = bytes;
        self.blocks.split_off(&bytes.div_ceil(BLOCK_BYTES as u64));
        let inside = (bytes % BLOCK_BYTES as u64) as usize;
        if let Some(block) = self.blocks.get_mut(&(bytes / BLOCK_BYTES as u64)).filter(|_| inside > 0) {
            Rc::make_mut(block)[inside..].fill(0);
        }
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> usize {
        let length = buffer.len().min(usize::try_from(self.bytes.saturating_sub(offset)).unwrap_or(usize::MAX));
        let mut done = 0;
        while done < length {
            let at = offset + done as u64;
            let inside = (at % BLOCK_BYTES as u64) as usize;
            let piece = (BLOCK_BYTES - inside).min(length - done);
            let out = &mut buffer[done..done + piece];
            match self.blocks.get(&(at / BLOCK_BYTES as u64)) {
                Some(block) => out.copy_from_slice(&block[inside..inside + piece]),
                None => out.fill(0),
            }
            done += piece;
        }
        length
    }
}

impl Inode {
    fn write(&mut self, bytes: &[u8], offset: u64) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let (number, inside) = (at / BLOCK_BYTES as u64, (at % BLOCK_BYTES as u64) as usize);
            let piece = &bytes[done..bytes.len().min(done + BLOCK_BYTES - inside)];
            let mut block = self.seen.blocks.get(&number).map_or([0; BLOCK_BYTES], |block| **block);
            block[inside..inside + piece.len()].copy_from_slice(piece);
            let block = if block == [0; BLOCK_BYTES] { None } else { Some(Rc::new(block)) };
            self.seen.set(number, block.clone());
            self.unsynced.push((number, block));
            done += piece.len();
        }
        self.seen.bytes = self.seen.bytes.max(offset + bytes.len() as u64);
    }

    fn sync(&mut self) {
        for (number, block) in self.unsynced.drain(..) {
            self.doomed.retain(|(doomed, _)| *doomed != number);
            self.durable.set(number, block);
        }
        self.durable.bytes = self.seen.bytes;
        self.durable.blocks.split_off(&self.durable.bytes.div_ceil(BLOCK_BYTES as u64));
    }

    fn settle(&mut self, cut: PowerCut, random: &mut Random) {
        self.open = 0;
        let written = self.doomed.drain(..).chain(self.unsynced.drain(..));
        if cut == PowerCut::ProcessOnly {
            written.for_each(|(number, block)| self.durable.set(number, block));
            self.durable = self.seen.clone();
            return;
        }
        for (number, block) in written {
            match (cut, random.below(3)) {
                (PowerCut::LoseAll, _) | (_, 0) => {}
                (PowerCut::Sectors, 1) => {
                    let mut torn = self.durable.blocks.get(&number).map_or([0; BLOCK_BYTES], |block| **block);
                    let new = block.as_ref().map_or([0; BLOCK_BYTES], |block| **block);
                    // A prefix, as a device in the middle of a write leaves it, or any of its sectors.
                    let prefix = random.below((BLOCK_BYTES / SECTOR_BYTES) as u64) as usize;
                    let in_order = random.once_in(2);
                    for sector in 0..BLOCK_BYTES / SECTOR_BYTES {
                        let written = if in_order { sector < prefix } else { random.once_in(2) };
                        let place = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
                        if written {
                            torn[place.clone()].copy_from_slice(&new[place]);
                        }
                    }
                    self.durable.set(number, Some(Rc::new(torn)));
                }
                _ => self.durable.set(number, block),
            }
        }
        if self.seen.bytes != self.durable.bytes && cut != PowerCut::LoseAll && random.once_in(2) {
            self.durable.cut(self.seen.bytes);
        }
        // Blocks behind the end that came to nothing.
        let bytes = self.durable.bytes;
        self.durable.cut(bytes);
        self.seen = self.durable.clone();
    }
}

/// An open file. Plain numbers, so that jobs can carry it; it means something only in the run that opened it.
#[derive(Debug)]
pub(crate) struct Handle {
    inode: u64,
    life: u64,
}

impl Drop for Handle {
    fn drop(&mut self) {
        let Some(world) = current() else { return };
        let disk = &mut *world.disk.borrow_mut();
        if disk.life == self.life
            && let Some(inode) = disk.inodes.get_mut(&self.inode)
        {
            inode.open -= 1;
            disk.forget(self.inode);
        }
    }
}

/// What a thread of the world does with files: answers of the system calls of those names.
impl super::Inner {
    fn with<R>(&self, handle: &Handle, act: impl FnOnce(&mut Disk, &mut Random) -> io::Result<R>) -> io::Result<R> {
        let disk = &mut *self.disk.borrow_mut();
        if disk.life != handle.life {
            return Err(errno(libc::EBADF));
        }
        disk.alive()?;
        act(disk, &mut self.random.borrow_mut())
    }

    pub(crate) fn open(&self, path: &Path, mode: Mode) -> io::Result<Handle> {
        let disk = &mut *self.disk.borrow_mut();
        disk.alive()?;
        let found = match (disk.file(path), mode) {
            (Ok(_), Mode::New) => return Err(errno(libc::EEXIST)),
            (Err(error), Mode::New | Mode::Either | Mode::Empty) if error.raw_os_error() == Some(libc::ENOENT) => None,
            (found, _) => Some(found?),
        };
        let number = match found {
            Some(number) => number,
            None => {
                disk.change()?;
                disk.room(1)?;
                let number = disk.next;
                disk.next += 1;
                disk.inodes.insert(number, Inode::default());
                if let Err(error) = disk.set_name(path, Some(Entry::File(number))) {
                    disk.inodes.remove(&number);
                    return Err(error);
                }
                self.note(("create", path, number));
                number
            }
        };
        if mode == Mode::Empty && found.is_some() {
            disk.change()?;
            let inode = disk.inode(number)?;
            inode.seen.cut(0);
            inode.doomed.clear();
        }
        disk.inode(number)?.open += 1;
        Ok(Handle { inode: number, life: disk.life })
    }

    pub(crate) fn read_at(&self, handle: &Handle, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let read = self.with(handle, |disk, _| Ok(disk.inode(handle.inode)?.seen.read(buffer, offset)))?;
        self.note(("read", handle.inode, offset, read));
        Ok(read)
    }

    /// A read that takes its time.
    pub(crate) async fn read(&self, handle: &Handle, offset: u64, len: usize) -> io::Result<Bytes> {
        Sleep::after(Duration::from_nanos(self.pause())).await;
        let mut buffer = vec![0; len];
        let read = self.read_at(handle, &mut buffer, offset)?;
        buffer.truncate(read);
        Ok(buffer.into())
    }

    pub(crate) fn write_at(&self, handle: &Handle, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.note(("write", handle.inode, offset, bytes.len()));
        self.with(handle, |disk, random| {
            let changed = disk.change();
            if changed.is_err() {
                // The power failed in the middle of it: what `settle` makes of a write that was not synced.
                disk.inode(handle.inode)?.write(bytes, offset);
            }
            changed?;
            if random.once_in(disk.faults.write_error_once_in) {
                return Err(errno(libc::EIO));
            }
            let end = offset + bytes.len() as u64;
            let more = end.saturating_sub(disk.inode(handle.inode)?.seen.bytes);
            disk.room(more)?;
            disk.inode(handle.inode)?.write(bytes, offset);
            Ok(())
        })
    }

    /// `fdatasync` and `fsync`: sizes are durable with both.
    pub(crate) fn sync(&self, handle: &Handle) -> io::Result<()> {
        self.note(("sync", handle.inode));
        self.with(handle, |disk, random| {
            disk.change()?;
            let fails = random.once_in(disk.faults.sync_error_once_in);
            let inode = disk.inode(handle.inode)?;
            if fails {
                tracing::trace!(inode = handle.inode, "the sync fails");
                inode.doomed.append(&mut inode.unsynced);
                return Err(errno(libc::EIO));
            }
            inode.sync();
            Ok(())
        })
    }

    pub(crate) fn length(&self, handle: &Handle) -> io::Result<u64> {
        self.with(handle, |disk, _| Ok(disk.inode(handle.inode)?.seen.bytes))
    }

    pub(crate) fn set_length(&self, handle: &Handle, bytes: u64) -> io::Result<()> {
        self.note(("length", handle.inode, bytes));
        self.with(handle, |disk, _| {
            disk.change()?;
            let more = bytes.saturating_sub(disk.inode(handle.inode)?.seen.bytes);
            disk.room(more)?;
            let inode = disk.inode(handle.inode)?;
            inode.seen.cut(bytes);
            inode.doomed.retain(|(block, _)| block * (BLOCK_BYTES as u64) < bytes);
            Ok(())
        })
    }

    /// `fallocate`: the file has at least so many bytes.
    pub(crate) fn allocate(&self, handle: &Handle, bytes: u64) -> io::Result<()> {
        if self.length(handle)? < bytes { self.set_length(handle, bytes) } else { Ok(()) }
    }

    pub(crate) fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let disk = &mut *self.disk.borrow_mut();
        disk.alive()?;
        let number = disk.file(from)?;
        disk.change()?;
        self.note(("rename", from, to));
        if from.parent() != to.parent() {
            return Err(errno(libc::EXDEV)); // nobody here moves files between folders
        }
        disk.set_name(to, Some(Entry::File(number)))?;
        disk.set_name(from, None)?;
        let last = disk.changes_of_names.pop().expect("set above");
        disk.changes_of_names.last_mut().expect("set above").names.extend(last.names);
        Ok(())
    }

    pub(crate) fn remove_file(&self, path: &Path) -> io::Result<()> {
        let disk = &mut *self.disk.borrow_mut();
        disk.alive()?;
        disk.file(path)?;
        disk.change()?;
        self.note(("remove", path));
        disk.set_name(path, None)
    }

    pub(crate) fn create_folders(&self, path: &Path) -> io::Result<()> {
        let disk = &mut *self.disk.borrow_mut();
        disk.alive()?;
        let ancestors: Vec<&Path> = path.ancestors().collect();
        for folder in ancestors.into_iter().rev() {
            match disk.names.get(folder) {
                Some(Entry::Folder) => {}
                Some(Entry::File(_)) => return Err(errno(libc::ENOTDIR)),
                None => {
                    disk.change()?;
                    disk.set_name(folder, Some(Entry::Folder))?;
                }
            }
        }
        Ok(())
    }

    /// Names in a folder, in order.
    pub(crate) fn names(&self, folder: &Path) -> io::Result<Vec<std::ffi::OsString>> {
        let disk = self.disk.borrow();
        disk.alive()?;
        if disk.names.get(folder) != Some(&Entry::Folder) {
            return Err(errno(libc::ENOENT));
        }
        let inside = disk.names.keys().filter(|path| path.parent() == Some(folder));
        Ok(inside.filter_map(|path| path.file_name().map(Into::into)).collect())
    }

    pub(crate) fn remove_folder(&self, path: &Path) -> io::Result<()> {
        let disk = &mut *self.disk.borrow_mut();
        disk.alive()?;
        disk.change()?;
        let inside: Vec<PathBuf> = disk.names.keys().filter(|name| name.starts_with(path)).cloned().collect();
        if inside.is_empty() {
            return Err(errno(libc::ENOENT));
        }
        inside.iter().rev().try_for_each(|name| disk.set_name(name, None))
    }

    pub(crate) fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        let disk = &mut *self.disk.borrow_mut();
        disk.change()?;
        self.note(("sync", folder));
        let changes: Vec<_> = disk.changes_of_names.extract_if(.., |change| change.folder == folder).collect();
        let gone: Vec<_> = changes.into_iter().flat_map(|change| disk.keep(change)).collect();
        for entry in gone {
            if let Entry::File(number) = entry {
                disk.forget(number);
            }
        }
        Ok(())
    }

    pub(crate) fn exists(&self, path: &Path) -> bool {
        self.disk.borrow().names.contains_key(path)
    }

    /// Bytes of the disk, and of them free.
    pub(crate) fn space(&self) -> io::Result<(u64, u64)> {
        let disk = self.disk.borrow();
        disk.alive()?;
        let capacity = if disk.faults.capacity_bytes > 0 { disk.faults.capacity_bytes } else { 1 << 40 };
        Ok((capacity, capacity.saturating_sub(disk.used_bytes())))
    }
}
