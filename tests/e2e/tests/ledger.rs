//! Validators as processes: they order, execute, die, come back, and refuse.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use metanode_application::Operation;
use metanode_client::TransactionStatus;
use metanode_crypto::Identity;
use metanode_e2e::{
    Access, Network, Seen, Sender, account, check_value, eventually, is_large, scenario, transaction, wait_for,
};
use metanode_ibft::{
    ChainId, Commit, Height, Message, Payload, Prepare, Round, RoundChange, RoundChangeMessage, Signed, View,
};
use metanode_ledger::{Answer, Block, Code, Outcome, TransactionDraft, TransactionId, system::Wish};
use metanode_types::{Hash, NodeKey};
use metanode_wire::{Frame, FrameLimits, FrameReader, Kind, RefusalCode, Ticket, TransactionRefusal};

const TIME: Duration = Duration::from_secs(60);

#[test]
fn transactions_are_ordered_executed_proven_and_outlive_a_restart() {
    // Without empty blocks: whoever takes a transaction in has to tell the proposer, or it waits for ever.
    let mut network = Network::new(4, &["--empty-ms", "0"]);
    let alone = network.cli("start").refused(9);
    assert!(alone.stderr.contains("start --validators 4"), "{}", alone.stderr);
    network.start_all();
    let key = network.cli("id").ok().text().trim().to_owned();
    let sent = network.cli("tx send set greeting hello -o json").ok().json();
    assert_eq!(sent["state"], "done");
    let id = sent["id"].as_str().unwrap();
    let other = NodeKey([7; 32]);
    network.cli(&format!("tx send pay {other} 500 --fee 3")).ok();
    let read = network.cli(&format!("tx send read {key} greeting -o json")).ok().json();
    assert_eq!(read["answer"].as_str().unwrap(), metanode_crypto::hash(b"hello").to_string());
    let account = network.cli("ledger query account -o json").ok().json();
    assert_eq!(account["nonce"], 3);
    assert_eq!(account["balance"], 1_000_000_000_000u64 - 503);
    let value = network.cli(&format!("ledger query value {key} greeting -o json")).ok().json();
    assert_eq!(value["value"], "hello");
    network.cli(&format!("ledger query value {key} nothing")).failed(3);
    // What fails says so, and where.
    let failed = network.cli(&format!("tx send pay {other} 2000000000000"));
    assert_eq!(failed.code, 1);
    assert!(failed.stderr.contains("less than the amount"), "{}", failed.stderr);
    network.cli("tx send set a b --nonce 0").failed(1);
    network.cli(&format!("tx status {} -o json", "ab".repeat(32))).ok();
    let tail = network.cli("ledger tail --from 1 --limit 3 -o json").ok().json();
    assert_eq!(tail.as_array().unwrap().len(), 3);
    let verified = network.cli(&format!("ledger verify -o json --genesis {}/genesis.json", network.folder().display()));
    assert_eq!(verified.ok().json()["transactions"], 4);
    assert_eq!(network.cli("node validators -o json").ok().json().as_array().unwrap().len(), 4);
    // What the ledger needs is not a client's to remove, also when it may write.
    let kept = network.cli("ls -o json").ok().json();
    let kept: Vec<&str> = kept.as_array().unwrap().iter().map(|blob| blob["hash"].as_str().unwrap()).collect();
    assert!(kept.len() >= 4, "blocks and batches: {kept:?}");
    for hash in kept {
        let refused = network.cli(&format!("rm {hash}")).refused(10);
        assert!(refused.stderr.contains("the node itself needs it"), "{}", refused.stderr);
    }
    let node = network.node(0);
    assert!(node.metric("ledger_height") >= 3.0 && node.metric("ledger_transactions_done_total") >= 3.0);
    assert_eq!((node.metric("ledger_votes"), node.metric("ledger_connected")), (1.0, 3.0));
    assert!(node.metric("ledger_sign_sync_seconds_count") >= 3.0);
    (0..4).for_each(|index| network.stop(index));
    network.start_all();
    scenario(network.reach(0, 1, TIME));
    let status = network.cli(&format!("tx status {id} -o json")).ok().json();
    assert_eq!(status["state"], "done", "the status of a transaction outlives a restart");
    scenario(async {
        let client = network.client(0).await.unwrap();
        eventually("it votes", TIME, async || client.ledger_status().await.ok().filter(|status| status.role == 1))
            .await;
    });
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (entry, to) = (entry.as_ref().unwrap(), to.join(entry.as_ref().unwrap().file_name()));
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy(&entry.path(), &to),
            kind if kind.is_file() => _ = fs::copy(entry.path(), to).unwrap(),
            _ => {}
        }
    }
}

