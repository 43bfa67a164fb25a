//! Products with several matrices of one shape: by head, and by expert.

use polyattn_device::{BufferSlice, Commands};

use super::{ExpertRows, Matrix, OpError, check_matrix, check_slice, cpu, elements, gpu};

/// Arguments of [`linear_by_head`].
#[derive(Clone, Copy, Debug)]
pub struct HeadsCall<'a> {
    /// f32 rows of `heads` parts of `x_stride` elements, of which the first `weight.cols` are read.
    pub x: BufferSlice<'a>,
    /// Rows of input and output.
    pub rows: u32,
    /// Matrices of one shape, one below the other.
    pub weight: &'a Matrix,
    /// How many matrices `weight` holds.
    pub matrices: u32,
    /// The first matrix that is used.
    pub first: u32,
    /// Parts of a row, each with a matrix of its own.
    pub heads: u32,
    /// Elements from one part of an input row to the next.
    pub x_stride: u32,
    /// Whether a matrix holds gates, then ups, and the outputs are `silu(gate) · up`, as in [`swiglu`](super::swiglu).
    pub gated: bool,
    /// f32 rows of `heads` parts of `out_stride` elements, of which the first are written, one for each output.
    pub out: BufferSlice<'a>,
    /// Elements from one part of an output row to the next.
    pub out_stride: u32,
}

/// Arguments of [`linear_by_expert`].
#[derive(Clone, Copy, Debug)]
pub struct ExpertsCall<'a> {
    /// f32 rows of `weight.cols` elements, one for each `share` pairs.
    pub x: BufferSlice<'a>,
    /// Pairs that read one row of `x`: the experts of a token where `x` holds tokens, 1 where it holds pairs.
    pub share: u32,
    /// The experts' matrices, one below the other.
    pub weight: &'a Matrix,
    /// Which pairs each expert serves.
    pub rows: &'a ExpertRows<'a>,
    /// Whether a matrix holds gates, then ups, and the outputs are `silu(gate) · up`.
    pub gated: bool,
    /// f32 `[pairs, outputs]`.
    pub out: BufferSlice<'a>,
}

/// The outputs of one of `count` matrices that lie below each other in `weight`.
fn outputs(weight: &Matrix, count: u32, gated: bool) -> Result<u32, OpError> {
    let parts = if gated { 2 } else { 1 };
    if count == 0 || !weight.rows.is_multiple_of(count.saturating_mul(parts)) {
        let kind = if gated { "gated matrices" } else { "matrices" };
        return Err(OpError::Shape(format!("{} rows of weights are no {count} {kind} of one shape", weight.rows)));
    }
    Ok(weight.rows / count / parts)
}

/// A product of each part of a row with a matrix of its own:
/// `out[r, h, o] = Σ_i x[r, h, i] · weight[first + h, o, i]`. Elements of `out` between the parts stay as they are.
///
/// A row gets the same bits whatever the number of rows in the call.
///
/// # Errors
/// Parts that do not fit their strides, buffers too small for these sizes; the device.
pub fn linear_by_head(commands: &mut Commands, call: &HeadsCall<'_>) -> Result<(), OpError> {
    check_matrix("weights of heads", call.weight)?;
    let outputs = outputs(call.weight, call.matrices, call.gated)?;
    let end = u64::from(call.first) + u64::from(call.heads);
    if call.heads == 0 || end > call.matrices.into() {
        return Err(OpError::Shape(format!("{} heads end at matrix {end} of {}", call.heads, call.matrices)));
    }
    let cols = call.weight.cols;
    for (what, stride, width) in [("input", call.x_stride, cols), ("output", call.out_stride, outputs)] {
        if stride < width {
            return Err(OpError::Shape(format!("{what} parts of {stride} elements for {width}")));
        }
    }
    let length = |what: &str, stride: u32, width: u32| -> Result<u64, OpError> {
        let row = u32::try_from(u64::from(call.heads) * u64::from(stride))
            .map_err(|_| OpError::Shape(format!("{what}: {} × {stride} elements exceed 32 bits", call.heads)))?;
        // The last part may end with its last element.
        Ok(elements(what, call.rows, row)?.saturating_sub(u64::from(stride - width)))
    };
    check_slice("input of heads", call.x, length("input of heads", call.x_stride, cols)?, 4)?;
    check_slice("output of heads", call.out, length("output of heads", call.out_stride, outputs)?, 4)?;
    if call.rows == 0 {
        return Ok(());
    }
    if commands.device().is_cpu() {
        cpu::linear_by_head(call, outputs)
    } else {
        gpu::linear_by_head(commands, call, outputs)
    }
}

/// A product of each pair of a token and an expert with the expert's matrix:
/// `out[p, o] = Σ_i x[p / share, i] · weight[expert of p, o, i]`.
///
/// A pair gets the same bits whatever the others.
///
/// # Errors
/// Buffers too small for these sizes; the device.
pub fn linear_by_expert(commands: &mut Commands, call: &ExpertsCall<'_>) -> Result<(), OpError> {
    check_matrix("weights of experts", call.weight)?;
    let outputs = outputs(call.weight, call.rows.experts, call.gated)?;
    if call.share == 0 {
        return Err(OpError::Shape("0 pairs share a row".into()));
    }
    let pairs = call.rows.pairs;
    let length = elements("input of experts", pairs.div_ceil(call.share), call.weight.cols)?;
    check_slice("input of experts", call.x, length, 4)?;
    check_slice("output of experts", call.out, elements("output of experts", pairs, outputs)?, 4)?;
    if pairs == 0 {
        return Ok(());
    }
    if commands.device().is_cpu() {
        cpu::linear_by_expert(call, outputs)
    } else {
        gpu::linear_by_expert(commands, call, outputs)
    }
}
