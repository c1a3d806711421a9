//! A chain is executed again: from a snapshot, or from its beginning. With it, the application comes to where it should be.

use std::{collections::HashSet, path::Path, rc::Rc, time::Duration};

use metanode_admin_api::application::{PIECE_BYTES_MAX, Request, State};
use metanode_ibft::Height;
use metanode_ledger::{Batch, Block, Chain, Executed, Genesis};
use metanode_shard::sleep;
use metanode_store::Store;
use metanode_types::Hash;

use super::{
    application::{App, Gone, NotTaken},
    blocks::{ReadError, batches_of, read},
    open::LedgerError,
    snapshots,
    validator::Validator,
};

/// Between two attempts to reach an application that is not there.
pub(super) const DIAL_PAUSE: Duration = Duration::from_millis(200);

/// Why a chain is not executed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReplayError {
    /// The application has gone: with the next one it begins again.
    #[error("{0}")]
    Gone(#[from] Gone),
    /// What is here can't be executed.
    #[error("{0}")]
    Ledger(#[from] LedgerError),
}

/// What it takes.
pub(super) struct Sources<'a> {
    pub(super) genesis: &'a Genesis,
    /// The ledger's folder.
    pub(super) folder: &'a Path,
    pub(super) store: &'a Store,
    pub(super) app: &'a App,
    /// Of the blocks that are stored, by height from 1.
    pub(super) addresses: &'a [Hash],
    /// Snapshots of later heights are of no use.
    pub(super) snapshots_up_to: Height,
}

/// What the blocks so far come to.
pub(super) struct Replayed {
    pub(super) chain: Chain,
    /// Root of the application's state.
    pub(super) root: Hash,
    /// Digests that blocks have named, behind where it began.
    pub(super) named: HashSet<Hash>,
    /// Where it began.
    pub(super) from: Height,
}

impl Sources<'_> {
    /// Begins at the latest snapshot that is carried by a block here, or at the chain's beginning.
    pub(super) async fn begin(&self) -> Result<Replayed, ReplayError> {
        let failed = |source| LedgerError::Io { what: "list", path: self.folder.to_owned(), source };
        let heights = snapshots::heights(self.folder).await.map_err(failed)?;
        for height in heights.into_iter().filter(|height| *height <= self.snapshots_up_to) {
            match self.restore(height).await {
                Ok(restored) => return Ok(restored),
                Err(NotRestored::Gone(gone)) => return Err(gone.into()),
                Err(NotRestored::Why(why)) => tracing::warn!("the snapshot of height {} is not used: {why}", height.0),
            }
            self.app.give_up(self.genesis.chain()).await?;
        }
        let text = bytes::Bytes::from(self.genesis.to_json());
        let mut state = None;
        let count = text.len().div_ceil(PIECE_BYTES_MAX).max(1);
        for place in 0..count {
            let part = text.slice(place * PIECE_BYTES_MAX..text.len().min((place + 1) * PIECE_BYTES_MAX));
            let given = self.app.give(Request::Begin { genesis: part, more: place + 1 < count }).await;
            state = Some(given.map_err(|error| match error {
                NotTaken::Gone(gone) => gone,
                NotTaken::Refused(refusal) => Gone(format!("it refuses the genesis: {refusal}")),
            })?);
        }
        let root = begun(state, Height(0)).map_err(Gone)?;
        Ok(Replayed { chain: Chain::new(self.genesis, &root), root, named: HashSet::new(), from: Height(0) })
    }

    async fn restore(&self, height: Height) -> Result<Replayed, NotRestored> {
        let (genesis, id) = (self.genesis, self.genesis.chain());
        let (mut reader, root, snapshot) = snapshots::Reader::open(self.folder, id, height).await?;
        let carrier = Height(height.0 + genesis.lag);
        let (block, _) = self.block(height).await?;
        let (header, _) = self.block(carrier).await?;
        if !snapshot.is_carried_by(genesis.lag, &root, &header.header) {
            return Err(NotRestored::Why(format!("it is not what the header of height {} says", carrier.0)));
        }
        let chain = Chain::restore(genesis, snapshot, &block).map_err(|error| NotRestored::Why(error.to_string()))?;
        // The last piece is known as such by the one that does not come.
        let mut piece = reader.piece().await?;
        let state = loop {
            let next = if piece.is_some() { reader.piece().await? } else { None };
            let more = next.is_some();
            let import = Request::Import { height: height.0, piece: piece.unwrap_or_default(), more };
            let state = self.app.give(import).await?;
            match next {
                Some(_) => piece = next,
                None => break state,
            }
        };
        let found = begun(Some(state), height).map_err(NotRestored::Why)?;
        if found != root {
            return Err(NotRestored::Why("its pieces make another state than it says".to_owned()));
        }
        Ok(Replayed { chain, root, named: HashSet::new(), from: height })
    }

    async fn block(&self, height: Height) -> Result<(Block, metanode_ibft::Certificate), NotRestored> {
        let place = usize::try_from(height.0).ok().and_then(|height| height.checked_sub(1));
        let address = place.and_then(|place| self.addresses.get(place));
        let address = address.ok_or_else(|| NotRestored::Why(format!("block {} is not here", height.0)))?;
        read(self.store, *address).await.map_err(|error| NotRestored::Why(error.to_string()))
    }

    /// Executes the blocks that are stored, up to a height.
    pub(super) async fn follow_stored(
        &self,
        this: &mut Replayed,
        to: Height,
        mut executed: impl AsyncFnMut(Executed) -> Result<(), LedgerError>,
    ) -> Result<(), ReplayError> {
        while this.chain.tip().height < to {
            let height = this.chain.tip().height.next().0;
            let failed = |error: ReadError| LedgerError::Block { height, why: error.to_string() };
            let (block, _) = read(self.store, self.addresses[height as usize - 1]).await.map_err(failed)?;
            let done = self.follow(this, &block).await?;
            executed(done).await?;
        }
        Ok(())
    }

    /// Executes a block that comes next.
    pub(super) async fn follow(&self, this: &mut Replayed, block: &Block) -> Result<Executed, ReplayError> {
        let height = this.chain.tip().height.next().0;
        let batches = batches_of(self.store, block, |_| None).await;
        let batches = batches.map_err(|error| LedgerError::Block { height, why: error.to_string() })?;
        let facts: Vec<_> = batches.iter().map(Batch::facts).collect();
        this.chain.check(block, &facts).map_err(|source| LedgerError::DoesNotFollow { height, source })?;
        this.chain.decided(block, &facts);
        this.named.extend(&block.batches);
        let plan = this.chain.plan(block, batches);
        let executed = self.app.execute(plan, self.genesis.lag, None).await?;
        this.root = executed.root;
        Ok(this.chain.executed(executed.done))
    }
}

