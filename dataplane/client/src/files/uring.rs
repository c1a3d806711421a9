//! Files by io_uring. tokio-uring's runtime lives on one thread, so each transfer of a file has a thread with a small ring.

use std::{collections::VecDeque, fs::File, io, rc::Rc};

use bytes::Bytes;
use metanode_types::limits::CHUNK_BYTES;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::{ChangedWhileRead, Version, plain};

/// Entries of a ring: twice what is ever on the way.
const RING_ENTRIES: u32 = 16;

/// Reads or writes of one file on the way at once.
const DEPTH: usize = 4;

/// Whether a ring can be made.
pub(super) fn probe() -> io::Result<()> {
    // A runtime must not be made on a thread that has one already, such as a caller's.
    let probe = std::thread::Builder::new().name("uring-probe".into()).spawn(|| runtime().map(drop))?;
    probe.join().unwrap_or_else(|_| Err(io::Error::other("the io_uring runtime panicked")))
}

fn runtime() -> io::Result<tokio_uring::Runtime> {
    tokio_uring::Runtime::new(tokio_uring::builder().entries(RING_ENTRIES))
}

pub(super) fn read(file: File, version: Version, give: mpsc::Sender<io::Result<Bytes>>) -> io::Result<()> {
    std::thread::Builder::new().name("file-read".into()).spawn(move || match runtime() {
        Ok(runtime) => runtime.block_on(read_all(file, version, give)),
        Err(_) => plain::read(file, version, &give), // the probe worked; rings may have run out since
    })?;
    Ok(())
}

async fn read_all(file: File, version: Version, give: mpsc::Sender<io::Result<Bytes>>) {
    let result = async {
        let check = file.try_clone()?;
        let file = Rc::new(tokio_uring::fs::File::from_std(file));
        let mut on_the_way: VecDeque<JoinHandle<io::Result<Vec<u8>>>> = VecDeque::new();
        let mut offset = 0;
        loop {
            while on_the_way.len() < DEPTH && offset < version.size_bytes {
                let length = (version.size_bytes - offset).min(CHUNK_BYTES as u64);
                on_the_way.push_back(tokio_uring::spawn(read_chunk(file.clone(), offset, length as usize)));
                offset += length;
            }
            let Some(next) = on_the_way.pop_front() else { break };
            let chunk = next.await.map_err(io::Error::other)??;
            if on_the_way.is_empty() && offset == version.size_bytes {
                plain::unchanged(&check, version)?; // before the last chunk is given
            }
            if give.send(Ok(chunk.into())).await.is_err() {
                break; // nobody wants it any more
            }
        }
        if version.size_bytes == 0 { plain::unchanged(&check, version) } else { Ok(()) }
    };
    if let Err(error) = result.await {
        let _ = give.send(Err(error)).await; // nobody wants it any more
    }
}

async fn read_chunk(file: Rc<tokio_uring::fs::File>, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let (result, mut chunk) = file.read_at(Vec::with_capacity(length), offset).await;
    let mut filled = result?;
    while filled < length {
        // Rare: a short read. The rest comes in a buffer of its own.
        let (result, rest) = file.read_at(Vec::with_capacity(length - filled), offset + filled as u64).await;
        match result? {
            0 => return Err(ChangedWhileRead.into_io()),
            n => chunk.extend_from_slice(&rest[..n]),
        }
        filled = chunk.len();
    }
    Ok(chunk)
}

pub(super) fn write(
    file: File,
    offset: u64,
    full: mpsc::Receiver<Vec<u8>>,
    empty: mpsc::Sender<Vec<u8>>,
    tell: oneshot::Sender<io::Result<()>>,
) -> io::Result<()> {
    std::thread::Builder::new().name("file-write".into()).spawn(move || {
        let result = match runtime() {
            Ok(runtime) => runtime.block_on(write_all(file, offset, full, empty)),
            Err(_) => plain::write(file, offset, full, &empty), // the probe worked; rings may have run out since
        };
        let _ = tell.send(result); // nobody waits after a failed transfer
    })?;
    Ok(())
}

async fn write_all(
    file: File,
    mut offset: u64,
    mut full: mpsc::Receiver<Vec<u8>>,
    empty: mpsc::Sender<Vec<u8>>,
) -> io::Result<()> {
    let file = Rc::new(tokio_uring::fs::File::from_std(file));
    let mut on_the_way: VecDeque<JoinHandle<io::Result<Vec<u8>>>> = VecDeque::new();
    loop {
        let next = full.recv().await;
        while on_the_way.len() >= DEPTH || (next.is_none() && !on_the_way.is_empty()) {
            let Some(oldest) = on_the_way.pop_front() else { break };
            let mut buffer = oldest.await.map_err(io::Error::other)??;
            buffer.clear();
            let _ = empty.try_send(buffer); // there are enough already
        }
        let Some(buffer) = next else { break };
        let length = buffer.len() as u64;
        on_the_way.push_back(tokio_uring::spawn(write_buffer(file.clone(), buffer, offset)));
        offset += length;
    }
    match file.sync_all().await {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()), // as in `plain::sync`
        result => result,
    }
}

async fn write_buffer(file: Rc<tokio_uring::fs::File>, buffer: Vec<u8>, offset: u64) -> io::Result<Vec<u8>> {
    let (result, buffer) = file.write_all_at(buffer, offset).await;
    result.map(|()| buffer)
}
