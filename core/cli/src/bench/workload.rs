//! A shape with its data on a device, and how long a backend takes for it.

use std::time::{Duration, Instant};

use crate::{
    api::{AttentionIo, AttentionKernel, AttentionProblem, BatchLayout, Plan, RegisteredBackend},
    device::{Buffer, Commands, Device, DeviceError, DeviceFacts},
};

use super::{
    Agreement, BenchError, Samples, Shape,
    data::{fill, poison},
    median,
    sample::{Places, SEEDS},
    value,
};

/// Bytes that must lie between two reads of the same cache for the second to come from memory: several times the
/// largest cache of a processor. Processors, also those that play a GPU, compute longer than they wait for memory, so a
/// smaller share of their memory does.
const COLD_BYTES: u64 = 256 << 20;
const COLD_BYTES_OF_SOFTWARE: u64 = 64 << 20;

/// Copies of a cache at the most.
const MOST_COPIES: u64 = 16;

/// What a time was measured with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// Timestamps that the GPU writes at both ends of a compute pass of many calls.
    GpuTimestamps,
    /// The host's clock, from the first call's recording until the device is done with the last.
    WallClock,
}

/// How long a call takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Timing {
    /// Seconds of one call, the median of the repetitions.
    pub seconds: f64,
    /// What they were measured with.
    pub clock: Clock,
    /// Seconds of one call by the wall clock, recording, submission and waiting included.
    pub wall_seconds: f64,
    /// Calls of one repetition.
    pub calls: u32,
    /// Repetitions.
    pub repetitions: u32,
}

/// The data of a shape on a device. The cache is there several times over where it is small, and calls take turns on
/// the copies, so that every call finds its keys and values in memory and not in a processor's cache.
#[derive(Debug)]
pub struct Workload {
    device: Device,
    shape: Shape,
    problem: AttentionProblem,
    layouts: Vec<BatchLayout>,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    out: Buffer,
    sinks: Option<Buffer>,
}

/// Times calls that `repeat` makes so many of, answering how long they took together on the GPU, where that is known, and
/// by the wall clock. After a warm-up, the median of repetitions that take about `budget` together, each of as many calls
/// as take some milliseconds.
///
/// # Errors
/// Those of `repeat`.
pub fn time<E>(
    budget: Duration,
    mut repeat: impl FnMut(u32) -> Result<(Option<Duration>, Duration), E>,
) -> Result<Timing, E> {
    const REPETITION: f64 = 5e-3;
    let mut each = |calls: u32| {
        let (gpu, wall) = repeat(calls)?;
        let each = |together: Duration| together.as_secs_f64() / f64::from(calls);
        Ok((gpu.map(each), each(wall)))
    };
    // The first call may compile, and clocks rise under load.
    let budget = budget.as_secs_f64();
    let start = Instant::now();
    let (mut gpu, mut wall) = each(1)?;
    if wall < budget {
        (gpu, wall) = each(1)?;
    }
    let calls = |once: f64| (REPETITION / once.max(1e-7)).ceil().clamp(1.0, 1000.0) as u32;
    let warm = Instant::now();
    while warm.elapsed().as_secs_f64() < budget / 4.0 && start.elapsed().as_secs_f64() < budget * 4.0 {
        (gpu, wall) = each(calls(gpu.unwrap_or(wall)))?;
    }
    let once = gpu.unwrap_or(wall);
    let calls = calls(once);
    let repetitions = (budget / (once.max(wall) * f64::from(calls))).clamp(1.0, 15.0) as u32;
    let (mut by_gpu, mut by_wall) = (Vec::new(), Vec::new());
    for _ in 0..repetitions {
        let (gpu, wall) = each(calls)?;
        by_gpu.extend(gpu);
        by_wall.push(wall);
    }
    let wall_seconds = median(&mut by_wall);
    let (seconds, clock) = match by_gpu.is_empty() {
        true => (wall_seconds, Clock::WallClock),
        false => (median(&mut by_gpu), Clock::GpuTimestamps),
    };
    Ok(Timing { seconds, clock, wall_seconds, calls, repetitions })
}

/// How many copies of a cache make sure that a call finds it cold on this device, keys and values no larger than one
/// binding together.
#[must_use]
pub fn copies(device: &DeviceFacts, keys: u64, values: u64) -> u64 {
    let cold = if device.hardware && !device.is_cpu() { COLD_BYTES } else { COLD_BYTES_OF_SOFTWARE };
    let room = device.limits.binding_bytes.min(device.limits.buffer_bytes) / keys.max(values).max(1);
    cold.div_ceil((keys + values).max(1)).min(MOST_COPIES).min(room).max(1)
}

