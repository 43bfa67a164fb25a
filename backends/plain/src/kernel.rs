use polyattn_api::{
    AttentionIo, AttentionKernel, AttentionProblem, BATCH_WGSL, BackendError, BatchLayout, Commands, Device, Plan,
    PlanPool,
    device::{Access, Pipeline, PipelineSpec, wgsl},
};

/// A compiled pipeline and the problem it serves.
#[derive(Debug)]
pub(crate) struct Kernel {
    device: Device,
    problem: AttentionProblem,
    plans: PlanPool,
    pipeline: Pipeline,
}

impl Kernel {
    pub(crate) fn new(device: &Device, problem: &AttentionProblem) -> Result<Self, BackendError> {
        let (heads, kv_heads) = (problem.kind.query_heads(), problem.kind.kv_heads());
        let bindings = [Access::Read, Access::Read, Access::Read, Access::Read, Access::ReadWrite, Access::ReadWrite];
        let pipeline = device.pipeline(&PipelineSpec {
            label: "plain",
            source: &source(problem),
            entry: "attend",
            bindings: if problem.lse { &bindings } else { &bindings[..5] },
            immediate_bytes: 4,
            constants: &[
                ("HEADS", heads.into()),
                ("GROUP", (heads / kv_heads).into()),
                ("HEAD_DIM", problem.kind.query_dim().into()),
            ],
        })?;
        Ok(Self { device: device.clone(), problem: problem.clone(), plans: PlanPool::default(), pipeline })
    }
}

/// The shader's text: element types and optional bindings are a preamble, numbers are `override`s.
pub(crate) fn source(problem: &AttentionProblem) -> String {
    let write_lse = if problem.lse {
        "@group(0) @binding(5) var<storage, read_write> lse: array<f32>;\nfn write_lse(i: u32, x: f32) { lse[i] = x; }\n"
    } else {
        "fn write_lse(i: u32, x: f32) {}\n"
    };
    let [q, k, v] = [(1, "q"), (2, "k"), (3, "v")].map(|(at, name)| wgsl::storage_loader(at, name, problem.dtype));
    [wgsl::PREAMBLE, BATCH_WGSL, &q, &k, &v, write_lse, include_str!("plain.wgsl")].concat()
}

impl AttentionKernel for Kernel {
    fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError> {
        Plan::new(&self.device, &self.plans, &self.problem, batch, Vec::new())
    }

    fn encode(&self, commands: &mut Commands, plan: &Plan, io: &AttentionIo<'_>) -> Result<(), BackendError> {
        io.validate(&self.problem, plan.batch())?;
        plan.made_in(&self.plans)?;
        let index = plan.index(commands)?;
        // A dimension of a dispatch is limited, so rows beyond the limit go on in z.
        let rows = plan.batch().rows();
        let y = rows.min(self.device.facts().limits.workgroups_per_dimension);
        let groups = [self.problem.kind.query_heads(), y, rows.div_ceil(y.max(1))];
        let scale = self.problem.scale.to_le_bytes();
        let slices = [index, io.q, io.k_cache, io.v_cache, io.out, io.lse.unwrap_or(io.out)];
        let bound = if self.problem.lse { 6 } else { 5 };
        commands.dispatch(&self.pipeline, &slices[..bound], &scale, groups)?;
        Ok(())
    }
}
