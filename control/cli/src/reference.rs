//! What a command line calls things: hashes, tickets, tags, paths in folders, ranges, sizes.

use std::str::FromStr;

use metanode_client::Client;
use metanode_types::{ByteRange, Hash, TagName};
use metanode_wire::{RefusalCode, Ticket, TicketError};

use crate::exit::{Exit, Failure, Result};

/// A blob or an entry of a folder: `HASH`, `TICKET` (or several for one blob, with `+` between) or `TAG`, each perhaps followed by
/// `/PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reference {
    Hash {
        hash: Hash,
        path: Option<String>,
    },
    Ticket {
        ticket: Ticket,
        /// Other nodes that have the blob.
        others: Vec<Ticket>,
        hash: Hash,
        path: Option<String>,
    },
    /// A tag, or a tag and a path: both may have slashes, so only the node can tell.
    Tag(String),
}

/// Nodes that one reference may name: more replicas than that no blob has, and the line would be longer than a page.
const SOURCES_MAX: usize = 16;

/// A reference whose hash is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resolved {
    pub(crate) hash: Hash,
    pub(crate) path: Option<String>,
}

impl FromStr for Reference {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self> {
        let (head, path) = match text.split_once('/') {
            Some((head, path)) => (head, Some(path.trim_matches('/').to_owned()).filter(|path| !path.is_empty())),
            None => (text, None),
        };
        if let Ok(hash) = head.parse() {
            return Ok(Self::Hash { hash, path });
        }
        let mut tickets = head.split('+').map(str::parse::<Ticket>);
        match tickets.next().expect("there is a first piece of every text") {
            Ok(ticket) => {
                let hash = ticket.hash.ok_or_else(|| {
                    Failure::usage("this ticket names a node, not a blob")
                        .hint("pass it as --node, and name the blob by its hash or tag")
                })?;
                let others = tickets.collect::<std::result::Result<Vec<_>, _>>()?;
                if others.len() >= SOURCES_MAX {
                    return Err(Failure::usage(format!("at most {SOURCES_MAX} tickets may be joined")));
                }
                if others.iter().any(|other| other.hash != Some(hash)) {
                    return Err(Failure::usage("the tickets are not for the same blob"));
                }
                Ok(Self::Ticket { ticket, others, hash, path })
            }
            // Long enough to be a ticket with a typing error rather than a tag.
            Err(error) if error != TicketError::Prefix && head.len() > 60 => Err(error.into()),
            Err(_) => {
                text.parse::<TagName>().map_err(|error| Failure::usage(format!("{text:?}: {error}")))?;
                Ok(Self::Tag(text.to_owned()))
            }
        }
    }
}

impl Reference {
    /// The node that it names, or the first of them.
    pub(crate) fn ticket(&self) -> Option<&Ticket> {
        match self {
            Self::Ticket { ticket, .. } => Some(ticket),
            Self::Hash { .. } | Self::Tag(_) => None,
        }
    }

    /// Further nodes that it names, in their order.
    pub(crate) fn other_tickets(&self) -> &[Ticket] {
        match self {
            Self::Ticket { others, .. } => others,
            Self::Hash { .. } | Self::Tag(_) => &[],
        }
    }

