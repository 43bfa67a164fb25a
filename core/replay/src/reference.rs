//! Attention as the contract words it, in f64 and without a thought for speed: what backends are held against.

use polyattn_api::{AttentionKind, KvDType, Mask};

use crate::{Case, ReplayError, number};

/// Output `[tokens, query_heads, output_dim]` and LSE `[tokens, query_heads]` of `case`, from the values as stored.
///
/// # Errors
/// A case that contradicts itself.
pub fn attention_f64(case: &Case) -> Result<(Vec<f64>, Vec<f64>), ReplayError> {
    case.validate()?;
    let (problem, batch) = (&case.problem, &case.batch);
    let heads = problem.kind.query_heads() as usize;
    let kv_heads = problem.kind.kv_heads() as usize;
    let (dim, value_dim) = (problem.kind.query_dim() as usize, problem.kind.output_dim() as usize);
    let mut out = vec![0.0; case.out_elements()];
    let mut lse = vec![f64::NEG_INFINITY; case.lse_elements()];

    for sequence in 0..batch.sequences() {
        let (start, queries) = batch.queries(sequence);
        let length = batch.kv_len[sequence];
        let slots: Vec<usize> = (0..length).map(|key| batch.slot(sequence, key)).collect();
        for kv_head in 0..kv_heads {
            let keys: Vec<Vec<f64>> = slots.iter().map(|slot| key(case, *slot, kv_head)).collect();
            let values: Vec<Vec<f64>> = slots.iter().map(|slot| value(case, *slot, kv_head)).collect();
            let group = heads / kv_heads;
            for (query, head) in (0..queries).flat_map(|query| (0..group).map(move |at| (query, kv_head * group + at)))
            {
                let row = (start + query) as usize * heads + head;
                let q: Vec<f64> = (0..dim).map(|at| number::query(&case.q, problem.dtype, row * dim + at)).collect();
                let mut logits = Vec::new();
                for key in (0..length).filter(|key| sees(case, sequence, query, *key)) {
                    let dot: f64 = q.iter().zip(&keys[key as usize]).map(|(q, k)| q * k).sum();
                    let mut logit = dot * f64::from(problem.scale);
                    if let Some(softcap) = problem.softcap.map(f64::from) {
                        logit = softcap * (logit / softcap).tanh();
                    }
                    if let Some(slopes) = &case.alibi_slopes {
                        let distance = f64::from(key) - (f64::from(length - queries) + f64::from(query));
                        logit += f64::from(slopes[head]) * distance;
                    }
                    logits.push((key as usize, logit));
                }
                let sink = case.sinks.as_ref().map(|sinks| f64::from(sinks[head]));
                let top = logits.iter().map(|(_, logit)| *logit).chain(sink).fold(f64::NEG_INFINITY, f64::max);
                if top == f64::NEG_INFINITY {
                    continue;
                }
                let sum = logits.iter().map(|(_, logit)| (logit - top).exp()).sum::<f64>()
                    + sink.map_or(0.0, |sink| (sink - top).exp());
                lse[row] = top + sum.ln();
                for (key, logit) in logits {
                    let weight = (logit - top).exp() / sum;
                    for (out, value) in out[row * value_dim..][..value_dim].iter_mut().zip(&values[key]) {
                        *out += weight * value;
                    }
                }
            }
        }
    }
    Ok((out, lse))
}

/// Whether query row `query` of a sequence sees position `key`.
fn sees(case: &Case, sequence: usize, query: u32, key: u32) -> bool {
    let (problem, batch) = (&case.problem, &case.batch);
    let (start, queries) = batch.queries(sequence);
    let first = batch.kv_len[sequence] - queries;
    let position = i64::from(first) + i64::from(query);
    let at = i64::from(key);

    // A sequence's own causality stands over the problem's mask.
    let mask = match &batch.causal {
        Some(causal) if causal[sequence] => Mask::Causal,
        Some(_) => Mask::Bidirectional,
        None => problem.mask,
    };
    let by_mask = match mask {
        Mask::Causal => {
            at <= position
                || batch.prefix_spans.iter().any(|[of, first, last]| {
                    let span = i64::from(*first)..=i64::from(*last);
                    *of as usize == sequence && span.contains(&position) && span.contains(&at)
                })
        }
        Mask::Tree => {
            key < first
                || batch.tree.as_ref().is_some_and(|tree| {
                    let (row, bit) = ((start + query) as usize, key - first);
                    tree.bits[row * tree.words + bit as usize / 32] >> (bit % 32) & 1 == 1
                })
        }
        _ => true,
    };
    let by_window = problem.window.is_none_or(|window| {
        window.left.is_none_or(|left| at >= position - i64::from(left))
            && window.right.is_none_or(|right| at <= position + i64::from(right))
    });
    by_mask && by_window
}

fn key(case: &Case, slot: usize, kv_head: usize) -> Vec<f64> {
    let heads = case.problem.kind.kv_heads() as usize;
    let dim = case.problem.kind.query_dim() as usize;
    stored_row(&case.k_cache, case.problem.kv_dtype, slot * heads + kv_head, dim, dim, case.k_scale.as_deref())
}

fn value(case: &Case, slot: usize, kv_head: usize) -> Vec<f64> {
    let heads = case.problem.kind.kv_heads() as usize;
    let dim = case.problem.kind.output_dim() as usize;
    let (cache, width) = match case.problem.kind {
        // The value is the latent, with which the key's row begins.
        AttentionKind::Mla { .. } => (&case.k_cache, case.problem.kind.query_dim() as usize),
        _ => (&case.v_cache, dim),
    };
    let scales = case.v_scale.as_deref().or(case.k_scale.as_deref());
    stored_row(cache, case.problem.kv_dtype, slot * heads + kv_head, width, dim, scales)
}

/// The first `dim` elements of row `row` of a cache whose rows have `width` elements.
fn stored_row(cache: &[u8], dtype: KvDType, row: usize, width: usize, dim: usize, scales: Option<&[f32]>) -> Vec<f64> {
    let scale = scales.map_or(1.0, |scales| f64::from(scales[row]));
    (0..dim).map(|at| number::element(cache, dtype, row * width + at) * scale).collect()
}
