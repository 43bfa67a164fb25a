//! Every operation against f64 on the host, on the CPU and, where there is an adapter, on a GPU.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{Random, devices, floats, poison};
use half::{bf16, f16};
use polyattn_api::HeadPart;
use polyattn_device::{DType, Device};
use polyattn_nn::{
    load::RopePairing,
    ops::{self, LinearCall, Matrix, Norm, OpError, RopeCall, RopeTable, SwigluCall, Vector},
};

fn vector(device: &Device, data: &[f32]) -> Vector {
    Vector { buffer: floats(device, data), len: data.len() as u32 }
}

/// A matrix of the dtype, and what its elements are once rounded.
fn matrix(device: &Device, dtype: DType, rows: usize, cols: usize, data: &[f32]) -> (Matrix, Vec<f32>) {
    let (buffer, values) = match dtype {
        DType::F32 => (floats(device, data), data.to_vec()),
        DType::F16 => {
            let narrow: Vec<f16> = data.iter().map(|value| f16::from_f32(*value)).collect();
            (device.upload(&narrow, "f16").unwrap(), narrow.iter().map(|value| value.to_f32()).collect())
        }
        _ => {
            let narrow: Vec<bf16> = data.iter().map(|value| bf16::from_f32(*value)).collect();
            (device.upload(&narrow, "bf16").unwrap(), narrow.iter().map(|value| value.to_f32()).collect())
        }
    };
    (Matrix { buffer, rows: rows as u32, cols: cols as u32, dtype }, values)
}

fn run(device: &Device, record: impl FnOnce(&mut polyattn_device::Commands) -> Result<(), OpError>) {
    let mut commands = device.commands().unwrap();
    record(&mut commands).unwrap();
    let _ = commands.submit().unwrap();
}

#[track_caller]
fn close(what: &str, found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1e-3f64, |most, value| most.max(value.abs()));
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        // NaN is no small error.
        assert!(error <= tolerance * scale, "{what}: element {i} is {found}, expected {expected}");
    }
}

fn normed(x: &[f32], weight: &[f32], eps: f32) -> Vec<f64> {
    x.chunks(weight.len().max(1))
        .flat_map(|row| {
            let mean = row.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>() / row.len() as f64;
            let scale = 1.0 / (mean + f64::from(eps)).sqrt();
            row.iter().zip(weight).map(move |(value, weight)| f64::from(*value) * scale * f64::from(*weight))
        })
        .collect()
}

fn product(x: &[f64], weights: &[f32], cols: usize) -> Vec<f64> {
    x.chunks(cols)
        .flat_map(|row| {
            weights.chunks(cols).map(|weights| row.iter().zip(weights).map(|(x, w)| x * f64::from(*w)).sum())
        })
        .collect()
}

const ROWS: [usize; 9] = [1, 2, 3, 7, 16, 17, 64, 65, 130];

/// Options of a product by bits of a counter: norm, bias, accumulate.
fn flag(counter: usize, bit: usize) -> bool {
    counter >> bit & 1 == 1
}

#[test]
fn linear() {
    for device in devices() {
        let mut random = Random(1);
        let mut counter = 0;
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for cols in [8, 24, 64, 100, 576, 13] {
                for outputs in [1, 5, 64, 100] {
                    let data = random.vec(outputs * cols);
                    let (weight, weights) = matrix(&device, dtype, outputs, cols, &data);
                    let (norm, bias) = (random.vec(cols), random.vec(outputs));
                    let (norm_vector, bias_vector) = (vector(&device, &norm), vector(&device, &bias));
                    for rows in ROWS {
                        // All combinations would take minutes on a software GPU; this meets each flag with each size.
                        counter += 1;
                        if !device.is_cpu() && rows > 17 && cols != 576 && counter % 3 != 0 {
                            continue;
                        }
                        let (has_norm, has_bias, accumulate) = (flag(counter, 0), flag(counter, 1), flag(counter, 2));
                        let x = random.vec(rows * cols);
                        let old = random.vec(rows * outputs);
                        let x_buffer = floats(&device, &x);
                        let out = if accumulate { floats(&device, &old) } else { poison(&device, rows * outputs) };
                        let call = LinearCall {
                            x: x_buffer.whole(),
                            rows: rows as u32,
                            weight: &weight,
                            norm: has_norm.then_some(Norm { weight: &norm_vector, eps: 1e-5 }),
                            bias: has_bias.then_some(&bias_vector),
                            out: out.whole(),
                            accumulate,
                        };
                        run(&device, |commands| ops::linear(commands, &call));
                        let x = if has_norm {
                            normed(&x, &norm, 1e-5)
                        } else {
                            x.iter().map(|value| f64::from(*value)).collect()
                        };
                        let mut expected = product(&x, &weights, cols);
                        for (i, value) in expected.iter_mut().enumerate() {
                            *value += if has_bias { f64::from(bias[i % outputs]) } else { 0.0 };
                            *value += if accumulate { f64::from(old[i]) } else { 0.0 };
                        }
                        let what = format!("{device:?} {dtype} {rows} × {cols} → {outputs}, {counter:b}");
                        close(&what, &device.download(&out).unwrap(), &expected, 1e-5);
                    }
                }
            }
        }
    }
}

