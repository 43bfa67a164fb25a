//! One cache, several readers: the layout they agree on, a backend for each phase and layer kind.

use std::{collections::BTreeMap, sync::Arc};

use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionProblem, BackendChoice, BackendError, BackendName, Capabilities, DType,
    Decline, Device, DeviceFacts, DeviceNeed, Dims, Drafter, DtypeSet, EngineConfig, KvDType, KvDtypeSet, KvLayout,
    LoadContext, Phase, PhaseSet, Proposer, ProposerError, ProposerRequirements, Registry, Resolution, backend_entry,
    proposer_entry, resolve,
};

use crate::mocks::{engine, layer, speculative};

const BASE: Capabilities = Capabilities::none(DeviceNeed::Any)
    .gqa(Dims::Any)
    .causal()
    .non_causal()
    .dtypes(DtypeSet::of(&[DType::F16]), KvDtypeSet::of(&[KvDType::F16]))
    .page_sizes(Dims::Any)
    .phases(PhaseSet::of(&Phase::ALL));
const TOKENS: &[KvLayout] = &[KvLayout::PageTokenHead];
const HEADS: &[KvLayout] = &[KvLayout::PageHeadToken];
const BOTH: &[KvLayout] = &[KvLayout::PageHeadToken, KvLayout::PageTokenHead];

macro_rules! reader {
    ($type:ident, $name:literal, $capabilities:expr) => {
        #[derive(Debug, Default)]
        struct $type;

        impl AttentionBackend for $type {
            fn name(&self) -> &'static str {
                $name
            }

            fn capabilities(&self) -> &Capabilities {
                const CAPABILITIES: Capabilities = $capabilities;
                &CAPABILITIES
            }

            fn prepare(&self, _: &Device, _: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
                Err(BackendError::Declined(vec![Decline::Other("running a mock".into())]))
            }
        }
    };
}
reader!(Tokens, "tokens", BASE.kv_layouts(TOKENS));
reader!(Heads, "heads", BASE.kv_layouts(HEADS));
reader!(Either, "either", BASE.kv_layouts(BOTH));
reader!(DecodeHeads, "decode-heads", BASE.kv_layouts(HEADS).phases(PhaseSet::of(&[Phase::Decode])));

/// A proposer that reads the target's cache.
#[derive(Debug, Default)]
struct Sharing;

impl Proposer for Sharing {
    fn name(&self) -> &'static str {
        "sharing"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none().draft_attention().shared_kv();
        &NEEDS
    }

    fn load(&self, _: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Err(ProposerError::Unsupported("running a mock".into()))
    }
}

/// The same with a cache of its own.
#[derive(Debug, Default)]
struct Apart;

impl Proposer for Apart {
    fn name(&self) -> &'static str {
        "apart"
    }

    fn requirements(&self) -> &ProposerRequirements {
        const NEEDS: ProposerRequirements = ProposerRequirements::none().draft_attention();
        &NEEDS
    }

    fn load(&self, _: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
        Err(ProposerError::Unsupported("running a mock".into()))
    }
}

fn registry() -> Registry {
    Registry::builder()
        .backend(backend_entry!(Either, priority = 10))
        .backend(backend_entry!(Tokens, priority = 5))
        .backend(backend_entry!(Heads, priority = 5))
        .proposer(proposer_entry!(Sharing))
        .proposer(proposer_entry!(Apart))
        .build()
        .expect("the names differ")
}

fn named(name: &str) -> BackendName {
    BackendName::parse(name).expect("a name")
}

fn require(name: &str) -> BackendChoice {
    BackendChoice::Require(named(name))
}

fn served(resolution: &Resolution) -> Vec<(Phase, &'static str, KvLayout)> {
    let layers = resolution.target.iter().chain(&resolution.draft);
    layers.map(|layer| (layer.problem.phase, layer.backend.name(), layer.problem.kv_layout)).collect()
}

fn resolved(config: &EngineConfig, registry: &Registry) -> Resolution {
    resolve(config, &DeviceFacts::cpu(), registry).expect("served")
}

#[test]
fn the_backends_own_preference_decides_where_nothing_else_does() {
    let resolution = resolved(&engine(vec![layer("full")]), &registry());
    let heads = KvLayout::PageHeadToken;
    assert_eq!(served(&resolution), [(Phase::Prefill, "either", heads), (Phase::Decode, "either", heads)]);
}

#[test]
fn phases_of_one_cache_agree() {
    let mut config = engine(vec![layer("full")]);
    config.attention.backend_per_phase = BTreeMap::from([(Phase::Prefill, require("tokens"))]);
    let tokens = KvLayout::PageTokenHead;
    let resolution = resolved(&config, &registry());
    assert_eq!(served(&resolution), [(Phase::Prefill, "tokens", tokens), (Phase::Decode, "either", tokens)]);
    assert_eq!((resolution.target[0].policy.name(), resolution.target[1].policy.name()), ("require", "auto"));

    config.attention.backend_per_phase.insert(Phase::Decode, require("heads"));
    let error = resolve(&config, &DeviceFacts::cpu(), &registry()).expect_err("no common layout").to_string();
    assert_eq!(
        error,
        "no KV layout suits all who read the cache of layer 'full': target prefill layer 'full' on 'tokens' reads \
         page-token-head; target decode layer 'full' on 'heads' reads page-head-token"
    );
}

