//! The problems that are measured, by name.

use crate::{
    api::{AttentionKind, AttentionProblem, DType, Phase, Role, Window},
    device::DeviceFacts,
};

/// One problem with its sizes: equal sequences over a paged cache.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Shape {
    /// Model, phase, and batch × context: `llama3-8b/verify-q8/8x32k`.
    pub name: String,
    /// The model whose heads these are.
    pub model: &'static str,
    /// What is computed, page size left open.
    pub problem: AttentionProblem,
    /// Sequences.
    pub batch: u32,
    /// Query rows of each sequence.
    pub rows: u32,
    /// Cached tokens of each sequence, its queries included.
    pub context: u32,
}

/// The attention of one kind of layer of a model.
struct Model {
    name: &'static str,
    kind: AttentionKind,
    /// Where it is not `query_dim^-1/2`.
    scale: Option<f32>,
    /// Keys that a row sees, its own included.
    window: Option<u32>,
    softcap: Option<f32>,
    sinks: bool,
}

const fn gqa(name: &'static str, query_heads: u32, kv_heads: u32, head_dim: u32) -> Model {
    let kind = AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim: head_dim };
    Model { name, kind, scale: None, window: None, softcap: None, sinks: false }
}

const K: u32 = 1024;

/// Sequences, query rows, context.
type Sizes = [u32; 3];

const LLAMA3_8B: Model = gqa("llama3-8b", 32, 8, 128);
const QWEN3_4B: Model = gqa("qwen3-4b", 32, 8, 128);
const QWEN3_06B: Model = gqa("qwen3-0.6b", 16, 8, 128);
const SMOLLM2: Model = gqa("smollm2-135m", 9, 3, 64);
const GEMMA2_9B: Model = Model { softcap: Some(50.0), ..gqa("gemma2-9b", 16, 8, 256) };
const GEMMA2_9B_SLIDING: Model =
    Model { window: Some(4 * K), softcap: Some(50.0), ..gqa("gemma2-9b-sliding", 16, 8, 256) };
const GPT_OSS_20B: Model = Model { sinks: true, ..gqa("gpt-oss-20b", 64, 8, 64) };
const GPT_OSS_20B_SLIDING: Model = Model { window: Some(128), sinks: true, ..gqa("gpt-oss-20b-sliding", 64, 8, 64) };
/// The scale is that of the head before absorption, 128 + 64 wide.
const DEEPSEEK_V2_LITE: Model = Model {
    name: "deepseek-v2-lite",
    kind: AttentionKind::Mla { query_heads: 16, latent_dim: 512, rope_dim: 64 },
    scale: Some(0.072_168_78),
    window: None,
    softcap: None,
    sinks: false,
};
/// The same with keys and values of heads instead of latents, as they are before absorption: another form of prefill.
const DEEPSEEK_V2_LITE_HEADS: Model = Model {
    kind: AttentionKind::Gqa { query_heads: 16, kv_heads: 16, head_dim: 192, value_dim: 128 },
    ..gqa("deepseek-v2-lite-heads", 16, 16, 192)
};

const CATALOGUE: &[(Model, &[Sizes])] = &[
    (
        LLAMA3_8B,
        &[
            // Decoding: few long sequences, many short ones, and what lies between.
            [1, 1, K],
            [1, 1, 8 * K],
            [1, 1, 32 * K],
            [1, 1, 128 * K],
            [8, 1, K],
            [8, 1, 32 * K],
            [16, 1, 8 * K],
            [64, 1, 8 * K],
            [128, 1, 8 * K],
            [256, 1, K],
            // Verification.
            [1, 4, K],
            [1, 8, 8 * K],
            [8, 2, 32 * K],
            [8, 4, 32 * K],
            [8, 8, 32 * K],
            [8, 16, 32 * K],
            [8, 32, 32 * K],
            [8, 64, 32 * K],
            // Prefill: a prompt, and a chunk over what is cached.
            [1, 2 * K, 2 * K],
            [1, 8 * K, 8 * K],
            [4, 512, 8 * K],
        ],
    ),
    (QWEN3_4B, &[[1, 1, 4 * K], [1, 8, 4 * K], [32, 1, 4 * K], [32, 8, 4 * K], [1, 4 * K, 4 * K]]),
    (QWEN3_06B, &[[1, 1, 2 * K], [1, 8, 2 * K], [256, 1, 2 * K], [64, 1, 4 * K], [64, 8, 4 * K], [1, 512, 512]]),
    (
        SMOLLM2,
        &[
            [1, 1, 256],
            [1, 1, K],
            [1, 8, 256],
            [1, 8, K],
            [1, 16, K],
            [4, 1, K],
            [4, 4, K],
            [64, 1, 2 * K],
            [1, 256, 256],
            [1, 2 * K, 2 * K],
        ],
    ),
    (GEMMA2_9B, &[[1, 1, K], [1, 1, 8 * K], [16, 1, 8 * K], [16, 8, 8 * K], [1, 4 * K, 4 * K]]),
    (GEMMA2_9B_SLIDING, &[[1, 1, 8 * K], [16, 1, 8 * K]]),
    (GPT_OSS_20B, &[[1, 1, K], [16, 1, 8 * K], [4, 1, 32 * K], [16, 8, 8 * K], [1, 4 * K, 4 * K]]),
    (GPT_OSS_20B_SLIDING, &[[1, 1, K], [16, 1, 8 * K]]),
    (
        DEEPSEEK_V2_LITE,
        &[
            [1, 1, K],
            [1, 1, 32 * K],
            [8, 1, 32 * K],
            [64, 1, 8 * K],
            [256, 1, K],
            [1, 4, K],
            [8, 2, 32 * K],
            [8, 4, 32 * K],
            [8, 8, 32 * K],
            [1, 256, 256],
            [1, 2 * K, 2 * K],
        ],
    ),
    (DEEPSEEK_V2_LITE_HEADS, &[[1, 256, 256], [1, 2 * K, 2 * K]]),
];

