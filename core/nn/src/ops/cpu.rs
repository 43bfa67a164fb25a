//! Operations on the CPU.

use std::{cell::RefCell, cmp::Ordering, ops::Range};

use bytemuck::Pod;
use half::{bf16, f16};
use polyattn_device::{BufferSlice, DType, DeviceError};
use rayon::prelude::*;

use super::{
    CombineCall, ExpertRows, ExpertsCall, HeadsCall, LinearCall, Matrix, Norm, OpError, RopeCall, RouteCall,
    SwigluCall,
    dot::{self, Columns, Weights},
};
use crate::load::{ExpertChoice, RopePairing};

/// Up to this many rows, products are formed row by row; beyond, by the gemm crate over widened panels.
const MOST_DOT_ROWS: usize = 64;
/// Elements of a widened panel, about: 640 KiB, which stays in a core's cache.
const PANEL: usize = 160 << 10;
/// Multiplications, or elements moved, below which waking other threads costs more than it saves.
const SERIAL: usize = 1 << 15;

thread_local! {
    /// Normed rows of the product that this thread was asked for.
    static NORMED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    /// Sums of the columns that this thread works on, and a widened panel.
    static TILE: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// `elements` elements of a slice, within the whole buffer's.
fn range<T>(slice: BufferSlice<'_>, elements: usize) -> Range<usize> {
    let start = slice.offset() as usize / size_of::<T>();
    start..start + elements
}

/// Opens a slice for reading and hands it on.
macro_rules! read {
    ($name:ident, $kind:ty, $slice:expr, $elements:expr) => {
        let guard = $slice.buffer().read::<$kind>()?;
        let $name = &guard[range::<$kind>($slice, $elements)];
    };
}

macro_rules! write {
    ($name:ident, $kind:ty, $slice:expr, $elements:expr) => {
        let mut guard = $slice.buffer().write::<$kind>()?;
        let $name = &mut guard[range::<$kind>($slice, $elements)];
    };
}

fn weights<R>(matrix: &Matrix, with: impl FnOnce(Weights<'_>) -> R) -> Result<R, DeviceError> {
    let (slice, count) = (matrix.buffer.whole(), matrix.rows as usize * matrix.cols as usize);
    Ok(match matrix.dtype {
        DType::F32 => {
            read!(all, f32, slice, count);
            with(Weights::F32(all))
        }
        DType::F16 => {
            read!(all, u16, slice, count);
            with(Weights::F16(all))
        }
        _ => {
            read!(all, u16, slice, count);
            with(Weights::Bf16(all))
        }
    })
}

pub(super) fn embed(table: &Matrix, ids: BufferSlice<'_>, rows: u32, out: BufferSlice<'_>) -> Result<(), OpError> {
    let cols = table.cols as usize;
    read!(ids, u32, ids, rows as usize);
    write!(out, f32, out, rows as usize * cols);
    weights(table, |weights| {
        for (out, id) in out.chunks_exact_mut(cols).zip(ids) {
            let row = (*id).min(table.rows - 1) as usize;
            dot::widen(weights, row..row + 1, cols, out);
        }
    })?;
    Ok(())
}

/// 1 / sqrt(mean(row²) + eps).
fn scale(row: &[f32], eps: f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let (chunks, rest) = row.as_chunks::<16>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += value * value;
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += value * value;
    }
    (lanes.iter().sum::<f32>() / row.len() as f32 + eps).sqrt().recip()
}

fn norm_rows(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let one = |(x, out): (&[f32], &mut [f32])| {
        let scale = scale(x, eps);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    };
    if x.len() < SERIAL {
        x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())).for_each(one);
    } else {
        x.par_chunks_exact(weight.len()).zip(out.par_chunks_exact_mut(weight.len())).for_each(one);
    }
}

pub(super) fn rms_norm(x: BufferSlice<'_>, norm: Norm<'_>, rows: u32, out: BufferSlice<'_>) -> Result<(), OpError> {
    let count = rows as usize * norm.weight.len as usize;
    read!(x, f32, x, count);
    read!(weight, f32, norm.weight.buffer.whole(), norm.weight.len as usize);
    write!(out, f32, out, count);
    norm_rows(x, weight, norm.eps, out);
    Ok(())
}

