use polyattn_api::{BackendError, Buffer, Commands, Device, MoeIo, MoeKernel, MoeProblem};
use polyattn_nn::ops::{self, CombineCall, ExpertOrder, ExpertsCall, Matrix, OpError};

/// Memory for all pairs of a token and an expert at once.
#[derive(Debug)]
pub(crate) struct Kernel {
    problem: MoeProblem,
    rows: u32,
    order: ExpertOrder,
    /// Activations of each pair, `[pairs, intermediate_size]`.
    mlp: Buffer,
    /// What its expert answers, `[pairs, hidden_size]`.
    answers: Buffer,
}

impl Kernel {
    pub(crate) fn new(device: &Device, problem: &MoeProblem, rows: u32) -> Result<Self, BackendError> {
        let Some(pairs) = rows.checked_mul(problem.experts_per_token) else {
            let per_token = problem.experts_per_token;
            return Err(BackendError::Io(format!("{rows} rows of {per_token} experts exceed 32 bits")));
        };
        let bytes = |width: u32| u64::from(pairs) * u64::from(width) * 4;
        Ok(Self {
            problem: problem.clone(),
            rows,
            order: ExpertOrder::new(device, pairs).map_err(from_op)?,
            mlp: device.alloc(bytes(problem.intermediate_size), "activations of experts")?,
            answers: device.alloc(bytes(problem.hidden_size), "answers of experts")?,
        })
    }
}

impl MoeKernel for Kernel {
    fn problem(&self) -> &MoeProblem {
        &self.problem
    }

    fn encode(&self, commands: &mut Commands, io: &MoeIo<'_>) -> Result<(), BackendError> {
        let MoeProblem { hidden_size, intermediate_size, experts, experts_per_token, dtype, .. } = self.problem;
        if io.rows > self.rows {
            return Err(BackendError::Io(format!("{} rows, prepared for {}", io.rows, self.rows)));
        }
        let gate_up =
            Matrix { buffer: io.gate_up.clone(), rows: experts * 2 * intermediate_size, cols: hidden_size, dtype };
        let down = Matrix { buffer: io.down.clone(), rows: experts * hidden_size, cols: intermediate_size, dtype };
        let pairs = io.rows * experts_per_token;
        let rows = ops::sort_by_expert(commands, io.ids, pairs, experts, &self.order).map_err(from_op)?;
        let mlp = self.mlp.whole();
        let activations =
            ExpertsCall { x: io.x, share: experts_per_token, weight: &gate_up, rows: &rows, gated: true, out: mlp };
        ops::linear_by_expert(commands, &activations).map_err(from_op)?;
        let answers = self.answers.whole();
        let outputs = ExpertsCall { x: mlp, share: 1, weight: &down, rows: &rows, gated: false, out: answers };
        ops::linear_by_expert(commands, &outputs).map_err(from_op)?;
        let combined = CombineCall {
            answers,
            ids: io.ids,
            weights: io.weights,
            rows: io.rows,
            per_token: experts_per_token,
            cols: hidden_size,
            expert: None,
            out: io.out,
        };
        ops::combine(commands, &combined).map_err(from_op)
    }
}

fn from_op(error: OpError) -> BackendError {
    match error {
        OpError::Device(error) => error.into(),
        other => BackendError::Io(other.to_string()),
    }
}
