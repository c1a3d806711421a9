//! Validators' messages, and what their sign state holds, as rkyv archives: the only door from bytes to them.
//!
//! An archive is a transport form. What is signed is the canonical encoding of `metanode-ibft` and `metanode-ledger`, never the archive; so
//! bytes that were bent on their way, and still are an archive, carry signatures that do not hold. What is checked here is that they are an
//! archive (bytecheck), of no more than [`MESSAGE_BYTES_MAX`], with no more signatures than there can be validators and no more batches than
//! a block can name; and that a block's batches are those of its header. The last is what makes its hash its name: otherwise one validator
//! could send the right header with wrong batches, and others would take a good block for a bad one.

use metanode_ibft::{Certificate, Justification, Message, Record, VALIDATORS_MAX};
use metanode_ledger::{BATCHES_MAX, Block};
use rkyv::{rancor::Failure, util::AlignedVec};

/// Bytes of a message at most: a proposal of a later round by one of [`VALIDATORS_MAX`] validators, twice over. It fits the head of a frame.
pub const MESSAGE_BYTES_MAX: usize = metanode_types::limits::FRAME_HEAD_BYTES_MAX;

/// Why bytes are no message or record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// More than [`MESSAGE_BYTES_MAX`].
    #[error("{0} bytes; a message has at most {MESSAGE_BYTES_MAX}")]
    TooLarge(usize),
    /// No archive of one.
    #[error("not an archive of a message")]
    Malformed,
    /// A block whose batches are not those of its header.
    #[error("the batches are not those of the block's header")]
    NotWhole,
    /// More signatures than validators, or more batches than a block names.
    #[error("too many {0}")]
    TooMany(&'static str),
}

/// A message as it travels.
pub fn encode_message(message: &Message<Block>) -> Vec<u8> {
    rkyv::to_bytes::<Failure>(message).expect("plain data always serializes into memory").into_vec()
}

/// Reads one.
pub fn decode_message(bytes: &[u8]) -> Result<Message<Block>, CodecError> {
    let message = rkyv::from_bytes::<Message<Block>, Failure>(&aligned(bytes)?).map_err(|_| CodecError::Malformed)?;
    check(&message)?;
    Ok(message)
}

/// A record as the sign state holds it.
pub fn encode_record(record: &Record<Block>) -> Vec<u8> {
    rkyv::to_bytes::<Failure>(record).expect("plain data always serializes into memory").into_vec()
}

/// Reads one. Its checksum has been checked; that it is a record has not.
pub fn decode_record(bytes: &[u8]) -> Result<Record<Block>, CodecError> {
    rkyv::from_bytes::<Record<Block>, Failure>(&aligned(bytes)?).map_err(|_| CodecError::Malformed)
}

/// Archives are read at a boundary of 16 bytes.
fn aligned(bytes: &[u8]) -> Result<AlignedVec<16>, CodecError> {
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(CodecError::TooLarge(bytes.len()));
    }
    let mut aligned = AlignedVec::with_capacity(bytes.len());
    aligned.extend_from_slice(bytes);
    Ok(aligned)
}

fn check(message: &Message<Block>) -> Result<(), CodecError> {
    let signatures = |count: usize| at_most(count, VALIDATORS_MAX, "signatures");
    let block = |block: &Block| {
        at_most(block.batches.len(), BATCHES_MAX, "batches")?;
        if block.is_whole() { Ok(()) } else { Err(CodecError::NotWhole) }
    };
    match message {
        Message::Proposal(proposal) => {
            let Justification { round_changes, prepares } = &proposal.justification;
            signatures(round_changes.len())?;
            signatures(prepares.len())?;
            block(&proposal.block)
        }
        Message::Prepare(_) | Message::Commit(_) => Ok(()),
        Message::RoundChange(asked) => {
            signatures(asked.prepares.len())?;
            asked.block.as_ref().map_or(Ok(()), block)
        }
        Message::NewBlock(decided) => {
            let Certificate { commits, .. } = &decided.1;
            signatures(commits.len())?;
            block(&decided.0)
        }
    }
}

fn at_most(count: usize, most: usize, what: &'static str) -> Result<(), CodecError> {
    if count <= most { Ok(()) } else { Err(CodecError::TooMany(what)) }
}

#[cfg(test)]
mod tests {
    use metanode_crypto::hash;
    use metanode_ibft::{
        Commit, Height, Prepare, Prepared, Proposal, ProposalMessage, Round, RoundChange, RoundChangeMessage, Signed,
        View,
    };
    use metanode_ledger::Header;
    use metanode_types::{Hash, NodeKey};

    use super::*;

    const VIEW: View = View { height: Height(3), round: Round(2) };

    fn signed<P>(payload: P, by: u8) -> Signed<P> {
        Signed { payload, signer: NodeKey([by; 32]), signature: [by; 64] }
    }

