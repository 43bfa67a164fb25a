//! Split-KV attention in WGSL over a paged cache: few query rows of a sequence, many keys.
//!
//! It serves decode, verify and draft, where reading keys and values is what costs. On GPUs with subgroups.
//!
//! # Structure
//! A sequence's keys are cut into *chunks* of a fixed number of positions, counted from position 0. A work item is one
//! chunk, one KV head and up to 16 *tiles* of 4 rows: a row is a query row and one query head of the group, so that
//! keys and values are read from memory once for all of them. 64 threads serve a tile. They form *streams*, each as
//! wide as a head with 8 elements a thread where subgroups allow: a stream takes every so-manieth key of the chunk,
//! reads it with neighbouring 16-byte loads, and keeps an online softmax of its own in registers. Streams are merged at
//! the end of the chunk, and chunks by a second kernel, in order of position.
//!
//! # What follows
//! However many sequences and rows there are, a row's chunks, streams and their order are the same: it has the bits of
//! the decode call at its position, alone and in any batch. The many chunks of one long sequence fill a device as well
//! as many short sequences do, and none waits for the longest.
//!
//! Source: split-KV decoding is Flash-Decoding's (Dao, Haziza, Massa, Sizov, 2023); the fixed split that makes it
//! batch-invariant is described in "Defeating Nondeterminism in LLM Inference" (Thinking Machines, 2025).

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
pub struct SplitKv;

impl AttentionBackend for SplitKv {
    fn name(&self) -> &'static str {
        "splitkv"
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
        if reasons.is_empty() {
            reasons.extend(shader::device_decline(problem, device));
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

// Below `flash`: on an H100 it is up to twelve times as fast for few long sequences, and behind for verification at long
// contexts and for decoding below about a thousand keys (tests/bench/results/2026-11-23-h100). Choosing one for decode
// and the other for verify would cost a verified row the bits of its decode call.
register_backend!(SplitKv, priority = 40);
