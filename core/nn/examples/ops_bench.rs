//! Times the operations at the shapes of SmolLM2-135M: `cargo run --release -p polyattn-nn --example ops_bench -- gpu`; a second
//! argument chooses one number of rows, and `all` other formats of weights too.
//!
//! On a GPU a figure is the GPU's own time for 100 dispatches of one recording, divided by 100. Successive dispatches
//! take other copies of the weights, together more than a cache holds, as the layers of a model do. On the CPU it is the
//! wall time of a call, and beside the table stand what the gemm crate and a copy of memory reach.

use std::time::{Duration, Instant};

use half::f16;
use polyattn_device::{Buffer, Commands, DType, Device};
use polyattn_nn::{
    load::RopePairing,
    ops::{self, LinearCall, Matrix, Norm, OpError, RopeCall, RopeTable, SwigluCall, Vector},
};
use rayon::prelude::*;

type Error = Box<dyn std::error::Error>;

const HIDDEN: u32 = 576;
const INTER: u32 = 1536;
const VOCABULARY: u32 = 49_152;
const MOST_ROWS: u32 = 512;
/// Memory that the copies of a weight fill: more than the caches of an H100 or of a server's processor.
const SPREAD: u64 = 160 << 20;

fn main() -> Result<(), Error> {
    let choice = std::env::args().nth(1).unwrap_or_default().parse()?;
    let device = Device::open(&choice)?;
    let facts = device.facts();
    println!("{} ({}), subgroups {}..{}", facts.name, facts.driver, facts.subgroup_min, facts.subgroup_max);
    let mut dtypes = vec![DType::F16];
    if std::env::args().any(|argument| argument == "all") {
        dtypes.extend([DType::BF16, DType::F32]);
    }
    if device.is_cpu() {
        let threads = rayon::current_num_threads();
        println!("{threads} threads, copy {:.1} GB/s (read and written), read {:.1} GB/s", copy_rate(), read_rate());
        for rows in [1, 16, 512] {
            println!("gemm [{rows} × 576] · [576 × 3072] f32: {:.1} GFLOP/s", gemm_rate(rows));
        }
    }
    for dtype in dtypes {
        let bench = Bench::new(&device, dtype)?;
        println!("{dtype} weights\n{:<28} {:>5} {:>12} {:>10} {:>10}", "operation", "rows", "µs", "GB/s", "GFLOP/s");
        let only = std::env::args().nth(2).and_then(|rows| rows.parse().ok());
        for rows in [1, 2, 4, 8, 16, 32, 64, 128, 512] {
            if only.is_none_or(|only: u32| only == rows) {
                bench.rows(rows)?;
            }
        }
    }
    Ok(())
}

fn copy_rate() -> f64 {
    let from = vec![1u64; 32 << 20];
    let mut to = vec![0u64; 32 << 20];
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        to.par_chunks_mut(1 << 17).zip(from.par_chunks(1 << 17)).for_each(|(to, from)| to.copy_from_slice(from));
        best = best.min(start.elapsed().as_secs_f64());
    }
    assert_eq!(to[77], 1);
    2.0 * size_of_val(from.as_slice()) as f64 / best / 1e9
}

fn read_rate() -> f64 {
    let data = vec![1u64; 32 << 20];
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        let sum: u64 = data.par_chunks(1 << 17).map(|chunk| chunk.iter().sum::<u64>()).sum();
        best = best.min(start.elapsed().as_secs_f64());
        assert_eq!(sum, data.len() as u64);
    }
    size_of_val(data.as_slice()) as f64 / best / 1e9
}

