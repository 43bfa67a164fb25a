//! Products by head and by expert, and what stands around those of experts, against f64 on the host.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{Random, devices, floats, poison};
use half::{bf16, f16};
use polyattn_device::{Buffer, Commands, DType, Device};
use polyattn_nn::{
    load::{ExpertChoice, RopePairing},
    ops::{
        self, CombineCall, ExpertOrder, ExpertsCall, HeadsCall, Matrix, Norm, OpError, RopeCall, RopeTable, RouteCall,
        Vector,
    },
};

fn below(random: &mut Random, count: usize) -> usize {
    (((random.next() + 1.0) / 2.0 * count as f32) as usize).min(count - 1)
}

fn matrix(device: &Device, dtype: DType, rows: usize, cols: usize, random: &mut Random) -> (Matrix, Vec<f64>) {
    let data = random.vec(rows * cols);
    let (buffer, values) = match dtype {
        DType::F32 => (floats(device, &data), data.iter().map(|value| f64::from(*value)).collect()),
        DType::F16 => {
            let narrow: Vec<f16> = data.iter().map(|value| f16::from_f32(*value)).collect();
            (device.upload(&narrow, "f16").unwrap(), narrow.iter().map(|value| value.to_f64()).collect())
        }
        _ => {
            let narrow: Vec<bf16> = data.iter().map(|value| bf16::from_f32(*value)).collect();
            (device.upload(&narrow, "bf16").unwrap(), narrow.iter().map(|value| value.to_f64()).collect())
        }
    };
    (Matrix { buffer, rows: rows as u32, cols: cols as u32, dtype }, values)
}

fn run(device: &Device, record: impl FnOnce(&mut Commands) -> Result<(), OpError>) {
    let mut commands = device.commands().unwrap();
    record(&mut commands).unwrap();
    let _ = commands.submit().unwrap();
}

fn read(device: &Device, buffer: &Buffer) -> Vec<f32> {
    device.download::<f32>(buffer).unwrap()
}

#[track_caller]
fn close(what: &str, found: f32, expected: f64, scale: f64) {
    let error = (f64::from(found) - expected).abs();
    assert!(error <= 1e-5 * scale, "{what}: {found}, expected {expected}");
}

/// The outputs of one matrix for one row, gated or not.
fn answers(x: &[f32], weights: &[f64], gated: bool) -> Vec<f64> {
    let sums: Vec<f64> =
        weights.chunks(x.len()).map(|row| row.iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum()).collect();
    if !gated {
        return sums;
    }
    let (gates, ups) = sums.split_at(sums.len() / 2);
    gates.iter().zip(ups).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect()
}

#[test]
fn products_by_head() {
    for device in devices() {
        let mut random = Random(3);
        for (dtype, cols, outputs, heads, gated) in [
            (DType::F32, 16, 32, 2, false),
            (DType::F16, 128, 64, 3, false),
            (DType::BF16, 13, 5, 4, false),
            (DType::F16, 24, 10, 1, true),
            (DType::BF16, 576, 33, 2, true),
            (DType::F32, 8, 1, 70, false),
        ] {
            for rows in [1usize, 3, 16, 17, 70] {
                let parts = if gated { 2 } else { 1 };
                let (matrices, first) = (heads + 2, 1);
                let (weight, values) = matrix(&device, dtype, matrices * outputs * parts, cols, &mut random);
                let (x_stride, out_stride) = (cols + if rows == 3 { 3 } else { 8 }, outputs + 5);
                let x = random.vec(rows * heads * x_stride);
                let (x_buffer, out) = (floats(&device, &x), poison(&device, rows * heads * out_stride));
                let call = HeadsCall {
                    x: x_buffer.whole(),
                    rows: rows as u32,
                    weight: &weight,
                    matrices: matrices as u32,
                    first: first as u32,
                    heads: heads as u32,
                    x_stride: x_stride as u32,
                    gated,
                    out: out.whole(),
                    out_stride: out_stride as u32,
                };
                run(&device, |commands| ops::linear_by_head(commands, &call));
                let found = read(&device, &out);
                let name = format!("{dtype} {heads} heads {cols} -> {outputs}, {rows} rows, {}", device.facts().name);
                for (part, found) in found.chunks(out_stride).enumerate() {
                    let (x, head) = (&x[part * x_stride..][..cols], first + part % heads);
                    let size = outputs * parts * cols;
                    let want = answers(x, &values[head * size..][..size], gated);
                    found.iter().zip(want).for_each(|(found, want)| close(&name, *found, want, cols as f64));
                    assert!(found[outputs..].iter().all(|value| value.is_nan()), "{name}: wrote between the parts");
                }

                // A row alone has the same bits.
                let alone = poison(&device, heads * out_stride);
                let last = x_buffer.slice(0, (heads * x_stride * 4) as u64).unwrap();
                let one = HeadsCall { x: last, rows: 1, out: alone.whole(), ..call };
                run(&device, |commands| ops::linear_by_head(commands, &one));
                for (part, one) in read(&device, &alone).chunks(out_stride).enumerate() {
                    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&one[..outputs]), bits(&found[part * out_stride..][..outputs]), "{name}");
                }
            }
        }
    }
}

