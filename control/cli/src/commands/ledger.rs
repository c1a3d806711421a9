//! `metanode ledger` and `node validators`.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use metanode_application::{Account, Application, Reference, Session};
use metanode_client::{Client, ExecutedBlock, Got, LedgerAnswer};
use metanode_crypto::{Claim, Identity, hash, verify_all};
use metanode_ibft::{Certificate, ChainId, Height};
use metanode_ledger::{
    Batch, Block, Chain, Genesis, TRANSACTION_DOMAIN,
    system::{PROOF_DOMAIN, Zip215, proof_message},
};
use metanode_node::{
    DataFolder,
    data::GENESIS_FILE,
    ledger::{REFERENCE, application_socket, begin_sign_state, has_sign_state, serve_application},
};
use metanode_state::{Key, Proof};
use metanode_types::{Hash, NodeKey};
use metanode_wire::{Ticket, message::LedgerStatusReply};
use serde::Serialize;

use super::{network, with_client};
use crate::{
    args::{Global, Ledger, Query},
    exit::{Exit, Failure, Result, io},
    output::{Row, Show, bytes, count},
    target::node_folder,
};

/// How long a node is asked to wait for a block.
const WAIT: Duration = Duration::from_secs(5);

pub(super) fn run(global: &Global, ledger: Ledger) -> Result<()> {
    match ledger {
        Ledger::Init(init) => network::init(global, &init),
        Ledger::Join { genesis, peer } => join(global, &genesis, &peer),
        Ledger::Sign { .. } => sign(global),
        Ledger::Candidate => candidate(global),
        Ledger::Application => application(global),
        Ledger::Stats => with_client(global, None, false, async |client, _| {
            global.output.print(&Stats::new(client.ledger_status().await?))
        }),
        Ledger::Query(query) => self::query(global, &query),
        Ledger::Tail { from, limit } => tail(global, from, limit),
        Ledger::Verify { genesis, to } => verify(global, genesis, to),
    }
}

#[derive(Debug, Serialize)]
struct Serving {
    socket: PathBuf,
    pid: u32,
}

impl Show for Serving {
    fn lines(&self) -> Vec<(&'static str, String)> {
        vec![("socket", self.socket.display().to_string()), ("process", self.pid.to_string())]
    }
}

/// `metanode ledger application`.
fn application(global: &Global) -> Result<()> {
    let folder = DataFolder::open(&node_folder(global)?)?;
    let socket = application_socket(&folder, &folder.config()?.ledger);
    let socket = socket.ok_or_else(|| {
        Failure::usage("the configuration names no socket: the node runs the application itself")
            .hint("`application = \"application.sock\"` in the section [ledger] of metanode.toml names one")
    })?;
    let session = Session::new(concat!("metanode-reference/", env!("CARGO_PKG_VERSION")).to_owned(), REFERENCE);
    let mut printed = Ok(());
    let ready = || {
        printed = global.output.print(&Serving { socket: socket.clone(), pid: std::process::id() });
        printed.is_ok()
    };
    let Err(error) = serve_application(&socket, session, ready);
    printed?;
    match error.kind() {
        std::io::ErrorKind::AddrInUse => Err(Failure::new(Exit::DataFolder, format!("{}: {error}", socket.display()))),
        _ => Err(io(socket.display())(error)),
    }
}

#[derive(Debug, Serialize)]
struct Stats {
    name: String,
    chain: String,
    node: String,
    role: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    reason: String,
    height: u64,
    block: String,
    time_ms: u64,
    executed: u64,
    lag: u64,
    round: u32,
    validators: usize,
    connected: usize,
    waiting: u64,
    waiting_bytes: u64,
    batches: u64,
    transactions: u64,
    timeouts: u64,
    /// Of this node's latest proposals, from proposal to quorum.
    #[serde(skip_serializing_if = "Option::is_none")]
    finality_p50_us: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    finality_p99_us: Option<u32>,
    syncs: u64,
    sync_p50_us: u32,
    guilty: Vec<String>,
}