#[test]
fn swiglu() {
    for device in devices() {
        let mut random = Random(2);
        let mut counter = 0;
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (cols, outputs) in [(8, 1), (24, 5), (100, 64), (576, 100)] {
                let data = random.vec(2 * outputs * cols);
                let (gate_up, weights) = matrix(&device, dtype, 2 * outputs, cols, &data);
                let norm = random.vec(cols);
                let norm_vector = vector(&device, &norm);
                for rows in ROWS {
                    counter += 1;
                    let has_norm = flag(counter, 0);
                    let x = random.vec(rows * cols);
                    let x_buffer = floats(&device, &x);
                    let out = poison(&device, rows * outputs);
                    let call = SwigluCall {
                        x: x_buffer.whole(),
                        rows: rows as u32,
                        gate_up: &gate_up,
                        norm: has_norm.then_some(Norm { weight: &norm_vector, eps: 1e-6 }),
                        out: out.whole(),
                    };
                    run(&device, |commands| ops::swiglu(commands, &call));
                    let x = if has_norm {
                        normed(&x, &norm, 1e-6)
                    } else {
                        x.iter().map(|value| f64::from(*value)).collect()
                    };
                    let expected: Vec<f64> = product(&x, &weights, cols)
                        .chunks(2 * outputs)
                        .flat_map(|row| {
                            let (gate, up) = row.split_at(outputs);
                            gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>()
                        })
                        .collect();
                    let what = format!("{device:?} {dtype} {rows} × {cols} → {outputs}");
                    close(&what, &device.download(&out).unwrap(), &expected, 2e-5);
                }
            }
        }
    }
}

#[test]
fn large_gates_stay_finite() {
    for device in devices() {
        let x = floats(&device, &[1.0; 8]);
        for gate in [-1000.0, -200.0, -88.0, 88.0, 1000.0f32] {
            let mut data = [0.0; 16];
            (data[0], data[8]) = (gate, 1.0);
            let (gate_up, _) = matrix(&device, DType::F32, 2, 8, &data);
            let out = poison(&device, 1);
            let call = SwigluCall { x: x.whole(), rows: 1, gate_up: &gate_up, norm: None, out: out.whole() };
            run(&device, |commands| ops::swiglu(commands, &call));
            let found: Vec<f32> = device.download(&out).unwrap();
            assert!((found[0] - gate.max(0.0)).abs() < 1e-30, "{device:?} {gate}: {found:?}");
        }
    }
}

