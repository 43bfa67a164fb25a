//! Drafters that see hidden states of their target, on tiny random targets: whatever they draft, in a chain or a tree,
//! for one request or several, the tokens are the target's.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use polyattn::{
    eagle::tiny as eagle,
    medusa::tiny as medusa,
    mtp::{Form, tiny as mtp},
};
use polyattn_api::{Registry, StrategyConfig, TargetFacts};
use polyattn_device::Device;
use polyattn_e2e::{assert_same_up_to_ties, devices, engine, greedy, margins, tests_folder};
use polyattn_engine::{Engine, EngineOptions, Happened, Request, SpeculativeOptions};
use polyattn_nn::load::{Checkpoint, ModelSource};

const PROMPT: [u32; 18] = [5, 9, 17, 33, 5, 9, 17, 40, 41, 42, 5, 9, 17, 33, 70, 5, 9, 17];

type Write = fn(&TargetFacts, &Path) -> io::Result<()>;

/// Methods, names of their checkpoints, and who writes these.
const METHODS: [(&str, &str, Write); 5] = [
    ("medusa", "medusa", medusa::write_random),
    ("eagle", "eagle", eagle::write_random),
    ("eagle3", "eagle3", eagle::write_random3),
    ("mtp", "mtp-deepseek", |target, folder| mtp::write_random(target, folder, Form::DeepSeek)),
    ("mtp", "mtp-qwen", |target, folder| mtp::write_random(target, folder, Form::Qwen)),
];

fn tiny(family: &str) -> (ModelSource, TargetFacts) {
    let folder = tests_folder("golden/tiny").join(family);
    let source = ModelSource::open(&folder).unwrap();
    let facts = facts(&source, &folder);
    (source, facts)
}

fn facts(source: &ModelSource, folder: &Path) -> TargetFacts {
    let model = &source.config;
    TargetFacts::new(model.layers, model.hidden_size, model.vocab_size, model.context_length).loaded_from(folder)
}

fn options(speculative: Option<SpeculativeOptions>) -> EngineOptions {
    EngineOptions::default().with_context(128).with_speculative(speculative)
}

fn drafting(method: &str, model: Option<PathBuf>, width: Option<u32>, tree: Option<&str>) -> SpeculativeOptions {
    SpeculativeOptions {
        method: method.into(),
        model,
        num_speculative_tokens: width,
        tree: tree.map(StrategyConfig::new),
        tree_nodes: tree.map(|_| 12),
        ..SpeculativeOptions::default()
    }
}

#[test]
fn greedy_tokens_are_the_targets() {
    let folder = tempfile::tempdir().unwrap();
    for family in ["llama", "qwen2", "qwen3"] {
        let (source, facts) = tiny(family);
        let vocab = source.config.vocab_size as usize;
        for device in devices() {
            let mut plain = engine(&source, &device, &options(None));
            let want = greedy(&mut plain, &PROMPT, 32).tokens;
            let margins = margins(&mut plain, &PROMPT, &want, vocab);
            for (method, name, write) in METHODS {
                let model = folder.path().join(format!("{family}-{name}"));
                write(&facts, &model).unwrap();
                for (width, tree) in [(Some(1), None), (Some(3), None), (None, None), (Some(3), Some("top-k"))] {
                    let wanted = drafting(method, Some(model.clone()), width, tree);
                    let mut engine = engine(&source, &device, &options(Some(wanted)));
                    let got = greedy(&mut engine, &PROMPT, 32);
                    let what = format!("{family}, {name} {width:?} {tree:?}, {}", device.facts().name);
                    let compared = assert_same_up_to_ties(&got.tokens, &want, &margins, &what);
                    let acceptance = got.acceptance.unwrap();
                    eprintln!("{what}: {compared} tokens equal, {} steps, {acceptance:?}", got.steps);
                    assert!(acceptance.drafted > 0, "{what}: nothing was drafted");
                }
            }
        }
    }
}

