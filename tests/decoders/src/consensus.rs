//! What a chain is made of, what validators send each other, and what they keep: the first byte of an input says what the rest is.

use bytes::Bytes;
use metanode_application::{Application as _, Operation, Piece, Reference};
use metanode_codec::{decode_message, decode_record, encode_message, encode_record};
use metanode_ibft::{ChainId, Height};
use metanode_ledger::{
    Batch, Block, Genesis, Outcome, Snapshot, Transaction, decode_certificate, encode_certificate,
    system::{Wish, decode_evidence, encode_evidence},
};
use metanode_wal::format::{BLOCK, Generation, Header, decode_header, scan};

const CHAIN: ChainId = ChainId([7; 32]);

/// More than a header has.
pub(crate) const SIGN_HEADER_BYTES: usize = 100;

/// Whatever is read is what was written: there is one encoding of each thing.
pub fn consensus(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else { return };
    match kind {
        0 => {
            if let Ok(transaction) = Transaction::decode(data) {
                assert_eq!(transaction.bytes(), data);
                let signed = transaction.signed_message(&CHAIN);
                assert!(signed.len() <= 32 + data.len() && signed.starts_with(&CHAIN.0));
            }
        }
        1 => {
            if let Ok(batch) = Batch::decode(Bytes::copy_from_slice(data)) {
                assert_eq!(batch.bytes(), data);
                assert_eq!(batch.transactions().count(), batch.count());
                let _ = batch.is_signed(&CHAIN);
            }
        }
        2 => {
            if let Ok(block) = Block::decode(data) {
                assert!(block.is_whole());
                assert_eq!(block.encode(), data);
            }
        }
        3 => {
            if let Ok(certificate) = decode_certificate(data) {
                assert_eq!(encode_certificate(&certificate), data);
            }
        }
        4 => {
            if let Ok(evidence) = decode_evidence(data) {
                assert_eq!(encode_evidence(&evidence), data);
            }
        }
        5 => {
            if let Ok(wish) = Wish::decode(data) {
                assert_eq!(wish.encode(), data);
            }
        }
        6 => {
            if let Ok(operation) = Operation::decode(data) {
                assert_eq!(operation.encode(), data);
            }
        }
        7 => {
            if let Ok(bytes) = data.try_into()
                && let Ok((id, outcome)) = Outcome::decode(bytes)
            {
                // What has no answer, or no code, has zeros in its place.
                assert_eq!(Outcome::decode(&outcome.encode(&id)), Ok((id, outcome)));
            }
        }
        8 => {
            if let Ok(genesis) =
                std::str::from_utf8(data).map_err(drop).and_then(|text| Genesis::from_json(text).map_err(drop))
            {
                let again = Genesis::from_json(&genesis.to_json()).expect("it was one");
                assert_eq!((again.chain(), &again), (genesis.chain(), &genesis));
            }
        }
        9 => {
            if let Ok(message) = decode_message(data) {
                assert_eq!(decode_message(&encode_message(&message)), Ok(message));
            }
        }
        10 => {
            if let Ok(record) = decode_record(data) {
                assert_eq!(decode_record(&encode_record(&record)), Ok(record));
            }
        }
        12 => {
            if let Ok(snapshot) = Snapshot::decode(data) {
                assert_eq!(Snapshot::decode(&snapshot.encode()), Ok(snapshot));
            }
        }
        13 => {
            let mut app = Reference::empty();
            if app.import(data).is_ok() {
                app.imported(Height(1));
                let mut other = Reference::empty();
                let mut after = Vec::new();
                while let Piece { bytes, next: Some(next) } = app.export(Height(1), &after).expect("it is kept") {
                    other.import(&bytes).expect("it was exported");
                    after = next;
                }
                let last = app.export(Height(1), &after).expect("it is kept");
                other.import(&last.bytes).expect("it was exported");
                assert_eq!(other.imported(Height(1)), app.executed().1);
            }
        }
        _ => sign_state(data),
    }
}

/// The header's block has zeros behind its first bytes, and so has the last one: inputs stay short.
fn sign_state(data: &[u8]) {
    let (header, frames) = data.split_at(data.len().min(SIGN_HEADER_BYTES));
    let mut file = header.to_vec();
    file.resize(BLOCK, 0);
    file.extend(frames);
    file.resize(file.len().next_multiple_of(BLOCK), 0);
    let generation = match decode_header(&file) {
        Header::Valid { generation, .. } => generation,
        _ => Generation { number: 1, salt: 0 },
    };
    if let Ok(found) = scan(&file, generation) {
        assert!(found.records.iter().map(Vec::len).sum::<usize>() <= file.len());
        assert!(found.end as usize <= file.len().max(BLOCK));
    }
}
