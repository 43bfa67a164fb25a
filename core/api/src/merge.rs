//! Merging of partial results of attention.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use polyattn_device::{Access, BufferSlice, Commands, Device, DeviceError, Pipeline, PipelineSpec};

use crate::BackendError;

/// Results of attention over some of the keys: an output and its LSE for each query row and head. A *state* is one head
/// of one row; states are numbered row by row.
#[derive(Clone, Copy, Debug)]
pub struct AttentionState<'a> {
    /// `[rows, query_heads, output_dim]`, f32.
    pub out: BufferSlice<'a>,
    /// `[rows, query_heads]`, f32: natural logarithm of the softmax's denominator, −∞ of a state that saw no key.
    pub lse: BufferSlice<'a>,
}

impl<'a> AttentionState<'a> {
    /// Output and LSE as a kernel wrote them ([`AttentionIo`](crate::AttentionIo)).
    pub fn new(out: impl Into<BufferSlice<'a>>, lse: impl Into<BufferSlice<'a>>) -> Self {
        Self { out: out.into(), lse: lse.into() }
    }
}

/// What [`merge_states`] merges.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MergeStates<'a> {
    /// Merged in place. Output and LSE lie in two buffers.
    pub into: AttentionState<'a>,
    /// What it is merged with, over other keys; in other buffers than `into`.
    pub other: AttentionState<'a>,
    /// The states to merge; those outside are left as they are.
    pub states: Range<u32>,
    /// Elements of a state's output.
    pub dim: u32,
}

impl<'a> MergeStates<'a> {
    /// `states` of `dim` elements each, of `other` into `into`.
    #[must_use]
    pub fn new(into: AttentionState<'a>, other: AttentionState<'a>, states: Range<u32>, dim: u32) -> Self {
        Self { into, other, states, dim }
    }

    fn validate(&self) -> Result<(), BackendError> {
        let end = u64::from(self.states.end);
        if end * u64::from(self.dim) > u64::from(u32::MAX) {
            let Self { states, dim, .. } = self;
            return Err(BackendError::Io(format!("{} states of {dim} elements exceed 32 bits", states.end)));
        }
        for (name, slice, needed) in [
            ("out", self.into.out, end * u64::from(self.dim) * 4),
            ("lse", self.into.lse, end * 4),
            ("the other out", self.other.out, end * u64::from(self.dim) * 4),
            ("the other lse", self.other.lse, end * 4),
        ] {
            if slice.bytes() < needed {
                return Err(BackendError::Io(format!("{name} has {} bytes, needs {needed}", slice.bytes())));
            }
        }
        Ok(())
    }
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Immediates {
    first: u32,
    count: u32,
    dim: u32,
}

/// Records the merging of partial results over disjoint sets of keys into the result over all of them:
/// with `m = max(a, b)` of the two LSEs, the output is `(e^(a−m)·out_a + e^(b−m)·out_b) / (e^(a−m) + e^(b−m))` and its LSE
/// `m + ln(e^(a−m) + e^(b−m))`.
///
/// It is associative and commutative up to rounding, so any number of parts may be merged in any order; a fixed order
/// gives the same bits. A state of LSE −∞ is the neutral element to the bit, whatever its output holds. A sink belongs to
/// one of the parts. It serves split keys, shared prefixes ([`Cascade`](crate::Cascade)), a prompt read in chunks, and
/// two backends that share a context.
///
/// Source: `merge_state` of FlashInfer (arXiv 2501.01005, whose LSE is of base 2; this one is natural).
///
/// # Errors
/// Buffers that are too small, or used twice (on a GPU that error comes with the submission).
pub fn merge_states(commands: &mut Commands, io: &MergeStates<'_>) -> Result<(), BackendError> {
    io.validate()?;
    if io.states.is_empty() {
        return Ok(());
    }
    if commands.device().is_cpu() {
        return merge(io);
    }
    let count = io.states.end - io.states.start;
    let pipeline = commands.device().cached_pipeline("merge_states", 0, compile)?;
    let immediates = Immediates { first: io.states.start, count, dim: io.dim };
    let slices = [io.into.out, io.into.lse, io.other.out, io.other.lse];
    // A dimension of a dispatch is limited, so many states are spread over two.
    let y = count.div_ceil(commands.device().facts().limits.workgroups_per_dimension.max(1));
    commands.dispatch(&pipeline, &slices, bytemuck::bytes_of(&immediates), [count.div_ceil(y), y, 1])?;
    Ok(())
}

fn compile(device: &Device) -> Result<Pipeline, DeviceError> {
    device.pipeline(&PipelineSpec {
        label: "merge_states",
        source: include_str!("merge.wgsl"),
        entry: "merge",
        bindings: &[Access::ReadWrite, Access::ReadWrite, Access::Read, Access::Read],
        immediate_bytes: size_of::<Immediates>() as u32,
        constants: &[],
    })
}

/// Merges on the CPU.
fn merge(io: &MergeStates<'_>) -> Result<(), BackendError> {
    let from = |slice: BufferSlice<'_>| slice.offset() as usize / 4;
    let mut out = io.into.out.buffer().write::<f32>()?;
    let out = &mut out[from(io.into.out)..];
    let mut lse = io.into.lse.buffer().write::<f32>()?;
    let lse = &mut lse[from(io.into.lse)..];
    let other_out = io.other.out.buffer().read::<f32>()?;
    let other_out = &other_out[from(io.other.out)..];
    let other_lse = io.other.lse.buffer().read::<f32>()?;
    let other_lse = &other_lse[from(io.other.lse)..];
    let dim = io.dim as usize;
    for state in io.states.start as usize..io.states.end as usize {
        let (a, b) = (lse[state], other_lse[state]);
        let (out, other) = (&mut out[state * dim..][..dim], &other_out[state * dim..][..dim]);
        if b == f32::NEG_INFINITY {
            continue;
        }
        if a == f32::NEG_INFINITY {
            out.copy_from_slice(other);
            lse[state] = b;
            continue;
        }
        let top = a.max(b);
        let (weight_a, weight_b) = ((a - top).exp(), (b - top).exp());
        let total = weight_a + weight_b;
        out.iter_mut().zip(other).for_each(|(out, other)| *out = (weight_a * *out + weight_b * other) / total);
        lse[state] = top + total.ln();
    }
    Ok(())
}
