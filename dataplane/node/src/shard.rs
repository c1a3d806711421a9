//! What runs in one shard's thread, and what its thread and the control thread say to each other.

use std::{
    rc::Rc,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use metanode_crypto::tls::ALPN_BPI;
use metanode_quic::{Connection, Datagram, Endpoint, ShardSocket, steer::Layout};
use metanode_shard::{
    ShardId, Task,
    mesh::{InjectorPort, MeshPort},
    now, sleep, spawn_local, timeout,
};
use metanode_store::{OpenError, Store, StoreError, StorePort, StoreShared};

use crate::{
    codes,
    config::Config,
    ledger::{self, LedgerPort, LedgerRoute, LedgerSeed},
    session::{self, STUCK_LOOK_PERIOD, Shard},
    state::NodeState,
};

/// What the control thread tells a shard, in this order. [`Command::End`] may come at any time.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Command {
    /// All shards have their stores: accept connections. Answer: [`Event::Serving`].
    Serve,
    /// Refuse new work, let what is begun finish until then, close connections. Answer: [`Event::Drained`].
    Drain { until: Instant },
    /// No shard asks this one for anything new: sync and close the store. Answer: [`Event::StoreClosed`].
    CloseStore,
    /// Return.
    End,
}

/// What a shard answers.
pub(crate) enum Event {
    Opened(Result<(), OpenError>),
    Serving(Result<(), std::io::Error>),
    Drained,
    StoreClosed(Result<(), StoreError>),
}

/// What a shard's thread starts with.
pub(crate) struct Seed {
    pub(crate) shard: ShardId,
    pub(crate) layout: Layout,
    pub(crate) config: Arc<Config>,
    pub(crate) quic: metanode_quic::Config,
    pub(crate) quic_counters: Arc<metanode_quic::Counters>,
    pub(crate) socket: ShardSocket,
    pub(crate) forward: MeshPort<Datagram>,
    pub(crate) store: StoreShared,
    pub(crate) store_port: StorePort,
    /// On the first shard of a node with a ledger.
    pub(crate) ledger: Option<LedgerSeed>,
    /// Of a node with a ledger.
    pub(crate) ledger_port: Option<LedgerPort>,
    pub(crate) state: Arc<NodeState>,
    pub(crate) commands: InjectorPort<Command>,
    pub(crate) events: mpsc::Sender<Event>,
}

/// Pause between two looks at the requests that a draining shard still has.
const DRAIN_PAUSE: Duration = Duration::from_millis(2);

/// Time for the last answers to reach clients after the last request was answered: many round trips of a data centre.
const FAREWELL_PAUSE: Duration = Duration::from_millis(50);

/// Time for clients to hear that their connections are closed.
const CLOSE_TIME_MAX: Duration = Duration::from_millis(300);

/// Runs a shard until it is told to end. Events that nobody receives any more are of no interest: the node is ending.
pub(crate) async fn run(seed: Seed) {
    let Seed {
        shard,
        layout,
        config,
        quic,
        quic_counters,
        socket,
        forward,
        store,
        store_port,
        mut ledger,
        ledger_port,
        state,
        commands,
        events,
    } = seed;
    let store = match Store::open(store, shard, store_port).await {
        Ok(store) => store,
        Err(error) => {
            events.send(Event::Opened(Err(error))).ok();
            // Stay: another shard that is still opening may need this one's mesh to fail in order.
            while !matches!(commands.recv().await, Command::End) {}
            return;
        }
    };
    events.send(Event::Opened(Ok(()))).ok();
    let this = Shard::new(store, state, &config, ledger_port.map(LedgerRoute::start));
    let _lookers = look_after(&this);
    let mut endpoint: Option<Rc<Endpoint>> = None;
    let mut socket_parts = Some((socket, forward));
    loop {
        match commands.recv().await {
            Command::Serve => {
                let Some((socket, forward)) = socket_parts.take() else { continue };
                let made = Endpoint::with_counters(socket, quic.clone(), shard, layout, forward, quic_counters.clone());
                let served = made.map(|made| {
                    endpoint = Some(made.clone());
                    serve(&this, made);
                    if let Some(seed) = ledger.take() {
                        spawn_local(open_ledger(this.clone(), seed)).detach();
                    }
                });
                events.send(Event::Serving(served)).ok();
            }
            Command::Drain { until } => {
                if let Some(endpoint) = &endpoint {
                    drain(&this, endpoint, until).await;
                }
                events.send(Event::Drained).ok();
            }
            Command::CloseStore => {
                if let Some(ledger) = &this.ledger {
                    ledger.stop();
                }
                events.send(Event::StoreClosed(this.store.shutdown().await)).ok();
            }
            Command::End => return,
        }
    }
}

/// What looks after a shard's connections as long as it is kept.
pub(crate) fn look_after(shard: &Rc<Shard>) -> [Task<()>; 2] {
    shard.publish();
    let publishing = shard.clone();
    let publisher = spawn_local(async move {
        loop {
            sleep(STUCK_LOOK_PERIOD).await;
            publishing.publish();
            publishing.close_stuck();
        }
    });
    [publisher, spawn_local(shard.outgoing.clone().look())]
}

/// Accepts connections and serves them.
pub(crate) fn serve(shard: &Rc<Shard>, endpoint: Rc<Endpoint>) {
    let serving = shard.clone();
    spawn_local(endpoint.run(move |connection: Connection| {
        let shard = serving.clone();
        match shard.ledger.clone().filter(|_| connection.alpn().as_deref() == Some(ALPN_BPI)) {
            Some(route) => {
                let may_read = shard.access.rights_of(connection.peer_key()).read;
                spawn_local(ledger::serve_peer(route, connection, may_read)).detach();
            }
            None => drop(spawn_local(session::serve(shard, connection)).detach()),
        }
    }))
    .detach();
}

/// Reads the chain, and takes part in it. A ledger that can't be opened is said in the log and to who asks; the node goes on.
async fn open_ledger(shard: Rc<Shard>, seed: LedgerSeed) {
    let Some(route) = &shard.ledger else { return };
    route.set_watch(seed.watch());
    match ledger::start(seed, shard.store.clone()).await {
        Ok(validator) => route.set_here(validator),
        Err(error) => route.set_broken(&error),
    }
}

/// Ends what clients do here: new requests are refused, begun ones have until `until`, then connections are closed.
pub(crate) async fn drain(shard: &Shard, endpoint: &Endpoint, until: Instant) {
    shard.draining.set(true);
    if let Some(route) = &shard.ledger {
        route.begin_stop();
    }
    endpoint.begin_shutdown();
    while shard.in_flight.get() > 0 && now() < until {
        sleep(DRAIN_PAUSE).await;
    }
    if shard.in_flight.get() > 0 {
        tracing::warn!("{} requests did not finish in time and are cut off", shard.in_flight.get());
    }
    if endpoint.connections() > 0 {
        sleep(FAREWELL_PAUSE).await;
        endpoint.close_all(codes::SHUTTING_DOWN, b"the node is stopping");
        if timeout(CLOSE_TIME_MAX, endpoint.wait_idle()).await.is_err() {
            tracing::debug!("some clients did not hear that the node stops");
        }
    }
}
