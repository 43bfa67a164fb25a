//! The feed-forward part of a layer: a SwiGLU, or a mixture of experts.

use std::sync::Arc;

use polyattn_api::{MoeIo, MoeKernel};
use polyattn_device::{Buffer, Commands, Device};

use super::{LayerLoader, LayerScratch};
use crate::{
    NnError,
    load::{DecoderConfig, ExpertsConfig, LayerWeight as W},
    ops::{self, LinearCall, Matrix, Norm, RouteCall, SwigluCall, Vector},
};

/// A SwiGLU.
#[derive(Debug)]
pub(super) struct Swiglu {
    gate_up: Matrix,
    down: Matrix,
}

impl Swiglu {
    /// Loads the one that these three names say.
    pub(super) fn load(
        loader: &mut LayerLoader<'_, '_>,
        [gate, up, down]: [W; 3],
        hidden_size: u32,
        intermediate_size: u32,
    ) -> Result<Self, NnError> {
        Ok(Self {
            gate_up: loader.matrix(&[gate, up], hidden_size, 2 * intermediate_size)?,
            down: loader.matrix(&[down], intermediate_size, hidden_size)?,
        })
    }

    pub(super) fn matrices(&self) -> [&Matrix; 2] {
        [&self.gate_up, &self.down]
    }

    /// Adds it, of normed `x`, to `out`.
    pub(super) fn forward(
        &self,
        commands: &mut Commands,
        x: &Buffer,
        norm: Option<Norm<'_>>,
        rows: u32,
        scratch: &LayerScratch,
        out: &Buffer,
    ) -> Result<(), NnError> {
        let (gate_up, mlp) = (&self.gate_up, scratch.mlp.whole());
        ops::swiglu(commands, &SwigluCall { x: x.whole(), rows, gate_up, norm, out: mlp })?;
        let out = out.whole();
        let down = LinearCall { x: mlp, rows, weight: &self.down, norm: None, bias: None, out, accumulate: true };
        Ok(ops::linear(commands, &down)?)
    }
}

/// The feed-forward part.
#[derive(Debug)]
pub(super) enum FeedForward {
    Dense(Swiglu),
    Experts(Experts),
}

/// A mixture of experts, and the SwiGLU beside it.
#[derive(Debug)]
pub(super) struct Experts {
    config: ExpertsConfig,
    router: Matrix,
    /// Of each expert the gates, then the ups.
    gate_up: Matrix,
    down: Matrix,
    shared: Option<Swiglu>,
}

/// Memory that a mixture of experts needs besides that of any layer, and who serves it.
#[derive(Debug)]
pub(super) struct ExpertsScratch {
    normed: Buffer,
    scores: Buffer,
    ids: Buffer,
    weights: Buffer,
    pub(super) kernel: Arc<dyn MoeKernel>,
}

impl ExpertsScratch {
    pub(super) fn new(
        device: &Device,
        hidden_size: u32,
        experts: &ExpertsConfig,
        kernel: Arc<dyn MoeKernel>,
        rows: u32,
    ) -> Result<Self, NnError> {
        let bytes = |elements: u32| u64::from(rows) * u64::from(elements) * 4;
        Ok(Self {
            normed: device.alloc(bytes(hidden_size), "normed rows")?,
            scores: device.alloc(bytes(experts.experts), "scores of experts")?,
            ids: device.alloc(bytes(experts.per_token), "chosen experts")?,
            weights: device.alloc(bytes(experts.per_token), "weights of experts")?,
            kernel,
        })
    }
}

impl Experts {
    pub(super) fn load(
        loader: &mut LayerLoader<'_, '_>,
        config: &DecoderConfig,
        experts: &ExpertsConfig,
    ) -> Result<Self, NnError> {
        let (hidden, wide, count) = (config.hidden_size, experts.intermediate_size, experts.experts);
        let rows = |of_one: u32| {
            count
                .checked_mul(of_one)
                .ok_or_else(|| NnError::Shape(format!("{count} experts of {of_one} rows of weights exceed 32 bits")))
        };
        Ok(Self {
            router: loader.matrix(&[W::Router], hidden, count)?,
            gate_up: loader.experts(&[W::Gate, W::Up], count, hidden, rows(2 * wide)?)?,
            down: loader.experts(&[W::Down], count, wide, rows(hidden)?)?,
            shared: match experts.shared_size {
                Some(wide) => Some(Swiglu::load(loader, [W::SharedGate, W::SharedUp, W::SharedDown], hidden, wide)?),
                None => None,
            },
            config: experts.clone(),
        })
    }

    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let own = [&self.router, &self.gate_up, &self.down];
        own.into_iter().chain(self.shared.iter().flat_map(Swiglu::matrices))
    }

    /// The experts read normed rows, because what they add to is what the norm is of.
    fn forward(
        &self,
        commands: &mut Commands,
        x: &Buffer,
        norm: Norm<'_>,
        rows: u32,
        scratch: &LayerScratch,
    ) -> Result<(), NnError> {
        let Some(memory) = &scratch.experts else {
            return Err(NnError::Shape("a layer has experts, but its scratch names nobody who serves them".into()));
        };
        let ExpertsConfig { experts, per_token, choice, normalize, scale, .. } = self.config;
        let problem = memory.kernel.problem();
        if problem.dtype != self.gate_up.dtype || self.down.dtype != self.gate_up.dtype {
            let (up, down, asked) = (self.gate_up.dtype, self.down.dtype, problem.dtype);
            return Err(NnError::Shape(format!("experts of {up} and {down}, their backend was asked for {asked}")));
        }
        ops::rms_norm(commands, x.whole(), norm, rows, memory.normed.whole())?;
        let scores = LinearCall {
            x: memory.normed.whole(),
            rows,
            weight: &self.router,
            norm: None,
            bias: None,
            out: memory.scores.whole(),
            accumulate: false,
        };
        ops::linear(commands, &scores)?;
        let (ids, weights, scores) = (memory.ids.whole(), memory.weights.whole(), memory.scores.whole());
        let route = RouteCall { scores, rows, experts, per_token, choice, normalize, scale, ids, weights };
        ops::route(commands, &route)?;
        if let Some(shared) = &self.shared {
            shared.forward(commands, &memory.normed, None, rows, scratch, x)?;
        }
        let (gate_up, down) = (&self.gate_up.buffer, &self.down.buffer);
        let io = MoeIo::new(memory.normed.whole(), rows, ids, weights, gate_up, down, x.whole());
        Ok(memory.kernel.encode(commands, &io)?)
    }
}

impl FeedForward {
    pub(super) fn matrices(&self) -> Vec<&Matrix> {
        match self {
            Self::Dense(swiglu) => swiglu.matrices().to_vec(),
            Self::Experts(experts) => experts.matrices().collect(),
        }
    }

    /// Adds it to `x`; `norm` is that before it.
    pub(super) fn forward(
        &self,
        commands: &mut Commands,
        x: &Buffer,
        weight: &Vector,
        eps: f32,
        rows: u32,
        scratch: &LayerScratch,
    ) -> Result<(), NnError> {
        let norm = Norm { weight, eps };
        match self {
            Self::Dense(swiglu) => swiglu.forward(commands, x, Some(norm), rows, scratch, x),
            Self::Experts(experts) => experts.forward(commands, x, norm, rows, scratch),
        }
    }
}