/// A data folder from a backup has forgotten what its key has signed since. It asks first how far the others are, finds votes of its own that it
/// knows nothing of, and says nothing more.
#[test]
fn a_validator_from_a_backup_is_silent() {
    let mut network = Network::new(4, &["--empty-ms", "100"]);
    network.start_all();
    network.cli("tx send set name before").ok();
    network.stop(3);
    let backup = network.beside("backup");
    copy(&network.data(3), &backup);
    network.start(3);
    let height =
        |network: &Network| scenario(async { network.client(0).await.unwrap().ledger_status().await.unwrap().height });
    let begun = height(&network);
    scenario(network.reach(3, begun + 20, TIME));
    network.kill(3);
    fs::remove_dir_all(network.data(3)).unwrap();
    copy(&backup, &network.data(3));
    network.start(3);
    let status = scenario(async {
        let client = network.client(3).await.unwrap();
        eventually("it is silent for good", TIME, async || {
            client
                .ledger_status()
                .await
                .ok()
                .filter(|status| status.role == 2 && status.reason.contains("a vote of its key"))
        })
        .await
    });
    // The others go on; it follows, and has not contradicted itself.
    scenario(network.reach(3, status.height + 10, TIME));
    network.cli("tx send set name after").ok();
    let guilty = network.cli("ledger stats -o json").ok().json();
    assert_eq!(guilty["guilty"].as_array().unwrap().len(), 0);
}

/// One that was away is as far as the others soon after it is back, also while nothing happens.
#[test]
fn who_was_away_catches_up_while_nothing_happens() {
    let mut network = Network::new(4, &["--empty-ms", "0"]);
    network.start_all();
    scenario(network.reach(3, 0, TIME));
    network.stop(3);
    for number in 0..15 {
        network.cli(&format!("tx send set name {number}")).ok();
    }
    let height = network.cli("ledger stats -o json").ok().json()["height"].as_u64().unwrap();
    let begun = Instant::now();
    network.start(3);
    scenario(network.reach(3, height, TIME));
    println!("{height} heights in {:?}", begun.elapsed());
}

/// What clients did, and what they were told.
#[derive(Debug)]
struct Operations {
    all: Vec<(TransactionId, Height, Outcome, Instant, Instant)>,
    /// What was seen of the value that each client sets.
    values: BTreeMap<usize, Vec<Seen>>,
    /// How many each account has had.
    nonces: BTreeMap<NodeKey, u64>,
    fees: u64,
}

impl Operations {
    fn new() -> Self {
        Self { all: Vec::new(), values: BTreeMap::new(), nonces: BTreeMap::new(), fees: 0 }
    }
}

/// The value's name, of each client.
const VALUE: &[u8] = b"value";

/// Clients that pay each other, set a value and read each other's as long as they are let, whatever happens to validators.
async fn pay(
    index: usize,
    identities: Vec<Identity>,
    network: Arc<tokio::sync::RwLock<Network>>,
    go_on: Arc<AtomicBool>,
    done: Arc<Mutex<Operations>>,
) {
    let chain = network.read().await.chain();
    let mut sender = Sender::new(chain, identities[index].clone());
    let mut turn = index;
    while go_on.load(Ordering::Relaxed) {
        let next = (index + 1) % identities.len();
        let to = identities[next].public();
        let nonce = sender.nonce();
        let version = (nonce / 3 + 1).to_le_bytes();
        let operation = match nonce % 3 {
            0 => Operation::Pay { to, amount: nonce % 7 },
            1 => Operation::Set { name: VALUE, value: &version },
            _ => Operation::Read { owner: to, name: VALUE },
        };
        let begun = Instant::now();
        let (id, height, outcome) = sender
            .send(&operation, 1, async || {
                turn += 1;
                let network = network.read().await;
                let running: Vec<usize> = network.running().collect();
                let validator = *running.get(turn % running.len().max(1))?;
                network.client_as(validator, identities[index].clone()).await.ok()
            })
            .await;
        let (mut done, ended) = (done.lock().unwrap(), Instant::now());
        done.all.push((id, height, outcome, begun, ended));
        let seen = match (operation, outcome) {
            (Operation::Set { .. }, _) => Some((index, Access::Wrote(nonce / 3 + 1))),
            (Operation::Read { .. }, Outcome::Done(answer)) => Some((next, Access::Read(version_of(answer)))),
            _ => None,
        };
        let of = |(owner, what)| (owner, Seen { begun, ended, what });
        seen.map(of).into_iter().for_each(|(owner, seen)| done.values.entry(owner).or_default().push(seen));
        done.nonces.insert(sender.account(), sender.nonce());
        done.fees += 1;
    }
}

