use std::{cell::RefCell, ops::Range};

use polyattn_api::{
    AttentionIo, AttentionKernel, AttentionKind, AttentionProblem, BackendError, BatchLayout, BufferSlice, Commands,
    Device, DeviceError, Plan, PlanPool,
};
use rayon::prelude::*;

use crate::{
    cache::{Paged, Stored},
    lanes::{self, BLOCK, Isa, Left, Logits, Shape},
    visible::{Visible, below, first_run, runs},
};

/// Keys of a tile; a row's keys in it are the bits of a u64.
pub(crate) const TILE: usize = 64;

/// Rows (query row × query head) of a work item, at the most. Enough that widening a tile of keys costs little beside
/// multiplying with it, and few enough that the item's memory stays in a core's cache.
const ROWS: usize = 64;

/// Multiply-adds below which starting other threads takes longer than doing it all.
const SERIAL: u64 = 1 << 18;

/// Attention of one problem on the CPU.
#[derive(Debug)]
pub(crate) struct CpuKernel {
    device: Device,
    problem: AttentionProblem,
    pool: PlanPool,
    isa: Isa,
}

/// Query rows `queries` of a sequence, for `heads` query heads of one key head.
#[derive(Clone, Copy, Debug)]
struct Item {
    sequence: u32,
    first_query: u32,
    queries: u32,
    kv_head: u32,
    first_head: u32,
    heads: u32,
}

impl Item {
    const WORDS: usize = 6;

    fn words(self) -> [u32; Self::WORDS] {
        [self.sequence, self.first_query, self.queries, self.kv_head, self.first_head, self.heads]
    }

    fn from_words([sequence, first_query, queries, kv_head, first_head, heads]: [u32; Self::WORDS]) -> Self {
        Self { sequence, first_query, queries, kv_head, first_head, heads }
    }
}

/// How a problem's query heads are cut into items: `(key head, first query head, query heads)`.
fn head_cuts(kind: AttentionKind) -> Vec<(u32, u32, u32)> {
    let group = kind.query_heads() / kind.kv_heads();
    let most = ROWS as u32;
    let mut cuts = Vec::new();
    for kv_head in 0..kind.kv_heads() {
        let end = (kv_head + 1) * group;
        for first in (end - group..end).step_by(ROWS) {
            cuts.push((kv_head, first, most.min(end - first)));
        }
    }
    cuts
}

/// The items of a batch. Those of the same query rows follow each other in the order of [`head_cuts`].
fn items(problem: &AttentionProblem, batch: &BatchLayout) -> Vec<Item> {
    let cuts = head_cuts(problem.kind);
    let widest = cuts.iter().map(|(_, _, heads)| *heads).max().unwrap_or(1);
    let tile = (ROWS as u32 / widest).max(1);
    let mut items = Vec::new();
    for sequence in 0..batch.sequences() {
        let (_, queries) = batch.queries(sequence);
        // With a causal mask the last rows have the most keys; the longest work should not start last.
        for at in (0..queries.div_ceil(tile)).rev() {
            let first_query = at * tile;
            let queries = tile.min(queries - first_query);
            items.extend(cuts.iter().map(|&(kv_head, first_head, heads)| Item {
                sequence: sequence as u32,
                first_query,
                queries,
                kv_head,
                first_head,
                heads,
            }));
        }
    }
    items
}

impl CpuKernel {
    pub(crate) fn new(device: Device, problem: AttentionProblem) -> Self {
        Self { device, problem, pool: PlanPool::default(), isa: Isa::detect() }
    }
}

impl AttentionKernel for CpuKernel {
    fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError> {
        // Items are made of a valid batch only.
        batch.validate(&self.problem)?;
        let words = items(&self.problem, batch).into_iter().flat_map(Item::words).collect();
        Plan::new(&self.device, &self.pool, &self.problem, batch, words)
    }

