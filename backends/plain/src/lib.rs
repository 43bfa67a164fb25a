//! The smallest attention backend on the GPU, and the one to copy.
//!
//! One workgroup answers one query row of one head. It serves causal grouped-query attention over a paged cache in f32
//! and f16, and declines the rest. To start a backend of your own, copy this crate, rename [`Plain`] and change
//!
//! * `capabilities.rs`: what it can serve, as data,
//! * `kernel.rs`: how a problem becomes a pipeline, and a call a dispatch,
//! * `plain.wgsl`: the kernel.

#![forbid(unsafe_code)]

mod capabilities;
mod kernel;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionProblem, BackendError, Capabilities, Device, register_backend,
};

/// The backend's descriptor. It holds no state; what is compiled belongs to the kernels it prepares.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plain;

impl AttentionBackend for Plain {
    fn name(&self) -> &'static str {
        "plain"
    }

    fn capabilities(&self) -> &Capabilities {
        &capabilities::CAPABILITIES
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        let declines = self.declines(problem, device.facts());
        if !declines.is_empty() {
            return Err(BackendError::Declined(declines));
        }
        Ok(Arc::new(kernel::Kernel::new(device, problem)?))
    }
}

register_backend!(Plain, priority = 10);
