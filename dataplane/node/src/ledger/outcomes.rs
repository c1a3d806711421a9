//! What became of transactions, for good: those that are too old for memory are found on disk by their names.
//!
//! Outcomes of some hundred blocks are sorted by name and written as a *run*; runs of a size are merged, so that there are few. Names are
//! hashes: where one would be in a run follows from its first bytes, so that a search reads the disk about once a run.
//!
//! ```text
//! DIR/ledger/outcomes/run-FROM-TO:  entries in the order of their names, of the blocks from FROM to TO
//! entry:                            name 32 | outcome 35 | height u64 | 0 u8 | CRC-32C of the chain's first 8 and the entry so far u32
//! ```

use std::{
    cell::RefCell,
    io,
    path::{Path, PathBuf},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use metanode_ibft::{ChainId, Height};
use metanode_ledger::{Outcome, TransactionId};
use metanode_shard::{
    Companion,
    fs::{self, PlainFile},
    local::Notify,
    run_blocking,
};

use super::{
    results::Results,
    validator::{Progress, Validator},
};

const KEY: usize = 32;
const CHECK: usize = 4;
const ENTRY: usize = Outcome::BYTES + 8 + 1 + CHECK;

/// Runs of about the same size that are merged into one.
const MERGED: usize = 4;

/// Entries that a search reads at once: 40 KiB.
const PIECE: u64 = 512;

/// Guesses after which a search halves what is left: for names that somebody has made alike.
const GUESSES: u32 = 6;

/// Entries that a merge reads at once from each run, and writes at once: a megabyte.
const MERGE_PIECE: usize = 13_000;

/// Entries of a run that is not merged yet, at most: sorting them takes a tenth of a second.
const RUN_MAX: usize = 1 << 18;

/// Outcomes of the blocks from `from` to `to`.
#[derive(Debug)]
struct Run {
    path: PathBuf,
    from: u64,
    to: u64,
    file: PlainFile,
    count: u64,
}

/// See the module.
pub(super) struct Outcomes {
    chain: ChainId,
    folder: PathBuf,
    /// The latest last; their heights follow each other.
    runs: RefCell<Vec<Arc<Run>>>,
    /// Writes runs.
    thread: Companion,
    /// Merges them: that may take minutes.
    merger: Companion,
    /// Looks in them.
    finder: Companion,
    came: Notify,
    stops: Arc<AtomicBool>,
    kept: Progress,
    /// Up to this height outcomes are to be kept now.
    wanted: Progress,
    wanted_came: Notify,
}

type Entry = [u8; ENTRY];

fn entry(chain: &ChainId, id: &TransactionId, outcome: &Outcome, height: Height) -> Entry {
    let mut entry = [0; ENTRY];
    entry[..Outcome::BYTES].copy_from_slice(&outcome.encode(id));
    entry[Outcome::BYTES..][..8].copy_from_slice(&height.0.to_le_bytes());
    let check = check_of(chain, &entry);
    entry[ENTRY - CHECK..].copy_from_slice(&check);
    entry
}

/// Against rot, not against people: what is in the folder is the operator's.
fn check_of(chain: &ChainId, entry: &Entry) -> [u8; CHECK] {
    let of_chain = crc32c::crc32c(&chain.0[..8]);
    crc32c::crc32c_append(of_chain, &entry[..ENTRY - CHECK]).to_le_bytes()
}

fn damaged(path: &Path, what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", path.display()))
}

fn read_entry(chain: &ChainId, run: &Run, entry: &Entry) -> io::Result<(Height, Outcome)> {
    if entry[ENTRY - CHECK..] != check_of(chain, entry) {
        return Err(damaged(&run.path, "an entry does not check"));
    }
    let (outcome, rest) = entry.split_first_chunk().expect("it is longer");
    let (_, outcome) = Outcome::decode(outcome).map_err(|_| damaged(&run.path, "an entry can't be read"))?;
    Ok((Height(u64::from_le_bytes(*rest.first_chunk().expect("it is longer"))), outcome))
}

/// What was executed beats what was skipped; otherwise the later one counts.
fn beats(new: &Outcome, old: &Outcome) -> bool {
    !matches!(new, Outcome::Skipped(_)) || matches!(old, Outcome::Skipped(_))
}

impl Run {
    fn open(folder: &Path, from: u64, to: u64) -> io::Result<Self> {
        let path = folder.join(format!("run-{from}-{to}"));
        let file = PlainFile::open(&path)?;
        let size = file.size()?;
        if !size.is_multiple_of(ENTRY as u64) {
            return Err(damaged(&path, "its size is none of a run"));
        }
        Ok(Self { path, from, to, file, count: size / ENTRY as u64 })
    }

    fn read(&self, first: u64, count: u64) -> io::Result<Vec<Entry>> {
        let mut bytes = vec![0; (count * ENTRY as u64) as usize];
        if self.file.read_at(&mut bytes, first * ENTRY as u64)? < bytes.len() {
            return Err(damaged(&self.path, "it ends too early"));
        }
        Ok(bytes.as_chunks().0.to_vec())
    }

    /// The entry of a name. Waits for the disk.
    fn find(&self, id: &TransactionId) -> io::Result<Option<Entry>> {
        let (mut low, mut high) = (0, self.count);
        for guesses in 0.. {
            if high - low <= PIECE {
                let entries = self.read(low, high - low)?;
                let place = entries.binary_search_by(|entry| entry[..KEY].cmp(&id.0));
                return Ok(place.ok().map(|place| entries[place]));
            }
            // In the middle of what is read is where it should be, if names are spread evenly over the whole run.
            let share = u64::from_be_bytes(*id.0.first_chunk().expect("it is longer"));
            let guess = match guesses {
                0..GUESSES => ((u128::from(share) * u128::from(self.count)) >> 64) as u64,
                _ => low.midpoint(high),
            };
            let first = guess.saturating_sub(PIECE / 2).clamp(low, high - PIECE);
            let entries = self.read(first, PIECE)?;
            let last = entries.len() - 1;
            if id.0[..] < entries[0][..KEY] {
                high = first;
            } else if id.0[..] > entries[last][..KEY] {
                low = first + PIECE;
            } else {
                let place = entries.binary_search_by(|entry| entry[..KEY].cmp(&id.0));
                return Ok(place.ok().map(|place| entries[place]));
            }
        }
        unreachable!("each step leaves less")
    }
}

/// Whether runs that lie before `folder`'s others are of a size.
fn level(run: &Run) -> u32 {
    run.count.max(1).ilog2() / MERGED.ilog2()
}

/// Writes a run of entries that come in order.
fn write_run(
    folder: &Path,
    from: u64,
    to: u64,
    mut next: impl FnMut(&mut Vec<u8>) -> io::Result<bool>,
) -> io::Result<Run> {
    let aside = folder.join(format!("run-{from}-{to}.new"));
    let file = PlainFile::create(&aside)?;
    let (mut bytes, mut offset) = (Vec::new(), 0);
    loop {
        let more = next(&mut bytes)?;
        file.write_at(&bytes, offset)?;
        offset += bytes.len() as u64;
        bytes.clear();
        if !more {
            break;
        }
    }
    file.sync()?;
    fs::rename(&aside, folder.join(format!("run-{from}-{to}")))?;
    fs::sync_folder(folder)?;
    Run::open(folder, from, to)
}

/// Runs in the order of their heights as one. Of a name that is in several, one counts, see [`beats`].
fn merge_runs(chain: &ChainId, folder: &Path, runs: &[Arc<Run>], stops: &AtomicBool) -> io::Result<Run> {
    struct Part<'a> {
        run: &'a Run,
        next: u64,
        entries: std::vec::IntoIter<Entry>,
        head: Option<Entry>,
    }
    impl Part<'_> {
        fn advance(&mut self) -> io::Result<()> {
            self.head = self.entries.next();
            if self.head.is_none() && self.next < self.run.count {
                let count = (self.run.count - self.next).min(MERGE_PIECE as u64);
                self.entries = self.run.read(self.next, count)?.into_iter();
                self.next += count;
                self.head = self.entries.next();
            }
            Ok(())
        }
    }
    let mut parts = Vec::new();
    for run in runs {
        let mut part = Part { run, next: 0, entries: Vec::new().into_iter(), head: None };
        part.advance()?;
        parts.push(part);
    }
    let (first, last) = (&runs[0], &runs[runs.len() - 1]);
    write_run(folder, first.from, last.to, |bytes| {
        if stops.load(Ordering::Acquire) {
            return Err(io::ErrorKind::Interrupted.into());
        }
        for _ in 0..MERGE_PIECE {
            let Some(least) = parts.iter().filter_map(|part| part.head).map(|head| id_of(&head)).min() else {
                return Ok(false);
            };
            let mut best: Option<(Entry, Outcome)> = None;
            for part in &mut parts {
                if let Some(head) = part.head.filter(|head| id_of(head) == least) {
                    let (_, outcome) = read_entry(chain, part.run, &head)?;
                    if best.as_ref().is_none_or(|(_, old)| beats(&outcome, old)) {
                        best = Some((head, outcome));
                    }
                    part.advance()?;
                }
            }
            bytes.extend(best.expect("one has the least").0);
        }
        Ok(true)
    })
}

