//! `mla` against recorded and random problems, and what it refuses.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::path::Path;

use polyattn_api::{
    AttentionBackend, AttentionIo, AttentionKind, AttentionProblem, BackendError, BatchLayout, DType, Decline, Device,
    DeviceFacts, KvDType, Mask, Phase, Policy, Registry, Role, Window, device::DeviceChoice, select,
};
use polyattn_mla::Mla;
use polyattn_replay::{
    Case, Comparison, ReplayError,
    random::{self, Spec},
};

fn mla(query_heads: u32, latent_dim: u32, rope_dim: u32) -> AttentionKind {
    AttentionKind::Mla { query_heads, latent_dim, rope_dim }
}

/// A GPU that the backend runs on, or why there is none.
fn gpu() -> Option<Device> {
    let device = Device::open(&DeviceChoice::Gpu).inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
    let reasons = Mla.declines(&AttentionProblem::new(mla(2, 64, 16), DType::F16), device.facts());
    reasons.first().map(|reason| eprintln!("skipped: {reason}")).is_none().then_some(device)
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
        match case.run(&device, &Mla) {
            Ok(outcome) => {
                let comparison = Comparison::of(&case, &outcome).unwrap();
                assert!(comparison.within_tolerance, "{}: {comparison:?}", path.display());
                ran += 1;
            }
            Err(ReplayError::Declined(reasons)) => assert!(reasons.contains(&Decline::Gqa), "{}", path.display()),
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }
    assert!(ran >= 11, "only {ran} golden files served");
}

#[test]
fn random_problems() {
    let Some(device) = gpu() else { return };
    let ragged = [(1, 300), (0, 5), (20, 64), (0, 0), (3, 3), (1, 1100), (9, 513), (1, 256), (2, 257)];
    let short = [(1, 300), (0, 5), (7, 64), (0, 0), (3, 3), (2, 513)];
    let small = mla(6, 64, 16);
    let window = |left, right| Some(Window { left, right });
    let specs = [
        Spec::new(small, DType::F32, &ragged),
        Spec { page_size: 1, ..Spec::new(mla(1, 8, 8), DType::F16, &ragged) },
        Spec { page_size: 7, mask: Mask::Bidirectional, ..Spec::new(mla(16, 128, 64), DType::F16, &short) },
        Spec { page_size: 300, per_sequence_causal: true, ..Spec::new(mla(8, 72, 24), DType::BF16, &short) },
        Spec { kv_dtype: KvDType::F16, ..Spec::new(mla(16, 512, 64), DType::F32, &short) },
        Spec { kv_dtype: KvDType::F32, ..Spec::new(mla(2, 1024, 256), DType::BF16, &short) },
        Spec { kv_dtype: KvDType::Q8, ..Spec::new(small, DType::F16, &short) },
        Spec { kv_dtype: KvDType::F8E4M3, ..Spec::new(small, DType::F16, &short) },
        Spec { kv_dtype: KvDType::F8E5M2, ..Spec::new(small, DType::F32, &short) },
        Spec { window: window(Some(17), None), ..Spec::new(small, DType::F32, &ragged) },
        Spec { window: window(Some(300), None), sinks: true, ..Spec::new(small, DType::F16, &ragged) },
        Spec { window: window(Some(9), Some(30)), mask: Mask::Bidirectional, ..Spec::new(small, DType::F32, &ragged) },
        Spec {
            mask: Mask::Tree,
            softcap: Some(5.0),
            alibi: true,
            sinks: true,
            ..Spec::new(mla(5, 40, 8), DType::F32, &ragged)
        },
        // A prompt.
        Spec::new(mla(4, 64, 16), DType::F16, &[(200, 530), (300, 300)]),
    ];
    for (seed, spec) in specs.iter().enumerate() {
        let case = random::case(seed as u64, spec);
        let outcome = case.run(&device, &Mla).unwrap();
        let comparison = Comparison::of(&case, &outcome).unwrap();
        assert!(comparison.within_tolerance, "{spec:?}: {comparison:?}");
        assert_eq!(case.run(&device, &Mla).unwrap().out, outcome.out, "{spec:?}");
    }
}

