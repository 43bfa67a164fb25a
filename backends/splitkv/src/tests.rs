//! What the public interface cannot reach: every variant of the shaders, and plans in several rounds.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::sync::Arc;

use naga::{
    back::{hlsl, msl, spv},
    valid::{self, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator},
};
use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionKind, AttentionProblem, BackendError, BatchLayout, Capabilities, DType,
    Device, Mask, Window, device::DeviceChoice,
};
use polyattn_replay::{
    Comparison, Outcome, emulated_matrices,
    random::{self, Spec},
};

use crate::{
    Multiply, SplitKv,
    kernel::{self, Kernel},
    plan,
    shader::{self, Products, Variant},
};

/// In every language that wgpu hands a shader to a driver in; cooperative matrices have none on DX12.
fn translates(source: &str, bindings: usize) {
    let module =
        naga::front::wgsl::parse_str(source).unwrap_or_else(|error| panic!("{}", error.emit_to_string(source)));
    let capabilities = valid::Capabilities::IMMEDIATES
        | valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32
        | valid::Capabilities::SHADER_FLOAT16
        | valid::Capabilities::COOPERATIVE_MATRIX
        | valid::Capabilities::SUBGROUP;
    let info = Validator::new(ValidationFlags::all(), capabilities)
        .subgroup_operations(SubgroupOperationSet::all())
        .subgroup_stages(ShaderStages::COMPUTE)
        .validate(&module)
        .unwrap_or_else(|error| panic!("{}", error.emit_to_string(source)));
    let options = spv::Options { lang_version: (1, 3), ..spv::Options::default() };
    spv::write_vec(&module, &info, &options, None).unwrap();
    let options = msl::Options { fake_missing_bindings: true, lang_version: (3, 1), ..msl::Options::default() };
    msl::write_string(&module, &info, &options, &msl::PipelineOptions::default()).unwrap();
    assert_eq!(module.global_variables.iter().filter(|(_, v)| v.binding.is_some()).count(), bindings);
    if source.contains("wgpu_cooperative_matrix") {
        return;
    }
    let options = hlsl::Options {
        shader_model: hlsl::ShaderModel::V6_0,
        fake_missing_bindings: true,
        immediates_target: Some(hlsl::BindTarget::default()),
        special_constants_binding: Some(hlsl::BindTarget::default()),
        ..hlsl::Options::default()
    };
    let mut text = String::new();
    hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default()).write(&module, &info, None).unwrap();
}

#[test]
fn every_variant_translates() {
    let (mut count, mut matrices) = (0, 0);
    for (variant, problem) in shader::variants() {
        translates(&variant.partial(&problem), Variant::partial_bindings(&problem, variant.direct).len());
        matrices += u32::from(matches!(variant.products, Products::Matrices(_)));
        if variant.tiles == 1 {
            translates(&variant.merge(&problem), Variant::merge_bindings(&problem).len());
        }
        count += 1;
    }
    assert!(count > 400 && matrices > 80, "{count} variants, {matrices} of matrices");
}

#[test]
fn sequences_share_rounds_up_to_the_buffers_size() {
    let kind = AttentionKind::Gqa { query_heads: 4, kv_heads: 2, head_dim: 64, value_dim: 64 };
    let problem = AttentionProblem::new(kind, DType::F16);
    let variant = Variant { products: Products::Lanes(8), tiles: 1, head_dim: 64, direct: false };
    let chunk = variant.chunk();
    let mut batch = BatchLayout::new(chunk, 64);
    let pages: Vec<i32> = (0..8).collect();
    // 2, 0, 16 and 8 chunk states of a head and row.
    for (queries, length) in [(2, chunk), (0, chunk), (2, 8 * chunk), (1, 7 * chunk + 1)] {
        batch.push(queries, length, &pages);
    }
    let rounds = |most| {
        let words = plan::words(Vec::new(), &problem, &batch, variant, 1, most).unwrap();
        let (tiles, per, rounds) = plan::rounds(&words).unwrap();
        let rounds: Vec<_> = rounds.collect();
        assert_eq!((tiles, per, rounds[0].first_item as usize), (1, 1, plan::HEADER + 4 * 3 + plan::ROUND));
        // Rounds follow one another, each behind the last one's items.
        let ends: Vec<_> =
            rounds.iter().map(|round| round.first_item as usize + round.items as usize * plan::ITEM).collect();
        assert!(rounds[1..].iter().zip(&ends).all(|(round, end)| round.first_item as usize == end + plan::ROUND));
        assert_eq!(ends.last(), Some(&words.len()));
        rounds.iter().map(|round| (round.items, round.first_row, round.rows, round.states)).collect::<Vec<_>>()
    };
    assert_eq!(rounds(1000), [(17, 0, 5, 104)]);
    assert_eq!(rounds(72), [(9, 0, 4, 72), (8, 4, 1, 32)]);
    assert_eq!(rounds(64), [(1, 0, 2, 8), (8, 2, 2, 64), (8, 4, 1, 32)]);
    let error = plan::words(Vec::new(), &problem, &batch, variant, 1, 63).unwrap_err().to_string();
    // A sequence of one chunk keeps no state where it is answered at once.
    let direct = plan::words(Vec::new(), &problem, &batch, Variant { direct: true, ..variant }, 1, 1000).unwrap();
    let (_, _, rounds) = plan::rounds(&direct).unwrap();
    assert_eq!(rounds.map(|round| round.states).collect::<Vec<_>>(), [96]);
    assert!(error.contains("sequence 2 with 2 query rows over 2048 keys has 64 partial states"), "{error}");
}