impl Stats {
    fn new(status: LedgerStatusReply) -> Self {
        let mut times = status.finality_us;
        times.sort_unstable();
        let at = |share: usize| times.get(times.len() * share / 100).copied();
        Self {
            name: status.name,
            chain: Hash(status.chain).to_string(),
            node: NodeKey(status.node_key).to_string(),
            role: match status.role {
                0 => "observes",
                1 => "votes",
                2 => "silent",
                _ => "stopped",
            },
            reason: status.reason,
            height: status.height,
            block: Hash(status.block).to_string(),
            time_ms: status.time_ms,
            executed: status.executed,
            lag: status.lag,
            round: status.round,
            validators: status.validators.len(),
            connected: status.connected.len(),
            waiting: status.waiting,
            waiting_bytes: status.waiting_bytes,
            batches: status.batches,
            transactions: status.transactions,
            timeouts: status.timeouts,
            finality_p50_us: at(50),
            finality_p99_us: at(99),
            syncs: status.syncs,
            sync_p50_us: status.sync_p50_us,
            guilty: status.guilty.into_iter().map(|key| NodeKey(key).to_string()).collect(),
        }
    }
}

impl Show for Stats {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let millis = |micros: u32| format!("{:.2} ms", f64::from(micros) / 1000.0);
        let mut lines = vec![
            ("chain", format!("{} {}", self.name, self.chain)),
            ("node", self.node.clone()),
            ("role", if self.reason.is_empty() { self.role.into() } else { format!("{}: {}", self.role, self.reason) }),
            ("height", format!("{}, executed {}, round {}", self.height, self.executed, self.round)),
            ("block", self.block.clone()),
            ("validators", format!("{}, connected to {} nodes", self.validators, self.connected)),
            (
                "waiting",
                format!(
                    "{} transactions, {}; {} batches",
                    count(self.waiting),
                    bytes(self.waiting_bytes),
                    self.batches
                ),
            ),
            ("transactions", format!("{} executed since the start", count(self.transactions))),
            ("timeouts", format!("{} rounds since the start", self.timeouts)),
        ];
        if let (Some(half), Some(most)) = (self.finality_p50_us, self.finality_p99_us) {
            lines.push(("finality", format!("p50 {}, p99 {} (this node's proposals)", millis(half), millis(most))));
        }
        lines.push(("sign state", format!("{} syncs, p50 {}", count(self.syncs), millis(self.sync_p50_us))));
        lines.extend(self.guilty.iter().map(|key| ("guilty", key.clone())));
        lines
    }
}

#[derive(Debug, Serialize)]
struct ValidatorRow {
    key: String,
    is_this_node: bool,
    connected: bool,
}

impl Row for ValidatorRow {
    const COLUMNS: &'static [(&'static str, isize)] = &[("KEY", 72), ("CONNECTED", 9)];

    fn cells(&self) -> Vec<String> {
        let connected = if self.is_this_node {
            "this node"
        } else if self.connected {
            "yes"
        } else {
            "no"
        };
        vec![self.key.clone(), connected.to_owned()]
    }
}

pub(super) fn validators(global: &Global) -> Result<()> {
    with_client(global, None, false, async |client, _| {
        let status = client.ledger_status().await?;
        let mut list = global.output.list::<ValidatorRow>()?;
        for key in &status.validators {
            list.push(&ValidatorRow {
                key: NodeKey(*key).to_string(),
                is_this_node: *key == status.node_key,
                connected: status.connected.contains(key),
            })?;
        }
        list.end()
    })
}

fn read_genesis(path: &Path) -> Result<Genesis> {
    let text = std::fs::read_to_string(path).map_err(io(path.display()))?;
    Genesis::from_json(&text).map_err(|error| Failure::usage(error).context(path.display()))
}

/// The chain of the data folder's node.
fn own_genesis(folder: &DataFolder) -> Result<Genesis> {
    let config = folder.config()?;
    if config.ledger.genesis.is_empty() {
        let what = format!("the node of {} has no ledger", folder.path().display());
        return Err(Failure::new(Exit::NotFound, what).hint("`metanode ledger join` makes it follow a chain"));
    }
    read_genesis(&folder.path().join(&config.ledger.genesis))
}