/// On a target that counts, by drafters that know how: whole drafts are accepted, in chains and in trees, by every
/// request of a batch.
#[test]
fn drafters_that_know_the_target_are_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("target");
    fs::create_dir(&target).unwrap();
    polyattn_conformance::write_counting_target(&target).unwrap();
    let source = ModelSource::open(&target).unwrap();
    let facts = facts(&source, &target);
    let methods: [(&str, &str, Write); 5] = [
        ("medusa", "medusa", medusa::write_counting),
        ("eagle", "eagle", eagle::write_counting),
        ("eagle3", "eagle3", eagle::write_counting3),
        ("mtp", "mtp-deepseek", |target, folder| mtp::write_counting(target, folder, Form::DeepSeek)),
        ("mtp", "mtp-qwen", |target, folder| mtp::write_counting(target, folder, Form::Qwen)),
    ];
    for device in devices() {
        for (method, name, write) in methods {
            let model = folder.path().join(name);
            write(&facts, &model).unwrap();
            for tree in [None, Some("top-k"), Some("best-first")] {
                let options = options(Some(drafting(method, Some(model.clone()), Some(3), tree))).with_sequences(3);
                let mut engine = engine(&source, &device, &options);
                for first in [30, 57, 100] {
                    let prompt = (first..first + 5 + first / 20).map(|id| 27 * (first / 27) + id % 27).collect();
                    let mut request = Request::new(prompt, 40);
                    request.stop = Some(Vec::new());
                    let _ = engine.add_request(request).unwrap();
                }
                let what = format!("{name} {tree:?}, {}", device.facts().name);
                let mut done = 0;
                while !engine.is_idle() {
                    for event in engine.step() {
                        match event.what {
                            Happened::Finished(generation) => {
                                assert!(generation.tokens.windows(2).all(|two| two[1] % 27 == (two[0] + 1) % 27));
                                let acceptance = generation.acceptance.unwrap();
                                let mean = 1.0 + acceptance.accepted as f64 / acceptance.drafted_steps as f64;
                                eprintln!("{what}: {mean:.2} tokens a step");
                                // An EAGLE-3 drafter here lacks one id of a circle.
                                let floor = if method == "eagle3" { 3.2 } else { 3.8 };
                                assert!(mean >= floor, "{what}: {mean} tokens a step");
                                done += 1;
                            }
                            Happened::Failed(error) => panic!("{what}: {error}"),
                            _ => {}
                        }
                    }
                }
                assert_eq!(done, 3, "{what}");
            }
        }
    }
}

#[test]
fn requests_of_unequal_lengths_do_not_mix() {
    let folder = tempfile::tempdir().unwrap();
    let (source, facts) = tiny("qwen3");
    let vocab = source.config.vocab_size as usize;
    let prompts: Vec<Vec<u32>> = [18, 5, 11, 2].map(|length| PROMPT[18 - length..].to_vec()).into();
    for device in devices() {
        let mut plain = engine(&source, &device, &options(None));
        let wanted: Vec<Vec<u32>> = prompts.iter().map(|prompt| greedy(&mut plain, prompt, 20).tokens).collect();
        for (method, name, write) in METHODS {
            for tree in [None, Some("top-k")] {
                let model = folder.path().join(name);
                write(&facts, &model).unwrap();
                let options = options(Some(drafting(method, Some(model), None, tree))).with_sequences(4);
                let mut engine = engine(&source, &device, &options);
                let mut places = BTreeMap::new();
                for (place, prompt) in prompts.iter().enumerate() {
                    let mut request = Request::new(prompt.clone(), 20);
                    request.stop = Some(Vec::new());
                    places.insert(engine.add_request(request).unwrap(), place);
                }
                let mut done = 0;
                while !engine.is_idle() {
                    for event in engine.step() {
                        match event.what {
                            Happened::Finished(generation) => {
                                let place = places[&event.request];
                                let margins = margins(&mut plain, &prompts[place], &wanted[place], vocab);
                                let what = format!("{name} {tree:?}, request {place}, {}", device.facts().name);
                                assert_same_up_to_ties(&generation.tokens, &wanted[place], &margins, &what);
                                assert!(generation.acceptance.unwrap().drafted > 0, "{what}: nothing was drafted");
                                done += 1;
                            }
                            Happened::Failed(error) => panic!("{name}: {error}"),
                            _ => {}
                        }
                    }
                }
                assert_eq!(done, prompts.len(), "{name}");
            }
        }
    }
}