fn gemm_rate(rows: usize) -> f64 {
    let (inputs, outputs) = (HIDDEN as usize, 2 * INTER as usize);
    let (x, w, mut out) = (vec![1f32; rows * inputs], vec![1f32; inputs * outputs], vec![0f32; rows * outputs]);
    let mut best = f64::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        // SAFETY: strides of the three vectors above.
        unsafe {
            gemm::gemm(
                rows,
                outputs,
                inputs,
                out.as_mut_ptr(),
                1,
                outputs as isize,
                false,
                x.as_ptr(),
                1,
                inputs as isize,
                w.as_ptr(),
                inputs as isize,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(0),
            );
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    2.0 * (rows * inputs * outputs) as f64 / best / 1e9
}

struct Bench<'a> {
    device: &'a Device,
    qkv: Vec<Matrix>,
    output: Vec<Matrix>,
    gate_up: Vec<Matrix>,
    down: Vec<Matrix>,
    head: Matrix,
    norm: Vector,
    wide_norm: Vector,
    table: RopeTable,
    x: Buffer,
    out: Buffer,
    queries: Buffer,
    logits: Buffer,
    ids: Buffer,
}

impl<'a> Bench<'a> {
    fn new(device: &'a Device, dtype: DType) -> Result<Self, Error> {
        let matrices = |rows: u32, cols: u32, count: u64| -> Result<Vec<Matrix>, Error> {
            let elements = rows as usize * cols as usize;
            (0..count.max(1))
                .map(|_| {
                    let value = |i: usize| ((i * 7919) % 255) as f32 / 8192.0 - 0.015;
                    let buffer = match dtype {
                        DType::F32 => device.upload(&(0..elements).map(value).collect::<Vec<_>>(), "weights")?,
                        DType::F16 => {
                            let data: Vec<f16> = (0..elements).map(|i| f16::from_f32(value(i))).collect();
                            device.upload(&data, "weights")?
                        }
                        _ => {
                            let data: Vec<u16> = (0..elements).map(|i| (value(i).to_bits() >> 16) as u16).collect();
                            device.upload(&data, "weights")?
                        }
                    };
                    Ok(Matrix { buffer, rows, cols, dtype })
                })
                .collect()
        };
        let copies = |rows: u32, cols: u32| {
            let bytes = u64::from(rows) * u64::from(cols) * dtype.bytes();
            // A software GPU or a CPU needs no more than its own caches exceeded.
            SPREAD / bytes / if device.facts().hardware && !device.is_cpu() { 1 } else { 4 }
        };
        let vector = |len: u32| -> Result<Vector, Error> {
            Ok(Vector { buffer: device.upload(&vec![1f32; len as usize], "norm")?, len })
        };
        let data = |elements: u32, label: &str| {
            let values: Vec<f32> = (0..elements).map(|i| (i % 101) as f32 / 101.0 - 0.5).collect();
            device.upload(&values, label)
        };
        let frequencies: Vec<f64> = (0..32).map(|i| 1e5f64.powf(-f64::from(i) / 32.0)).collect();
        Ok(Self {
            device,
            qkv: matrices(960, HIDDEN, copies(960, HIDDEN))?,
            output: matrices(HIDDEN, HIDDEN, copies(HIDDEN, HIDDEN))?,
            gate_up: matrices(2 * INTER, HIDDEN, copies(2 * INTER, HIDDEN))?,
            down: matrices(HIDDEN, INTER, copies(HIDDEN, INTER))?,
            head: matrices(VOCABULARY, HIDDEN, 1)?.remove(0),
            norm: vector(HIDDEN)?,
            wide_norm: vector(INTER)?,
            table: RopeTable::new(device, &frequencies, 2048)?,
            x: data(MOST_ROWS * INTER, "x")?,
            out: data(MOST_ROWS * 2 * INTER, "out")?,
            queries: data(MOST_ROWS * HIDDEN, "queries")?,
            logits: data(16 * VOCABULARY, "logits")?,
            ids: device.upload(&vec![1u32; MOST_ROWS as usize], "ids")?,
        })
    }

