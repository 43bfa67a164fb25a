//! `plain` on whatever GPU there is, against the golden files and the f64 reference.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::path::Path;

use polyattn_api::{
    AttentionBackend, AttentionKind, AttentionProblem, BackendError, BatchLayout, DType, Decline, Device, DeviceFacts,
    Mask, Policy, Registry, device::DeviceChoice, select,
};
use polyattn_plain::Plain;
use polyattn_replay::{
    Case, Comparison, ReplayError,
    random::{self, Spec},
};

const KIND: AttentionKind = AttentionKind::Gqa { query_heads: 6, kv_heads: 2, head_dim: 64, value_dim: 64 };

fn gpu() -> Option<Device> {
    Device::open(&DeviceChoice::Gpu).inspect_err(|error| eprintln!("skipped: {error}")).ok()
}

fn check(name: &str, device: &Device, case: &Case) -> bool {
    match case.run(device, &Plain) {
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
fn golden_files() {
    let Some(device) = gpu() else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/replay");
    let mut ran = 0;
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            ran += u32::from(check(&path.display().to_string(), &device, &Case::load(&path).unwrap()));
        }
    }
    assert!(ran >= 15, "only {ran} golden files served");
}

#[test]
fn random_problems() {
    let Some(device) = gpu() else { return };
    for (seed, dtype, head_dim, page_size) in
        [(1, DType::F32, 8, 16), (2, DType::F16, 64, 1), (3, DType::F32, 200, 7), (4, DType::F16, 256, 64)]
    {
        let kind = AttentionKind::Gqa { query_heads: 6, kv_heads: 2, head_dim, value_dim: head_dim };
        let spec = Spec { page_size, ..Spec::new(kind, dtype, &[(1, 130), (0, 5), (9, 64), (0, 0), (3, 3)]) };
        assert!(check(&format!("{spec:?}"), &device, &random::case(seed, &spec)));
    }
}

#[test]
fn is_registered_and_declines_what_it_does_not_serve() {
    let registry = Registry::global().unwrap();
    assert_eq!(registry.backend("PLAIN").unwrap().priority, 10);
    let facts = DeviceFacts::gpu("any");
    let problem = AttentionProblem::new(KIND, DType::F16);
    assert_eq!(select(&problem, &facts, registry, &Policy::Auto).unwrap().backend.name(), "plain");
    let open = problem.clone().mask(Mask::Bidirectional);
    assert_eq!(Plain.declines(&open, &facts), [Decline::NonCausal]);
    assert_eq!(Decline::NonCausal.to_string(), "non-causal attention not supported");
    assert_eq!(Plain.declines(&problem, &DeviceFacts::cpu()), [Decline::NeedsGpu]);
    assert!(matches!(Plain.prepare(&Device::cpu(), &problem), Err(BackendError::Declined(_))));
}

#[test]
fn mistakes_are_typed_errors() {
    let Some(device) = gpu() else { return };
    let kernel = Plain.prepare(&device, &AttentionProblem::new(KIND, DType::F32)).unwrap();
    let mut batch = BatchLayout::new(16, 1);
    batch.push(1, 17, &[0]);
    assert!(matches!(kernel.plan(&batch), Err(BackendError::Batch(_))));
    let mut batch = BatchLayout::new(16, 1);
    batch.push(1, 16, &[0]);
    let plan = kernel.plan(&batch).unwrap();
    let small = device.alloc(16, "small").unwrap();
    let io = polyattn_api::AttentionIo::new(&small, &small, &small, &small);
    assert!(matches!(kernel.encode(&mut device.commands().unwrap(), &plan, &io), Err(BackendError::Io(_))));
}
