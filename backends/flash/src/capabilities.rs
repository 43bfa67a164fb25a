use polyattn_api::{Capabilities, DType, DeviceNeed, Dims, DtypeSet, KvDType, KvDtypeSet, KvLayout, Phase, PhaseSet};

use crate::shader;

const DIMS: Dims = Dims::Steps { min: shader::MIN_DIM, max: shader::MAX_DIM, step: 8 };

/// What `flash` serves; everything not named here is declined.
pub(crate) const CAPABILITIES: Capabilities = Capabilities::none(DeviceNeed::Gpu)
    .gqa(DIMS)
    .value_dims(DIMS)
    .kv_layouts(&[KvLayout::PageTokenHead, KvLayout::PageHeadToken])
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
    .deterministic()
    .batch_invariant()
    .dtypes(DtypeSet::of(&[DType::F32, DType::F16, DType::BF16]), KvDtypeSet::of(&KvDType::ALL))
    .page_sizes(Dims::Any)
    .phases(PhaseSet::of(&Phase::ALL))
    .needs_workgroup_bytes(shader::LEAST_WORKGROUP_BYTES);

/// The same with shared prefixes, whose sums depend on who shares.
pub(crate) const CASCADING: Capabilities = {
    let mut capabilities = CAPABILITIES;
    capabilities.batch_invariant = false;
    capabilities
};
