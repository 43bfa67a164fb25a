//! Backends that differ in everything selection looks at, and proposers that differ in what they ask for.

use std::sync::Arc;

use polyattn_api::{
    AttentionBackend, AttentionConfig, AttentionKernel, AttentionProblem, BackendError, Capabilities, DType, Decline,
    Device, DeviceFacts, DeviceNeed, Dims, Drafter, DtypeSet, EngineConfig, KernelConfig, KvCacheConfig, KvDType,
    KvDtypeSet, LayerConfig, LayerKind, LoadContext, ModelConfig, Phase, PhaseSet, Proposer, ProposerError,
    ProposerRequirements, Registry, SpeculativeConfig, backend_entry, default_draft_config, proposer_entry,
};

macro_rules! mock_backend {
    ($(#[$doc:meta])* $type:ident, $name:literal, $capabilities:expr) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $type;

        impl AttentionBackend for $type {
            fn name(&self) -> &'static str {
                $name
            }

            fn capabilities(&self) -> &Capabilities {
                const CAPABILITIES: Capabilities = $capabilities;
                &CAPABILITIES
            }

            fn prepare(&self, _: &Device, _: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
                Err(BackendError::Declined(vec![Decline::Other("running a mock".into())]))
            }
        }
    };
}

const FLOATS: DtypeSet = DtypeSet::of(&[DType::F32, DType::F16]);
const KV_FLOATS: KvDtypeSet = KvDtypeSet::of(&[KvDType::F32, KvDType::F16]);

mock_backend!(
    /// A GPU backend of high priority that is causal only.
    Causal,
    "causal",
    Capabilities::none(DeviceNeed::Gpu)
        .gqa(Dims::Steps { min: 32, max: 256, step: 32 })
        .causal()
        .dtypes(FLOATS, KV_FLOATS)
        .page_sizes(Dims::Any)
        .phases(PhaseSet::of(&Phase::ALL))
);

mock_backend!(
    /// A GPU backend of middle priority that is bidirectional too, and picky about pages and the device.
    Wide,
    "wide",
    Capabilities::none(DeviceNeed::Gpu)
        .gqa(Dims::List(&[64, 96, 128]))
        .causal()
        .non_causal()
        .per_sequence_causal()
        .sliding_window()
        .lse()
        .dtypes(FLOATS, KvDtypeSet::of(&[KvDType::F32, KvDType::F16, KvDType::Q8]))
        .page_sizes(Dims::List(&[16, 32]))
        .phases(PhaseSet::of(&Phase::ALL))
        .needs_features(&["shader-f16", "subgroups"])
);

mock_backend!(
    /// A GPU backend for latent attention alone.
    Latent,
    "latent",
    Capabilities::none(DeviceNeed::Gpu)
        .mla(Dims::List(&[512]), Dims::List(&[64]))
        .causal()
        .dtypes(DtypeSet::of(&[DType::F16]), KvDtypeSet::of(&[KvDType::F16]))
        .page_sizes(Dims::List(&[64]))
        .phases(PhaseSet::of(&[Phase::Prefill, Phase::Decode]))
        .needs_workgroup_bytes(48 << 10)
);

mock_backend!(
    /// A CPU backend that serves everything.
    Reference,
    "reference",
    Capabilities::none(DeviceNeed::Cpu)
        .gqa(Dims::Any)
        .mla(Dims::Any, Dims::Any)
        .value_dims(Dims::Any)
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
        .dtypes(DtypeSet::of(&[DType::F32, DType::F16, DType::BF16]), KvDtypeSet::of(&KvDType::ALL))
        .page_sizes(Dims::Any)
        .phases(PhaseSet::of(&Phase::ALL))
);

mock_backend!(
    /// A CPU backend that is causal only, below the one that serves everything.
    CpuCausal,
    "cpu-causal",
    Capabilities::none(DeviceNeed::Cpu)
        .gqa(Dims::Any)
        .causal()
        .dtypes(FLOATS, KV_FLOATS)
        .page_sizes(Dims::Any)
        .phases(PhaseSet::of(&Phase::ALL))
);

mock_backend!(
    /// A backend that has not said what it can do.
    Nothing,
    "nothing",
    Capabilities::none(DeviceNeed::Any)
);

