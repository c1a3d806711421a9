//! What a user does, and what it must see.

use std::{cell::RefCell, rc::Rc, time::Duration};

use bytes::Bytes;
use metanode_client::{BytesSource, Client, ClientConfig, ClientError, Got, PutOptions, VecSink};
use metanode_crypto::hash;
use metanode_shard::sim::Random;
use metanode_types::{BlobKind, ByteRange, DurabilityClass, TagName};
use metanode_wire::{RefusalCode, Ticket};
use tokio::time::{sleep, timeout};

use super::Lives;
use crate::model::{Blob, BlobState, Known, Model, TagState, contents};

/// Blobs of a user: the first are removed now and then, tags point to the others.
const REMOVABLE: u32 = 8;
const TAGGED: u32 = 4;
const TAGS: u32 = 3;

/// Time of one operation: longer than a connection takes to be noticed as lost, and its requests to be given up.
const OPERATION_TIME_MAX: Duration = Duration::from_secs(300);

/// Between two attempts to connect.
const CONNECT_PAUSE_MS: u64 = 500;

pub(super) struct User {
    pub(super) seed: u64,
    pub(super) number: u32,
    pub(super) config: ClientConfig,
    pub(super) ticket: Ticket,
    pub(super) lives: Lives,
    pub(super) model: Rc<RefCell<Model>>,
    pub(super) doing: Rc<RefCell<String>>,
    pub(super) random: Random,
    pub(super) client: Option<Client>,
    /// Nothing fails any more, and the connection is of now.
    pub(super) is_last_look: bool,
}

/// How an operation ended.
enum Outcome<T> {
    Done(T),
    Refused(RefusalCode),
    /// Nobody knows.
    Lost,
}

impl User {
    /// So many operations, and then, once nothing fails any more, a look at everything.
    pub(super) async fn run(mut self, operations: u32) {
        for _ in 0..operations {
            sleep(Duration::from_millis(self.random.below(600))).await;
            let key = (self.number, self.random.below(u64::from(REMOVABLE + TAGGED)) as u32);
            match self.random.below(12) {
                0..4 => self.put(key).await,
                4..8 => self.get(key).await,
                8 => self.remove((key.0, key.1 % REMOVABLE)).await,
                9 | 10 => self.set_tag().await,
                _ => {
                    let tag = self.random.below(u64::from(TAGS)) as u32;
                    self.get_tag(tag).await;
                }
            }
        }
        while !self.lives.calm.get() {
            sleep(Duration::from_millis(500)).await;
        }
        // Whatever has become of the connection: from now on one that is new works.
        self.client = None;
        self.is_last_look = true;
        for number in 0..REMOVABLE + TAGGED {
            self.get((self.number, number)).await;
        }
        for tag in 0..TAGS {
            self.get_tag(tag).await;
        }
        for number in 0..REMOVABLE {
            self.put((self.number, number)).await;
            self.remove((self.number, number)).await;
            self.get((self.number, number)).await;
        }
        self.doing("going");
        if let Some(client) = self.client.take() {
            client.close().await;
        }
    }

    fn doing(&self, what: impl Into<String>) {
        let what = what.into();
        tracing::debug!(user = self.number, %what);
        *self.doing.borrow_mut() = what;
    }

    fn violation(&self, what: &str) {
        let text = format!("user {}, life {}, {}: {what}", self.number, self.lives.number.get(), self.doing.borrow());
        self.model.borrow_mut().violation(text);
    }

    /// A client that is connected, as far as it knows.
    async fn client(&mut self) -> Client {
        loop {
            if let Some(client) = &self.client {
                return client.clone();
            }
            match Client::connect(&self.ticket, self.config.clone()).await {
                Ok(client) => self.client = Some(client),
                Err(error) => {
                    self.judge(&error);
                    sleep(Duration::from_millis(1 + self.random.below(CONNECT_PAUSE_MS))).await;
                }
            }
        }
    }

    /// Whether an error can be the network's or the node's state.
    fn judge(&self, error: &ClientError) -> Option<RefusalCode> {
        match error {
            ClientError::Unreachable(_) | ClientError::Timeout(_) | ClientError::ConnectionLost(_) => None,
            ClientError::Refused(refusal) => {
                use RefusalCode::{Busy, DiskFull, InUse, MissingChild, NotFound, ReadOnly, ShuttingDown, Storage};
                let code = refusal.code;
                if !matches!(
                    code,
                    Busy | DiskFull | InUse | MissingChild | NotFound | ReadOnly | ShuttingDown | Storage
                ) {
                    self.violation(&format!("refused: {refusal}"));
                }
                Some(code)
            }
            other => {
                self.violation(&format!("an honest node, and yet: {other}"));
                None
            }
        }
    }

