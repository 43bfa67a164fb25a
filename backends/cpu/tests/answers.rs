//! What the backend answers, against recorded answers and the f64 reference.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::path::PathBuf;

use polyattn_api::{
    AttentionIo, AttentionKind, AttentionProblem, BackendError, BatchLayout, DType, Decline, Device, KvDType, KvLayout,
    Mask, Plan, PlanPool, Registry, Window,
};
use polyattn_cpu as _;
use polyattn_replay::{
    Case, Comparison, Outcome,
    random::{self, Spec},
};

fn gqa(query_heads: u32, kv_heads: u32, head_dim: u32, value_dim: u32) -> AttentionKind {
    AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim }
}

const MLA: AttentionKind = AttentionKind::Mla { query_heads: 12, latent_dim: 40, rope_dim: 8 };

fn run(case: &Case) -> Outcome {
    let backend = Registry::global().unwrap().backend("cpu").unwrap();
    case.run(&Device::cpu(), backend.backend.as_ref()).unwrap()
}

#[track_caller]
fn check(name: &str, case: &Case) {
    let outcome = run(case);
    let comparison = Comparison::of(case, &outcome).unwrap();
    assert!(comparison.within_tolerance, "{name}: {comparison:?}");
    assert!(comparison.lse_max_abs_err.is_some());
}

#[test]
fn is_registered() {
    let entry = Registry::global().unwrap().backend("CPU").unwrap();
    assert_eq!((entry.name(), entry.priority, entry.origin.crate_name), ("cpu", 0, "polyattn-cpu"));
}

#[test]
fn golden_files() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/replay");
    let Ok(entries) = std::fs::read_dir(folder) else {
        println!("skipped: no golden files");
        return;
    };
    for entry in entries {
        let file = entry.unwrap().path();
        if file.extension().is_some_and(|extension| extension == "safetensors") {
            check(&file.display().to_string(), &Case::load(&file).unwrap());
        }
    }
}

const SEQUENCES: [(u32, u32); 8] = [(1, 130), (7, 64), (0, 40), (3, 3), (24, 90), (1, 1), (0, 0), (5, 140)];

#[test]
fn every_feature_in_every_format() {
    type Change = fn(&mut Spec);
    let features: [(&str, Change); 16] = [
        ("causal", |_| {}),
        ("bidirectional", |s| s.mask = Mask::Bidirectional),
        ("tree", |s| s.mask = Mask::Tree),
        ("tree, window", |s| (s.mask, s.window) = (Mask::Tree, Some(Window { left: Some(20), right: Some(1) }))),
        ("tree, per-sequence causal", |s| (s.mask, s.per_sequence_causal) = (Mask::Tree, true)),
        ("per-sequence causal", |s| s.per_sequence_causal = true),
        ("prefix spans", |s| s.prefix_spans = true),
        ("window left", |s| s.window = Some(Window { left: Some(70), right: Some(0) })),
        ("window of one", |s| s.window = Some(Window { left: Some(0), right: None })),
        ("window both", |s| {
            (s.mask, s.window) = (Mask::Bidirectional, Some(Window { left: Some(3), right: Some(66) }));
        }),
        ("window and spans", |s| (s.prefix_spans, s.window) = (true, Some(Window { left: Some(9), right: Some(9) }))),
        ("softcap", |s| s.softcap = Some(1.5)),
        ("sinks", |s| s.sinks = true),
        ("alibi", |s| s.alibi = true),
        ("pages of 1", |s| s.page_size = 1),
        ("all of it", |s| {
            (s.mask, s.per_sequence_causal, s.softcap, s.sinks, s.alibi) = (Mask::Causal, true, Some(4.0), true, true);
            (s.page_size, s.window) = (7, Some(Window { left: Some(40), right: Some(5) }));
        }),
    ];
    for kind in [gqa(6, 2, 20, 36), MLA] {
        for (seed, (name, change)) in features.iter().enumerate() {
            let whole_matrix = ["causal", "all of it"].contains(name);
            for (row, dtype) in [DType::F32, DType::F16, DType::BF16].into_iter().enumerate() {
                for (column, kv_dtype) in KvDType::ALL.into_iter().enumerate() {
                    // The other features take f32, where the tolerance is small, and one cache format for each dtype.
                    let turn = (row + column + seed) % KvDType::ALL.len() == 0;
                    if whole_matrix || turn || (row, column) == (0, 0) {
                        let mut spec = Spec { kv_dtype, ..Spec::new(kind, dtype, &SEQUENCES) };
                        change(&mut spec);
                        let mut case = random::case(seed as u64, &spec);
                        if column % 2 == 1 && kind != MLA {
                            case.problem.kv_layout = KvLayout::PageHeadToken;
                        }
                        check(&format!("{name}, {dtype} over {kv_dtype}, {kind:?}"), &case);
                    }
                }
            }
        }
    }
}

