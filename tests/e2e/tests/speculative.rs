//! Whatever drafts, the tokens are the target's; and draft and target run on the backends asked for.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::{ops::ControlFlow, path::PathBuf};

use polyattn_api::{BackendName, Registry, TargetFacts};
use polyattn_device::Device;
use polyattn_e2e::{assert_same_up_to_ties, devices, engine, greedy, margins, tests_folder};
use polyattn_engine::{Engine, EngineOptions, Happened, Request, Sampling, SpeculativeOptions, StopReason};
use polyattn_nn::load::ModelSource;
use serde_json::Value;

/// A prompt that repeats itself, so that prompt lookup has something to find.
const PROMPT: [u32; 18] = [5, 9, 17, 33, 5, 9, 17, 40, 41, 42, 5, 9, 17, 33, 70, 5, 9, 17];

fn tiny(family: &str) -> (ModelSource, Vec<f64>) {
    let folder = tests_folder("golden/tiny").join(family);
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(folder.join("golden.json")).unwrap()).unwrap();
    let margins = golden["greedy_margins"].as_array().unwrap().iter().map(|m| m.as_f64().unwrap()).collect();
    (ModelSource::open(&folder).unwrap(), margins)
}

/// Writes a random drafter for `source` in the released format.
fn drafter(source: &ModelSource, folder: &std::path::Path, sliding: bool) -> PathBuf {
    let model = &source.config;
    let facts = TargetFacts::new(model.layers, model.hidden_size, model.vocab_size, model.context_length);
    polyattn_dflash::tiny::write_random(&facts, folder, sliding).unwrap();
    folder.to_owned()
}

fn speculative(method: &str, model: Option<PathBuf>) -> SpeculativeOptions {
    SpeculativeOptions { method: method.into(), model, ..SpeculativeOptions::default() }
}

fn options(speculative: Option<SpeculativeOptions>) -> EngineOptions {
    EngineOptions::default().with_context(128).with_speculative(speculative)
}

#[test]
fn drafts_do_not_change_greedy_tokens() {
    let folder = tempfile::tempdir().unwrap();
    for family in ["llama", "qwen2", "qwen3"] {
        let (source, _) = tiny(family);
        let vocab = source.config.vocab_size as usize;
        let mut methods = vec![("ngram", None)];
        for sliding in [false, true] {
            let path = folder.path().join(format!("{family}-{sliding}"));
            methods.push(("dflash", Some(drafter(&source, &path, sliding))));
        }
        for device in devices() {
            let mut plain = engine(&source, &device, &options(None));
            let want = greedy(&mut plain, &PROMPT, 40).tokens;
            let margins = margins(&mut plain, &PROMPT, &want, vocab);
            for (method, model) in &methods {
                for width in [1, 3, 7] {
                    let mut wanted = speculative(method, model.clone());
                    wanted.num_speculative_tokens = Some(width);
                    let mut engine = engine(&source, &device, &options(Some(wanted)));
                    let got = greedy(&mut engine, &PROMPT, 40);
                    let name = format!("{family}, {method} {width}, {}", device.facts().name);
                    let compared = assert_same_up_to_ties(&got.tokens, &want, &margins, &name);
                    let acceptance = got.acceptance.unwrap();
                    eprintln!("{name}: {compared} tokens equal, {} steps, {acceptance:?}", got.steps);
                    assert!(acceptance.drafted > 0, "{name}: nothing was drafted");
                    assert_eq!(got.tokens.len() as u64, 1 + got.steps + acceptance.accepted, "{name}");
                }
            }
        }
    }
}

#[test]
fn drafts_do_not_change_sampled_tokens() {
    let (source, _) = tiny("qwen3");
    let folder = tempfile::tempdir().unwrap();
    let model = drafter(&source, folder.path(), false);
    let device = Device::cpu();
    let mut request = Request::new(PROMPT.to_vec(), 30);
    request.stop = Some(Vec::new());
    request.sampling = Sampling { temperature: 0.8, top_k: Some(20), top_p: 0.95, seed: 11, ..Sampling::default() };
    let run = |speculative| {
        let mut engine = engine(&source, &device, &options(speculative));
        engine.generate(&request, &mut |_| ControlFlow::Continue(())).unwrap().tokens
    };
    let plain = run(None);
    assert_eq!(run(Some(speculative("ngram", None))), plain);
    assert_eq!(run(Some(speculative("dflash", Some(model)))), plain);
}

