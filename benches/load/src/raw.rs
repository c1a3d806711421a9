//! What the disk does when nobody stands between it and the load: the figures that a store's are divided by. And whether the machine
//! holds still.
//!
//! Everything runs on the node's core while the node is idle or stopped, reads and writes on files of the same file system, past the page
//! cache (`O_DIRECT`).

use std::{
    cell::{Cell, RefCell},
    fs::{File, OpenOptions},
    io::ErrorKind,
    net::{Ipv4Addr, UdpSocket},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    process::Command,
    rc::Rc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::fs::OFlags;
use tokio_uring::buf::BoundedBuf as _;

use crate::{
    data::Random,
    measure::{Latencies, pin},
};

/// What `O_DIRECT` wants of addresses, offsets and lengths at most.
const ALIGNMENT: usize = 4096;
/// Size of an object.
const OBJECT_BYTES: usize = 4096;
/// Objects of one commit: as many as are on the way at once when a node is measured, so that it could commit them together.
const COMMIT_OBJECTS: usize = 64;
/// The file that commits go to, over and over: its blocks have been written, as those of a node's segments have.
const COMMIT_FILE_BYTES: usize = 64 << 20;
/// Random reads on the way at once.
const RANDOM_DEPTH: usize = 64;
/// Size of a sequential read.
const SEQUENTIAL_BYTES: usize = 1 << 20;
/// Sequential reads on the way at once that keep any disk busy.
const DEPTH: usize = 16;
/// Random reads need this much to choose from, or a host's cache would answer them.
const RANDOM_BYTES_MIN: u64 = 64 << 20;

/// Over how long a core's speed is taken: a tail of 2 ms feels as long a moment.
const STEADY_WINDOW: Duration = Duration::from_millis(5);
/// Size of a datagram that a core sends to itself, and of what it is taken from: more than its caches hold.
const STEADY_DATAGRAM_BYTES: usize = 32 << 10;
const STEADY_BYTES: usize = 64 << 20;

/// A rate, and how long operations took.
pub(crate) struct Rate {
    /// Objects, or bytes, a second.
    pub(crate) per_second: f64,
    pub(crate) latencies: Latencies,
}

/// How the objects of one raw commit reach the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Append {
    /// Each by a write of its own, all on the way at once through io_uring: what a store without group commit would do.
    Each,
    /// All by one write: the least that the disk can be asked for.
    Together,
}

/// 4 KiB objects a second that become durable in `dir`: 64 are appended, then comes one `fdatasync`.
pub(crate) async fn commits(dir: &Path, core: usize, append: Append, time: Duration) -> Result<Rate> {
    let path = dir.join("raw-commit");
    on_core(core, move || {
        let measured = uring(|| commits_to(path.clone(), append, time));
        // Best effort: the folder goes as a whole in the end.
        let _ = std::fs::remove_file(&path);
        measured
    })
    .await
}

async fn commits_to(path: PathBuf, append: Append, time: Duration) -> Result<Rate> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(&path)
        .with_context(|| format!("cannot make {}", path.display()))?;
    let mut zeros = Aligned::zeroed(SEQUENTIAL_BYTES);
    for offset in (0..COMMIT_FILE_BYTES).step_by(SEQUENTIAL_BYTES) {
        file.write_all_at(zeros.bytes(), offset as u64)?;
    }
    file.sync_all()?;
    let ring_file = Rc::new(tokio_uring::fs::File::from_std(file.try_clone()?));
    let commit_bytes = COMMIT_OBJECTS * OBJECT_BYTES;
    let mut random = Random::new(1);
    let mut buffer = |length| {
        let mut buffer = Aligned::zeroed(length);
        random.fill(buffer.bytes());
        buffer
    };
    let mut together = buffer(commit_bytes);
    let mut each: Vec<Aligned> = (0..COMMIT_OBJECTS).map(|_| buffer(OBJECT_BYTES)).collect();
    let mut latencies = Latencies::new();
    let mut offset = 0;
    let mut commits = 0;
    let begun = Instant::now();
    let mut now = begun;
    while now - begun < time {
        match append {
            // Plain calls: with one write there is nothing to overlap, and a ring would only add to it.
            Append::Together => {
                file.write_all_at(together.bytes(), offset)?;
                file.sync_data()?;
            }
            Append::Each => {
                let at = (offset..).step_by(OBJECT_BYTES);
                let writes = each.drain(..).zip(at).map(|(buffer, at)| {
                    let file = ring_file.clone();
                    tokio_uring::spawn(async move { buffer.write(&file, at).await })
                });
                let writes: Vec<_> = writes.collect();
                for write in writes {
                    each.push(write.await??);
                }
                ring_file.sync_data().await?;
            }
        }
        let end = Instant::now();
        latencies.push(end - now);
        now = end;
        commits += 1;
        offset = (offset + commit_bytes as u64) % COMMIT_FILE_BYTES as u64;
    }
    let objects = f64::from(commits) * COMMIT_OBJECTS as f64;
    Ok(Rate { per_second: objects / (now - begun).as_secs_f64(), latencies })
}

