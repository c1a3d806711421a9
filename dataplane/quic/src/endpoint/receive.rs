use std::{
    io::{self, IoSliceMut},
    rc::Rc,
    time::Instant,
};

use bytes::{Bytes, BytesMut};
use metanode_shard::now;
use quinn_proto::{DatagramEvent, EcnCodepoint, Incoming, VarInt};
use quinn_udp::RecvMeta;

use super::{Datagram, Endpoint, limit_key};
use crate::{connection::Phase, steer};

/// Datagrams (or GRO batches of them) one system call receives. Each takes a slot of [`SLOT_BYTES`].
const BATCH: usize = 16;

/// The largest GRO batch: an IP packet.
const SLOT_BYTES: usize = 65_536;

/// Datagrams from this size on share an allocation with those that came with them; smaller ones are what the internet carries, and copied.
const SHARED_BYTES_MIN: usize = 2_048;

/// System calls in one round of the driver, so that a flood can't keep answers from being sent.
const CALLS_MAX: usize = 4;

/// Datagrams from other shards handled in one round.
const FORWARDED_MAX: usize = 256;

/// First packets that wait for their handshake. A client repeats its first packet after a second, so a longer queue than one
/// second of handshakes (4,400 measured) only holds what its sender has given up.
const INCOMING_MAX: usize = 1024;

/// Handshakes begun in one round: each costs 0.3 to 0.9 ms of key exchange and signatures, during which nothing else moves; a round
/// without costs microseconds.
const HANDSHAKES_MAX: usize = 1;

/// What the driver receives into.
pub(super) struct Receiver {
    memory: Box<[u8]>,
    metas: [RecvMeta; BATCH],
    /// Packets that quinn-proto answers with outside any connection.
    response: Vec<u8>,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self {
            memory: vec![0; BATCH * SLOT_BYTES].into_boxed_slice(),
            metas: [RecvMeta::default(); BATCH],
            response: Vec::with_capacity(2048),
        }
    }
}

impl Endpoint {
    /// Receives what has arrived, up to a bound. True when the socket was emptied.
    pub(super) fn receive(self: &Rc<Self>, receiver: &mut Receiver) -> bool {
        let (mut datagrams, mut bytes) = (0, 0);
        let mut calls = 0;
        let drained = loop {
            if calls == CALLS_MAX {
                break false;
            }
            calls += 1;
            let mut slots = receiver.memory.chunks_exact_mut(SLOT_BYTES);
            let mut vectors: [IoSliceMut<'_>; BATCH] =
                std::array::from_fn(|_| IoSliceMut::new(slots.next().expect("as many slots as vectors")));
            let received = match self.socket.receive(&mut vectors, &mut receiver.metas) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break true,
                Err(error) => {
                    // An ICMP message about something sent earlier, or memory pressure: neither is a reason to stop.
                    tracing::debug!(%error, "receiving failed");
                    self.counters.receive_errors.increment();
                    continue;
                }
            };
            let now = now();
            for (meta, slot) in receiver.metas[..received].iter().zip(receiver.memory.chunks_exact(SLOT_BYTES)) {
                bytes += meta.len;
                // Large datagrams of a GRO batch share one allocation. Small ones have one each: what QUIC keeps of one would keep the
                // whole batch, fifty times as much.
                if meta.stride < SHARED_BYTES_MIN {
                    for datagram in slot[..meta.len].chunks(meta.stride.max(1)) {
                        datagrams += 1;
                        self.sort(now, meta, BytesMut::from(datagram), &mut receiver.response);
                    }
                    continue;
                }
                let mut batch = BytesMut::from(&slot[..meta.len]);
                while !batch.is_empty() {
                    datagrams += 1;
                    let datagram = batch.split_to(meta.stride.min(batch.len()));
                    self.sort(now, meta, datagram, &mut receiver.response);
                }
            }
            if received < BATCH {
                break true;
            }
        };
        self.counters.receive_calls.add(calls as u64);
        self.counters.datagrams_received.add(datagrams);
        self.counters.bytes_received.add(bytes as u64);
        drained
    }

    /// Handles what other shards have handed over, up to a bound.
    pub(super) fn receive_forwarded(self: &Rc<Self>, first: Option<Datagram>, receiver: &mut Receiver) {
        let rest = std::iter::from_fn(|| self.forward.try_recv()).map(|(_, datagram)| datagram);
        let mut count = 0;
        let mut moment = None;
        for datagram in first.into_iter().chain(rest).take(FORWARDED_MAX) {
            count += 1;
            self.handle(*moment.get_or_insert_with(now), datagram, &mut receiver.response);
        }
        if count > 0 {
            self.counters.forwarded_in.add(count);
        }
    }

