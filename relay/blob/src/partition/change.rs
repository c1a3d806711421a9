//! What an operation does to a key that is free: an answer at once, or a record for the log.

use metanode_types::sabotage::{self, Sabotage};

use super::*;

impl Partition {
    /// Does `op`, now or when its key is free; [`Event::Ended`] says how it went.
    pub fn submit(&mut self, token: Token, op: Op) {
        if let Some(pending) = self.pending.get_mut(&op.key()) {
            if sabotage::is_on(Sabotage::UpgradeEarly)
                && let (Op::PutWhole { .. }, Some(_)) = (&op, &pending.whole)
            {
                let outcome = Outcome::Stored { existed: true, became_folder: false };
                return self.events.push(Event::Ended(token, Ok(outcome)));
            }
            pending.waiting.push_back((token, op));
            return;
        }
        match self.decide(token, op) {
            Ok(Some(outcome)) => self.events.push(Event::Ended(token, Ok(outcome))),
            Ok(None) => {}
            Err(error) => self.events.push(Event::Ended(token, Err(error))),
        }
    }

    /// The outcome if it is known at once; `None` when a record was staged.
    pub(super) fn decide(&mut self, token: Token, op: Op) -> Result<Option<Outcome>, OpError> {
        match op {
            Op::PutWhole { hash, bytes, options } => self.put_whole(token, hash, bytes, options),
            Op::PutChunk { name, bytes } => self.put_chunk(token, name, bytes),
            Op::PutRoot { hash, size_bytes, payload, options } => {
                self.put_root(token, hash, size_bytes, payload, options)
            }
            Op::Remove { hash } => self.remove(token, hash, false),
            Op::RemoveKept { hash } => self.remove(token, hash, true),
            Op::Settle { .. } => Ok(Some(Outcome::Done)),
            Op::Refer { hash } => {
                self.roots.get_mut(&hash).ok_or(OpError::NotFound)?.references += 1;
                Ok(Some(Outcome::Done))
            }
            Op::TagSet { name, target } => self.tag_set(token, name, target),
            Op::TagRemove { name } => {
                self.tags.get(&name).ok_or(OpError::NotFound)?;
                let key = tag_key(&name);
                self.stage(Some(token), Record::bare(RecordKind::Untag, key), Change::Untag { name }, true)?;
                Ok(None)
            }
            Op::Move { head, payload, droppable } => self.relocate(token, &head, payload, droppable),
        }
    }

    pub(super) fn put_whole(
        &mut self,
        token: Token,
        hash: Hash,
        bytes: Bytes,
        options: RootOptions,
    ) -> Result<Option<Outcome>, OpError> {
        let size_bytes = bytes.len() as u64;
        // First: making room may drop the very chunk that is looked for next.
        if self.roots.get(&hash).is_none() {
            self.check_room()?;
        }
        let chunk = self.chunks.get(&hash).filter(|chunk| !chunk.corrupt);
        let content_here = chunk.is_some() || bytes.is_empty();
        if let Some(root) = self.roots.get(&hash).filter(|_| content_here) {
            if let Some(outcome) = self.existing_root(hash, *root, options) {
                return Ok(Some(outcome));
            }
        } else if !content_here {
            self.check_room()?;
        }
        let mut record = Record { blob_bytes: size_bytes, ..Record::bare(RecordKind::Root, hash) };
        record.flags = self.root_flags(&hash, options);
        let pending = Pending { whole: Some((bytes.clone(), options)), ..Pending::default() };
        let change = if content_here {
            Change::Root { options }
        } else {
            record.kind = RecordKind::Whole;
            record.payload = bytes;
            Change::Whole(options)
        };
        self.stage_root(token, record, change, options.class, pending)
    }