/// Calls `with` on the rows of a product, normed if they are to be.
fn with_rows<R>(
    x: BufferSlice<'_>,
    rows: usize,
    cols: usize,
    norm: Option<Norm<'_>>,
    with: impl FnOnce(&[f32]) -> R,
) -> Result<R, DeviceError> {
    read!(x, f32, x, rows * cols);
    let Some(norm) = norm else { return Ok(with(x)) };
    read!(weight, f32, norm.weight.buffer.whole(), cols);
    // Taken, not borrowed: while this thread waits for others it may be given another product's task.
    let mut normed = NORMED.take();
    normed.resize(normed.len().max(x.len()), 0.0);
    norm_rows(x, weight, norm.eps, &mut normed[..x.len()]);
    let result = with(&normed[..x.len()]);
    NORMED.set(normed);
    Ok(result)
}

/// How a product is cut: columns of a task, and whether they are computed from a widened panel.
fn cut(rows: usize, cols: usize, outputs: usize) -> (usize, bool) {
    if rows <= MOST_DOT_ROWS {
        if rows * cols * outputs < SERIAL {
            return (outputs, false);
        }
        let share = outputs.div_ceil(8 * rayon::current_num_threads());
        (share.clamp(16, 512).next_multiple_of(dot::OUTPUTS), false)
    } else {
        // As many tasks for each thread.
        let threads = rayon::current_num_threads();
        let tasks = threads * (outputs * cols).div_ceil(PANEL * threads);
        (outputs.div_ceil(tasks).next_multiple_of(16), true)
    }
}

/// The sums of `outputs` for all rows, `[rows, outputs]`.
fn sums(
    weights: Weights<'_>,
    outputs: Range<usize>,
    x: &[f32],
    cols: usize,
    panel: Option<&mut Vec<f32>>,
    sums: &mut [f32],
) {
    match panel {
        None => dot::dots(weights, outputs, x, cols, sums),
        Some(panel) => {
            panel.resize(panel.len().max(outputs.len() * cols), 0.0);
            dot::widen(weights, outputs.clone(), cols, panel);
            dot::gemm_panel(x.len() / cols, outputs.len(), cols, x, panel, sums);
        }
    }
}

pub(super) fn linear(call: &LinearCall<'_>) -> Result<(), OpError> {
    let (rows, cols, outputs) = (call.rows as usize, call.weight.cols as usize, call.weight.rows as usize);
    let bias = call.bias.map(|bias| bias.buffer.read::<f32>()).transpose()?;
    write!(out, f32, call.out, rows * outputs);
    with_rows(call.x, rows, cols, call.norm, |x| {
        weights(call.weight, |weights| {
            let (width, panels) = cut(rows, cols, outputs);
            let task = |mut columns: Columns<'_>| {
                TILE.with_borrow_mut(|(tile, panel)| {
                    let range = columns.range();
                    tile.resize(tile.len().max(rows * range.len()), 0.0);
                    sums(weights, range.clone(), x, cols, panels.then_some(panel), tile);
                    for (row, sums) in tile.chunks_exact(range.len()).take(rows).enumerate() {
                        let out = columns.row(row);
                        if !call.accumulate {
                            out.copy_from_slice(sums);
                        } else {
                            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
                        }
                        if let Some(bias) = &bias {
                            out.iter_mut().zip(&bias[range.clone()]).for_each(|(out, bias)| *out += bias);
                        }
                    }
                });
            };
            Columns::split(out, outputs, width).for_each(task);
        })
    })??;
    Ok(())
}