/// All of them, f16.
#[must_use]
pub fn catalogue() -> Vec<Shape> {
    CATALOGUE.iter().flat_map(|(model, sizes)| sizes.iter().map(|sizes| Shape::new(model, *sizes))).collect()
}

impl Shape {
    fn new(model: &Model, [batch, rows, context]: Sizes) -> Self {
        let thousands = |tokens: u32| match tokens % K {
            0 => format!("{}k", tokens / K),
            _ => tokens.to_string(),
        };
        let (phase, what) = match rows {
            1 => (Phase::Decode, "decode".to_owned()),
            2..=64 => (Phase::Verify, format!("verify-q{rows}")),
            _ if rows == context => (Phase::Prefill, "prefill".to_owned()),
            _ => (Phase::Prefill, format!("prefill-{}", thousands(rows))),
        };
        let mut problem =
            AttentionProblem::new(model.kind, DType::F16).serving(Role::Target, phase).layer(model.name).window(
                // A causal row sees nothing to its right.
                model.window.map(|keys| Window { left: Some(keys - 1), right: Some(0) }),
            );
        problem.scale = model.scale.unwrap_or(problem.scale);
        problem.softcap = model.softcap;
        problem.sinks = model.sinks;
        let name = format!("{}/{what}/{batch}x{}", model.name, thousands(context));
        Self { name, model: model.name, problem, batch, rows, context }
    }

    /// Whether its name contains `pattern`, in which `*` stands for anything.
    #[must_use]
    pub fn matches(&self, pattern: &str) -> bool {
        let mut rest = self.name.as_str();
        pattern.to_ascii_lowercase().split('*').all(|part| match rest.find(part) {
            Some(at) => {
                rest = &rest[at + part.len()..];
                true
            }
            None => false,
        })
    }

    /// The decode problem over the same cache, where this one verifies: what its time is compared with.
    #[must_use]
    pub fn decode(&self) -> Option<String> {
        let (_, sizes) = self.name.rsplit_once('/')?;
        (self.problem.phase == Phase::Verify).then(|| format!("{}/decode/{sizes}", self.model))
    }

    /// Elements of a token's keys and of its values, in one layer; latent attention has no values of its own.
    #[must_use]
    pub fn token_elements(&self) -> (u64, u64) {
        let kind = self.problem.kind;
        let heads = u64::from(kind.kv_heads());
        let values = match kind {
            AttentionKind::Mla { .. } => 0,
            _ => heads * u64::from(kind.output_dim()),
        };
        (heads * u64::from(kind.query_dim()), values)
    }

    /// Bytes of the keys and of the values of all its sequences.
    #[must_use]
    pub fn cache_bytes(&self) -> (u64, u64) {
        let tokens = u64::from(self.batch) * u64::from(self.context) * self.problem.kv_dtype.bytes();
        let (keys, values) = self.token_elements();
        (tokens * keys, tokens * values)
    }

    /// Keys that query row `row` of a sequence sees.
    fn visible(&self, row: u32) -> u64 {
        let causal = u64::from(self.context - self.rows + row) + 1;
        let left = self.problem.window.and_then(|window| window.left);
        left.map_or(causal, |left| causal.min(u64::from(left) + 1))
    }

