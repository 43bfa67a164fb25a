//! What the public interface cannot reach: every variant of the shaders, and plans in several rounds.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::sync::Arc;

use naga::{
    back::{hlsl, msl, spv},
    valid::{self, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator},
};
use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionKind, AttentionProblem, BackendError, BatchLayout, Capabilities, DType,
    Device, DeviceFacts, KvDType, Mask, Window, device::DeviceChoice,
};
use polyattn_replay::{
    Comparison, emulated_matrices,
    random::{self, Spec},
};

use crate::{
    capabilities,
    kernel::{self, Kernel},
    plan::{self, Cut},
    shader::{self, Matrices, Products, Variant},
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

fn problem(latent_dim: u32, rope_dim: u32) -> AttentionProblem {
    AttentionProblem::new(AttentionKind::Mla { query_heads: 9, latent_dim, rope_dim }, DType::F16)
}

/// Dims, formats and features, each varied apart from the others.
fn problems() -> Vec<AttentionProblem> {
    let mut all: Vec<_> = [(8, 8), (72, 16), (128, 64), (256, 64), (512, 64), (1024, 256)]
        .map(|(latent, rope)| problem(latent, rope))
        .into();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for kv_dtype in KvDType::ALL {
            let mut one = problem(64, 16);
            (one.dtype, one.kv_dtype) = (dtype, kv_dtype);
            all.push(one);
        }
    }
    for bits in 0..64u32 {
        let mut one = problem(128, 64).mask(if bits & 1 == 1 { Mask::Tree } else { Mask::Causal });
        one.softcap = (bits & 2 != 0).then_some(30.0);
        (one.sinks, one.alibi, one.lse) = (bits & 4 != 0, bits & 8 != 0, bits & 16 != 0);
        if bits & 32 != 0 {
            one.kv_dtype = KvDType::Q8;
        }
        all.push(one);
    }
    all
}

#[test]
fn every_variant_translates() {
    let mut plain = DeviceFacts::gpu("any");
    plain.limits.workgroup_bytes = 64 << 10;
    plain.limits.workgroup_invocations = 1024;
    let matrices = [8, 16, 32, 64].map(|width| {
        let facts = plain.clone().with_subgroups(width, width).with_feature("shader-f16");
        facts.with_cooperative_tile(16, DType::F16, DType::F32)
    });
    let mut counts = [0, 0];
    for problem in problems() {
        for facts in matrices.iter().chain([&plain]) {
            for variant in Variant::all(&problem, facts) {
                counts[usize::from(variant.products != Products::Plain)] += 1;
                translates(&variant.partial(&problem), shader::partial_bindings(&problem).len());
            }
        }
        translates(&shader::merge(&problem), shader::merge_bindings(&problem).len());
    }
    assert!(counts[0] > 200 && counts[1] > 100, "{counts:?} variants");
}

/// The kernel for cooperative matrices where they are emulated, as a backend of so many tiles.
#[derive(Debug)]
struct Emulated(u32);

impl AttentionBackend for Emulated {
    fn name(&self) -> &'static str {
        "emulated"
    }

    fn capabilities(&self) -> &Capabilities {
        &capabilities::CAPABILITIES
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        let products = Products::Matrices(Matrices { width: 32, tiles: self.0 });
        let variant = Variant { products, rows: 16 };
        let source = emulated_matrices(&variant.partial(problem)).unwrap();
        let pipeline = kernel::compile(device, problem, &source)?;
        Ok(Arc::new(Kernel::of(device, problem, vec![(variant, pipeline.into())])?))
    }
}