/// Which version of a value an answer is the hash of; 0: there is none.
fn version_of(answer: Answer) -> u64 {
    let is = |version: &u64| metanode_crypto::hash(&version.to_le_bytes()).0 == answer.0;
    if answer == Answer::default() { 0 } else { (1..100_000).find(is).expect("somebody has set it") }
}

/// Same chain everywhere, nothing lost, nothing doubled, in the order of real time, and money is conserved.
async fn check(network: &Network, identities: &[Identity], done: &Operations, each: u64) {
    let newest = done.all.iter().map(|(_, height, ..)| height.0).max().unwrap();
    let mut blocks = Vec::new();
    for index in 0..network.len() {
        network.reach(index, newest, TIME).await;
        let client = network.client(index).await.unwrap();
        let (block, _) = client.block(Height(newest), TIME).await.unwrap().unwrap();
        blocks.push(block.header.hash());
        for (id, height, outcome, ..) in &done.all {
            let status = client.transaction(*id, Duration::ZERO).await.unwrap();
            let told = TransactionStatus::Executed { height: *height, outcome: *outcome };
            assert_eq!(status, told, "validator {index}");
        }
        let mut total = 0;
        for identity in identities {
            let account = account(&client, identity.public()).await.unwrap();
            assert_eq!(Some(&account.nonce), done.nonces.get(&identity.public()), "executed once each");
            total += account.balance;
        }
        assert_eq!(total, each * identities.len() as u64 - done.fees, "money is conserved");
    }
    assert!(blocks.windows(2).all(|pair| pair[0] == pair[1]), "one chain");
    for history in done.values.values() {
        check_value(history).unwrap();
    }
    for (_, height, _, _, ended) in &done.all {
        for (_, later, _, begun, _) in &done.all {
            assert!(begun <= ended || later > height, "what began after an end is ordered behind it");
        }
    }
}

fn clients(count: u8) -> (Vec<Identity>, Vec<String>) {
    let identities: Vec<Identity> = (0..count).map(|number| Identity::from_seed(&[100 + number; 32])).collect();
    let accounts = identities.iter().map(|identity| format!("--account={}=1000000", identity.public())).collect();
    (identities, accounts)
}

/// `METANODE_KILLS` says how often; `cargo xtask crash consensus` sets it.
#[test]
fn all_validators_are_killed_at_once_again_and_again() {
    let kills = std::env::var("METANODE_KILLS").map_or(5, |text| text.parse().expect("a number"));
    let (identities, accounts) = clients(4);
    let mut options: Vec<&str> = vec!["--empty-ms", "200", "--round-ms", "500"];
    options.extend(accounts.iter().map(String::as_str));
    let mut network = Network::new(4, &options);
    network.start_all();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let network = Arc::new(tokio::sync::RwLock::new(network));
        let go_on = Arc::new(AtomicBool::new(true));
        let done = Arc::new(Mutex::new(Operations::new()));
        let payers: Vec<_> = (0..identities.len())
            .map(|index| tokio::task::spawn_local(pay(index, identities.clone(), network.clone(), go_on.clone(), done.clone())))
            .collect();
        let begun = Instant::now();
        let mut slowest = Duration::ZERO;
        for kill in 0..kills {
            let before = done.lock().unwrap().all.len();
            // Some transactions are told of between two kills, at another moment each time.
            let wanted = before + 1 + kill % 5;
            let restarted = Instant::now();
            eventually("transactions go on", TIME, async || {
                (done.lock().unwrap().all.len() >= wanted).then_some(())
            })
            .await;
            slowest = slowest.max(restarted.elapsed());
            let mut network = network.write().await;
            (0..4).for_each(|index| network.kill(index));
            network.start_all();
        }
        go_on.store(false, Ordering::Relaxed);
        for payer in payers {
            tokio::time::timeout(TIME, payer).await.expect("it ends in time").unwrap();
        }
        let done = std::mem::replace(&mut *done.lock().unwrap(), Operations::new());
        check(&*network.read().await, &identities, &done, 1_000_000).await;
        println!(
            "{kills} times all validators were killed: {} transactions, none lost or doubled; slowest return {} ms; {} s",
            done.all.len(),
            slowest.as_millis(),
            begun.elapsed().as_secs()
        );
    });
}

