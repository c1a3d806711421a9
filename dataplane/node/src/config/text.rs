//! Text forms of values that serde does not know.

use std::{fmt, net::SocketAddr};

use metanode_congestion::Congestion;
use metanode_types::NodeKey;
use metanode_wire::Ticket;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, SeqAccess, Visitor},
};

use super::Readers;

const PUBLIC: &str = "public";
const OFF: &str = "off";

fn key<E: de::Error>(text: &str) -> Result<NodeKey, E> {
    text.parse().map_err(|error| E::custom(format_args!("`{text}`: {error}")))
}

/// Lists of keys.
pub(super) mod keys {
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(keys: &[NodeKey], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(keys.iter().map(NodeKey::to_string))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<NodeKey>, D::Error> {
        Vec::<String>::deserialize(from)?.iter().map(|text| key(text)).collect()
    }
}

/// Lists of tickets.
pub(super) mod tickets {
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(tickets: &[Ticket], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(tickets.iter().map(Ticket::to_string))
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Ticket>, D::Error> {
        let ticket = |text: &String| text.parse().map_err(|error| de::Error::custom(format_args!("`{text}`: {error}")));
        Vec::<String>::deserialize(from)?.iter().map(ticket).collect()
    }
}

/// The names of [`Congestion`].
#[derive(Serialize, Deserialize)]
#[serde(remote = "Congestion", rename_all = "lowercase")]
pub(super) enum CongestionName {
    Tolerant,
    Cubic,
}

/// An address, or `"off"`.
pub(super) mod address_or_off {
    use super::*;

    pub(in super::super) fn serialize<S: Serializer>(address: &Option<SocketAddr>, to: S) -> Result<S::Ok, S::Error> {
        match address {
            Some(address) => address.serialize(to),
            None => OFF.serialize(to),
        }
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<SocketAddr>, D::Error> {
        let text = String::deserialize(from)?;
        if text == OFF {
            return Ok(None);
        }
        let wrong =
            |_| de::Error::custom(format_args!("`{text}`: expected an address such as 127.0.0.1:9101, or {OFF}"));
        text.parse().map(Some).map_err(wrong)
    }
}

impl Serialize for Readers {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Public => PUBLIC.serialize(to),
            Self::Keys(list) => keys::serialize(list, to),
        }
    }
}

impl<'de> Deserialize<'de> for Readers {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct ReadersVisitor;

        impl<'de> Visitor<'de> for ReadersVisitor {
            type Value = Readers;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "\"{PUBLIC}\" or a list of keys")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Readers, E> {
                if text == PUBLIC {
                    return Ok(Readers::Public);
                }
                Err(E::invalid_value(de::Unexpected::Str(text), &self))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Readers, A::Error> {
                let mut keys = Vec::new();
                while let Some(text) = list.next_element::<String>()? {
                    keys.push(key(&text)?);
                }
                Ok(Readers::Keys(keys))
            }
        }

        from.deserialize_any(ReadersVisitor)
    }
}