/// A row's bits do not depend on the rows beside it: verification relies on it.
#[test]
fn rows_are_invariant() {
    for device in devices() {
        let mut random = Random(3);
        let shapes = [(576, 40, DType::F16), (1536, 20, DType::F16), (100, 12, DType::F32), (64, 2100, DType::BF16)];
        for (cols, outputs, dtype) in shapes {
            let data = random.vec(outputs * cols);
            let (weight, _) = matrix(&device, dtype, outputs, cols, &data);
            let (norm, bias) = (vector(&device, &random.vec(cols)), vector(&device, &random.vec(outputs)));
            let x = random.vec(64 * cols);
            let old = random.vec(64 * outputs);
            let compute = |first: usize, rows: usize, gated: bool| -> Vec<u32> {
                let x = floats(&device, &x[first * cols..(first + rows) * cols]);
                let norm = Some(Norm { weight: &norm, eps: 1e-5 });
                let (x, rows) = (x.whole(), rows as u32);
                if gated {
                    let out = poison(&device, rows as usize * outputs / 2);
                    let call = SwigluCall { x, rows, gate_up: &weight, norm, out: out.whole() };
                    run(&device, |commands| ops::swiglu(commands, &call));
                    device.download(&out).unwrap()
                } else {
                    let out = floats(&device, &old[first * outputs..(first + rows as usize) * outputs]);
                    let (bias, out_slice) = (Some(&bias), out.whole());
                    let call = LinearCall { x, rows, weight: &weight, norm, bias, out: out_slice, accumulate: true };
                    run(&device, |commands| ops::linear(commands, &call));
                    device.download(&out).unwrap()
                }
            };
            for gated in [false, true] {
                let width = if gated { outputs / 2 } else { outputs };
                let single: Vec<u32> = (0..64).flat_map(|row| compute(row, 1, gated)).collect();
                for (first, rows) in
                    [(0, 2), (1, 3), (5, 4), (8, 5), (3, 8), (2, 13), (0, 16), (16, 17), (7, 33), (0, 64)]
                {
                    let found = compute(first, rows, gated);
                    assert!(
                        found == single[first * width..(first + rows) * width],
                        "{device:?} {dtype} {cols} → {outputs}, gated {gated}: rows {first}.. of {rows}"
                    );
                }
            }
        }
    }
}

#[test]
fn embed_and_norm() {
    for device in devices() {
        let mut random = Random(4);
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (table_rows, cols) in [(1, 8), (50, 100), (7, 33), (300, 576)] {
                let data = random.vec(table_rows * cols);
                let (table, values) = matrix(&device, dtype, table_rows, cols, &data);
                for rows in [1, 2, 17, 130] {
                    // The last one lies beyond the table.
                    let ids: Vec<u32> = (0..rows as u32)
                        .map(|row| if row + 1 == rows as u32 { u32::MAX } else { row * 31 % table_rows as u32 })
                        .collect();
                    let id_buffer = device.upload(&ids, "ids").unwrap();
                    let (out, out_normed) = (poison(&device, rows * cols), poison(&device, rows * cols));
                    let norm = random.vec(cols);
                    let norm_vector = vector(&device, &norm);
                    run(&device, |commands| {
                        ops::embed(commands, &table, id_buffer.whole(), rows as u32, out.whole())?;
                        let norm = Norm { weight: &norm_vector, eps: 1e-5 };
                        ops::rms_norm(commands, out.whole(), norm, rows as u32, out_normed.whole())
                    });
                    let expected: Vec<f32> = ids
                        .iter()
                        .flat_map(|id| {
                            let row = (*id as usize).min(table_rows - 1);
                            values[row * cols..(row + 1) * cols].to_vec()
                        })
                        .collect();
                    assert_eq!(device.download::<f32>(&out).unwrap(), expected, "{device:?} {dtype}");
                    let found = device.download::<f32>(&out_normed).unwrap();
                    close("rms_norm", &found, &normed(&expected, &norm, 1e-5), 1e-6);
                }
            }
        }
    }
}

