//! The provided writer of K and V.

use bytemuck::{Pod, Zeroable};
use half::{bf16, f16};
use polyattn_device::{Access, BufferSlice, Commands, DType, Device, DeviceError, Pipeline, PipelineSpec, wgsl};

use crate::{
    AttentionKind, AttentionProblem, BATCH_WGSL, BackendError, BatchLayout, KvDType, KvLayout, MoveKv, Plan, StoreKv,
    narrow,
};

/// Rows along one dimension of a dispatch: what every device allows.
pub(crate) const MOST_ROWS: u32 = 65_535;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Immediates {
    parts: u32,
    k_words: u32,
    v_words: u32,
    k_offset: u32,
    k_stride: u32,
    v_offset: u32,
    v_stride: u32,
}

/// What decides the shader.
#[derive(Clone, Copy)]
struct Form {
    dtype: KvDType,
    layout: KvLayout,
    with_v: bool,
}

/// Rows of one tensor on their way into its cache.
pub(crate) struct Rows<'a> {
    source: BufferSlice<'a>,
    offset: u32,
    stride: u32,
    /// Heads that have places of their own in the cache, or 1 where a row is written as it is.
    parts: u32,
    /// Elements of a part.
    dim: u32,
    cache: BufferSlice<'a>,
    scale: Option<BufferSlice<'a>>,
}

impl<'a> Rows<'a> {
    /// Those of K, and of V where there are any, each head `apart` or all in one.
    pub(crate) fn of(kind: AttentionKind, io: &StoreKv<'a>, apart: bool) -> (Self, Option<Self>) {
        let heads = kind.kv_heads();
        let (parts, width) = if apart { (heads, 1) } else { (1, heads) };
        let k = Self {
            source: io.k,
            offset: io.k_offset,
            stride: io.k_stride,
            parts,
            dim: width * kind.query_dim(),
            cache: io.k_cache,
            scale: io.k_scale,
        };
        let v = match kind {
            AttentionKind::Gqa { value_dim, .. } => Some(Self {
                source: io.v,
                offset: io.v_offset,
                stride: io.v_stride,
                parts,
                dim: width * value_dim,
                cache: io.v_cache,
                scale: io.v_scale,
            }),
            AttentionKind::Mla { .. } => None,
        };
        (k, v)
    }

    fn row(&self) -> u32 {
        self.parts * self.dim
    }