#[test]
fn one_may_be_gone_two_stop_the_chain_and_it_resumes() {
    let mut network = Network::new(4, &["--round-ms", "300", "--round-ms-max", "2000", "--empty-ms", "100"]);
    network.start_all();
    network.cli("tx send set a 1").ok();
    network.kill(3);
    for number in 0..4 {
        network.cli(&format!("tx send set b{number} 1")).ok();
    }
    network.kill(2);
    let height = |network: &Network| network.cli("ledger stats -o json").ok().json()["height"].as_u64().unwrap();
    let stuck = network.cli("tx send set c 1 --timeout 3");
    assert_eq!(stuck.code, 7, "{}", stuck.stderr);
    assert!(stuck.stderr.contains("no quorum: 2 validators are heard of in round "), "{}", stuck.stderr);
    let before = height(&network);
    network.cli("tx send set d 1 --timeout 1 --nonce 7");
    assert!(height(&network) <= before + 1, "no quorum, no blocks");
    let reason =
        |network: &Network| network.cli("ledger stats -o json").ok().json()["reason"].as_str().map(str::to_owned);
    assert!(reason(&network).is_some_and(|why| why.ends_with("3 are needed")), "it says why");
    assert_eq!(network.node(0).metric("ledger_quorum_lacks"), 1.0);
    network.start(2);
    network.start(3);
    // What was sent meanwhile is executed.
    eventually_value(&network, "c");
    assert!(wait_for(TIME, || reason(&network).is_none().then_some(())).is_some(), "and no longer");
    scenario(async { network.reach(3, height(&network), TIME).await });
}

/// Runs something with a network whose clients pay each other meanwhile, and checks what they were told.
fn under_load(network: Network, identities: &[Identity], work: impl AsyncFnOnce(&tokio::sync::RwLock<Network>)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let network = Arc::new(tokio::sync::RwLock::new(network));
        let go_on = Arc::new(AtomicBool::new(true));
        let done = Arc::new(Mutex::new(Operations::new()));
        let payers: Vec<_> = (0..identities.len())
            .map(|index| {
                let (network, go_on, done) = (network.clone(), go_on.clone(), done.clone());
                tokio::task::spawn_local(pay(index, identities.to_vec(), network, go_on, done))
            })
            .collect();
        work(&network).await;
        go_on.store(false, Ordering::Relaxed);
        for payer in payers {
            tokio::time::timeout(TIME, payer).await.expect("it ends in time").unwrap();
        }
        let done = std::mem::replace(&mut *done.lock().unwrap(), Operations::new());
        check(&*network.read().await, identities, &done, 1_000_000).await;
    });
}

