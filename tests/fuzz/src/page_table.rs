//! Batches of any shape: what passes the host's checks must be safe for a kernel that has none.

use std::sync::Arc;

use arbitrary::Unstructured;
use polyattn_api::{
    AttentionBackend, AttentionIo, AttentionKernel, AttentionKind, AttentionProblem, BackendError, BatchLayout,
    Cascade, DType, Device, Mask, StoreKv, TreeMask, Window,
};

/// Slots of a cache that is really there.
const MOST_SLOTS: u64 = 2048;

#[derive(Debug)]
struct Batch {
    query_start: Vec<u8>,
    kv_len: Vec<u8>,
    page_table: Vec<i8>,
    max_pages: u8,
    page_size: u8,
    pool_pages: u8,
    causal: Option<Vec<bool>>,
    tree: Option<(u8, Vec<u32>)>,
    prefix_spans: Vec<[u8; 3]>,
    /// One number of those above, made huge.
    huge: Option<(u8, u8, u32)>,
    mask: u8,
    window: Option<(Option<u8>, Option<u8>)>,
}

impl Batch {
    fn read(source: &mut Unstructured<'_>) -> arbitrary::Result<Self> {
        Ok(Self {
            query_start: source.arbitrary()?,
            kv_len: source.arbitrary()?,
            page_table: source.arbitrary()?,
            max_pages: source.arbitrary()?,
            page_size: source.arbitrary()?,
            pool_pages: source.arbitrary()?,
            causal: source.arbitrary()?,
            tree: source.arbitrary()?,
            prefix_spans: source.arbitrary()?,
            huge: source.arbitrary()?,
            mask: source.arbitrary()?,
            window: source.arbitrary()?,
        })
    }

    fn layout(&self) -> BatchLayout {
        let wide = |numbers: &[u8]| numbers.iter().map(|number| u32::from(*number)).collect::<Vec<_>>();
        let mut layout = BatchLayout::new(self.page_size.into(), self.pool_pages.into());
        layout.query_start = wide(&self.query_start);
        layout.kv_len = wide(&self.kv_len);
        layout.page_table = self.page_table.iter().map(|page| i32::from(*page)).collect();
        layout.max_pages = self.max_pages.into();
        layout.causal = self.causal.clone();
        layout.tree = self.tree.as_ref().map(|(words, bits)| TreeMask { words: (*words).into(), bits: bits.clone() });
        layout.prefix_spans = self.prefix_spans.iter().map(|span| span.map(u32::from)).collect();
        if let Some((which, place, value)) = self.huge {
            let set = |list: &mut [u32]| {
                if let Some(number) = list.get_mut(usize::from(place)) {
                    *number = value;
                }
            };
            match which % 8 {
                0 => set(&mut layout.query_start),
                1 => set(&mut layout.kv_len),
                2 => layout.page_size = value,
                3 => layout.pool_pages = value,
                4 => layout.max_pages = value as usize,
                5 => layout.max_pages = usize::MAX - value as usize,
                6 => layout.page_table.iter_mut().for_each(|page| *page = value.cast_signed()),
                _ => layout.prefix_spans.push([place.into(), 0, value]),
            }
        }
        layout
    }
}

/// Tables of pages, lengths, masks and spans.
pub fn page_table(data: &[u8]) {
    let Ok(described) = Batch::read(&mut Unstructured::new(data)) else { return };
    let batch = described.layout();
    let kind = AttentionKind::Gqa { query_heads: 2, kv_heads: 1, head_dim: 4, value_dim: 4 };
    let mask = [Mask::Causal, Mask::Bidirectional, Mask::Tree][usize::from(described.mask % 3)];
    let mut problem = AttentionProblem::new(kind, DType::F32).mask(mask);
    problem.lse = true;
    problem.per_sequence_causal = batch.causal.is_some();
    problem.prefix_spans = !batch.prefix_spans.is_empty();
    problem.window =
        described.window.map(|(left, right)| Window { left: left.map(u32::from), right: right.map(u32::from) });
    if batch.validate(&problem).is_err() {
        return;
    }
    let slots = u64::from(batch.pool_pages) * u64::from(batch.page_size);
    for sequence in 0..batch.sequences() {
        for position in (0..batch.kv_len[sequence]).take(1 << 12) {
            assert!((batch.slot(sequence, position) as u64) < slots);
        }
    }
    if slots > MOST_SLOTS || batch.rows() > 64 {
        return;
    }

    let device = Device::cpu();
    let cpu = polyattn_cpu::Cpu;
    let kernel = match cpu.prepare(&device, &problem) {
        Ok(kernel) => kernel,
        Err(BackendError::Declined(_)) => return,
        Err(error) => panic!("{error}"),
    };
    let whole = answer(&device, &kernel, &batch);
    match Cascade::prepare(&cpu, &device, &problem) {
        Ok(cascade) => {
            let kernel: Arc<dyn AttentionKernel> = Arc::new(cascade.sharing_above(0));
            let shared = answer(&device, &kernel, &batch);
            for (a, b) in whole.iter().zip(&shared) {
                assert!((a - b).abs() <= 1e-4 * (1.0 + a.abs()) || a == b, "{a} and {b} of {batch:?}");
            }
        }
        Err(BackendError::Declined(_)) => {}
        Err(error) => panic!("{error}"),
    }
}

/// Stores rows, then attends; LSE behind the output.
fn answer(device: &Device, kernel: &Arc<dyn AttentionKernel>, batch: &BatchLayout) -> Vec<f32> {
    let wave = |count: usize| (0..count).map(|i| (i as f32 * 0.7).sin()).collect::<Vec<_>>();
    let (rows, slots) = (batch.rows() as usize, (batch.pool_pages * batch.page_size) as usize);
    let upload = |values: &[f32]| device.upload(values, "data").unwrap();
    let poison = vec![f32::NAN; rows * 8];
    let (q, new) = (upload(&wave(rows * 8)), upload(&wave(rows * 8)));
    let (k, v) = (upload(&wave(slots * 4)), upload(&wave(slots * 4)));
    let (out, lse) = (upload(&poison), upload(&poison[..rows * 2]));
    let plan = kernel.plan(batch).unwrap();
    let mut commands = device.commands().unwrap();
    kernel.store_kv(&mut commands, &plan, &StoreKv::from_rows(&new, 8, 0, 4, &k, &v)).unwrap();
    let mut io = AttentionIo::new(&q, &k, &v, &out);
    io.lse = Some(lse.whole());
    kernel.encode(&mut commands, &plan, &io).unwrap();
    let _ = commands.submit().unwrap();
    let answer = [device.download::<f32>(&out).unwrap(), device.download(&lse).unwrap()].concat();
    assert!(answer.iter().all(|x| !x.is_nan()), "{answer:?} of {batch:?}");
    answer
}
