//! The draft is selected on its own (the rules of vLLM PR #39930, with `use_non_causal` reset).

use polyattn_api::{
    BackendChoice, BackendName, DType, DeviceFacts, EngineConfig, LayerConfig, Mask, ModelConfig, Phase, Resolution,
    Role, SpeculativeConfig, WindowConfig, default_draft_config, resolve,
};

use crate::mocks::{bare_gpu, big_gpu, engine, latent_layer, layer, registry, speculative};

fn name(text: &str) -> BackendName {
    BackendName::parse(text).expect("a name")
}

fn section(config: &mut EngineConfig) -> &mut SpeculativeConfig {
    config.speculative.as_mut().expect("a speculative section")
}

fn backends(layers: &[polyattn_api::ResolvedLayer]) -> Vec<&'static str> {
    layers.iter().map(|layer| layer.backend.name()).collect()
}

fn resolved(config: &EngineConfig) -> Resolution {
    resolve(config, &big_gpu(), &registry()).expect("served")
}

#[test]
fn four_combinations_of_target_and_draft_backend() {
    for method in ["block", "chain"] {
        for (target, draft) in
            [(None, None), (Some("causal"), None), (None, Some("wide")), (Some("causal"), Some("wide"))]
        {
            let mut config = speculative(method);
            config.attention.backend = target.map(name).into();
            section(&mut config).attention_backend = draft.map(name);
            let before = config.clone();
            let answer = resolved(&config);
            assert_eq!(config, before, "the target's configuration is left alone");

            assert_eq!(backends(&answer.target), ["causal"; 3], "{method} {target:?} {draft:?}");
            let policy = if target.is_some() { "require" } else { "auto" };
            assert!(answer.target.iter().all(|layer| layer.policy.name() == policy));

            let automatic = if method == "block" { "wide" } else { "causal" };
            assert_eq!(backends(&answer.draft), [draft.unwrap_or(automatic)], "{method} {target:?} {draft:?}");
            assert_eq!(answer.draft[0].policy.name(), if draft.is_some() { "require" } else { "auto" });

            let draft_config = answer.draft_config.expect("there is a draft");
            assert_eq!(draft_config.attention.backend, draft.map(name).into(), "never the target's");
        }
    }
}

#[test]
fn the_targets_backend_is_never_carried_over() {
    // An MLA target with a GQA draft: the target's backend could not serve the draft.
    let mut config = speculative("block");
    config.model.layers = vec![latent_layer("latent")];
    config.attention.backend = BackendChoice::Require(name("reference"));
    let answer = resolve(&config, &DeviceFacts::cpu(), &registry()).expect("served");
    assert_eq!(backends(&answer.target), ["reference"; 3]);
    assert_eq!(answer.draft[0].policy.name(), "auto");
    assert_eq!(answer.draft_config.expect("a draft").attention.backend, BackendChoice::Auto);

    config.attention.backend = BackendChoice::Prefer(name("reference"));
    assert_eq!(default_draft_config(&config).attention.backend, BackendChoice::Auto, "nor a preference");
}

#[test]
fn an_explicit_causal_draft_backend_refuses_a_non_causal_draft() {
    let mut config = speculative("block");
    section(&mut config).attention_backend = Some(name("causal"));
    let error = resolve(&config, &big_gpu(), &registry()).expect_err("must not fall back").to_string();
    assert_eq!(error, "backend 'causal' cannot serve draft draft layer 'draft': non-causal attention not supported");
    // The same choice is right for a causal draft.
    let mut config = speculative("chain");
    section(&mut config).attention_backend = Some(name("causal"));
    assert_eq!(backends(&resolved(&config).draft), ["causal"]);
}

#[test]
fn nobody_for_the_draft_lists_everybody() {
    let error = resolve(&speculative("block"), &bare_gpu(), &registry()).expect_err("wide needs features").to_string();
    assert!(error.starts_with("no attention backend can serve draft draft layer 'draft': "), "{error}");
    for backend in ["latent: ", "causal: non-causal attention not supported", "wide: needs feature shader-f16"] {
        assert!(error.contains(backend), "{error}");
    }
}

#[test]
fn only_who_asks_gets_non_causal_attention() {
    for (method, non_causal) in [("block", true), ("chain", false)] {
        let answer = resolved(&speculative(method));
        assert_eq!(answer.draft[0].use_non_causal(), non_causal, "{method}");
        assert_eq!(answer.draft_config.expect("a draft").attention.use_non_causal, non_causal, "{method}");
        assert!(answer.target.iter().all(|layer| !layer.use_non_causal()), "{method} leaks into the target");
    }
    let answer = resolved(&speculative("lookup"));
    assert!(answer.draft.is_empty());
    assert!(!answer.draft_config.expect("there is a draft section").attention.use_non_causal);
}