/// Matrices that together exceed one binding of 128 MiB, where a device has no larger ones: each is bound for itself, and
/// begins between two offsets that may be bound.
#[test]
fn matrices_beyond_one_binding() {
    for device in devices() {
        let (cols, outputs, matrices) = (1000usize, 24_001usize, 3usize);
        let data: Vec<f16> = (0..matrices * outputs * cols).map(|i| f16::from_f32((i % 251) as f32 / 251.0)).collect();
        let buffer = device.upload(&data, "matrices").unwrap();
        let weight = Matrix { buffer, rows: (matrices * outputs) as u32, cols: cols as u32, dtype: DType::F16 };
        let x = Random(15).vec(cols);
        let (x_buffer, out) = (floats(&device, &x), poison(&device, outputs));
        for first in 0..matrices {
            let call = HeadsCall {
                x: x_buffer.whole(),
                rows: 1,
                weight: &weight,
                matrices: matrices as u32,
                first: first as u32,
                heads: 1,
                x_stride: cols as u32,
                gated: false,
                out: out.whole(),
                out_stride: outputs as u32,
            };
            run(&device, |commands| ops::linear_by_head(commands, &call));
            let found = read(&device, &out);
            for output in [0, 1, 12_345, outputs - 1] {
                let row = &data[(first * outputs + output) * cols..][..cols];
                let want = row.iter().zip(&x).map(|(weight, x)| weight.to_f64() * f64::from(*x)).sum();
                close(&format!("matrix {first}, {}", device.facts().name), found[output], want, cols as f64);
            }
        }
    }
}

/// Rows, experts, experts of a row, columns, outputs, dtype; ids are random, so that some experts serve nobody.
#[test]
fn products_by_expert() {
    for device in devices() {
        let mut random = Random(5);
        for (rows, experts, per_token, cols, outputs, dtype, gated) in [
            (1usize, 8usize, 3usize, 32usize, 24usize, DType::F32, true),
            (8, 64, 6, 64, 40, DType::F16, true),
            (33, 5, 2, 40, 7, DType::BF16, false),
            (130, 4, 3, 24, 16, DType::F16, false),
            (3, 300, 8, 13, 9, DType::F32, true),
            (70, 2, 1, 8, 4, DType::F32, false),
        ] {
            let parts = if gated { 2 } else { 1 };
            let (weight, values) = matrix(&device, dtype, experts * outputs * parts, cols, &mut random);
            let pairs = rows * per_token;
            let ids: Vec<u32> = (0..pairs).map(|_| below(&mut random, experts) as u32).collect();
            let memory = ExpertOrder::new(&device, pairs as u32 + 5).unwrap();
            for share in [per_token, 1] {
                let x = random.vec(pairs / share * cols);
                let (x_buffer, out) = (floats(&device, &x), poison(&device, pairs * outputs));
                let id_buffer = device.upload(&ids, "ids").unwrap();
                run(&device, |commands| {
                    let (pairs, experts) = (pairs as u32, experts as u32);
                    let rows = ops::sort_by_expert(commands, id_buffer.whole(), pairs, experts, &memory)?;
                    let (x, out, share) = (x_buffer.whole(), out.whole(), share as u32);
                    let call = ExpertsCall { x, share, weight: &weight, rows: &rows, gated, out };
                    ops::linear_by_expert(commands, &call)
                });
                let name = format!("{dtype} {rows} rows, {per_token} of {experts}, {}", device.facts().name);
                for (pair, found) in read(&device, &out).chunks(outputs).enumerate() {
                    let size = outputs * parts * cols;
                    let x = &x[pair / share * cols..][..cols];
                    let want = answers(x, &values[ids[pair] as usize * size..][..size], gated);
                    found.iter().zip(want).for_each(|(found, want)| close(&name, *found, want, cols as f64));
                }
            }
        }
    }
}