fn id_of(entry: &Entry) -> [u8; KEY] {
    *entry.first_chunk().expect("it is longer")
}

/// Opens the runs of a folder. Those that were merged into another are removed.
fn open_runs(folder: &Path) -> io::Result<Vec<Arc<Run>>> {
    fs::create_folders(folder)?;
    let is_unfinished = |name: &&std::ffi::OsString| name.to_str().is_some_and(|name| name.ends_with(".new"));
    fs::names(folder)?.iter().filter(is_unfinished).try_for_each(|name| fs::remove_file(folder.join(name)))?;
    let range = |name: &std::ffi::OsString| {
        let (from, to) = name.to_str()?.strip_prefix("run-")?.split_once('-')?;
        Some((from.parse::<u64>().ok()?, to.parse::<u64>().ok()?))
    };
    let mut ranges: Vec<(u64, u64)> = fs::names(folder)?.iter().filter_map(range).collect();
    ranges.sort_unstable_by_key(|(from, to)| (*from, std::cmp::Reverse(*to)));
    let mut runs: Vec<Arc<Run>> = Vec::new();
    for (from, to) in ranges {
        match runs.last() {
            Some(last) if to <= last.to => fs::remove_file(folder.join(format!("run-{from}-{to}")))?,
            Some(last) if from != last.to + 1 => {
                return Err(damaged(
                    folder,
                    &format!("nothing is known of the blocks from {} to {}", last.to + 1, from - 1),
                ));
            }
            _ => runs.push(Arc::new(Run::open(folder, from, to)?)),
        }
    }
    Ok(runs)
}

