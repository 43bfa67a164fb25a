//! The sentences, each of which is a promise.

use std::sync::Arc;

use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionKind, AttentionProblem, BackendError, Capabilities, DType, Decline,
    Device, DeviceFacts, KvDType, Mask, Phase, Policy, Registry, Role, Window, backend_entry, select,
};

use crate::mocks::{Causal, Latent, Nothing, Reference, Wide, bare_gpu, big_gpu};

fn gqa(head_dim: u32, value_dim: u32) -> AttentionProblem {
    AttentionProblem::new(AttentionKind::Gqa { query_heads: 8, kv_heads: 2, head_dim, value_dim }, DType::F16)
}

fn mla(latent_dim: u32, rope_dim: u32) -> AttentionProblem {
    AttentionProblem::new(AttentionKind::Mla { query_heads: 8, latent_dim, rope_dim }, DType::F16)
}

fn reasons(backend: &dyn AttentionBackend, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<String> {
    backend.declines(problem, device).iter().map(ToString::to_string).collect()
}

#[track_caller]
fn causal_says(problem: &AttentionProblem, wanted: &[&str]) {
    assert_eq!(reasons(&Causal, problem, &big_gpu()), wanted);
    assert!(reasons(&Reference, problem, &DeviceFacts::cpu()).is_empty(), "the reference serves everything");
}

#[test]
fn what_is_missing_is_named_with_its_value() {
    causal_says(&gqa(128, 128), &[]);
    causal_says(&gqa(80, 80), &["head_dim 80 not supported"]);
    causal_says(&gqa(128, 64), &["value_dim 64 not supported"]);
    causal_says(&gqa(80, 64), &["head_dim 80 not supported", "value_dim 64 not supported"]);
    causal_says(&mla(512, 64), &["MLA not supported"]);
    causal_says(&gqa(128, 128).mask(Mask::Bidirectional), &["non-causal attention not supported"]);
    causal_says(&gqa(128, 128).mask(Mask::Tree), &["tree mask not supported"]);
    causal_says(
        &gqa(128, 128).window(Some(Window { left: Some(7), right: Some(0) })),
        &["sliding window not supported"],
    );

    let with = |set: fn(&mut AttentionProblem)| {
        let mut problem = gqa(128, 128);
        set(&mut problem);
        problem
    };
    causal_says(
        &with(|p| (p.dtype, p.kv_dtype) = (DType::BF16, KvDType::BF16)),
        &["dtype bf16 not supported", "kv dtype bf16 not supported"],
    );
    causal_says(&with(|p| p.kv_dtype = KvDType::F8E4M3), &["kv dtype f8e4m3 not supported"]);
    causal_says(&with(|p| p.kv_dtype = KvDType::F8E5M2), &["kv dtype f8e5m2 not supported"]);
    causal_says(&with(|p| p.kv_dtype = KvDType::Q8), &["kv dtype q8 not supported"]);
    causal_says(&with(|p| p.kv_dtype = KvDType::F32), &["kv dtype f32 with dtype f16 not supported"]);
    causal_says(&with(|p| p.softcap = Some(30.0)), &["softcap not supported"]);
    causal_says(&with(|p| p.sinks = true), &["attention sinks not supported"]);
    causal_says(&with(|p| p.alibi = true), &["ALiBi not supported"]);
    causal_says(&with(|p| p.lse = true), &["LSE output not supported"]);
    causal_says(&with(|p| p.per_sequence_causal = true), &["per-sequence causality not supported"]);
    causal_says(&with(|p| p.prefix_spans = true), &["prefix spans not supported"]);
}

#[test]
fn a_page_size_rules_out_only_where_it_was_chosen() {
    assert!(reasons(&Wide, &gqa(96, 96), &big_gpu()).is_empty());
    assert!(reasons(&Wide, &gqa(96, 96).page_size(16), &big_gpu()).is_empty());
    assert_eq!(reasons(&Wide, &gqa(96, 96).page_size(24), &big_gpu()), ["page size 24 not supported"]);
    assert_eq!(reasons(&Causal, &gqa(96, 96).page_size(24), &big_gpu()), [""; 0]);
}

#[test]
fn a_device_that_falls_short_is_told_what_it_needs() {
    assert_eq!(reasons(&Wide, &gqa(96, 96), &bare_gpu()), ["needs feature shader-f16", "needs feature subgroups"]);
    assert_eq!(reasons(&Wide, &gqa(96, 96), &bare_gpu().with_feature("shader-f16")), ["needs feature subgroups"]);
    assert_eq!(
        reasons(&Latent, &mla(512, 64), &bare_gpu()),
        ["needs 49152 bytes of workgroup memory, the device has 32768"]
    );
    assert_eq!(reasons(&Causal, &gqa(96, 96), &DeviceFacts::cpu()), ["needs a GPU"]);
    assert_eq!(reasons(&Reference, &gqa(96, 96), &big_gpu()), ["needs the CPU device"]);
}

#[test]
fn latent_attention_has_dims_of_its_own() {
    assert_eq!(reasons(&Latent, &mla(512, 64).page_size(64), &big_gpu()), [""; 0]);
    assert_eq!(
        reasons(&Latent, &mla(256, 32), &big_gpu()),
        ["latent_dim 256 not supported", "rope_dim 32 not supported"]
    );
    assert_eq!(reasons(&Latent, &gqa(128, 128), &big_gpu()), ["GQA not supported"]);
    assert_eq!(
        reasons(&Latent, &mla(512, 64).serving(Role::Target, Phase::Verify), &big_gpu()),
        ["phase verify not supported"]
    );
    assert_eq!(
        reasons(&Latent, &mla(512, 64).serving(Role::Draft, Phase::Draft).mask(Mask::Bidirectional), &big_gpu()),
        ["non-causal attention not supported", "phase draft not supported"]
    );
}

#[test]
fn all_reasons_are_told_not_the_first() {
    let mut problem = gqa(80, 72).page_size(24).mask(Mask::Bidirectional).serving(Role::Draft, Phase::Draft);
    problem.window = Some(Window { left: Some(3), right: Some(3) });
    problem.softcap = Some(20.0);
    problem.sinks = true;
    problem.alibi = true;
    problem.lse = true;
    problem.dtype = DType::BF16;
    problem.kv_dtype = KvDType::F8E4M3;
    assert_eq!(
        reasons(&Nothing, &problem, &big_gpu()),
        [
            "GQA not supported",
            "dtype bf16 not supported",
            "kv dtype f8e4m3 not supported",
            "page size 24 not supported",
            "non-causal attention not supported",
            "sliding window not supported",
            "softcap not supported",
            "attention sinks not supported",
            "ALiBi not supported",
            "LSE output not supported",
            "phase draft not supported",
        ]
    );
    assert_eq!(
        reasons(&Nothing, &gqa(64, 64), &big_gpu())[3..],
        ["causal attention not supported", "phase decode not supported"]
    );
}

/// A backend with a rule across fields: wide heads only where the mask is causal.
#[derive(Debug, Default)]
struct Crossed;

impl AttentionBackend for Crossed {
    fn name(&self) -> &'static str {
        "crossed"
    }

    fn capabilities(&self) -> &Capabilities {
        static REFERENCE: Reference = Reference;
        REFERENCE.capabilities()
    }

    fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        let mut reasons = self.capabilities().declines(problem, device);
        if problem.mask == Mask::Bidirectional && problem.kind.query_dim() > 128 {
            reasons.push(Decline::Other("non-causal attention with head_dim over 128".into()));
        }
        reasons
    }

    fn prepare(&self, _: &Device, _: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        Err(BackendError::Declined(Vec::new()))
    }
}

#[test]
fn a_backend_can_have_rules_across_fields() {
    let registry = Registry::builder().backend(backend_entry!(Crossed, priority = 1)).build().expect("one name");
    let cpu = DeviceFacts::cpu();
    assert!(select(&gqa(256, 256), &cpu, &registry, &Policy::Auto).is_ok());
    assert!(select(&gqa(128, 128).mask(Mask::Bidirectional), &cpu, &registry, &Policy::Auto).is_ok());
    let error = select(&gqa(256, 256).mask(Mask::Bidirectional), &cpu, &registry, &Policy::Auto).expect_err("the rule");
    assert!(error.to_string().ends_with("crossed: non-causal attention with head_dim over 128 not supported"));
}