#[test]
fn rope() {
    for device in devices() {
        let mut random = Random(5);
        let mut counter = 0;
        for (head_dim, dim) in [(64, 64), (64, 16), (128, 128), (6, 6), (6, 2), (300, 200)] {
            for pairing in [RopePairing::Interleaved, RopePairing::HalfSplit] {
                for (query_heads, kv_heads) in [(9, 3), (0, 2), (1, 0)] {
                    for (rows, q_dtype) in [(1, DType::F32), (3, DType::F16), (17, DType::BF16)] {
                        counter += 1;
                        let (has_q, has_k) = (flag(counter, 0), flag(counter, 1));
                        let offset = if flag(counter, 2) { 10 } else { 0 };
                        // Queries among the keys, or in two parts elsewhere; norms of a head or of its first elements.
                        let (apart, front) = (flag(counter, 4), head_dim / 3);
                        let inside = if apart { 0 } else { query_heads };
                        let (q_normed, k_normed) = if flag(counter, 5) { (front, 1) } else { (head_dim, head_dim) };
                        let stride = offset + (inside + 2 * kv_heads) * head_dim + if flag(counter, 3) { 5 } else { 0 };
                        let frequencies: Vec<f64> =
                            (0..dim / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / dim as f64)).collect();
                        let table = RopeTable::new(&device, &frequencies, 500).unwrap();
                        // The last position lies beyond the table.
                        let positions: Vec<u32> =
                            (0..rows).map(|row| if row == 16 { 7000 } else { row * 29 }).collect();
                        let position_buffer = device.upload(&positions, "positions").unwrap();
                        let rows = rows as usize;
                        let qkv = random.vec(rows * stride);
                        let qkv_buffer = floats(&device, &qkv);
                        let q_width = query_heads * head_dim;
                        let q_bytes = (rows * q_width) as u64 * q_dtype.bytes();
                        let q_out = device.upload(&vec![0xffu8; q_bytes as usize], "q").unwrap();
                        let (q_weight, k_weight) = (random.vec(q_normed), random.vec(k_normed));
                        let part_stride = head_dim + 3;
                        let parts = [7, 8].map(|_| random.vec((rows * query_heads + 1) * part_stride));
                        let part_buffers = parts.each_ref().map(|part| floats(&device, part));
                        let part = |at: usize, offset, dim| HeadPart {
                            rows: part_buffers[at].whole(),
                            offset,
                            stride: part_stride as u32,
                            dim: dim as u32,
                        };
                        let (q_vector, k_vector) = (vector(&device, &q_weight), vector(&device, &k_weight));
                        let call = RopeCall {
                            qkv: qkv_buffer.whole(),
                            offset: offset as u32,
                            stride: stride as u32,
                            rows: rows as u32,
                            query_heads: query_heads as u32,
                            kv_heads: kv_heads as u32,
                            head_dim: head_dim as u32,
                            parts: apart.then_some([part(0, 0, front), part(1, 2, head_dim - front)]),
                            q_norm: has_q.then_some(Norm { weight: &q_vector, eps: 1e-5 }),
                            k_norm: has_k.then_some(Norm { weight: &k_vector, eps: 1e-6 }),
                            table: &table,
                            pairing,
                            positions: position_buffer.whole(),
                            q_out: q_out.whole(),
                            q_dtype,
                        };
                        run(&device, |commands| ops::rope(commands, &call));

                        let mut expected_q = Vec::new();
                        let mut expected: Vec<f64> = qkv.iter().map(|value| f64::from(*value)).collect();
                        for (row, position) in positions.iter().enumerate() {
                            for head in 0..query_heads + kv_heads {
                                let query = head < query_heads;
                                let place = if query { head } else { head + inside - query_heads };
                                let start = row * stride + offset + place * head_dim;
                                let x = if query && apart {
                                    let at = (row * query_heads + head) * part_stride;
                                    [&parts[0][at..][..front], &parts[1][at + 2..][..head_dim - front]].concat()
                                } else {
                                    qkv[start..start + head_dim].to_vec()
                                };
                                let (weight, eps) = match (query, has_q, has_k) {
                                    (true, true, _) => (&q_weight[..], 1e-5),
                                    (false, _, true) => (&k_weight[..], 1e-6),
                                    _ => (&[][..], 1.0),
                                };
                                let (first, rest) = x.split_at(weight.len());
                                let mut x = normed(first, weight, eps);
                                x.extend(rest.iter().map(|value| f64::from(*value)));
                                let mut turned = x.clone();
                                for (pair, frequency) in frequencies.iter().enumerate() {
                                    let (sin, cos) = (f64::from((*position).min(499)) * frequency).sin_cos();
                                    let (a, b) = match pairing {
                                        RopePairing::Interleaved => (2 * pair, 2 * pair + 1),
                                        _ => (pair, pair + dim / 2),
                                    };
                                    turned[a] = x[a] * cos - x[b] * sin;
                                    turned[b] = x[b] * cos + x[a] * sin;
                                }
                                if query {
                                    expected_q.extend(turned);
                                } else {
                                    expected[start..start + head_dim].copy_from_slice(&turned);
                                }
                            }
                        }
                        let what = format!("{device:?} {head_dim}/{dim} {pairing:?} {query_heads} {kv_heads} {rows}");
                        close(&what, &device.download(&qkv_buffer).unwrap(), &expected, 1e-5);
                        let (found, tolerance) = match q_dtype {
                            DType::F32 => (device.download::<f32>(&q_out).unwrap(), 1e-5),
                            DType::F16 => {
                                let found = device.download::<f16>(&q_out).unwrap();
                                (found.iter().map(|value| value.to_f32()).collect(), 1e-3)
                            }
                            _ => {
                                let found = device.download::<bf16>(&q_out).unwrap();
                                (found.iter().map(|value| value.to_f32()).collect(), 5e-3)
                            }
                        };
                        close(&what, &found, &expected_q, tolerance);
                    }
                }
            }
        }
    }
}