#[test]
fn validators_come_and_go_under_load_and_keys_are_rotated() {
    let (identities, accounts) = clients(3);
    let mut options: Vec<&str> = vec!["--empty-ms", "100", "--round-ms", "500", "--round-ms-max", "2000"];
    options.extend(accounts.iter().map(String::as_str));
    let mut network = Network::new(4, &options);
    network.start_all();
    under_load(network, &identities, async |network| {
        // 4 → 5: one follows, three vote for it.
        let fifth = network.write().await.join();
        let network_now = network.read().await;
        let newcomer = network_now.identity(fifth);
        let consent = network_now.consent(&newcomer);
        let mut keys: Vec<NodeKey> = (0..4).map(|index| network_now.identity(index).public()).collect();
        let forged = network_now.wish(0, &Wish::Add(newcomer.public(), [7; 64])).await;
        assert_eq!(forged, Outcome::Failed(Code::NO_PROOF_OF_KEY));
        for voter in 0..3 {
            let outcome = network_now.wish(voter, &Wish::Add(newcomer.public(), consent)).await;
            assert_eq!(outcome, Outcome::DONE, "vote {voter}");
        }
        keys.push(newcomer.public());
        network_now.votes(fifth, &keys, TIME).await;
        let client = network_now.client(fifth).await.unwrap();
        eventually("the newcomer votes", TIME, async || {
            client.ledger_status().await.ok().filter(|status| status.role == 1 && !status.finality_us.is_empty())
        })
        .await;
        // 5 → 4: who has just proposed goes; of five, four must vote for it, its own vote among them or not.
        let status = client.ledger_status().await.unwrap();
        let (block, _) = client.block(Height(status.height), TIME).await.unwrap().unwrap();
        let removed = (0..5).find(|index| keys[*index] == block.header.author).unwrap();
        for voter in (0..5).filter(|index| *index != removed) {
            assert_eq!(network_now.wish(voter, &Wish::Remove(keys[removed])).await, Outcome::DONE);
        }
        let left: Vec<usize> = (0..5).filter(|index| *index != removed).collect();
        let mut left_keys: Vec<NodeKey> = left.iter().map(|index| keys[*index]).collect();
        network_now.votes(left[0], &left_keys, TIME).await;
        network_now.votes(removed, &left_keys, TIME).await; // it follows
        let height = client.ledger_status().await.unwrap().height;
        drop(network_now);
        // Without the removed one and another, three of four are a quorum; of five they would be none.
        network.write().await.kill(removed);
        network.write().await.kill(left[1]);
        network.read().await.reach(left[0], height + 5, TIME).await;
        network.write().await.start_all();
        // Another key for one of them, which is restarted with it.
        let other = Identity::from_seed(&[77; 32]);
        let rotating = left[2];
        let network_now = network.read().await;
        let outcome = network_now.wish(rotating, &Wish::Rotate(other.public(), network_now.consent(&other))).await;
        assert_eq!(outcome, Outcome::DONE);
        let place = left_keys.iter().position(|key| *key == keys[rotating]).unwrap();
        left_keys[place] = other.public();
        network_now.votes(left[0], &left_keys, TIME).await;
        let data = network_now.data(rotating);
        drop(network_now);
        let mut network_now = network.write().await;
        network_now.stop(rotating);
        fs::write(data.join("node.key"), other.to_pem().as_bytes()).unwrap();
        fs::remove_dir_all(data.join("ledger/sign")).unwrap();
        network_now.cli_on(&data, "ledger sign --it-has-signed-nothing-that-matters").ok();
        network_now.start(rotating);
        let network_now = network_now.downgrade();
        let client = network_now.client(rotating).await.unwrap();
        eventually("it votes with its other key", TIME, async || {
            client.ledger_status().await.ok().filter(|status| status.role == 1 && !status.finality_us.is_empty())
        })
        .await;
    });
}

fn eventually_value(network: &Network, name: &str) {
    let key = network.operator().public();
    scenario(async {
        let client = network.client(0).await.unwrap();
        eventually(&format!("the value of {name}"), TIME, async || {
            client.ledger_value(key, name.as_bytes()).await.ok().filter(|answer| answer.value.is_some())
        })
        .await;
    });
}

#[test]
fn a_lost_sign_state_makes_a_validator_silent_until_it_is_told_otherwise() {
    let mut network = Network::new(4, &["--empty-ms", "100", "--round-ms", "300", "--round-ms-max", "2000"]);
    network.start_all();
    network.cli("tx send set a 1").ok();
    network.stop(3);
    fs::remove_dir_all(network.data(3).join("ledger/sign")).unwrap();
    network.start(3);
    let role = |network: &Network| {
        let stats = network.cli_on(&network.data(3), "ledger stats -o json").ok().json();
        (stats["role"].as_str().unwrap().to_owned(), stats["syncs"].as_u64().unwrap())
    };
    network.cli("tx send set b 1").ok();
    assert_eq!(role(&network), ("silent".to_owned(), 0), "it says nothing");
    scenario(network.reach(3, 3, TIME)); // and follows
    network.stop(3);
    network.cli_on(&network.data(3), "ledger sign --it-has-signed-nothing-that-matters").ok();
    network.cli_on(&network.data(3), "ledger sign --it-has-signed-nothing-that-matters").refused(9);
    network.start(3);
    network.cli("tx send set c 1").ok();
    assert_eq!(role(&network).0, "votes");
}

