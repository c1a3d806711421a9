//! Validators of one chain, all on this machine: how long finality takes, and how many transactions they order and execute.
//!
//! All validators and the load share all cores: what the load took is told apart. Each validator is a process with its files in a folder of
//! its own on the same disk, in its shipped configuration but for its address.
//!
//! 1. `finality_empty`: nothing to do but an empty block every [`EMPTY_MS`]; each validator's own proposals, from proposal to quorum of commits.
//! 2. `executed`: one client, one transfer at a time, from submission to its outcome.
//! 3. `tx_signed`: transfers of different accounts, signed before; first as many as are taken, to find a rate, then an open loop at a part of
//!    it for the whole time.
//! 4. `tx_opaque`: random payloads of 1 KiB without a signature, as many as are taken.
//! 5. `socket_tx_signed`: the third again, with each validator's application in a process of its own.

use std::{
    io::BufRead as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use metanode_application::Operation;
use metanode_client::{Client, ClientConfig, TransactionStatus};
use metanode_crypto::{Claim, Identity, PIECE_MAX, verify_all};
use metanode_ibft::{ChainId, Height};
use metanode_ledger::{Genesis, Kind, TRANSACTION_DOMAIN, Transaction, TransactionDraft};
use metanode_wire::{Ticket, message::LedgerStatusReply};
use serde_json::Value;
use tokio::{
    task::{JoinSet, LocalSet},
    time::{sleep, timeout},
};

use crate::{
    Consensus, data,
    measure::{Latencies, Report, cpu_time, memory_kib},
    node::Place,
};

/// Between two empty blocks.
const EMPTY_MS: u64 = 20;
/// Accounts that pay each other: more than are in flight at a time.
const ACCOUNTS: usize = 2_048;
/// Transfers in one request.
const SIGNED_PER_REQUEST: usize = 128;
/// Payloads in one request: what fits a frame's body.
const OPAQUE_PER_REQUEST: usize = 250;
const OPAQUE_BYTES: usize = 1_024;
/// Requests of the closed loops that are on the way at once, at each validator.
const DEPTH: usize = 4;
/// The part of what was taken at most that the open loop offers.
const OFFERED_SHARE: f64 = 0.9;
/// Time for what was taken to be executed when nothing more is sent.
const SETTLE_TIME_MAX: Duration = Duration::from_secs(60);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// Time for a validator to be ready.
const READY_TIME_MAX: Duration = Duration::from_secs(60);

pub(crate) async fn run(options: &Consensus) -> Result<Report> {
    LocalSet::new().run_until(measure(options)).await
}

async fn measure(options: &Consensus) -> Result<Report> {
    let mut report = Report::default();
    let accounts: Vec<Identity> = (0..ACCOUNTS).map(account).collect();
    let verify = verify_rate(&accounts);
    report.add("verify_batched_ops_core", verify);
    {
        let chain = Network::start(options, 4, &accounts, false).await?;
        empty(&chain, options, "", &mut report).await?;
        one_by_one(&chain, &accounts, "", &mut report).await?;
        let accounts = Rc::new(accounts.clone());
        let signed = signed(&chain, accounts, options, "", &mut report).await?;
        report.add("tx_signed_share", signed / (2.0 * verify / 4.0));
        opaque(&chain, options, "", &mut report).await?;
        report.add("consensus_rss_mib", chain.rss_mib()?);
        chain.stop().await?;
    }
    {
        let chain = Network::start(options, 4, &accounts, true).await?;
        one_by_one(&chain, &accounts, "socket_", &mut report).await?;
        signed(&chain, Rc::new(accounts.clone()), options, "socket_", &mut report).await?;
        chain.stop().await?;
    }
    if options.seven {
        let chain = Network::start(options, 7, &accounts, false).await?;
        empty(&chain, options, "n7_", &mut report).await?;
        one_by_one(&chain, &accounts, "n7_", &mut report).await?;
        let accounts = Rc::new(accounts);
        signed(&chain, accounts, options, "n7_", &mut report).await?;
        opaque(&chain, options, "n7_", &mut report).await?;
        chain.stop().await?;
    }
    Ok(report)
}

fn account(index: usize) -> Identity {
    let mut seed = [7; 32];
    seed[..8].copy_from_slice(&(index as u64).to_le_bytes());
    Identity::from_seed(&seed)
}

/// A signed transfer.
fn transfer(chain: &ChainId, from: &Identity, to: &Identity, nonce: u64) -> Vec<u8> {
    let payload = Operation::Pay { to: to.public(), amount: 1 }.encode();
    let draft = TransactionDraft {
        kind: Kind::Application,
        account: from.public(),
        nonce,
        fee: 1,
        expiry: Height(90_000),
        payload: &payload,
    };
    let sign = |domain: &str, message: &[u8]| Ok::<_, std::convert::Infallible>(from.sign(domain, message));
    let Ok(encoded) = draft.encode(chain, sign);
    encoded
}

/// Signatures of such transfers that one core checks in a second, 64 together.
fn verify_rate(accounts: &[Identity]) -> f64 {
    let chain = ChainId([3; 32]);
    let encoded: Vec<Vec<u8>> =
        (0..1_024).map(|index| transfer(&chain, &accounts[index], &accounts[index + 1], 0)).collect();
    let signed: Vec<_> = encoded
        .iter()
        .map(|encoded| {
            let transaction = Transaction::decode(encoded).expect("it was made just now");
            (transaction.account, transaction.signed_message(&chain), *transaction.signature.expect("it is signed"))
        })
        .collect();
    let claims: Vec<Claim<'_>> = signed
        .iter()
        .map(|(signer, message, signature)| Claim { signer: *signer, domain: TRANSACTION_DOMAIN, message, signature })
        .collect();
    let (begun, mut count) = (Instant::now(), 0);
    while begun.elapsed() < Duration::from_secs(2) {
        for piece in claims.chunks(PIECE_MAX) {
            verify_all(piece).expect("they hold");
            count += piece.len();
        }
    }
    count as f64 / begun.elapsed().as_secs_f64()
}

/// Validators that run, and a client at each.
struct Network {
    _place: Place,
    validators: Vec<Validator>,
    chain: ChainId,
}

struct Validator {
    child: Child,
    client: Client,
    /// Its application, where that is a process of its own.
    application: Option<Child>,
}

impl Drop for Validator {
    fn drop(&mut self) {
        for child in [Some(&mut self.child), self.application.as_mut()].into_iter().flatten() {
            _ = child.kill(); // it may have ended
            _ = child.wait();
        }
    }
}

fn command(metanode: &Path) -> Command {
    let mut command = Command::new(metanode);
    for name in ["METANODE_DATA", "METANODE_NODE", "METANODE_KEY", "METANODE_LOG"] {
        command.env_remove(name);
    }
    command
}

impl Network {
    /// Validators that run, each with its application in a process of its own if they are `apart`.
    async fn start(options: &Consensus, count: usize, accounts: &[Identity], apart: bool) -> Result<Self> {
        let place = Place::make(&options.common, &format!("consensus-{count}"))?;
        let folder = place.path().join("network");
        let mut init = command(&options.common.metanode);
        init.args(["ledger", "init", "--opaque", "--listen", "127.0.0.1:0", "--validators", &count.to_string()]);
        init.args(["--empty-ms", &EMPTY_MS.to_string(), "--out"]).arg(&folder);
        if apart {
            init.arg("--application");
        }
        init.args(accounts.iter().map(|account| format!("--account={}=1000000000", account.public())));
        let made = init.output().context("cannot run metanode")?;
        ensure!(made.status.success(), "ledger init: {}", String::from_utf8_lossy(&made.stderr));
        let text = std::fs::read_to_string(folder.join("genesis.json"))?;
        let chain = Genesis::from_json(&text).context("the genesis")?.chain();
        let operator = std::fs::read_to_string(folder.join("operator.key"))?;
        let operator = Identity::from_pem(&operator).context("the operator's key")?;
        let mut validators = Vec::new();
        for number in 1..=count {
            let data = folder.join(format!("validator-{number}"));
            validators.push(Validator::start(&options.common.metanode, &data, &operator, apart).await?);
        }
        let this = Self { _place: place, validators, chain };
        for validator in &this.validators {
            let ready = async {
                loop {
                    match validator.client.ledger_status().await {
                        Ok(status) if status.connected.len() + 1 >= count && status.height > 2 => return,
                        _ => sleep(LOOK).await,
                    }
                }
            };
            timeout(READY_TIME_MAX, ready).await.context("the validators don't find each other")?;
        }
        Ok(this)
    }

    async fn statuses(&self) -> Result<Vec<LedgerStatusReply>> {
        let mut all = Vec::new();
        for validator in &self.validators {
            all.push(validator.client.ledger_status().await?);
        }
        Ok(all)
    }

    /// CPU time of all validators with their applications, and of this process.
    fn cpu(&self) -> Result<(Duration, Duration)> {
        let mut all = Duration::ZERO;
        for validator in &self.validators {
            all += cpu_time(validator.child.id())?;
            if let Some(application) = &validator.application {
                all += cpu_time(application.id())?;
            }
        }
        Ok((all, cpu_time(std::process::id())?))
    }

    /// The largest of them.
    fn rss_mib(&self) -> Result<f64> {
        let mut most = 0.0f64;
        for validator in &self.validators {
            most = most.max(memory_kib(validator.child.id(), "VmHWM")? / 1024.0);
        }
        Ok(most)
    }

    async fn stop(mut self) -> Result<()> {
        for validator in &mut self.validators {
            let pid = rustix::process::Pid::from_child(&validator.child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).context("a validator has gone")?;
        }
        for validator in &mut self.validators {
            let begun = Instant::now();
            loop {
                match validator.child.try_wait()? {
                    Some(status) => {
                        ensure!(status.success(), "a validator ended with {status}");
                        break;
                    }
                    None if begun.elapsed() > READY_TIME_MAX => bail!("a validator does not end"),
                    None => sleep(LOOK).await,
                }
            }
        }
        Ok(())
    }
}

impl Validator {
    async fn start(metanode: &Path, data: &PathBuf, operator: &Identity, apart: bool) -> Result<Self> {
        let log = std::fs::File::create(data.with_extension("application.log"))?;
        let mut serve = command(metanode);
        serve
            .args(["ledger", "application", "--data"])
            .arg(data)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let application = apart.then(|| serve.spawn().context("an application")).transpose()?;
        let mut start = command(metanode);
        start.args(["start", "--foreground", "-o", "json", "--data"]).arg(data);
        let log = std::fs::File::create(data.with_extension("log"))?;
        let mut child = start.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().context("a validator")?;
        let stdout = child.stdout.take().context("it is piped")?;
        let line = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            std::io::BufReader::new(stdout).read_line(&mut line).map(|_| line)
        });
        let line = timeout(READY_TIME_MAX, line).await.context("a validator is not ready in time")???;
        ensure!(!line.is_empty(), "a validator has ended: {}", std::fs::read_to_string(data.with_extension("log"))?);
        let ready: Value = serde_json::from_str(&line)?;
        let ticket: Ticket = ready["ticket"].as_str().context("a ready line has a ticket")?.parse()?;
        let mut config = ClientConfig::new(operator.clone());
        config.shard_aware = false;
        let client = Client::connect(&ticket, config).await?;
        Ok(Self { child, client, application })
    }
}