    /// Bytes that must be moved at the least: each visible key and value once, the queries, the f32 output.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let (keys, values) = self.token_elements();
        let left = self.problem.window.and_then(|window| window.left);
        let seen = left.map_or(self.context, |left| self.context.min(left.saturating_add(self.rows)));
        let kind = self.problem.kind;
        let row = u64::from(kind.query_heads())
            * (u64::from(kind.query_dim()) * self.problem.dtype.bytes() + u64::from(kind.output_dim()) * 4);
        u64::from(self.batch)
            * (u64::from(seen) * (keys + values) * self.problem.kv_dtype.bytes() + u64::from(self.rows) * row)
    }

    /// Floating-point operations of the two products over what the mask lets through: 2 · heads · (query dim + output
    /// dim) for each visible pair of row and key.
    #[must_use]
    pub fn flops(&self) -> u64 {
        let kind = self.problem.kind;
        let pairs: u64 = (0..self.rows).map(|row| self.visible(row)).sum();
        let dims = u64::from(kind.query_dim()) + u64::from(kind.output_dim());
        2 * u64::from(self.batch) * u64::from(kind.query_heads()) * dims * pairs
    }

    /// Why it is not measured on `device` unless asked for by name: a processor, be it one that plays a GPU, would take
    /// too long for it.
    #[must_use]
    pub fn too_slow_for(&self, device: &DeviceFacts) -> Option<String> {
        const MOST: u64 = 400_000_000;
        let software = device.is_cpu() || !device.hardware;
        (software && self.flops() > MOST).then(|| {
            format!("above {:.1} GFLOP, which a processor measures only when named by --shape", MOST as f64 / 1e9)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn named(name: &str) -> Shape {
        catalogue().into_iter().find(|shape| shape.name == name).expect("in the catalogue")
    }

    #[test]
    fn names_are_unique_and_verification_has_its_decode_call() {
        let shapes = catalogue();
        let names: HashSet<_> = shapes.iter().map(|shape| shape.name.as_str()).collect();
        assert_eq!(names.len(), shapes.len());
        for shape in &shapes {
            assert_eq!(shape.decode().is_some(), shape.problem.phase == Phase::Verify, "{}", shape.name);
            if let Some(decode) = shape.decode() {
                assert!(names.contains(decode.as_str()), "{decode}");
            }
        }
    }

    #[test]
    fn work_is_counted() {
        // 4,096 bytes of K and V for each token, 8 KB + 16 KB of q and out for each row.
        let decode = named("llama3-8b/decode/64x8k");
        assert_eq!(decode.bytes(), 64 * (8192 * 4096 + 4096 * (2 + 4)));
        assert_eq!(decode.flops(), 4 * 64 * 32 * 128 * 8192);
        assert_eq!(decode.cache_bytes(), (1 << 30, 1 << 30));
        // Row i of 8 sees all but 7 − i keys.
        assert_eq!(named("llama3-8b/verify-q8/8x32k").flops(), 4 * 8 * 32 * 128 * (8 * 32768 - 28));
        let mla = named("deepseek-v2-lite/decode/64x8k");
        assert_eq!(mla.bytes(), 64 * (8192 * 1152 + 16 * (576 * 2 + 512 * 4)));
        assert_eq!(mla.flops(), 64 * 2 * 16 * (576 + 512) * 8192);
        // 192^-1/2.
        assert!((f64::from(mla.problem.scale) * 192f64.sqrt() - 1.0).abs() < 1e-6);
        let sliding = named("gpt-oss-20b-sliding/decode/16x8k");
        assert_eq!(sliding.bytes(), 16 * (128 * 2048 + 64 * 64 * (2 + 4)));
        assert_eq!(sliding.flops(), 4 * 16 * 64 * 64 * 128);
        assert_eq!(named("smollm2-135m/prefill/1x256").flops(), 4 * 9 * 64 * (256 * 257 / 2));
    }

    #[test]
    fn patterns() {
        let shape = named("llama3-8b/verify-q8/8x32k");
        for pattern in ["", "llama3", "verify-q8", "LLAMA3*8x32k", "*q8*", "llama3-8b/verify-q8/8x32k"] {
            assert!(shape.matches(pattern), "{pattern}");
        }
        for pattern in ["qwen", "8x32k*llama3", "verify-q80"] {
            assert!(!shape.matches(pattern), "{pattern}");
        }
    }
}
