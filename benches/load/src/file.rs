//! One large file through the command line: in, out, compared, with the peak memory of every process.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{
    FileOptions, data, measure,
    measure::Report,
    node::{Node, Place},
};

/// What node and client may each hold at most, in MiB: the promise that this scenario checks.
const HWM_MIB_MAX: f64 = 256.0;

/// Pieces in which the file is made and compared.
const PIECE_BYTES: usize = 1 << 20;

/// Between two looks at a command's memory. What it takes in its very last moments is not seen.
const LOOK: Duration = Duration::from_millis(5);

pub(crate) async fn run(options: &FileOptions) -> Result<Report> {
    let common = &options.common;
    let place = Place::make(common, "file")?;
    let mut report = Report::default();
    let (source, target) = (place.path().join("source"), place.path().join("target"));
    let bytes = make_file(&source, options.bytes)?;

    let node = Node::start(common, &place).await?;
    let cache = shipped_cache_mib(options, &place)?;
    report.add("file_bytes", bytes as f64);
    report.add("file_cache_limit_mib", cache);
    let command = |name: &str| {
        let mut command = Command::new(&common.metanode);
        command.arg(name).arg("--node").arg(node.ticket().to_string()).arg("--data").arg(place.data());
        command
    };
    let started = Instant::now();
    let (line, put_hwm) = finish(command("put").args(["-o", "json"]).arg(&source))?;
    report.add("file_put_mbs", bytes as f64 / started.elapsed().as_secs_f64() / 1e6);
    let stored: Value = serde_json::from_str(&line).with_context(|| format!("put said {line:?}"))?;
    let hash = stored["hash"].as_str().context("put said no hash")?.to_owned();
    let started = Instant::now();
    let (_, get_hwm) = finish(command("get").arg(&hash).arg(&target))?;
    report.add("file_get_mbs", bytes as f64 / started.elapsed().as_secs_f64() / 1e6);
    let node_hwm = node.hwm_mib()?;
    report.add("file_put_client_hwm_mib", put_hwm);
    report.add("file_get_client_hwm_mib", get_hwm);
    report.add("file_node_hwm_mib", node_hwm);
    node.stop().await?;
    compare(&source, &target)?;
    let largest = put_hwm.max(get_hwm).max(node_hwm);
    ensure!(largest < HWM_MIB_MAX, "a process held {largest:.0} MiB at its peak; the limit is {HWM_MIB_MAX} MiB");
    Ok(report)
}

fn make_file(path: &Path, bytes: u64) -> Result<u64> {
    let mut random = data::Random::new(data::fresh_seed()?);
    let mut file = File::create_new(path).with_context(|| format!("cannot make {}", path.display()))?;
    let mut written = 0;
    while written < bytes {
        let length = PIECE_BYTES.min((bytes - written) as usize);
        file.write_all(&random.bytes(length)).with_context(|| format!("cannot write {}", path.display()))?;
        written += length as u64;
    }
    Ok(written)
}

/// The limit of the node's memory cache, which is the shipped one unless the folder has a configuration.
fn shipped_cache_mib(options: &FileOptions, place: &Place) -> Result<f64> {
    let mut command = Command::new(&options.common.metanode);
    let (line, _) = finish(command.args(["config", "check", "-o", "json", "--data"]).arg(place.data()))?;
    let config: Value = serde_json::from_str(&line).with_context(|| format!("config check said {line:?}"))?;
    let bytes = config["store"]["cache_bytes"].as_u64().context("the configuration has no store.cache_bytes")?;
    Ok(bytes as f64 / 1024.0 / 1024.0)
}

/// Runs a command to its end. Returns what it printed, and its peak resident memory in MiB as last seen.
fn finish(command: &mut Command) -> Result<(String, f64)> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    let mut stdout = child.stdout.take().context("no stdout")?;
    let mut hwm = 0f64;
    let status = loop {
        // A process that has just ended has no such line any more.
        hwm = measure::memory_kib(child.id(), "VmHWM").map_or(hwm, |kib| hwm.max(kib / 1024.0));
        match child.try_wait()? {
            Some(status) => break status,
            None => std::thread::sleep(LOOK),
        }
    };
    let mut line = String::new();
    stdout.read_to_string(&mut line)?; // a few lines, which the pipe has held
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok((line, hwm))
}

fn compare(source: &Path, target: &Path) -> Result<()> {
    ensure!(fs::metadata(source)?.len() == fs::metadata(target)?.len(), "what came back has another size");
    let (mut source, mut target) = (File::open(source)?, File::open(target)?);
    let (mut left, mut right) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    loop {
        let length = source.read(&mut left)?;
        if length == 0 {
            return Ok(());
        }
        target.read_exact(&mut right[..length])?;
        if left[..length] != right[..length] {
            bail!("what came back has other bytes");
        }
    }
}