    async fn attempt<T>(&mut self, work: impl AsyncFn(&Client) -> Result<T, ClientError>) -> Outcome<T> {
        let life = self.lives.number.get();
        let worked = timeout(OPERATION_TIME_MAX, async {
            let client = self.client().await;
            work(&client).await
        });
        let Ok(worked) = worked.await else {
            if self.lives.calm.get() || (self.lives.steady && self.lives.number.get() == life) {
                self.violation("it did not come to an end");
            }
            self.client = None;
            return Outcome::Lost;
        };
        let mut model = self.model.borrow_mut();
        model.answered += 1;
        drop(model);
        match worked {
            Ok(done) => Outcome::Done(done),
            Err(error) => {
                tracing::debug!(user = self.number, %error);
                self.model.borrow_mut().refused += 1;
                if let Some(code) = self.judge(&error) {
                    return Outcome::Refused(code);
                }
                if self.is_last_look {
                    self.violation(&format!("nothing fails any more, and yet: {error}"));
                }
                self.client = None; // the connection is of no more use
                Outcome::Lost
            }
        }
    }

    fn blob(&self, key: (u32, u32)) -> Rc<Blob> {
        let make = || {
            let bytes = contents(self.seed, key.0, key.1);
            let blob = Rc::new(Blob { hash: hash(&bytes), bytes, kind: BlobKind::Blob, children: Vec::new() });
            BlobState { blob, now: Known::No, durable: Known::No, tags: 0 }
        };
        self.model.borrow_mut().blobs.entry(key).or_insert_with(make).blob.clone()
    }

    fn state(&self, key: (u32, u32)) -> (Known, Known) {
        let model = self.model.borrow();
        model.blobs.get(&key).map_or((Known::No, Known::No), |state| (state.now, state.durable))
    }

    fn set(&self, key: (u32, u32), now: Known, durable: Known) {
        if let Some(state) = self.model.borrow_mut().blobs.get_mut(&key) {
            (state.now, state.durable) = (now, durable);
        }
    }

    async fn put(&mut self, key: (u32, u32)) {
        let blob = self.blob(key);
        let durable = key.1 >= REMOVABLE || self.random.below(3) > 0;
        let class = if durable { DurabilityClass::Durable } else { DurabilityClass::Memory };
        let options = PutOptions { class, kind: BlobKind::Blob, hold: true };
        self.doing(format!("putting {key:?} of {} bytes, {class:?}", blob.bytes.len()));
        let begun = (self.lives.number.get(), self.state(key));
        let unless = |known| if known == Known::Yes { Known::Yes } else { Known::Unknown };
        self.set(key, unless(begun.1.0), unless(begun.1.1));
        let again = self.random.below(2) == 0;
        let outcome = self
            .attempt(async |client| {
                let source = || BytesSource(blob.bytes.clone());
                let size_bytes = Some(blob.bytes.len() as u64);
                if again {
                    let put = client.put_again(&mut source(), size_bytes, options).await;
                    // A chunk that was to be spared went with a blob that somebody has removed.
                    if put.as_ref().err().and_then(ClientError::refusal_code) != Some(RefusalCode::NotFound) {
                        return put;
                    }
                }
                client.put_source(&mut source(), size_bytes, options).await
            })
            .await;
        match outcome {
            Outcome::Done(stored) => {
                if (stored.hash, stored.size_bytes) != (blob.hash, blob.bytes.len() as u64) {
                    self.violation("something else was stored");
                }
                if durable {
                    self.set(key, Known::Yes, Known::Yes);
                } else if self.lives.number.get() == begun.0 {
                    self.set(key, Known::Yes, self.state(key).1);
                }
            }
            Outcome::Refused(code) => self.only_in_trouble(code),
            Outcome::Lost => {}
        }
    }

    /// A refusal that says that the node can't do what it should be able to.
    fn only_in_trouble(&self, code: RefusalCode) {
        if self.lives.calm.get()
            || !matches!(code, RefusalCode::Busy | RefusalCode::ShuttingDown | RefusalCode::Storage)
        {
            self.violation(&format!("refused with {code:?}"));
        }
    }