#[test]
fn items_take_whole_spans() {
    let kind = AttentionKind::Gqa { query_heads: 4, kv_heads: 2, head_dim: 64, value_dim: 64 };
    let variant = Variant { products: Products::Lanes(8), tiles: 1, head_dim: 64, direct: false };
    let chunk = variant.chunk();
    let mut batch = BatchLayout::new(chunk, 64);
    batch.push(1, 22 * chunk, &(0..22).collect::<Vec<_>>());
    let items = |problem: &AttentionProblem, run| {
        let words = plan::words(Vec::new(), problem, &batch, variant, run, 1000).unwrap();
        let (_, per, rounds) = plan::rounds(&words).unwrap();
        let states: Vec<_> = rounds.map(|round| round.states).collect();
        let first = plan::HEADER + 3 + plan::ROUND;
        let items = words[first..].chunks(plan::ITEM).map(|item| (item[2], item[3])).collect::<Vec<_>>();
        (per, states, items)
    };
    let problem = AttentionProblem::new(kind, DType::F16);
    let every: Vec<_> = (0..22).map(|chunk| (chunk, chunk + 1)).collect();
    assert_eq!(items(&problem, 1), (1, vec![22 * 4], every));
    assert_eq!(items(&problem, 4).2, [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 22)]);
    assert_eq!(items(&problem, 8), (4, vec![6 * 4], vec![(0, 8), (8, 16), (16, 22)]));
    // The window begins in chunk 5: its span has less of it.
    let problem = problem.window(Some(Window { left: Some(16 * chunk), right: None }));
    assert_eq!(items(&problem, 1).2.len(), 17);
    assert_eq!(items(&problem, 8), (4, vec![5 * 4], vec![(5, 12), (12, 20), (20, 22)]));
}

/// The kernel for cooperative matrices where they are emulated, as a backend of one variant.
#[derive(Debug)]
struct Emulated(Variant);

impl AttentionBackend for Emulated {
    fn name(&self) -> &'static str {
        "emulated"
    }

    fn capabilities(&self) -> &Capabilities {
        SplitKv.capabilities()
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        let source = emulated_matrices(&self.0.partial(problem)).unwrap();
        let pipeline = kernel::compile(device, problem, self.0, &source)?;
        Ok(Arc::new(Kernel::of(device, problem, vec![(self.0, pipeline.into())])?))
    }
}

/// A device that emulates matrices, or why there is none.
fn emulating() -> Option<Device> {
    let device = Device::open(&DeviceChoice::Gpu).inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
    let facts = device.facts();
    if !facts.has("shader-f16") || !facts.has("subgroups") {
        eprintln!("skipped: '{}' has no f16 or no subgroups", facts.name);
        return None;
    }
    Some(device)
}

/// The variants for matrices that fit a device which emulates them, smallest first.
fn emulated(device: &Device, kind: AttentionKind) -> Vec<Emulated> {
    let mut facts = device.facts().clone().with_subgroups(32, 32).with_cooperative_tile(16, DType::F16, DType::F32);
    let limits = &mut facts.limits;
    limits.workgroup_bytes = if facts.hardware {
        // Emulated shuffles take the rest.
        limits.workgroup_bytes.saturating_sub(4 * limits.workgroup_invocations)
    } else {
        // A processor has as much as a shader declares, whatever it says.
        64 << 10
    };
    let problem = AttentionProblem::new(kind, DType::F16);
    let all: Vec<_> = Variant::all(&problem, &facts, Some(Multiply::Matrices)).map(Emulated).collect();
    if all.is_empty() {
        eprintln!("skipped: '{}' has too little workgroup memory for {kind:?}", facts.name);
    }
    all
}

