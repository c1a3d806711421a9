//! A segment log as a core: frames, index, recovery, compaction