    pub(super) fn put_chunk(&mut self, token: Token, name: Hash, bytes: Bytes) -> Result<Option<Outcome>, OpError> {
        if self.chunks.get(&name).is_some_and(|chunk| !chunk.corrupt) {
            self.take_chunk(&name, u32::from(!sabotage::is_on(Sabotage::ForgetMatchedChunks)));
            return Ok(Some(Outcome::Done));
        }
        self.check_room()?;
        let record = Record { payload: bytes.clone(), ..Record::bare(RecordKind::Chunk, name) };
        self.stage(Some(token), record, Change::Chunk, false)?;
        self.pending.insert(name, Pending { chunk: Some(bytes), ..Pending::default() });
        Ok(None)
    }

    pub(super) fn put_root(
        &mut self,
        token: Token,
        hash: Hash,
        size_bytes: u64,
        payload: Bytes,
        options: RootOptions,
    ) -> Result<Option<Outcome>, OpError> {
        if let Some(root) = self.roots.get(&hash) {
            if let Some(outcome) = self.existing_root(hash, *root, options) {
                return Ok(Some(outcome));
            }
        } else {
            self.check_room()?;
        }
        let mut record = Record { blob_bytes: size_bytes, payload, ..Record::bare(RecordKind::Root, hash) };
        record.flags = self.root_flags(&hash, options);
        self.stage_root(token, record, Change::Root { options }, options.class, Pending::default())
    }

    /// The answer when the root is there and already as it is wanted.
    pub(super) fn existing_root(&mut self, hash: Hash, root: RootEntry, options: RootOptions) -> Option<Outcome> {
        let folder = options.kind == BlobKind::Folder && root.kind() == BlobKind::Blob;
        let newly = (options.hold && !root.is_held()) || (options.keep && !root.is_kept());
        if newly || folder || root.damaged {
            return None;
        }
        if options.lease {
            *self.leases.entry(hash).or_default() += 1;
        }
        Some(Outcome::Stored { existed: true, became_folder: false })
    }

    pub(super) fn root_flags(&self, hash: &Hash, options: RootOptions) -> RecordFlags {
        let before = self.roots.get(hash).map_or(0, |root| root.flags.0);
        let hold = if options.hold { RecordFlags::HELD } else { 0 };
        let folder = if options.kind == BlobKind::Folder { RecordFlags::FOLDER } else { 0 };
        let keep = if options.keep { RecordFlags::KEPT } else { 0 };
        RecordFlags(before | hold | folder | keep)
    }

    pub(super) fn stage_root(
        &mut self,
        token: Token,
        record: Record,
        mut change: Change,
        class: DurabilityClass,
        pending: Pending,
    ) -> Result<Option<Outcome>, OpError> {
        let key = record.key;
        let mut lease_now = false;
        if let Change::Whole(options) | Change::Root { options } = &mut change
            && class == DurabilityClass::Memory
        {
            lease_now = std::mem::take(&mut options.lease); // the caller may release it before the commit
        }
        // A chunk that is here already must outlive the wait for this record.
        let takes = matches!(change, Change::Root { .. })
            && record.blob_bytes <= CHUNK_BYTES as u64
            && !self.roots.get(&key).is_some_and(RootEntry::is_whole);
        if takes {
            self.take_chunk(&key, 1);
        }
        let later = (class == DurabilityClass::Durable).then_some(token);
        if let Err(error) = self.stage(later, record, change, false) {
            if takes {
                self.undo_root(&key);
            }
            return Err(error);
        }
        self.pending.insert(key, pending);
        if lease_now {
            *self.leases.entry(key).or_default() += 1;
        }
        match class {
            DurabilityClass::Durable if !sabotage::is_on(Sabotage::AnswerBeforeCommit) => Ok(None),
            DurabilityClass::Durable => Ok(Some(Outcome::Stored { existed: false, became_folder: false })),
            DurabilityClass::Memory => Ok(Some(Outcome::Stored { existed: false, became_folder: false })),
        }
    }

    /// A root record failed: the chunk's reference that was taken for it goes back.
    pub(super) fn undo_root(&mut self, key: &Hash) {
        if !self.roots.get(key).is_some_and(RootEntry::is_whole) && self.chunks.get(key).is_some() {
            self.release_chunk(key);
        }
    }

