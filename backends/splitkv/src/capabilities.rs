use polyattn_api::{Capabilities, DType, DeviceNeed, Dims, DtypeSet, KvDType, KvDtypeSet, KvLayout, Phase, PhaseSet};

use crate::shader;

/// What `splitkv` serves; everything not named here is declined. Deterministic and batch-invariant with either kernel,
/// and a verified row has the bits of its decode call: no row's arithmetic depends on its company.
pub(crate) const CAPABILITIES: Capabilities = Capabilities::none(DeviceNeed::Gpu)
    .gqa(Dims::List(&shader::HEAD_DIMS))
    .kv_layouts(&[KvLayout::PageTokenHead, KvLayout::PageHeadToken])
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
    .phases(PhaseSet::of(&[Phase::Decode, Phase::Verify, Phase::Draft]))
    .needs_features(&["subgroups"])
    .needs_workgroup_bytes(shader::LEAST_WORKGROUP_BYTES);
