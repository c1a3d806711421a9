//! What a seed stands for.

use std::time::Duration;

use metanode_shard::sim::{Conditions, DiskFaults, PowerCut, Random};

/// One life of the node.
#[derive(Debug, Clone)]
pub struct LifePlan {
    /// Shards.
    pub shards: u16,
    /// The power fails at this change of the disk, if there are so many.
    pub fails_at: Option<u64>,
    /// Otherwise it is killed after this time.
    pub lasts: Duration,
    /// What that leaves.
    pub cut: PowerCut,
    /// Time until the next one.
    pub down: Duration,
}

/// All of a seed.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What the disk does wrong, until the last life.
    pub faults: DiskFaults,
    /// What the network does, until the last life.
    pub conditions: Conditions,
    /// Of each look at the weather, so often nothing arrives for a while.
    pub cuts_once_in: u64,
    /// And so often all users get new addresses.
    pub moves_once_in: u64,
    /// Users.
    pub users: u32,
    /// Operations of each.
    pub operations: u32,
    /// Shards of the last life.
    pub shards: u16,
    /// Lives before the last, in order.
    pub lives: Vec<LifePlan>,
}

impl Plan {
    /// The plan of a seed.
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x7265_6d6f);
        let random = &mut random;
        let longest = [500, 5000, 60_000][random.below(3) as usize];
        let mut conditions = Conditions {
            delay: Duration::from_micros(50 + random.below(longest)),
            mtu_bytes: [1252, 1452, 1472, 8952, 65_527][random.below(5) as usize],
            ..Conditions::default()
        };
        let kind = random.below(8);
        let all = kind == 7;
        if kind == 1 || all {
            conditions.loss_once_in = 10 + random.below(100);
        }
        if kind == 2 || all {
            conditions.jitter = Duration::from_micros(random.below(30_000));
            conditions.double_once_in = 5 + random.below(50);
        }
        if kind == 3 || all {
            conditions.damage_once_in = 10 + random.below(100);
        }
        let cuts_once_in = if kind == 4 || all { 1 + random.below(3) } else { 0 };
        let moves_once_in = if kind == 5 || all { 1 + random.below(2) } else { 0 };
        let mut faults = DiskFaults::default();
        if random.below(6) == 0 {
            faults.slow_once_in = 5 + random.below(50);
        }
        let shards = 1 + random.below(3) as u16;
        let changes = random.below(2) == 0;
        let longest_down = [100, 3000, 40_000][random.below(3) as usize];
        let lives = (0..random.below(4)).map(|_| LifePlan {
            shards: if changes { 1 + random.below(3) as u16 } else { shards },
            fails_at: match random.below(3) {
                0 => None,
                _ => Some(5 + random.below(600)),
            },
            // Some last until their users have done everything, so that nothing but the node itself ends what it holds up.
            lasts: match random.below(5) {
                0 => Duration::from_secs(900),
                _ => Duration::from_millis(50 + random.below(12_000)),
            },
            cut: [PowerCut::ProcessOnly, PowerCut::LoseAll, PowerCut::Blocks, PowerCut::Sectors]
                [random.below(4) as usize],
            down: Duration::from_millis(random.below(longest_down)),
        });
        let lives = lives.collect();
        Self {
            faults,
            conditions,
            cuts_once_in,
            moves_once_in,
            users: 1 + random.below(3) as u32,
            operations: 8 + random.below(30) as u32,
            shards,
            lives,
        }
    }

    /// A network that does nothing wrong.
    pub fn calm(&self) -> Conditions {
        Conditions { delay: self.conditions.delay, mtu_bytes: self.conditions.mtu_bytes, ..Conditions::default() }
    }
}
