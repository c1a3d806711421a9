//! A connection below the client library: any ALPN, any bytes.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use metanode_crypto::{
    Identity,
    tls::{self, CipherSuite},
};
use metanode_wire::{
    Frame, FrameLimits, FrameReader, Message, Refusal, Ticket, encode,
    message::{ArchivedRefused, Refused},
};

/// The longest that a node may take to answer or to close.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(20);

/// A connection to a node.
#[derive(Debug)]
pub struct Raw {
    /// The connection.
    pub connection: quinn::Connection,
    /// Its socket.
    pub endpoint: quinn::Endpoint,
}

/// Connects as `identity`, offering `alpn`.
pub async fn connect_raw(ticket: &Ticket, identity: &Identity, alpn: &[u8]) -> Result<Raw, quinn::ConnectionError> {
    let crypto =
        tls::client(identity, ticket.node, CipherSuite::DEFAULT, &[alpn]).expect("the shipped suites make a TLS");
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    let mut transport = quinn::TransportConfig::default();
    transport.keep_alive_interval(Some(Duration::from_secs(1)));
    config.transport_config(Arc::new(transport));
    let local: SocketAddr = (Ipv4Addr::LOCALHOST, 0).into();
    let endpoint = quinn::Endpoint::client(local).expect("loopback has ports left");
    let connecting = endpoint.connect_with(config, ticket.addresses[0], tls::SERVER_NAME).expect("the address is one");
    let connected = tokio::time::timeout(ANSWER_TIME_MAX, connecting).await.expect("the node answers");
    Ok(Raw { connection: connected?, endpoint })
}

impl Raw {
    /// Opens a stream.
    ///
    /// # Panics
    ///
    /// When the connection has gone, or permits no more streams for too long.
    pub async fn open(&self) -> RawStream {
        self.try_open().await.expect("the connection lives")
    }

    /// Opens a stream, unless the connection has gone.
    pub async fn try_open(&self) -> Option<RawStream> {
        let opened = tokio::time::timeout(ANSWER_TIME_MAX, self.connection.open_bi()).await;
        let (send, recv) = opened.expect("the node permits another stream").ok()?;
        Some(RawStream { send, recv, reader: FrameReader::new(FrameLimits::default()) })
    }

    /// Waits until the node closes the connection; the application code that it gives.
    ///
    /// # Panics
    ///
    /// When it does not, or closes otherwise than by such a code.
    pub async fn close_code(&self) -> u64 {
        let closed = tokio::time::timeout(ANSWER_TIME_MAX, self.connection.closed()).await;
        match closed.expect("the node closes the connection") {
            quinn::ConnectionError::ApplicationClosed(closed) => closed.error_code.into_inner(),
            other => panic!("the node closed the connection without an application code: {other}"),
        }
    }
}

/// A stream of a [`Raw`] connection.
#[derive(Debug)]
pub struct RawStream {
    /// To the node.
    pub send: quinn::SendStream,
    /// From the node.
    pub recv: quinn::RecvStream,
    reader: FrameReader,
}

impl RawStream {
    /// Sends bytes as they are.
    pub async fn write(&mut self, bytes: &[u8]) {
        self.send.write_all(bytes).await.expect("the node takes bytes");
    }

    /// Sends a frame.
    pub async fn ask<M: Message>(&mut self, request: u32, message: &M, body: &[u8]) {
        self.write(&frame(request, message, body)).await;
    }

    /// The next frame; `None` at the end of the stream or of the connection.
    pub async fn answer(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.reader.next_frame().expect("the node sends frames") {
                return Some(frame);
            }
            let chunk = tokio::time::timeout(ANSWER_TIME_MAX, self.recv.read_chunk(64 * 1024, true)).await;
            match chunk.expect("the node answers") {
                Ok(Some(chunk)) => self.reader.push(chunk.bytes),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    /// The refusal that comes next, and the number of the request that it answers.
    ///
    /// # Panics
    ///
    /// When something else comes.
    pub async fn refusal(&mut self) -> (u32, Refusal) {
        let frame = self.answer().await.expect("the node refuses before it ends the stream");
        let refused: &ArchivedRefused = frame.message::<Refused>().expect("the node refuses");
        (frame.request, Refusal::from_message(refused))
    }
}

/// The bytes of a frame.
pub fn frame<M: Message>(request: u32, message: &M, body: &[u8]) -> Bytes {
    let mut out = Vec::new();
    encode(&mut out, request, message, body.len());
    out.extend_from_slice(body);
    out.into()
}
