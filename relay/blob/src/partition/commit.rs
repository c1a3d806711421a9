//! What committed and failed records do to the index, and what of each segment still counts.

use super::*;

impl Partition {
    pub(super) fn commit(&mut self, done: Committed<Ticket>, order: Order) {
        let Committed { record, ticket: Ticket { token, change }, placed } = done;
        let key = record.key;
        let outcome = self.apply(&record, change, placed, order);
        if let Some(token) = token {
            self.events.push(Event::Ended(token, Ok(outcome)));
        }
        self.settle(key);
        self.drop_if_unused(&key);
    }

    pub(super) fn apply(&mut self, record: &Record, change: Change, placed: Placed, order: Order) -> Outcome {
        let (key, location) = (record.key, placed.location);
        match change {
            Change::Chunk => {
                // A blob that is this chunk, and had lost it, has no reference to it yet.
                let lost = self.chunks.get(&key).is_none()
                    && self.roots.get(&key).is_some_and(|root| root.is_whole() && root.size_bytes > 0);
                self.set_chunk(key, placed, 1 + u32::from(lost));
                Outcome::Done
            }
            Change::Whole(options) => {
                // A root that had lost its chunk has no reference to it yet.
                let new = self.roots.get(&key).is_none() || self.chunks.get(&key).is_none();
                self.set_chunk(key, placed, u32::from(new));
                self.set_root(record, location, options)
            }
            Change::Root { options } => self.set_root(record, location, options),
            Change::Unroot => {
                if let Some(entry) = self.roots.remove(&key) {
                    self.events.push(Event::Unrooted(key));
                    self.blob_bytes = self.blob_bytes.saturating_sub(entry.size_bytes);
                    self.died_record(entry.location, if entry.is_whole() { 0 } else { entry.location.length });
                    match self.pins.get_mut(&key) {
                        Some(pin) => pin.dead = Some(entry),
                        None => self.release_content(key, entry),
                    }
                }
                self.set_tombstone(record.kind, key, location, order);
                Outcome::Removed
            }
            Change::Tag { name, target } => {
                self.drop_tombstone(&key);
                self.lives(location);
                let before = self.tags.insert(name, TagEntry { target, location });
                Outcome::Untagged(before.map(|tag| {
                    self.died(tag.location);
                    tag.target
                }))
            }
            Change::Untag { name } => {
                let before = self.tags.remove(&name).map(|tag| {
                    self.died(tag.location);
                    tag.target
                });
                self.set_tombstone(record.kind, key, location, order);
                Outcome::Untagged(before)
            }
            Change::Move { from } => {
                self.moved(record, from, placed, order);
                Outcome::Done
            }
        }
    }

    /// Sets where a chunk is; `taken` references are added.
    pub(super) fn set_chunk(&mut self, name: Hash, placed: Placed, taken: u32) {
        let before = self.chunks.get(&name).copied();
        if let Some(orphan) = before.filter(|chunk| chunk.references == 0 && taken > 0) {
            self.orphans.adopted(&orphan);
        }
        let references = before.map_or(0, |chunk| chunk.references).saturating_add(taken);
        let queued = before.map_or(Queued::No, |chunk| chunk.queued);
        self.lives(placed.location);
        if let Some(before) = self.chunks.insert(name, ChunkEntry { references, queued, ..ChunkEntry::new(placed) }) {
            self.died(before.location);
        }
    }

    pub(super) fn set_root(&mut self, record: &Record, location: Location, options: RootOptions) -> Outcome {
        let key = record.key;
        let whole = record.blob_bytes <= CHUNK_BYTES as u64;
        self.drop_tombstone(&key);
        self.lives_record(location, if whole { 0 } else { location.length });
        let before = self.roots.get(&key).copied();
        let references = before.map(|root| root.references).or_else(|| self.lost.remove(&key)).unwrap_or(0);
        let entry =
            RootEntry { location, size_bytes: record.blob_bytes, references, flags: record.flags, damaged: false };
        self.roots.insert(key, entry);
        match before {
            Some(before) => self.died_record(before.location, if whole { 0 } else { before.location.length }),
            None => self.blob_bytes = self.blob_bytes.saturating_add(record.blob_bytes),
        }
        if options.lease {
            *self.leases.entry(key).or_default() += 1;
        }
        let folder = options.kind == BlobKind::Folder && before.is_some_and(|root| root.kind() == BlobKind::Blob);
        // What a damaged root refers to is not what it should: the new one takes the references of its upload.
        Outcome::Stored { existed: before.is_some_and(|before| !before.damaged), became_folder: folder }
    }

