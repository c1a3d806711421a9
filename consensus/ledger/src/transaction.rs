//! What somebody wants to happen.

use metanode_crypto::{Claim, derive, keyed};
use metanode_ibft::{ChainId, Height};
use metanode_types::NodeKey;
use metanode_wire::cursor::Cursor;

use crate::DecodeError;

/// Bytes of a payload at most: a page, not a file. Files are blobs, and transactions name them.
pub const PAYLOAD_BYTES_MAX: usize = 64 << 10;

/// Separates signatures of transactions from all others; the version of the encoding is in it.
pub const TRANSACTION_DOMAIN: &str = "metanode transaction v1";

/// Bytes in front of the payload of a signed transaction, and behind it.
const HEAD_BYTES: usize = 1 + 32 + 8 + 8 + 8 + 4;
const SIGNATURE_BYTES: usize = 64;

/// Who executes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// The application.
    Application = 0,
    /// The ledger: a vote on the set of validators, or a rotated key.
    Validators = 1,
    /// The ledger: proof that a validator has signed two things that exclude each other.
    Evidence = 2,
    /// Nobody: it is ordered and kept. Unsigned, and only on chains whose genesis allows it.
    Opaque = 3,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [Self::Application, Self::Validators, Self::Evidence, Self::Opaque].into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// A transaction, read in place.
///
/// ```text
/// kind u8 | account 32 | nonce u64 | fee u64 | expiry u64 | payload length u32 | payload | signature 64
/// opaque:   3 u8 | payload length u32 | payload
/// ```
///
/// Signed is the chain's identity, followed by everything before the signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transaction<'a> {
    /// Who executes it.
    pub kind: Kind,
    /// Whose it is; it signs. Zeros in an opaque one.
    pub account: NodeKey,
    /// How many the account has had before.
    pub nonce: u64,
    /// What the account pays for it, by the application's rules.
    pub fee: u64,
    /// The last height at which it may be executed.
    pub expiry: Height,
    /// What is to happen.
    pub payload: &'a [u8],
    /// By the account; `None` of an opaque one.
    pub signature: Option<&'a [u8; 64]>,
    /// All of it, and how much of that is signed.
    bytes: &'a [u8],
    signed_bytes: usize,
}

/// Names a transaction on all chains: a hash of what is signed. Another signature over the same is no other transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TransactionId(pub [u8; 32]);

impl std::fmt::Display for TransactionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        metanode_types::Hash(self.0).fmt(f)
    }
}

/// Names transactions of one chain.
///
/// ```text
/// key  = BLAKE3 derive_key("metanode 2026 transaction id v1", chain 32)
/// name = BLAKE3 keyed with it, of what is signed of the transaction
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Names([u8; 32]);

impl Names {
    /// Of this chain.
    pub fn of(chain: &ChainId) -> Self {
        Self(derive("metanode 2026 transaction id v1", &chain.0))
    }

    /// A transaction's name.
    pub fn name(&self, transaction: &Transaction<'_>) -> TransactionId {
        TransactionId(keyed(&self.0, &transaction.bytes[..transaction.signed_bytes]).0)
    }
}

/// Why bytes are no transaction that may be executed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TransactionError {
    /// They are none.
    #[error("not a transaction: {0}")]
    Malformed(#[from] DecodeError),
    /// The payload is larger than [`PAYLOAD_BYTES_MAX`].
    #[error("a payload of {0} bytes; at most {PAYLOAD_BYTES_MAX} are allowed")]
    TooLarge(usize),
    /// This chain takes only signed ones.
    #[error("this chain takes no unsigned transactions")]
    Unsigned,
    /// The signature is not the account's for this chain.
    #[error("the signature does not verify on this chain")]
    BadSignature,
    /// The ledger's own transactions are for validators.
    #[error("only validators may send this kind of transaction")]
    NotAValidator,
    /// It can't be executed any more.
    #[error("expired at height {}", .0.0)]
    Expired(Height),
    /// It would be kept for longer than the chain allows.
    #[error("expires at height {}, later than the chain allows", .0.0)]
    ExpiresTooLate(Height),
}

