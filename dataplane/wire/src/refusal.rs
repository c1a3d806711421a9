use metanode_types::limits::REFUSAL_DETAIL_BYTES_MAX;

use crate::message::{ArchivedRefused, Refused};

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $words:literal;)*) => {
        /// Why a node refused; the numbers are the protocol.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum RefusalCode { $($(#[$doc])* $name = $number,)* }

        impl RefusalCode {
            /// Every code.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// A few words.
            pub const fn words(self) -> &'static str {
                match self { $(Self::$name => $words,)* }
            }
        }
    };
}

codes! {
    /// Too much work; try again after the hint.
    Busy = 1, "busy";
    /// No such blob or tag.
    NotFound = 2, "not found";
    /// This key may not do that.
    Forbidden = 3, "not permitted for this key";
    /// Larger than a limit.
    TooLarge = 4, "too large";
    /// The bytes do not have the hash they were announced with.
    HashMismatch = 5, "the bytes do not match the hash";
    /// A tag or folder refers to it.
    InUse = 6, "still referred to";
    /// No room on the disk; reads and removals work.
    DiskFull = 7, "the disk is full";
    /// The index has reached its cap.
    IndexFull = 8, "the index is full";
    /// The store takes no writes: read-only folder, or a failed sync.
    ReadOnly = 9, "the store is read-only";
    /// The disk failed.
    Storage = 10, "the disk failed";
    /// What is stored does not match its hash, and no good copy is here.
    Corrupt = 11, "the stored copy is corrupt";
    /// The range starts behind the end.
    BadRange = 12, "the range starts behind the end";
    /// The request makes no sense.
    Malformed = 13, "malformed request";
    /// Another protocol version.
    UnsupportedVersion = 14, "unsupported protocol version";
    /// The node is stopping.
    ShuttingDown = 15, "the node is stopping";
    /// A folder names a blob that is not here.
    MissingChild = 16, "a folder refers to a blob that is not stored";
    /// Not available on this node.
    NotSupported = 17, "not supported";
}

impl RefusalCode {
    /// The code with this number.
    pub fn from_u16(number: u16) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| *code as u16 == number)
    }
}

/// A typed refusal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{}{detail}", code.words(), if detail.is_empty() { "" } else { ": " })]
pub struct Refusal {
    /// Why.
    pub code: RefusalCode,
    /// For `Busy`: how long to wait, in milliseconds.
    pub retry_after_ms: u32,
    /// A sentence for a person; may be empty.
    pub detail: String,
}

impl Refusal {
    /// A refusal with an explanation, which is cut at the limit.
    pub fn new(code: RefusalCode, detail: impl Into<String>) -> Self {
        let mut detail = detail.into();
        if detail.len() > REFUSAL_DETAIL_BYTES_MAX {
            let cut = (0..=REFUSAL_DETAIL_BYTES_MAX).rev().find(|&at| detail.is_char_boundary(at)).unwrap_or(0);
            detail.truncate(cut);
        }
        Self { code, retry_after_ms: 0, detail }
    }

    /// `Busy`, with a hint.
    pub fn busy(retry_after_ms: u32) -> Self {
        Self { code: RefusalCode::Busy, retry_after_ms, detail: String::new() }
    }

    /// As a message.
    pub fn to_message(&self) -> Refused {
        Refused { code: self.code as u16, retry_after_ms: self.retry_after_ms, detail: self.detail.clone() }
    }

    /// From a message; an unknown code, of a later node, reads as `NotSupported` with its number.
    pub fn from_message(message: &ArchivedRefused) -> Self {
        let number = message.code.to_native();
        let detail = message.detail.as_str();
        match RefusalCode::from_u16(number) {
            Some(code) => Self { retry_after_ms: message.retry_after_ms.to_native(), ..Self::new(code, detail) },
            None => Self::new(RefusalCode::NotSupported, format!("refusal {number}: {detail}")),
        }
    }
}

impl From<RefusalCode> for Refusal {
    fn from(code: RefusalCode) -> Self {
        Self { code, retry_after_ms: 0, detail: String::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_cut_at_a_character() {
        let refusal = Refusal::new(RefusalCode::Storage, "ä".repeat(REFUSAL_DETAIL_BYTES_MAX));
        assert_eq!(refusal.detail.len(), REFUSAL_DETAIL_BYTES_MAX);
        assert_eq!(Refusal::from(RefusalCode::Busy).to_string(), "busy");
        assert_eq!(Refusal::new(RefusalCode::InUse, "tag a").to_string(), "still referred to: tag a");
    }
}
