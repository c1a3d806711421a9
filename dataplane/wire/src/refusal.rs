use metanode_types::limits::REFUSAL_DETAIL_BYTES_MAX;

use crate::message::{ArchivedRefused, ArchivedTransactionRefused, Refused, TransactionRefused};

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

/// Why a transaction is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransactionRefusal {
    /// The bytes are none.
    #[error("not a transaction")]
    Malformed,
    /// Its payload is too large.
    #[error("its payload of {0} bytes is too large")]
    TooLarge(u64),
    /// The chain takes signed ones only.
    #[error("this chain takes no unsigned transactions")]
    Unsigned,
    /// The signature does not hold for this chain.
    #[error("the signature does not verify on this chain")]
    BadSignature,
    /// Only validators send this kind.
    #[error("only validators may send this kind of transaction")]
    NotAValidator,
    /// Its time is over.
    #[error("expired at height {0}")]
    Expired(u64),
    /// It would be kept for too long.
    #[error("expires at height {0}, later than the chain allows")]
    ExpiresTooLate(u64),
    /// Too much waits; later there is room.
    #[error("busy: too many transactions wait")]
    Full,
    /// This client's share is used up; later there is room.
    #[error("busy: this client's transactions that wait use up its share")]
    PeerFull,
    /// The account's share is used up; later there is room.
    #[error("busy: this account's transactions that wait use up its share")]
    AccountFull,
    /// The account has had this nonce.
    #[error("nonce {nonce} is used; the account's next is {next}")]
    NonceUsed {
        /// The transaction's.
        nonce: u64,
        /// The account's next.
        next: u64,
    },
    /// Too far ahead.
    #[error("nonce {nonce} is too far ahead; the account's next is {next}")]
    NonceTooHigh {
        /// The transaction's.
        nonce: u64,
        /// The account's next.
        next: u64,
    },
    /// It waits already.
    #[error("it waits already")]
    Known,
    /// Another one with its nonce waits.
    #[error("another transaction with this nonce waits; a fee of {0} would replace it")]
    FeeTooLow(u64),
    /// The application refuses it, with a code of its own.
    #[error("the application refuses it with code {0}")]
    Application(u16),
    /// This client may not send unsigned ones.
    #[error("this client may not send unsigned transactions")]
    NotPermitted,
    /// A reason that this program does not know.
    #[error("refused for reason {0}")]
    Other(u16),
}

impl TransactionRefusal {
    /// As a message.
    pub fn to_message(self, index: u32) -> TransactionRefused {
        let (code, number, other) = match self {
            Self::Malformed => (1, 0, 0),
            Self::TooLarge(bytes) => (2, bytes, 0),
            Self::Unsigned => (3, 0, 0),
            Self::BadSignature => (4, 0, 0),
            Self::NotAValidator => (5, 0, 0),
            Self::Expired(height) => (6, height, 0),
            Self::ExpiresTooLate(height) => (7, height, 0),
            Self::Full => (8, 0, 0),
            Self::PeerFull => (9, 0, 0),
            Self::AccountFull => (10, 0, 0),
            Self::NonceUsed { nonce, next } => (11, nonce, next),
            Self::NonceTooHigh { nonce, next } => (12, nonce, next),
            Self::Known => (13, 0, 0),
            Self::FeeTooLow(needed) => (14, needed, 0),
            Self::Application(code) => (15, code.into(), 0),
            Self::NotPermitted => (16, 0, 0),
            Self::Other(code) => (code, 0, 0),
        };
        TransactionRefused { index, code, number, other }
    }

    /// From a message.
    pub fn from_message(message: &ArchivedTransactionRefused) -> Self {
        let (number, other) = (message.number.to_native(), message.other.to_native());
        match message.code.to_native() {
            1 => Self::Malformed,
            2 => Self::TooLarge(number),
            3 => Self::Unsigned,
            4 => Self::BadSignature,
            5 => Self::NotAValidator,
            6 => Self::Expired(number),
            7 => Self::ExpiresTooLate(number),
            8 => Self::Full,
            9 => Self::PeerFull,
            10 => Self::AccountFull,
            11 => Self::NonceUsed { nonce: number, next: other },
            12 => Self::NonceTooHigh { nonce: number, next: other },
            13 => Self::Known,
            14 => Self::FeeTooLow(number),
            15 => Self::Application(u16::try_from(number).unwrap_or(u16::MAX)),
            16 => Self::NotPermitted,
            code => Self::Other(code),
        }
    }

    /// Whether it may be taken later, as it is.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Full | Self::PeerFull | Self::AccountFull)
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

    #[test]
    fn refusals_of_transactions_are_read_as_they_were_written() {
        for code in 1..=17 {
            let refused = TransactionRefused { index: 3, code, number: 5, other: 6 };
            let bytes = rkyv::to_bytes::<rkyv::rancor::Failure>(&refused).unwrap();
            let archived = rkyv::access::<ArchivedTransactionRefused, rkyv::rancor::Failure>(&bytes).unwrap();
            let refusal = TransactionRefusal::from_message(archived);
            let again = refusal.to_message(3);
            assert_eq!((again.index, again.code), (3, code), "{refusal}");
        }
    }
}