    pub(crate) fn validate(&self, batch: &BatchLayout, dtype: KvDType) -> Result<(), BackendError> {
        let slots = u64::from(batch.pool_pages) * u64::from(batch.page_size);
        let needed = slots * u64::from(self.row()) * dtype.bytes();
        if self.cache.bytes() < needed {
            return Err(BackendError::Io(format!("cache has {} bytes, needs {needed}", self.cache.bytes())));
        }
        let last_row = u64::from(batch.rows().saturating_sub(1));
        let elements = u64::from(self.offset) + last_row * u64::from(self.stride) + u64::from(self.row());
        if batch.rows() > 0 && self.source.bytes() < elements * 4 {
            return Err(BackendError::Io(format!("rows have {} bytes, need {}", self.source.bytes(), elements * 4)));
        }
        let bits = dtype.bytes() * 8;
        if !(u64::from(self.dim) * dtype.bytes()).is_multiple_of(4) {
            let message = format!("rows of {} {bits}-bit elements are no whole number of words", self.dim);
            return Err(BackendError::Io(message));
        }
        if dtype == KvDType::Q8 {
            let needed = slots * u64::from(self.parts) * 4;
            match self.scale {
                None => return Err(BackendError::Io("the scales of a q8 cache are missing".into())),
                Some(scale) if scale.bytes() < needed => {
                    return Err(BackendError::Io(format!("scales have {} bytes, need {needed}", scale.bytes())));
                }
                Some(_) => {}
            }
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
    let (dtype, layout) = (problem.kv_dtype, problem.kv_layout);
    // Where the heads of a token follow each other and need no scale, its row is copied whole.
    let (k, v) = Rows::of(problem.kind, io, layout == KvLayout::PageHeadToken || dtype == KvDType::Q8);
    plan.stores()?;
    let batch = plan.batch();
    for rows in [Some(&k), v.as_ref()].into_iter().flatten() {
        rows.validate(batch, dtype)?;
        if commands.device().is_cpu() {
            write(batch, layout, rows, dtype)?;
        }
    }
    if commands.device().is_cpu() {
        return Ok(());
    }

    let form = Form { dtype, layout, with_v: v.is_some() };
    let variant = (dtype as u64) << 8 | (layout as u64) << 1 | u64::from(form.with_v);
    let pipeline = commands.device().cached_pipeline("store_kv", variant, |device| compile(device, form))?;
    let words = |rows: &Rows<'_>| (u64::from(rows.dim) * dtype.bytes() / 4) as u32;
    let immediates = Immediates {
        parts: k.parts,
        k_words: words(&k),
        v_words: v.as_ref().map_or(0, words),
        k_offset: k.offset,
        k_stride: k.stride,
        v_offset: io.v_offset,
        v_stride: io.v_stride,
    };
    let groups = [
        (immediates.k_words.max(immediates.v_words) * k.parts).div_ceil(64),
        batch.rows().min(MOST_ROWS),
        batch.rows().div_ceil(MOST_ROWS),
    ];
    let index = plan.index(commands)?;
    let mut slices = [index; 7];
    let mut bound = 1;
    for rows in [Some(&k), v.as_ref()].into_iter().flatten() {
        for slice in [Some(rows.source), Some(rows.cache), rows.scale.filter(|_| dtype == KvDType::Q8)] {
            let Some(slice) = slice else { continue };
            slices[bound] = slice;
            bound += 1;
        }
    }
    commands.dispatch(&pipeline, &slices[..bound], bytemuck::bytes_of(&immediates), groups)?;
    Ok(())
}

fn compile(device: &Device, form: Form) -> Result<Pipeline, DeviceError> {
    use Access::{Read, ReadWrite};
    let mut bindings = vec![Read];
    for _ in 0..1 + usize::from(form.with_v) {
        bindings.extend([Read, ReadWrite]);
        bindings.extend((form.dtype == KvDType::Q8).then_some(ReadWrite));
    }
    device.pipeline(&PipelineSpec {
        label: "store_kv",
        source: &source(form),
        entry: "store",
        bindings: &bindings,
        immediate_bytes: size_of::<Immediates>() as u32,
        constants: &[],
    })
}

fn source(form: Form) -> String {
    let scaled = form.dtype == KvDType::Q8;
    let width = 4 / form.dtype.bytes();
    let word = word(form.dtype, "T_rows");
    let scale = if scaled {
        "let start = first - word * 4u;
         var largest = 0u;
         for (var i = 0u; i < call.T_words * 4u; i++) {
             largest = max(largest, bitcast<u32>(T_rows[start + i]) & 0x7fffffffu);
         }
         let scale = scale_of(largest);
         if (word == 0u) { T_scale[row] = scale; }"
    } else {
        ""
    };
    let store = format!(
        "if (id.x < call.T_words * call.parts) {{
            let word = id.x % call.T_words;
            let row = cache_row(to, id.x / call.T_words, call.parts);
            let first = call.T_offset + r * call.T_stride + id.x * {width}u;
            {scale}
            T_cache[row * call.T_words + word] = {word};
        }}\n"
    );
    // The bindings follow each other: rows, cache and scales of K, then those of V.
    let mut bindings = String::new();
    let mut bind = |binding: u32, access: &str, name: &str, element: &str| {
        bindings += &format!("@group(0) @binding({binding}) var<storage, {access}> {name}: array<{element}>;\n");
    };
    if scaled {
        bind(3, "read_write", "k_scale", "u32");
    }
    if form.with_v {
        let next = if scaled { 4 } else { 3 };
        bind(next, "read", "v_rows", "f32");
        bind(next + 1, "read_write", "v_cache", "u32");
        if scaled {
            bind(next + 2, "read_write", "v_scale", "u32");
        }
    }
    let mut stores = store.replace("T_", "k_");
    if form.with_v {
        stores += &store.replace("T_", "v_");
    }
    let main = include_str!("store.wgsl").replace("STORE", &stores).replace("MOST_ROWS", &MOST_ROWS.to_string());
    [wgsl::PREAMBLE, BATCH_WGSL, form.layout.wgsl(), &helpers(form.dtype), &bindings, &main].concat()
}

