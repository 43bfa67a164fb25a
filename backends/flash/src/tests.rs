//! What the public interface cannot reach: every variant of the shader, and each of them forced on one problem.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::{path::Path, sync::Arc};

use naga::{
    back::{hlsl, msl, spv},
    valid::{self, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator},
};
use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionKind, AttentionProblem, BackendError, BatchLayout, Capabilities, DType,
    Device, DeviceFacts, KvDType, Window, device::DeviceChoice,
};
use polyattn_replay::{
    Case, Comparison, Outcome,
    random::{self, Spec},
};

use crate::{
    Flash,
    kernel::Kernel,
    shader::{self, Exchange, Variant},
};

/// Every variant of the shader, in every language that wgpu hands it to a driver in.
#[test]
fn translates() {
    let mut count = 0;
    for (variant, problem) in shader::variants() {
        let source = variant.source(&problem);
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|error| panic!("{variant:?}: {}", error.emit_to_string(&source)));
        let capabilities = valid::Capabilities::IMMEDIATES
            | valid::Capabilities::SHADER_FLOAT16_IN_FLOAT32
            | valid::Capabilities::SUBGROUP;
        let info = Validator::new(ValidationFlags::all(), capabilities)
            .subgroup_operations(SubgroupOperationSet::all())
            .subgroup_stages(ShaderStages::COMPUTE)
            .validate(&module)
            .unwrap_or_else(|error| panic!("{variant:?}: {}", error.emit_to_string(&source)));
        let options = spv::Options { lang_version: (1, 3), ..spv::Options::default() };
        spv::write_vec(&module, &info, &options, None).unwrap();
        let options = msl::Options { fake_missing_bindings: true, lang_version: (2, 4), ..msl::Options::default() };
        msl::write_string(&module, &info, &options, &msl::PipelineOptions::default()).unwrap();
        let options = hlsl::Options {
            shader_model: hlsl::ShaderModel::V6_0,
            fake_missing_bindings: true,
            immediates_target: Some(hlsl::BindTarget::default()),
            special_constants_binding: Some(hlsl::BindTarget::default()),
            ..hlsl::Options::default()
        };
        let mut text = String::new();
        hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default()).write(&module, &info, None).unwrap();
        assert_eq!(module.global_variables.iter().filter(|(_, v)| v.binding.is_some()).count(), {
            Variant::bindings(&problem).len()
        });
        count += 1;
    }
    assert!(count > 300, "{count} variants");
}

#[test]
fn least_workgroup_memory_serves_every_head_dim() {
    let least = shader::LEAST_WORKGROUP_BYTES;
    assert!(least <= 16 << 10, "{least} bytes");
    for dim in (shader::MIN_DIM..=shader::MAX_DIM).step_by(8) {
        let kind = AttentionKind::Gqa { query_heads: 1, kv_heads: 1, head_dim: dim, value_dim: dim };
        for exchange in [Exchange::Subgroup, Exchange::Workgroup] {
            assert!(Variant::all(kind, exchange, least).next().is_some(), "{dim} {exchange:?}");
        }
    }
}

#[test]
fn shuffles_need_subgroups_that_hold_a_slice() {
    let problem = |head_dim| {
        AttentionProblem::new(
            AttentionKind::Gqa { query_heads: 1, kv_heads: 1, head_dim, value_dim: head_dim },
            DType::F16,
        )
    };
    let gpu = || DeviceFacts::gpu("any");
    for (facts, head_dim, expected) in [
        (gpu(), 64, Exchange::Workgroup),
        (gpu().with_subgroups(32, 32), 256, Exchange::Subgroup),
        (gpu().with_subgroups(8, 8), 64, Exchange::Subgroup),
        (gpu().with_subgroups(8, 8), 72, Exchange::Workgroup),
        (gpu().with_subgroups(4, 128), 32, Exchange::Subgroup),
        (gpu().with_subgroups(8, 32), 128, Exchange::Workgroup),
    ] {
        assert_eq!(Exchange::choose(&problem(head_dim), &facts), expected, "{head_dim} {facts:?}");
    }
}

/// `flash` with its choices made for it.
#[derive(Debug)]
struct Forced {
    exchange: Exchange,
    quads: u32,
}

impl AttentionBackend for Forced {
    fn name(&self) -> &'static str {
        "forced"
    }

    fn capabilities(&self) -> &Capabilities {
        Flash.capabilities()
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        Ok(Arc::new(Kernel::new(device, problem, self.exchange)?.only(self.quads)))
    }
}

fn gpu() -> Option<Device> {
    Device::open(&DeviceChoice::Gpu).inspect_err(|error| eprintln!("skipped: {error}")).ok()
}

