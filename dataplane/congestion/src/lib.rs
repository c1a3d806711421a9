//! How fast a side of a connection sends.
//!
//! CUBIC (RFC 9438) takes every lost packet for a full queue. On a path of 50 ms that loses 1 % of its packets for other reasons
//! (radio, a bad cable) it carries 0.4 MB/s, however wide the path is. [`Tolerant`] is quinn-proto's CUBIC, told of losses only when they
//! are more than [`TOLERATED`] of what arrives: the threshold of BBRv3 (draft-ietf-ccwg-bbr, `BBR.LossThresh`). A queue that
//! overflows costs more than that within a round trip, and slows it down as before.
//!
//! It also ends slow start when round trips grow, before the queue overflows (the criterion of HyStart++, RFC 9406 section 4.2): doubling until
//! something is lost loses up to half a window at once, in thousands of gaps, and quinn gives a stream up that has more than 1,024.
//!
//! A core: no clock, no I/O. [`Congestion::factory`] is what a transport configuration takes.

use std::{
    any::Any,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn_proto::{
    RttEstimator,
    congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig},
};

/// One of so many bytes may be lost: 2 %.
pub const TOLERATED: u64 = 50;

/// So many packets may be lost at any time, as while a window is so small that 2 % of it is less than a packet.
const CREDIT_PACKETS: u64 = 8;

/// Round trip samples of a round that say something: RFC 9406's `N_RTT_SAMPLE`.
const SAMPLES_MIN: u32 = 8;

/// Bounds of the growth of a round trip that ends slow start, an eighth of it otherwise: RFC 9406's `MIN_RTT_THRESH` and
/// `MAX_RTT_THRESH`.
const GROWTH_MIN: Duration = Duration::from_millis(4);
const GROWTH_MAX: Duration = Duration::from_millis(16);

/// What decides how fast a side sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// [`Tolerant`].
    #[default]
    Tolerant,
    /// CUBIC as in RFC 9438, for paths that are shared with many others and lose nothing of their own.
    Cubic,
}

impl Congestion {
    /// Makes the controller of each path.
    pub fn factory(self) -> Arc<dyn ControllerFactory + Send + Sync> {
        match self {
            Self::Tolerant => Arc::new(TolerantConfig::default()),
            Self::Cubic => Arc::new(CubicConfig::default()),
        }
    }
}

/// Makes [`Tolerant`] controllers.
#[derive(Debug, Default, Clone)]
struct TolerantConfig(Arc<CubicConfig>);

impl ControllerFactory for TolerantConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Tolerant::new(self.0.clone().build(now, current_mtu), current_mtu))
    }
}

/// See the crate's documentation.
pub struct Tolerant {
    cubic: Box<dyn Controller>,
    mtu: u64,
    /// Bytes that may be lost before CUBIC hears of it. Grows with what arrives.
    credit: u64,
    /// When CUBIC last heard: what was sent before and is missed later belongs to the same event.
    told: Option<Instant>,
    /// Until slow start is over.
    start: Option<SlowStart>,
}

/// Round trips during slow start.
#[derive(Debug, Clone, Default)]
struct SlowStart {
    sent: u64,
    /// The round ends when a later packet is acknowledged.
    round_end: u64,
    /// Shortest round trip of the last round.
    before: Option<Duration>,
    /// Of this one.
    shortest: Option<Duration>,
    samples: u32,
}

impl std::fmt::Debug for Tolerant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tolerant").field("window", &self.cubic.window()).field("credit", &self.credit).finish()
    }
}

impl Tolerant {
    fn new(cubic: Box<dyn Controller>, mtu: u16) -> Self {
        let mtu = u64::from(mtu);
        Self { cubic, mtu, credit: CREDIT_PACKETS * mtu, told: None, start: Some(SlowStart::default()) }
    }

    fn credit_max(&self) -> u64 {
        (CREDIT_PACKETS * self.mtu).max(self.cubic.window() / TOLERATED)
    }

    /// Notes a packet that has arrived. Whether the queue of the path is so long that slow start should end.
    fn arrived(&mut self, now: Instant, sent: Instant, bytes: u64) -> bool {
        self.credit = (self.credit + bytes / TOLERATED).min(self.credit_max());
        self.start.as_mut().is_some_and(|start| start.sample(now.saturating_duration_since(sent)))
    }

    /// The queue of the path is full, or about to be.
    fn tell(&mut self, now: Instant, sent: Instant, is_persistent: bool, lost_bytes: u64) {
        self.cubic.on_congestion_event(now, sent, is_persistent, lost_bytes);
        self.told = Some(now);
        self.start = None;
        // What the event left of the credit says nothing about the time behind it.
        self.credit = self.credit_max();
    }
}

