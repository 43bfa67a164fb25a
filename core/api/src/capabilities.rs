use polyattn_device::{DType, DeviceFacts, DeviceKind};
use serde::Serialize;

use crate::{AttentionKind, AttentionProblem, Decline, KvDType, KvLayout, Mask, Phase};

/// A set of sizes: head dims, value dims, page sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Dims {
    /// No size.
    None,
    /// Every size.
    Any,
    /// `min`, `min + step`, … up to `max`.
    Steps {
        /// Smallest.
        min: u32,
        /// Largest.
        max: u32,
        /// Distance between two.
        step: u32,
    },
    /// These.
    List(&'static [u32]),
}

impl Dims {
    /// Whether `size` is in the set.
    #[must_use]
    pub fn contains(self, size: u32) -> bool {
        match self {
            Self::None => false,
            Self::Any => true,
            Self::Steps { min, max, step } => (min..=max).contains(&size) && (size - min).is_multiple_of(step.max(1)),
            Self::List(sizes) => sizes.contains(&size),
        }
    }

    /// The size of the set that is closest to `size`, the smaller one of two; `None` where the set is empty.
    #[must_use]
    pub fn nearest(self, size: u32) -> Option<u32> {
        match self {
            Self::None => None,
            Self::Any => Some(size),
            Self::Steps { min, max, step } => {
                let step = step.max(1);
                let last = min + (max.checked_sub(min)? / step) * step;
                let below = min + size.clamp(min, last).saturating_sub(min) / step * step;
                let above = if below < last { below + step } else { below };
                Some(if size.abs_diff(above) < size.abs_diff(below) { above } else { below })
            }
            Self::List(sizes) => sizes.iter().copied().min_by_key(|one| (one.abs_diff(size), *one)),
        }
    }
}

/// The devices a backend runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DeviceNeed {
    /// The CPU.
    Cpu,
    /// A GPU.
    Gpu,
    /// Either.
    Any,
}

/// A set of [`DType`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DtypeSet(&'static [DType]);

/// A set of [`KvDType`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvDtypeSet(&'static [KvDType]);

/// A set of [`Phase`]s.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhaseSet(&'static [Phase]);

macro_rules! set {
    ($set:ident, $item:ty) => {
        impl $set {
            /// The set of these.
            #[must_use]
            pub const fn of(items: &'static [$item]) -> Self {
                Self(items)
            }

            /// Whether `item` is in the set.
            #[must_use]
            pub fn contains(self, item: $item) -> bool {
                self.0.contains(&item)
            }

            /// Its members, in the order they were given.
            pub fn iter(self) -> impl Iterator<Item = $item> {
                self.0.iter().copied()
            }
        }

        impl Serialize for $set {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                self.0.serialize(serializer)
            }
        }
    };
}
set!(DtypeSet, DType);
set!(KvDtypeSet, KvDType);
set!(PhaseSet, Phase);

/// What a backend can serve, as plain data. The default is nothing, so a new field never claims support by accident.
///
/// ```
/// use polyattn_api::{Capabilities, DType, DeviceNeed, Dims, DtypeSet, KvDType, KvDtypeSet, Phase, PhaseSet};
///
/// const CAN: Capabilities = Capabilities::none(DeviceNeed::Gpu)
///     .gqa(Dims::Steps { min: 32, max: 256, step: 8 })
///     .causal()
///     .dtypes(DtypeSet::of(&[DType::F32, DType::F16]), KvDtypeSet::of(&[KvDType::F32, KvDType::F16]))
///     .page_sizes(Dims::Any)
///     .phases(PhaseSet::of(&Phase::ALL));
/// assert!(CAN.causal && !CAN.non_causal);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Capabilities {
    /// Devices it runs on.
    pub device: DeviceNeed,
    /// Grouped-query attention.
    pub gqa: bool,
    /// Latent attention.
    pub mla: bool,
    /// Head dims of queries and keys (GQA).
    pub head_dims: Dims,
    /// Value dims that differ from the head dim; an equal one is always served.
    pub value_dims: Dims,
    /// Latent dims (MLA).
    pub latent_dims: Dims,
    /// Rope dims (MLA).
    pub rope_dims: Dims,
    /// Causal masks.
    pub causal: bool,
    /// Bidirectional masks in the paged decoder path.
    pub non_causal: bool,
    /// Causality for each sequence of a batch.
    pub per_sequence_causal: bool,
    /// Tree masks.
    pub tree: bool,
    /// Bidirectional spans inside a causal sequence.
    pub prefix_spans: bool,
    /// Sliding windows.
    pub sliding_window: bool,
    /// Softcap.
    pub softcap: bool,
    /// Attention sinks.
    pub sinks: bool,
    /// ALiBi slopes.
    pub alibi: bool,
    /// LSE output.
    pub lse: bool,
    /// Formats of queries.
    pub dtypes: DtypeSet,
    /// Formats of the cache.
    pub kv_dtypes: KvDtypeSet,
    /// Whether the cache's format may differ from the queries'.
    pub mixed_dtypes: bool,
    /// Page sizes in tokens.
    pub page_sizes: Dims,
    /// Phases.
    pub phases: PhaseSet,
    /// Cache layouts, in order of preference.
    pub kv_layouts: &'static [KvLayout],
    /// Query rows of one sequence at the most; `None` is unbounded.
    pub max_query_rows: Option<u32>,
    /// wgpu features it cannot do without, by kebab-case name.
    pub needs_features: &'static [&'static str],
    /// Bytes of workgroup memory it needs.
    pub needs_workgroup_bytes: u32,
    /// Whether the same call gives the same bits again.
    pub deterministic: bool,
    /// Whether a sequence's result is bitwise independent of the rest of its batch.
    pub batch_invariant: bool,
}

