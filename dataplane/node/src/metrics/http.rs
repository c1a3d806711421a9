//! As much of HTTP/1.1 (RFC 9112) as a scrape needs: one request, one answer, `Connection: close`.

use std::{
    io::{self, Read, Write as _},
    net::{Shutdown, TcpStream},
    time::{Duration, Instant},
};

use metanode_shard::metrics::TextWriter;

/// Most bytes of a request's head. A scraper sends some hundred.
pub(super) const REQUEST_BYTES_MAX: usize = 8 * 1024;

/// Time for a request, and again for its answer.
pub(super) const EXCHANGE_TIME_MAX: Duration = Duration::from_secs(2);

/// Most bytes that are read and dropped after the answer, so that closing does not reset what the client has not read yet.
const TAIL_BYTES_MAX: usize = 64 * 1024;

/// Reads one request and answers it; `page` makes the text when it is asked for.
pub(super) fn exchange(stream: &TcpStream, page: impl FnOnce() -> String) -> io::Result<()> {
    let head = read_head(stream)?;
    let (status, text) = match head.as_deref().map(request_line) {
        None => ("431 Request Header Fields Too Large", "the request is too large\n".to_owned()),
        Some(Some(("GET", "/metrics"))) => ("200 OK", page()),
        Some(Some(("GET", _))) => ("404 Not Found", "there is only /metrics\n".to_owned()),
        Some(Some(_)) => ("405 Method Not Allowed", "only GET\n".to_owned()),
        Some(None) => ("400 Bad Request", "not an HTTP request\n".to_owned()),
    };
    let header = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {}\r\nContent-Length: {}\r\nAllow: GET\r\nConnection: close\r\n\r\n",
        TextWriter::CONTENT_TYPE,
        text.len()
    );
    let deadline = Instant::now() + EXCHANGE_TIME_MAX;
    write_all(stream, header.as_bytes(), deadline)?;
    write_all(stream, text.as_bytes(), deadline)?;
    stream.shutdown(Shutdown::Write)?;
    drain(stream, deadline)
}

/// The bytes up to the empty line; `None` when there are too many.
fn read_head(stream: &TcpStream) -> io::Result<Option<Vec<u8>>> {
    let deadline = Instant::now() + EXCHANGE_TIME_MAX;
    let mut head = Vec::with_capacity(1024);
    let mut piece = [0; 1024];
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        let count = read(stream, &mut piece, deadline)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        head.extend_from_slice(&piece[..count]);
        if head.len() > REQUEST_BYTES_MAX {
            return Ok(None);
        }
    }
    Ok(Some(head))
}

/// Method and path, without the query.
fn request_line(head: &[u8]) -> Option<(&str, &str)> {
    let line = head.split(|&byte| byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    if !version.starts_with("HTTP/1.") || words.next().is_some() {
        return None;
    }
    Some((method, target.split('?').next()?))
}

fn drain(stream: &TcpStream, deadline: Instant) -> io::Result<()> {
    let mut piece = [0; 1024];
    let mut count = 0;
    while count < TAIL_BYTES_MAX {
        match read(stream, &mut piece, deadline)? {
            0 => break,
            n => count += n,
        }
    }
    Ok(())
}

/// One read within the deadline, which bounds the whole request: a client that sends a byte a second gains nothing.
fn read(mut stream: &TcpStream, into: &mut [u8], deadline: Instant) -> io::Result<usize> {
    stream.set_read_timeout(Some(time_left(deadline)?))?;
    stream.read(into)
}

fn write_all(mut stream: &TcpStream, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(time_left(deadline)?))?;
        match stream.write(bytes)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => bytes = &bytes[n..],
        }
    }
    Ok(())
}

fn time_left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn ask(request: &[u8]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.write_all(request).unwrap();
        let (server, _) = listener.accept().unwrap();
        let answering = std::thread::spawn(move || exchange(&server, || "up 1\n".to_owned()));
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        drop(client);
        answering.join().unwrap().unwrap();
        answer
    }

    #[test]
    fn one_path_one_method() {
        let page = ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(page.starts_with("HTTP/1.1 200 OK\r\n") && page.ends_with("\r\n\r\nup 1\n"), "{page}");
        assert!(page.contains("Content-Length: 5\r\n"), "{page}");
        assert!(ask(b"GET /metrics?name=a HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200 "));
        assert!(ask(b"GET / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404 "));
        assert!(ask(b"POST /metrics HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405 "));
        assert!(ask(b"\xff\xfe\r\n\r\n").starts_with("HTTP/1.1 400 "));
        assert!(ask(b"GET /metrics SPDY\r\n\r\n").starts_with("HTTP/1.1 400 "));
    }

    #[test]
    fn a_large_request_is_refused() {
        let mut request = b"GET /metrics HTTP/1.1\r\nX: ".to_vec();
        request.resize(REQUEST_BYTES_MAX + 100, b'x');
        assert!(ask(&request).starts_with("HTTP/1.1 431 "));
    }
}