pub(super) fn swiglu(call: &SwigluCall<'_>) -> Result<(), OpError> {
    let (rows, cols, outputs) = (call.rows as usize, call.gate_up.cols as usize, call.gate_up.rows as usize / 2);
    write!(out, f32, call.out, rows * outputs);
    with_rows(call.x, rows, cols, call.norm, |x| {
        weights(call.gate_up, |weights| {
            let (width, panels) = cut(rows, cols, outputs);
            let task = |mut columns: Columns<'_>| {
                TILE.with_borrow_mut(|(tile, panel)| {
                    let range = columns.range();
                    let count = rows * range.len();
                    tile.resize(tile.len().max(2 * count), 0.0);
                    let (gate, up) = tile.split_at_mut(count);
                    let ups = range.start + outputs..range.end + outputs;
                    if panels {
                        sums(weights, range.clone(), x, cols, Some(panel), gate);
                        sums(weights, ups, x, cols, Some(panel), up);
                    } else {
                        sums(weights, range.clone(), x, cols, None, gate);
                        sums(weights, ups, x, cols, None, up);
                    }
                    dot::gated(gate, &up[..count]);
                    for (row, gate) in gate.chunks_exact(range.len()).enumerate() {
                        columns.row(row).copy_from_slice(gate);
                    }
                });
            };
            Columns::split(out, outputs, width).for_each(task);
        })
    })??;
    Ok(())
}

/// An element of the queries.
trait Narrow: Pod + Send {
    fn narrow(value: f32) -> Self;
}

