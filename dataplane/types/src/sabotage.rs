//! Deliberate mistakes, for the tests of the tests.
//!
//! A simulation that finds nothing proves little until it is shown to find something. Each mistake here is made where its rule is
//! kept, when this thread has switched it on; without the feature `sabotage`, which nothing that ships has, [`is_on`] is a
//! constant.

/// A rule that is broken on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Sabotage {
    /// A frame is answered for without `fdatasync`.
    SkipSync,
    /// A durable PUT is answered when its record is staged.
    AnswerBeforeCommit,
    /// A freed segment is used again as it is, and checksums don't depend on the segment's number.
    RecycleWithoutGeneration,
    /// The root of a large blob is staged while its chunks are on their way.
    RootBeforeChunks,
    /// A durable PUT of what a PUT in memory has on its way is answered at once.
    UpgradeEarly,
    /// An upload takes no reference to a chunk that is there already, so that it can be freed under it.
    ForgetMatchedChunks,
    /// What a power cut has torn at the end of a log is taken for rot.
    TornTailIsRot,
    /// Compaction drops tombstones whatever older segments hold.
    DropTombstones,
    /// The clock of a later round starts with it, whoever else is there.
    ClockAtOnce,
    /// Of the locks in a round change the lowest is proposed again.
    LowestLock,
    /// A validator believes messages that name it as their signer.
    TrustOwnMessages,
    /// A batch that no block names is dropped before its time is over.
    DropBatches,
}

impl Sabotage {
    /// Those of the store.
    pub const STORE: [Self; 8] = [
        Self::SkipSync,
        Self::AnswerBeforeCommit,
        Self::RecycleWithoutGeneration,
        Self::RootBeforeChunks,
        Self::UpgradeEarly,
        Self::ForgetMatchedChunks,
        Self::TornTailIsRot,
        Self::DropTombstones,
    ];

    /// Those of consensus.
    pub const CONSENSUS: [Self; 4] = [Self::ClockAtOnce, Self::LowestLock, Self::TrustOwnMessages, Self::DropBatches];
}

#[cfg(feature = "sabotage")]
thread_local! {
    static ON: std::cell::Cell<Option<Sabotage>> = const { std::cell::Cell::new(None) };
}

/// Breaks a rule in this thread from now on, or none.
#[cfg(feature = "sabotage")]
pub fn set(sabotage: Option<Sabotage>) {
    ON.set(sabotage);
}

/// Whether this rule is to be broken.
#[cfg(feature = "sabotage")]
pub fn is_on(sabotage: Sabotage) -> bool {
    ON.get() == Some(sabotage)
}

/// Never.
#[cfg(not(feature = "sabotage"))]
#[inline]
pub const fn is_on(_: Sabotage) -> bool {
    false
}
