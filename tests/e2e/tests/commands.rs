//! The command line, beside a running node.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt as _, symlink},
        net::UnixListener,
    },
    path::Path,
    time::Duration,
};

use metanode_crypto::Identity;
use metanode_e2e::{Home, Item, Ran, Ready, content, is_running, make_tree, metanode, picture, run, wait_for};
use serde_json::Value;

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_else(|| panic!("no {name} in {value}"))
}

/// Stores a file and returns its hash.
fn put_file(home: &Home, path: &Path) -> String {
    let report = home.cli_args(["put", "-o", "json", path.to_str().unwrap()]).ok().json();
    text(&report, "hash").to_owned()
}

#[test]
fn files_go_in_and_come_out() {
    let home = Home::new();
    let _node = home.start(2);
    for (name, size) in
        [("empty", 0), ("one", 1), ("page", 4096), ("chunk", 1 << 18), ("more", (1 << 18) + 1), ("large", 5 << 20)]
    {
        let (source, target) = (home.beside(name), home.beside(&format!("{name}.back")));
        let bytes = content(1, size);
        fs::write(&source, &bytes).unwrap();
        let report = home.cli_args(["put", "-o", "json", source.to_str().unwrap()]).ok().json();
        let hash = text(&report, "hash");
        assert_eq!(hash, metanode_crypto::hash(&bytes).to_string());
        assert_eq!((report["size"].as_u64(), report["existed"].as_bool()), (Some(size as u64), Some(false)));
        assert_eq!(text(&report, "kind"), "blob");
        let report = home.cli_args(["get", "-o", "json", hash, target.to_str().unwrap()]).ok().json();
        assert_eq!(report["size"].as_u64(), Some(size as u64));
        assert!(fs::read(&target).unwrap() == bytes, "{size} bytes");
        let stat = home.cli(&format!("stat -o json {hash}")).ok().json();
        assert_eq!((stat["size"].as_u64(), text(&stat, "class")), (Some(size as u64), "durable"));
        // What is there is not replaced unasked.
        fs::write(&target, "precious").unwrap();
        home.cli_args(["get", hash, target.to_str().unwrap()]).refused(1);
        assert_eq!(fs::read(&target).unwrap(), b"precious");
        home.cli_args(["get", "--force", hash, target.to_str().unwrap()]).ok();
        assert!(fs::read(&target).unwrap() == bytes);
    }
    let missing = "ab".repeat(32);
    home.cli(&format!("get {missing} nowhere")).refused(3);
    home.cli(&format!("stat {missing}")).refused(3);
    home.cli("put no-such-file").failed(3);
    assert!(!home.beside("nowhere").exists());
}

#[test]
fn standard_input_and_output() {
    let home = Home::new();
    let _node = home.start(2);
    for size in [0, 3, 1 << 18, (2 << 20) + 7] {
        let bytes = content(2, size);
        let report = run(&mut home.command(["put", "-", "-o", "json"]), &bytes).ok().json();
        assert_eq!(text(&report, "hash"), metanode_crypto::hash(&bytes).to_string());
        let got = home.cli(&format!("get {} -", text(&report, "hash"))).ok();
        assert!(got.stdout == bytes, "{size} bytes");
    }
    // A part, named in each way.
    let bytes = content(2, (2 << 20) + 7);
    let hash = metanode_crypto::hash(&bytes);
    for (range, part) in
        [("5..9", 5..9), ("..4K", 0..4096), ("2M..", 2 << 20..bytes.len()), ("1M+100", 1 << 20..(1 << 20) + 100)]
    {
        assert!(home.cli(&format!("get {hash} - --range {range}")).ok().stdout == bytes[part], "{range}");
    }
    home.cli(&format!("get {hash} - --range 3M..")).refused(2);
    home.cli(&format!("get {hash} - --range 9..5")).usage();
}

trait Usage {
    fn usage(self);
}

impl Usage for Ran {
    /// The command line was not understood.
    #[track_caller]
    fn usage(self) {
        assert_eq!((self.code, self.stdout.len()), (2, 0), "{}", self.stderr);
    }
}

