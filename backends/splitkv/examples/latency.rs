//! How long one call takes on a GPU, beside `flash` and a copy kernel: decode and verify over a range of contexts.
//!
//! `cargo run --release -p polyattn-splitkv --example latency [DEVICE] [small|large|all] [alone]`, `alone` without `flash`

use std::error::Error;

use polyattn_api::{
    AttentionBackend, AttentionIo, AttentionKind, AttentionProblem, BatchLayout, Buffer, DType, Device, Phase, Role,
    device::{Access, DeviceChoice, PipelineSpec},
};
use polyattn_flash::Flash;
use polyattn_splitkv::SplitKv;

/// Query heads, KV heads, head dim, query rows, sequences, context.
type Shape = [u32; 6];

const SMALL: &[Shape] = &[
    [9, 3, 64, 1, 1, 64],
    [9, 3, 64, 1, 1, 256],
    [9, 3, 64, 1, 1, 512],
    [9, 3, 64, 1, 1, 1024],
    [9, 3, 64, 1, 1, 4096],
    [9, 3, 64, 8, 1, 64],
    [9, 3, 64, 8, 1, 256],
    [9, 3, 64, 8, 1, 512],
    [9, 3, 64, 8, 1, 1024],
    [9, 3, 64, 8, 1, 4096],
    [32, 8, 128, 1, 1, 128],
    [32, 8, 128, 1, 1, 1024],
    [32, 8, 128, 1, 1, 8192],
    [32, 8, 128, 8, 1, 1024],
    [32, 8, 128, 8, 1, 8192],
    [32, 8, 128, 1, 8, 1024],
    [32, 8, 128, 1, 64, 256],
    [32, 8, 128, 1, 64, 1024],
    [32, 8, 128, 4, 64, 1024],
    [32, 8, 128, 8, 64, 1024],
    [8, 1, 256, 1, 16, 4096],
    [8, 1, 256, 8, 16, 4096],
    [64, 8, 64, 1, 32, 4096],
];

const LARGE: &[Shape] = &[
    [32, 8, 128, 1, 64, 8192],
    [32, 8, 128, 1, 1, 131_072],
    [32, 8, 128, 1, 16, 8192],
    [32, 8, 128, 1, 8, 32_768],
    [32, 8, 128, 2, 8, 32_768],
    [32, 8, 128, 4, 8, 32_768],
    [32, 8, 128, 8, 8, 32_768],
    [32, 8, 128, 16, 8, 32_768],
    [32, 8, 128, 32, 8, 32_768],
    [32, 8, 128, 64, 8, 32_768],
];

const COPY: &str = "
@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<u32>>;
@compute @workgroup_size(256)
fn copy(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
    let first = (group.x + group.y * groups.x) * 1024u + thread;
    for (var i = 0u; i < 4u; i++) { y[first + i * 256u] = x[first + i * 256u]; }
}";

/// Halves between -1 and 1: a GPU may be quicker on zeros.
const FILL: &str = "
@group(0) @binding(0) var<storage, read_write> x: array<u32>;
fn half(seed: u32) -> f32 {
    var h = seed * 747796405u + 2891336453u;
    h = ((h >> ((h >> 28u) + 4u)) ^ h) * 277803737u;
    return f32((h >> 22u) ^ h) * (2.0 / 4294967296.0) - 1.0;
}
@compute @workgroup_size(256)
fn fill(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
    let i = (group.x + group.y * groups.x) * 256u + thread;
    if (i < arrayLength(&x)) { x[i] = pack2x16float(vec2<f32>(half(2u * i), half(2u * i + 1u))); }
}";

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let choice: DeviceChoice = args.next().as_deref().unwrap_or("gpu").parse()?;
    let shapes = match args.next().as_deref() {
        Some("large") => LARGE.to_vec(),
        Some("all") => [SMALL, LARGE].concat(),
        _ => SMALL.to_vec(),
    };
    let alone = args.next().is_some();
    let device = Device::open(&choice)?;
    println!("{} ({}), f16", device.facts().name, device.facts().driver);
    let copied = copy(&device)?;
    println!("copy kernel: {copied:.0} GB/s, read and written");
    println!(
        "{:>9} {:>5} {:>5} {:>8} | {:>9} {:>9} {:>7} {:>5} |",
        "heads", "rows", "batch", "context", "flash µs", "splitkv", "GB/s", "copy"
    );
    for shape in &shapes {
        let flash = if alone { f64::NAN } else { time(&device, &Flash, shape)? };
        let split = time(&device, &SplitKv, shape)?;
        let [query_heads, kv_heads, head_dim, rows, batch, context] = *shape;
        let bytes = f64::from(batch) * f64::from(context) * f64::from(kv_heads * head_dim) * 4.0;
        let rate = bytes / split / 1e3;
        println!(
            "{:>9} {rows:>5} {batch:>5} {context:>8} | {flash:>9.2} {split:>9.2} {rate:>7.0} {:>4.0}% |",
            format!("{query_heads}/{kv_heads}/{head_dim}"),
            100.0 * rate / copied
        );
    }
    Ok(())
}

