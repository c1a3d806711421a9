use std::io;

/// glommio's error as a standard one that keeps the operating system's number: glommio's own conversion loses it.
pub(crate) fn io_error<T>(error: glommio::GlommioError<T>) -> io::Error {
    match error.raw_os_error() {
        Some(number) => io::Error::from_raw_os_error(number),
        None => error.into(),
    }
}