/// A target's folder with the tensors of a layer for multi-token prediction in a shard of its own.
#[test]
fn a_layer_in_the_targets_checkpoint_is_found() {
    for form in [Form::DeepSeek, Form::Qwen] {
        let folder = tempfile::tempdir().unwrap();
        let (_, facts_of) = tiny("qwen3");
        let target = facts_of.checkpoint.clone().unwrap();
        mtp::write_random(&facts_of, &folder.path().join("layer"), form).unwrap();
        let whole = folder.path().join("whole");
        fs::create_dir(&whole).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(target.join(name), whole.join(name)).unwrap();
        }
        let layer = folder.path().join("layer");
        fs::copy(layer.join("config.json"), whole.join("config.json")).unwrap();
        let mut map = serde_json::Map::new();
        for (from, shard) in [(&target, "model-1.safetensors"), (&layer, "model-2.safetensors")] {
            fs::copy(from.join("model.safetensors"), whole.join(shard)).unwrap();
            let names = Checkpoint::open(&whole.join(shard)).unwrap();
            map.extend(names.names().into_iter().map(|name| (name.to_owned(), shard.into())));
        }
        let index = serde_json::json!({ "weight_map": map });
        fs::write(whole.join("model.safetensors.index.json"), index.to_string()).unwrap();
        let source = ModelSource::open(&whole).unwrap();
        let device = Device::cpu();
        let want = greedy(&mut engine(&source, &device, &options(None)), &PROMPT, 16).tokens;
        let mut drafted = engine(&source, &device, &options(Some(drafting("mtp", None, None, None))));
        let got = greedy(&mut drafted, &PROMPT, 16);
        assert_eq!(got.tokens, want);
        assert!(got.acceptance.unwrap().drafted > 0);
        assert_eq!(serde_json::to_value(&got.backends).unwrap()["draft"]["draft"], "cpu");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (source, facts) = tiny("qwen3");
    let registry = Registry::global().unwrap();
    let refused = |speculative| {
        let loaded = Engine::load(&source, &Device::cpu(), registry, &options(Some(speculative)), &mut |_| {});
        loaded.unwrap_err().to_string()
    };
    let TargetFacts { layers, hidden_size, vocab_size, context_length, .. } = facts;
    let wide = TargetFacts::new(layers, 2 * hidden_size, vocab_size, context_length);
    let short = TargetFacts::new(layers, hidden_size, vocab_size - 1, context_length);
    let written = |name: &str, write: Write, facts: &TargetFacts| {
        let model = folder.path().join(name);
        write(facts, &model).unwrap();
        Some(model)
    };
    for (method, name, write) in &METHODS[..3] {
        let error = refused(drafting(method, written(&format!("{name}-wide"), *write, &wide), None, None));
        let numbers = format!("hidden_size is {}, the target's is {hidden_size}", 2 * hidden_size);
        assert!(error.contains(&numbers), "{name}: {error}");
        let error = refused(drafting(method, written(&format!("{name}-short"), *write, &short), None, None));
        let numbers = format!("vocab_size is {}, the target's is {vocab_size}", vocab_size - 1);
        assert!(error.contains(&numbers), "{name}: {error}");
        let error = refused(drafting(method, None, None, None));
        assert!(error.contains("needs a draft model"), "{name}: {error}");
        let error = refused(drafting(method, written(name, *write, &facts), Some(17), None));
        assert!(error.contains("is 17") && error.contains("at most"), "{name}: {error}");
    }
    let eagle3 = written("eagle3", METHODS[2].2, &facts);
    let error = refused(drafting("eagle", eagle3, None, None));
    assert!(error.contains("EAGLE-3 checkpoint"), "{error}");
    let error = refused(drafting("eagle3", written("eagle", METHODS[1].2, &facts), None, None));
    assert!(error.contains("eagle_aux_hidden_state_layer_ids is missing"), "{error}");
    let error = refused(drafting("mtp", None, None, None));
    assert!(error.contains("neither num_nextn_predict_layers nor mtp_num_hidden_layers"), "{error}");
    let several = written("mtp-deepseek", METHODS[3].2, &facts).unwrap();
    let config = fs::read_to_string(several.join("config.json")).unwrap();
    let config = config.replace("\"num_nextn_predict_layers\":1", "\"num_nextn_predict_layers\":2");
    fs::write(several.join("config.json"), config).unwrap();
    let error = refused(drafting("mtp", Some(several), None, None));
    assert!(error.contains("num_nextn_predict_layers is 2, only 1 is supported"), "{error}");
}
