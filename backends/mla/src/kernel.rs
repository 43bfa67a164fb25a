use std::sync::OnceLock;

use bytemuck::{Pod, Zeroable};
use parking_lot::Mutex;
use polyattn_api::{
    AttentionIo, AttentionKernel, AttentionProblem, BackendError, BatchLayout, Buffer, Commands, Device, KvDType, Plan,
    PlanPool, StoreRotated,
    device::{Pipeline, PipelineSpec},
};

use crate::{
    plan::{self, Cut},
    shader::{self, Variant},
};

/// Bytes of partial states that one round aims to stay below.
const ROUND_BYTES: u64 = 256 << 20;

/// Work items that a GPU runs at once, about. No adapter tells its number of cores; this suits large and small ones.
/// Results do not depend on it.
const RESIDENT: u64 = 256;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PartialCall {
    scale: f32,
    softcap: f32,
    left: u32,
    right: u32,
    heads: u32,
    items: u32,
    first: u32,
    facts: u32,
    end: u32,
    states: u32,
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
}

/// The pipelines of a problem, one for each number of rows, and one that merges.
#[derive(Debug)]
pub(crate) struct Kernel {
    device: Device,
    problem: AttentionProblem,
    plans: PlanPool,
    /// Fewest rows first. A step's rows decide which are needed, so all but the first are compiled when a plan needs
    /// them.
    partial: Vec<(Variant, OnceLock<Pipeline>)>,
    merge: Pipeline,
    /// Partial states. Steps and layers use it one after the other, as the device runs them.
    states: Mutex<Buffer>,
}

impl Kernel {
    /// For a problem that was not declined.
    pub(crate) fn new(device: &Device, problem: &AttentionProblem) -> Result<Self, BackendError> {
        let variants = Variant::all(problem, device.facts());
        Self::of(device, problem, variants.into_iter().map(|variant| (variant, OnceLock::new())).collect())
    }

    /// With these variants, fewest rows first. Some may be compiled.
    pub(crate) fn of(
        device: &Device,
        problem: &AttentionProblem,
        partial: Vec<(Variant, OnceLock<Pipeline>)>,
    ) -> Result<Self, BackendError> {
        let Some(rows) = partial.first().map(|(variant, _)| variant.rows) else {
            return Err(BackendError::Batch("the device's limits leave no tile of rows".into()));
        };
        let merge = device.pipeline(&PipelineSpec {
            label: "mla merge",
            source: &shader::merge(problem),
            entry: "merge",
            bindings: &shader::merge_bindings(problem),
            immediate_bytes: size_of::<MergeCall>() as u32,
            constants: &[],
        })?;
        let states = Mutex::new(device.alloc(64 << 10, "partial states")?);
        let (device, problem) = (device.clone(), problem.clone());
        let kernel = Self { device, problem, plans: PlanPool::default(), partial, merge, states };
        kernel.pipeline(rows)?;
        Ok(kernel)
    }

    /// Bytes of one state.
    fn state_bytes(&self) -> u64 {
        u64::from(self.problem.kind.output_dim() + 2) * 4
    }

    /// The fewest rows whose items run at once, or that hold all rows of the widest sequence: rows of one item share
    /// what they read, items of their own finish sooner.
    fn choose(&self, batch: &BatchLayout) -> Option<Variant> {
        let rows = |sequence: usize| u64::from(batch.queries(sequence).1) * u64::from(self.problem.kind.query_heads());
        let most = (0..batch.sequences()).map(rows).max().unwrap_or(0);
        let mut chosen = None;
        for (variant, _) in &self.partial {
            let tile = u64::from(variant.rows);
            let items: u64 = (0..batch.sequences())
                .map(|sequence| {
                    let queries = batch.queries(sequence).1;
                    let chunks = |query| plan::chunks(&self.problem, batch, sequence, query, variant.chunk());
                    let seen = if queries > 0 { chunks(queries - 1).1 - chunks(0).0 } else { 0 };
                    rows(sequence).div_ceil(tile) * u64::from(seen)
                })
                .sum();
            chosen = Some(*variant);
            if items <= RESIDENT || tile >= most {
                break;
            }
        }
        chosen
    }

