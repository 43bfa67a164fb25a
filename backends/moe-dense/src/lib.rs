//! A backend for mixtures of experts: every expert in a loop, and the one to copy.
//!
//! Each expert answers all rows, and rows that did not choose it drop its answer. It does the work of as many experts as
//! there are, whatever a token chooses: right on every device, and fast where nearly all experts are chosen anyway. To
//! start a backend of your own, copy this crate, rename [`Dense`] and change
//!
//! * `capabilities.rs`: what it can serve,
//! * `kernel.rs`: the memory it needs, and how a call becomes operations.

#![forbid(unsafe_code)]

mod capabilities;
mod kernel;

use std::sync::Arc;

use polyattn_api::{
    BackendError, Decline, Device, DeviceFacts, MoeBackend, MoeKernel, MoeProblem, register_moe_backend,
};

/// The backend's descriptor. It holds no state; memory belongs to the kernels it prepares.
#[derive(Clone, Copy, Debug, Default)]
pub struct Dense;

impl MoeBackend for Dense {
    fn name(&self) -> &'static str {
        "dense"
    }

    fn declines(&self, problem: &MoeProblem, device: &DeviceFacts) -> Vec<Decline> {
        capabilities::declines(problem, device)
    }

    fn prepare(&self, device: &Device, problem: &MoeProblem, rows: u32) -> Result<Arc<dyn MoeKernel>, BackendError> {
        Ok(Arc::new(kernel::Kernel::new(device, problem, rows)?))
    }
}

register_moe_backend!(Dense, priority = 10);