/// The first `queries` rows of a sequence from `first` on, alone, cut off behind the last of them.
fn alone(case: &Case, sequence: usize, first: u32, queries: u32) -> Case {
    let (start, all) = case.batch.queries(sequence);
    let mut one = case.clone();
    one.batch = BatchLayout::new(case.batch.page_size, case.batch.pool_pages);
    let pages = &case.batch.page_table[sequence * case.batch.max_pages..][..case.batch.max_pages];
    one.batch.push(queries, case.batch.kv_len[sequence] - all + first + queries, pages);
    let row = (case.problem.kind.query_heads() * case.problem.kind.query_dim()) as usize
        * case.problem.dtype.bytes() as usize;
    one.q = case.q[(start + first) as usize * row..][..queries as usize * row].to_vec();
    one.problem.phase = if queries == 1 { Phase::Decode } else { Phase::Verify };
    one
}

/// The demand behind lossless speculative decoding.
#[test]
fn a_verify_row_has_the_bits_of_its_decode_call() {
    let Some(device) = gpu() else { return };
    let plain =
        Spec { page_size: 24, ..Spec::new(mla(6, 64, 16), DType::F16, &[(5, 7), (9, 517), (0, 3), (30, 1100)]) };
    let window = Some(Window { left: Some(200), right: None });
    let rich = Spec {
        window,
        softcap: Some(20.0),
        sinks: true,
        alibi: true,
        dtype: DType::F32,
        kind: mla(5, 256, 64),
        ..plain.clone()
    };
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    for (seed, spec) in [plain, rich].iter().enumerate() {
        let case = random::case(seed as u64, spec);
        let all = case.run(&device, &Mla).unwrap();
        assert!(Comparison::of(&case, &all).unwrap().within_tolerance);
        let (row, heads) =
            ((spec.kind.query_heads() * spec.kind.output_dim()) as usize, spec.kind.query_heads() as usize);
        for sequence in [0, 1, 3] {
            let (start, queries) = case.batch.queries(sequence);
            for (first, count) in (0..queries).step_by(3).map(|first| (first, 1)).chain([(0, 2), (1, 4)]) {
                let one = alone(&case, sequence, first, count).run(&device, &Mla).unwrap();
                let place = (start + first) as usize;
                let want = &all.out[place * row..][..count as usize * row];
                assert_eq!(bits(&one.out), bits(want), "{spec:?} rows {first}, {count}");
                let want = &all.lse.as_ref().unwrap()[place * heads..][..count as usize * heads];
                assert_eq!(bits(&one.lse.unwrap()), bits(want), "{spec:?} rows {first}, {count}");
            }
        }
    }
}

#[test]
fn is_registered_and_declines_what_it_does_not_serve() {
    let registry = Registry::global().unwrap();
    assert_eq!(registry.backend("MLA").unwrap().priority, 50);
    let facts = DeviceFacts::gpu("any");
    for phase in Phase::ALL {
        let problem = AttentionProblem::new(mla(16, 512, 64), DType::F16).serving(Role::Target, phase);
        assert_eq!(select(&problem, &facts, registry, &Policy::Auto).unwrap().backend.name(), "mla");
    }
    let mut other = AttentionProblem::new(mla(16, 500, 4), DType::F16);
    other.prefix_spans = true;
    let reasons: Vec<_> = Mla.declines(&other, &facts).iter().map(ToString::to_string).collect();
    assert_eq!(reasons, ["latent_dim 500 not supported", "rope_dim 4 not supported", "prefix spans not supported"]);
    let gqa = AttentionKind::Gqa { query_heads: 4, kv_heads: 2, head_dim: 64, value_dim: 64 };
    assert_eq!(Mla.declines(&AttentionProblem::new(gqa, DType::F16), &facts), [Decline::Gqa]);
    let problem = AttentionProblem::new(mla(16, 512, 64), DType::F16);
    let mut small = facts.clone();
    small.limits.workgroup_bytes = 2 << 10;
    assert!(matches!(Mla.declines(&problem, &small)[..], [Decline::NeedsWorkgroupMemory { .. }]));
    assert_eq!(Mla.declines(&problem, &DeviceFacts::cpu()), [Decline::NeedsGpu]);
    assert!(matches!(Mla.prepare(&Device::cpu(), &problem), Err(BackendError::Declined(_))));
}

