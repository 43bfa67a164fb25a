use polyattn_api::{BackendError, Buffer, Commands, Device, MoeIo, MoeKernel, MoeProblem};
use polyattn_nn::ops::{self, CombineCall, HeadsCall, Matrix, OpError};

/// Memory for one expert at a time.
#[derive(Debug)]
pub(crate) struct Kernel {
    problem: MoeProblem,
    rows: u32,
    /// Activations of an expert, `[rows, intermediate_size]`.
    mlp: Buffer,
    /// What it answers, `[rows, hidden_size]`.
    answers: Buffer,
}

impl Kernel {
    pub(crate) fn new(device: &Device, problem: &MoeProblem, rows: u32) -> Result<Self, BackendError> {
        let bytes = |width: u32| u64::from(rows) * u64::from(width) * 4;
        Ok(Self {
            problem: problem.clone(),
            rows,
            mlp: device.alloc(bytes(problem.intermediate_size), "activations of an expert")?,
            answers: device.alloc(bytes(problem.hidden_size), "answers of an expert")?,
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
        for expert in 0..experts {
            let activations = HeadsCall {
                x: io.x,
                rows: io.rows,
                weight: &gate_up,
                matrices: experts,
                first: expert,
                heads: 1,
                x_stride: hidden_size,
                gated: true,
                out: self.mlp.whole(),
                out_stride: intermediate_size,
            };
            ops::linear_by_head(commands, &activations).map_err(from_op)?;
            let answers = HeadsCall {
                x: self.mlp.whole(),
                weight: &down,
                x_stride: intermediate_size,
                gated: false,
                out: self.answers.whole(),
                out_stride: hidden_size,
                ..activations
            };
            ops::linear_by_head(commands, &answers).map_err(from_op)?;
            let combined = CombineCall {
                answers: self.answers.whole(),
                ids: io.ids,
                weights: io.weights,
                rows: io.rows,
                per_token: experts_per_token,
                cols: hidden_size,
                expert: Some(expert),
                out: io.out,
            };
            ops::combine(commands, &combined).map_err(from_op)?;
        }
        Ok(())
    }
}

fn from_op(error: OpError) -> BackendError {
    match error {
        OpError::Device(error) => error.into(),
        other => BackendError::Io(other.to_string()),
    }
}