fn gqa(query_heads: u32, kv_heads: u32, head_dim: u32) -> AttentionKind {
    AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim: head_dim }
}

fn bits(outcome: &Outcome) -> Vec<u32> {
    outcome.out.iter().chain(outcome.lse.iter().flatten()).map(|value| value.to_bits()).collect()
}

/// Runs a random case with every variant: they give the same bits, and those are right.
fn all_agree(device: &Device, seed: u64, like: impl Fn(Spec) -> Spec, kind: AttentionKind) {
    let variants = emulated(device, kind);
    let Some(first) = variants.first() else { return };
    // No key, a part of a chunk, just one, a little more, many; few and many rows.
    let chunk = first.0.chunk();
    let sequences = [(1, 70), (0, 5), (2, chunk), (0, 0), (9, chunk + 1), (3, 5 * chunk + 20), (25, 2 * chunk - 100)];
    let spec = like(Spec::new(kind, DType::F16, &sequences));
    let case = random::case(seed, &spec);
    let outcome = case.run(device, first).unwrap();
    let comparison = Comparison::of(&case, &outcome).unwrap();
    assert!(comparison.within_tolerance, "{first:?}, {spec:?}: {comparison:?}");
    for variant in &variants[1..] {
        assert!(bits(&case.run(device, variant).unwrap()) == bits(&outcome), "{variant:?}, {spec:?}");
    }
}

#[test]
fn emulated_matrices_are_right_for_every_head_dim() {
    let Some(device) = emulating() else { return };
    for (seed, head_dim) in (0..).zip(shader::HEAD_DIMS) {
        all_agree(&device, seed, |plain| plain, gqa(3, 1, head_dim));
    }
}

#[test]
fn emulated_matrices_are_right_for_every_feature() {
    let Some(device) = emulating() else { return };
    let window = |left, right| Some(Window { left: Some(left), right });
    let rich = |plain| Spec { softcap: Some(5.0), alibi: true, sinks: true, page_size: 7, ..plain };
    all_agree(&device, 10, |plain| Spec { window: window(300, None), ..rich(plain) }, gqa(6, 2, 64));
    all_agree(&device, 11, |plain| Spec { mask: Mask::Tree, ..rich(plain) }, gqa(10, 2, 64));
    let both_sides = |plain| Spec { window: window(700, Some(9)), mask: Mask::Bidirectional, ..plain };
    all_agree(&device, 12, both_sides, gqa(8, 1, 32));
    all_agree(&device, 13, |plain| Spec { per_sequence_causal: true, ..plain }, gqa(3, 3, 32));
}

/// However many tiles serve it, in a decode call and in a batch so large that items take spans of chunks.
#[test]
fn emulated_matrices_give_a_row_the_same_bits_in_any_batch() {
    let Some(device) = emulating() else { return };
    let kind = gqa(8, 4, 32);
    for variant in emulated(&device, kind) {
        let length = 6 * variant.0.chunk() + 100;
        let case = random::case(5, &Spec::new(kind, DType::F16, &[(3, length)]));
        let few = case.run(&device, &variant).unwrap();
        assert!(Comparison::of(&case, &few).unwrap().within_tolerance);
        let row = 8 * 32;
        for query in 0..3 {
            let mut one = case.clone();
            one.batch = BatchLayout::new(case.batch.page_size, case.batch.pool_pages);
            one.batch.push(1, length - 2 + query as u32, &case.batch.page_table);
            one.q = case.q[query * row * 2..][..row * 2].to_vec();
            let alone = bits(&one.run(&device, &variant).unwrap());
            let want = few.out[query * row..][..row].iter().chain(&few.lse.as_ref().unwrap()[query * 8..][..8]);
            assert!(want.map(|x| x.to_bits()).eq(alone), "{variant:?}, row {query}");
        }

        let copies = (variant.0.resident() * u64::from(plan::SPAN)).div_ceil(7 * 4) as usize;
        let mut many = case.clone();
        many.batch = BatchLayout::new(case.batch.page_size, case.batch.pool_pages);
        (0..copies).for_each(|_| many.batch.push(3, length, &case.batch.page_table));
        many.q = case.q.repeat(copies);
        let kernel = variant.prepare(&device, &case.problem).unwrap();
        let per = |batch: &BatchLayout| plan::rounds(kernel.plan(batch).unwrap().extra()).unwrap().1;
        assert_eq!((per(&case.batch), per(&many.batch)), (1, plan::SPAN));
        let all = many.run(&device, &variant).unwrap().out;
        assert!(all.chunks(few.out.len()).all(|out| out == few.out), "{variant:?}");
    }
}
