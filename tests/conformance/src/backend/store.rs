//! New rows of K and V on their way into a cache.

use half::{bf16, f16};
use polyattn_api::{
    AttentionBackend, AttentionKind, AttentionProblem, BatchLayout, Buffer, DType, HeadPart, KvDType, KvLayout,
    QuerySource, RotatedQueries, Rotation, StoreKv, StoreRotated,
};

use super::{
    Trials,
    subject::{Subject, kind_name},
};
use crate::Failure;

/// What lies in a cache before: a pattern that no conversion of a row makes.
const BEFORE: u8 = 0xa5;

pub(super) fn trials(trials: &mut Trials) {
    let subject = trials.subject.clone();
    for kind in subject.kinds() {
        for (dtype, kv_dtype) in subject.formats() {
            let Some(stored) = kv_dtype.as_dtype() else { continue };
            trials.add(format!("{}/store/{dtype} rows into {kv_dtype}", kind_name(kind)), move |subject| {
                store(subject, kind, dtype, stored)
            });
        }
    }
}

/// Bytes of a value in a cache.
fn narrow(value: f32, dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => value.to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
        _ => bf16::from_f32(value).to_le_bytes().to_vec(),
    }
}

fn store(subject: &Subject, kind: AttentionKind, dtype: DType, stored: DType) -> Result<(), Failure> {
    let broken = |error: &dyn std::fmt::Display| Failure::new(error.to_string());
    let (Some(phase), Some(mask)) = (subject.phases().first().copied(), subject.mask()) else { return Ok(()) };
    let Some(page_size) = subject.can().page_sizes.nearest(4) else { return Ok(()) };
    let mut problem = AttentionProblem::new(kind, dtype).mask(mask).page_size(page_size);
    (problem.kv_dtype, problem.phase) = (KvDType::from(stored), phase);
    let layouts = subject.can().kv_layouts;
    let Some(layout) = KvLayout::of(kind).iter().find(|layout| layouts.contains(layout)) else { return Ok(()) };
    problem.kv_layout = *layout;
    // The element of a slot's head, as the layout has it.
    let heads = kind.kv_heads() as usize;
    let place = |slot: usize, head: usize| match layout {
        KvLayout::PageHeadToken => {
            let (page, token) = (slot / page_size as usize, slot % page_size as usize);
            (page * heads + head) * page_size as usize + token
        }
        _ => slot * heads + head,
    };

    let pages = 9;
    let mut batch = BatchLayout::new(page_size, pages);
    // One row at a page's end, one behind it, several over an edge, none.
    for (rows, length, own) in [
        (1, page_size, &[3][..]),
        (1, page_size + 1, &[1, 5]),
        (3.min(page_size + 1), page_size + 1, &[7, 0]),
        (0, 2.min(page_size), &[8]),
    ] {
        let rows = if phase == polyattn_api::Phase::Decode { rows.min(1) } else { rows };
        batch.push(rows, length, own);
    }
    if problem.mask == polyattn_api::Mask::Tree {
        let rows = batch.rows() as usize;
        batch.tree = Some(polyattn_api::TreeMask { words: 1, bits: vec![1; rows] });
    }

    let latent = matches!(kind, AttentionKind::Mla { .. });
    let k_row = heads * kind.query_dim() as usize;
    let v_row = if latent { 0 } else { heads * kind.output_dim() as usize };
    // Rows lie among other things: something in front, between and behind.
    let q_row = kind.query_heads() as usize * kind.query_dim() as usize;
    let (front, stride) = (5usize, k_row + v_row + q_row + 11);
    let total = batch.rows() as usize;
    let values: Vec<f32> = (0..front + total * stride).map(|i| ((i * 37 % 1009) as f32 - 504.0) / 64.0).collect();
    let slots = pages as usize * page_size as usize;
    let bytes = |row: usize| slots * row * stored.bytes() as usize;
    let device = &subject.device;
    let rows = device.upload(&values, "rows").map_err(|error| broken(&error))?;
    let before = |count: usize| device.upload(&vec![BEFORE; count.max(16)], "cache").map_err(|error| broken(&error));
    let (k_cache, v_cache) = (before(bytes(k_row))?, before(bytes(v_row))?);

    let kernel = subject.prepare(device, &problem).map_err(|error| broken(&error))?;
    let plan = kernel.plan(&batch).map_err(|error| broken(&error))?;
    let mut commands = device.commands().map_err(|error| broken(&error))?;
    let caches = if latent { (&k_cache, &k_cache) } else { (&k_cache, &v_cache) };
    let io = StoreKv::from_rows(&rows, stride as u32, front as u32, (front + k_row) as u32, caches.0, caches.1);
    kernel.store_kv(&mut commands, &plan, &io).map_err(|error| broken(&error))?;
    commands.submit().map_err(|error| broken(&error))?;
    let cached = |k_cache: &Buffer, v_cache: &Buffer, step: &str| {
        for (name, cache, row, offset) in [("K", k_cache, k_row, front), ("V", v_cache, v_row, front + k_row)] {
            if row == 0 {
                continue;
            }
            let dim = row / heads;
            let element = stored.bytes() as usize;
            let mut want = vec![BEFORE; bytes(row)];
            for sequence in 0..batch.sequences() {
                let (start, queries) = batch.queries(sequence);
                for query in 0..queries {
                    let slot = batch.slot(sequence, batch.kv_len[sequence] - queries + query);
                    let from = offset + (start + query) as usize * stride;
                    for (i, value) in values[from..from + row].iter().enumerate() {
                        let to = (place(slot, i / dim) * dim + i % dim) * element;
                        want[to..to + element].copy_from_slice(&narrow(*value, stored));
                    }
                }
            }
            let got = device.download::<u8>(cache).map_err(|error| broken(&error))?;
            if let Some(at) = want.iter().zip(&got).position(|(want, got)| want != got) {
                let (slot, what) = (
                    at / element / row,
                    if want[at] == BEFORE { "nobody's slot was written" } else { "a row is wrong" },
                );
                let what = format!("{step}{name} cache: {what}, at byte {at} (token place {slot} of the pool)");
                return Err(Failure::new(what));
            }
        }
        Ok(())
    };
    cached(&k_cache, &v_cache, "")?;

    // A kernel that rotates and stores in one step stores the same where nothing turns.
    let dim = kind.query_dim() / 2 * 2;
    if dim == 0 {
        return Ok(());
    }
    let (k_cache, v_cache, q_out) = (before(bytes(k_row))?, before(bytes(v_row))?, before(total * q_row * 4)?);
    let still: Vec<[f32; 2]> = vec![[1.0, 0.0]; dim as usize / 2];
    let table = device.upload(still.as_flattened(), "rotations").map_err(|error| broken(&error))?;
    let positions = device.upload(&vec![0u32; total.max(4)], "positions").map_err(|error| broken(&error))?;
    let mut store = io;
    (store.k_cache, store.v_cache) = (k_cache.whole(), if latent { &k_cache } else { &v_cache }.whole());
    let rotation = Rotation {
        table: table.whole(),
        table_positions: 1,
        dim,
        first: 0,
        interleaved: false,
        positions: positions.whole(),
    };
    let mut io = StoreRotated::new(store, rotation);
    let q_offset = front + k_row + v_row + 3;
    let queries: Vec<f32> = (0..total).flat_map(|row| &values[q_offset + row * stride..][..q_row]).copied().collect();
    // Those of latent attention lie in two parts, of which other operations made one each.
    let parts = device.upload(&queries, "queries").map_err(|error| broken(&error))?;
    let source = match kind {
        AttentionKind::Mla { latent_dim, rope_dim, .. } => {
            let part = |offset, dim| HeadPart { rows: parts.whole(), offset, stride: kind.query_dim(), dim };
            QuerySource::Parts([part(0, latent_dim), part(latent_dim, rope_dim)])
        }
        _ => QuerySource::KeyRows(q_offset as u32),
    };
    io.queries = Some(RotatedQueries { source, norm: None, out: q_out.whole() });
    let mut commands = device.commands().map_err(|error| broken(&error))?;
    if !kernel.store_rotated(&mut commands, &plan, &io).map_err(|error| broken(&error))? {
        return Ok(());
    }
    commands.submit().map_err(|error| broken(&error))?;
    cached(&k_cache, &v_cache, "stored with a rotation, ")?;
    let wanted: Vec<u8> = queries.iter().flat_map(|value| narrow(*value, dtype)).collect();
    let got = device.download::<u8>(&q_out).map_err(|error| broken(&error))?;
    match wanted.iter().zip(&got).position(|(want, got)| want != got) {
        Some(at) => Err(Failure::new(format!("stored with a rotation, the queries are wrong at byte {at}"))),
        None => Ok(()),
    }
}
