use polyattn_api::{Capabilities, DType, DeviceNeed, Dims, DtypeSet, KvDType, KvDtypeSet, Phase, PhaseSet};

/// What `plain` serves; everything not named here is declined.
pub(crate) const CAPABILITIES: Capabilities = Capabilities::none(DeviceNeed::Gpu)
    .gqa(Dims::Steps { min: 8, max: 256, step: 8 })
    .causal()
    .lse()
    .deterministic()
    .batch_invariant()
    .dtypes(DtypeSet::of(&[DType::F32, DType::F16]), KvDtypeSet::of(&[KvDType::F32, KvDType::F16]))
    .page_sizes(Dims::Any)
    .phases(PhaseSet::of(&Phase::ALL))
    .needs_workgroup_bytes(3 * 64 * 4);
