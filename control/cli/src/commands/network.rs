//! A chain's beginning, and a network of validators on one machine.
//!
//! ```text
//! DIR/genesis.json      the chain
//! DIR/operator.key      may write to all of them, and has all that there is at the beginning
//! DIR/validator-1/ ...  data folders
//! ```

use std::{
    fs,
    net::{SocketAddr, UdpSocket},
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use metanode_crypto::Identity;
use metanode_ledger::{Account, Genesis};
use metanode_node::{
    DataFolder, admin,
    data::{self, GENESIS_FILE},
    ledger::begin_sign_state,
};
use metanode_types::NodeKey;
use metanode_wire::Ticket;
use serde::Serialize;

use super::node::{self, Launched, Life};
use crate::{
    args::{Global, LedgerInit, Start, Stop},
    exit::{Exit, Failure, Result, io},
    output::Show,
    target::data_folder,
};

/// What operator.key has at the beginning.
const OPERATOR_BALANCE: u64 = 1_000_000_000_000;

/// Heights ahead that a transaction may expire: a day of a block each second.
const EXPIRY_HEIGHTS_MAX: u64 = 100_000;

/// A second of difference is more than clocks of a data centre have.
const CLOCK_DRIFT_MS_MAX: u64 = 1_000;

/// Where applications listen, in the data folders.
const APPLICATION_SOCKET: &str = "application.sock";

/// Memory caches of validators that share a machine.
const CACHE_BYTES: u64 = 64 << 20;

#[derive(Debug, Serialize)]
struct Made {
    chain: String,
    genesis: PathBuf,
    operator_key: PathBuf,
    validators: Vec<ValidatorLine>,
}

#[derive(Debug, Serialize)]
struct ValidatorLine {
    folder: PathBuf,
    key: String,
    ticket: String,
}

impl Show for Made {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![
            ("chain", self.chain.clone()),
            ("genesis", self.genesis.display().to_string()),
            ("operator key", self.operator_key.display().to_string()),
        ];
        for validator in &self.validators {
            lines.push(("validator", format!("{} in {}", validator.key, validator.folder.display())));
        }
        lines
    }
}

/// `metanode ledger init`.
pub(super) fn init(global: &Global, init: &LedgerInit) -> Result<()> {
    global.output.print(&make(init)?)
}

fn make(init: &LedgerInit) -> Result<Made> {
    let out = &init.out;
    if out.read_dir().is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Failure::new(Exit::DataFolder, format!("{} is not empty", out.display())));
    }
    // What is wrong with the numbers is seen before anything is made.
    let someone = Identity::from_seed(&[1; 32]);
    genesis(init, &someone, vec![someone.public()])?;
    let sockets = addresses(init.listen, init.validators)?;
    fs::DirBuilder::new().mode(0o700).recursive(true).create(out).map_err(io(out.display()))?;
    let out = fs::canonicalize(out).map_err(io(out.display()))?;
    let operator_key = out.join("operator.key");
    data::create_key(&operator_key)?;
    let operator = data::read_key(&operator_key)?;
    let mut folders = Vec::new();
    for number in 1..=init.validators {
        folders.push(DataFolder::open_or_init(&folder_of(&out, number))?);
    }
    let keys = folders.iter().map(|folder| folder.node_identity().public()).collect();
    let genesis = genesis(init, &operator, keys)?;
    let tickets: Vec<Ticket> = folders
        .iter()
        .zip(&sockets)
        .map(|(folder, address)| Ticket {
            node: folder.node_identity().public(),
            addresses: vec![*address],
            hash: None,
        })
        .collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for (place, folder) in folders.iter().enumerate() {
        let mut config = folder.config()?;
        config.quic.listen = sockets[place];
        config.metrics.listen = None;
        config.node.shards = Some(1);
        config.node.cores = (init.validators > 1).then(|| vec![place % cores]);
        config.store.cache_bytes = CACHE_BYTES;
        config.access.writers.push(operator.public());
        config.ledger.genesis = GENESIS_FILE.to_owned();
        if init.application {
            config.ledger.application = APPLICATION_SOCKET.to_owned();
        }
        config.ledger.peers = tickets.iter().filter(|it| it.node != tickets[place].node).cloned().collect();
        folder.set_genesis(&genesis.to_json())?;
        begin_sign_state(folder, &genesis)?;
        folder.set_config(&config)?;
    }
    let path = out.join(GENESIS_FILE);
    fs::write(&path, genesis.to_json()).map_err(io(path.display()))?;
    let validators = folders.iter().zip(&tickets).map(|(folder, ticket)| ValidatorLine {
        folder: folder.path().to_owned(),
        key: ticket.node.to_string(),
        ticket: ticket.to_string(),
    });
    let chain = metanode_types::Hash(genesis.chain().0).to_string();
    Ok(Made { chain, genesis: path, operator_key, validators: validators.collect() })
}

fn folder_of(network: &Path, number: u16) -> PathBuf {
    network.join(format!("validator-{number}"))
}