/// Random aligned 4 KiB reads a second from `files`, 64 at a time through io_uring.
pub(crate) async fn random_reads(files: Vec<PathBuf>, core: usize, time: Duration) -> Result<Rate> {
    on_core(core, move || {
        let opened = Rc::new(open_direct(&files)?);
        let blocks: u64 = opened.iter().map(|(_, bytes)| bytes / OBJECT_BYTES as u64).sum();
        ensure!(blocks * OBJECT_BYTES as u64 >= RANDOM_BYTES_MIN, "the store's files are too small for random reads");
        uring(move || random_reads_of(opened, blocks, time))
    })
    .await
}

async fn random_reads_of(files: Rc<Vec<(File, u64)>>, blocks: u64, time: Duration) -> Result<Rate> {
    let files: Rc<Vec<_>> = Rc::new(to_uring(&files)?);
    let random = Rc::new(RefCell::new(Random::new(2)));
    let latencies = Rc::new(RefCell::new(Latencies::new()));
    let count = Rc::new(Cell::new(0u64));
    let begun = Instant::now();
    let workers: Vec<_> = (0..RANDOM_DEPTH)
        .map(|_| {
            let (files, random, latencies, count) = (files.clone(), random.clone(), latencies.clone(), count.clone());
            tokio_uring::spawn(async move {
                let mut buffer = Aligned::zeroed(OBJECT_BYTES);
                let mut now = Instant::now();
                while now - begun < time {
                    let mut block = random.borrow_mut().below(blocks);
                    let (file, _) = files
                        .iter()
                        .find(|(_, bytes)| {
                            let own = bytes / OBJECT_BYTES as u64;
                            let is_here = block < own;
                            block -= if is_here { 0 } else { own };
                            is_here
                        })
                        .context("a block of no file")?;
                    buffer = buffer.read(file, block * OBJECT_BYTES as u64, OBJECT_BYTES).await?;
                    let end = Instant::now();
                    latencies.borrow_mut().push(end - now);
                    now = end;
                    count.set(count.get() + 1);
                }
                anyhow::Ok(())
            })
        })
        .collect();
    for worker in workers {
        worker.await??;
    }
    let per_second = count.get() as f64 / begun.elapsed().as_secs_f64();
    let latencies = Rc::into_inner(latencies).context("a worker is left")?.into_inner();
    Ok(Rate { per_second, latencies })
}

/// Bytes a second at which `dd bs=1M iflag=direct` reads `files`: one reader that asks for a MiB and waits for it.
pub(crate) async fn plain_reads(files: Vec<PathBuf>, core: usize) -> Result<f64> {
    on_core(core, move || {
        let mut bytes = 0;
        let begun = Instant::now();
        for path in &files {
            // It inherits this thread's core.
            let mut dd = Command::new("dd");
            dd.arg(format!("if={}", path.display())).args(["of=/dev/null", "bs=1M", "iflag=direct", "status=none"]);
            let ended = dd.status().context("dd can't be run")?;
            ensure!(ended.success(), "dd could not read {}", path.display());
            bytes += path.metadata()?.len();
        }
        ensure!(bytes > 0, "the store's files are too small for sequential reads");
        Ok(bytes as f64 / begun.elapsed().as_secs_f64())
    })
    .await
}

