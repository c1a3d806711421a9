//! Ed25519 with a domain: signing, and the strict check that makes a `Verified`.

use std::hint::black_box;

use criterion::Criterion;
use metanode_crypto::{Identity, Verified};

const DOMAIN: &str = "metanode bench v1";

pub(crate) fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ed25519");
    let identity = Identity::from_seed(&[7; 32]);
    let (key, message) = (identity.public(), crate::noise(200));
    let signature = identity.sign(DOMAIN, &message);
    group.bench_function("sign_200", |bencher| bencher.iter(|| identity.sign(DOMAIN, black_box(&message))));
    group.bench_function("verify_200", |bencher| {
        bencher.iter(|| {
            Verified::check((), black_box(&message), DOMAIN, key, &signature).expect("the signature was made here")
        });
    });
    let mut wrong = signature;
    wrong[0] ^= 1;
    // What a stranger can make the node spend.
    group.bench_function("refuse_200", |bencher| {
        bencher.iter(|| Verified::check((), black_box(&message), DOMAIN, key, &wrong).is_err());
    });
    group.finish();
}
