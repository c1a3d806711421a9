//! The messages of the relay protocol. Fields are plain data; sizes are bytes; hashes are BLAKE3.

use rkyv::{Archive, Deserialize, Portable, Serialize, bytecheck::CheckBytes, rancor::Failure};

use crate::frame::Kind;

/// A type that travels as the head of one kind of frame.
pub trait Message:
    for<'a> Serialize<
        rkyv::api::high::HighSerializer<rkyv::util::AlignedVec<16>, rkyv::ser::allocator::ArenaHandle<'a>, Failure>,
        Archived: Portable + for<'b> CheckBytes<rkyv::api::high::HighValidator<'b, Failure>>,
    >
{
    /// The kind of frame that carries it.
    const KIND: Kind;
}

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
        #[rkyv(derive(Debug))]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

        impl Message for $name {
            const KIND: Kind = Kind::$name;
        }
    )*};
}

messages! {
    /// First request on a connection. Answer: [`Welcome`].
    Hello {
        /// What asks, for the node's log: `metanode-client/0.1.0`.
        agent: String,
    }

    /// What a client must know of a node.
    Welcome {
        /// What answers.
        agent: String,
        /// Shards of the node; the owner of a hash is `ShardId::owner_of(hash, shards)`. To reach a shard, choose an initial
        /// destination connection ID of at least eight bytes whose first byte modulo `shards` is its number.
        shards: u16,
        /// The shard that this connection is on.
        shard: u16,
        /// Largest blob that [`Get`] and [`Put`] carry; larger ones go by [`GetBulk`] and [`PutBulk`].
        whole_bytes_max: u32,
        /// Requests that a connection may have unanswered.
        requests_max: u32,
        /// Whether this client's key may write and delete.
        may_write: bool,
    }

    /// Fetch a whole blob of at most `whole_bytes_max` bytes. Answer: [`Data`] with the bytes; for a larger blob [`Data`] with
    /// its size and an empty body.
    Get {
        /// Address.
        hash: [u8; 32],
    }

    /// Size of a blob; the body holds all of it, or nothing when it must be fetched by [`GetBulk`].
    Data {
        /// Bytes of the whole blob.
        size_bytes: u64,
    }

    /// Fetch a range; takes the stream. Answer: [`BulkBegin`], then the bao encoding of all groups that touch the range.
    GetBulk {
        /// Address.
        hash: [u8; 32],
        /// First byte.
        offset: u64,
        /// Bytes; `u64::MAX` for all that follow.
        length: u64,
    }

    /// The stream continues unframed: for each node of the tree that the range touches, in pre-order, 64 bytes (left and right
    /// chaining value) or the bytes of a group (16 KiB, less at the end of the blob), as bao with chunk groups of 2⁴ has it.
    BulkBegin {
        /// Bytes of the whole blob.
        size_bytes: u64,
    }

    /// Store a blob of at most `whole_bytes_max` bytes: the body. Answer: [`Stored`].
    Put {
        /// The address that the body must have.
        hash: [u8; 32],
        /// `DurabilityClass`.
        class: u8,
        /// `BlobKind`.
        kind: u8,
        /// Whether the blob stays by itself. Otherwise it lives while this connection does, and on when a folder or a tag that
        /// was stored meanwhile refers to it.
        hold: bool,
    }

    /// Store a blob of any size; takes the stream. [`Chunk`] and [`KnownChunk`] frames follow, then one [`PutEnd`]. Answer: [`Stored`].
    PutBulk {
        /// Bytes, when known beforehand: lets the node refuse early.
        size_bytes: Option<u64>,
        /// `DurabilityClass`.
        class: u8,
        /// `BlobKind`.
        kind: u8,
        /// As in [`Put`].
        hold: bool,
    }

    /// The next 256 KiB of a [`PutBulk`], in the body; only the last may be shorter, and none is empty.
    Chunk {}

    /// In place of a [`Chunk`] of a full 256 KiB that the node has, by an earlier, perhaps interrupted upload. Refused with `NotFound`,
    /// which ends the transfer, when it is not there any more: then the upload begins anew, with all bytes.
    KnownChunk {
        /// BLAKE3 of the chunk's bytes.
        name: [u8; 32],
    }

    /// Which of these chunks the node has; for those who may write. Answer: [`HaveReply`].
    Have {
        /// BLAKE3 of each chunk's bytes; at most `HAVE_CHUNKS_MAX`.
        names: Vec<[u8; 32]>,
    }

    /// Answer to [`Have`]. It may be out of date when it arrives.
    HaveReply {
        /// In the order of the names.
        have: Vec<bool>,
    }

    /// All chunks were sent.
    PutEnd {
        /// The address that the client computed; another one is refused.
        hash: [u8; 32],
    }

    /// The blob is stored in the class that was asked for.
    Stored {
        /// Address.
        hash: [u8; 32],
        /// Bytes.
        size_bytes: u64,
        /// Whether the node had it already.
        existed: bool,
    }

    /// What is known of a blob. Answer: [`StatReply`].
    Stat {
        /// Address.
        hash: [u8; 32],
    }

    /// Answer to [`Stat`].
    StatReply {
        /// Bytes.
        size_bytes: u64,
        /// `BlobKind`.
        kind: u8,
        /// `DurabilityClass`.
        class: u8,
        /// Whether it stays by itself.
        held: bool,
        /// Tags and folders that refer to it.
        references: u32,
    }

    /// Remove a blob. Refused while a tag or a folder refers to it. Answer: [`Done`], after the removal is durable.
    Remove {
        /// Address.
        hash: [u8; 32],
    }

    /// Point a tag to a blob, durably. Answer: [`Done`].
    TagSet {
        /// A `TagName`.
        name: String,
        /// Address.
        hash: [u8; 32],
    }

    /// Remove a tag, durably. Answer: [`Done`].
    TagRemove {
        /// A `TagName`.
        name: String,
    }

    /// Where a tag points. Answer: [`TagTarget`].
    TagGet {
        /// A `TagName`.
        name: String,
    }

    /// Answer to [`TagGet`].
    TagTarget {
        /// Address.
        hash: [u8; 32],
    }

    /// Done, and durable.
    Done {}

    /// A page of blobs in the order of their addresses. Answer: [`BlobPage`].
    ListBlobs {
        /// Only addresses behind this one.
        after: Option<[u8; 32]>,
        /// Entries at most; the node may send fewer.
        count: u32,
    }

    /// Answer to [`ListBlobs`].
    BlobPage {
        /// In order.
        entries: Vec<BlobEntry>,
        /// Whether there are more behind the last entry.
        more: bool,
    }

    /// A page of tags in the order of their names. Answer: [`TagPage`].
    ListTags {
        /// Only names behind this one.
        after: Option<String>,
        /// Entries at most; the node may send fewer.
        count: u32,
    }

    /// Answer to [`ListTags`].
    TagPage {
        /// In order.
        entries: Vec<TagEntry>,
        /// Whether there are more behind the last entry.
        more: bool,
    }

    /// Ask how the node is. Answer: [`NodeStatusReply`].
    NodeStatus {}

    /// Answer to [`NodeStatus`].
    NodeStatusReply {
        /// Version of the node.
        version: String,
        /// Its key.
        node_key: [u8; 32],
        /// Process number.
        pid: u32,
        /// Milliseconds since it was ready.
        uptime_ms: u64,
        /// Shards.
        shards: u16,
        /// Address that it listens on.
        quic_address: String,
        /// Address of its metrics, empty when off.
        metrics_address: String,
        /// Connections that are open.
        connections: u64,
        /// Blobs it holds.
        blobs: u64,
        /// Bytes of their contents.
        blob_bytes: u64,
        /// Bytes of its files.
        disk_bytes: u64,
        /// Bytes its file system has left.
        disk_free_bytes: u64,
        /// Bytes in the memory cache.
        cache_bytes: u64,
        /// Limit of the memory cache.
        cache_bytes_max: u64,
        /// Rescues of a parked executor with runnable tasks.
        shard_stalls: u64,
        /// Why it takes no writes, empty when it does.
        read_only_reason: String,
    }

    /// Stop: drain, sync, exit 0. Only on the local socket. Answer: [`Done`], then the socket closes when the node has ended.
    AdminStop {}

    /// Begin work on the whole store. Only on the local socket. Answer: [`MaintainReply`], at once.
    AdminMaintain {
        /// 0: scrub; 1: compact; 2: survey.
        what: u8,
        /// Of a scrub: bytes to read a second; 0 is as fast as it goes.
        bytes_per_second: u64,
    }

    /// The work has its number; [`StoreStatusReply`] says when it is done.
    MaintainReply {
        /// Of this kind of work, since the node started.
        number: u64,
    }

    /// Ask how the store is. Only on the local socket. Answer: [`StoreStatusReply`].
    AdminStoreStatus {}

    /// Answer to [`AdminStoreStatus`]: sums over all shards.
    StoreStatusReply {
        /// Blobs.
        blobs: u64,
        /// Bytes of their contents.
        blob_bytes: u64,
        /// Segment files.
        segments: u64,
        /// Bytes of them.
        segment_bytes: u64,
        /// Bytes that interrupted uploads have left.
        orphan_bytes: u64,
        /// Segments that compaction has freed, since the start.
        compacted_segments: u64,
        /// Compactions that were asked for and are done.
        compact_done: u64,
        /// Shards that scrub now.
        scrubbing_shards: u64,
        /// Scrubs that were asked for and are done.
        scrub_done: u64,
        /// Bytes that scrubs have read, since the start.
        scrub_bytes: u64,
        /// Chunks and maps that scrubs have found to be damaged, since the start.
        scrub_corrupt: u64,
        /// Reads that found damage, those of scrubs included, since the start.
        corrupt_reads: u64,
        /// Surveys that were asked for and are done.
        survey_done: u64,
    }

    /// The blobs that the latest survey has found to be damaged, in the order of their addresses. Only on the local socket. Answer:
    /// [`DamagedPage`].
    AdminDamaged {
        /// Only addresses behind this one.
        after: Option<[u8; 32]>,
    }

    /// Answer to [`AdminDamaged`].
    DamagedPage {
        /// The survey that the list is of; it is complete once [`StoreStatusReply`] says that this one is done.
        survey: u64,
        /// In order.
        hashes: Vec<[u8; 32]>,
        /// Whether there are more behind the last.
        more: bool,
    }

    /// Order transactions: at most `SUBMIT_TRANSACTIONS_MAX`, encoded one behind the other in the body. Answer: [`Submitted`].
    Submit {}

    /// Answer to [`Submit`]: those that are not refused wait in memory until they are in a batch. What becomes of them is asked by
    /// [`TransactionWait`].
    Submitted {
        /// In the order of their places.
        refused: Vec<TransactionRefused>,
    }

    /// What became of a transaction. Answer: [`TransactionState`], as soon as it is executed or the time is up.
    TransactionWait {
        /// Its name.
        id: [u8; 32],
        /// How long to wait for it, in milliseconds; the node may answer earlier.
        wait_ms: u32,
    }

    /// Answer to [`TransactionWait`].
    TransactionState {
        /// 0: not known here; 1: it waits, or is in a batch; 2: executed.
        state: u8,
        /// The height of its block, when executed.
        height: u64,
        /// How it ended, when executed: 0 done, 1 failed, 2 skipped.
        outcome: u8,
        /// Why, when failed or skipped.
        code: u16,
        /// What it answers, when done.
        answer: [u8; 32],
    }

    /// How the ledger of this node is. Answer: [`LedgerStatusReply`].
    LedgerStatus {}

    /// Answer to [`LedgerStatus`].
    LedgerStatusReply {
        /// The chain's name.
        name: String,
        /// The chain's identity: the hash of its genesis.
        chain: [u8; 32],
        /// k of the genesis: a header carries the results of so many heights before.
        lag: u64,
        /// Heights ahead that a transaction may expire at most.
        expiry_heights_max: u64,
        /// This node's key.
        node_key: [u8; 32],
        /// 0: it observes; 1: it votes; 2: it is a validator that may not vote; 3: it has halted.
        role: u8,
        /// Why it does not vote, or why no block comes although it does, for a person; empty when all is well.
        reason: String,
        /// Last final height.
        height: u64,
        /// Its block's hash.
        block: [u8; 32],
        /// Its time, in milliseconds since 1970.
        time_ms: u64,
        /// Last executed height.
        executed: u64,
        /// Round that the next height is in.
        round: u32,
        /// Who votes on the next height.
        validators: Vec<[u8; 32]>,
        /// Of them and of configured peers: those that this node is connected to.
        connected: Vec<[u8; 32]>,
        /// Transactions that wait here.
        waiting: u64,
        /// Their bytes.
        waiting_bytes: u64,
        /// Batches that no block names.
        batches: u64,
        /// Transactions that were executed since the start, skipped ones included.
        transactions: u64,
        /// Of them those that did what they should.
        done: u64,
        /// Messages of the protocol that were sent since the start, one for each receiver.
        messages: u64,
        /// Their bytes.
        message_bytes: u64,
        /// Signatures of validators' messages that were checked since the start.
        signatures: u64,
        /// Rounds that ended without a block since the start.
        timeouts: u64,
        /// Heights that this node has proposed since the start, of the last ones: from proposal to quorum of commits, in microseconds.
        finality_us: Vec<u32>,
        /// Syncs of the sign state since the start.
        syncs: u64,
        /// How long half of them took at most, in microseconds.
        sync_p50_us: u32,
        /// Validators that have signed two things that exclude each other, as the chain says.
        guilty: Vec<[u8; 32]>,
    }

    /// What the reference application has, with proof. Answer: [`LedgerFound`].
    LedgerQuery {
        /// 1: an account; 2: a value that an account has set.
        kind: u8,
        /// The account.
        account: [u8; 32],
        /// The value's name.
        name: Vec<u8>,
    }

    /// Answer to [`LedgerQuery`]. The header of `height` + lag carries the hash that the proof leads to.
    LedgerFound {
        /// As of this height.
        height: u64,
        /// Where in the state.
        key: [u8; 32],
        /// What is there.
        value: Option<Vec<u8>>,
        /// Hashes beside the way up to the root, the lowest first.
        beside: Vec<[u8; 32]>,
        /// What is at the end of the way: key and hash.
        found: Option<([u8; 32], [u8; 32])>,
        /// The ledger's own part of the state, hashed.
        system: [u8; 32],
    }

    /// A final block. Answer: [`BlockReply`], or `NotFound`.
    BlockGet {
        /// Which.
        height: u64,
        /// How long to wait for it, in milliseconds; the node may answer earlier.
        wait_ms: u32,
    }

    /// Answer to [`BlockGet`].
    BlockReply {
        /// The block's encoding.
        block: Vec<u8>,
        /// Its certificate's encoding.
        certificate: Vec<u8>,
    }

    /// What became of the transactions of a block, in their order. Answer: [`OutcomesReply`], or `NotFound` when it is not executed in
    /// time, or too long ago.
    OutcomesGet {
        /// Which block's.
        height: u64,
        /// From this place on.
        first: u32,
        /// How long to wait for it, in milliseconds; the node may answer earlier.
        wait_ms: u32,
    }

    /// Answer to [`OutcomesGet`]; the body has encoded outcomes, one behind the other.
    OutcomesReply {
        /// Of the whole block.
        count: u32,
    }

    /// A batch. Answer: [`Data`] with its bytes, or `NotFound`.
    BatchGet {
        /// Its digest.
        digest: [u8; 32],
    }

    /// First frame of a validator's first stream. Answer: [`PeerWelcome`]; a node of another chain refuses.
    PeerHello {
        /// The chain's identity.
        chain: [u8; 32],
        /// Ticket by which the sender is reached.
        ticket: String,
    }

    /// Answer to [`PeerHello`].
    PeerWelcome {
        /// Last final height.
        height: u64,
        /// Tickets by which validators are reached, as far as this one knows. Whether they are is seen when they are dialled.
        peers: Vec<String>,
    }

    /// A message of the protocol, as `metanode-codec` has it, in the body. No answer.
    PeerMessage {}

    /// A batch, in the body. No answer.
    PeerBatch {}

    /// First request to an application's process: which chain is it for? Answer: [`AppState`].
    AppHello {
        /// What asks, for the application's log.
        agent: String,
        /// The chain's identity.
        chain: [u8; 32],
    }

    /// Begin at the chain's beginning, whatever there is. The body has the genesis, or a part of it. Answer: [`AppState`].
    AppBegin {
        /// There is more of it to come.
        more: bool,
    }

    /// May these transactions be executed, now or after others? The body has them, one behind the other. Answer: [`AppChecked`].
    AppCheck {}

    /// Execute a height. The body has its transactions, one behind the other. Answer: [`AppExecuted`].
    AppExecute {
        /// It follows the last one.
        height: u64,
        /// The block's time, in milliseconds since 1970.
        time_ms: u64,
    }

    /// What was executed stays so. Answer: [`Done`].
    AppCommit {
        /// States of heights below this one are not asked for any more.
        keep_from: u64,
    }

    /// What is there? Answer: [`AppFound`].
    AppQuery {
        /// 1: an account; 2: a value that an account has set.
        kind: u8,
        /// The account.
        account: [u8; 32],
        /// The value's name.
        name: Vec<u8>,
    }

    /// A piece of the state of a height. Answer: [`AppPiece`].
    AppExport {
        /// It has been executed, and states from it on are kept.
        height: u64,
        /// What the piece before said comes next; empty for the first.
        after: Vec<u8>,
    }

    /// A piece of a state that was exported, in the body; the first one replaces whatever there is. Answer: [`AppState`].
    AppImport {
        /// The state's height.
        height: u64,
        /// Pieces follow.
        more: bool,
    }

    /// Where an application is. Answer to [`AppHello`], [`AppBegin`] and [`AppImport`].
    AppState {
        /// What answers.
        agent: String,
        /// It has a state, of the chain that was named.
        begun: bool,
        /// The last executed height.
        height: u64,
        /// The root of the state there.
        root: [u8; 32],
    }

    /// Answer to [`AppCheck`]. The body has for each transaction: code u16 (0: nothing against it) | next nonce of its account u64.
    AppChecked {}

    /// Answer to [`AppExecute`]. The body has an outcome for each transaction: 0 done, 1 failed, 2 skipped u8 | code u16 | answer 32.
    AppExecuted {
        /// The root of the state behind it.
        root: [u8; 32],
    }

    /// Answer to [`AppQuery`], as of the last executed height.
    AppFound {
        /// That height.
        height: u64,
        /// Where in the state.
        key: [u8; 32],
        /// What is there.
        value: Option<Vec<u8>>,
        /// Hashes beside the way down, the root's child first.
        beside: Vec<[u8; 32]>,
        /// What is at the end of the way: key and hash.
        found: Option<([u8; 32], [u8; 32])>,
    }

    /// Answer to [`AppExport`]; the body has the piece.
    AppPiece {
        /// What to ask for next; `None`: that was the last.
        next: Option<Vec<u8>>,
    }

    /// The request was refused; nothing of it was done.
    Refused {
        /// A [`RefusalCode`](crate::RefusalCode).
        code: u16,
        /// When `Busy`: how long to wait before another attempt, in milliseconds.
        retry_after_ms: u32,
        /// A sentence for a person.
        detail: String,
    }
}

