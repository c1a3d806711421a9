//! What validators sign, and what they send.
//!
//! ```text
//! signed bytes: domain (one for each kind, with its version) | 0 | chain id 32 | height u64 | round u32 | rest
//! rest:         proposal, prepare, commit: block hash 32
//!               round change:              0 u8, or 1 u8 | prepared round u32 | prepared hash 32
//! ```
//!
//! Numbers are little-endian. The signature of a commit is the block's seal: there is no second one (clause 5). The round is in the
//! message and never in the block (clause 6).

use metanode_types::{Hash, NodeKey};
use rkyv::{Archive, Deserialize, Serialize};

/// Which chain: the BLAKE3 of its genesis. It is in everything that is signed (clause 3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChainId(pub [u8; 32]);

/// Number of a block; the genesis has 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Archive, Serialize, Deserialize)]
pub struct Height(pub u64);

impl Height {
    /// The one behind.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// Number of an attempt to agree on the block of a height, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Archive, Serialize, Deserialize)]
pub struct Round(pub u32);

impl Round {
    /// The first.
    pub const ZERO: Self = Self(0);

    /// The one behind.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// A round of a height.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Archive, Serialize, Deserialize)]
pub struct View {
    /// Height.
    pub height: Height,
    /// Round of that height.
    pub round: Round,
}

/// An Ed25519 signature.
pub type Signature = [u8; 64];

/// What can be signed.
pub trait Payload: Clone + PartialEq {
    /// Separates the kinds of messages, and versions of a kind (clause 3).
    const DOMAIN: &'static str;

    /// The round it is for.
    fn view(&self) -> View;

    /// What tells two payloads of one kind and view apart: two different ones by one signer are equivocation (clause 26).
    fn choice(&self) -> Option<Hash>;

    /// Appends what follows the view in the signed bytes.
    fn encode_rest(&self, out: &mut Vec<u8>);

    /// The signed bytes behind the domain.
    fn encode(&self, chain: &ChainId) -> Vec<u8> {
        let mut out = chain.0.to_vec();
        out.extend(self.view().height.0.to_le_bytes());
        out.extend(self.view().round.0.to_le_bytes());
        self.encode_rest(&mut out);
        out
    }
}

macro_rules! vote {
    ($(#[$doc:meta])* $name:ident, $domain:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
        pub struct $name {
            /// Where.
            pub view: View,
            /// The block.
            pub hash: Hash,
        }

        impl Payload for $name {
            const DOMAIN: &'static str = $domain;

            fn view(&self) -> View {
                self.view
            }

            fn choice(&self) -> Option<Hash> {
                Some(self.hash)
            }

            fn encode_rest(&self, out: &mut Vec<u8>) {
                out.extend(self.hash.0);
            }
        }
    };
}

vote! {
    /// "Let this be the block."
    Proposal, "metanode ibft proposal v1"
}
vote! {
    /// "This block is valid, and all it names is here, checked, on disk, pinned, and will be served" (clause 14).
    Prepare, "metanode ibft prepare v1"
}
vote! {
    /// "A quorum has prepared this block, and I hold to it." A quorum of these decides.
    Commit, "metanode ibft commit v1"
}

/// "Let us try `view.round`; this is what I hold to."
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub struct RoundChange {
    /// The round to go to.
    pub view: View,
    /// The highest round in which the signer saw a quorum of prepares, and for which block: both, or neither (clause 7).
    pub prepared: Option<(Round, Hash)>,
}

impl Payload for RoundChange {
    const DOMAIN: &'static str = "metanode ibft round change v1";

    fn view(&self) -> View {
        self.view
    }

    fn choice(&self) -> Option<Hash> {
        self.prepared.map(|(_, hash)| hash)
    }

    fn encode_rest(&self, out: &mut Vec<u8>) {
        match self.prepared {
            None => out.push(0),
            Some((round, hash)) => {
                out.push(1);
                out.extend(round.0.to_le_bytes());
                out.extend(hash.0);
            }
        }
    }
}

/// A payload, and who says to have signed it: [`verify`](Self::verify) before it counts for anything (clause 2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub struct Signed<P> {
    /// What.
    pub payload: P,
    /// Who.
    pub signer: NodeKey,
    /// Over `domain ‖ 0 ‖ encoding`.
    pub signature: Signature,
}

impl<P: Payload> Signed<P> {
    /// Whether the signature is the signer's, for this chain.
    pub fn verify(&self, chain: &ChainId, verifier: &dyn Verifier) -> bool {
        verifier.verify(&self.signer, P::DOMAIN, &self.payload.encode(chain), &self.signature)
    }
}

/// Checks signatures. All validators must come to the same verdict, so there is one for the whole chain: Ed25519 by the rules of ZIP-215.
pub trait Verifier {
    /// Whether `signature` over `domain ‖ 0 ‖ message` is the signer's.
    fn verify(&self, signer: &NodeKey, domain: &str, message: &[u8], signature: &Signature) -> bool;
}

/// What is agreed on. Its hash covers neither round nor seals (clause 6), and names it: two blocks of one hash are equal, which whoever makes
/// one from bytes sees to.
pub trait Block: Clone + PartialEq + std::fmt::Debug {
    /// Its identity.
    fn hash(&self) -> Hash;
    /// Its place.
    fn height(&self) -> Height;
    /// Hash of the block before.
    fn parent(&self) -> Hash;
    /// Who made it, whoever proposes it again.
    fn author(&self) -> NodeKey;
    /// When, in milliseconds since 1970.
    fn time_ms(&self) -> u64;
    /// Bytes of its encoding, for limits.
    fn size_bytes(&self) -> usize;
}

/// Why a proposal of a round above 0 may be made (clause 9).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Archive, Serialize, Deserialize)]
pub struct Justification {
    /// A quorum that wants this round.
    pub round_changes: Vec<Signed<RoundChange>>,
    /// A quorum that prepared the block, in the highest round that one of them claims; none if none claims any.
    pub prepares: Vec<Signed<Prepare>>,
}

/// A proposal with its block.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub struct ProposalMessage<B> {
    /// By the round's proposer.
    pub signed: Signed<Proposal>,
    /// The block that it names.
    pub block: B,
    /// Empty in round 0.
    pub justification: Justification,
}

/// A round change with the proof of what it claims.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub struct RoundChangeMessage<B> {
    /// By any validator.
    pub signed: Signed<RoundChange>,
    /// The block that was prepared.
    pub block: Option<B>,
    /// The quorum that prepared it.
    pub prepares: Vec<Signed<Prepare>>,
}

