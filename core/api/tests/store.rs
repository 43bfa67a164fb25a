//! The provided writer of K and V: the same bytes on the CPU and on a GPU, and nothing but the new rows touched.
#![allow(clippy::unwrap_used, reason = "a test's help may fail the test")]

use half::{bf16, f16};
use polyattn_api::{
    AttentionIo, AttentionKernel, AttentionKind, AttentionProblem, BackendError, BatchLayout, Commands, DType, Device,
    KvDType, KvLayout, MoveKv, Plan, PlanPool, StoreKv,
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

/// More rows than one dimension of a dispatch holds.
#[test]
fn many_rows_are_stored() {
    const ROWS: u32 = 66_000;
    let kind = AttentionKind::Gqa { query_heads: 1, kv_heads: 1, head_dim: 8, value_dim: 8 };
    let mut batch = BatchLayout::new(1, ROWS);
    for row in 0..ROWS {
        batch.push(1, 1, &[(ROWS - 1 - row) as i32]);
    }
    let rows: Vec<f32> = (0..ROWS * 16).map(|i| i as f32).collect();
    for device in devices() {
        let problem = AttentionProblem::new(kind, DType::F32).page_size(1);
        let kernel = Store { device: device.clone(), problem, pool: PlanPool::default() };
        let source = device.upload(&rows, "rows").unwrap();
        let [k_cache, v_cache] = ["k", "v"].map(|name| device.upload(&vec![-1f32; ROWS as usize * 8], name).unwrap());
        let mut commands = device.commands().unwrap();
        let plan = kernel.plan(&batch).unwrap();
        kernel.store_kv(&mut commands, &plan, &StoreKv::from_rows(&source, 16, 0, 8, &k_cache, &v_cache)).unwrap();
        let _ = commands.submit().unwrap();
        for (cache, offset) in [(&k_cache, 0), (&v_cache, 8)] {
            let got: Vec<f32> = device.download(cache).unwrap();
            let wrong = (0..ROWS as usize * 8).find(|at| {
                let row = ROWS as usize - 1 - at / 8;
                got[*at] != rows[row * 16 + offset + at % 8]
            });
            assert_eq!(wrong, None, "{}", device.facts().name);
        }
    }
}

/// A slot has one row to write it.
#[test]
fn rows_that_share_a_slot_are_refused() {
    let kind = AttentionKind::Gqa { query_heads: 1, kv_heads: 1, head_dim: 8, value_dim: 8 };
    let device = Device::cpu();
    let problem = AttentionProblem::new(kind, DType::F32);
    let kernel = Store { device: device.clone(), problem, pool: PlanPool::default() };
    let [rows, k, v] = [1024, 2048, 2048].map(|bytes| device.alloc(bytes, "test").unwrap());
    let store = |sequences: [(u32, u32, &[i32]); 2]| {
        let mut batch = BatchLayout::new(4, 9);
        for (queries, length, pages) in sequences {
            batch.push(queries, length, pages);
        }
        let plan = kernel.plan(&batch).unwrap();
        let mut commands = device.commands().unwrap();
        kernel.store_kv(&mut commands, &plan, &StoreKv::from_rows(&rows, 16, 0, 8, &k, &v))
    };
    // A page in common is none of the store's business where only one of them writes there, or each elsewhere.
    store([(2, 6, &[3, 1]), (1, 5, &[3, 2])]).unwrap();
    store([(2, 2, &[3]), (2, 4, &[3])]).unwrap();
    let error = store([(2, 6, &[3, 1]), (3, 7, &[2, 1])]).unwrap_err().to_string();
    assert!(error.contains("sequences 0 and 1 both store a row in slot 4 of the cache"), "{error}");
    let error = store([(1, 1, &[0]), (6, 8, &[5, 5])]).unwrap_err().to_string();
    assert!(error.contains("sequences 1 and 1 both store a row in slot 22"), "{error}");
}

/// Every format in both layouts: one set of bytes on all devices, each number within half a step of its format.
#[test]
fn narrow_caches_are_alike_everywhere() {
    let kind = AttentionKind::Gqa { query_heads: 6, kv_heads: 3, head_dim: 16, value_dim: 8 };
    let mut batch = BatchLayout::new(4, 4);
    batch.push(3, 6, &[3, 1]);
    batch.push(4, 5, &[0, 2]);
    let stride = 72u32;
    let mut rows: Vec<f32> = (0..7 * stride).map(|i| (i as f32 * 0.37).sin() * (i as f32 * 0.011).exp()).collect();
    rows[stride as usize..stride as usize + 16].fill(0.0);
    (rows[2 * stride as usize], rows[2 * stride as usize + 1]) = (1e9, 1e-9);
    let slots = [12, 13, 14, 15, 4, 5, 0, 1, 2, 3, 8];
    let lines =
        [(0, slots[3]), (1, slots[4]), (2, slots[5]), (3, slots[7]), (4, slots[8]), (5, slots[9]), (6, slots[10])];
    for dtype in KvDType::ALL {
        for layout in [KvLayout::PageTokenHead, KvLayout::PageHeadToken] {
            let mut answers: Vec<[Vec<u8>; 4]> = Vec::new();
            for device in devices() {
                let mut problem = AttentionProblem::new(kind, DType::F32).page_size(4);
                (problem.kv_dtype, problem.kv_layout) = (dtype, layout);
                let kernel = Store { device: device.clone(), problem, pool: PlanPool::default() };
                let source = device.upload(&rows, "rows").unwrap();
                let cache =
                    |dim: usize| device.upload(&vec![0xA5u8; 16 * 3 * dim * dtype.bytes() as usize], "cache").unwrap();
                let scales = || device.upload(&[7.5f32; 16 * 3], "scales").unwrap();
                let (k_cache, v_cache, k_scale, v_scale) = (cache(16), cache(8), scales(), scales());
                let mut io = StoreKv::from_rows(&source, stride, 0, 48, &k_cache, &v_cache);
                let mut commands = device.commands().unwrap();
                let plan = kernel.plan(&batch).unwrap();
                if dtype == KvDType::Q8 {
                    assert!(matches!(kernel.store_kv(&mut commands, &plan, &io), Err(BackendError::Io(_))));
                    (io.k_scale, io.v_scale) = (Some(k_scale.whole()), Some(v_scale.whole()));
                }
                kernel.store_kv(&mut commands, &plan, &io).unwrap();
                let _ = commands.submit().unwrap();
                let bytes = |buffer| device.download::<u8>(buffer).unwrap();
                answers.push([bytes(&k_cache), bytes(&v_cache), bytes(&k_scale), bytes(&v_scale)]);
            }
            for other in &answers[1..] {
                assert!(other == &answers[0], "{dtype} {layout:?}: devices differ");
            }
            let [k, _, scales, _] = &answers[0];
            if dtype == KvDType::Q8 {
                let scales: &[f32] =
                    &scales.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect::<Vec<_>>();
                for (line, slot) in lines {
                    for head in 0..3 {
                        let row = layout.row(slot, head, 3, 4);
                        for at in 0..16 {
                            let want = rows[line * stride as usize + head * 16 + at];
                            let got = f32::from(k[row * 16 + at].cast_signed()) * scales[row];
                            assert!((got - want).abs() <= scales[row] * 0.5001, "{want} became {got}");
                        }
                    }
                }
                assert_eq!(scales.iter().filter(|scale| **scale == 7.5).count(), (16 - 7) * 3, "others' scales");
            } else if dtype.bytes() == 1 {
                let (mantissa, least, most) =
                    if dtype == KvDType::F8E4M3 { (3, 2f32.powi(-10), 448.0) } else { (2, 2f32.powi(-17), 57344.0) };
                for (line, slot) in lines {
                    let row = layout.row(slot, 1, 3, 4);
                    for at in 0..16 {
                        let want: f32 = rows[line * stride as usize + 16 + at].clamp(-most, most);
                        let (code, bias) = (k[row * 16 + at], (1 << (6 - mantissa)) - 1);
                        let (exponent, part) =
                            (i32::from(code & 0x7f) >> mantissa, f32::from(code & ((1 << mantissa) - 1)));
                        let part = part / (1 << mantissa) as f32 + f32::from(u8::from(exponent > 0));
                        let got = part * 2f32.powi(exponent.max(1) - bias) * if code < 0x80 { 1.0 } else { -1.0 };
                        let bound = (want.abs() * 2f32.powi(-mantissa - 1)).max(least);
                        assert!((got - want).abs() <= bound, "{dtype}: {want} became {got}");
                    }
                }
            }
        }
    }
}

/// Tokens move from slot to slot of every layout and format, one after the other, and nothing else changes.
#[test]
fn tokens_move_within_a_cache() {
    let gqa = AttentionKind::Gqa { query_heads: 4, kv_heads: 2, head_dim: 8, value_dim: 12 };
    let mla = AttentionKind::Mla { query_heads: 4, latent_dim: 12, rope_dim: 4 };
    let moves = [[5u32, 3], [9, 4], [4, 30], [17, 9]];
    let (pages, page_size) = (8usize, 4usize);
    for kind in [gqa, mla] {
        for layout in KvLayout::of(kind) {
            for dtype in [KvDType::F32, KvDType::F16, KvDType::Q8] {
                let mut problem = AttentionProblem::new(kind, DType::F32).page_size(page_size as u32);
                (problem.kv_dtype, problem.kv_layout) = (dtype, *layout);
                let heads = kind.kv_heads() as usize;
                let value_dim = if matches!(kind, AttentionKind::Gqa { .. }) { 12 } else { 0 };
                let bytes = |dim: usize| heads * dim * dtype.bytes() as usize;
                for device in devices() {
                    let filled = |row: usize, seed: usize| -> Vec<u8> {
                        (0..pages * page_size * row.max(4)).map(|i| ((i * 31 + seed) % 251) as u8).collect()
                    };
                    // Each with the bytes of a head.
                    let tensors = [(kind.query_dim() as usize, 1), (value_dim, 2)]
                        .map(|(dim, seed)| (filled(bytes(dim), seed), dim * dtype.bytes() as usize));
                    let scales = [3, 4].map(|seed| (filled(heads * 4, seed), 4));
                    let upload = |bytes: &[u8]| device.upload(bytes, "cache").unwrap();
                    let [k, v] = [&tensors[0].0, &tensors[1].0].map(|bytes| upload(bytes));
                    let [k_scale, v_scale] = [&scales[0].0, &scales[1].0].map(|bytes| upload(bytes));
                    let words = device.upload(moves.as_flattened(), "moves").unwrap();
                    let mut io = MoveKv::new(&moves, &words, page_size as u32, &k, &v);
                    (io.k_scale, io.v_scale) = (Some(k_scale.whole()), Some(v_scale.whole()));
                    let store = Store { device: device.clone(), problem: problem.clone(), pool: PlanPool::default() };
                    let mut commands = device.commands().unwrap();
                    store.move_kv(&mut commands, &io).unwrap();
                    let _ = commands.submit().unwrap();
                    let moved = |(mut bytes, head): (Vec<u8>, usize), used: bool| {
                        for [from, to] in moves.iter().filter(|_| used) {
                            for part in 0..heads {
                                let row = |slot: u32| layout.row(slot as usize, part, heads, page_size) * head;
                                bytes.copy_within(row(*from)..row(*from) + head, row(*to));
                            }
                        }
                        bytes
                    };
                    let [k_want, v_want] = tensors;
                    let [k_scale_want, v_scale_want] = scales;
                    let gqa = value_dim > 0;
                    let scaled = dtype == KvDType::Q8;
                    let what = format!("{layout:?} {dtype} {device:?}");
                    let got = |buffer| device.download::<u8>(buffer).unwrap();
                    assert_eq!(got(&k), moved(k_want, true), "keys, {what}");
                    assert_eq!(got(&v), moved(v_want, gqa), "values, {what}");
                    assert_eq!(got(&k_scale), moved(k_scale_want, scaled), "key scales, {what}");
                    assert_eq!(got(&v_scale), moved(v_scale_want, scaled && gqa), "value scales, {what}");
                    let small = device.alloc(64, "small").unwrap();
                    let mut short = io;
                    short.k_cache = small.whole();
                    let mut commands = device.commands().unwrap();
                    assert!(store.move_kv(&mut commands, &short).is_err(), "a cache that is too small");
                }
            }
        }
    }
}
