//! The ways between the shards of a store.

use std::rc::Rc;

use metanode_blob::partition::{Op, Outcome};
use metanode_shard::{local::Slot, spawn_local};
use metanode_types::{Hash, ShardId};
use tracing::warn;

use crate::{
    StoreError,
    request::{Notice, Packet, Reply, Request, by_owner},
    shard::{Inner, wrong},
};

impl Inner {
    /// Asks a shard, which may be this one.
    pub(crate) async fn request(self: &Rc<Self>, to: ShardId, request: Request) -> Result<Reply, StoreError> {
        if to == self.shard {
            return Ok(self.serve(request).await);
        }
        self.counters.mesh_requests.increment();
        let (number, slot) = (self.number(), Slot::new());
        self.replies.borrow_mut().insert(number, slot.clone());
        if self.port.0.send(to, Packet::Request(number, request)).await.is_err() {
            self.replies.borrow_mut().remove(&number);
            return Err(StoreError::ShuttingDown);
        }
        Ok(slot.wait().await)
    }

    pub(crate) async fn op(self: &Rc<Self>, to: ShardId, op: Op) -> Result<Outcome, StoreError> {
        if self.closing.get() {
            return Err(StoreError::ShuttingDown);
        }
        match self.request(to, Request::Op(op)).await? {
            Reply::Op(result) => Ok(result?),
            other => Err(wrong(&other)),
        }
    }

    pub(crate) fn notice_here(self: &Rc<Self>, notice: Notice) {
        {
            let mut partition = self.partition.borrow_mut();
            match notice {
                Notice::Unpin(hash) => partition.unpin(hash),
                Notice::ReleaseChunks(names) => names.iter().for_each(|name| partition.release_chunk(name)),
                Notice::AbandonChunks(names) => names.iter().for_each(|name| partition.abandon_chunk(name)),
                Notice::DropOrphans => _ = partition.drop_orphans(),
                Notice::ReleaseRoots(hashes) => hashes.iter().for_each(|hash| partition.release_root(hash)),
                Notice::ReleaseLeases(hashes) => hashes.iter().for_each(|hash| partition.release_lease(hash)),
                Notice::Damaged(hash) => {
                    warn!(%hash, "the map of a blob is damaged; the next PUT of the blob replaces it");
                    partition.mark_damaged(&hash);
                }
                Notice::Forget(log, segment) => self.files.forget(log, segment),
                Notice::SpaceFreed => partition.space_freed(),
            }
        }
        self.dispatch();
    }

    /// Tells a shard, which may be this one.
    pub(crate) fn notice(self: &Rc<Self>, to: ShardId, notice: Notice) {
        if to == self.shard {
            return self.notice_here(notice);
        }
        if let Err(packet) = self.port.0.try_send(to, Packet::Notice(notice)) {
            let inner = self.clone();
            spawn_local(async move { _ = inner.port.0.send(to, packet).await }).detach();
        }
    }

    pub(crate) fn release_roots(self: &Rc<Self>, hashes: Vec<Hash>) {
        for (owner, group) in by_owner(hashes, self.shards) {
            self.notice(owner, Notice::ReleaseRoots(group));
        }
    }

    pub(crate) fn release_chunks(self: &Rc<Self>, names: Vec<Hash>) {
        for (owner, group) in by_owner(names, self.shards) {
            self.notice(owner, Notice::ReleaseChunks(group));
        }
    }

    pub(crate) fn abandon_chunks(self: &Rc<Self>, names: Vec<Hash>) {
        for (owner, group) in by_owner(names, self.shards) {
            self.notice(owner, Notice::AbandonChunks(group));
        }
    }

    pub(crate) fn release_leases(self: &Rc<Self>, hashes: Vec<Hash>) {
        for (owner, group) in by_owner(hashes, self.shards) {
            self.notice(owner, Notice::ReleaseLeases(group));
        }
    }
}

/// Takes what other shards send.
pub(crate) async fn receive(inner: Rc<Inner>) {
    loop {
        let (from, packet) = inner.port.0.recv().await;
        match packet {
            Packet::Request(number, request) => {
                let inner = inner.clone();
                spawn_local(async move {
                    let reply = inner.serve(request).await;
                    _ = inner.port.0.send(from, Packet::Reply(number, reply)).await;
                })
                .detach();
            }
            Packet::Reply(number, reply) => {
                let slot = inner.replies.borrow_mut().remove(&number);
                if let Some(slot) = slot {
                    slot.set(reply);
                }
            }
            Packet::Notice(notice) => inner.notice_here(notice),
        }
    }
}
