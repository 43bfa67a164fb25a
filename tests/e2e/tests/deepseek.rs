//! DeepSeek-V2-style targets: latent attention, dense and with experts, alone and under a drafter of grouped-query
//! attention, which is the case this project was born from.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::path::Path;

use polyattn_api::{AttentionKind, AttentionProblem, DType, Policy, Registry, Role, TargetFacts, select};
use polyattn_device::Device;
use polyattn_e2e::{Margin, assert_same_up_to_ties, devices, engine, greedy, margins, tests_folder};
use polyattn_engine::{Engine, EngineOptions, SpeculativeOptions};
use polyattn_nn::load::{Architecture, ModelSource, tiny::TinyModel};
use serde_json::Value;

/// A prompt that repeats itself, so that prompt lookup has something to find.
const PROMPT: [u32; 18] = [5, 9, 17, 33, 5, 9, 17, 40, 41, 42, 5, 9, 17, 33, 70, 5, 9, 17];

/// The devices on which a registered backend serves latent attention; says which do not.
fn latent_devices() -> Vec<Device> {
    let kind = AttentionKind::Mla { query_heads: 4, latent_dim: 32, rope_dim: 8 };
    let problem = AttentionProblem::new(kind, DType::F32).page_size(16);
    let registry = Registry::global().unwrap();
    devices()
        .into_iter()
        .filter(|device| match select(&problem, device.facts(), registry, &Policy::Auto) {
            Ok(_) => true,
            Err(error) => {
                assert!(!device.is_cpu(), "the CPU serves everything: {error}");
                eprintln!("skipped on {}: {error}", device.facts().name);
                false
            }
        })
        .collect()
}

fn tiny(experts: bool, folder: &Path) -> ModelSource {
    TinyModel::deepseek(experts).write_hf_folder(folder).unwrap();
    ModelSource::open(folder).unwrap()
}

fn options(speculative: Option<SpeculativeOptions>) -> EngineOptions {
    EngineOptions::default().with_context(128).with_speculative(speculative)
}

fn with_moe(name: &str, speculative: Option<SpeculativeOptions>) -> EngineOptions {
    let mut options = options(speculative);
    options.kernel.moe_backend = Some(name.into());
    options
}

