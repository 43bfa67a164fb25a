//! A backend that is right, and the same with one bug at a time: the kit passes the first and catches each of the
//! others, by the trial that is meant for it.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use half::{bf16, f16};
use polyattn_api::{
    AttentionBackend, AttentionIo, AttentionKernel, AttentionKind, AttentionProblem, BackendError, BatchLayout,
    BufferSlice, Capabilities, Commands, DType, Decline, Device, DeviceFacts, DeviceNeed, Dims, DtypeSet, KvDType,
    KvDtypeSet, Mask, Origin, Phase, PhaseSet, Plan, PlanPool, RegisteredBackend, StoreKv, StoreRotated,
};
use polyattn_conformance::suite;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bug {
    None,
    OneKeyTooMany,
    MaskOffByOne,
    ScaleMissing,
    WindowInclusive,
    GqaHeadMapping,
    StalePage,
    SinkForgotten,
    SinkNotInLse,
    LseBaseTwo,
    SoftcapAfterMask,
    TreeBitOrder,
    BatchMixing,
    ValueDimIsHeadDim,
    AlibiFromZero,
    SpanEndsEarly,
    SequencesAllCausal,
    EmptyRowsAreNan,
    GarbageLeaks,
    NoHighestSubtracted,
    Nondeterministic,
    BatchVariant,
    RowNotWritten,
    StoresNextDoor,
    StoresTruncated,
    StoresNoRotated,
    ServesUnasked,
    PreparesDeclined,
    MovingDeclines,
    TakesSmallBuffers,
    PanicsInDeclines,
    PanicsInPrepare,
    PanicsInEncode,
    DeclinesItsOwn,
}

const CAN: Capabilities = Capabilities::none(DeviceNeed::Cpu)
    .gqa(Dims::Steps { min: 8, max: 64, step: 8 })
    .value_dims(Dims::Steps { min: 8, max: 64, step: 8 })
    .causal()
    .non_causal()
    .per_sequence_causal()
    .tree()
    .prefix_spans()
    .sliding_window()
    .softcap()
    .sinks()
    .alibi()
    .lse()
    .mixed_dtypes()
    .deterministic()
    .batch_invariant()
    .dtypes(DtypeSet::of(&[DType::F32, DType::F16]), KvDtypeSet::of(&[KvDType::F32, KvDType::BF16]))
    .page_sizes(Dims::Steps { min: 1, max: 128, step: 1 })
    .phases(PhaseSet::of(&[Phase::Prefill, Phase::Decode, Phase::Verify]));

#[derive(Debug)]
struct Naive(Bug);

impl AttentionBackend for Naive {
    fn name(&self) -> &'static str {
        "naive"
    }

    fn capabilities(&self) -> &Capabilities {
        &CAN
    }

    fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        static ASKED: AtomicU32 = AtomicU32::new(0);
        assert_ne!(self.0, Bug::PanicsInDeclines, "planted");
        let mut reasons = CAN.declines(problem, device);
        match self.0 {
            Bug::ServesUnasked => reasons.retain(|reason| !matches!(reason, Decline::HeadDim(_))),
            Bug::MovingDeclines if !reasons.is_empty() => {
                let asked = ASKED.fetch_add(1, Ordering::Relaxed);
                reasons.push(Decline::Other(format!("question {asked}").into()));
            }
            Bug::DeclinesItsOwn if problem.softcap.is_some() => reasons.push(Decline::Other("this softcap".into())),
            _ => {}
        }
        reasons
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        assert_ne!(self.0, Bug::PanicsInPrepare, "planted");
        let reasons = CAN.declines(problem, device.facts());
        if !reasons.is_empty() && self.0 != Bug::PreparesDeclined {
            return Err(BackendError::Declined(reasons));
        }
        let (device, problem, pool) = (device.clone(), problem.clone(), PlanPool::default());
        Ok(Arc::new(Kernel { bug: self.0, device, problem, pool, calls: AtomicU32::new(0) }))
    }
}

#[derive(Debug)]
struct Kernel {
    bug: Bug,
    device: Device,
    problem: AttentionProblem,
    pool: PlanPool,
    calls: AtomicU32,
}