/// A quorum of commits of one round: proof that a block is final.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub struct Certificate {
    /// Height and round.
    pub view: View,
    /// The block.
    pub hash: Hash,
    /// Distinct signers, in the order of their keys.
    pub commits: Vec<Signed<Commit>>,
}

/// What travels between validators.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Archive, Serialize, Deserialize)]
pub enum Message<B> {
    /// See there.
    Proposal(Box<ProposalMessage<B>>),
    /// See there.
    Prepare(Signed<Prepare>),
    /// See there.
    Commit(Signed<Commit>),
    /// See there.
    RoundChange(Box<RoundChangeMessage<B>>),
    /// A final block, for whom has not seen its commits (clause 24).
    NewBlock(Box<(B, Certificate)>),
}

impl<B: Block> Message<B> {
    /// The round it is for; of a final block, the one that decided.
    pub fn view(&self) -> View {
        match self {
            Self::Proposal(message) => message.signed.payload.view,
            Self::Prepare(signed) => signed.payload.view,
            Self::Commit(signed) => signed.payload.view,
            Self::RoundChange(message) => message.signed.payload.view,
            Self::NewBlock(decided) => decided.1.view,
        }
    }

    /// Whether its own signature is its signer's, whatever it carries; a final block has none of its own.
    pub fn is_signed(&self, chain: &ChainId, verifier: &dyn Verifier) -> bool {
        match self {
            Self::Proposal(message) => message.signed.verify(chain, verifier),
            Self::Prepare(signed) => signed.verify(chain, verifier),
            Self::Commit(signed) => signed.verify(chain, verifier),
            Self::RoundChange(message) => message.signed.verify(chain, verifier),
            Self::NewBlock(_) => false,
        }
    }

    /// Who signed it; `None` for a final block, which is signed by many.
    pub fn signer(&self) -> Option<NodeKey> {
        match self {
            Self::Proposal(message) => Some(message.signed.signer),
            Self::Prepare(signed) => Some(signed.signer),
            Self::Commit(signed) => Some(signed.signer),
            Self::RoundChange(message) => Some(message.signed.signer),
            Self::NewBlock(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIEW: View = View { height: Height(0x0102), round: Round(3) };

    /// Clause 3, golden bytes: the chain is in front of everything, the kind and its version in the domain.
    #[test]
    fn golden_signed_bytes() {
        let view = [&[9; 32][..], &[2, 1, 0, 0, 0, 0, 0, 0], &[3, 0, 0, 0]].concat();
        let chain = ChainId([9; 32]);
        let hash = Hash([7; 32]);
        let with = |rest: &[u8]| [&view[..], rest].concat();
        assert_eq!(Proposal { view: VIEW, hash }.encode(&chain), with(&[7; 32]));
        assert_eq!(Prepare { view: VIEW, hash }.encode(&chain), with(&[7; 32]));
        assert_eq!(Commit { view: VIEW, hash }.encode(&chain), with(&[7; 32]));
        assert_eq!(RoundChange { view: VIEW, prepared: None }.encode(&chain), with(&[0]));
        let claim = RoundChange { view: VIEW, prepared: Some((Round(2), hash)) };
        assert_eq!(claim.encode(&chain), with(&[&[1, 2, 0, 0, 0][..], &[7; 32]].concat()));
        let domains = [Proposal::DOMAIN, Prepare::DOMAIN, Commit::DOMAIN, RoundChange::DOMAIN];
        assert_eq!(std::collections::BTreeSet::from(domains).len(), 4);
    }
}
