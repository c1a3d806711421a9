//! Which node a command talks to, and as whom.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use metanode_client::{Client, ClientConfig};
use metanode_crypto::Identity;
use metanode_node::{admin, data::DataFolder};
use metanode_types::Hash;
use metanode_wire::Ticket;

use crate::{
    args::Global,
    exit::{Exit, Failure, Result, io},
};

/// A node and an identity.
pub(crate) struct Target {
    pub(crate) ticket: Ticket,
    pub(crate) identity: Identity,
}

impl Target {
    /// The node that `named` names (a reference with a ticket), else --node, else the one that runs on the data folder.
    pub(crate) fn find(global: &Global, named: Option<&Ticket>) -> Result<Self> {
        match named.or(global.node.as_ref()) {
            Some(ticket) => Ok(Self { ticket: ticket.node_only(), identity: identity(global)? }),
            None => Self::local(global),
        }
    }

    /// The node that runs on the data folder.
    pub(crate) fn local(global: &Global) -> Result<Self> {
        let folder = local_folder(global)?;
        let (node, operator) = (first_of_network(&folder), folder.join("operator.key"));
        let folder = node.clone().unwrap_or(folder);
        let status = admin::status(&folder)?;
        let identity = match &global.key {
            Some(file) => key_file(file)?,
            None if node.is_some() => key_file(&operator)?,
            None => DataFolder::open(&folder)?.operator_identity().clone(),
        };
        Ok(Self {
            ticket: Ticket { node: status.node_key, addresses: addresses_of(status.quic), hash: None },
            identity,
        })
    }

    /// Connects.
    pub(crate) async fn connect(&self, global: &Global, shard_aware: bool) -> Result<Client> {
        let mut config = ClientConfig::new(self.identity.clone());
        config.shard_aware = shard_aware;
        config.request_timeout = global.timeout;
        config.connect_timeout = config.connect_timeout.min(global.timeout);
        config.agent = concat!("metanode-cli/", env!("CARGO_PKG_VERSION")).into();
        Ok(Client::connect(&self.ticket, config).await?)
    }

    /// A ticket for a blob on this node.
    pub(crate) fn ticket_for(&self, hash: Hash) -> Ticket {
        Ticket { hash: Some(hash), ..self.ticket.clone() }
    }
}

/// --data, METANODE_DATA, or the usual place.
pub(crate) fn data_folder(global: &Global) -> Result<PathBuf> {
    if let Some(folder) = &global.data {
        return Ok(folder.clone());
    }
    let from = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = from("XDG_DATA_HOME").or_else(|| Some(from("HOME")?.join(".local/share")));
    let base = base.ok_or_else(|| {
        Failure::usage("no data folder: neither XDG_DATA_HOME nor HOME is set").hint("name one with --data DIR")
    })?;
    Ok(base.join("metanode"))
}

/// The data folder of the first validator, when a folder is that of a network.
fn first_of_network(folder: &Path) -> Option<PathBuf> {
    let first = folder.join("validator-1");
    (!folder.join("format").exists() && first.join("format").exists()).then_some(first)
}

/// The data folder of a node: of the first validator, when it is a network's.
pub(crate) fn node_folder(global: &Global) -> Result<PathBuf> {
    let folder = data_folder(global)?;
    Ok(first_of_network(&folder).unwrap_or(folder))
}

/// The data folder, for what is done to the node that runs on it. --node must not name another one.
pub(crate) fn local_folder(global: &Global) -> Result<PathBuf> {
    let folder = data_folder(global)?;
    if let Some(ticket) = &global.node
        && let Ok(data) = DataFolder::open(&folder)
        && data.node_identity().public() != ticket.node
    {
        let shown = folder.display();
        let other = format!("--node (or METANODE_NODE) names another node than the one of the data folder {shown}");
        return Err(
            Failure::usage(other).hint("this command works on a data folder: name it with --data, without --node")
        );
    }
    Ok(folder)
}

/// Whom to be towards a node: --key, else the data folder's operator, else somebody new, who may only read.
pub(crate) fn identity(global: &Global) -> Result<Identity> {
    if let Some(identity) = own_identity(global)? {
        return Ok(identity);
    }
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(|error| Failure::new(Exit::Other, error))?;
    Ok(Identity::from_seed(&seed))
}

/// The key of --key or of the data folder's operator, if there is one.
pub(crate) fn own_identity(global: &Global) -> Result<Option<Identity>> {
    if let Some(file) = &global.key {
        return key_file(file).map(Some);
    }
    let file = data_folder(global)?.join("operator.key");
    if file.try_exists().map_err(io(file.display()))? { key_file(&file).map(Some) } else { Ok(None) }
}

/// Reads a private key that nobody else can read.
fn key_file(file: &Path) -> Result<Identity> {
    let what = || format!("key file {}", file.display());
    let mode = file.metadata().map_err(io(what()))?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(Failure::new(
            Exit::NotPermitted,
            format!("{}: mode {:04o} lets others at it", what(), mode & 0o7777),
        )
        .hint(format!("chmod 600 {}", file.display())));
    }
    let text = std::fs::read_to_string(file).map_err(io(what()))?;
    Identity::from_pem(&text).map_err(|error| {
        Failure::usage(format!("{}: {error}", what()))
            .hint("a key is PKCS#8 in PEM: `openssl genpkey -algorithm ed25519` makes one")
    })
}

/// Where to reach a node that listens on `address`. One that listens everywhere is reached by loopback here, and from elsewhere
/// by the address that this machine's packets leave from.
pub(crate) fn addresses_of(address: SocketAddr) -> Vec<SocketAddr> {
    if !address.ip().is_unspecified() {
        return vec![address];
    }
    let (loopback, elsewhere) = match address {
        SocketAddr::V4(_) => (IpAddr::from([127, 0, 0, 1]), "192.0.2.1:9"), // RFC 5737: for documentation, nobody's
        SocketAddr::V6(_) => (IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1]), "[2001:db8::1]:9"), // RFC 3849
    };
    let mut addresses = vec![SocketAddr::new(loopback, address.port())];
    // Connecting a UDP socket sends nothing; it only asks for the route.
    let outward = UdpSocket::bind(SocketAddr::new(address.ip(), 0))
        .and_then(|socket| socket.connect(elsewhere).and_then(|()| socket.local_addr()));
    addresses.extend(outward.ok().map(|local| SocketAddr::new(local.ip(), address.port())));
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_listens_everywhere_is_reached_by_loopback_first() {
        let parse = |text: &str| -> SocketAddr { text.parse().unwrap() };
        assert_eq!(addresses_of(parse("127.0.0.1:5")), [parse("127.0.0.1:5")]);
        assert_eq!(addresses_of(parse("0.0.0.0:5"))[0], parse("127.0.0.1:5"));
        assert_eq!(addresses_of(parse("[::]:5"))[0], parse("[::1]:5"));
    }

    #[test]
    fn keys_that_others_can_read_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("key");
        std::fs::write(&file, Identity::from_seed(&[5; 32]).to_pem().as_bytes()).unwrap();
        let set = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        set(0o644);
        assert_eq!(key_file(&file).unwrap_err().exit, Exit::NotPermitted);
        set(0o600);
        assert_eq!(key_file(&file).unwrap().public(), Identity::from_seed(&[5; 32]).public());
        std::fs::write(&file, "no key").unwrap();
        assert_eq!(key_file(&file).unwrap_err().exit, Exit::Usage);
        assert_eq!(key_file(&folder.path().join("none")).unwrap_err().exit, Exit::NotFound);
    }
}
