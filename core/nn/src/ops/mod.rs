//! The operations between attention calls: matrix products, norms, rotary positions and what moves rows about.
//!
//! Every operation is recorded in a [`Commands`] and runs on its device: on a GPU as one dispatch of the project's own
//! WGSL, on the CPU at once. Activations are f32 and row-major; matrices stay in the format they are held in (f32, f16
//! or bf16) and are widened where they are used. Sums are f32.
//!
//! **Row invariance.** Up to [`INVARIANT_ROWS`] rows, [`linear`] and [`swiglu`] give each row the same bits whatever
//! the number of rows in the call and whatever stands in the others: a row of a verify pass equals the row that plain
//! decoding computes. Beyond that number another kernel, with another order of summation, may serve.
//!
//! **Buffers.** An output may not lie in the buffer of an input, except where an operation says that it works in place:
//! a GPU cannot bind one buffer for reading and writing. Ranges on a GPU start at a multiple of the device's
//! `offset_alignment`.

mod cpu;
mod dot;
mod experts;
mod gpu;
mod shader;
mod stacked;

use polyattn_api::{HeadNorm, HeadPart, Rotation};
use polyattn_device::{Buffer, BufferSlice, Commands, DType, Device, DeviceError};

use crate::load::RopePairing;

pub use experts::{CombineCall, ExpertOrder, ExpertRows, MOST_EXPERTS, RouteCall, combine, route, sort_by_expert};
pub use stacked::{ExpertsCall, HeadsCall, linear_by_expert, linear_by_head};

/// Up to this many rows a row's results do not depend on the others in the call; see the [module](self).
pub const INVARIANT_ROWS: u32 = 64;

/// What can go wrong in an operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpError {
    /// The device failed, or a limit of it is exceeded.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Sizes that do not fit together.
    #[error("{0}")]
    Shape(String),
}

/// A matrix of weights, row-major `[rows, cols]`: one row for each output, one column for each input.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// The elements.
    pub buffer: Buffer,
    /// Outputs.
    pub rows: u32,
    /// Inputs.
    pub cols: u32,
    /// Format of the elements.
    pub dtype: DType,
}

/// A vector of f32 weights.
#[derive(Clone, Debug)]
pub struct Vector {
    /// The elements.
    pub buffer: Buffer,
    /// How many.
    pub len: u32,
}

/// An RMS norm: `x / sqrt(mean(x²) + eps) · weight`.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// One factor for each element.
    pub weight: &'a Vector,
    /// Added to the mean square.
    pub eps: f32,
}

impl<'a> From<Norm<'a>> for HeadNorm<'a> {
    fn from(norm: Norm<'a>) -> Self {
        Self { weight: norm.weight.buffer.whole(), dim: norm.weight.len, eps: norm.eps }
    }
}

/// Arguments of [`linear`].
#[derive(Clone, Copy, Debug)]
pub struct LinearCall<'a> {
    /// Input, `[rows, weight.cols]` f32.
    pub x: BufferSlice<'a>,
    /// Rows of input and output.
    pub rows: u32,
    /// The matrix.
    pub weight: &'a Matrix,
    /// A norm of each input row, over all its `weight.cols` elements.
    pub norm: Option<Norm<'a>>,
    /// Added to each output row; `weight.rows` elements.
    pub bias: Option<&'a Vector>,
    /// Output, `[rows, weight.rows]` f32.
    pub out: BufferSlice<'a>,
    /// Whether to add to what `out` holds, instead of replacing it.
    pub accumulate: bool,
}

/// Arguments of [`swiglu`].
#[derive(Clone, Copy, Debug)]
pub struct SwigluCall<'a> {
    /// Input, `[rows, gate_up.cols]` f32.
    pub x: BufferSlice<'a>,
    /// Rows of input and output.
    pub rows: u32,
    /// `[2 · inter, hidden]`: all gate rows, then all up rows.
    pub gate_up: &'a Matrix,
    /// A norm of each input row.
    pub norm: Option<Norm<'a>>,
    /// Output, `[rows, gate_up.rows / 2]` f32.
    pub out: BufferSlice<'a>,
}

/// Cosines and sines of rotary positions, on a device.
#[derive(Clone, Debug)]
pub struct RopeTable {
    buffer: Buffer,
    dim: u32,
    first: u32,
    positions: u32,
}