/// Bytes a second at which `files` are read from first to last, 1 MiB at a time, 16 on the way, through io_uring.
pub(crate) async fn deep_reads(files: Vec<PathBuf>, core: usize) -> Result<f64> {
    on_core(core, move || {
        let opened = Rc::new(open_direct(&files)?);
        uring(move || deep_reads_of(opened))
    })
    .await
}

async fn deep_reads_of(files: Rc<Vec<(File, u64)>>) -> Result<f64> {
    let pieces: Vec<(usize, u64)> = files
        .iter()
        .enumerate()
        .flat_map(|(index, (_, bytes))| {
            (0..bytes / SEQUENTIAL_BYTES as u64).map(move |piece| (index, piece * SEQUENTIAL_BYTES as u64))
        })
        .collect();
    ensure!(!pieces.is_empty(), "the store's files are too small for sequential reads");
    let bytes = pieces.len() * SEQUENTIAL_BYTES;
    let (files, pieces) = (Rc::new(to_uring(&files)?), Rc::new(pieces));
    let next = Rc::new(Cell::new(0));
    let begun = Instant::now();
    let workers: Vec<_> = (0..DEPTH)
        .map(|_| {
            let (files, pieces, next) = (files.clone(), pieces.clone(), next.clone());
            tokio_uring::spawn(async move {
                let mut buffer = Aligned::zeroed(SEQUENTIAL_BYTES);
                while let Some((file, offset)) = pieces.get(next.replace(next.get() + 1)) {
                    buffer = buffer.read(&files[*file].0, *offset, SEQUENTIAL_BYTES).await?;
                }
                anyhow::Ok(())
            })
        })
        .collect();
    for worker in workers {
        worker.await??;
    }
    Ok(bytes as f64 / begun.elapsed().as_secs_f64())
}

/// Share of the time in which a core runs at half of its usual speed or more, by its own work for the kernel: it sends itself datagrams over
/// loopback. 1 where nothing else wants the machine. Under a hypervisor others may have it, which shows neither as stolen time nor as a
/// late wake-up.
pub(crate) async fn steady_share(core: usize, time: Duration) -> Result<f64> {
    on_core(core, move || {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect(socket.local_addr()?)?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        let source = vec![1; STEADY_BYTES];
        let mut datagrams = source.chunks_exact(STEADY_DATAGRAM_BYTES).cycle();
        let mut arrived = vec![0; STEADY_DATAGRAM_BYTES];
        let mut exchange = || -> Result<()> {
            let datagram = datagrams.next().context("there are datagrams")?;
            socket.send(datagram)?;
            let bytes = loop {
                match socket.recv(&mut arrived) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    received => break received.context("a datagram to ourselves was lost")?,
                }
            };
            ensure!(bytes == datagram.len(), "a datagram to ourselves was cut");
            Ok(())
        };
        let mut rates = Vec::new();
        let begun = Instant::now();
        while begun.elapsed() < time {
            let (window, mut count) = (Instant::now(), 0);
            while count == 0 || window.elapsed() < STEADY_WINDOW {
                exchange()?;
                count += 1;
            }
            // The first quarter is on a core that has come from rest.
            if begun.elapsed() > time / 4 {
                rates.push(f64::from(count) / window.elapsed().as_secs_f64());
            }
        }
        rates.sort_by(f64::total_cmp);
        let median = rates.get(rates.len() / 2).context("no time to measure in")?;
        let slow = rates.iter().filter(|rate| **rate < median / 2.0).count();
        Ok(1.0 - slow as f64 / rates.len() as f64)
    })
    .await
}

/// Runs `measure` in a thread of its own, pinned to `core`.
async fn on_core<T: Send + 'static>(core: usize, measure: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (give, take) = tokio::sync::oneshot::channel();
    let run = move || {
        let measured = pin(core).and_then(|()| measure());
        let _ = give.send(measured); // the run was given up
    };
    let thread = thread::Builder::new().name("raw".to_owned()).spawn(run).context("cannot start a thread")?;
    let measured = take.await;
    thread.join().map_err(|_| anyhow!("the thread of a raw measurement panicked"))?;
    measured.context("a raw measurement ended early")?
}

