//! Performs the effects of log and blob on shard: group commit, cache, checkpoints