    async fn get(&mut self, key: (u32, u32)) {
        let blob = self.blob(key);
        let size = blob.bytes.len() as u64;
        let range = match self.random.below(3) {
            0 if size > 0 => {
                let offset = self.random.below(size);
                ByteRange { offset, length: 1 + self.random.below(size - offset) }
            }
            _ => ByteRange::ALL,
        };
        self.doing(format!("getting {range:?} of {key:?} with {size} bytes"));
        let begun = (self.lives.number.get(), self.state(key));
        let outcome = self
            .attempt(async |client| {
                if range == ByteRange::ALL
                    && let Got::Whole(bytes) = client.get_whole(blob.hash).await?
                {
                    return Ok(bytes);
                }
                let mut sink = VecSink { bytes: Vec::new(), bytes_max: size };
                client.get_range(blob.hash, range, &mut sink).await?;
                Ok(Bytes::from(sink.bytes))
            })
            .await;
        let same_life = self.lives.number.get() == begun.0;
        let (now, durable) = begun.1;
        match outcome {
            Outcome::Done(bytes) => {
                let (start, end) = range.clamp(size).expect("it was made to fit");
                if bytes != blob.bytes[start as usize..end as usize] {
                    self.violation("other bytes came");
                }
                if now == Known::No && durable == Known::No {
                    self.violation("it was removed, or never stored, and is there");
                }
            }
            Outcome::Refused(RefusalCode::NotFound) => {
                if durable == Known::Yes || (now == Known::Yes && same_life) {
                    self.violation("it was stored and is gone");
                }
            }
            Outcome::Refused(code) => self.only_in_trouble(code),
            Outcome::Lost => {}
        }
    }

    async fn remove(&mut self, key: (u32, u32)) {
        let blob = self.blob(key);
        self.doing(format!("removing {key:?}"));
        let begun = (self.lives.number.get(), self.state(key));
        let unless = |known| if known == Known::No { Known::No } else { Known::Unknown };
        self.set(key, unless(begun.1.0), unless(begun.1.1));
        match self.attempt(async |client| client.remove(blob.hash).await).await {
            Outcome::Done(()) => {
                if begun.1 == (Known::No, Known::No) {
                    self.violation("it was not there, and was removed");
                }
                self.set(key, Known::No, Known::No);
            }
            Outcome::Refused(RefusalCode::NotFound) => {
                let (now, durable) = begun.1;
                if durable == Known::Yes || (now == Known::Yes && self.lives.number.get() == begun.0) {
                    self.violation("it was stored and is gone");
                }
            }
            Outcome::Refused(code) => {
                self.set(key, begun.1.0, begun.1.1);
                self.only_in_trouble(code);
            }
            Outcome::Lost => {}
        }
    }

    fn tag(&self, number: u32) -> ((u32, u32), TagName) {
        let key = (self.number, number);
        (key, format!("tag-{}-{}", key.0, key.1).parse().expect("a short name"))
    }

    async fn set_tag(&mut self) {
        let number = self.random.below(u64::from(TAGS)) as u32;
        let (key, name) = self.tag(number);
        let target = (self.number, REMOVABLE + self.random.below(u64::from(TAGGED)) as u32);
        self.put(target).await;
        let removes = self.random.below(4) == 0;
        let hash = self.blob(target).hash;
        let wanted = (!removes).then_some(hash);
        self.doing(format!("pointing {name} to {wanted:?}"));
        let stored = self.state(target).0 == Known::Yes;
        let before = {
            let mut model = self.model.borrow_mut();
            let state = model.tags.entry(key).or_insert_with(|| TagState { now: vec![None], durable: vec![None] });
            let before = state.clone();
            state.now.push(wanted);
            state.durable.push(wanted);
            before
        };
        let outcome = self
            .attempt(async |client| match removes {
                true => client.tag_remove(&name).await,
                false => client.tag_set(&name, hash).await,
            })
            .await;
        let set = |now: Vec<_>, durable: Vec<_>| {
            self.model.borrow_mut().tags.insert(key, TagState { now, durable });
        };
        match outcome {
            Outcome::Done(()) => set(vec![wanted], vec![wanted]),
            Outcome::Refused(RefusalCode::NotFound) if removes => {
                if !before.now.contains(&None) {
                    self.violation("the tag was set and is gone");
                }
            }
            Outcome::Refused(RefusalCode::NotFound | RefusalCode::MissingChild) => {
                if stored {
                    self.violation("what the tag should point to was stored and is gone");
                }
                set(before.now, before.durable);
            }
            Outcome::Refused(code) => self.only_in_trouble(code),
            Outcome::Lost => {}
        }
    }

    async fn get_tag(&mut self, number: u32) {
        let (key, name) = self.tag(number);
        self.doing(format!("looking where {name} points"));
        let begun = self.lives.number.get();
        let before = self.model.borrow().tags.get(&key).cloned();
        let known = before.unwrap_or(TagState { now: vec![None], durable: vec![None] });
        let found = match self.attempt(async |client| client.tag_get(&name).await).await {
            Outcome::Done(hash) => Some(hash),
            Outcome::Refused(RefusalCode::NotFound) => None,
            Outcome::Refused(code) => return self.only_in_trouble(code),
            Outcome::Lost => return,
        };
        let may_be = if self.lives.number.get() == begun { &known.now } else { &known.durable };
        if !may_be.contains(&found) && !known.durable.contains(&found) {
            self.violation(&format!("it points to {found:?}, known {known:?}"));
        }
    }
}
