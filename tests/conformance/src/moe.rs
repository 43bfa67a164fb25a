//! The kit for backends of mixtures of experts.

use std::process::ExitCode;

use half::{bf16, f16};
use polyattn_api::{Buffer, DType, Device, MoeIo, MoeProblem, RegisteredMoeBackend, Registry};

use crate::{Failure, Trial, trial::run_named};

/// Hidden size, width, experts, experts of a row.
const SHAPES: [[u32; 4]; 5] = [[64, 40, 8, 3], [32, 20, 4, 1], [24, 13, 5, 5], [128, 64, 64, 6], [16, 8, 1, 1]];

/// Rows of a call; the kernel is prepared for the most.
const ROWS: [u32; 4] = [1, 3, 17, 70];

/// Every trial of a backend for mixtures of experts on a device.
///
/// | group | what it asks |
/// |---|---|
/// | `answers` | what the f64 reference answers, onto what stood there, with experts of NaN that nobody chose |
/// | `bits` | a row's bits alone and among others |
/// | `declines` | more rows than it was prepared for are an error |
///
/// Problems that it declines on the device are left out; one that declines all of them fails.
#[must_use]
pub fn moe_suite(backend: &RegisteredMoeBackend, device: &Device) -> Vec<Trial> {
    let mut trials = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for [hidden, wide, experts, per_token] in SHAPES {
            let problem = MoeProblem::new(hidden, wide, experts, per_token, dtype);
            if !backend.declines(&problem, device.facts()).is_empty() {
                continue;
            }
            let name = format!("{dtype}-{hidden}-{wide}-{per_token}-of-{experts}");
            let subject = Subject { backend: backend.clone(), device: device.clone(), problem };
            let (answers, bits) = (subject.clone(), subject);
            trials.push(Trial::new(format!("answers/{name}"), move || answers.answers()));
            trials.push(Trial::new(format!("bits/{name}"), move || bits.bits()));
        }
    }
    let served = !trials.is_empty();
    let problem = MoeProblem::new(SHAPES[0][0], SHAPES[0][1], SHAPES[0][2], SHAPES[0][3], DType::F32);
    let subject = Subject { backend: backend.clone(), device: device.clone(), problem };
    trials.push(Trial::new("declines".into(), move || {
        if !served {
            return Err(Failure::new("it declines every problem of the kit"));
        }
        subject.declines()
    }));
    trials
}

/// Runs [`moe_suite`] for a registered backend, or for `all`, on the CPU and on a GPU where there is one, as a test
/// target without a harness.
#[must_use]
pub fn moe_main(name: &str) -> ExitCode {
    let registry = match Registry::global() {
        Ok(registry) => registry,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    let unknown = format!("unknown MoE backend '{name}'; registered are: {}", registry.moe_backend_names());
    run_named(&registry.moe_backends(), name, |one| one.name(), &unknown, moe_suite)
}

/// A backend and what it is asked.
#[derive(Clone)]
struct Subject {
    backend: RegisteredMoeBackend,
    device: Device,
    problem: MoeProblem,
}

/// One call on the host.
struct Case {
    rows: usize,
    x: Vec<f32>,
    ids: Vec<u32>,
    weights: Vec<f32>,
    gate_up: Vec<f32>,
    down: Vec<f32>,
    out: Vec<f32>,
}

/// Numbers in -1..1, the same ones on every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1 << 23) as f32) - 1.0
    }

    fn vec(&mut self, length: usize) -> Vec<f32> {
        (0..length).map(|_| self.next()).collect()
    }
}

fn failure(error: impl std::fmt::Display) -> Failure {
    Failure::new(error.to_string())
}

fn rounded(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    }
}

impl Subject {
    fn dims(&self) -> [usize; 4] {
        let MoeProblem { hidden_size, intermediate_size, experts, experts_per_token, .. } = self.problem;
        [hidden_size, intermediate_size, experts, experts_per_token].map(|dim| dim as usize)
    }

    fn case(&self, rows: usize) -> Case {
        let [hidden, wide, experts, per_token] = self.dims();
        let mut random = Random(rows as u64 + 1);
        // Rows lean on a few experts, each row's are different ones, and some are nobody's.
        let mut ids: Vec<u32> = Vec::new();
        for row in 0..rows {
            let mut free = vec![true; experts];
            let mut expert = if row % 3 == 0 { 0 } else { row * 7 % experts };
            for _ in 0..per_token {
                while !free[expert] {
                    expert = (expert + 1) % experts;
                }
                free[expert] = false;
                ids.push(expert as u32);
                expert = (expert + 1 + row % 2) % experts;
            }
        }
        let mut of_experts = |elements: usize| {
            let mut values: Vec<f32> =
                random.vec(experts * elements).iter().map(|value| rounded(*value, self.problem.dtype)).collect();
            for expert in (0..experts).filter(|expert| !ids.contains(&(*expert as u32))) {
                values[expert * elements..][..elements].fill(f32::NAN);
            }
            values
        };
        let (gate_up, down) = (of_experts(2 * wide * hidden), of_experts(hidden * wide));
        let (x, out) = (random.vec(rows * hidden), random.vec(rows * hidden));
        Case { rows, x, weights: random.vec(rows * per_token), ids, gate_up, down, out }
    }

