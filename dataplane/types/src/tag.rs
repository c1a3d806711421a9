use std::{borrow::Borrow, fmt, str::FromStr};

use crate::limits::TAG_NAME_BYTES_MAX;

/// A name that an operator gives to a blob: 1 to [`TAG_NAME_BYTES_MAX`] bytes of UTF-8 without control characters.
///
/// A text of exactly 64 hexadecimal digits is refused: it could not be told from a hash on a command line.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TagName(String);

/// Why a text is not a tag name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TagNameError {
    /// Nothing in it.
    #[error("a tag name is not empty")]
    Empty,
    /// Over the limit.
    #[error("a tag name has at most {TAG_NAME_BYTES_MAX} bytes")]
    TooLong,
    /// Contains a control character.
    #[error("a tag name has no control characters")]
    ControlCharacter,
    /// Looks like a hash.
    #[error("a tag name is not 64 hexadecimal digits: that is a hash")]
    LooksLikeHash,
}

impl TagName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TagName {
    type Err = TagNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            Err(TagNameError::Empty)
        } else if text.len() > TAG_NAME_BYTES_MAX {
            Err(TagNameError::TooLong)
        } else if text.chars().any(char::is_control) {
            Err(TagNameError::ControlCharacter)
        } else if text.parse::<crate::Hash>().is_ok() {
            Err(TagNameError::LooksLikeHash)
        } else {
            Ok(Self(text.to_owned()))
        }
    }
}

impl Borrow<str> for TagName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for TagName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_a_terminal_or_a_parser_would_trip_over() {
        assert_eq!("".parse::<TagName>(), Err(TagNameError::Empty));
        assert_eq!("a\nb".parse::<TagName>(), Err(TagNameError::ControlCharacter));
        assert_eq!("x".repeat(256).parse::<TagName>(), Err(TagNameError::TooLong));
        assert_eq!("0".repeat(64).parse::<TagName>(), Err(TagNameError::LooksLikeHash));
        assert_eq!("backup/2026 ä".parse::<TagName>().unwrap().as_str(), "backup/2026 ä");
    }
}
