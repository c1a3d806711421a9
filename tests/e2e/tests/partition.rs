//! Validators on machines of their own, as far as the network goes, between which a cable is cut.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::time::{Duration, Instant};

use metanode_e2e::{Halves, Network, is_large, left_behind, wait_for};

/// Of rounds, at most.
const CAP: Duration = Duration::from_secs(2);

fn height(halves: &Halves, network: &Network, machine: u8) -> u64 {
    let stats = halves.cli(machine, &network.data(machine.into()), "ledger stats -o json").ok().json();
    stats["height"].as_u64().unwrap()
}

#[test]
fn a_parted_network_stops_and_goes_on_when_it_is_whole_again() {
    let before = left_behind();
    let Some(halves) = Halves::make(4) else { return };
    let (parted, cap) = if is_large() { (60, 5 * CAP) } else { (15, CAP) };
    let cap_ms = cap.as_millis().to_string();
    let mut network = Network::new(4, &["--empty-ms", "100", "--round-ms", "300", "--round-ms-max", &cap_ms]);
    network.move_to(|index| format!("{}:4441", halves.address(index as u8)));
    for index in 0..4 {
        network.start_by(index, |command| halves.on(index as u8, command));
    }
    let reached = wait_for(Duration::from_secs(60), || (height(&halves, &network, 0) >= 3).then_some(()));
    assert!(reached.is_some(), "they find each other");

    halves.cut(true);
    // What was under way may still end; then nothing more does.
    let look = || -> Vec<u64> { (0..4).map(|machine| height(&halves, &network, machine)).collect() };
    let mut last = look();
    let stuck = wait_for(Duration::from_secs(30), || {
        let now = look();
        (std::mem::replace(&mut last, now.clone()) == now).then_some(now)
    });
    let stuck = stuck.expect("no more blocks come");
    std::thread::sleep(Duration::from_secs(parted)); // not for an event: this long it is parted
    let still = look();
    assert_eq!(stuck, still, "no side has a quorum");

    halves.cut(false);
    let healed = Instant::now();
    let next = still.iter().max().unwrap() + 1;
    let limit = 2 * cap + Duration::from_secs(1);
    let reached =
        wait_for(Duration::from_secs(60), || (height(&halves, &network, 0) >= next).then(|| healed.elapsed()));
    let time = reached.expect("they go on");
    println!("parted for {parted} s; the next height came {} ms after the cable was mended", time.as_millis());
    // The bound is on the protocol; looking takes a while too, on a busy machine.
    assert!(time < limit + Duration::from_secs(2), "{time:?} after the cable was mended; the limit is {limit:?}");
    for machine in 0..4 {
        let reached = wait_for(Duration::from_secs(60), || (height(&halves, &network, machine) >= next).then_some(()));
        assert!(reached.is_some(), "validator {machine} goes on");
    }
    drop(network);
    drop(halves);
    assert_eq!(left_behind(), before, "nothing is left behind");
}
