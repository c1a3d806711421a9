//! Tickets: one text for each, and each text one ticket.

use std::net::{IpAddr, SocketAddr};

use data_encoding::BASE32_NOPAD;
use metanode_types::{Hash, NodeKey, limits::TICKET_ADDRESSES_MAX};
use metanode_wire::Ticket;

use crate::script::Script;

/// `what u8 | a text, or a ticket's bytes without the checksum, or what a ticket is made of`
pub fn tickets(data: &[u8]) {
    let mut script = Script::new(data);
    match script.u8() % 3 {
        0 => check(&String::from_utf8_lossy(script.rest())),
        1 => check(&signed(script.rest())),
        _ => {
            let ticket = made(&mut script);
            assert_eq!(ticket.to_string().parse(), Ok(ticket), "a ticket's text is the ticket");
        }
    }
}

fn check(text: &str) {
    let Ok(ticket) = text.parse::<Ticket>() else { return };
    assert!((1..=TICKET_ADDRESSES_MAX).contains(&ticket.addresses.len()));
    assert_eq!(ticket.to_string(), text.trim().to_ascii_lowercase(), "there is no other text for it");
    let node = ticket.node_only();
    assert_eq!((node.node, &node.addresses, node.hash), (ticket.node, &ticket.addresses, None));
    assert_eq!(node.to_string().parse(), Ok(node));
}

/// The text of these bytes, with the right checksum.
pub(crate) fn signed(body: &[u8]) -> String {
    let sum = metanode_crypto::derive("metanode 2026 ticket checksum v1", body);
    let bytes = [body, &sum[..4]].concat();
    format!("mn1{}", BASE32_NOPAD.encode(&bytes).to_ascii_lowercase())
}

fn made(script: &mut Script<'_>) -> Ticket {
    let node = NodeKey(script.array());
    let hash = (script.u8() % 2 == 1).then(|| Hash(script.array()));
    let count = 1 + usize::from(script.u8()) % TICKET_ADDRESSES_MAX;
    let address = |script: &mut Script<'_>| -> SocketAddr {
        let ip: IpAddr =
            if script.u8().is_multiple_of(2) { script.array::<4>().into() } else { script.array::<16>().into() };
        (ip, script.u16()).into()
    };
    Ticket { node, hash, addresses: (0..count).map(|_| address(script)).collect() }
}