#[test]
fn every_size() {
    for kind in [
        gqa(1, 1, 1, 1),
        gqa(4, 4, 3, 17),
        gqa(9, 3, 64, 64),
        gqa(8, 1, 128, 128),
        gqa(7, 7, 40, 8),
        gqa(2, 1, 256, 80),
        gqa(130, 1, 16, 16),
        gqa(200, 2, 8, 24),
        AttentionKind::Mla { query_heads: 70, latent_dim: 128, rope_dim: 16 },
        AttentionKind::Mla { query_heads: 1, latent_dim: 5, rope_dim: 3 },
    ] {
        for page_size in [1, 5, 16, 24, 64, 100] {
            let spec = Spec { page_size, ..Spec::new(kind, DType::F32, &[(1, 70), (20, 40), (2, 129)]) };
            check(&format!("{kind:?} in pages of {page_size}"), &random::case(9, &spec));
        }
    }
    check("no sequences", &random::case(1, &Spec::new(gqa(2, 1, 8, 8), DType::F32, &[])));
    check("no rows", &random::case(1, &Spec::new(gqa(2, 1, 8, 8), DType::F16, &[(0, 20), (0, 0)])));
}

/// The case with other rows of the batch in it: sequence `sequence` alone, and of its query rows those from `first` up
/// to `end`, the keys behind them dropped from the cache's length.
fn part(case: &Case, sequence: usize, first: u32, end: u32) -> Case {
    let (start, queries) = case.batch.queries(sequence);
    let length = case.batch.kv_len[sequence] - (queries - end);
    let pages = &case.batch.page_table[sequence * case.batch.max_pages..][..case.batch.max_pages];
    let mut batch = BatchLayout::new(case.batch.page_size, case.batch.pool_pages);
    batch.push(end - first, length, pages);
    let row = case.q.len() / case.batch.rows() as usize;
    let q = &case.q[(start + first) as usize * row..(start + end) as usize * row];
    let mut part = Case::new(case.problem.clone(), batch, q.to_vec(), case.k_cache.clone(), case.v_cache.clone());
    part.sinks = case.sinks.clone();
    part.alibi_slopes = case.alibi_slopes.clone();
    part.k_scale = case.k_scale.clone();
    part.v_scale = case.v_scale.clone();
    part
}

/// The bits of output and LSE of `rows` rows from row `start` on.
fn bits(case: &Case, outcome: &Outcome, start: u32, rows: u32) -> Vec<u32> {
    let heads = case.problem.kind.query_heads() as usize;
    let of = |values: &[f32], row: usize| -> Vec<u32> {
        values[start as usize * row..(start + rows) as usize * row].iter().map(|value| value.to_bits()).collect()
    };
    let mut bits = of(&outcome.out, heads * case.problem.kind.output_dim() as usize);
    bits.extend(of(outcome.lse.as_ref().unwrap(), heads));
    bits
}

fn invariant_specs() -> Vec<Spec> {
    let sequences = [(5, 300), (1, 64), (9, 9), (70, 200), (1, 700), (2, 66)];
    let plain = |kind, dtype| Spec::new(kind, dtype, &sequences);
    vec![
        plain(gqa(9, 3, 64, 64), DType::F16),
        plain(gqa(8, 1, 40, 24), DType::F32),
        plain(MLA, DType::BF16),
        Spec {
            window: Some(Window { left: Some(90), right: Some(0) }),
            softcap: Some(2.0),
            sinks: true,
            alibi: true,
            page_size: 5,
            kv_dtype: KvDType::Q8,
            ..plain(gqa(4, 4, 32, 32), DType::F32)
        },
    ]
}

#[test]
fn a_sequence_does_not_feel_its_batch() {
    for spec in invariant_specs() {
        let case = random::case(11, &spec);
        let whole = run(&case);
        for sequence in 0..case.batch.sequences() {
            let (start, queries) = case.batch.queries(sequence);
            let alone = part(&case, sequence, 0, queries);
            assert_eq!(bits(&alone, &run(&alone), 0, queries), bits(&case, &whole, start, queries), "{:?}", spec.kind);
        }
    }
}