    /// Handles a datagram here or hands it to the shard it belongs to.
    fn sort(self: &Rc<Self>, now: Instant, meta: &RecvMeta, bytes: BytesMut, response: &mut Vec<u8>) {
        let owner = steer::owner(&bytes, self.layout).unwrap_or(self.shard);
        let ecn = meta.ecn.and_then(|ecn| EcnCodepoint::from_bits(ecn as u8));
        let datagram = Datagram { from: meta.addr, to: meta.dst_ip, ecn, bytes };
        if owner == self.shard {
            self.handle(now, datagram, response);
            return;
        }
        match self.forward.try_send(owner, datagram) {
            Ok(()) => self.counters.forwarded_out.increment(),
            // As good as lost on the way: its sender repeats it.
            Err(_) => self.counters.dropped_forward_full.increment(),
        }
    }

    fn handle(self: &Rc<Self>, now: Instant, datagram: Datagram, response: &mut Vec<u8>) {
        let Datagram { from, to, ecn, bytes } = datagram;
        let is_long = bytes.first().is_some_and(|first| first & 0x80 != 0);
        response.clear();
        let event = self.proto.borrow_mut().handle(now, from, to, ecn, bytes, response);
        match event {
            Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                let state = self.connections.borrow().get(handle.0).and_then(Clone::clone);
                if let Some(state) = state {
                    state.proto.borrow_mut().handle_event(event);
                    self.mark(&state);
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) => self.admit(incoming, response),
            Some(DatagramEvent::Response(transmit)) => {
                if !is_long {
                    self.counters.resets_sent.increment();
                }
                self.respond(&transmit, response);
            }
            None => self.counters.ignored.increment(),
        }
    }

    /// Decides about a first packet: a place in the queue of handshakes, a refusal, or a proof of address first.
    fn admit(&self, incoming: Incoming, response: &mut Vec<u8>) {
        response.clear();
        let address = limit_key(incoming.remote_address().ip());
        let waiting = self.incoming.borrow().len();
        let refusal = if self.shutting_down.get() {
            Some(&self.counters.refused_shutdown)
        } else if self.connections_count.get() + waiting >= self.config.connections_max {
            Some(&self.counters.refused_full)
        } else if self.per_address.borrow().get(&address).copied().unwrap_or(0)
            >= self.config.connections_per_address_max
        {
            Some(&self.counters.refused_address)
        } else {
            None
        };
        let mut proto = self.proto.borrow_mut();
        if let Some(counter) = refusal {
            counter.increment();
            let transmit = proto.refuse(incoming, response);
            self.respond(&transmit, response);
        } else if self.handshaking_count.get() + waiting >= self.config.incoming_retry_threshold
            && !incoming.remote_address_validated()
            && incoming.may_retry()
        {
            match proto.retry(incoming, response) {
                Ok(transmit) => {
                    self.counters.retries.increment();
                    self.respond(&transmit, response);
                }
                Err(error) => proto.ignore(error.into_incoming()),
            }
        } else if self.handshaking_count.get() + waiting >= self.config.handshakes_max
            && !self.give_up_oldest(&mut proto)
        {
            self.counters.dropped_handshakes_max.increment();
            proto.ignore(incoming);
        } else if waiting >= INCOMING_MAX {
            self.counters.dropped_handshake_queue.increment();
            proto.ignore(incoming);
        } else {
            self.incoming.borrow_mut().push_back(incoming);
        }
    }

    /// Begins handshakes, up to a bound.
    pub(super) fn begin_handshakes(self: &Rc<Self>, receiver: &mut Receiver) {
        for _ in 0..HANDSHAKES_MAX {
            let Some(incoming) = self.incoming.borrow_mut().pop_front() else {
                return;
            };
            receiver.response.clear();
            let accepted = self.proto.borrow_mut().accept(incoming, now(), &mut receiver.response, None);
            match accepted {
                Ok((handle, proto)) => {
                    let state = self.add(handle, proto, true);
                    self.mark(&state);
                }
                Err(error) => {
                    tracing::debug!(cause = %error.cause, "handshake failed at its first packet");
                    self.counters.handshakes_begun.increment();
                    self.counters.handshakes_failed.increment();
                    if let Some(transmit) = error.response {
                        self.respond(&transmit, &receiver.response);
                    }
                }
            }
        }
    }

    /// Lets timers of the connections expire.
    pub(super) fn expire(&self, now: Instant) {
        loop {
            let Some(slot) = self.deadlines.borrow_mut().pop_due(now) else {
                return;
            };
            let Some(state) = self.connections.borrow().get(slot).and_then(Clone::clone) else {
                continue;
            };
            let mut proto = state.proto.borrow_mut();
            if let Phase::Handshaking { deadline } = state.phase.get()
                && deadline <= now
            {
                if state.is_server {
                    drop(proto);
                    self.forget(&state, &mut self.proto.borrow_mut());
                    continue;
                }
                proto.close(now, VarInt::from_u32(0), Bytes::from_static(b"handshake timeout"));
                drop(proto);
                self.lose(&state, crate::ConnectionLost::TimedOut);
                self.mark(&state);
                continue;
            }
            match proto.poll_timeout() {
                Some(deadline) if deadline <= now => proto.handle_timeout(now),
                // It came up early. Sending nothing, the transmit stage stores the new deadline.
                _ => {}
            }
            drop(proto);
            self.mark(&state);
        }
    }
}