#[test]
fn folders_go_in_and_come_out() {
    let home = Home::new();
    let node = home.start(4);
    let (source, target) = (home.beside("source"), home.beside("target"));
    fs::create_dir(&source).unwrap();
    make_tree(&source, true);
    let report = home.cli("put source --tag backup/today -o json").ok().json();
    let hash = text(&report, "hash");
    assert_eq!(
        (text(&report, "kind"), report["skipped"].as_u64(), report["links"].as_u64()),
        ("folder", Some(1), Some(2))
    );
    let expected = picture(&source);
    let files = expected.values().filter(|item| matches!(item, Item::File(..))).count();
    assert_eq!(report["files"].as_u64(), Some(files as u64));
    home.cli(&format!("get {hash} target")).ok();
    assert!(picture(&target) == expected, "another folder came back");
    // A folder that is there stays as it is, unless told otherwise; then it is replaced as a whole.
    fs::write(target.join("precious"), "x").unwrap();
    home.cli("get backup/today target").refused(1);
    assert!(target.join("precious").exists());
    home.cli("get backup/today target --force").ok();
    assert!(picture(&target) == expected, "a folder is replaced, not mixed");
    // Parts of it.
    let large = home.cli(&format!("get {hash}/nested/deeper/deepest/large -")).ok();
    assert!(large.stdout == content(4, 3 << 20));
    home.cli_args(["get", "backup/today/script", "script"]).ok();
    assert_eq!(fs::metadata(home.beside("script")).unwrap().permissions().mode() & 0o777, 0o755);
    home.cli("get backup/today/nested/deeper part").ok();
    let part = picture(&home.beside("part"));
    assert_eq!(part.len(), expected.keys().filter(|path| path.starts_with("nested/deeper/")).count());
    for (path, item) in part {
        assert!(expected[&format!("nested/deeper/{path}")] == item, "{path}");
    }
    home.cli("get backup/today/no/such/entry x").refused(3);
    home.cli("get backup/tomorrow x").refused(3);
    home.cli("get backup/today -").refused(2);
    // Its entries.
    let listed = home.cli("ls backup/today -o json").ok().json();
    let paths: Vec<_> = listed.as_array().unwrap().iter().map(|entry| text(entry, "path")).collect();
    assert!(paths.iter().copied().eq(expected.keys().map(String::as_str)), "{paths:?}");
    let stat = home.cli("stat backup/today/script -o json").ok().json();
    assert_eq!((stat["size"].as_u64(), text(&stat, "mode")), (Some(10), "0755"));
    // What the folder refers to is protected by it, and it by its tag.
    let inner = metanode_crypto::hash(b"#!/bin/sh\n");
    home.cli(&format!("rm {inner}")).refused(10);
    home.cli(&format!("rm {hash}")).refused(10);
    home.cli("tag rm backup/today").ok();
    home.cli(&format!("rm {hash}")).ok();
    // Its files go behind its removal.
    let gone = wait_for(Duration::from_secs(20), || (home.cli("ls -o json").ok().text() == "[]\n").then_some(()));
    assert!(gone.is_some(), "the folder's files stay");
    home.cli(&format!("get {inner} x")).refused(3);
    node.stop();
}

#[test]
fn links_that_lead_out_of_a_folder_are_refused() {
    let home = Home::new();
    let _node = home.start(1);
    fs::create_dir(home.beside("source")).unwrap();
    symlink("/etc/passwd", home.beside("source/out")).unwrap();
    home.cli("put source --tag links").ok();
    home.cli("get links target").refused(1);
    assert!(!home.beside("target").exists());
    home.cli("get links target --unsafe-links").ok();
    assert_eq!(fs::read_link(home.beside("target/out")).unwrap(), Path::new("/etc/passwd"));
}

#[test]
fn tags_and_removal() {
    let home = Home::new();
    let node = home.start(2);
    let [a, b] = ["a", "b"].map(|name| {
        fs::write(home.beside(name), name.repeat(100)).unwrap();
        put_file(&home, &home.beside(name))
    });
    home.cli(&format!("tag set name {a}")).ok();
    assert_eq!(home.cli("tag get name").ok().text().trim(), a);
    assert_eq!(text(&home.cli("tag get name -o json").ok().json(), "hash"), a);
    home.cli(&format!("rm {a}")).refused(10);
    home.cli("tag set second name").ok();
    assert_eq!(home.cli("tag get second").ok().text().trim(), a);
    home.cli("tag rm second").ok();
    home.cli("tag set second missing").refused(3);
    home.cli(&format!("tag set second {a}/entry")).refused(2);
    home.cli(&format!("tag set name {b}")).ok();
    home.cli(&format!("rm {a}")).ok();
    home.cli(&format!("rm {a}")).refused(3);
    let tags = home.cli("ls --tags -o json").ok().json();
    assert_eq!(
        (tags.as_array().unwrap().len(), text(&tags[0], "name"), text(&tags[0], "hash")),
        (1, "name", b.as_str())
    );
    assert_eq!(home.cli("tag ls -o json").ok().json(), tags);
    home.cli(&format!("tag set missing {a}")).refused(3);
    home.cli("tag rm missing").refused(3);
    node.stop();
    let _node = home.start(2);
    home.cli(&format!("get {a} x")).refused(3);
    home.cli("tag rm name").ok();
    home.cli("tag get name").refused(3);
    home.cli(&format!("rm {b}")).ok();
    assert_eq!(home.cli("ls -o json").ok().json(), serde_json::json!([]));
}

