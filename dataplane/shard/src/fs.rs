//! The file system beside a shard's own files: names in folders, small files that are read and written at once, free space.
//!
//! Plain system calls that wait: before the shards start, or in [`run_blocking`](crate::run_blocking).

use std::{ffi::OsString, fs, io, os::unix::fs::FileExt as _, path::Path};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};

#[cfg(feature = "sim")]
use crate::sim;

/// Answers with the simulated machine's, in one.
macro_rules! simulated {
    (|$world:ident| $answer:expr) => {
        #[cfg(feature = "sim")]
        if let Some($world) = crate::sim::current() {
            return $answer;
        }
    };
}
pub(crate) use simulated;

/// A file read and written by plain system calls through the page cache.
#[derive(Debug)]
pub struct PlainFile(Inner);

#[derive(Debug)]
enum Inner {
    System(fs::File),
    #[cfg(feature = "sim")]
    Simulated(sim::Handle),
}

impl PlainFile {
    /// Opens an existing file for reading.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        simulated!(|world| world.open(path.as_ref(), sim::Mode::Existing).map(Inner::Simulated).map(Self));
        fs::File::open(path).map(Inner::System).map(Self)
    }

    /// Opens an existing file for reading and writing.
    pub fn open_for_change(path: impl AsRef<Path>) -> io::Result<Self> {
        simulated!(|world| world.open(path.as_ref(), sim::Mode::Existing).map(Inner::Simulated).map(Self));
        fs::File::options().read(true).write(true).open(path).map(Inner::System).map(Self)
    }

    /// Opens a file for writing; makes it if it is not there and keeps what is in it if it is.
    pub fn open_or_create(path: impl AsRef<Path>) -> io::Result<Self> {
        simulated!(|world| world.open(path.as_ref(), sim::Mode::Either).map(Inner::Simulated).map(Self));
        fs::File::options().create(true).truncate(false).write(true).open(path).map(Inner::System).map(Self)
    }

    /// Makes an empty file, also of one that is there.
    pub fn create(path: impl AsRef<Path>) -> io::Result<Self> {
        simulated!(|world| world.open(path.as_ref(), sim::Mode::Empty).map(Inner::Simulated).map(Self));
        fs::File::create(path).map(Inner::System).map(Self)
    }

    /// Fills `buffer` with what lies from `offset` on; returns how much that was, less only at the end of the file.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            let (rest, at) = (&mut buffer[done..], offset + done as u64);
            let read = match &self.0 {
                Inner::System(file) => file.read_at(rest, at),
                #[cfg(feature = "sim")]
                Inner::Simulated(file) => sim::world()?.read_at(file, rest, at),
            };
            match read {
                Ok(0) => break,
                Ok(more) => done += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// Writes all of `bytes` at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        match &self.0 {
            Inner::System(file) => file.write_all_at(bytes, offset),
            #[cfg(feature = "sim")]
            Inner::Simulated(file) => sim::world()?.write_at(file, bytes, offset),
        }
    }

    /// Bytes in the file.
    pub fn size(&self) -> io::Result<u64> {
        match &self.0 {
            Inner::System(file) => Ok(file.metadata()?.len()),
            #[cfg(feature = "sim")]
            Inner::Simulated(file) => sim::world()?.length(file),
        }
    }

    /// Cuts the file off, or fills it up with zeros.
    pub fn set_size(&self, bytes: u64) -> io::Result<()> {
        match &self.0 {
            Inner::System(file) => file.set_len(bytes),
            #[cfg(feature = "sim")]
            Inner::Simulated(file) => sim::world()?.set_length(file, bytes),
        }
    }

    /// Reserves space, so that the file has at least `bytes`.
    pub fn allocate(&self, bytes: u64) -> io::Result<()> {
        match &self.0 {
            Inner::System(file) => Ok(fallocate(file, FallocateFlags::empty(), 0, bytes)?),
            #[cfg(feature = "sim")]
            Inner::Simulated(file) => sim::world()?.allocate(file, bytes),
        }
    }

    /// Makes contents and size survive a crash.
    pub fn sync(&self) -> io::Result<()> {
        match &self.0 {
            Inner::System(file) => file.sync_all(),
            #[cfg(feature = "sim")]
            Inner::Simulated(file) => sim::world()?.sync(file),
        }
    }
}

/// An exclusive lock on a file (flock(2)). It ends with this, or with the process.
#[derive(Debug)]
pub struct FileLock {
    _file: Option<fs::File>,
}