impl RopeTable {
    /// The rotations of positions `0..positions` by `position · inv_freq[i]` radians, computed in f64. It rotates the
    /// first `2 · inv_freq.len()` elements of a head.
    ///
    /// # Errors
    /// No memory; no frequency or no position; a table beyond 32-bit indices.
    pub fn new(device: &Device, inv_freq: &[f64], positions: u32) -> Result<Self, OpError> {
        let pairs = u32::try_from(inv_freq.len()).ok().filter(|pairs| *pairs > 0 && *pairs < 1 << 30);
        let (Some(pairs), true) = (pairs, positions > 0) else {
            return Err(OpError::Shape(format!("a RoPE table of {} pairs × {positions} positions", inv_freq.len())));
        };
        let length = elements("RoPE table", positions, 2 * pairs)?;
        let buffer = device.alloc(length * 4, "rope table")?;
        // In pieces, so that a table of a long context does not stand in host memory twice.
        let step = (1u32 << 18).div_ceil(pairs);
        let mut piece = Vec::new();
        for first in (0..positions).step_by(step as usize) {
            piece.clear();
            for position in first..positions.min(first.saturating_add(step)) {
                piece.extend(inv_freq.iter().flat_map(|frequency| {
                    let (sin, cos) = (f64::from(position) * frequency).sin_cos();
                    [cos as f32, sin as f32]
                }));
            }
            device.write(&buffer, u64::from(first) * u64::from(pairs) * 8, &piece)?;
        }
        Ok(Self { buffer, dim: 2 * pairs, first: 0, positions })
    }

    /// The same rotations for the elements of a head from `first` on, an even number.
    #[must_use]
    pub fn from_element(&self, first: u32) -> Self {
        Self { first, ..self.clone() }
    }

    /// `[positions, dim / 2, 2]` f32: cosine and sine of each pair.
    #[must_use]
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// These rotations for rows at `positions`, as kernels take them.
    #[must_use]
    pub fn rotation<'a>(&'a self, pairing: RopePairing, positions: BufferSlice<'a>) -> Rotation<'a> {
        Rotation {
            table: self.buffer.whole(),
            table_positions: self.positions,
            dim: self.dim,
            first: self.first,
            interleaved: pairing == RopePairing::Interleaved,
            positions,
        }
    }

    /// Elements of a head that it rotates.
    #[must_use]
    pub fn dim(&self) -> u32 {
        self.dim
    }

    /// Positions it holds.
    #[must_use]
    pub fn positions(&self) -> u32 {
        self.positions
    }
}

/// Arguments of [`rope`].
#[derive(Clone, Copy, Debug)]
pub struct RopeCall<'a> {
    /// f32 rows of `stride` elements; from `offset` on, a row holds its query heads, unless `parts` says where they
    /// are, then its key heads.
    pub qkv: BufferSlice<'a>,
    /// Elements of a row before its first head.
    pub offset: u32,
    /// Elements from one row to the next.
    pub stride: u32,
    /// Rows.
    pub rows: u32,
    /// Query heads, possibly none.
    pub query_heads: u32,
    /// Key heads, possibly none.
    pub kv_heads: u32,
    /// Elements of a head, an even number.
    pub head_dim: u32,
    /// The first elements of each query head and the rest of them, `head_dim` together, where query heads do not lie in
    /// `qkv`, nor in its buffer.
    pub parts: Option<[HeadPart<'a>; 2]>,
    /// A norm of each query head, of as many first elements as it has weights; those behind them stay.
    pub q_norm: Option<Norm<'a>>,
    /// A norm of each key head, likewise.
    pub k_norm: Option<Norm<'a>>,
    /// The rotations, after the norm.
    pub table: &'a RopeTable,
    /// Which two elements are rotated together.
    pub pairing: RopePairing,
    /// Position of each row, u32 `[rows]`; those beyond the table are taken as its last.
    pub positions: BufferSlice<'a>,
    /// Rotated queries, `[rows, query_heads, head_dim]` of `q_dtype`. Unused without query heads.
    pub q_out: BufferSlice<'a>,
    /// Format of the queries.
    pub q_dtype: DType,
}