impl<'a> Transaction<'a> {
    /// Reads one from the front; what is left is behind it.
    pub fn decode_first(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), TransactionError> {
        let mut cursor = Cursor::new(bytes);
        let kind = cursor.u8().map_err(DecodeError::from)?;
        let kind = Kind::from_byte(kind).ok_or(DecodeError::Unknown("kind of transaction"))?;
        let mut rest = || -> Result<Self, DecodeError> {
            let mut account = NodeKey([0; 32]);
            let (mut nonce, mut fee, mut expiry) = (0, 0, u64::MAX);
            if kind != Kind::Opaque {
                account = NodeKey(cursor.array()?);
                (nonce, fee, expiry) = (cursor.u64()?, cursor.u64()?, cursor.u64()?);
            }
            let length = cursor.u32()? as usize;
            let payload = cursor.take(length)?;
            let signed_bytes = if kind == Kind::Opaque { 5 } else { HEAD_BYTES } + length;
            let signature = match kind {
                Kind::Opaque => None,
                _ => Some(cursor.take(SIGNATURE_BYTES)?.try_into().expect("it has 64 bytes")),
            };
            let whole = signed_bytes + signature.map_or(0, |_| SIGNATURE_BYTES);
            let expiry = Height(expiry);
            Ok(Self { kind, account, nonce, fee, expiry, payload, signature, bytes: &bytes[..whole], signed_bytes })
        };
        let this = rest()?;
        if this.payload.len() > PAYLOAD_BYTES_MAX {
            return Err(TransactionError::TooLarge(this.payload.len()));
        }
        Ok((this, &bytes[this.bytes.len()..]))
    }

    /// Reads one, and nothing behind it.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, TransactionError> {
        match Self::decode_first(bytes)? {
            (this, []) => Ok(this),
            (_, rest) => Err(DecodeError::Long(rest.len()).into()),
        }
    }

    /// Its encoding.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// What is signed, behind [`TRANSACTION_DOMAIN`].
    pub fn signed_message(&self, chain: &ChainId) -> Vec<u8> {
        [&chain.0, &self.bytes[..self.signed_bytes]].concat()
    }

    /// Its name.
    pub fn id(&self, chain: &ChainId) -> TransactionId {
        Names::of(chain).name(self)
    }

    /// Whether its account has signed it for this chain; an opaque one has nothing to check.
    pub fn is_signed(&self, chain: &ChainId) -> bool {
        let message = self.signed_message(chain);
        self.signature.is_none_or(|signature| {
            Claim { signer: self.account, domain: TRANSACTION_DOMAIN, message: &message, signature }.holds()
        })
    }
}

/// A transaction to be signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransactionDraft<'a> {
    /// Not opaque.
    pub kind: Kind,
    /// Whose.
    pub account: NodeKey,
    /// See [`Transaction`].
    pub nonce: u64,
    /// See [`Transaction`].
    pub fee: u64,
    /// See [`Transaction`].
    pub expiry: Height,
    /// At most [`PAYLOAD_BYTES_MAX`].
    pub payload: &'a [u8],
}

impl TransactionDraft<'_> {
    /// The encoding, with the signature that `sign` makes over a domain and a message.
    pub fn encode<E>(
        &self,
        chain: &ChainId,
        sign: impl FnOnce(&str, &[u8]) -> Result<[u8; 64], E>,
    ) -> Result<Vec<u8>, E> {
        assert!(self.payload.len() <= PAYLOAD_BYTES_MAX && self.kind != Kind::Opaque, "the caller keeps the limits");
        let mut bytes = Vec::with_capacity(HEAD_BYTES + self.payload.len() + SIGNATURE_BYTES);
        bytes.push(self.kind as u8);
        bytes.extend(self.account.0);
        bytes.extend(self.nonce.to_le_bytes());
        bytes.extend(self.fee.to_le_bytes());
        bytes.extend(self.expiry.0.to_le_bytes());
        bytes.extend((self.payload.len() as u32).to_le_bytes());
        bytes.extend(self.payload);
        let signature = sign(TRANSACTION_DOMAIN, &[&chain.0, &bytes[..]].concat())?;
        bytes.extend(signature);
        Ok(bytes)
    }

    /// The encoding of an opaque one.
    pub fn encode_opaque(payload: &[u8]) -> Vec<u8> {
        assert!(payload.len() <= PAYLOAD_BYTES_MAX, "the caller keeps the limits");
        [&[Kind::Opaque as u8], &(payload.len() as u32).to_le_bytes()[..], payload].concat()
    }
}

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It was executed; what the application answers.
    Done(Answer),
    /// It was tried and changed nothing but its account's nonce and fee.
    Failed(Code),
    /// It was not tried: nothing was consumed, and it may come again.
    Skipped(Code),
}

