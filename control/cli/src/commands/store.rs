//! `metanode store`: work on the store of the data folder.

mod repair;

use std::time::{Duration, Instant};

use metanode_node::{admin, data::DataFolder};
use serde::Serialize;

use crate::{
    args::{Global, Store, Work},
    exit::{Exit, Failure, Result},
    output::{Show, bytes, count},
    target::local_folder,
};

/// Between two looks at the work.
const LOOK_PERIOD: Duration = Duration::from_millis(200);

/// Findings that are shown to people; the data formats have all of them.
const FINDINGS_SHOWN: usize = 20;

pub(super) fn run(global: &Global, store: &Store) -> Result<()> {
    match store {
        Store::Status => status(global),
        Store::Scrub { rate, work } => scrub(global, rate.unwrap_or(0), work),
        Store::Compact { work } => compact(global, work),
        Store::Check { offline: true, repair, .. } => check_offline(global, *repair),
        Store::Check { repair, from, .. } => repair::run(global, *repair, from),
    }
}

/// Numbers of the store of a running node.
#[derive(Debug, Serialize)]
struct StatusReport {
    blobs: u64,
    blob_bytes: u64,
    segments: u64,
    segment_bytes: u64,
    orphan_bytes: u64,
    compacted_segments: u64,
    scrubbing_shards: u64,
    scrub_bytes: u64,
    scrub_corrupt: u64,
    corrupt_reads: u64,
}

impl StatusReport {
    fn of(status: &admin::StoreStatus) -> Self {
        Self {
            blobs: status.blobs,
            blob_bytes: status.blob_bytes,
            segments: status.segments,
            segment_bytes: status.segment_bytes,
            orphan_bytes: status.orphan_bytes,
            compacted_segments: status.compacted_segments,
            scrubbing_shards: status.scrubbing_shards,
            scrub_bytes: status.scrub_bytes,
            scrub_corrupt: status.scrub_corrupt,
            corrupt_reads: status.corrupt_reads,
        }
    }
}

impl Show for StatusReport {
    fn lines(&self) -> Vec<(&'static str, String)> {
        vec![
            ("blobs", format!("{} with {}", count(self.blobs), bytes(self.blob_bytes))),
            ("segments", format!("{} with {}", count(self.segments), bytes(self.segment_bytes))),
            ("orphans", format!("{} that interrupted uploads have left", bytes(self.orphan_bytes))),
            ("freed segments", count(self.compacted_segments)),
            ("scrubs", format!("{} read, {} damaged", bytes(self.scrub_bytes), count(self.scrub_corrupt))),
            ("scrubbing", if self.scrubbing_shards > 0 { "now" } else { "no" }.into()),
            ("damaged reads", count(self.corrupt_reads)),
        ]
    }
}

fn status(global: &Global) -> Result<()> {
    global.output.print(&StatusReport::of(&admin::store_status(&local_folder(global)?)?))
}

/// What work has done.
#[derive(Debug, Default, Serialize)]
struct WorkReport {
    work: &'static str,
    done: bool,
    seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    read_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    damaged: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    freed_segments: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    segment_bytes: Option<u64>,
}

impl Show for WorkReport {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let state = if self.done { format!("done in {:.1} s", self.seconds) } else { "begun".to_owned() };
        let mut lines = vec![(self.work, state)];
        lines.extend(self.read_bytes.map(|read| ("read", bytes(read))));
        lines.extend(self.damaged.map(|damaged| ("damaged", count(damaged))));
        lines.extend(self.freed_segments.map(|freed| ("freed segments", count(freed))));
        lines.extend(self.segment_bytes.map(|left| ("segments now", bytes(left))));
        lines
    }
}

fn scrub(global: &Global, rate: u64, work: &Work) -> Result<()> {
    if work.no_wait {
        admin::scrub(&local_folder(global)?, rate)?;
        return global.output.print(&WorkReport { work: "scrub", ..WorkReport::default() });
    }
    let report = scrubbed(global, rate)?;
    global.output.print(&report)?;
    let hint = "`metanode store check` names the blobs; `metanode store check --repair --from TICKET` fetches what is damaged from another node";
    damaged(report.damaged.unwrap_or(0), hint)
}