fn join(global: &Global, genesis: &Path, peers: &[Ticket]) -> Result<()> {
    let genesis = read_genesis(genesis)?;
    let folder = DataFolder::open_or_init(&node_folder(global)?)?;
    let mut config = folder.config()?;
    folder.set_genesis(&genesis.to_json())?;
    if read_genesis(&folder.path().join(GENESIS_FILE))? != genesis {
        let what = format!("{} has the genesis of another chain", folder.path().display());
        return Err(Failure::new(Exit::DataFolder, what)
            .hint("a data folder is of one chain for good: name another one with --data"));
    }
    if !has_sign_state(&folder) {
        begin_sign_state(&folder, &genesis)?;
    }
    config.ledger.genesis = GENESIS_FILE.to_owned();
    // Those that it knows already stay.
    for peer in peers {
        config.ledger.peers.retain(|known| known.node != peer.node);
        config.ledger.peers.push(peer.node_only());
    }
    folder.set_config(&config)?;
    let chain = Hash(genesis.chain().0).to_string();
    let text = format!("follows {} {chain} from its next start on", genesis.name);
    global.output.print_or(&serde_json::json!({ "chain": chain }), &text)
}

fn sign(global: &Global) -> Result<()> {
    let folder = DataFolder::open(&node_folder(global)?)?;
    let genesis = own_genesis(&folder)?;
    if has_sign_state(&folder) {
        let what = format!("there is a sign state in {}", folder.path().join("ledger/sign").display());
        return Err(Failure::new(Exit::DataFolder, what).hint("if it is another one's or damaged, move it away first"));
    }
    begin_sign_state(&folder, &genesis)?;
    let key = folder.node_identity().public().to_string();
    global.output.print_or(&serde_json::json!({ "key": key }), &format!("{key} may vote from its next start on"))
}

fn candidate(global: &Global) -> Result<()> {
    let folder = DataFolder::open(&node_folder(global)?)?;
    let genesis = own_genesis(&folder)?;
    let identity: &Identity = folder.node_identity();
    let consent = identity.sign(PROOF_DOMAIN, &proof_message(&genesis.chain(), &identity.public()));
    let (first, second) = consent.split_at(32);
    let hex = |half: &[u8]| half.try_into().map(Hash).map(|half| half.to_string()).unwrap_or_default();
    let (key, consent) = (identity.public().to_string(), hex(first) + &hex(second));
    global.output.print_or(&serde_json::json!({ "key": key, "consent": consent }), &format!("{key} {consent}"))
}

#[derive(Debug, Serialize)]
struct Found {
    key: String,
    height: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    balance: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    nonce: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<String>,
    /// The block whose header proves it.
    proven_by: u64,
}

impl Show for Found {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![("key", self.key.clone())];
        lines.extend(self.balance.map(|balance| ("balance", balance.to_string())));
        lines.extend(self.nonce.map(|nonce| ("nonce", nonce.to_string())));
        lines.extend(self.value.iter().map(|value| ("value", value.clone())));
        lines.push(("height", self.height.to_string()));
        lines.push(("proven by", format!("the header of block {}", self.proven_by)));
        lines
    }
}

fn query(global: &Global, query: &Query) -> Result<()> {
    with_client(global, None, false, async |client, target| {
        let (answer, key) = match query {
            Query::Account { account } => {
                let account = account.unwrap_or_else(|| target.identity.public());
                (client.ledger_account(account).await?, account)
            }
            Query::Value { account, name } => (client.ledger_value(*account, name.as_bytes()).await?, *account),
        };
        let proven_by = prove(client, &answer, global.timeout).await?;
        let mut found =
            Found { key: key.to_string(), height: answer.height.0, balance: None, nonce: None, value: None, proven_by };
        match query {
            Query::Account { .. } => {
                let account = answer.value.as_deref().and_then(Account::decode).unwrap_or_default();
                (found.balance, found.nonce) = (Some(account.balance), Some(account.nonce));
            }
            Query::Value { name, .. } => match &answer.value {
                Some(stored) => found.value = Some(String::from_utf8_lossy(&stored[1..]).into_owned()),
                None => return Err(Failure::new(Exit::NotFound, format!("{key} has set nothing at {name:?}"))),
            },
        }
        global.output.print(&found)
    })
}