/// The root of a state that was begun at a height.
fn begun(state: Option<State>, height: Height) -> Result<Hash, String> {
    match state {
        Some(state) if state.begun && state.height == height.0 => Ok(state.root),
        _ => Err(format!("it does not begin at height {} when it is told to", height.0)),
    }
}

/// Why a snapshot is not used.
enum NotRestored {
    Gone(Gone),
    Why(String),
}

impl From<NotTaken> for NotRestored {
    fn from(error: NotTaken) -> Self {
        match error {
            NotTaken::Gone(gone) => Self::Gone(gone),
            NotTaken::Refused(refusal) => Self::Why(format!("the application refuses it: {refusal}")),
        }
    }
}

impl From<std::io::Error> for NotRestored {
    fn from(error: std::io::Error) -> Self {
        Self::Why(error.to_string())
    }
}

/// Reaches the application again when it has gone, and gives it the state that it should have.
pub(super) async fn revive(this: Rc<Validator>) {
    loop {
        this.app_gone.wait().await;
        while this.app_is_away() {
            // Also when it is there again at once: one that refuses the same thing over and over is not asked without a pause.
            sleep(DIAL_PAUSE).await;
            match bring_back(&this).await {
                Ok(()) => this.app_is_back(),
                Err(ReplayError::Gone(gone)) => this.lost_app(&gone),
                Err(ReplayError::Ledger(error)) => return this.fail(error.to_string()),
            }
        }
    }
}

async fn bring_back(this: &Validator) -> Result<(), ReplayError> {
    let state = this.app.connect(this.chain).await?;
    // Nothing is executed as long as it is away.
    let (executed, root) = (this.replica.borrow().chain().executed_height(), this.app_root.get());
    if (state.begun, Height(state.height), state.root) == (true, executed, root) {
        return Ok(());
    }
    tracing::info!(agent = state.agent, "the application is given its state, of height {}", executed.0);
    this.stored.reach(executed).await;
    let addresses = this.block_addresses.borrow().clone();
    let sources = Sources {
        genesis: &this.genesis,
        folder: &this.folder,
        store: &this.store,
        app: &this.app,
        addresses: &addresses,
        snapshots_up_to: executed,
    };
    let mut replayed = sources.begin().await?;
    sources.follow_stored(&mut replayed, executed, async |_| Ok(())).await?;
    if replayed.root != root {
        let why = format!("at height {} it comes to another state than the one before it did", executed.0);
        return Err(LedgerError::Application(why).into());
    }
    Ok(())
}
