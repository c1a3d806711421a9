//! Where the bytes of a transfer come from and go to.

use std::{future::Future, io};

use bytes::{Bytes, BytesMut};
use metanode_types::limits::CHUNK_BYTES;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Gives the bytes of a blob that is stored.
pub trait BlobSource: Send {
    /// The next [`CHUNK_BYTES`] bytes; fewer, but not none, only at the end; then `None`.
    fn next_chunk(&mut self) -> impl Future<Output = io::Result<Option<Bytes>>> + Send;
}

/// Takes the verified bytes of a blob that is fetched.
pub trait BlobSink: Send {
    /// The bytes from `offset` on. Calls come in ascending order without gaps; the first starts where the range does.
    fn take(&mut self, offset: u64, data: &[u8]) -> impl Future<Output = io::Result<()>> + Send;
}

impl<S: BlobSource> BlobSource for &mut S {
    fn next_chunk(&mut self) -> impl Future<Output = io::Result<Option<Bytes>>> + Send {
        S::next_chunk(self)
    }
}

impl<S: BlobSink> BlobSink for &mut S {
    fn take(&mut self, offset: u64, data: &[u8]) -> impl Future<Output = io::Result<()>> + Send {
        S::take(self, offset, data)
    }
}

/// A source that reads from any [`AsyncRead`].
#[derive(Debug)]
pub struct ReaderSource<R>(pub R);

impl<R: AsyncRead + Unpin + Send> BlobSource for ReaderSource<R> {
    async fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
        while chunk.len() < CHUNK_BYTES {
            let room = CHUNK_BYTES - chunk.len();
            if (&mut self.0).take(room as u64).read_buf(&mut chunk).await? == 0 {
                break;
            }
        }
        Ok((!chunk.is_empty()).then(|| chunk.freeze()))
    }
}

/// A source in memory.
#[derive(Debug)]
pub struct BytesSource(pub Bytes);

impl BlobSource for BytesSource {
    async fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        let chunk = self.0.split_to(self.0.len().min(CHUNK_BYTES));
        Ok((!chunk.is_empty()).then_some(chunk))
    }
}

/// A source with some chunks of it already taken out in front.
pub(crate) struct Rejoined<S> {
    pub(crate) first: Option<Bytes>,
    pub(crate) rest: S,
}

impl<S: BlobSource> BlobSource for Rejoined<S> {
    async fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        match self.first.take() {
            Some(chunk) => Ok(Some(chunk)),
            None => self.rest.next_chunk().await,
        }
    }
}

/// A sink that writes to any [`AsyncWrite`].
#[derive(Debug)]
pub struct WriterSink<W>(pub W);

impl<W: AsyncWrite + Unpin + Send> BlobSink for WriterSink<W> {
    async fn take(&mut self, _offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write_all(data).await
    }
}

/// A sink that calls a function.
#[derive(Debug)]
pub struct FnSink<F>(pub F);

impl<F: FnMut(u64, &[u8]) + Send> BlobSink for FnSink<F> {
    async fn take(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        (self.0)(offset, data);
        Ok(())
    }
}

/// A sink in memory that refuses more than a number of bytes.
#[derive(Debug)]
pub struct VecSink {
    /// What came.
    pub bytes: Vec<u8>,
    /// How much may come.
    pub bytes_max: u64,
}

impl BlobSink for VecSink {
    async fn take(&mut self, _offset: u64, data: &[u8]) -> io::Result<()> {
        if (self.bytes.len() + data.len()) as u64 > self.bytes_max {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than expected"));
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn readers_give_whole_chunks_and_a_shorter_last_one() {
        let data = vec![7; 2 * CHUNK_BYTES + 3];
        let mut source = ReaderSource(&data[..]);
        let mut lengths = Vec::new();
        while let Some(chunk) = source.next_chunk().await.unwrap() {
            lengths.push(chunk.len());
        }
        assert_eq!(lengths, [CHUNK_BYTES, CHUNK_BYTES, 3]);
        assert_eq!(ReaderSource(&b""[..]).next_chunk().await.unwrap(), None);
    }
}