/// From proposal to quorum, of the heights that were proposed between two looks.
fn finality(before: &[LedgerStatusReply], after: &[LedgerStatusReply]) -> Latencies {
    let mut all = Latencies::new();
    for (before, after) in before.iter().zip(after) {
        // What came since is at the end. A list that is full has lost its beginning.
        let new = after.finality_us.len().saturating_sub(before.finality_us.len());
        let new = if after.finality_us.len() == before.finality_us.len() { after.finality_us.len() } else { new };
        let from = after.finality_us.len() - new;
        after.finality_us[from..].iter().for_each(|micros| all.push(Duration::from_micros(u64::from(*micros))));
    }
    all
}

fn add_finality(report: &mut Report, name: &str, times: &Latencies) {
    report.add(format!("{name}_p50_ms"), times.quantile_us(0.5) / 1000.0);
    report.add(format!("{name}_p99_ms"), times.quantile_us(0.99) / 1000.0);
}

async fn empty(network: &Network, options: &Consensus, name: &str, report: &mut Report) -> Result<()> {
    sleep(Duration::from_secs(2)).await; // files that were just made are written back
    let before = network.statuses().await?;
    let cpu = network.cpu()?;
    let begun = Instant::now();
    sleep(Duration::from_secs_f64(options.empty_seconds)).await;
    let after = network.statuses().await?;
    let cpu = network.cpu()?.0.saturating_sub(cpu.0);
    let time = begun.elapsed().as_secs_f64();
    let blocks = (after[0].height - before[0].height) as f64;
    ensure!(blocks > 10.0, "only {blocks} blocks in {time:.0} s");
    add_finality(report, &format!("{name}finality_empty"), &finality(&before, &after));
    let sum = |of: fn(&LedgerStatusReply) -> u64| {
        after.iter().map(of).sum::<u64>() as f64 - before.iter().map(of).sum::<u64>() as f64
    };
    report.add(format!("{name}empty_blocks_s"), blocks / time);
    report.add(format!("{name}empty_cpu_us_block"), cpu.as_micros() as f64 / blocks);
    report.add(format!("{name}block_messages"), sum(|status| status.messages) / blocks);
    report.add(format!("{name}block_message_bytes"), sum(|status| status.message_bytes) / blocks);
    report.add(format!("{name}block_signatures_checked"), sum(|status| status.signatures) / blocks);
    report.add(format!("{name}block_syncs"), sum(|status| status.syncs) / blocks);
    report.add(format!("{name}sign_sync_p50_us"), f64::from(after[0].sync_p50_us));
    report.add(format!("{name}sign_syncs"), after.iter().map(|status| status.syncs).sum::<u64>() as f64);
    Ok(())
}

