//! Tickets: what a command line pays for the string that it is given.

use std::hint::black_box;

use criterion::Criterion;
use metanode_crypto::Identity;
use metanode_types::Hash;
use metanode_wire::Ticket;

pub(crate) fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ticket");
    let ticket = Ticket {
        node: Identity::from_seed(&[7; 32]).public(),
        addresses: vec![([127, 0, 0, 1], 4433).into(), (std::net::Ipv6Addr::LOCALHOST, 4433).into()],
        hash: Some(Hash([9; 32])),
    };
    let text = ticket.to_string();
    group.bench_function("print", |bencher| bencher.iter(|| black_box(&ticket).to_string()));
    group.bench_function("parse", |bencher| {
        bencher.iter(|| black_box(&text).parse::<Ticket>().expect("the ticket was printed here"));
    });
    let mut mistyped = text.clone();
    mistyped.replace_range(10..11, if &text[10..11] == "a" { "b" } else { "a" });
    group.bench_function("refuse_mistyped", |bencher| bencher.iter(|| black_box(&mistyped).parse::<Ticket>().is_err()));
    group.finish();
}
