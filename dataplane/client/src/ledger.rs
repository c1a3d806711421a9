//! What a client asks of the ledger of a node.

use std::time::Duration;

use bytes::Bytes;
use metanode_ibft::{Certificate, Height};
use metanode_ledger::{Block, Outcome, TransactionId, decode_certificate};
use metanode_types::{NodeKey, limits::SUBMIT_TRANSACTIONS_MAX};
use metanode_wire::{
    FrameError, RefusalCode, TransactionRefusal,
    message::{
        BlockGet, BlockReply, LedgerFound, LedgerQuery, LedgerStatus, LedgerStatusReply, OutcomesGet, OutcomesReply,
        Submit, Submitted, TransactionState, TransactionWait,
    },
};

use crate::{Client, ClientError, link::Link};

/// How long a node is asked to wait at a time: less than [`ClientConfig::request_timeout`](crate::ClientConfig::request_timeout) usually is.
const WAIT: Duration = Duration::from_secs(10);

/// Transactions in one [`Client::submit`].
pub const SUBMIT_MAX: usize = SUBMIT_TRANSACTIONS_MAX;

/// What a node knows of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransactionStatus {
    /// It has not seen it, or too long ago.
    Unknown,
    /// It waits there, or is in a batch.
    Waiting,
    /// It was executed.
    Executed {
        /// In the block of this height.
        height: Height,
        /// With this outcome.
        outcome: Outcome,
    },
}

/// What somebody has, with proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LedgerAnswer {
    /// As of this height. The header of this height + lag carries the hash that the proof leads to.
    pub height: Height,
    /// What is there, as the application stores it.
    pub value: Option<Vec<u8>>,
    /// Where in the state.
    pub key: [u8; 32],
    /// Hashes beside the way up, the lowest first.
    pub beside: Vec<[u8; 32]>,
    /// What is at the end of the way.
    pub found: Option<([u8; 32], [u8; 32])>,
    /// The ledger's own part, hashed.
    pub system: [u8; 32],
}

/// A block that was executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecutedBlock {
    /// The block.
    pub block: Block,
    /// Why it is final.
    pub certificate: Certificate,
    /// What became of its transactions, in their order.
    pub outcomes: Vec<(TransactionId, Outcome)>,
}

impl Client {
    /// Has transactions ordered: at most [`SUBMIT_MAX`], encoded one behind the other. Those that are refused, with their places; the
    /// others wait in the node's memory until they are in a batch. [`Client::transaction`] says what becomes of them.
    pub async fn submit(&self, encoded: Bytes) -> Result<Vec<(usize, TransactionRefusal)>, ClientError> {
        let link = self.link_of_ledger().await?;
        let frame = link.call(&Submit {}, encoded).await?;
        let refused = &link.read::<Submitted>(&frame)?.refused;
        let refused = refused.iter().map(|it| (it.index.to_native() as usize, TransactionRefusal::from_message(it)));
        Ok(refused.collect())
    }

    /// What became of a transaction: as soon as it is executed, or when the time is up. A node waits for a while only.
    pub async fn transaction(&self, id: TransactionId, wait: Duration) -> Result<TransactionStatus, ClientError> {
        let link = self.link_of_ledger().await?;
        let frame = link.call(&TransactionWait { id: id.0, wait_ms: millis(wait) }, Bytes::new()).await?;
        let state = link.read::<TransactionState>(&frame)?;
        let malformed = || link.protocol_error(FrameError::Malformed);
        Ok(match state.state {
            0 => TransactionStatus::Unknown,
            1 => TransactionStatus::Waiting,
            2 => {
                let mut encoded = [0; Outcome::BYTES];
                encoded[32] = state.outcome;
                encoded[33..35].copy_from_slice(&state.code.to_native().to_le_bytes());
                encoded[35..].copy_from_slice(&state.answer);
                let (_, outcome) = Outcome::decode(&encoded).map_err(|_| malformed())?;
                TransactionStatus::Executed { height: Height(state.height.to_native()), outcome }
            }
            _ => return Err(malformed()),
        })
    }

    /// How the ledger of the node is.
    pub async fn ledger_status(&self) -> Result<LedgerStatusReply, ClientError> {
        let link = self.link_of_ledger().await?;
        let frame = link.call(&LedgerStatus {}, Bytes::new()).await?;
        let reply = link.read::<LedgerStatusReply>(&frame)?;
        let keys = |keys: &[[u8; 32]]| keys.to_vec();
        Ok(LedgerStatusReply {
            name: reply.name.as_str().into(),
            chain: reply.chain,
            lag: reply.lag.to_native(),
            expiry_heights_max: reply.expiry_heights_max.to_native(),
            node_key: reply.node_key,
            role: reply.role,
            reason: reply.reason.as_str().into(),
            height: reply.height.to_native(),
            block: reply.block,
            time_ms: reply.time_ms.to_native(),
            executed: reply.executed.to_native(),
            round: reply.round.to_native(),
            validators: keys(&reply.validators),
            connected: keys(&reply.connected),
            waiting: reply.waiting.to_native(),
            waiting_bytes: reply.waiting_bytes.to_native(),
            batches: reply.batches.to_native(),
            transactions: reply.transactions.to_native(),
            done: reply.done.to_native(),
            messages: reply.messages.to_native(),
            message_bytes: reply.message_bytes.to_native(),
            signatures: reply.signatures.to_native(),
            timeouts: reply.timeouts.to_native(),
            finality_us: reply.finality_us.iter().map(|time| time.to_native()).collect(),
            syncs: reply.syncs.to_native(),
            sync_p50_us: reply.sync_p50_us.to_native(),
            guilty: keys(&reply.guilty),
        })
    }

