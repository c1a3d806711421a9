//! Configuration files: what is taken is within its ranges, and is the same when it is written and read again.

use metanode_node::Config;

/// A file's text.
pub fn config(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let Ok(config) = Config::from_toml_str(&text) else { return };
    assert_eq!(config.validate(), Ok(()));
    let written = config.to_toml_string();
    let again = Config::from_toml_str(&written);
    assert_eq!(again.as_ref(), Ok(&config), "{written}");
    assert_eq!(again.map(|config| config.to_toml_string()), Ok(written));
}
