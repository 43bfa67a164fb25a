//! What is not advertised must be declined, and what contradicts itself refused.

use polyattn_api::{
    AttentionBackend, AttentionIo, AttentionKind, AttentionProblem, BatchLayout, DType, DeviceFacts, DeviceNeed,
    KvDType, KvLayout, Mask, Phase, TreeMask, Window,
};

use super::{
    Trials,
    subject::{Subject, gqa, kind_name},
};
use crate::Failure;

/// On a device that it does not run on.
pub(super) fn elsewhere(trials: &mut Trials) {
    trials.add("declines/this device".into(), |subject| {
        let kind = subject.kinds().first().copied().unwrap_or(gqa(6, 2, 64));
        declined(subject, &AttentionProblem::new(kind, DType::F16), "the device")
    });
}

pub(super) fn trials(trials: &mut Trials) {
    let subject = trials.subject.clone();
    for (kind, base) in subject.kinds().into_iter().filter_map(|kind| Some((kind, base(&subject, kind)?))) {
        let name = kind_name(kind);
        for (what, problem) in foreign(&subject, &base) {
            trials.add(format!("{name}/declines/{what}"), move |subject| declined(subject, &problem, &what));
        }
        let problem = base.clone();
        trials.add(format!("{name}/declines/the other kind of device"), move |subject| other_device(subject, &problem));
        let problem = base.clone();
        trials.add(format!("{name}/declines/batches that contradict themselves"), move |subject| {
            batches(subject, &problem)
        });
        trials.add(format!("{name}/declines/buffers that are too small"), move |subject| buffers(subject, &base));
    }
}

/// A problem that is served.
fn base(subject: &Subject, kind: AttentionKind) -> Option<AttentionProblem> {
    let spec = subject.spec(kind)?;
    let phase = *subject.phases().first()?;
    Some(subject.case(1, &spec, phase).problem)
}

/// A problem must be declined, twice alike, and not be prepared.
fn declined(subject: &Subject, problem: &AttentionProblem, what: &str) -> Result<(), Failure> {
    let facts = subject.device.facts();
    let reasons = subject.declines(problem, facts);
    if reasons.is_empty() {
        return Err(Failure::new(format!("it does not advertise {what} and declines nothing: {problem:?}")));
    }
    if subject.declines(problem, facts) != reasons {
        return Err(Failure::new(format!("asked twice about {what}, it gives two answers")));
    }
    // Past the guard: the backend itself must refuse.
    let prepared = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        subject.backend.backend.prepare(&subject.device, problem).is_ok()
    }));
    match prepared {
        Ok(false) => Ok(()),
        Ok(true) => Err(Failure::new(format!("it declines {what} and prepares a kernel for it all the same"))),
        Err(_) => Err(Failure::new(format!("it panicked in prepare when asked for {what}, which it declines"))),
    }
}

/// Every change of a served problem to something that is not advertised.
fn foreign(subject: &Subject, base: &AttentionProblem) -> Vec<(String, AttentionProblem)> {
    let can = subject.can();
    let mut all = Vec::new();
    let mut add = |served: bool, what: String, change: &dyn Fn(&mut AttentionProblem)| {
        if !served {
            let mut problem = base.clone();
            change(&mut problem);
            all.push((what, problem));
        }
    };
    add(can.causal, "causal".into(), &|p| p.mask = Mask::Causal);
    add(can.non_causal, "bidirectional".into(), &|p| p.mask = Mask::Bidirectional);
    add(can.tree, "tree".into(), &|p| p.mask = Mask::Tree);
    add(can.per_sequence_causal, "causality per sequence".into(), &|p| p.per_sequence_causal = true);
    add(can.prefix_spans, "prefix spans".into(), &|p| p.prefix_spans = true);
    add(can.sliding_window, "windows".into(), &|p| p.window = Some(Window { left: Some(4), right: Some(0) }));
    add(can.softcap, "softcap".into(), &|p| p.softcap = Some(3.0));
    add(can.sinks, "sinks".into(), &|p| p.sinks = true);
    add(can.alibi, "ALiBi".into(), &|p| p.alibi = true);
    add(can.lse, "LSE".into(), &|p| p.lse = true);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        add(can.dtypes.contains(dtype), format!("dtype {dtype}"), &|p| p.dtype = dtype);
    }
    for kv_dtype in KvDType::ALL {
        add(can.kv_dtypes.contains(kv_dtype), format!("kv dtype {kv_dtype}"), &|p| p.kv_dtype = kv_dtype);
        let other = KvDType::from(base.dtype) != kv_dtype && can.kv_dtypes.contains(kv_dtype);
        add(can.mixed_dtypes || !other, format!("{kv_dtype} under {}", base.dtype), &|p| p.kv_dtype = kv_dtype);
    }
    for phase in Phase::ALL {
        add(can.phases.contains(phase), format!("phase {phase}"), &|p| p.phase = phase);
    }
    for size in [1, 2, 3, 16, 24, 48, 64, 1 << 20] {
        add(can.page_sizes.contains(size), format!("page size {size}"), &|p| p.page_size = Some(size));
    }
    for layout in [KvLayout::PageTokenHead, KvLayout::PageHeadToken, KvLayout::PageTokenLatent] {
        add(can.kv_layouts.contains(&layout), format!("KV layout {}", layout.name()), &|p| p.kv_layout = layout);
    }
    match base.kind {
        AttentionKind::Gqa { query_heads, kv_heads, head_dim, .. } => {
            for dim in [1, 8, 20, 33, 48, 512, 1024] {
                add(can.head_dims.contains(dim), format!("head_dim {dim}"), &|p| {
                    p.kind = gqa(query_heads, kv_heads, dim);
                });
            }
            for value_dim in [8, 24, 1000].into_iter().filter(|dim| *dim != head_dim) {
                add(can.value_dims.contains(value_dim), format!("value_dim {value_dim}"), &|p| {
                    p.kind = AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim };
                });
            }
            add(false, "7 query heads over 2 KV heads".into(), &|p| p.kind = gqa(7, 2, head_dim));
            add(can.mla, "MLA".into(), &|p| {
                (p.kind, p.kv_layout) =
                    (AttentionKind::Mla { query_heads, latent_dim: 64, rope_dim: 16 }, KvLayout::PageTokenLatent);
            });
        }
        AttentionKind::Mla { query_heads, latent_dim, rope_dim } => {
            for dim in [1, 20, 4096] {
                add(can.latent_dims.contains(dim), format!("latent_dim {dim}"), &|p| {
                    p.kind = AttentionKind::Mla { query_heads, latent_dim: dim, rope_dim };
                });
                add(can.rope_dims.contains(dim), format!("rope_dim {dim}"), &|p| {
                    p.kind = AttentionKind::Mla { query_heads, latent_dim, rope_dim: dim };
                });
            }
            add(can.gqa, "GQA".into(), &|p| {
                (p.kind, p.kv_layout) = (gqa(query_heads, 1, 64), KvLayout::PageTokenHead);
            });
        }
        _ => {}
    }
    all
}

