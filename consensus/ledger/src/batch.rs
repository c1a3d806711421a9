//! Transactions that one validator has taken in.

use bytes::Bytes;
use metanode_crypto::{Claim, hash};
use metanode_ibft::{ChainId, Height};
use metanode_types::{Hash, NodeKey};
use metanode_wire::cursor::Cursor;

use crate::{
    DecodeError,
    transaction::{Transaction, TransactionError},
};

/// Bytes of a batch at most: it is a blob of one chunk, hashed once, and travels in one frame.
pub const BATCH_BYTES_MAX: usize = metanode_types::limits::CHUNK_BYTES;

/// Transactions in one: what fits of the usual ones of some 200 bytes, several times over; of tiny opaque ones fewer than would fit.
pub const BATCH_TRANSACTIONS_MAX: usize = 8192;

/// Separates signatures over batches from all others.
const DOMAIN: &str = "metanode batch v1";
const VERSION: u8 = 1;
const HEAD_BYTES: usize = 1 + 32 + 8 + 8 + 4;
const SIGNATURE_BYTES: usize = 64;

/// A batch that was read; whether its author has signed it, and each account its transaction, is asked separately.
///
/// ```text
/// version 1 u8 | author 32 | number u64 | expiry u64 | count u32 | transactions | signature 64
/// ```
///
/// Signed is the chain's identity and the BLAKE3 of everything before the signature. Its digest is the BLAKE3 of all of it, which is the
/// address of the blob that it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    bytes: Bytes,
    digest: Hash,
    author: NodeKey,
    number: u64,
    expiry: Height,
    /// Where each transaction begins, and where the last one ends.
    places: Vec<u32>,
}

/// Why bytes are no batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Larger than [`BATCH_BYTES_MAX`].
    #[error("a batch of {0} bytes; at most {BATCH_BYTES_MAX} are allowed")]
    TooLarge(usize),
    /// They are none.
    #[error("not a batch: {0}")]
    Malformed(#[from] DecodeError),
    /// One of its transactions is none.
    #[error("transaction {0} of the batch: {1}")]
    Transaction(usize, TransactionError),
}

impl Batch {
    /// Reads one.
    pub fn decode(bytes: Bytes) -> Result<Self, BatchError> {
        if bytes.len() > BATCH_BYTES_MAX {
            return Err(BatchError::TooLarge(bytes.len()));
        }
        let mut cursor = Cursor::new(&bytes);
        let mut head = || -> Result<_, DecodeError> {
            match cursor.u8()? {
                VERSION => Ok((NodeKey(cursor.array()?), cursor.u64()?, cursor.u64()?, cursor.u32()? as usize)),
                _ => Err(DecodeError::Unknown("version of a batch")),
            }
        };
        let (author, number, expiry, count) = head()?;
        if count > BATCH_TRANSACTIONS_MAX {
            return Err(DecodeError::TooMany("transactions in a batch").into());
        }
        let mut places = Vec::with_capacity(count + 1);
        let mut rest = &bytes[HEAD_BYTES..];
        for index in 0..count {
            places.push((bytes.len() - rest.len()) as u32);
            let (_, behind) = Transaction::decode_first(rest).map_err(|error| BatchError::Transaction(index, error))?;
            rest = behind;
        }
        places.push((bytes.len() - rest.len()) as u32);
        match rest.len().checked_sub(SIGNATURE_BYTES) {
            Some(0) => {}
            Some(more) => return Err(DecodeError::Long(more).into()),
            None => return Err(DecodeError::Short.into()),
        }
        let digest = hash(&bytes);
        Ok(Self { digest, author, number, expiry: Height(expiry), places, bytes })
    }

    /// Its encoding.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Its name, and its address as a blob.
    pub fn digest(&self) -> Hash {
        self.digest
    }

    /// The validator that has taken its transactions in, and answers for their signatures.
    pub fn author(&self) -> NodeKey {
        self.author
    }

    /// Its author's, who counts up: never the same twice, and not without gaps.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The last height whose block may name it.
    pub fn expiry(&self) -> Height {
        self.expiry
    }

    /// Number of its transactions.
    pub fn count(&self) -> usize {
        self.places.len() - 1
    }

    /// Its transactions, in their order.
    pub fn transactions(&self) -> impl Iterator<Item = Transaction<'_>> {
        self.places.windows(2).map(|place| {
            let bytes = &self.bytes[place[0] as usize..place[1] as usize];
            Transaction::decode(bytes).expect("it was read before")
        })
    }

    /// Whether its author has signed it for this chain.
    pub fn is_signed(&self, chain: &ChainId) -> bool {
        let (body, signature) = self.bytes.split_at(self.bytes.len() - SIGNATURE_BYTES);
        let message = signed_message(chain, body);
        let signature = signature.try_into().expect("it has 64 bytes");
        Claim { signer: self.author, domain: DOMAIN, message: &message, signature }.holds()
    }
}

