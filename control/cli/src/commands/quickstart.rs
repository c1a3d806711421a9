//! `metanode quickstart`: the whole way once, on a throw-away node, with real files.

mod choose;
mod compare;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use metanode_client::{
    Progress,
    files::FileIo,
    folder::{self, FolderGet, FolderPut, FolderStored, Links},
};
use metanode_node::{Config, admin};
use metanode_types::DurabilityClass;
use serde::Serialize;

use super::{
    node::{self, Launched, Life, peak_memory_bytes, say},
    on_runtime,
};
use crate::{
    args::{AddressOrOff, Global, Overrides, Quickstart},
    doctor::{self, State},
    exit::{Exit, Failure, Result, io},
    output::{Show, bytes, count, rate},
    progress::shown,
    target::Target,
};

/// Time for a throw-away node to end by itself.
const STOP_TIME: Duration = Duration::from_secs(20);

/// A folder is stored once, fetched once, and the segments have room to spare.
const DISK_FACTOR: u64 = 3;

#[derive(Debug, Serialize)]
struct Report {
    folder: PathBuf,
    hash: String,
    files: u64,
    folders: u64,
    links: u64,
    skipped: u64,
    bytes: u64,
    class: &'static str,
    put_seconds: f64,
    get_seconds: f64,
    /// Whether every file, mode and link was compared with its source and equal.
    identical: bool,
    sent_bytes: u64,
    received_bytes: u64,
    node_peak_bytes: Option<u64>,
    client_peak_bytes: Option<u64>,
    cache_bytes_max: u64,
    shards: u16,
}

impl Show for Report {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let time = |seconds: f64| {
            let time = Duration::from_secs_f64(seconds);
            let files = (self.files as f64 / seconds.max(1e-9)) as u64;
            format!("{seconds:.2} s, {}, {} files/s", rate(self.bytes, time), count(files))
        };
        let peak = |bytes_of: Option<u64>| bytes_of.map_or("unknown".into(), bytes);
        let mut lines = vec![
            ("folder", self.folder.display().to_string()),
            ("hash", self.hash.clone()),
            (
                "contents",
                format!("{} files, {} folders, {} links", count(self.files), count(self.folders), count(self.links)),
            ),
            ("size", bytes(self.bytes)),
            ("put", format!("{} ({}: on disk before each answer)", time(self.put_seconds), self.class)),
            ("get", format!("{} (over QUIC, BLAKE3-verified, synced)", time(self.get_seconds))),
            ("on the wire", format!("{} sent, {} received", bytes(self.sent_bytes), bytes(self.received_bytes))),
            ("compared", "every byte, mode and link with its source: identical".into()),
            (
                "peak memory",
                format!(
                    "node {} (cache limit {}, {} shards), client {}",
                    peak(self.node_peak_bytes),
                    bytes(self.cache_bytes_max),
                    self.shards,
                    peak(self.client_peak_bytes)
                ),
            ),
        ];
        if self.skipped > 0 {
            lines.push(("skipped", format!("{} sockets, pipes or devices", self.skipped)));
        }
        lines
    }
}

/// A folder that goes with its owner.
struct Scratch(PathBuf);

impl Scratch {
    fn make() -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| Failure::new(Exit::Other, error))?;
        let path = std::env::temp_dir().join(format!("metanode-quickstart-{:016x}", u64::from_le_bytes(random)));
        std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(io(path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        compare::make_removable(&self.0);
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            say(&format!("{} could not be removed: {error}", self.0.display()));
        }
    }
}

/// A node that ends with its owner.
struct ThrowAway {
    launched: Launched,
    data: PathBuf,
}

impl Drop for ThrowAway {
    fn drop(&mut self) {
        let stopped = admin::stop(&self.data, STOP_TIME).is_ok();
        if !(stopped && node::ended_within(&mut self.launched.child, STOP_TIME)) {
            let _ = self.launched.child.kill(); // it may have ended by itself
            let _ = self.launched.child.wait();
        }
    }
}