#[test]
fn argmax() {
    for device in devices() {
        let mut random = Random(6);
        let nan = f32::NAN;
        let low = f32::NEG_INFINITY;
        let mut cases: Vec<(usize, Vec<f32>)> = vec![
            (4, vec![nan; 4]),
            (4, vec![low, low, nan, low]),
            (4, vec![nan, low, low, low]),
            (4, vec![1.0, 3.0, 3.0, nan]),
            (4, vec![-0.0, 0.0, -0.0, 0.0]),
            (4, vec![-1.0, -0.0, 0.0, -3.0]),
            (3, vec![-5.0, -4.0, -4.0]),
            (1, vec![nan]),
            (2, vec![f32::INFINITY, nan, 7.0, f32::INFINITY, -1.0, -2.0]),
        ];
        for cols in [5, 8, 1000, 4096, 49_152, 50_001] {
            let mut data = random.vec(3 * cols);
            // Equal largest elements far apart, and a row of NaN but for one.
            (data[cols / 3], data[cols - 1]) = (2.0, 2.0);
            data[cols..2 * cols].fill(nan);
            data[2 * cols - 1] = -7.0;
            cases.push((cols, data));
        }
        for (cols, data) in cases {
            let rows = data.len() / cols;
            let logits = floats(&device, &data);
            for first in [0, rows - 1] {
                let ids = device.upload(&vec![77_777; rows], "ids").unwrap();
                run(&device, |commands| {
                    ops::argmax(commands, logits.whole(), first as u32..rows as u32, cols as u32, ids.whole())
                });
                let mut expected = vec![77_777; first];
                expected.extend(data[first * cols..].chunks(cols).map(|row| {
                    let mut best: Option<(u32, f32)> = None;
                    for (place, value) in (0..).zip(row) {
                        if !value.is_nan() && best.is_none_or(|best| *value > best.1) {
                            best = Some((place, *value));
                        }
                    }
                    best.map_or(u32::MAX, |best| best.0)
                }));
                assert_eq!(device.download::<u32>(&ids).unwrap(), expected, "{device:?} {cols} columns");
            }
        }
    }
}