fn signed_message(chain: &ChainId, body: &[u8]) -> [u8; 64] {
    let mut message = [0; 64];
    message[..32].copy_from_slice(&chain.0);
    message[32..].copy_from_slice(&hash(body).0);
    message
}

/// A batch in the making.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchDraft {
    bytes: Vec<u8>,
    count: usize,
}

impl BatchDraft {
    /// An empty one.
    pub fn new(author: NodeKey, number: u64, expiry: Height) -> Self {
        let mut bytes = vec![VERSION];
        bytes.extend(author.0);
        bytes.extend(number.to_le_bytes());
        bytes.extend(expiry.0.to_le_bytes());
        bytes.extend([0; 4]);
        Self { bytes, count: 0 }
    }

    /// Number of transactions in it.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Appends a transaction; `false` when it does not fit any more.
    pub fn push(&mut self, transaction: &Transaction<'_>) -> bool {
        let bytes = self.bytes.len() + transaction.bytes().len() + SIGNATURE_BYTES;
        if bytes > BATCH_BYTES_MAX || self.count == BATCH_TRANSACTIONS_MAX {
            return false;
        }
        self.bytes.extend(transaction.bytes());
        self.count += 1;
        true
    }

    /// The batch, with the signature that `sign` makes over a domain and a message.
    pub fn finish<E>(
        mut self,
        chain: &ChainId,
        sign: impl FnOnce(&str, &[u8]) -> Result<[u8; 64], E>,
    ) -> Result<Batch, E> {
        self.bytes[HEAD_BYTES - 4..HEAD_BYTES].copy_from_slice(&(self.count as u32).to_le_bytes());
        let signature = sign(DOMAIN, &signed_message(chain, &self.bytes))?;
        self.bytes.extend(signature);
        Ok(Batch::decode(self.bytes.into()).expect("it was made by these rules"))
    }
}

#[cfg(test)]
mod tests {
    use metanode_crypto::Identity;

    use super::*;
    use crate::transaction::TransactionDraft;

    const CHAIN: ChainId = ChainId([7; 32]);

    fn batch(payloads: &[&[u8]]) -> Batch {
        let author = Identity::from_seed(&[1; 32]);
        let mut draft = BatchDraft::new(author.public(), 3, Height(9));
        for payload in payloads {
            assert!(draft.push(&Transaction::decode(&TransactionDraft::encode_opaque(payload)).unwrap()));
        }
        draft.finish(&CHAIN, |domain, message| Ok::<_, ()>(author.sign(domain, message))).unwrap()
    }

    #[test]
    fn what_was_put_in_comes_out() {
        let made = batch(&[b"one", b"", b"three"]);
        let read = Batch::decode(made.bytes().clone()).unwrap();
        assert_eq!(read, made);
        assert_eq!((read.number(), read.expiry(), read.count()), (3, Height(9), 3));
        assert_eq!(read.transactions().map(|it| it.payload).collect::<Vec<_>>(), [&b"one"[..], b"", b"three"]);
        assert_eq!(read.digest(), hash(read.bytes()));
        assert!(read.is_signed(&CHAIN) && !read.is_signed(&ChainId([8; 32])));
        assert_eq!(batch(&[]).count(), 0);
    }

    #[test]
    fn bent_and_cut_ones_are_refused_or_not_signed() {
        let bytes = batch(&[b"one", b"two"]).bytes().to_vec();
        for byte in 0..bytes.len() {
            let mut bent = bytes.clone();
            bent[byte] ^= 1;
            assert!(!Batch::decode(bent.into()).is_ok_and(|bent| bent.is_signed(&CHAIN)), "{byte}");
            assert!(Batch::decode(bytes[..byte].to_vec().into()).is_err(), "{byte}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(Batch::decode(longer.into()), Err(DecodeError::Long(1).into()));
        let too_large = Batch::decode(vec![1; BATCH_BYTES_MAX + 1].into());
        assert_eq!(too_large, Err(BatchError::TooLarge(BATCH_BYTES_MAX + 1)));
    }

    #[test]
    fn a_full_one_takes_no_more() {
        let author = Identity::from_seed(&[1; 32]);
        for (payload, most) in [(vec![0; 60_000], 4), (vec![], BATCH_TRANSACTIONS_MAX)] {
            let opaque = TransactionDraft::encode_opaque(&payload);
            let transaction = Transaction::decode(&opaque).unwrap();
            let mut draft = BatchDraft::new(author.public(), 0, Height(1));
            while draft.push(&transaction) {}
            assert_eq!(draft.count(), most);
            let made = draft.finish(&CHAIN, |domain, message| Ok::<_, ()>(author.sign(domain, message))).unwrap();
            assert!(made.bytes().len() <= BATCH_BYTES_MAX);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = Batch::decode(bytes.into());
        }
    }
}