/// Fetches rows of a table: `out[r] = table[ids[r]]`, widened to f32.
///
/// `ids` holds u32 `[rows]`, `out` f32 `[rows, table.cols]`. An id beyond the table is taken as its last row.
///
/// # Errors
/// Buffers too small for these sizes, an empty table; the device.
pub fn embed(
    commands: &mut Commands,
    table: &Matrix,
    ids: BufferSlice<'_>,
    rows: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    check_matrix("embedding", table)?;
    check_slice("ids", ids, u64::from(rows), 4)?;
    check_slice("embedded rows", out, elements("embedded rows", rows, table.cols)?, 4)?;
    if rows == 0 {
        return Ok(());
    }
    if commands.device().is_cpu() {
        cpu::embed(table, ids, rows, out)
    } else {
        gpu::embed(commands, table, ids, rows, out)
    }
}

/// Norms each row: `out[r] = norm(x[r])`. `x` and `out` are f32 `[rows, norm.weight.len]` in two buffers.
///
/// # Errors
/// Buffers too small for these sizes; the device.
pub fn rms_norm(
    commands: &mut Commands,
    x: BufferSlice<'_>,
    norm: Norm<'_>,
    rows: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    let cols = norm.weight.len;
    check_norm("norm", norm, cols)?;
    let length = elements("normed rows", rows, cols)?;
    check_slice("rows to norm", x, length, 4)?;
    check_slice("normed rows", out, length, 4)?;
    if length == 0 {
        return Ok(());
    }
    if commands.device().is_cpu() {
        cpu::rms_norm(x, norm, rows, out)
    } else {
        gpu::rms_norm(commands, x, norm, rows, out)
    }
}

/// A matrix product with what often surrounds it:
/// `out[r, o] = (accumulate ? out[r, o] : 0) + bias[o] + Σ_i norm(x)[r, i] · weight[o, i]`.
///
/// # Errors
/// Buffers too small for these sizes; the device.
pub fn linear(commands: &mut Commands, call: &LinearCall<'_>) -> Result<(), OpError> {
    let (outputs, cols) = (call.weight.rows, call.weight.cols);
    check_matrix("weights", call.weight)?;
    check_slice("input of a product", call.x, elements("input of a product", call.rows, cols)?, 4)?;
    check_slice("output of a product", call.out, elements("output of a product", call.rows, outputs)?, 4)?;
    if let Some(norm) = call.norm {
        check_norm("norm", norm, cols)?;
    }
    if let Some(bias) = call.bias {
        check_vector("bias", bias, outputs)?;
    }
    if call.rows == 0 {
        return Ok(());
    }
    if commands.device().is_cpu() { cpu::linear(call) } else { gpu::linear(commands, call) }
}

/// The gated half of a feed-forward layer: `out = silu(gate) · up`, where `gate` and `up` are the products of the
/// normed input with the two halves of `gate_up`, and `silu(v) = v / (1 + exp(-v))`.
///
/// # Errors
/// An odd number of weight rows, buffers too small for these sizes; the device.
pub fn swiglu(commands: &mut Commands, call: &SwigluCall<'_>) -> Result<(), OpError> {
    let (outputs, cols) = (call.gate_up.rows / 2, call.gate_up.cols);
    check_matrix("gate and up weights", call.gate_up)?;
    if !call.gate_up.rows.is_multiple_of(2) {
        return Err(OpError::Shape(format!("gate and up weights have {} rows, an odd number", call.gate_up.rows)));
    }
    check_slice("input of SwiGLU", call.x, elements("input of SwiGLU", call.rows, cols)?, 4)?;
    check_slice("output of SwiGLU", call.out, elements("output of SwiGLU", call.rows, outputs)?, 4)?;
    if let Some(norm) = call.norm {
        check_norm("norm", norm, cols)?;
    }
    if call.rows == 0 {
        return Ok(());
    }
    if commands.device().is_cpu() { cpu::swiglu(call) } else { gpu::swiglu(commands, call) }
}

/// Rotary positions, with a norm of each head before them.
///
/// Queries are normed, rotated, rounded to `q_dtype` and written to `q_out`; keys are normed and rotated in place in
/// `qkv`. Nothing else of `qkv` changes.
///
/// # Errors
/// An odd head size, a table or a norm wider than a head, parts of another size, heads beyond the stride, buffers too
/// small; the device.
pub fn rope(commands: &mut Commands, call: &RopeCall<'_>) -> Result<(), OpError> {
    check_rope(call)?;
    if call.rows == 0 || call.query_heads + call.kv_heads == 0 {
        return Ok(());
    }
    if commands.device().is_cpu() { cpu::rope(call) } else { gpu::rope(commands, call) }
}

