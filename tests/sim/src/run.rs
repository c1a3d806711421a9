use std::{
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
};

use metanode_shard::sim::{DiskFaults, PowerCut, World};
use metanode_types::{
    ShardCount,
    sabotage::{self, Sabotage},
};

use crate::{
    life::{Ending, Setting, live},
    model::Model,
    plan::{LifePlan, Plan},
};

/// What a seed has shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Of the run.
    pub seed: u64,
    /// A hash of everything that happened.
    pub trace: u64,
    /// What must not be; empty is well.
    pub violations: Vec<String>,
    /// Openings of the store.
    pub openings: usize,
    /// Of them, ended by a power cut.
    pub cuts: usize,
    /// Operations that were answered, and how many of them with an error.
    pub answered: u64,
    /// See `answered`.
    pub refused: u64,
    /// Changes of the disk.
    pub disk_changes: u64,
}

/// Runs a seed, with a rule broken on purpose or none.
pub fn run(seed: u64, broken: Option<Sabotage>) -> Report {
    sabotage::set(broken);
    let model = Rc::new(RefCell::new(Model::default()));
    let plan = Plan::of(seed);
    let world = World::new(seed, plan.faults);
    let mut report = Report::new(seed);
    let lived = catch_unwind(AssertUnwindSafe(|| lives(&world, seed, &plan, &model, &mut report)));
    sabotage::set(None);
    report.finish(lived, &model, &world);
    report
}

impl Report {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, trace: 0, violations: Vec::new(), openings: 0, cuts: 0, answered: 0, refused: 0, disk_changes: 0 }
    }

    /// Adds how it ended, and what the model and the world have seen.
    pub(crate) fn finish(&mut self, lived: std::thread::Result<()>, model: &RefCell<Model>, world: &World) {
        if let Err(panic) = lived {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            // The model may be borrowed for good.
            self.violations.push(format!("panicked: {}", text.unwrap_or_default()));
        }
        if let Ok(model) = model.try_borrow() {
            self.violations.extend(model.violations.iter().cloned());
            (self.answered, self.refused) = (model.answered, model.refused);
        }
        self.trace = world.trace();
        self.disk_changes = world.disk_changes();
    }
}

fn lives(world: &World, seed: u64, plan: &Plan, model: &Rc<RefCell<Model>>, report: &mut Report) {
    let mut rotted = false;
    let sound = LifePlan {
        shards: 0,
        fails_at: None,
        closes: Ok(()),
        operations: 5,
        removes: false,
        cut: PowerCut::LoseAll,
        rot: 0,
    };
    let last = LifePlan { shards: plan.lives[plan.lives.len() - 1].shards, ..sound };
    for (number, life) in plan.lives.iter().chain([&last]).enumerate() {
        let is_last = number == plan.lives.len();
        if is_last {
            world.set_faults(DiskFaults::default());
        }
        let setting = Setting {
            seed,
            life: number,
            shards: ShardCount::new(life.shards).expect("1 to 3"),
            cache_bytes: plan.cache_bytes,
            clients: plan.clients,
            operations: life.operations,
            removes: life.removes,
            closes: life.closes,
            writes_fail: plan.faults.loses_writes() && !is_last,
            rotted,
            last: is_last,
        };
        world.fail_power_at(life.fails_at);
        let ending = live(world, &setting, model);
        tracing::info!(number, ?ending, cut = ?life.cut, "the opening has ended");
        report.openings += 1;
        report.cuts += usize::from(ending == Ending::Cut);
        if !model.borrow().violations.is_empty() {
            return; // what follows from it says nothing more
        }
        world.power_cut(life.cut);
        model.borrow_mut().restarted();
        if world.rot(".seg", life.rot) > 0 {
            rotted = true;
            model.borrow_mut().rotted();
        }
        world.note((number, ending == Ending::Closed, model.borrow().answered));
    }
}