impl Outcomes {
    /// Opens what is known of a chain.
    pub(super) async fn open(folder: PathBuf, chain: ChainId) -> io::Result<Self> {
        let owned = folder.clone();
        let runs = run_blocking(move || open_runs(&owned)).await?;
        let kept = Progress::new(Height(runs.last().map_or(0, |run| run.to)));
        Ok(Self {
            chain,
            folder,
            runs: RefCell::new(runs),
            thread: Companion::start("outcomes", 1)?,
            merger: Companion::start("merge", 1)?,
            finder: Companion::start("find", 1)?,
            came: Notify::default(),
            stops: Arc::default(),
            kept,
            wanted: Progress::default(),
            wanted_came: Notify::default(),
        })
    }

    /// Up to which height all outcomes are kept.
    pub(super) fn kept(&self) -> &Progress {
        &self.kept
    }

    /// What is known of a transaction, and at which height that was.
    pub(super) async fn of(&self, id: TransactionId) -> io::Result<Option<(Height, Outcome)>> {
        let (chain, runs) = (self.chain, self.runs.borrow().clone());
        let find = move || {
            let mut best: Option<(Height, Outcome)> = None;
            for run in runs.iter().rev() {
                let Some(entry) = run.find(&id)? else { continue };
                let found = read_entry(&chain, run, &entry)?;
                // Later runs come first: only an execution says more than what they have.
                if best.as_ref().is_none_or(|(_, known)| matches!(known, Outcome::Skipped(_)) && beats(&found.1, known))
                {
                    best = Some(found);
                }
                if best.as_ref().is_some_and(|(_, known)| !matches!(known, Outcome::Skipped(_))) {
                    break;
                }
            }
            Ok(best)
        };
        self.finder.run(find).await
    }

    /// A merge that is under way ends soon; a later life begins it again.
    pub(super) fn stop(&self) {
        self.stops.store(true, Ordering::Release);
    }

    /// Sees to it that outcomes up to a height are kept, which has been executed.
    pub(super) async fn keep_up_to(&self, height: Height) {
        self.want(height);
        self.kept.reach(height).await;
    }

    /// As [`keep_up_to`](Self::keep_up_to), sometime.
    pub(super) fn want(&self, height: Height) {
        self.wanted.set(height);
        self.wanted_came.notify();
    }

