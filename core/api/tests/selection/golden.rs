//! The whole table: problems × devices × policies, pinned by `golden.txt` beside this file.
//!
//! `POLYATTN_BLESS=1 cargo test -p polyattn-api` writes it anew; read the difference before committing it.

use std::fmt::Write;

use polyattn_api::{
    AttentionKind, AttentionProblem, BackendName, DType, DeviceFacts, KvDType, Mask, Phase, Policy, Role, Selection,
    SelectionError, Window, select,
};

use crate::mocks::{bare_gpu, big_gpu, registry};

type Change = fn(&mut AttentionProblem);

/// One row for each thing a problem can ask for.
const PROBLEMS: &[(&str, Change)] = &[
    ("gqa 16/8x128 f16", |_| {}),
    ("prefill", |p| p.phase = Phase::Prefill),
    ("verify", |p| p.phase = Phase::Verify),
    ("draft, non-causal", |p| {
        (p.role, p.phase, p.mask) = (Role::Draft, Phase::Draft, Mask::Bidirectional);
    }),
    ("mha 16/16x128", |p| p.kind = gqa(16, 128, 128)),
    ("mqa 16/1x128", |p| p.kind = gqa(1, 128, 128)),
    ("head_dim 48", |p| p.kind = gqa(8, 48, 48)),
    ("head_dim 96", |p| p.kind = gqa(8, 96, 96)),
    ("head_dim 256", |p| p.kind = gqa(8, 256, 256)),
    ("head_dim 512", |p| p.kind = gqa(8, 512, 512)),
    ("value_dim 64", |p| p.kind = gqa(8, 128, 64)),
    ("f32", |p| (p.dtype, p.kv_dtype) = (DType::F32, KvDType::F32)),
    ("bf16", |p| (p.dtype, p.kv_dtype) = (DType::BF16, KvDType::BF16)),
    ("kv f32 under f16", |p| p.kv_dtype = KvDType::F32),
    ("kv q8", |p| p.kv_dtype = KvDType::Q8),
    ("kv f8e4m3", |p| p.kv_dtype = KvDType::F8E4M3),
    ("page size 16", |p| p.page_size = Some(16)),
    ("page size 24", |p| p.page_size = Some(24)),
    ("page size 64", |p| p.page_size = Some(64)),
    ("non-causal", |p| p.mask = Mask::Bidirectional),
    ("tree, verify", |p| (p.mask, p.phase) = (Mask::Tree, Phase::Verify)),
    ("per-sequence causal", |p| p.per_sequence_causal = true),
    ("prefix spans", |p| p.prefix_spans = true),
    ("window 128", |p| p.window = Some(Window { left: Some(127), right: Some(0) })),
    ("window 128, non-causal", |p| {
        (p.mask, p.window) = (Mask::Bidirectional, Some(Window { left: Some(127), right: Some(127) }));
    }),
    ("softcap", |p| p.softcap = Some(50.0)),
    ("sinks", |p| p.sinks = true),
    ("alibi", |p| p.alibi = true),
    ("lse", |p| p.lse = true),
    ("mla 512+64", |p| *p = mla(512, 64)),
    ("mla 512+64, page size 64", |p| *p = mla(512, 64).page_size(64)),
    ("mla 512+64, verify", |p| *p = mla(512, 64).serving(Role::Target, Phase::Verify)),
    ("mla 512+64, non-causal", |p| *p = mla(512, 64).mask(Mask::Bidirectional)),
    ("mla 256+32", |p| *p = mla(256, 32)),
];

const fn gqa(kv_heads: u32, head_dim: u32, value_dim: u32) -> AttentionKind {
    AttentionKind::Gqa { query_heads: 16, kv_heads, head_dim, value_dim }
}

fn mla(latent_dim: u32, rope_dim: u32) -> AttentionProblem {
    AttentionProblem::new(AttentionKind::Mla { query_heads: 16, latent_dim, rope_dim }, DType::F16)
}

fn line(answer: &Result<Selection, SelectionError>) -> String {
    match answer {
        Err(error) => format!("! {error}"),
        Ok(found) => {
            let others: Vec<_> = found
                .declined
                .iter()
                .map(|one| match one.reasons.as_slice() {
                    [] => format!("{} outranked", one.backend),
                    reasons => {
                        let reasons: Vec<_> = reasons.iter().map(ToString::to_string).collect();
                        format!("{}: {}", one.backend, reasons.join("; "))
                    }
                })
                .collect();
            format!("{} [{}]", found.backend.name(), others.join(" | "))
        }
    }
}

fn table() -> String {
    let registry = registry();
    let named = |name: &str| BackendName::parse(name).expect("a name");
    let policies = [
        ("auto", Policy::Auto),
        ("prefer wide", Policy::Prefer(named("wide"))),
        ("require causal", Policy::Require(named("causal"))),
    ];
    let mut out = String::new();
    for (title, change) in PROBLEMS {
        let mut problem = AttentionProblem::new(gqa(8, 128, 128), DType::F16);
        change(&mut problem);
        writeln!(out, "{title}").expect("a string takes all");
        for device in [DeviceFacts::cpu(), bare_gpu(), big_gpu()] {
            for (policy_name, policy) in &policies {
                let answer = line(&select(&problem, &device, &registry, policy));
                writeln!(out, "  {} · {policy_name} → {answer}", device.name).expect("a string takes all");
            }
        }
    }
    out
}

#[test]
fn the_table_stands_as_written() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/selection/golden.txt");
    let got = table();
    if std::env::var_os("POLYATTN_BLESS").is_some() {
        std::fs::write(path, &got).expect("the source folder can be written");
    }
    let want = std::fs::read_to_string(path).expect("golden.txt lies beside this file");
    for (number, (got, want)) in got.lines().zip(want.lines()).enumerate() {
        assert_eq!(got, want, "line {} moved; POLYATTN_BLESS=1 writes the table anew", number + 1);
    }
    assert_eq!(got.lines().count(), want.lines().count(), "rows came or went; POLYATTN_BLESS=1 writes the table anew");
}
