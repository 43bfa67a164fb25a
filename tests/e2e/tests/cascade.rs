//! Shared prefixes on every backend that can serve them, against the f64 reference.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::sync::Arc;

use polyattn as _;
use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionKind, AttentionProblem, BackendError, BatchLayout, Capabilities,
    Cascade, DType, Decline, Device, DeviceFacts, KvDType, KvLayout, Mask, Registry, Window, device::DeviceChoice,
};
use polyattn_replay::{
    Case, Comparison, ReplayError,
    random::{self, Spec},
};

/// A backend by shared prefixes, however little they save.
#[derive(Debug)]
struct Shared(Arc<dyn AttentionBackend>);

impl AttentionBackend for Shared {
    fn name(&self) -> &'static str {
        "shared"
    }

    fn capabilities(&self) -> &Capabilities {
        self.0.capabilities()
    }

    fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        self.0.declines(problem, device)
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        Ok(Arc::new(Cascade::prepare(&*self.0, device, problem)?.sharing_above(0)))
    }
}

fn devices() -> Vec<Device> {
    let mut devices = vec![Device::cpu()];
    match Device::open(&DeviceChoice::Gpu) {
        Ok(gpu) => devices.push(gpu),
        Err(error) => eprintln!("skipped on a GPU: {error}"),
    }
    devices
}

/// Lets sequences begin with the first pages of another: (sequence, whose, pages).
fn share(case: &mut Case, shares: &[(usize, usize, usize)]) {
    let width = case.batch.max_pages;
    for (sequence, whose, pages) in shares {
        for page in 0..*pages {
            case.batch.page_table[sequence * width + page] = case.batch.page_table[whose * width + page];
        }
    }
}

fn cases() -> Vec<Case> {
    let gqa = AttentionKind::Gqa { query_heads: 6, kv_heads: 2, head_dim: 64, value_dim: 64 };
    let wide = AttentionKind::Gqa { query_heads: 4, kv_heads: 4, head_dim: 32, value_dim: 48 };
    let mla = AttentionKind::Mla { query_heads: 3, latent_dim: 24, rope_dim: 8 };
    // Two groups, a sequence of no rows within the first, strangers before, between and behind.
    let sequences = [(1, 7), (1, 200), (0, 90), (4, 170), (1, 161), (3, 3), (2, 100), (2, 101), (1, 40)];
    let shares = [(3, 1, 10), (4, 1, 10), (7, 6, 5)];
    let spec = |kind, dtype| Spec { page_size: 16, ..Spec::new(kind, dtype, &sequences) };
    let specs = [
        spec(gqa, DType::F32),
        Spec { softcap: Some(5.0), sinks: true, ..spec(gqa, DType::F16) },
        Spec { mask: Mask::Tree, kv_dtype: KvDType::Q8, ..spec(gqa, DType::F32) },
        Spec { mask: Mask::Bidirectional, kv_dtype: KvDType::F8E4M3, ..spec(wide, DType::BF16) },
        Spec { per_sequence_causal: true, prefix_spans: true, sinks: true, ..spec(wide, DType::F32) },
        spec(mla, DType::F32),
        Spec { kv_dtype: KvDType::Q8, sinks: true, ..spec(mla, DType::F16) },
    ];
    let mut cases = Vec::new();
    for (seed, spec) in specs.iter().enumerate() {
        let mut case = random::case(seed as u64, spec);
        share(&mut case, &shares);
        if seed % 2 == 1 && case.problem.kv_layout == KvLayout::PageTokenHead {
            case.problem.kv_layout = KvLayout::PageHeadToken;
        }
        cases.push(case);
    }
    cases
}

