//! `flash` on whatever GPU there is, against the golden files and the f64 reference.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::path::Path;

use polyattn_api::{
    AttentionBackend, AttentionIo, AttentionKind, AttentionProblem, BackendError, BatchLayout, DType, Decline, Device,
    DeviceFacts, KvDType, KvLayout, Mask, Policy, Registry, Window, device::DeviceChoice, select,
};
use polyattn_flash::Flash;
use polyattn_replay::{
    Case, Comparison, ReplayError,
    random::{self, Spec},
};

const fn wide(query_heads: u32, kv_heads: u32, head_dim: u32, value_dim: u32) -> AttentionKind {
    AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim }
}

const fn gqa(query_heads: u32, kv_heads: u32, head_dim: u32) -> AttentionKind {
    wide(query_heads, kv_heads, head_dim, head_dim)
}

fn gpu() -> Option<Device> {
    Device::open(&DeviceChoice::Gpu).inspect_err(|error| eprintln!("skipped: {error}")).ok()
}

#[test]
fn golden_files() {
    let Some(device) = gpu() else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/replay");
    let mut ran = 0;
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let case = Case::load(&path).unwrap();
        match case.run(&device, &Flash) {
            Ok(outcome) => {
                let comparison = Comparison::of(&case, &outcome).unwrap();
                assert!(comparison.within_tolerance, "{}: {comparison:?}", path.display());
                ran += 1;
            }
            Err(ReplayError::Declined(_)) if matches!(case.problem.kind, AttentionKind::Mla { .. }) => {}
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }
    assert!(ran >= 70, "only {ran} golden files served");
}

#[test]
fn random_problems() {
    let Some(device) = gpu() else { return };
    let ragged = [(1, 300), (0, 5), (20, 64), (0, 0), (3, 3)];
    let small = gqa(6, 2, 64);
    let window = |left, right| Some(Window { left, right });
    let specs = [
        Spec::new(small, DType::F32, &ragged),
        Spec { page_size: 1, ..Spec::new(gqa(3, 1, 32), DType::F16, &ragged) },
        Spec { page_size: 7, mask: Mask::Bidirectional, ..Spec::new(gqa(2, 2, 96), DType::F16, &ragged) },
        Spec { page_size: 300, per_sequence_causal: true, ..Spec::new(gqa(8, 1, 128), DType::BF16, &ragged) },
        Spec { kv_dtype: KvDType::F16, ..Spec::new(gqa(10, 2, 40), DType::F32, &ragged) },
        Spec { kv_dtype: KvDType::F32, ..Spec::new(gqa(2, 1, 256), DType::BF16, &ragged) },
        Spec { window: window(Some(17), None), ..Spec::new(small, DType::F32, &ragged) },
        Spec { window: window(Some(9), Some(30)), mask: Mask::Bidirectional, ..Spec::new(small, DType::F32, &ragged) },
        Spec {
            mask: Mask::Tree,
            softcap: Some(5.0),
            alibi: true,
            sinks: true,
            ..Spec::new(small, DType::F32, &ragged)
        },
        Spec::new(gqa(9, 3, 64), DType::F16, &[(80, 530)]),
        Spec { kv_dtype: KvDType::Q8, ..Spec::new(small, DType::F32, &ragged) },
        Spec { kv_dtype: KvDType::F8E4M3, ..Spec::new(wide(4, 2, 128, 72), DType::F16, &ragged) },
        Spec { kv_dtype: KvDType::F8E5M2, page_size: 5, ..Spec::new(wide(4, 2, 40, 200), DType::BF16, &ragged) },
        Spec { prefix_spans: true, ..Spec::new(small, DType::F32, &ragged) },
        Spec {
            prefix_spans: true,
            kv_dtype: KvDType::Q8,
            window: window(Some(20), Some(5)),
            softcap: Some(5.0),
            sinks: true,
            alibi: true,
            per_sequence_causal: true,
            page_size: 7,
            ..Spec::new(wide(6, 2, 16, 512), DType::F16, &ragged)
        },
        Spec { mask: Mask::Tree, per_sequence_causal: true, ..Spec::new(small, DType::F32, &ragged) },
        Spec { mask: Mask::Tree, kv_dtype: KvDType::Q8, ..Spec::new(wide(8, 1, 512, 16), DType::F32, &ragged) },
        Spec::new(gqa(4, 2, 512), DType::F32, &ragged),
        Spec { softcap: Some(9.0), ..Spec::new(gqa(4, 4, 16), DType::F32, &ragged) },
        Spec { kv_dtype: KvDType::F8E4M3, mask: Mask::Bidirectional, ..Spec::new(gqa(3, 1, 264), DType::F32, &ragged) },
    ];
    for (seed, spec) in specs.iter().enumerate() {
        let mut case = random::case(seed as u64, spec);
        if seed % 2 == 1 {
            case.problem.kv_layout = KvLayout::PageHeadToken;
        }
        let outcome = case.run(&device, &Flash).unwrap();
        let comparison = Comparison::of(&case, &outcome).unwrap();
        assert!(comparison.within_tolerance, "{spec:?}: {comparison:?}");
        assert_eq!(case.run(&device, &Flash).unwrap().out, outcome.out, "{spec:?}");
    }
}

