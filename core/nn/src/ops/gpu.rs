//! Operations as dispatches.

use std::ops::Range;

use polyattn_api::HeadPart;
use polyattn_device::{BufferSlice, Commands, DType, Device, DeviceError, Pipeline, PipelineSpec};

use super::{
    CombineCall, ExpertRows, ExpertsCall, HeadsCall, INVARIANT_ROWS, LinearCall, Matrix, Norm, OpError, RopeCall,
    RouteCall, SwigluCall, Vector,
    shader::{self, Few, Product, Rope, Source, Stack},
};
use crate::load::{ExpertChoice, RopePairing};

/// Groups of lanes that keep a large GPU busy: below it, rows are spread over more of them.
const BUSY_GROUPS: u32 = 512;

fn pipeline(
    commands: &Commands,
    name: &'static str,
    variant: u64,
    source: impl FnOnce() -> Source,
) -> Result<Pipeline, DeviceError> {
    commands.device().cached_pipeline(name, variant, |device: &Device| {
        let source = source();
        device.pipeline(&PipelineSpec {
            label: name,
            source: &source.text,
            entry: "main",
            bindings: &source.bindings,
            immediate_bytes: source.immediate_bytes,
            constants: &[],
        })
    })
}

/// `count` workgroups in as many dimensions as the limit asks for; there may be some too many.
fn spread(commands: &Commands, count: u64) -> Result<[u32; 3], OpError> {
    let limit = u64::from(commands.device().facts().limits.workgroups_per_dimension.max(1));
    let height = count.div_ceil(limit).max(1);
    if height > limit {
        return Err(DeviceError::Limit {
            what: "an operation".into(),
            needed: count,
            allowed: limit * limit,
            unit: "workgroups",
            device: commands.device().facts().name.clone(),
        }
        .into());
    }
    // Both fit into 32 bits, as the limit does.
    Ok([count.div_ceil(height) as u32, height as u32, 1])
}

fn dtype_code(dtype: DType) -> u64 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        _ => 2,
    }
}

fn bits<const N: usize>(fields: [u64; N]) -> u64 {
    fields.into_iter().fold(0, |all, field| all << 8 | field)
}

/// A matrix cut into row ranges that a device can bind: first row, rows, and where they lie.
fn parts(device: &Device, matrix: &Matrix) -> Result<Vec<(u32, u32, u64, u64)>, OpError> {
    let limits = &device.facts().limits;
    let row = u64::from(matrix.cols) * matrix.dtype.bytes();
    let all = u64::from(matrix.rows) * row;
    if all <= limits.binding_bytes {
        return Ok(vec![(0, matrix.rows, 0, all)]);
    }
    let alignment = u64::from(limits.offset_alignment.max(1));
    // The fewest rows after which another part may start.
    let step = alignment / gcd(alignment, row);
    let most = limits.binding_bytes / row / step * step;
    let Some(most) = u32::try_from(most).ok().filter(|most| *most > 0) else {
        return Err(DeviceError::Limit {
            what: matrix.buffer.label().to_owned(),
            needed: step * row,
            allowed: limits.binding_bytes,
            unit: "bytes in one binding",
            device: device.facts().name.clone(),
        }
        .into());
    };
    Ok((0..matrix.rows)
        .step_by(most as usize)
        .map(|first| {
            let count = most.min(matrix.rows - first);
            (first, count, u64::from(first) * row, u64::from(count) * row)
        })
        .collect())
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a.max(1) } else { gcd(b, a % b) }
}

pub(super) fn embed(
    commands: &mut Commands,
    table: &Matrix,
    ids: BufferSlice<'_>,
    rows: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    let pipeline = pipeline(commands, "embed", dtype_code(table.dtype), || shader::embed(table.dtype))?;
    let count = u64::from(rows) * u64::from(table.cols);
    let workgroups = spread(commands, count.div_ceil(shader::COPIED.into()))?;
    for (first, part_rows, offset, bytes) in parts(commands.device(), table)? {
        let params = [rows, table.cols, table.rows, first, part_rows];
        let part = table.buffer.slice(offset, bytes)?;
        commands.dispatch(&pipeline, &[ids, part, out], bytemuck::bytes_of(&params), workgroups)?;
    }
    Ok(())
}

