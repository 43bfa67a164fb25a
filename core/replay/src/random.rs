//! Random problems for testing backends.

use polyattn_api::{AttentionKind, AttentionProblem, BatchLayout, DType, KvDType, Mask, TreeMask, Window};

use crate::{Case, case::phase_of, number};

/// What a random problem is like. Start from [`Spec::new`] and change fields:
///
/// ```
/// use polyattn_api::{AttentionKind, DType, Mask};
/// use polyattn_replay::random::{self, Spec};
///
/// let kind = AttentionKind::Gqa { query_heads: 8, kv_heads: 2, head_dim: 64, value_dim: 64 };
/// let spec = Spec { mask: Mask::Tree, softcap: Some(30.0), ..Spec::new(kind, DType::F16, &[(7, 100), (1, 33)]) };
/// assert_eq!(random::case(1, &spec).batch.rows(), 8);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Spec {
    /// Form, heads and dims.
    pub kind: AttentionKind,
    /// Format of the queries.
    pub dtype: DType,
    /// Format of the cache.
    pub kv_dtype: KvDType,
    /// Which keys a row sees. A tree is random: every row sees itself and the ancestors of one earlier row.
    pub mask: Mask,
    /// Sliding window.
    pub window: Option<Window>,
    /// Softcap of the logits.
    pub softcap: Option<f32>,
    /// With a random sink for each head.
    pub sinks: bool,
    /// With ALiBi slopes.
    pub alibi: bool,
    /// With random causality of each sequence.
    pub per_sequence_causal: bool,
    /// With a random span in every sequence that has keys.
    pub prefix_spans: bool,
    /// Tokens of a page.
    pub page_size: u32,
    /// Query rows and cached tokens (queries included) of each sequence. Query rows beyond the tokens are dropped.
    pub sequences: Vec<(u32, u32)>,
}

impl Spec {
    /// Causal attention in pages of 16 tokens, cache and queries of one format, and nothing else asked for.
    #[must_use]
    pub fn new(kind: AttentionKind, dtype: DType, sequences: &[(u32, u32)]) -> Self {
        Self {
            kind,
            dtype,
            kv_dtype: dtype.into(),
            mask: Mask::Causal,
            window: None,
            softcap: None,
            sinks: false,
            alibi: false,
            per_sequence_causal: false,
            prefix_spans: false,
            page_size: 16,
            sequences: sequences.to_vec(),
        }
    }
}

