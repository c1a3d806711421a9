//! Applications behind a socket, snapshots of their state, and what became of transactions long ago.
#![allow(clippy::unwrap_used, reason = "a test's helper fails its test")]

use std::{fs, time::Duration};

use metanode_application::Operation;
use metanode_client::{ClientError, TransactionStatus};
use metanode_crypto::Identity;
use metanode_e2e::{Network, account, eventually, scenario, transaction};
use metanode_ibft::{ChainId, Height};
use metanode_ledger::{Outcome, Transaction, TransactionId};
use metanode_types::NodeKey;
use metanode_wire::RefusalCode;

const TIME: Duration = Duration::from_secs(60);
const OTHER: NodeKey = NodeKey([7; 32]);

/// The ledger waits for it, goes on without one of four, stops without all, and gives each its state again.
#[test]
fn applications_behind_sockets_die_and_come_back() {
    let mut network = Network::new(4, &["--empty-ms", "300", "--round-ms", "400", "--application"]);
    network.start_all();
    // The store works without it.
    let file = network.beside("file");
    fs::write(&file, "content").unwrap();
    network.cli_on(&network.data(0), &format!("put {}", file.display())).ok();
    let waits = network.cli_on(&network.data(0), "ledger stats").failed(7);
    assert!(waits.stderr.contains("waits for its application: nothing listens"), "{}", waits.stderr);
    (0..4).for_each(|index| network.start_application(index));
    scenario(async {
        for index in 0..4 {
            network.reach(index, 1, TIME).await;
        }
    });
    network.cli(&format!("tx send pay {OTHER} 5 --fee 1")).ok();
    let second = network.cli_on(&network.data(0), "ledger application").failed(9);
    assert!(second.stderr.contains("another process serves it"), "{}", second.stderr);

    network.kill_application(3);
    for _ in 0..10 {
        network.cli(&format!("tx send pay {OTHER} 5 --fee 1")).ok();
    }
    scenario(async {
        let client = network.client(3).await.unwrap();
        let status = eventually("it says that it waits", TIME, async || {
            client.ledger_status().await.ok().filter(|status| status.role == 2)
        })
        .await;
        assert!(status.reason.contains("waits for its application"), "{}", status.reason);
        let refused = account(&client, OTHER).await.unwrap_err();
        assert!(matches!(&refused, ClientError::Refused(refusal) if refusal.code == RefusalCode::Busy), "{refused:?}");
    });
    network.start_application(3);
    scenario(async {
        let client = network.client(3).await.unwrap();
        eventually("it votes again", TIME, async || {
            client.ledger_status().await.ok().filter(|status| status.role == 1)
        })
        .await;
        eventually("it has executed what the others have", TIME, async || {
            account(&client, OTHER).await.ok().filter(|account| account.balance == 55)
        })
        .await;
    });
    assert!(network.node(3).log().contains("is given its state"));

    (0..4).for_each(|index| network.kill_application(index));
    let stopped = network.cli(&format!("tx send pay {OTHER} 5 --fee 1 --timeout 3s"));
    assert_ne!(stopped.code, 0, "{}", stopped.text());
    (0..4).for_each(|index| network.start_application(index));
    scenario(async {
        for index in 0..4 {
            let client = network.client(index).await.unwrap();
            eventually("all vote again", TIME, async || {
                client.ledger_status().await.ok().filter(|status| status.role == 1)
            })
            .await;
        }
    });
    network.cli(&format!("tx send pay {OTHER} 5 --fee 1")).ok();
    // A node that is started again gives its application the state that it had.
    network.kill(1);
    network.start(1);
    scenario(async {
        let height = network.client(0).await.unwrap().ledger_status().await.unwrap().height;
        network.reach(1, height, TIME).await;
        let balance = account(&network.client(1).await.unwrap(), OTHER).await.unwrap().balance;
        assert!(balance >= 60, "{balance}");
    });
    let folder = network.folder().join("genesis.json");
    network.cli(&format!("ledger verify --genesis {}", folder.display())).ok();
    (0..4).for_each(|index| network.stop(index));
}

fn payments(chain: &ChainId, from: &Identity, nonces: std::ops::Range<u64>) -> (Vec<u8>, Vec<TransactionId>) {
    let one = |nonce| transaction(chain, from, nonce, 1, 90_000, &Operation::Pay { to: OTHER, amount: 1 });
    let all: Vec<Vec<u8>> = nonces.map(one).collect();
    let ids = all.iter().map(|encoded| Transaction::decode(encoded).unwrap().id(chain)).collect();
    (all.concat(), ids)
}