fn uring<T, Running: Future<Output = Result<T>>>(measure: impl FnOnce() -> Running) -> Result<T> {
    tokio_uring::builder().entries(2 * RANDOM_DEPTH as u32).start(async { measure().await })
}

fn open_direct(paths: &[PathBuf]) -> Result<Vec<(File, u64)>> {
    let open = |path: &PathBuf| -> std::io::Result<(File, u64)> {
        let file = OpenOptions::new().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path)?;
        let bytes = file.metadata()?.len();
        Ok((file, bytes))
    };
    paths.iter().map(|path| open(path).with_context(|| format!("cannot open {}", path.display()))).collect()
}

fn to_uring(files: &[(File, u64)]) -> Result<Vec<(tokio_uring::fs::File, u64)>> {
    files.iter().map(|(file, bytes)| Ok((tokio_uring::fs::File::from_std(file.try_clone()?), *bytes))).collect()
}

/// A buffer whose address is a multiple of [`ALIGNMENT`].
struct Aligned {
    /// Larger than asked for by [`ALIGNMENT`].
    buffer: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn zeroed(length: usize) -> Self {
        let buffer = vec![0; length + ALIGNMENT];
        let start = buffer.as_ptr().align_offset(ALIGNMENT);
        assert!(start < ALIGNMENT, "a byte pointer can be aligned");
        Self { buffer, start }
    }

    fn bytes(&mut self) -> &mut [u8] {
        let end = self.buffer.len() - ALIGNMENT + self.start;
        &mut self.buffer[self.start..end]
    }

    /// Fills the buffer with `length` bytes from `offset` on; fewer are an error.
    async fn read(self, file: &tokio_uring::fs::File, offset: u64, length: usize) -> Result<Self> {
        let start = self.start;
        let (read, slice) = file.read_at(self.buffer.slice(start..start + length), offset).await;
        let read = read.context("a raw read")?;
        ensure!(read == length, "a raw read gave {read} of {length} bytes");
        Ok(Self { buffer: slice.into_inner(), start })
    }

    /// Writes the whole buffer at `offset`; less is an error.
    async fn write(self, file: &tokio_uring::fs::File, offset: u64) -> Result<Self> {
        let (start, length) = (self.start, self.buffer.len() - ALIGNMENT);
        let (written, slice) = file.write_at(self.buffer.slice(start..start + length), offset).submit().await;
        let written = written.context("a raw write")?;
        ensure!(written == length, "a raw write took {written} of {length} bytes");
        Ok(Self { buffer: slice.into_inner(), start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a disk: `O_DIRECT` is not for every memory file system.
    fn folder() -> PathBuf {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../../target/raw-test-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[tokio::test]
    async fn a_core_is_steady_for_a_share_of_the_time() {
        let share = steady_share(0, Duration::from_millis(100)).await.unwrap();
        assert!((0.0..=1.0).contains(&share), "{share}");
        assert!(steady_share(0, Duration::ZERO).await.is_err());
    }

    #[tokio::test]
    async fn the_disk_writes_and_reads() {
        let dir = folder();
        let file = dir.join("x.seg");
        std::fs::write(&file, vec![7; RANDOM_BYTES_MIN as usize]).unwrap();
        let time = Duration::from_millis(50);
        for append in [Append::Each, Append::Together] {
            let commits = commits(&dir, 0, append, time).await.unwrap();
            assert!(commits.per_second > 64.0 && commits.latencies.quantile_us(0.5) > 1.0, "{append:?}");
        }
        let random = random_reads(vec![file.clone()], 0, time).await;
        let sequential = deep_reads(vec![file.clone()], 0).await;
        let plain = plain_reads(vec![file.clone()], 0).await;
        std::fs::write(&file, b"short").unwrap();
        let short = random_reads(vec![file], 0, time).await;
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(random.unwrap().per_second > 100.0);
        assert!(sequential.unwrap() > 1e6);
        assert!(plain.unwrap() > 1e6);
        assert!(short.is_err());
    }

    #[test]
    fn buffers_are_aligned() {
        for _ in 0..8 {
            let mut buffer = Aligned::zeroed(OBJECT_BYTES);
            assert_eq!((buffer.bytes().as_ptr().align_offset(ALIGNMENT), buffer.bytes().len()), (0, OBJECT_BYTES));
        }
    }
}
