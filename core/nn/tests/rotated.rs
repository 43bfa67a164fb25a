//! Norm, rotation and the writing of the cache in one dispatch: the same bits as in two, and nothing else touched.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use polyattn_api::{
    AttentionIo, AttentionKernel, AttentionKind, AttentionProblem, BackendError, BatchLayout, Commands, HeadPart,
    KvDType, KvLayout, Plan, PlanPool, QuerySource, RotatedQueries, StoreKv, StoreRotated,
};
use polyattn_device::{Buffer, DType, Device, DeviceChoice};
use polyattn_nn::{
    layer::LayerAttention,
    load::RopePairing,
    ops::{self, Norm, RopeCall, RopeTable, Vector},
};

/// A kernel that does nothing but store.
#[derive(Debug)]
struct Store {
    device: Device,
    problem: AttentionProblem,
    pool: PlanPool,
    /// Whether it has the one step.
    fused: bool,
}

impl AttentionKernel for Store {
    fn problem(&self) -> &AttentionProblem {
        &self.problem
    }

    fn plan(&self, batch: &BatchLayout) -> Result<Plan, BackendError> {
        Plan::new(&self.device, &self.pool, &self.problem, batch, Vec::new())
    }

    fn store_rotated(&self, commands: &mut Commands, plan: &Plan, io: &StoreRotated<'_>) -> Result<bool, BackendError> {
        if self.fused { io.record_provided(&self.problem, commands, plan) } else { Ok(false) }
    }

    fn encode(&self, _: &mut Commands, _: &Plan, _: &AttentionIo<'_>) -> Result<(), BackendError> {
        Err(BackendError::Io("stores only".into()))
    }
}

fn gpu() -> Option<Device> {
    Device::open(&DeviceChoice::Gpu).inspect_err(|error| eprintln!("skipped on a GPU: {error}")).ok()
}

/// Numbers in -1..1, the same ones on every run.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1 << 23) as f32) - 1.0
    };
    (0..count).map(|_| next()).collect()
}

#[derive(Clone, Copy, Debug)]
struct Case {
    query_heads: u32,
    kv_heads: u32,
    head_dim: u32,
    /// Elements of a value; none where the key has them, as latent attention's.
    value_dim: Option<u32>,
    /// Elements that are rotated, and the first of them; with latent attention the rope part.
    rotated: [u32; 2],
    pairing: RopePairing,
    norms: [bool; 2],
    /// Elements that the norms take.
    normed: u32,
    /// Elements of the first part of a query, where queries lie in two.
    parts: Option<u32>,
    /// Format of the queries, if there are any.
    queries: Option<DType>,
    dtype: KvDType,
    layout: KvLayout,
}

/// Unequal lengths: over page edges, a sequence without rows, a long one in pages out of order.
fn batch() -> BatchLayout {
    let mut batch = BatchLayout::new(4, 16);
    batch.push(3, 6, &[8, 2]);
    batch.push(0, 3, &[1]);
    batch.push(2, 9, &[0, 5, 7]);
    batch.push(17, 20, &[15, 10, 12, 9, 14]);
    batch
}

const ROWS: u32 = 22;
const SLOTS: usize = 64;
/// Elements from one head's part to the next, and before the first.
const PART_STRIDE: u32 = 640;
const PART_OFFSET: u32 = 7;

/// A case on a device, its caches and queries poisoned.
struct Setting {
    case: Case,
    device: Device,
    rows: Buffer,
    offset: u32,
    stride: u32,
    table: RopeTable,
    positions: Buffer,
    norms: [Vector; 2],
    parts: [Buffer; 2],
    q_out: Buffer,
    caches: [Buffer; 4],
}

impl Setting {
    fn new(device: &Device, case: Case) -> Self {
        let Case { query_heads, kv_heads, head_dim, value_dim, rotated: [dim, first], queries, dtype, .. } = case;
        let query_heads = if queries.is_some() { query_heads } else { 0 };
        let inside = if case.parts.is_some() { 0 } else { query_heads };
        let value_dim = value_dim.unwrap_or(0);
        let offset = 5;
        let stride = offset + (inside + kv_heads) * head_dim + kv_heads * value_dim + 3;
        let frequencies: Vec<f64> = (0..dim / 2).map(|i| 100f64.powf(-2.0 * f64::from(i) / f64::from(dim))).collect();
        // The last position lies beyond the table.
        let positions: Vec<u32> = (0..ROWS).map(|row| if row + 1 == ROWS { 7000 } else { row * 29 }).collect();
        let floats = |count: u32, seed| device.upload(&random(count as usize, seed), "floats").unwrap();
        let norm = |seed| Vector { buffer: floats(case.normed, seed), len: case.normed };
        let part = |seed| floats(ROWS * query_heads * PART_STRIDE + PART_OFFSET, seed);
        let poison = |bytes: usize| device.upload(&vec![0xA5u8; bytes.max(16)], "poison").unwrap();
        let places = SLOTS * kv_heads as usize;
        let cache = |dim: u32| poison(places * dim as usize * dtype.bytes() as usize);
        Self {
            case,
            device: device.clone(),
            rows: floats(ROWS * stride, 3),
            offset,
            stride,
            table: RopeTable::new(device, &frequencies, 500).unwrap().from_element(first),
            positions: device.upload(&positions, "positions").unwrap(),
            norms: [norm(11), norm(12)],
            parts: [part(21), part(22)],
            q_out: poison((ROWS * query_heads * head_dim) as usize * 4),
            caches: [cache(head_dim), cache(value_dim), poison(places * 4), poison(places * 4)],
        }
    }

