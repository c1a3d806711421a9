//! What a shard counts; atomics, so that other threads read them without asking.

use metanode_shard::metrics::{Counter, Gauge, Histogram};
use metanode_wire::{Kind, RefusalCode};

macro_rules! operations {
    ($($name:ident = $text:literal,)*) => {
        /// What a client can ask for, as metrics name it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Operation { $($name,)* }

        impl Operation {
            pub(crate) const ALL: &[Self] = &[$(Self::$name,)*];

            /// The value of the label `operation`.
            pub(crate) const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Which operation a request of this kind is.
            pub(crate) const fn of(kind: Kind) -> Option<Self> {
                match kind { $(Kind::$name => Some(Self::$name),)* _ => None }
            }
        }

        /// One `T` for each operation.
        #[derive(Debug, Default)]
        #[allow(non_snake_case, reason = "fields are named as the operations")]
        pub(crate) struct PerOperation<T> { $($name: T,)* }

        impl<T> std::ops::Index<Operation> for PerOperation<T> {
            type Output = T;

            fn index(&self, operation: Operation) -> &T {
                match operation { $(Operation::$name => &self.$name,)* }
            }
        }
    };
}

operations! {
    Hello = "hello",
    Get = "get",
    GetBulk = "get_bulk",
    Put = "put",
    PutBulk = "put_bulk",
    Stat = "stat",
    Remove = "remove",
    TagSet = "tag_set",
    TagRemove = "tag_remove",
    TagGet = "tag_get",
    ListBlobs = "list_blobs",
    ListTags = "list_tags",
    NodeStatus = "node_status",
    Have = "have",
    Submit = "submit",
    TransactionWait = "transaction_wait",
    LedgerStatus = "ledger_status",
    LedgerQuery = "ledger_query",
    BlockGet = "block_get",
    OutcomesGet = "outcomes_get",
}

/// Counters of one shard. Written by that shard alone, read by the threads of metrics page and local socket.
#[derive(Debug, Default)]
pub(crate) struct ShardCounters {
    /// From the request's arrival to the hand-over of its answer to QUIC; the count is the number of requests answered.
    pub(crate) seconds: PerOperation<Histogram>,
    /// Refusals by code, in the order of [`RefusalCode::ALL`].
    refused: [Counter; RefusalCode::ALL.len()],
    /// Bytes of frames and bulk data that came in.
    pub(crate) bytes_in: Counter,
    /// Bytes of frames and bulk data handed to QUIC.
    pub(crate) bytes_out: Counter,
    /// GETs that were answered from this shard's cache without a task.
    pub(crate) cached_gets: Counter,
    /// Streams that ended for a violation of the protocol.
    pub(crate) protocol_errors: Counter,
    /// Connections that are open.
    pub(crate) connections: Gauge,
    /// Connections that were accepted.
    pub(crate) connections_accepted: Counter,
    /// Closed since they kept memory and did not move.
    pub(crate) stalled: Counter,
    /// Requests that wait for the store.
    pub(crate) requests_waiting: Gauge,
    /// Bytes of uploads not yet stored.
    pub(crate) upload_bytes: Gauge,
    /// Bytes of answers that clients have not taken.
    pub(crate) download_bytes: Gauge,
    /// Bulk transfers that run.
    pub(crate) bulk_transfers: Gauge,
    /// What the store of this shard says of itself; published once a second.
    pub(crate) usage: PublishedUsage,
}

/// The store's usage, as of the last publication.
#[derive(Debug, Default)]
pub(crate) struct PublishedUsage {
    pub(crate) blobs: Gauge,
    pub(crate) blob_bytes: Gauge,
    pub(crate) cache_bytes: Gauge,
    pub(crate) segment_bytes: Gauge,
}

impl ShardCounters {
    /// Counts a refusal.
    pub(crate) fn refused(&self, code: RefusalCode) {
        if let Some(at) = RefusalCode::ALL.iter().position(|known| *known == code) {
            self.refused[at].increment();
        }
    }

    /// Refusals by code.
    pub(crate) fn refusals(&self) -> impl Iterator<Item = (RefusalCode, u64)> {
        RefusalCode::ALL.iter().copied().zip(self.refused.iter().map(Counter::value))
    }
}

/// Counters of the ledger. Written by its shard alone.
#[derive(Debug, Default)]
pub(crate) struct LedgerCounters {
    /// The last final height.
    pub(crate) height: Gauge,
    /// The last executed height.
    pub(crate) executed: Gauge,
    /// The round that the next height is in.
    pub(crate) round: Gauge,
    /// 1 when this node votes.
    pub(crate) votes: Gauge,
    /// Validators that lack to a quorum, when a round can't begin for want of it.
    pub(crate) quorum_lacks: Gauge,
    /// Validators and peers that it is connected to.
    pub(crate) connected: Gauge,
    /// Transactions that wait, and their bytes.
    pub(crate) waiting: Gauge,
    pub(crate) waiting_bytes: Gauge,
    /// Batches that no block names.
    pub(crate) batches: Gauge,
    /// Transactions that were executed, and of them those that did what they should.
    pub(crate) transactions: Counter,
    pub(crate) done: Counter,
    /// Rounds that ended without a block.
    pub(crate) timeouts: Counter,
    /// From this node's proposals to their quorums of commits.
    pub(crate) finality: Histogram,
    /// Syncs of the sign state.
    pub(crate) syncs: Histogram,
    /// Messages of the protocol that were sent, one for each receiver, and their bytes.
    pub(crate) messages: Counter,
    pub(crate) message_bytes: Counter,
    /// Messages that counted for nothing.
    pub(crate) refused: Counter,
    /// Signatures of validators' messages that were checked.
    pub(crate) signatures: Counter,
}
