//! A validator's disk, of which a crash leaves what was synced.

use std::collections::BTreeMap;

use metanode_application::Reference;
use metanode_ibft::{Certificate, Message, Record};
use metanode_ledger::{Batch, Block};
use metanode_types::Hash;

use crate::Broken;

/// What goes to disk with one sync (clause 21).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    Proposal,
    Prepare,
    Commit,
    RoundChange,
    Decision,
}

pub(crate) fn group_of(record: &Record<Block>) -> Group {
    match record {
        Record::Cast(Message::Proposal(_)) => Group::Proposal,
        Record::Block(_) | Record::Cast(Message::Prepare(_)) => Group::Prepare,
        Record::Prepared(_) | Record::Cast(Message::Commit(_)) => Group::Commit,
        Record::Round(_) | Record::Cast(Message::RoundChange(_)) => Group::RoundChange,
        Record::Decision(_) | Record::Cast(Message::NewBlock(_)) => Group::Decision,
    }
}

#[derive(Default)]
pub(crate) struct Disk {
    pub(crate) wal: Vec<Record<Block>>,
    pub(crate) blocks: Vec<(Block, Certificate)>,
    pub(crate) batches: BTreeMap<Hash, Batch>,
    /// How much of each a crash leaves.
    pub(crate) wal_synced: usize,
    pub(crate) blocks_synced: usize,
    /// What the chain and the application came to, somewhere on the way.
    pub(crate) snapshot: Option<(Vec<u8>, Reference)>,
}

impl Disk {
    pub(crate) fn record(&mut self, record: Record<Block>, broken: Option<Broken>) {
        let synced = broken != Some(Broken::Sync(group_of(&record)));
        self.wal.push(record);
        if synced {
            (self.wal_synced, self.blocks_synced) = (self.wal.len(), self.blocks.len());
        }
    }

    /// A crash of the machine.
    pub(crate) fn crash(&mut self) {
        self.wal.truncate(self.wal_synced);
        self.blocks.truncate(self.blocks_synced);
    }
}