    /// `rows` of a case, from `first` on, by a kernel for `most` rows.
    fn run(&self, case: &Case, first: usize, rows: usize, most: u32) -> Result<Vec<f32>, Failure> {
        let [hidden, _, _, per_token] = self.dims();
        let device = &self.device;
        let kernel = self.backend.prepare(device, &self.problem, most).map_err(failure)?;
        let floats = |values: &[f32]| device.upload(values, "moe").map_err(failure);
        let held = |values: &[f32]| -> Result<Buffer, Failure> {
            let narrow: Vec<u16> = match self.problem.dtype {
                DType::F16 => values.iter().map(|value| f16::from_f32(*value).to_bits()).collect(),
                DType::BF16 => values.iter().map(|value| bf16::from_f32(*value).to_bits()).collect(),
                _ => return floats(values),
            };
            device.upload(&narrow, "experts").map_err(failure)
        };
        let (x, out) = (first * hidden..(first + rows) * hidden, first * hidden..(first + rows) * hidden);
        let pairs = first * per_token..(first + rows) * per_token;
        let (x, out) = (floats(&case.x[x])?, floats(&case.out[out])?);
        let ids = device.upload(&case.ids[pairs.clone()], "ids").map_err(failure)?;
        let weights = floats(&case.weights[pairs])?;
        let (gate_up, down) = (held(&case.gate_up)?, held(&case.down)?);
        let (ids, weights) = (ids.whole(), weights.whole());
        let io = MoeIo::new(x.whole(), rows as u32, ids, weights, &gate_up, &down, out.whole());
        let mut commands = device.commands().map_err(failure)?;
        kernel.encode(&mut commands, &io).map_err(failure)?;
        let _ = commands.submit().map_err(failure)?;
        device.download::<f32>(&out).map_err(failure)
    }

    fn answers(&self) -> Result<(), Failure> {
        let [hidden, wide, _, per_token] = self.dims();
        for rows in ROWS {
            let case = self.case(rows as usize);
            let found = self.run(&case, 0, case.rows, ROWS[3])?;
            for row in 0..case.rows {
                let x = &case.x[row * hidden..][..hidden];
                let mut want: Vec<f64> = case.out[row * hidden..][..hidden].iter().map(|out| f64::from(*out)).collect();
                for pair in row * per_token..(row + 1) * per_token {
                    let expert = case.ids[pair] as usize;
                    let dot = |weights: &[f32], x: &dyn Fn(usize) -> f64| -> f64 {
                        weights.iter().enumerate().map(|(i, weight)| f64::from(*weight) * x(i)).sum()
                    };
                    let gate_up = &case.gate_up[expert * 2 * wide * hidden..][..2 * wide * hidden];
                    let (gates, ups) = gate_up.split_at(wide * hidden);
                    let of_x = |i: usize| f64::from(x[i]);
                    let mlp: Vec<f64> = gates
                        .chunks_exact(hidden)
                        .zip(ups.chunks_exact(hidden))
                        .map(|(gate, up)| {
                            let gate = dot(gate, &of_x);
                            gate / (1.0 + (-gate).exp()) * dot(up, &of_x)
                        })
                        .collect();
                    let down = &case.down[expert * hidden * wide..][..hidden * wide];
                    for (want, weights) in want.iter_mut().zip(down.chunks_exact(wide)) {
                        *want += f64::from(case.weights[pair]) * dot(weights, &|i| mlp[i]);
                    }
                }
                let scale = want.iter().fold(1.0f64, |most, value| most.max(value.abs()));
                for (place, (found, want)) in found[row * hidden..][..hidden].iter().zip(&want).enumerate() {
                    let error = (f64::from(*found) - want).abs();
                    // NaN is no small error.
                    if error.is_nan() || error > 1e-4 * scale {
                        let message = format!("element {place} of row {row} of {rows} is {found}, expected {want}");
                        return Err(Failure::new(message));
                    }
                }
            }
        }
        Ok(())
    }

    fn bits(&self) -> Result<(), Failure> {
        let [hidden, ..] = self.dims();
        let case = self.case(17);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let all = self.run(&case, 0, case.rows, ROWS[3])?;
        for row in [0, 1, 16] {
            let alone = self.run(&case, row, 1, 1)?;
            if bits(&alone) != bits(&all[row * hidden..][..hidden]) {
                return Err(Failure::new(format!("row {row} has other bits alone than among {} rows", case.rows)));
            }
        }
        Ok(())
    }

    fn declines(&self) -> Result<(), Failure> {
        let case = self.case(3);
        match self.run(&case, 0, 3, 2) {
            Err(_) => Ok(()),
            Ok(_) => Err(Failure::new("it takes 3 rows, prepared for 2")),
        }
    }
}