/// A buffer's values as f32.
fn floats(slice: BufferSlice<'_>, dtype: KvDType) -> Vec<f32> {
    let buffer = slice.buffer();
    match dtype {
        KvDType::F32 => buffer.read::<f32>().unwrap().to_vec(),
        KvDType::F16 => buffer.read::<f16>().unwrap().iter().map(|x| x.to_f32()).collect(),
        _ => buffer.read::<bf16>().unwrap().iter().map(|x| x.to_f32()).collect(),
    }
}

impl Kernel {
    /// Whether a row sees a key: the contract, with the bugs that concern it.
    fn sees(&self, batch: &BatchLayout, sequence: usize, query: u32, key: u32) -> bool {
        let (start, queries) = batch.queries(sequence);
        let context = batch.kv_len[sequence] - queries;
        let position = context + query;
        let causal = match (&batch.causal, self.bug) {
            (Some(_), Bug::SequencesAllCausal) => true,
            (Some(causal), _) => causal[sequence],
            (None, _) => self.problem.mask == Mask::Causal,
        };
        let spans = batch.prefix_spans.iter().filter(|span| span[0] as usize == sequence);
        let end = u32::from(self.bug != Bug::SpanEndsEarly);
        let in_span = |at: u32, span: &[u32; 3]| at >= span[1] && at < span[2] + end;
        let mut seen = match self.problem.mask {
            Mask::Tree if batch.causal.is_none() => {
                let tree = batch.tree.as_ref().unwrap();
                key < context || {
                    let j = key - context;
                    let bit = if self.bug == Bug::TreeBitOrder { 31 - j % 32 } else { j % 32 };
                    tree.bits[(start + query) as usize * tree.words + j as usize / 32] >> bit & 1 == 1
                }
            }
            _ if !causal => true,
            _ => {
                let behind = u32::from(self.bug == Bug::OneKeyTooMany);
                let first = u32::from(self.bug == Bug::MaskOffByOne && position > 0);
                key + first <= position + behind
                    || spans.into_iter().any(|span| in_span(position, span) && in_span(key, span))
            }
        };
        if let Some(window) = self.problem.window {
            let left = window.left.map(|left| left + u32::from(self.bug == Bug::WindowInclusive));
            seen &= left.is_none_or(|left| key + left >= position);
            seen &= window.right.is_none_or(|right| key <= position + right);
        }
        seen
    }
}

impl AttentionKernel for Kernel {
    fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError> {
        Plan::new(&self.device, &self.pool, &self.problem, batch, Vec::new())
    }