    pub(super) fn remove(&mut self, token: Token, hash: Hash, kept: bool) -> Result<Option<Outcome>, OpError> {
        let root = self.roots.get(&hash).ok_or(OpError::NotFound)?;
        if root.is_kept() && !kept {
            return Err(OpError::Kept);
        }
        let references = root.references + self.leases.get(&hash).copied().unwrap_or(0);
        if references > 0 {
            return Err(OpError::InUse { references });
        }
        self.stage(Some(token), Record::bare(RecordKind::Unroot, hash), Change::Unroot, true)?;
        Ok(None)
    }

    pub(super) fn tag_set(&mut self, token: Token, name: TagName, target: Hash) -> Result<Option<Outcome>, OpError> {
        if self.tags.get(&name).is_some_and(|tag| tag.target == target) {
            return Ok(Some(Outcome::Untagged(Some(target)))); // as it was; the caller's reference is one too many
        }
        if !self.tags.contains_key(&name) {
            self.check_room()?;
        }
        let payload = [&target.0[..], name.as_str().as_bytes()].concat();
        let record = Record { payload: payload.into(), ..Record::bare(RecordKind::Tag, tag_key(&name)) };
        self.stage(Some(token), record, Change::Tag { name, target }, false)?;
        Ok(None)
    }

    pub(super) fn relocate(
        &mut self,
        token: Token,
        head: &RecordHead,
        payload: Bytes,
        droppable: bool,
    ) -> Result<Option<Outcome>, OpError> {
        let key = head.key;
        let root = self.roots.get(&key).filter(|root| root.location == head.location).copied();
        let chunk = self.chunks.get(&key).is_some_and(|chunk| chunk.location == head.location);
        let kind = match head.kind {
            RecordKind::Whole | RecordKind::Root | RecordKind::Chunk => match (root, chunk) {
                (Some(_), true) => RecordKind::Whole,
                (Some(_), false) => RecordKind::Root,
                (None, true) => RecordKind::Chunk,
                (None, false) => return Ok(Some(Outcome::Done)),
            },
            RecordKind::Tag => {
                let name = std::str::from_utf8(payload.get(32..).unwrap_or_default()).unwrap_or_default();
                if self.tags.get(name).is_none_or(|tag| tag.location != head.location) {
                    return Ok(Some(Outcome::Done));
                }
                RecordKind::Tag
            }
            RecordKind::Unroot | RecordKind::Untag => {
                match self.tombstones.get(&key).map(|t| t.location == head.location) {
                    Some(true) if droppable => {
                        self.tombstones.remove(&key);
                        self.died(head.location);
                        return Ok(Some(Outcome::Done));
                    }
                    Some(true) => head.kind,
                    _ => return Ok(Some(Outcome::Done)),
                }
            }
        };
        let keep_payload = chunk || matches!(kind, RecordKind::Tag) || root.is_some_and(|root| !root.is_whole());
        let record = Record {
            kind,
            flags: root.map_or(RecordFlags(0), |root| root.flags),
            key,
            blob_bytes: root.map_or(0, |root| root.size_bytes),
            payload: if keep_payload { payload } else { Bytes::new() },
        };
        self.stage(Some(token), record, Change::Move { from: head.location }, true)?;
        Ok(None)
    }

    pub(super) fn check_room(&mut self) -> Result<(), OpError> {
        let entries = |this: &Self| this.chunks.len() + this.roots.len() + this.tags.len();
        let full = entries(self) >= self.entries_max && !(self.drop_orphans() && entries(self) < self.entries_max);
        if full { Err(OpError::IndexFull) } else { Ok(()) }
    }

    pub(super) fn stage(
        &mut self,
        token: Option<Token>,
        record: Record,
        change: Change,
        essential: bool,
    ) -> Result<(), OpError> {
        let key = record.key;
        let append = Append { record, ticket: Ticket { token, change }, essential };
        self.writer.append(append).map_err(|(failure, _)| OpError::Log(failure))?;
        self.pending.entry(key).or_default();
        Ok(())
    }
}