macro_rules! mock_proposer {
    ($(#[$doc:meta])* $type:ident, $name:literal, $requirements:expr $(, $hook:item)?) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $type;

        impl Proposer for $type {
            fn name(&self) -> &'static str {
                $name
            }

            fn requirements(&self) -> &ProposerRequirements {
                const REQUIREMENTS: ProposerRequirements = $requirements;
                &REQUIREMENTS
            }

            $($hook)?

            fn load(&self, _: &LoadContext<'_>) -> Result<Box<dyn Drafter>, ProposerError> {
                Err(ProposerError::Unsupported("running a mock".into()))
            }
        }
    };
}

mock_proposer!(
    /// Drafts without a model.
    Lookup,
    "lookup",
    ProposerRequirements::none()
);

mock_proposer!(
    /// A causal draft model, which asks for nothing.
    Chain,
    "chain",
    ProposerRequirements::none().checkpoint().draft_attention()
);

mock_proposer!(
    /// A block drafter, which overrides the hook as DFlash does.
    Block,
    "block",
    ProposerRequirements::none().taps().checkpoint().draft_attention().non_causal(),
    fn draft_config(&self, target: &EngineConfig) -> EngineConfig {
        let mut draft = default_draft_config(target);
        draft.attention.use_non_causal = true;
        draft
    }
);

mock_proposer!(
    /// A block drafter that asks layer by layer: the first causal, the others not.
    Mixed,
    "mixed",
    ProposerRequirements::none().checkpoint().draft_attention().non_causal(),
    fn draft_config(&self, target: &EngineConfig) -> EngineConfig {
        let mut draft = default_draft_config(target);
        for (place, layer) in draft.model.layers.iter_mut().enumerate() {
            layer.causal = Some(place == 0);
        }
        draft
    }
);

mock_proposer!(
    /// A block drafter that forgot the hook.
    Forgetful,
    "forgetful",
    ProposerRequirements::none().checkpoint().draft_attention().non_causal()
);

/// All backends and all proposers.
pub(crate) fn registry() -> Registry {
    Registry::builder()
        .backend(backend_entry!(Latent, priority = 40))
        .backend(backend_entry!(Causal, priority = 30))
        .backend(backend_entry!(Wide, priority = 20))
        .backend(backend_entry!(Reference, priority = 10))
        .backend(backend_entry!(CpuCausal, priority = 5))
        .proposer(proposer_entry!(Lookup))
        .proposer(proposer_entry!(Chain))
        .proposer(proposer_entry!(Block))
        .proposer(proposer_entry!(Mixed))
        .proposer(proposer_entry!(Forgetful))
        .build()
        .expect("the names differ")
}

/// A GPU with everything the mocks ask for.
pub(crate) fn big_gpu() -> DeviceFacts {
    let mut gpu = DeviceFacts::gpu("big").with_feature("shader-f16").with_subgroups(32, 32);
    gpu.limits.workgroup_bytes = 64 << 10;
    gpu
}

/// A GPU with nothing optional.
pub(crate) fn bare_gpu() -> DeviceFacts {
    DeviceFacts::gpu("bare")
}

/// One full layer kind, as most models have it.
pub(crate) fn layer(name: &str) -> LayerConfig {
    LayerConfig::gqa(name, 4, 16, 8, 128)
}

/// A latent layer kind.
pub(crate) fn latent_layer(name: &str) -> LayerConfig {
    LayerConfig {
        kind: LayerKind::Mla,
        kv_heads: None,
        head_dim: None,
        latent_dim: Some(512),
        rope_dim: Some(64),
        ..layer(name)
    }
}

/// A configuration of these layers with nothing else asked for.
pub(crate) fn engine(layers: Vec<LayerConfig>) -> EngineConfig {
    EngineConfig {
        model: ModelConfig { dtype: DType::F16, layers },
        kv_cache: KvCacheConfig::default(),
        attention: AttentionConfig::default(),
        kernel: KernelConfig::default(),
        backend_config: Default::default(),
        speculative: None,
    }
}

/// The usual target, with a draft of one layer kind under this method.
pub(crate) fn speculative(method: &str) -> EngineConfig {
    let mut config = engine(vec![layer("full")]);
    config.speculative = Some(SpeculativeConfig {
        method: method.into(),
        draft: Some(ModelConfig { dtype: DType::F16, layers: vec![layer("draft")] }),
        ..SpeculativeConfig::default()
    });
    config
}