/// What [`rope`] checks.
pub(crate) fn check_rope(call: &RopeCall<'_>) -> Result<(), OpError> {
    let shape = |message: String| Err(OpError::Shape(message));
    if call.head_dim == 0 || !call.head_dim.is_multiple_of(2) {
        return shape(format!("heads of {} elements cannot be rotated", call.head_dim));
    }
    let RopeTable { dim, first, .. } = *call.table;
    if u64::from(first) + u64::from(dim) > call.head_dim.into() || !first.is_multiple_of(2) {
        return shape(format!("a RoPE table of {dim} elements from {first} on for heads of {}", call.head_dim));
    }
    let heads = u64::from(call.query_heads) + u64::from(call.kv_heads);
    let parts = call.parts.filter(|_| call.query_heads > 0);
    let inside = if parts.is_some() { call.kv_heads.into() } else { heads };
    let end = u64::from(call.offset) + inside * u64::from(call.head_dim);
    if end > u64::from(call.stride) {
        return shape(format!("heads end at element {end} of rows of {}", call.stride));
    }
    if heads == 0 || call.rows == 0 {
        return Ok(());
    }
    // The last row may end with its last head.
    let length = elements("rows to rotate", call.rows, call.stride)? - u64::from(call.stride) + end;
    check_slice("rows to rotate", call.qkv, length, 4)?;
    check_slice("positions", call.positions, u64::from(call.rows), 4)?;
    let norm = |what: &str, norm: Option<Norm<'_>>| {
        let Some(norm) = norm else { return Ok(()) };
        let len = norm.weight.len;
        if len == 0 || len > call.head_dim {
            return shape(format!("{what} has {len} elements, for heads of {}", call.head_dim));
        }
        check_norm(what, norm, len)
    };
    if call.query_heads > 0 {
        // Below 2³².
        let queries = elements("query heads", call.rows, call.query_heads)? as u32;
        let length = elements("rotated queries", queries, call.head_dim)?;
        check_slice("rotated queries", call.q_out, length, call.q_dtype.bytes())?;
        norm("query norm", call.q_norm)?;
        if let Some([front, back]) = parts {
            if front.dim.checked_add(back.dim) != Some(call.head_dim) {
                return shape(format!("parts of {} and {} for heads of {}", front.dim, back.dim, call.head_dim));
            }
            for HeadPart { rows, offset, stride, dim } in [front, back] {
                let before = elements("parts of queries", queries, stride)? - u64::from(stride);
                check_slice("parts of queries", rows, before + u64::from(offset) + u64::from(dim), 4)?;
            }
        }
    }
    norm("key norm", call.k_norm)
}

/// The place of each row's largest element, for the rows of a range: `ids[r]`, u32, of f32 `logits` `[_, cols]` for r
/// in `rows`; the ids before and behind the range stay as they are.
///
/// Of equal elements the first counts, NaN never does; a row of nothing but NaN gives `u32::MAX`, which no
/// vocabulary has.
///
/// # Errors
/// No columns, buffers too small for these sizes; the device.
pub fn argmax(
    commands: &mut Commands,
    logits: BufferSlice<'_>,
    rows: std::ops::Range<u32>,
    cols: u32,
    ids: BufferSlice<'_>,
) -> Result<(), OpError> {
    if cols == 0 {
        return Err(OpError::Shape("the largest of no elements".into()));
    }
    check_slice("logits", logits, elements("logits", rows.end, cols)?, 4)?;
    check_slice("ids", ids, u64::from(rows.end), 4)?;
    if rows.is_empty() {
        return Ok(());
    }
    if commands.device().is_cpu() {
        cpu::argmax(logits, rows, cols, ids)
    } else {
        gpu::argmax(commands, logits, rows, cols, ids)
    }
}

