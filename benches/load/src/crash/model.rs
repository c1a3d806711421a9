//! What must be true of the blobs and tags of one writer, whatever happened to the node.
//!
//! A writer has a fixed number of blobs and tags. Each operation is written down before it is sent and settled when its answer
//! comes. A kill in between leaves it open: both what was before and what would be after are right then, and the first look
//! after the restart says which it is, from then on for good.

use anyhow::{Result, bail};
use bytes::{Bytes, BytesMut};
use metanode_types::{DurabilityClass, Hash, TagName, limits::CHUNK_BYTES};
use metanode_wire::RefusalCode;

use crate::data::{Random, derived_seed};

/// Writers at work at once; the store sees that many requests together.
pub(super) const WRITERS: usize = 16;
/// Blobs of a writer. All blobs at once are about 50 MiB in 320 blobs.
pub(super) const BLOBS_PER_WRITER: usize = 20;
/// Tags of a writer.
pub(super) const TAGS_PER_WRITER: usize = 4;

/// About the size of the largest small blob.
const SMALL_BYTES: usize = 12 << 10;
/// Blobs from this number on are a good part of a chunk, or all of it.
const FIRST_MIDDLE: usize = 14;
/// Blobs from this number on have several chunks.
const FIRST_LARGE: usize = 18;
/// Chunks that large blobs are made of, whoever's they are.
const SHARED_CHUNKS: u64 = 24;
/// Most of these in one blob.
const SHARED_CHUNKS_PER_BLOB: u64 = 5;

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Put { blob: usize, class: DurabilityClass },
    Remove { blob: usize },
    TagSet { tag: usize, blob: usize },
    TagRemove { tag: usize },
    Get { blob: usize },
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Of a put.
    Stored { hash: Hash, existed: bool },
    /// Of a removal, or of a tag.
    Done,
    /// Of a get.
    Read { is_equal: bool },
    /// A refusal that says something of the blob or tag.
    Refused(RefusalCode),
}

/// What a look at a blob must show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    Present,
    Absent { was_removed: bool },
    Either,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Presence {
    Never,
    Removed,
    /// Acknowledged before it was on disk: there until the node is killed.
    Memory,
    Durable,
    /// A kill has left it open.
    Open,
}

/// Where a tag points; when a kill has left it open, the second is as good as the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Target {
    known: Option<usize>,
    or: Option<Option<usize>>,
}

struct Blob {
    hash: Hash,
    presence: Presence,
}

/// The blobs and tags of one writer.
pub(super) struct Writer {
    seed: u64,
    number: usize,
    random: Random,
    blobs: Vec<Blob>,
    tags: [Target; TAGS_PER_WRITER],
    under_way: Option<Operation>,
    /// Operations answered since somebody took this number.
    pub(super) acknowledged: u64,
}

impl Writer {
    pub(super) fn new(seed: u64, number: usize) -> Self {
        let blob =
            |index| Blob { hash: metanode_crypto::hash(&content(seed, number, index)), presence: Presence::Never };
        Self {
            seed,
            number,
            random: Random::new(derived_seed(seed, number as u64)),
            blobs: (0..BLOBS_PER_WRITER).map(blob).collect(),
            tags: [Target { known: None, or: None }; TAGS_PER_WRITER],
            under_way: None,
            acknowledged: 0,
        }
    }

    pub(super) fn hash(&self, blob: usize) -> Hash {
        self.blobs[blob].hash
    }

    pub(super) fn content(&self, blob: usize) -> Bytes {
        content(self.seed, self.number, blob)
    }

    pub(super) fn tag_name(&self, tag: usize) -> TagName {
        format!("writer {}/tag {tag}", self.number).parse().expect("a short name without control characters")
    }

    pub(super) fn describe_blob(&self, blob: usize) -> String {
        let Blob { hash, presence } = &self.blobs[blob];
        format!("blob {blob} of writer {} ({hash}, {presence:?})", self.number)
    }

    pub(super) fn describe(&self, operation: &Operation) -> String {
        format!("{operation:?} of writer {}", self.number)
    }

    /// Chooses the next operation and writes it down.
    pub(super) fn begin(&mut self) -> Operation {
        assert!(self.under_way.is_none(), "a writer does one thing at a time");
        let random = &mut self.random;
        let blob = random.index(BLOBS_PER_WRITER);
        let tag = random.index(TAGS_PER_WRITER);
        let operation = match random.below(100) {
            0..40 => Operation::Put { blob, class: DurabilityClass::Durable },
            40..46 => Operation::Put { blob, class: DurabilityClass::Memory },
            46..76 => Operation::Remove { blob },
            // A tag on a blob that only memory holds: what a crash leaves of it is not this model's to say.
            76..86 if self.blobs[blob].presence != Presence::Memory => Operation::TagSet { tag, blob },
            86..91 => Operation::TagRemove { tag },
            _ => Operation::Get { blob },
        };
        self.under_way = Some(operation);
        operation
    }