async fn one_by_one(network: &Network, accounts: &[Identity], name: &str, report: &mut Report) -> Result<()> {
    let mut latencies = Latencies::new();
    let client = &network.validators[0].client;
    // The last account, which the loads leave alone.
    let (from, to) = (&accounts[ACCOUNTS - 1], &accounts[0]);
    for nonce in 0..200 {
        let encoded = transfer(&network.chain, from, to, nonce);
        let id = Transaction::decode(&encoded).expect("it was made just now").id(&network.chain);
        let begun = Instant::now();
        let refused = client.submit(encoded.into()).await?;
        ensure!(refused.is_empty(), "refused: {refused:?}");
        let status = client.transaction(id, Duration::from_secs(10)).await?;
        ensure!(matches!(status, TransactionStatus::Executed { .. }), "{status:?}");
        latencies.push(begun.elapsed());
    }
    report.add(format!("{name}executed_p50_ms"), latencies.quantile_us(0.5) / 1000.0);
    report.add(format!("{name}executed_p99_ms"), latencies.quantile_us(0.99) / 1000.0);
    Ok(())
}

/// Requests for one validator: transfers of the accounts that are its own, nonce by nonce, so that none waits for another's.
struct Signed {
    chain: ChainId,
    accounts: Rc<Vec<Identity>>,
    /// Its first account, and how many it has.
    first: usize,
    count: usize,
    /// How many transfers were made.
    made: usize,
}

