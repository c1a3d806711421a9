//! One opening of the store: recovery, a look at everything, clients at work, then the power cut or the end.

use std::{cell::RefCell, path::PathBuf, rc::Rc, time::Duration};

use metanode_shard::{
    sim::{End, Random, World},
    sleep, spawn_local, timeout,
};
use metanode_store::{PutOptions, Store, StoreConfig, StoreError, StoreShared, mesh};
use metanode_types::{BlobKind, ByteRange, DurabilityClass, ShardCount};

use crate::{
    client::{Client, Look, count_tags, look, put, tag_name},
    model::{Known, Model},
    plan::SEGMENT_BYTES,
};

/// Where the store is.
const FOLDER: &str = "/store";

/// A disk that fails now and then may fail a start that often in a row.
const STARTS_MAX: usize = 40;

/// The longest that a scrub of these small stores takes, by the simulated clock and a slow disk.
const SCRUB_TIME_MAX: Duration = Duration::from_secs(3600);

/// What an operator asks for while clients work.
const OPERATOR_COMMANDS: usize = 20;

/// By then the orphans of interrupted uploads are gone, which takes two turns of half an hour, and compaction has freed what is to be
/// freed.
const REST: Duration = Duration::from_secs(2 * 60 * 60);

/// What becomes of an opening.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Clients did what they had to, and the store was closed in order.
    Closed,
    /// The power failed, or the store could not be opened.
    Cut,
}

/// How the store is opened and used.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Of the run.
    pub seed: u64,
    /// Number of the opening.
    pub life: usize,
    /// Shards.
    pub shards: ShardCount,
    /// Bytes of cache.
    pub cache_bytes: u64,
    /// Clients.
    pub clients: u32,
    /// Operations of each.
    pub operations: u32,
    /// Whether they mostly remove.
    pub removes: bool,
    /// Whether the store is closed in order, or the power fails so many milliseconds behind the last operation.
    pub closes: Result<(), u64>,
    /// Whether writes may fail.
    pub writes_fail: bool,
    /// Whether something may have rotted by now.
    pub rotted: bool,
    /// Whether nothing fails any more: then everything is removed, and must be gone.
    pub last: bool,
}

impl Setting {
    fn config(&self) -> StoreConfig {
        let mut config = StoreConfig::new(PathBuf::from(FOLDER), self.shards);
        config.segment_bytes = SEGMENT_BYTES;
        config.cache_bytes_max = self.cache_bytes;
        config
    }
}

/// Runs an opening in the world.
pub fn live(world: &World, setting: &Setting, model: &Rc<RefCell<Model>>) -> Ending {
    let (inside, known) = (setting.clone(), model.clone());
    let numbers = Random::new(world.random());
    match world.run(move || async move { open_and_use(&inside, &known, numbers).await }) {
        End::Done(ending) => ending,
        End::PowerFailed => Ending::Cut,
        End::Stuck => {
            model.borrow_mut().violation("nothing can happen any more: tasks wait for each other".to_owned());
            Ending::Cut
        }
        End::Endless => {
            model.borrow_mut().violation("the store never comes to rest".to_owned());
            Ending::Cut
        }
    }
}