impl Workload {
    /// Allocates and fills: random queries, keys and values, in pages of `page_size` tokens in random order.
    ///
    /// # Errors
    /// [`BenchError::NoRoom`] with the numbers; a device that fails.
    pub fn new(device: &Device, shape: &Shape, page_size: u32) -> Result<Self, BenchError> {
        let problem = shape.problem.clone().page_size(page_size);
        let limits = device.facts().limits;
        let dtype = problem.dtype;
        let pages = shape.context.div_ceil(page_size);
        let (token_keys, token_values) = shape.token_elements();
        let slots = u64::from(pages) * u64::from(page_size) * u64::from(shape.batch) * problem.kv_dtype.bytes();
        let (keys, values) = (slots * token_keys, slots * token_values);
        let allowed = limits.binding_bytes.min(limits.buffer_bytes);
        let heads = u64::from(problem.kind.query_heads());
        let rows = u64::from(shape.batch) * u64::from(shape.rows) * heads;
        let q_bytes = rows * u64::from(problem.kind.query_dim()) * dtype.bytes();
        let out_bytes = rows * u64::from(problem.kind.output_dim()) * 4;
        for (what, bytes) in [("keys", keys), ("values", values), ("queries", q_bytes), ("output", out_bytes)] {
            if bytes > allowed {
                return Err(BenchError::NoRoom(format!("{what} of {bytes} bytes, one binding holds {allowed}")));
            }
        }
        let copies = copies(device.facts(), keys, values);
        let room = |error: DeviceError| match error {
            DeviceError::OutOfMemory { .. } => BenchError::NoRoom(error.to_string()),
            error => error.into(),
        };
        let buffer = |seed: u32, bytes: u64, label: &str| {
            let buffer = device.alloc(bytes, label).map_err(room)?;
            fill(device, &buffer, seed, dtype)?;
            Ok::<_, BenchError>(buffer)
        };
        let q = buffer(SEEDS[0], q_bytes, "q")?;
        let k = buffer(SEEDS[1], keys * copies, "k")?;
        let v = if values == 0 { k.clone() } else { buffer(SEEDS[2], values * copies, "v")? };
        let out = device.alloc(out_bytes, "out").map_err(room)?;
        let sinks = match problem.sinks {
            true => {
                let sinks: Vec<f32> = (0..heads as u32).map(|head| value(SEEDS[3], head)).collect();
                Some(device.upload(&sinks, "sinks").map_err(room)?)
            }
            false => None,
        };
        let pool = pages * shape.batch * copies as u32;
        let mut order: Vec<i32> = (0..pool.cast_signed()).collect();
        shuffle(&mut order);
        let layouts = order.chunks_exact((pages * shape.batch) as usize).map(|own| {
            let mut layout = BatchLayout::new(page_size, pool);
            own.chunks_exact(pages as usize).for_each(|pages| layout.push(shape.rows, shape.context, pages));
            layout
        });
        let layouts = layouts.collect();
        Ok(Self { device: device.clone(), shape: shape.clone(), problem, layouts, q, k, v, out, sinks })
    }

    /// What is computed, its page size set.
    #[must_use]
    pub fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    /// Copies of the cache that calls take turns on.
    #[must_use]
    pub fn copies(&self) -> usize {
        self.layouts.len()
    }

    /// Rows of the right answer.
    ///
    /// # Errors
    /// As [`Samples::compute`].
    pub fn samples(&self) -> Result<Samples, BenchError> {
        let kind = self.problem.kind;
        let (heads, kv_heads) = (kind.query_heads(), kind.kv_heads());
        let slot = |sequence: u32, position: u32| self.layouts[0].slot(sequence as usize, position) as u32 * kv_heads;
        Samples::compute(
            &self.shape,
            Places {
                query: &|sequence, row, head| ((sequence * self.shape.rows + row) * heads + head) * kind.query_dim(),
                key: &|sequence, position, head| (slot(sequence, position) + head) * kind.query_dim(),
                value: &|sequence, position, head| (slot(sequence, position) + head) * kind.output_dim(),
            },
        )
    }

    /// Runs `backend` once over poisoned memory and compares with the reference.
    ///
    /// # Errors
    /// A backend or device that fails.
    pub fn check(&self, backend: &RegisteredBackend, samples: &Samples) -> Result<Agreement, BenchError> {
        let kernel = backend.prepare(&self.device, &self.problem)?;
        let plan = kernel.plan(&self.layouts[0])?;
        poison(&self.device, &self.out)?;
        let mut commands = self.device.commands()?;
        self.encode(&mut commands, kernel.as_ref(), &plan)?;
        commands.submit()?;
        let (heads, dim) = (self.problem.kind.query_heads(), self.problem.kind.output_dim());
        samples.compare(|sequence, row, head| {
            let bytes = u64::from(dim) * 4;
            let at = u64::from(sequence * self.shape.rows + row) * u64::from(heads) + u64::from(head);
            let mut commands = self.device.commands()?;
            let readback = commands.read_back(self.out.slice(at * bytes, bytes)?)?;
            commands.submit()?;
            Ok::<_, BenchError>(readback.wait_as()?)
        })
    }

    /// Times `backend`, as [`time`] does: a repetition is one submission, in one compute pass.
    ///
    /// # Errors
    /// A backend or device that fails.
    pub fn time(&self, backend: &RegisteredBackend, budget: Duration) -> Result<Timing, BenchError> {
        let kernel = backend.prepare(&self.device, &self.problem)?;
        let plans: Vec<Plan> = self.layouts.iter().map(|layout| kernel.plan(layout)).collect::<Result<_, _>>()?;
        let mut turn = 0;
        time(budget, |calls| {
            let start = Instant::now();
            let mut commands = self.device.timed_commands()?;
            for _ in 0..calls {
                self.encode(&mut commands, kernel.as_ref(), &plans[turn % plans.len()])?;
                turn += 1;
            }
            let gpu = commands.submit()?.gpu_time()?;
            self.device.wait()?;
            Ok((gpu, start.elapsed()))
        })
    }

    fn encode(&self, commands: &mut Commands, kernel: &dyn AttentionKernel, plan: &Plan) -> Result<(), BenchError> {
        let mut io = AttentionIo::new(&self.q, &self.k, &self.v, &self.out);
        io.sinks = self.sinks.as_ref().map(Buffer::whole);
        Ok(kernel.encode(commands, plan, &io)?)
    }
}

/// Fisher and Yates's, by random numbers that are the same each time.
fn shuffle(pages: &mut [i32]) {
    let mut random = 0x2545_f491_4f6c_dd1du64;
    for at in (1..pages.len()).rev() {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        pages.swap(at, ((random >> 33) % (at as u64 + 1)) as usize);
    }
}