/// The `k` largest elements of each of `rows` rows, largest first: their places in `ids` (u32 `[rows, k]`), and in
/// `log_probabilities` (f32 `[rows, k]`) the logarithms of their shares in the row's softmax, of f32 `logits`
/// `[rows, cols]`.
///
/// Of equal elements the first comes first. NaN takes no part; where a row has fewer numbers than k, the place is
/// `u32::MAX` and the logarithm −∞.
///
/// # Errors
/// No columns, k of 0 or beyond 1,024, buffers too small for these sizes; the device.
pub fn top_k(
    commands: &mut Commands,
    logits: BufferSlice<'_>,
    rows: u32,
    cols: u32,
    k: u32,
    ids: BufferSlice<'_>,
    log_probabilities: BufferSlice<'_>,
) -> Result<(), OpError> {
    if cols == 0 || !(1..=1024).contains(&k) {
        return Err(OpError::Shape(format!("the {k} largest of {cols} elements")));
    }
    check_slice("logits", logits, elements("logits", rows, cols)?, 4)?;
    check_slice("ids of the largest", ids, elements("ids of the largest", rows, k)?, 4)?;
    check_slice("log-probabilities", log_probabilities, elements("log-probabilities", rows, k)?, 4)?;
    if rows == 0 {
        return Ok(());
    }
    if commands.device().is_cpu() {
        cpu::top_k(logits, rows, cols, k, ids, log_probabilities)
    } else {
        gpu::top_k(commands, logits, rows, cols, k, ids, log_probabilities)
    }
}

/// In [`gather_ids`], a source that is the id itself.
#[must_use]
pub const fn given_id(id: u32) -> u32 {
    id | 1 << 31
}

/// Fetches ids, u32: `out[r] = ids[sources[r]]`, or the id itself where the source is a [`given_id`]. `ids` holds as many
/// as fit into its range; an index beyond is taken as the last.
///
/// # Errors
/// No id, buffers too small for these sizes; the device.
pub fn gather_ids(
    commands: &mut Commands,
    ids: BufferSlice<'_>,
    sources: BufferSlice<'_>,
    rows: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    check_slice("sources", sources, u64::from(rows), 4)?;
    check_slice("fetched ids", out, u64::from(rows), 4)?;
    check_slice("ids to fetch from", ids, 1, 4)?;
    if rows == 0 {
        return Ok(());
    }
    let held = u32::try_from(ids.bytes() / 4).unwrap_or(u32::MAX);
    if commands.device().is_cpu() {
        cpu::gather_ids(ids, held, sources, rows, out)
    } else {
        gpu::gather_ids(commands, ids, held, sources, rows, out)
    }
}

/// `product = x · weightᵀ` by the `gemm` crate on all threads of the CPU, f32 `[rows, cols] · [outputs, cols]ᵀ`: what
/// products of many rows are built on, and so the ceiling that they are measured against. Slices of other lengths leave
/// `product` as it is.
pub fn matrix_product(x: &[f32], weight: &[f32], product: &mut [f32], rows: usize, outputs: usize, cols: usize) {
    let fits = [(x.len(), rows, cols), (weight.len(), outputs, cols), (product.len(), rows, outputs)];
    if fits.iter().any(|(length, a, b)| a.checked_mul(*b) != Some(*length) || *length == 0) {
        return;
    }
    let part = rows.div_ceil(rayon::current_num_threads());
    rayon::scope(|scope| {
        for (product, x) in product.chunks_mut(part * outputs).zip(x.chunks(part * cols)) {
            scope.spawn(move |_| dot::gemm_panel(x.len() / cols, outputs, cols, x, weight, product));
        }
    });
}

/// Fetches rows: `out[r] = x[indices[r]]`. `x` holds as many rows of `cols` f32 elements as fit into its range, `indices`
/// u32 `[rows]`, `out` f32 `[rows, cols]`. An index beyond `x` is taken as its last row.
///
/// # Errors
/// No row in `x`, buffers too small for these sizes; the device.
pub fn gather_rows(
    commands: &mut Commands,
    x: BufferSlice<'_>,
    cols: u32,
    indices: BufferSlice<'_>,
    rows: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    check_slice("indices", indices, u64::from(rows), 4)?;
    let length = elements("fetched rows", rows, cols)?;
    check_slice("fetched rows", out, length, 4)?;
    if length == 0 {
        return Ok(());
    }
    check_slice("rows to fetch from", x, cols.into(), 4)?;
    let held = x.bytes() / 4 / u64::from(cols);
    let held = u32::try_from(held).unwrap_or(u32::MAX);
    elements("rows to fetch from", held, cols)?;
    if commands.device().is_cpu() {
        cpu::gather_rows(x, held, cols, indices, rows, out)
    } else {
        gpu::gather_rows(commands, x, held, cols, indices, rows, out)
    }
}

