//! Attention on the CPU: serves every problem, and is the reference other backends are measured against.
//!
//! Name the crate where the program is built, and it is registered as `cpu`:
//!
//! ```
//! use polyattn_cpu as _;
//!
//! assert!(polyattn_api::Registry::global()?.backend("cpu").is_some());
//! # Ok::<(), polyattn_api::RegistryError>(())
//! ```
//!
//! # How it works
//! A plan cuts the batch into work items: up to 64 rows of one sequence and one key head, a row being one query row of
//! one query head. Items run in parallel. Each walks the keys in tiles of 64, widens a tile of keys and values to f32
//! once for all its rows, and keeps the running maximum, sum and weighted values of every row (online softmax).
//!
//! Tiles begin at multiples of 64 from position 0, and the arithmetic of a row is the same whatever else is in the
//! item. So a row's bits depend on its sequence alone: not on the rest of the batch, and not on the number of query rows
//! in the call. A verified row equals the decoded one.
//!
//! Vector instructions are chosen when the program runs: AVX-512, AVX2 with FMA, or what every CPU of the architecture
//! has. Results of two of these differ in the last bits.

#![deny(unsafe_code)]

mod cache;
mod capabilities;
mod kernel;
mod lanes;
mod visible;

use std::sync::Arc;

use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionKind, AttentionProblem, BackendError, Capabilities, Decline, Device,
    DeviceFacts, register_backend,
};

use crate::kernel::CpuKernel;

register_backend!(Cpu, priority = 0);

/// The backend `cpu`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

/// Larger heads would make a work item's memory larger than most caches in RAM.
const MOST_DIM: u32 = 1 << 16;

impl AttentionBackend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn capabilities(&self) -> &Capabilities {
        &capabilities::CAPABILITIES
    }

    fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        let mut reasons = self.capabilities().declines(problem, device);
        let served = |dim: u32| (1..=MOST_DIM).contains(&dim);
        match problem.kind {
            AttentionKind::Gqa { head_dim, value_dim, .. } => {
                reasons.extend((!served(head_dim)).then_some(Decline::HeadDim(head_dim)));
                reasons.extend((!served(value_dim)).then_some(Decline::ValueDim(value_dim)));
            }
            AttentionKind::Mla { query_heads, latent_dim, rope_dim } => {
                reasons.extend((query_heads == 0).then_some(Decline::Other("attention without heads".into())));
                reasons.extend((!served(latent_dim)).then_some(Decline::LatentDim(latent_dim)));
                reasons.extend((rope_dim > MOST_DIM).then_some(Decline::RopeDim(rope_dim)));
            }
            _ => reasons.push(Decline::Other("this kind of attention".into())),
        }
        reasons
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        let reasons = self.declines(problem, device.facts());
        if !reasons.is_empty() {
            return Err(BackendError::Declined(reasons));
        }
        Ok(Arc::new(CpuKernel::new(device.clone(), problem.clone())))
    }
}
