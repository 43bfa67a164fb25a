//! Split-KV attention in WGSL over a paged cache: few query rows of a sequence, many keys.
//!
//! It serves decode, verify and draft, where reading keys and values is what costs. On GPUs with subgroups.
//!
//! # Structure
//! A sequence's keys are cut into *chunks* of a fixed number of positions, counted from position 0, and four chunks make
//! a *span*. A work item is one chunk or some spans, one KV head and some *tiles* of rows: a row is a query row and one
//! query head of the group, so that keys and values are read from memory once for all of them. Chunks become partial
//! states (weighted sums, highest logit, sum of weights). Those of a span are joined in order of position, by their item
//! where it has the span, else by a second kernel, in the same way; that kernel then merges the spans. A sequence of one
//! chunk is answered at once. Two kernels answer chunks. Which one does is decided by the formats and the device alone:
//!
//! * `cooperative.wgsl`, where queries and cache are halves and the device multiplies 16 × 16 halves as cooperative
//!   matrices (subgroups of 32). Tiles of 16 rows, up to 4; chunks of 512 keys (256 where heads have 64 elements at the
//!   most), in blocks of 64. Keys and values go through workgroup memory, each block's into registers while the one
//!   before is computed with. Scores and sums leave the matrices through workgroup memory, and are scaled and added by
//!   ordinary threads in f32; weights are rounded to halves. Many rows cost little more than one.
//! * `partial.wgsl` on any GPU with subgroups, and for every format. Tiles of 4 rows, up to 16; chunks of 256 keys. 64
//!   threads serve a tile. They form *streams*, each as wide as a head with 8 elements a thread where subgroups allow. A
//!   stream takes 4 keys at once, which lie as many apart as there are streams: it reads them with neighbouring 16-byte
//!   loads and keeps an online softmax of its own in registers. Its threads add up their parts of the scores such that
//!   each is left with one key's, and weighs that. Where a processor plays the GPU, it is one subgroup that serves up to
//!   4 tiles and takes 8 keys at once, and a word of each line of the next ones is touched a step ahead.
//!
//! The setting `{"splitkv": {"multiply": "matrices" | "lanes" | "narrow"}}` of [`Settings`] makes that choice by hand.
//!
//! # What follows
//! However many sequences and rows there are, a row's chunks, spans, blocks, streams and their order are the same: it has
//! the bits of the decode call at its position, alone and in any batch. The many chunks of one long sequence fill a
//! device as well as many short sequences do, and none waits for the longest.
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
use serde::Deserialize;

/// What users can set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// What multiplies; without, the device and the formats decide.
    pub multiply: Option<Multiply>,
}

/// What multiplies queries with keys, and weights with values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Multiply {
    /// Cooperative matrices of 16 × 16 halves, which also round weights to halves.
    Matrices,
    /// The threads of many subgroups.
    Lanes,
    /// The threads of one subgroup, for processors that play the GPU.
    Narrow,
}

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
        Configured::default().declines(problem, device)
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        Configured::default().prepare(device, problem)
    }

    fn configured(&self, config: &serde_json::Value) -> Result<Arc<dyn AttentionBackend>, String> {
        Configured::default().configured(config)
    }
}

/// [`SplitKv`] with settings.
#[derive(Clone, Copy, Debug, Default)]
struct Configured(Settings);

impl AttentionBackend for Configured {
    fn name(&self) -> &'static str {
        SplitKv.name()
    }

    fn capabilities(&self) -> &Capabilities {
        SplitKv.capabilities()
    }

    fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        let mut reasons = self.capabilities().declines(problem, device);
        // A sequence's own causality would take the place of its tree, which the kernel holds fixed.
        if problem.per_sequence_causal && problem.mask == Mask::Tree {
            reasons.push(Decline::Other("tree mask with per-sequence causality".into()));
        }
        if reasons.is_empty() {
            reasons.extend(shader::device_decline(problem, device, self.0.multiply));
        }
        reasons
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        let declines = self.declines(problem, device.facts());
        if !declines.is_empty() {
            return Err(BackendError::Declined(declines));
        }
        Ok(Arc::new(kernel::Kernel::new(device, problem, self.0.multiply)?))
    }

    fn configured(&self, config: &serde_json::Value) -> Result<Arc<dyn AttentionBackend>, String> {
        let settings = Settings::deserialize(config).map_err(|error| error.to_string())?;
        Ok(Arc::new(Self(settings)))
    }
}

// Above `flash`: as fast or faster for decoding throughout, many times so for few long sequences, and for verification
// with cooperative matrices. Without them it is behind in verifying many rows of many sequences (`polyattn bench
// kernels`); but choosing one for decode and the other for verify would cost a verified row the bits of its decode call.
register_backend!(SplitKv, priority = 60);