/// A transaction that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct TransactionRefused {
    /// Its place among those of the request, from 0.
    pub index: u32,
    /// A [`TransactionRefusal`](crate::TransactionRefusal)'s number.
    pub code: u16,
    /// What the code says it is.
    pub number: u64,
    /// What the code says it is.
    pub other: u64,
}

/// One line of a [`BlobPage`].
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct BlobEntry {
    /// Address.
    pub hash: [u8; 32],
    /// Bytes.
    pub size_bytes: u64,
    /// `BlobKind`.
    pub kind: u8,
    /// Whether it stays by itself.
    pub held: bool,
    /// Tags and folders that refer to it.
    pub references: u32,
}

/// One line of a [`TagPage`].
#[derive(Debug, Clone, PartialEq, Eq, Archive, Serialize, Deserialize)]
#[rkyv(derive(Debug))]
pub struct TagEntry {
    /// A `TagName`.
    pub name: String,
    /// Address.
    pub hash: [u8; 32],
}

#[cfg(test)]
mod tests {
    use metanode_types::limits::{
        FRAME_HEAD_BYTES_MAX, HAVE_CHUNKS_MAX, LIST_PAGE_MAX, SUBMIT_TRANSACTIONS_MAX, TAG_NAME_BYTES_MAX,
    };

