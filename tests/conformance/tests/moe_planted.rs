//! A backend for mixtures of experts with a bug at a time: the kit must find each.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use std::sync::Arc;

use polyattn_api::{
    BackendError, Commands, DType, Decline, Device, DeviceFacts, MoeBackend, MoeIo, MoeKernel, MoeProblem, Origin,
    RegisteredMoeBackend,
};
use polyattn_conformance::moe_suite;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Bug {
    None,
    Overwrites,
    IgnoresWeights,
    NextExpert,
    SwapsGateAndUp,
    ReadsEveryExpert,
    DependsOnRows,
    TakesAnyRows,
    DeclinesAll,
}

#[derive(Clone, Copy, Debug)]
struct Planted(Bug);

impl MoeBackend for Planted {
    fn name(&self) -> &'static str {
        "planted"
    }

    fn declines(&self, problem: &MoeProblem, _: &DeviceFacts) -> Vec<Decline> {
        let all = self.0 == Bug::DeclinesAll;
        if problem.dtype != DType::F32 || all { vec![Decline::Dtype(problem.dtype)] } else { Vec::new() }
    }

    fn prepare(&self, _: &Device, problem: &MoeProblem, rows: u32) -> Result<Arc<dyn MoeKernel>, BackendError> {
        Ok(Arc::new(Kernel { bug: self.0, problem: problem.clone(), rows }))
    }
}

#[derive(Debug)]
struct Kernel {
    bug: Bug,
    problem: MoeProblem,
    rows: u32,
}

impl MoeKernel for Kernel {
    fn problem(&self) -> &MoeProblem {
        &self.problem
    }

    fn encode(&self, _: &mut Commands, io: &MoeIo<'_>) -> Result<(), BackendError> {
        if io.rows > self.rows && self.bug != Bug::TakesAnyRows {
            return Err(BackendError::Io("too many rows".into()));
        }
        let MoeProblem { hidden_size, intermediate_size, experts, experts_per_token, .. } = self.problem;
        let [hidden, wide, experts, per_token] =
            [hidden_size, intermediate_size, experts, experts_per_token].map(|dim| dim as usize);
        let (x, ids, weights) = (io.x.buffer().read::<f32>()?, io.ids.buffer().read::<u32>()?, io.weights.buffer());
        let (weights, gate_up, down) = (weights.read::<f32>()?, io.gate_up.read::<f32>()?, io.down.read::<f32>()?);
        let mut out = io.out.buffer().write::<f32>()?;
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        for row in 0..io.rows as usize {
            let x = &x[row * hidden..][..hidden];
            let mut sums = vec![0.0; hidden];
            for pair in row * per_token..(row + 1) * per_token {
                let mut expert = ids[pair] as usize;
                if self.bug == Bug::NextExpert {
                    expert = (expert + 1) % experts;
                }
                let weight = if self.bug == Bug::IgnoresWeights { 1.0 } else { weights[pair] };
                let matrix = &gate_up[expert * 2 * wide * hidden..][..2 * wide * hidden];
                let mlp: Vec<f32> = (0..wide)
                    .map(|i| {
                        let mut gate = dot(&matrix[i * hidden..][..hidden], x);
                        let mut up = dot(&matrix[(wide + i) * hidden..][..hidden], x);
                        if self.bug == Bug::SwapsGateAndUp {
                            (gate, up) = (up, gate);
                        }
                        gate / (1.0 + (-gate).exp()) * up
                    })
                    .collect();
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum += weight * dot(&down[(expert * hidden + i) * wide..][..wide], &mlp);
                }
            }
            if self.bug == Bug::ReadsEveryExpert {
                sums[0] += 0.0 * down.iter().sum::<f32>();
            }
            if self.bug == Bug::DependsOnRows {
                sums[0] *= 1.0 + f32::EPSILON * io.rows as f32;
            }
            for (out, sum) in out[row * hidden..][..hidden].iter_mut().zip(sums) {
                *out = if self.bug == Bug::Overwrites { sum } else { *out + sum };
            }
        }
        Ok(())
    }
}

/// The names of the trials that fail.
fn failed(bug: Bug) -> Vec<String> {
    let origin = Origin { crate_name: "planted", version: "0.0.0" };
    let backend = RegisteredMoeBackend { origin, priority: 0, backend: Arc::new(Planted(bug)) };
    let trials = moe_suite(&backend, &Device::cpu());
    trials
        .into_iter()
        .filter_map(|trial| {
            let name = trial.name().to_owned();
            trial.run().err().map(|_| name)
        })
        .collect()
}

#[test]
fn a_backend_without_a_bug_passes() {
    assert_eq!(failed(Bug::None), [] as [&str; 0]);
}

#[test]
fn every_bug_is_found() {
    for (bug, trial) in [
        (Bug::Overwrites, "answers/f32-64-40-3-of-8"),
        (Bug::IgnoresWeights, "answers/f32-64-40-3-of-8"),
        (Bug::NextExpert, "answers/f32-64-40-3-of-8"),
        (Bug::SwapsGateAndUp, "answers/f32-16-8-1-of-1"),
        (Bug::ReadsEveryExpert, "answers/f32-128-64-6-of-64"),
        (Bug::DependsOnRows, "bits/f32-64-40-3-of-8"),
        (Bug::TakesAnyRows, "declines"),
        (Bug::DeclinesAll, "declines"),
    ] {
        let failed = failed(bug);
        assert!(failed.iter().any(|name| name == trial), "{bug:?} is not found by {trial}, only by {failed:?}");
    }
}
