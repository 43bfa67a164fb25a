use std::{fmt, sync::Arc};

use polyattn_device::{
    DType,
    wgsl::{self, Byte},
};
use serde::{Deserialize, Serialize};

/// Whose attention it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The model whose tokens are emitted.
    Target,
    /// The model of a speculative proposer.
    Draft,
}

/// What a pass is for. It says nothing of the mask; it lets a backend decline, and a selector prefer, by the number
/// of query rows to expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Many query rows of a prompt.
    Prefill,
    /// One query row for each sequence.
    Decode,
    /// The anchor and the drafted tokens of each sequence.
    Verify,
    /// The block of a drafter.
    Draft,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Prefill, Self::Decode, Self::Verify, Self::Draft];
}

/// What form keys and values have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum AttentionKind {
    /// Grouped-query attention; multi-head and multi-query attention are its special cases.
    Gqa {
        /// Query heads, a multiple of `kv_heads`.
        query_heads: u32,
        /// Key and value heads.
        kv_heads: u32,
        /// Elements of a query and a key.
        head_dim: u32,
        /// Elements of a value.
        value_dim: u32,
    },
    /// Multi-head latent attention in absorbed form: one latent row and one rope key for all query heads.
    Mla {
        /// Query heads.
        query_heads: u32,
        /// Elements of the latent, which is also the value.
        latent_dim: u32,
        /// Elements of the rope key that follows the latent.
        rope_dim: u32,
    },
}

impl AttentionKind {
    /// Query heads.
    #[must_use]
    pub const fn query_heads(self) -> u32 {
        match self {
            Self::Gqa { query_heads, .. } | Self::Mla { query_heads, .. } => query_heads,
        }
    }

    /// Key and value heads of the cache, 1 for MLA.
    #[must_use]
    pub const fn kv_heads(self) -> u32 {
        match self {
            Self::Gqa { kv_heads, .. } => kv_heads,
            Self::Mla { .. } => 1,
        }
    }

    /// Elements of one head of a query, and of a key. Both parts of a latent row may be as large as 32 bits hold; their
    /// sum stops there.
    #[must_use]
    pub const fn query_dim(self) -> u32 {
        match self {
            Self::Gqa { head_dim, .. } => head_dim,
            Self::Mla { latent_dim, rope_dim, .. } => latent_dim.saturating_add(rope_dim),
        }
    }

    /// Elements of one head of the output.
    #[must_use]
    pub const fn output_dim(self) -> u32 {
        match self {
            Self::Gqa { value_dim, .. } => value_dim,
            Self::Mla { latent_dim, .. } => latent_dim,
        }
    }
}

/// Which keys a query row sees, before a window narrows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Mask {
    /// Keys up to its own position.
    Causal,
    /// Every key of its sequence.
    Bidirectional,
    /// The context before the queries, and the query rows named by a bit mask.
    Tree,
}

/// A sliding window around a query's position p: keys p − left ..= p + right. `None` is unbounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Keys before the query's own.
    pub left: Option<u32>,
    /// Keys after the query's own.
    pub right: Option<u32>,
}

/// The number formats a cache can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum KvDType {
    /// 32-bit float.
    F32,
    /// 16-bit float.
    F16,
    /// bfloat16.
    BF16,
    /// Signed bytes with one f32 scale for each token and head.
    Q8,
    /// 8-bit float, 4 exponent and 3 mantissa bits (the finite variant: no infinities).
    F8E4M3,
    /// 8-bit float, 5 exponent and 2 mantissa bits.
    F8E5M2,
}

