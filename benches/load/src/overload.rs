//! More than a node can do: fetches of objects that are not in its memory arrive at ten times the rate of its best, whatever becomes of
//! earlier ones.
//!
//! The load is made of frames of our own making on quinn's streams: the shipped client waits when the node says busy, and so many of
//! its requests would cost more of this core than the node's refusals cost the other. Every object that comes back is compared with
//! its hash, as the client does.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use metanode_client::PutOptions;
use metanode_crypto::{
    Identity,
    tls::{self, ALPN_RELAY, CipherSuite, SERVER_NAME},
};
use metanode_types::Hash;
use metanode_wire::{
    Frame, FrameLimits, FrameReader, Kind, Refusal, RefusalCode, encode,
    message::{Get, Refused},
};
use tokio::{
    sync::Notify,
    task::{JoinHandle, LocalSet, spawn_local},
    time::MissedTickBehavior,
};

use crate::{
    Overload, data,
    measure::{Latencies, Meter, Report, closed_loop, memory_kib},
    node::{Node, Place},
};

/// Connections that the load comes by: together they may have 16 times as many requests unanswered as a shard lets wait.
const CONNECTIONS: usize = 64;
/// Requests of one connection without an answer: twice what a node reads before it has answered. What is due beyond is held back.
const SLOTS: u32 = 2_048;
/// Requests on the way at once when the node's best is looked for, over all connections: what it reads from the disk at a time.
const BEST_DEPTH: usize = 256;
/// How often requests that have come due are sent.
const TICK: Duration = Duration::from_millis(1);
/// Between two looks at the node's memory.
const LOOK: Duration = Duration::from_millis(100);
/// Parts of the time whose rates are told apart: the worst of them is what counts.
const PARTS: usize = 6;
/// Time in which everything that was asked must be answered when no more is asked.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// Most pieces of one read of a stream.
const PIECES: usize = 64;

pub(crate) async fn run(options: &Overload) -> Result<Report> {
    // A local set: the state of the load is of one thread.
    LocalSet::new().run_until(measure(options)).await
}

async fn measure(options: &Overload) -> Result<Report> {
    let common = &options.common;
    let place = Place::make(common, "overload")?;
    let mut report = Report::default();
    let node = Node::start(common, &place).await?;
    let client = node.client().await?;
    let hashes: Rc<[Hash]> = store(&client, options).await?.into();
    let load = Load::connect(&node, hashes).await?;

    let best_time = Duration::from_secs_f64(options.best_seconds.clamp(0.1, 600.0));
    load.run(Arrivals::WhenAnswered, best_time / 4, &node).await?; // warm up: the cache is full of what it holds
    let meter = Meter::start(node.pid())?;
    let best = load.run(Arrivals::WhenAnswered, best_time, &node).await?;
    let cpu = meter.read()?;
    report.add("overload_best_ops", best.rate());
    report.add_latencies("overload_best", &best.latencies);
    report.add("overload_best_server_share", cpu.server.as_secs_f64() / best.time.as_secs_f64());
    report.add("overload_best_client_share", cpu.client.as_secs_f64() / best.time.as_secs_f64());
    report.add("overload_best_rss_mib", best.rss_max_kib / 1024.0);

    let offered = best.rate() * options.times;
    let time = Duration::from_secs_f64(options.seconds.clamp(0.1, 3_600.0));
    let meter = Meter::start(node.pid())?;
    let over = load.run(Arrivals::PerSecond(offered), time, &node).await?;
    let cpu = meter.read()?;
    report.add("overload_offered_ops", over.due as f64 / over.time.as_secs_f64());
    report.add("overload_sent_ops", (over.due - over.held_back) as f64 / over.time.as_secs_f64());
    report.add("overload_ops", over.rate());
    report.add("overload_worst_ops", over.worst_rate());
    report.add_latencies("overload_admitted", &over.latencies);
    report.add("overload_refused_ops", over.refused as f64 / over.time.as_secs_f64());
    report.add("overload_hint_ms", over.hint_ms as f64 / over.refused.max(1) as f64);
    report.add("overload_server_share", cpu.server.as_secs_f64() / over.time.as_secs_f64());
    report.add("overload_client_share", cpu.client.as_secs_f64() / over.time.as_secs_f64());
    report.add_foreign("overload", cpu);
    report.add("overload_rss_mib", over.rss_max_kib / 1024.0);
    report.add("overload_memory_limit_mib", node.page().metric("node_memory_limit_bytes")? / f64::from(1 << 20));

    // Whoever asks next is served as ever.
    let after = load.run(Arrivals::WhenAnswered, best_time / 4, &node).await?;
    ensure!(after.refused == 0, "{} requests were refused after the overload", after.refused);
    report.add("overload_after_ops", after.rate());
    load.close().await;
    client.close().await;
    node.stop().await?;
    Ok(report)
}