async fn open_and_use(setting: &Setting, model: &Rc<RefCell<Model>>, mut random: Random) -> Ending {
    let mut shared = None;
    for _ in 0..STARTS_MAX {
        match StoreShared::open(setting.config()) {
            Ok(opened) => {
                shared = Some(opened);
                break;
            }
            // The disk's fault; an operator would try again.
            Err(error) if setting.last => {
                model.borrow_mut().violation(format!("a store on a sound disk could not be opened: {error}"));
                return Ending::Cut;
            }
            Err(_) => {}
        }
    }
    let Some(shared) = shared else { return Ending::Cut };
    let report = shared.recovery();
    if !setting.rotted && (report.rot_bytes > 0 || report.damaged_blobs > 0) {
        model.borrow_mut().violation(format!("nothing rotted, and recovery reports {report:?}"));
    }
    let mut stores = Vec::new();
    for (port, shard) in mesh(setting.shards).into_iter().zip(setting.shards.iter()) {
        match Store::open(shared.clone(), shard, port).await {
            Ok(store) => stores.push(store),
            Err(error) => {
                model.borrow_mut().violation(format!("a partition could not be opened: {error}"));
                return Ending::Cut;
            }
        }
    }
    if setting.rotted {
        scrub(&shared, &stores, model).await;
    }
    look_at_everything(&stores, setting, model).await;
    // An operator at work, now and then.
    let (operated, mut moods) = (shared.clone(), Random::new(random.next()));
    spawn_local(async move {
        for _ in 0..OPERATOR_COMMANDS {
            sleep(Duration::from_millis(1 + moods.below(400))).await;
            match moods.below(3) {
                0 => _ = operated.maintenance().scrub(moods.below(2) * (1 << 20)),
                1 => _ = operated.maintenance().compact(),
                _ => {}
            }
        }
    })
    .detach();
    let clients: Vec<_> = (0..setting.clients)
        .map(|number| {
            let client = Client {
                seed: setting.seed,
                number,
                store: stores[number as usize % stores.len()].clone(),
                model: model.clone(),
                random: Random::new(random.next()),
                writes_fail: setting.writes_fail,
                removes: setting.removes,
                rotted: setting.rotted,
            };
            spawn_local(client.run(setting.operations))
        })
        .collect();
    for client in clients {
        client.await;
    }
    if let Err(millis) = setting.closes {
        sleep(Duration::from_millis(millis)).await;
        return Ending::Cut;
    }
    if setting.last {
        remove_everything(&stores, setting, model).await;
    }
    for store in &stores {
        let _ = timeout(Duration::from_secs(60), store.shutdown()).await.map_err(|_| {
            model.borrow_mut().violation("the store could not be closed".to_owned());
        });
    }
    Ending::Closed
}

/// Has the store find all that has rotted.
async fn scrub(shared: &StoreShared, stores: &[Store], model: &Rc<RefCell<Model>>) {
    let number = shared.maintenance().scrub(0);
    let done = async {
        while stores.iter().any(|store| store.counters().scrub_done.value() != number) {
            sleep(Duration::from_millis(50)).await;
        }
    };
    if timeout(SCRUB_TIME_MAX, done).await.is_err() {
        model.borrow_mut().violation("a scrub did not come to its end".to_owned());
    }
}

/// Compares the store with the model; what was not known is known then.
async fn look_at_everything(stores: &[Store], setting: &Setting, model: &Rc<RefCell<Model>>) {
    let blobs: Vec<_> = model.borrow().blobs.iter().map(|(key, state)| (*key, state.clone())).collect();
    for (key, state) in blobs {
        let store = &stores[key.1 as usize % stores.len()];
        let found = look(store, &state.blob, ByteRange::ALL).await;
        let wrong = match (&found, state.durable) {
            (Look::Wrong, _) => Some("other bytes came back"),
            (Look::Gone, Known::Yes) => Some("it was acknowledged and is gone"),
            (Look::Refused(_), _) if !setting.rotted => Some("its copy is refused, and nothing rotted"),
            (Look::Right, Known::No) => Some("it was removed and is there"),
            _ => None,
        };
        if let Some(wrong) = wrong {
            let what = format!("opening {}: {} {key:?}: {wrong}", setting.life, state.blob.hash);
            model.borrow_mut().violation(what);
        }
        let mut healed = false;
        if matches!(found, Look::Refused(_)) && setting.rotted {
            // The scrub has found all that is bad of it, so one PUT replaces it.
            let options = PutOptions {
                class: DurabilityClass::Durable,
                kind: state.blob.kind,
                hold: true,
                keep: false,
                leases: None,
            };
            let stored = put(store, &state.blob, options).await;
            let seen = look(store, &state.blob, ByteRange::ALL).await;
            tracing::info!(hash = %state.blob.hash, ?stored, ?seen, "stored again what had rotted");
            healed = stored.is_ok() && seen == Look::Right;
            if !healed && state.blob.kind == BlobKind::Blob && !setting.writes_fail {
                model.borrow_mut().violation(format!("{} {key:?}: a PUT does not heal it", state.blob.hash));
            }
        }
        if found == Look::Right {
            for child in &state.blob.children {
                let child_found = look(store, child, ByteRange::ALL).await;
                if child_found != Look::Right && !setting.rotted {
                    let what = format!("folder {key:?} is there and its child {} is {child_found:?}", child.hash);
                    model.borrow_mut().violation(what);
                }
            }
        }
        let known = match found {
            Look::Right => Known::Yes,
            Look::Gone => Known::No,
            Look::Refused(_) if healed => Known::Yes,
            Look::Wrong | Look::Refused(_) => Known::Unknown,
        };
        let mut model = model.borrow_mut();
        let state = model.blobs.get_mut(&key).expect("listed above");
        (state.now, state.durable) = (known, known);
    }
    let tags: Vec<_> = model.borrow().tags.iter().map(|(key, state)| (*key, state.clone())).collect();
    for (key, state) in tags {
        let store = &stores[key.1 as usize % stores.len()];
        let found = match store.tag_get(tag_name(key)).await {
            Ok(hash) => Some(hash),
            Err(StoreError::NotFound) => None,
            Err(error) => {
                model.borrow_mut().violation(format!("tag {key:?} can't be read: {error}"));
                continue;
            }
        };
        let mut model = model.borrow_mut();
        if !state.durable.contains(&found) && !setting.rotted {
            model.violation(format!("opening {}: tag {key:?} points to {found:?}, known {state:?}", setting.life));
        }
        if let Some(target) = found
            && !setting.rotted
            && !model.blobs.values().any(|blob| blob.blob.hash == target && blob.now == Known::Yes)
        {
            model.violation(format!("tag {key:?} points to {target}, which is not there"));
        }
        let state = model.tags.get_mut(&key).expect("listed above");
        (state.now, state.durable) = (vec![found], vec![found]);
    }
    for client in 0..setting.clients {
        count_tags(&mut model.borrow_mut(), client);
    }
}