/// WGSL that [`word`] calls.
pub(crate) fn helpers(dtype: KvDType) -> String {
    match dtype {
        KvDType::Q8 => narrow::SCALED_WGSL.to_owned(),
        KvDType::F8E4M3 => narrow::E4M3.wgsl(),
        KvDType::F8E5M2 => narrow::E5M2.wgsl(),
        _ => String::new(),
    }
}

/// The WGSL expression of a word of a cache: the elements of the f32 array `from` from `first` on, in steps of `scale`
/// where the format has one.
pub(crate) fn word(dtype: KvDType, from: &str) -> String {
    let bytes = |scale: &str| {
        (0..4)
            .map(|at| format!("(byte_of({from}[first + {at}u]{scale}) << {}u)", at * 8))
            .collect::<Vec<_>>()
            .join(" | ")
    };
    match dtype.as_dtype() {
        Some(DType::F32) => format!("bitcast<u32>({from}[first])"),
        Some(dtype) => wgsl::narrow2(dtype, &format!("vec2<f32>({from}[first], {from}[first + 1u])")),
        None if dtype == KvDType::Q8 => bytes(", scale"),
        None => bytes(""),
    }
}

/// Writes on the CPU.
fn write(batch: &BatchLayout, layout: KvLayout, rows: &Rows<'_>, dtype: KvDType) -> Result<(), BackendError> {
    /// Row by row, element by element.
    fn each<T>(convert: impl Fn(f32) -> T) -> impl FnMut(usize, &[f32], &mut [T]) {
        move |_, from, into| into.iter_mut().zip(from).for_each(|(to, from)| *to = convert(*from))
    }
    match (dtype, rows.scale) {
        (KvDType::F16, _) => scatter(batch, layout, rows, each(f16::from_f32)),
        (KvDType::BF16, _) => scatter(batch, layout, rows, each(bf16::from_f32)),
        (KvDType::F8E4M3, _) => scatter(batch, layout, rows, each(|x| narrow::E4M3.narrow(x))),
        (KvDType::F8E5M2, _) => scatter(batch, layout, rows, each(|x| narrow::E5M2.narrow(x))),
        (KvDType::Q8, Some(scale)) => {
            let mut scales = scale.buffer().write::<f32>()?;
            let scales = &mut scales[scale.offset() as usize / 4..];
            scatter(batch, layout, rows, |row, from, into: &mut [u8]| {
                let scale = narrow::scale(narrow::largest(from));
                scales[row] = scale;
                into.iter_mut().zip(from).for_each(|(to, from)| *to = narrow::steps(*from, scale));
            })
        }
        _ => scatter(batch, layout, rows, each(|x| x)),
    }
}