#[test]
fn the_kernel_for_cooperative_matrices_is_right_where_they_are_emulated() {
    let device = match Device::open(&DeviceChoice::Gpu) {
        Ok(device) => device,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let facts = device.facts();
    if !facts.has("shader-f16") {
        return eprintln!("skipped: '{}' has no f16", facts.name);
    }
    let kind = |query_heads| AttentionKind::Mla { query_heads, latent_dim: 128, rope_dim: 64 };
    let plain = Spec::new(kind(16), DType::F16, &[(1, 70), (0, 5), (2, 33)]);
    let window = Some(Window { left: Some(40), right: None });
    let specs = [
        plain.clone(),
        Spec { window, softcap: Some(5.0), alibi: true, sinks: true, kind: kind(3), page_size: 7, ..plain.clone() },
        Spec { mask: Mask::Tree, kind: kind(5), sequences: vec![(7, 530)], ..plain.clone() },
        Spec { mask: Mask::Bidirectional, kind: kind(5), ..plain },
    ];
    for (seed, spec) in specs.iter().enumerate() {
        let mut case = random::case(seed as u64, spec);
        // So large that sums have to be taken relative to another score time and again.
        case.problem.scale = 1.5;
        let tiles = 2 - seed as u32 % 2;
        let outcome = case.run(&device, &Emulated(tiles)).unwrap();
        let comparison = Comparison::of(&case, &outcome).unwrap();
        assert!(comparison.within_tolerance, "{tiles} tiles, {spec:?}: {comparison:?}");
    }

    // A row has the bits of its decode call, though others of its matrix have their sums scaled at other steps.
    let mut case = random::case(9, &Spec::new(kind(5), DType::F16, &[(4, 70)]));
    case.problem.scale = 1.5;
    let backend = Emulated(1);
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let all = bits(&case.run(&device, &backend).unwrap().out);
    for query in 0..4 {
        let mut one = case.clone();
        one.batch = BatchLayout::new(case.batch.page_size, case.batch.pool_pages);
        one.batch.push(1, 67 + query as u32, &case.batch.page_table);
        one.q = case.q[query * 5 * 192 * 2..][..5 * 192 * 2].to_vec();
        assert_eq!(bits(&one.run(&device, &backend).unwrap().out), all[query * 5 * 128..][..5 * 128], "row {query}");
    }
}

#[test]
fn rounds_hold_as_many_query_rows_as_the_buffer_has_states_for() {
    let problem = problem(64, 16);
    let mut batch = BatchLayout::new(256, 64);
    let pages: Vec<i32> = (0..8).collect();
    // 9 states for each chunk that a query row sees: 1 and 1, none, 8 and 8, 8.
    for (queries, length) in [(2, 256), (0, 256), (2, 8 * 256), (1, 7 * 256 + 1)] {
        batch.push(queries, length, &pages);
    }
    let rounds = |states, most_states| {
        let words =
            plan::words(Vec::new(), &problem, &batch, Cut { rows: 16, chunk: 256, states, most_states }).unwrap();
        let (rows, rounds) = plan::rounds(&words).unwrap();
        let rounds: Vec<_> = rounds.collect();
        let facts = batch.rows() as usize * 3;
        assert_eq!((rows, rounds[0].first_item as usize), (16, plan::HEADER + facts + plan::ROUND));
        // Rounds follow one another, each behind the last one's items.
        let ends: Vec<_> =
            rounds.iter().map(|round| round.first_item as usize + round.items as usize * plan::ITEM).collect();
        assert!(rounds[1..].iter().zip(&ends).all(|(round, end)| round.first_item as usize == end + plan::ROUND));
        assert_eq!(ends.last(), Some(&words.len()));
        rounds.iter().map(|round| (round.items, round.first_row, round.rows, round.states)).collect::<Vec<_>>()
    };
    // 18 rows in tiles of 16: two items for each chunk.
    assert_eq!(rounds(1000, 1000), [(26, 0, 5, 234)]);
    assert_eq!(rounds(162, 1000), [(18, 0, 4, 162), (8, 4, 1, 72)]);
    // A sequence is cut between its query rows.
    assert_eq!(rounds(90, 1000), [(10, 0, 3, 90), (8, 3, 1, 72), (8, 4, 1, 72)]);
    assert_eq!(rounds(10, 72), [(1, 0, 1, 9), (1, 1, 1, 9), (8, 2, 1, 72), (8, 3, 1, 72), (8, 4, 1, 72)]);
    let cut = Cut { rows: 16, chunk: 256, states: 10, most_states: 71 };
    let error = plan::words(Vec::new(), &problem, &batch, cut).unwrap_err().to_string();
    assert!(error.contains("a query row of sequence 2 over 2048 keys in 9 heads has 72 partial states"), "{error}");
    // Chunks outside a window are nobody's.
    let window = problem.window(Some(Window { left: Some(255), right: None }));
    let words = plan::words(Vec::new(), &window, &batch, Cut { rows: 16, chunk: 256, states: 1000, most_states: 1000 })
        .unwrap();
    let (_, mut rounds) = plan::rounds(&words).unwrap();
    assert_eq!(rounds.next().unwrap().states, 9 * (1 + 1 + 2 + 1 + 2));
}
