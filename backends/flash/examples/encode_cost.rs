//! What a step costs the host: planning a batch, and encoding one layer of it. A plan ends in one write to the device,
//! whose time is wgpu's and the driver's; such a write alone is shown beside it.
//!
//! `cargo run --release -p polyattn-flash --example encode_cost [LIMIT]` on any GPU, a software one too: nothing is
//! waited for while time is taken. Ends with 1 where planning beyond the write and encoding take more than
//! LIMIT microseconds (10).

use std::{
    error::Error,
    hint::black_box,
    process::ExitCode,
    time::{Duration, Instant},
};

use polyattn_api::{
    AttentionBackend, AttentionIo, AttentionKind, AttentionProblem, BatchLayout, DType, Device, device::DeviceChoice,
};
use polyattn_flash::Flash;

const SEQUENCES: i32 = 8;
const LAYERS: usize = 32;
const STEPS: usize = 300;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let limit = match std::env::args().nth(1) {
        Some(text) => Duration::from_micros(text.parse()?),
        None => Duration::from_micros(10),
    };
    let device = Device::open(&DeviceChoice::Gpu)?;
    let kind = AttentionKind::Gqa { query_heads: 8, kv_heads: 2, head_dim: 64, value_dim: 64 };
    let kernel = Flash.prepare(&device, &AttentionProblem::new(kind, DType::F16))?;
    let mut batch = BatchLayout::new(16, 32);
    for sequence in 0..SEQUENCES {
        let pages: Vec<i32> = (0..4).map(|page| sequence * 4 + page).collect();
        batch.push(1, 60, &pages);
    }
    let rows = u64::from(batch.rows());
    let (q, out) = (device.alloc(rows * 8 * 64 * 2, "q")?, device.alloc(rows * 8 * 64 * 4, "out")?);
    let (k, v) = (device.alloc(32 * 16 * 2 * 64 * 2, "k")?, device.alloc(32 * 16 * 2 * 64 * 2, "v")?);
    let io = AttentionIo::new(&q, &k, &v, &out);
    let (mut planned, mut written, mut encoded) = (Vec::new(), Vec::new(), Vec::new());
    let (index, words) = (device.alloc(1024, "index")?, [1u32; 128]);
    for _ in 0..STEPS {
        let mut commands = device.commands()?;
        // The first write after a submission begins a recording of wgpu's own.
        device.write(&index, 0, &words)?;
        let start = Instant::now();
        device.write(&index, 0, black_box(&words))?;
        written.push(start.elapsed());
        let start = Instant::now();
        let plan = black_box(kernel.plan(black_box(&batch))?);
        planned.push(start.elapsed());
        let start = Instant::now();
        for _ in 0..LAYERS {
            kernel.encode(&mut commands, black_box(&plan), black_box(&io))?;
        }
        encoded.push(start.elapsed() / LAYERS as u32);
        commands.submit()?;
        device.wait()?;
    }
    let (plan, write, encode) = (median(planned), median(written), median(encoded));
    println!("{SEQUENCES} sequences, {LAYERS} layers, {}", device.facts().name);
    println!("plan, once a step: {plan:?}, of which a write takes {write:?}; encode, once a layer: {encode:?}");
    let own = plan.saturating_sub(write) + encode;
    println!("without the write: {own:?} (limit {limit:?})");
    Ok(if own <= limit { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
