//! Portable flash attention in WGSL over a paged cache.
//!
//! It serves prefill, decode, verify and draft with one kernel on any GPU that wgpu reaches: no cooperative matrices,
//! no 16-bit arithmetic, subgroups where there are some.
//!
//! # Structure
//! A work item is one KV head and up to 16 *rows* of one sequence: a row is a query row and one query head of the
//! group, so that keys and values are read once for all heads that share them. One workgroup of 256 threads serves an
//! item. Threads form *slices*, each wide enough to cover a value with 8 elements a thread. Slice g takes keys g·w to
//! g·w + w − 1 of every tile of 256 keys, w being its width: each thread scores one key for all rows, then sums its 8
//! elements of the slice's values. A slice keeps an online softmax of its own, and slices are merged once at the end.
//! Elements are read through loaders by format, of 8 bits too; the scale of a key multiplies its score, that of a value
//! its weight.
//!
//! Where a slice lies within a subgroup, its maximum goes by shuffles and the loop over the keys has half the barriers.
//!
//! # What follows
//! Tiles begin at position 0, and nothing in the order of a row's arithmetic depends on the other rows, on the rows of
//! an item, or on the batch. So a row of a verify pass has the bits of the decode call at its position, and a sequence
//! has the same bits in any batch.
//!
//! # Settings
//! `{"cascade": true}` as its `backend_config` lets sequences that begin with the same pages read them once
//! ([`Cascade`]). What is shared decides the order of sums, so the backend then no longer claims the same bits in any
//! batch, nor has a verified row those of its decode call. Problems with windows or ALiBi are served as without it.

#![forbid(unsafe_code)]

mod capabilities;
mod kernel;
mod shader;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use polyattn_api::{
    AttentionBackend, AttentionKernel, AttentionProblem, BackendError, Capabilities, Cascade, Decline, Device,
    DeviceFacts, register_backend,
};
use serde::Deserialize;

/// What users can set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Whether pages that sequences share are read once for all of them, where that pays.
    pub cascade: bool,
}

/// The backend's descriptor.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flash;

impl AttentionBackend for Flash {
    fn name(&self) -> &'static str {
        "flash"
    }

    fn capabilities(&self) -> &Capabilities {
        &capabilities::CAPABILITIES
    }

    fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        let mut reasons = self.capabilities().declines(problem, device);
        let (needed, available) = (shader::Variant::bindings(problem).len(), device.limits.storage_buffers);
        if !device.is_cpu() && needed > available as usize {
            let what = format!("{needed} storage buffers in one kernel, where the device has {available},");
            reasons.push(Decline::Other(what.into()));
        }
        reasons
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        let declines = self.declines(problem, device.facts());
        if !declines.is_empty() {
            return Err(BackendError::Declined(declines));
        }
        let exchange = shader::Exchange::choose(problem, device.facts());
        Ok(Arc::new(kernel::Kernel::new(device, problem, exchange)?))
    }

    fn configured(&self, config: &serde_json::Value) -> Result<Arc<dyn AttentionBackend>, String> {
        let settings = Settings::deserialize(config).map_err(|error| error.to_string())?;
        Ok(if settings.cascade { Arc::new(Cascading) } else { Arc::new(Self) })
    }
}

/// [`Flash`] with shared prefixes.
#[derive(Clone, Copy, Debug)]
struct Cascading;

impl AttentionBackend for Cascading {
    fn name(&self) -> &'static str {
        Flash.name()
    }

    fn capabilities(&self) -> &Capabilities {
        &capabilities::CASCADING
    }

    fn declines(&self, problem: &AttentionProblem, device: &DeviceFacts) -> Vec<Decline> {
        Flash.declines(problem, device)
    }

    fn prepare(&self, device: &Device, problem: &AttentionProblem) -> Result<Arc<dyn AttentionKernel>, BackendError> {
        // One buffer more, for the LSE, may be one too many for the device.
        let mut own = problem.clone();
        own.lse = true;
        if Cascade::declines(problem).is_some() || !Flash.declines(&own, device.facts()).is_empty() {
            return Flash.prepare(device, problem);
        }
        Ok(Arc::new(Cascade::prepare(&Flash, device, problem)?))
    }

    fn configured(&self, config: &serde_json::Value) -> Result<Arc<dyn AttentionBackend>, String> {
        Flash.configured(config)
    }
}

register_backend!(Flash, priority = 50);