/// The published rule, in f64.
fn routed(scores: &[f32], choice: ExpertChoice, per_token: usize, normalize: bool, scale: f64) -> Vec<(u32, f64)> {
    let most = scores.iter().copied().fold(f32::MIN, f32::max);
    let sum: f64 = scores.iter().map(|score| f64::from(score - most).exp()).sum();
    let shares: Vec<f64> = scores.iter().map(|score| f64::from(score - most).exp() / sum).collect();
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| shares[*b].total_cmp(&shares[*a]));
    if let ExpertChoice::GroupLimited { groups, chosen } = choice {
        let size = scores.len() / groups as usize;
        let mut best: Vec<usize> = Vec::new();
        for expert in &order {
            if !best.contains(&(expert / size)) && best.len() < chosen as usize {
                best.push(expert / size);
            }
        }
        order.retain(|expert| best.contains(&(expert / size)));
    }
    order.truncate(per_token);
    let total: f64 = order.iter().map(|expert| shares[*expert]).sum();
    order.iter().map(|e| (*e as u32, if normalize { shares[*e] / total } else { shares[*e] * scale })).collect()
}

#[test]
fn routes() {
    let limited = |groups, chosen| ExpertChoice::GroupLimited { groups, chosen };
    for device in devices() {
        let mut random = Random(7);
        for (rows, experts, per_token, choice, normalize) in [
            (5usize, 8usize, 3usize, ExpertChoice::Greedy, false),
            (70, 64, 6, ExpertChoice::Greedy, true),
            (3, 160, 6, limited(8, 3), false),
            (4, 300, 8, limited(100, 5), true),
            (2, 1, 1, ExpertChoice::Greedy, false),
        ] {
            let scores: Vec<f32> = random.vec(rows * experts).iter().map(|score| score * 5.0).collect();
            let pairs = rows * per_token;
            let (ids, weights) = (device.upload(&vec![u32::MAX; pairs], "ids").unwrap(), poison(&device, pairs));
            let score_buffer = floats(&device, &scores);
            let call = RouteCall {
                scores: score_buffer.whole(),
                rows: rows as u32,
                experts: experts as u32,
                per_token: per_token as u32,
                choice,
                normalize,
                scale: 1.5,
                ids: ids.whole(),
                weights: weights.whole(),
            };
            run(&device, |commands| ops::route(commands, &call));
            let (ids, weights) = (device.download::<u32>(&ids).unwrap(), read(&device, &weights));
            for row in 0..rows {
                let want = routed(&scores[row * experts..][..experts], choice, per_token, normalize, 1.5);
                for (place, (id, weight)) in want.into_iter().enumerate() {
                    let name = format!("row {row} of {per_token} of {experts}, {}", device.facts().name);
                    assert_eq!(ids[row * per_token + place], id, "{name}");
                    close(&name, weights[row * per_token + place], weight, 1.0);
                }
            }
        }

        // Ties go to the first, and NaN shows in the weights without leaving the experts.
        let scores = floats(&device, &[1.0, 2.0, 2.0, 2.0, f32::NAN, 0.0, 0.0, 0.0]);
        let (ids, weights) = (device.upload(&[9u32; 4], "ids").unwrap(), poison(&device, 4));
        let call = RouteCall {
            scores: scores.whole(),
            rows: 2,
            experts: 4,
            per_token: 2,
            choice: ExpertChoice::Greedy,
            normalize: false,
            scale: 1.0,
            ids: ids.whole(),
            weights: weights.whole(),
        };
        run(&device, |commands| ops::route(commands, &call));
        let ids = device.download::<u32>(&ids).unwrap();
        assert!(ids[..2] == [1, 2] && ids[2..].iter().all(|id| *id < 4), "{ids:?}");
        assert!(read(&device, &weights)[2..].iter().all(|weight| weight.is_nan()));
    }
}

#[test]
fn answers_are_combined() {
    for device in devices() {
        let mut random = Random(9);
        let (rows, per_token, cols) = (5usize, 3usize, 70usize);
        let weights = random.vec(rows * per_token);
        // No row chooses an expert twice.
        let ids: Vec<u32> =
            (0..rows * per_token).map(|pair| (pair % per_token) as u32 * 2 + (pair / 7) as u32 % 2).collect();
        let old = random.vec(rows * cols);
        for expert in [None, Some(3), Some(40)] {
            let held = if expert.is_some() { rows } else { rows * per_token };
            let mut answers = random.vec(held * cols);
            if let Some(expert) = expert {
                // Rows that did not choose the expert may hold anything.
                for row in (0..rows).filter(|row| !ids[row * per_token..][..per_token].contains(&expert)) {
                    answers[row * cols..][..cols].fill(f32::NAN);
                }
            }
            let (answer_buffer, weight_buffer) = (floats(&device, &answers), floats(&device, &weights));
            let (id_buffer, out) = (device.upload(&ids, "ids").unwrap(), floats(&device, &old));
            let call = CombineCall {
                answers: answer_buffer.whole(),
                ids: id_buffer.whole(),
                weights: weight_buffer.whole(),
                rows: rows as u32,
                per_token: per_token as u32,
                cols: cols as u32,
                expert,
                out: out.whole(),
            };
            run(&device, |commands| ops::combine(commands, &call));
            for (i, found) in read(&device, &out).into_iter().enumerate() {
                let (row, col) = (i / cols, i % cols);
                let pairs = row * per_token..(row + 1) * per_token;
                let sum: f64 = pairs
                    .filter(|pair| expert.is_none_or(|expert| ids[*pair] == expert))
                    .map(|pair| {
                        let at = if expert.is_some() { row } else { pair } * cols + col;
                        f64::from(weights[pair]) * f64::from(answers[at])
                    })
                    .sum();
                close(&format!("{expert:?} {i} {}", device.facts().name), found, f64::from(old[i]) + sum, 1.0);
            }
        }
    }
}