    fn store_kv(&self, commands: &mut Commands, plan: &Plan, io: &StoreKv<'_>) -> Result<(), BackendError> {
        let batch = plan.batch();
        let AttentionKind::Gqa { kv_heads, head_dim, value_dim, .. } = self.problem.kind else { return Ok(()) };
        let _ = commands;
        let shift = usize::from(self.bug == Bug::StoresNextDoor);
        let rows = io.k.buffer().read::<f32>()?;
        for (cache, dim, offset, stride) in
            [(io.k_cache, head_dim, io.k_offset, io.k_stride), (io.v_cache, value_dim, io.v_offset, io.v_stride)]
        {
            let width = (kv_heads * dim) as usize;
            for sequence in 0..batch.sequences() {
                let (start, queries) = batch.queries(sequence);
                for query in 0..queries {
                    let slot = batch.slot(sequence, batch.kv_len[sequence] - queries + query) + shift;
                    let from = offset as usize + (start + query) as usize * stride as usize;
                    let values = &rows[from..from + width];
                    match self.problem.kv_dtype {
                        KvDType::F32 => cache.buffer().write::<f32>()?[slot * width..][..width].copy_from_slice(values),
                        _ => {
                            let mut cache = cache.buffer().write::<bf16>()?;
                            for (to, value) in cache[slot * width..][..width].iter_mut().zip(values) {
                                *to = match self.bug {
                                    Bug::StoresTruncated => bf16::from_bits((value.to_bits() >> 16) as u16),
                                    _ => bf16::from_f32(*value),
                                };
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn store_rotated(&self, _: &mut Commands, _: &Plan, _: &StoreRotated<'_>) -> Result<bool, BackendError> {
        Ok(self.bug == Bug::StoresNoRotated)
    }

    fn encode(&self, _: &mut Commands, plan: &Plan, io: &AttentionIo<'_>) -> Result<(), BackendError> {
        assert_ne!(self.bug, Bug::PanicsInEncode, "planted");
        let (problem, batch) = (&self.problem, plan.batch());
        match io.validate(problem, batch) {
            Err(_) if self.bug == Bug::TakesSmallBuffers => return Ok(()),
            checked => checked?,
        }
        let AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim } = problem.kind else { return Ok(()) };
        let (heads, kv_heads) = (query_heads as usize, kv_heads as usize);
        let (dim, value_dim) = (head_dim as usize, value_dim as usize);
        let q = floats(io.q, problem.dtype.into());
        let (k, v) = (floats(io.k_cache, problem.kv_dtype), floats(io.v_cache, problem.kv_dtype));
        let optional = |slice: Option<BufferSlice<'_>>| slice.map(|slice| floats(slice, KvDType::F32));
        let (sinks, slopes) = (optional(io.sinks), optional(io.alibi_slopes));
        let mut out = io.out.buffer().write::<f32>()?;
        let mut lse = io.lse.map(|lse| lse.buffer().write::<f32>()).transpose()?;
        let calls = self.calls.fetch_add(1, Ordering::Relaxed);

        for sequence in 0..batch.sequences() {
            let (start, queries) = batch.queries(sequence);
            let mut length = batch.kv_len[sequence];
            if self.bug == Bug::BatchMixing {
                length = length.min(batch.kv_len[0].max(1));
            }
            for (query, head) in (0..queries).flat_map(|query| (0..heads).map(move |head| (query, head))) {
                let row = (start + query) as usize * heads + head;
                if self.bug == Bug::RowNotWritten && query == 19 {
                    continue;
                }
                let kv_head = if self.bug == Bug::GqaHeadMapping { head % kv_heads } else { head * kv_heads / heads };
                let slot = |key: u32| match self.bug {
                    Bug::StalePage if key >= 2 * batch.page_size => batch.slot(sequence, key - batch.page_size),
                    _ => batch.slot(sequence, key),
                };
                let position = batch.kv_len[sequence] - queries + query;
                let visible: Vec<(u32, bool)> =
                    (0..length).map(|key| (key, self.sees(batch, sequence, query, key))).collect();
                let scale = if self.bug == Bug::ScaleMissing { 1.0 } else { problem.scale };
                let logit = |key: u32, seen: bool| {
                    let at = (slot(key) * kv_heads + kv_head) * dim;
                    let mut x: f32 = (0..dim).map(|i| q[row * dim + i] * k[at + i]).sum::<f32>() * scale;
                    let cap = |x: f32| problem.softcap.map_or(x, |cap| cap * (x / cap).tanh());
                    if self.bug != Bug::SoftcapAfterMask {
                        x = cap(x);
                    }
                    if let Some(slopes) = &slopes {
                        let base = if self.bug == Bug::AlibiFromZero { 0 } else { position };
                        x += slopes[head] * (key as f32 - base as f32);
                    }
                    let x = if seen { x } else { f32::NEG_INFINITY };
                    if self.bug == Bug::SoftcapAfterMask { cap(x) } else { x }
                };
                let logits: Vec<(u32, f32)> = visible
                    .iter()
                    .filter(|(_, seen)| *seen || self.bug == Bug::SoftcapAfterMask)
                    .map(|(key, seen)| (*key, logit(*key, *seen)))
                    .collect();
                let sink = sinks.as_ref().filter(|_| self.bug != Bug::SinkForgotten).map(|sinks| sinks[head]);
                let top = logits.iter().map(|(_, x)| *x).chain(sink).fold(f32::NEG_INFINITY, f32::max);
                let base = match self.bug {
                    Bug::NoHighestSubtracted => 0.0,
                    _ if top == f32::NEG_INFINITY => 0.0,
                    _ => top,
                };
                let mut weights: Vec<(u32, f32)> = logits.iter().map(|(key, x)| (*key, (x - base).exp())).collect();
                match self.bug {
                    // The order of a sum shows in its last bits.
                    Bug::Nondeterministic if calls.is_multiple_of(3) => weights.reverse(),
                    Bug::BatchVariant if batch.sequences() > 1 => weights.reverse(),
                    _ => {}
                }
                let keys: f32 = weights.iter().map(|(_, w)| w).sum();
                let total = keys + sink.map_or(0.0, |sink| (sink - base).exp());
                let values = if self.bug == Bug::ValueDimIsHeadDim { dim } else { value_dim };
                for i in 0..value_dim {
                    let mut sum = 0.0;
                    for (key, weight) in &weights {
                        sum += weight * v.get((slot(*key) * kv_heads + kv_head) * values + i).copied().unwrap_or(0.0);
                    }
                    if self.bug == Bug::GarbageLeaks {
                        // What lies behind the sequence, under a weight of zero.
                        let last = batch.page_table[sequence * batch.max_pages..][..batch.max_pages].iter();
                        let page = last.rev().find(|page| **page >= 0).copied().unwrap_or(0) as usize;
                        let end = ((page + 1) * batch.page_size as usize - 1) * kv_heads + kv_head;
                        sum += 0.0 * v[end * value_dim + i];
                    }
                    let nothing = total == 0.0 && self.bug != Bug::EmptyRowsAreNan;
                    out[row * value_dim + i] = if nothing { 0.0 } else { sum / total };
                }
                if let Some(lse) = &mut lse {
                    let total = if self.bug == Bug::SinkNotInLse { keys } else { total };
                    lse[row] = match self.bug {
                        _ if total == 0.0 => f32::NEG_INFINITY,
                        Bug::LseBaseTwo => total.log2() + base,
                        _ => total.ln() + base,
                    };
                }
            }
        }
        Ok(())
    }
}

/// The names and messages of the trials that fail for a bug.
fn failures(bug: Bug) -> Vec<(String, String)> {
    let origin = Origin { crate_name: "planted", version: "0.0.0" };
    let backend = RegisteredBackend { origin, priority: 0, backend: Arc::new(Naive(bug)) };
    let failed = suite(&backend, &Device::cpu()).into_iter().filter_map(|trial| {
        let name = trial.name().to_owned();
        trial.run().err().map(|failure| (name, failure.to_string()))
    });
    failed.collect()
}

#[test]
fn a_right_backend_passes() {
    let failed = failures(Bug::None);
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Each bug with the trial that is meant for it, and what that says.
const CAUGHT: [(Bug, &str, &str); 33] = [
    (Bug::OneKeyTooMany, "gqa/masks/causal", "the answer is wrong"),
    (Bug::MaskOffByOne, "gqa/masks/causal", "the answer is wrong"),
    (Bug::ScaleMissing, "gqa/edges/a scale of its own", "the answer is wrong"),
    (Bug::WindowInclusive, "gqa/windows/left", "the answer is wrong"),
    (Bug::GqaHeadMapping, "gqa/dims/15 over 3 heads of 64, values of 64", "the answer is wrong"),
    (Bug::StalePage, "gqa/pages/16", "the answer is wrong"),
    (Bug::SinkForgotten, "gqa/logits/sinks", "the answer is wrong"),
    (Bug::SinkNotInLse, "gqa/logits/sinks", "of the LSE"),
    (Bug::LseBaseTwo, "gqa/masks/causal", "of the LSE"),
    (Bug::SoftcapAfterMask, "gqa/logits/softcap under a causal mask", "the answer is wrong"),
    (Bug::TreeBitOrder, "gqa/masks/tree", "the answer is wrong"),
    (Bug::BatchMixing, "gqa/edges/lengths far apart", "the answer is wrong"),
    (Bug::ValueDimIsHeadDim, "gqa/dims/4 over 2 heads of 64, values of 24", ""),
    (Bug::AlibiFromZero, "gqa/logits/ALiBi", "of the LSE"),
    (Bug::SpanEndsEarly, "gqa/masks/prefix spans", "the answer is wrong"),
    (Bug::SequencesAllCausal, "gqa/masks/causality per sequence", "the answer is wrong"),
    (Bug::EmptyRowsAreNan, "gqa/edges/rows that see nothing", "are NaN"),
    (Bug::GarbageLeaks, "gqa/masks/causal", "are NaN"),
    (Bug::NoHighestSubtracted, "gqa/edges/large logits", "are NaN"),
    (Bug::Nondeterministic, "gqa/bits/f32 over f32/the same call gives the same bits", "have other bits"),
    (Bug::BatchVariant, "gqa/bits/f32 over f32/a sequence has the same bits alone", "have other bits"),
    (Bug::RowNotWritten, "gqa/masks/causal", "were not written"),
    (Bug::StoresNextDoor, "gqa/store/f32 rows into f32", "K cache: a row is wrong"),
    (Bug::StoresTruncated, "gqa/store/f32 rows into bf16", "a row is wrong"),
    (Bug::StoresNoRotated, "gqa/store/f32 rows into f32", "stored with a rotation, K cache: a row is wrong"),
    (Bug::ServesUnasked, "gqa/declines/head_dim 20", "declines nothing"),
    (Bug::PreparesDeclined, "gqa/declines/head_dim 20", "prepares a kernel for it all the same"),
    (Bug::MovingDeclines, "gqa/declines/head_dim 20", "gives two answers"),
    (Bug::TakesSmallBuffers, "gqa/declines/buffers that are too small", "it takes 16 bytes for the whole of q"),
    (Bug::PanicsInDeclines, "gqa/masks/causal", "panicked when asked"),
    (Bug::PanicsInPrepare, "gqa/masks/causal", "'naive' is at fault: it panicked in prepare: "),
    (Bug::PanicsInEncode, "gqa/masks/causal", "'naive' is at fault: it panicked in encode: "),
    (Bug::DeclinesItsOwn, "gqa/logits/softcap", "it advertises this and declines it: this softcap not supported"),
];

#[test]
fn every_bug_is_caught() {
    let mut missed = Vec::new();
    for (bug, trial, message) in CAUGHT {
        let failed = failures(bug);
        match failed.iter().find(|(name, _)| name == trial) {
            None => {
                let names: Vec<_> = failed.iter().map(|(name, _)| name).collect();
                missed.push(format!("{bug:?}: '{trial}' passed; failed were {names:?}"));
            }
            Some((_, said)) if !said.contains(message) => missed.push(format!("{bug:?}: '{trial}' said {said}")),
            Some(_) => {}
        }
    }
    assert!(missed.is_empty(), "{}", missed.join("\n"));
}

#[test]
fn a_wrong_answer_leaves_a_replay_file_that_shows_it() {
    let origin = Origin { crate_name: "planted", version: "0.0.0" };
    let backend = RegisteredBackend { origin, priority: 0, backend: Arc::new(Naive(Bug::ScaleMissing)) };
    let trials = suite(&backend, &Device::cpu());
    let failure = trials.into_iter().find(|trial| trial.name() == "gqa/random/problems").unwrap().run().unwrap_err();
    let case = polyattn_replay::Case::load(failure.replay().expect("a file")).unwrap();
    let compare = |backend: &dyn AttentionBackend| {
        let outcome = case.run(&Device::cpu(), backend).unwrap();
        polyattn_replay::Comparison::of(&case, &outcome).unwrap().within_tolerance
    };
    assert!(!compare(&Naive(Bug::ScaleMissing)) && compare(&Naive(Bug::None)));
    // The simplest problem that shows it: one sequence that has something to see.
    assert!(case.batch.sequences() <= 2, "{:?}", case.batch);
}

#[test]
fn on_another_device_it_must_say_so() {
    let origin = Origin { crate_name: "planted", version: "0.0.0" };
    let Ok(gpu) = Device::open(&polyattn_api::device::DeviceChoice::Gpu) else {
        eprintln!("skipped: no GPU");
        return;
    };
    let trials = |bug| {
        let backend = RegisteredBackend { origin, priority: 0, backend: Arc::new(Naive(bug)) };
        suite(&backend, &gpu)
            .into_iter()
            .map(|trial| (trial.name().to_owned(), trial.run().is_ok()))
            .collect::<Vec<_>>()
    };
    assert_eq!(trials(Bug::None), [("declines/this device".to_owned(), true)]);
    assert_eq!(trials(Bug::PreparesDeclined), [("declines/this device".to_owned(), false)]);
}
