//! Who serves mixtures of experts: asked only where a model has them, by name or by priority, apart for target and draft.

use std::sync::Arc;

use polyattn_api::{
    BackendError, Decline, Device, DeviceFacts, EngineConfig, MoeBackend, MoeConfig, MoeKernel, MoeProblem, Registry,
    RegistryError, Resolution, Role, SpeculativeConfig, moe_backend_entry, resolve,
};
use serde_json::json;

use crate::mocks;

/// A backend that serves up to some experts.
macro_rules! mock {
    ($type:ident, $name:literal, $most:literal) => {
        #[derive(Debug, Default)]
        struct $type;

        impl MoeBackend for $type {
            fn name(&self) -> &'static str {
                $name
            }

            fn declines(&self, problem: &MoeProblem, _: &DeviceFacts) -> Vec<Decline> {
                let many = problem.experts > $most;
                many.then(|| Decline::Other(format!("{} experts", problem.experts).into())).into_iter().collect()
            }

            fn prepare(&self, _: &Device, _: &MoeProblem, _: u32) -> Result<Arc<dyn MoeKernel>, BackendError> {
                Err(BackendError::Io("not here".into()))
            }
        }
    };
}

mock!(Loop, "loop", 1000);
mock!(Sorted, "sorted", 16);
mock!(Shouting, "LOUD", 1);

fn registry() -> Registry {
    let registry = mocks::registry();
    for entry in [moe_backend_entry!(Loop, priority = 10), moe_backend_entry!(Sorted, priority = 50)] {
        registry.register_moe_backend(entry).expect("unique names");
    }
    registry
}

fn section(config: &mut EngineConfig) -> &mut SpeculativeConfig {
    config.speculative.as_mut().expect("speculative")
}

fn experts(experts: u32) -> Option<MoeConfig> {
    Some(MoeConfig::new(experts, 2, 64, 32))
}

fn config(target: Option<MoeConfig>, draft: Option<MoeConfig>) -> EngineConfig {
    let mut config = mocks::speculative("block");
    config.model.layers[0].moe = target;
    if let Some(model) = &mut section(&mut config).draft {
        model.layers[0].moe = draft;
    }
    config
}

fn resolved(config: &EngineConfig) -> Result<Resolution, String> {
    resolve(config, &mocks::big_gpu(), &registry()).map_err(|error| error.to_string())
}

fn served(resolution: &Resolution, role: Role) -> Option<&'static str> {
    resolution.moe_of(role).next().map(|moe| moe.backend.name())
}

#[test]
fn the_highest_priority_that_can_serve() {
    let answer = resolved(&config(experts(8), experts(64))).expect("both are served");
    assert_eq!(served(&answer, Role::Target), Some("sorted"));
    assert_eq!(served(&answer, Role::Draft), Some("loop"));
    let json = serde_json::to_value(&answer).expect("an answer");
    assert_eq!(
        json["moe"],
        json!({
            "target": [{ "layer": "full", "backend": "sorted", "policy": "auto",
                         "declined": [{ "backend": "loop", "reasons": [] }] }],
            "draft": [{ "layer": "draft", "backend": "loop", "policy": "auto",
                        "declined": [{ "backend": "sorted", "reasons": ["64 experts not supported"] }] }],
        })
    );
}

#[test]
fn a_name_is_looked_at_only_where_there_are_experts() {
    let mut without = config(None, None);
    without.kernel.moe_backend = Some("abacus".into());
    let answer = resolved(&without).expect("nobody is asked");
    assert!(answer.moe.is_empty());
    assert_eq!(serde_json::to_value(&answer).expect("an answer").get("moe"), None);

    without.model.layers[0].moe = experts(8);
    let error = resolved(&without).expect_err("nobody is called so");
    assert_eq!(error, "unknown MoE backend 'abacus'; registered are: loop, sorted");
    without.kernel.moe_backend = Some("Sorted".into());
    let answer = resolved(&without).expect("any case");
    assert_eq!((served(&answer, Role::Target), answer.moe[0].policy.name()), (Some("sorted"), "require"));
    without.model.layers[0].moe = experts(64);
    let error = resolved(&without).expect_err("a name never falls back");
    assert_eq!(error, "MoE backend 'sorted' cannot serve the experts of target layer 'full': 64 experts not supported");
    without.kernel.moe_backend = None;
    without.model.layers[0].moe = experts(2000);
    let error = resolved(&without).expect_err("too many for all");
    assert!(
        error.contains("no MoE backend can serve") && error.contains("loop: 2000 experts not supported"),
        "{error}"
    );
}

#[test]
fn the_drafts_own_replaces_the_targets() {
    for (own, wanted) in [(None, "loop"), (Some("sorted"), "sorted")] {
        let mut config = config(experts(8), experts(8));
        config.kernel.moe_backend = Some("loop".into());
        section(&mut config).moe_backend = own.map(str::to_owned);
        let answer = resolved(&config).expect("both can");
        assert_eq!((served(&answer, Role::Target), served(&answer, Role::Draft)), (Some("loop"), Some(wanted)));
    }
}

#[test]
fn contradictions_name_the_field() {
    for (change, says) in [
        (MoeConfig::new(0, 2, 64, 32), "target.layers[0].moe.experts: 0 is out of range"),
        (MoeConfig::new(1, 2, 64, 32), "moe.experts_per_token: 2 of 1 experts"),
        (MoeConfig::new(8, 2, 0, 32), "moe.hidden_size: 0 is out of range"),
    ] {
        let error = resolved(&config(Some(change), None)).expect_err("a contradiction");
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn names_are_unique_and_selectable() {
    let twice = Registry::builder()
        .moe_backend(moe_backend_entry!(Loop, priority = 1))
        .moe_backend(moe_backend_entry!(Loop, priority = 2))
        .build();
    let error = twice.expect_err("two of one name").to_string();
    assert!(error.starts_with("two MoE backends are called 'loop'"), "{error}");
    let loud = Registry::builder().moe_backend(moe_backend_entry!(Shouting, priority = 1)).build();
    assert!(matches!(loud, Err(RegistryError::Name { kind: "MoE backend", .. })));
}
