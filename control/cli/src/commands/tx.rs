//! `metanode tx`: transactions, from signing to their outcome.

use std::time::{Duration, Instant};

use metanode_application::{Account, Operation};
use metanode_client::{Client, ClientError, TransactionStatus};
use metanode_crypto::Identity;
use metanode_ibft::{ChainId, Height};
use metanode_ledger::{
    Answer, Code, Kind, Outcome, PAYLOAD_BYTES_MAX, Transaction, TransactionDraft, TransactionId, system::Wish,
};
use metanode_node::DataFolder;
use metanode_types::Hash;
use metanode_wire::TransactionRefusal;
use serde::Serialize;

use super::with_client;
use crate::{
    args::{Action, Global, Tx, TxSend},
    exit::{Exit, Failure, Result},
    output::Show,
    target::{node_folder, own_identity},
};

#[derive(Debug, Serialize)]
struct Report {
    id: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    height: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// What it answers, if it has something to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<String>,
}

impl Show for Report {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![("id", self.id.clone()), ("state", self.state.to_owned())];
        lines.extend(self.height.map(|height| ("height", height.to_string())));
        lines.extend(self.reason.iter().map(|reason| ("reason", reason.clone())));
        lines.extend(self.answer.iter().map(|answer| ("answer", answer.clone())));
        lines
    }
}

impl Report {
    fn new(id: TransactionId, status: TransactionStatus) -> Self {
        let mut report =
            Self { id: id.to_string(), state: "unknown", height: None, code: None, reason: None, answer: None };
        match status {
            TransactionStatus::Unknown => {}
            TransactionStatus::Waiting => report.state = "waiting",
            TransactionStatus::Executed { height, outcome } => {
                report.height = Some(height.0);
                match outcome {
                    Outcome::Done(answer) => {
                        report.state = "done";
                        report.answer = (answer != Answer::default()).then(|| Hash(answer.0).to_string());
                    }
                    Outcome::Failed(code) => {
                        (report.state, report.code, report.reason) = ("failed", Some(code.0), Some(words(code)));
                    }
                    Outcome::Skipped(code) => {
                        (report.state, report.code, report.reason) = ("skipped", Some(code.0), Some(words(code)));
                    }
                }
            }
        }
        report
    }
}

/// What a code says.
fn words(code: Code) -> String {
    let words = match code {
        Code::EXPIRED => "expired before it was executed",
        Code::NONCE_TOO_HIGH => "the account has had fewer transactions: it may come again",
        Code::NONCE_USED => "the account has had this nonce",
        Code::MALFORMED => "its payload can't be read",
        Code::NOT_A_VALIDATOR => "only validators may do this",
        Code::NO_CHANGE => "it changes nothing",
        Code::NO_PROOF_OF_KEY => "the key has not consented",
        Code::NO_EVIDENCE => "it proves nothing",
        Code::KNOWN => "the same was executed before",
        Code::TOO_MANY => "its sender has sent too many such, or has too many open votes",
        Code::EXPIRES_TOO_LATE => "it expires too late",
        Code::TOO_SOON => "the key has been rotated not long ago",
        Code(256) => "the account can't pay the fee",
        Code(257) => "the account has less than the amount",
        Code(258) => "a name of more than 256 bytes, or a value of more than 16 KiB",
        Code(259) => "the receiver would have more than there can be",
        Code(other) => return format!("code {other} of the application"),
    };
    words.to_owned()
}

pub(super) fn run(global: &Global, tx: &Tx) -> Result<()> {
    match tx {
        Tx::Send(args) => send(global, args),
        Tx::Wait { id } => with_client(global, None, false, async |client, _| {
            let id = TransactionId(id.0);
            let status = wait(client, id, global.timeout).await?;
            report(global, client, id, status).await
        }),
        Tx::Status { id } => with_client(global, None, false, async |client, _| {
            let id = TransactionId(id.0);
            let status = client.transaction(id, Duration::ZERO).await?;
            global.output.print(&Report::new(id, status))
        }),
    }
}

/// Prints what came of it; anything but success is a failure of the command.
async fn report(global: &Global, client: &Client, id: TransactionId, status: TransactionStatus) -> Result<()> {
    let report = Report::new(id, status);
    global.output.print(&report)?;
    match status {
        TransactionStatus::Executed { outcome: Outcome::Done(_), .. } => Ok(()),
        TransactionStatus::Executed { .. } => {
            Err(Failure::new(Exit::Other, format!("{}: {}", report.state, report.reason.unwrap_or_default())))
        }
        _ => {
            let mut what = "not executed within the time; it may still be".to_owned();
            // The node may know why; that it doesn't say is no reason to fail otherwise.
            if let Ok(ledger) = client.ledger_status().await
                && !ledger.reason.is_empty()
            {
                what = format!("{what} (the node says: {})", ledger.reason);
            }
            Err(Failure::new(Exit::Busy, what).hint(format!("`metanode tx wait {id}` goes on waiting")))
        }
    }
}