#[test]
fn a_better_backend_is_worth_another_layout() {
    let registry = Registry::builder()
        .backend(backend_entry!(DecodeHeads, priority = 20))
        .backend(backend_entry!(Either, priority = 10))
        .build()
        .expect("the names differ");
    let heads = KvLayout::PageHeadToken;
    let resolution = resolved(&engine(vec![layer("full")]), &registry);
    assert_eq!(served(&resolution), [(Phase::Prefill, "either", heads), (Phase::Decode, "decode-heads", heads)]);

    // Where the other phase's reader knows no such layout, the better one declines by name.
    let registry = Registry::builder()
        .backend(backend_entry!(DecodeHeads, priority = 20))
        .backend(backend_entry!(Tokens, priority = 10))
        .build()
        .expect("the names differ");
    let resolution = resolved(&engine(vec![layer("full")]), &registry);
    let tokens = KvLayout::PageTokenHead;
    assert_eq!(served(&resolution), [(Phase::Prefill, "tokens", tokens), (Phase::Decode, "tokens", tokens)]);
    let declined = &resolution.target[1].declined[0];
    assert_eq!((declined.backend, &declined.reasons[..]), ("decode-heads", &[Decline::KvLayout(tokens)][..]));
}

#[test]
fn a_draft_takes_the_targets_layout_where_it_costs_nothing() {
    let mut config = speculative("apart");
    config.attention.backend = require("tokens");
    let layouts = |config: &EngineConfig| {
        let resolution = resolved(config, &registry());
        let answer = serde_json::to_value(&resolution).expect("an answer");
        (resolution.draft[0].problem.kv_layout, answer["kv_layout"].clone())
    };
    let (draft, answer) = layouts(&config);
    assert_eq!(draft, KvLayout::PageTokenHead);
    let both = "page-token-head";
    assert_eq!(answer, serde_json::json!({ "target": both, "draft": both, "shared": true }));

    config.speculative.as_mut().expect("a section").attention_backend = Some(named("heads"));
    let (draft, answer) = layouts(&config);
    assert_eq!(draft, KvLayout::PageHeadToken);
    assert_eq!(answer["shared"], false);
}

#[test]
fn a_shared_cache_is_agreed_together() {
    let mut config = speculative("sharing");
    config.speculative.as_mut().expect("a section").attention_backend = Some(named("tokens"));
    let resolution = resolved(&config, &registry());
    let tokens = KvLayout::PageTokenHead;
    assert!(served(&resolution).iter().all(|(_, _, layout)| *layout == tokens), "{resolution:?}");
    assert_eq!(resolution.target[0].backend.name(), "either", "the target gives way in layout, not in backend");

    config.attention.backend = require("heads");
    let error = resolve(&config, &DeviceFacts::cpu(), &registry()).expect_err("no common layout").to_string();
    let start = "no KV layout suits all who read the cache that target and draft share: target prefill layer 'full' on \
                 'heads' reads page-head-token";
    assert!(error.starts_with(start), "{error}");
    assert!(error.ends_with("draft draft layer 'draft' on 'tokens' reads page-token-head"), "{error}");
}

#[test]
fn a_kind_has_a_backend_of_its_own() {
    let mut config = engine(vec![layer("full"), layer("sliding")]);
    config.attention.backend = require("either");
    config.attention.backend_per_phase = BTreeMap::from([(Phase::Decode, require("tokens"))]);
    config.attention.backend_per_kind = BTreeMap::from([("sliding".to_owned(), require("heads"))]);
    let resolution = resolved(&config, &registry());
    let names: Vec<_> = resolution.target.iter().map(|layer| layer.backend.name()).collect();
    assert_eq!(names, ["either", "tokens", "heads", "heads"]);
    let answer = serde_json::to_value(&resolution).expect("an answer");
    assert_eq!(answer["kv_layout"]["target"], serde_json::json!(["page-token-head", "page-head-token"]));

    config.attention.backend_per_kind = BTreeMap::from([("slidding".to_owned(), require("heads"))]);
    let error = resolve(&config, &DeviceFacts::cpu(), &registry()).expect_err("no such kind").to_string();
    assert_eq!(
        error,
        "attention.backend_per_kind.slidding: the target has no layer kind of this name; it has: full, sliding"
    );
}

#[test]
fn every_choice_must_name_a_backend_there_is() {
    let check = |change: &dyn Fn(&mut EngineConfig), field: &str| {
        let mut config = speculative("apart");
        change(&mut config);
        let error = resolve(&config, &DeviceFacts::cpu(), &registry()).expect_err("unknown").to_string();
        let names = "unknown attention backend 'fast'; registered are: either, heads, tokens";
        assert_eq!(error, format!("{field}: {names}"));
    };
    let fast = || require("fast");
    check(
        &|config| drop(config.attention.backend_per_phase.insert(Phase::Decode, fast())),
        "attention.backend_per_phase.decode",
    );
    check(
        &|config| drop(config.attention.backend_per_kind.insert("full".into(), fast())),
        "attention.backend_per_kind.full",
    );
    check(
        &|config| {
            let section = config.speculative.as_mut().expect("a section");
            section.attention_backend_per_kind.insert("draft".into(), fast());
        },
        "speculative.attention_backend_per_kind.draft",
    );
    let mut config = engine(vec![layer("full")]);
    config.attention.backend_per_phase.insert(Phase::Draft, require("tokens"));
    let error = resolve(&config, &DeviceFacts::cpu(), &registry()).expect_err("not the target's").to_string();
    assert!(error.ends_with("the draft's backend is chosen by speculative.attention_backend"), "{error}");
}

#[test]
fn a_drafts_kinds_are_its_own() {
    let mut config = speculative("apart");
    config.attention.backend_per_kind = BTreeMap::from([("full".to_owned(), require("heads"))]);
    let section = config.speculative.as_mut().expect("a section");
    section.attention_backend_per_kind = BTreeMap::from([("draft".to_owned(), require("tokens"))]);
    let resolution = resolved(&config, &registry());
    assert_eq!(resolution.target[0].backend.name(), "heads");
    assert_eq!(resolution.draft[0].backend.name(), "tokens");
}