    /// Keeps what is wanted.
    pub(super) async fn keep_wanted(&self, results: &Results) -> io::Result<()> {
        while self.kept.get() < self.wanted.get() {
            let blocks = results.blocks(self.kept.get().next(), self.wanted.get(), RUN_MAX);
            let (Some(first), Some(last)) = (blocks.first(), blocks.last()) else { return Ok(()) };
            let (from, to) = (first.height.0, last.height.0);
            if from != self.kept.get().0 + 1 {
                return Err(damaged(&self.folder, &format!("nothing is known of the block {}", self.kept.get().0 + 1)));
            }
            let (chain, folder) = (self.chain, self.folder.clone());
            let run = self.thread.run(move || {
                let mut entries: Vec<Entry> = Vec::with_capacity(blocks.iter().map(|block| block.outcomes.len()).sum());
                for block in &blocks {
                    let of_block = block.outcomes.iter();
                    entries.extend(of_block.map(|(id, outcome)| entry(&chain, id, outcome, block.height)));
                }
                drop(blocks);
                write_sorted(&folder, from, to, &entries)
            });
            let run = run.await?;
            self.runs.borrow_mut().push(Arc::new(run));
            self.kept.set(Height(to));
            results.kept_up_to(Height(to));
            self.came.notify();
        }
        Ok(())
    }

    /// Merges the latest runs as long as there are enough that are not larger than the last.
    async fn merge(&self) -> io::Result<()> {
        loop {
            let runs = self.runs.borrow().clone();
            let of_level = runs.last().map_or(0, |last| level(last));
            let same = runs.iter().rev().take_while(|run| level(run) <= of_level).count();
            if same < MERGED {
                return Ok(());
            }
            let first = runs.len() - same;
            let old = runs[first..].to_vec();
            let (chain, folder, parts, stops) = (self.chain, self.folder.clone(), old.clone(), self.stops.clone());
            let merged = self.merger.run(move || merge_runs(&chain, &folder, &parts, &stops)).await?;
            // Others may have come behind them meanwhile.
            self.runs.borrow_mut().splice(first..first + same, [Arc::new(merged)]);
            self.merger.run(move || old.iter().try_for_each(|run| fs::remove_file(&run.path))).await?;
        }
    }
}

/// Merges runs, as they come.
pub(super) async fn merge(this: Rc<Validator>) {
    loop {
        match this.outcomes.merge().await {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return,
            Err(error) => return this.fail(format!("what became of transactions: {error}")),
        }
        this.outcomes.came.wait().await;
    }
}

/// Keeps what is wanted, as it is wanted.
pub(super) async fn run(this: Rc<Validator>) {
    loop {
        this.outcomes.wanted_came.wait().await;
        if let Err(error) = this.outcomes.keep_wanted(&this.results).await {
            return this.fail(format!("what became of transactions: {error}"));
        }
    }
}

/// Writes a run of entries that come in the order of their heights.
fn write_sorted(folder: &Path, from: u64, to: u64, entries: &[Entry]) -> io::Result<Run> {
    // By numbers first: entries are too large to be moved about.
    let number = |entry: &Entry| u64::from_be_bytes(*entry.first_chunk().expect("it is longer"));
    let mut order: Vec<(u64, u32)> =
        entries.iter().enumerate().map(|(place, entry)| (number(entry), place as u32)).collect();
    let of = |place: u32| &entries[place as usize];
    order.sort_unstable_by(|(a, place_a), (b, place_b)| {
        let by_name = || of(*place_a)[..KEY].cmp(&of(*place_b)[..KEY]);
        a.cmp(b).then_with(by_name).then_with(|| place_a.cmp(place_b))
    });
    order.dedup_by(|later, before| {
        let same = of(later.1)[..KEY] == of(before.1)[..KEY];
        let skipped = |place: u32| of(place)[KEY] == 2;
        if same && (!skipped(later.1) || skipped(before.1)) {
            *before = *later;
        }
        same
    });
    let mut pieces = order.chunks(MERGE_PIECE);
    write_run(folder, from, to, |bytes| {
        let Some(piece) = pieces.next() else { return Ok(false) };
        piece.iter().for_each(|(_, place)| bytes.extend_from_slice(of(*place)));
        Ok(true)
    })
}

#[cfg(test)]
mod tests {
    use metanode_ledger::Code;

    use super::*;

    const CHAIN: ChainId = ChainId([7; 32]);

    fn id(number: u64) -> TransactionId {
        TransactionId(metanode_crypto::derive("outcomes test", &number.to_le_bytes()))
    }

    fn entries(height: u64, all: impl IntoIterator<Item = (u64, Outcome)>) -> Vec<Entry> {
        all.into_iter().map(|(number, outcome)| entry(&CHAIN, &id(number), &outcome, Height(height))).collect()
    }

    fn found(run: &Run, number: u64) -> Option<(Height, Outcome)> {
        let entry = run.find(&id(number)).unwrap()?;
        Some(read_entry(&CHAIN, run, &entry).unwrap())
    }