/// A residual SiLU: `out = x + silu(gate)`, `silu(v) = v / (1 + exp(-v))`, over `[rows, cols]` f32 elements.
///
/// # Errors
/// Buffers too small for these sizes; the device.
pub fn add_silu(
    commands: &mut Commands,
    x: BufferSlice<'_>,
    gate: BufferSlice<'_>,
    rows: u32,
    cols: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    let length = elements("a residual SiLU", rows, cols)?;
    for (what, slice) in [("input of SiLU", gate), ("what SiLU is added to", x), ("output of a residual SiLU", out)] {
        check_slice(what, slice, length, 4)?;
    }
    // `elements` has it in 32 bits.
    let count = length as u32;
    if count == 0 {
        return Ok(());
    }
    if commands.device().is_cpu() {
        cpu::add_silu(x, gate, count, out)
    } else {
        gpu::add_silu(commands, x, gate, count, out)
    }
}

/// Copies rows into columns of wider rows: `out[r, out_offset + c] = x[r, c]`, with `x` f32 `[rows, cols]` and `out` rows
/// of `out_stride` f32 elements. Other columns stay as they are.
///
/// # Errors
/// Columns beyond the stride, buffers too small for these sizes; the device.
pub fn copy_columns(
    commands: &mut Commands,
    x: BufferSlice<'_>,
    cols: u32,
    rows: u32,
    out: BufferSlice<'_>,
    out_stride: u32,
    out_offset: u32,
) -> Result<(), OpError> {
    let end = u64::from(out_offset) + u64::from(cols);
    if end > u64::from(out_stride) {
        return Err(OpError::Shape(format!("columns end at {end} in rows of {out_stride}")));
    }
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    check_slice("columns to copy", x, elements("columns to copy", rows, cols)?, 4)?;
    let length = elements("copied columns", rows, out_stride)? - u64::from(out_stride) + end;
    check_slice("copied columns", out, length, 4)?;
    if commands.device().is_cpu() {
        cpu::copy_columns(x, cols, rows, out, out_stride, out_offset)
    } else {
        gpu::copy_columns(commands, x, cols, rows, out, out_stride, out_offset)
    }
}

/// `rows · cols`, which kernels count in 32 bits.
fn elements(what: &str, rows: u32, cols: u32) -> Result<u64, OpError> {
    let count = u64::from(rows) * u64::from(cols);
    // Kernels round up to whole tiles before they compare, so some room is left.
    if count > u64::from(u32::MAX - (1 << 20)) {
        return Err(OpError::Shape(format!("{what}: {rows} × {cols} elements exceed 32-bit indices")));
    }
    Ok(count)
}

fn check_slice(what: &str, slice: BufferSlice<'_>, elements: u64, element_bytes: u64) -> Result<(), OpError> {
    if !slice.offset().is_multiple_of(4) {
        return Err(OpError::Shape(format!("{what} start at byte {}, no multiple of 4", slice.offset())));
    }
    let needed = elements * element_bytes;
    if slice.bytes() < needed {
        return Err(OpError::Shape(format!(
            "{what} need {needed} bytes, buffer '{}' gives {}",
            slice.buffer().label(),
            slice.bytes()
        )));
    }
    Ok(())
}

fn check_matrix(what: &str, matrix: &Matrix) -> Result<(), OpError> {
    if matrix.rows == 0 || matrix.cols == 0 {
        return Err(OpError::Shape(format!("{what}: a matrix of {} × {}", matrix.rows, matrix.cols)));
    }
    match matrix.dtype {
        DType::F32 | DType::F16 | DType::BF16 => {}
        other => return Err(OpError::Shape(format!("{what}: matrices of {other} are not served"))),
    }
    check_slice(what, matrix.buffer.whole(), elements(what, matrix.rows, matrix.cols)?, matrix.dtype.bytes())
}

fn check_vector(what: &str, vector: &Vector, len: u32) -> Result<(), OpError> {
    if vector.len != len {
        return Err(OpError::Shape(format!("{what} has {} elements, expected {len}", vector.len)));
    }
    check_slice(what, vector.buffer.whole(), len.into(), 4)
}

fn check_norm(what: &str, norm: Norm<'_>, len: u32) -> Result<(), OpError> {
    check_vector(what, norm.weight, len)
}
