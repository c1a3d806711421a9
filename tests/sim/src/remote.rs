//! A node and its users over a network, seed by seed.
//!
//! The node's own code (QUIC driver, sessions, transfers, store) runs in a [`World`]; its users are clients as they are shipped, on tokio with
//! its clock stopped. Both live by that clock and talk over a [`Network`] that loses, doubles, delays, damages and cuts off. The node is
//! killed and started again meanwhile, as in the other simulation.
//!
//! What must hold in every seed:
//!
//! * what a node has acknowledged is there, under the same rules as in the other simulation, whatever the network does;
//! * a client gives right bytes or an error that says what was wrong with the network or the node's state; no error says that an
//!   honest node broke the protocol or sent something else;
//! * every operation comes to an end, and once the network and the node work, every one succeeds.

mod node;
mod plan;
mod socket;
mod tls;
mod user;

use std::{
    cell::{Cell, RefCell},
    future::{Future as _, poll_fn},
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::Duration,
};

use metanode_client::{ClientConfig, Surroundings};
use metanode_crypto::Identity;
use metanode_quic::steer;
use metanode_shard::sim::{DiskFaults, End, Network, PowerCut, Random, Run, World};
use metanode_types::{
    ShardCount, ShardId,
    sabotage::{self, Sabotage},
};
use metanode_wire::Ticket;
pub use plan::Plan;
use socket::ClientSocket;
use tokio::{
    sync::oneshot,
    task::{JoinHandle, LocalSet, spawn_local},
    time::{Instant, sleep, sleep_until, timeout},
};
use user::User;

use crate::{model::Model, run::Report};

/// Where the node is.
const NODE_ADDRESS: &str = "10.0.0.1:4433";
const USER_ADDRESS: &str = "10.0.0.2";

/// The longest that users may take by the simulated clock, once nothing is in their way any more: many times what a connection takes
/// to be noticed as lost.
const USERS_TIME_MAX: Duration = Duration::from_secs(3600);

/// Runs a seed, with a rule broken on purpose or none.
///
/// # Panics
/// Never for what the seed does: that is reported.
pub fn run(seed: u64, broken: Option<Sabotage>) -> Report {
    sabotage::set(broken);
    tls::seed(seed ^ 0x746c_735f);
    let model = Rc::new(RefCell::new(Model::default()));
    let plan = Plan::of(seed);
    let world = World::new(seed, plan.faults);
    let network = Network::new(seed ^ 0x6e65_7477, |datagram, count| {
        let count = u16::try_from(count).ok().and_then(ShardCount::new)?;
        steer::owner(datagram, count).map(ShardId::index)
    });
    let mut report = Report::new(seed);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime without I/O needs nothing");
    let lived = catch_unwind(AssertUnwindSafe(|| {
        let tasks = LocalSet::new();
        tasks.block_on(&runtime, lives(&world, &network, seed, &plan, &model, &mut report));
    }));
    sabotage::set(None);
    report.finish(lived, &model, &world);
    report.trace ^= network.trace().rotate_left(1);
    report
}

/// What users know of the node's lives.
#[derive(Debug, Clone, Default)]
struct Lives {
    /// Number of the present one.
    number: Rc<Cell<u64>>,
    /// Nothing fails any more.
    calm: Rc<Cell<bool>>,
    /// The network never stops carrying anything.
    steady: bool,
}

