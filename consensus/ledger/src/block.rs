//! What validators agree on.

use metanode_crypto::derive;
use metanode_ibft::{self as ibft, Certificate, Commit, Height, Round, Signed, VALIDATORS_MAX, View};
use metanode_types::{Hash, NodeKey};
use metanode_wire::cursor::Cursor;

use rkyv::{Archive, Deserialize, Serialize};

use crate::{DecodeError, tree};

/// Batches that one block may name: 16 MiB of transactions. More would not be executed in the time of a round.
pub const BATCHES_MAX: usize = 64;

/// The form of blocks that this program makes and takes.
pub(crate) const VERSION: u32 = 1;

/// What a block says. Its hash is the block's.
///
/// ```text
/// version 1 u32 | height u64 | time u64 | parent 32 | author 32 | batches root 32 | application hash 32 | results root 32 |
/// validators hash 32 | next validators hash 32
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub struct Header {
    /// Its place.
    pub height: Height,
    /// Milliseconds since 1970, by its author's clock, and above its parent's.
    pub time_ms: u64,
    /// Hash of the block before; of the first one, the chain's identity.
    pub parent: Hash,
    /// Who made it.
    pub author: NodeKey,
    /// Over the digests of its batches.
    pub batches_root: Hash,
    /// The state after executing height − lag.
    pub app_hash: Hash,
    /// Over the outcomes of the transactions of height − lag.
    pub results_root: Hash,
    /// Over the keys that vote on this block.
    pub validators_hash: Hash,
    /// Over the keys that vote on the next: with it, a client that trusts this block knows whom to trust for the next.
    pub next_validators_hash: Hash,
}

impl Header {
    const BYTES: usize = 4 + 8 + 8 + 7 * 32;

    /// Its encoding.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Self::BYTES);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.height.0.to_le_bytes());
        bytes.extend(self.time_ms.to_le_bytes());
        bytes.extend(self.parent.0);
        bytes.extend(self.author.0);
        for hash in
            [self.batches_root, self.app_hash, self.results_root, self.validators_hash, self.next_validators_hash]
        {
            bytes.extend(hash.0);
        }
        bytes
    }

    fn read(cursor: &mut Cursor<'_>) -> Result<Self, DecodeError> {
        if cursor.u32()? != VERSION {
            return Err(DecodeError::Unknown("version of a block"));
        }
        let (height, time_ms) = (Height(cursor.u64()?), cursor.u64()?);
        let (parent, author) = (Hash(cursor.array()?), NodeKey(cursor.array()?));
        let mut hash = || cursor.array().map(Hash);
        Ok(Self {
            height,
            time_ms,
            parent,
            author,
            batches_root: hash()?,
            app_hash: hash()?,
            results_root: hash()?,
            validators_hash: hash()?,
            next_validators_hash: hash()?,
        })
    }

    /// The hash of the block.
    pub fn hash(&self) -> Hash {
        Hash(derive("metanode 2026 block v1", &self.encode()))
    }
}

/// A header, and the batches that it stands for.
///
/// ```text
/// header | count u32 | digests 32 each
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub struct Block {
    /// What is agreed on.
    pub header: Header,
    /// At most [`BATCHES_MAX`], in the order of execution.
    pub batches: Vec<Hash>,
}

impl Block {
    /// The root over its batches, which its header has.
    pub fn batches_root(&self) -> Hash {
        batches_root(&self.batches)
    }

    /// Whether its batches are those of its header. Who makes a block from bytes sees to it: its hash names the header alone.
    pub fn is_whole(&self) -> bool {
        self.header.batches_root == self.batches_root()
    }

    /// Its encoding.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.header.encode();
        bytes.extend((self.batches.len() as u32).to_le_bytes());
        bytes.extend(self.batches.iter().flat_map(|digest| digest.0));
        bytes
    }

    /// Reads one; its header must be that of its batches.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        let header = Header::read(&mut cursor)?;
        let count = cursor.u32()? as usize;
        if count > BATCHES_MAX {
            return Err(DecodeError::TooMany("batches in a block"));
        }
        let batches = (0..count).map(|_| cursor.array().map(Hash)).collect::<Result<Vec<_>, _>>()?;
        end(&cursor)?;
        let block = Self { header, batches };
        if !block.is_whole() {
            return Err(DecodeError::Unknown("batches: they are not those of the header"));
        }
        Ok(block)
    }
}

fn end(cursor: &Cursor<'_>) -> Result<(), DecodeError> {
    match cursor.left() {
        0 => Ok(()),
        more => Err(DecodeError::Long(more)),
    }
}

/// The root over the digests of batches.
pub(crate) fn batches_root(batches: &[Hash]) -> Hash {
    tree::root(&batches.iter().map(|digest| tree::leaf(&digest.0)).collect::<Vec<_>>())
}

