use std::{collections::HashSet, rc::Rc};

use metanode_types::NodeKey;

use crate::config::{AccessConfig, Readers};

/// Who may do what, by the key that the peer proved in the handshake.
#[derive(Debug)]
pub(crate) struct AccessList {
    writers: HashSet<NodeKey>,
    /// `None`: every key.
    readers: Option<HashSet<NodeKey>>,
}

/// What one peer may do; decided once a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rights {
    pub(crate) read: bool,
    pub(crate) write: bool,
}

impl AccessList {
    pub(crate) fn new(config: &AccessConfig) -> Rc<Self> {
        let readers = match &config.readers {
            Readers::Public => None,
            Readers::Keys(keys) => Some(keys.iter().copied().collect()),
        };
        Rc::new(Self { writers: config.writers.iter().copied().collect(), readers })
    }

    /// A peer without a key (which the handshake does not let through) may do nothing.
    pub(crate) fn rights_of(&self, peer: Option<NodeKey>) -> Rights {
        let Some(key) = peer else {
            return Rights { read: false, write: false };
        };
        let write = self.writers.contains(&key);
        Rights { read: write || self.readers.as_ref().is_none_or(|readers| readers.contains(&key)), write }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_read_readers_do_not_write_and_strangers_read_only_what_is_public() {
        let [writer, reader, stranger] = [1, 2, 3].map(|byte| NodeKey([byte; 32]));
        let mut config = AccessConfig { writers: vec![writer], readers: Readers::Public };
        let public = AccessList::new(&config);
        assert_eq!(public.rights_of(Some(writer)), Rights { read: true, write: true });
        assert_eq!(public.rights_of(Some(stranger)), Rights { read: true, write: false });
        assert_eq!(public.rights_of(None), Rights { read: false, write: false });
        config.readers = Readers::Keys(vec![reader]);
        let listed = AccessList::new(&config);
        assert_eq!(listed.rights_of(Some(writer)), Rights { read: true, write: true });
        assert_eq!(listed.rights_of(Some(reader)), Rights { read: true, write: false });
        assert_eq!(listed.rights_of(Some(stranger)), Rights { read: false, write: false });
    }
}