#[test]
fn another_chain_another_key_and_a_second_instance_are_refused() {
    let mut network = Network::new(4, &[]);
    let other = Network::new(1, &["--name", "other"]);
    network.start_all();
    // A second instance on the same folder.
    let again = metanode_e2e::run(&mut network.start_command(0), b"");
    again.failed(9);
    // Another chain's genesis in a folder that has one.
    network.stop(3);
    fs::copy(other.folder().join("genesis.json"), network.data(3).join("genesis.json")).unwrap();
    let refused = metanode_e2e::run(&mut network.start_command(3), b"").failed(9);
    assert!(refused.stderr.contains("of the chain"), "{}", refused.stderr);
    // Another chain's validator, though it is in the configuration, is not talked to.
    fs::remove_dir_all(network.data(3).join("ledger")).unwrap();
    network.start(3);
    let log = || network.node(3).log();
    scenario(eventually("a refused greeting", TIME, async || {
        let log = network.node(0).log() + &log();
        log.contains("refused: it is of the chain").then_some(())
    }));
    network.cli("tx send set a 1").ok();
}

#[test]
fn bad_transactions_are_refused_by_name_and_harm_nobody() {
    let (identities, accounts) = clients(2);
    let options: Vec<&str> = accounts.iter().map(String::as_str).collect();
    let mut network = Network::new(4, &options);
    network.start_all();
    let (chain, foreign) = (network.chain(), metanode_ibft::ChainId([9; 32]));
    let signer = &identities[0];
    let pay = Operation::Pay { to: identities[1].public(), amount: 1 };
    scenario(async {
        // One who may read, and not write.
        let client = network.client_as(0, identities[0].clone()).await.unwrap();
        let refused = async |encoded: Vec<u8>| {
            let refused = client.submit(encoded.into()).await.unwrap();
            assert_eq!(refused.len(), 1, "{refused:?}");
            refused[0].1
        };
        let good = |nonce| transaction(&chain, signer, nonce, 1, 1_000, &pay);
        let mut forged = good(0);
        *forged.last_mut().unwrap() ^= 1;
        assert_eq!(refused(forged).await, TransactionRefusal::BadSignature);
        let of_another_chain = transaction(&foreign, signer, 0, 1, 1_000, &pay);
        assert_eq!(refused(of_another_chain).await, TransactionRefusal::BadSignature);
        let late = transaction(&chain, signer, 0, 1, 0, &pay);
        assert_eq!(refused(late).await, TransactionRefusal::Expired(0));
        let far = transaction(&chain, signer, 0, 1, u64::MAX, &pay);
        assert_eq!(refused(far).await, TransactionRefusal::ExpiresTooLate(u64::MAX));
        let too_high = TransactionRefusal::NonceTooHigh { nonce: 5_000, next: 0 };
        assert_eq!(refused(good(5_000)).await, too_high);
        let opaque = TransactionDraft::encode_opaque(b"unsigned");
        assert_eq!(refused(opaque).await, TransactionRefusal::NotPermitted);
        let poor = transaction(&chain, &Identity::from_seed(&[9; 32]), 0, 1, 1_000, &pay);
        assert_eq!(refused(poor).await, TransactionRefusal::Application(256));
        // Good ones among bad ones are taken.
        let mut bad = good(1);
        *bad.last_mut().unwrap() ^= 1;
        let mixed = [good(0), bad, good(1)].concat();
        let answer = client.submit(mixed.into()).await.unwrap();
        assert_eq!(answer, [(1, TransactionRefusal::BadSignature)]);
        eventually("both are executed", TIME, async || {
            let account = account(&client, signer.public()).await.unwrap();
            (account.nonce == 2).then_some(())
        })
        .await;
        // Again: it was executed.
        assert!(matches!(refused(good(0)).await, TransactionRefusal::Application(3)), "the nonce is used");
        // What can't be read is refused as a whole, and the connection lives.
        for bytes in [vec![], vec![9; 40], good(2)[..50].to_vec(), [good(2), vec![0; 3]].concat()] {
            let error = client.submit(bytes.into()).await.unwrap_err();
            assert_eq!(error.refusal_code(), Some(RefusalCode::Malformed), "{error}");
        }
        let many: Vec<u8> = (0..1_025).flat_map(|_| TransactionDraft::encode_opaque(b"")).collect();
        let error = client.submit(many.into()).await.unwrap_err();
        assert_eq!(error.refusal_code(), Some(RefusalCode::TooLarge), "{error}");
        assert_eq!(client.submit(good(2).into()).await.unwrap(), []);
        // A node without a ledger says so.
        let home = metanode_e2e::Home::new();
        let node = home.start(1);
        let alone = home.client(&node, true).await;
        let error = alone.ledger_status().await.unwrap_err();
        assert_eq!(error.refusal_code(), Some(RefusalCode::NotSupported), "{error}");
    });
}