/// Hands each part of a row and its place in the cache, with the number of that place, to `put`.
fn scatter<T: Pod>(
    batch: &BatchLayout,
    layout: KvLayout,
    rows: &Rows<'_>,
    mut put: impl FnMut(usize, &[f32], &mut [T]),
) -> Result<(), BackendError> {
    let from = rows.source.buffer().read::<f32>()?;
    let from = &from[rows.source.offset() as usize / 4..];
    let mut into = rows.cache.buffer().write::<T>()?;
    let into = &mut into[rows.cache.offset() as usize / size_of::<T>()..];
    let (dim, parts) = (rows.dim as usize, rows.parts as usize);
    for sequence in 0..batch.sequences() {
        let (start, queries) = batch.queries(sequence);
        for query in 0..queries {
            let slot = batch.slot(sequence, batch.kv_len[sequence] - queries + query);
            let source = rows.offset as usize + (start + query) as usize * rows.stride as usize;
            for part in 0..parts {
                let row = layout.row(slot, part, parts, batch.page_size as usize);
                put(row, &from[source + part * dim..][..dim], &mut into[row * dim..][..dim]);
            }
        }
    }
    Ok(())
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Moves {
    count: u32,
    parts: u32,
    words: u32,
    page_size: u32,
}

/// Moves tokens within a cache.
pub(crate) fn move_kv(
    problem: &AttentionProblem,
    commands: &mut Commands,
    io: &MoveKv<'_>,
) -> Result<(), BackendError> {
    if io.moves.is_empty() {
        return Ok(());
    }
    let (dtype, layout, kind) = (problem.kv_dtype, problem.kv_layout, problem.kind);
    let heads = kind.kv_heads();
    let scaled = dtype == KvDType::Q8;
    let apart = layout == KvLayout::PageHeadToken || scaled;
    // Each tensor with its parts of a token, and the bytes of a part.
    let rows = |dim: u32| match apart {
        true => (heads, u64::from(dim) * dtype.bytes()),
        false => (1, u64::from(heads * dim) * dtype.bytes()),
    };
    let mut tensors = vec![(io.k_cache, rows(kind.query_dim()))];
    let missing = || BackendError::Io("the scales of a q8 cache are missing".into());
    if scaled {
        tensors.push((io.k_scale.ok_or_else(missing)?, (heads, 4)));
    }
    if let AttentionKind::Gqa { value_dim, .. } = kind {
        tensors.push((io.v_cache, rows(value_dim)));
        if scaled {
            tensors.push((io.v_scale.ok_or_else(missing)?, (heads, 4)));
        }
    }
    let slots = io
        .moves
        .iter()
        .flatten()
        .max()
        .map_or(0, |slot| u64::from(*slot) + 1)
        .next_multiple_of(io.page_size.max(1).into());
    if io.words.bytes() < io.moves.len() as u64 * 8 {
        let message =
            format!("moves have {} bytes, {} of them need {}", io.words.bytes(), io.moves.len(), io.moves.len() * 8);
        return Err(BackendError::Io(message));
    }
    for (cache, (parts, bytes)) in tensors {
        if !bytes.is_multiple_of(4) {
            return Err(BackendError::Io(format!("rows of {bytes} bytes are no whole number of words")));
        }
        let needed = slots * u64::from(parts) * bytes;
        if cache.bytes() < needed {
            return Err(BackendError::Io(format!("cache has {} bytes, needs {needed}", cache.bytes())));
        }
        let call = Moves { count: io.moves.len() as u32, parts, words: (bytes / 4) as u32, page_size: io.page_size };
        if commands.device().is_cpu() {
            move_words(cache, layout, call, io.moves)?;
            continue;
        }
        let pipeline = commands.device().cached_pipeline("move_kv", layout as u64, |device| {
            let source = include_str!("move.wgsl").to_owned() + layout.wgsl();
            device.pipeline(&PipelineSpec {
                label: "move_kv",
                source: &source,
                entry: "move_kv",
                bindings: &[Access::Read, Access::ReadWrite],
                immediate_bytes: size_of::<Moves>() as u32,
                constants: &[],
            })
        })?;
        let groups = [(call.parts * call.words).div_ceil(64), 1, 1];
        commands.dispatch(&pipeline, &[io.words, cache], bytemuck::bytes_of(&call), groups)?;
    }
    Ok(())
}

fn move_words(cache: BufferSlice<'_>, layout: KvLayout, call: Moves, moves: &[[u32; 2]]) -> Result<(), BackendError> {
    let mut cache_words = cache.buffer().write::<u32>()?;
    let cache_words = &mut cache_words[cache.offset() as usize / 4..];
    let words = call.words as usize;
    for [from, to] in moves {
        for part in 0..call.parts as usize {
            let row = |slot: u32| layout.row(slot as usize, part, call.parts as usize, call.page_size as usize) * words;
            cache_words.copy_within(row(*from)..row(*from) + words, row(*to));
        }
    }
    Ok(())
}