/// Removes all tags and blobs; then nothing may be left of them, and there must be room again.
async fn remove_everything(stores: &[Store], setting: &Setting, model: &Rc<RefCell<Model>>) {
    let tags: Vec<_> = model.borrow().tags.keys().copied().collect();
    for key in tags {
        match stores[0].tag_remove(tag_name(key)).await {
            Ok(()) | Err(StoreError::NotFound) => {}
            Err(error) => model.borrow_mut().violation(format!("tag {key:?} could not be removed: {error}")),
        }
    }
    let blobs: Vec<_> = model.borrow().blobs.iter().map(|(key, state)| (*key, state.blob.clone())).collect();
    // Folders first: what they list is theirs.
    for folders in [true, false] {
        for (key, blob) in blobs.iter().filter(|(_, blob)| (blob.kind == BlobKind::Folder) == folders) {
            match stores[0].remove(blob.hash).await {
                Ok(()) | Err(StoreError::NotFound) => {}
                Err(StoreError::InUse { .. }) if setting.rotted => {} // by a folder that can't be read any more
                Err(error) => model.borrow_mut().violation(format!("blob {key:?} could not be removed: {error}")),
            }
        }
    }
    sleep(REST).await;
    if setting.rotted {
        return; // what can't be read can't be counted
    }
    let mut left = Vec::new();
    for store in stores {
        let usage = store.usage();
        if usage.orphan_bytes > 0 {
            left.push(format!("{} bytes of orphans", usage.orphan_bytes));
        }
        if usage.blobs > 0 {
            left.push(format!("{} blobs, {} bytes on {}", usage.blobs, usage.blob_bytes, store.shard()));
        }
    }
    // The active segment and one that is more than half tombstones, of each log there was.
    let segments: u64 = stores.iter().map(|store| store.usage().segments).sum();
    if segments > 3 * u64::from(setting.shards.get()) + 3 {
        left.push(format!("{segments} segments"));
    }
    if !left.is_empty() {
        model.borrow_mut().violation(format!("everything was removed, and there is left: {}", left.join("; ")));
    }
    let again = blobs.iter().find(|(_, blob)| blob.kind == BlobKind::Blob);
    if let Some((key, blob)) = again {
        let options =
            PutOptions { class: DurabilityClass::Durable, kind: BlobKind::Blob, hold: true, keep: false, leases: None };
        let store = &stores[stores.len() - 1];
        let stored = put(store, blob, options).await;
        if stored != Ok(false) || look(store, blob, ByteRange::ALL).await != Look::Right {
            model.borrow_mut().violation(format!("blob {key:?} was removed and can't be stored again: {stored:?}"));
        }
        if let Err(error) = store.remove(blob.hash).await {
            model.borrow_mut().violation(format!("blob {key:?} could not be removed again: {error}"));
        }
    }
}