#[test]
fn the_targets_non_causal_flag_is_not_taken_over() {
    let mut config = speculative("chain");
    config.attention.use_non_causal = true;
    let answer = resolved(&config);
    assert_eq!(backends(&answer.target), ["wide"; 3]);
    assert!(answer.target.iter().all(polyattn_api::ResolvedLayer::use_non_causal));
    assert_eq!(backends(&answer.draft), ["causal"]);
    assert!(!answer.draft_config.expect("a draft").attention.use_non_causal);
}

#[test]
fn the_hook_changes_nothing_but_what_it_asks_for() {
    let mut config = speculative("block");
    config.attention.backend = BackendChoice::Require(name("causal"));
    config.kernel.moe_backend = Some("grouped".into());
    config.kv_cache.page_size = Some(16);
    section(&mut config).attention_backend = Some(name("wide"));
    let registry = registry();
    let hook = |method: &str| registry.proposer(method).expect("registered").proposer.draft_config(&config);
    let mut asked = hook("block");
    assert!(asked.attention.use_non_causal);
    asked.attention.use_non_causal = false;
    assert_eq!(asked, default_draft_config(&config));
    for method in ["lookup", "chain", "forgetful"] {
        assert_eq!(hook(method), default_draft_config(&config), "{method}");
    }
    assert_eq!(asked.kv_cache, config.kv_cache, "the cache's configuration is the target's");
    assert!(asked.speculative.is_none(), "a draft has no draft");
    assert_eq!(asked.model, section(&mut config.clone()).draft.clone().expect("a draft model"));
}

#[test]
fn the_moe_backend_is_the_targets_unless_set() {
    let cases = [
        (None, None, None),
        (Some("grouped"), None, Some("grouped")),
        (None, Some("dense"), Some("dense")),
        (Some("grouped"), Some("dense"), Some("dense")),
    ];
    for (target, own, wanted) in cases {
        for attention in [None, Some("wide")] {
            let mut config = speculative("block");
            config.kernel.moe_backend = target.map(str::to_owned);
            section(&mut config).moe_backend = own.map(str::to_owned);
            section(&mut config).attention_backend = attention.map(name);
            let before = config.clone();
            let draft = resolved(&config).draft_config.expect("a draft");
            assert_eq!(draft.kernel.moe_backend.as_deref(), wanted);
            assert_eq!(
                draft.attention.backend,
                attention.map(name).into(),
                "the two overrides do not disturb each other"
            );
            assert_eq!(config, before);
        }
    }
}

#[test]
fn causality_is_per_layer() {
    let mut config = speculative("mixed");
    section(&mut config).draft = Some(ModelConfig { dtype: DType::F16, layers: vec![layer("sliding"), layer("full")] });
    let answer = resolved(&config);
    assert_eq!(backends(&answer.draft), ["causal", "wide"]);
    assert_eq!([answer.draft[0].use_non_causal(), answer.draft[1].use_non_causal()], [false, true]);

    // The other way round: a layer that says causal under a configuration that says it is not.
    let mut config = speculative("block");
    let own = section(&mut config);
    let causal = LayerConfig { causal: Some(true), ..layer("causal") };
    own.draft = Some(ModelConfig { dtype: DType::F16, layers: vec![causal, layer("full")] });
    let answer = resolved(&config);
    assert_eq!(backends(&answer.draft), ["causal", "wide"]);
    assert_eq!(answer.find(Role::Draft, Phase::Draft, "causal").expect("there").problem.mask, Mask::Causal);
}

#[test]
fn a_proposer_that_needs_non_causal_must_ask_for_it() {
    let error = resolve(&speculative("forgetful"), &big_gpu(), &registry()).expect_err("refused").to_string();
    assert!(error.contains("speculative.method") && error.contains("'forgetful' requires non-causal"), "{error}");
}

#[test]
fn a_draft_is_required_only_where_attention_is_run() {
    let mut config = speculative("block");
    section(&mut config).draft = None;
    let error = resolve(&config, &big_gpu(), &registry()).expect_err("nothing to resolve").to_string();
    assert!(error.starts_with("speculative.draft: missing") && error.contains("'block'"), "{error}");

    let mut config = speculative("lookup");
    section(&mut config).draft = None;
    let answer = resolved(&config);
    assert!(answer.draft.is_empty() && answer.target.len() == 3);
}

