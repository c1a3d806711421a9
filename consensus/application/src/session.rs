//! An application in a process of its own: what it answers to its node. What is said is `metanode_admin_api::application`; the socket is the
//! caller's.

use bytes::Bytes;
use metanode_admin_api::application::{Found as FoundReply, Reply, Request, State};
use metanode_ibft::{ChainId, Height};
use metanode_ledger::{Genesis, Outcome, Transaction};
use metanode_types::{Hash, NodeKey};
use metanode_wire::{Refusal, RefusalCode};

use crate::{Application, Found, Question};

/// Bytes of a genesis at most: a million accounts of some hundred bytes.
const GENESIS_BYTES_MAX: usize = 256 << 20;

/// How an application comes to be.
#[derive(Debug, Clone, Copy)]
pub struct Maker<A> {
    /// At a chain's beginning.
    pub begin: fn(&Genesis) -> A,
    /// With nothing in it, for a state that is imported.
    pub empty: fn() -> A,
}

/// An application, and what its node has told it so far.
#[derive(Debug)]
pub struct Session<A> {
    agent: String,
    maker: Maker<A>,
    /// What the node has named.
    chain: Option<ChainId>,
    state: Option<(ChainId, A)>,
    /// Parts of a genesis.
    genesis: Vec<u8>,
    importing: Option<(Height, A)>,
}

impl<A: Application> Session<A> {
    /// One that has nothing yet. `agent` is its name, for the node's log.
    pub fn new(agent: String, maker: Maker<A>) -> Self {
        Self { agent, maker, chain: None, state: None, genesis: Vec::new(), importing: None }
    }

    /// Answers a request.
    pub fn answer(&mut self, request: Request) -> Reply {
        self.try_answer(request).unwrap_or_else(Reply::Refused)
    }

    fn try_answer(&mut self, request: Request) -> Result<Reply, Refusal> {
        Ok(match request {
            Request::Hello { agent: _, chain } => {
                self.chain = Some(ChainId(chain));
                // What another connection began is nobody's to end.
                (self.genesis, self.importing) = (Vec::new(), None);
                self.where_it_is()
            }
            Request::Begin { genesis, more } => {
                self.begin(&genesis, more)?;
                self.where_it_is()
            }
            Request::Import { height, piece, more } => {
                self.import(Height(height), &piece, more)?;
                self.where_it_is()
            }
            Request::Check { transactions } => {
                let transactions = decode(&transactions)?;
                let app = self.app()?;
                let check = |transaction: &Transaction<'_>| {
                    let code = app.check(transaction).err().map_or(0, |code| code.0);
                    (code, app.next_nonce(&transaction.account))
                };
                Reply::Checked(transactions.iter().map(check).collect())
            }
            Request::Execute { height, time_ms, transactions } => {
                let transactions = decode(&transactions)?;
                let app = self.app_mut()?;
                let next = app.executed().0.next();
                if Height(height) != next {
                    let why = format!("height {height} is to be executed, {} comes next", next.0);
                    return Err(Refusal::new(RefusalCode::NotFound, why));
                }
                let (outcomes, root) = app.execute(next, time_ms, &transactions);
                let outcomes: Vec<u8> = outcomes.iter().flat_map(Outcome::encode_bare).collect();
                Reply::Executed { root, outcomes: outcomes.into() }
            }
            Request::Commit { keep_from } => {
                self.app_mut()?.commit(Height(keep_from));
                Reply::Done
            }
            Request::Query { kind, account, name } => {
                let question = Question::of(kind, NodeKey(account), name)?;
                let app = self.app()?;
                let height = app.executed().0;
                let found = app.query(height, &question).map_err(|_| RefusalCode::NotFound)?;
                Reply::Found(to_reply(height, found))
            }
            Request::Export { height, after } => {
                let piece = self.app()?.export(Height(height), &after).map_err(|_| RefusalCode::NotFound)?;
                Reply::Piece { piece: piece.bytes.into(), next: piece.next }
            }
        })
    }

    fn where_it_is(&self) -> Reply {
        let agent = self.agent.clone();
        Reply::State(match &self.state {
            Some((chain, app)) if Some(*chain) == self.chain => {
                let (height, root) = app.executed();
                State { agent, begun: true, height: height.0, root }
            }
            _ => State { agent, begun: false, height: 0, root: Hash([0; 32]) },
        })
    }

    fn begin(&mut self, part: &Bytes, more: bool) -> Result<(), Refusal> {
        let chain = self.named()?;
        if self.genesis.len() + part.len() > GENESIS_BYTES_MAX {
            self.genesis = Vec::new();
            return Err(Refusal::new(
                RefusalCode::TooLarge,
                format!("a genesis of more than {GENESIS_BYTES_MAX} bytes"),
            ));
        }
        self.genesis.extend_from_slice(part);
        if more {
            return Ok(());
        }
        let text = String::from_utf8(std::mem::take(&mut self.genesis));
        let text = text.map_err(|_| Refusal::new(RefusalCode::Malformed, "the genesis is no text"))?;
        let genesis = Genesis::from_json(&text)
            .map_err(|error| Refusal::new(RefusalCode::Malformed, format!("the genesis: {error}")))?;
        if genesis.chain() != chain {
            return Err(Refusal::new(RefusalCode::Malformed, "the genesis is of another chain than was named"));
        }
        self.state = Some((chain, (self.maker.begin)(&genesis)));
        Ok(())
    }

    fn import(&mut self, height: Height, piece: &[u8], more: bool) -> Result<(), Refusal> {
        let chain = self.named()?;
        let (of, mut app) = match self.importing.take() {
            Some(importing) => importing,
            None => {
                self.state = None; // two of them may not fit
                (height, (self.maker.empty)())
            }
        };
        let malformed = |why| Refusal::new(RefusalCode::Malformed, why);
        if of != height {
            return Err(malformed("a piece of another height than those before"));
        }
        app.import(piece).map_err(|_| malformed("a piece that is none, or does not follow the one before"))?;
        if more {
            self.importing = Some((height, app));
        } else {
            app.imported(height);
            self.state = Some((chain, app));
        }
        Ok(())
    }

    fn named(&self) -> Result<ChainId, Refusal> {
        self.chain.ok_or_else(|| Refusal::new(RefusalCode::Malformed, "no chain was named"))
    }

    fn app(&self) -> Result<&A, Refusal> {
        self.state.as_ref().map(|(_, app)| app).ok_or_else(not_begun)
    }

    fn app_mut(&mut self) -> Result<&mut A, Refusal> {
        self.state.as_mut().map(|(_, app)| app).ok_or_else(not_begun)
    }
}

