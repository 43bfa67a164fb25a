//! `splitkv` against recorded and random problems, and what it refuses.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::{path::Path, sync::Arc};

use polyattn_api::{
    AttentionBackend, AttentionIo, AttentionKind, AttentionProblem, BackendError, BatchLayout, DType, Decline, Device,
    DeviceFacts, KvDType, Mask, Phase, Policy, Registry, Window, device::DeviceChoice, select,
};
use polyattn_replay::{
    Case, Comparison, ReplayError,
    random::{self, Spec},
};
use polyattn_splitkv::SplitKv;

fn gqa(query_heads: u32, kv_heads: u32, head_dim: u32) -> AttentionKind {
    AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim: head_dim }
}

/// A GPU that the backend runs on, or why there is none.
fn gpu() -> Option<Device> {
    let device = Device::open(&DeviceChoice::Gpu).inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
    let reasons = SplitKv.declines(&AttentionProblem::new(gqa(2, 1, 64), DType::F16), device.facts());
    reasons.first().map(|reason| eprintln!("skipped: {reason}")).is_none().then_some(device)
}

/// The backend as it chooses, and with the threads of many subgroups, which it leaves to GPUs without matrices.
fn both() -> [Arc<dyn AttentionBackend>; 2] {
    [Arc::new(SplitKv), SplitKv.configured(&serde_json::json!({ "multiply": "lanes" })).unwrap()]
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
        let mut case = Case::load(&path).unwrap();
        case.problem.phase = Phase::Verify;
        match case.run(&device, &SplitKv) {
            Ok(outcome) => {
                let comparison = Comparison::of(&case, &outcome).unwrap();
                assert!(comparison.within_tolerance, "{}: {comparison:?}", path.display());
                ran += 1;
            }
            Err(ReplayError::Declined(_)) => {}
            Err(error) => panic!("{}: {error}", path.display()),
        }
    }
    assert!(ran >= 80, "only {ran} golden files served");
}

#[test]
fn random_problems() {
    let Some(device) = gpu() else { return };
    let ragged = [(1, 300), (0, 5), (20, 64), (0, 0), (3, 3), (1, 1100), (9, 513), (1, 256), (2, 257)];
    let small = gqa(6, 2, 64);
    let window = |left, right| Some(Window { left, right });
    let specs = [
        Spec::new(small, DType::F32, &ragged),
        Spec { page_size: 1, ..Spec::new(gqa(3, 1, 32), DType::F16, &ragged) },
        Spec { page_size: 7, mask: Mask::Bidirectional, ..Spec::new(gqa(2, 2, 96), DType::F16, &ragged) },
        Spec { page_size: 300, per_sequence_causal: true, ..Spec::new(gqa(8, 1, 128), DType::BF16, &ragged) },
        Spec { kv_dtype: KvDType::F16, ..Spec::new(gqa(10, 2, 192), DType::F32, &ragged) },
        Spec { kv_dtype: KvDType::F32, ..Spec::new(gqa(2, 1, 256), DType::BF16, &ragged) },
        Spec { window: window(Some(17), None), ..Spec::new(small, DType::F32, &ragged) },
        Spec { window: window(Some(300), None), sinks: true, ..Spec::new(small, DType::F16, &ragged) },
        Spec { window: window(Some(9), Some(30)), mask: Mask::Bidirectional, ..Spec::new(small, DType::F32, &ragged) },
        Spec {
            mask: Mask::Tree,
            softcap: Some(5.0),
            alibi: true,
            sinks: true,
            ..Spec::new(small, DType::F32, &ragged)
        },
        Spec::new(gqa(9, 3, 64), DType::F16, &[(64, 530), (40, 2000)]),
        Spec { kv_dtype: KvDType::Q8, alibi: true, ..Spec::new(small, DType::F16, &ragged) },
        Spec { kv_dtype: KvDType::Q8, mask: Mask::Bidirectional, ..Spec::new(gqa(4, 1, 128), DType::F32, &ragged) },
        Spec { kv_dtype: KvDType::F8E4M3, sinks: true, ..Spec::new(gqa(4, 4, 32), DType::F16, &ragged) },
        Spec { kv_dtype: KvDType::F8E5M2, page_size: 5, ..Spec::new(gqa(8, 2, 96), DType::BF16, &ragged) },
    ];
    for (seed, spec) in specs.iter().enumerate() {
        let mut case = random::case(seed as u64, spec);
        case.problem.phase = Phase::Verify;
        for backend in both() {
            let outcome = case.run(&device, &*backend).unwrap();
            let comparison = Comparison::of(&case, &outcome).unwrap();
            assert!(comparison.within_tolerance, "{spec:?}: {comparison:?}");
            assert_eq!(case.run(&device, &*backend).unwrap().out, outcome.out, "{spec:?}");
        }
    }
}

