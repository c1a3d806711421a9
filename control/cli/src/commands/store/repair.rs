//! `metanode store check`: reads everything, then names the blobs that known damage belongs to. With `--repair` these are read from here as far
//! as they can be, from other nodes where they can't, and stored again: only the chunks that are damaged are fetched and written.

use std::{
    collections::{BTreeMap, VecDeque},
    io,
    time::Instant,
};

use bytes::Bytes;
use metanode_client::{BlobSource, Client, ClientError, PutOptions, VecSink};
use metanode_node::admin;
use metanode_types::{ByteRange, Hash, limits::CHUNK_BYTES};
use metanode_wire::Ticket;
use serde::Serialize;

use super::{damaged, scrubbed, wait};
use crate::{
    args::Global,
    commands::on_runtime,
    exit::Result,
    output::{Show, bytes, count, visible},
    target::{Target, local_folder},
};

/// Chunks that are read from here at once: 4 MiB.
const READ_CHUNKS: u64 = 16;

/// What a check has found, and a repair done.
#[derive(Debug, Serialize)]
struct CheckReport {
    seconds: f64,
    read_bytes: u64,
    /// Chunks and maps that were found now.
    damaged: u64,
    /// Blobs that these, or what was found before, belong to.
    damaged_blobs: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    repaired_blobs: Option<u64>,
    /// From other nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    fetched_bytes: Option<u64>,
    left: Vec<Left>,
}

/// A blob that is damaged.
#[derive(Debug, Serialize)]
struct Left {
    hash: String,
    reason: String,
}

impl Show for CheckReport {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![
            ("check", format!("done in {:.1} s", self.seconds)),
            ("read", bytes(self.read_bytes)),
            ("damaged", format!("{} blobs; {} chunks were found now", count(self.damaged_blobs), count(self.damaged))),
        ];
        if let (Some(blobs), Some(fetched)) = (self.repaired_blobs, self.fetched_bytes) {
            lines.push(("repaired", format!("{} blobs with {} from other nodes", count(blobs), bytes(fetched))));
        }
        lines.push(("left", count(self.left.len() as u64)));
        let shown = self.left.iter().take(super::FINDINGS_SHOWN);
        lines.extend(shown.map(|left| ("", format!("{}: {}", left.hash, left.reason))));
        if self.left.len() > super::FINDINGS_SHOWN {
            lines.push(("", format!("and {} more (-o json has them)", self.left.len() - super::FINDINGS_SHOWN)));
        }
        lines
    }
}

/// Checks; repairs with what these nodes have, if that was asked for.
pub(super) fn run(global: &Global, repairs: bool, from: &[Ticket]) -> Result<()> {
    let begun = Instant::now();
    let scrub = scrubbed(global, 0)?;
    let mut blobs = survey(global)?;
    let mut report = CheckReport {
        seconds: 0.0,
        read_bytes: scrub.read_bytes.unwrap_or(0),
        damaged: scrub.damaged.unwrap_or(0),
        damaged_blobs: blobs.len() as u64,
        repaired_blobs: repairs.then_some(0),
        fetched_bytes: repairs.then_some(0),
        left: Vec::new(),
    };
    let mut reasons = BTreeMap::new();
    if repairs && !blobs.is_empty() {
        let tried = std::mem::take(&mut blobs);
        let fetched_bytes = repair_all(global, from, &tried, &mut reasons)?;
        // What the node itself says is what counts.
        blobs = survey(global)?;
        report.repaired_blobs = Some(tried.iter().filter(|hash| !blobs.contains(hash)).count() as u64);
        report.fetched_bytes = Some(fetched_bytes);
        for hash in blobs.iter().filter(|hash| !tried.contains(hash)) {
            reasons.insert(*hash, "it was not among those found first: check again".to_owned());
        }
    }
    report.left = blobs
        .iter()
        .map(|hash| {
            let reason = reasons.remove(hash).unwrap_or_else(|| "something of it is damaged".to_owned());
            Left { hash: hash.to_string(), reason }
        })
        .collect();
    report.seconds = begun.elapsed().as_secs_f64();
    global.output.print(&report)?;
    let hint = match repairs {
        true => {
            "name a node that has them with --from, `metanode put` the contents again, or `metanode rm` what is lost"
        }
        false => "`metanode store check --repair --from TICKET` fetches what is damaged from another node",
    };
    damaged(report.left.len() as u64, hint)
}

/// Stores blobs again; how much came from other nodes, and why some could not be.
fn repair_all(global: &Global, from: &[Ticket], blobs: &[Hash], reasons: &mut BTreeMap<Hash, String>) -> Result<u64> {
    let target = Target::local(global)?;
    let mut fetched_bytes = 0;
    on_runtime(async {
        let here = target.connect(global, true).await?;
        let mut others = connect(global, &target, from).await;
        for hash in blobs {
            match repair(&here, &mut others, *hash).await {
                Ok(bytes) => fetched_bytes += bytes,
                Err(error) => {
                    let reason = match error {
                        ClientError::Stream(error) => error.to_string(),
                        other => other.to_string(),
                    };
                    reasons.insert(*hash, reason);
                }
            }
        }
        for client in others {
            client.close().await;
        }
        here.close().await;
        Ok(())
    })?;
    Ok(fetched_bytes)
}