pub(super) fn rms_norm(
    commands: &mut Commands,
    x: BufferSlice<'_>,
    norm: Norm<'_>,
    rows: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    let pipeline = pipeline(commands, "rms norm", 0, shader::rms_norm)?;
    let params = [rows, norm.weight.len, norm.eps.to_bits()];
    let workgroups = spread(commands, rows.into())?;
    let slices = [x, norm.weight.buffer.whole(), out];
    Ok(commands.dispatch(&pipeline, &slices, bytemuck::bytes_of(&params), workgroups)?)
}

pub(super) fn linear(commands: &mut Commands, call: &LinearCall<'_>) -> Result<(), OpError> {
    for (first, count, offset, bytes) in parts(commands.device(), call.weight)? {
        let product = ProductCall {
            x: call.x,
            rows: call.rows,
            weight: call.weight,
            part: call.weight.buffer.slice(offset, bytes)?,
            first,
            outputs: count,
            stride: call.weight.rows,
            paired: false,
            norm: call.norm,
            bias: call.bias,
            out: call.out,
            accumulate: call.accumulate,
        };
        product.record(commands)?;
    }
    Ok(())
}

pub(super) fn swiglu(commands: &mut Commands, call: &SwigluCall<'_>) -> Result<(), OpError> {
    let outputs = call.gate_up.rows / 2;
    let product = ProductCall {
        x: call.x,
        rows: call.rows,
        weight: call.gate_up,
        part: call.gate_up.buffer.whole(),
        first: 0,
        outputs,
        stride: outputs,
        paired: true,
        norm: call.norm,
        bias: None,
        out: call.out,
        accumulate: false,
    };
    product.record(commands)
}

/// A matrix product with rows of one matrix, or with a part of them.
struct ProductCall<'a> {
    x: BufferSlice<'a>,
    rows: u32,
    weight: &'a Matrix,
    part: BufferSlice<'a>,
    first: u32,
    outputs: u32,
    stride: u32,
    paired: bool,
    norm: Option<Norm<'a>>,
    bias: Option<&'a Vector>,
    out: BufferSlice<'a>,
    accumulate: bool,
}

impl ProductCall<'_> {
    fn record(&self, commands: &mut Commands) -> Result<(), OpError> {
        let product = Product {
            dtype: self.weight.dtype,
            stack: Stack::Single,
            aligned: self.weight.cols.is_multiple_of(8),
            paired: self.paired,
            norm: self.norm.is_some(),
            bias: self.bias.is_some(),
        };
        let (pipeline, workgroups, row_tiles) = if self.rows <= INVARIANT_ROWS {
            let few = few(commands.device(), product, self.rows, self.outputs, self.weight.cols);
            let row_tiles = self.rows.div_ceil(few.rows);
            let tiles = u64::from(self.outputs.div_ceil(few.outputs() * few.groups)) * u64::from(row_tiles);
            (few_pipeline(commands, &few)?, spread(commands, tiles)?, row_tiles)
        } else {
            let tile = if self.paired { shader::TILE / 2 } else { shader::TILE };
            let workgroups = [self.outputs.div_ceil(tile), self.rows.div_ceil(shader::TILE), 1];
            let name = "product of many rows";
            let pipeline = pipeline(commands, name, product_code(&product), || shader::many_rows(&product))?;
            (pipeline, workgroups, 0)
        };
        let params = [
            self.rows,
            self.weight.cols,
            self.outputs,
            self.first,
            self.stride,
            self.accumulate.into(),
            row_tiles,
            self.norm.map_or(0.0, |norm| norm.eps).to_bits(),
        ];
        // Up to five bindings; those that are not used lie behind the rest.
        let mut slices = [self.x, self.part, self.out, self.out, self.out];
        let mut used = 3;
        for vector in self.norm.map(|norm| norm.weight).into_iter().chain(self.bias) {
            slices[used] = vector.buffer.whole();
            used += 1;
        }
        Ok(commands.dispatch(&pipeline, &slices[..used], bytemuck::bytes_of(&params), workgroups)?)
    }
}

