use polyattn_api::{Capabilities, DType, DeviceNeed, Dims, DtypeSet, KvDType, KvDtypeSet, Phase, PhaseSet};

use crate::shader;

/// What `mla` serves; everything not named here is declined.
pub(crate) const CAPABILITIES: Capabilities = Capabilities::none(DeviceNeed::Gpu)
    .mla(
        Dims::Steps { min: 8, max: shader::MOST_LATENT, step: 8 },
        Dims::Steps { min: 8, max: shader::MOST_ROPE, step: 8 },
    )
    .causal()
    .non_causal()
    .per_sequence_causal()
    .tree()
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
