//! One problem: policies, priorities, errors.

use polyattn_api::{
    AttentionKind, AttentionProblem, BackendChoice, BackendName, DType, DeviceFacts, Mask, Phase, Policy, Registry,
    Role, SelectionError, backend_entry, resolve, select,
};

use crate::mocks::{Causal, CpuCausal, Nothing, Reference, Wide, bare_gpu, big_gpu, engine, layer, registry};

fn problem() -> AttentionProblem {
    let kind = AttentionKind::Gqa { query_heads: 16, kv_heads: 8, head_dim: 128, value_dim: 128 };
    AttentionProblem::new(kind, DType::F16).layer("full")
}

fn name(text: &str) -> BackendName {
    BackendName::parse(text).expect("a name")
}

fn require(text: &str) -> Policy {
    Policy::Require(name(text))
}

#[test]
fn an_explicit_causal_backend_refuses_non_causal_attention() {
    let mut config = engine(vec![layer("full")]);
    config.attention.backend = BackendChoice::Require(name("causal"));
    config.attention.use_non_causal = true;
    let error = resolve(&config, &big_gpu(), &registry()).expect_err("must not fall back").to_string();
    assert_eq!(error, "backend 'causal' cannot serve target prefill layer 'full': non-causal attention not supported");
}

#[test]
fn an_explicit_causal_backend_serves_causal_attention() {
    let mut config = engine(vec![layer("full")]);
    config.attention.backend = BackendChoice::Require(name("causal"));
    let answer = resolve(&config, &big_gpu(), &registry()).expect("served");
    assert!(answer.target.iter().all(|layer| layer.backend.name() == "causal" && layer.policy.name() == "require"));
}

#[test]
fn automatic_choice_with_non_causal_takes_one_that_supports_it() {
    let mut config = engine(vec![layer("full")]);
    config.attention.use_non_causal = true;
    let answer = resolve(&config, &big_gpu(), &registry()).expect("served");
    for layer in &answer.target {
        assert_eq!(layer.backend.name(), "wide");
        assert!(layer.backend.backend.capabilities().non_causal && layer.use_non_causal());
    }
    config.attention.use_non_causal = false;
    let answer = resolve(&config, &big_gpu(), &registry()).expect("served");
    assert_eq!(answer.target[0].backend.name(), "causal", "the higher priority where both can");
}

#[test]
fn nobody_left_lists_every_backend_with_every_reason() {
    let problem = problem().mask(Mask::Bidirectional).page_size(24);
    let error = select(&problem, &bare_gpu(), &registry(), &Policy::Auto).expect_err("nobody serves it");
    assert_eq!(
        error.to_string(),
        "no attention backend can serve target decode layer 'full': \
         latent: needs 49152 bytes of workgroup memory, the device has 32768; GQA not supported; \
         page size 24 not supported; non-causal attention not supported | \
         causal: non-causal attention not supported | \
         wide: needs feature shader-f16; needs feature subgroups; page size 24 not supported | \
         reference: needs the CPU device | \
         cpu-causal: needs the CPU device; non-causal attention not supported"
    );
}

#[test]
fn an_unknown_name_lists_the_names() {
    for policy in [require("Flush"), Policy::Prefer(name("flush"))] {
        let error = select(&problem(), &big_gpu(), &registry(), &policy).expect_err("no such backend");
        assert_eq!(
            error.to_string(),
            "unknown attention backend 'flush'; registered are: causal, cpu-causal, latent, reference, wide"
        );
    }
}

#[test]
fn a_name_is_matched_in_any_case() {
    for text in ["wide", "WIDE", "Wide", " wide "] {
        let found = select(&problem(), &big_gpu(), &registry(), &require(text)).expect("served");
        assert_eq!(found.backend.name(), "wide");
    }
    assert!(registry().backend("WiDe").is_some() && registry().proposer("BLOCK").is_some());
}

#[test]
fn prefer_takes_the_named_one_or_falls_back() {
    let prefer = Policy::Prefer(name("wide"));
    assert_eq!(select(&problem(), &big_gpu(), &registry(), &prefer).expect("served").backend.name(), "wide");

    let found = select(&problem(), &bare_gpu(), &registry(), &prefer).expect("served by another");
    assert_eq!(found.backend.name(), "causal");
    let wide = found.declined.iter().find(|one| one.backend == "wide").expect("listed");
    assert_eq!(wide.reasons.len(), 2, "and it says why the preferred one was not taken: {wide:?}");
}

