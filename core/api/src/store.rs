//! The provided writer of K and V for the common layouts.

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use polyattn_device::{Access, BufferSlice, Commands, DType, Device, DeviceError, Pipeline, PipelineSpec, wgsl};

use crate::{AttentionKind, AttentionProblem, BATCH_WGSL, BackendError, BatchLayout, Plan, StoreKv};

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Immediates {
    k_words: u32,
    v_words: u32,
    k_offset: u32,
    k_stride: u32,
    v_offset: u32,
    v_stride: u32,
}

/// Rows of one tensor on their way into its cache.
struct Rows<'a> {
    source: BufferSlice<'a>,
    offset: u32,
    stride: u32,
    /// Elements of a row.
    row: u32,
    cache: BufferSlice<'a>,
}

impl Rows<'_> {
    fn validate(&self, batch: &BatchLayout, dtype: DType) -> Result<(), BackendError> {
        let slots = u64::from(batch.pool_pages) * u64::from(batch.page_size);
        let needed = slots * u64::from(self.row) * dtype.bytes();
        if self.cache.bytes() < needed {
            return Err(BackendError::Io(format!("cache has {} bytes, needs {needed}", self.cache.bytes())));
        }
        let last_row = u64::from(batch.rows().saturating_sub(1));
        let elements = u64::from(self.offset) + last_row * u64::from(self.stride) + u64::from(self.row);
        if batch.rows() > 0 && self.source.bytes() < elements * 4 {
            return Err(BackendError::Io(format!("rows have {} bytes, need {}", self.source.bytes(), elements * 4)));
        }
        if !self.row.is_multiple_of(2) && dtype != DType::F32 {
            return Err(BackendError::Io(format!("rows of {} 16-bit elements are no whole number of words", self.row)));
        }
        Ok(())
    }
}

pub(crate) fn store_kv(
    problem: &AttentionProblem,
    commands: &mut Commands,
    plan: &Plan,
    io: &StoreKv<'_>,
) -> Result<(), BackendError> {
    let Some(dtype) = problem.kv_dtype.as_dtype() else {
        return Err(BackendError::Io(format!("the provided store_kv does not write {}", problem.kv_dtype)));
    };
    let heads = problem.kind.kv_heads();
    let k = Rows {
        source: io.k,
        offset: io.k_offset,
        stride: io.k_stride,
        row: heads * problem.kind.query_dim(),
        cache: io.k_cache,
    };
    let v = match problem.kind {
        AttentionKind::Gqa { value_dim, .. } => Some(Rows {
            source: io.v,
            offset: io.v_offset,
            stride: io.v_stride,
            row: heads * value_dim,
            cache: io.v_cache,
        }),
        AttentionKind::Mla { .. } => None,
    };
    let batch = plan.batch();
    for rows in [Some(&k), v.as_ref()].into_iter().flatten() {
        rows.validate(batch, dtype)?;
        if commands.device().is_cpu() {
            match dtype {
                DType::F32 => scatter(batch, rows, |x| x)?,
                DType::F16 => scatter(batch, rows, f16::from_f32)?,
                _ => scatter(batch, rows, bf16::from_f32)?,
            }
        }
    }
    if commands.device().is_cpu() {
        return Ok(());
    }

    let variant = (dtype as u64) << 1 | u64::from(v.is_some());
    let pipeline =
        commands.device().cached_pipeline("store_kv", variant, |device| compile(device, dtype, v.is_some()))?;
    let words = |rows: &Rows<'_>| (u64::from(rows.row) * dtype.bytes() / 4) as u32;
    let immediates = Immediates {
        k_words: words(&k),
        v_words: v.as_ref().map_or(0, words),
        k_offset: k.offset,
        k_stride: k.stride,
        v_offset: io.v_offset,
        v_stride: io.v_stride,
    };
    let groups = [immediates.k_words.max(immediates.v_words).div_ceil(64), batch.rows(), 1];
    let index = plan.index(commands)?;
    let bytes = bytemuck::bytes_of(&immediates);
    match &v {
        Some(v) => commands.dispatch(&pipeline, &[index, k.source, k.cache, v.source, v.cache], bytes, groups)?,
        None => commands.dispatch(&pipeline, &[index, k.source, k.cache], bytes, groups)?,
    }
    Ok(())
}

fn compile(device: &Device, dtype: DType, with_v: bool) -> Result<Pipeline, DeviceError> {
    use Access::{Read, ReadWrite};
    let all = [Read, Read, ReadWrite, Read, ReadWrite];
    device.pipeline(&PipelineSpec {
        label: "store_kv",
        source: &source(dtype, with_v),
        entry: "store",
        bindings: if with_v { &all } else { &all[..3] },
        immediate_bytes: size_of::<Immediates>() as u32,
        constants: &[],
    })
}

fn source(dtype: DType, with_v: bool) -> String {
    let (width, narrow) = match dtype {
        DType::F32 => ("1u", "bitcast<u32>(a)".to_owned()),
        _ => ("2u", wgsl::narrow2(dtype, "vec2<f32>(a, b)")),
    };
    let narrow = format!("const WIDTH: u32 = {width};\nfn narrow(a: f32, b: f32) -> u32 {{ return {narrow}; }}\n");
    let (v_bindings, store_v) = if with_v {
        (
            "@group(0) @binding(3) var<storage, read> v_rows: array<f32>;\n\
             @group(0) @binding(4) var<storage, read_write> v_cache: array<u32>;\n",
            "if (id.x < call.v_words) {\n\
             let first = call.v_offset + r * call.v_stride + id.x * WIDTH;\n\
             v_cache[to * call.v_words + id.x] = narrow(v_rows[first], v_rows[first + WIDTH - 1u]);\n}",
        )
    } else {
        ("", "")
    };
    [wgsl::PREAMBLE, BATCH_WGSL, &narrow, v_bindings, &include_str!("store.wgsl").replace("STORE_V", store_v)].concat()
}

fn scatter<T: Pod>(batch: &BatchLayout, rows: &Rows<'_>, convert: impl Fn(f32) -> T) -> Result<(), BackendError> {
    let from = rows.source.buffer().read::<f32>()?;
    let from = &from[rows.source.offset() as usize / 4..];
    let mut into = rows.cache.buffer().write::<T>()?;
    let into = &mut into[rows.cache.offset() as usize / size_of::<T>()..];
    let row = rows.row as usize;
    for sequence in 0..batch.sequences() {
        let (start, queries) = batch.queries(sequence);
        for query in 0..queries {
            let slot = batch.slot(sequence, batch.kv_len[sequence] - queries + query);
            let source = rows.offset as usize + (start + query) as usize * rows.stride as usize;
            for (to, from) in into[slot * row..][..row].iter_mut().zip(&from[source..]) {
                *to = convert(*from);
            }
        }
    }
    Ok(())
}
