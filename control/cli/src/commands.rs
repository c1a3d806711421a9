//! What each command does.

mod bench;
mod config;
mod doctor;
mod get;
mod ledger;
mod list;
mod network;
mod node;
mod put;
mod quickstart;
mod stat;
mod status;
mod store;
mod tx;

use std::future::Future;

use clap::CommandFactory as _;
use metanode_client::Client;
use metanode_wire::Ticket;

use crate::{
    args::{Cli, Command, Config, Global, Node},
    exit::{Exit, Failure, Result},
    target::{Target, own_identity},
};

/// Runs the command.
pub(crate) fn run(cli: Cli) -> Result<()> {
    let Cli { global, command } = cli;
    match command {
        Command::Start(start) => match start.validators {
            Some(count) => network::start(&global, &start, count),
            None => match network::of(&global)? {
                Some(network) => Err(network.is_not_one_node()),
                None => node::start(&global, &start),
            },
        },
        Command::Stop(stop) => match network::of(&global)? {
            Some(network) => network.stop(&global, &stop),
            None => node::stop(&global, &stop),
        },
        Command::Node(Node::Run(run)) => node::run(&global, &run),
        Command::Node(Node::Validators) => ledger::validators(&global),
        Command::Tx(tx) => tx::run(&global, &tx),
        Command::Ledger(ledger) => ledger::run(&global, ledger),
        Command::Quickstart(args) => quickstart::run(&global, &args),
        Command::Put(put) => put::run(&global, &put),
        Command::Get(get) => get::run(&global, &get),
        Command::Ls(ls) => list::run(&global, &ls),
        Command::Stat(stat) => stat::run(&global, &stat),
        Command::Tag(tag) => stat::tag(&global, tag),
        Command::Rm(rm) => stat::remove(&global, &rm),
        Command::Status => status::run(&global),
        Command::Store(store) => store::run(&global, &store),
        Command::Doctor => doctor::run(&global),
        Command::Bench(bench) => bench::run(&global, &bench),
        Command::Id => {
            let none = || {
                let made = "`openssl genpkey -algorithm ed25519 -out FILE` makes a key, which --key FILE shows";
                Failure::new(Exit::NotFound, "there is no key: neither --key nor an operator.key in the data folder")
                    .hint(format!("`metanode start` makes a data folder with one; {made}"))
            };
            let key = own_identity(&global)?.ok_or_else(none)?.public().to_string();
            global.output.print_or(&serde_json::json!({ "key": key }), &key)
        }
        Command::Config(Config::Check { file }) => config::check(&global, file.as_deref()),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "metanode", &mut script);
            crate::output::write(&String::from_utf8_lossy(&script))
        }
    }
}

/// Runs `work` on a runtime until it ends or the user interrupts it. What it has under temporary names is removed either way.
///
/// One thread moves more than 2 GB/s; files are read, hashed and written on threads of their own.
fn on_runtime<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    metanode_node::logging::init("error"); // unless METANODE_LOG says otherwise
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(crate::exit::io("starting the runtime"))?;
    let result = runtime.block_on(async {
        tokio::select! {
            biased;
            signal = tokio::signal::ctrl_c() => {
                signal.map_err(crate::exit::io("waiting for signals"))?;
                Err(Failure::new(Exit::Interrupted, "interrupted"))
            }
            result = work => result,
        }
    });
    runtime.shutdown_timeout(std::time::Duration::from_millis(200)); // a read of standard input may be stuck
    result
}

/// Standard input or output as a file: tokio reads and writes those on threads that may wait.
fn as_file(stream: std::os::fd::BorrowedFd<'_>) -> Result<tokio::fs::File> {
    let owned = stream.try_clone_to_owned().map_err(crate::exit::io("standard input or output"))?;
    Ok(tokio::fs::File::from_std(owned.into()))
}

/// How often a transfer that was under way connects again after its connection was lost: a node that is restarted, a laptop that slept.
const CONNECT_AGAIN_MAX: u32 = 3;

/// Connects to the node in question, does `work` with it and says goodbye.
fn with_client<T>(
    global: &Global,
    named: Option<&Ticket>,
    shard_aware: bool,
    work: impl AsyncFnOnce(&Client, &Target) -> Result<T>,
) -> Result<T> {
    let target = Target::find(global, named)?;
    on_runtime(async {
        let client = target.connect(global, shard_aware).await?;
        let result = work(&client, &target).await;
        client.close().await;
        result
    })
}
