//! The metrics page: Prometheus text over HTTP/1.1 on a local TCP port.
//!
//! One thread, one request at a time, one path. It reads counters and asks no shard, so it answers while shards are busy, and
//! a slow reader costs it at most four seconds.

mod http;
mod page;

use std::{
    io,
    net::{SocketAddr, TcpListener},
};

pub(crate) use page::PageSource;

use crate::acceptor::Acceptor;

/// Binds the configured address; when the port is taken, a free one of the same host.
pub(crate) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let listener = TcpListener::bind((address.ip(), 0))?;
            tracing::warn!("metrics: {address} is taken, listening on {} instead", listener.local_addr()?);
            Ok(listener)
        }
        bound => bound,
    }
}

/// Serves the page until the acceptor is dropped.
pub(crate) fn serve(listener: TcpListener, source: PageSource) -> io::Result<Acceptor> {
    Acceptor::start("metrics", listener, move |stream| {
        if let Err(error) = http::exchange(&stream, || source.text()) {
            tracing::debug!("metrics: {error}");
        }
    })
}