#[test]
fn strangers_and_nonsense_among_validators_change_nothing() {
    let mut network = Network::new(4, &["--empty-ms", "100"]);
    network.start_all();
    scenario(async {
        // Somebody with a key of their own and the right protocol, who greets and then says things.
        let ticket: Ticket = network.node(0).ready.ticket.clone();
        let stranger = Identity::from_seed(&[66; 32]);
        let connection = connect_as_validator(&ticket, &stranger).await;
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        let mut hello = Vec::new();
        let own = Ticket { node: stranger.public(), ..ticket.clone() };
        let greeting = metanode_wire::message::PeerHello { chain: network.chain().0, ticket: own.to_string() };
        metanode_wire::encode(&mut hello, 1, &greeting, 0);
        send.write_all(&hello).await.unwrap();
        let mut reader = FrameReader::new(FrameLimits::default());
        let frame = next_frame(&mut recv, &mut reader).await;
        assert_eq!(frame.kind, Kind::PeerWelcome, "it may listen");
        let mut said = Vec::new();
        metanode_wire::encode(&mut said, 2, &metanode_wire::message::PeerMessage {}, 4);
        said.extend([1, 2, 3, 4]);
        send.write_all(&said).await.unwrap();
        let after = recv.read_chunk(usize::MAX, true).await;
        assert!(!matches!(after, Ok(Some(_))), "it may not speak: its stream ends");
    });
    network.cli("tx send set a 1").ok();
}

/// A validator that is played here: its key, and a stream to one of the others.
struct Liar {
    identity: Identity,
    chain: ChainId,
    _connection: quinn::Connection,
    stream: quinn::SendStream,
}

impl Liar {
    async fn greet(network: &Network, index: usize, to: usize) -> Self {
        let identity = network.identity(index);
        let ticket = network.node(to).ready.ticket.clone();
        let connection = connect_as_validator(&ticket, &identity).await;
        let (mut stream, mut recv) = connection.open_bi().await.unwrap();
        let own = Ticket { node: identity.public(), ..ticket };
        let greeting = metanode_wire::message::PeerHello { chain: network.chain().0, ticket: own.to_string() };
        let mut hello = Vec::new();
        metanode_wire::encode(&mut hello, 1, &greeting, 0);
        stream.write_all(&hello).await.unwrap();
        let frame = next_frame(&mut recv, &mut FrameReader::new(FrameLimits::default())).await;
        assert_eq!(frame.kind, Kind::PeerWelcome);
        Self { identity, chain: network.chain(), _connection: connection, stream }
    }

    fn sign<P: Payload>(&self, payload: P) -> Signed<P> {
        let signature = self.identity.sign(P::DOMAIN, &payload.encode(&self.chain));
        Signed { payload, signer: self.identity.public(), signature }
    }

    async fn say(&mut self, message: &Message<Block>) {
        let body = metanode_codec::encode_message(message);
        let mut frame = Vec::new();
        metanode_wire::encode(&mut frame, 0, &metanode_wire::message::PeerMessage {}, body.len());
        frame.extend(body);
        self.stream.write_all(&frame).await.unwrap();
    }
}

