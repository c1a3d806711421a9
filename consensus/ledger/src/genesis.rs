//! What the validators of a chain agree on beforehand.

use std::{str::FromStr, time::Duration};

use metanode_crypto::{derive, is_small_order};
use metanode_ibft::{BadValidatorSet, ChainId, Timing, ValidatorSet};
use metanode_types::NodeKey;
use serde::{Deserialize, Serialize};

/// How far execution may lag behind at most. Farther, and the results of a transaction would take long to be certified.
pub const LAG_MAX: u64 = 16;

/// The form of the file.
const VERSION: u32 = 1;
/// A name fits a line of a table.
const NAME_BYTES_MAX: usize = 64;
/// Accounts that a genesis can give something to.
const ACCOUNTS_MAX: usize = 1 << 20;

/// A chain's beginning, as its JSON file has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Genesis {
    /// Of this form: 1.
    pub version: u32,
    /// What people call the chain: letters, digits, `-` and `.`.
    pub name: String,
    /// When it was made, in milliseconds since 1970: what the first block's time must be above. Two chains of one name differ in it.
    pub time_ms: u64,
    /// k: the header of height h carries what height h − k did; a change of the validators acts at h + k + 1. 1 to [`LAG_MAX`].
    pub lag: u64,
    /// Length of a height's first round, in milliseconds; each further one doubles it.
    pub round_ms: u64,
    /// Length of a round at most.
    pub round_ms_max: u64,
    /// How long a height waits for transactions before it makes an empty block; 0 waits for ever.
    pub empty_ms: u64,
    /// How far a block's time may be ahead of a validator's clock.
    pub clock_drift_ms_max: u64,
    /// How many heights ahead a transaction or batch may expire.
    pub expiry_heights_max: u64,
    /// Whether unsigned transactions are ordered. Anybody who may write to a validator can fill the chain with them.
    pub opaque: bool,
    /// Who votes on the first blocks.
    #[serde(with = "texts")]
    pub validators: Vec<NodeKey>,
    /// Who has what at the beginning.
    pub accounts: Vec<Account>,
}

/// What somebody has at the beginning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Account {
    /// Whose.
    #[serde(with = "text")]
    pub key: NodeKey,
    /// In the smallest unit.
    pub balance: u64,
}