impl Signed {
    fn all(network: &Network, accounts: &Rc<Vec<Identity>>) -> Vec<Self> {
        let each = (ACCOUNTS - 1) / network.validators.len() / SIGNED_PER_REQUEST * SIGNED_PER_REQUEST;
        (0..network.validators.len())
            .map(|validator| Self {
                chain: network.chain,
                accounts: accounts.clone(),
                first: validator * each,
                count: each,
                made: 0,
            })
            .collect()
    }

    fn request(&mut self) -> Bytes {
        let mut encoded = Vec::with_capacity(SIGNED_PER_REQUEST * 170);
        for _ in 0..SIGNED_PER_REQUEST {
            let (index, nonce) = (self.made % self.count, self.made / self.count);
            let (from, to) = (self.first + index, self.first + (index + 1) % self.count);
            encoded.extend(transfer(&self.chain, &self.accounts[from], &self.accounts[to], nonce as u64));
            self.made += 1;
        }
        encoded.into()
    }
}

/// As many requests as are taken, for a time; a request that is refused as busy is sent again.
async fn as_many(network: &Network, requests: Vec<Vec<Bytes>>, each: usize, time: Duration) -> Result<usize> {
    let begun = Instant::now();
    let mut running = JoinSet::new();
    for (validator, requests) in network.validators.iter().zip(requests) {
        let queue = Rc::new(std::cell::RefCell::new(std::collections::VecDeque::from(requests)));
        // In order of nonces at each validator: what comes behind a request that is on its way waits there, whichever is first.
        for _ in 0..DEPTH {
            let (client, queue) = (validator.client.clone(), queue.clone());
            running.spawn_local(async move {
                let mut taken = 0;
                while begun.elapsed() < time {
                    let Some(request) = queue.borrow_mut().pop_front() else { break };
                    loop {
                        let refused = client.submit(request.clone()).await?;
                        if refused.is_empty() {
                            taken += each;
                            break;
                        }
                        let busy = refused.iter().all(|(_, refusal)| refusal.is_busy() || is_there(*refusal));
                        ensure!(busy, "refused: {:?}", refused.first());
                        sleep(Duration::from_millis(5)).await;
                        if begun.elapsed() > time + SETTLE_TIME_MAX {
                            bail!("busy for ever");
                        }
                    }
                }
                Ok::<_, anyhow::Error>(taken)
            });
        }
    }
    let mut count = 0;
    while let Some(ended) = running.join_next().await {
        count += ended??;
    }
    Ok(count)
}

