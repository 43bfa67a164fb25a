use bytemuck::{Pod, Zeroable};
use polyattn_api::{
    AttentionIo, AttentionKernel, AttentionProblem, BackendError, BatchLayout, Commands, Device, KvDType, Plan,
    PlanPool, StoreRotated,
    device::{Pipeline, PipelineSpec},
};

use crate::shader::{Exchange, Variant};

/// Words before the work items: vectors of rows, items.
const HEADER: usize = 2;

/// Work items that a GPU runs at once, about: with fewer, smaller tiles of rows finish sooner although keys and values
/// are read more often. No adapter tells its number of cores; this suits large and small ones. Results do not depend
/// on it.
const RESIDENT: u64 = 128;

/// Work items that a plan may have: 16 million rows.
const MOST_ITEMS: u64 = 1 << 20;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Immediates {
    scale: f32,
    softcap: f32,
    nothing: f32,
    left: u32,
    right: u32,
    heads: u32,
    kv_heads: u32,
    group: u32,
}

/// The pipelines of a problem, one for each tile of rows.
#[derive(Debug)]
pub(crate) struct Kernel {
    device: Device,
    problem: AttentionProblem,
    plans: PlanPool,
    pipelines: Vec<(Variant, Pipeline)>,
}

impl Kernel {
    /// For a problem that was not declined.
    pub(crate) fn new(device: &Device, problem: &AttentionProblem, exchange: Exchange) -> Result<Self, BackendError> {
        let limit = device.facts().limits.workgroup_bytes;
        let bindings = Variant::bindings(problem);
        let pipelines = Variant::all(problem.kind, exchange, limit)
            .map(|variant| {
                let pipeline = device.pipeline(&PipelineSpec {
                    label: "flash",
                    source: &variant.source(problem),
                    entry: "attend",
                    bindings: &bindings,
                    immediate_bytes: size_of::<Immediates>() as u32,
                    constants: &[],
                })?;
                Ok((variant, pipeline))
            })
            .collect::<Result<_, BackendError>>()?;
        Ok(Self { device: device.clone(), problem: problem.clone(), plans: PlanPool::default(), pipelines })
    }

    /// With one tile of rows alone.
    #[cfg(test)]
    pub(crate) fn only(mut self, quads: u32) -> Self {
        self.pipelines.retain(|(variant, _)| variant.quads == quads);
        self
    }

    fn group(&self) -> u32 {
        self.problem.kind.query_heads() / self.problem.kind.kv_heads()
    }

    /// The smallest tile of rows whose items run at once, or that holds every row there is.
    fn choose(&self, batch: &BatchLayout) -> Option<(Variant, u64)> {
        let rows = || batch.query_start.windows(2).map(|pair| u64::from(pair[1] - pair[0]) * u64::from(self.group()));
        let most = rows().max().unwrap_or(0);
        let mut chosen = None;
        for (variant, _) in &self.pipelines {
            let tile = u64::from(variant.rows());
            let items: u64 = rows().map(|rows| rows.div_ceil(tile)).sum();
            chosen = Some((*variant, items));
            if items * u64::from(self.problem.kind.kv_heads()) <= RESIDENT || tile >= most {
                break;
            }
        }
        chosen
    }
}

impl AttentionKernel for Kernel {
    fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError> {
        batch.validate(&self.problem)?;
        let Some((variant, items)) = self.choose(batch) else {
            return Err(BackendError::Batch("the kernel has no pipeline".into()));
        };
        if items > MOST_ITEMS {
            let (rows, most) = (batch.rows(), MOST_ITEMS * u64::from(variant.rows()) / u64::from(self.group()));
            return Err(BackendError::Batch(format!("{rows} query rows in one call, at most {most} are served")));
        }
        let mut words = self.plans.words();
        words.reserve(HEADER + items as usize * 2);
        words.extend([variant.quads, items as u32]);
        for sequence in 0..batch.sequences() {
            let rows = batch.queries(sequence).1 * self.group();
            words.extend((0..rows).step_by(variant.rows() as usize).flat_map(|first| [sequence as u32, first]));
        }
        Plan::new(&self.device, &self.plans, &self.problem, batch, words)
    }

    fn store_rotated(&self, commands: &mut Commands, plan: &Plan, io: &StoreRotated<'_>) -> Result<bool, BackendError> {
        io.record_provided(&self.problem, commands, plan)
    }

    fn encode(&self, commands: &mut Commands, plan: &Plan, io: &AttentionIo<'_>) -> Result<(), BackendError> {
        let problem = &self.problem;
        io.validate(problem, plan.batch())?;
        plan.made_in(&self.plans)?;
        let pipeline = match plan.extra() {
            [quads, items, ..] => {
                self.pipelines.iter().find(|(variant, _)| variant.quads == *quads).map(|found| (&found.1, *items))
            }
            _ => None,
        };
        let Some((pipeline, items)) = pipeline else {
            return Err(BackendError::Batch("the plan has no such items".into()));
        };
        let index = plan.index(commands)?;
        let optional = [
            io.lse.filter(|_| problem.lse),
            io.sinks.filter(|_| problem.sinks),
            io.alibi_slopes.filter(|_| problem.alibi),
            io.k_scale.filter(|_| problem.kv_dtype == KvDType::Q8),
            io.v_scale.filter(|_| problem.kv_dtype == KvDType::Q8),
        ];
        let mut slices = [index, io.q, io.k_cache, io.v_cache, io.out, io.out, io.out, io.out, io.out, io.out];
        let mut bound = 5;
        for slice in optional.into_iter().flatten() {
            slices[bound] = slice;
            bound += 1;
        }
        let side = |side: Option<u32>| side.unwrap_or(u32::MAX);
        let immediates = Immediates {
            scale: problem.scale,
            softcap: problem.softcap.unwrap_or(1.0),
            nothing: f32::NEG_INFINITY,
            left: side(problem.window.and_then(|window| window.left)),
            right: side(problem.window.and_then(|window| window.right)),
            heads: problem.kind.query_heads(),
            kv_heads: problem.kind.kv_heads(),
            group: self.group(),
        };
        // A dimension of a dispatch is limited, so many items are spread over two.
        let y = items.div_ceil(self.device.facts().limits.workgroups_per_dimension.max(1));
        let groups = [items.div_ceil(y.max(1)), y, problem.kind.kv_heads()];
        commands.dispatch(pipeline, &slices[..bound], bytemuck::bytes_of(&immediates), groups)?;
        Ok(())
    }
}