    #[test]
    fn a_run_has_what_was_written_and_nothing_else() {
        let temp = tempfile::tempdir().unwrap();
        for count in [0, 1, 511, 512, 513, 20_000] {
            let all = entries(count + 1, (0..count).map(|number| (number, Outcome::DONE)));
            let run = write_sorted(temp.path(), count + 1, count + 1, &all).unwrap();
            assert_eq!(run.count, count);
            for number in (0..count).step_by(7) {
                assert_eq!(found(&run, number), Some((Height(count + 1), Outcome::DONE)));
            }
            (count..count + 50).for_each(|number| assert_eq!(found(&run, number), None));
        }
    }

    /// Names that begin alike are found too: somebody may make them so.
    #[test]
    fn names_that_begin_alike_are_found() {
        let temp = tempfile::tempdir().unwrap();
        let alike = |number: u64| {
            let mut id = [0; 32];
            id[24..].copy_from_slice(&number.to_be_bytes());
            TransactionId(id)
        };
        let all: Vec<Entry> =
            (0..20_000).map(|number| entry(&CHAIN, &alike(number), &Outcome::DONE, Height(1))).collect();
        let run = write_sorted(temp.path(), 1, 1, &all).unwrap();
        for number in (0..20_000).step_by(97) {
            assert!(run.find(&alike(number)).unwrap().is_some());
        }
        assert_eq!(run.find(&alike(20_000)).unwrap(), None);
        assert_eq!(run.find(&id(1)).unwrap(), None);
    }

    #[test]
    fn what_was_executed_beats_what_was_skipped_within_runs_and_between_them() {
        let temp = tempfile::tempdir().unwrap();
        let skipped = Outcome::Skipped(Code::NONCE_TOO_HIGH);
        let failed = Outcome::Failed(Code::MALFORMED);
        let first = [entries(1, [(1, skipped), (2, Outcome::DONE)]), entries(2, [(1, failed), (3, skipped)])].concat();
        let first = Arc::new(write_sorted(temp.path(), 1, 2, &first).unwrap());
        assert_eq!(found(&first, 1), Some((Height(2), failed)));
        let second = entries(3, [(1, skipped), (2, skipped), (3, skipped), (4, Outcome::DONE)]);
        let second = Arc::new(write_sorted(temp.path(), 3, 3, &second).unwrap());
        let merged = merge_runs(&CHAIN, temp.path(), &[first, second], &AtomicBool::new(false)).unwrap();
        let all: Vec<_> = (1..=5).map(|number| found(&merged, number)).collect();
        let at = |height, outcome| Some((Height(height), outcome));
        assert_eq!(all, [at(2, failed), at(1, Outcome::DONE), at(3, skipped), at(3, Outcome::DONE), None]);
        // Parts of a merged one go; a gap is no chain's.
        assert_eq!(open_runs(temp.path()).unwrap().len(), 1);
        assert!(!temp.path().join("run-1-2").exists() && temp.path().join("run-1-3").exists());
        write_sorted(temp.path(), 7, 8, &[]).unwrap();
        let gap = open_runs(temp.path()).unwrap_err().to_string();
        assert!(gap.ends_with("nothing is known of the blocks from 4 to 6"), "{gap}");
    }

    #[test]
    fn a_large_merge_loses_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let runs: Vec<Arc<Run>> = (0..4u64)
            .map(|part| {
                let all = entries(part + 1, (0..10_000).map(|number| (part * 10_000 + number, Outcome::DONE)));
                Arc::new(write_sorted(temp.path(), part + 1, part + 1, &all).unwrap())
            })
            .collect();
        let merged = merge_runs(&CHAIN, temp.path(), &runs, &AtomicBool::new(false)).unwrap();
        assert_eq!((merged.count, merged.from, merged.to), (40_000, 1, 4));
        for number in (0..40_000).step_by(11) {
            assert_eq!(found(&merged, number).unwrap().0, Height(number / 10_000 + 1));
        }
    }

    #[test]
    fn damage_is_seen() {
        let temp = tempfile::tempdir().unwrap();
        let run = write_sorted(temp.path(), 1, 1, &entries(1, (0..10).map(|number| (number, Outcome::DONE)))).unwrap();
        let path = run.path.clone();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[40] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let bad = (0..10).filter(|number| {
            let entry = run.find(&id(*number)).unwrap().unwrap();
            read_entry(&CHAIN, &run, &entry).is_err()
        });
        assert_eq!(bad.count(), 1);
        std::fs::write(&path, &bytes[..ENTRY + 1]).unwrap();
        assert!(open_runs(temp.path()).is_err());
    }
}
