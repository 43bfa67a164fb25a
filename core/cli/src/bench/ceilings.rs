//! What a device reaches at the most, measured.

use std::time::Instant;

use crate::{
    api::DType,
    device::{Access, Buffer, Commands, Device, Pipeline, PipelineSpec},
};

use super::{BenchError, Clock, Shape, data::fill, median};

const COPY: &str = include_str!("copy.wgsl");
const PRODUCT: &str = include_str!("product.wgsl");

/// Rows and columns of the tile that a workgroup of the product computes.
const TILE: u32 = 128;

/// Measurements, of which the median counts.
const REPETITIONS: usize = 5;

/// What a device reaches at the most: bytes by a compute kernel that copies (a CPU's threads), operations by a matrix
/// product in f32 and, where there is such arithmetic, in f16, without cooperative matrices (on a CPU the `gemm` crate's
/// f32 alone).
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Ceilings {
    /// Bytes read plus bytes written by the second, in units of 10⁹.
    pub copy_gigabytes_per_second: f64,
    /// Floating-point operations of a product of f32 matrices by the second, in units of 10¹².
    pub product_f32_teraflops: f64,
    /// The same in f16.
    pub product_f16_teraflops: Option<f64>,
    /// What they were measured with.
    pub clock: Clock,
}

impl Ceilings {
    /// Measures them; takes less than a second.
    ///
    /// # Errors
    /// A device that fails.
    pub fn measure(device: &Device) -> Result<Self, BenchError> {
        if device.is_cpu() {
            return Ok(of_cpu());
        }
        let (copy, clock) = copy(device)?;
        let half = device.facts().has("shader-f16");
        Ok(Self {
            copy_gigabytes_per_second: copy / 1e9,
            product_f32_teraflops: product(device, DType::F32)? / 1e12,
            product_f16_teraflops: if half { Some(product(device, DType::F16)? / 1e12) } else { None },
            clock,
        })
    }

    /// The faster of the matrix products, in units of 10¹² operations by the second.
    #[must_use]
    pub fn product_teraflops(&self) -> f64 {
        self.product_f16_teraflops.unwrap_or(0.0).max(self.product_f32_teraflops)
    }

    /// The time that `shape` takes where nothing but the ceilings holds it up ÷ `seconds`.
    #[must_use]
    pub fn share(&self, shape: &Shape, seconds: f64) -> f64 {
        let memory = shape.bytes() as f64 / (self.copy_gigabytes_per_second * 1e9);
        let arithmetic = shape.flops() as f64 / (self.product_teraflops() * 1e12);
        memory.max(arithmetic) / seconds
    }
}

/// Whether a kernel of this device runs on hardware, which wants larger problems for its best.
fn large(device: &Device) -> bool {
    device.facts().hardware
}

/// Seconds of one of `calls` runs of a pipeline, the median of several submissions.
fn seconds(
    device: &Device,
    calls: u32,
    mut encode: impl FnMut(&mut Commands) -> Result<(), BenchError>,
) -> Result<(f64, Clock), BenchError> {
    let (mut times, mut clock) = (Vec::new(), Clock::WallClock);
    for repetition in 0..=REPETITIONS {
        let start = Instant::now();
        let mut commands = device.timed_commands()?;
        for _ in 0..calls {
            encode(&mut commands)?;
        }
        let gpu = commands.submit()?.gpu_time()?;
        device.wait()?;
        let took = gpu.unwrap_or_else(|| start.elapsed()).as_secs_f64();
        clock = if gpu.is_some() { Clock::GpuTimestamps } else { Clock::WallClock };
        // The first one warms up.
        if repetition > 0 {
            times.push(took / f64::from(calls));
        }
    }
    Ok((median(&mut times), clock))
}

/// Bytes by the second, read plus written.
fn copy(device: &Device) -> Result<(f64, Clock), BenchError> {
    const GROUP_BYTES: u64 = 16 << 10;
    let wanted = if large(device) { 512 << 20 } else { 32 << 20 };
    let bytes = device.facts().limits.binding_bytes.min(wanted) / (4 * GROUP_BYTES) * (4 * GROUP_BYTES);
    let (from, to) = (device.alloc(bytes, "copy from")?, device.alloc(bytes, "copy to")?);
    fill(device, &from, 1, DType::F32)?;
    let pipeline = device.pipeline(&PipelineSpec {
        label: "copy",
        source: COPY,
        entry: "copy",
        bindings: &[Access::Read, Access::ReadWrite],
        immediate_bytes: 0,
        constants: &[],
    })?;
    let groups = [(bytes / GROUP_BYTES / 4) as u32, 4, 1];
    let (seconds, clock) =
        seconds(device, 4, |commands| Ok(commands.dispatch(&pipeline, &[from.whole(), to.whole()], &[], groups)?))?;
    Ok((2.0 * bytes as f64 / seconds, clock))
}