/// Logits and tokens of models that an independent implementation computed without absorbing anything
/// (`tests/golden/make_tiny.py`).
#[test]
fn golden_models() {
    for (family, tolerance) in [("deepseek", 1e-3), ("deepseek-moe", 0.03), ("deepseek-moe-normed", 0.03)] {
        let folder = tests_folder("golden/tiny").join(family);
        let source = ModelSource::open(&folder).unwrap();
        let golden: Value =
            serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap();
        let integers = |value: &Value| -> Vec<u32> {
            value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let floats = |value: &Value| -> Vec<f64> {
            value.as_array().unwrap().iter().map(|logit| logit.as_f64().unwrap()).collect()
        };
        let (ids, want) = (integers(&golden["ids"]), integers(&golden["greedy"]));
        let vocab = source.config.vocab_size as usize;
        for device in latent_devices() {
            for moe in ["dense", "grouped"].iter().take(if source.config.experts.is_some() { 2 } else { 1 }) {
                let name = format!("{family}, {moe}, {}", device.facts().name);
                let mut engine = engine(&source, &device, &with_moe(moe, None));
                let logits = engine.score(&ids).unwrap();
                let mut worst: f64 = 0.0;
                for (row, logits) in logits.chunks(vocab).enumerate() {
                    for (id, want) in integers(&golden["top5_ids"][row]).iter().zip(floats(&golden["top5_logits"][row]))
                    {
                        let error = (f64::from(logits[*id as usize]) - want).abs();
                        worst = worst.max(error);
                        assert!(error <= tolerance, "{name}: logit {id} of row {row} is off by {error}");
                    }
                }
                let got = greedy(&mut engine, &ids, want.len());
                let margins = Margin::of_gaps(&floats(&golden["greedy_margins"]), 2.0 * tolerance);
                let compared = assert_same_up_to_ties(&got.tokens, &want, &margins, &name);
                eprintln!("{name}: logits within {worst:.1e}, {compared} greedy tokens equal");
            }
        }
    }
}

/// The whole case: a target of latent attention and experts, a non-causal drafter of grouped-query attention.
#[test]
fn a_drafter_of_another_attention_changes_no_token() {
    let folder = tempfile::tempdir().unwrap();
    for experts in [false, true] {
        let model = folder.path().join(format!("target-{experts}"));
        std::fs::create_dir(&model).unwrap();
        let source = tiny(experts, &model);
        let config = &source.config;
        let vocab = config.vocab_size as usize;
        let facts = TargetFacts::new(config.layers, config.hidden_size, config.vocab_size, config.context_length);
        let drafter = folder.path().join(format!("drafter-{experts}"));
        polyattn_dflash::tiny::write_random(&facts, &drafter, true).unwrap();
        for device in latent_devices() {
            let mut plain = engine(&source, &device, &options(None));
            let want = greedy(&mut plain, &PROMPT, 40).tokens;
            let margins = margins(&mut plain, &PROMPT, &want, vocab);
            for moe in ["dense", "grouped"].iter().take(if experts { 2 } else { 1 }) {
                for (method, model, width) in
                    [("dflash", Some(&drafter), 3), ("dflash", Some(&drafter), 7), ("ngram", None, 4)]
                {
                    let speculative = SpeculativeOptions {
                        method: method.into(),
                        model: model.cloned(),
                        num_speculative_tokens: Some(width),
                        ..SpeculativeOptions::default()
                    };
                    let mut engine = engine(&source, &device, &with_moe(moe, Some(speculative)));
                    let got = greedy(&mut engine, &PROMPT, 40);
                    let name = format!("experts {experts}, {moe}, {method} {width}, {}", device.facts().name);
                    let compared = assert_same_up_to_ties(&got.tokens, &want, &margins, &name);
                    let acceptance = got.acceptance.unwrap();
                    eprintln!("{name}: {compared} tokens equal, {acceptance:?}, {:?}", got.backends);
                    assert!(acceptance.drafted > 0, "{name}: nothing was drafted");

                    // Target and draft ran on backends that serve their attention, each its own.
                    let (target, drafts): (_, &[&str]) =
                        if device.is_cpu() { ("cpu", &["cpu"]) } else { ("mla", &["splitkv", "flash"]) };
                    let ran = serde_json::to_value(&got.backends).unwrap();
                    assert_eq!(ran["target"]["prefill"], target, "{name}");
                    assert_eq!(ran["target"]["verify"], target, "{name}");
                    let draft = ran["draft"]["draft"].as_str();
                    assert!(draft.map_or(method != "dflash", |draft| drafts.contains(&draft)), "{name}: {ran}");
                    let served: Vec<_> = engine.resolution().moe.iter().map(|moe| moe.backend.name()).collect();
                    assert_eq!(served, if experts { vec![*moe] } else { vec![] }, "{name}");
                }
            }
        }
    }
}

/// Any model drafts: one of latent attention and experts for itself and for a target of grouped-query attention, with its
/// own kernels for both.
#[test]
fn a_draft_model_with_experts_changes_no_token() {
    let folder = tempfile::tempdir().unwrap();
    let draft = folder.path().join("draft");
    let other = folder.path().join("other");
    for path in [&draft, &other] {
        std::fs::create_dir(path).unwrap();
    }
    let itself = tiny(true, &draft);
    TinyModel::new(Architecture::Llama).write_hf_folder(&other).unwrap();
    let other = ModelSource::open(&other).unwrap();
    for device in latent_devices() {
        for (target, name) in [(&itself, "itself"), (&other, "another")] {
            let vocab = target.config.vocab_size as usize;
            let mut plain = engine(target, &device, &options(None));
            let want = greedy(&mut plain, &PROMPT, 40).tokens;
            let margins = margins(&mut plain, &PROMPT, &want, vocab);
            for moe in ["dense", "grouped"] {
                let speculative = SpeculativeOptions {
                    method: "draft-model".into(),
                    model: Some(draft.clone()),
                    num_speculative_tokens: Some(3),
                    moe_backend: Some(moe.into()),
                    ..SpeculativeOptions::default()
                };
                let mut engine = engine(target, &device, &options(Some(speculative)));
                let got = greedy(&mut engine, &PROMPT, 40);
                let name = format!("draft model for {name}, {moe}, {}", device.facts().name);
                let compared = assert_same_up_to_ties(&got.tokens, &want, &margins, &name);
                let acceptance = got.acceptance.unwrap();
                eprintln!("{name}: {compared} tokens equal, {acceptance:?}");
                let served: Vec<_> = engine.resolution().moe_of(Role::Draft).map(|moe| moe.backend.name()).collect();
                assert_eq!(served, [moe], "{name}");
                let ran = serde_json::to_value(&got.backends).unwrap();
                assert_eq!(ran["draft"]["draft"], if device.is_cpu() { "cpu" } else { "mla" }, "{name}");
                // What a model drafts for itself is accepted but where two logits tie; another's hardly ever is.
                if std::ptr::eq(target, &itself) {
                    assert!(acceptance.accepted * 10 >= acceptance.drafted * 9, "{name}: {acceptance:?}");
                }
            }
        }
    }
}

#[test]
fn the_moe_backend_is_chosen_by_name_where_there_are_experts() {
    let folder = tempfile::tempdir().unwrap();
    let (dense_folder, experts_folder) = (folder.path().join("dense"), folder.path().join("experts"));
    for path in [&dense_folder, &experts_folder] {
        std::fs::create_dir(path).unwrap();
    }
    let (dense, experts) = (tiny(false, &dense_folder), tiny(true, &experts_folder));
    let (device, registry) = (Device::cpu(), Registry::global().unwrap());
    let load =
        |source: &ModelSource, options: &EngineOptions| Engine::load(source, &device, registry, options, &mut |_| {});
    let served = |engine: &Engine, role| engine.resolution().moe_of(role).next().map(|moe| moe.backend.name());

    let automatic = load(&experts, &options(None)).unwrap();
    assert_eq!(served(&automatic, Role::Target), Some("grouped"));
    let named = load(&experts, &with_moe("DENSE", None)).unwrap();
    assert_eq!(served(&named, Role::Target), Some("dense"));
    let error = load(&experts, &with_moe("abacus", None)).unwrap_err().to_string();
    assert!(error.contains("unknown MoE backend 'abacus'; registered are: dense, grouped"), "{error}");
    // A model without experts asks nobody, whatever the name.
    assert!(load(&dense, &with_moe("abacus", None)).unwrap().resolution().moe.is_empty());

    // The draft's replaces the target's where it is set, and is the target's where it is not.
    for (own, wanted) in [(Some("grouped"), "grouped"), (None, "dense")] {
        let speculative = SpeculativeOptions {
            method: "ngram".into(),
            moe_backend: own.map(str::to_owned),
            ..SpeculativeOptions::default()
        };
        let engine = load(&experts, &with_moe("dense", Some(speculative))).unwrap();
        let draft = engine.resolution().draft_config.as_ref().unwrap();
        assert_eq!(draft.kernel.moe_backend.as_deref(), Some(wanted));
        assert_eq!(served(&engine, Role::Target), Some("dense"));
        // Prompt lookup has no model, so none with experts.
        assert_eq!(served(&engine, Role::Draft), None);
    }
}
