//! Whether what clients have seen of a value fits one order of all that happened to it.

use std::time::Instant;

/// What one client did with a value, and what it was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// When it asked.
    pub begun: Instant,
    /// When it had its answer.
    pub ended: Instant,
    /// What it did.
    pub what: Access,
}

/// With a value whose versions are counted from 1; 0: there was none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It made this version.
    Wrote(u64),
    /// It found this version.
    Read(u64),
}

/// Linearizability of a value that one client sets, one version after the other, and all read: reads find what is there then (regular), and of two
/// reads, one after the other, the second finds nothing older. For one writer that is all (Lamport, *On interprocess communication*,
/// 1986, proposition 5). All must have ended.
pub fn check_value(history: &[Seen]) -> Result<(), String> {
    let mut writes: Vec<(u64, &Seen)> = Vec::new();
    let mut reads: Vec<(u64, &Seen)> = Vec::new();
    for seen in history {
        match seen.what {
            Access::Wrote(version) => writes.push((version, seen)),
            Access::Read(version) => reads.push((version, seen)),
        }
    }
    writes.sort_by_key(|(version, _)| *version);
    for (place, (version, write)) in writes.iter().enumerate() {
        if *version != place as u64 + 1 || (place > 0 && writes[place - 1].1.ended > write.begun) {
            return Err(format!("version {version} does not follow the one before"));
        }
    }
    for (version, read) in &reads {
        if *version > writes.len() as u64 {
            return Err(format!("version {version} was never written"));
        }
        if *version > 0 && writes[*version as usize - 1].1.begun > read.ended {
            return Err(format!("version {version} was read before it was written"));
        }
        if writes.get(*version as usize).is_some_and(|(_, next)| next.ended < read.begun) {
            return Err(format!("version {version} was read when the next one was there"));
        }
        let newer = reads.iter().find(|(found, other)| found > version && other.ended < read.begun);
        if let Some((newer, _)) = newer {
            return Err(format!("version {version} was read after version {newer} had been"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use Access::{Read, Wrote};

    fn check(history: &[(u64, u64, Access)]) -> Result<(), String> {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        let seen =
            history.iter().map(|(begun, ended, what)| Seen { begun: at(*begun), ended: at(*ended), what: *what });
        check_value(&seen.collect::<Vec<_>>())
    }

    #[test]
    fn what_one_order_explains_is_accepted_and_nothing_else() {
        let writes = [(10, 20, Wrote(1)), (30, 60, Wrote(2))];
        let with = |reads: &[(u64, u64, Access)]| check(&[&writes, reads].concat());
        // While version 2 is being written, either may be found; but not the older one behind the newer.
        for reads in [
            &[(0, 5, Read(0)), (15, 16, Read(0)), (21, 22, Read(1)), (61, 62, Read(2))][..],
            &[(11, 12, Read(1)), (31, 32, Read(2)), (33, 34, Read(2))],
            &[(40, 50, Read(2)), (45, 55, Read(1))],
            &[(0, 100, Read(0)), (0, 100, Read(1)), (0, 100, Read(2))],
        ] {
            assert_eq!(with(reads), Ok(()), "{reads:?}");
        }
        for (reads, why) in [
            (&[(21, 22, Read(0))][..], "version 0 was read when the next one was there"),
            (&[(61, 62, Read(1))], "version 1 was read when the next one was there"),
            (&[(21, 22, Read(2))], "version 2 was read before it was written"),
            (&[(31, 32, Read(2)), (33, 34, Read(1))], "version 1 was read after version 2 had been"),
            (&[(61, 62, Read(3))], "version 3 was never written"),
        ] {
            assert_eq!(with(reads).unwrap_err(), why);
        }
        assert!(check(&[(10, 20, Wrote(1)), (15, 25, Wrote(2))]).is_err(), "one after the other");
        assert!(check(&[(10, 20, Wrote(2))]).is_err(), "from the first on");
    }
}