/// Every choice that `device` allows for `problem`.
fn choices(device: &Device, problem: &AttentionProblem) -> Vec<Forced> {
    let limit = device.facts().limits.workgroup_bytes;
    let mut exchanges = vec![Exchange::Workgroup];
    if Exchange::choose(problem, device.facts()) == Exchange::Subgroup {
        exchanges.push(Exchange::Subgroup);
    }
    let each = |exchange| Variant::all(problem.kind, exchange, limit);
    exchanges
        .into_iter()
        .flat_map(|exchange| each(exchange).map(move |variant| Forced { exchange, quads: variant.quads }))
        .collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn every_variant_answers_alike() {
    let Some(device) = gpu() else { return };
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/replay");
    for name in ["gqa-mixed-decode-prefill-f32", "gqa-window-softcap-sinks-f16"] {
        let case = Case::load(folder.join(name).with_extension("safetensors")).unwrap();
        let mut last: Option<(Exchange, Outcome)> = None;
        for forced in choices(&device, &case.problem) {
            let outcome = case.run(&device, &forced).unwrap();
            let comparison = Comparison::of(&case, &outcome).unwrap();
            assert!(comparison.within_tolerance, "{name} {forced:?}: {comparison:?}");
            // Tiles of rows do not change a bit.
            if let Some((exchange, last)) = &last
                && *exchange == forced.exchange
            {
                assert_eq!(bits(&outcome.out), bits(&last.out), "{name} {forced:?}");
            }
            last = Some((forced.exchange, outcome));
        }
    }
}

/// One sequence of `case` with its first `queries` rows alone, cut off behind the last of them.
fn first_rows(case: &Case, sequence: usize, from: u32, queries: u32) -> Case {
    let (start, all) = case.batch.queries(sequence);
    let mut one = case.clone();
    one.batch = BatchLayout::new(case.batch.page_size, case.batch.pool_pages);
    let pages = &case.batch.page_table[sequence * case.batch.max_pages..][..case.batch.max_pages];
    one.batch.push(queries, case.batch.kv_len[sequence] - all + from + queries, pages);
    let row = (case.problem.kind.query_heads() * case.problem.kind.query_dim()) as usize
        * case.problem.dtype.bytes() as usize;
    one.q = case.q[(start + from) as usize * row..][..queries as usize * row].to_vec();
    one
}

/// The demand behind lossless speculative decoding: a row has the same bits alone, in a verify pass, and in any batch,
/// whatever the tiles of rows.
#[test]
fn a_verify_row_has_the_bits_of_its_decode_call() {
    let Some(device) = gpu() else { return };
    let kind = AttentionKind::Gqa { query_heads: 6, kv_heads: 2, head_dim: 64, value_dim: 64 };
    let sequences = [(5, 7), (9, 517), (0, 3), (1, 40)];
    let plain = Spec { page_size: 24, ..Spec::new(kind, DType::F16, &sequences) };
    let window = Some(Window { left: Some(200), right: None });
    let rich = Spec { window, softcap: Some(20.0), sinks: true, alibi: true, dtype: DType::F32, ..plain.clone() };
    let bytes = Spec { kv_dtype: KvDType::Q8, alibi: true, ..plain.clone() };
    for (seed, spec) in [plain, rich, bytes].iter().enumerate() {
        let case = random::case(seed as u64, spec);
        let row = (kind.query_heads() * kind.output_dim()) as usize;
        let heads = kind.query_heads() as usize;
        for exchange in [Exchange::Workgroup, Exchange::Subgroup] {
            let choices: Vec<_> =
                choices(&device, &case.problem).into_iter().filter(|forced| forced.exchange == exchange).collect();
            let (Some(narrow), Some(wide)) = (choices.first(), choices.last()) else { continue };
            let all = case.run(&device, wide).unwrap();
            assert!(Comparison::of(&case, &all).unwrap().within_tolerance);
            let (start, queries) = case.batch.queries(1);
            for query in 0..queries {
                let one = first_rows(&case, 1, query, 1).run(&device, narrow).unwrap();
                let place = (start + query) as usize;
                assert_eq!(bits(&one.out), bits(&all.out[place * row..][..row]), "{spec:?} row {query}");
                let (one, all) = (one.lse.unwrap(), all.lse.as_ref().unwrap());
                assert_eq!(bits(&one), bits(&all[place * heads..][..heads]), "{spec:?} row {query}");
            }
            let some = first_rows(&case, 1, 3, 4).run(&device, narrow).unwrap();
            assert_eq!(bits(&some.out), bits(&all.out[(start as usize + 3) * row..][..4 * row]));
        }
    }
}