#[test]
fn a_verified_row_equals_the_decoded_one() {
    for spec in invariant_specs() {
        let case = random::case(12, &spec);
        let whole = run(&case);
        for sequence in 0..case.batch.sequences() {
            let (start, queries) = case.batch.queries(sequence);
            for query in 0..queries {
                let decoded = part(&case, sequence, query, query + 1);
                assert_eq!(
                    bits(&decoded, &run(&decoded), 0, 1),
                    bits(&case, &whole, start + query, 1),
                    "{:?}",
                    spec.kind
                );
            }
        }
    }
}

#[test]
fn later_rows_cannot_harm_earlier_ones() {
    let case = random::case(13, &Spec::new(gqa(6, 2, 16, 16), DType::F32, &[(4, 20)]));
    let good = run(&case);
    let mut bad = case.clone();
    let slot = case.batch.slot(0, 19) * 2 * 16 * 4;
    for cache in [&mut bad.k_cache, &mut bad.v_cache] {
        cache[slot..slot + 2 * 16 * 4].copy_from_slice(bytemuck::cast_slice(&[f32::INFINITY; 32]));
    }
    let bad = run(&bad);
    assert_eq!(bits(&case, &good, 0, 3), bits(&case, &bad, 0, 3));
    assert!(bad.out[3 * 6 * 16..].iter().any(|value| !value.is_finite()));
}

#[test]
fn rows_that_see_nothing() {
    let mut case = random::case(2, &Spec { mask: Mask::Tree, ..Spec::new(gqa(2, 1, 8, 8), DType::F32, &[(3, 3)]) });
    case.batch.tree.as_mut().unwrap().bits = vec![1, 0, 0b101];
    let outcome = run(&case);
    assert!(outcome.out[16..32].iter().all(|value| *value == 0.0));
    assert_eq!(outcome.lse.unwrap()[2..4], [f32::NEG_INFINITY; 2]);
    case.problem.sinks = true;
    case.sinks = Some(vec![0.5, -3.0]);
    let outcome = run(&case);
    assert!(outcome.out[16..32].iter().all(|value| *value == 0.0));
    assert_eq!(outcome.lse.unwrap()[2..4], [0.5, -3.0]);
}

#[test]
fn wrong_calls_are_errors() {
    let (device, backend) = (Device::cpu(), Registry::global().unwrap().backend("cpu").unwrap().backend);
    let odd = AttentionProblem::new(gqa(5, 2, 8, 8), DType::F32);
    let declined = backend.prepare(&device, &odd).unwrap_err();
    assert!(matches!(declined, BackendError::Declined(reasons) if matches!(reasons[..], [Decline::Other(_)])));

    let problem = AttentionProblem::new(gqa(4, 2, 8, 8), DType::F32);
    let kernel = backend.prepare(&device, &problem).unwrap();
    let mut batch = BatchLayout::new(16, 1);
    batch.push(2, 9, &[0]);
    let plan = kernel.plan(&batch).unwrap();
    let [q, k, v, out] = [256, 1024, 1024, 256].map(|bytes| device.alloc(bytes, "test").unwrap());
    let mut commands = device.commands().unwrap();
    kernel.encode(&mut commands, &plan, &AttentionIo::new(&q, &k, &v, &out)).unwrap();
    let small = device.alloc(255, "test").unwrap();
    assert!(matches!(
        kernel.encode(&mut commands, &plan, &AttentionIo::new(&q, &k, &v, &small)),
        Err(BackendError::Io(_))
    ));
    assert!(matches!(
        kernel.encode(&mut commands, &plan, &AttentionIo::new(&out, &k, &v, &out)),
        Err(BackendError::Device(_))
    ));
    let wide = device.alloc(1026, "test").unwrap();
    let odd = AttentionIo::new(&q, wide.slice(2, 1024).unwrap(), &v, &out);
    assert!(matches!(kernel.encode(&mut commands, &plan, &odd), Err(BackendError::Io(_))));
    for words in [vec![], vec![0; 12], vec![7; 12], vec![u32::MAX; 12]] {
        let foreign = Plan::new(&device, &PlanPool::default(), &problem, &batch, words).unwrap();
        let io = AttentionIo::new(&q, &k, &v, &out);
        assert!(matches!(kernel.encode(&mut commands, &foreign, &io), Err(BackendError::Batch(_))));
    }
    batch.kv_len[0] = 1;
    assert!(matches!(kernel.plan(&batch), Err(BackendError::Batch(_))));
}