/// Why this is no beginning.
#[derive(Debug, thiserror::Error)]
pub enum GenesisError {
    /// Not the JSON that it should be.
    #[error("not a genesis file: {0}")]
    Json(#[from] serde_json::Error),
    /// By a later version of this program.
    #[error("version {0} of a genesis; this program knows version {VERSION}")]
    Version(u32),
    /// A value that is not allowed.
    #[error("{name} must be {must}")]
    Value {
        /// Which.
        name: &'static str,
        /// What it must be.
        must: String,
    },
    /// The validators are no set.
    #[error("the validators: {0}")]
    Validators(#[from] BadValidatorSet),
}

impl Genesis {
    /// Reads the file's text, and checks it.
    pub fn from_json(text: &str) -> Result<Self, GenesisError> {
        let this: Self = serde_json::from_str(text)?;
        this.check()?;
        Ok(this)
    }

    /// The file's text.
    pub fn to_json(&self) -> String {
        let text = serde_json::to_string_pretty(self).expect("names and numbers are JSON");
        text + "\n"
    }

    /// Whether a chain can begin like this.
    pub fn check(&self) -> Result<(), GenesisError> {
        let value = |ok: bool, name, must: &str| match ok {
            true => Ok(()),
            false => Err(GenesisError::Value { name, must: must.to_owned() }),
        };
        if self.version != VERSION {
            return Err(GenesisError::Version(self.version));
        }
        let sound = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
        let named = !self.name.is_empty() && self.name.len() <= NAME_BYTES_MAX && self.name.bytes().all(sound);
        value(named, "name", "1 to 64 letters, digits, - and .")?;
        value((1..=LAG_MAX).contains(&self.lag), "lag", &format!("1 to {LAG_MAX}"))?;
        value((1..=60_000).contains(&self.round_ms), "round_ms", "1 to 60000")?;
        let longest = self.round_ms..=600_000;
        value(longest.contains(&self.round_ms_max), "round_ms_max", "at least round_ms, and at most 600000")?;
        value(self.empty_ms <= 86_400_000, "empty_ms", "at most a day")?;
        value(self.clock_drift_ms_max <= 60_000, "clock_drift_ms_max", "at most 60000")?;
        value((1..=1_000_000).contains(&self.expiry_heights_max), "expiry_heights_max", "1 to 1000000")?;
        self.validator_set()?;
        value(!self.validators.iter().any(is_small_order), "validators", "keys that can't be signed for by everybody")?;
        let mut keys: Vec<NodeKey> = self.accounts.iter().map(|account| account.key).collect();
        keys.sort_unstable();
        value(keys.len() <= ACCOUNTS_MAX, "accounts", &format!("at most {ACCOUNTS_MAX}"))?;
        value(keys.windows(2).all(|pair| pair[0] != pair[1]), "accounts", "named once each")?;
        let total = self.accounts.iter().try_fold(0u64, |sum, account| sum.checked_add(account.balance));
        value(total.is_some(), "accounts", "worth less than 2^64 together")
    }

    /// The chain's identity: a hash of all of it, however the file is laid out and in whatever order it names keys.
    pub fn chain(&self) -> ChainId {
        ChainId(derive("metanode 2026 genesis v1", &self.encode()))
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = self.version.to_le_bytes().to_vec();
        bytes.extend((self.name.len() as u32).to_le_bytes());
        bytes.extend(self.name.as_bytes());
        for number in [
            self.time_ms,
            self.lag,
            self.round_ms,
            self.round_ms_max,
            self.empty_ms,
            self.clock_drift_ms_max,
            self.expiry_heights_max,
            u64::from(self.opaque),
            self.validators.len() as u64,
            self.accounts.len() as u64,
        ] {
            bytes.extend(number.to_le_bytes());
        }
        let mut validators = self.validators.clone();
        validators.sort_unstable();
        validators.iter().for_each(|key| bytes.extend(key.0));
        let mut accounts: Vec<&Account> = self.accounts.iter().collect();
        accounts.sort_unstable_by_key(|account| account.key);
        for account in accounts {
            bytes.extend(account.key.0);
            bytes.extend(account.balance.to_le_bytes());
        }
        bytes
    }

    /// Who votes on the first blocks.
    pub fn validator_set(&self) -> Result<ValidatorSet, BadValidatorSet> {
        ValidatorSet::new(self.validators.clone())
    }

    /// How long rounds last.
    pub fn timing(&self) -> Timing {
        Timing {
            base: Duration::from_millis(self.round_ms),
            cap: Duration::from_millis(self.round_ms_max),
            empty: (self.empty_ms > 0).then(|| Duration::from_millis(self.empty_ms)),
        }
    }
}

/// Keys as text.
mod text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

    use super::{FromStr as _, NodeKey};

    pub(super) fn serialize<S: Serializer>(key: &NodeKey, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(key)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<NodeKey, D::Error> {
        let text = String::deserialize(deserializer)?;
        NodeKey::from_str(&text).map_err(D::Error::custom)
    }
}

/// Lists of them.
mod texts {
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

    use super::{FromStr as _, NodeKey};

    pub(super) fn serialize<S: Serializer>(keys: &[NodeKey], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(keys.iter().map(ToString::to_string))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<NodeKey>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        texts.iter().map(|text| NodeKey::from_str(text).map_err(D::Error::custom)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn genesis() -> Genesis {
        Genesis {
            version: 1,
            name: "test-1".to_owned(),
            time_ms: 1_000,
            lag: 2,
            round_ms: 500,
            round_ms_max: 10_000,
            empty_ms: 1_000,
            clock_drift_ms_max: 500,
            expiry_heights_max: 1_000,
            opaque: false,
            validators: [2, 1, 3].map(|byte| NodeKey([byte; 32])).into(),
            accounts: vec![Account { key: NodeKey([9; 32]), balance: 5 }],
        }
    }

    #[test]
    fn the_file_is_read_as_it_was_written() {
        let text = genesis().to_json();
        assert_eq!(Genesis::from_json(&text).unwrap(), genesis());
        assert!(text.contains(&NodeKey([2; 32]).to_string()));
        assert!(Genesis::from_json(&text.replace("\"lag\"", "\"lags\"")).is_err());
        assert!(Genesis::from_json("{}").is_err());
    }

    /// Every value is in the identity, the order of keys is not.
    #[test]
    fn the_identity_is_that_of_the_contents() {
        let chain = genesis().chain();
        let mut other = genesis();
        other.validators.reverse();
        assert_eq!(other.chain(), chain);
        let changes: [fn(&mut Genesis); 12] = [
            |genesis| genesis.name.push('x'),
            |genesis| genesis.time_ms += 1,
            |genesis| genesis.lag += 1,
            |genesis| genesis.round_ms += 1,
            |genesis| genesis.round_ms_max += 1,
            |genesis| genesis.empty_ms += 1,
            |genesis| genesis.clock_drift_ms_max += 1,
            |genesis| genesis.expiry_heights_max += 1,
            |genesis| genesis.opaque = true,
            |genesis| genesis.validators[0] = NodeKey([7; 32]),
            |genesis| genesis.accounts[0].balance += 1,
            |genesis| genesis.accounts[0].key = NodeKey([8; 32]),
        ];
        let mut chains = vec![chain];
        for change in changes {
            let mut changed = genesis();
            change(&mut changed);
            chains.push(changed.chain());
        }
        chains.sort_unstable_by_key(|chain| chain.0);
        chains.dedup();
        assert_eq!(chains.len(), 13);
    }

    #[test]
    fn what_can_be_no_beginning_is_refused_by_name() {
        let refused = |change: fn(&mut Genesis)| {
            let mut changed = genesis();
            change(&mut changed);
            Genesis::from_json(&changed.to_json()).unwrap_err().to_string()
        };
        assert!(refused(|genesis| genesis.version = 2).contains("version 2"));
        assert!(refused(|genesis| genesis.name.clear()).starts_with("name"));
        assert!(refused(|genesis| genesis.name.push(' ')).starts_with("name"));
        assert!(refused(|genesis| genesis.lag = 0).starts_with("lag"));
        assert!(refused(|genesis| genesis.lag = 17).starts_with("lag"));
        assert!(refused(|genesis| genesis.round_ms = 0).starts_with("round_ms"));
        assert!(refused(|genesis| genesis.round_ms_max = 499).starts_with("round_ms_max"));
        assert!(refused(|genesis| genesis.validators.clear()).starts_with("the validators"));
        assert!(refused(|genesis| genesis.validators[0] = NodeKey([1; 32])).starts_with("the validators"));
        assert!(refused(|genesis| genesis.validators[0] = NodeKey([0; 32])).starts_with("validators"));
        assert!(refused(|genesis| genesis.accounts.push(genesis.accounts[0].clone())).starts_with("accounts"));
        assert!(
            refused(|genesis| {
                genesis.accounts.push(Account { key: NodeKey([3; 32]), balance: u64::MAX });
            })
            .starts_with("accounts")
        );
    }
}