    fn pipeline(&self, rows: u32) -> Result<Option<&Pipeline>, BackendError> {
        let Some((variant, pipeline)) = self.partial.iter().find(|(variant, _)| variant.rows == rows) else {
            return Ok(None);
        };
        if pipeline.get().is_none() {
            let _ = pipeline.set(compile(&self.device, &self.problem, &variant.partial(&self.problem))?);
        }
        Ok(pipeline.get())
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

    /// A dimension of a dispatch is limited, so many workgroups are spread over two.
    fn spread(&self, count: u32, z: u32) -> [u32; 3] {
        let y = count.div_ceil(self.device.facts().limits.workgroups_per_dimension.max(1)).max(1);
        [count.div_ceil(y), y, z]
    }
}

/// The pipeline of a variant whose text is `source`.
pub(crate) fn compile(device: &Device, problem: &AttentionProblem, source: &str) -> Result<Pipeline, BackendError> {
    Ok(device.pipeline(&PipelineSpec {
        label: "mla partial",
        source,
        entry: "attend",
        bindings: &shader::partial_bindings(problem),
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
        let Some(variant) = self.choose(batch) else {
            return Err(BackendError::Batch("the kernel has no pipeline".into()));
        };
        self.pipeline(variant.rows)?;
        let binding = self.device.facts().limits.binding_bytes;
        let cut = Cut {
            rows: variant.rows,
            chunk: variant.chunk(),
            states: ROUND_BYTES.min(binding) / self.state_bytes(),
            most_states: binding / self.state_bytes(),
        };
        let words = plan::words(self.plans.words(), &self.problem, batch, cut)?;
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
        let heads = problem.kind.query_heads();
        let (rows, rounds) = plan::rounds(plan.extra()).ok_or_else(foreign)?;
        let partial = self.pipeline(rows)?.ok_or_else(foreign)?;
        let index = plan.index(commands)?;
        let side = |side: Option<u32>| side.unwrap_or(u32::MAX);
        for round in rounds {
            let buffer = self.states(u64::from(round.states) * self.state_bytes())?;
            let states = buffer.whole();
            let call = PartialCall {
                scale: problem.scale,
                softcap: problem.softcap.unwrap_or(1.0),
                left: side(problem.window.and_then(|window| window.left)),
                right: side(problem.window.and_then(|window| window.right)),
                heads,
                items: round.items,
                first: round.first_item,
                facts: plan::HEADER as u32,
                end: round.first_row + round.rows,
                states: round.states,
            };
            let optional =
                [io.alibi_slopes.filter(|_| problem.alibi), io.k_scale.filter(|_| problem.kv_dtype == KvDType::Q8)];
            let mut bound = [index, io.q, io.k_cache, states, states, states];
            let mut count = 4;
            for slice in optional.into_iter().flatten() {
                bound[count] = slice;
                count += 1;
            }
            let groups = self.spread(round.items, 1);
            commands.dispatch(partial, &bound[..count], bytemuck::bytes_of(&call), groups)?;

            let call = MergeCall {
                nothing: f32::NEG_INFINITY,
                heads,
                first: round.first_row,
                rows: round.rows,
                facts: plan::HEADER as u32,
                states: round.states,
            };
            let optional = [io.lse.filter(|_| problem.lse), io.sinks.filter(|_| problem.sinks)];
            let mut bound = [index, states, io.out, io.out, io.out];
            let mut count = 3;
            for slice in optional.into_iter().flatten() {
                bound[count] = slice;
                count += 1;
            }
            let groups =
                self.spread(round.rows * (problem.kind.output_dim() / 4 / shader::merge_block(problem)), heads);
            commands.dispatch(&self.merge, &bound[..count], bytemuck::bytes_of(&call), groups)?;
        }
        Ok(())
    }
}