#[test]
fn a_ticket_is_all_that_a_stranger_needs() {
    let home = Home::new();
    let node = home.start(2);
    fs::write(home.beside("file"), content(3, 300_000)).unwrap();
    let report = home.cli("put file -o json").ok().json();
    let ticket = text(&report, "ticket");
    // Elsewhere: no data folder, no key.
    let elsewhere = tempfile::tempdir().unwrap();
    let away = |arguments: &[&str]| run(metanode(arguments).current_dir(&elsewhere), b"");
    away(&["get", ticket, "copy"]).ok();
    assert!(fs::read(elsewhere.path().join("copy")).unwrap() == content(3, 300_000));
    let node_ticket = node.ready.ticket.to_string();
    let stat = away(&["stat", text(&report, "hash"), "--node", &node_ticket, "-o", "json"]).ok().json();
    assert_eq!(stat["size"].as_u64(), Some(300_000));
    assert_eq!(away(&["status", "--node", &node_ticket, "-o", "json"]).ok().json()["shards"].as_u64(), Some(2));
    // A node's ticket is not a blob's, and a mistyped one is no tag.
    away(&["get", &node_ticket, "x"]).usage();
    let (but_last, last) = ticket.split_at(ticket.len() - 1);
    let mistyped = format!("{but_last}{}", if last == "a" { "b" } else { "a" });
    away(&["get", &mistyped, "x"]).usage();
    // Without a ticket there is no node.
    assert_eq!(away(&["ls", "--data", "nothing-here"]).code, 6);
}

#[test]
fn every_format_says_the_same() {
    let home = Home::new();
    let node = home.start(2);
    fs::write(home.beside("file"), "four").unwrap();
    let hash = put_file(&home, &home.beside("file"));
    let json = home.cli("status -o json").ok().json();
    assert_eq!(json["pid"].as_u64(), Some(node.pid().into()));
    assert_eq!((json["shards"].as_u64(), text(&json, "quic")), (Some(2), &*node.ready.quic.to_string()));
    assert_eq!(text(&json, "ticket"), node.ready.ticket.to_string());
    assert_eq!(json["read_only_reason"], Value::Null);
    let yaml = home.cli("status -o yaml").ok();
    assert!(yaml.text().contains(&format!("pid: {}\n", node.pid())), "{}", yaml.text());
    let table = home.cli("status").ok();
    for part in [node.pid().to_string(), node.ready.quic.to_string(), node.ready.ticket.to_string()] {
        assert!(table.text().contains(&part), "{}", table.text());
    }
    let list = home.cli("ls -o json").ok().json();
    assert_eq!((text(&list[0], "hash"), list[0]["size"].as_u64()), (hash.as_str(), Some(4)));
    assert!(home.cli("ls -o yaml").ok().text().contains(&format!("hash: {hash}\n")));
    assert!(home.cli("ls").ok().text().contains(&hash));
    assert!(home.cli(&format!("stat {hash} -o yaml")).ok().text().contains("size: 4\n"));
    home.cli("ls -o xml").usage();
    // The blob count is published now and then; it must come to be right.
    let counted = wait_for(Duration::from_secs(20), || {
        (home.cli("status -o json").ok().json()["blobs"].as_u64() == Some(1)).then_some(())
    });
    assert!(counted.is_some(), "the status never says that there is one blob");
}

#[test]
fn listings_have_limits_and_beginnings() {
    let home = Home::new();
    let _node = home.start(2);
    fs::create_dir(home.beside("source")).unwrap();
    for number in 0..200 {
        fs::write(home.beside("source").join(number.to_string()), content(number, 33)).unwrap();
    }
    home.cli("put source").ok();
    let all = home.cli("ls -o json").ok().json();
    let all: Vec<_> = all.as_array().unwrap().iter().map(|line| text(line, "hash").to_owned()).collect();
    assert_eq!(all.len(), 201);
    assert!(all.is_sorted());
    let some = home.cli(&format!("ls -o json --limit 150 --after {}", all[9])).ok().json();
    let some: Vec<_> = some.as_array().unwrap().iter().map(|line| text(line, "hash").to_owned()).collect();
    assert_eq!(some, all[10..160]);
    home.cli("ls --after nothash").failed(2);
}