/// A problem like `spec`, the same for the same `seed`. Pages are shuffled; two pages are nobody's; whatever lies in
/// those or beyond a sequence's tokens is NaN (with `q8` the scales are). It records no answer.
#[must_use]
pub fn case(seed: u64, spec: &Spec) -> Case {
    let mut random = Random::new(seed);
    let page_size = spec.page_size.max(1);
    let sequences: Vec<_> = spec.sequences.iter().map(|(queries, length)| (*queries.min(length), *length)).collect();

    let needed: u32 = sequences.iter().map(|(_, length)| length.div_ceil(page_size)).sum();
    let pool = needed + 2;
    let mut pages: Vec<i32> = (0..pool.cast_signed()).collect();
    random.shuffle(&mut pages);
    let mut batch = BatchLayout::new(page_size, pool);
    let mut live = vec![false; (pool * page_size) as usize];
    for (queries, length) in &sequences {
        let mut own = pages.split_off(pages.len() - length.div_ceil(page_size) as usize);
        // A table may be wider than what it needs.
        own.push(-1);
        batch.push(*queries, *length, &own);
        let sequence = batch.sequences() - 1;
        for position in 0..*length {
            live[batch.slot(sequence, position)] = true;
        }
    }
    if spec.per_sequence_causal {
        batch.causal = Some(sequences.iter().map(|_| random.below(2) == 1).collect());
    }
    if spec.prefix_spans {
        for (sequence, (_, length)) in sequences.iter().enumerate().filter(|(_, (_, length))| *length > 0) {
            let (a, b) = (random.below(*length), random.below(*length));
            batch.prefix_spans.push([sequence as u32, a.min(b), a.max(b)]);
        }
    }
    if spec.mask == Mask::Tree {
        batch.tree = Some(tree(&mut random, &sequences));
    }

    let mut problem = AttentionProblem::new(spec.kind, spec.dtype).layer("random").mask(spec.mask).window(spec.window);
    problem.kv_dtype = spec.kv_dtype;
    problem.softcap = spec.softcap;
    problem.sinks = spec.sinks;
    problem.alibi = spec.alibi;
    problem.per_sequence_causal = batch.causal.is_some();
    problem.prefix_spans = !batch.prefix_spans.is_empty();
    problem.phase = phase_of(&batch);

    let heads = spec.kind.query_heads();
    let mut q = Vec::new();
    for _ in 0..u64::from(batch.rows()) * u64::from(heads) * u64::from(spec.kind.query_dim()) {
        number::push(&mut q, spec.dtype.into(), random.normal());
    }
    let mut cache = |row: u32| {
        let mut data = Vec::new();
        for live in &live {
            for _ in 0..row {
                let value = match (live, spec.kv_dtype) {
                    (true, KvDType::Q8) => random.below(255) as f32 - 127.0,
                    (true, _) => random.normal(),
                    (false, KvDType::Q8) => 127.0,
                    (false, _) => f32::NAN,
                };
                number::push(&mut data, spec.kv_dtype, value);
            }
        }
        data
    };
    let kv_heads = spec.kind.kv_heads();
    let k_cache = cache(kv_heads * spec.kind.query_dim());
    let v_cache = match spec.kind {
        AttentionKind::Mla { .. } => Vec::new(),
        _ => cache(kv_heads * spec.kind.output_dim()),
    };

    let mut case = Case::new(problem, batch, q, k_cache, v_cache);
    if spec.kv_dtype == KvDType::Q8 {
        let mut scales = || {
            let each = live.iter().flat_map(|live| std::iter::repeat_n(*live, kv_heads as usize));
            each.map(|live| if live { (0.5 + random.unit()) / 64.0 } else { f32::NAN }).collect::<Vec<_>>()
        };
        case.k_scale = Some(scales());
        // The latent is key and value at once, so it has one scale.
        case.v_scale = (!matches!(spec.kind, AttentionKind::Mla { .. })).then(scales);
    }
    case.sinks = spec.sinks.then(|| (0..heads).map(|_| random.normal()).collect());
    case.alibi_slopes =
        spec.alibi.then(|| (1..=heads).map(|head| (-8.0 * head as f32 / heads as f32).exp2()).collect());
    case
}

/// Random trees: a row sees itself and what its parent, an earlier row, sees.
fn tree(random: &mut Random, sequences: &[(u32, u32)]) -> TreeMask {
    let most = sequences.iter().map(|(queries, _)| *queries).max().unwrap_or(0);
    let words = most.div_ceil(32).max(1) as usize;
    let mut bits: Vec<u32> = Vec::new();
    for (queries, _) in sequences {
        let first = bits.len();
        for query in 0..*queries {
            let row = bits.len();
            if query == 0 {
                bits.resize(row + words, 0);
            } else {
                let parent = first + random.below(query) as usize * words;
                bits.extend_from_within(parent..parent + words);
            }
            bits[row + query as usize / 32] |= 1 << (query % 32);
        }
    }
    TreeMask { words, bits }
}

/// A xorshift generator: a few lines in place of a dependency.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Neighbouring seeds must not give neighbouring sequences, nor seed 0 the fixed point.
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d | 1);
        for _ in 0..8 {
            random.next();
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number in 0..`limit`.
    fn below(&mut self, limit: u32) -> u32 {
        (((self.next() >> 32) * u64::from(limit.max(1))) >> 32) as u32
    }

    /// A number in 0..1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 24) as f32
    }

    /// About normal: mean 0, variance 1.
    fn normal(&mut self) -> f32 {
        let sum: f32 = (0..6).map(|_| self.unit()).sum();
        (sum - 3.0) * std::f32::consts::SQRT_2
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at as u32 + 1) as usize);
        }
    }
}