fn product_code(product: &Product) -> u64 {
    bits([
        dtype_code(product.dtype),
        u64::from(product.aligned)
            | u64::from(product.paired) << 1
            | u64::from(product.norm) << 2
            | u64::from(product.bias) << 3
            | (product.stack as u64) << 4,
    ])
}

fn few_pipeline(commands: &Commands, few: &Few) -> Result<Pipeline, DeviceError> {
    let [rows, lanes, groups, unroll] = [few.rows, few.lanes, few.groups, few.unroll].map(u64::from);
    let flags = product_code(&few.product);
    let variant = bits([flags >> 8, flags & 0xff, rows, lanes, groups, unroll, few.subgroups.into()]);
    pipeline(commands, "product of few rows", variant, || shader::few_rows(few))
}

/// The variant of the few-rows kernel for so many rows and outputs. Lanes depend on the device alone, see
/// `few_rows.wgsl`.
fn few(device: &Device, product: Product, rows: u32, outputs: u32, cols: u32) -> Few {
    let facts = device.facts();
    let subgroups = facts.has("subgroups")
        && facts.subgroup_min == facts.subgroup_max
        && facts.subgroup_min.is_power_of_two()
        && (4..=128).contains(&facts.subgroup_min);
    let lanes = if subgroups { facts.subgroup_min } else { 32 };
    let mut few = Few { product, rows: 1, lanes, groups: 1, unroll: 1, subgroups };
    few.rows = rows.next_power_of_two().min(shader::MOST_ROWS);
    let groups = |few: &Few| outputs.div_ceil(few.outputs()) * rows.div_ceil(few.rows);
    while few.rows > 4 && groups(&few) < BUSY_GROUPS {
        few.rows /= 2;
    }
    // Small matrices are spread over the whole GPU, large ones use few, larger workgroups.
    if !subgroups {
        few.groups = 2;
    } else if groups(&few) > 2 * BUSY_GROUPS {
        few.groups = (128 / lanes).max(1);
    }
    // With many rows the registers hold sums rather than weights on their way.
    let chunks = cols.div_ceil(8).div_ceil(lanes);
    few.unroll = chunks.min(if few.rows <= 4 { 6 } else { 3 });
    few
}

/// A matrix, or as little of it as holds rows of a range where it cannot be bound whole, and the element of that part
/// where the range begins.
fn rows_of<'a>(device: &Device, matrix: &'a Matrix, rows: Range<u64>) -> Result<(BufferSlice<'a>, u32), OpError> {
    let limits = &device.facts().limits;
    let row = u64::from(matrix.cols) * matrix.dtype.bytes();
    let all = u64::from(matrix.rows) * row;
    let alignment = u64::from(limits.offset_alignment.max(1));
    let (start, end) = match all <= limits.binding_bytes {
        true => (0, all),
        false => (rows.start * row / alignment * alignment, rows.end * row),
    };
    if end - start > limits.binding_bytes {
        return Err(DeviceError::Limit {
            what: matrix.buffer.label().to_owned(),
            needed: end - start,
            allowed: limits.binding_bytes,
            unit: "bytes in one binding",
            device: device.facts().name.clone(),
        }
        .into());
    }
    // Within a matrix of fewer than 2³² elements.
    Ok((matrix.buffer.slice(start, end - start)?, ((rows.start * row - start) / matrix.dtype.bytes()) as u32))
}