#[test]
fn stop_ends_the_node_and_so_does_sigterm() {
    let home = Home::new();
    for shards in [1, 4] {
        let mut node = home.start(shards);
        let stopped = home.cli("stop -o json").ok().json();
        assert_eq!(stopped["stopped"].as_u64(), Some(node.pid().into()));
        assert!(!is_running(node.pid()), "stop returns when the process has ended");
        assert_eq!(node.ended().code(), Some(0));
        home.start(shards).stop();
        home.cli("stop").refused(6);
        home.cli("status").refused(6);
        home.cli("ls").refused(6);
    }
}

/// A detached node that does not outlive the test.
struct Detached<'a>(&'a Home, u32);

impl Drop for Detached<'_> {
    fn drop(&mut self) {
        // By number, and only if it is still the process of this folder.
        let line = fs::read(format!("/proc/{}/cmdline", self.1)).unwrap_or_default();
        if String::from_utf8_lossy(&line).contains(self.0.data().to_str().unwrap()) {
            let pid = rustix::process::Pid::from_raw(self.1 as i32).unwrap();
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

#[test]
fn a_fresh_node_starts_in_the_background_as_shipped() {
    let home = Home::fresh();
    let line = "start -o json --listen 127.0.0.1:0 --metrics 127.0.0.1:0 --shards 2 --cache 16M";
    let ready = Ready::parse(home.cli(line).ok().text());
    let _detached = Detached(&home, ready.pid);
    assert!(is_running(ready.pid));
    for (name, mode) in [("", 0o700), ("node.key", 0o600), ("operator.key", 0o600)] {
        let metadata = fs::metadata(home.data().join(name)).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, mode, "{name}");
    }
    assert!(ready.quic.ip().is_loopback(), "a fresh node serves its own machine only");
    // The local operator may write, by the key that was made for it.
    fs::write(home.beside("file"), "hello").unwrap();
    let hash = put_file(&home, &home.beside("file"));
    assert_eq!(home.cli(&format!("get {hash} -")).ok().stdout, b"hello");
    let id = home.cli("id").ok();
    let config = fs::read_to_string(home.data().join("metanode.toml")).unwrap();
    assert!(config.contains(id.text().trim()), "the operator is on the list of writers");
    // A second node on the same folder.
    for again in
        ["start --listen 127.0.0.1:0", "start --foreground --listen 127.0.0.1:0", "node run --listen 127.0.0.1:0"]
    {
        let refused = home.cli(again).refused(9);
        assert!(refused.stderr.contains(&ready.pid.to_string()), "{}", refused.stderr);
    }
    home.cli("stop").ok();
    assert!(!is_running(ready.pid));
    // Started again, it is the same node with the same content.
    let again = Ready::parse(home.cli(line).ok().text());
    let _detached = Detached(&home, again.pid);
    assert_eq!(again.ticket.node, ready.ticket.node);
    assert_eq!(home.cli(&format!("get {hash} -")).ok().stdout, b"hello");
    home.cli("stop").ok();
    assert!(!is_running(again.pid));
}

#[test]
fn a_node_listens_on_ipv6() {
    if std::net::UdpSocket::bind("[::1]:0").is_err() {
        eprintln!("skipped: no IPv6 loopback here");
        return;
    }
    let home = Home::new();
    let node = home.start_at(2, "[::1]:0");
    assert!(node.ready.quic.is_ipv6());
    let bytes = content(4, 1 << 20);
    fs::write(home.beside("file"), &bytes).unwrap();
    let report = home.cli("put file -o json").ok().json();
    let got = run(&mut metanode(["get", text(&report, "ticket"), "-"]), b"").ok();
    assert!(got.stdout == bytes);
    node.stop();
}

#[test]
fn metrics_are_prometheus_text() {
    let home = Home::new();
    let node = home.start(2);
    fs::write(home.beside("file"), "x").unwrap();
    let hash = put_file(&home, &home.beside("file"));
    home.cli(&format!("get {hash} -")).ok();
    let page = node.metrics();
    let mut families = Vec::new();
    for line in page.lines().filter(|line| !line.is_empty()) {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(!families.contains(&name), "{name} is described twice");
            families.push(name);
        } else if !line.starts_with("# HELP ") {
            let (series, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let name = series.split('{').next().unwrap();
            assert!(families.last().is_some_and(|family| name.starts_with(family)), "{line}: not in its family");
        }
    }
    for name in ["shard_stalls_total", "requests_total", "connections_accepted_total"] {
        node.metric(name);
    }
    assert!(node.metric("requests_total") >= 2.0);
    for shard in 0..2 {
        assert!(
            page.lines()
                .any(|line| line.contains("shard_stalls_total{") && line.contains(&format!("shard=\"{shard}\"")))
        );
    }
    node.stop();
    // Off is off.
    let node = run_off(&home);
    assert_eq!(node["metrics"], Value::Null);
}

/// The ready line of a node without a metrics page, which is stopped again.
fn run_off(home: &Home) -> Value {
    let line = home.cli("start -o json --listen 127.0.0.1:0 --metrics off --shards 1").ok().json();
    let _detached = Detached(home, line["pid"].as_u64().unwrap() as u32);
    home.cli("stop").ok();
    line
}

#[test]
fn quickstart_ends_verified() {
    let home = Home::fresh();
    let source = home.beside("source");
    fs::create_dir(&source).unwrap();
    make_tree(&source, false);
    let _socket = UnixListener::bind(source.join("socket")).unwrap();
    let ran = run(metanode(["quickstart", "-o", "json"]).arg(&source).env("TMPDIR", home.beside("")), b"").ok();
    let report = ran.json();
    assert_eq!((report["identical"].as_bool(), report["skipped"].as_u64()), (Some(true), Some(1)));
    let bytes: usize =
        picture(&source).values().map(|item| if let Item::File(_, bytes) = item { bytes.len() } else { 0 }).sum();
    assert_eq!(report["bytes"].as_u64(), Some(bytes as u64));
    assert!(report["received_bytes"].as_u64().unwrap() >= bytes as u64, "it went over the wire");
    let left: Vec<_> = fs::read_dir(home.beside("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["source"], "the throw-away node and its files are gone");
    run(metanode(["quickstart", "no-such-folder"]).env("TMPDIR", home.beside("")), b"").failed(3);
}

#[test]
fn configurations_are_checked() {
    let home = Home::new();
    let file = home.beside("some.toml");
    let check = |text: &str| {
        fs::write(&file, text).unwrap();
        home.cli("config check some.toml")
    };
    let shown = check("[quic]\nstreams_max = 32\n").ok();
    assert!(shown.text().contains("streams_max = 32"), "{}", shown.text());
    // What it prints is a configuration itself.
    check(shown.text()).ok();
    for (text, named) in [
        ("[quic]\nstreams_max = 5000\n", "quic.streams_max"),
        ("[quic]\nstream_max = 32\n", "stream_max"),
        ("[access]\nwriters = ['me']\n", "ed25519:"),
        ("[store\n", "some.toml"),
    ] {
        let refused = check(text).refused(2);
        assert!(refused.stderr.contains(named), "{}", refused.stderr);
    }
    home.cli("config check no-such-file").refused(2);
    assert!(home.cli("config check -o json some.toml").code == 2, "the last text is wrong in every format");
    // A node refuses what the check refuses.
    fs::write(home.data().join("metanode.toml"), "[quic]\nstreams_max = 5000\n").unwrap();
    let refused = home.start_refused(1).refused(2);
    assert!(refused.stderr.contains("quic.streams_max"), "{}", refused.stderr);
}

#[test]
fn commands_without_a_node() {
    let home = Home::new();
    let script = home.cli("completions bash").ok();
    assert!(script.text().contains("complete -F _metanode"), "no bash completion");
    for shell in ["zsh", "fish"] {
        assert!(home.cli(&format!("completions {shell}")).ok().text().contains("metanode"));
    }
    let doctor = home.cli("doctor -o json").ok().json();
    let checks = doctor.as_array().unwrap();
    assert!(checks.len() >= 10 && checks.iter().all(|check| !text(check, "found").is_empty()), "{doctor}");
    assert!(checks.iter().any(|check| text(check, "name").contains("io_uring")), "{doctor}");
    assert!(home.cli("doctor").ok().text().contains("CHECK"));
    let key = home.key_file("key", &Identity::from_seed(&[9; 32]));
    let id = home.cli_args(["id", "--key", key.to_str().unwrap()]).ok();
    assert_eq!(id.text().trim(), Identity::from_seed(&[9; 32]).public().to_string());
    assert!(home.cli("--help").ok().text().contains("Exit codes:"));
    assert!(home.cli("--version").ok().text().starts_with("metanode "));
    home.cli("frobnicate").usage();
    // A key that others can read is not used.
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    home.cli_args(["id", "--key", key.to_str().unwrap()]).refused(4);
}