    use super::*;

    #[test]
    fn the_largest_pages_fit_a_frame() {
        let tags = TagPage {
            entries: vec![TagEntry { name: "x".repeat(TAG_NAME_BYTES_MAX), hash: [0; 32] }; LIST_PAGE_MAX],
            more: true,
        };
        let entry = BlobEntry { hash: [0; 32], size_bytes: 0, kind: 0, held: true, references: 0 };
        let blobs = BlobPage { entries: vec![entry; LIST_PAGE_MAX], more: true };
        let mut out = Vec::new();
        crate::encode(&mut out, 0, &tags, 0);
        assert!(out.len() < FRAME_HEAD_BYTES_MAX);
        out.clear();
        crate::encode(&mut out, 0, &blobs, 0);
        assert!(out.len() < FRAME_HEAD_BYTES_MAX);
        out.clear();
        let refused = vec![TransactionRefused { index: 0, code: 0, number: 0, other: 0 }; SUBMIT_TRANSACTIONS_MAX];
        crate::encode(&mut out, 0, &Submitted { refused }, 0);
        assert!(out.len() < FRAME_HEAD_BYTES_MAX);
        out.clear();
        crate::encode(&mut out, 0, &Have { names: vec![[0; 32]; HAVE_CHUNKS_MAX] }, 0);
        assert!(out.len() < FRAME_HEAD_BYTES_MAX);
    }
}
