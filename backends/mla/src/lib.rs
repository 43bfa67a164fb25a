//! Multi-head latent attention (MLA) in WGSL, in absorbed form, over a paged cache.
//!
//! A token's cache row is its latent and, behind it, the rope key that all heads share. Queries arrive with the key
//! up-projection absorbed, `[latent_dim + rope_dim]` a head; the output stays latent. So all query heads attend one
//! key head, and the value is the first part of the key. It serves prefill, decode, verify and draft. The logits'
//! factor is the problem's: that of the unabsorbed head, not `(latent_dim + rope_dim)^-1/2`.
//!
//! A long prefill takes less arithmetic in the form that is not absorbed, with keys and values of each head made from
//! the latents. That is another problem (GQA with as many KV heads as query heads), which is up to the model to pose. It
//! is no faster while no backend multiplies matrices for it: 2,048 tokens of DeepSeek-V2-Lite take this crate 1.3 ms on
//! an H100, and `flash` 2.0 ms with keys and values at hand (`bench kernels`, `deepseek-v2-lite*/prefill/1x2k`).
//!
//! # Structure
//! A sequence's keys are cut into *chunks* of a fixed number of positions, counted from position 0. A *row* is a query
//! row and a head. A work item is one chunk and up to 16 rows of one sequence, which share what is read of the cache.
//! It leaves a partial state for each row; a second kernel merges a row's chunks, in order of position. The first
//! kernel comes in two forms:
//!
//! * By cooperative matrices, for f16 queries over an f16 cache on devices that multiply 16 by 16 of them: eight
//!   subgroups take a chunk in steps of 32 keys, whose latents lie in workgroup memory once and are keys first, values
//!   then. Dims are those that subgroups share evenly (512 + 64 and 256 + 64 among them).
//! * In plain arithmetic, for everything else, with or without subgroups: 128 threads score two keys each for all rows,
//!   the queries passing through workgroup memory in slices along the row; scores become weights; then each thread sums
//!   eight columns of the latents for eight rows.
//!
//! # What follows
//! However many sequences and rows there are, a row's chunks and the order of its sums are the same: it has the bits of
//! the decode call at its position, alone and in any batch. The many chunks of one long sequence fill a device as well
//! as many short sequences do.
//!
//! Sources: MLA and its absorbed form are DeepSeek-V2's (arXiv 2405.04434); split-KV decoding is Flash-Decoding's (Dao,
//! Haziza, Massa, Sizov, 2023); scaling sums only where a score passes its base by a margin is FlashAttention-4's.

#![forbid(unsafe_code)]

mod capabilities;
mod kernel;
mod plan;
mod shader;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionProblem, BackendError, Capabilities, Decline, Device, DeviceFacts,
    Mask, register_backend,
};

/// The backend's descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mla;

impl AttentionBackend for Mla {
    fn name(&self) -> &'static str {
        "mla"
    }

    fn capabilities(&self) -> &Capabilities {
        &capabilities::CAPABILITIES
    }

    fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        let mut reasons = self.capabilities().declines(problem, device);
        // A sequence's own causality would take the place of its tree, which the kernel holds fixed.
        if problem.per_sequence_causal && problem.mask == Mask::Tree {
            reasons.push(Decline::Other("tree mask with per-sequence causality".into()));
        }
        reasons
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        let declines = self.declines(problem, device.facts());
        if !declines.is_empty() {
            return Err(BackendError::Declined(declines));
        }
        Ok(Arc::new(kernel::Kernel::new(device, problem)?))
    }
}

register_backend!(Mla, priority = 50);