/// Ties an answer to the header of a final block, whose certificate is checked by the set that the node names: what a stranger checks from
/// the genesis on is `ledger verify`'s.
async fn prove(client: &Client, answer: &LedgerAnswer, time: Duration) -> Result<u64> {
    let broken = |what: &str| Failure::new(Exit::Integrity, format!("the node's answer is not proven: {what}"));
    let status = client.ledger_status().await?;
    let proof = Proof {
        beside: answer.beside.iter().map(|hash| Hash(*hash)).collect(),
        found: answer.found.map(|(key, hash)| (Key(key), Hash(hash))),
    };
    let proven_by = Height(answer.height.0 + status.lag);
    let begun = Instant::now();
    let header = loop {
        if let Some((block, _)) = client.block(proven_by, WAIT.min(time / 2)).await? {
            break block.header;
        }
        if begun.elapsed() >= time {
            return Err(Failure::new(Exit::Busy, format!("block {} is not there in time", proven_by.0)));
        }
    };
    let (root, found) = proof.leads_to(&Key(answer.key)).map_err(|_| broken("the proof is malformed"))?;
    if found != answer.value.as_deref().map(hash) {
        return Err(broken("what is there is something else"));
    }
    let app_hash = metanode_ledger::state_hash(&Hash(answer.system), &root);
    if app_hash != header.app_hash {
        return Err(broken("the header has another hash"));
    }
    Ok(proven_by.0)
}

#[derive(Debug, Serialize)]
struct BlockRow {
    height: u64,
    time_ms: u64,
    author: String,
    round: u32,
    batches: usize,
    transactions: usize,
    done: usize,
    hash: String,
}

impl Row for BlockRow {
    const COLUMNS: &'static [(&'static str, isize)] =
        &[("HEIGHT", -8), ("ROUND", -5), ("BATCHES", -7), ("TRANSACTIONS", -12), ("DONE", -8), ("HASH", 64)];

    fn cells(&self) -> Vec<String> {
        vec![
            self.height.to_string(),
            self.round.to_string(),
            self.batches.to_string(),
            self.transactions.to_string(),
            self.done.to_string(),
            self.hash.clone(),
        ]
    }
}

fn tail(global: &Global, from: Option<u64>, limit: Option<u64>) -> Result<()> {
    with_client(global, None, false, async |client, _| {
        let from = match from {
            Some(from) => from.max(1),
            None => client.ledger_status().await?.executed + 1,
        };
        let mut follow = client.follow(Height(from));
        let mut list = global.output.list::<BlockRow>()?;
        let mut left = limit.unwrap_or(u64::MAX);
        while left > 0 {
            let ExecutedBlock { block, certificate, outcomes } = follow.next().await?;
            let done = outcomes.iter().filter(|(_, it)| matches!(it, metanode_ledger::Outcome::Done(_))).count();
            list.push(&BlockRow {
                height: block.header.height.0,
                time_ms: block.header.time_ms,
                author: block.header.author.to_string(),
                round: certificate.view.round.0,
                batches: block.batches.len(),
                transactions: outcomes.len(),
                done,
                hash: block.header.hash().to_string(),
            })?;
            left -= 1;
        }
        list.end()
    })
}

#[derive(Debug, Serialize)]
struct Verified {
    chain: String,
    height: u64,
    block: String,
    batches: u64,
    transactions: u64,
    signatures: u64,
    /// Results are certified by later headers: up to here.
    results_certified: u64,
    seconds: f64,
}

impl Show for Verified {
    fn lines(&self) -> Vec<(&'static str, String)> {
        vec![
            ("chain", self.chain.clone()),
            (
                "verified",
                format!(
                    "{} blocks, {} batches, {} transactions, {} signatures",
                    count(self.height),
                    count(self.batches),
                    count(self.transactions),
                    count(self.signatures)
                ),
            ),
            ("last block", self.block.clone()),
            ("results", format!("executed here again; headers certify them up to height {}", self.results_certified)),
            ("time", format!("{:.1} s", self.seconds)),
        ]
    }
}

/// A chain that is verified block by block.
struct Verification {
    id: ChainId,
    chain: Chain,
    app: Reference,
    lag: u64,
    batches: u64,
    transactions: u64,
    signatures: u64,
}

