//! `metanoded --data DIR`: runs the node of a data folder, which is made when it is not there. The same as `metanode node run`.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, bail};
use metanode_node::{DataFolder, logging, run};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: &str = "usage: metanoded --data DIR";

fn main() -> ExitCode {
    match node() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn node() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let path = match (arguments.next(), arguments.next(), arguments.next()) {
        (Some(flag), Some(path), None) if flag == "--data" => PathBuf::from(path),
        (Some(flag), None, None) if flag == "--help" || flag == "-h" => {
            println!("{USAGE}");
            return Ok(());
        }
        (Some(flag), None, None) if flag == "--version" || flag == "-V" => {
            println!("metanoded {}", env!("CARGO_PKG_VERSION"));
            return Ok(());
        }
        _ => bail!("{USAGE}"),
    };
    let data = DataFolder::open_or_init(&path)?;
    let config = data.config()?;
    logging::init(&config.log.level);
    run(data, config, |ready| {
        println!("listening on {} (process {})", ready.quic, ready.pid);
        println!("{}", ready.ticket);
    })
    .context("the node has ended")
}