#[test]
fn top_k() {
    for device in devices() {
        let mut random = Random(16);
        let (nan, low) = (f32::NAN, f32::NEG_INFINITY);
        let mut cases: Vec<(usize, usize, Vec<f32>)> = vec![
            (4, 2, vec![nan; 4]),
            (4, 3, vec![1.0, 3.0, 3.0, nan]),
            (4, 4, vec![-0.0, 0.0, -0.0, 0.0]),
            (4, 3, vec![nan, low, 2.0, low]),
            (2, 5, vec![0.5, 0.25]),
        ];
        for (cols, k) in [(5, 5), (1000, 1), (1000, 16), (49_152, 8)] {
            let mut data = random.vec(3 * cols);
            (data[cols / 3], data[cols - 1]) = (2.0, 2.0);
            data[2 * cols..].iter_mut().for_each(|x| *x *= 30.0);
            cases.push((cols, k, data));
        }
        for (cols, k, data) in cases {
            let rows = data.len() / cols;
            let logits = floats(&device, &data);
            let ids = device.upload(&vec![77u32; rows * k], "ids").unwrap();
            let logs = floats(&device, &vec![f32::NAN; rows * k]);
            run(&device, |commands| {
                ops::top_k(commands, logits.whole(), rows as u32, cols as u32, k as u32, ids.whole(), logs.whole())
            });
            let (ids, logs): (Vec<u32>, Vec<f32>) = (device.download(&ids).unwrap(), device.download(&logs).unwrap());
            for (row, values) in data.chunks(cols).enumerate() {
                let mut ranked: Vec<(u32, f32)> =
                    (0..).zip(values).filter(|(_, x)| !x.is_nan()).map(|(id, x)| (id, *x)).collect();
                ranked.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap().then(a.0.cmp(&b.0)));
                let most = ranked.first().map_or(0.0, |one| f64::from(one.1));
                let total: f64 = ranked.iter().map(|(_, x)| (f64::from(*x) - most).exp()).sum();
                for place in 0..k {
                    let (id, log) = (ids[row * k + place], logs[row * k + place]);
                    match ranked.get(place) {
                        Some((want, x)) => {
                            assert_eq!(id, *want, "{device:?} {cols} columns, row {row}, place {place}");
                            let want = f64::from(*x) - most - total.ln();
                            let near = (f64::from(log) - want).abs() <= 1e-4 * (1.0 + want.abs());
                            assert!(near || f64::from(log) == want, "{device:?}: {log} is not {want}");
                        }
                        None => assert_eq!((id, log), (u32::MAX, low), "{device:?} {cols} columns, row {row}"),
                    }
                }
            }
        }
    }
}

#[test]
fn gathers_ids() {
    for device in devices() {
        let ids = device.upload(&[7u32, 49_151, 3], "ids").unwrap();
        let wanted = [2, ops::given_id(150_000), 0, 1, ops::given_id(0), 9];
        let sources = device.upload(&wanted, "sources").unwrap();
        let out = device.upload(&[1u32; 7], "out").unwrap();
        run(&device, |commands| ops::gather_ids(commands, ids.whole(), sources.whole(), 6, out.whole()));
        assert_eq!(device.download::<u32>(&out).unwrap(), [3, 150_000, 7, 49_151, 0, 3, 1], "{device:?}");
    }
}

#[test]
fn moves() {
    for device in devices() {
        let mut random = Random(7);
        for (held, cols, rows) in [(1, 8, 1), (5, 100, 7), (70, 33, 130), (3, 576, 3)] {
            let x = random.vec(held * cols);
            let x_buffer = floats(&device, &x);
            let indices: Vec<u32> =
                (0..rows as u32).map(|row| if row == 2 { u32::MAX } else { row * 13 % held as u32 }).collect();
            let index_buffer = device.upload(&indices, "indices").unwrap();
            let out = poison(&device, rows * cols);
            let stride = cols + 9;
            let wide = floats(&device, &vec![5.0; rows * stride]);
            run(&device, |commands| {
                let indices = index_buffer.whole();
                ops::gather_rows(commands, x_buffer.whole(), cols as u32, indices, rows as u32, out.whole())?;
                let (cols, stride) = (cols as u32, stride as u32);
                ops::copy_columns(commands, out.whole(), cols, rows as u32, wide.whole(), stride, 4)
            });
            let expected: Vec<f32> = indices
                .iter()
                .flat_map(|index| {
                    let row = (*index as usize).min(held - 1);
                    x[row * cols..(row + 1) * cols].to_vec()
                })
                .collect();
            assert_eq!(device.download::<f32>(&out).unwrap(), expected);
            let found = device.download::<f32>(&wide).unwrap();
            for (found, expected) in found.chunks(stride).zip(expected.chunks(cols)) {
                assert_eq!(found[..4], [5.0; 4]);
                assert_eq!(found[4..4 + cols], *expected);
                assert_eq!(found[4 + cols..], [5.0; 5]);
            }
        }
    }
}