impl Capabilities {
    /// A backend of this kind of device that serves nothing yet.
    #[must_use]
    pub const fn none(device: DeviceNeed) -> Self {
        Self {
            device,
            gqa: false,
            mla: false,
            head_dims: Dims::None,
            value_dims: Dims::None,
            latent_dims: Dims::None,
            rope_dims: Dims::None,
            causal: false,
            non_causal: false,
            per_sequence_causal: false,
            tree: false,
            prefix_spans: false,
            sliding_window: false,
            softcap: false,
            sinks: false,
            alibi: false,
            lse: false,
            dtypes: DtypeSet(&[]),
            kv_dtypes: KvDtypeSet(&[]),
            mixed_dtypes: false,
            page_sizes: Dims::None,
            phases: PhaseSet(&[]),
            kv_layouts: &[],
            max_query_rows: None,
            needs_features: &[],
            needs_workgroup_bytes: 0,
            deterministic: false,
            batch_invariant: false,
        }
    }

    /// Serves grouped-query attention of these head dims, over caches that keep pages of tokens of heads.
    #[must_use]
    pub const fn gqa(mut self, head_dims: Dims) -> Self {
        self.gqa = true;
        self.head_dims = head_dims;
        self.kv_layouts =
            if self.mla { &[KvLayout::PageTokenHead, KvLayout::PageTokenLatent] } else { &[KvLayout::PageTokenHead] };
        self
    }

    /// Serves latent attention of these dims.
    #[must_use]
    pub const fn mla(mut self, latent_dims: Dims, rope_dims: Dims) -> Self {
        self.mla = true;
        self.latent_dims = latent_dims;
        self.rope_dims = rope_dims;
        self.kv_layouts =
            if self.gqa { &[KvLayout::PageTokenHead, KvLayout::PageTokenLatent] } else { &[KvLayout::PageTokenLatent] };
        self
    }

    /// Serves value dims that differ from the head dim.
    #[must_use]
    pub const fn value_dims(mut self, dims: Dims) -> Self {
        self.value_dims = dims;
        self
    }

    /// Reads these cache layouts, in order of preference. Without it, the first of [`KvLayout::of`] each kind served.
    #[must_use]
    pub const fn kv_layouts(mut self, layouts: &'static [KvLayout]) -> Self {
        self.kv_layouts = layouts;
        self
    }

    /// Serves these formats of queries and caches.
    #[must_use]
    pub const fn dtypes(mut self, dtypes: DtypeSet, kv_dtypes: KvDtypeSet) -> Self {
        self.dtypes = dtypes;
        self.kv_dtypes = kv_dtypes;
        self
    }

    /// Serves these page sizes.
    #[must_use]
    pub const fn page_sizes(mut self, sizes: Dims) -> Self {
        self.page_sizes = sizes;
        self
    }

    /// Serves these phases.
    #[must_use]
    pub const fn phases(mut self, phases: PhaseSet) -> Self {
        self.phases = phases;
        self
    }

    /// Serves at most this many query rows of one sequence.
    #[must_use]
    pub const fn max_query_rows(mut self, rows: u32) -> Self {
        self.max_query_rows = Some(rows);
        self
    }