pub(super) fn run(global: &Global, args: &Quickstart) -> Result<()> {
    let scratch = Scratch::make()?;
    name_what_is_missing(&scratch.0)?;
    let source = choose::folder(args.folder.as_deref())?;
    let free = doctor::free_bytes(&scratch.0).unwrap_or(u64::MAX);
    if free < source.bytes.saturating_mul(DISK_FACTOR) {
        let what = format!("{} has {} free, the folder has {}", scratch.0.display(), bytes(free), bytes(source.bytes));
        return Err(Failure::new(Exit::NoRoom, what).hint(
            "name a smaller folder (`metanode quickstart FOLDER`), or another place for temporary files (TMPDIR)",
        ));
    }
    say(&format!("storing {} ({} files, {})", source.path.display(), count(source.files), bytes(source.bytes)));
    let data = scratch.0.join("data");
    let any_port = "127.0.0.1:0".parse().expect("a literal address");
    let overrides =
        Overrides { listen: Some(any_port), metrics: Some(AddressOrOff::Address(any_port)), ..Overrides::default() };
    let launched = node::launch(&data, &overrides, Life::WithParent, global.timeout)?;
    let running = ThrowAway { launched, data };
    let report = transfer(global, &running, &source.path, &scratch.0.join("copy"))?;
    global.output.print(&report)?;
    drop(running);
    say(NEXT);
    Ok(())
}

const NEXT: &str = "
Next:
  metanode start                    a node of your own, in the background
  metanode put FILE --tag NAME      store something; prints its hash and a ticket
  metanode get HASH|TICKET DEST     fetch it, here or from another machine
  metanode status                   how the node is
  metanode doctor                   what this machine has, and what is lost without the rest
  metanode stop                     stop it
";

/// Before anything is started: what would make it fail, or slow, and how to provide it.
fn name_what_is_missing(place: &Path) -> Result<()> {
    let mut missing = Vec::new();
    for check in doctor::essential(place).into_iter().filter(|check| check.state != State::Ok) {
        say(&format!("{}: {}; lost: {}; fix: {}", check.name, check.found, check.lost, check.fix));
        if check.needed && check.state == State::Missing {
            missing.push(check.name);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::new(Exit::Other, format!("a node does not run here without: {}", missing.join(", ")))
        .hint("the lines above say how to provide it; `metanode doctor` shows everything"))
}

fn transfer(global: &Global, running: &ThrowAway, source: &Path, copy: &Path) -> Result<Report> {
    let global = Global { data: Some(running.data.clone()), node: None, key: None, ..global.clone() };
    let target = Target::find(&global, None)?;
    on_runtime(async {
        let client = target.connect(&global, true).await?;
        let file_io = FileIo::probe();
        let progress = Progress::default();
        let how = FolderPut { class: DurabilityClass::Durable, hold: true, file_io };
        let begun = Instant::now();
        let stored = shown("put", global.quiet, &progress, folder::put_folder(&client, source, how, &progress)).await?;
        let put_time = begun.elapsed();
        let progress = Progress::default();
        let how = FolderGet { replace: false, links: Links::All, file_io };
        let begun = Instant::now();
        let fetch = async {
            let manifest = folder::get_manifest(&client, stored.hash).await?;
            folder::get_folder(&client, &manifest, copy, how, &progress).await
        };
        shown("get", global.quiet, &progress, fetch).await?;
        let get_time = begun.elapsed();
        let (left, right) = (source.to_path_buf(), copy.to_path_buf());
        let compared = tokio::task::spawn_blocking(move || compare::identical(&left, &right)).await;
        compared.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        let wire = client.wire_counters();
        let status = client.status().await?;
        let FolderStored { hash, contents, skipped, .. } = stored;
        let report = Report {
            folder: source.to_path_buf(),
            hash: hash.to_string(),
            files: contents.files,
            folders: contents.folders,
            links: contents.links,
            skipped,
            bytes: contents.bytes,
            class: "durable",
            put_seconds: put_time.as_secs_f64(),
            get_seconds: get_time.as_secs_f64(),
            identical: true,
            sent_bytes: wire.sent_bytes,
            received_bytes: wire.received_bytes,
            node_peak_bytes: peak_memory_bytes(running.launched.ready.pid),
            client_peak_bytes: peak_memory_bytes(std::process::id()),
            cache_bytes_max: cache_limit(status.cache_bytes_max),
            shards: client.shards(),
        };
        client.close().await;
        Ok(report)
    })
}

fn cache_limit(told: u64) -> u64 {
    if told > 0 { told } else { Config::default().store.cache_bytes }
}
