use std::{borrow::Cow, fmt};

use polyattn_device::DType;

use crate::{KvDType, KvLayout, Phase};

/// One reason why a backend cannot serve a problem. Its [`Display`](fmt::Display) form is part of the program's
/// contract: `<thing> not supported`, or `needs <thing>` where a device falls short.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Decline {
    /// Grouped-query attention.
    Gqa,
    /// Latent attention.
    Mla,
    /// The head dim.
    HeadDim(u32),
    /// The value dim.
    ValueDim(u32),
    /// The latent dim.
    LatentDim(u32),
    /// The rope dim.
    RopeDim(u32),
    /// The format of the queries.
    Dtype(DType),
    /// The format of the cache.
    KvDtype(KvDType),
    /// A cache of one format under queries of another.
    MixedDtypes(KvDType, DType),
    /// The page size.
    PageSize(u32),
    /// The cache's layout.
    KvLayout(KvLayout),
    /// Causal masks.
    Causal,
    /// Bidirectional masks.
    NonCausal,
    /// Tree masks.
    Tree,
    /// Causality for each sequence.
    PerSequenceCausal,
    /// Bidirectional spans.
    PrefixSpans,
    /// Sliding windows.
    SlidingWindow,
    /// Softcap.
    Softcap,
    /// Attention sinks.
    Sinks,
    /// ALiBi.
    Alibi,
    /// LSE output.
    Lse,
    /// The phase.
    Phase(Phase),
    /// It runs on the CPU alone.
    NeedsCpu,
    /// It runs on GPUs alone.
    NeedsGpu,
    /// A wgpu feature, by its kebab-case name.
    NeedsFeature(Cow<'static, str>),
    /// Workgroup memory.
    NeedsWorkgroupMemory {
        /// Bytes it needs.
        needed: u32,
        /// Bytes the device has.
        available: u32,
    },
    /// A rule of the backend's own: the thing that is not supported.
    Other(Cow<'static, str>),
    /// The backend panicked while it was asked; what it said.
    Panicked(Cow<'static, str>),
}

impl fmt::Display for Decline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gqa => f.write_str("GQA not supported"),
            Self::Mla => f.write_str("MLA not supported"),
            Self::HeadDim(dim) => write!(f, "head_dim {dim} not supported"),
            Self::ValueDim(dim) => write!(f, "value_dim {dim} not supported"),
            Self::LatentDim(dim) => write!(f, "latent_dim {dim} not supported"),
            Self::RopeDim(dim) => write!(f, "rope_dim {dim} not supported"),
            Self::Dtype(dtype) => write!(f, "dtype {dtype} not supported"),
            Self::KvDtype(dtype) => write!(f, "kv dtype {dtype} not supported"),
            Self::MixedDtypes(kv, dtype) => write!(f, "kv dtype {kv} with dtype {dtype} not supported"),
            Self::PageSize(size) => write!(f, "page size {size} not supported"),
            Self::KvLayout(layout) => write!(f, "KV layout {} not supported", layout.name()),
            Self::Causal => f.write_str("causal attention not supported"),
            Self::NonCausal => f.write_str("non-causal attention not supported"),
            Self::Tree => f.write_str("tree mask not supported"),
            Self::PerSequenceCausal => f.write_str("per-sequence causality not supported"),
            Self::PrefixSpans => f.write_str("prefix spans not supported"),
            Self::SlidingWindow => f.write_str("sliding window not supported"),
            Self::Softcap => f.write_str("softcap not supported"),
            Self::Sinks => f.write_str("attention sinks not supported"),
            Self::Alibi => f.write_str("ALiBi not supported"),
            Self::Lse => f.write_str("LSE output not supported"),
            Self::Phase(phase) => write!(f, "phase {phase} not supported"),
            Self::NeedsCpu => f.write_str("needs the CPU device"),
            Self::NeedsGpu => f.write_str("needs a GPU"),
            Self::NeedsFeature(feature) => write!(f, "needs feature {feature}"),
            Self::NeedsWorkgroupMemory { needed, available } => {
                write!(f, "needs {needed} bytes of workgroup memory, the device has {available}")
            }
            Self::Other(thing) => write!(f, "{thing} not supported"),
            Self::Panicked(message) => write!(f, "panicked when asked: {message}"),
        }
    }
}

impl serde::Serialize for Decline {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