    fn rows(&self, rows: u32) -> Result<(), Error> {
        let norm = Some(Norm { weight: &self.norm, eps: 1e-5 });
        let linear = |weights: &[Matrix], norm: Option<Norm<'_>>, accumulate: bool| {
            self.time(
                &format!("linear {}×{}", weights[0].rows, weights[0].cols),
                rows,
                weights.first(),
                |commands, i| {
                    let weight = &weights[i % weights.len()];
                    let call = LinearCall {
                        x: self.x.whole(),
                        rows,
                        weight,
                        norm,
                        bias: None,
                        out: if weight.rows == VOCABULARY { self.logits.whole() } else { self.out.whole() },
                        accumulate,
                    };
                    ops::linear(commands, &call)
                },
            )
        };
        linear(&self.qkv, norm, false)?;
        linear(&self.output, None, true)?;
        self.time(&format!("swiglu {}×{HIDDEN}", 2 * INTER), rows, self.gate_up.first(), |commands, i| {
            let gate_up = &self.gate_up[i % self.gate_up.len()];
            ops::swiglu(commands, &SwigluCall { x: self.x.whole(), rows, gate_up, norm, out: self.out.whole() })
        })?;
        linear(&self.down, None, true)?;
        if rows <= 16 {
            linear(std::slice::from_ref(&self.head), norm, false)?;
            self.time("argmax 49152", rows, None, |commands, _| {
                ops::argmax(commands, self.logits.whole(), 0..rows, VOCABULARY, self.ids.whole())
            })?;
        }
        self.time("rope 9+3 heads of 64", rows, None, |commands, _| {
            let call = RopeCall {
                qkv: self.out.whole(),
                offset: 0,
                stride: 960,
                rows,
                query_heads: 9,
                kv_heads: 3,
                head_dim: 64,
                parts: None,
                q_norm: None,
                k_norm: None,
                table: &self.table,
                pairing: RopePairing::Interleaved,
                positions: self.ids.whole(),
                q_out: self.queries.whole(),
                q_dtype: DType::F16,
            };
            ops::rope(commands, &call)
        })?;
        self.time("rms_norm 1536", rows, None, |commands, _| {
            let norm = Norm { weight: &self.wide_norm, eps: 1e-5 };
            ops::rms_norm(commands, self.x.whole(), norm, rows, self.out.whole())
        })?;
        self.time("embed 576", rows, None, |commands, _| {
            ops::embed(commands, &self.head, self.ids.whole(), rows, self.out.whole())
        })?;
        self.time("gather_rows 576", rows, None, |commands, _| {
            ops::gather_rows(commands, self.x.whole(), HIDDEN, self.ids.whole(), rows, self.out.whole())
        })?;
        self.time("copy_columns 576", rows, None, |commands, _| {
            ops::copy_columns(commands, self.x.whole(), HIDDEN, rows, self.out.whole(), 2 * HIDDEN, HIDDEN)
        })
    }

    /// Prints the time of one call; `weights` are what it reads of the matrix.
    fn time(
        &self,
        name: &str,
        rows: u32,
        weights: Option<&Matrix>,
        mut call: impl FnMut(&mut Commands, usize) -> Result<(), OpError>,
    ) -> Result<(), Error> {
        let mut best = Duration::MAX;
        let slow = !self.device.is_cpu() && !self.device.facts().hardware;
        for round in 0..4 {
            let calls = if slow { 3 } else { 100 };
            let mut commands = self.device.timed_commands()?;
            let start = Instant::now();
            for i in 0..calls {
                call(&mut commands, i)?;
            }
            let recorded = start.elapsed();
            let took = commands.submit()?.gpu_time()?;
            self.device.wait()?;
            let took = took.unwrap_or_else(|| if self.device.is_cpu() { recorded } else { start.elapsed() });
            // The first round compiles and warms up.
            if round > 0 {
                best = best.min(took / calls as u32);
            }
        }
        let seconds = best.as_secs_f64();
        print!("{name:<28} {rows:>5} {:>12.2}", seconds * 1e6);
        if let Some(matrix) = weights {
            let elements = f64::from(matrix.rows) * f64::from(matrix.cols);
            print!(" {:>10.1}", elements * matrix.dtype.bytes() as f64 / seconds / 1e9);
            print!(" {:>10.1}", 2.0 * elements * f64::from(rows) / seconds / 1e9);
        }
        println!();
        Ok(())
    }
}