/// A row of the latent cache: a norm of the latent, a rotation of what follows it.
#[test]
fn norms_and_rotations_of_a_part() {
    for device in devices() {
        let mut random = Random(11);
        for pairing in [RopePairing::Interleaved, RopePairing::HalfSplit] {
            let (rows, latent, rope, stride) = (7usize, 22usize, 8usize, 33usize);
            let (x, weight) = (random.vec(rows * stride), random.vec(latent));
            let inv_freq = [1.0, 0.1, 0.01, 0.001];
            let table = RopeTable::new(&device, &inv_freq, 64).unwrap().from_element(latent as u32);
            let buffer = floats(&device, &x);
            let norm = Vector { buffer: floats(&device, &weight), len: latent as u32 };
            let at: Vec<u32> = (0..rows as u32).map(|row| row * 5).collect();
            let positions = device.upload(&at, "positions").unwrap();
            run(&device, |commands| {
                let call = RopeCall {
                    qkv: buffer.whole(),
                    offset: 0,
                    stride: stride as u32,
                    rows: rows as u32,
                    query_heads: 0,
                    kv_heads: 1,
                    head_dim: (latent + rope) as u32,
                    parts: None,
                    q_norm: None,
                    k_norm: Some(Norm { weight: &norm, eps: 1e-5 }),
                    table: &table,
                    pairing,
                    positions: positions.whole(),
                    q_out: buffer.whole(),
                    q_dtype: DType::F32,
                };
                ops::rope(commands, &call)
            });
            for (row, (found, x)) in read(&device, &buffer).chunks(stride).zip(x.chunks(stride)).enumerate() {
                let name = format!("{pairing:?} row {row} {}", device.facts().name);
                let mean = x[..latent].iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / latent as f64;
                for i in 0..latent {
                    let want = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
                    close(&name, found[i], want, 1.0);
                }
                for (pair, frequency) in inv_freq.iter().enumerate() {
                    let (a, b) = match pairing {
                        RopePairing::Interleaved => (latent + 2 * pair, latent + 2 * pair + 1),
                        _ => (latent + pair, latent + pair + rope / 2),
                    };
                    let (sin, cos) = (f64::from(at[row]) * frequency).sin_cos();
                    let (first, second) = (f64::from(x[a]), f64::from(x[b]));
                    close(&name, found[a], first * cos - second * sin, 2.0);
                    close(&name, found[b], second * cos + first * sin, 2.0);
                }
                assert_eq!(found[latent + rope..], x[latent + rope..], "{name}: what follows the row changed");
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = Device::cpu();
    let mut random = Random(13);
    let (weight, _) = matrix(&device, DType::F32, 12, 8, &mut random);
    let buffer = floats(&device, &[0.0; 64]);
    let out = floats(&device, &[0.0; 64]);
    let mut commands = device.commands().unwrap();
    let call = HeadsCall {
        x: buffer.whole(),
        rows: 1,
        weight: &weight,
        matrices: 3,
        first: 0,
        heads: 3,
        x_stride: 8,
        gated: false,
        out: out.whole(),
        out_stride: 4,
    };
    ops::linear_by_head(&mut commands, &call).unwrap();
    for wrong in [
        HeadsCall { matrices: 5, ..call },
        HeadsCall { matrices: 4, gated: true, ..call },
        HeadsCall { first: 1, ..call },
        HeadsCall { heads: 0, ..call },
        HeadsCall { x_stride: 7, ..call },
        HeadsCall { out_stride: 3, ..call },
        HeadsCall { rows: 3, ..call },
        HeadsCall { rows: u32::MAX, ..call },
    ] {
        let error = ops::linear_by_head(&mut commands, &wrong).unwrap_err();
        assert!(matches!(error, OpError::Shape(_)), "{error}");
    }
    let memory = ExpertOrder::new(&device, 4).unwrap();
    for (pairs, experts) in [(5, 3), (4, 0), (4, ops::MOST_EXPERTS + 1)] {
        ops::sort_by_expert(&mut commands, buffer.whole(), pairs, experts, &memory).unwrap_err();
    }
}