fn not_begun() -> Refusal {
    Refusal::new(RefusalCode::NotFound, "there is no state: it was not begun")
}

fn decode(mut encoded: &[u8]) -> Result<Vec<Transaction<'_>>, Refusal> {
    let mut transactions = Vec::new();
    while !encoded.is_empty() {
        let (transaction, rest) = Transaction::decode_first(encoded).map_err(|error| {
            Refusal::new(RefusalCode::Malformed, format!("transaction {}: {error}", transactions.len()))
        })?;
        transactions.push(transaction);
        encoded = rest;
    }
    Ok(transactions)
}

fn to_reply(height: Height, found: Found) -> FoundReply {
    FoundReply {
        height: height.0,
        key: found.key.0,
        value: found.value,
        beside: found.proof.beside,
        found: found.proof.found.map(|(key, hash)| (key.0, hash)),
    }
}

#[cfg(test)]
mod tests {
    use metanode_crypto::Identity;
    use metanode_ledger::{Account, Kind, TransactionDraft};

    use super::*;
    use crate::{Operation, Reference};

    const MAKER: Maker<Reference> = Maker { begin: Reference::new, empty: Reference::empty };

    fn key(number: u8) -> NodeKey {
        Identity::from_seed(&[number; 32]).public()
    }

    fn genesis() -> Genesis {
        let accounts = (1..200).map(|number| Account { key: key(number), balance: 1_000 }).collect();
        Genesis {
            version: 1,
            name: "test".to_owned(),
            time_ms: 0,
            lag: 2,
            round_ms: 500,
            round_ms_max: 10_000,
            empty_ms: 0,
            clock_drift_ms_max: 500,
            expiry_heights_max: 100,
            opaque: false,
            validators: vec![key(1)],
            accounts,
        }
    }

    fn pay(chain: &ChainId, nonce: u64) -> Vec<u8> {
        let payload = Operation::Pay { to: key(2), amount: 10 }.encode();
        let draft = TransactionDraft {
            kind: Kind::Application,
            account: key(1),
            nonce,
            fee: 1,
            expiry: Height(50),
            payload: &payload,
        };
        draft.encode(chain, |_, _| Ok::<_, ()>([0; 64])).unwrap()
    }

    fn refused(reply: Reply) -> RefusalCode {
        match reply {
            Reply::Refused(refusal) => refusal.code,
            other => panic!("{other:?}"),
        }
    }

