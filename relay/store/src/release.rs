//! What a removed root referred to.

use std::rc::Rc;

use bytes::Bytes;
use metanode_blob::{
    extent::{ExtentPage, decode_root},
    partition::ReleasedRoot,
};
use metanode_types::{BlobKind, Hash};
use tracing::warn;

use crate::{
    StoreError,
    children::ChildNames,
    request::{Reply, Request},
    serve::Check,
    shard::{Inner, wrong},
};

/// Releases the chunks of a root that is gone, and the children of a folder. What can't be read is counted again, and dropped, by
/// the next start.
pub(crate) async fn content(inner: &Rc<Inner>, root: ReleasedRoot) {
    let ReleasedRoot { hash, entry } = root;
    let result = async {
        let names = match entry.is_whole() {
            true if entry.size_bytes == 0 => Vec::new(),
            true => vec![hash],
            false => {
                let payload = inner.root_payload(&hash, entry.location).await?;
                names(inner, &payload, entry.size_bytes).await?
            }
        };
        if entry.kind() == BlobKind::Folder {
            let mut children = ChildNames::default();
            for name in &names {
                if children.push(&chunk(inner, *name).await?)? {
                    break;
                }
            }
            inner.release_roots(children.finish()?);
        }
        inner.release_chunks(names);
        Ok::<_, StoreError>(())
    };
    if let Err(error) = result.await {
        warn!(%hash, %error, "the content of a removed blob stays until the next start");
    }
}

/// All chunks of a map, and its pages.
pub(crate) async fn names(inner: &Rc<Inner>, payload: &[u8], size_bytes: u64) -> Result<Vec<Hash>, StoreError> {
    let extents = decode_root(payload, size_bytes).map_err(|_| StoreError::Corrupt)?;
    let mut names = Vec::new();
    for (index, extent) in extents.iter().enumerate() {
        let page = chunk(inner, extent.page).await?;
        names.extend(ExtentPage::decode(&page, index, size_bytes).map_err(|_| StoreError::Corrupt)?.chunks);
    }
    names.extend(extents.iter().map(|extent| extent.page));
    Ok(names)
}

/// A chunk of any shard, checked there by its hash.
pub(crate) async fn chunk(inner: &Rc<Inner>, name: Hash) -> Result<Bytes, StoreError> {
    checked_chunk(inner, name, Check::Hash).await
}

/// A chunk of any shard, checked there.
pub(crate) async fn checked_chunk(inner: &Rc<Inner>, name: Hash, check: Check) -> Result<Bytes, StoreError> {
    match inner.request(inner.owner(&name), Request::Chunk(name, check)).await? {
        Reply::Chunk(result) => result,
        other => Err(wrong(&other)),
    }
}