#[test]
fn answers_are_those_of_every_key() {
    for device in devices() {
        let mut served = 0;
        for entry in Registry::global().unwrap().backends().iter() {
            // Software GPUs take long to compile: there, those that have most in them.
            let cases = cases().into_iter().enumerate().filter(|(at, _)| device.is_cpu() || [1, 2].contains(at));
            for (_, case) in cases {
                let shared = Shared(Arc::clone(&entry.backend));
                let outcome = match case.run(&device, &shared) {
                    Ok(outcome) => outcome,
                    Err(ReplayError::Declined(_)) => continue,
                    Err(ReplayError::Backend(BackendError::Declined(_))) => continue,
                    Err(error) => panic!("{}: {error}", entry.name()),
                };
                let comparison = Comparison::of(&case, &outcome).unwrap();
                assert!(comparison.within_tolerance, "{} {:?}: {comparison:?}", entry.name(), case.problem);
                // It was no plain call: other sums give other bits somewhere.
                let plain = case.run(&device, &*entry.backend).unwrap();
                assert_ne!(outcome.out, plain.out, "{} {:?} shared nothing", entry.name(), case.problem);
                served += 1;
            }
        }
        assert!(served >= 2, "{served} served on {device:?}");
    }
}

#[test]
fn what_saves_too_little_has_the_bits_of_the_backend() {
    let registry = Registry::global().unwrap();
    let cpu = registry.backend("cpu").unwrap();
    let device = Device::cpu();
    let mut case = cases().swap_remove(0);
    case.problem.lse = true;
    let kernel = Cascade::prepare(&*cpu.backend, &device, &case.problem).unwrap();
    assert!(kernel.plan(&case.batch).unwrap().parts().is_empty(), "a few pages are not worth it");
    let kernel = kernel.sharing_above(0);
    let plan = kernel.plan(&case.batch).unwrap();
    assert_eq!(plan.parts().len(), 2);
    assert_eq!(plan.batch(), &case.batch);
    // What nobody shares is served whole.
    let alone = random::case(5, &Spec::new(case.problem.kind, DType::F32, &[(1, 200), (2, 150)]));
    let kernel = Shared(Arc::clone(&cpu.backend));
    assert_eq!(case_bits(&alone, &device, &kernel), case_bits(&alone, &device, &*cpu.backend));
}

fn case_bits(case: &Case, device: &Device, backend: &dyn AttentionBackend) -> Vec<u32> {
    case.run(device, backend).unwrap().out.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_long_prefix_of_many_is_worth_it() {
    let kind = AttentionKind::Gqa { query_heads: 32, kv_heads: 8, head_dim: 128, value_dim: 128 };
    let device = Device::cpu();
    let cpu = Registry::global().unwrap().backend("cpu").unwrap();
    let kernel = Cascade::prepare(&*cpu.backend, &device, &AttentionProblem::new(kind, DType::F16)).unwrap();
    let mut batch = BatchLayout::new(16, 300);
    for sequence in 0..8 {
        let mut pages: Vec<i32> = (0..256).collect();
        pages.push(256 + sequence);
        batch.push(1, 4100, &pages);
    }
    assert_eq!(kernel.plan(&batch).unwrap().parts().len(), 2);
}

#[test]
fn declines_what_needs_positions() {
    let kind = AttentionKind::Gqa { query_heads: 2, kv_heads: 1, head_dim: 64, value_dim: 64 };
    let registry = Registry::global().unwrap();
    let cpu = registry.backend("cpu").unwrap();
    let refused = |backend: &dyn AttentionBackend, device: &Device, problem: &AttentionProblem| {
        Cascade::prepare(backend, device, problem).expect_err("refused").to_string()
    };
    let problem = AttentionProblem::new(kind, DType::F32);
    let window = problem.clone().window(Some(Window { left: Some(9), right: None }));
    assert!(refused(&*cpu.backend, &Device::cpu(), &window).contains("sliding window not supported"));
    let mut alibi = problem.clone();
    alibi.alibi = true;
    assert!(refused(&*cpu.backend, &Device::cpu(), &alibi).contains("under ALiBi not supported"));
    // A backend without what the shared part needs says so.
    if let Some(device) = devices().get(1) {
        let plain = registry.backend("plain").unwrap();
        assert!(refused(&*plain.backend, device, &problem).contains("non-causal attention not supported"));
    }
}
