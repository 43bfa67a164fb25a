//! What stands around the products of a mixture of experts: who serves a token, and the sum of what they answer.

use polyattn_device::{Buffer, BufferSlice, Commands, Device};

use super::{OpError, check_slice, cpu, elements, gpu};
use crate::load::ExpertChoice;

/// Experts at the most: kernels keep a number or two of each in workgroup memory.
pub const MOST_EXPERTS: u32 = 1024;

/// Arguments of [`route`].
#[derive(Clone, Copy, Debug)]
pub struct RouteCall<'a> {
    /// f32 `[rows, experts]`, before the softmax.
    pub scores: BufferSlice<'a>,
    /// Rows.
    pub rows: u32,
    /// Experts to choose from.
    pub experts: u32,
    /// Experts to choose for each row.
    pub per_token: u32,
    /// How they are chosen.
    pub choice: ExpertChoice,
    /// Whether the weights of a row are divided by their sum.
    pub normalize: bool,
    /// Factor of the weights, where they are not divided.
    pub scale: f32,
    /// u32 `[rows, per_token]`: the experts, best first.
    pub ids: BufferSlice<'a>,
    /// f32 `[rows, per_token]`: their weights.
    pub weights: BufferSlice<'a>,
}

/// Chooses the experts of each row: a softmax over the scores, the best of them, and their weights. Of equal scores the
/// first counts. Scores that are NaN give weights that are.
///
/// # Errors
/// More experts for a row than there are to choose from, or than [`MOST_EXPERTS`]; groups that do not divide them;
/// buffers too small for these sizes; the device.
pub fn route(commands: &mut Commands, call: &RouteCall<'_>) -> Result<(), OpError> {
    let fail = |message: String| Err(OpError::Shape(message));
    let RouteCall { experts, per_token, .. } = *call;
    if per_token == 0 || per_token > experts || experts > MOST_EXPERTS {
        return fail(format!("{per_token} of {experts} experts, at most {MOST_EXPERTS}"));
    }
    if let ExpertChoice::GroupLimited { groups, chosen } = call.choice
        && (groups == 0
            || !experts.is_multiple_of(groups)
            || chosen > groups
            || chosen * (experts / groups) < per_token)
    {
        return fail(format!("{per_token} of {experts} experts out of {chosen} of {groups} groups"));
    }
    check_slice("scores of experts", call.scores, elements("scores of experts", call.rows, experts)?, 4)?;
    let pairs = elements("chosen experts", call.rows, per_token)?;
    check_slice("chosen experts", call.ids, pairs, 4)?;
    check_slice("weights of experts", call.weights, pairs, 4)?;
    if call.rows == 0 {
        return Ok(());
    }
    if commands.device().is_cpu() { cpu::route(call) } else { gpu::route(commands, call) }
}

/// Memory of [`sort_by_expert`].
#[derive(Clone, Debug)]
pub struct ExpertOrder {
    pub(super) order: Buffer,
    pub(super) tiles: Buffer,
    pairs: u32,
}

impl ExpertOrder {
    /// For up to `pairs` pairs of a token and an expert.
    ///
    /// # Errors
    /// No memory.
    pub fn new(device: &Device, pairs: u32) -> Result<Self, OpError> {
        let pairs = pairs.max(1);
        Ok(Self {
            order: device.alloc(u64::from(pairs) * 4, "pairs by expert")?,
            // No tile is without a pair.
            tiles: device.alloc(u64::from(pairs) * 16, "tiles of pairs")?,
            pairs,
        })
    }
}

/// Pairs of a token and an expert, sorted by expert: what [`sort_by_expert`] made.
#[derive(Clone, Copy, Debug)]
pub struct ExpertRows<'a> {
    pub(super) memory: &'a ExpertOrder,
    pub(super) pairs: u32,
    pub(super) experts: u32,
    /// Pairs of a tile at the most.
    pub(super) tile: u32,
    /// Tiles, some of them possibly empty.
    pub(super) tiles: u32,
}

/// Sorts pairs by their expert: pair p, the (p mod per_token)-th of token p / per_token, goes to expert `ids[p]`.
///
/// # Errors
/// More pairs than `memory` is for, more experts than [`MOST_EXPERTS`]; buffers too small for these sizes; the device.
pub fn sort_by_expert<'a>(
    commands: &mut Commands,
    ids: BufferSlice<'_>,
    pairs: u32,
    experts: u32,
    memory: &'a ExpertOrder,
) -> Result<ExpertRows<'a>, OpError> {
    if pairs > memory.pairs || experts == 0 || experts > MOST_EXPERTS {
        let most = memory.pairs;
        return Err(OpError::Shape(format!("{pairs} pairs of {experts} experts, at most {most} of {MOST_EXPERTS}")));
    }
    check_slice("chosen experts", ids, pairs.into(), 4)?;
    let (tile, tiles) =
        if commands.device().is_cpu() { (pairs, experts.min(pairs)) } else { gpu::tiles(pairs, experts) };
    let rows = ExpertRows { memory, pairs, experts, tile, tiles };
    if pairs == 0 {
        return Ok(rows);
    }
    if commands.device().is_cpu() {
        cpu::sort_by_expert(ids, &rows)?
    } else {
        gpu::sort_by_expert(commands, ids, &rows)?
    }
    Ok(rows)
}

/// Arguments of [`combine`].
#[derive(Clone, Copy, Debug)]
pub struct CombineCall<'a> {
    /// What experts answered, f32: `[rows · per_token, cols]`, or `[rows, cols]` where they are those of one expert.
    pub answers: BufferSlice<'a>,
    /// u32 `[rows, per_token]`.
    pub ids: BufferSlice<'a>,
    /// f32 `[rows, per_token]`.
    pub weights: BufferSlice<'a>,
    /// Rows.
    pub rows: u32,
    /// Experts of a row.
    pub per_token: u32,
    /// Elements of a row.
    pub cols: u32,
    /// The expert that answered, where it was one for all rows: rows that did not choose it stay as they are.
    pub expert: Option<u32>,
    /// f32 `[rows, cols]`, added to.
    pub out: BufferSlice<'a>,
}

/// Adds the weighted answers of each row's experts: `out[r] += Σ_j weights[r, j] · answers[r · per_token + j]`.
///
/// # Errors
/// Buffers too small for these sizes; the device.
pub fn combine(commands: &mut Commands, call: &CombineCall<'_>) -> Result<(), OpError> {
    let pairs = elements("weights of experts", call.rows, call.per_token)?;
    let held = if call.expert.is_some() { call.rows } else { pairs as u32 };
    let answers = elements("answers of experts", held, call.cols)?;
    check_slice("answers of experts", call.answers, answers, 4)?;
    check_slice("chosen experts", call.ids, pairs, 4)?;
    check_slice("weights of experts", call.weights, pairs, 4)?;
    let out = elements("combined rows", call.rows, call.cols)?;
    check_slice("combined rows", call.out, out, 4)?;
    if out == 0 {
        return Ok(());
    }
    if commands.device().is_cpu() { cpu::combine(call) } else { gpu::combine(commands, call) }
}
