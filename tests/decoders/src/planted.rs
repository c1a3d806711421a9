//! A decoder with a length bug, for the test of the fuzzing itself.
//!
//! ```text
//! "MNPB" | version (1) u8 | kind (7) u8 | record count u8 | records: mark (0xa5) u8 | length u8 | bytes
//! ```
//!
//! The bug: from the third record on, a length is held against the whole input rather than against what is left of it. Before it are
//! six bytes and three marks that must be right, so that bytes at random need 2⁷² attempts; each of them is a branch, which
//! coverage sees.

/// Magic, version, kind.
const HEADER: [u8; 6] = *b"MNPB\x01\x07";

/// In front of each record.
const MARK: u8 = 0xa5;

/// Records up to this one are held to what is left.
const SOUND_RECORDS: usize = 2;

/// Reads the records; panics on some inputs, which nothing outside the test of the fuzzing may.
pub fn planted(data: &[u8]) {
    let _ = records(data);
}

fn records(data: &[u8]) -> Option<Vec<&[u8]>> {
    let mut rest = data;
    for expected in HEADER {
        if byte(&mut rest)? != expected {
            return None;
        }
    }
    let count = byte(&mut rest)?;
    let mut records = Vec::new();
    for index in 0..usize::from(count) {
        if byte(&mut rest)? != MARK {
            return None;
        }
        let length = usize::from(byte(&mut rest)?);
        let bound = if index < SOUND_RECORDS { rest.len() } else { data.len() };
        if length > bound {
            return None;
        }
        let (record, tail) = rest.split_at(length);
        records.push(record);
        rest = tail;
    }
    Some(records)
}

fn byte(rest: &mut &[u8]) -> Option<u8> {
    let (first, tail) = rest.split_first()?;
    *rest = tail;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(last_length: u8) -> Vec<u8> {
        let mut input = HEADER.to_vec();
        input.extend([3, MARK, 1, 0, MARK, 0, MARK, last_length, 1, 2]);
        input
    }

    #[test]
    #[should_panic(expected = "mid")]
    fn the_bug_is_there() {
        planted(&input(3));
    }

    #[test]
    fn bytes_at_random_do_not_find_it() {
        assert_eq!(records(&input(2)).map(|records| records.len()), Some(3));
        let mut random = crate::script::Random::new(1);
        for _ in 0..1_000_000 {
            let mut input = [0; 24];
            input.chunks_exact_mut(8).for_each(|part| part.copy_from_slice(&random.next().to_le_bytes()));
            planted(&input);
        }
    }
}