pub(super) fn linear_by_head(commands: &mut Commands, call: &HeadsCall<'_>, outputs: u32) -> Result<(), OpError> {
    let weight = call.weight;
    let product = Product {
        dtype: weight.dtype,
        stack: Stack::Heads,
        aligned: weight.cols.is_multiple_of(8) && call.x_stride.is_multiple_of(4),
        paired: call.gated,
        norm: false,
        bias: false,
    };
    let few = few(commands.device(), product, call.rows, outputs, weight.cols);
    let rows = u64::from(weight.rows / call.matrices);
    let range = u64::from(call.first) * rows..(u64::from(call.first) + u64::from(call.heads)) * rows;
    let (part, base) = rows_of(commands.device(), weight, range)?;
    let row_tiles = call.rows.div_ceil(few.rows);
    let tiles = u64::from(outputs.div_ceil(few.outputs() * few.groups)) * u64::from(row_tiles);
    let mut workgroups = spread(commands, tiles)?;
    workgroups[2] = call.heads;
    let allowed = commands.device().facts().limits.workgroups_per_dimension;
    if call.heads > allowed {
        return Err(OpError::Shape(format!("{} heads, the device takes {allowed}", call.heads)));
    }
    let (out_stride, x_stride) = (call.out_stride, call.x_stride);
    let params = [call.rows, weight.cols, outputs, 0, out_stride, 0, row_tiles, 0, call.heads, x_stride, base];
    let pipeline = few_pipeline(commands, &few)?;
    Ok(commands.dispatch(&pipeline, &[call.x, part, call.out], bytemuck::bytes_of(&params), workgroups)?)
}

/// Pairs of a tile, and tiles that suffice for so many pairs of so many experts: as many pairs as an expert has on the
/// average, so that its weights are read once or twice.
pub(super) fn tiles(pairs: u32, experts: u32) -> (u32, u32) {
    let tile = pairs.div_ceil(experts).next_power_of_two().min(shader::MOST_ROWS);
    // Each expert has at most one tile that is not full.
    (tile, pairs.min(pairs / tile + experts))
}

pub(super) fn linear_by_expert(commands: &mut Commands, call: &ExpertsCall<'_>, outputs: u32) -> Result<(), OpError> {
    let (weight, rows) = (call.weight, call.rows);
    let product = Product {
        dtype: weight.dtype,
        stack: Stack::Experts,
        aligned: weight.cols.is_multiple_of(8),
        paired: call.gated,
        norm: false,
        bias: false,
    };
    let mut few = few(commands.device(), product, rows.tile, outputs, weight.cols);
    few.rows = rows.tile;
    few.unroll = few.unroll.min(if few.rows <= 4 { 6 } else { 3 });
    let (part, base) = rows_of(commands.device(), weight, 0..weight.rows.into())?;
    let tiles = u64::from(outputs.div_ceil(few.outputs() * few.groups)) * u64::from(rows.tiles);
    let workgroups = spread(commands, tiles)?;
    let cols = weight.cols;
    let params = [rows.pairs, cols, outputs, 0, outputs, 0, rows.tiles, 0, call.share, cols, base];
    let pipeline = few_pipeline(commands, &few)?;
    let slices = [call.x, part, call.out, rows.memory.order.whole(), rows.memory.tiles.whole()];
    Ok(commands.dispatch(&pipeline, &slices, bytemuck::bytes_of(&params), workgroups)?)
}

pub(super) fn route(commands: &mut Commands, call: &RouteCall<'_>) -> Result<(), OpError> {
    let (groups, chosen) = match call.choice {
        ExpertChoice::Greedy => (0, 0),
        ExpertChoice::GroupLimited { groups, chosen } => (groups, chosen),
    };
    let variant = u64::from(call.experts) << 32 | u64::from(groups);
    let pipeline = pipeline(commands, "route", variant, || shader::route(call.experts, groups))?;
    let (normalize, scale) = (u32::from(call.normalize), call.scale.to_bits());
    let params = [call.rows, call.experts, call.per_token, groups, chosen, normalize, scale];
    let workgroups = spread(commands, call.rows.into())?;
    Ok(commands.dispatch(&pipeline, &[call.scores, call.ids, call.weights], bytemuck::bytes_of(&params), workgroups)?)
}

pub(super) fn sort_by_expert(
    commands: &mut Commands,
    ids: BufferSlice<'_>,
    rows: &ExpertRows<'_>,
) -> Result<(), OpError> {
    let name = "sort by expert";
    let pipeline = pipeline(commands, name, rows.experts.into(), || shader::sort_by_expert(rows.experts))?;
    let params = [rows.pairs, rows.experts, rows.tile, rows.tiles];
    let slices = [ids, rows.memory.order.whole(), rows.memory.tiles.whole()];
    Ok(commands.dispatch(&pipeline, &slices, bytemuck::bytes_of(&params), [1, 1, 1])?)
}