    /// Needs these wgpu features.
    #[must_use]
    pub const fn needs_features(mut self, features: &'static [&'static str]) -> Self {
        self.needs_features = features;
        self
    }

    /// Needs this much workgroup memory.
    #[must_use]
    pub const fn needs_workgroup_bytes(mut self, bytes: u32) -> Self {
        self.needs_workgroup_bytes = bytes;
        self
    }

    /// Every reason why a backend of these capabilities cannot serve `problem` on `device`; none if it can.
    #[must_use]
    pub fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        let mut reasons = self.device_declines(device);
        let mut unless = |served: bool, decline: Decline| {
            if !served {
                reasons.push(decline);
            }
        };
        match problem.kind {
            AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim } => {
                unless(self.gqa, Decline::Gqa);
                if kv_heads == 0 || query_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
                    // No kernel can share KV heads among query heads that way.
                    unless(false, Decline::Other(format!("{query_heads} query heads over {kv_heads} KV heads").into()));
                }
                if self.gqa {
                    unless(self.head_dims.contains(head_dim), Decline::HeadDim(head_dim));
                    unless(value_dim == head_dim || self.value_dims.contains(value_dim), Decline::ValueDim(value_dim));
                }
            }
            AttentionKind::Mla { latent_dim, rope_dim, .. } => {
                unless(self.mla, Decline::Mla);
                if self.mla {
                    unless(self.latent_dims.contains(latent_dim), Decline::LatentDim(latent_dim));
                    unless(self.rope_dims.contains(rope_dim), Decline::RopeDim(rope_dim));
                }
            }
        }
        unless(self.dtypes.contains(problem.dtype), Decline::Dtype(problem.dtype));
        let kv_served = self.kv_dtypes.contains(problem.kv_dtype);
        unless(kv_served, Decline::KvDtype(problem.kv_dtype));
        if kv_served && KvDType::from(problem.dtype) != problem.kv_dtype {
            unless(self.mixed_dtypes, Decline::MixedDtypes(problem.kv_dtype, problem.dtype));
        }
        if let Some(size) = problem.page_size {
            unless(self.page_sizes.contains(size), Decline::PageSize(size));
        }
        match problem.mask {
            Mask::Causal => unless(self.causal, Decline::Causal),
            Mask::Bidirectional => unless(self.non_causal, Decline::NonCausal),
            Mask::Tree => unless(self.tree, Decline::Tree),
        }
        unless(!problem.per_sequence_causal || self.per_sequence_causal, Decline::PerSequenceCausal);
        unless(!problem.prefix_spans || self.prefix_spans, Decline::PrefixSpans);
        unless(problem.window.is_none() || self.sliding_window, Decline::SlidingWindow);
        unless(problem.softcap.is_none() || self.softcap, Decline::Softcap);
        unless(!problem.sinks || self.sinks, Decline::Sinks);
        unless(!problem.alibi || self.alibi, Decline::Alibi);
        unless(!problem.lse || self.lse, Decline::Lse);
        unless(self.phases.contains(problem.phase), Decline::Phase(problem.phase));
        unless(
            self.kv_layouts.contains(&problem.kv_layout) || reasons_name_kind(self, problem),
            Decline::KvLayout(problem.kv_layout),
        );
        reasons
    }

    /// The reasons that concern the device alone.
    #[must_use]
    pub fn device_declines(&self, device: &DeviceFacts) -> Vec<Decline> {
        match (self.device, device.kind) {
            (DeviceNeed::Cpu, DeviceKind::Gpu) => return vec![Decline::NeedsCpu],
            (DeviceNeed::Gpu, DeviceKind::Cpu) => return vec![Decline::NeedsGpu],
            (_, DeviceKind::Cpu) => return Vec::new(),
            (_, DeviceKind::Gpu) => {}
        }
        let mut reasons: Vec<_> = self
            .needs_features
            .iter()
            .filter(|feature| !device.has(feature))
            .map(|feature| Decline::NeedsFeature((*feature).into()))
            .collect();
        if self.needs_workgroup_bytes > device.limits.workgroup_bytes {
            reasons.push(Decline::NeedsWorkgroupMemory {
                needed: self.needs_workgroup_bytes,
                available: device.limits.workgroup_bytes,
            });
        }
        reasons
    }
}

/// A backend without GQA has no layout for it either; one reason says it.
fn reasons_name_kind(capabilities: &Capabilities, problem: &AttentionProblem) -> bool {
    match problem.kind {
        AttentionKind::Gqa { .. } => !capabilities.gqa,
        AttentionKind::Mla { .. } => !capabilities.mla,
    }
}

macro_rules! claims {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        impl Capabilities {
            $($(#[$doc])* #[must_use] pub const fn $name(mut self) -> Self { self.$name = true; self })*
        }
    };
}
claims! {
    /// Serves causal masks.
    causal,
    /// Serves bidirectional masks.
    non_causal,
    /// Serves causality for each sequence.
    per_sequence_causal,
    /// Serves tree masks.
    tree,
    /// Serves bidirectional spans.
    prefix_spans,
    /// Serves sliding windows.
    sliding_window,
    /// Serves softcap.
    softcap,
    /// Serves attention sinks.
    sinks,
    /// Serves ALiBi.
    alibi,
    /// Serves LSE output.
    lse,
    /// Serves a cache format apart from the queries'.
    mixed_dtypes,
    /// Gives the same bits again.
    deterministic,
    /// Gives a sequence the same bits in any batch.
    batch_invariant,
}