#[test]
fn mistakes_are_typed_errors() {
    let Some(device) = gpu() else { return };
    let kernel = Mla.prepare(&device, &AttentionProblem::new(mla(6, 64, 16), DType::F32)).unwrap();
    let other = Mla.prepare(&device, &AttentionProblem::new(mla(4, 64, 16), DType::F32)).unwrap();
    let mut batch = BatchLayout::new(16, 1);
    batch.push(1, 17, &[0]);
    assert!(matches!(kernel.plan(&batch), Err(BackendError::Batch(_))));
    let mut outside = BatchLayout::new(16, 1);
    outside.push(1, 16, &[1]);
    let error = kernel.plan(&outside).unwrap_err().to_string();
    assert!(error.contains("page_table[0][0] is 1, the cache has 1 pages"), "{error}");
    let mut huge = BatchLayout::new(1 << 24, 1);
    huge.push(1 << 24, 1 << 24, &[0]);
    let error = kernel.plan(&huge).unwrap_err().to_string();
    assert!(error.contains("work items"), "{error}");

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
    let mut empty = BatchLayout::new(16, 1);
    empty.push(0, 0, &[]);
    empty.push(0, 9, &[0]);
    kernel.encode(&mut commands, &kernel.plan(&empty).unwrap(), &io).unwrap();
    assert_eq!(commands.dispatches(), 0);
}

#[test]
fn a_cache_beyond_one_binding_is_refused_with_the_numbers() {
    let Some(device) = gpu() else { return };
    let limits = device.facts().limits;
    let bytes = limits.binding_bytes + 4096;
    if bytes > limits.buffer_bytes || bytes > 1 << 30 {
        eprintln!("skipped: a binding holds {} bytes of a buffer's {}", limits.binding_bytes, limits.buffer_bytes);
        return;
    }
    let kernel = Mla.prepare(&device, &AttentionProblem::new(mla(1, 64, 16), DType::F16)).unwrap();
    let cache = device.alloc(bytes, "k_cache").unwrap();
    let small = device.alloc(4096, "small").unwrap();
    let mut batch = BatchLayout::new(16, (bytes / (16 * 160)) as u32);
    batch.push(1, 16, &[0]);
    let plan = kernel.plan(&batch).unwrap();
    let mut commands = device.commands().unwrap();
    let error = kernel.encode(&mut commands, &plan, &AttentionIo::new(&small, &cache, &cache, &small)).unwrap_err();
    let error = error.to_string();
    for part in ["k_cache", &bytes.to_string(), &limits.binding_bytes.to_string()] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn more_items_than_one_dimension_holds() {
    let Some(device) = gpu() else { return };
    let count = 66_000;
    let mut batch = BatchLayout::new(1, 2);
    for sequence in 0..count {
        batch.push(1, 1, &[i32::from(sequence % 3 == 0)]);
    }
    let kernel = Mla.prepare(&device, &AttentionProblem::new(mla(1, 8, 8), DType::F32)).unwrap();
    let plan = kernel.plan(&batch).unwrap();
    let q = device.upload(&vec![1.0f32; count * 16], "q").unwrap();
    let cache = device.upload(&[[1.0f32; 16], [2.0; 16]].concat(), "cache").unwrap();
    let out = device.alloc(count as u64 * 8 * 4, "out").unwrap();
    let mut commands = device.commands().unwrap();
    kernel.encode(&mut commands, &plan, &AttentionIo::new(&q, &cache, &cache, &out)).unwrap();
    commands.submit().unwrap();
    let out = device.download::<f32>(&out).unwrap();
    assert!((0..count * 8).all(|i| out[i] == if i / 8 % 3 == 0 { 2.0 } else { 1.0 }));
}
