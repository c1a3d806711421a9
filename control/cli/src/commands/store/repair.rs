//! `metanode store check --repair`: damaged blobs are read from here as far as they can be, from other nodes where they can't, and stored
//! again. Only the chunks that are damaged are fetched and written.

use std::{collections::VecDeque, io, time::Instant};

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
    target::{Target, data_folder},
};

/// Chunks that are read from here at once: 4 MiB.
const READ_CHUNKS: u64 = 16;

/// What a repair has done.
#[derive(Debug, Serialize)]
struct RepairReport {
    seconds: f64,
    read_bytes: u64,
    /// Chunks and maps.
    damaged: u64,
    damaged_blobs: u64,
    repaired_blobs: u64,
    /// From other nodes.
    fetched_bytes: u64,
    left: Vec<Left>,
}

/// A blob that could not be repaired.
#[derive(Debug, Serialize)]
struct Left {
    hash: String,
    reason: String,
}

impl Show for RepairReport {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![
            ("check", format!("done in {:.1} s", self.seconds)),
            ("read", bytes(self.read_bytes)),
            ("damaged", format!("{} in {} blobs", count(self.damaged), count(self.damaged_blobs))),
            ("repaired", format!("{} blobs with {} fetched", count(self.repaired_blobs), bytes(self.fetched_bytes))),
            ("left", count(self.left.len() as u64)),
        ];
        lines.extend(
            self.left.iter().take(super::FINDINGS_SHOWN).map(|left| ("", format!("{}: {}", left.hash, left.reason))),
        );
        if self.left.len() > super::FINDINGS_SHOWN {
            lines.push(("", format!("and {} more (-o json has them)", self.left.len() - super::FINDINGS_SHOWN)));
        }
        lines
    }
}

pub(super) fn run(global: &Global, from: &[Ticket]) -> Result<()> {
    let begun = Instant::now();
    let scrub = scrubbed(global, 0)?;
    let blobs = survey(global)?;
    let mut report = RepairReport {
        seconds: 0.0,
        read_bytes: scrub.read_bytes.unwrap_or(0),
        damaged: scrub.damaged.unwrap_or(0),
        damaged_blobs: blobs.len() as u64,
        repaired_blobs: 0,
        fetched_bytes: 0,
        left: Vec::new(),
    };
    if !blobs.is_empty() {
        let target = Target::local(global)?;
        on_runtime(async {
            let here = target.connect(global, true).await?;
            let others = connect(global, &target, from).await;
            for hash in blobs {
                match repair(&here, &others, hash).await {
                    Ok(fetched_bytes) => {
                        report.repaired_blobs += 1;
                        report.fetched_bytes += fetched_bytes;
                    }
                    Err(error) => {
                        let reason = match error {
                            ClientError::Stream(error) => error.to_string(),
                            other => other.to_string(),
                        };
                        report.left.push(Left { hash: hash.to_string(), reason });
                    }
                }
            }
            for client in others {
                client.close().await;
            }
            here.close().await;
            Ok(())
        })?;
        // What the node itself says is what counts.
        for hash in survey(global)? {
            let hash = hash.to_string();
            if !report.left.iter().any(|left| left.hash == hash) {
                report.repaired_blobs = report.repaired_blobs.saturating_sub(1);
                report.left.push(Left { hash, reason: "it was damaged again".to_owned() });
            }
        }
    }
    report.seconds = begun.elapsed().as_secs_f64();
    global.output.print(&report)?;
    let hint =
        "name a node that has them with --from, `metanode put` the contents again, or `metanode rm` what is lost";
    damaged(report.left.len() as u64, hint)
}

/// The blobs that something is missing of.
fn survey(global: &Global) -> Result<Vec<Hash>> {
    let folder = data_folder(global)?;
    let number = admin::survey(&folder)?;
    wait(&folder, |status| status.survey_done >= number)?;
    Ok(admin::damaged(&folder)?)
}

/// Connects to what can be reached.
async fn connect(global: &Global, target: &Target, from: &[Ticket]) -> Vec<Client> {
    let mut others = Vec::new();
    for ticket in from {
        let other = Target { ticket: ticket.node_only(), identity: target.identity.clone() };
        match other.connect(global, true).await {
            Ok(client) => others.push(client),
            Err(failure) => eprintln!("warning: {}; going on without this node", visible(&failure.to_string())),
        }
    }
    others
}

/// Stores a damaged blob again; how much of it came from other nodes.
async fn repair(here: &Client, others: &[Client], hash: Hash) -> std::result::Result<u64, ClientError> {
    let info = here.stat(hash).await?;
    let options = PutOptions { class: info.class, kind: info.kind, hold: info.held };
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
    others: &'a [Client],
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
        let mut others = self.others.iter();
        while found.is_empty() {
            let Some(other) = others.next() else {
                return Err(why.unwrap_or_else(|| io::Error::other("no other node was named")));
            };
            let (bytes, read) = self.read(other, rest.min(CHUNK_BYTES as u64)).await;
            match read {
                Ok(()) => {
                    self.fetched_bytes += bytes.len() as u64;
                    found = bytes;
                }
                Err(error) => why = Some(io::Error::other(error)),
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
