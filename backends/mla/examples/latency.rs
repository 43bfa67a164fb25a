//! How long one call takes on a GPU, beside a copy kernel, after small calls were held against the `cpu` backend.
//!
//! `cargo run --release -p polyattn-mla --example latency [DEVICE]`; with `POLYATTN_NO_COOPERATIVE_MATRICES` set, in
//! plain arithmetic.

use std::error::Error;

use polyattn_api::{
    AttentionBackend, AttentionIo, AttentionKind, AttentionProblem, BatchLayout, DType, Device, Mask, Phase, Role,
    Window,
    device::{Access, DeviceChoice, Pipeline, PipelineSpec},
};
use polyattn_cpu::Cpu;
use polyattn_mla::Mla;
use polyattn_replay::random::{self, Spec};

/// Heads, latent dim, rope dim, query rows, sequences, context.
type Shape = [u32; 6];

const SHAPES: &[Shape] = &[
    [16, 512, 64, 1, 64, 8192],
    [16, 512, 64, 1, 16, 8192],
    [16, 512, 64, 1, 1, 8192],
    [16, 512, 64, 1, 1, 131_072],
    [16, 512, 64, 1, 256, 1024],
    [16, 512, 64, 4, 64, 8192],
    [128, 512, 64, 1, 16, 8192],
    [16, 512, 64, 2048, 1, 2048],
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

/// Numbers of 16 bits between -2 and 2, so that nothing is faster for being zero.
const FILL: &str = "
@group(0) @binding(0) var<storage, read_write> x: array<vec4<u32>>;
@compute @workgroup_size(256)
fn fill(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>,
        @builtin(local_invocation_index) thread: u32) {
    let i = (group.x + group.y * groups.x) * 256u + thread;
    var h = vec4<u32>(i * 4u, i * 4u + 1u, i * 4u + 2u, i * 4u + 3u) * 2654435761u;
    h = (h ^ (h >> vec4<u32>(15u))) * 2246822519u;
    if (i < arrayLength(&x)) { x[i] = (h ^ (h >> vec4<u32>(13u))) & vec4<u32>(0xbfffbfffu); }
}";

fn main() -> Result<(), Box<dyn Error>> {
    let choice: DeviceChoice = std::env::args().nth(1).as_deref().unwrap_or("gpu").parse()?;
    let device = Device::open(&choice)?;
    let facts = device.facts();
    let matrices = if facts.cooperative_tiles.is_empty() { "without" } else { "with" };
    println!("{} ({}), f16, {matrices} cooperative matrices", facts.name, facts.driver);
    hold(&device)?;
    let copied = copy(&device)?;
    println!("copy kernel: {copied:.0} GB/s, read and written");
    println!(
        "{:>10} {:>5} {:>5} {:>8} | {:>9} {:>6} {:>5} {:>8} |",
        "heads", "rows", "batch", "context", "µs", "GB/s", "copy", "TFLOP/s"
    );
    for shape in SHAPES {
        let [heads, latent, rope, rows, batch, context] = *shape;
        let took = time(&device, shape)?;
        let bytes = f64::from(batch) * f64::from(context) * f64::from(latent + rope) * 2.0;
        let rate = bytes / took / 1e3;
        // Pairs of a query row and a key it sees.
        let pairs = f64::from(rows) * (f64::from(context) - f64::from(rows - 1) / 2.0) * f64::from(batch);
        let work = pairs * f64::from(heads) * 2.0 * f64::from(2 * latent + rope);
        println!(
            "{:>10} {rows:>5} {batch:>5} {context:>8} | {took:>9.2} {rate:>6.0} {:>4.0}% {:>8.2} |",
            format!("{heads}/{latent}+{rope}"),
            100.0 * rate / copied,
            work / took / 1e6
        );
    }
    Ok(())
}

/// Small calls against the `cpu` backend, and twice.
fn hold(device: &Device) -> Result<(), Box<dyn Error>> {
    let kind = |query_heads, latent_dim, rope_dim| AttentionKind::Mla { query_heads, latent_dim, rope_dim };
    let full = Spec::new(kind(16, 512, 64), DType::F16, &[(1, 1500), (0, 9), (1, 1), (3, 40), (5, 700)]);
    let window = Some(Window { left: Some(100), right: None });
    let specs = [
        full.clone(),
        Spec { mask: Mask::Bidirectional, page_size: 7, kind: kind(5, 512, 64), ..full.clone() },
        Spec { window, softcap: Some(5.0), alibi: true, sinks: true, kind: kind(3, 256, 64), ..full.clone() },
        Spec { mask: Mask::Tree, kind: kind(20, 128, 64), ..full.clone() },
        Spec { dtype: DType::BF16, kv_dtype: DType::BF16.into(), ..full },
    ];
    for (seed, spec) in specs.iter().enumerate() {
        for scale in [0.04, 0.5, 3.0] {
            let mut case = random::case(seed as u64, spec);
            case.problem.scale = scale;
            let got = case.run(device, &Mla)?;
            let want = case.run(&Device::cpu(), &Cpu)?;
            let errors = got.out.iter().zip(&want.out).map(|(got, want)| (got - want).abs() / (1.0 + want.abs()));
            let worst = errors.fold(0.0f32, |worst, error| if error.is_nan() { f32::NAN } else { worst.max(error) });
            let lse = got.lse.iter().flatten().zip(want.lse.iter().flatten());
            let lse = lse.map(|(got, want)| (got - want).abs()).fold(0.0f32, f32::max);
            println!("seed {seed}, scale {scale}: largest error {worst:.2e}, of the LSE {lse:.2e}");
            // Not a number is no small error.
            if !(worst < 1e-2 && lse < 1e-2) {
                println!("  WRONG: {:?}", spec.kind);
            }
            if case.run(device, &Mla)?.out != got.out {
                println!("  WRONG: other bits the second time");
            }
        }
    }
    Ok(())
}

/// Microseconds of one call, the median of several recordings.
fn time(device: &Device, shape: &Shape) -> Result<f64, Box<dyn Error>> {
    let [query_heads, latent_dim, rope_dim, rows, batch, context] = *shape;
    let kind = AttentionKind::Mla { query_heads, latent_dim, rope_dim };
    let phase = if rows == 1 { Phase::Decode } else { Phase::Verify };
    let problem = AttentionProblem::new(kind, DType::F16).serving(Role::Target, phase).page_size(64);
    let kernel = Mla.prepare(device, &problem)?;
    let pages = context.div_ceil(64);
    let mut layout = BatchLayout::new(64, pages * batch);
    for sequence in 0..batch {
        let own: Vec<i32> = (sequence * pages..(sequence + 1) * pages).map(u32::cast_signed).collect();
        layout.push(rows, context, &own);
    }
    let cache = u64::from(layout.pool_pages) * 64 * u64::from(latent_dim + rope_dim) * 2;
    let q = device.alloc(u64::from(batch * rows * query_heads) * u64::from(latent_dim + rope_dim) * 2, "q")?;
    let cache = device.alloc(cache, "cache")?;
    let out = device.alloc(u64::from(batch * rows * query_heads * latent_dim) * 4, "out")?;
    for buffer in [&q, &cache] {
        let groups = buffer.bytes().div_ceil(4096) as u32;
        let mut commands = device.commands()?;
        let y = groups.div_ceil(65_535);
        commands.dispatch(&pipeline(device, "fill", FILL)?, &[buffer.whole()], &[], [groups.div_ceil(y), y, 1])?;
        commands.submit()?;
    }
    let plan = kernel.plan(&layout)?;
    // Enough calls for a millisecond or more, few enough for a slow device.
    let calls = if batch * context > 1 << 17 { 5 } else { 20 };
    let mut times = Vec::new();
    for _ in 0..5 {
        let mut commands = device.timed_commands()?;
        for _ in 0..calls {
            kernel.encode(&mut commands, &plan, &AttentionIo::new(&q, &cache, &cache, &out))?;
        }
        let took = commands.submit()?.gpu_time()?.ok_or("the device has no timestamps")?;
        times.push(took.as_secs_f64() * 1e6 / f64::from(calls));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn pipeline(device: &Device, entry: &str, source: &str) -> Result<Pipeline, Box<dyn Error>> {
    let bindings: &[Access] = if entry == "copy" { &[Access::Read, Access::ReadWrite] } else { &[Access::ReadWrite] };
    let spec = PipelineSpec { label: entry, source, entry, bindings, immediate_bytes: 0, constants: &[] };
    Ok(device.pipeline(&spec)?)
}

/// GB/s of a compute kernel that copies half a gigabyte (less where a binding holds less).
fn copy(device: &Device) -> Result<f64, Box<dyn Error>> {
    let groups = (device.facts().limits.binding_bytes / (1 << 14)).min(32_768) as u32 & !3;
    let bytes = u64::from(groups) << 14;
    let (x, y) = (device.alloc(bytes, "x")?, device.alloc(bytes, "y")?);
    let pipeline = pipeline(device, "copy", COPY)?;
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let mut commands = device.timed_commands()?;
        for _ in 0..4 {
            commands.dispatch(&pipeline, &[x.whole(), y.whole()], &[], [groups / 4, 4, 1])?;
        }
        best = best.min(commands.submit()?.gpu_time()?.ok_or("the device has no timestamps")?.as_secs_f64() / 4.0);
    }
    Ok(2.0 * bytes as f64 / best / 1e9)
}