    fn state(reply: Reply) -> State {
        match reply {
            Reply::State(state) => state,
            other => panic!("{other:?}"),
        }
    }

    fn hello(chain: ChainId) -> Request {
        Request::Hello { agent: "test".to_owned(), chain: chain.0 }
    }

    /// What the node does: begin, execute, ask; and go on elsewhere from what was exported.
    #[test]
    fn a_session_is_the_application() {
        let genesis = genesis();
        let chain = genesis.chain();
        let mut session = Session::new("reference".to_owned(), MAKER);
        assert!(!state(session.answer(hello(chain))).begun);
        assert_eq!(refused(session.answer(Request::Commit { keep_from: 0 })), RefusalCode::NotFound);
        let text = Bytes::from(genesis.to_json());
        let (one, other) = (text.slice(..100), text.slice(100..));
        assert!(!state(session.answer(Request::Begin { genesis: one, more: true })).begun);
        let begun = state(session.answer(Request::Begin { genesis: other, more: false }));
        let mut here = Reference::new(&genesis);
        assert_eq!((begun.begun, begun.height, begun.root), (true, 0, here.executed().1));

        let transactions = Bytes::from([pay(&chain, 0), pay(&chain, 5)].concat());
        let checked = session.answer(Request::Check { transactions: transactions.clone() });
        assert_eq!(checked, Reply::Checked(vec![(0, 0), (0, 0)]));
        let execute = |height| Request::Execute { height, time_ms: 1, transactions: transactions.clone() };
        assert_eq!(refused(session.answer(execute(2))), RefusalCode::NotFound, "heights follow each other");
        let decoded = decode(&transactions).unwrap();
        let (outcomes, root) = here.execute(Height(1), 1, &decoded);
        let outcomes: Vec<u8> = outcomes.iter().flat_map(Outcome::encode_bare).collect();
        assert_eq!(session.answer(execute(1)), Reply::Executed { root, outcomes: outcomes.into() });
        let nonsense = Request::Check { transactions: Bytes::from_static(b"nonsense") };
        assert_eq!(refused(session.answer(nonsense)), RefusalCode::Malformed);
        let asked = session.answer(Request::Query { kind: 1, account: key(2).0, name: Vec::new() });
        let found = here.query(Height(1), &Question::Account(key(2))).unwrap();
        assert_eq!(asked, Reply::Found(to_reply(Height(1), found)));
        let unknown = Request::Query { kind: 9, account: key(2).0, name: Vec::new() };
        assert_eq!(refused(session.answer(unknown)), RefusalCode::NotSupported);

        let mut pieces = Vec::new();
        let mut after = Vec::new();
        loop {
            let Reply::Piece { piece, next } = session.answer(Request::Export { height: 1, after }) else { panic!() };
            pieces.push(piece);
            match next {
                Some(next) => after = next,
                None => break,
            }
        }
        let mut second = Session::new("reference".to_owned(), MAKER);
        state(second.answer(hello(chain)));
        let last = pieces.len() - 1;
        for (place, piece) in pieces.iter().enumerate() {
            let import = Request::Import { height: 1, piece: piece.clone(), more: place < last };
            let now = state(second.answer(import));
            assert_eq!(now.begun, place == last);
        }
        assert_eq!(state(second.answer(hello(chain))).root, root);
        assert!(!state(second.answer(hello(ChainId([9; 32])))).begun, "of another chain it has nothing");
        second.answer(hello(chain));
        assert_eq!(second.answer(execute(2)), session.answer(execute(2)));
    }

    #[test]
    fn what_does_not_belong_together_is_refused() {
        let genesis = genesis();
        let mut session = Session::new("reference".to_owned(), MAKER);
        let text = Bytes::from(genesis.to_json());
        let begin = Request::Begin { genesis: text, more: false };
        assert_eq!(refused(session.answer(begin.clone())), RefusalCode::Malformed, "no chain was named");
        session.answer(hello(ChainId([9; 32])));
        assert_eq!(refused(session.answer(begin)), RefusalCode::Malformed);
        let import =
            |height, piece: &'static [u8], more| Request::Import { height, piece: Bytes::from_static(piece), more };
        assert_eq!(refused(session.answer(import(3, b"x", true))), RefusalCode::Malformed);
        assert!(!state(session.answer(import(3, b"", true))).begun);
        assert_eq!(refused(session.answer(import(4, b"", false))), RefusalCode::Malformed);
        let empty = state(session.answer(import(4, b"", false)));
        assert_eq!((empty.begun, empty.height, empty.root), (true, 4, Hash([0; 32])));
    }
}
