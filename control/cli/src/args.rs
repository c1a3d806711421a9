//! The command line.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use metanode_types::{ByteRange, DurabilityClass, Hash, NodeKey, TagName};
use metanode_wire::Ticket;

use crate::{
    exit,
    output::Format,
    reference::{self, Reference},
};

/// Store and fetch content by its BLAKE3 hash, over QUIC.
#[derive(Debug, Parser)]
#[command(name = "metanode", version, max_term_width = 100, after_help = exit::TABLE, propagate_version = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of all commands.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// How to print data
    #[arg(short, long, global = true, value_enum, default_value = "table", value_name = "FORMAT")]
    pub(crate) output: Format,
    /// The node to use; otherwise the one of the data folder
    #[arg(long, global = true, env = "METANODE_NODE", value_name = "TICKET")]
    pub(crate) node: Option<Ticket>,
    /// The data folder [default: $XDG_DATA_HOME/metanode or ~/.local/share/metanode]
    #[arg(long, global = true, env = "METANODE_DATA", value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// The private key to show to the node [default: operator.key of the data folder, else a fresh one that may only read]
    #[arg(long, global = true, env = "METANODE_KEY", value_name = "FILE")]
    pub(crate) key: Option<PathBuf>,
    /// How long to wait for an answer
    #[arg(long, global = true, default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: Duration,
    /// No progress bars
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a node, in the background unless told otherwise
    Start(Start),
    /// Stop the node of the data folder and wait until it has ended
    Stop(Stop),
    /// Try it out: start a throw-away node, store a folder, fetch it back, compare, print figures
    Quickstart(Quickstart),
    /// Store a file, a folder or standard input; prints its hash
    Put(Put),
    /// Fetch a blob, a folder, or a part of one, verifying every byte
    Get(Get),
    /// List blobs, tags, or the entries of a folder
    Ls(Ls),
    /// What the node knows of a blob, or a folder of an entry
    Stat(Stat),
    /// Name blobs
    #[command(subcommand)]
    Tag(Tag),
    /// Remove blobs to which no tag and no folder refers
    Rm(Rm),
    /// How the node is
    Status,
    /// Look after the store of the data folder
    #[command(subcommand)]
    Store(Store),
    /// What this machine has, and what is lost without the rest
    Doctor,
    /// A quick measurement of the node in use
    Bench(Bench),
    /// Send transactions to a ledger, and see what becomes of them
    #[command(subcommand)]
    Tx(Tx),
    /// A ledger: begin one, look at it, verify it
    #[command(subcommand)]
    Ledger(Ledger),
    /// Print the public key that this command shows to nodes
    Id,
    /// The configuration
    #[command(subcommand)]
    Config(Config),
    /// Roles of this program
    #[command(subcommand)]
    Node(Node),
    /// Print a completion script
    Completions {
        /// For which shell
        shell: clap_complete::Shell,
    },
}

/// What is different from the configuration file, for this run.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct Overrides {
    /// UDP address to listen on; port 0 for any
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = socket_address)]
    pub(crate) listen: Option<SocketAddr>,
    /// TCP address of the metrics page, or "off"
    #[arg(long, value_name = "ADDRESS", value_parser = address_or_off)]
    pub(crate) metrics: Option<AddressOrOff>,
    /// Number of shards
    #[arg(long, value_name = "COUNT")]
    pub(crate) shards: Option<u16>,
    /// CPUs to pin the shards to: 0,1,2
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub(crate) cores: Option<Vec<usize>>,
    /// Size of the memory cache: 416M
    #[arg(long, value_name = "BYTES", value_parser = reference::size)]
    pub(crate) cache: Option<u64>,
    /// Level of the log: error, warn, info, debug, trace
    #[arg(long, value_name = "LEVEL")]
    pub(crate) log: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Store {
    /// Segments, orphans, scrubs
    Status,
    /// Read everything and compare it with its hash; exit code 5 when damage is found that was not known
    Scrub {
        /// Bytes to read a second: 50M [default: as fast as it goes]
        #[arg(long, value_name = "BYTES", value_parser = reference::size)]
        rate: Option<u64>,
        #[command(flatten)]
        work: Work,
    },
    /// Give back all space that removed blobs hold, whatever it costs
    Compact {
        #[command(flatten)]
        work: Work,
    },
    /// Check the whole store and name the damaged blobs; exit code 5 as long as there are any
    Check {
        /// Without a node: reads the files themselves, and follows all references. Changes nothing
        #[arg(long)]
        offline: bool,
        /// Store damaged blobs again; what can't be read here is fetched from the nodes of --from
        #[arg(long)]
        repair: bool,
        /// A node that may have them too, by its ticket or one of its blobs'; may be given more than once
        #[arg(long, value_name = "TICKET", requires = "repair", conflicts_with = "offline")]
        from: Vec<Ticket>,
    },
}