    /// Asks the node where a tag points.
    pub(crate) async fn resolve(&self, client: &Client) -> Result<Resolved> {
        let text = match self {
            Self::Hash { hash, path } | Self::Ticket { hash, path, .. } => {
                return Ok(Resolved { hash: *hash, path: path.clone() });
            }
            Self::Tag(text) => text,
        };
        // The longest tag wins: `a/b/c` is the tag `a/b/c`, else `c` in the tag `a/b`, else `b/c` in the tag `a`.
        for end in std::iter::once(text.len()).chain(text.rmatch_indices('/').map(|(at, _)| at)) {
            let Ok(name) = text[..end].parse::<TagName>() else { continue };
            match client.tag_get(&name).await {
                Ok(hash) => {
                    let path = text[end..].trim_matches('/').to_owned();
                    return Ok(Resolved { hash, path: Some(path).filter(|path| !path.is_empty()) });
                }
                Err(error) if error.refusal_code() == Some(RefusalCode::NotFound) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let hint = match text.starts_with(Ticket::PREFIX) {
            true => "it begins as tickets do, which are longer: copy all of it",
            false => "`metanode ls --tags` lists the tags",
        };
        Err(Failure::new(Exit::NotFound, format!("{text:?} is neither a hash nor a ticket, and no such tag is there"))
            .hint(hint))
    }

    /// What to call it on disk when nobody says.
    pub(crate) fn file_name(&self) -> String {
        let last = |path: &str| path.rsplit('/').next().unwrap_or(path).to_owned();
        match self {
            Self::Hash { path: Some(path), .. } | Self::Ticket { path: Some(path), .. } => last(path),
            Self::Hash { hash, .. } | Self::Ticket { hash, .. } => hash.to_string(),
            Self::Tag(text) => last(text),
        }
    }
}

/// `START..END` (without the byte at END), `START..`, `..END`, or `START+LENGTH`; sizes as in [`size`].
pub(crate) fn range(text: &str) -> std::result::Result<ByteRange, String> {
    let or = |text: &str, default: u64| if text.is_empty() { Ok(default) } else { size(text) };
    if let Some((start, end)) = text.split_once("..") {
        let (offset, end) = (or(start, 0)?, or(end, u64::MAX)?);
        if end < offset {
            return Err(format!("it ends ({end}) before it starts ({offset})"));
        }
        return Ok(ByteRange { offset, length: if end == u64::MAX { u64::MAX } else { end - offset } });
    }
    match text.split_once('+') {
        Some((start, length)) => Ok(ByteRange { offset: size(start)?, length: size(length)? }),
        None => Err("expected START..END, START.., ..END or START+LENGTH".into()),
    }
}

/// A number of bytes: `4096`, `4K`, `416M`, `1.5G`; K, M, G and T are powers of 1024, with or without `iB`.
pub(crate) fn size(text: &str) -> std::result::Result<u64, String> {
    let wrong = || format!("{text:?} is not a size: expected a number, perhaps with K, M, G or T");
    let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    let shift = match unit.trim().trim_end_matches("iB").trim_end_matches('B') {
        "" => 0,
        "K" | "k" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wrong()),
    };
    if let Ok(whole) = digits.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(wrong);
    }
    let number: f64 = digits.parse().map_err(|_| wrong())?;
    let bytes = number * (1u64 << shift) as f64;
    if bytes.is_finite() && bytes >= 0.0 && bytes < 2f64.powi(63) { Ok(bytes as u64) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use metanode_types::NodeKey;

    use super::*;

    fn hash() -> Hash {
        Hash([0xab; 32])
    }

    #[test]
    fn references_are_told_apart() {
        let parse = |text: &str| text.parse::<Reference>().unwrap();
        assert_eq!(parse(&hash().to_string()), Reference::Hash { hash: hash(), path: None });
        assert_eq!(parse(&format!("{}/a/b/", hash())), Reference::Hash { hash: hash(), path: Some("a/b".into()) });
        assert_eq!(parse("backup/2026"), Reference::Tag("backup/2026".into()));
        let mut ticket =
            Ticket { node: NodeKey([1; 32]), addresses: vec!["127.0.0.1:1".parse().unwrap()], hash: Some(hash()) };
        let parsed = parse(&format!("{ticket}/x"));
        let path = Some("x".to_owned());
        assert_eq!(
            parsed,
            Reference::Ticket { ticket: ticket.clone(), others: Vec::new(), hash: hash(), path: path.clone() }
        );
        let second = Ticket { node: NodeKey([2; 32]), ..ticket.clone() };
        let two = parse(&format!("{ticket}+{second}/x"));
        let others = vec![second.clone()];
        assert_eq!(two, Reference::Ticket { ticket: ticket.clone(), others, hash: hash(), path });
        let foreign = Ticket { hash: Some(Hash([1; 32])), ..second };
        assert_eq!(format!("{ticket}+{foreign}").parse::<Reference>().unwrap_err().exit, Exit::Usage);
        assert!(vec![ticket.to_string(); SOURCES_MAX + 1].join("+").parse::<Reference>().is_err());
        assert_eq!(parsed.file_name(), "x");
        let mistyped = ticket.to_string().replace("mn1a", "mn1b");
        assert_eq!(mistyped.parse::<Reference>().unwrap_err().exit, Exit::Usage);
        ticket.hash = None;
        assert!(ticket.to_string().parse::<Reference>().unwrap_err().hint.unwrap().contains("--node"));
    }

    #[test]
    fn ranges_and_sizes() {
        assert_eq!(range("5..9"), Ok(ByteRange { offset: 5, length: 4 }));
        assert_eq!(range("5.."), Ok(ByteRange { offset: 5, length: u64::MAX }));
        assert_eq!(range("..4K"), Ok(ByteRange { offset: 0, length: 4096 }));
        assert_eq!(range("1M+1"), Ok(ByteRange { offset: 1 << 20, length: 1 }));
        assert_eq!(range(".."), Ok(ByteRange::ALL));
        assert!(range("9..5").is_err() && range("9").is_err() && range("a..b").is_err());
        assert_eq!((size("17"), size("416MiB"), size("1.5G")), (Ok(17), Ok(416 << 20), Ok(3 << 29)));
        assert!(size("").is_err() && size("x").is_err() && size("1Q").is_err() && size("99999999999T").is_err());
    }
}