#[test]
fn unknown_names_say_which_field_asked() {
    let text = |config: &EngineConfig| resolve(config, &big_gpu(), &registry()).expect_err("unknown").to_string();
    for method in ["block", "lookup"] {
        let mut config = speculative(method);
        section(&mut config).attention_backend = Some(name("Flush"));
        assert_eq!(
            text(&config),
            "speculative.attention_backend: unknown attention backend 'flush'; registered are: causal, cpu-causal, \
             latent, reference, wide"
        );
    }
    for choice in [BackendChoice::Require(name("flush")), BackendChoice::Prefer(name("flush"))] {
        let mut config = speculative("lookup");
        config.attention.backend = choice;
        assert!(text(&config).starts_with("attention.backend: unknown attention backend 'flush'; registered are: "));
    }
    assert_eq!(
        text(&speculative("eagle9")),
        "speculative.method: unknown proposer 'eagle9'; registered are: block, chain, forgetful, lookup, mixed"
    );
    assert_eq!(backends(&resolved(&speculative("BLOCK")).draft), ["wide"], "a proposer's name in any case");
}

#[test]
fn phases_of_the_target_follow_the_speculative_section() {
    let phases =
        |config: &EngineConfig| resolved(config).target.iter().map(|layer| layer.problem.phase).collect::<Vec<_>>();
    assert_eq!(phases(&engine(vec![layer("full")])), [Phase::Prefill, Phase::Decode]);
    assert_eq!(phases(&speculative("lookup")), [Phase::Prefill, Phase::Decode, Phase::Verify]);
    let answer = resolved(&speculative("block"));
    assert!(answer.draft.iter().all(|layer| layer.problem.phase == Phase::Draft && layer.problem.role == Role::Draft));
}

#[test]
fn the_answer_tells_the_layouts() {
    let json = |config: &EngineConfig, device: &DeviceFacts| {
        serde_json::to_value(resolve(config, device, &registry()).expect("served")).expect("plain data")
    };
    let cpu = DeviceFacts::cpu();
    let both = json(&speculative("block"), &big_gpu());
    assert_eq!(both["kv_layout"]["target"], "page-token-head");
    assert_eq!(both["kv_layout"]["draft"], "page-token-head");
    assert_eq!(both["kv_layout"]["shared"], true);

    for config in [speculative("lookup"), engine(vec![layer("full")])] {
        let none = json(&config, &big_gpu());
        assert_eq!(none["draft"], serde_json::json!([]));
        assert!(none["kv_layout"]["draft"].is_null() && none["kv_layout"]["shared"].is_null());
    }

    let mut config = speculative("block");
    config.model.layers = vec![latent_layer("latent")];
    let apart = json(&config, &cpu);
    assert_eq!(apart["kv_layout"]["target"], "page-token-latent");
    assert_eq!(apart["kv_layout"]["shared"], false);

    config.model.layers = vec![layer("full"), latent_layer("latent")];
    assert_eq!(json(&config, &cpu)["kv_layout"]["shared"], false, "one of the target's kinds lies differently");
}

#[test]
fn the_answer_has_the_promised_shape() {
    let mut config = speculative("block");
    config.kernel.moe_backend = Some("grouped".into());
    let answer = serde_json::to_value(resolved(&config)).expect("plain data");
    assert_eq!(
        answer["target"][0],
        serde_json::json!({
            "layer": "full", "phase": "prefill", "backend": "causal", "policy": "auto", "use_non_causal": false,
            "declined": [
                { "backend": "latent", "reasons": ["GQA not supported"] },
                { "backend": "wide", "reasons": [] },
                { "backend": "reference", "reasons": ["needs the CPU device"] },
                { "backend": "cpu-causal", "reasons": ["needs the CPU device"] },
            ],
        })
    );
    assert_eq!(answer["target"].as_array().map(Vec::len), Some(3));
    assert_eq!(answer["draft"][0]["phase"], "draft");
    assert_eq!(answer["draft"][0]["use_non_causal"], true);
    assert_eq!(
        answer["draft_config"],
        serde_json::json!({
            "attention": { "backend": null, "use_non_causal": true }, "kernel": { "moe_backend": "grouped" },
        })
    );
    let plain = serde_json::to_value(resolved(&engine(vec![layer("full")]))).expect("plain data");
    assert!(plain["draft_config"].is_null());
}

#[test]
fn a_window_of_the_draft_goes_by_the_drafts_causality() {
    let mut config = speculative("block");
    let windowed = LayerConfig { window: Some(WindowConfig::Keys(8)), ..layer("sliding") };
    config.model.layers = vec![windowed.clone()];
    section(&mut config).draft = Some(ModelConfig { dtype: DType::F16, layers: vec![windowed] });
    let answer = resolved(&config);
    let sides = |layers: &[polyattn_api::ResolvedLayer]| {
        let window = layers[0].problem.window.expect("a window");
        (window.left, window.right)
    };
    assert_eq!(sides(&answer.target), (Some(7), Some(0)));
    assert_eq!(sides(&answer.draft), (Some(7), Some(7)));
}
