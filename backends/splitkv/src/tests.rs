//! What the public interface cannot reach: every variant of the shaders, and plans in several rounds.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use naga::{
    back::{hlsl, msl, spv},
    valid::{self, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator},
};
use polyattn_api::{AttentionKind, AttentionProblem, BatchLayout, DType, Window};

use crate::{
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