#[test]
fn residual_silu() {
    for device in devices() {
        let mut random = Random(9);
        let (rows, cols) = (5, 77);
        let x = random.vec(rows * cols);
        let mut gate: Vec<f32> = random.vec(rows * cols).into_iter().map(|value| 6.0 * value).collect();
        gate[..4].copy_from_slice(&[90.0, -90.0, 0.0, -0.0]);
        let (x_buffer, gate_buffer, out) =
            (floats(&device, &x), floats(&device, &gate), poison(&device, rows * cols + 3));
        run(&device, |commands| {
            let (x, gate) = (x_buffer.whole(), gate_buffer.whole());
            ops::add_silu(commands, x, gate, rows as u32, cols as u32, out.whole())
        });
        let got = device.download::<f32>(&out).unwrap();
        for ((got, x), gate) in got.iter().zip(&x).zip(&gate) {
            let gate = f64::from(*gate);
            let want = f64::from(*x) + gate / (1.0 + (-gate).exp());
            assert!((f64::from(*got) - want).abs() <= 1e-5 * (1.0 + want.abs()), "{got}, not {want}");
        }
        assert!(got[rows * cols..].iter().all(|value| value.is_nan()), "{device:?}");
    }
}

/// Outputs beyond one dimension of workgroups, and a call in the middle of buffers.
#[test]
fn many_outputs_and_offsets() {
    for device in devices() {
        let mut random = Random(8);
        let (cols, outputs) = (8, 600_003);
        let data = random.vec(outputs * cols);
        let (weight, weights) = matrix(&device, DType::F16, outputs, cols, &data);
        let x = random.vec(cols);
        let mut padded = vec![f32::NAN; 64];
        padded.extend(&x);
        padded.extend([f32::NAN; 64]);
        let x_buffer = floats(&device, &padded);
        let out = poison(&device, outputs + 128);
        run(&device, |commands| {
            let x = x_buffer.slice(256, cols as u64 * 4)?;
            let out = out.slice(256, outputs as u64 * 4)?;
            let call = LinearCall { x, rows: 1, weight: &weight, norm: None, bias: None, out, accumulate: false };
            ops::linear(commands, &call)
        });
        let x: Vec<f64> = x.iter().map(|value| f64::from(*value)).collect();
        let found = device.download::<f32>(&out).unwrap();
        close("600003 outputs", &found[64..64 + outputs], &product(&x, &weights, cols), 1e-5);
        assert!(found[..64].iter().chain(&found[64 + outputs..]).all(|value| value.is_nan()));
    }
}