#[test]
fn require_never_falls_back() {
    let error = select(&problem(), &bare_gpu(), &registry(), &require("wide")).expect_err("the device falls short");
    assert_eq!(
        error.to_string(),
        "backend 'wide' cannot serve target decode layer 'full': needs feature shader-f16; needs feature subgroups"
    );
    let problem = problem().serving(Role::Draft, Phase::Draft).layer("draft");
    let error = select(&problem, &DeviceFacts::cpu(), &registry(), &require("causal")).expect_err("no GPU");
    assert_eq!(error.to_string(), "backend 'causal' cannot serve draft draft layer 'draft': needs a GPU");
}

#[test]
fn everybody_else_is_listed_in_the_registrys_order() {
    let found = select(&problem(), &big_gpu(), &registry(), &Policy::Auto).expect("served");
    assert_eq!(found.backend.name(), "causal");
    let listed: Vec<_> = found.declined.iter().map(|one| one.backend).collect();
    assert_eq!(listed, ["latent", "wide", "reference", "cpu-causal"]);
    assert!(found.declined[1].reasons.is_empty(), "outranked is no reason");
    assert!(found.declined.iter().filter(|one| one.backend != "wide").all(|one| !one.reasons.is_empty()));
}

#[test]
fn priority_decides_then_the_name() {
    let registry = Registry::builder()
        .backend(backend_entry!(Wide, priority = 7))
        .backend(backend_entry!(Causal, priority = 7))
        .build()
        .expect("the names differ");
    assert_eq!(select(&problem(), &big_gpu(), &registry, &Policy::Auto).expect("served").backend.name(), "causal");
    let registry = Registry::builder()
        .backend(backend_entry!(Causal, priority = -1))
        .backend(backend_entry!(Wide, priority = 0))
        .build()
        .expect("the names differ");
    assert_eq!(select(&problem(), &big_gpu(), &registry, &Policy::Auto).expect("served").backend.name(), "wide");
}

#[test]
fn a_backend_that_claims_nothing_serves_nothing() {
    let registry = Registry::builder().backend(backend_entry!(Nothing, priority = 99)).build().expect("one name");
    for device in [DeviceFacts::cpu(), big_gpu()] {
        let error = select(&problem(), &device, &registry, &Policy::Auto).expect_err("nobody serves it");
        let SelectionError::Nobody { declined, .. } = error else { panic!("{error}") };
        assert!(declined[0].reasons.len() >= 5, "{declined:?}");
    }
}

#[test]
fn the_cpu_serves_where_no_gpu_is() {
    let found = select(&problem(), &DeviceFacts::cpu(), &registry(), &Policy::Auto).expect("served");
    assert_eq!(found.backend.name(), "reference");
    assert!(found.declined.iter().any(|one| one.backend == "cpu-causal" && one.reasons.is_empty()));
}

#[test]
fn an_empty_registry_says_so() {
    let empty = Registry::builder().build().expect("nothing to refuse");
    let error = select(&problem(), &big_gpu(), &empty, &Policy::Auto).expect_err("nobody there").to_string();
    assert!(error.contains("none is registered") && error.contains("target decode layer 'full'"), "{error}");
    let error = select(&problem(), &big_gpu(), &empty, &require("flash")).expect_err("nobody there").to_string();
    assert_eq!(error, "unknown attention backend 'flash'; registered are: none");
}

#[test]
fn selection_is_a_pure_function() {
    let registry = Registry::builder()
        .backend(backend_entry!(CpuCausal, priority = 1))
        .backend(backend_entry!(Reference, priority = 0))
        .build()
        .expect("the names differ");
    let run = |problem: &AttentionProblem| {
        select(problem, &DeviceFacts::cpu(), &registry, &Policy::Auto).expect("served").backend.name()
    };
    // A cache keyed by too little would let the answer to one problem leak into the next.
    for _ in 0..2 {
        assert_eq!(run(&problem()), "cpu-causal");
        assert_eq!(run(&problem().mask(Mask::Bidirectional)), "reference");
        assert_eq!(run(&problem().serving(Role::Draft, Phase::Draft)), "cpu-causal");
    }
}
