//! A backend for mixtures of experts: tokens sorted by expert, one grouped product.
//!
//! Each token and each of its experts make a pair. Pairs are sorted by expert on the device, so that one product for the
//! gates and ups of all experts and one for their outputs read each weight once for all pairs of a tile; experts that
//! nobody chose are not read. The answers of a token's experts are then added up in their order.

#![forbid(unsafe_code)]

mod capabilities;
mod kernel;

use std::sync::Arc;

use polyattn_api::{
    BackendError, Decline, Device, DeviceFacts, MoeBackend, MoeKernel, MoeProblem, register_moe_backend,
};

/// The backend's descriptor. It holds no state; memory belongs to the kernels it prepares.
#[derive(Clone, Copy, Debug, Default)]
pub struct Grouped;

impl MoeBackend for Grouped {
    fn name(&self) -> &'static str {
        "grouped"
    }

    fn declines(&self, problem: &MoeProblem, device: &DeviceFacts) -> Vec<Decline> {
        capabilities::declines(problem, device)
    }

    fn prepare(&self, device: &Device, problem: &MoeProblem, rows: u32) -> Result<Arc<dyn MoeKernel>, BackendError> {
        Ok(Arc::new(kernel::Kernel::new(device, problem, rows)?))
    }
}

register_moe_backend!(Grouped, priority = 50);
