//! The provided writer of K and V: the same bytes on the CPU and on a GPU, and nothing but the new rows touched.
#![allow(clippy::unwrap_used, reason = "a test's help may fail the test")]

use half::{bf16, f16};
use polyattn_api::{
    AttentionIo, AttentionKernel, AttentionKind, AttentionProblem, BackendError, BatchLayout, Commands, DType, Device,
    Plan, PlanPool, StoreKv,
};
use polyattn_device::DeviceChoice;

/// A kernel that does nothing but store.
#[derive(Debug)]
struct Store {
    device: Device,
    problem: AttentionProblem,
    pool: PlanPool,
}

impl AttentionKernel for Store {
    fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError> {
        Plan::new(&self.device, &self.pool, &self.problem, batch, Vec::new())
    }

    fn encode(&self, _: &mut Commands, _: &Plan, _: &AttentionIo<'_>) -> Result<(), BackendError> {
        Err(BackendError::Io("stores only".into()))
    }
}

fn devices() -> Vec<Device> {
    let mut devices = vec![Device::cpu()];
    match Device::open(&DeviceChoice::Gpu) {
        Ok(gpu) => devices.push(gpu),
        Err(error) => eprintln!("skipped on a GPU: {error}"),
    }
    devices
}

fn bytes(dtype: DType, value: f32) -> Vec<u8> {
    match dtype {
        DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        DType::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        _ => value.to_le_bytes().to_vec(),
    }
}

fn check(kind: AttentionKind, dtype: DType) {
    let mut batch = BatchLayout::new(4, 9);
    batch.push(3, 6, &[8, 2]);
    batch.push(0, 3, &[1]);
    batch.push(2, 9, &[0, 5, 7]);
    let (k_row, v_row) = match kind {
        AttentionKind::Gqa { kv_heads, head_dim, value_dim, .. } => (kv_heads * head_dim, kv_heads * value_dim),
        _ => (kind.query_dim(), 0),
    };
    let (stride, k_offset) = (k_row + v_row + 5, 3);
    let rows: Vec<f32> = (0..5 * stride).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
    let element = dtype.bytes() as usize;
    let slots = 36;
    for device in devices() {
        let problem = AttentionProblem::new(kind, dtype).page_size(4);
        let kernel = Store { device: device.clone(), problem, pool: PlanPool::default() };
        let source = device.upload(&rows, "rows").unwrap();
        let untouched = |row: u32| vec![0xA5u8; slots * row as usize * element];
        let k_cache = device.upload(&untouched(k_row), "k").unwrap();
        let v_cache = device.upload(&untouched(v_row.max(1)), "v").unwrap();
        let mut commands = device.commands().unwrap();
        let plan = kernel.plan(&batch).unwrap();
        let io = StoreKv::from_rows(&source, stride, k_offset, k_offset + k_row, &k_cache, &v_cache);
        kernel.store_kv(&mut commands, &plan, &io).unwrap();
        drop(plan);
        let _ = commands.submit().unwrap();
        for (cache, row, offset) in [(&k_cache, k_row, k_offset), (&v_cache, v_row, k_offset + k_row)] {
            let mut want = untouched(row.max(1));
            for (line, slot) in [(0, 35), (1, 8), (2, 9), (3, 23), (4, 28)] {
                for i in 0..row as usize {
                    let value = rows[line * stride as usize + offset as usize + i];
                    want[(slot * row as usize + i) * element..][..element].copy_from_slice(&bytes(dtype, value));
                }
            }
            let got: Vec<u8> = device.download(cache).unwrap();
            assert_eq!(got, want, "{kind:?} {dtype} on {}", device.facts().name);
        }

        let short = device.alloc(16, "short").unwrap();
        let plan = kernel.plan(&batch).unwrap();
        let mut commands = device.commands().unwrap();
        let io = StoreKv::from_rows(&source, stride, k_offset, k_offset + k_row, &short, &v_cache);
        assert!(matches!(kernel.store_kv(&mut commands, &plan, &io), Err(BackendError::Io(_))));
    }
}

#[test]
fn rows_arrive_in_their_slots() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        check(AttentionKind::Gqa { query_heads: 4, kv_heads: 2, head_dim: 8, value_dim: 8 }, dtype);
        check(AttentionKind::Gqa { query_heads: 2, kv_heads: 1, head_dim: 70, value_dim: 6 }, dtype);
        check(AttentionKind::Mla { query_heads: 2, latent_dim: 12, rope_dim: 4 }, dtype);
    }
}
