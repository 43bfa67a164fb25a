//! What a device reaches at the most, measured.

use std::time::Instant;

use crate::{
    api::DType,
    device::{Access, Buffer, Commands, Device, DeviceFacts, Pipeline, PipelineSpec},
};

use super::{BenchError, Clock, Shape, data::fill, median};

const COPY: &str = include_str!("copy.wgsl");
const PRODUCT: &str = include_str!("product.wgsl");
const PRODUCT_COOPERATIVE: &str = include_str!("product_cooperative.wgsl");

/// Rows and columns of the tile that a workgroup of the product computes.
const TILE: u32 = 128;

/// Measurements, of which the median counts.
const REPETITIONS: usize = 5;

/// What a device reaches at the most: bytes by a compute kernel that copies (a CPU's threads), operations by a matrix
/// product in f32, in f16 and by cooperative matrices of f16 summed in f32, where a device has those (on a CPU the `gemm`
/// crate's f32 alone).
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Ceilings {
    /// Bytes read plus bytes written by the second, in units of 10⁹.
    pub copy_gigabytes_per_second: f64,
    /// Floating-point operations of a product of f32 matrices by the second, in units of 10¹².
    pub product_f32_teraflops: f64,
    /// The same in f16.
    pub product_f16_teraflops: Option<f64>,
    /// The same by cooperative matrices.
    pub product_cooperative_teraflops: Option<f64>,
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
        let product = |arithmetic: Arithmetic| match arithmetic.runs_on(device.facts()) {
            true => Ok::<_, BenchError>(Some(product(device, arithmetic)? / 1e12)),
            false => Ok(None),
        };
        Ok(Self {
            copy_gigabytes_per_second: copy / 1e9,
            product_f32_teraflops: product(Arithmetic::F32)?.unwrap_or(f64::NAN),
            product_f16_teraflops: product(Arithmetic::F16)?,
            product_cooperative_teraflops: product(Arithmetic::Cooperative)?,
            clock,
        })
    }

    /// The matrix products by name, in units of 10¹² operations by the second.
    pub fn products(&self) -> impl Iterator<Item = (&'static str, f64)> {
        [
            ("f32", Some(self.product_f32_teraflops)),
            ("f16", self.product_f16_teraflops),
            ("cooperative matrices", self.product_cooperative_teraflops),
        ]
        .into_iter()
        .filter_map(|(name, reached)| Some((name, reached?)))
    }

    /// The fastest of the matrix products, in units of 10¹² operations by the second.
    #[must_use]
    pub fn product_teraflops(&self) -> f64 {
        self.products().map(|(_, reached)| reached).fold(0.0, f64::max)
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

/// What a product is computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arithmetic {
    F32,
    F16,
    /// f16 summed in f32 by matrices of 16 × 16.
    Cooperative,
}

impl Arithmetic {
    fn runs_on(self, device: &DeviceFacts) -> bool {
        match self {
            Self::F32 => true,
            Self::F16 => device.has("shader-f16"),
            Self::Cooperative => {
                (device.subgroup_min, device.subgroup_max) == (32, 32)
                    && device.has("shader-f16")
                    && device.has_cooperative_tile(16, DType::F16, DType::F32)
            }
        }
    }

    fn source(self) -> String {
        match self {
            Self::F32 => format!("alias T = f32;\n{PRODUCT}"),
            Self::F16 => format!("enable f16;\nalias T = f16;\n{PRODUCT}"),
            Self::Cooperative => PRODUCT_COOPERATIVE.into(),
        }
    }

    /// Elements of the factors and of the product.
    fn dtypes(self) -> [DType; 2] {
        match self {
            Self::F32 => [DType::F32; 2],
            Self::F16 => [DType::F16; 2],
            Self::Cooperative => [DType::F16, DType::F32],
        }
    }
}