impl KvDType {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::F32, Self::F16, Self::BF16, Self::Q8, Self::F8E4M3, Self::F8E5M2];

    /// Bytes of one element.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8 | Self::F8E4M3 | Self::F8E5M2 => 1,
        }
    }

    /// Its name in configurations and files.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8 => "q8",
            Self::F8E4M3 => "f8e4m3",
            Self::F8E5M2 => "f8e5m2",
        }
    }

    /// The same format among [`DType`], where it is one of those.
    #[must_use]
    pub const fn as_dtype(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::F16 => Some(DType::F16),
            Self::BF16 => Some(DType::BF16),
            Self::Q8 | Self::F8E4M3 | Self::F8E5M2 => None,
        }
    }

    /// WGSL that declares caches of this format, by binding and name, and reads them:
    /// [`storage_loader`](wgsl::storage_loader) or [`byte_loader`](wgsl::byte_loader) with what it calls. It goes behind
    /// [`wgsl::PREAMBLE`].
    #[must_use]
    pub fn loaders_wgsl(self, caches: &[(u32, &str)]) -> String {
        let byte = match (self.as_dtype(), self) {
            (Some(dtype), _) => {
                return caches.iter().map(|(binding, name)| wgsl::storage_loader(*binding, name, dtype)).collect();
            }
            (None, Self::F8E4M3) => Byte::E4M3,
            (None, Self::F8E5M2) => Byte::E5M2,
            (None, _) => Byte::I8,
        };
        let loaders = caches.iter().map(|(binding, name)| wgsl::byte_loader(*binding, name, byte));
        std::iter::once(wgsl::BYTES_PREAMBLE.to_owned()).chain(loaders).collect()
    }
}

impl From<DType> for KvDType {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            _ => Self::F32,
        }
    }
}

impl fmt::Display for KvDType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a cache lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum KvLayout {
    /// Keys `[pages, page_size, kv_heads, head_dim]` and values `[pages, page_size, kv_heads, value_dim]`, apart.
    PageTokenHead,
    /// Keys `[pages, kv_heads, page_size, head_dim]` and values `[pages, kv_heads, page_size, value_dim]`, apart.
    PageHeadToken,
    /// `[pages, page_size, latent_dim + rope_dim]`.
    PageTokenLatent,
}

impl KvLayout {
    /// The layouts that a cache of this kind of attention can have.
    #[must_use]
    pub const fn of(kind: AttentionKind) -> &'static [Self] {
        match kind {
            AttentionKind::Gqa { .. } => &[Self::PageTokenHead, Self::PageHeadToken],
            AttentionKind::Mla { .. } => &[Self::PageTokenLatent],
        }
    }

    /// The row of the cache in which token `slot` of the pool keeps head `head` of `heads`: rows are what a head has of
    /// a token, and the scales of a `q8` cache lie in the same order.
    #[must_use]
    pub const fn row(self, slot: usize, head: usize, heads: usize, page_size: usize) -> usize {
        match self {
            Self::PageHeadToken => ((slot / page_size) * heads + head) * page_size + slot % page_size,
            Self::PageTokenHead | Self::PageTokenLatent => slot * heads + head,
        }
    }

    /// WGSL of [`row`](Self::row), to be put behind [`BATCH_WGSL`](crate::BATCH_WGSL): `cache_row(slot, head, heads)`.
    #[must_use]
    pub const fn wgsl(self) -> &'static str {
        match self {
            Self::PageHeadToken => {
                "fn cache_row(slot: u32, head: u32, heads: u32) -> u32 { let size = batch_page_size(); return (slot / size * heads + head) * size + slot % size; }\n"
            }
            Self::PageTokenHead | Self::PageTokenLatent => {
                "fn cache_row(slot: u32, head: u32, heads: u32) -> u32 { return slot * heads + head; }\n"
            }
        }
    }

    /// Its name in answers.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PageTokenHead => "page-token-head",
            Self::PageHeadToken => "page-head-token",
            Self::PageTokenLatent => "page-token-latent",
        }
    }
}

