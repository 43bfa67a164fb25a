//! What one change would let a backend in that declined.

use std::fmt::Display;

use crate::{Capabilities, Decline, RegisteredBackend};

impl RegisteredBackend {
    /// The one change that would let this backend serve a problem that it declined for `reasons`: of the problem, in the
    /// words of a configuration, or of the device. `None` where it takes more than one, or none helps. It is a hint for
    /// people; nothing falls back to it.
    #[must_use]
    pub fn remedy(&self, reasons: &[Decline]) -> Option<String> {
        match reasons {
            [only] => only.remedy(self.backend.capabilities()),
            _ => None,
        }
    }
}

impl Decline {
    fn remedy(&self, can: &Capabilities) -> Option<String> {
        let given = |claim: bool, change: &str| claim.then(|| change.to_owned());
        let size = |name: &str, nearest: Option<u32>| nearest.map(|size| format!("{name} {size}"));
        let any = |name: &str, all: Vec<String>| (!all.is_empty()).then(|| format!("{name} {}", all.join(" or ")));
        match self {
            Self::HeadDim(dim) => size("head_dim", can.head_dims.nearest(*dim)),
            Self::ValueDim(dim) => size("value_dim", can.value_dims.nearest(*dim))
                .or_else(|| Some("value_dim equal to head_dim".to_owned())),
            Self::LatentDim(dim) => size("latent_dim", can.latent_dims.nearest(*dim)),
            Self::RopeDim(dim) => size("rope_dim", can.rope_dims.nearest(*dim)),
            Self::Dtype(_) => any("dtype", names(can.dtypes.iter())),
            Self::KvDtype(_) => any("kv_cache.dtype", names(can.kv_dtypes.iter())),
            Self::MixedDtypes(..) => Some("kv_cache.dtype \"auto\"".into()),
            Self::PageSize(tokens) => size("kv_cache.page_size", can.page_sizes.nearest(*tokens)),
            Self::KvLayout(_) => any("KV layout", can.kv_layouts.iter().map(|layout| layout.name().into()).collect()),
            Self::Causal => given(can.non_causal, "non-causal attention"),
            Self::NonCausal => given(can.causal, "causal attention"),
            Self::Tree => given(can.causal, "a chain of drafted tokens, no tree"),
            Self::PerSequenceCausal => Some("one causality for all sequences".into()),
            Self::PrefixSpans => Some("no prefix spans".into()),
            Self::SlidingWindow => Some("no window".into()),
            Self::Softcap => Some("no softcap".into()),
            Self::Sinks => Some("no attention sinks".into()),
            Self::Alibi => Some("no ALiBi".into()),
            Self::Lse => Some("no LSE output".into()),
            Self::Phase(_) => any("another phase:", names(can.phases.iter())),
            Self::NeedsCpu => Some("--device cpu".into()),
            Self::NeedsGpu => Some("--device gpu".into()),
            Self::NeedsFeature(feature) => Some(format!("a device with feature {feature}")),
            Self::NeedsWorkgroupMemory { needed, .. } => {
                Some(format!("a device with {needed} bytes of workgroup memory"))
            }
            Self::Gqa | Self::Mla | Self::Other(_) | Self::Panicked(_) => None,
        }
    }
}

fn names<T: Display>(items: impl Iterator<Item = T>) -> Vec<String> {
    items.map(|item| item.to_string()).collect()
}