#[test]
fn is_registered_and_declines_what_it_does_not_serve() {
    let registry = Registry::global().unwrap();
    assert_eq!(registry.backend("Flash").unwrap().priority, 50);
    let facts = DeviceFacts::gpu("any");
    let problem = AttentionProblem::new(gqa(9, 3, 64), DType::F16).mask(Mask::Bidirectional);
    assert_eq!(select(&problem, &facts, registry, &Policy::Auto).unwrap().backend.name(), "flash");
    let mut other = AttentionProblem::new(gqa(9, 2, 20), DType::F16);
    other.kv_dtype = KvDType::Q8;
    (other.sinks, other.alibi) = (true, true);
    let reasons: Vec<_> = Flash.declines(&other, &facts).iter().map(ToString::to_string).collect();
    assert_eq!(
        reasons,
        [
            "9 query heads over 2 KV heads not supported",
            "head_dim 20 not supported",
            "9 storage buffers in one kernel, where the device has 8, not supported"
        ]
    );
    let mut small = facts.clone();
    small.limits.workgroup_bytes = 8 << 10;
    assert!(matches!(Flash.declines(&problem, &small)[..], [Decline::NeedsWorkgroupMemory { .. }]));
    assert_eq!(Flash.declines(&problem, &DeviceFacts::cpu()), [Decline::NeedsGpu]);
    assert!(matches!(Flash.prepare(&Device::cpu(), &problem), Err(BackendError::Declined(_))));
}

#[test]
fn mistakes_are_typed_errors() {
    let Some(device) = gpu() else { return };
    let kernel = Flash.prepare(&device, &AttentionProblem::new(gqa(6, 2, 64), DType::F32)).unwrap();
    let other = Flash.prepare(&device, &AttentionProblem::new(gqa(4, 4, 64), DType::F32)).unwrap();
    let mut batch = BatchLayout::new(16, 1);
    batch.push(1, 17, &[0]);
    assert!(matches!(kernel.plan(&batch), Err(BackendError::Batch(_))));
    let mut huge = BatchLayout::new(1 << 28, 1);
    huge.push(1 << 28, 1 << 28, &[0]);
    assert!(matches!(kernel.plan(&huge), Err(BackendError::Batch(_))));

    let mut batch = BatchLayout::new(16, 1);
    batch.push(1, 16, &[0]);
    let mut commands = device.commands().unwrap();
    let plan = kernel.plan(&batch).unwrap();
    let small = device.alloc(16, "small").unwrap();
    let io = AttentionIo::new(&small, &small, &small, &small);
    assert!(matches!(kernel.encode(&mut commands, &plan, &io), Err(BackendError::Io(_))));
    let large = device.alloc(1 << 16, "large").unwrap();
    let out = device.alloc(1 << 16, "out").unwrap();
    let io = AttentionIo::new(&large, &large, &large, &out);
    assert!(matches!(kernel.encode(&mut commands, &other.plan(&batch).unwrap(), &io), Err(BackendError::Batch(_))));

    // Nothing to do is no mistake.
    let empty = kernel.plan(&BatchLayout::new(16, 1)).unwrap();
    kernel.encode(&mut commands, &empty, &io).unwrap();
    assert_eq!(commands.dispatches(), 0);
}

#[test]
fn more_items_than_one_dimension_holds() {
    let Some(device) = gpu() else { return };
    let count = 66_000;
    let mut batch = BatchLayout::new(1, 2);
    for sequence in 0..count {
        batch.push(1, 1, &[i32::from(sequence % 3 == 0)]);
    }
    let kernel = Flash.prepare(&device, &AttentionProblem::new(gqa(1, 1, 32), DType::F32)).unwrap();
    let plan = kernel.plan(&batch).unwrap();
    let q = device.upload(&vec![1.0f32; count * 32], "q").unwrap();
    let cache = device.upload(&[[1.0f32; 32], [2.0; 32]].concat(), "cache").unwrap();
    let out = device.alloc(count as u64 * 32 * 4, "out").unwrap();
    let mut commands = device.commands().unwrap();
    kernel.encode(&mut commands, &plan, &AttentionIo::new(&q, &cache, &cache, &out)).unwrap();
    commands.submit().unwrap();
    let out = device.download::<f32>(&out).unwrap();
    assert!((0..count * 32).all(|i| out[i] == if i / 32 % 3 == 0 { 2.0 } else { 1.0 }));
}

#[test]
fn reads_its_settings() {
    let configured = |text: &str| Flash.configured(&serde_json::from_str(text).unwrap());
    assert!(configured("{}").unwrap().capabilities().batch_invariant);
    let sharing = configured(r#"{"cascade": true}"#).unwrap();
    assert!(!sharing.capabilities().batch_invariant && sharing.capabilities().deterministic);
    assert!(sharing.configured(&serde_json::json!({})).unwrap().capabilities().batch_invariant);
    let refused = configured(r#"{"cascades": true}"#).unwrap_err();
    assert!(refused.contains("unknown field `cascades`, expected `cascade`"), "{refused}");

    let Some(device) = gpu() else { return };
    // Ten sequences with eighty pages in common: enough for the sharing to pay. One of the problems must go without.
    let sequences = [(1, 1290); 10];
    for window in [None, Some(Window { left: Some(1000), right: None })] {
        let spec = Spec { window, sinks: true, ..Spec::new(wide(8, 8, 64, 64), DType::F32, &sequences) };
        let mut case = random::case(7, &spec);
        let width = case.batch.max_pages;
        for sequence in 1..10 {
            case.batch.page_table.copy_within(0..80, sequence * width);
        }
        let outcome = case.run(&device, &*sharing).unwrap();
        let comparison = Comparison::of(&case, &outcome).unwrap();
        assert!(comparison.within_tolerance, "{comparison:?}");
        let alone = case.run(&device, &Flash).unwrap();
        assert_eq!(alone.out == outcome.out, window.is_some(), "{window:?}");
    }
}