impl ibft::Block for Block {
    fn hash(&self) -> Hash {
        self.header.hash()
    }

    fn height(&self) -> Height {
        self.header.height
    }

    fn parent(&self) -> Hash {
        self.header.parent
    }

    fn author(&self) -> NodeKey {
        self.header.author
    }

    fn time_ms(&self) -> u64 {
        self.header.time_ms
    }

    fn size_bytes(&self) -> usize {
        Header::BYTES + 4 + 32 * self.batches.len()
    }
}

/// A certificate of finality as it is stored beside its block.
///
/// ```text
/// height u64 | round u32 | hash 32 | count u32 | (signer 32 | signature 64) each
/// ```
pub fn encode_certificate(certificate: &Certificate) -> Vec<u8> {
    let Certificate { view, hash, commits } = certificate;
    let mut bytes = Vec::with_capacity(8 + 4 + 32 + 4 + 96 * commits.len());
    bytes.extend(view.height.0.to_le_bytes());
    bytes.extend(view.round.0.to_le_bytes());
    bytes.extend(hash.0);
    bytes.extend((commits.len() as u32).to_le_bytes());
    for commit in commits {
        bytes.extend(commit.signer.0);
        bytes.extend(commit.signature);
    }
    bytes
}

/// Reads one. Whether it certifies anything is the validators' question.
pub fn decode_certificate(bytes: &[u8]) -> Result<Certificate, DecodeError> {
    let mut cursor = Cursor::new(bytes);
    let view = View { height: Height(cursor.u64()?), round: Round(cursor.u32()?) };
    let hash = Hash(cursor.array()?);
    let count = cursor.u32()? as usize;
    if count > VALIDATORS_MAX {
        return Err(DecodeError::TooMany("commits in a certificate"));
    }
    let mut commits = Vec::with_capacity(count);
    for _ in 0..count {
        let (signer, signature) = (NodeKey(cursor.array()?), cursor.array()?);
        commits.push(Signed { payload: Commit { view, hash }, signer, signature });
    }
    end(&cursor)?;
    Ok(Certificate { view, hash, commits })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> Block {
        let batches = vec![Hash([1; 32]), Hash([2; 32])];
        let header = Header {
            height: Height(3),
            time_ms: 4,
            parent: Hash([5; 32]),
            author: NodeKey([6; 32]),
            batches_root: batches_root(&batches),
            app_hash: Hash([7; 32]),
            results_root: Hash([8; 32]),
            validators_hash: Hash([9; 32]),
            next_validators_hash: Hash([10; 32]),
        };
        Block { header, batches }
    }

    /// A chain must mean the same in later versions.
    #[test]
    fn golden_bytes() {
        let block = block();
        let bytes = block.encode();
        assert_eq!(bytes.len(), ibft::Block::size_bytes(&block));
        assert_eq!(bytes[..20], [1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        let firsts = [20, 52, 116, 148, 180, 212].map(|at| bytes[at]);
        assert_eq!(firsts, [5, 6, 7, 8, 9, 10]);
        assert_eq!(bytes[244..248], [2, 0, 0, 0]);
        assert_eq!(block.header.hash().to_string(), "149d32389aae5e69ec0c94c9e38c71299d3b0e33a7150d1204c313a62a7bed11");
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let bytes = block().encode();
        assert_eq!(Block::decode(&bytes), Ok(block()));
        for length in 0..bytes.len() {
            assert!(Block::decode(&bytes[..length]).is_err());
        }
        assert_eq!(Block::decode(&[&bytes[..], &[0]].concat()), Err(DecodeError::Long(1)));
        for byte in [0, 84, 250, bytes.len() - 1] {
            let mut bent = bytes.clone();
            bent[byte] ^= 1;
            assert!(Block::decode(&bent).is_err(), "{byte}");
        }
    }

    /// Clause 6: neither round nor seals are in the hash.
    #[test]
    fn a_certificate_lies_beside_its_block() {
        let view = View { height: Height(3), round: Round(1) };
        let hash = block().header.hash();
        let commit =
            |byte| Signed { payload: Commit { view, hash }, signer: NodeKey([byte; 32]), signature: [byte; 64] };
        let certificate = Certificate { view, hash, commits: vec![commit(1), commit(2), commit(3)] };
        let bytes = encode_certificate(&certificate);
        assert_eq!(decode_certificate(&bytes), Ok(certificate));
        for length in 0..bytes.len() {
            assert!(decode_certificate(&bytes[..length]).is_err());
        }
        assert_eq!(decode_certificate(&[&bytes[..], &[0]].concat()), Err(DecodeError::Long(1)));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = (Block::decode(&bytes), decode_certificate(&bytes));
        }
    }
}