impl FileLock {
    /// Locks a file, which is made if it is not there; `None` when another has it. In a simulated world there is nobody else.
    pub fn try_acquire(path: impl AsRef<Path>) -> io::Result<Option<Self>> {
        simulated!(|_world| Ok(Some(Self { _file: None })));
        let file = fs::File::options().create(true).truncate(false).write(true).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { _file: Some(file) })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// All of a file.
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    simulated!(|world| {
        let file = world.open(path.as_ref(), sim::Mode::Existing)?;
        let mut bytes = vec![0; world.length(&file)? as usize];
        world.read_at(&file, &mut bytes, 0)?;
        Ok(bytes)
    });
    fs::read(path)
}

/// Gives a file another name in its folder; a file of that name goes.
pub fn rename(from: impl AsRef<Path>, to: impl AsRef<Path>) -> io::Result<()> {
    simulated!(|world| world.rename(from.as_ref(), to.as_ref()));
    fs::rename(from, to)
}

/// Removes a file.
pub fn remove_file(path: impl AsRef<Path>) -> io::Result<()> {
    simulated!(|world| world.remove_file(path.as_ref()));
    fs::remove_file(path)
}

/// Makes a folder and those around it; one that is there is fine.
pub fn create_folders(path: impl AsRef<Path>) -> io::Result<()> {
    simulated!(|world| world.create_folders(path.as_ref()));
    fs::create_dir_all(path)
}

/// Removes a folder with what is in it.
pub fn remove_folder(path: impl AsRef<Path>) -> io::Result<()> {
    simulated!(|world| world.remove_folder(path.as_ref()));
    fs::remove_dir_all(path)
}

/// What is in a folder, by name and in order.
pub fn names(folder: impl AsRef<Path>) -> io::Result<Vec<OsString>> {
    simulated!(|world| world.names(folder.as_ref()));
    let mut names = fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
    names.sort_unstable();
    Ok(names)
}

/// Makes changes of names in a folder survive a crash.
pub fn sync_folder(folder: impl AsRef<Path>) -> io::Result<()> {
    simulated!(|world| world.sync_folder(folder.as_ref()));
    fs::File::open(folder)?.sync_all()
}

/// Whether there is something of this name.
pub fn exists(path: impl AsRef<Path>) -> bool {
    simulated!(|world| world.exists(path.as_ref()));
    path.as_ref().exists()
}

/// Bytes of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// All of them.
    pub total_bytes: u64,
    /// What this user may still take.
    pub free_bytes: u64,
}

/// How large the file system is that `path` lies on.
pub fn space(path: impl AsRef<Path>) -> io::Result<Space> {
    simulated!(|world| world.space().map(|(total_bytes, free_bytes)| Space { total_bytes, free_bytes }));
    let disk = rustix::fs::statvfs(path.as_ref())?;
    Ok(Space { total_bytes: disk.f_blocks * disk.f_frsize, free_bytes: disk.f_bavail * disk.f_frsize })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_in_order_and_sizes_are_what_was_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["b", "a"] {
            let file = PlainFile::create(at(name)).unwrap();
            file.write_at(b"hello", 2).unwrap();
            file.sync().unwrap();
        }
        rename(at("b"), at("c")).unwrap();
        sync_folder(folder.path()).unwrap();
        assert_eq!(names(folder.path()).unwrap(), ["a", "c"]);
        assert_eq!(read(at("c")).unwrap(), b"\0\0hello");
        let file = PlainFile::open_for_change(at("c")).unwrap();
        file.set_size(4).unwrap();
        let mut buffer = [9; 8];
        assert_eq!((file.read_at(&mut buffer, 1).unwrap(), file.size().unwrap()), (3, 4));
        assert_eq!(buffer[..4], [0, b'h', b'e', 9]);
        let kept = PlainFile::open_or_create(at("c")).unwrap();
        kept.allocate(4096).unwrap();
        assert_eq!(kept.size().unwrap(), 4096);
        remove_file(at("c")).unwrap();
        assert!(exists(at("a")) && !exists(at("c")));
        assert!(PlainFile::open(at("c")).is_err());
        create_folders(at("x/y")).unwrap();
        remove_folder(at("x")).unwrap();
        assert!(!exists(at("x")));
        let space = space(folder.path()).unwrap();
        assert!(space.free_bytes <= space.total_bytes && space.total_bytes > 0);
    }
}