fn genesis(init: &LedgerInit, operator: &Identity, validators: Vec<NodeKey>) -> Result<Genesis> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut accounts = vec![Account { key: operator.public(), balance: OPERATOR_BALANCE }];
    accounts.extend(init.account.iter().map(|(key, balance)| Account { key: *key, balance: *balance }));
    let genesis = Genesis {
        version: 1,
        name: init.name.clone(),
        time_ms: now.as_millis() as u64,
        lag: init.lag,
        round_ms: init.round_ms,
        round_ms_max: init.round_ms_max,
        empty_ms: init.empty_ms,
        clock_drift_ms_max: CLOCK_DRIFT_MS_MAX,
        expiry_heights_max: EXPIRY_HEIGHTS_MAX,
        opaque: init.opaque,
        validators,
        accounts,
    };
    genesis.check().map_err(Failure::usage)?;
    Ok(genesis)
}

/// One for each validator: ports one behind the other, or free ones.
fn addresses(first: SocketAddr, count: u16) -> Result<Vec<SocketAddr>> {
    if first.ip().is_unspecified() {
        return Err(Failure::usage(format!("{first} is no address by which validators reach each other"))
            .hint("name one of this machine's addresses; metanode.toml may say another one to listen on"));
    }
    if first.port() != 0 {
        let port = |number: u16| first.port().checked_add(number).map(|port| SocketAddr::new(first.ip(), port));
        let all: Option<Vec<_>> = (0..count).map(port).collect();
        return all.ok_or_else(|| Failure::usage("there are not so many ports behind this one"));
    }
    // All at once, so that they differ.
    let sockets: std::io::Result<Vec<UdpSocket>> = (0..count).map(|_| UdpSocket::bind(first)).collect();
    let sockets = sockets.map_err(io(format!("ports of {}", first.ip())))?;
    sockets.iter().map(|socket| socket.local_addr().map_err(io("a socket"))).collect()
}

/// A network's folder.
#[derive(Debug)]
pub(super) struct Network {
    folders: Vec<PathBuf>,
}

/// The network in the data folder, if that is one.
pub(super) fn of(global: &Global) -> Result<Option<Network>> {
    let folder = data_folder(global)?;
    let folders: Vec<PathBuf> =
        (1..).map(|number| folder_of(&folder, number)).take_while(|path| path.join("format").exists()).collect();
    Ok((!folders.is_empty()).then_some(Network { folders }))
}

#[derive(Debug, Serialize)]
struct Started {
    validators: Vec<node::ReadyLine>,
}

impl Show for Started {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let line = |ready: &node::ReadyLine| ("validator", format!("{} process {}", ready.ticket, ready.pid));
        self.validators.iter().map(line).collect()
    }
}

/// `metanode start --validators N`.
pub(super) fn start(global: &Global, start: &Start, count: u16) -> Result<()> {
    let folder = data_folder(global)?;
    if folder.join("format").exists() {
        let what = format!("{} is the data folder of one node", folder.display());
        return Err(Failure::new(Exit::DataFolder, what).hint("name another folder for the network: --data DIR"));
    }
    let network = match of(global)? {
        Some(network) if network.folders.len() == usize::from(count) => network,
        Some(network) => {
            let what = format!("the network in {} has {} validators", folder.display(), network.folders.len());
            return Err(Failure::usage(what));
        }
        None => {
            make(&LedgerInit {
                validators: count,
                out: folder,
                name: "local".to_owned(),
                listen: SocketAddr::from(([127, 0, 0, 1], 0)),
                lag: 2,
                round_ms: 2_000,
                round_ms_max: 10_000,
                empty_ms: 5_000,
                opaque: true,
                application: false,
                account: Vec::new(),
            })?;
            of(global)?.ok_or_else(|| Failure::new(Exit::Other, "the network was made, and is not there"))?
        }
    };
    let mut started = Started { validators: Vec::new() };
    for folder in &network.folders {
        match node::launch(folder, &start.overrides, Life::Detached, global.timeout) {
            Ok(Launched { ready, .. }) => started.validators.push(ready),
            Err(failure) => {
                for started in &network.folders[..started.validators.len()] {
                    _ = admin::stop(started, Duration::from_secs(10)); // the failure says more
                }
                return Err(failure.context(format!("starting {}", folder.display())));
            }
        }
    }
    global.output.print(&started)
}

impl Network {
    /// What `metanode start` without a number says of it.
    pub(super) fn is_not_one_node(&self) -> Failure {
        let count = self.folders.len();
        Failure::new(Exit::DataFolder, format!("the data folder is that of a network of {count} validators"))
            .hint(format!("`metanode start --validators {count}` starts them all"))
    }

    /// `metanode stop` of a network: all that run.
    pub(super) fn stop(&self, global: &Global, stop: &Stop) -> Result<()> {
        let mut stopped = Vec::new();
        for folder in &self.folders {
            match admin::status(folder) {
                Ok(status) => {
                    admin::stop(folder, stop.deadline)?;
                    stopped.push(status.pid);
                }
                Err(admin::AdminError::NotRunning { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if stopped.is_empty() {
            return Err(Failure::new(Exit::Unreachable, "none of the network's validators runs"));
        }
        let text = format!("stopped {} validators", stopped.len());
        global.output.print_or(&serde_json::json!({ "stopped": stopped }), &text)
    }
}