/// The blobs that something is missing of, as the node knows.
fn survey(global: &Global) -> Result<Vec<Hash>> {
    let folder = local_folder(global)?;
    loop {
        let number = admin::survey(&folder)?;
        wait(&folder, |status| status.survey_done >= number)?;
        // Otherwise somebody else has begun another one meanwhile.
        if let Some(blobs) = admin::damaged(&folder, number)? {
            return Ok(blobs);
        }
    }
}

/// Connects to what can be reached.
async fn connect(global: &Global, target: &Target, from: &[Ticket]) -> VecDeque<Client> {
    let mut others = VecDeque::new();
    for ticket in from {
        let other = Target { ticket: ticket.node_only(), identity: target.identity.clone() };
        match other.connect(global, true).await {
            Ok(client) => others.push_back(client),
            Err(failure) => eprintln!("warning: {}; going on without this node", visible(&failure.to_string())),
        }
    }
    others
}

/// Stores a damaged blob again; how much of it came from other nodes.
async fn repair(here: &Client, others: &mut VecDeque<Client>, hash: Hash) -> std::result::Result<u64, ClientError> {
    let info = here.stat(hash).await?;
    // What holds it holds it on; what is removed meanwhile stays removed.
    let options = PutOptions { class: info.class, kind: info.kind, hold: false };
    let mut source =
        Mended { here, others, hash, size_bytes: info.size_bytes, at: 0, ready: VecDeque::new(), fetched_bytes: 0 };
    let stored = here.put_again(&mut source, Some(info.size_bytes), options).await?;
    match stored.hash == hash {
        true => Ok(source.fetched_bytes),
        false => Err(ClientError::HashMismatch(hash)),
    }
}

/// The contents of a damaged blob.
struct Mended<'a> {
    here: &'a Client,
    /// In the order in which they are asked: one that fails goes to the end.
    others: &'a mut VecDeque<Client>,
    hash: Hash,
    size_bytes: u64,
    at: u64,
    ready: VecDeque<Bytes>,
    fetched_bytes: u64,
}

impl BlobSource for Mended<'_> {
    async fn next_chunk(&mut self) -> io::Result<Option<Bytes>> {
        if self.ready.is_empty() && self.at < self.size_bytes {
            self.fill().await?;
        }
        Ok(self.ready.pop_front())
    }
}

impl Mended<'_> {
    /// The next chunks from here, or the next one from another node when it can't be read here.
    async fn fill(&mut self) -> io::Result<()> {
        let rest = self.size_bytes - self.at;
        let mut found = Vec::new();
        // The refusal of one chunk can overtake those before it, so the first is asked for alone before it is given up.
        for chunks in [READ_CHUNKS, 1] {
            if found.is_empty() {
                let read;
                (found, read) = self.read(self.here, rest.min(chunks * CHUNK_BYTES as u64)).await;
                let whole = if read.is_ok() { found.len() } else { found.len() / CHUNK_BYTES * CHUNK_BYTES };
                found.truncate(whole);
            }
        }
        let mut why = None;
        let mut left = self.others.len();
        while found.is_empty() {
            let Some(other) = self.others.front().filter(|_| left > 0) else {
                return Err(
                    why.unwrap_or_else(|| io::Error::other("something of it is damaged, and no other node was named"))
                );
            };
            let (bytes, read) = self.read(other, rest.min(CHUNK_BYTES as u64)).await;
            match read {
                Ok(()) => {
                    self.fetched_bytes += bytes.len() as u64;
                    found = bytes;
                }
                Err(error) => {
                    why = Some(io::Error::other(error));
                    self.others.rotate_left(1);
                    left -= 1;
                }
            }
        }
        self.at += found.len() as u64;
        let mut found = Bytes::from(found);
        while !found.is_empty() {
            self.ready.push_back(found.split_to(found.len().min(CHUNK_BYTES)));
        }
        Ok(())
    }

    async fn read(&self, node: &Client, length: u64) -> (Vec<u8>, std::result::Result<(), ClientError>) {
        let mut sink = VecSink { bytes: Vec::with_capacity(length as usize), bytes_max: length };
        let range = ByteRange { offset: self.at, length };
        let read = match node.get_range(self.hash, range, &mut sink).await {
            Ok(fetched) if fetched.taken_bytes == length => Ok(()),
            Ok(_) => Err(ClientError::HashMismatch(self.hash)),
            Err(error) => Err(error),
        };
        (sink.bytes, read)
    }
}