#[test]
fn who_says_two_things_is_on_the_chain_within_ten_heights() {
    let mut network = Network::new(4, &["--empty-ms", "100", "--round-ms", "500", "--round-ms-max", "2000"]);
    (0..3).for_each(|index| network.start(index));
    scenario(async {
        network.reach(0, 2, TIME).await;
        let mut liar = Liar::greet(&network, 3, 0).await;
        let client = network.client(0).await.unwrap();
        let key = liar.identity.public();
        // Two things for round 0 of the next height: nobody has decided there yet, so every validator still looks at what it hears.
        let (mut from, begun) = (0, Instant::now());
        let at = loop {
            let status = client.ledger_status().await.unwrap();
            if status.guilty.contains(&key.0) {
                break status.height;
            }
            assert!(begun.elapsed() < TIME, "the evidence does not come");
            from = if from == 0 { status.height } else { from };
            let view = View { height: Height(status.height + 1), round: Round(0) };
            for byte in [1, 2] {
                let prepare = liar.sign(Prepare { view, hash: Hash([byte; 32]) });
                liar.say(&Message::Prepare(prepare)).await;
            }
            tokio::time::sleep(Duration::from_millis(10)).await; // the next look
        };
        assert!(at <= from + 10, "said at height {from}, on the chain at {at}");
    });
}

/// Seconds of the flood: what is asked for is a minute.
fn flood_time() -> Duration {
    Duration::from_secs(if is_large() { 60 } else { 5 })
}

#[test]
fn a_validator_that_floods_future_heights_and_rounds_takes_no_memory_and_stops_nobody() {
    let mut network = Network::new(4, &["--empty-ms", "100", "--round-ms", "500", "--round-ms-max", "2000"]);
    (0..3).for_each(|index| network.start(index));
    scenario(async {
        network.reach(0, 2, TIME).await;
        let mut liar = Liar::greet(&network, 3, 0).await;
        let client = network.client(0).await.unwrap();
        let before = client.ledger_status().await.unwrap().height;
        let (begun, mut said) = (Instant::now(), 0u64);
        while begun.elapsed() < flood_time() {
            let height = client.ledger_status().await.unwrap().height;
            for number in 0..200u32 {
                // Heights that are kept, and heights that are not; rounds without end.
                let view =
                    View { height: Height(height + 1 + u64::from(number % 5)), round: Round(said as u32 + number) };
                let hash = Hash([number as u8; 32]);
                let message = match number % 3 {
                    0 => Message::Prepare(liar.sign(Prepare { view, hash })),
                    1 => Message::Commit(liar.sign(Commit { view, hash })),
                    _ => Message::RoundChange(Box::new(RoundChangeMessage {
                        signed: liar.sign(RoundChange { view, prepared: None }),
                        block: None,
                        prepares: Vec::new(),
                    })),
                };
                liar.say(&message).await;
            }
            said += 200;
        }
        let after = client.ledger_status().await.unwrap().height;
        let heights = after - before;
        let seconds = begun.elapsed().as_secs();
        let node = network.node(0);
        let (rss, limit) = (node.metric("process_resident_memory_bytes"), node.metric("node_memory_limit_bytes"));
        println!("{said} messages in {seconds} s: {heights} heights meanwhile; {:.0} MiB resident", rss / 1048576.0);
        assert!(heights >= seconds, "finality goes on: {heights} heights in {seconds} s");
        assert!(rss < limit && rss < 500e6, "{rss} of {limit} bytes");
    });
    network.cli("tx send set a 1").ok();
}

async fn next_frame(recv: &mut quinn::RecvStream, reader: &mut FrameReader) -> Frame {
    loop {
        if let Some(frame) = reader.next_frame().unwrap() {
            return frame;
        }
        let chunk = recv.read_chunk(usize::MAX, true).await.unwrap().expect("an answer comes");
        reader.push(chunk.bytes);
    }
}

async fn connect_as_validator(ticket: &Ticket, identity: &Identity) -> quinn::Connection {
    use metanode_crypto::tls;
    let crypto = tls::client(identity, ticket.node, tls::CipherSuite::DEFAULT, &[tls::ALPN_BPI]).unwrap();
    let mut endpoint = quinn::Endpoint::client("0.0.0.0:0".parse().unwrap()).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    endpoint.connect(ticket.addresses[0], tls::SERVER_NAME).unwrap().await.unwrap()
}