    fn encode(&self, _: &mut Commands, plan: &Plan, io: &AttentionIo<'_>) -> Result<(), BackendError> {
        let (problem, batch) = (&self.problem, plan.batch());
        io.validate(problem, batch)?;
        plan.made_in(&self.pool)?;
        let items: Vec<Item> = plan.extra().as_chunks().0.iter().map(|words| Item::from_words(*words)).collect();
        let cuts = head_cuts(problem.kind);

        let q = io.q.buffer().read::<u8>()?;
        let k_cache = io.k_cache.buffer().read::<u8>()?;
        let v_slice = if matches!(problem.kind, AttentionKind::Mla { .. }) { &io.k_cache } else { &io.v_cache };
        let v_cache = v_slice.buffer().read::<u8>()?;
        let floats = |slice: Option<BufferSlice<'_>>| -> Result<Option<Vec<f32>>, DeviceError> {
            let Some(slice) = slice else { return Ok(None) };
            let bytes = slice.buffer().read::<u8>()?;
            Ok(Some(bytemuck::pod_collect_to_vec(within(&bytes, &slice))))
        };
        let k_scale = io.k_scale.map(|slice| slice.buffer().read::<u8>()).transpose()?;
        let v_scale = io.v_scale.map(|slice| slice.buffer().read::<u8>()).transpose()?;
        let scales = |name: &str, slice: Option<BufferSlice<'_>>, bytes| match (slice, bytes) {
            (Some(slice), Some(bytes)) => aligned(name, within(bytes, &slice)).map(Some),
            _ => Ok(None),
        };
        let kind = problem.kind;
        let width = kind.query_dim() as usize;
        let heads = kind.kv_heads() as usize;
        let key_scales = scales("k_scale", io.k_scale, k_scale.as_deref())?;
        let value_scales = scales("v_scale", io.v_scale, v_scale.as_deref())?;
        let call = Call {
            isa: self.isa,
            problem,
            batch,
            q: Stored::new("q", within(&q, &io.q), problem.dtype.into(), None)?,
            keys: Paged {
                stored: Stored::new("k_cache", within(&k_cache, &io.k_cache), problem.kv_dtype, key_scales)?,
                width,
                heads,
                layout: problem.kv_layout,
            },
            values: Paged {
                stored: Stored::new("v_cache", within(&v_cache, v_slice), problem.kv_dtype, value_scales)?,
                // The latent is the beginning of the key's row.
                width: if matches!(kind, AttentionKind::Mla { .. }) { width } else { kind.output_dim() as usize },
                heads,
                layout: problem.kv_layout,
            },
            sinks: floats(io.sinks.filter(|_| problem.sinks))?,
            slopes: floats(io.alibi_slopes.filter(|_| problem.alibi))?,
        };

        let (rows, out_row) = (batch.rows() as usize, kind.query_heads() as usize * kind.output_dim() as usize);
        let mut out = io.out.buffer().write::<u8>()?;
        let out: &mut [f32] = aligned_mut("out", within_mut(&mut out, &io.out))?;
        let mut lse = match io.lse.filter(|_| problem.lse) {
            Some(slice) => Some((slice.buffer().write::<u8>()?, slice)),
            None => None,
        };
        let lse: Option<&mut [f32]> = match &mut lse {
            Some((bytes, slice)) => Some(aligned_mut("lse", within_mut(bytes, slice))?),
            None => None,
        };
        let targets = targets(&items, &cuts, batch, kind, &mut out[..rows * out_row], lse);
        let work = targets.into_iter().zip(&items);
        if call.multiply_adds() < SERIAL {
            work.for_each(|(target, item)| call.run(*item, target));
        } else {
            let work: Vec<_> = work.collect();
            work.into_par_iter().for_each(|(target, item)| call.run(*item, target));
        }
        Ok(())
    }
}

fn within<'a>(bytes: &'a [u8], slice: &BufferSlice<'_>) -> &'a [u8] {
    &bytes[slice.offset() as usize..][..slice.bytes() as usize]
}

