//! Transfers that are cut in the middle, and go on.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::{
    fs,
    net::IpAddr,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use metanode_e2e::{Home, Node, content, is_large, wait_for};
use metanode_proxy::{Conditions, Proxy};
use metanode_wire::Ticket;

/// Large enough that what is on its way is little of it.
fn blob_bytes() -> usize {
    if is_large() { 2 << 30 } else { 256 << 20 }
}

/// A rerun may move so much of it.
const SHARE_MAX: f64 = 0.55;

/// When a transfer is cut: behind the middle by what may be on its way and is lost.
const CUT_AT: f64 = 0.52;

/// The longest that half of it may take on two busy cores, unoptimised.
const HALF_TIME_MAX: Duration = Duration::from_secs(300);

fn source(home: &Home) -> std::path::PathBuf {
    let path = home.beside("source");
    fs::write(&path, content(1, blob_bytes())).unwrap();
    path
}

/// Runs a command until `moved` says that the transfer is over the middle, then kills it.
#[track_caller]
fn cut(mut command: Command, mut moved: impl FnMut() -> f64) {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let middle = wait_for(HALF_TIME_MAX, || (moved() >= CUT_AT * blob_bytes() as f64).then_some(()));
    assert!(middle.is_some(), "half of the transfer within {HALF_TIME_MAX:?}");
    assert!(child.try_wait().unwrap().is_none(), "it was over before it was cut");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[track_caller]
fn at_most_a_share(what: &str, moved: f64) {
    let share = moved / blob_bytes() as f64;
    assert!(share <= SHARE_MAX, "{what} moved {share:.3} of the blob again");
    assert!(share > 0.3, "{what} moved only {share:.3} of the blob: it was not cut in the middle");
}

fn received(node: &Node) -> f64 {
    node.metric("received_bytes_total")
}

fn sent(node: &Node) -> f64 {
    node.metric("sent_bytes_total")
}

#[test]
fn a_put_goes_on_after_its_client_was_killed() {
    let home = Home::new();
    let node = home.start(2);
    let file = source(&home);
    let put = || home.command(["put", file.to_str().unwrap(), "-o", "json"]);
    cut(put(), || received(&node));
    let before = received(&node);
    let stored = home.cli_args(["put", file.to_str().unwrap(), "-o", "json"]).ok().json();
    at_most_a_share("the second put", received(&node) - before);
    let target = home.beside("target");
    home.cli_args(["get", stored["hash"].as_str().unwrap(), target.to_str().unwrap()]).ok();
    assert!(same(&file, &target));
    node.stop();
}

#[test]
fn a_put_goes_on_after_its_node_was_killed() {
    let home = Home::new();
    let node = home.start(1);
    let file = source(&home);
    let mut client = home.command(["put", file.to_str().unwrap()]);
    let mut client = client.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let middle = wait_for(HALF_TIME_MAX, || (received(&node) >= CUT_AT * blob_bytes() as f64).then_some(()));
    assert!(middle.is_some(), "half of the transfer within {HALF_TIME_MAX:?}");
    node.kill();
    client.kill().unwrap();
    client.wait().unwrap();
    let node = home.start(2);
    home.cli_args(["put", file.to_str().unwrap(), "--tag", "whole"]).ok();
    at_most_a_share("the put to the restarted node", received(&node));
    let target = home.beside("target");
    home.cli_args(["get", "whole", target.to_str().unwrap()]).ok();
    assert!(same(&file, &target));
    node.stop();
}

#[test]
fn a_get_goes_on_after_its_client_was_killed() {
    let home = Home::new();
    let node = home.start(2);
    let file = source(&home);
    home.cli_args(["put", file.to_str().unwrap(), "--tag", "x"]).ok();
    let folder = home.beside("into");
    fs::create_dir(&folder).unwrap();
    let target = folder.join("target");
    let before = sent(&node);
    // What is handed to QUIC is not all received: a little more than the middle.
    cut(home.command(["get", "x", target.to_str().unwrap()]), || sent(&node) - before - 0.06 * blob_bytes() as f64);
    assert!(!target.exists());
    let before = sent(&node);
    home.cli_args(["get", "x", target.to_str().unwrap()]).ok();
    at_most_a_share("the second get", sent(&node) - before);
    assert!(same(&file, &target));
    assert_eq!(fs::read_dir(&folder).unwrap().count(), 1, "the part is gone");
    node.stop();
}

#[test]
fn a_part_with_other_bytes_is_not_taken_for_the_blob() {
    let home = Home::new();
    let node = home.start(1);
    let bytes = content(3, 32 << 20);
    let file = home.beside("source");
    fs::write(&file, &bytes).unwrap();
    let hash =
        home.cli_args(["put", file.to_str().unwrap(), "-o", "json"]).ok().json()["hash"].as_str().unwrap().to_owned();
    let target = home.beside("target");
    let part = home.beside(&format!(".target.metanode-part-{}", &hash[..16].trim_start_matches('0')));
    let mut wrong = bytes[..24 << 20].to_vec();
    wrong[1000] ^= 1;
    fs::write(&part, wrong).unwrap();
    home.cli_args(["get", &hash, target.to_str().unwrap()]).ok();
    assert!(same(&file, &target));
    assert!(!part.exists());
    node.stop();
}

#[test]
fn a_get_goes_to_the_next_node_when_the_first_is_not_there() {
    let (first, second) = (Home::new(), Home::new());
    let (node, other) = (first.start(1), second.start(2));
    let (file, target) = (first.beside("source"), first.beside("target"));
    fs::write(&file, content(1, 20 << 20)).unwrap();
    let ticket = |home: &Home| {
        let put = home.cli_args(["put", file.to_str().unwrap(), "-o", "json"]).ok().json();
        put["ticket"].as_str().unwrap().to_owned()
    };
    let both = format!("{}+{}", ticket(&first), ticket(&second));
    node.kill();
    let ran = first.cli_args(["get", &both, target.to_str().unwrap(), "--timeout", "3"]).ok();
    assert!(ran.stderr.contains("going on with the next node"), "{}", ran.stderr);
    assert!(same(&file, &target));
    other.stop();
}

#[test]
fn a_get_takes_from_two_nodes_at_once_and_goes_on_without_one() {
    const BYTES: usize = 96 << 20;
    // So narrow that it lasts long enough to lose a node in the middle of it.
    let conditions = Conditions { delay: Duration::from_millis(2), rate: 16e6, ..Conditions::default() };
    let home = Home::new();
    let file = home.beside("source");
    fs::write(&file, content(1, BYTES)).unwrap();
    let (other_home, loopback) = (Home::new(), IpAddr::from([127, 0, 0, 1]));
    let start = |home: &Home| {
        let node = home.start(2);
        let put = home.cli_args(["put", file.to_str().unwrap(), "-o", "json"]).ok().json();
        let hash = put["hash"].as_str().unwrap().parse().unwrap();
        let proxy = Proxy::start(loopback, node.ready.quic, conditions, 11).unwrap();
        let ticket = Ticket { addresses: vec![proxy.address()], hash: Some(hash), ..node.ready.ticket.clone() };
        (node, proxy, ticket.to_string())
    };
    let ((first, _way, one), (second, _other_way, two)) = (start(&home), start(&other_home));
    let target = home.beside("target");
    let mut get = home.command(["get", &format!("{one}+{two}"), target.to_str().unwrap()]);
    let mut child = get.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    for node in [&first, &second] {
        let fifth = wait_for(HALF_TIME_MAX, || (sent(node) >= BYTES as f64 / 5.0).then_some(()));
        assert!(fifth.is_some(), "each sends a fifth within {HALF_TIME_MAX:?}: {} and {}", sent(&first), sent(&second));
    }
    assert!(child.try_wait().unwrap().is_none(), "it was over before a node was lost");
    first.kill();
    let status = wait_for(HALF_TIME_MAX, || child.try_wait().unwrap()).expect("the command ends");
    assert!(status.success(), "{status}");
    assert!(same(&file, &target));
    let sent = sent(&second);
    assert!(sent < 0.9 * BYTES as f64, "what the first had sent is not asked of the second: {sent}");
    second.stop();
}

#[test]
fn transfers_outlive_a_restart_of_their_node() {
    let home = Home::new();
    let mut node = home.start(2);
    let address = node.ready.quic.to_string();
    let ticket = node.ready.ticket.to_string();
    let (file, target) = (source(&home), home.beside("target"));
    for arguments in [["put", file.to_str().unwrap(), "--tag", "x"], ["get", "x", target.to_str().unwrap(), "--force"]]
    {
        let moved = |node: &Node| if arguments[0] == "put" { received(node) } else { sent(node) };
        let before = moved(&node);
        let mut command = home.command(arguments);
        let mut child = command.args(["--node", &ticket]).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let middle = wait_for(HALF_TIME_MAX, || (moved(&node) - before >= CUT_AT * blob_bytes() as f64).then_some(()));
        assert!(middle.is_some(), "half of the transfer within {HALF_TIME_MAX:?}");
        node.kill();
        node = home.start_at(2, &address);
        let status = wait_for(HALF_TIME_MAX, || child.try_wait().unwrap()).expect("the command ends");
        let mut errors = String::new();
        std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut errors).unwrap();
        assert!(status.success(), "{status}: {errors}");
        assert!(errors.contains("connecting again"), "{errors}");
        assert!(moved(&node) <= 0.6 * blob_bytes() as f64, "{}: {} moved again", arguments[0], moved(&node));
    }
    assert!(same(&file, &target));
    node.stop();
}

fn same(a: &Path, b: &Path) -> bool {
    fs::read(a).unwrap() == fs::read(b).unwrap()
}
