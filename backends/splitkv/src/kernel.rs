use std::sync::OnceLock;

use bytemuck::{Pod, Zeroable};
use parking_lot::Mutex;
use polyattn_api::{
    AttentionIo, AttentionKernel, AttentionProblem, BackendError, BatchLayout, Buffer, BufferSlice, Commands, Device,
    KvDType, Plan, PlanPool, StoreRotated,
    device::{Pipeline, PipelineSpec},
};

use crate::{Multiply, plan, shader::Variant};

/// Bytes of partial states that one round aims to stay below.
const ROUND_BYTES: u64 = 256 << 20;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PartialCall {
    scale: f32,
    softcap: f32,
    nothing: f32,
    left: u32,
    right: u32,
    heads: u32,
    kv_heads: u32,
    group: u32,
    items: u32,
    first: u32,
    facts: u32,
    states: u32,
    per: u32,
    zero: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct MergeCall {
    nothing: f32,
    heads: u32,
    first: u32,
    rows: u32,
    facts: u32,
    states: u32,
    per: u32,
}

/// The pipelines of a problem, one for each number of tiles, and one that merges.
#[derive(Debug)]
pub(crate) struct Kernel {
    device: Device,
    problem: AttentionProblem,
    plans: PlanPool,
    /// Smallest first. A step's rows decide which are needed, so all but the first are compiled when a plan needs them.
    partial: Vec<(Variant, OnceLock<Pipeline>)>,
    merge: Pipeline,
    /// Partial states. Steps and layers use it one after the other, as the device runs them.
    states: Mutex<Buffer>,
}

impl Kernel {
    /// For a problem that was not declined.
    pub(crate) fn new(
        device: &Device,
        problem: &AttentionProblem,
        wanted: Option<Multiply>,
    ) -> Result<Self, BackendError> {
        let variants = Variant::all(problem, device.facts(), wanted);
        Self::of(device, problem, variants.map(|variant| (variant, OnceLock::new())).collect())
    }

    /// With these variants, smallest first. Some may be compiled.
    pub(crate) fn of(
        device: &Device,
        problem: &AttentionProblem,
        partial: Vec<(Variant, OnceLock<Pipeline>)>,
    ) -> Result<Self, BackendError> {
        let Some(variant) = partial.first().map(|(variant, _)| *variant) else {
            return Err(BackendError::Batch("the device's limits leave no tile of rows".into()));
        };
        let merge = device.pipeline(&PipelineSpec {
            label: "splitkv merge",
            source: &variant.merge(problem),
            entry: "merge",
            bindings: &Variant::merge_bindings(problem),
            immediate_bytes: size_of::<MergeCall>() as u32,
            constants: &[],
        })?;
        let states = Mutex::new(device.alloc(64 << 10, "partial states")?);
        let (device, problem) = (device.clone(), problem.clone());
        let kernel = Self { device, problem, plans: PlanPool::default(), partial, merge, states };
        kernel.pipeline(variant.tiles)?;
        Ok(kernel)
    }

    fn group(&self) -> u32 {
        self.problem.kind.query_heads() / self.problem.kind.kv_heads()
    }

    /// Bytes of one state.
    fn state_bytes(&self) -> u64 {
        u64::from(self.problem.kind.output_dim() + 2) * 4
    }

    /// The fewest tiles whose items run at once, or that hold all rows of the widest sequence: tiles of one item share
    /// what they read, items of their own finish sooner. And the chunks that an item takes one after the other: whole
    /// spans where there are so many items that starting and ending chunks is what costs.
    fn choose(&self, batch: &BatchLayout) -> Option<(Variant, u32)> {
        let rows = |sequence: usize| u64::from(batch.queries(sequence).1) * u64::from(self.group());
        let most = (0..batch.sequences()).map(rows).max().unwrap_or(0);
        let mut chosen = None;
        for (variant, _) in &self.partial {
            let tile = u64::from(variant.rows());
            let items: u64 = (0..batch.sequences())
                .map(|sequence| {
                    let (first, last) = plan::chunks(&self.problem, batch, sequence, variant.chunk());
                    rows(sequence).div_ceil(tile) * u64::from(last - first)
                })
                .sum();
            let items = items * u64::from(self.problem.kind.kv_heads());
            let spans = (items / (variant.resident() * u64::from(plan::SPAN))).min(variant.most_spans().into()) as u32;
            chosen = Some((*variant, (spans * plan::SPAN).max(1)));
            if items <= variant.resident() || tile >= most {
                break;
            }
        }
        chosen
    }

    fn pipeline(&self, tiles: u32) -> Result<Option<(Variant, &Pipeline)>, BackendError> {
        let Some((variant, pipeline)) = self.partial.iter().find(|(variant, _)| variant.tiles == tiles) else {
            return Ok(None);
        };
        if pipeline.get().is_none() {
            let _ = pipeline.set(compile(&self.device, &self.problem, *variant, &variant.partial(&self.problem))?);
        }
        Ok(pipeline.get().map(|pipeline| (*variant, pipeline)))
    }

    /// Refuses a cache that no binding holds, before anything is recorded.
    fn fits(&self, batch: &BatchLayout) -> Result<(), BackendError> {
        let kind = &self.problem.kind;
        let slots = u64::from(batch.pool_pages) * u64::from(batch.page_size);
        let bytes = slots * u64::from(kind.kv_heads() * kind.query_dim()) * self.problem.kv_dtype.bytes();
        let allowed = self.device.facts().limits.binding_bytes;
        if bytes <= allowed {
            return Ok(());
        }
        Err(BackendError::Batch(format!(
            "a key cache of {} pages of {} tokens has {bytes} bytes, and a binding of '{}' holds {allowed}",
            batch.pool_pages,
            batch.page_size,
            self.device.facts().name
        )))
    }

    /// The buffer of partial states, at least of this many bytes.
    fn states(&self, bytes: u64) -> Result<Buffer, BackendError> {
        let mut states = self.states.lock();
        if states.bytes() < bytes {
            let room = bytes.next_power_of_two().min(self.device.facts().limits.binding_bytes & !15);
            *states = self.device.alloc(room.max(bytes), "partial states")?;
        }
        Ok(states.clone())
    }
}

/// The pipeline of a variant whose text is `source`.
pub(crate) fn compile(
    device: &Device,
    problem: &AttentionProblem,
    variant: Variant,
    source: &str,
) -> Result<Pipeline, BackendError> {
    Ok(device.pipeline(&PipelineSpec {
        label: "splitkv partial",
        source,
        entry: "attend",
        bindings: &Variant::partial_bindings(problem, variant.direct),
        immediate_bytes: size_of::<PartialCall>() as u32,
        constants: &[],
    })?)
}

impl AttentionKernel for Kernel {
    fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError> {
        batch.validate(&self.problem)?;
        self.fits(batch)?;
        let Some((variant, run)) = self.choose(batch) else {
            return Err(BackendError::Batch("the kernel has no pipeline".into()));
        };
        self.pipeline(variant.tiles)?;
        let widest = batch.query_start.windows(2).map(|pair| u64::from(pair[1] - pair[0])).max().unwrap_or(0);
        let longest = batch.kv_len.iter().copied().max().unwrap_or(0);
        // One sequence stays in one round, however large.
        let chunks = u64::from(longest) / u64::from(variant.chunk()) + 1;
        let alone = widest * u64::from(self.problem.kind.query_heads()) * chunks;
        let room = ROUND_BYTES.max(alone * self.state_bytes()).min(self.device.facts().limits.binding_bytes);
        let most_states = room / self.state_bytes();
        let words = plan::words(self.plans.words(), &self.problem, batch, variant, run, most_states)?;
        Plan::new(&self.device, &self.plans, &self.problem, batch, words)
    }

    fn store_rotated(&self, commands: &mut Commands, plan: &Plan, io: &StoreRotated<'_>) -> Result<bool, BackendError> {
        io.record_provided(&self.problem, commands, plan)
    }

    fn encode(&self, commands: &mut Commands, plan: &Plan, io: &AttentionIo<'_>) -> Result<(), BackendError> {
        let problem = &self.problem;
        io.validate(problem, plan.batch())?;
        plan.made_in(&self.plans)?;
        let foreign = || BackendError::Batch("the plan has no such items".into());
        let (tiles, per, rounds) = plan::rounds(plan.extra()).ok_or_else(foreign)?;
        let (variant, partial) = self.pipeline(tiles)?.ok_or_else(foreign)?;
        let index = plan.index(commands)?;
        let side = |side: Option<u32>| side.unwrap_or(u32::MAX);
        let (heads, kv_heads) = (problem.kind.query_heads(), problem.kind.kv_heads());
        let endings = [Some(io.out), io.lse.filter(|_| problem.lse), io.sinks.filter(|_| problem.sinks)];
        let scales = [io.k_scale, io.v_scale].map(|scale| scale.filter(|_| problem.kv_dtype == KvDType::Q8));
        let slopes = io.alibi_slopes.filter(|_| problem.alibi);
        for round in rounds {
            let buffer = self.states(u64::from(round.states) * self.state_bytes())?;
            let states = buffer.whole();
            let call = PartialCall {
                scale: problem.scale,
                softcap: problem.softcap.unwrap_or(1.0),
                nothing: f32::NEG_INFINITY,
                left: side(problem.window.and_then(|window| window.left)),
                right: side(problem.window.and_then(|window| window.right)),
                heads,
                kv_heads,
                group: self.group(),
                items: round.items,
                first: round.first_item,
                facts: plan::HEADER as u32,
                states: round.states,
                per,
                zero: 0,
            };
            let own = [Some(io.q), Some(io.k_cache), Some(io.v_cache), Some(states), slopes];
            let ended = endings.into_iter().filter(|_| variant.direct);
            let (slices, count) = bound(index, own.into_iter().chain(scales).chain(ended));
            let groups = self.spread(round.items, kv_heads);
            commands.dispatch(partial, &slices[..count], bytemuck::bytes_of(&call), groups)?;
            if round.states == 0 {
                continue;
            }

            let call = MergeCall {
                nothing: f32::NEG_INFINITY,
                heads,
                first: round.first_row,
                rows: round.rows,
                facts: plan::HEADER as u32,
                states: round.states,
                per,
            };
            let (slices, count) = bound(index, [Some(states)].into_iter().chain(endings));
            let groups = self.spread(round.rows, heads);
            commands.dispatch(&self.merge, &slices[..count], bytemuck::bytes_of(&call), groups)?;
        }
        Ok(())
    }
}

/// Bindings of a dispatch at the most.
const MOST_BINDINGS: usize = 11;

/// The index and those other buffers that a problem has: the bindings of a dispatch, and their number.
fn bound<'a>(
    index: BufferSlice<'a>,
    others: impl Iterator<Item = Option<BufferSlice<'a>>>,
) -> ([BufferSlice<'a>; MOST_BINDINGS], usize) {
    let mut bound = [index; MOST_BINDINGS];
    let mut count = 1;
    for (place, slice) in bound[1..].iter_mut().zip(others.flatten()) {
        *place = slice;
        count += 1;
    }
    (bound, count)
}

impl Kernel {
    /// A workgroup for each of `count` things and each head. A dimension of a dispatch is limited, so many are spread
    /// over two.
    fn spread(&self, count: u32, heads: u32) -> [u32; 3] {
        let all = u64::from(count) * u64::from(heads);
        let y = all.div_ceil(u64::from(self.device.facts().limits.workgroups_per_dimension.max(1))).max(1);
        [all.div_ceil(y) as u32, y as u32, 1]
    }
}
