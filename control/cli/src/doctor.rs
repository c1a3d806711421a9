//! What a machine has, and what is lost without the rest. Only what was tried is called ok; what was not is called *not probed*.

mod disk;
mod kernel;

use std::path::Path;

pub(crate) use disk::free_bytes;
use serde::Serialize;

use crate::output::Row;

/// What became of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum State {
    /// There, as it should be.
    Ok,
    /// There, with less than one could have.
    Degraded,
    /// Not there.
    Missing,
    /// Nothing was tried, so nothing is claimed.
    NotProbed,
}

/// One line of the doctor.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) state: State,
    /// What is there.
    pub(crate) found: String,
    /// What is lost; empty when nothing is.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) lost: String,
    /// How to provide it; empty when there is nothing to do.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) fix: String,
    /// Whether a node runs without it.
    #[serde(skip)]
    pub(crate) needed: bool,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, state: State::Ok, found: found.into(), lost: String::new(), fix: String::new(), needed: false }
    }

    fn bad(name: &'static str, state: State, found: impl Into<String>, lost: &str, fix: impl Into<String>) -> Self {
        Self { name, state, found: found.into(), lost: lost.into(), fix: fix.into(), needed: false }
    }

    fn needed(self) -> Self {
        Self { needed: true, ..self }
    }
}

impl Row for Check {
    const COLUMNS: &'static [(&'static str, isize)] = &[("CHECK", 16), ("STATE", 10), ("FOUND", 0)];
    const HAS_LINES: bool = true;

    fn cells(&self) -> Vec<String> {
        let state = match self.state {
            State::Ok => "ok",
            State::Degraded => "degraded",
            State::Missing => "missing",
            State::NotProbed => "not probed",
        };
        let mut found = self.found.clone();
        for (word, text) in [("lost", &self.lost), ("fix", &self.fix)] {
            if !text.is_empty() {
                found.push_str(&format!("\n{:30}{word}: {text}", ""));
            }
        }
        vec![self.name.into(), state.into(), found]
    }
}

/// Everything, in the order of importance.
pub(crate) fn all(data: &Path) -> Vec<Check> {
    let mut checks = essential(data);
    checks.extend([kernel::cpu(), kernel::udp_buffers()]);
    checks.extend(disk::features(data));
    checks.push(kernel::cgroups());
    checks.extend(kernel::bpf());
    checks
}

/// What decides whether a node runs, and how well.
pub(crate) fn essential(data: &Path) -> Vec<Check> {
    vec![kernel::version(), kernel::io_uring(), kernel::memlock(), kernel::nofile(), disk::free(data)]
}

/// A file of `/proc` or `/sys`, without the line's end.
fn text_of(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_that_is_not_ok_says_what_is_lost_or_why_nothing_was_tried() {
        let folder = tempfile::tempdir().unwrap();
        let checks = all(folder.path());
        assert!(checks.len() >= 12);
        for check in checks {
            assert!(!check.found.is_empty(), "{check:?}");
            assert_eq!(check.state == State::Ok, check.lost.is_empty(), "{check:?}");
        }
    }

    #[test]
    fn lines_have_what_is_lost_below() {
        let check = Check::bad("x", State::Missing, "nothing", "much", "buy one");
        assert_eq!(check.cells()[2], format!("nothing\n{0:30}lost: much\n{0:30}fix: buy one", ""));
    }
}