    /// Settles the operation under way. An error is an answer that can't be right.
    pub(super) fn end(&mut self, outcome: Outcome) -> Result<()> {
        let operation = self.under_way.take().expect("an operation was begun");
        self.acknowledged += 1;
        let is_here = |blob: usize| matches!(self.blobs[blob].presence, Presence::Memory | Presence::Durable);
        match (operation, outcome) {
            (Operation::Put { blob, class }, Outcome::Stored { hash, existed })
                if hash == self.hash(blob) && existed == is_here(blob) =>
            {
                let presence = &mut self.blobs[blob].presence;
                if class == DurabilityClass::Durable || *presence != Presence::Durable {
                    *presence = stored_as(class);
                }
            }
            (Operation::Remove { blob }, Outcome::Done) if is_here(blob) && self.references(blob) == 0 => {
                self.blobs[blob].presence = Presence::Removed;
            }
            (Operation::Remove { blob }, Outcome::Refused(RefusalCode::InUse)) if self.references(blob) > 0 => {}
            (Operation::TagSet { tag, blob }, Outcome::Done) if is_here(blob) => self.tags[tag].known = Some(blob),
            (Operation::TagRemove { tag }, Outcome::Done) if self.tags[tag].known.is_some() => {
                self.tags[tag].known = None;
            }
            (Operation::TagRemove { tag }, Outcome::Refused(RefusalCode::NotFound))
                if self.tags[tag].known.is_none() => {}
            (Operation::Get { blob }, Outcome::Read { is_equal: true }) if is_here(blob) => {}
            (
                Operation::Remove { blob } | Operation::TagSet { blob, .. } | Operation::Get { blob },
                Outcome::Refused(RefusalCode::NotFound),
            ) if !is_here(blob) => {}
            (operation, outcome) => {
                let about = match operation {
                    Operation::TagRemove { tag } => format!("tag {tag} is {:?}", self.tags[tag]),
                    Operation::Put { blob, .. }
                    | Operation::Remove { blob }
                    | Operation::TagSet { blob, .. }
                    | Operation::Get { blob } => {
                        format!("{}, tags on it: {}", self.describe_blob(blob), self.references(blob))
                    }
                };
                bail!("{} gave {outcome:?}; {about}", self.describe(&operation));
            }
        }
        Ok(())
    }

    /// The node was killed: what was under way is open, and what only memory held too.
    pub(super) fn node_killed(&mut self) {
        for blob in &mut self.blobs {
            if blob.presence == Presence::Memory {
                blob.presence = Presence::Open;
            }
        }
        self.leave_open();
    }

    /// The node has ended in good order: what was under way is open, all else is on disk.
    pub(super) fn node_stopped(&mut self) {
        for blob in &mut self.blobs {
            if blob.presence == Presence::Memory {
                blob.presence = Presence::Durable;
            }
        }
        self.leave_open();
    }

    fn leave_open(&mut self) {
        match self.under_way.take() {
            Some(Operation::Put { blob, .. }) if self.blobs[blob].presence != Presence::Durable => {
                self.blobs[blob].presence = Presence::Open;
            }
            // One to which a tag refers is refused, and one that is not there stays so.
            Some(Operation::Remove { blob })
                if self.references(blob) == 0 && self.blobs[blob].presence == Presence::Durable =>
            {
                self.blobs[blob].presence = Presence::Open;
            }
            Some(Operation::TagSet { tag, blob }) if self.blobs[blob].presence == Presence::Durable => {
                self.tags[tag].or = Some(Some(blob));
            }
            Some(Operation::TagRemove { tag }) => self.tags[tag].or = Some(None),
            _ => {}
        }
    }

    pub(super) fn expected(&self, blob: usize) -> Expected {
        match self.blobs[blob].presence {
            Presence::Never => Expected::Absent { was_removed: false },
            Presence::Removed => Expected::Absent { was_removed: true },
            Presence::Durable | Presence::Memory => Expected::Present,
            Presence::Open => Expected::Either,
        }
    }