#[test]
fn wrong_sizes_are_typed_errors() {
    for device in devices() {
        let (small, other) = (poison(&device, 8), poison(&device, 8));
        let ids = device.upload(&[0u32; 4], "ids").unwrap();
        let (weight, _) = matrix(&device, DType::F32, 3, 2, &[0.0; 6]);
        let short = vector(&device, &[1.0]);
        let mut commands = device.commands().unwrap();
        let linear = LinearCall {
            x: small.whole(),
            rows: 2,
            weight: &weight,
            norm: None,
            bias: None,
            out: other.whole(),
            accumulate: false,
        };
        let is_shape = |result: Result<(), OpError>| assert!(matches!(result, Err(OpError::Shape(_))), "{result:?}");
        assert!(ops::linear(&mut commands, &linear).is_ok());
        is_shape(ops::linear(&mut commands, &LinearCall { rows: 3, ..linear }));
        is_shape(ops::linear(&mut commands, &LinearCall { rows: u32::MAX, ..linear }));
        is_shape(ops::linear(&mut commands, &LinearCall { bias: Some(&short), ..linear }));
        let norm = Norm { weight: &short, eps: 1e-5 };
        is_shape(ops::linear(&mut commands, &LinearCall { norm: Some(norm), ..linear }));
        let lying = Matrix { rows: 1000, ..weight.clone() };
        is_shape(ops::linear(&mut commands, &LinearCall { weight: &lying, rows: 0, ..linear }));
        let empty = Matrix { rows: 0, ..weight.clone() };
        is_shape(ops::embed(&mut commands, &empty, ids.whole(), 1, other.whole()));
        is_shape(ops::embed(&mut commands, &weight, ids.whole(), 5, other.whole()));
        let swiglu = SwigluCall { x: small.whole(), rows: 1, gate_up: &weight, norm: None, out: other.whole() };
        is_shape(ops::swiglu(&mut commands, &swiglu));
        is_shape(ops::rms_norm(&mut commands, small.whole(), norm, 9, other.whole()));
        is_shape(ops::argmax(&mut commands, small.whole(), 0..1, 0, ids.whole()));
        is_shape(ops::argmax(&mut commands, small.whole(), 0..3, 4, ids.whole()));
        is_shape(
            ops::gather_rows(&mut commands, small.whole(), 9, ids.whole(), 0, other.whole()).and(ops::gather_rows(
                &mut commands,
                small.whole(),
                9,
                ids.whole(),
                1,
                other.whole(),
            )),
        );
        is_shape(ops::copy_columns(&mut commands, small.whole(), 4, 1, other.whole(), 5, 2));
        is_shape(ops::copy_columns(&mut commands, small.whole(), 4, 2, other.whole(), 6, 0));
        is_shape(RopeTable::new(&device, &[], 10).map(|_| ()));
        is_shape(RopeTable::new(&device, &[1.0], 0).map(|_| ()));
        let table = RopeTable::new(&device, &[1.0, 0.5], 10).unwrap();
        let rope = RopeCall {
            qkv: small.whole(),
            offset: 0,
            stride: 8,
            rows: 1,
            query_heads: 1,
            kv_heads: 1,
            head_dim: 4,
            parts: None,
            q_norm: None,
            k_norm: None,
            table: &table,
            pairing: RopePairing::HalfSplit,
            positions: ids.whole(),
            q_out: other.whole(),
            q_dtype: DType::F32,
        };
        assert!(ops::rope(&mut commands, &rope).is_ok());
        is_shape(ops::rope(&mut commands, &RopeCall { head_dim: 3, ..rope }));
        is_shape(ops::rope(&mut commands, &RopeCall { head_dim: 2, ..rope }));
        is_shape(ops::rope(&mut commands, &RopeCall { kv_heads: 2, ..rope }));
        is_shape(ops::rope(&mut commands, &RopeCall { offset: 1, ..rope }));
        is_shape(ops::rope(&mut commands, &RopeCall { rows: 2, ..rope }));
        is_shape(ops::rope(&mut commands, &RopeCall { query_heads: u32::MAX, ..rope }));
        let part = |dim| HeadPart { rows: weight.buffer.whole(), offset: 0, stride: 4, dim };
        for (parts, fits) in [([2, 2], true), ([2, 3], false), ([u32::MAX, 5], false)] {
            let result = ops::rope(&mut commands, &RopeCall { parts: Some(parts.map(part)), ..rope });
            assert_eq!(result.is_ok(), fits, "{parts:?}: {result:?}");
        }
        let parts = Some([part(2), HeadPart { offset: u32::MAX, ..part(2) }]);
        is_shape(ops::rope(&mut commands, &RopeCall { parts, ..rope }));
        let parts = Some([part(2), part(2)]);
        is_shape(ops::rope(&mut commands, &RopeCall { parts, query_heads: u32::MAX, ..rope }));
        let long = vector(&device, &[1.0; 5]);
        let k_norm = Some(Norm { weight: &long, eps: 1e-5 });
        is_shape(ops::rope(&mut commands, &RopeCall { k_norm, ..rope }));
        let _ = commands.submit().unwrap();

        // One buffer for input and output is refused, at once or when it is submitted.
        let mut commands = device.commands().unwrap();
        let result = ops::linear(&mut commands, &LinearCall { out: small.whole(), ..linear });
        assert!(result.is_err() || commands.submit().is_err(), "{device:?}");
    }
}

/// Nothing to do is done.
#[test]
fn no_rows() {
    for device in devices() {
        let none = device.alloc(0, "none").unwrap();
        let (weight, _) = matrix(&device, DType::F16, 4, 8, &[0.5; 32]);
        run(&device, |commands| {
            ops::embed(commands, &weight, none.whole(), 0, none.whole())?;
            ops::argmax(commands, none.whole(), 0..0, 4, none.whole())?;
            ops::gather_rows(commands, none.whole(), 4, none.whole(), 0, none.whole())?;
            ops::copy_columns(commands, none.whole(), 4, 0, none.whole(), 4, 0)?;
            let (x, out) = (none.whole(), none.whole());
            ops::swiglu(commands, &SwigluCall { x, rows: 0, gate_up: &weight, norm: None, out })
        });
    }
}
