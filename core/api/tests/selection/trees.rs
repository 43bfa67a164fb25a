//! Trees are a problem of their own, posed beside the chain's where one is asked for.

use polyattn_api::{Mask, Phase, Role, StrategyConfig, WindowConfig, resolve};

use crate::mocks::{big_gpu, registry, speculative};

fn with_tree(tree: &str) -> polyattn_api::EngineConfig {
    let mut config = speculative("chain");
    config.speculative.as_mut().expect("a speculative section").tree = Some(StrategyConfig::new(tree));
    config
}

#[test]
fn a_tree_is_verified_beside_chains() {
    let answer = resolve(&with_tree("top-k"), &polyattn_api::DeviceFacts::cpu(), &registry()).expect("served");
    let problems: Vec<_> = answer.target.iter().map(|layer| (layer.problem.phase, layer.problem.mask)).collect();
    let (causal, tree) = (Mask::Causal, Mask::Tree);
    let want = [(Phase::Prefill, causal), (Phase::Decode, causal), (Phase::Verify, causal), (Phase::Verify, tree)];
    assert_eq!(problems, want);
    let chain = answer.find(Role::Target, Phase::Verify, &answer.target[0].problem.layer).expect("the chain's");
    assert_eq!(chain.problem.mask, causal);
    let json = serde_json::to_value(&answer).expect("json");
    assert_eq!((&json["target"][3]["mask"], &json["target"][2]["mask"]), (&"tree".into(), &serde_json::Value::Null));
    // A chain needs no more than it always did.
    let plain = resolve(&with_tree("chain"), &big_gpu(), &registry()).expect("served");
    assert_eq!(plain.target.len(), 3);
}

#[test]
fn what_no_tree_can_stand_in_is_refused() {
    for alibi in [false, true] {
        let mut config = with_tree("best-first");
        config.model.layers[0].window = (!alibi).then_some(WindowConfig::Keys(16));
        config.model.layers[0].alibi = alibi;
        let error = resolve(&config, &polyattn_api::DeviceFacts::cpu(), &registry()).expect_err("refused").to_string();
        assert!(error.starts_with("speculative.tree: target layer '"), "{error}");
        assert!(error.contains(if alibi { "ALiBi" } else { "sliding window" }), "{error}");
    }
    // A backend without tree masks declines as for anything else that it does not serve.
    let error = resolve(&with_tree("top-k"), &big_gpu(), &registry()).expect_err("declined").to_string();
    assert!(error.contains("target verify layer") && error.contains("tree mask not supported"), "{error}");
}