    /// Takes note of what a look at a blob showed; gives what is wrong with it.
    pub(super) fn blob_found(&mut self, blob: usize, is_found: bool) -> Option<String> {
        let violation = match self.expected(blob) {
            Expected::Present if !is_found => Some("was acknowledged, and is lost"),
            Expected::Absent { was_removed: true } if is_found => Some("was removed, and is back"),
            Expected::Absent { was_removed: false } if is_found => Some("was never put, and is there"),
            _ => None,
        };
        let violation = violation.map(|what| format!("{} {what}", self.describe_blob(blob)));
        let presence = &mut self.blobs[blob].presence;
        if *presence == Presence::Open {
            *presence = if is_found { Presence::Durable } else { Presence::Removed };
        }
        violation
    }

    /// As [`Writer::blob_found`], for a tag.
    pub(super) fn tag_found(&mut self, tag: usize, found: Option<Hash>) -> Option<String> {
        let Target { known, or } = self.tags[tag];
        let blob = found.map(|hash| self.blobs.iter().position(|blob| blob.hash == hash));
        let is_right = |target: Option<usize>| match (blob, target) {
            (None, None) => true,
            (Some(Some(found)), Some(target)) => found == target,
            _ => false,
        };
        let settled = [Some(known), or].into_iter().flatten().find(|target| is_right(*target));
        self.tags[tag] = Target { known: settled.unwrap_or(known), or: None };
        settled.is_none().then(|| {
            let name = self.tag_name(tag);
            format!("tag {name} leads to {found:?} (blob {blob:?}); acknowledged was blob {known:?}, or perhaps {or:?}")
        })
    }

    /// Tags that point to a blob.
    pub(super) fn references(&self, blob: usize) -> u32 {
        self.tags.iter().map(|tag| u32::from(tag.known == Some(blob))).sum()
    }

    pub(super) fn present_blobs(&self) -> impl Iterator<Item = usize> {
        (0..BLOBS_PER_WRITER).filter(|blob| self.expected(*blob) == Expected::Present)
    }

    pub(super) fn set_tags(&self) -> impl Iterator<Item = (usize, usize)> {
        self.tags.iter().enumerate().filter_map(|(tag, target)| Some((tag, target.known?)))
    }
}

fn stored_as(class: DurabilityClass) -> Presence {
    match class {
        DurabilityClass::Memory => Presence::Memory,
        DurabilityClass::Durable => Presence::Durable,
    }
}