fn verify(global: &Global, genesis: Option<PathBuf>, to: Option<u64>) -> Result<()> {
    let genesis = match genesis {
        Some(path) => read_genesis(&path)?,
        None => own_genesis(&DataFolder::open(&node_folder(global)?)?)?,
    };
    let begun = Instant::now();
    with_client(global, None, true, async |client, _| {
        let status = client.ledger_status().await?;
        let id = genesis.chain();
        if status.chain != id.0 {
            let what = format!("the node is of the chain {}, the genesis of {}", Hash(status.chain), Hash(id.0));
            return Err(Failure::new(Exit::Integrity, what));
        }
        let app = Reference::new(&genesis);
        let chain = Chain::new(&genesis, &app.executed().1);
        let mut this = Verification { id, chain, app, lag: genesis.lag, batches: 0, transactions: 0, signatures: 0 };
        let to = to.unwrap_or(status.height);
        for height in 1..=to {
            let found = client.block(Height(height), WAIT).await?;
            let (block, certificate) =
                found.ok_or_else(|| Failure::new(Exit::NotFound, format!("the node has no block {height}")))?;
            this.block(client, &block, &certificate)
                .await
                .map_err(|failure| failure.context(format!("block {height}")))?;
        }
        let tip = this.chain.tip();
        global.output.print(&Verified {
            chain: Hash(id.0).to_string(),
            height: tip.height.0,
            block: tip.hash.to_string(),
            batches: this.batches,
            transactions: this.transactions,
            signatures: this.signatures,
            results_certified: tip.height.0.saturating_sub(this.lag),
            seconds: begun.elapsed().as_secs_f64(),
        })
    })
}

impl Verification {
    async fn block(&mut self, client: &Client, block: &Block, certificate: &Certificate) -> Result<()> {
        let wrong = |what: String| Failure::new(Exit::Integrity, what);
        let validators = self.chain.validators().map_err(|error| wrong(error.to_string()))?;
        if certificate.hash != block.header.hash() || certificate.view.height != block.header.height {
            return Err(wrong("the certificate is of another block".into()));
        }
        certificate
            .verify(&self.id, validators, &Zip215)
            .map_err(|error| wrong(format!("the certificate does not hold: {error}")))?;
        self.signatures += certificate.commits.len() as u64;
        let mut batches = Vec::new();
        for digest in &block.batches {
            let Got::Whole(bytes) = client.get_whole(*digest).await? else {
                return Err(wrong(format!("batch {digest} is too large")));
            };
            let batch = Batch::decode(bytes).map_err(|error| wrong(format!("batch {digest}: {error}")))?;
            self.batch(&batch).map_err(|failure| failure.context(format!("batch {digest}")))?;
            batches.push(batch);
        }
        let facts: Vec<_> = batches.iter().map(Batch::facts).collect();
        self.chain.check(block, &facts).map_err(|error| wrong(error.to_string()))?;
        self.chain.decided(block, &facts);
        let app = &mut self.app;
        let done = self.chain.plan(block, batches).execute(|height, time_ms, transactions| {
            Ok::<_, std::convert::Infallible>(app.execute(height, time_ms, transactions))
        });
        let Ok(done) = done;
        self.chain.executed(done);
        self.app.commit(Height(block.header.height.0.saturating_sub(1)));
        Ok(())
    }

    fn batch(&mut self, batch: &Batch) -> Result<()> {
        let wrong = |what: String| Failure::new(Exit::Integrity, what);
        if !batch.is_signed(&self.id) {
            return Err(wrong("its author has not signed it".into()));
        }
        let signed: Vec<_> = batch
            .transactions()
            .filter_map(|it| Some((it.account, it.signed_message(&self.id), it.signature?)))
            .collect();
        let claims: Vec<Claim<'_>> = signed
            .iter()
            .map(|(signer, message, signature)| Claim {
                signer: *signer,
                domain: TRANSACTION_DOMAIN,
                message,
                signature,
            })
            .collect();
        if let Err(bad) = verify_all(&claims) {
            return Err(wrong(format!("{} signatures of transactions do not hold", bad.len())));
        }
        self.batches += 1;
        self.transactions += batch.count() as u64;
        self.signatures += 1 + claims.len() as u64;
        Ok(())
    }
}
