use std::{io, rc::Rc, time::Instant};

use metanode_shard::now;
use quinn_proto::Transmit;
use quinn_udp::EcnCodepoint;

use super::Endpoint;
use crate::connection::{ConnectionState, Phase};

/// What one GSO batch may hold: the kernel cuts up by itself, before sending, what reaches 65,536 bytes with its headers (62 for
/// IPv6). As many segments as fit are sent with one system call (45 at an MTU of 1,452); this, against quinn's ten, is the
/// larger part of the bulk rate.
const GSO_BYTES_MAX: usize = 65_535 - 62;

/// GSO batches of one connection in one round, so that one bulk transfer doesn't keep the others waiting: 512 KiB.
const BURSTS_MAX: usize = 8;

/// Responses outside any connection that wait while the socket's buffer is full. They are optional (their askers repeat), so
/// further ones are dropped; transmits of connections always wait.
const PARKED_RESPONSES_MAX: usize = 64;

/// A transmit that met a full buffer. quinn-proto counts it as sent, so it must be.
pub(super) struct Parked {
    transmit: Transmit,
    contents: Vec<u8>,
}

/// The socket's buffer is full.
struct Full;

/// Whether a connection was served completely.
#[derive(PartialEq, Eq)]
enum Served {
    /// It has nothing more to send now.
    Completely,
    /// It has more, others first.
    InPart,
    /// The socket's buffer is full.
    Blocked,
}

impl Endpoint {
    /// Sends for all connections that were marked before the call. Returns false when the socket's buffer is full.
    pub(super) fn transmit_all(self: &Rc<Self>, buffer: &mut Vec<u8>) -> bool {
        if !self.send_parked() {
            return false;
        }
        let now = now();
        let count = self.dirty.borrow().len();
        for _ in 0..count {
            let Some(state) = self.dirty.borrow_mut().pop_front() else {
                break;
            };
            state.dirty.set(false);
            if state.forgotten.get() {
                continue;
            }
            let served = self.transmit_one(&state, now, buffer);
            self.dispatch(&state);
            if served != Served::Completely && !state.dirty.replace(true) {
                self.dirty.borrow_mut().push_back(state);
            }
            if served == Served::Blocked {
                return false;
            }
        }
        true
    }

    fn transmit_one(&self, state: &ConnectionState, now: Instant, buffer: &mut Vec<u8>) -> Served {
        let gso_max = self.socket.max_gso_segments();
        let mut proto = state.proto.borrow_mut();
        let mut served = Served::InPart;
        for _ in 0..BURSTS_MAX {
            let segments = (GSO_BYTES_MAX / usize::from(proto.current_mtu())).clamp(1, gso_max);
            buffer.clear();
            let Some(transmit) = proto.poll_transmit(now, segments, buffer) else {
                served = Served::Completely;
                break;
            };
            if let Err(Full) = self.send(&transmit, &buffer[..transmit.size]) {
                self.park(transmit, std::mem::take(buffer));
                served = Served::Blocked;
                break;
            }
        }
        let handshake = match state.phase.get() {
            Phase::Handshaking { deadline } => Some(deadline),
            Phase::Connected | Phase::Lost => None,
        };
        if let Some(deadline) = proto.poll_timeout().into_iter().chain(handshake).min() {
            self.deadlines.borrow_mut().at_latest(state.handle.0, deadline);
        }
        served
    }

    /// Sends a packet that belongs to no connection.
    pub(super) fn respond(&self, transmit: &Transmit, contents: &[u8]) {
        let contents = &contents[..transmit.size];
        let waiting = self.parked.borrow().len();
        if waiting == 0 && self.send(transmit, contents).is_ok() {
            return;
        }
        match waiting {
            0..PARKED_RESPONSES_MAX => self.park(copy_of(transmit), contents.to_vec()),
            _ => self.counters.dropped_responses.increment(),
        }
    }

    /// Whether a transmit waits for room.
    pub(super) fn has_parked(&self) -> bool {
        !self.parked.borrow().is_empty()
    }

    fn park(&self, transmit: Transmit, contents: Vec<u8>) {
        self.counters.transmits_parked.increment();
        self.parked.borrow_mut().push_back(Parked { transmit, contents });
    }

    /// Sends what waits. False when the buffer is full again.
    fn send_parked(&self) -> bool {
        loop {
            let Some(parked) = self.parked.borrow_mut().pop_front() else {
                return true;
            };
            if let Err(Full) = self.send(&parked.transmit, &parked.contents[..parked.transmit.size]) {
                self.parked.borrow_mut().push_front(parked);
                return false;
            }
        }
    }

    fn send(&self, transmit: &Transmit, contents: &[u8]) -> Result<(), Full> {
        if self.refuse_sends.get() > 0 {
            self.refuse_sends.set(self.refuse_sends.get() - 1);
            return Err(Full);
        }
        let out = quinn_udp::Transmit {
            destination: transmit.destination,
            ecn: transmit.ecn.and_then(|ecn| EcnCodepoint::from_bits(ecn as u8)),
            contents,
            segment_size: transmit.segment_size,
            src_ip: transmit.src_ip,
        };
        match self.socket.send(&out) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(Full),
            // A probe that found the path's limit, which is its purpose.
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {}
            // Anything else (no route, no memory, a firewall) is a lost packet to QUIC, which knows how to go on.
            Err(error) => {
                tracing::debug!(%error, to = %transmit.destination, "sending failed");
                self.counters.send_errors.increment();
            }
        }
        let datagrams = transmit.segment_size.map_or(1, |size| contents.len().div_ceil(size));
        self.counters.send_calls.increment();
        self.counters.datagrams_sent.add(datagrams as u64);
        self.counters.bytes_sent.add(contents.len() as u64);
        Ok(())
    }
}

fn copy_of(transmit: &Transmit) -> Transmit {
    Transmit {
        destination: transmit.destination,
        ecn: transmit.ecn,
        size: transmit.size,
        segment_size: transmit.segment_size,
        src_ip: transmit.src_ip,
    }
}
