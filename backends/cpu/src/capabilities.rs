use polyattn_api::{Capabilities, DType, DeviceNeed, Dims, DtypeSet, KvDType, KvDtypeSet, KvLayout, Phase, PhaseSet};

/// Everything that a problem can ask for.
pub(crate) const CAPABILITIES: Capabilities = Capabilities::none(DeviceNeed::Cpu)
    .gqa(Dims::Any)
    .value_dims(Dims::Any)
    .mla(Dims::Any, Dims::Any)
    .kv_layouts(&[KvLayout::PageTokenHead, KvLayout::PageHeadToken, KvLayout::PageTokenLatent])
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
    .dtypes(DtypeSet::of(&[DType::F32, DType::F16, DType::BF16]), KvDtypeSet::of(&KvDType::ALL))
    .mixed_dtypes()
    .page_sizes(Dims::Any)
    .phases(PhaseSet::of(&Phase::ALL))
    .deterministic()
    .batch_invariant();