/// How work is waited for.
#[derive(Debug, Args)]
pub(crate) struct Work {
    /// Begin it and return
    #[arg(long)]
    pub(crate) no_wait: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AddressOrOff {
    Address(SocketAddr),
    Off,
}

#[derive(Debug, Args)]
pub(crate) struct Start {
    /// Stay in the foreground and log to standard error
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Start a network of so many validators on this machine, to try things out; made in the data folder if it is not there
    #[arg(long, value_name = "COUNT", conflicts_with_all = ["foreground", "listen", "shards", "cores"], value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) validators: Option<u16>,
    #[command(flatten)]
    pub(crate) overrides: Overrides,
}

#[derive(Debug, Args)]
pub(crate) struct Stop {
    /// How long to wait for its end
    #[arg(long, default_value = "60", value_name = "SECONDS", value_parser = seconds)]
    pub(crate) deadline: Duration,
}

#[derive(Debug, Args)]
pub(crate) struct Quickstart {
    /// The folder to store [default: sources of the cargo registry, else the current folder]
    pub(crate) folder: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Put {
    /// A file, a folder, or - for standard input
    #[arg(value_name = "FILE|DIR|-")]
    pub(crate) source: PathBuf,
    /// Point this tag to it
    #[arg(long, value_name = "NAME")]
    pub(crate) tag: Option<TagName>,
    /// When the node answers: once it is on disk, or in memory
    #[arg(long, value_enum, default_value = "durable")]
    pub(crate) class: Class,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Class {
    /// After fdatasync: it survives a crash
    Durable,
    /// Once it is in memory: a crash may lose it
    Memory,
}

impl From<Class> for DurabilityClass {
    fn from(class: Class) -> Self {
        match class {
            Class::Durable => Self::Durable,
            Class::Memory => Self::Memory,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Get {
    /// What to fetch; /PATH names an entry of a folder. Tickets of several nodes for one blob are joined by +: it comes from all
    /// of them side by side, and from the others where one fails
    #[arg(value_name = "HASH|TICKET|TAG[/PATH]")]
    pub(crate) what: Reference,
    /// Where to write it, or - for standard output [default: its name, here]
    #[arg(value_name = "DEST|-")]
    pub(crate) target: Option<PathBuf>,
    /// Only these bytes: START..END, START.., ..END or START+LENGTH; K, M and G are understood
    #[arg(long, value_parser = reference::range)]
    pub(crate) range: Option<ByteRange>,
    /// Replace the file that is there; a folder by a folder, with everything in it
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Recreate links that may lead out of the folder too
    #[arg(long)]
    pub(crate) unsafe_links: bool,
    /// Of a folder, fetch the manifest itself
    #[arg(long)]
    pub(crate) raw: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// A folder whose entries to list; otherwise all blobs of the node
    #[arg(value_name = "HASH|TICKET|TAG[/PATH]")]
    pub(crate) folder: Option<Reference>,
    /// List tags instead of blobs
    #[arg(long, conflicts_with = "folder")]
    pub(crate) tags: bool,
    /// Stop after this many
    #[arg(long, value_name = "COUNT")]
    pub(crate) limit: Option<u64>,
    /// Begin behind this hash (with --tags: this name; in a folder: this path)
    #[arg(long, value_name = "HASH|NAME|PATH")]
    pub(crate) after: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Stat {
    #[arg(value_name = "HASH|TICKET|TAG[/PATH]")]
    pub(crate) what: Reference,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Tag {
    /// Point a tag to a blob
    Set {
        /// Its name
        name: TagName,
        /// The blob; what is in a folder has to be named by its own hash
        #[arg(value_name = "HASH|TICKET|TAG")]
        what: Reference,
    },
    /// Where a tag points
    Get {
        /// Its name
        name: TagName,
    },
    /// Remove a tag; the blob stays
    Rm {
        /// Its name
        name: TagName,
    },
    /// List tags
    Ls {
        /// Stop after this many
        #[arg(long, value_name = "COUNT")]
        limit: Option<u64>,
        /// Begin behind this name
        #[arg(long, value_name = "NAME")]
        after: Option<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Rm {
    /// The blobs
    #[arg(required = true, value_name = "HASH", value_parser = removable)]
    pub(crate) hashes: Vec<Hash>,
}

#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// How long each measurement of small blobs lasts
    #[arg(long, default_value = "2", value_name = "SECONDS", value_parser = seconds)]
    pub(crate) time: Duration,
    /// Small requests on the way at once
    #[arg(long, default_value = "64", value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) concurrency: u32,
    /// When the node answers a put
    #[arg(long, value_enum, default_value = "durable")]
    pub(crate) class: Class,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Config {
    /// Read and check a configuration, print what is in force
    Check {
        /// The file [default: metanode.toml of the data folder]
        file: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Node {
    /// Run a node in this process; logs to standard error
    Run(NodeRun),
    /// Who votes on the next block of the node's ledger
    Validators,
}

#[derive(Debug, Args)]
pub(crate) struct NodeRun {
    #[command(flatten)]
    pub(crate) overrides: Overrides,
    /// Leave the session of the terminal, and standard output once the node is ready
    #[arg(long, hide = true)]
    pub(crate) detached: bool,
    /// End when the starting process ends
    #[arg(long, hide = true)]
    pub(crate) with_parent: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Tx {
    /// Sign a transaction with the key that this command shows, and send it; prints its name
    Send(TxSend),
    /// Wait until a transaction is executed
    Wait {
        /// Its name, as `tx send` prints it
        id: Hash,
    },
    /// What the node knows of a transaction now
    Status {
        /// Its name, as `tx send` prints it
        id: Hash,
    },
}

#[derive(Debug, Args)]
pub(crate) struct TxSend {
    #[command(subcommand)]
    pub(crate) what: Action,
    /// What to pay for it
    #[arg(long, global = true, default_value = "0")]
    pub(crate) fee: u64,
    /// How many transactions the account has had [default: what the node says]
    #[arg(long, global = true)]
    pub(crate) nonce: Option<u64>,
    /// In so many blocks it must be executed, or not at all
    #[arg(long, global = true, default_value = "1000", value_name = "HEIGHTS")]
    pub(crate) expiry: u64,
    /// Return when the node has taken it, before it is executed
    #[arg(long, global = true)]
    pub(crate) no_wait: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Action {
    /// Give somebody some of what the account has
    Pay {
        /// To whom
        #[arg(value_name = "KEY")]
        to: NodeKey,
        /// How much, in the smallest unit
        amount: u64,
    },
    /// Put a value at a name of the account
    Set {
        /// Where
        name: String,
        /// What; empty removes it
        value: String,
    },
    /// Read a value, in the order of all transactions; answers its hash
    Read {
        /// Whose
        #[arg(value_name = "KEY")]
        owner: NodeKey,
        /// Which
        name: String,
    },
    /// Vote for another validator; signed with the key of the data folder's node, which must be one
    VoteAdd {
        /// Its key
        #[arg(value_name = "KEY")]
        validator: NodeKey,
        /// Its consent, as `ledger candidate` prints it
        consent: String,
    },
    /// Vote for the removal of a validator; signed with the key of the data folder's node, which must be one
    VoteRemove {
        /// Its key
        #[arg(value_name = "KEY")]
        validator: NodeKey,
    },
    /// Replace the key of the data folder's node, which must be a validator, by another
    Rotate {
        /// The other key
        #[arg(value_name = "KEY")]
        validator: NodeKey,
        /// Its consent, as `ledger candidate` prints it
        consent: String,
    },
    /// Vote for another form of blocks; signed with the key of the data folder's node, which must be a validator. Who does not know the form
    /// stops before it
    VoteUpgrade {
        /// The form, above the present one
        #[arg(value_name = "VERSION")]
        form: u32,
        /// The first height that has it
        #[arg(value_name = "HEIGHT")]
        from: u64,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum Ledger {
    /// Make the genesis and the data folders of a new chain
    Init(LedgerInit),
    /// Make the data folder's node follow a chain; it votes once the validators have voted it in
    Join {
        /// The chain's genesis file
        #[arg(long, value_name = "FILE")]
        genesis: PathBuf,
        /// Ticket of a validator; may be given more than once
        #[arg(long, value_name = "TICKET", required = true)]
        peer: Vec<Ticket>,
    },
    /// Begin a sign state for the data folder's node, whose earlier one is lost. Only if what it has signed before can't matter any more
    Sign {
        /// The chain has gone on, by more than the blocks that were under way, since the key has last signed
        #[arg(long, required = true)]
        it_has_signed_nothing_that_matters: bool,
    },
    /// Print the consent of the data folder's node to becoming a validator
    Candidate,
    /// Run the reference application in a process of its own, for the data folder's node: at the socket that its configuration names
    Application,
    /// How the ledger of the node is
    Stats,
    /// What the reference application has, verified by its proof
    #[command(subcommand)]
    Query(Query),
    /// Blocks, as they are executed
    Tail {
        /// Begin at this height [default: the next]
        #[arg(long, value_name = "HEIGHT")]
        from: Option<u64>,
        /// End after so many
        #[arg(long, value_name = "COUNT")]
        limit: Option<u64>,
    },
    /// Fetch the whole chain and verify it from its genesis on: every signature, every hash, every result
    Verify {
        /// The chain's genesis file [default: the data folder's]
        #[arg(long, value_name = "FILE")]
        genesis: Option<PathBuf>,
        /// End at this height [default: the last]
        #[arg(long, value_name = "HEIGHT")]
        to: Option<u64>,
    },
}

#[derive(Debug, Clone, Args)]
pub(crate) struct LedgerInit {
    /// How many validators it begins with
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) validators: u16,
    /// Folder to make: genesis.json, operator.key and the data folders validator-1, validator-2, ...
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// The chain's name
    #[arg(long, default_value = "metanode", value_name = "NAME")]
    pub(crate) name: String,
    /// UDP address of the first validator; the others have the ports behind it. Port 0 picks free ones
    #[arg(long, default_value = "127.0.0.1:4441", value_name = "ADDRESS:PORT", value_parser = socket_address)]
    pub(crate) listen: SocketAddr,
    /// Heights that results lag behind
    #[arg(long, default_value = "2", value_name = "HEIGHTS")]
    pub(crate) lag: u64,
    /// Milliseconds of a height's first round
    #[arg(long, default_value = "2000", value_name = "MS")]
    pub(crate) round_ms: u64,
    /// Milliseconds of a round at most
    #[arg(long, default_value = "10000", value_name = "MS")]
    pub(crate) round_ms_max: u64,
    /// Milliseconds without transactions after which an empty block is made
    #[arg(long, default_value = "5000", value_name = "MS")]
    pub(crate) empty_ms: u64,
    /// Order unsigned transactions too, of whoever may write to a validator
    #[arg(long)]
    pub(crate) opaque: bool,
    /// Let each validator's application be a process of its own (`metanode ledger application`)
    #[arg(long)]
    pub(crate) application: bool,
    /// Who has something at the beginning, beside operator.key: KEY=AMOUNT; may be given more than once
    #[arg(long, value_name = "KEY=AMOUNT", value_parser = account)]
    pub(crate) account: Vec<(NodeKey, u64)>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Query {
    /// What an account has
    Account {
        /// Whose [default: of the key that this command shows]
        #[arg(value_name = "KEY")]
        account: Option<NodeKey>,
    },
    /// A value that an account has set
    Value {
        /// Whose
        #[arg(value_name = "KEY")]
        account: NodeKey,
        /// Which
        name: String,
    },
}

fn account(text: &str) -> Result<(NodeKey, u64), String> {
    let (key, amount) = text.split_once('=').ok_or("expected KEY=AMOUNT")?;
    Ok((key.parse().map_err(|error| format!("{error}"))?, amount.parse().map_err(|error| format!("{error}"))?))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    match Duration::try_from_secs_f64(number) {
        Ok(time) if !time.is_zero() && time <= Duration::from_secs(86_400) => Ok(time),
        _ => Err("expected more than 0 and at most 86400 seconds".into()),
    }
}

fn socket_address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| "expected an IP address and a port, such as 127.0.0.1:4433 or [::]:0".to_owned())
}

/// A blob's hash alone: with a tag, it would be open whether the tag or the blob is meant.
fn removable(text: &str) -> Result<Hash, String> {
    text.parse::<Hash>()
        .map_err(|error| format!("{error}; `metanode tag rm` removes a tag, `metanode stat` says what it names"))
}

fn address_or_off(text: &str) -> Result<AddressOrOff, String> {
    if text == "off" {
        return Ok(AddressOrOff::Off);
    }
    text.parse().map(AddressOrOff::Address).map_err(|_| format!("{text:?} is neither an address nor \"off\""))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_lines_of_the_readme_parse() {
        let (hash, key) = ("ab".repeat(32), NodeKey([7; 32]));
        for line in [
            "metanode start --foreground -o json --shards 2 --cores 0,1 --listen 127.0.0.1:0 --cache 64M --metrics off",
            "metanode --data /tmp/x stop --deadline 5",
            "metanode quickstart",
            "metanode put - --tag a/b --class memory -o json",
            &format!("metanode get {hash}/a/b - --range 5..9"),
            &format!("metanode get {hash} dest --force"),
            "metanode ls --tags --limit 5 --after x",
            &format!("metanode ls {hash}/folder"),
            &format!("metanode tag set name {hash}"),
            "metanode tag set name other",
            &format!("metanode rm {hash} {hash}"),
            "metanode config check file.toml -o yaml",
            "metanode node run --data /x",
            "metanode completions bash",
            "metanode bench --time 0.5 --concurrency 8",
            "metanode --data /tmp/net start --validators 4",
            "metanode ledger init --validators 4 --out /tmp/net --listen 127.0.0.1:0 --opaque",
            &format!("metanode tx send pay {key} 5 --fee 1 --no-wait"),
            &format!("metanode tx send read {key} name"),
            &format!("metanode tx send vote-remove {key}"),
            &format!("metanode tx wait {hash} --timeout 5"),
            &format!("metanode ledger query value {key} name"),
            "metanode ledger query account",
            "metanode ledger tail --from 1 --limit 5",
            "metanode ledger verify --genesis genesis.json",
            "metanode node validators",
        ] {
            assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "metanode put",
            "metanode rm",
            "metanode rm nothash",
            "metanode get x --range 9..5",
            "metanode tag set x",
            "metanode rm tag",
            "metanode start --listen 127.0.0.1",
            "metanode --node nonsense ls",
            "metanode stop --deadline 0",
            "metanode start --metrics maybe",
            "metanode bench --concurrency 0",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