/// Refused since it was taken before, when only others of its request were refused.
fn is_there(refusal: metanode_wire::TransactionRefusal) -> bool {
    use metanode_wire::TransactionRefusal as Refusal;
    matches!(
        refusal,
        Refusal::Known | Refusal::NonceUsed { .. } | Refusal::NonceTooHigh { .. } | Refusal::Application(3)
    )
}

/// Waits until so many transactions are done everywhere, more than there were.
async fn settle(network: &Network, before: &[LedgerStatusReply], count: usize) -> Result<Vec<LedgerStatusReply>> {
    let begun = Instant::now();
    loop {
        let after = network.statuses().await?;
        if after.iter().zip(before).all(|(after, before)| after.done >= before.done + count as u64) {
            return Ok(after);
        }
        if begun.elapsed() > SETTLE_TIME_MAX {
            let of = |(after, before): (&LedgerStatusReply, &LedgerStatusReply)| {
                let skipped = (after.transactions - before.transactions) - (after.done - before.done);
                let (height, waiting, batches) = (after.height - before.height, after.waiting, after.batches);
                let done = after.done - before.done;
                format!("{done} done, {skipped} skipped, {waiting} wait, {batches} batches, {height} blocks")
            };
            let all: Vec<String> = after.iter().zip(before).map(of).collect();
            bail!("of {count} transactions not all are executed: {all:?}");
        }
        sleep(LOOK).await;
    }
}