/// Operations by the second.
fn product(device: &Device, arithmetic: Arithmetic) -> Result<f64, BenchError> {
    let side = if large(device) { 4096 } else { 2 * TILE };
    let product = Product::new(device, arithmetic, side)?;
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
    fn new(device: &Device, arithmetic: Arithmetic, side: u32) -> Result<Self, BenchError> {
        let matrix = |seed: u32, dtype: DType| {
            let buffer = device.alloc(u64::from(side * side) * dtype.bytes(), "matrix")?;
            fill(device, &buffer, seed, dtype)?;
            Ok::<_, BenchError>(buffer)
        };
        let [factor, sum] = arithmetic.dtypes();
        let pipeline = device.pipeline(&PipelineSpec {
            label: "product",
            source: &arithmetic.source(),
            entry: "product",
            bindings: &[Access::Read, Access::Read, Access::ReadWrite],
            immediate_bytes: 4,
            constants: &[],
        })?;
        Ok(Self { side, pipeline, a: matrix(1, factor)?, b: matrix(2, factor)?, c: matrix(3, sum)? })
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
        product_cooperative_teraflops: None,
        clock: Clock::WallClock,
    }
}

#[cfg(test)]
mod tests {
    use naga::{
        back::{msl, spv},
        valid::{self, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator},
    };

    use super::*;
    use crate::{bench::value, device::DeviceChoice};

    const ALL: [Arithmetic; 3] = [Arithmetic::F32, Arithmetic::F16, Arithmetic::Cooperative];

    /// Cooperative matrices are nothing that a software GPU has.
    #[test]
    fn the_products_translate() {
        for arithmetic in ALL {
            let source = arithmetic.source();
            let module = naga::front::wgsl::parse_str(&source)
                .unwrap_or_else(|error| panic!("{arithmetic:?}: {}", error.emit_to_string(&source)));
            let capabilities = valid::Capabilities::IMMEDIATES
                | valid::Capabilities::SHADER_FLOAT16
                | valid::Capabilities::COOPERATIVE_MATRIX;
            let info = Validator::new(ValidationFlags::all(), capabilities)
                .subgroup_operations(SubgroupOperationSet::all())
                .subgroup_stages(ShaderStages::COMPUTE)
                .validate(&module)
                .unwrap_or_else(|error| panic!("{arithmetic:?}: {}", error.emit_to_string(&source)));
            spv::write_vec(&module, &info, &spv::Options { lang_version: (1, 3), ..spv::Options::default() }, None)
                .expect("SPIR-V");
            let options = msl::Options { fake_missing_bindings: true, lang_version: (3, 1), ..msl::Options::default() };
            msl::write_string(&module, &info, &options, &msl::PipelineOptions::default()).expect("MSL");
        }
    }

    #[test]
    fn the_products_are_right() {
        let Ok(device) = Device::open(&DeviceChoice::Gpu) else {
            eprintln!("skipped: there is no GPU");
            return;
        };
        const SIDE: u32 = 2 * TILE;
        for arithmetic in ALL {
            if !arithmetic.runs_on(device.facts()) {
                eprintln!("{arithmetic:?} is skipped: '{}' has none", device.facts().name);
                continue;
            }
            let product = Product::new(&device, arithmetic, SIDE).expect("it compiles");
            let mut commands = device.commands().expect("the device is there");
            product.encode(&mut commands).expect("it fits");
            commands.submit().expect("it runs");
            let bytes = device.download::<u8>(&product.c).expect("it ran");
            let (got, tolerance): (Vec<f32>, f64) = match arithmetic.dtypes()[1] {
                DType::F16 => {
                    let halves = bytes.chunks_exact(2).map(|pair| half::f16::from_le_bytes([pair[0], pair[1]]));
                    (halves.map(half::f16::to_f32).collect(), 0.5)
                }
                _ => {
                    (bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().expect("4"))).collect(), 1e-3)
                }
            };
            for at in (0..SIDE * SIDE).step_by(977) {
                let (row, column) = (at / SIDE, at % SIDE);
                let term = |k: u32| f64::from(value(1, k * SIDE + row)) * f64::from(value(2, k * SIDE + column));
                let want: f64 = (0..SIDE).map(term).sum();
                let error = (f64::from(got[at as usize]) - want).abs();
                assert!(error < tolerance, "{arithmetic:?} [{row}, {column}]: {error} from {want}");
            }
        }
    }
}
