//! One trial for each feature, format, size and phase that is advertised.

use polyattn_api::{AttentionKind, KvLayout, Mask, Phase, Window};
use polyattn_replay::random::Spec;

use super::{
    Trials,
    subject::{Subject, gqa, kind_name, samples},
};

pub(super) fn trials(trials: &mut Trials) {
    let subject = trials.subject.clone();
    let can = subject.can();
    let Some(phase) = subject.phases().first().copied() else { return };
    for kind in subject.kinds() {
        let Some(base) = subject.spec(kind) else { continue };
        let name = kind_name(kind);
        for (group, what, spec) in features(&subject, &base) {
            served(trials, format!("{name}/{group}/{what}"), spec, phase);
        }
        for (dtype, kv_dtype) in subject.formats() {
            served(
                trials,
                format!("{name}/formats/{dtype} over {kv_dtype}"),
                Spec { dtype, kv_dtype, ..base.clone() },
                phase,
            );
        }
        for kind in kinds(&subject, kind) {
            let what = match kind {
                AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim } => {
                    format!("{query_heads} over {kv_heads} heads of {head_dim}, values of {value_dim}")
                }
                AttentionKind::Mla { query_heads, latent_dim, rope_dim } => {
                    format!("{query_heads} heads, latent {latent_dim}, rope {rope_dim}")
                }
                _ => continue,
            };
            served(trials, format!("{name}/dims/{what}"), Spec { kind, ..base.clone() }, phase);
        }
        for page_size in samples(can.page_sizes, &[1, 7, 16, 64, 100]) {
            served(trials, format!("{name}/pages/{page_size}"), Spec { page_size, ..base.clone() }, phase);
        }
        for phase in subject.phases() {
            served(trials, format!("{name}/phases/{phase}"), base.clone(), phase);
        }
        for layout in KvLayout::of(kind).iter().filter(|layout| can.kv_layouts.contains(layout)) {
            let (spec, layout) = (base.clone(), *layout);
            trials.add(format!("{name}/layouts/{}", layout.name()), move |subject| {
                let mut case = subject.case(0, &spec, phase);
                case.problem.kv_layout = layout;
                subject.check(&case)
            });
        }
    }
}

fn served(trials: &mut Trials, name: String, spec: Spec, phase: Phase) {
    let seed = name.bytes().fold(1u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(u64::from(byte)));
    trials.add(name, move |subject| subject.check(&subject.case(seed, &spec, phase)));
}

/// Group, name and specification of every advertised feature.
fn features(subject: &Subject, base: &Spec) -> Vec<(&'static str, &'static str, Spec)> {
    let can = subject.can();
    let mut all = Vec::new();
    let mut add = |claimed: bool, group, what, change: &dyn Fn(&mut Spec)| {
        if claimed {
            let mut spec = base.clone();
            change(&mut spec);
            all.push((group, what, spec));
        }
    };
    let window = |left, right| Some(Window { left, right });
    add(can.causal, "masks", "causal", &|s| s.mask = Mask::Causal);
    add(can.non_causal, "masks", "bidirectional", &|s| s.mask = Mask::Bidirectional);
    add(can.tree, "masks", "tree", &|s| s.mask = Mask::Tree);
    add(can.tree, "masks", "tree of two words", &|s| {
        (s.mask, s.sequences) = (Mask::Tree, vec![(40, 45), (3, 70), (33, 33)]);
    });
    let sequences = can.per_sequence_causal && base.mask != Mask::Tree;
    add(sequences, "masks", "causality per sequence", &|s| s.per_sequence_causal = true);
    add(can.prefix_spans && can.causal, "masks", "prefix spans", &|s| {
        (s.mask, s.prefix_spans) = (Mask::Causal, true);
    });
    let sliding = can.sliding_window;
    add(sliding && can.causal, "windows", "left", &|s| (s.mask, s.window) = (Mask::Causal, window(Some(17), Some(0))));
    add(sliding && can.causal, "windows", "left, right open", &|s| {
        (s.mask, s.window) = (Mask::Causal, window(Some(5), None));
    });
    add(sliding && can.causal, "windows", "the own key alone", &|s| {
        (s.mask, s.window) = (Mask::Causal, window(Some(0), Some(0)));
    });
    add(sliding && can.non_causal, "windows", "both sides", &|s| {
        (s.mask, s.window) = (Mask::Bidirectional, window(Some(6), Some(3)));
    });
    add(sliding && can.non_causal, "windows", "right", &|s| {
        (s.mask, s.window) = (Mask::Bidirectional, window(None, Some(2)));
    });
    add(sliding && can.tree, "windows", "over a tree", &|s| {
        (s.mask, s.window) = (Mask::Tree, window(Some(9), Some(1)));
    });
    add(can.softcap, "logits", "softcap", &|s| s.softcap = Some(1.5));
    add(can.softcap && can.tree, "logits", "softcap over a tree", &|s| (s.mask, s.softcap) = (Mask::Tree, Some(0.7)));
    add(can.softcap && can.causal, "logits", "softcap under a causal mask", &|s| {
        (s.mask, s.softcap) = (Mask::Causal, Some(0.7));
    });
    add(can.sinks, "logits", "sinks", &|s| s.sinks = true);
    add(can.alibi, "logits", "ALiBi", &|s| s.alibi = true);
    add(can.alibi && can.non_causal, "logits", "ALiBi both ways", &|s| (s.mask, s.alibi) = (Mask::Bidirectional, true));
    add(can.softcap && can.sinks && can.alibi && sliding, "logits", "all at once", &|s| {
        (s.softcap, s.sinks, s.alibi, s.window) = (Some(2.0), true, true, window(Some(30), None));
    });
    all
}

/// Heads and dims to sample.
fn kinds(subject: &Subject, base: AttentionKind) -> Vec<AttentionKind> {
    let can = subject.can();
    match base {
        AttentionKind::Gqa { head_dim, .. } => {
            let dims = samples(can.head_dims, &[8, 16, 40, 64, 72, 96, 128, 256]);
            let heads =
                [(1, 1), (4, 1), (5, 5), (15, 3)].map(|(query_heads, kv_heads)| gqa(query_heads, kv_heads, head_dim));
            let values = samples(can.value_dims, &[8, 24, 32, 128]).into_iter().filter(|dim| *dim != head_dim);
            let values =
                values.map(|value_dim| AttentionKind::Gqa { query_heads: 4, kv_heads: 2, head_dim, value_dim });
            dims.into_iter().map(|dim| gqa(4, 2, dim)).chain(heads).chain(values).collect()
        }
        AttentionKind::Mla { latent_dim, rope_dim, .. } => {
            let latents = samples(can.latent_dims, &[16, 32, 128, 512]);
            let latents =
                latents.into_iter().map(|latent_dim| AttentionKind::Mla { query_heads: 3, latent_dim, rope_dim });
            let ropes = samples(can.rope_dims, &[8, 32, 64]);
            let ropes = ropes.into_iter().map(|rope_dim| AttentionKind::Mla { query_heads: 2, latent_dim, rope_dim });
            let heads = [1, 16].map(|query_heads| AttentionKind::Mla { query_heads, latent_dim, rope_dim });
            latents.chain(ropes).chain(heads).collect()
        }
        _ => Vec::new(),
    }
}