async fn signed(
    network: &Network,
    accounts: Rc<Vec<Identity>>,
    options: &Consensus,
    name: &str,
    report: &mut Report,
) -> Result<f64> {
    let mut makers = Signed::all(network, &accounts);
    // Some thousand a second at most, twice over.
    let warm_seconds = options.find_seconds;
    let per_validator = (20_000.0 * warm_seconds / network.validators.len() as f64) as usize / SIGNED_PER_REQUEST;
    let requests: Vec<Vec<Bytes>> =
        makers.iter_mut().map(|maker| (0..per_validator).map(|_| maker.request()).collect()).collect();
    let before = network.statuses().await?;
    let begun = Instant::now();
    let taken = as_many(network, requests, SIGNED_PER_REQUEST, Duration::from_secs_f64(warm_seconds)).await?;
    settle(network, &before, taken).await?;
    let most = taken as f64 / begun.elapsed().as_secs_f64();
    report.add(format!("{name}tx_signed_most_ops"), most);
    // The accounts go on where they are.
    let next = next_nonces(network, &makers).await?;
    let offered = most * options.offered_share.unwrap_or(OFFERED_SHARE);
    let seconds = options.seconds;
    let total = (offered * seconds) as usize / SIGNED_PER_REQUEST;
    let mut plan: Vec<(usize, Bytes)> = Vec::with_capacity(total);
    for (maker, next) in makers.iter_mut().zip(next) {
        maker.made = next as usize * maker.count;
    }
    for index in 0..total {
        let validator = index % makers.len();
        plan.push((validator, makers[validator].request()));
    }

    let before = network.statuses().await?;
    let cpu = network.cpu()?;
    let begun = Instant::now();
    let mut running = JoinSet::new();
    for (index, (validator, request)) in plan.into_iter().enumerate() {
        let due = Duration::from_secs_f64(index as f64 * SIGNED_PER_REQUEST as f64 / offered);
        if let Some(early) = due.checked_sub(begun.elapsed()) {
            sleep(early).await;
        }
        let client = network.validators[validator].client.clone();
        running.spawn_local(async move { client.submit(request).await });
        while let Some(ended) = running.try_join_next() {
            let refused = ended??;
            ensure!(refused.is_empty(), "refused under the offered load: {:?}", refused.first());
        }
    }
    let sent = begun.elapsed();
    let at_end = network.statuses().await?;
    let in_time = at_end.iter().zip(&before).map(|(after, before)| after.done - before.done).min().unwrap_or(0);
    let time = begun.elapsed();
    while let Some(ended) = running.join_next().await {
        let refused = ended??;
        ensure!(refused.is_empty(), "refused under the offered load: {:?}", refused.first());
    }
    let used = network.cpu()?;
    settle(network, &before, total * SIGNED_PER_REQUEST).await?;
    let rate = in_time as f64 / time.as_secs_f64();
    let done = in_time as f64;
    report.add(format!("{name}tx_signed_offered_ops"), offered);
    report.add(format!("{name}tx_signed_seconds"), sent.as_secs_f64());
    report.add(format!("{name}tx_signed_ops"), rate);
    add_finality(report, &format!("{name}tx_signed_finality"), &finality(&before, &at_end));
    let blocks = (at_end[0].height - before[0].height) as f64;
    report.add(format!("{name}tx_signed_blocks_s"), blocks / time.as_secs_f64());
    report.add(format!("{name}tx_signed_cpu_us"), (used.0 - cpu.0).as_micros() as f64 / done);
    report.add(format!("{name}tx_signed_load_share"), (used.1 - cpu.1).as_secs_f64() / time.as_secs_f64());
    report.add(format!("{name}tx_signed_cpu_share"), (used.0 - cpu.0).as_secs_f64() / time.as_secs_f64());
    Ok(rate)
}