impl SlowStart {
    fn sample(&mut self, round_trip: Duration) -> bool {
        self.samples += 1;
        let shortest = self.shortest.map_or(round_trip, |shortest| shortest.min(round_trip));
        self.shortest = Some(shortest);
        self.samples >= SAMPLES_MIN
            && self.before.is_some_and(|before| shortest >= before + (before / 8).clamp(GROWTH_MIN, GROWTH_MAX))
    }

    fn acknowledged(&mut self, packet: u64) {
        if packet <= self.round_end {
            return;
        }
        self.round_end = self.sent;
        if self.samples >= SAMPLES_MIN {
            self.before = self.shortest;
        }
        self.shortest = None;
        self.samples = 0;
    }
}

impl Controller for Tolerant {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        if let Some(start) = &mut self.start {
            start.sent = last_packet_number;
        }
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        let is_queueing = self.arrived(now, sent, bytes);
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
        if is_queueing {
            self.tell(now, now, false, 0);
        }
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_packet_num_acked: Option<u64>) {
        if let (Some(start), Some(packet)) = (&mut self.start, largest_packet_num_acked) {
            start.acknowledged(packet);
        }
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        if self.told.is_some_and(|told| sent <= told) && !is_persistent_congestion {
            return; // as CUBIC would
        }
        // No bytes: a router has marked packets, which says what losses only hint at.
        if lost_bytes > 0 && lost_bytes <= self.credit && !is_persistent_congestion {
            self.credit -= lost_bytes;
            return;
        }
        self.tell(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu.into();
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.cubic.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            cubic: self.cubic.clone_box(),
            mtu: self.mtu,
            credit: self.credit,
            told: self.told,
            start: self.start.clone(),
        })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MTU: u64 = 1200;

    fn controller() -> (Tolerant, Instant) {
        let now = Instant::now();
        (Tolerant::new(Arc::new(CubicConfig::default()).build(now, MTU as u16), MTU as u16), now)
    }

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    /// Losses of single packets, `per_mille` of what is sent, evenly spread. How often CUBIC heard.
    fn reductions(per_mille: u64, packets: u64) -> u32 {
        let (mut tolerant, start) = controller();
        let (mut count, mut due) = (0, 0);
        for packet in 0..packets {
            let now = at(start, 1000 + packet);
            due += per_mille;
            if due >= 1000 {
                due -= 1000;
                let before = tolerant.told;
                tolerant.on_congestion_event(now, at(start, 950 + packet), false, MTU);
                count += u32::from(tolerant.told != before);
            } else {
                tolerant.arrived(now, at(start, 950 + packet), MTU);
            }
        }
        count
    }

    #[test]
    fn a_few_losses_do_not_count_and_more_do() {
        assert_eq!(reductions(10, 100_000), 0);
        assert_eq!(reductions(19, 100_000), 0);
        assert!(reductions(40, 100_000) > 10);
        assert!(reductions(200, 10_000) > 10);
    }

    #[test]
    fn a_burst_counts_once() {
        let (mut tolerant, start) = controller();
        let window = tolerant.window();
        for _ in 0..=CREDIT_PACKETS {
            tolerant.on_congestion_event(at(start, 100), at(start, 50), false, MTU);
        }
        let reduced = tolerant.window();
        assert!(reduced < window, "{reduced} of {window}");
        for _ in 0..100 {
            tolerant.on_congestion_event(at(start, 120), at(start, 90), false, MTU);
        }
        assert_eq!(tolerant.window(), reduced, "they were sent before the event was noticed");
        for _ in 0..=CREDIT_PACKETS {
            tolerant.on_congestion_event(at(start, 300), at(start, 250), false, MTU);
        }
        assert!(tolerant.window() < reduced);
    }

    #[test]
    fn marks_and_persistent_congestion_are_passed_on_at_once() {
        let (mut tolerant, start) = controller();
        let window = tolerant.window();
        tolerant.on_congestion_event(at(start, 100), at(start, 50), false, 0);
        let marked = tolerant.window();
        assert!(marked < window);
        tolerant.on_congestion_event(at(start, 101), at(start, 51), true, MTU);
        // CUBIC itself ignores what was sent before it last heard.
        tolerant.on_congestion_event(at(start, 202), at(start, 151), true, MTU);
        assert!(tolerant.window() < marked);
    }

    #[test]
    fn slow_start_ends_when_round_trips_grow() {
        let (mut tolerant, start) = controller();
        let mut round = |round_trip: u64, packets: u64| {
            let mut queueing = false;
            let first = tolerant.start.as_ref().map_or(0, |start| start.sent);
            for packet in 1..=packets {
                tolerant.on_sent(start, MTU, first + packet);
            }
            for _ in 0..packets {
                queueing |= tolerant.arrived(at(start, 1000 + round_trip), at(start, 1000), MTU);
            }
            tolerant.on_end_acks(at(start, 1000), 0, false, Some(first + packets));
            queueing
        };
        assert!(!round(50, 10), "nothing to compare with");
        assert!(!round(55, 20), "less than an eighth");
        assert!(!round(70, 5), "too few samples");
        assert!(round(63, 20));
    }
}