fn within_mut<'a>(bytes: &'a mut [u8], slice: &BufferSlice<'_>) -> &'a mut [u8] {
    &mut bytes[slice.offset() as usize..][..slice.bytes() as usize]
}

fn aligned<'a>(name: &str, bytes: &'a [u8]) -> Result<&'a [f32], BackendError> {
    let whole = bytes.len() / 4 * 4;
    bytemuck::try_cast_slice(&bytes[..whole]).map_err(|error| BackendError::Io(format!("{name}: {error}")))
}

fn aligned_mut<'a>(name: &str, bytes: &'a mut [u8]) -> Result<&'a mut [f32], BackendError> {
    let whole = bytes.len() / 4 * 4;
    bytemuck::try_cast_slice_mut(&mut bytes[..whole]).map_err(|error| BackendError::Io(format!("{name}: {error}")))
}

/// Where an item's results go: for each of its query rows `[heads, output_dim]`, and `[heads]`.
#[derive(Default)]
struct Target<'a> {
    out: Vec<&'a mut [f32]>,
    lse: Vec<&'a mut [f32]>,
}

/// Deals the rows of `out` and `lse` out to the items.
fn targets<'a>(
    items: &[Item],
    cuts: &[(u32, u32, u32)],
    batch: &BatchLayout,
    kind: AttentionKind,
    out: &'a mut [f32],
    lse: Option<&'a mut [f32]>,
) -> Vec<Target<'a>> {
    // The first item of each row; those of its other heads follow.
    let mut first = vec![0; batch.rows() as usize];
    for (at, item) in items.iter().enumerate().step_by(cuts.len()) {
        let start = (batch.queries(item.sequence as usize).0 + item.first_query) as usize;
        first[start..start + item.queries as usize].fill(at);
    }
    let mut targets: Vec<_> = items.iter().map(|_| Target::default()).collect();
    let (heads, dim) = (kind.query_heads() as usize, kind.output_dim() as usize);
    for (row, first) in out.chunks_exact_mut(heads * dim).zip(&first) {
        let mut rest = row;
        for (cut, &(_, _, heads)) in cuts.iter().enumerate() {
            let (part, tail) = rest.split_at_mut(heads as usize * dim);
            targets[first + cut].out.push(part);
            rest = tail;
        }
    }
    for (row, first) in lse.into_iter().flat_map(|lse| lse.chunks_exact_mut(heads)).zip(&first) {
        let mut rest = row;
        for (cut, &(_, _, heads)) in cuts.iter().enumerate() {
            let (part, tail) = rest.split_at_mut(heads as usize);
            targets[first + cut].lse.push(part);
            rest = tail;
        }
    }
    targets
}

/// One call's inputs.
struct Call<'a> {
    isa: Isa,
    problem: &'a AttentionProblem,
    batch: &'a BatchLayout,
    q: Stored<'a>,
    keys: Paged<'a>,
    values: Paged<'a>,
    sinks: Option<Vec<f32>>,
    slopes: Option<Vec<f32>>,
}

/// The memory of a work item, kept by its thread for the next one.
#[derive(Default)]
struct Scratch {
    /// `[rows, dim]`.
    q: Vec<f32>,
    /// `[TILE, dim]`: keys as they come.
    k: Vec<f32>,
    /// `[dim, TILE]`: keys as a product takes them.
    k_columns: Vec<f32>,
    /// `[TILE, padded value dim]`.
    v: Vec<f32>,
    /// `[rows, TILE]`: logits, then weights.
    weights: Vec<f32>,
    /// `[rows, padded value dim]`.
    out: Vec<f32>,
    /// Running maximum and sum of each row.
    state: Vec<(f32, f32)>,
    /// Keys of the tile that each row sees.
    masks: Vec<u64>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Call<'_> {
    /// About what all items cost.
    fn multiply_adds(&self) -> u64 {
        let kind = self.problem.kind;
        let rows: u64 = (0..self.batch.sequences())
            .map(|sequence| u64::from(self.batch.queries(sequence).1) * u64::from(self.batch.kv_len[sequence]))
            .sum();
        let a_row = u64::from(kind.query_heads()) * u64::from(kind.query_dim() + kind.output_dim());
        rows.saturating_mul(a_row)
    }