    fn block(batches: usize) -> Block {
        let header = Header {
            height: Height(3),
            time_ms: 4,
            parent: Hash([5; 32]),
            author: NodeKey([6; 32]),
            batches_root: Hash([7; 32]),
            app_hash: Hash([8; 32]),
            results_root: Hash([9; 32]),
            validators_hash: Hash([10; 32]),
            next_validators_hash: Hash([11; 32]),
        };
        let mut block = Block { header, batches: (0..batches).map(|number| hash(&[number as u8])).collect() };
        block.header.batches_root = block.batches_root();
        block
    }

    /// Of each kind, as large as it gets with so many validators.
    fn messages(validators: usize, batches: usize) -> Vec<Message<Block>> {
        let hash = Hash([1; 32]);
        let prepare = Prepare { view: VIEW, hash };
        let change = RoundChange { view: VIEW, prepared: Some((Round(1), hash)) };
        let prepares: Vec<_> = (0..validators).map(|by| signed(prepare, by as u8)).collect();
        let commits = (0..validators).map(|by| signed(Commit { view: VIEW, hash }, by as u8)).collect();
        let round_changes = (0..validators).map(|by| signed(change, by as u8)).collect();
        vec![
            Message::Proposal(Box::new(ProposalMessage {
                signed: signed(Proposal { view: VIEW, hash }, 1),
                block: block(batches),
                justification: Justification { round_changes, prepares: prepares.clone() },
            })),
            Message::Prepare(signed(prepare, 1)),
            Message::Commit(signed(Commit { view: VIEW, hash }, 1)),
            Message::RoundChange(Box::new(RoundChangeMessage {
                signed: signed(change, 1),
                block: Some(block(batches)),
                prepares: prepares.clone(),
            })),
            Message::NewBlock(Box::new((block(batches), Certificate { view: VIEW, hash, commits }))),
        ]
    }

    #[test]
    fn what_was_written_is_read_and_the_largest_fits() {
        for message in messages(VALIDATORS_MAX, BATCHES_MAX).into_iter().chain(messages(0, 0)) {
            let bytes = encode_message(&message);
            assert!(bytes.len() <= MESSAGE_BYTES_MAX, "{}", bytes.len());
            assert_eq!(decode_message(&bytes), Ok(message.clone()));
            let mut records = vec![Record::Cast(message.clone())];
            if let Message::Proposal(proposal) = message {
                let prepares = proposal.justification.prepares.clone();
                records.push(Record::Block(proposal.block.clone()));
                records.push(Record::Prepared(Prepared { view: VIEW, block: proposal.block, prepares }));
                records.push(Record::Round(VIEW));
            }
            for record in records {
                assert_eq!(decode_record(&encode_record(&record)), Ok(record));
            }
        }
    }

    #[test]
    fn more_than_there_can_be_is_refused() {
        for message in messages(VALIDATORS_MAX + 1, 1) {
            let refused = decode_message(&encode_message(&message));
            let is_small = matches!(message, Message::Prepare(_) | Message::Commit(_));
            assert_eq!(refused.is_ok(), is_small, "{refused:?}");
        }
        let many = &messages(1, BATCHES_MAX + 1)[0];
        assert_eq!(decode_message(&encode_message(many)), Err(CodecError::TooMany("batches")));
        let long = vec![0; MESSAGE_BYTES_MAX + 1];
        assert_eq!(decode_message(&long), Err(CodecError::TooLarge(long.len())));
        for mut message in messages(1, 2) {
            let wrong = match &mut message {
                Message::Proposal(proposal) => &mut proposal.block,
                Message::RoundChange(asked) => asked.block.as_mut().unwrap(),
                Message::NewBlock(decided) => &mut decided.0,
                Message::Prepare(_) | Message::Commit(_) => continue,
            };
            wrong.batches.pop();
            assert_eq!(decode_message(&encode_message(&message)), Err(CodecError::NotWhole));
        }
    }

    /// A sign state must mean the same in later versions.
    #[test]
    fn golden_archives() {
        let all: Vec<u8> = messages(2, 2).iter().flat_map(encode_message).collect();
        assert_eq!(
            (all.len(), hash(&all).to_string()),
            (3248, "2770c778240a3b72820a59a5c6bc85339c6cc59001ca8722a805a2b5aebca751".to_owned())
        );
    }

    #[test]
    fn cut_ones_are_refused() {
        for message in messages(2, 2) {
            let bytes = encode_message(&message);
            for length in 0..bytes.len() {
                // A shorter archive can be read only if it is one: its root is at its end.
                assert_ne!(decode_message(&bytes[..length]), Ok(message.clone()));
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = (decode_message(&bytes), decode_record(&bytes));
        }

        /// Bent archives are refused, or are other messages; nothing panics.
        #[test]
        fn bent_archives_are_survived(at: usize, bit in 0u8..8, kind in 0usize..5) {
            let mut bytes = encode_message(&messages(2, 2)[kind]);
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            let _ = (decode_message(&bytes), decode_record(&bytes));
        }
    }
}
