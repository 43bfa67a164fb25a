//! The stranger's backend beside those of the project, on whatever GPU there is.

use std::{collections::BTreeMap, path::Path};

use polyattn_api::{
    AttentionBackend, AttentionKind, AttentionProblem, DType, Device, DeviceFacts, Mask, Policy, Registry, Window,
    device::DeviceChoice, select,
};
use polyattn_replay::{
    Case, Comparison, ReplayError,
    random::{self, Spec},
};
use serde_json::json;
use stranger_attention::Stranger;
use {polyattn_cpu as _, polyattn_flash as _, polyattn_plain as _};

const MLA: AttentionKind = AttentionKind::Mla { query_heads: 4, latent_dim: 512, rope_dim: 64 };

fn gpu() -> Option<Device> {
    Device::open(&DeviceChoice::Gpu).inspect_err(|error| eprintln!("skipped: {error}")).ok()
}

fn holds(name: &str, device: &Device, backend: &dyn AttentionBackend, case: &Case) -> bool {
    match case.run(device, backend) {
        Ok(outcome) => {
            let comparison = Comparison::of(case, &outcome).unwrap();
            assert!(comparison.within_tolerance, "{name}: {comparison:?}");
            true
        }
        Err(ReplayError::Declined(_)) => false,
        Err(error) => panic!("{name}: {error}"),
    }
}

#[test]
fn wins_what_only_it_can_serve() {
    let registry = Registry::global().unwrap();
    let facts = DeviceFacts::gpu("any");
    let latent = select(&AttentionProblem::new(MLA, DType::F16), &facts, registry, &Policy::Auto).unwrap();
    assert_eq!(latent.backend.name(), "stranger");
    assert_eq!(latent.backend.origin.crate_name, "stranger-attention");
    let flash = latent.declined.iter().find(|declined| declined.backend == "flash").unwrap();
    assert!(flash.reasons.iter().any(|reason| reason.to_string() == "MLA not supported"), "{flash:?}");

    let grouped = AttentionKind::Gqa { query_heads: 4, kv_heads: 2, head_dim: 64, value_dim: 64 };
    let grouped = select(&AttentionProblem::new(grouped, DType::F16), &facts, registry, &Policy::Auto).unwrap();
    assert_eq!(grouped.backend.name(), "flash");
    let stranger = grouped.declined.iter().find(|declined| declined.backend == "stranger").unwrap();
    assert!(stranger.reasons.iter().any(|reason| reason.to_string() == "GQA not supported"), "{stranger:?}");
}

#[test]
fn reads_its_own_settings() {
    let registry = Registry::global().unwrap();
    let configured = |settings| registry.configured(&BTreeMap::from([("stranger".to_owned(), settings)]));
    assert!(configured(json!({ "keys_per_tile": 64 })).is_ok());
    for (settings, expected) in [
        (json!({ "keys_per_tile": 48 }), "keys_per_tile is 48; it may be 8, 16, 32 or 64"),
        (json!({ "keys_per_tiel": 64 }), "unknown field `keys_per_tiel`"),
        (json!({ "keys_per_tile": "many" }), "invalid type: string \"many\""),
        (json!(7), "invalid type"),
    ] {
        let error = configured(settings).unwrap_err().to_string();
        assert!(error.contains("backend_config.stranger") && error.contains(expected), "{error}");
    }
}

#[test]
fn golden_files() {
    let Some(device) = gpu() else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/replay");
    let mut served = Vec::new();
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        if name.starts_with("mla-") && holds(&name, &device, &Stranger::default(), &Case::load(&path).unwrap()) {
            served.push(name);
        }
    }
    assert!(served.len() >= 9, "only {served:?}");
}

#[test]
fn random_problems_under_every_setting() {
    let Some(device) = gpu() else { return };
    let window = |left, right| Some(Window { left, right });
    for (seed, (latent_dim, rope_dim, dtype, mask, window, softcap)) in [
        (8, 8, DType::F32, Mask::Causal, None, None),
        (72, 16, DType::F16, Mask::Bidirectional, window(Some(5), Some(3)), None),
        (512, 64, DType::BF16, Mask::Causal, None, Some(20.0)),
        (256, 128, DType::F32, Mask::Bidirectional, window(None, Some(0)), None),
        (64, 32, DType::F16, Mask::Causal, window(Some(0), None), None),
    ]
    .into_iter()
    .enumerate()
    {
        let kind = AttentionKind::Mla { query_heads: 3, latent_dim, rope_dim };
        let sequences = [(1, 130), (0, 5), (9, 64), (0, 0), (3, 3)];
        let spec = Spec { mask, window, softcap, page_size: 7, ..Spec::new(kind, dtype, &sequences) };
        let case = random::case(seed as u64, &spec);
        for keys_per_tile in [8, 16, 32, 64] {
            let backend = Stranger::default().configured(&json!({ "keys_per_tile": keys_per_tile })).unwrap();
            assert!(holds(&format!("{keys_per_tile}: {spec:?}"), &device, backend.as_ref(), &case), "{spec:?}");
        }
    }
}