/// The next nonce of each validator's accounts, which are all as far; makes them so.
async fn next_nonces(network: &Network, makers: &[Signed]) -> Result<Vec<u64>> {
    let mut all = Vec::new();
    for (maker, validator) in makers.iter().zip(&network.validators) {
        let mut nonces = Vec::new();
        for index in 0..maker.count {
            let key = maker.accounts[maker.first + index].public();
            let answer = validator.client.ledger_account(key).await?;
            let stored = answer.value.context("an account has gone")?;
            nonces.push(metanode_application::Account::decode(&stored).context("an account")?.nonce);
        }
        let most = nonces.iter().copied().max().unwrap_or(0);
        let mut missing = Vec::new();
        for (index, nonce) in nonces.iter().enumerate() {
            let from = &maker.accounts[maker.first + index];
            missing.extend((*nonce..most).map(|nonce| transfer(&maker.chain, from, &maker.accounts[0], nonce)));
        }
        for piece in missing.chunks(SIGNED_PER_REQUEST) {
            let refused = validator.client.submit(piece.concat().into()).await?;
            ensure!(refused.is_empty(), "refused: {refused:?}");
        }
        all.push(most);
    }
    let begun = Instant::now();
    while network.statuses().await?.iter().any(|status| status.waiting > 0 || status.batches > 0) {
        ensure!(begun.elapsed() < SETTLE_TIME_MAX, "transactions wait for ever");
        sleep(LOOK).await;
    }
    Ok(all)
}

async fn opaque(network: &Network, options: &Consensus, name: &str, report: &mut Report) -> Result<()> {
    // Some requests over and over would do for the validators, which do not look for repetitions; the disk might.
    let seed = data::fresh_seed()?;
    let seconds = options.opaque_seconds;
    let before = network.statuses().await?;
    let cpu = network.cpu()?;
    let begun = Instant::now();
    let mut running = JoinSet::new();
    for (index, validator) in network.validators.iter().enumerate() {
        for depth in 0..DEPTH {
            let client = validator.client.clone();
            let mut random = data::Random::new(data::derived_seed(seed, (index * DEPTH + depth) as u64));
            running.spawn_local(async move {
                let (mut taken, mut busy) = (0, 0);
                while begun.elapsed().as_secs_f64() < seconds {
                    let request = opaque_request(&mut random);
                    let refused = client.submit(request).await?;
                    ensure!(refused.iter().all(|(_, it)| it.is_busy()), "refused: {:?}", refused.first());
                    taken += OPAQUE_PER_REQUEST - refused.len();
                    busy += refused.len();
                }
                Ok::<_, anyhow::Error>((taken, busy))
            });
        }
    }
    let (mut taken, mut busy) = (0, 0);
    while let Some(ended) = running.join_next().await {
        let (count, refused) = ended??;
        taken += count;
        busy += refused;
    }
    let used = network.cpu()?;
    let after = settle(network, &before, taken).await?;
    let time = begun.elapsed();
    report.add(format!("{name}tx_opaque_ops"), taken as f64 / time.as_secs_f64());
    report.add(format!("{name}tx_opaque_busy_ops"), busy as f64 / time.as_secs_f64());
    add_finality(report, &format!("{name}tx_opaque_finality"), &finality(&before, &after));
    report.add(format!("{name}tx_opaque_cpu_us"), (used.0 - cpu.0).as_micros() as f64 / taken as f64);
    report.add(format!("{name}tx_opaque_load_share"), (used.1 - cpu.1).as_secs_f64() / time.as_secs_f64());
    Ok(())
}

fn opaque_request(random: &mut data::Random) -> Bytes {
    let mut encoded = Vec::with_capacity(OPAQUE_PER_REQUEST * (OPAQUE_BYTES + 5));
    let mut payload = [0; OPAQUE_BYTES];
    for _ in 0..OPAQUE_PER_REQUEST {
        random.fill(&mut payload);
        encoded.extend(TransactionDraft::encode_opaque(&payload));
    }
    encoded.into()
}
