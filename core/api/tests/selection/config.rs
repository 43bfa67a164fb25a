//! Configurations as they are written.

use polyattn_api::{
    BackendChoice, BackendName, DType, DeviceFacts, EngineConfig, KvDType, Phase, Role, WindowConfig, resolve,
};
use serde_json::{Value, json};

use crate::mocks::{big_gpu, registry};

/// The smallest configuration, with `patch` merged into it.
fn written(patch: Value) -> Value {
    let mut base = json!({
        "target": { "dtype": "f16", "layers": [
            { "name": "full", "kind": "gqa", "query_heads": 16, "kv_heads": 8, "head_dim": 128 } ] }
    });
    merge(&mut base, patch);
    base
}

fn merge(base: &mut Value, patch: Value) {
    match (base, patch) {
        (Value::Object(base), Value::Object(patch)) => {
            for (key, value) in patch {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, patch) => *base = patch,
    }
}

/// The smallest configuration, with `patch` merged into its only layer.
fn with_layer(patch: Value) -> Value {
    let mut config = written(json!({}));
    merge(&mut config["target"]["layers"][0], patch);
    config
}

fn read(value: Value) -> Result<EngineConfig, String> {
    serde_json::from_value(value).map_err(|error| error.to_string())
}

fn good(value: Value) -> EngineConfig {
    read(value).expect("a good configuration")
}

/// The error of reading or else of resolving.
#[track_caller]
fn refused(value: Value) -> String {
    match read(value) {
        Err(error) => error,
        Ok(config) => resolve(&config, &big_gpu(), &registry()).expect_err("a bad configuration").to_string(),
    }
}

#[test]
fn defaults_are_those_of_the_documentation() {
    let small = good(written(json!({})));
    let full = good(json!({
        "target": { "dtype": "f16", "layers": [
            { "name": "full", "count": 1, "kind": "gqa", "query_heads": 16, "kv_heads": 8, "head_dim": 128,
              "window": null, "softcap": null, "sinks": false, "alibi": false } ] },
        "kv_cache": { "dtype": "auto", "page_size": null },
        "attention": { "backend": null, "use_non_causal": false },
        "kernel": { "moe_backend": null },
        "speculative": null,
    }));
    assert_eq!(small, full);
    let answer = resolve(&small, &big_gpu(), &registry()).expect("served");
    let problem = &answer.find(Role::Target, Phase::Decode, "full").expect("there").problem;
    assert_eq!(problem.kind.output_dim(), 128, "the value dim is the head dim");
    assert_eq!(problem.kv_dtype, KvDType::F16, "the cache's format is the model's");
    assert_eq!(problem.page_size, None);
    assert!((problem.scale - 128f32.powf(-0.5)).abs() < 1e-7);
}

#[test]
fn a_configuration_survives_being_written() {
    let config = good(written(json!({
        "attention": { "backend": { "prefer": "Wide" }, "use_non_causal": true },
        "kv_cache": { "dtype": "q8", "page_size": 16 },
        "kernel": { "moe_backend": "grouped" },
        "speculative": { "method": "block", "num_speculative_tokens": 7, "attention_backend": "WIDE",
            "draft": { "dtype": "f32", "layers": [ { "name": "d", "kind": "mla", "query_heads": 8, "latent_dim": 512,
                "rope_dim": 64, "kv_heads": 1, "window": { "left": 3, "right": null }, "softcap": 30.0 } ] } },
    })));
    let text = serde_json::to_value(&config).expect("plain data");
    assert_eq!(text["attention"]["backend"], json!({ "prefer": "wide" }));
    assert_eq!(good(text), config);
}

#[test]
fn auto_in_any_case_is_unset() {
    for auto in ["auto", "AUTO", "Auto", "aUtO", " auto ", ""] {
        assert_eq!(BackendName::parse(auto), None, "{auto:?}");
        let config = good(written(json!({
            "attention": { "backend": auto },
            "kernel": { "moe_backend": auto },
            "speculative": { "method": "lookup", "attention_backend": auto, "moe_backend": auto },
        })));
        assert_eq!(config.attention.backend, BackendChoice::Auto);
        assert_eq!(config.kernel.moe_backend, None);
        let speculative = config.speculative.expect("present");
        assert_eq!((speculative.attention_backend, speculative.moe_backend), (None, None));
    }
    let config = good(written(json!({ "attention": { "backend": { "prefer": "Auto" } } })));
    assert_eq!(config.attention.backend, BackendChoice::Auto);
    assert_eq!(good(written(json!({ "kv_cache": { "dtype": "AUTO" } }))).kv_cache.dtype, None);
}

#[test]
fn a_backend_is_required_preferred_or_unset() {
    let choice = |value: Value| good(written(json!({ "attention": { "backend": value } }))).attention.backend;
    let wide = BackendName::parse("wide").expect("a name");
    assert_eq!(choice(json!("WIDE")), BackendChoice::Require(wide.clone()));
    assert_eq!(choice(json!({ "prefer": "Wide" })), BackendChoice::Prefer(wide.clone()));
    assert_eq!(choice(Value::Null), BackendChoice::Auto);
    assert_eq!("Wide".parse(), Ok(BackendChoice::Require(wide)));
    for bad in [json!(3), json!(true), json!(["wide"]), json!({}), json!({ "prefer": null })] {
        assert!(read(written(json!({ "attention": { "backend": bad } }))).is_err());
    }
}

#[test]
fn a_preference_is_carried_into_the_answer() {
    let config = good(written(json!({ "attention": { "backend": { "prefer": "wide" } } })));
    let policy = |device: &DeviceFacts| {
        let answer = resolve(&config, device, &registry()).expect("served");
        (answer.target[0].backend.name(), answer.target[0].policy.name())
    };
    assert_eq!(policy(&big_gpu()), ("wide", "prefer"));
    assert_eq!(policy(&DeviceFacts::cpu()), ("reference", "prefer"));
}

#[test]
fn unknown_fields_are_named() {
    let cases = [
        (written(json!({ "atention": {} })), "atention"),
        (written(json!({ "target": { "heads": 3 } })), "heads"),
        (with_layer(json!({ "heads": 3 })), "heads"),
        (with_layer(json!({ "window": { "left": 3, "rigth": 0 } })), "rigth"),
        (written(json!({ "kv_cache": { "pagesize": 16 } })), "pagesize"),
        (written(json!({ "attention": { "non_causal": true } })), "non_causal"),
        (written(json!({ "attention": { "backend": { "prefers": "wide" } } })), "prefers"),
        (written(json!({ "attention": { "backend": { "prefer": "wide", "else": "x" } } })), "else"),
        (written(json!({ "kernel": { "moe": "x" } })), "moe"),
        (written(json!({ "speculative": { "method": "lookup", "tokens": 3 } })), "tokens"),
        (written(json!({ "speculative": { "draft": { "layers": [], "vocab": 3 } } })), "vocab"),
    ];
    for (value, field) in cases {
        let error = refused(value);
        assert!(error.contains(&format!("unknown field `{field}`")), "{field}: {error}");
    }
}

#[test]
fn what_is_required_is_asked_for() {
    for (pointer, field) in [("", "target"), ("/target", "dtype"), ("/target", "layers")] {
        let mut config = written(json!({}));
        config.pointer_mut(pointer).and_then(Value::as_object_mut).expect("there").remove(field);
        assert!(refused(config).contains(&format!("`{field}`")), "{field}");
    }
    for field in ["name", "kind", "query_heads", "kv_heads", "head_dim"] {
        let mut config = written(json!({}));
        config["target"]["layers"][0].as_object_mut().expect("there").remove(field);
        let error = refused(config);
        assert!(error.contains(field) && error.contains("missing"), "{field}: {error}");
    }
    for field in ["latent_dim", "rope_dim"] {
        let mut config = written(json!({}));
        config["target"]["layers"][0] =
            json!({ "name": "l", "kind": "mla", "query_heads": 8, "latent_dim": 512, "rope_dim": 64 });
        config["target"]["layers"][0].as_object_mut().expect("there").remove(field);
        let error = refused(config);
        assert!(error.contains(&format!("target.layers[0].{field}: missing")), "{field}: {error}");
    }
}

#[test]
fn a_draft_has_defaults_too() {
    let config = good(written(json!({ "speculative": { "method": "chain", "draft": { "layers": [
        { "name": "d", "kind": "gqa", "query_heads": 4, "kv_heads": 4, "head_dim": 64 } ] } } })));
    let speculative = config.speculative.expect("present");
    assert_eq!(speculative.draft.expect("present").dtype, DType::F16);
    assert_eq!(speculative.num_speculative_tokens, None);
}

#[test]
fn numbers_have_limits() {
    assert_eq!(good(with_layer(json!({ "count": 1_000_000 }))).model.layers[0].count, 1_000_000);
    for count in [0, 1_000_001, u32::MAX] {
        let error = refused(with_layer(json!({ "count": count })));
        assert_eq!(error, format!("target.layers[0].count: {count} is not between 1 and 1000000"));
    }
    for bad in [json!(-1), json!(1.5), json!("3"), json!(u64::from(u32::MAX) + 1), json!(null), json!(1e30)] {
        assert!(read(with_layer(json!({ "count": bad }))).is_err(), "{bad}");
        assert!(read(with_layer(json!({ "query_heads": bad }))).is_err(), "{bad}");
    }
    for field in ["query_heads", "kv_heads", "head_dim", "value_dim"] {
        let error = refused(with_layer(json!({ field: 0 })));
        assert_eq!(error, format!("target.layers[0].{field}: 0 is out of range, at least 1"));
        assert!(read(with_layer(json!({ field: u64::from(u32::MAX) + 1 }))).is_err());
        assert!(read(with_layer(json!({ field: -4 }))).is_err());
    }
    assert!(refused(written(json!({ "kv_cache": { "page_size": 0 } }))).starts_with("kv_cache.page_size: 0 "));
    let none = json!({ "speculative": { "method": "lookup", "num_speculative_tokens": 0 } });
    assert!(refused(written(none)).starts_with("speculative.num_speculative_tokens: 0 "));
    assert!(refused(written(json!({ "target": { "layers": [] } }))).starts_with("target.layers: "));
}

#[test]
fn the_largest_dims_are_answered_without_a_panic() {
    let top = u32::MAX;
    let gqa = json!({ "query_heads": top, "kv_heads": top, "head_dim": top, "value_dim": top, "window": top });
    let mut mla = written(json!({}));
    mla["target"]["layers"][0] =
        json!({ "name": "l", "kind": "mla", "query_heads": top, "latent_dim": top, "rope_dim": top });
    for value in [with_layer(gqa), mla] {
        let config = good(value);
        assert!(resolve(&config, &DeviceFacts::cpu(), &registry()).is_ok(), "the reference takes any");
        assert!(resolve(&config, &big_gpu(), &registry()).is_err());
    }
}

#[test]
fn dims_belong_to_their_kind() {
    for field in ["latent_dim", "rope_dim"] {
        let error = refused(with_layer(json!({ field: 64 })));
        assert_eq!(error, format!("target.layers[0].{field}: 64 does not belong to kind gqa"));
    }
    let latent = |patch: Value| {
        let mut config = written(json!({}));
        config["target"]["layers"][0] =
            json!({ "name": "l", "kind": "mla", "query_heads": 8, "latent_dim": 512, "rope_dim": 64 });
        merge(&mut config["target"]["layers"][0], patch);
        config
    };
    for field in ["head_dim", "value_dim"] {
        let error = refused(latent(json!({ field: 64 })));
        assert_eq!(error, format!("target.layers[0].{field}: 64 does not belong to kind mla"));
    }
    assert_eq!(refused(latent(json!({ "kv_heads": 2 }))), "target.layers[0].kv_heads: 2, MLA has 1");
    for kv_heads in [json!(1), Value::Null] {
        let config = good(latent(json!({ "kv_heads": kv_heads })));
        let answer = resolve(&config, &big_gpu(), &registry()).expect("served");
        assert_eq!(answer.target[0].backend.name(), "latent");
    }
    assert_eq!(
        refused(with_layer(json!({ "kv_heads": 3 }))),
        "target.layers[0].kv_heads: 3 does not divide 16 query heads"
    );
    assert_eq!(
        refused(with_layer(json!({ "kv_heads": 32 }))),
        "target.layers[0].kv_heads: 32 does not divide 16 query heads"
    );
    for kind in ["mha", "GQA", ""] {
        let error = refused(with_layer(json!({ "kind": kind })));
        assert!(error.contains("unknown variant") && error.contains("`gqa`"), "{error}");
    }
}

#[test]
fn multi_head_and_multi_query_are_special_cases() {
    for (query_heads, kv_heads) in [(16, 16), (16, 1), (1, 1)] {
        let config = good(with_layer(json!({ "query_heads": query_heads, "kv_heads": kv_heads })));
        assert!(resolve(&config, &big_gpu(), &registry()).is_ok());
    }
}

#[test]
fn layers_have_names_of_their_own() {
    let two = |a: &str, b: &str| {
        let layer =
            |name: &str| json!({ "name": name, "kind": "gqa", "query_heads": 8, "kv_heads": 8, "head_dim": 64 });
        written(json!({ "target": { "layers": [layer(a), layer(b)] } }))
    };
    assert_eq!(refused(two("full", "full")), "target.layers[1].name: 'full' names two layer kinds");
    assert!(refused(two("full", "")).starts_with("target.layers[1].name: '' "));
    let answer = resolve(&good(two("full", "sliding")), &big_gpu(), &registry()).expect("served");
    let listed: Vec<_> = answer.target.iter().map(|one| (&*one.problem.layer, one.problem.phase)).collect();
    assert_eq!(
        listed,
        [("full", Phase::Prefill), ("full", Phase::Decode), ("sliding", Phase::Prefill), ("sliding", Phase::Decode)]
    );
}

#[test]
fn formats_are_read_by_name() {
    for (text, dtype) in [("f32", DType::F32), ("f16", DType::F16), ("bf16", DType::BF16)] {
        assert_eq!(good(written(json!({ "target": { "dtype": text } }))).model.dtype, dtype);
    }
    for dtype in KvDType::ALL {
        let config = good(written(json!({ "kv_cache": { "dtype": dtype.name() } })));
        assert_eq!(config.kv_cache.dtype, Some(dtype));
        let answer = resolve(&config, &DeviceFacts::cpu(), &registry()).expect("the reference takes any");
        assert_eq!(answer.target[0].problem.kv_dtype, dtype);
    }
    let error = refused(written(json!({ "kv_cache": { "dtype": "fp8" } })));
    assert!(error.contains("'fp8'") && error.contains("f8e4m3"), "{error}");
    let error = refused(written(json!({ "target": { "dtype": "float16" } })));
    assert!(error.contains("`float16`") && error.contains("`f16`"), "{error}");
}

#[test]
fn a_window_in_keys_becomes_sides_by_causality() {
    let sides = |layer: Value, non_causal: bool| {
        let mut config = good(with_layer(layer));
        config.attention.use_non_causal = non_causal;
        let answer = resolve(&config, &DeviceFacts::cpu(), &registry()).expect("served");
        answer.target[0].problem.window.map(|window| (window.left, window.right))
    };
    assert_eq!(sides(json!({ "window": 128 }), false), Some((Some(127), Some(0))));
    assert_eq!(sides(json!({ "window": 128 }), true), Some((Some(127), Some(127))));
    assert_eq!(sides(json!({ "window": 1 }), true), Some((Some(0), Some(0))));
    assert_eq!(sides(json!({ "window": 128, "causal": false }), false), Some((Some(127), Some(127))));
    assert_eq!(sides(json!({ "window": null }), false), None);
    for non_causal in [false, true] {
        assert_eq!(sides(json!({ "window": { "left": 5, "right": 2 } }), non_causal), Some((Some(5), Some(2))));
        assert_eq!(sides(json!({ "window": { "left": 5 } }), non_causal), Some((Some(5), None)));
        assert_eq!(sides(json!({ "window": { "left": null, "right": null } }), non_causal), None, "takes no key away");
    }
    assert_eq!(sides(json!({ "window": { "left": null, "right": 0 } }), true), Some((None, Some(0))));
    assert_eq!(sides(json!({ "window": { "left": null, "right": 0 } }), false), None, "takes no key away");
    assert_eq!(WindowConfig::Keys(0).sides(true).left, Some(0), "no underflow where nobody checked");

    assert!(refused(with_layer(json!({ "window": 0 }))).starts_with("target.layers[0].window: 0 "));
    for bad in [json!(-1), json!(2.5), json!("wide"), json!([3, 0]), json!(true), json!({ "left": -1 })] {
        let error = refused(with_layer(json!({ "window": bad })));
        assert!(error.contains("invalid"), "{error}");
    }
}

#[test]
fn a_softcap_is_a_positive_number() {
    assert!(resolve(&good(with_layer(json!({ "softcap": 30 }))), &DeviceFacts::cpu(), &registry()).is_ok());
    for (bad, shown) in [(json!(0.0), "0"), (json!(-3.5), "-3.5"), (json!(1e300), "inf")] {
        let error = refused(with_layer(json!({ "softcap": bad })));
        assert_eq!(error, format!("target.layers[0].softcap: {shown} is no positive number"));
    }
}

#[test]
fn a_fault_in_the_draft_is_found_in_the_draft() {
    let config = json!({ "speculative": { "method": "chain", "draft": { "layers": [
        { "name": "a", "kind": "gqa", "query_heads": 4, "kv_heads": 4, "head_dim": 64 },
        { "name": "b", "kind": "gqa", "query_heads": 4, "kv_heads": 3, "head_dim": 64 } ] } } });
    assert_eq!(refused(written(config)), "speculative.draft.layers[1].kv_heads: 3 does not divide 4 query heads");
}

#[test]
fn a_field_given_twice_is_refused() {
    let text = r#"{ "target": { "dtype": "f16", "dtype": "f32", "layers": [] } }"#;
    let error = serde_json::from_str::<EngineConfig>(text).expect_err("twice").to_string();
    assert!(error.contains("duplicate field `dtype`"), "{error}");
}