    /// What an account has.
    pub async fn ledger_account(&self, account: NodeKey) -> Result<LedgerAnswer, ClientError> {
        self.ledger_query(LedgerQuery { kind: 1, account: account.0, name: Vec::new() }).await
    }

    /// A value that an account has set.
    pub async fn ledger_value(&self, account: NodeKey, name: &[u8]) -> Result<LedgerAnswer, ClientError> {
        self.ledger_query(LedgerQuery { kind: 2, account: account.0, name: name.to_vec() }).await
    }

    async fn ledger_query(&self, query: LedgerQuery) -> Result<LedgerAnswer, ClientError> {
        let link = self.link_of_ledger().await?;
        let frame = link.call(&query, Bytes::new()).await?;
        let found = link.read::<LedgerFound>(&frame)?;
        Ok(LedgerAnswer {
            height: Height(found.height.to_native()),
            value: found.value.as_ref().map(|value| value.to_vec()),
            key: found.key,
            beside: found.beside.to_vec(),
            found: found.found.as_ref().map(|found| (found.0, found.1)),
            system: found.system,
        })
    }

    /// A final block with its certificate; `None` when there is none yet after this time. Neither is checked here beyond being one.
    pub async fn block(&self, height: Height, wait: Duration) -> Result<Option<(Block, Certificate)>, ClientError> {
        let link = self.link_of_ledger().await?;
        let get = BlockGet { height: height.0, wait_ms: millis(wait) };
        let Some(frame) = found(link.call(&get, Bytes::new()).await)? else { return Ok(None) };
        let reply = link.read::<BlockReply>(&frame)?;
        let malformed = |_| link.protocol_error(FrameError::Malformed);
        let block = Block::decode(&reply.block).map_err(malformed)?;
        let certificate = decode_certificate(&reply.certificate).map_err(malformed)?;
        if block.header.height != height {
            return Err(link.protocol_error(FrameError::Malformed));
        }
        Ok(Some((block, certificate)))
    }

    /// What became of the transactions of a block; `None` when it is not executed after this time, or was too long ago.
    pub async fn outcomes(
        &self,
        height: Height,
        wait: Duration,
    ) -> Result<Option<Vec<(TransactionId, Outcome)>>, ClientError> {
        let link = self.link_of_ledger().await?;
        let mut outcomes: Vec<(TransactionId, Outcome)> = Vec::new();
        loop {
            let get = OutcomesGet { height: height.0, first: outcomes.len() as u32, wait_ms: millis(wait) };
            let Some(frame) = found(link.call(&get, Bytes::new()).await)? else { return Ok(None) };
            let count = link.read::<OutcomesReply>(&frame)?.count.to_native() as usize;
            let before = outcomes.len();
            read_outcomes(link, &frame.body, &mut outcomes)?;
            if outcomes.len() >= count {
                return Ok(Some(outcomes));
            }
            if outcomes.len() == before {
                return Err(link.protocol_error(FrameError::Malformed));
            }
        }
    }

    /// The executed blocks from a height on, as they come.
    pub fn follow(&self, from: Height) -> Follow<'_> {
        Follow { client: self, next: from }
    }
}

/// See [`Client::follow`].
#[derive(Debug)]
pub struct Follow<'a> {
    client: &'a Client,
    next: Height,
}

impl Follow<'_> {
    /// The next block, when it is executed. `NotFound` when it was executed so long ago that its outcomes are not kept.
    pub async fn next(&mut self) -> Result<ExecutedBlock, ClientError> {
        loop {
            let Some((block, certificate)) = self.client.block(self.next, WAIT).await? else { continue };
            let Some(outcomes) = self.client.outcomes(self.next, WAIT).await? else {
                // Not executed in that time, or too long ago.
                if self.client.ledger_status().await?.executed >= self.next.0 {
                    return Err(ClientError::Refused(RefusalCode::NotFound.into()));
                }
                continue;
            };
            self.next = self.next.next();
            return Ok(ExecutedBlock { block, certificate, outcomes });
        }
    }
}

fn millis(wait: Duration) -> u32 {
    u32::try_from(wait.as_millis()).unwrap_or(u32::MAX)
}

fn found<T>(answer: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(error) if error.refusal_code() == Some(RefusalCode::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_outcomes(link: &Link, body: &[u8], outcomes: &mut Vec<(TransactionId, Outcome)>) -> Result<(), ClientError> {
    let (encoded, rest) = body.as_chunks::<{ Outcome::BYTES }>();
    if !rest.is_empty() {
        return Err(link.protocol_error(FrameError::Malformed));
    }
    for encoded in encoded {
        outcomes.push(Outcome::decode(encoded).map_err(|_| link.protocol_error(FrameError::Malformed))?);
    }
    Ok(())
}