    fn kernel(&self, fused: bool) -> Store {
        let Case { query_heads, kv_heads, head_dim, value_dim, rotated, dtype, layout, queries, .. } = self.case;
        let kind = match value_dim {
            Some(value_dim) => AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim },
            None => AttentionKind::Mla { query_heads, latent_dim: rotated[1], rope_dim: rotated[0] },
        };
        let mut problem = AttentionProblem::new(kind, queries.unwrap_or(DType::F32)).page_size(4);
        (problem.kv_dtype, problem.kv_layout) = (dtype, layout);
        Store { device: self.device.clone(), problem, pool: PlanPool::default(), fused }
    }

    /// The parts of the queries: the second lies at the end of wider ones.
    fn parts(&self) -> Option<[HeadPart<'_>; 2]> {
        let first = self.case.parts?;
        let part = |at: usize, offset, dim| HeadPart { rows: self.parts[at].whole(), offset, stride: PART_STRIDE, dim };
        let rest = self.case.head_dim - first;
        Some([part(0, 0, first), part(1, PART_OFFSET + PART_STRIDE - rest, rest)])
    }

    fn rope(&self) -> RopeCall<'_> {
        let norm = |at: usize, eps| self.case.norms[at].then_some(Norm { weight: &self.norms[at], eps });
        RopeCall {
            qkv: self.rows.whole(),
            offset: self.offset,
            stride: self.stride,
            rows: ROWS,
            query_heads: self.case.queries.map_or(0, |_| self.case.query_heads),
            kv_heads: self.case.kv_heads,
            head_dim: self.case.head_dim,
            parts: self.parts(),
            q_norm: norm(0, 1e-5).filter(|_| self.case.queries.is_some()),
            k_norm: norm(1, 1e-6),
            table: &self.table,
            pairing: self.case.pairing,
            positions: self.positions.whole(),
            q_out: self.q_out.whole(),
            q_dtype: self.case.queries.unwrap_or(DType::F32),
        }
    }

    fn store(&self) -> StoreKv<'_> {
        let rope = self.rope();
        let k_offset = self.offset + rope.parts.map_or(rope.query_heads * rope.head_dim, |_| 0);
        let v_offset = k_offset + rope.kv_heads * rope.head_dim;
        let [k, v, k_scale, v_scale] = &self.caches;
        let mut store = StoreKv::from_rows(&self.rows, self.stride, k_offset, v_offset, k, v);
        (store.k_scale, store.v_scale) = (Some(k_scale.whole()), Some(v_scale.whole()));
        store
    }

    fn rotated(&self) -> StoreRotated<'_> {
        let rope = self.rope();
        let mut io = StoreRotated::new(self.store(), self.table.rotation(rope.pairing, rope.positions));
        io.k_norm = rope.k_norm.map(Into::into);
        let source = rope.parts.map_or(QuerySource::KeyRows(rope.offset), QuerySource::Parts);
        let queries = RotatedQueries { source, norm: rope.q_norm.map(Into::into), out: rope.q_out };
        io.queries = self.case.queries.map(|_| queries);
        io
    }

    /// What lies in queries, caches and scales.
    fn found(&self) -> Vec<Vec<u8>> {
        let bytes = |buffer| self.device.download::<u8>(buffer).unwrap();
        [&self.q_out].into_iter().chain(&self.caches).map(bytes).collect()
    }
}