/// Pays in several blocks, and returns the first transaction of each request.
async fn pay(network: &Network, nonces: std::ops::Range<u64>) -> Vec<TransactionId> {
    let client = network.client(0).await.unwrap();
    let mut first = Vec::new();
    for begin in nonces.step_by(100) {
        let (encoded, ids) = payments(&network.chain(), &network.operator(), begin..begin + 100);
        assert_eq!(client.submit(encoded.into()).await.unwrap(), []);
        let last = client.transaction(ids[99], TIME / 4).await.unwrap();
        assert!(matches!(last, TransactionStatus::Executed { outcome: Outcome::DONE, .. }), "{last:?}");
        first.push(ids[0]);
    }
    first
}

fn snapshots(network: &Network) -> Vec<u64> {
    let names = fs::read_dir(network.data(0).join("ledger")).unwrap();
    let height = |name: &str| name.strip_prefix("snapshot-")?.parse().ok();
    let mut heights: Vec<u64> =
        names.filter_map(|entry| height(entry.unwrap().file_name().to_str().unwrap())).collect();
    heights.sort_unstable();
    heights
}

/// Where the latest start has gone on from.
fn went_on_from(network: &Network) -> u64 {
    let log = network.node(0).log();
    let open = log.lines().rfind(|line| line.contains("the ledger is open")).unwrap();
    open.split("snapshot=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_restart_goes_on_from_a_snapshot_and_knows_what_was_before() {
    let mut network = Network::new(1, &["--empty-ms", "100"]);
    network.start_all();
    let mut ids = scenario(async {
        // A state of several pieces.
        let client = network.client(0).await.unwrap();
        for nonce in 0..100 {
            let (name, value) = (format!("{nonce}"), vec![nonce as u8; 10_000]);
            let set = Operation::Set { name: name.as_bytes(), value: &value };
            let encoded = transaction(&network.chain(), &network.operator(), nonce, 1, 90_000, &set);
            assert_eq!(client.submit(encoded.into()).await.unwrap(), []);
        }
        let ids = pay(&network, 100..4_100).await;
        eventually("two snapshots", TIME, async || (snapshots(&network).len() == 2).then_some(())).await;
        ids
    });
    let check = |network: &Network, ids: &[TransactionId]| {
        scenario(async {
            let client = network.client(0).await.unwrap();
            network.reach(0, 1, TIME).await;
            for id in ids {
                let status = client.transaction(*id, Duration::ZERO).await.unwrap();
                let done = matches!(status, TransactionStatus::Executed { outcome: Outcome::DONE, height } if height > Height(0));
                assert!(done, "{status:?}");
            }
            let unknown = client.transaction(TransactionId([9; 32]), Duration::ZERO).await.unwrap();
            assert_eq!(unknown, TransactionStatus::Unknown);
            assert_eq!(account(&client, OTHER).await.unwrap().balance, ids.len() as u64 * 100);
        });
    };
    check(&network, &ids);
    network.kill(0);
    let heights = snapshots(&network);
    network.start(0);
    check(&network, &ids);
    assert_eq!(went_on_from(&network), *heights.last().unwrap());

    // What is damaged is not believed: the one before is taken, then none.
    network.stop(0);
    let damage = |network: &Network, height: u64| {
        let path = network.data(0).join(format!("ledger/snapshot-{height}"));
        let mut bytes = fs::read(&path).unwrap();
        assert!(bytes.len() > 1_000_000, "several pieces");
        let last = bytes.len() - 1_000; // the others are taken before it is seen
        bytes[last] = bytes[last].wrapping_add(1); // twice is damage too
        fs::write(&path, bytes).unwrap();
    };
    let heights = snapshots(&network);
    damage(&network, heights[1]);
    network.start(0);
    check(&network, &ids);
    assert_eq!(went_on_from(&network), heights[0]);
    assert!(network.node(0).log().contains("does not check"));
    ids.extend(scenario(pay(&network, 4_100..4_600)));
    network.stop(0);
    snapshots(&network).into_iter().for_each(|height| damage(&network, height));
    network.start(0);
    check(&network, &ids);
    assert_eq!(went_on_from(&network), 0);
    network.stop(0);

    // One of another chain, or one that was made up, is not carried by any block.
    let heights = snapshots(&network);
    for height in &heights {
        fs::remove_file(network.data(0).join(format!("ledger/snapshot-{height}"))).unwrap();
    }
    fs::remove_dir_all(network.data(0).join("ledger/outcomes")).unwrap();
    network.start(0);
    check(&network, &ids);
    network.stop(0);
}

/// A form of blocks that this program does not know is where its ledger stops, now and after a restart; the store goes on.
#[test]
fn a_program_that_does_not_know_a_form_of_blocks_stops_before_it() {
    let mut network = Network::new(1, &["--empty-ms", "50"]);
    network.start_all();
    let stats = |network: &Network| network.cli_on(&network.data(0), "ledger stats -o json").ok().json();
    let from = stats(&network)["height"].as_u64().unwrap() + 40;
    network.cli_on(&network.data(0), &format!("tx send vote-upgrade 2 {from}")).ok();
    let stopped = |network: &Network| {
        let found = scenario(async {
            let client = network.client(0).await.unwrap();
            eventually("it stops", TIME, async || client.ledger_status().await.ok().filter(|it| it.role == 3)).await
        });
        assert_eq!(found.height + 1, from, "{}", found.reason);
        let named = format!("not supported: blocks of version 2, which the chain has from height {from} on");
        assert!(found.reason.contains(&named), "{}", found.reason);
    };
    stopped(&network);
    network.stop(0);
    network.start(0);
    let refused = eventually_refused(&network);
    assert!(refused.contains("not supported: blocks of version 2"), "{refused}");
    let file = network.beside("file");
    fs::write(&file, "content").unwrap();
    network.cli_on(&network.data(0), &format!("put {}", file.display())).ok();
    network.stop(0);
}

/// What a ledger that can't be opened says.
fn eventually_refused(network: &Network) -> String {
    scenario(async {
        let client = network.client(0).await.unwrap();
        eventually("it says why it is not open", TIME, async || match client.ledger_status().await {
            Err(ClientError::Refused(refusal)) if refusal.code == RefusalCode::NotSupported => Some(refusal.detail),
            _ => None,
        })
        .await
    })
}

/// On larger machines the ledger has a shard of its own; clients of the store get what they want on the others, and everybody reaches it.
#[test]
fn a_ledger_on_a_shard_of_its_own() {
    for (shards, shard) in [(3, "own"), (2, "shared"), (5, "auto")] {
        let mut network = Network::new(4, &["--empty-ms", "200"]);
        for index in 0..4 {
            let path = network.data(index).join("metanode.toml");
            let config = fs::read_to_string(&path).unwrap();
            let config = config.replace("shards = 1", &format!("shards = {shards}"));
            assert!(config.contains("shard = \"auto\""));
            fs::write(&path, config.replace("shard = \"auto\"", &format!("shard = \"{shard}\""))).unwrap();
        }
        network.start_all();
        network.cli(&format!("tx send pay {OTHER} 5 --fee 1")).ok();
        // Blobs of all shards, by a client that knows how many there are.
        let folder = network.beside("folder");
        fs::create_dir(&folder).unwrap();
        (0..40).for_each(|number| fs::write(folder.join(number.to_string()), [number; 500]).unwrap());
        let put = network.cli(&format!("put {} -o json", folder.display())).ok().json();
        let (hash, back) = (put["hash"].as_str().unwrap(), network.beside("back"));
        network.cli(&format!("get {hash} {}", back.display())).ok();
        assert_eq!(fs::read(back.join("39")).unwrap(), [39; 500]);
        network.kill(2);
        network.start(2);
        scenario(async {
            let height = network.client(0).await.unwrap().ledger_status().await.unwrap().height;
            network.reach(2, height, TIME).await;
            assert_eq!(account(&network.client(2).await.unwrap(), OTHER).await.unwrap().balance, 5);
        });
        assert_eq!(network.node(0).metric("node_shards"), f64::from(shards));
        (0..4).for_each(|index| network.stop(index));
    }
    let network = Network::new(1, &[]);
    let path = network.data(0).join("metanode.toml");
    let config = fs::read_to_string(&path).unwrap().replace("shard = \"auto\"", "shard = \"own\"");
    fs::write(&path, config).unwrap();
    let refused = network.cli_on(&network.data(0), "start");
    assert_ne!(refused.code, 0);
    assert!(refused.stderr.contains("two shards at least"), "{}", refused.stderr);
}