    pub(super) fn moved(&mut self, record: &Record, from: Location, placed: Placed, order: Order) {
        let (key, to) = (record.key, placed.location);
        if let Some(chunk) = self.chunks.get_mut(&key).filter(|chunk| chunk.location == from)
            && matches!(record.kind, RecordKind::Whole | RecordKind::Chunk)
        {
            (chunk.location, chunk.checksum) = (to, placed.checksum);
            self.lives(to);
            self.died(from);
        }
        if let Some(root) = self.roots.get_mut(&key).filter(|root| root.location == from)
            && matches!(record.kind, RecordKind::Whole | RecordKind::Root)
        {
            root.location = to;
            let payload = if root.is_whole() { 0 } else { to.length };
            self.lives_record(to, payload);
            self.died_record(from, payload);
        }
        if record.kind == RecordKind::Tag
            && let Some(name) = record.payload.get(32..).and_then(|name| std::str::from_utf8(name).ok())
            && let Some(tag) = self.tags.get_mut(name).filter(|tag| tag.location == from)
        {
            tag.location = to;
            self.lives(to);
            self.died(from);
        }
        if matches!(record.kind, RecordKind::Unroot | RecordKind::Untag) {
            self.set_tombstone(record.kind, key, to, order);
        }
    }

    pub(super) fn set_tombstone(&mut self, kind: RecordKind, key: Hash, location: Location, order: Order) {
        self.drop_tombstone(&key);
        self.lives(location);
        self.tombstones.insert(key, Tombstone { kind, location, order });
    }

    pub(super) fn drop_tombstone(&mut self, key: &Hash) {
        if let Some(before) = self.tombstones.remove(key) {
            self.died(before.location);
        }
    }

    /// The order of the tombstone that is live at `location`.
    pub fn tombstone_order(&self, key: &Hash, location: Location) -> Option<Order> {
        self.tombstones.get(key).filter(|t| t.location == location).map(|t| t.order)
    }

    pub(super) fn fail(&mut self, failed: Vec<(Failure, Append<Ticket>)>) {
        for (failure, append) in failed {
            let key = append.record.key;
            if matches!(append.ticket.change, Change::Root { .. }) && append.record.blob_bytes <= CHUNK_BYTES as u64 {
                self.undo_root(&key);
            }
            if let Some(token) = append.ticket.token {
                self.events.push(Event::Ended(token, Err(OpError::Log(failure))));
            }
            self.settle(key);
        }
    }

    /// The key is free: decides what waited for it.
    pub(super) fn settle(&mut self, key: Hash) {
        let Some(Pending { mut waiting, .. }) = self.pending.remove(&key) else { return };
        while let Some((token, op)) = waiting.pop_front() {
            self.submit(token, op);
            if let Some(pending) = self.pending.get_mut(&key) {
                waiting.append(&mut pending.waiting);
                pending.waiting = waiting;
                return;
            }
        }
    }

    pub(super) fn lives(&mut self, location: Location) {
        self.lives_record(location, location.length);
    }

    pub(super) fn lives_record(&mut self, location: Location, payload: u32) {
        let live = self.live.entry((location.log, location.segment)).or_default();
        live.bytes += u64::from(payload) + HEAD_BYTES as u64;
        live.records += 1;
    }

    pub(super) fn died(&mut self, location: Location) {
        self.died_record(location, location.length);
    }

    pub(super) fn died_record(&mut self, location: Location, payload: u32) {
        let place = (location.log, location.segment);
        if let Some(live) = self.live.get_mut(&place) {
            live.bytes = live.bytes.saturating_sub(u64::from(payload) + HEAD_BYTES as u64);
            live.records = live.records.saturating_sub(1);
            if live.records == 0 {
                self.live.remove(&place);
            }
        }
        if !matches!(self.events.last(), Some(Event::SpaceDied)) {
            self.events.push(Event::SpaceDied);
        }
    }
}
