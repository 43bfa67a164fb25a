use polyattn_api::{
    AttentionIo, AttentionKernel, AttentionProblem, BATCH_WGSL, BackendError, BatchLayout, Commands, DType, Device,
    KvDType, Mask, Plan, PlanPool,
    device::{Access, Pipeline, PipelineSpec, wgsl},
};

use crate::Settings;

/// A compiled pipeline and the problem it serves.
#[derive(Debug)]
pub(crate) struct Kernel {
    device: Device,
    problem: AttentionProblem,
    plans: PlanPool,
    pipeline: Pipeline,
}

impl Kernel {
    pub(crate) fn new(device: &Device, problem: &AttentionProblem, settings: Settings) -> Result<Self, BackendError> {
        let bindings = [Access::Read, Access::Read, Access::Read, Access::ReadWrite, Access::ReadWrite];
        let pipeline = device.pipeline(&PipelineSpec {
            label: "stranger",
            source: &source(problem, settings)?,
            entry: "attend",
            bindings: if problem.lse { &bindings } else { &bindings[..4] },
            immediate_bytes: 8,
            constants: &[],
        })?;
        Ok(Self { device: device.clone(), problem: problem.clone(), plans: PlanPool::default(), pipeline })
    }
}

/// The shader's text: what the problem decides is a preamble of constants.
fn source(problem: &AttentionProblem, settings: Settings) -> Result<String, BackendError> {
    let cached = match problem.kv_dtype {
        KvDType::F32 => DType::F32,
        KvDType::F16 => DType::F16,
        KvDType::BF16 => DType::BF16,
        other => return Err(BackendError::Io(format!("a cache of {other}"))),
    };
    let window = problem.window.unwrap_or(polyattn_api::Window { left: None, right: None });
    let lse = if problem.lse {
        "@group(0) @binding(4) var<storage, read_write> lse: array<f32>;\nfn write_lse(i: u32, x: f32) { lse[i] = x; }\n"
    } else {
        "fn write_lse(i: u32, x: f32) {}\n"
    };
    let constants = format!(
        "const HEADS = {}u; const LATENT = {}u; const DIM = {}u; const TILE = {}u; const CAUSAL = {}; \
         const LEFT = {}u; const RIGHT = {}u; const SOFTCAP = {};\n",
        problem.kind.query_heads(),
        problem.kind.output_dim(),
        problem.kind.query_dim(),
        settings.keys_per_tile,
        problem.mask == Mask::Causal,
        window.left.unwrap_or(u32::MAX),
        window.right.unwrap_or(u32::MAX),
        problem.softcap.is_some(),
    );
    let q = wgsl::storage_loader(1, "q", problem.dtype);
    let kv = wgsl::storage_loader(2, "kv", cached);
    Ok([wgsl::PREAMBLE, BATCH_WGSL, &q, &kv, lse, &constants, include_str!("stranger.wgsl")].concat())
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
        let rows = plan.batch().rows();
        let y = rows.min(self.device.facts().limits.workgroups_per_dimension);
        let groups = [self.problem.kind.query_heads(), y, rows.div_ceil(y.max(1))];
        let mut call = [0; 8];
        call[..4].copy_from_slice(&self.problem.scale.to_le_bytes());
        call[4..].copy_from_slice(&self.problem.softcap.unwrap_or(1.0).to_le_bytes());
        let index = plan.index(commands)?;
        let slices = [index, io.q, io.k_cache, io.out, io.lse.unwrap_or(io.out)];
        commands.dispatch(&self.pipeline, if self.problem.lse { &slices } else { &slices[..4] }, &call, groups)?;
        Ok(())
    }
}