/// Microseconds of one call, the median of several recordings.
fn time(device: &Device, backend: &dyn AttentionBackend, shape: &Shape) -> Result<f64, Box<dyn Error>> {
    let [query_heads, kv_heads, head_dim, rows, batch, context] = *shape;
    let kind = AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim: head_dim };
    let phase = if rows == 1 { Phase::Decode } else { Phase::Verify };
    let problem = AttentionProblem::new(kind, DType::F16).serving(Role::Target, phase).page_size(16);
    let kernel = backend.prepare(device, &problem)?;
    let pages = context.div_ceil(16);
    let mut layout = BatchLayout::new(16, pages * batch);
    for sequence in 0..batch {
        let own: Vec<i32> = (sequence * pages..(sequence + 1) * pages).map(u32::cast_signed).collect();
        layout.push(rows, context, &own);
    }
    let cache = u64::from(layout.pool_pages) * 16 * u64::from(kv_heads * head_dim) * 2;
    let q = device.alloc(u64::from(batch * rows * query_heads * head_dim) * 2, "q")?;
    let (k, v) = (device.alloc(cache, "k")?, device.alloc(cache, "v")?);
    let out = device.alloc(u64::from(batch * rows * query_heads * head_dim) * 4, "out")?;
    for buffer in [&q, &k, &v] {
        fill(device, buffer)?;
    }
    let plan = kernel.plan(&layout)?;
    // Enough calls for a millisecond or more, few enough for a slow device.
    let calls = if batch * context > 1 << 17 { 5 } else { 100 };
    let mut times = Vec::new();
    for _ in 0..5 {
        let mut commands = device.timed_commands()?;
        for _ in 0..calls {
            kernel.encode(&mut commands, &plan, &AttentionIo::new(&q, &k, &v, &out))?;
        }
        let took = commands.submit()?.gpu_time()?.ok_or("the device has no timestamps")?;
        times.push(took.as_secs_f64() * 1e6 / f64::from(calls));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn fill(device: &Device, buffer: &Buffer) -> Result<(), Box<dyn Error>> {
    let pipeline = device.pipeline(&PipelineSpec {
        label: "fill",
        source: FILL,
        entry: "fill",
        bindings: &[Access::ReadWrite],
        immediate_bytes: 0,
        constants: &[],
    })?;
    let groups = buffer.bytes().div_ceil(1024) as u32;
    let y = groups.div_ceil(32_768);
    let mut commands = device.commands()?;
    commands.dispatch(&pipeline, &[buffer.whole()], &[], [groups.div_ceil(y), y, 1])?;
    commands.submit()?;
    Ok(())
}

/// GB/s of a compute kernel that copies half a gigabyte (less where a binding holds less).
fn copy(device: &Device) -> Result<f64, Box<dyn Error>> {
    let bytes = device.facts().limits.binding_bytes.min(512 << 20) >> 24 << 24;
    let (x, y) = (device.alloc(bytes, "x")?, device.alloc(bytes, "y")?);
    fill(device, &x)?;
    let pipeline = device.pipeline(&PipelineSpec {
        label: "copy",
        source: COPY,
        entry: "copy",
        bindings: &[Access::Read, Access::ReadWrite],
        immediate_bytes: 0,
        constants: &[],
    })?;
    let groups = (bytes / (16 << 10)) as u32;
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let mut commands = device.timed_commands()?;
        for _ in 0..4 {
            commands.dispatch(&pipeline, &[x.whole(), y.whole()], &[], [groups.div_ceil(4), 4, 1])?;
        }
        best = best.min(commands.submit()?.gpu_time()?.ok_or("the device has no timestamps")?.as_secs_f64() / 4.0);
    }
    Ok(2.0 * bytes as f64 / best / 1e9)
}
