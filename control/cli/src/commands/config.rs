//! `metanode config check`.

use std::path::Path;

use metanode_node::{Config, DataFolder, data::DataError};

use crate::{args::Global, exit::Result, target::data_folder};

pub(super) fn check(global: &Global, file: Option<&Path>) -> Result<()> {
    let config = match file {
        Some(file) => Config::load(file)?,
        None => match DataFolder::open(&data_folder(global)?) {
            Ok(folder) => folder.config()?,
            // Nothing there yet: what a fresh folder would get, but for its operator's key.
            Err(DataError::NotADataFolder { .. }) => Config::default(),
            Err(error) => return Err(error.into()),
        },
    };
    global.output.print_or(&config, &config.to_toml_string())
}