/// Stores the objects; their hashes.
async fn store(client: &metanode_client::Client, options: &Overload) -> Result<Vec<Hash>> {
    let (seed, bytes) = (data::fresh_seed()?, options.object_bytes as usize);
    let object = move |index: usize| data::Random::new(data::derived_seed(seed, index as u64)).bytes(bytes);
    let stored = Arc::new(std::sync::Mutex::new(vec![Hash([0; 32]); options.count as usize]));
    let (keeping, client) = (stored.clone(), client.clone());
    let put = move |index| {
        let (keeping, client) = (keeping.clone(), client.clone());
        async move {
            let hash = client.put_whole(object(index), PutOptions::default()).await?.hash;
            keeping.lock().expect("no task panics with it")[index] = hash;
            Ok(())
        }
    };
    let count = options.count as usize;
    let done = closed_loop(count, 32, Instant::now() + Duration::from_secs(300), put).await?;
    ensure!(done.count == count, "only {} of {count} objects were stored in five minutes", done.count);
    let mut stored = stored.lock().expect("all tasks have ended");
    Ok(std::mem::take(&mut *stored))
}

/// When requests are sent.
#[derive(Clone, Copy)]
enum Arrivals {
    /// The next one when one is answered: [`BEST_DEPTH`] are always on the way.
    WhenAnswered,
    /// So many a second, evenly.
    PerSecond(f64),
}

/// Connections, and what came of their requests.
struct Load {
    endpoint: quinn::Endpoint,
    lines: Vec<Rc<Line>>,
    tasks: Vec<JoinHandle<Result<()>>>,
    shared: Rc<Shared>,
}

/// What all connections share.
struct Shared {
    hashes: Rc<[Hash]>,
    random: RefCell<data::Random>,
    /// An answer brings the next request.
    refill: Cell<bool>,
    tally: RefCell<Tally>,
    unanswered: Cell<usize>,
}

/// Requests of one period, by what became of them.
struct Tally {
    begun: Instant,
    time: Duration,
    /// Requests that were to be sent.
    due: u64,
    /// Of these, those that the connection had no room for.
    held_back: u64,
    /// Objects that came, in each part of the time.
    admitted: [u64; PARTS],
    refused: u64,
    /// The sum of what the refusals advised.
    hint_ms: u64,
    /// From when a request was due.
    latencies: Latencies,
    rss_max_kib: f64,
}

impl Tally {
    fn new(time: Duration) -> Self {
        Self {
            begun: Instant::now(),
            time,
            due: 0,
            held_back: 0,
            admitted: [0; PARTS],
            refused: 0,
            hint_ms: 0,
            latencies: Latencies::new(),
            rss_max_kib: 0.0,
        }
    }

    /// An object that was due then has come. What comes after the time counts for nothing.
    fn admit(&mut self, due: Instant) {
        let part = self.begun.elapsed().as_secs_f64() / self.time.as_secs_f64() * PARTS as f64;
        if let Some(count) = self.admitted.get_mut(part as usize) {
            *count += 1;
            self.latencies.push(due.elapsed());
        }
    }

    fn rate(&self) -> f64 {
        self.admitted.iter().sum::<u64>() as f64 / self.time.as_secs_f64()
    }

    fn worst_rate(&self) -> f64 {
        self.admitted.iter().min().copied().unwrap_or(0) as f64 * PARTS as f64 / self.time.as_secs_f64()
    }
}

impl Load {
    async fn connect(node: &Node, hashes: Rc<[Hash]>) -> Result<Self> {
        let shared = Rc::new(Shared {
            hashes,
            random: RefCell::new(data::Random::new(data::fresh_seed()?)),
            refill: Cell::new(false),
            tally: RefCell::new(Tally::new(Duration::from_secs(1))),
            unanswered: Cell::new(0),
        });
        let tls = tls::client(&Identity::from_seed(&[9; 32]), node.ticket().node, CipherSuite::DEFAULT, &[ALPN_RELAY])?;
        let config = quinn::ClientConfig::new(Arc::new(tls));
        let endpoint = quinn::Endpoint::client((node.address().ip(), 0).into())?;
        let (mut lines, mut tasks) = (Vec::new(), Vec::new());
        for _ in 0..CONNECTIONS {
            let connection = endpoint.connect_with(config.clone(), node.address(), SERVER_NAME)?.await?;
            let (send, recv) = connection.open_bi().await?;
            let line = Rc::new(Line::new(connection));
            tasks.push(spawn_local(write(line.clone(), send)));
            tasks.push(spawn_local(read(line.clone(), shared.clone(), recv)));
            lines.push(line);
        }
        Ok(Self { endpoint, lines, tasks, shared })
    }