impl Narrow for f32 {
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Narrow for f16 {
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Narrow for bf16 {
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
}

pub(super) fn rope(call: &RopeCall<'_>) -> Result<(), OpError> {
    match call.q_dtype {
        DType::F32 => rope_to::<f32>(call),
        DType::F16 => rope_to::<f16>(call),
        _ => rope_to::<bf16>(call),
    }
}

fn rope_to<T: Narrow>(call: &RopeCall<'_>) -> Result<(), OpError> {
    let dim = call.head_dim as usize;
    let (rows, stride) = (call.rows as usize, call.stride as usize);
    let heads = call.query_heads as usize;
    let (q_width, k_width) = (heads * dim, call.kv_heads as usize * dim);
    let start = call.offset as usize;
    // Keys lie behind the queries, unless these lie elsewhere.
    let keys = start + if call.parts.is_some() { 0 } else { q_width };
    read!(positions, u32, call.positions, rows);
    let table = call.table.buffer.read::<f32>()?;
    let q_weight = call.q_norm.map(|norm| norm.weight.buffer.read::<f32>()).transpose()?;
    let k_weight = call.k_norm.map(|norm| norm.weight.buffer.read::<f32>()).transpose()?;
    let (q_norm, k_norm) = (call.q_norm.zip(q_weight.as_deref()), call.k_norm.zip(k_weight.as_deref()));
    let part = |at: usize| {
        let part = call.parts.filter(|_| heads > 0).map(|parts| parts[at]);
        part.map(|part| part.rows.buffer().read::<f32>().map(|values| (part, values))).transpose()
    };
    let (front, back) = (part(0)?, part(1)?);

    let turn = |head: &mut [f32], norm: Option<(Norm<'_>, &[f32])>, position: u32| {
        if let Some((norm, weight)) = norm {
            let weight = &weight[..norm.weight.len as usize];
            let scale = scale(&head[..weight.len()], norm.eps);
            head.iter_mut().zip(weight).for_each(|(value, weight)| *value = *value * scale * weight);
        }
        let (pairs, first) = (call.table.dim as usize / 2, call.table.first as usize);
        let at = position.min(call.table.positions - 1) as usize * 2 * pairs;
        for (pair, angle) in table[at..at + 2 * pairs].as_chunks::<2>().0.iter().enumerate() {
            let (a, b) = match call.pairing {
                RopePairing::Interleaved => (first + 2 * pair, first + 2 * pair + 1),
                RopePairing::HalfSplit => (first + pair, first + pair + pairs),
            };
            let (left, right) = (head[a], head[b]);
            head[a] = left * angle[0] - right * angle[1];
            head[b] = right * angle[0] + left * angle[1];
        }
    };
    write!(qkv, f32, call.qkv, (rows - 1) * stride + keys + k_width);
    if q_width > 0 {
        let one = |row: usize, out: &mut [T]| {
            let mut head = [0.0; 256];
            let mut long = Vec::new();
            let head: &mut [f32] = match head.get_mut(..dim) {
                Some(head) => head,
                None => {
                    long.resize(dim, 0.0);
                    &mut long
                }
            };
            for (place, out) in out.chunks_exact_mut(dim).enumerate() {
                match (&front, &back) {
                    (Some(front), Some(back)) => {
                        let (first, rest) = head.split_at_mut(front.0.dim as usize);
                        for ((part, values), to) in [(front, first), (back, rest)] {
                            let at = part.offset as usize + (row * heads + place) * part.stride as usize;
                            to.copy_from_slice(&values[range::<f32>(part.rows, at + to.len())][at..]);
                        }
                    }
                    _ => head.copy_from_slice(&qkv[row * stride + start + place * dim..][..dim]),
                }
                turn(head, q_norm, positions[row]);
                out.iter_mut().zip(&*head).for_each(|(out, value)| *out = T::narrow(*value));
            }
        };
        write!(queries, T, call.q_out, rows * q_width);
        if rows * q_width < SERIAL {
            queries.chunks_exact_mut(q_width).enumerate().for_each(|(row, out)| one(row, out));
        } else {
            queries.par_chunks_exact_mut(q_width).enumerate().for_each(|(row, out)| one(row, out));
        }
    }
    if k_width > 0 {
        let one = |(row, position): (&mut [f32], &u32)| {
            for key in row[keys..keys + k_width].chunks_exact_mut(dim) {
                turn(key, k_norm, *position);
            }
        };
        if rows * k_width < SERIAL {
            qkv.chunks_mut(stride).zip(positions).for_each(one);
        } else {
            qkv.par_chunks_mut(stride).zip(positions).for_each(one);
        }
    }
    Ok(())
}

pub(super) fn argmax(
    logits: BufferSlice<'_>,
    rows: Range<u32>,
    cols: u32,
    ids: BufferSlice<'_>,
) -> Result<(), OpError> {
    let cols = cols as usize;
    read!(logits, f32, logits, rows.end as usize * cols);
    write!(ids, u32, ids, rows.end as usize);
    let skipped = rows.start as usize;
    logits[skipped * cols..].par_chunks_exact(cols).zip(&mut ids[skipped..]).for_each(|(row, id)| *id = largest(row));
    Ok(())
}

pub(super) fn top_k(
    logits: BufferSlice<'_>,
    rows: u32,
    cols: u32,
    k: u32,
    ids: BufferSlice<'_>,
    log_probabilities: BufferSlice<'_>,
) -> Result<(), OpError> {
    let (rows, cols, k) = (rows as usize, cols as usize, k as usize);
    read!(logits, f32, logits, rows * cols);
    write!(ids, u32, ids, rows * k);
    write!(logs, f32, log_probabilities, rows * k);
    let chosen = ids.par_chunks_exact_mut(k).zip(logs.par_chunks_exact_mut(k));
    logits.par_chunks_exact(cols).zip(chosen).for_each(|(row, (ids, logs))| {
        let mut ranked: Vec<(u32, f32)> = (0..).zip(row).filter(|(_, x)| !x.is_nan()).map(|(id, x)| (id, *x)).collect();
        // −0 and 0 are equal.
        let falling =
            |a: &(u32, f32), b: &(u32, f32)| b.1.partial_cmp(&a.1).unwrap_or(Ordering::Equal).then(a.0.cmp(&b.0));
        if ranked.len() > k {
            ranked.select_nth_unstable_by(k - 1, falling);
        }
        let largest = ranked.iter().map(|(_, x)| *x).fold(f32::NEG_INFINITY, f32::max);
        let shares = row.iter().filter(|x| !x.is_nan()).map(|x| f64::from((x - largest).exp()));
        let total = shares.sum::<f64>().ln() as f32;
        ranked.truncate(k);
        ranked.sort_unstable_by(falling);
        for (place, (id, log)) in ids.iter_mut().zip(logs).enumerate() {
            (*id, *log) = match ranked.get(place) {
                Some((chosen, x)) => (*chosen, x - largest - total),
                None => (u32::MAX, f32::NEG_INFINITY),
            };
        }
    });
    Ok(())
}

pub(super) fn gather_ids(
    ids: BufferSlice<'_>,
    held: u32,
    sources: BufferSlice<'_>,
    rows: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    read!(ids, u32, ids, held as usize);
    read!(sources, u32, sources, rows as usize);
    write!(out, u32, out, rows as usize);
    for (out, source) in out.iter_mut().zip(sources) {
        *out = if source >> 31 == 1 { source & (u32::MAX >> 1) } else { ids[(*source).min(held - 1) as usize] };
    }
    Ok(())
}

/// The place of the largest element.
fn largest(row: &[f32]) -> u32 {
    // Block by block: the maximum of a block is quickly found, and its place sought only if it is a new one.
    let mut best = f32::NEG_INFINITY;
    let mut place = None;
    for (block, values) in row.chunks(256).enumerate() {
        let mut lanes = [f32::NEG_INFINITY; 16];
        let (chunks, rest) = values.as_chunks::<16>();
        // A comparison, not `f32::max`, is one instruction and never takes a NaN.
        let take = |lane: &mut f32, value: f32| *lane = if value > *lane { value } else { *lane };
        for chunk in chunks {
            lanes.iter_mut().zip(chunk).for_each(|(lane, value)| take(lane, *value));
        }
        lanes.iter_mut().zip(rest).for_each(|(lane, value)| take(lane, *value));
        let mut most = f32::NEG_INFINITY;
        lanes.iter().for_each(|value| take(&mut most, *value));
        if (most > best || place.is_none())
            && let Some(at) = values.iter().position(|value| *value == most)
        {
            best = most;
            place = Some(block * 256 + at);
        }
    }
    place.map_or(u32::MAX, |place| place as u32)
}

pub(super) fn gather_rows(
    x: BufferSlice<'_>,
    held: u32,
    cols: u32,
    indices: BufferSlice<'_>,
    rows: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    let cols = cols as usize;
    read!(x, f32, x, held as usize * cols);
    read!(indices, u32, indices, rows as usize);
    write!(out, f32, out, rows as usize * cols);
    for (out, index) in out.chunks_exact_mut(cols).zip(indices) {
        let row = (*index).min(held - 1) as usize;
        out.copy_from_slice(&x[row * cols..(row + 1) * cols]);
    }
    Ok(())
}

pub(super) fn add_silu(
    x: BufferSlice<'_>,
    gate: BufferSlice<'_>,
    count: u32,
    out: BufferSlice<'_>,
) -> Result<(), OpError> {
    read!(x, f32, x, count as usize);
    read!(gate, f32, gate, count as usize);
    write!(out, f32, out, count as usize);
    for ((out, x), gate) in out.iter_mut().zip(x).zip(gate) {
        *out = x + gate / (1.0 + (-gate).exp());
    }
    Ok(())
}

pub(super) fn copy_columns(
    x: BufferSlice<'_>,
    cols: u32,
    rows: u32,
    out: BufferSlice<'_>,
    stride: u32,
    offset: u32,
) -> Result<(), OpError> {
    let (rows, cols, stride, offset) = (rows as usize, cols as usize, stride as usize, offset as usize);
    read!(x, f32, x, rows * cols);
    write!(out, f32, out, (rows - 1) * stride + offset + cols);
    for (out, x) in out.chunks_mut(stride).zip(x.chunks_exact(cols)) {
        out[offset..offset + cols].copy_from_slice(x);
    }
    Ok(())
}

/// The products of contiguous rows `x` with one of several matrices, whose first output is row `first` of `weights`:
/// `[rows, outputs]`, gated where `outputs` gates are followed by as many ups.
fn one_of_several(weights: Weights<'_>, first: usize, outputs: usize, gated: bool, x: &[f32], cols: usize) -> Vec<f32> {
    let rows = x.len() / cols;
    let sums = |range: Range<usize>| {
        let mut sums = vec![0.0; rows * range.len()];
        dot::dots(weights, first + range.start..first + range.end, x, cols, &mut sums);
        if gated {
            let mut ups = vec![0.0; rows * range.len()];
            dot::dots(weights, first + outputs + range.start..first + outputs + range.end, x, cols, &mut ups);
            dot::gated(&mut sums, &ups);
        }
        sums
    };
    if rows * cols * outputs < SERIAL {
        return sums(0..outputs);
    }
    let width = outputs.div_ceil(4 * rayon::current_num_threads()).next_multiple_of(dot::OUTPUTS);
    let starts: Vec<usize> = (0..outputs).step_by(width).collect();
    let parts: Vec<Vec<f32>> = starts.par_iter().map(|start| sums(*start..outputs.min(start + width))).collect();
    let mut all = vec![0.0; rows * outputs];
    for (start, part) in starts.iter().zip(parts) {
        let width = part.len() / rows;
        for (row, part) in all.chunks_exact_mut(outputs).zip(part.chunks_exact(width)) {
            row[*start..start + width].copy_from_slice(part);
        }
    }
    all
}

pub(super) fn linear_by_head(call: &HeadsCall<'_>, outputs: u32) -> Result<(), OpError> {
    let (rows, heads, cols) = (call.rows as usize, call.heads as usize, call.weight.cols as usize);
    let (x_stride, out_stride, outputs) = (call.x_stride as usize, call.out_stride as usize, outputs as usize);
    let matrix = outputs * if call.gated { 2 } else { 1 };
    read!(x, f32, call.x, (rows * heads - 1) * x_stride + cols);
    write!(out, f32, call.out, (rows * heads - 1) * out_stride + outputs);
    weights(call.weight, |weights| {
        let answers: Vec<Vec<f32>> = (0..heads)
            .into_par_iter()
            .map(|head| {
                let parts = (0..rows).map(|row| &x[(row * heads + head) * x_stride..][..cols]);
                let x: Vec<f32> = parts.flatten().copied().collect();
                one_of_several(weights, (call.first as usize + head) * matrix, outputs, call.gated, &x, cols)
            })
            .collect();
        for (head, answers) in answers.iter().enumerate() {
            for (row, answer) in answers.chunks_exact(outputs).enumerate() {
                out[(row * heads + head) * out_stride..][..outputs].copy_from_slice(answer);
            }
        }
    })?;
    Ok(())
}

pub(super) fn linear_by_expert(call: &ExpertsCall<'_>, outputs: u32) -> Result<(), OpError> {
    let (pairs, cols, outputs) = (call.rows.pairs as usize, call.weight.cols as usize, outputs as usize);
    let (share, matrix) = (call.share as usize, outputs * if call.gated { 2 } else { 1 });
    read!(x, f32, call.x, pairs.div_ceil(share) * cols);
    read!(order, u32, call.rows.memory.order.whole(), pairs);
    read!(tiles, u32, call.rows.memory.tiles.whole(), 4 * call.rows.tiles as usize);
    write!(out, f32, call.out, pairs * outputs);
    weights(call.weight, |weights| {
        let answers: Vec<(&[u32], Vec<f32>)> = tiles
            .as_chunks::<4>()
            .0
            .par_iter()
            .map(|[expert, first, count, _]| {
                let pairs = &order[*first as usize..(first + count) as usize];
                let rows = pairs.iter().map(|pair| &x[*pair as usize / share * cols..][..cols]);
                let x: Vec<f32> = rows.flatten().copied().collect();
                (pairs, one_of_several(weights, *expert as usize * matrix, outputs, call.gated, &x, cols))
            })
            .collect();
        for (pairs, answers) in answers {
            for (pair, answer) in pairs.iter().zip(answers.chunks_exact(outputs)) {
                out[*pair as usize * outputs..][..outputs].copy_from_slice(answer);
            }
        }
    })?;
    Ok(())
}

pub(super) fn route(call: &RouteCall<'_>) -> Result<(), OpError> {
    let (rows, experts, per_token) = (call.rows as usize, call.experts as usize, call.per_token as usize);
    read!(scores, f32, call.scores, rows * experts);
    write!(ids, u32, call.ids, rows * per_token);
    write!(weights, f32, call.weights, rows * per_token);
    let mut shares = vec![0.0f32; experts];
    for (row, scores) in scores.chunks_exact(experts).enumerate() {
        let most = scores.iter().copied().fold(f32::MIN, f32::max);
        shares.iter_mut().zip(scores).for_each(|(share, score)| *share = (score - most).exp());
        let sum: f32 = shares.iter().sum();
        shares.iter_mut().for_each(|share| *share /= sum);
        if let ExpertChoice::GroupLimited { groups, chosen } = call.choice {
            let size = experts / groups as usize;
            let best = |group: &[f32]| group.iter().copied().fold(-1.0, f32::max);
            let mut bests: Vec<f32> = shares.chunks_exact(size).map(best).collect();
            for _ in 0..chosen {
                let place = best_of(&bests).unwrap_or(0);
                bests[place] = -2.0;
            }
            let closed = shares.chunks_exact_mut(size).zip(bests).filter(|(_, best)| *best != -2.0);
            closed.for_each(|(group, _)| group.fill(-1.0));
        }
        let range = row * per_token..(row + 1) * per_token;
        let (ids, weights) = (&mut ids[range.clone()], &mut weights[range]);
        for (id, weight) in ids.iter_mut().zip(&mut *weights) {
            // Where the scores are NaN nobody is best; the weight then says so.
            let (place, share) = match best_of(&shares).filter(|place| shares[*place] > -0.5) {
                Some(place) => (place, shares[place]),
                None => (experts - 1, sum),
            };
            (*id, *weight) = (place as u32, share);
            shares[place] = -1.0;
        }
        let total = weights.iter().sum::<f32>() + 1e-20;
        weights
            .iter_mut()
            .for_each(|weight| *weight = if call.normalize { *weight / total } else { *weight * call.scale });
    }
    Ok(())
}

/// The place of the largest element, the first of equal ones; NaN is none.
fn best_of(values: &[f32]) -> Option<usize> {
    let mut best: Option<usize> = None;
    for (place, value) in values.iter().enumerate().filter(|(_, value)| !value.is_nan()) {
        if best.is_none_or(|best| *value > values[best]) {
            best = Some(place);
        }
    }
    best
}

/// One tile for each expert that serves anybody, as there is no workgroup that it would have to suit.
pub(super) fn sort_by_expert(ids: BufferSlice<'_>, rows: &ExpertRows<'_>) -> Result<(), OpError> {
    let pairs = rows.pairs as usize;
    read!(ids, u32, ids, pairs);
    write!(order, u32, rows.memory.order.whole(), pairs);
    write!(tiles, u32, rows.memory.tiles.whole(), 4 * rows.tiles as usize);
    order.iter_mut().zip(0..).for_each(|(place, pair)| *place = pair);
    order.sort_by_key(|pair| ids[*pair as usize]);
    tiles.fill(0);
    let mut first = 0;
    for (tile, pairs) in
        tiles.as_chunks_mut::<4>().0.iter_mut().zip(order.chunk_by(|a, b| ids[*a as usize] == ids[*b as usize]))
    {
        *tile = [ids[pairs[0] as usize], first, pairs.len() as u32, 0];
        first += pairs.len() as u32;
    }
    Ok(())
}

pub(super) fn combine(call: &CombineCall<'_>) -> Result<(), OpError> {
    let (rows, cols, per_token) = (call.rows as usize, call.cols as usize, call.per_token as usize);
    read!(answers, f32, call.answers, rows * cols * if call.expert.is_some() { 1 } else { per_token });
    read!(ids, u32, call.ids, rows * per_token);
    read!(weights, f32, call.weights, rows * per_token);
    write!(out, f32, call.out, rows * cols);
    for (row, out) in out.chunks_exact_mut(cols).enumerate() {
        let mut sums = vec![0.0f32; cols];
        for pair in row * per_token..(row + 1) * per_token {
            let place = match call.expert {
                Some(expert) if ids[pair] != expert => continue,
                Some(_) => row,
                None => pair,
            };
            let answer = &answers[place * cols..][..cols];
            sums.iter_mut().zip(answer).for_each(|(sum, answer)| *sum = weights[pair].mul_add(*answer, *sum));
        }
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
    }
    Ok(())
}