fn other_device(subject: &Subject, problem: &AttentionProblem) -> Result<(), Failure> {
    let (need, facts) = match subject.can().device {
        DeviceNeed::Cpu => ("the CPU", DeviceFacts::gpu("described")),
        DeviceNeed::Gpu => ("a GPU", DeviceFacts::cpu()),
        _ => return Ok(()),
    };
    match subject.declines(problem, &facts).is_empty() {
        true => Err(Failure::new(format!("it needs {need} and declines nothing on another device"))),
        false => Ok(()),
    }
}

/// A batch of one sequence of this problem, right but for what a trial breaks.
fn batch(problem: &AttentionProblem) -> BatchLayout {
    let page_size = problem.page_size.unwrap_or(16);
    let mut batch = BatchLayout::new(page_size, 4);
    batch.push(1, page_size + 1, &[2, 0]);
    if problem.mask == Mask::Tree {
        batch.tree = Some(TreeMask { words: 1, bits: vec![1] });
    }
    batch
}

fn batches(subject: &Subject, problem: &AttentionProblem) -> Result<(), Failure> {
    type Break = fn(&mut BatchLayout);
    let breaks: [(&str, Break); 7] = [
        ("a page beyond the pool", |b| b.page_table[0] = 4),
        ("a page that is missing", |b| b.page_table[1] = -1),
        ("more keys than pages", |b| b.kv_len[0] = 4 * b.page_size),
        ("more rows than keys", |b| b.kv_len[0] = 0),
        ("rows that begin behind their end", |b| b.query_start = vec![1, 0]),
        ("another page size", |b| b.page_size += 1),
        ("causality per sequence, unasked", |b| b.causal = Some(vec![true])),
    ];
    let kernel = subject.prepare(&subject.device, problem).map_err(|error| Failure::new(error.to_string()))?;
    kernel.plan(&batch(problem)).map_err(|error| Failure::new(format!("it refuses a batch that is right: {error}")))?;
    for (what, change) in breaks {
        let mut batch = batch(problem);
        change(&mut batch);
        if kernel.plan(&batch).is_ok() {
            return Err(Failure::new(format!("it plans a batch with {what}")));
        }
    }
    Ok(())
}

fn buffers(subject: &Subject, problem: &AttentionProblem) -> Result<(), Failure> {
    let broken = |error: &dyn std::fmt::Display| Failure::new(error.to_string());
    let device = &subject.device;
    let kernel = subject.prepare(device, problem).map_err(|error| broken(&error))?;
    let plan = kernel.plan(&batch(problem)).map_err(|error| broken(&error))?;
    let large = || device.alloc(1 << 20, "large").map_err(|error| broken(&error));
    let (q, k, v, out) = (large()?, large()?, large()?, large()?);
    let small = device.alloc(16, "small").map_err(|error| broken(&error))?;
    let latent = matches!(problem.kind, AttentionKind::Mla { .. });
    for (what, io) in [
        ("q", AttentionIo::new(&small, &k, &v, &out)),
        ("k_cache", AttentionIo::new(&q, &small, &v, &out)),
        ("v_cache", AttentionIo::new(&q, &k, &small, &out)),
        ("out", AttentionIo::new(&q, &k, &v, &small)),
    ] {
        if what == "v_cache" && latent {
            continue;
        }
        let mut commands = device.commands().map_err(|error| broken(&error))?;
        if kernel.encode(&mut commands, &plan, &io).is_ok() {
            return Err(Failure::new(format!("it takes 16 bytes for the whole of {what}")));
        }
    }
    Ok(())
}