pub(super) fn combine(commands: &mut Commands, call: &CombineCall<'_>) -> Result<(), OpError> {
    let one = call.expert.is_some();
    let pipeline = pipeline(commands, "combine", one.into(), || shader::combine(one))?;
    let params = [call.rows, call.cols, call.per_token, call.expert.unwrap_or(0)];
    let count = u64::from(call.rows) * u64::from(call.cols);
    let workgroups = spread(commands, count.div_ceil(shader::COPIED.into()))?;
    let slices = [call.answers, call.weights, call.out, call.ids];
    let used = if one { 4 } else { 3 };
    Ok(commands.dispatch(&pipeline, &slices[..used], bytemuck::bytes_of(&params), workgroups)?)
}

pub(super) fn rope(commands: &mut Commands, call: &RopeCall<'_>) -> Result<(), OpError> {
    let q_norm = call.q_norm.filter(|_| call.query_heads > 0);
    let parts = call.parts.filter(|_| call.query_heads > 0);
    let rope = Rope {
        head_dim: call.head_dim,
        interleaved: call.pairing == RopePairing::Interleaved,
        queries: (call.query_heads > 0).then_some(call.q_dtype),
        parts: parts.is_some(),
        q_norm: q_norm.is_some(),
        k_norm: call.k_norm.is_some(),
    };
    let facts = commands.device().facts();
    let needed = u64::from(call.head_dim) * 4 + 256;
    if needed > facts.limits.workgroup_bytes.into() {
        return Err(DeviceError::Limit {
            what: format!("RoPE of heads of {} elements", call.head_dim),
            needed,
            allowed: facts.limits.workgroup_bytes.into(),
            unit: "bytes of workgroup memory",
            device: facts.name.clone(),
        }
        .into());
    }
    let flags = u64::from(rope.interleaved)
        | u64::from(rope.q_norm) << 1
        | u64::from(rope.k_norm) << 2
        | rope.queries.map_or(0, |dtype| dtype_code(dtype) + 1) << 3
        | u64::from(rope.parts) << 5;
    let variant = u64::from(call.head_dim) << 8 | flags;
    let pipeline = pipeline(commands, "rope", variant, || shader::rope(&rope))?;
    let heads = call.query_heads + call.kv_heads;
    let eps = |norm: Option<Norm<'_>>| norm.map_or(0.0, |norm| norm.eps).to_bits();
    let normed = |norm: Option<Norm<'_>>| norm.map_or(0, |norm| norm.weight.len);
    let words = parts.map_or([[0; 3]; 2], |parts| parts.map(HeadPart::words));
    let [[front_offset, front_stride, front_dim], [back_offset, back_stride, back_dim]] = words;
    let params = [
        call.rows,
        call.stride,
        call.offset,
        call.query_heads,
        heads,
        call.table.positions,
        call.table.dim,
        call.table.first,
        normed(q_norm),
        normed(call.k_norm),
        eps(q_norm),
        eps(call.k_norm),
        front_offset,
        front_stride,
        front_dim,
        back_offset,
        back_stride,
        back_dim,
    ];
    let workgroups = spread(commands, u64::from(call.rows) * u64::from(heads))?;
    let mut slices = [call.qkv; 8];
    slices[1..4].copy_from_slice(&[call.table.buffer.whole(), call.positions, call.q_out]);
    let mut used = 3 + usize::from(call.query_heads > 0);
    let parts = parts.into_iter().flatten().map(|part| part.rows);
    let norms = q_norm.into_iter().chain(call.k_norm).map(|norm| norm.weight.buffer.whole());
    for slice in parts.chain(norms) {
        slices[used] = slice;
        used += 1;
    }
    Ok(commands.dispatch(&pipeline, &slices[..used], bytemuck::bytes_of(&params), workgroups)?)
}