/// What a transaction that was executed has to say: 32 bytes whose meaning is its executor's, zeros when there is nothing. A value that was
/// read, say, by its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Answer(pub [u8; 32]);

/// Why not. Numbers below 256 are the ledger's; the application has the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Code(pub u16);

impl Code {
    /// Behind its last height.
    pub const EXPIRED: Self = Self(1);
    /// The account is not there yet.
    pub const NONCE_TOO_HIGH: Self = Self(2);
    /// The account has had this one: it was executed before, or another in its place.
    pub const NONCE_USED: Self = Self(3);
    /// A payload that its executor can't read.
    pub const MALFORMED: Self = Self(4);
    /// A vote or rotation by somebody who is no validator.
    pub const NOT_A_VALIDATOR: Self = Self(5);
    /// A vote that changes nothing: the key is there already, is not there, or would leave nobody.
    pub const NO_CHANGE: Self = Self(6);
    /// A key whose holder has not signed for it.
    pub const NO_PROOF_OF_KEY: Self = Self(7);
    /// Evidence that proves nothing here.
    pub const NO_EVIDENCE: Self = Self(8);
    /// The same vote or evidence is on the chain already.
    pub const KNOWN: Self = Self(9);
    /// Its sender has sent too many of the ledger's transactions, or has too many open votes.
    pub const TOO_MANY: Self = Self(10);
    /// One of the ledger's that would have to be remembered for too long.
    pub const EXPIRES_TOO_LATE: Self = Self(11);
    /// The key has taken another's place not long ago.
    pub const TOO_SOON: Self = Self(12);
    /// The first that is the application's.
    pub const APPLICATION: Self = Self(256);
}

impl Outcome {
    /// Bytes of it alone: 0 done, 1 failed, 2 skipped u8 | code u16 | answer 32.
    pub const BARE_BYTES: usize = 1 + 2 + 32;

    /// Bytes of an [encoding](Self::encode).
    pub const BYTES: usize = 32 + Self::BARE_BYTES;

    /// It was executed, and has nothing to say.
    pub const DONE: Self = Self::Done(Answer([0; 32]));

    /// Of which transaction it is follows from its place.
    pub fn encode_bare(&self) -> [u8; Self::BARE_BYTES] {
        let (status, code, answer) = match self {
            Self::Done(answer) => (0, Code(0), *answer),
            Self::Failed(code) => (1, *code, Answer::default()),
            Self::Skipped(code) => (2, *code, Answer::default()),
        };
        let mut bytes = [0; Self::BARE_BYTES];
        bytes[0] = status;
        bytes[1..3].copy_from_slice(&code.0.to_le_bytes());
        bytes[3..].copy_from_slice(&answer.0);
        bytes
    }

    /// Reads one.
    pub fn decode_bare(bytes: &[u8; Self::BARE_BYTES]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let status = cursor.u8()?;
        let (code, answer) = (Code(cursor.u16()?), Answer(cursor.array()?));
        match status {
            0 => Ok(Self::Done(answer)),
            1 => Ok(Self::Failed(code)),
            2 => Ok(Self::Skipped(code)),
            _ => Err(DecodeError::Unknown("status of a result")),
        }
    }

    /// A leaf of the results' tree: id 32, and the outcome.
    pub fn encode(&self, id: &TransactionId) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..32].copy_from_slice(&id.0);
        bytes[32..].copy_from_slice(&self.encode_bare());
        bytes
    }

    /// Reads one.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<(TransactionId, Self), DecodeError> {
        let mut cursor = Cursor::new(bytes);
        Ok((TransactionId(cursor.array()?), Self::decode_bare(&cursor.array()?)?))
    }
}

#[cfg(test)]
mod tests {
    use metanode_crypto::Identity;

    use super::*;

    const CHAIN: ChainId = ChainId([7; 32]);