/// Runs what `record` records and says how many dispatches it took.
fn run(device: &Device, record: impl FnOnce(&mut Commands)) -> u64 {
    let mut commands = device.commands().unwrap();
    record(&mut commands);
    let dispatches = commands.dispatches();
    let _ = commands.submit().unwrap();
    dispatches
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let dims = [
        (4, 2, 64, 64, [64, 0]),
        (6, 3, 128, 32, [48, 0]),
        (2, 1, 8, 24, [4, 2]),
        (9, 3, 72, 300, [72, 0]),
        (1, 1, 200, 4, [160, 40]),
    ];
    let latent = [(16, 576, [64, 512]), (3, 40, [8, 32]), (5, 280, [24, 256]), (1, 84, [4, 80])];
    // Every combination of the rest comes up, many with each format.
    let case = |number: usize, query_heads, kv_heads, head_dim, rotated, dtype| {
        let bit = |bit: usize| number >> bit & 1 == 1;
        Case {
            query_heads,
            kv_heads,
            head_dim,
            value_dim: None,
            rotated,
            pairing: if bit(0) { RopePairing::Interleaved } else { RopePairing::HalfSplit },
            norms: [bit(1), bit(2)],
            normed: if bit(5) { head_dim / 2 + 1 } else { head_dim },
            parts: bit(6).then_some(head_dim / 3),
            queries: [Some(DType::F32), Some(DType::F16), Some(DType::BF16), None][number >> 3 & 3],
            dtype,
            layout: KvLayout::PageTokenLatent,
        }
    };
    for dtype in KvDType::ALL {
        for layout in [KvLayout::PageTokenHead, KvLayout::PageHeadToken] {
            for (query_heads, kv_heads, head_dim, value_dim, rotated) in dims {
                let number = cases.len() * 23 % 128;
                let case = case(number, query_heads, kv_heads, head_dim, rotated, dtype);
                cases.push(Case { value_dim: Some(value_dim), layout, ..case });
            }
        }
        for (query_heads, head_dim, rotated) in latent {
            for pairing in [RopePairing::Interleaved, RopePairing::HalfSplit] {
                // As a model has it: the latent part of a query apart from its rope part, a norm of the key's latent.
                let case = case(cases.len() * 8, query_heads, 1, head_dim, rotated, dtype);
                let (normed, parts) = (rotated[1], Some(rotated[1]));
                cases.push(Case { pairing, norms: [false, true], normed, parts, ..case });
            }
            cases.push(case(cases.len() * 23 % 128, query_heads, 1, head_dim, rotated, dtype));
        }
    }
    cases
}

#[test]
fn one_step_leaves_the_bits_of_two() {
    let Some(device) = gpu() else { return };
    for case in cases() {
        let (one, two) = (Setting::new(&device, case), Setting::new(&device, case));
        let (before, poisoned) = (device.download::<u8>(&one.rows).unwrap(), one.found());
        let kernel = one.kernel(true);
        let plan = kernel.plan(&batch()).unwrap();
        let dispatches = run(&device, |commands| {
            assert!(kernel.store_rotated(commands, &plan, &one.rotated()).unwrap(), "{case:?}");
        });
        assert_eq!(dispatches, 1);
        assert!(device.download::<u8>(&one.rows).unwrap() == before, "the rows were changed: {case:?}");
        let dispatches = run(&device, |commands| {
            ops::rope(commands, &two.rope()).unwrap();
            kernel.store_kv(commands, &plan, &two.store()).unwrap();
        });
        assert_eq!(dispatches, 2);
        let (found, wanted) = (one.found(), two.found());
        let names = ["queries", "keys", "values", "key scales", "value scales"];
        for (((name, found), wanted), poisoned) in names.iter().zip(&found).zip(&wanted).zip(&poisoned) {
            let differ = found.iter().zip(wanted).filter(|(a, b)| a != b).count();
            assert_eq!(differ, 0, "{name}: {differ} of {} bytes, {case:?}", found.len());
            let written = match *name {
                "queries" => case.queries.is_some(),
                "key scales" => case.dtype == KvDType::Q8,
                "value scales" => case.dtype == KvDType::Q8 && case.value_dim.is_some(),
                "values" => case.value_dim.is_some(),
                _ => true,
            };
            assert_eq!(found != poisoned, written, "{name}, {case:?}");
        }
    }
}