async fn lives(
    world: &World,
    network: &Network,
    seed: u64,
    plan: &Plan,
    model: &Rc<RefCell<Model>>,
    report: &mut Report,
) {
    let clock = Instant::now();
    let lives = Lives { steady: plan.cuts_once_in == 0, ..Lives::default() };
    let mut random = Random::new(seed ^ 0x7573_6572);
    let identity = Identity::from_seed(&[1; 32]);
    let ticket =
        Ticket { node: identity.public(), addresses: vec![NODE_ADDRESS.parse().expect("a constant")], hash: None };
    let mut users: Vec<(Rc<RefCell<String>>, JoinHandle<()>)> = Vec::new();
    let mut keys = Vec::new();
    for number in 0..plan.users {
        let key = Identity::from_seed(&[10 + number as u8; 32]);
        keys.push(key.public());
        let mut config = ClientConfig::new(key);
        config.shard_aware = random.below(2) == 0;
        config.surroundings = Some(surroundings(network, clock, random.next()));
        let doing = Rc::new(RefCell::new(String::new()));
        let user = User {
            seed,
            number,
            config,
            ticket: ticket.clone(),
            lives: lives.clone(),
            model: model.clone(),
            doing: doing.clone(),
            random: Random::new(random.next()),
            client: None,
            is_last_look: false,
        };
        users.push((doing, spawn_local(user.run(plan.operations))));
    }
    let weather = spawn_local(weather(network.clone(), plan.clone(), Random::new(random.next())));

    for (number, life) in plan.lives.iter().map(Some).chain([None]).enumerate() {
        let is_last = life.is_none();
        if is_last {
            weather.abort();
            network.set(plan.calm());
            world.set_faults(DiskFaults::default());
        }
        lives.number.set(number as u64);
        world.fail_power_at(life.and_then(|life| life.fails_at));
        let (stop, stopped) = oneshot::channel();
        let shards = ShardCount::new(life.map_or(plan.shards, |life| life.shards)).expect("1 to 3");
        let parts = node::Setting { identity: identity.clone(), writers: keys.clone(), shards, stopped };
        let (inside, around) = (model.clone(), network.clone());
        let node = world.start(move || async move { node::live(parts, &around, &inside).await });
        let mut served = false;
        let ended = {
            let mut turning = Box::pin(turn(&node, network, clock));
            match life {
                Some(life) => tokio::select! {
                    biased;
                    end = &mut turning => Some(end),
                    () = sleep(life.lasts) => None,
                },
                None => {
                    lives.calm.set(true);
                    tokio::select! {
                        biased;
                        end = &mut turning => Some(end),
                        () = ended(&mut users, model) => {
                            let _ = stop.send(()); // gone if it has ended by itself
                            served = true;
                            Some(turning.await)
                        }
                    }
                }
            }
        };
        report.openings += 1;
        match ended {
            Some(End::Done(())) if served => {}
            Some(End::Done(())) => model.borrow_mut().violation("the node has ended by itself".to_owned()),
            Some(End::PowerFailed) if is_last => model.borrow_mut().violation("a sound disk has failed".to_owned()),
            Some(End::PowerFailed) | None => report.cuts += 1,
            Some(End::Stuck) => model.borrow_mut().violation("nothing can happen any more in the node".to_owned()),
            Some(End::Endless) => model.borrow_mut().violation("the node never comes to rest".to_owned()),
        }
        drop(node);
        world.power_cut(life.map_or(PowerCut::ProcessOnly, |life| life.cut));
        network.settle(); // what it has said is heard
        lives.number.set(u64::MAX); // between two lives
        model.borrow_mut().restarted();
        world.note((number, model.borrow().answered));
        if !model.borrow().violations.is_empty() {
            return; // what follows from it says nothing more
        }
        if let Some(life) = life {
            sleep(life.down).await;
            network.settle(); // nobody is there to hear it
        }
    }
}

/// Waits for all users, with patience.
async fn ended(users: &mut Vec<(Rc<RefCell<String>>, JoinHandle<()>)>, model: &Rc<RefCell<Model>>) {
    for (number, (doing, user)) in users.drain(..).enumerate() {
        match timeout(USERS_TIME_MAX, user).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => model.borrow_mut().violation(format!("user {number} while {}: {error}", doing.borrow())),
            Err(_elapsed) => {
                model.borrow_mut().violation(format!("user {number} did not come to an end: {}", doing.borrow()));
            }
        }
    }
}

/// Turns the node's world by tokio's clock until the node ends.
async fn turn<T: 'static>(node: &Run<T>, network: &Network, clock: Instant) -> End<T> {
    let mut timer = Box::pin(sleep_until(clock));
    poll_fn(|cx| {
        loop {
            match node.turn(clock.elapsed(), network, cx.waker()) {
                Ok(end) => return Poll::Ready(end),
                Err(None) => return Poll::Pending,
                Err(Some(next)) => {
                    timer.as_mut().reset(clock + next);
                    if timer.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                }
            }
        }
    })
    .await
}

/// Changes the network now and then.
async fn weather(network: Network, plan: Plan, mut random: Random) {
    network.set(plan.conditions);
    loop {
        sleep(Duration::from_millis(1 + random.below(4000))).await;
        if random.once_in(plan.cuts_once_in) {
            network.set(metanode_shard::sim::Conditions { cut: true, ..plan.conditions });
            let long = random.once_in(5);
            sleep(Duration::from_millis(random.below(if long { 50_000 } else { 3000 }))).await;
            network.set(plan.conditions);
        }
        if random.once_in(plan.moves_once_in) {
            network.move_all(USER_ADDRESS.parse().expect("a constant"));
        }
    }
}

fn surroundings(network: &Network, clock: Instant, seed: u64) -> Surroundings {
    let network = network.clone();
    let numbers = Arc::new(Mutex::new(Random::new(seed)));
    Surroundings {
        sockets: Arc::new(move |_| {
            let socket = network.bind_any(USER_ADDRESS.parse().expect("a constant"));
            Ok(Arc::new(ClientSocket::new(socket, clock)))
        }),
        numbers: Arc::new(move |bytes: &mut [u8]| {
            numbers.lock().unwrap_or_else(PoisonError::into_inner).fill(bytes);
        }),
        crypto: tls::crypto(),
    }
}