    /// Puts the load on for `time`, then waits until everything is answered.
    async fn run(&self, arrivals: Arrivals, time: Duration, node: &Node) -> Result<Tally> {
        let shared = &self.shared;
        *shared.tally.borrow_mut() = Tally::new(time);
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut lines = self.lines.iter().cycle();
        if let Arrivals::WhenAnswered = arrivals {
            shared.refill.set(true);
            (0..BEST_DEPTH).for_each(|_| lines.next().expect("there are some").ask(shared, Instant::now()));
        }
        let begun = Instant::now();
        let mut looked = begun - LOOK;
        while begun.elapsed() < time {
            ticks.tick().await;
            self.is_alive()?;
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                let now_kib = memory_kib(node.pid(), "VmRSS")?;
                let mut tally = shared.tally.borrow_mut();
                tally.rss_max_kib = tally.rss_max_kib.max(now_kib);
            }
            if let Arrivals::PerSecond(rate) = arrivals {
                let now = begun.elapsed().min(time);
                let due = (now.as_secs_f64() * rate) as u64;
                let asked = shared.tally.borrow().due;
                for number in asked..due {
                    let moment = begun + Duration::from_secs_f64(number as f64 / rate);
                    lines.next().expect("there are some").ask(shared, moment);
                }
            }
        }
        shared.refill.set(false);
        let deadline = Instant::now() + ANSWER_TIME_MAX;
        while shared.unanswered.get() > 0 {
            ensure!(Instant::now() < deadline, "{} requests were never answered", shared.unanswered.get());
            ticks.tick().await;
            self.is_alive()?;
        }
        Ok(shared.tally.replace(Tally::new(time)))
    }

    fn is_alive(&self) -> Result<()> {
        match self.lines.iter().find_map(|line| line.connection.close_reason()) {
            Some(reason) => Err(reason).context("the node gave a connection up"),
            None if self.tasks.iter().any(JoinHandle::is_finished) => bail!("a stream has ended"),
            None => Ok(()),
        }
    }

    async fn close(self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        self.endpoint.close(0u32.into(), b"");
        self.endpoint.wait_idle().await;
    }
}

/// One connection with one stream.
struct Line {
    connection: quinn::Connection,
    /// Frames that are not sent yet.
    frames: RefCell<Vec<u8>>,
    more: Notify,
    slots: RefCell<Slots>,
}

/// Requests by their numbers: the object that is asked for, and when that was due.
struct Slots {
    asked: Vec<Option<(u32, Instant)>>,
    free: Vec<u32>,
}

impl Line {
    fn new(connection: quinn::Connection) -> Self {
        let slots = Slots { asked: vec![None; SLOTS as usize], free: (0..SLOTS).rev().collect() };
        Self { connection, frames: RefCell::default(), more: Notify::new(), slots: slots.into() }
    }

    /// Asks for some object, if there is room for one more request.
    fn ask(&self, shared: &Shared, due: Instant) {
        shared.tally.borrow_mut().due += 1;
        let mut slots = self.slots.borrow_mut();
        let Some(number) = slots.free.pop() else {
            shared.tally.borrow_mut().held_back += 1;
            return;
        };
        let object = shared.random.borrow_mut().index(shared.hashes.len());
        slots.asked[number as usize] = Some((object as u32, due));
        shared.unanswered.set(shared.unanswered.get() + 1);
        encode(&mut self.frames.borrow_mut(), number, &Get { hash: shared.hashes[object].0 }, 0);
        self.more.notify_one();
    }

    fn answered(&self, shared: &Shared, frame: &Frame) -> Result<()> {
        let (object, due) = {
            let mut slots = self.slots.borrow_mut();
            let asked = slots.asked.get_mut(frame.request as usize).and_then(Option::take);
            slots.free.push(frame.request);
            asked.with_context(|| format!("an answer to {}, which was not asked", frame.request))?
        };
        shared.unanswered.set(shared.unanswered.get() - 1);
        match frame.kind {
            Kind::Data => {
                let hash = metanode_crypto::hash(&frame.body);
                ensure!(hash == shared.hashes[object as usize], "an object does not have its hash");
                shared.tally.borrow_mut().admit(due);
            }
            Kind::Refused => {
                let refusal = Refusal::from_message(frame.message::<Refused>()?);
                ensure!(refusal.code == RefusalCode::Busy, "the node refused: {refusal}");
                ensure!(refusal.retry_after_ms > 0, "the node was busy without a hint");
                let mut tally = shared.tally.borrow_mut();
                tally.refused += 1;
                tally.hint_ms += u64::from(refusal.retry_after_ms);
            }
            other => bail!("the node answered {other:?}"),
        }
        if shared.refill.get() {
            self.ask(shared, Instant::now());
        }
        Ok(())
    }
}

/// Sends what piles up.
async fn write(line: Rc<Line>, mut send: quinn::SendStream) -> Result<()> {
    loop {
        line.more.notified().await;
        let frames = line.frames.take();
        send.write_chunk(Bytes::from(frames)).await?;
    }
}

async fn read(line: Rc<Line>, shared: Rc<Shared>, mut recv: quinn::RecvStream) -> Result<()> {
    let mut reader = FrameReader::new(FrameLimits::default());
    let mut pieces = [const { Bytes::new() }; PIECES];
    while let Some(count) = recv.read_chunks(&mut pieces).await? {
        pieces[..count].iter_mut().for_each(|piece| reader.push(std::mem::take(piece)));
        while let Some(frame) = reader.next_frame()? {
            line.answered(&shared, &frame)?;
        }
    }
    bail!("the node ended the stream")
}