/// A layer's step takes the one dispatch where there is one, and two where there is none: on the CPU, with a kernel that
/// offers none, and for heads that are no whole number of words by themselves.
#[test]
fn a_layer_takes_two_steps_where_one_will_not_do() {
    let mut case = cases()[0];
    (case.dtype, case.layout, case.queries) = (KvDType::F16, KvLayout::PageTokenHead, Some(DType::F16));
    let narrow = Case { head_dim: 6, value_dim: Some(6), rotated: [6, 0], normed: 6, dtype: KvDType::F8E4M3, ..case };
    let latent = Case {
        kv_heads: 1,
        head_dim: 40,
        value_dim: None,
        rotated: [8, 32],
        norms: [false, true],
        normed: 32,
        parts: Some(32),
        layout: KvLayout::PageTokenLatent,
        ..case
    };
    for device in gpu().into_iter().chain([Device::cpu()]) {
        let cases = [(case, true, 1), (case, false, 2), (narrow, true, 2), (latent, true, 1), (latent, false, 2)];
        for (case, fused, expected) in cases {
            let (one, two) = (Setting::new(&device, case), Setting::new(&device, case));
            let kernel = one.kernel(fused);
            let plan = kernel.plan(&batch()).unwrap();
            let [k_cache, v_cache, ..] = &one.caches;
            let attention = LayerAttention { kernel: &kernel, plan: &plan, k_cache, v_cache };
            let dispatches = run(&device, |commands| attention.rotate_and_store(commands, &one.rope()).unwrap());
            assert_eq!(dispatches, if device.is_cpu() { 0 } else { expected }, "{case:?} {device:?}");
            run(&device, |commands| {
                ops::rope(commands, &two.rope()).unwrap();
                kernel.store_kv(commands, &plan, &two.store()).unwrap();
            });
            assert!(one.found() == two.found(), "{case:?} {device:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(device) = gpu() else { return };
    let case = Case { dtype: KvDType::Q8, norms: [true; 2], queries: Some(DType::F16), parts: None, ..cases()[0] };
    let setting = Setting::new(&device, case);
    let kernel = setting.kernel(true);
    let plan = kernel.plan(&batch()).unwrap();
    let small = device.alloc(16, "small").unwrap();
    let small = small.whole();
    let refused = |change: &dyn Fn(&mut StoreRotated<'_>)| {
        let mut io = setting.rotated();
        change(&mut io);
        let mut commands = device.commands().unwrap();
        let answer = kernel.store_rotated(&mut commands, &plan, &io);
        assert!(matches!(answer, Err(BackendError::Io(_))), "{answer:?}");
        assert_eq!(commands.dispatches(), 0);
    };
    refused(&|io| io.store.k_scale = None);
    refused(&|io| io.rotation.dim = 0);
    refused(&|io| io.rotation.dim = 7);
    refused(&|io| io.rotation.first = 2);
    refused(&|io| io.rotation.table_positions = 0);
    refused(&|io| io.rotation.table_positions = 501);
    refused(&|io| io.store.v_stride = 1 << 20);
    refused(&|io| io.queries.as_mut().unwrap().source = QuerySource::KeyRows(1 << 20));
    refused(&|io| io.k_norm.as_mut().unwrap().dim = 0);
    refused(&|io| io.k_norm.as_mut().unwrap().dim = 65);
    refused(&|io| io.queries.as_mut().unwrap().norm.as_mut().unwrap().dim = 65);
    let mut io = setting.rotated();
    let mut commands = device.commands().unwrap();
    for field in 0..6 {
        let mut short = io;
        match field {
            0 => short.store.k_cache = small,
            1 => short.store.v_cache = small,
            2 => short.rotation.positions = small,
            3 => short.k_norm.as_mut().unwrap().weight = small,
            4 => short.queries.as_mut().unwrap().out = small,
            _ => short.queries.as_mut().unwrap().norm.as_mut().unwrap().weight = small,
        }
        let answer = kernel.store_rotated(&mut commands, &plan, &short);
        assert!(matches!(answer, Err(BackendError::Io(_))), "{field}: {answer:?}");
    }
    let part = |rows, offset, stride, dim| HeadPart { rows, offset, stride, dim };
    let rows = setting.parts[0].whole();
    for [front, back] in [
        [part(rows, 0, 64, 32), part(rows, 0, 64, 34)],
        [part(rows, 0, 64, u32::MAX), part(rows, 0, 64, 65)],
        [part(rows, 1 << 24, 64, 32), part(rows, 0, 64, 32)],
        [part(rows, 0, 64, 32), part(rows, 0, 1 << 20, 32)],
        [part(small, 0, 64, 32), part(rows, 0, 64, 32)],
    ] {
        let mut apart = io;
        apart.queries.as_mut().unwrap().source = QuerySource::Parts([front, back]);
        let answer = kernel.store_rotated(&mut commands, &plan, &apart);
        assert!(matches!(answer, Err(BackendError::Io(_))), "{front:?} {back:?}: {answer:?}");
    }
    assert_eq!(commands.dispatches(), 0);
    // Without what is missing it goes.
    io.k_norm = None;
    assert_eq!(kernel.store_rotated(&mut commands, &plan, &io), Ok(true));
    assert_eq!(commands.dispatches(), 1);
}
