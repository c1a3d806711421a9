//! The log: one line an event on stderr, levels by crate.

use std::io::{self, IsTerminal as _};

use tracing_subscriber::{Layer as _, filter::Targets, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// The environment variable that goes before the configuration.
pub const LOG_VARIABLE: &str = "METANODE_LOG";

/// Starts logging at `level` (as in `log.level`), or at what [`LOG_VARIABLE`] says when it is set and can be read.
///
/// Call it once, from the program; when a subscriber is installed already, that one stays.
pub fn init(level: &str) {
    let from_environment = std::env::var(LOG_VARIABLE).ok();
    let (levels, problem) = match from_environment.as_deref().map(parse_levels) {
        Some(Ok(levels)) => (levels, None),
        Some(Err(problem)) => (parse_levels(level).unwrap_or_default(), Some(problem)),
        None => (parse_levels(level).unwrap_or_default(), None),
    };
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = tracing_subscriber::fmt::layer().compact().with_ansi(colours).with_writer(io::stderr);
    let installed = tracing_subscriber::registry().with(lines.with_filter(levels)).try_init().is_ok();
    if let (true, Some(problem)) = (installed, problem) {
        tracing::warn!("{LOG_VARIABLE} is ignored: {problem}");
    }
}

/// Levels by target; the error says what was not understood.
pub(crate) fn parse_levels(text: &str) -> Result<Targets, String> {
    // `Targets` takes a bare unknown word for the name of a crate; a level that is mistyped would silence the log.
    let bare = text.split(',').map(str::trim).filter(|part| !part.contains('='));
    for word in bare {
        if word.parse::<tracing::level_filters::LevelFilter>().is_err() {
            return Err(format!("`{word}` is not a level (error, warn, info, debug, trace, off)"));
        }
    }
    if let Some(part) = text.split(',').find(|part| part.trim().starts_with('=')) {
        return Err(format!("`{part}` names no crate"));
    }
    text.parse().map_err(|error| format!("`{text}`: {error}"))
}