    fn transfer() -> Vec<u8> {
        let signer = Identity::from_seed(&[1; 32]);
        let draft = TransactionDraft {
            kind: Kind::Application,
            account: signer.public(),
            nonce: 5,
            fee: 6,
            expiry: Height(7),
            payload: b"pay",
        };
        draft.encode(&CHAIN, |domain, message| Ok::<_, ()>(signer.sign(domain, message))).unwrap()
    }

    /// What is signed must mean the same in later versions.
    #[test]
    fn golden_bytes() {
        let bytes = transfer();
        let numbers = [&[5, 0, 0, 0, 0, 0, 0, 0][..], &[6, 0, 0, 0, 0, 0, 0, 0], &[7, 0, 0, 0, 0, 0, 0, 0]].concat();
        assert_eq!((bytes[0], &bytes[33..57], &bytes[57..64]), (0, &numbers[..], &b"\x03\0\0\0pay"[..]));
        assert_eq!(bytes.len(), 64 + 64);
        let transaction = Transaction::decode(&bytes).unwrap();
        assert_eq!(transaction.signed_message(&CHAIN), [&CHAIN.0[..], &bytes[..64]].concat());
        assert_eq!(
            transaction.id(&CHAIN).to_string(),
            "1db6bf317403bfc76db204386f88d18fb92fb832bcd5d7c08daa2e3cff7ed081"
        );
        let opaque = TransactionDraft::encode_opaque(b"abc");
        assert_eq!(opaque, *b"\x03\x03\0\0\0abc");
        let failed = Outcome::Failed(Code(0x0201)).encode(&TransactionId([9; 32]));
        assert_eq!((&failed[31..36], failed.len()), (&[9, 1, 1, 2, 0][..], 67));
        let done = Outcome::Done(Answer([7; 32])).encode(&TransactionId([9; 32]));
        assert_eq!(done[31..36], [9, 0, 0, 0, 7]);
        for bytes in [failed, done] {
            let (id, outcome) = Outcome::decode(&bytes).unwrap();
            assert_eq!(outcome.encode(&id), bytes);
        }
    }

    #[test]
    fn what_was_signed_is_checked() {
        let bytes = transfer();
        let transaction = Transaction::decode(&bytes).unwrap();
        assert!(transaction.is_signed(&CHAIN));
        assert!(!transaction.is_signed(&ChainId([8; 32])), "another chain");
        for byte in 0..bytes.len() {
            let mut bent = bytes.clone();
            bent[byte] ^= 1;
            let holds = Transaction::decode(&bent).is_ok_and(|bent| bent.is_signed(&CHAIN));
            assert!(!holds, "{byte}");
        }
        let opaque = TransactionDraft::encode_opaque(b"abc");
        assert!(Transaction::decode(&opaque).unwrap().is_signed(&CHAIN));
    }

    /// Whoever signs again has not made another transaction.
    #[test]
    fn the_signature_is_not_part_of_the_name() {
        let mut bytes = transfer();
        let id = Transaction::decode(&bytes).unwrap().id(&CHAIN);
        *bytes.last_mut().unwrap() ^= 1;
        assert_eq!(Transaction::decode(&bytes).unwrap().id(&CHAIN), id);
        bytes[33] ^= 1;
        assert_ne!(Transaction::decode(&bytes).unwrap().id(&CHAIN), id);
    }

    #[test]
    fn bytes_that_are_none() {
        let bytes = transfer();
        for length in 0..bytes.len() {
            assert!(Transaction::decode(&bytes[..length]).is_err(), "{length}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(Transaction::decode(&longer), Err(DecodeError::Long(1).into()));
        assert_eq!(Transaction::decode_first(&longer).unwrap().1, [0]);
        let mut other = bytes.clone();
        other[0] = 9;
        assert_eq!(Transaction::decode(&other), Err(DecodeError::Unknown("kind of transaction").into()));
        let huge =
            [&[3u8][..], &(PAYLOAD_BYTES_MAX as u32 + 1).to_le_bytes(), &vec![0; PAYLOAD_BYTES_MAX + 1]].concat();
        assert_eq!(Transaction::decode(&huge), Err(TransactionError::TooLarge(PAYLOAD_BYTES_MAX + 1)));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived_and_what_is_read_is_what_was_written(bytes: Vec<u8>) {
            if let Ok(transaction) = Transaction::decode(&bytes) {
                assert_eq!(transaction.bytes(), bytes);
            }
        }
    }
}