pub(super) fn argmax(
    commands: &mut Commands,
    logits: BufferSlice<'_>,
    rows: Range<u32>,
    cols: u32,
    ids: BufferSlice<'_>,
) -> Result<(), OpError> {
    let limits = &commands.device().facts().limits;
    let allowed = limits.workgroup_invocations.min(limits.workgroup_bytes / 8).clamp(1, 1024);
    // The largest power of two that is allowed.
    let workgroup = 1 << allowed.ilog2();
    let aligned = cols.is_multiple_of(4);
    let variant = u64::from(workgroup) << 1 | u64::from(aligned);
    let pipeline = pipeline(commands, "argmax", variant, || shader::argmax(aligned, workgroup))?;
    let workgroups = spread(commands, rows.len() as u64)?;
    Ok(commands.dispatch(&pipeline, &[logits, ids], bytemuck::bytes_of(&[rows.start, rows.end, cols]), workgroups)?)
}

pub(super) fn top_k(
    commands: &mut Commands,
    logits: BufferSlice<'_>,
    rows: u32,
    cols: u32,
    k: u32,
    ids: BufferSlice<'_>,
    log_probabilities: BufferSlice<'_>,
) -> Result<(), OpError> {
    let limits = &commands.device().facts().limits;
    let allowed = limits.workgroup_invocations.min(limits.workgroup_bytes / 12).clamp(1, 256);
    let workgroup = 1 << allowed.ilog2();
    let pipeline = pipeline(commands, "top k", u64::from(workgroup), || shader::top_k(workgroup))?;
    let workgroups = spread(commands, rows.into())?;
    let slices = [logits, ids, log_probabilities];
    Ok(commands.dispatch(&pipeline, &slices, bytemuck::bytes_of(&[rows, cols, k]), workgroups)?)
}

pub(super) fn gather_ids(
    commands: &mut Commands,
    ids: BufferSlice<'_>,
    held: u32,
    sources: BufferSlice<'_>,
    rows: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    let pipeline = pipeline(commands, "gather ids", 0, shader::gather_ids)?;
    let workgroups = spread(commands, u64::from(rows.div_ceil(shader::COPIED)))?;
    Ok(commands.dispatch(&pipeline, &[ids, sources, out], bytemuck::bytes_of(&[rows, held]), workgroups)?)
}

pub(super) fn gather_rows(
    commands: &mut Commands,
    x: BufferSlice<'_>,
    held: u32,
    cols: u32,
    indices: BufferSlice<'_>,
    rows: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    let pipeline = pipeline(commands, "gather rows", 0, shader::gather_rows)?;
    let count = u64::from(rows) * u64::from(cols);
    let workgroups = spread(commands, count.div_ceil(shader::COPIED.into()))?;
    let params = [rows, cols, held];
    Ok(commands.dispatch(&pipeline, &[x, indices, out], bytemuck::bytes_of(&params), workgroups)?)
}

pub(super) fn add_silu(
    commands: &mut Commands,
    x: BufferSlice<'_>,
    gate: BufferSlice<'_>,
    count: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    let pipeline = pipeline(commands, "add silu", 0, shader::add_silu)?;
    let workgroups = spread(commands, count.div_ceil(shader::COPIED).into())?;
    Ok(commands.dispatch(&pipeline, &[x, gate, out], bytemuck::bytes_of(&count), workgroups)?)
}

pub(super) fn copy_columns(
    commands: &mut Commands,
    x: BufferSlice<'_>,
    cols: u32,
    rows: u32,
    out: BufferSlice<'_>,
    stride: u32,
    offset: u32,
) -> Result<(), OpError> {
    let pipeline = pipeline(commands, "copy columns", 0, shader::copy_columns)?;
    let count = u64::from(rows) * u64::from(cols);
    let workgroups = spread(commands, count.div_ceil(shader::COPIED.into()))?;
    let params = [rows, cols, stride, offset];
    Ok(commands.dispatch(&pipeline, &[x, out], bytemuck::bytes_of(&params), workgroups)?)
}