/// Halves take cooperative matrices where a device has them: every head dim, number of tiles and part of the mask there.
#[test]
fn cooperative_matrices() {
    let Some(device) = gpu() else { return };
    if !device.facts().has_cooperative_tile(16, DType::F16, DType::F32) {
        eprintln!("skipped: '{}' has no cooperative matrices of 16 x 16 halves", device.facts().name);
        return;
    }
    let ragged = [(1, 300), (0, 5), (20, 64), (0, 0), (3, 3), (1, 1100), (9, 513), (1, 512), (2, 1030), (64, 1700)];
    let window = |left, right| Some(Window { left, right });
    let mut specs = Vec::new();
    for (head_dim, group) in [(32, 1), (64, 3), (96, 4), (128, 4), (192, 2), (256, 8)] {
        let plain = Spec::new(gqa(2 * group, 2, head_dim), DType::F16, &ragged);
        let rich = Spec { softcap: Some(5.0), alibi: true, sinks: true, page_size: 1, ..plain.clone() };
        specs.push(plain.clone());
        specs.push(Spec { mask: Mask::Tree, ..rich.clone() });
        specs.push(Spec { window: window(Some(70), None), page_size: 48, ..rich });
        specs.push(Spec { window: window(Some(700), Some(9)), mask: Mask::Bidirectional, page_size: 7, ..plain });
    }
    for (seed, spec) in specs.iter().enumerate() {
        let mut case = random::case(100 + seed as u64, spec);
        case.problem.phase = Phase::Verify;
        let outcome = case.run(&device, &SplitKv).unwrap();
        let comparison = Comparison::of(&case, &outcome).unwrap();
        assert!(comparison.within_tolerance, "{spec:?}: {comparison:?}");
        eprintln!("head_dim {}: {comparison:?}", spec.kind.query_dim());
        assert_eq!(case.run(&device, &SplitKv).unwrap().out, outcome.out, "{spec:?}");
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
    one
}

/// The demand behind lossless speculative decoding.
#[test]
fn a_verify_row_has_the_bits_of_its_decode_call() {
    let Some(device) = gpu() else { return };
    let kind = gqa(6, 2, 64);
    let plain = Spec { page_size: 24, ..Spec::new(kind, DType::F16, &[(5, 7), (9, 517), (0, 3), (30, 1100)]) };
    let window = Some(Window { left: Some(200), right: None });
    let rich = Spec { window, softcap: Some(20.0), sinks: true, alibi: true, dtype: DType::F32, ..plain.clone() };
    let halves = Spec { dtype: DType::F16, kv_dtype: KvDType::F16, ..rich.clone() };
    let many = Spec::new(gqa(8, 2, 128), DType::F16, &[(40, 1600), (1, 700), (7, 512), (1, 3)]);
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let specs = [plain, rich, halves, many];
    let every = specs.iter().enumerate().flat_map(|spec| both().map(|backend| (spec, backend)));
    for ((seed, spec), backend) in every {
        let kind = spec.kind;
        let mut case = random::case(seed as u64, spec);
        case.problem.phase = Phase::Verify;
        let all = case.run(&device, &*backend).unwrap();
        assert!(Comparison::of(&case, &all).unwrap().within_tolerance);
        let (row, heads) = ((kind.query_heads() * kind.output_dim()) as usize, kind.query_heads() as usize);
        for sequence in [0, 1, 3] {
            let (start, queries) = case.batch.queries(sequence);
            for (first, count) in (0..queries).step_by(3).map(|first| (first, 1)).chain([(0, 2), (1, 4)]) {
                if first + count > queries {
                    continue;
                }
                let one = alone(&case, sequence, first, count).run(&device, &*backend).unwrap();
                let place = (start + first) as usize;
                let want = &all.out[place * row..][..count as usize * row];
                assert_eq!(bits(&one.out), bits(want), "{spec:?} rows {first}, {count}");
                let want = &all.lse.as_ref().unwrap()[place * heads..][..count as usize * heads];
                assert_eq!(bits(&one.lse.unwrap()), bits(want), "{spec:?} rows {first}, {count}");
            }
        }
    }
}

/// Where there are very many items, one takes several chunks.
#[test]
fn a_row_has_the_bits_of_its_call_in_a_large_batch() {
    let Some(device) = gpu() else { return };
    for queries in [1, 5] {
        let mut one = random::case(queries.into(), &Spec::new(gqa(8, 2, 64), DType::F16, &[(queries, 1700)]));
        one.problem.phase = Phase::Verify;
        let alone = one.run(&device, &SplitKv).unwrap();
        assert!(Comparison::of(&one, &alone).unwrap().within_tolerance);
        let mut many = one.clone();
        // So many that items take runs of chunks, where they do at all.
        let copies = if device.facts().cooperative_tiles.is_empty() { 30 } else { 700 };
        many.batch = BatchLayout::new(one.batch.page_size, one.batch.pool_pages);
        for _ in 0..copies {
            many.batch.push(queries, 1700, &one.batch.page_table);
        }
        many.q = one.q.repeat(copies);
        let all = many.run(&device, &SplitKv).unwrap();
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let want = bits(&alone.out);
        assert_eq!(all.out.len(), alone.out.len() * copies);
        assert!(all.out.chunks(want.len()).all(|out| bits(out) == want), "{queries} query rows");
    }
}

#[test]
fn is_registered_and_declines_what_it_does_not_serve() {
    let registry = Registry::global().unwrap();
    assert_eq!(registry.backend("SplitKV").unwrap().priority, 60);
    let facts = DeviceFacts::gpu("any").with_subgroups(32, 32);
    let problem = AttentionProblem::new(gqa(9, 3, 64), DType::F16);
    assert_eq!(select(&problem, &facts, registry, &Policy::Auto).unwrap().backend.name(), "splitkv");
    let mut other = AttentionProblem::new(gqa(9, 3, 40), DType::F16);
    (other.prefix_spans, other.phase) = (true, Phase::Prefill);
    let reasons: Vec<_> = SplitKv.declines(&other, &facts).iter().map(ToString::to_string).collect();
    assert_eq!(reasons, ["head_dim 40 not supported", "prefix spans not supported", "phase prefill not supported"]);
    assert!(SplitKv.declines(&problem, &DeviceFacts::gpu("any"))[0].to_string().starts_with("needs feature subgroups"));
    let odd = DeviceFacts::gpu("any").with_subgroups(8, 128);
    assert_eq!(SplitKv.declines(&problem, &odd)[0].to_string(), "subgroups of 8 to 128 not supported");
    let mut small = facts.clone();
    small.limits.workgroup_bytes = 2 << 10;
    assert!(matches!(SplitKv.declines(&problem, &small)[..], [Decline::NeedsWorkgroupMemory { .. }]));
    assert_eq!(SplitKv.declines(&problem, &DeviceFacts::cpu()), [Decline::NeedsGpu]);
    let configured = |multiply: &str| SplitKv.configured(&serde_json::json!({ "multiply": multiply }));
    let reason = |multiply, facts: &DeviceFacts| configured(multiply).unwrap().declines(&problem, facts)[0].to_string();
    let want = "f16 queries and cache, and cooperative matrices of 16 x 16 halves in subgroups of 32, which its settings \
                want, not supported";
    assert_eq!(reason("matrices", &facts), want);
    let widths = facts.clone().with_subgroups(8, 32);
    assert_eq!(reason("narrow", &widths), "subgroups of one width, which its settings want, not supported");
    assert!(configured("lanes").unwrap().declines(&problem, &widths).is_empty());
    let error = configured("tensor").unwrap_err();
    assert!(error.contains("unknown variant `tensor`, expected one of `matrices`, `lanes`, `narrow`"), "{error}");
    assert!(matches!(SplitKv.prepare(&Device::cpu(), &problem), Err(BackendError::Declined(_))));
}

#[test]
fn mistakes_are_typed_errors() {
    let Some(device) = gpu() else { return };
    let kernel = SplitKv.prepare(&device, &AttentionProblem::new(gqa(6, 2, 64), DType::F32)).unwrap();
    let other = SplitKv.prepare(&device, &AttentionProblem::new(gqa(4, 4, 64), DType::F32)).unwrap();
    let mut batch = BatchLayout::new(16, 1);
    batch.push(1, 17, &[0]);
    assert!(matches!(kernel.plan(&batch), Err(BackendError::Batch(_))));
    let mut huge = BatchLayout::new(1 << 18, 1);
    huge.push(1 << 18, 1 << 18, &[0]);
    let error = kernel.plan(&huge).unwrap_err().to_string();
    assert!(error.contains("work items"), "{error}");

    // A page outside the pool, and a cache beyond what one binding holds.
    let mut batch = BatchLayout::new(16, 4);
    batch.push(1, 17, &[0, 4]);
    let error = kernel.plan(&batch).unwrap_err().to_string();
    assert!(error.contains('4'), "{error}");
    let pages = device.facts().limits.binding_bytes / (16 * 2 * 64 * 4) + 1;
    let mut batch = BatchLayout::new(16, pages as u32);
    batch.push(1, 16, &[0]);
    let error = kernel.plan(&batch).unwrap_err().to_string();
    let bytes = (pages * 16 * 2 * 64 * 4).to_string();
    assert!(error.contains(&bytes) && error.contains(&device.facts().limits.binding_bytes.to_string()), "{error}");

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
    let kernel = SplitKv.prepare(&device, &AttentionProblem::new(gqa(1, 1, 32), DType::F32)).unwrap();
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