/// What a blob holds: a few sizes at the edges of what the store treats differently, and noise.
fn content(seed: u64, writer: usize, blob: usize) -> Bytes {
    let mut random = Random::new(derived_seed(derived_seed(seed, writer as u64), blob as u64));
    let mut bytes = BytesMut::new();
    if blob > FIRST_LARGE {
        for _ in 0..=random.below(SHARED_CHUNKS_PER_BLOB) {
            let chunk = random.below(SHARED_CHUNKS);
            bytes.extend_from_slice(&Random::new(derived_seed(!seed, chunk)).bytes(CHUNK_BYTES));
        }
    }
    let own_bytes = match blob {
        0 if writer == 0 => 0, // one of this kind is all there can be
        1 => 4096,
        FIRST_MIDDLE => CHUNK_BYTES,
        FIRST_LARGE => CHUNK_BYTES + 1,
        // At least 16 bytes, so that no two writers draw the same.
        _ if blob < FIRST_MIDDLE => 16 + random.index(SMALL_BYTES),
        _ if blob < FIRST_LARGE => SMALL_BYTES + random.index(CHUNK_BYTES - SMALL_BYTES),
        _ => 16 + random.index(CHUNK_BYTES),
    };
    bytes.extend_from_slice(&random.bytes(own_bytes));
    bytes.freeze()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    const DURABLE: DurabilityClass = DurabilityClass::Durable;

    fn after(writer: &mut Writer, operation: Operation, outcome: Outcome) -> Result<()> {
        writer.under_way = Some(operation);
        writer.end(outcome)
    }

    fn put(writer: &mut Writer, blob: usize, class: DurabilityClass) {
        let stored = Outcome::Stored { hash: writer.hash(blob), existed: false };
        after(writer, Operation::Put { blob, class }, stored).unwrap();
    }

    #[test]
    fn contents_differ_and_repeat() {
        let writers: Vec<_> = (0..3).map(|number| Writer::new(5, number)).collect();
        let hashes: HashSet<_> = writers.iter().flat_map(|writer| writer.blobs.iter().map(|blob| blob.hash)).collect();
        assert_eq!(hashes.len(), 3 * BLOBS_PER_WRITER);
        assert_eq!(writers[1].content(19), content(5, 1, 19));
        assert!(writers[1].content(19).len() > CHUNK_BYTES);
    }

    #[test]
    fn what_was_acknowledged_must_be_there() {
        let mut writer = Writer::new(1, 0);
        put(&mut writer, 3, DURABLE);
        writer.node_killed();
        assert_eq!(writer.blob_found(3, true), None);
        assert!(writer.blob_found(3, false).unwrap().contains("lost"));
        assert!(writer.blob_found(4, true).unwrap().contains("never put"));
    }

    #[test]
    fn what_was_removed_must_stay_away() {
        let mut writer = Writer::new(1, 0);
        put(&mut writer, 3, DURABLE);
        after(&mut writer, Operation::Remove { blob: 3 }, Outcome::Done).unwrap();
        writer.node_killed();
        assert_eq!(writer.blob_found(3, false), None);
        assert!(writer.blob_found(3, true).unwrap().contains("back"));
    }

    #[test]
    fn what_was_under_way_is_settled_by_the_first_look() {
        for is_found in [true, false] {
            let mut writer = Writer::new(1, 0);
            writer.under_way = Some(Operation::Put { blob: 3, class: DURABLE });
            writer.node_killed();
            assert_eq!(writer.blob_found(3, is_found), None);
            assert_eq!(writer.blob_found(3, is_found), None);
            assert!(writer.blob_found(3, !is_found).is_some());
        }
        let mut writer = Writer::new(1, 0);
        put(&mut writer, 3, DURABLE);
        writer.under_way = Some(Operation::Remove { blob: 3 });
        writer.node_killed();
        assert_eq!(writer.expected(3), Expected::Either);
    }

    #[test]
    fn memory_survives_a_stop_but_not_a_kill() {
        let mut writer = Writer::new(1, 0);
        put(&mut writer, 3, DurabilityClass::Memory);
        writer.node_stopped();
        assert_eq!(writer.expected(3), Expected::Present);
        put(&mut writer, 4, DurabilityClass::Memory);
        writer.node_killed();
        assert_eq!((writer.expected(3), writer.expected(4)), (Expected::Present, Expected::Either));
    }

    #[test]
    fn a_tag_protects_its_blob() {
        let mut writer = Writer::new(1, 0);
        put(&mut writer, 3, DURABLE);
        after(&mut writer, Operation::TagSet { tag: 0, blob: 3 }, Outcome::Done).unwrap();
        assert_eq!(writer.references(3), 1);
        assert!(after(&mut writer, Operation::Remove { blob: 3 }, Outcome::Done).is_err());
        after(&mut writer, Operation::Remove { blob: 3 }, Outcome::Refused(RefusalCode::InUse)).unwrap();
        writer.under_way = Some(Operation::Remove { blob: 3 });
        writer.node_killed();
        assert_eq!(writer.expected(3), Expected::Present);
        assert!(writer.tag_found(0, None).is_some());
        assert!(writer.tag_found(0, Some(writer.hash(4))).is_some());
        assert_eq!(writer.tag_found(0, Some(writer.hash(3))), None);
    }

    #[test]
    fn a_tag_under_way_leads_to_either_end() {
        for found in [3, 4] {
            let mut writer = Writer::new(1, 0);
            put(&mut writer, 3, DURABLE);
            put(&mut writer, 4, DURABLE);
            after(&mut writer, Operation::TagSet { tag: 0, blob: 3 }, Outcome::Done).unwrap();
            writer.under_way = Some(Operation::TagSet { tag: 0, blob: 4 });
            writer.node_killed();
            assert_eq!(writer.tag_found(0, Some(writer.hash(found))), None);
            assert!(writer.tag_found(0, Some(writer.hash(7 - found))).is_some());
        }
    }

    #[test]
    fn answers_that_contradict_the_history_are_errors() {
        let mut writer = Writer::new(1, 0);
        let hash = writer.hash(3);
        for (operation, outcome) in [
            (Operation::Get { blob: 3 }, Outcome::Read { is_equal: true }),
            (Operation::Remove { blob: 3 }, Outcome::Done),
            (Operation::TagSet { tag: 0, blob: 3 }, Outcome::Done),
            (Operation::TagRemove { tag: 0 }, Outcome::Done),
            (Operation::Put { blob: 3, class: DURABLE }, Outcome::Stored { hash, existed: true }),
            (Operation::Put { blob: 4, class: DURABLE }, Outcome::Stored { hash, existed: false }),
        ] {
            assert!(after(&mut writer, operation, outcome).is_err(), "{operation:?}");
        }
        put(&mut writer, 3, DURABLE);
        assert!(after(&mut writer, Operation::Get { blob: 3 }, Outcome::Refused(RefusalCode::NotFound)).is_err());
        assert!(after(&mut writer, Operation::Get { blob: 3 }, Outcome::Read { is_equal: false }).is_err());
    }
}