async fn wait(client: &Client, id: TransactionId, time: Duration) -> Result<TransactionStatus> {
    let begun = Instant::now();
    loop {
        // Half of the time for an answer: the node answers that it is not there yet, rather than too late.
        let left = time.saturating_sub(begun.elapsed());
        let status = client.transaction(id, left.min(time / 2)).await?;
        if matches!(status, TransactionStatus::Executed { .. }) || left.is_zero() {
            return Ok(status);
        }
    }
}

/// Who signs, what kind it is, what is in it.
fn payload(global: &Global, action: &Action, shown: &Identity) -> Result<(Identity, Kind, Vec<u8>)> {
    let consent = |text: &str| {
        let bytes = signature(text);
        bytes.ok_or_else(|| {
            Failure::usage("the consent is 128 hexadecimal digits, as `metanode ledger candidate` prints")
        })
    };
    let wish = match action {
        Action::Pay { to, amount } => {
            let operation = Operation::Pay { to: *to, amount: *amount };
            return Ok((shown.clone(), Kind::Application, operation.encode()));
        }
        Action::Set { name, value } => {
            let operation = Operation::Set { name: name.as_bytes(), value: value.as_bytes() };
            return Ok((shown.clone(), Kind::Application, operation.encode()));
        }
        Action::Read { owner, name } => {
            let operation = Operation::Read { owner: *owner, name: name.as_bytes() };
            return Ok((shown.clone(), Kind::Application, operation.encode()));
        }
        Action::VoteAdd { validator, consent: text } => Wish::Add(*validator, consent(text)?),
        Action::VoteRemove { validator } => Wish::Remove(*validator),
        Action::Rotate { validator, consent: text } => Wish::Rotate(*validator, consent(text)?),
        Action::VoteUpgrade { form, from } => Wish::Upgrade { version: *form, from: Height(*from) },
    };
    let validator = DataFolder::open(&node_folder(global)?)?.node_identity().clone();
    Ok((validator, Kind::Validators, wish.encode()))
}

/// 64 bytes from their hexadecimal digits.
fn signature(text: &str) -> Option<[u8; 64]> {
    let (first, second) = text.split_at_checked(64)?;
    let halves = [first.parse::<Hash>().ok()?.0, second.parse::<Hash>().ok()?.0];
    halves.concat().try_into().ok()
}

fn send(global: &Global, args: &TxSend) -> Result<()> {
    if global.node.is_some() && own_identity(global)?.is_none() {
        let what = "there is no key to sign with: nobody could use the account again";
        return Err(
            Failure::usage(what).hint("name one with --key FILE, or the data folder that has one with --data DIR")
        );
    }
    with_client(global, None, false, async |client, target| {
        let (signer, kind, payload) = payload(global, &args.what, &target.identity)?;
        let status = client.ledger_status().await?;
        let nonce = match args.nonce {
            Some(nonce) => nonce,
            None if kind == Kind::Application => next_nonce(client, &signer).await?,
            None => 0,
        };
        let expiry = status.height.saturating_add(args.expiry.clamp(1, status.expiry_heights_max));
        let draft = TransactionDraft {
            kind,
            account: signer.public(),
            nonce,
            fee: args.fee,
            expiry: Height(expiry),
            payload: &payload,
        };
        if payload.len() > PAYLOAD_BYTES_MAX {
            let what = format!("a payload of {} bytes; a transaction has at most {PAYLOAD_BYTES_MAX}", payload.len());
            return Err(Failure::usage(what).hint("put what is larger into the store, and its hash here"));
        }
        let chain = ChainId(status.chain);
        let sign = |domain: &str, message: &[u8]| Ok::<_, std::convert::Infallible>(signer.sign(domain, message));
        let Ok(encoded) = draft.encode(&chain, sign);
        let id = Transaction::decode(&encoded).map_err(|error| Failure::new(Exit::Other, error))?.id(&chain);
        // Once it has left nobody can take it back: who does not hear of it asks for it, and does not send another one.
        let unknown = |failure: Failure| {
            failure
                .context(format!("what became of the transaction {id} is not known"))
                .hint(format!("it may have been executed, or still be: `metanode tx wait {id}` says so; sending another one may do it twice"))
        };
        let submitted = match client.submit(encoded.into()).await {
            Err(ClientError::Refused(refusal)) => return Err(ClientError::Refused(refusal).into()),
            submitted => submitted.map_err(|error| unknown(error.into()))?,
        };
        if let Some((_, refusal)) = submitted.into_iter().next() {
            let exit = if refusal.is_busy() { Exit::Busy } else { Exit::Other };
            let failure = match refusal {
                TransactionRefusal::Application(code) => Failure::new(exit, words(Code(code))),
                refusal => Failure::new(exit, refusal),
            };
            return Err(failure.context("the node refused the transaction"));
        }
        if args.no_wait {
            return global.output.print(&Report::new(id, TransactionStatus::Waiting));
        }
        let status = wait(client, id, global.timeout).await.map_err(unknown)?;
        report(global, client, id, status).await
    })
}

async fn next_nonce(client: &Client, signer: &Identity) -> Result<u64> {
    let answer = client.ledger_account(signer.public()).await?;
    let account = answer.value.as_deref().map(|stored| {
        Account::decode(stored).ok_or_else(|| Failure::new(Exit::Other, "what the node says is no account"))
    });
    Ok(account.transpose()?.unwrap_or_default().nonce)
}