/// A scrub from beginning to end.
fn scrubbed(global: &Global, rate: u64) -> Result<WorkReport> {
    let folder = local_folder(global)?;
    let before = admin::store_status(&folder)?;
    let number = admin::scrub(&folder, rate)?;
    let begun = Instant::now();
    let after = wait(&folder, |status| status.scrub_done >= number)?;
    Ok(WorkReport {
        work: "scrub",
        done: true,
        seconds: begun.elapsed().as_secs_f64(),
        read_bytes: Some(after.scrub_bytes.saturating_sub(before.scrub_bytes)),
        damaged: Some(after.scrub_corrupt.saturating_sub(before.scrub_corrupt)),
        ..WorkReport::default()
    })
}

fn compact(global: &Global, work: &Work) -> Result<()> {
    let folder = local_folder(global)?;
    let before = admin::store_status(&folder)?;
    let number = admin::compact(&folder)?;
    let begun = Instant::now();
    let mut report = WorkReport { work: "compaction", ..WorkReport::default() };
    if !work.no_wait {
        let after = wait(&folder, |status| status.compact_done >= number)?;
        report.done = true;
        report.seconds = begun.elapsed().as_secs_f64();
        report.freed_segments = Some(after.compacted_segments.saturating_sub(before.compacted_segments));
        report.segment_bytes = Some(after.segment_bytes);
    }
    global.output.print(&report)
}

/// Waits for the node, as long as it lives. An interrupt ends the command, not the work.
fn wait(folder: &std::path::Path, is_done: impl Fn(&admin::StoreStatus) -> bool) -> Result<admin::StoreStatus> {
    loop {
        let status = admin::store_status(folder)?;
        if is_done(&status) {
            return Ok(status);
        }
        std::thread::sleep(LOOK_PERIOD);
    }
}

/// What a check without a node has found.
#[derive(Debug, Serialize)]
struct CheckReport {
    segments: u64,
    segment_bytes: u64,
    frames: u64,
    records: u64,
    blobs: u64,
    tags: u64,
    tail_bytes: u64,
    replaced: u64,
    damages: u64,
    findings: Vec<String>,
}

impl Show for CheckReport {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![
            ("segments", format!("{} with {}", count(self.segments), bytes(self.segment_bytes))),
            ("records", format!("{} in {} frames", count(self.records), count(self.frames))),
            ("blobs", count(self.blobs)),
            ("tags", count(self.tags)),
            ("unused", format!("{} behind the last frames", bytes(self.tail_bytes))),
            ("replaced", format!("{} damaged copies, by newer ones", count(self.replaced))),
            ("damages", count(self.damages)),
        ];
        lines.extend(self.findings.iter().take(FINDINGS_SHOWN).map(|finding| ("", finding.clone())));
        if self.findings.len() > FINDINGS_SHOWN {
            lines.push(("", format!("and {} more (-o json has them)", self.findings.len() - FINDINGS_SHOWN)));
        }
        lines
    }
}

fn check_offline(global: &Global, repair: bool) -> Result<()> {
    let folder = DataFolder::open(&local_folder(global)?)?;
    // The store must not change while it is read.
    let _lock = folder.lock()?;
    let report = metanode_store::check(&folder.store_path())?;
    let report = CheckReport {
        segments: report.segments,
        segment_bytes: report.segment_bytes,
        frames: report.frames,
        records: report.records,
        blobs: report.blobs,
        tags: report.tags,
        tail_bytes: report.tail_bytes,
        replaced: report.replaced,
        damages: report.damages,
        findings: report.findings,
    };
    global.output.print(&report)?;
    let hint = "start the node; `metanode store check --repair --from TICKET` fetches them from another node";
    match repair && report.damages > 0 {
        true => {
            let found = format!("{} damages were found; not supported: repairs without a node", count(report.damages));
            Err(Failure::new(Exit::Integrity, found).hint(hint))
        }
        false => damaged(report.damages, hint),
    }
}

fn damaged(number: u64, hint: &str) -> Result<()> {
    match number {
        0 => Ok(()),
        _ => Err(Failure::new(Exit::Integrity, format!("{} damages were found", count(number))).hint(hint)),
    }
}
