//! From the other shards to the one that has the ledger, and back.

use std::{
    cell::{Cell, OnceCell, RefCell},
    future::poll_fn,
    pin::pin,
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use metanode_ibft::Height;
use metanode_quic::steer::{APART_BYTE, Layout};
use metanode_shard::{
    ShardId,
    local::Slot,
    mesh::{Mesh, MeshPort},
    spawn_local,
};
use metanode_wire::{
    Refusal, RefusalCode,
    message::{BlockReply, LedgerFound, LedgerStatusReply, TransactionRefused, TransactionState},
};
use rustc_hash::FxHashMap;

use super::{
    answer::answer,
    application::Watch,
    incoming::not_ready,
    open::LedgerError,
    submit::Sender,
    validator::{Detach as _, Progress, Validator, away},
};

/// Messages that may wait between two shards.
const MESH_CAPACITY: usize = 1024;

/// What a client asks.
#[derive(Debug)]
pub(crate) enum LedgerRequest {
    Submit { sender: Sender, encoded: Bytes },
    Wait { id: [u8; 32], wait: Duration },
    Status,
    Query { kind: u8, account: [u8; 32], name: Vec<u8> },
    Block { height: u64, wait: Duration },
    Outcomes { height: u64, first: u32, wait: Duration },
}

/// What it is answered.
#[derive(Debug)]
pub(crate) enum LedgerReply {
    Submitted(Vec<TransactionRefused>),
    Transaction(TransactionState),
    Status(Box<LedgerStatusReply>),
    Found(Box<LedgerFound>),
    Block(Box<BlockReply>),
    Outcomes { count: u32, body: Bytes },
}

type Answer = Result<LedgerReply, Refusal>;

/// Between two shards.
pub(crate) enum Packet {
    Request(u64, LedgerRequest),
    Reply(u64, Answer),
}

/// One shard's end of the mesh between them.
pub(crate) struct LedgerPort {
    port: MeshPort<Packet>,
    home: ShardId,
}

/// The shard that has the ledger: where validators dial.
pub(crate) fn home(layout: Layout) -> ShardId {
    layout.of_byte(APART_BYTE)
}

/// A port for each shard, in order.
pub(crate) fn mesh(layout: Layout) -> Vec<LedgerPort> {
    let ports = Mesh::new(layout.all(), MESH_CAPACITY).into_iter();
    ports.map(|port| LedgerPort { port, home: home(layout) }).collect()
}

/// How a shard reaches the ledger.
pub(crate) struct LedgerRoute {
    port: MeshPort<Packet>,
    home: ShardId,
    next: Cell<u64>,
    waiting: RefCell<FxHashMap<u64, Slot<Answer>>>,
    /// On the shard that has it, once it is ready.
    here: OnceCell<Rc<Validator>>,
    /// Why it is not.
    broken: OnceCell<Refusal>,
    watch: OnceCell<Arc<Watch>>,
    /// 1 once the node is stopping.
    stopping: Progress,
}

impl LedgerRoute {
    /// Begins to pass on what comes from the other shards.
    pub(crate) fn start(port: LedgerPort) -> Rc<Self> {
        let this = Rc::new(Self {
            port: port.port,
            home: port.home,
            next: Cell::new(0),
            waiting: RefCell::default(),
            here: OnceCell::new(),
            broken: OnceCell::new(),
            watch: OnceCell::new(),
            stopping: Progress::default(),
        });
        spawn_local(receive(this.clone())).detach_quietly();
        this
    }

    /// The ledger is ready, on this shard.
    pub(crate) fn set_here(&self, validator: Rc<Validator>) {
        if self.here.set(validator).is_err() {
            unreachable!("a ledger is started once");
        }
    }

    /// The ledger can't be opened.
    pub(crate) fn set_broken(&self, error: &LedgerError) {
        tracing::error!("the ledger can't be opened: {error}");
        let code = match error {
            LedgerError::NotSupported(_) => RefusalCode::NotSupported,
            _ => RefusalCode::Storage,
        };
        self.broken.get_or_init(|| Refusal::new(code, format!("the ledger can't be opened: {error}")));
    }

    /// A ledger is being opened here, whose application is to be seen by this.
    pub(crate) fn set_watch(&self, watch: Arc<Watch>) {
        self.watch.get_or_init(|| watch);
    }

    /// The shard ends, and with it the ledger, also one that is being opened.
    pub(crate) fn stop(&self) {
        if let Some(watch) = self.watch.get() {
            watch.end();
        }
        if let Some(ledger) = self.here() {
            ledger.stop();
        }
    }

    /// The ledger, when it is on this shard and ready.
    pub(crate) fn here(&self) -> Option<Rc<Validator>> {
        self.here.get().cloned()
    }

    /// From now on nobody waits here.
    pub(crate) fn begin_stop(&self) {
        self.stopping.set(Height(1));
    }

    /// Asks it.
    pub(crate) async fn ask(&self, request: LedgerRequest) -> Answer {
        let (mut asking, mut stopping) = (pin!(self.pass_on(request)), pin!(self.stopping.reach(Height(1))));
        poll_fn(|cx| match asking.as_mut().poll(cx) {
            Poll::Ready(answer) => Poll::Ready(answer),
            Poll::Pending => stopping.as_mut().poll(cx).map(|()| Err(RefusalCode::ShuttingDown.into())),
        })
        .await
    }

    async fn pass_on(&self, request: LedgerRequest) -> Answer {
        if self.port.shard() == self.home {
            return self.answer(request).await;
        }
        let number = self.next.get();
        self.next.set(number + 1);
        let slot = Slot::new();
        self.waiting.borrow_mut().insert(number, slot.clone());
        if self.port.send(self.home, Packet::Request(number, request)).await.is_err() {
            self.waiting.borrow_mut().remove(&number);
            return Err(RefusalCode::ShuttingDown.into());
        }
        slot.wait().await
    }

    async fn answer(&self, request: LedgerRequest) -> Answer {
        match self.here() {
            Some(validator) => answer(&validator, request).await,
            None => Err(match self.broken.get() {
                Some(refusal) => refusal.clone(),
                None => match self.watch.get().and_then(|watch| watch.waits()) {
                    Some(why) => away(&why),
                    None => not_ready(),
                },
            }),
        }
    }
}

async fn receive(this: Rc<LedgerRoute>) {
    loop {
        let (from, packet) = this.port.recv().await;
        match packet {
            Packet::Request(number, request) => {
                let this = this.clone();
                spawn_local(async move {
                    let answer = this.answer(request).await;
                    _ = this.port.send(from, Packet::Reply(number, answer)).await; // the shard may have ended
                })
                .detach_quietly();
            }
            Packet::Reply(number, answer) => {
                let slot = this.waiting.borrow_mut().remove(&number);
                if let Some(slot) = slot {
                    slot.set(answer);
                }
            }
        }
    }
}
