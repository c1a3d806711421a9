//! What a seed stands for.

use metanode_shard::sim::{DiskFaults, PowerCut, Random};

/// Bytes of a segment: a few hundred operations use up several.
pub const SEGMENT_BYTES: u64 = 1 << 20;

/// Smallest disk: the active, the next, the spare and the reserve segment of each log, and room for some data.
const SMALL_DISK_BYTES: u64 = 20 << 20;

/// One opening of the store.
#[derive(Debug, Clone)]
pub struct LifePlan {
    /// Shards; a store may be opened with another number each time.
    pub shards: u16,
    /// The power fails at this change of the disk, if there are so many.
    pub fails_at: Option<u64>,
    /// Otherwise, when the clients have done their work, the store is closed in order; or the power fails so many milliseconds later.
    pub closes: Result<(), u64>,
    /// Operations of each client.
    pub operations: u32,
    /// Clients mostly remove what is there and put little, so that segments die and are freed.
    pub removes: bool,
    /// What the power cut leaves.
    pub cut: PowerCut,
    /// Blocks that rot before the next opening.
    pub rot: usize,
}

/// All of a seed.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What the disk does wrong, until the last opening.
    pub faults: DiskFaults,
    /// Clients.
    pub clients: u32,
    /// Openings, in order.
    pub lives: Vec<LifePlan>,
    /// Bytes of memory cache: little, so that reads come from the disk as well.
    pub cache_bytes: u64,
}

impl Plan {
    /// The plan of a seed.
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x706c_616e);
        let random = &mut random;
        let kind = random.below(10);
        let mut faults = DiskFaults::default();
        match kind {
            0 => faults.capacity_bytes = SMALL_DISK_BYTES + (random.below(8) << 20),
            1 => faults.sync_error_once_in = 10 + random.below(100),
            2 => faults.write_error_once_in = 10 + random.below(100),
            3 => faults.slow_once_in = 5 + random.below(50),
            _ => {}
        }
        let rots = kind == 4;
        let shards = 1 + random.below(3) as u16;
        let changes = random.below(2) == 0;
        // Most runs are short, so that there can be many; what compaction does takes long ones.
        let length = [1, 1, 2, 6][random.below(4) as usize];
        let lives = 2 + random.below(4);
        let lives = (0..lives).map(|_| LifePlan {
            shards: if changes { 1 + random.below(3) as u16 } else { shards },
            closes: if random.below(3) == 0 { Ok(()) } else { Err(random.below(4) * random.below(1000)) },
            fails_at: match random.below(5) {
                0 => None,
                1 => Some(1 + random.below(30)), // while it is opened
                _ => Some(20 + length * random.below(400)),
            },
            removes: random.below(3) == 0,
            operations: (10 + length * random.below(40)) as u32,
            cut: [PowerCut::ProcessOnly, PowerCut::LoseAll, PowerCut::Blocks, PowerCut::Sectors]
                [random.below(4) as usize],
            rot: if rots { random.below(4) as usize } else { 0 },
        });
        let lives = lives.collect();
        Self { faults, clients: 1 + random.below(6) as u32, lives, cache_bytes: (64 << 10) << random.below(6) }
    }

    /// Whether the disk loses or refuses what it should keep, so that more may be missing than a power cut takes.
    pub fn rots(&self) -> bool {
        self.lives.iter().any(|life| life.rot > 0)
    }
}
