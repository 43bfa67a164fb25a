#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use naga::{
    back::{hlsl, msl, pipeline_constants::process_overrides, spv},
    valid::{Capabilities, ValidationFlags, Validator},
};
use polyattn_api::{AttentionKind, AttentionProblem, DType};

/// Every variant of the shader, in every language that wgpu hands it to a driver in.
#[test]
fn translates() {
    for (dtype, lse) in [(DType::F32, false), (DType::F32, true), (DType::F16, false), (DType::F16, true)] {
        let kind = AttentionKind::Gqa { query_heads: 4, kv_heads: 2, head_dim: 64, value_dim: 64 };
        let mut problem = AttentionProblem::new(kind, dtype);
        problem.lse = lse;
        let source = crate::kernel::source(&problem);
        let module = naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)));
        let mut validator =
            Validator::new(ValidationFlags::all(), Capabilities::IMMEDIATES | Capabilities::SHADER_FLOAT16_IN_FLOAT32);
        let info = validator.validate(&module).unwrap();
        let constants = [("HEADS", 4.0), ("GROUP", 2.0), ("HEAD_DIM", 64.0)].map(|(k, v)| (k.to_owned(), v));
        let entry = Some((naga::ShaderStage::Compute, "attend"));
        let (module, info) = process_overrides(&module, &info, entry, &constants.into_iter().collect()).unwrap();
        spv::write_vec(&module, &info, &spv::Options::default(), None).unwrap();
        let msl_options = msl::Options { fake_missing_bindings: true, ..msl::Options::default() };
        msl::write_string(&module, &info, &msl_options, &msl::PipelineOptions::default()).unwrap();
        let mut text = String::new();
        let hlsl_options = hlsl::Options {
            fake_missing_bindings: true,
            immediates_target: Some(hlsl::BindTarget::default()),
            special_constants_binding: Some(hlsl::BindTarget::default()),
            ..hlsl::Options::default()
        };
        hlsl::Writer::new(&mut text, &hlsl_options, &hlsl::PipelineOptions::default())
            .write(&module, &info, None)
            .unwrap();
    }
}