#[test]
fn a_draft_runs_on_a_backend_of_its_own() {
    let (source, _) = tiny("qwen3");
    let folder = tempfile::tempdir().unwrap();
    let model = drafter(&source, folder.path(), false);
    for device in devices().into_iter().skip(1) {
        let mut asked = options(Some(speculative("dflash", Some(model.clone()))));
        asked.attention.backend = BackendName::parse("PLAIN").into();
        let mut mixed = engine(&source, &device, &asked);
        let got = greedy(&mut mixed, &PROMPT, 12);
        let ran = serde_json::to_value(&got.backends).unwrap();
        // Whether a pass had a single row, and was a decode, depends on what was accepted.
        let target = ran["target"].as_object().unwrap();
        assert!(target["prefill"] == "plain" && target.values().all(|name| name == "plain"), "{ran}");
        let draft = ran["draft"]["draft"].as_str().unwrap();
        assert!(["splitkv", "flash"].contains(&draft), "never the target's: {ran}");
        assert!(got.calls["plain"] > 0 && got.calls[draft] > 0);

        let mut causal = speculative("dflash", Some(model.clone()));
        causal.attention_backend = BackendName::parse("plain");
        let registry = Registry::global().unwrap();
        let error = Engine::load(&source, &device, registry, &options(Some(causal)), &mut |_| {}).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("backend 'plain' cannot serve draft draft layer 'full'"), "{error}");
        assert!(error.contains("non-causal attention not supported"), "{error}");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let (source, _) = tiny("qwen3");
    let (other, _) = tiny("qwen2");
    let folder = tempfile::tempdir().unwrap();
    let model = drafter(&source, folder.path(), false);
    let registry = Registry::global().unwrap();
    let load = |source: &ModelSource, speculative| {
        let outcome = Engine::load(source, &Device::cpu(), registry, &options(Some(speculative)), &mut |_| {});
        outcome.unwrap_err().to_string()
    };
    let error = load(&source, speculative("dflash", None));
    assert!(error.contains("needs a draft model"), "{error}");
    let error = load(&source, speculative("clairvoyance", None));
    assert!(error.contains("clairvoyance") && error.contains("registered are: combine, dflash, "), "{error}");
    let mut wide = speculative("dflash", Some(model.clone()));
    wide.num_speculative_tokens = Some(8);
    let error = load(&source, wide);
    assert!(error.contains("is 8") && error.contains("at most 7"), "{error}");
    if other.config.layers != source.config.layers || other.config.vocab_size != source.config.vocab_size {
        let error = load(&other, speculative("dflash", Some(model)));
        assert!(error.contains("does not fit the target"), "{error}");
    }
}

#[test]
fn requests_that_cannot_be_met_are_errors_and_free_their_pages() {
    let (source, _) = tiny("llama");
    let mut engine = engine(&source, &Device::cpu(), &EngineOptions::default().with_context(32));
    let mut run = |request: &Request| engine.generate(request, &mut |_| ControlFlow::Continue(()));
    let error = run(&Request::new(Vec::new(), 4)).unwrap_err().to_string();
    assert!(error.contains("no tokens"), "{error}");
    let error = run(&Request::new(vec![1], 0)).unwrap_err().to_string();
    assert!(error.contains("0 new tokens"), "{error}");
    let error = run(&Request::new(vec![1; 40], 4)).unwrap_err().to_string();
    assert!(error.contains("40 tokens") && error.contains("32"), "{error}");
    let error = run(&Request::new(vec![9999], 4)).unwrap_err().to_string();
    assert!(error.contains("9999"), "{error}");
    for _ in 0..20 {
        let mut long = Request::new(vec![1; 20], 100);
        long.stop = Some(Vec::new());
        let generation = run(&long).unwrap();
        assert_eq!((generation.stop, generation.tokens.len()), (StopReason::Context, 12));
    }
    let mut seen = 0;
    let stopped = engine
        .generate(&Request { stop: Some(Vec::new()), ..Request::new(vec![1; 4], 20) }, &mut |tokens| {
            seen += tokens.len();
            if seen >= 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })
        .unwrap();
    assert_eq!((stopped.stop, stopped.tokens.len()), (StopReason::Cancelled, 3));
}

#[test]
fn a_long_prompt_can_be_given_up() {
    let (source, _) = tiny("llama");
    let mut options = options(None);
    options.prefill_chunk = 8;
    let mut engine = engine(&source, &Device::cpu(), &options);
    let stopped = engine.generate(&Request::new(vec![1; 30], 4), &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!((stopped.stop, stopped.tokens.len(), stopped.steps), (StopReason::Cancelled, 0, 0));
    assert_eq!(stopped.calls["cpu"], u64::from(source.config.layers), "one chunk was run");
}

/// Prompts that fill no page wait for the first draft, which then runs all of them at once.
#[test]
fn a_draft_model_takes_many_short_prompts_at_once() {
    let (source, _) = tiny("qwen3");
    let own = tests_folder("golden/tiny/qwen3");
    let asked = EngineOptions::default()
        .with_context(64)
        .with_sequences(64)
        .with_speculative(Some(speculative("draft-model", Some(own))));
    let mut engine = engine(&source, &Device::cpu(), &asked);
    for number in 0..64 {
        let mut request = Request::new((0..15).map(|place| 3 + (number + place * place) % 40).collect(), 6);
        request.stop = Some(Vec::new());
        engine.add_request(request).unwrap();
    }
    let mut finished = 0;
    while !engine.is_idle() {
        for event in engine.step() {
            if let Happened::Finished(generation) = event.what {
                assert!(!generation.drafter_lost);
                assert!(generation.acceptance.unwrap().accepted > 0);
                finished += 1;
            }
        }
    }
    assert_eq!(finished, 64);
}
