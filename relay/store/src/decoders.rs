//! The decoders of this crate, for `tests/decoders`, which gives them any bytes.

use std::path::Path;

use metanode_types::Hash;

use crate::{children::ChildNames, open::Meta};

/// The file `meta` as an opening that read this one writes it; `None` when it is refused.
pub fn meta(text: &str) -> Option<String> {
    let mut meta = Meta::parse(text, Path::new("meta")).ok()?;
    meta.count_opening();
    Some(meta.text())
}

/// The children that a manifest names, when its bytes come in these pieces; `None` when it is refused.
pub fn children<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Option<Vec<Hash>> {
    let mut names = ChildNames::default();
    for piece in pieces {
        if names.push(piece).ok()? {
            break;
        }
    }
    names.finish().ok()
}