/// What must be computed, without data: everything that decides whether a backend can serve it.
///
/// Built by [`AttentionProblem::new`] and its setters; new fields come with defaults, so that is not a breaking change.
///
/// # The contract of an answer
/// Query row i (0-based) of a sequence with n query rows and L cached tokens, its queries included, stands at position
/// p = L − n + i. Its logits are `scale · q·k`, then softcap `c·tanh(x/c)`, then ALiBi `slope · (key − p)`, then the
/// mask and the window. A sink is one more logit in the softmax's denominator. The output is f32; a row that sees
/// nothing gives zeros and an LSE of −∞, or the sink's own logit. LSE is the natural logarithm of the denominator.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AttentionProblem {
    /// Whose attention it is.
    pub role: Role,
    /// What the pass is for.
    pub phase: Phase,
    /// The layer kind's name, for messages.
    pub layer: Arc<str>,
    /// Form, heads and dims.
    pub kind: AttentionKind,
    /// Factor of the logits, usually `head_dim^-1/2`.
    pub scale: f32,
    /// Which keys a row sees.
    pub mask: Mask,
    /// Whether each sequence of a batch brings its own causality, over `mask`.
    pub per_sequence_causal: bool,
    /// Whether spans of a causal sequence see each other both ways.
    pub prefix_spans: bool,
    /// Sliding window.
    pub window: Option<Window>,
    /// Softcap of the logits.
    pub softcap: Option<f32>,
    /// Whether every query head has a sink.
    pub sinks: bool,
    /// Whether every query head has an ALiBi slope.
    pub alibi: bool,
    /// Format of the queries.
    pub dtype: DType,
    /// Format of the cache.
    pub kv_dtype: KvDType,
    /// Tokens of a page; `None` where nobody chose yet, which rules out no backend.
    pub page_size: Option<u32>,
    /// How the cache lies in memory.
    pub kv_layout: KvLayout,
    /// Whether the LSE is wanted beside the output.
    pub lse: bool,
}

impl AttentionProblem {
    /// A causal problem of the target's decode phase with scale `query_dim^-1/2` and nothing else asked for; queries
    /// and cache of `dtype`.
    #[must_use]
    pub fn new(kind: AttentionKind, dtype: DType) -> Self {
        Self {
            role: Role::Target,
            phase: Phase::Decode,
            layer: "attention".into(),
            kind,
            scale: 1.0 / (kind.query_dim() as f32).sqrt(),
            mask: Mask::Causal,
            per_sequence_causal: false,
            prefix_spans: false,
            window: None,
            softcap: None,
            sinks: false,
            alibi: false,
            dtype,
            kv_dtype: dtype.into(),
            page_size: None,
            kv_layout: KvLayout::of(kind)[0],
            lse: false,
        }
    }

    /// For this role and phase.
    #[must_use]
    pub fn serving(mut self, role: Role, phase: Phase) -> Self {
        self.role = role;
        self.phase = phase;
        self
    }

    /// Of the layer kind with this name.
    #[must_use]
    pub fn layer(mut self, name: impl Into<Arc<str>>) -> Self {
        self.layer = name.into();
        self
    }

    /// With this mask.
    #[must_use]
    pub fn mask(mut self, mask: Mask) -> Self {
        self.mask = mask;
        self
    }

    /// With this window.
    #[must_use]
    pub fn window(mut self, window: Option<Window>) -> Self {
        self.window = window;
        self
    }

    /// With this page size.
    #[must_use]
    pub fn page_size(mut self, tokens: u32) -> Self {
        self.page_size = Some(tokens);
        self
    }

    /// WGSL of what a query row sees and of what becomes of its scores, as the contract of an answer has it, to be put
    /// behind [`BATCH_WGSL`](crate::BATCH_WGSL):
    ///
    /// * `keys_of(sequence, query)`: the first key that a query row sees, and the key behind the last one;
    /// * `logit(product, slope, key, position)`: the logit of a product of query and key that is scaled already;
    /// * `TREE`, `SPANS`, `SOFTCAP`, `ALIBI`: whether the problem has these. With `TREE`, keys from a sequence's query
    ///   rows on are seen where `tree_bit` says so.
    ///
    /// The kernel has a variable `call` with `left` and `right`, u32, the window's sides, the largest number where they
    /// are unbounded, and `softcap`, f32.
    #[must_use]
    pub fn row_wgsl(&self) -> String {
        let flags = [
            // A sequence's own causality stands over its tree.
            ("TREE", self.mask == Mask::Tree && !self.per_sequence_causal),
            ("SPANS", self.prefix_spans),
            ("SOFTCAP", self.softcap.is_some()),
            ("ALIBI", self.alibi),
        ];
        let flags: String = flags.iter().map(|(name, value)| format!("const {name}: bool = {value};\n")).collect();
        flags + include_str!("row.wgsl")
    }

    /// Role, phase and layer, in words.
    pub(crate) fn described(&self) -> String {
        format!("{} {} layer '{}'", self.role, self.phase, self.layer)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Target => "target",
            Self::Draft => "draft",
        })
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Verify => "verify",
            Self::Draft => "draft",
        })
    }
}
