//! How long one call of small batches takes on a GPU: decode, verify and draft of one sequence over several contexts.
//!
//! `cargo run --release -p polyattn-flash --example latency [DEVICE] [QUERY_HEADS KV_HEADS HEAD_DIM]`

use std::error::Error;

use polyattn_api::{
    AttentionBackend, AttentionIo, AttentionKind, AttentionProblem, BatchLayout, DType, Device, Mask, StoreKv,
    device::DeviceChoice,
};
use polyattn_flash::Flash;

/// Calls of one timed recording.
const CALLS: u32 = 200;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let choice: DeviceChoice = args.next().as_deref().unwrap_or("gpu").parse()?;
    let numbers: Vec<u32> = args.map(|arg| arg.parse()).collect::<Result<_, _>>()?;
    let (query_heads, kv_heads, head_dim) = match numbers.as_slice() {
        [query_heads, kv_heads, head_dim] => (*query_heads, *kv_heads, *head_dim),
        _ => (9, 3, 64),
    };
    let device = Device::open(&choice)?;
    println!("{} ({}), {query_heads}/{kv_heads} heads of {head_dim}, f16", device.facts().name, device.facts().driver);
    println!("{:<14} {:>6} {:>8} {:>10}", "mask", "rows", "context", "µs");
    let kind = AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim: head_dim };
    for (mask, name) in [(Mask::Causal, "causal"), (Mask::Bidirectional, "bidirectional")] {
        let problem = AttentionProblem::new(kind, DType::F16).mask(mask).page_size(16);
        let kernel = Flash.prepare(&device, &problem)?;
        for rows in [1u32, 4, 8, 16, 128] {
            for context in [64u32, 256, 512, 1024, 4096] {
                let length = context + rows;
                let pages: Vec<i32> = (0..length.div_ceil(16) as i32).collect();
                let mut batch = BatchLayout::new(16, pages.len() as u32);
                batch.push(rows, length, &pages);
                let cache = u64::from(batch.pool_pages) * 16 * u64::from(kv_heads * head_dim) * 2;
                let heads = u64::from(rows * query_heads * head_dim);
                let q = device.alloc(heads * 2, "q")?;
                let (k, v) = (device.alloc(cache, "k")?, device.alloc(cache, "v")?);
                let out = device.alloc(heads * 4, "out")?;
                let width = (query_heads + 2 * kv_heads) * head_dim;
                let fresh = device.alloc(u64::from(rows * width) * 4, "rows")?;
                let plan = kernel.plan(&batch)?;
                let time = |store: bool| -> Result<f64, Box<dyn Error>> {
                    let mut best = f64::INFINITY;
                    for _ in 0..3 {
                        let mut commands = device.timed_commands()?;
                        for _ in 0..CALLS {
                            if store {
                                let offset = query_heads * head_dim;
                                let after = offset + kv_heads * head_dim;
                                let io = StoreKv::from_rows(&fresh, width, offset, after, &k, &v);
                                kernel.store_kv(&mut commands, &plan, &io)?;
                            } else {
                                kernel.encode(&mut commands, &plan, &AttentionIo::new(&q, &k, &v, &out))?;
                            }
                        }
                        let took = commands.submit()?.gpu_time()?.ok_or("the device has no timestamps")?;
                        best = best.min(took.as_secs_f64() * 1e6 / f64::from(CALLS));
                    }
                    Ok(best)
                };
                println!("{name:<14} {rows:>6} {context:>8} {:>10.2}", time(false)?);
                if context == 64 && mask == Mask::Causal {
                    println!("{:<14} {rows:>6} {:>8} {:>10.2}", "store_kv", "", time(true)?);
                }
            }
        }
    }
    Ok(())
}