/// Operations by the second.
fn product(device: &Device, dtype: DType) -> Result<f64, BenchError> {
    let side = if large(device) { 4096 } else { 2 * TILE };
    let product = Product::new(device, dtype, side)?;
    let (seconds, _) = seconds(device, 2, |commands| product.encode(commands))?;
    Ok(2.0 * f64::from(side).powi(3) / seconds)
}

/// c = aᵀ · b of square matrices.
struct Product {
    side: u32,
    pipeline: Pipeline,
    a: Buffer,
    b: Buffer,
    c: Buffer,
}

impl Product {
    fn new(device: &Device, dtype: DType, side: u32) -> Result<Self, BenchError> {
        let matrix = |seed: u32| {
            let buffer = device.alloc(u64::from(side * side) * dtype.bytes(), "matrix")?;
            fill(device, &buffer, seed, dtype)?;
            Ok::<_, BenchError>(buffer)
        };
        let element = match dtype {
            DType::F16 => "enable f16;\nalias T = f16;\n",
            _ => "alias T = f32;\n",
        };
        let pipeline = device.pipeline(&PipelineSpec {
            label: "product",
            source: &format!("{element}{PRODUCT}"),
            entry: "product",
            bindings: &[Access::Read, Access::Read, Access::ReadWrite],
            immediate_bytes: 4,
            constants: &[],
        })?;
        Ok(Self { side, pipeline, a: matrix(1)?, b: matrix(2)?, c: matrix(3)? })
    }

    fn encode(&self, commands: &mut Commands) -> Result<(), BenchError> {
        let slices = [self.a.whole(), self.b.whole(), self.c.whole()];
        let groups = [self.side / TILE, self.side / TILE, 1];
        Ok(commands.dispatch(&self.pipeline, &slices, &self.side.to_le_bytes(), groups)?)
    }
}

fn of_cpu() -> Ceilings {
    let best = |work: &mut dyn FnMut()| {
        (0..REPETITIONS).fold(f64::INFINITY, |best, _| {
            let start = Instant::now();
            work();
            best.min(start.elapsed().as_secs_f64())
        })
    };
    let threads = rayon::current_num_threads();
    let words = 32 << 20;
    let source = vec![1u64; words];
    let mut target = vec![0u64; words];
    let copy = best(&mut || {
        let part = words.div_ceil(threads);
        rayon::scope(|scope| {
            for (to, from) in target.chunks_mut(part).zip(source.chunks(part)) {
                scope.spawn(move |_| to.copy_from_slice(from));
            }
        });
    });
    let side = 1024;
    let (a, b) = (vec![0.5f32; side * side], vec![0.25f32; side * side]);
    let mut product = vec![0f32; side * side];
    let gemm = best(&mut || crate::nn::ops::matrix_product(&a, &b, &mut product, side, side, side));
    Ceilings {
        copy_gigabytes_per_second: (2 * words * 8) as f64 / copy / 1e9,
        product_f32_teraflops: 2.0 * (side as f64).powi(3) / gemm / 1e12,
        product_f16_teraflops: None,
        clock: Clock::WallClock,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{bench::value, device::DeviceChoice};

    #[test]
    fn the_product_is_one() {
        let Ok(device) = Device::open(&DeviceChoice::Gpu) else {
            eprintln!("skipped: there is no GPU");
            return;
        };
        const SIDE: u32 = 2 * TILE;
        for (dtype, tolerance) in [(DType::F32, 1e-3), (DType::F16, 0.5)] {
            if dtype == DType::F16 && !device.facts().has("shader-f16") {
                eprintln!("skipped in f16: the device has none");
                continue;
            }
            let product = Product::new(&device, dtype, SIDE).expect("it compiles");
            let mut commands = device.commands().expect("the device is there");
            product.encode(&mut commands).expect("it fits");
            commands.submit().expect("it runs");
            let bytes = device.download::<u8>(&product.c).expect("it ran");
            let got: Vec<f32> = match dtype {
                DType::F16 => {
                    bytes.chunks_exact(2).map(|pair| half::f16::from_le_bytes([pair[0], pair[1]]).to_f32()).collect()
                }
                _ => floats(&bytes),
            };
            for at in (0..SIDE * SIDE).step_by(977) {
                let (row, column) = (at / SIDE, at % SIDE);
                let term = |k: u32| f64::from(value(1, k * SIDE + row)) * f64::from(value(2, k * SIDE + column));
                let want: f64 = (0..SIDE).map(term).sum();
                let error = (f64::from(got[at as usize]) - want).abs();
                assert!(error < tolerance, "{dtype} [{row}, {column}]: {error} from {want}");
            }
        }
    }

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
    }
}
