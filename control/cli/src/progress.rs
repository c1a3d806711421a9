//! Progress bars: on standard error, when that is a terminal, for work that lasts more than a second.

use std::{
    future::Future,
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use metanode_client::Progress;

/// Work that is over sooner shows nothing.
const SHOW_AFTER: Duration = Duration::from_secs(1);

/// Between two drawings.
const ROUND: Duration = Duration::from_millis(100);

/// Does `work` and shows how far `progress` is meanwhile.
pub(crate) async fn shown<T>(what: &'static str, quiet: bool, progress: &Progress, work: impl Future<Output = T>) -> T {
    if quiet || !std::io::stderr().is_terminal() {
        return work.await;
    }
    let mut work = std::pin::pin!(work);
    let begun = Instant::now();
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
    let mut is_shown = false;
    loop {
        match tokio::time::timeout(ROUND, &mut work).await {
            Ok(done) => {
                bar.finish_and_clear();
                return done;
            }
            Err(_elapsed) => {
                if !is_shown && begun.elapsed() >= SHOW_AFTER {
                    is_shown = true;
                    bar.set_draw_target(ProgressDrawTarget::stderr());
                    bar.set_prefix(what);
                }
                advance(&bar, progress, begun);
            }
        }
    }
}

fn advance(bar: &ProgressBar, progress: &Progress, begun: Instant) {
    let (bytes, total) = (progress.bytes(), progress.bytes_total());
    let template = if total > 0 {
        bar.set_length(total);
        "{prefix} [{bar:28}] {bytes}/{total_bytes} {msg} ETA {eta}"
    } else {
        "{prefix} {spinner} {bytes} {msg}"
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_position(bytes);
    let rate = crate::output::rate(bytes, begun.elapsed());
    bar.set_message(match progress.files_total() {
        0 | 1 => rate,
        files => format!("{}/{files} files {rate}", progress.files()),
    });
}
