//! Validators of a chain of their own, each a process.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU8, Ordering},
    time::Duration,
};

use metanode_application::{Account, Operation};
use metanode_client::{Client, ClientConfig, ClientError, TransactionStatus};
use metanode_crypto::Identity;
use metanode_ibft::{ChainId, Height};
use metanode_ledger::{
    Genesis, Kind, Outcome, Transaction, TransactionDraft, TransactionId,
    system::{PROOF_DOMAIN, Wish, proof_message},
};
use metanode_types::NodeKey;
use metanode_wire::Ticket;
use tempfile::TempDir;

use crate::{
    Node, Ran, Service, eventually,
    process::{metanode, run},
};

/// Small segments: validators are then there in a moment.
const SEGMENT_BYTES: &str = "segment_bytes = 8388608";

/// A chain and its validators, numbered from 0.
pub struct Network {
    temp: TempDir,
    folder: PathBuf,
    nodes: Vec<Option<Node>>,
    /// Processes of the validators' applications, where there are some.
    applications: Vec<Option<Service>>,
    genesis: Genesis,
}

/// An address for validators that no other test's have: ports below those that are given out, on a loopback address of their own.
fn listen() -> String {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let (pid, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    format!("127.{}.{}.{number}:4441", 1 + pid % 250, 1 + pid / 250 % 250)
}

impl Network {
    /// Makes a chain, with more options for `ledger init`; nothing runs yet.
    #[track_caller]
    pub fn new(validators: u16, options: &[&str]) -> Self {
        let temp = tempfile::tempdir().expect("a temporary folder can be made");
        let folder = temp.path().join("network");
        let (count, listen) = (validators.to_string(), listen());
        let mut init = metanode(["ledger", "init", "--validators", &count, "--listen", &listen, "--out"]);
        run(init.arg(&folder).args(options), b"").ok();
        let genesis = std::fs::read_to_string(folder.join("genesis.json")).expect("there is a genesis");
        let genesis = Genesis::from_json(&genesis).expect("it is a genesis");
        let this = Self {
            temp,
            folder,
            nodes: (0..validators).map(|_| None).collect(),
            applications: (0..validators).map(|_| None).collect(),
            genesis,
        };
        (0..this.nodes.len()).for_each(|index| this.shrink(&this.data(index)));
        this
    }

    fn shrink(&self, data: &Path) {
        let path = data.join("metanode.toml");
        let config = std::fs::read_to_string(&path).expect("there is a configuration");
        let lines: Vec<&str> = config
            .lines()
            .map(|line| match line {
                _ if line.starts_with("segment_bytes") => SEGMENT_BYTES,
                "listen = \"off\"" => "listen = \"127.0.0.1:0\"", // the metrics page
                // Often, so that most restarts go on from one; and little memory of what was before.
                _ if line.starts_with("snapshot_heights") => "snapshot_heights = 7",
                _ if line.starts_with("outcomes_max") => "outcomes_max = 1024",
                line => line,
            })
            .collect();
        std::fs::write(&path, lines.join("\n")).expect("it can be written");
    }

    /// The network's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A path beside it.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    /// A validator's data folder.
    pub fn data(&self, index: usize) -> PathBuf {
        self.folder.join(format!("validator-{}", index + 1))
    }

    /// How many there are, whether they run or not.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The chain.
    pub fn chain(&self) -> ChainId {
        self.genesis.chain()
    }

    /// Its beginning.
    pub fn genesis(&self) -> &Genesis {
        &self.genesis
    }

    /// Starts a validator and waits until it serves.
    #[track_caller]
    pub fn start(&mut self, index: usize) {
        let log = self.temp.path().join(format!("validator-{}.log", index + 1));
        self.nodes[index] = Some(Node::spawn(&mut self.start_command(index), log));
    }

    /// As [`Network::start`], with the command as `change` has it.
    #[track_caller]
    pub fn start_by(&mut self, index: usize, change: impl FnOnce(&Command) -> Command) {
        let log = self.temp.path().join(format!("validator-{}.log", index + 1));
        self.nodes[index] = Some(Node::spawn(&mut change(&self.start_command(index)), log));
    }

    /// Gives all validators other addresses, before they are started: where each listens, and where the first sees the second.
    pub fn move_to(&self, address: impl Fn(usize) -> SocketAddr, seen: impl Fn(usize, usize) -> SocketAddr) {
        let ticket = |from: usize, to: usize| Ticket {
            node: self.identity(to).public(),
            addresses: vec![seen(from, to)],
            hash: None,
        };
        for index in 0..self.len() {
            let path = self.data(index).join("metanode.toml");
            let config = std::fs::read_to_string(&path).expect("there is a configuration");
            let mut lines = Vec::new();
            let mut in_peers = false;
            for line in config.lines() {
                match line {
                    _ if line.starts_with("listen = \"127.") => lines.push(format!("listen = \"{}\"", address(index))),
                    _ if line.starts_with("peers = [") => {
                        let peers = (0..self.len()).filter(|place| *place != index);
                        let peers: Vec<String> = peers.map(|place| format!("\"{}\"", ticket(index, place))).collect();
                        lines.push(format!("peers = [{}]", peers.join(", ")));
                        in_peers = true;
                    }
                    "]" if in_peers => in_peers = false,
                    _ if in_peers => {}
                    _ => lines.push(line.to_owned()),
                }
            }
            std::fs::write(&path, lines.join("\n")).expect("it can be written");
        }
    }

    /// What starts a validator.
    pub fn start_command(&self, index: usize) -> Command {
        let mut command = metanode(["start", "--foreground", "-o", "json", "--data"]);
        command.arg(self.data(index));
        command
    }

    /// Starts all that don't run.
    #[track_caller]
    pub fn start_all(&mut self) {
        for index in 0..self.nodes.len() {
            if self.nodes[index].is_none() {
                self.start(index);
            }
        }
    }

    /// Starts the process of a validator's application.
    #[track_caller]
    pub fn start_application(&mut self, index: usize) {
        let mut command = metanode(["ledger", "application", "-o", "json", "--data"]);
        self.applications[index] = Some(Service::spawn(command.arg(self.data(index))));
    }

    /// SIGKILL to the process of a validator's application.
    #[track_caller]
    pub fn kill_application(&mut self, index: usize) {
        self.applications[index].take().expect("it runs").kill();
    }

    /// One more node, which follows the chain.
    #[track_caller]
    pub fn join(&mut self) -> usize {
        let index = self.nodes.len();
        let mut join = metanode(["ledger", "join", "--genesis"]);
        join.arg(self.folder.join("genesis.json")).arg("--data").arg(self.data(index));
        for node in self.nodes.iter().flatten() {
            join.args(["--peer", &node.ready.ticket.to_string()]);
        }
        run(&mut join, b"").ok();
        let config = self.data(index).join("metanode.toml");
        let text = std::fs::read_to_string(&config).expect("there is a configuration");
        let text = text.replace("127.0.0.1:4433", "127.0.0.1:0").replace("127.0.0.1:9101", "off");
        std::fs::write(&config, text).expect("it can be written");
        self.shrink(&self.data(index));
        self.nodes.push(None);
        self.start(index);
        index
    }

    /// SIGKILL.
    #[track_caller]
    pub fn kill(&mut self, index: usize) {
        self.nodes[index].take().expect("it runs").kill();
    }

    /// SIGTERM, and exit code 0.
    #[track_caller]
    pub fn stop(&mut self, index: usize) {
        self.nodes[index].take().expect("it runs").stop();
    }

    /// A running validator.
    #[track_caller]
    pub fn node(&self, index: usize) -> &Node {
        self.nodes[index].as_ref().expect("it runs")
    }

    /// Those that run.
    pub fn running(&self) -> impl Iterator<Item = usize> {
        (0..self.nodes.len()).filter(|index| self.nodes[*index].is_some())
    }

    /// Runs a command on the network's folder.
    #[track_caller]
    pub fn cli(&self, line: &str) -> Ran {
        self.cli_on(&self.folder, line)
    }

    /// Runs a command on a data folder.
    #[track_caller]
    pub fn cli_on(&self, folder: &Path, line: &str) -> Ran {
        run(metanode(line.split(' ')).arg("--data").arg(folder).current_dir(self.temp.path()), b"")
    }

    /// A validator's key pair.
    pub fn identity(&self, index: usize) -> Identity {
        let pem = std::fs::read_to_string(self.data(index).join("node.key")).expect("there is a key");
        Identity::from_pem(&pem).expect("it is a key")
    }

    /// Asks the ledger for something of its own, as a validator, and waits until that is executed.
    pub async fn wish(&self, index: usize, wish: &Wish) -> Outcome {
        let identity = self.identity(index);
        let client = self.client(index).await.expect("it takes connections");
        let height = client.ledger_status().await.expect("it has a ledger").height;
        let payload = wish.encode();
        let draft = TransactionDraft {
            kind: Kind::Validators,
            account: identity.public(),
            nonce: 0,
            fee: 0,
            expiry: Height(height + 1_000),
            payload: &payload,
        };
        let sign = |domain: &str, message: &[u8]| Ok::<_, std::convert::Infallible>(identity.sign(domain, message));
        let Ok(encoded) = draft.encode(&self.chain(), sign);
        let id = Transaction::decode(&encoded).expect("it was made just now").id(&self.chain());
        assert_eq!(client.submit(encoded.into()).await.expect("it is asked"), [], "it is taken");
        match client.transaction(id, Duration::from_secs(20)).await {
            Ok(TransactionStatus::Executed { outcome, .. }) => outcome,
            other => panic!("{other:?}"),
        }
    }

    /// The consent of somebody to becoming a validator.
    pub fn consent(&self, identity: &Identity) -> [u8; 64] {
        identity.sign(PROOF_DOMAIN, &proof_message(&self.chain(), &identity.public()))
    }

    /// Waits until these vote, as a validator says.
    pub async fn votes(&self, index: usize, keys: &[NodeKey], time: Duration) {
        let client = self.client(index).await.expect("it takes connections");
        let mut wanted: Vec<[u8; 32]> = keys.iter().map(|key| key.0).collect();
        wanted.sort_unstable();
        eventually("the set of validators", time, async || {
            client.ledger_status().await.ok().filter(|status| status.validators == wanted)
        })
        .await;
    }

    /// Who may write to all of them, and has everything at the beginning.
    pub fn operator(&self) -> Identity {
        let pem = std::fs::read_to_string(self.folder.join("operator.key")).expect("there is a key");
        Identity::from_pem(&pem).expect("it is a key")
    }

    /// Connects to a validator as the operator.
    pub async fn client(&self, index: usize) -> Result<Client, ClientError> {
        self.client_as(index, self.operator()).await
    }

    /// Connects to a validator as somebody.
    pub async fn client_as(&self, index: usize, identity: Identity) -> Result<Client, ClientError> {
        let mut config = ClientConfig::new(identity);
        config.connect_timeout = Duration::from_secs(2);
        config.request_timeout = Duration::from_secs(10);
        let ticket = self.nodes[index].as_ref().expect("it runs").ready.ticket.clone();
        Client::connect(&ticket, config).await
    }

    /// Waits until a validator's ledger is at a height.
    pub async fn reach(&self, index: usize, height: u64, time: Duration) {
        let client = self.client(index).await.expect("it takes connections");
        eventually(&format!("validator {index} at height {height}"), time, async || {
            client.ledger_status().await.ok().filter(|status| status.executed >= height)
        })
        .await;
    }
}

/// A signed transaction of the reference application.
pub fn transaction(
    chain: &ChainId,
    signer: &Identity,
    nonce: u64,
    fee: u64,
    expiry: u64,
    operation: &Operation<'_>,
) -> Vec<u8> {
    let payload = operation.encode();
    let draft = TransactionDraft {
        kind: Kind::Application,
        account: signer.public(),
        nonce,
        fee,
        expiry: Height(expiry),
        payload: &payload,
    };
    let sign = |domain: &str, message: &[u8]| Ok::<_, std::convert::Infallible>(signer.sign(domain, message));
    let Ok(encoded) = draft.encode(chain, sign);
    encoded
}

/// Sends transactions of one account, one after the other, each until it is known what became of it.
#[derive(Debug)]
pub struct Sender {
    chain: ChainId,
    identity: Identity,
    nonce: u64,
}

impl Sender {
    /// With an account that has had no transactions.
    pub fn new(chain: ChainId, identity: Identity) -> Self {
        Self { chain, identity, nonce: 0 }
    }

    /// The account.
    pub fn account(&self) -> NodeKey {
        self.identity.public()
    }

    /// How many it has sent.
    pub fn nonce(&self) -> u64 {
        self.nonce
    }

    /// The next transaction, which is sent again until it is executed: to whom `connect` leads to. What became of it, and where.
    pub async fn send(
        &mut self,
        operation: &Operation<'_>,
        fee: u64,
        mut connect: impl AsyncFnMut() -> Option<Client>,
    ) -> (TransactionId, Height, Outcome) {
        let encoded = transaction(&self.chain, &self.identity, self.nonce, fee, 90_000, operation);
        let id = Transaction::decode(&encoded).expect("it was made just now").id(&self.chain);
        self.nonce += 1;
        loop {
            let Some(client) = connect().await else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            // It may be there already, and refused for that.
            if client.submit(encoded.clone().into()).await.is_err() {
                continue;
            }
            let status = client.transaction(id, Duration::from_secs(3)).await;
            if let Ok(TransactionStatus::Executed { height, outcome }) = status
                && !matches!(outcome, Outcome::Skipped(_))
            {
                return (id, height, outcome);
            }
        }
    }
}

/// What an account has, as a node says.
pub async fn account(client: &Client, key: NodeKey) -> Result<Account, ClientError> {
    let answer = client.ledger_account(key).await?;
    Ok(answer.value.as_deref().and_then(Account::decode).unwrap_or_default())
}
