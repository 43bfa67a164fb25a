//! Latent attention on the GPU, as a stranger adds it: a crate of its own, written against `polyattn-api` alone.
//!
//! It serves what multi-head latent attention needs in absorbed form, causal or not, and nothing else. Its settings are
//! a type of its own, [`Settings`], that users write under `backend_config.stranger`.

#![forbid(unsafe_code)]

mod kernel;

use std::sync::Arc;

use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionProblem, BackendError, Capabilities, DType, Device, DeviceNeed, Dims,
    DtypeSet, KvDType, KvDtypeSet, Phase, PhaseSet, register_backend,
};
use serde::Deserialize;

const CAPABILITIES: Capabilities = Capabilities::none(DeviceNeed::Gpu)
    .mla(Dims::Steps { min: 8, max: 512, step: 8 }, Dims::Steps { min: 8, max: 128, step: 8 })
    .causal()
    .non_causal()
    .sliding_window()
    .softcap()
    .lse()
    .deterministic()
    .batch_invariant()
    .mixed_dtypes()
    .dtypes(
        DtypeSet::of(&[DType::F32, DType::F16, DType::BF16]),
        KvDtypeSet::of(&[KvDType::F32, KvDType::F16, KvDType::BF16]),
    )
    .page_sizes(Dims::Any)
    .phases(PhaseSet::of(&Phase::ALL))
    .needs_workgroup_bytes((512 + 128 + 64 + 3 * 64) * 4);

/// What users can set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Keys that a workgroup reads at once: 8, 16, 32 or 64. The fewer, the more threads share a key.
    pub keys_per_tile: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Self { keys_per_tile: 16 }
    }
}

/// The backend's descriptor, with its settings.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stranger {
    settings: Settings,
}

impl Stranger {
    /// What it was set to.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.settings
    }
}

impl AttentionBackend for Stranger {
    fn name(&self) -> &'static str {
        "stranger"
    }

    fn capabilities(&self) -> &Capabilities {
        &CAPABILITIES
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        let declines = self.declines(problem, device.facts());
        if !declines.is_empty() {
            return Err(BackendError::Declined(declines));
        }
        Ok(Arc::new(kernel::Kernel::new(device, problem, self.settings)?))
    }

    fn configured(&self, config: &serde_json::Value) -> Result<Arc<dyn AttentionBackend>, String> {
        let settings = Settings::deserialize(config).map_err(|error| error.to_string())?;
        match settings.keys_per_tile {
            8 | 16 | 32 | 64 => Ok(Arc::new(Self { settings })),
            other => Err(format!("keys_per_tile is {other}; it may be 8, 16, 32 or 64")),
        }
    }
}

register_backend!(Stranger, priority = 5);