    fn run(&self, item: Item, mut target: Target<'_>) {
        SCRATCH.with_borrow_mut(|scratch| {
            self.attend(item, scratch);
            self.finish(item, scratch, &mut target);
        });
    }

    /// Rows of an item are query by query, head by head.
    fn attend(&self, item: Item, scratch: &mut Scratch) {
        let (kind, sequence) = (self.problem.kind, item.sequence as usize);
        let (dim, value_dim) = (kind.query_dim() as usize, kind.output_dim() as usize);
        let padded = value_dim.next_multiple_of(16);
        let heads = item.heads as usize;
        let rows = item.queries as usize * heads;
        let Scratch { q, k, k_columns, v, weights, out, state, masks } = scratch;
        q.resize(rows * dim, 0.0);
        k.resize(TILE * dim, 0.0);
        k_columns.resize(TILE * dim, 0.0);
        v.resize(TILE * padded, 0.0);
        weights.resize(rows * TILE, 0.0);
        out.clear();
        out.resize(rows * padded, 0.0);
        state.clear();
        state.resize(rows, (f32::NEG_INFINITY, 0.0));
        masks.resize(rows, 0);

        let first_row = self.batch.queries(sequence).0 as usize + item.first_query as usize;
        for (row, q) in q.chunks_exact_mut(dim).enumerate() {
            let source =
                (first_row + row / heads) * kind.query_heads() as usize + item.first_head as usize + row % heads;
            self.q.widen(self.isa, source, dim, q);
        }
        let visible: Vec<_> = (item.first_query..item.first_query + item.queries)
            .map(|query| Visible::new(self.problem, self.batch, sequence, query))
            .collect();
        let from = visible.iter().map(|row| row.keys.0).min().unwrap_or(0);
        let to = visible.iter().map(|row| row.keys.1).max().unwrap_or(0);

        let mut base = from.max(0) / TILE as i64 * TILE as i64;
        while base < to {
            let mut seen = 0;
            for (query, masks) in visible.iter().zip(masks.chunks_exact_mut(heads)) {
                masks.fill(query.in_tile(base));
                seen |= masks[0];
            }
            if seen != 0 {
                let (first, end) = (seen.trailing_zeros() as usize, TILE - seen.leading_zeros() as usize);
                let keys: Range<u32> = (base + first as i64) as u32..(base + end as i64) as u32;
                let of = (sequence, item.kv_head as usize);
                self.keys.gather(self.isa, self.batch, of, keys.clone(), (dim, dim), &mut k[first * dim..]);
                lanes::transpose(self.isa, k, dim, k_columns, first, end);
                self.values.gather(self.isa, self.batch, of, keys, (value_dim, padded), &mut v[first * padded..]);

                weights.fill(0.0);
                for start in (0..rows).step_by(BLOCK) {
                    let block = start..(start + BLOCK).min(rows);
                    let left = Left { data: &q[start * dim..], stride: dim, rows: block.len(), depth: dim };
                    let shape = Shape { stride: TILE, columns: TILE };
                    lanes::product(self.isa, left, (k_columns, TILE), &mut weights[start * TILE..], shape);
                    for row in block.clone() {
                        let distance = (base - visible[row / heads].position) as f32;
                        let logits = self.logits(item, row % heads, distance);
                        let out = &mut out[row * padded..][..padded];
                        let tile = &mut weights.as_chunks_mut::<TILE>().0[row];
                        self.soften(tile, logits, masks[row], &mut state[row], out);
                    }
                    let shape = Shape { stride: padded, columns: padded };
                    self.add_values(weights, block.clone(), &masks[block], v, out, shape);
                }
            }
            base += TILE as i64;
        }
    }

