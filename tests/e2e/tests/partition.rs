//! Validators on machines of their own, as far as the network goes, between which a cable is cut.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use metanode_e2e::{Halves, Network, is_large, left_behind, wait_for};
use metanode_proxy::{Conditions, Proxy};

/// Of rounds, at most.
const CAP: Duration = Duration::from_secs(2);

/// Of validators; each has an address of its own.
const PORT: u16 = 4441;

fn stats(halves: &Halves, network: &Network, machine: u8, what: &str) -> u64 {
    let stats = halves.cli(machine, &network.data(machine.into()), "ledger stats -o json").ok().json();
    stats[what].as_u64().unwrap()
}

fn height(halves: &Halves, network: &Network, machine: u8) -> u64 {
    stats(halves, network, machine, "height")
}

#[test]
fn a_parted_network_stops_and_goes_on_when_it_is_whole_again() {
    let Some(halves) = Halves::make(4) else { return };
    let name = halves.name().to_owned();
    let (parted, cap) = if is_large() { (60, 5 * CAP) } else { (15, CAP) };
    let cap_ms = cap.as_millis().to_string();
    let mut network = Network::new(4, &["--empty-ms", "100", "--round-ms", "300", "--round-ms-max", &cap_ms]);
    let address = |index: usize| SocketAddr::new(halves.address(index as u8), PORT);
    network.move_to(address, |_, to| address(to));
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
    assert_eq!(left_behind(&name), [""; 0], "nothing is left behind");
}

#[test]
fn far_apart_on_bad_cables_blocks_come_and_who_was_killed_returns() {
    let Some(mut halves) = Halves::make(4) else { return };
    let name = halves.name().to_owned();
    halves.put_between();
    assert!(left_behind(&name).len() > 8, "what is looked for at the end is found now");
    let ms = Duration::from_millis;
    let conditions =
        Conditions { delay: ms(40), jitter: ms(20), loss: 0.02, duplication: 0.01, ..Conditions::default() };
    let proxies: Vec<Proxy> = (0..4).map(|machine| halves.proxy(machine, PORT, conditions)).collect();
    let mut network = Network::new(4, &["--empty-ms", "100", "--round-ms", "1000", "--round-ms-max", "4000"]);
    let address = |index: usize| SocketAddr::new(halves.address(index as u8), PORT);
    let is_near = |from: usize, to: usize| halves.side(from as u8) == halves.side(to as u8);
    // What a validator says of its own address is of no use on the other side: the configured one stays beside it.
    network.move_to(address, |from, to| if is_near(from, to) { address(to) } else { proxies[to].address() });
    for index in 0..4 {
        network.start_by(index, |command| halves.on(index as u8, command));
    }
    let key = network.folder().join("operator.key");
    let mut executed = 0;
    let mut set = |network: &Network, machine: u8, name: &str| {
        let now = || stats(&halves, network, machine, "executed");
        // It says which number the account's next transaction has.
        let is_there = wait_for(Duration::from_secs(60), || (now() >= executed).then_some(()));
        assert!(is_there.is_some(), "validator {machine} executes height {executed}");
        let line = format!("tx send set {name} 1 --timeout 60 --key {}", key.display());
        halves.cli(machine, &network.data(machine.into()), &line).ok();
        executed = now();
    };
    for machine in 0..4 {
        set(&network, machine, "a");
    }
    network.kill(3);
    // Now all that are left are needed, and one of them is far.
    for machine in 0..3 {
        set(&network, machine, "b");
    }
    network.start_by(3, |command| halves.on(3, command));
    let connected = || (stats(&halves, &network, 0, "connected") == 3).then_some(());
    assert!(wait_for(Duration::from_secs(60), connected).is_some(), "it is reached from the other side again");
    set(&network, 3, "c");
    network.kill(0);
    set(&network, 3, "d");
    for (machine, proxy) in proxies.iter().enumerate() {
        let counts = proxy.counts();
        assert!(counts.passed > 100 && counts.lost > 0 && counts.doubled > 0, "{machine}: {counts:?}");
    }
    let genesis = network.folder().join("genesis.json");
    let verified = halves.cli(2, &network.data(2), &format!("ledger verify -o json --genesis {}", genesis.display()));
    assert_eq!(verified.ok().json()["transactions"], 9);
    drop(network);
    drop(proxies);
    drop(halves);
    assert_eq!(left_behind(&name), [""; 0], "nothing is left behind");
}