    fn logits(&self, item: Item, head: usize, distance: f32) -> Logits {
        Logits {
            scale: self.problem.scale,
            softcap: self.problem.softcap,
            alibi: self.slopes.as_ref().map(|slopes| (slopes[item.first_head as usize + head], distance)),
        }
    }

    /// The softmax's step for one row: dot products become weights against the new maximum, and what was summed before
    /// is scaled to it. A row that sees nothing of the tile is left as it is, so skipped tiles change nothing.
    fn soften(&self, tile: &mut [f32; TILE], to: Logits, mask: u64, state: &mut (f32, f32), out: &mut [f32]) {
        if mask == 0 {
            return;
        }
        let (old, sum) = *state;
        let top = lanes::logits(self.isa, tile, to, mask).max(old);
        // Logits of −∞ have weight 0; −∞ − (−∞) would make NaN of them.
        let reference = if top == f32::NEG_INFINITY { 0.0 } else { top };
        let added = lanes::weights(self.isa, tile, reference);
        if top > old {
            let shrink = lanes::exp(old - reference);
            for x in out.iter_mut() {
                *x *= shrink;
            }
            *state = (top, sum * shrink + added);
        } else {
            state.1 = sum + added;
        }
    }

    /// Adds the values of a block of rows, key by key in order. A key that a row does not see is not even multiplied
    /// by 0: it might be infinite, and a row's bits must not hang on keys of other rows.
    fn add_values(
        &self,
        weights: &[f32],
        block: Range<usize>,
        masks: &[u64],
        v: &[f32],
        out: &mut [f32],
        shape: Shape,
    ) {
        let stride = shape.stride;
        let mut add = |rows: Range<usize>, keys: Range<usize>| {
            if !keys.is_empty() {
                let data = &weights[rows.start * TILE + keys.start..];
                let left = Left { data, stride: TILE, rows: rows.len(), depth: keys.len() };
                lanes::product(
                    self.isa,
                    left,
                    (&v[keys.start * stride..], stride),
                    &mut out[rows.start * stride..],
                    shape,
                );
            }
        };
        // What all rows see goes in one product; around it each row has its own.
        let common = first_run(masks.iter().fold(u64::MAX, |all, mask| all & mask));
        for (row, mask) in block.clone().zip(masks) {
            runs(mask & below(common.start as i64)).for_each(|keys| add(row..row + 1, keys));
        }
        add(block.clone(), common.clone());
        for (row, mask) in block.zip(masks) {
            runs(mask & !below(common.end as i64)).for_each(|keys| add(row..row + 1, keys));
        }
    }

    /// Takes the sink in, divides by the sum, and writes.
    fn finish(&self, item: Item, scratch: &Scratch, target: &mut Target<'_>) {
        let heads = item.heads as usize;
        let value_dim = self.problem.kind.output_dim() as usize;
        let padded = value_dim.next_multiple_of(16);
        for (row, (&(top, sum), out)) in scratch.state.iter().zip(scratch.out.chunks_exact(padded)).enumerate() {
            let (query, head) = (row / heads, row % heads);
            let sink = self.sinks.as_ref().map_or(f32::NEG_INFINITY, |sinks| sinks[item.first_head as usize + head]);
            let all = top.max(sink);
            let reference = if all == f32::NEG_INFINITY { 0.0 } else { all };
            let shrink = lanes::exp(top - reference);
            let sum = sum * shrink + lanes::exp(sink - reference);
            let factor = if sum == 0.0 { 0.0 } else { shrink / sum };
            if let Some(to) = target.out.get_mut(query) {
                for (to, from) in to[head * value_dim..].iter_mut().zip(&out[..value_dim]) {
                    // −0 and 0 may depend on the keys a product was split at; adding 0 leaves one of them.
                    *to = from * factor + 0.0;
                }
            }
            if let Some(to) = target.lse.get_mut(query) {
                to[head] = if sum == 0.0 { f32::NEG_INFINITY } else { reference + sum.ln() };
            }
        }
    }
}
