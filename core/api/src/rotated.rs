//! The provided writer of queries, keys and values that are still to be normed and rotated.

use bytemuck::{Pod, Zeroable};
use polyattn_device::{Access, BufferSlice, Commands, DType, Device, DeviceError, Pipeline, PipelineSpec, wgsl};

use crate::{
    AttentionKind, AttentionProblem, BATCH_WGSL, BackendError, KvDType, KvLayout, Plan, StoreKv,
    store::{MOST_ROWS, Rows, helpers, word},
};

/// A rotation of heads by position (RoPE, arXiv 2104.09864): of each pair (a, b) it makes
/// (a · cos − b · sin, b · cos + a · sin).
#[derive(Clone, Copy, Debug)]
pub struct Rotation<'a> {
    /// `[table_positions, dim / 2, 2]`, f32: cosine and sine of each pair.
    pub table: BufferSlice<'a>,
    /// Positions of the table.
    pub table_positions: u32,
    /// Elements of a head that are rotated, an even number.
    pub dim: u32,
    /// The first of them, an even number.
    pub first: u32,
    /// Whether neighbours are a pair; otherwise an element of the first half and the one as far into the second.
    pub interleaved: bool,
    /// `[rows]`, u32: the position of each row; one beyond the table is taken as its last.
    pub positions: BufferSlice<'a>,
}

/// An RMS norm of the first elements of each head, `x / sqrt(mean(x²) + eps) · weight`; those behind them stay.
#[derive(Clone, Copy, Debug)]
pub struct HeadNorm<'a> {
    /// `[dim]`, f32.
    pub weight: BufferSlice<'a>,
    /// How many elements it takes: all of a head, or with latent attention the latent's.
    pub dim: u32,
    /// What is added to the mean of squares.
    pub eps: f32,
}

/// One of two parts of each query head, f32: head h of row r starts at element
/// `offset + (r · query_heads + h) · stride`.
#[derive(Clone, Copy, Debug)]
pub struct HeadPart<'a> {
    /// The buffer.
    pub rows: BufferSlice<'a>,
    /// First element of the first head of row 0.
    pub offset: u32,
    /// Elements from one head to the next.
    pub stride: u32,
    /// Elements of the part.
    pub dim: u32,
}

impl HeadPart<'_> {
    /// Offset, stride and elements, as [`HEAD_PARTS_WGSL`] reads them.
    #[must_use]
    pub const fn words(self) -> [u32; 3] {
        [self.offset, self.stride, self.dim]
    }
}

/// Where queries lie before their rotation, f32.
#[derive(Clone, Copy, Debug)]
pub enum QuerySource<'a> {
    /// In the buffer of the K rows: the heads of row 0 follow each other from this element on; rows lie as far apart as
    /// those of K.
    KeyRows(u32),
    /// The first elements of each head and the rest of them, `head_dim` together, wherever each part was made. With
    /// latent attention these are what became of the key's projection (`[.., latent_dim]`), and the rope part of the
    /// queries as they were before it (`[.., rope_dim]`).
    Parts([HeadPart<'a>; 2]),
}

/// Where queries come from and go to.
#[derive(Clone, Copy, Debug)]
pub struct RotatedQueries<'a> {
    /// Where they lie.
    pub source: QuerySource<'a>,
    /// A norm of each head, before the rotation.
    pub norm: Option<HeadNorm<'a>>,
    /// `[rows, query_heads, head_dim]` of the problem's dtype, what [`AttentionIo`](crate::AttentionIo) takes as `q`.
    pub out: BufferSlice<'a>,
}

/// New rows of K and V, and of queries, as their projection leaves them: queries and keys are still to be normed and
/// rotated. With latent attention a row has one key of `latent_dim + rope_dim` elements, whose latent is the value too,
/// and these are the elements of a query head as well. See
/// [`AttentionKernel::store_rotated`](crate::AttentionKernel::store_rotated).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct StoreRotated<'a> {
    /// The rows of K, not rotated yet, the rows of V, and their caches. The rows are left as they are.
    pub store: StoreKv<'a>,
    /// The rotation.
    pub rotation: Rotation<'a>,
    /// A norm of each key head, before the rotation.
    pub k_norm: Option<HeadNorm<'a>>,
    /// The queries, where there are any.
    pub queries: Option<RotatedQueries<'a>>,
}

impl<'a> StoreRotated<'a> {
    /// Rows on their way into a cache by a rotation, without norm and without queries.
    #[must_use]
    pub fn new(store: StoreKv<'a>, rotation: Rotation<'a>) -> Self {
        Self { store, rotation, k_norm: None, queries: None }
    }

    /// Records the whole in one dispatch, a workgroup for each head of each row, into the caches that the provided
    /// [`store_kv`](crate::AttentionKernel::store_kv) writes: what a kernel with that writer answers to
    /// [`store_rotated`](crate::AttentionKernel::store_rotated).
    ///
    /// `false`, and nothing is recorded, where the two steps must do: on the CPU, where nothing is dispatched; for
    /// heads of an odd number of elements or of no whole number of words in the cache; beyond the device's storage
    /// buffers or workgroup memory.
    ///
    /// # Errors
    /// Buffers that do not fit the problem, the batch or each other; the device.
    pub fn record_provided(
        &self,
        problem: &AttentionProblem,
        commands: &mut Commands,
        plan: &Plan,
    ) -> Result<bool, BackendError> {
        let (kind, queries) = (problem.kind, self.queries);
        let q_norm = queries.and_then(|queries| queries.norm);
        let (offset, parts) = match queries.map(|queries| queries.source) {
            Some(QuerySource::KeyRows(offset)) => (offset, None),
            Some(QuerySource::Parts(parts)) => (0, Some(parts)),
            None => (0, None),
        };
        let form = Form {
            dtype: problem.kv_dtype,
            layout: problem.kv_layout,
            head_dim: kind.query_dim(),
            value_dim: match kind {
                AttentionKind::Gqa { value_dim, .. } => Some(value_dim),
                AttentionKind::Mla { .. } => None,
            },
            interleaved: self.rotation.interleaved,
            queries: queries.map(|_| problem.dtype),
            parts: parts.is_some(),
            q_norm: q_norm.is_some(),
            k_norm: self.k_norm.is_some(),
        };
        if commands.device().is_cpu() || !form.fits(commands.device()) {
            return Ok(false);
        }
        plan.stores()?;
        let batch = plan.batch();
        let (k, v) = Rows::of(kind, &self.store, true);
        for rows in [Some(&k), v.as_ref()].into_iter().flatten() {
            rows.validate(batch, form.dtype)?;
        }
        self.validate(problem, batch.rows())?;

        let device = commands.device();
        let pipeline = device.cached_pipeline("store_rotated", form.variant(), |device| form.compile(device))?;
        let eps = |norm: Option<HeadNorm<'_>>| norm.map_or(0.0, |norm| norm.eps);
        let normed = |norm: Option<HeadNorm<'_>>| norm.map_or(0, |norm| norm.dim);
        let [front, back] = parts.map_or([[0; 3]; 2], |parts| parts.map(HeadPart::words));
        let call = Immediates {
            query_heads: if queries.is_some() { kind.query_heads() } else { 0 },
            kv_heads: kind.kv_heads(),
            q_offset: offset,
            k_offset: self.store.k_offset,
            k_stride: self.store.k_stride,
            v_offset: self.store.v_offset,
            v_stride: self.store.v_stride,
            positions: self.rotation.table_positions,
            dim: self.rotation.dim,
            first: self.rotation.first,
            q_normed: normed(q_norm),
            k_normed: normed(self.k_norm),
            q_eps: eps(q_norm),
            k_eps: eps(self.k_norm),
            front,
            back,
        };
        let index = plan.index(commands)?;
        let StoreKv { k, v, k_cache, v_cache, k_scale, v_scale, .. } = self.store;
        let (scaled, values) = (form.dtype == KvDType::Q8, form.value_dim.is_some());
        // In the order of `Form::bindings`.
        let all = [
            Some(index),
            Some(self.rotation.table),
            Some(self.rotation.positions),
            Some(k),
            Some(k_cache),
            Some(v).filter(|_| values),
            Some(v_cache).filter(|_| values),
            k_scale.filter(|_| scaled),
            v_scale.filter(|_| scaled && values),
            queries.map(|queries| queries.out),
            parts.map(|parts| parts[0].rows),
            parts.map(|parts| parts[1].rows),
            q_norm.map(|norm| norm.weight),
            self.k_norm.map(|norm| norm.weight),
        ];
        let mut slices = [index; MOST_BINDINGS];
        let mut bound = 0;
        for slice in all.into_iter().flatten() {
            slices[bound] = slice;
            bound += 1;
        }
        let heads = call.query_heads + call.kv_heads * (1 + u32::from(values));
        let rows = batch.rows();
        let groups = [heads, rows.min(MOST_ROWS), rows.div_ceil(MOST_ROWS)];
        commands.dispatch(&pipeline, &slices[..bound], bytemuck::bytes_of(&call), groups)?;
        Ok(true)
    }

    /// Checks what [`Rows::validate`] does not.
    fn validate(&self, problem: &AttentionProblem, rows: u32) -> Result<(), BackendError> {
        let Rotation { table, table_positions, dim, first, positions, .. } = self.rotation;
        let (heads, head_dim) = (u64::from(problem.kind.query_heads()), u64::from(problem.kind.query_dim()));
        let even = dim.is_multiple_of(2) && first.is_multiple_of(2);
        if dim == 0 || table_positions == 0 || !even || u64::from(first) + u64::from(dim) > head_dim {
            return Err(BackendError::Io(format!(
                "a rotation of {dim} elements from {first} on at {table_positions} positions for heads of {head_dim}"
            )));
        }
        let check = |name: &str, slice: BufferSlice<'_>, needed: u64| match slice.bytes() {
            bytes if bytes < needed => Err(BackendError::Io(format!("{name} have {bytes} bytes, need {needed}"))),
            _ => Ok(()),
        };
        let check_norm = |name: &str, norm: Option<HeadNorm<'_>>| match norm {
            None => Ok(()),
            Some(HeadNorm { weight, dim, .. }) if (1..=head_dim).contains(&dim.into()) => {
                check(name, weight, u64::from(dim) * 4)
            }
            Some(HeadNorm { dim, .. }) => {
                Err(BackendError::Io(format!("{name} are {dim}, for heads of {head_dim} elements")))
            }
        };
        check("rotations", table, u64::from(table_positions) * u64::from(dim) * 4)?;
        check("positions", positions, u64::from(rows) * 4)?;
        check_norm("weights of the key norm", self.k_norm)?;
        let Some(queries) = self.queries else { return Ok(()) };
        check_norm("weights of the query norm", queries.norm)?;
        check("rotated queries", queries.out, u64::from(rows) * heads * head_dim * problem.dtype.bytes())?;
        // Elements up to the last of the last row, where each of `count` has `dim` of them.
        let end = |offset: u32, stride: u32, count: u64, dim: u64| match count {
            0 => 0,
            _ => u64::from(offset) + (count - 1) * u64::from(stride) + dim,
        };
        match queries.source {
            QuerySource::KeyRows(offset) => {
                let end = end(offset, self.store.k_stride, rows.into(), heads * head_dim);
                check("rows of queries", self.store.k, end * 4)
            }
            QuerySource::Parts(parts) => {
                let [front, back] = parts.map(|part| u64::from(part.dim));
                if front + back != head_dim {
                    let message = format!("queries in parts of {front} and {back} elements for heads of {head_dim}");
                    return Err(BackendError::Io(message));
                }
                parts.iter().try_for_each(|part| {
                    let end = end(part.offset, part.stride, u64::from(rows) * heads, part.dim.into());
                    check("parts of queries", part.rows, end * 4)
                })
            }
        }
    }
}

const MOST_BINDINGS: usize = 14;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Immediates {
    query_heads: u32,
    kv_heads: u32,
    q_offset: u32,
    k_offset: u32,
    k_stride: u32,
    v_offset: u32,
    v_stride: u32,
    positions: u32,
    dim: u32,
    first: u32,
    q_normed: u32,
    k_normed: u32,
    q_eps: f32,
    k_eps: f32,
    /// As [`HeadPart::words`].
    front: [u32; 3],
    back: [u32; 3],
}

/// What decides the shader.
#[derive(Clone, Copy, Debug)]
struct Form {
    dtype: KvDType,
    layout: KvLayout,
    head_dim: u32,
    /// Elements of a value, unless the key has them.
    value_dim: Option<u32>,
    interleaved: bool,
    /// Format of the queries, if there are any.
    queries: Option<DType>,
    /// Whether these lie in two parts.
    parts: bool,
    q_norm: bool,
    k_norm: bool,
}

impl Form {
    /// Elements of the longest head.
    fn room(&self) -> u32 {
        self.head_dim.max(self.value_dim.unwrap_or(0))
    }

    /// Whether a workgroup can write a head by itself.
    fn fits(&self, device: &Device) -> bool {
        let limits = &device.facts().limits;
        let words = |dim: u32| (u64::from(dim) * self.dtype.bytes()).is_multiple_of(4);
        let memory = u64::from(self.room()) * 4 + 2 * 256;
        self.head_dim.is_multiple_of(2)
            && words(self.head_dim)
            && self.value_dim.is_none_or(words)
            && memory <= limits.workgroup_bytes.into()
            && self.bindings().count() <= limits.storage_buffers as usize
    }

    /// Workgroup memory keeps dimensions far below 24 bits.
    fn variant(&self) -> u64 {
        let queries = match self.queries {
            None => 0,
            Some(DType::F32) => 1,
            Some(DType::F16) => 2,
            Some(_) => 3,
        };
        let flags = [self.interleaved, self.q_norm, self.k_norm, self.parts, self.value_dim.is_some()];
        let flags = flags.into_iter().fold(0, |flags, flag| flags << 1 | u64::from(flag));
        let formats = queries << 5 | (self.layout as u64) << 7 | (self.dtype as u64) << 9;
        u64::from(self.head_dim) << 40 | u64::from(self.value_dim.unwrap_or(0)) << 16 | formats | flags
    }

    /// The bindings in order: name, access and element.
    fn bindings(&self) -> impl Iterator<Item = (&'static str, Access, &'static str)> {
        use Access::{Read, ReadWrite};
        let (scaled, values) = (self.dtype == KvDType::Q8, self.value_dim.is_some());
        let query = if self.queries == Some(DType::F32) { "f32" } else { "u32" };
        let all: [(bool, &str, Access, &str); MOST_BINDINGS] = [
            (true, "batch", Read, "u32"),
            (true, "table", Read, "vec2<f32>"),
            (true, "positions", Read, "u32"),
            (true, "k_rows", Read, "f32"),
            (true, "k_cache", ReadWrite, "u32"),
            (values, "v_rows", Read, "f32"),
            (values, "v_cache", ReadWrite, "u32"),
            (scaled, "k_scale", ReadWrite, "u32"),
            (scaled && values, "v_scale", ReadWrite, "u32"),
            (self.queries.is_some(), "q_out", ReadWrite, query),
            (self.parts, "q_front", Read, "f32"),
            (self.parts, "q_back", Read, "f32"),
            (self.q_norm, "q_norm", Read, "f32"),
            (self.k_norm, "k_norm", Read, "f32"),
        ];
        all.into_iter().filter(|binding| binding.0).map(|(_, name, access, element)| (name, access, element))
    }

    fn compile(&self, device: &Device) -> Result<Pipeline, DeviceError> {
        let bindings: Vec<Access> = self.bindings().map(|(_, access, _)| access).collect();
        device.pipeline(&PipelineSpec {
            label: "store_rotated",
            source: &self.source(),
            entry: "store_rotated",
            bindings: &bindings,
            immediate_bytes: size_of::<Immediates>() as u32,
            constants: &[],
        })
    }

    fn source(&self) -> String {
        let Self { dtype, layout, head_dim, value_dim, interleaved, q_norm, k_norm, .. } = *self;
        let scaled = dtype == KvDType::Q8;
        let mut declared = value_dim.map_or_else(String::new, |dim| format!("const VALUE_DIM = {dim}u;\n"));
        // The batch brings its own binding.
        for (binding, (name, access, element)) in self.bindings().enumerate().skip(1) {
            let access = if access == Access::Read { "read" } else { "read_write" };
            declared += &format!("@group(0) @binding({binding}) var<storage, {access}> {name}: array<{element}>;\n");
        }
        if scaled {
            declared += "var<workgroup> sizes: array<u32, 64>;\n";
        }
        if self.parts {
            declared += HEAD_PARTS_WGSL;
        }
        let load = if self.parts {
            "var x: f32;
            if (query) { x = of_parts(row * p.query_heads + place, i); } else { x = k_rows[base + i]; }"
        } else {
            "let x = k_rows[base + i];"
        };
        let queries = self.queries.map_or_else(String::new, |dtype| {
            let per_word = 4 / dtype.bytes();
            let word = match dtype {
                DType::F32 => "head[i]".to_owned(),
                _ => wgsl::narrow2(dtype, "vec2<f32>(head[2u * i], head[2u * i + 1u])"),
            };
            let words = u64::from(head_dim) / per_word;
            format!(
                "if (query) {{
                    let to = (row * p.query_heads + place) * {words}u;
                    for (var i = local; i < {words}u; i += 64u) {{ q_out[to + i] = {word}; }}
                    return;
                }}"
            )
        });
        let scale = if scaled {
            let dim = if value_dim.is_some() { "select(VALUE_DIM, HEAD_DIM, key)" } else { "HEAD_DIM" };
            format!(
                "var most = 0u;
                for (var i = local; i < {dim}; i += 64u) {{
                    most = max(most, bitcast<u32>(head[i]) & 0x7fffffffu);
                }}
                sizes[local] = most;
                workgroupBarrier();
                for (var half = 32u; half > 0u; half >>= 1u) {{
                    if (local < half) {{ sizes[local] = max(sizes[local], sizes[local + half]); }}
                    workgroupBarrier();
                }}
                let scale = scale_of(sizes[0]);"
            )
        } else {
            String::new()
        };
        let per_word = 4 / dtype.bytes();
        let store = |name: &str, dim: u32| {
            let words = u64::from(dim) / per_word;
            let scale =
                if scaled { format!("if (local == 0u) {{ {name}_scale[at] = scale; }}") } else { String::new() };
            let word = word(dtype, "head");
            format!(
                "{scale}
                for (var i = local; i < {words}u; i += 64u) {{
                    let first = i * {per_word}u;
                    {name}_cache[at * {words}u + i] = {word};
                }}"
            )
        };
        let values = value_dim.map_or_else(Default::default, |dim| [V_LOAD.to_owned(), store("v", dim)]);
        let main = include_str!("rotated.wgsl")
            .replace("MOST_ROWS", &MOST_ROWS.to_string())
            .replace("QUERIES", &queries)
            .replace("SCALE", &scale)
            .replace("K_STORE", &store("k", head_dim))
            .replace("V_STORE", &values[1])
            .replace("V_LOAD", &values[0])
            .replace("LOAD", load);
        let rotary = rotary_wgsl(head_dim, self.room(), interleaved, q_norm, k_norm);
        [wgsl::PREAMBLE, BATCH_WGSL, layout.wgsl(), &helpers(dtype), &declared, &rotary, &main].concat()
    }
}

/// A value head as it is.
const V_LOAD: &str = "let base = row * p.v_stride + p.v_offset + (place - p.query_heads - p.kv_heads) * VALUE_DIM;
        for (var i = local; i < VALUE_DIM; i += 64u) {
            head[i] = v_rows[base + i];
        }";

/// WGSL that norms and rotates a head, for kernels of a workgroup of 64 invocations by head: `head`, `room` f32 elements
/// of workgroup memory, at least `head_dim`; `normed_dim(query)`, how many elements of a head are normed, the first
/// ones; `head_scale(local, query, square, eps)`, a barrier after which `head` is complete and the factor of the norm,
/// of the squares of those elements; `turn_head(local, row, query, scale)`, both in place, with a barrier to follow.
///
/// The kernel declares `table` (`array<vec2<f32>>`, cosine and sine of each pair), `positions` (`array<u32>`), `q_norm`
/// and `k_norm` (`array<f32>`) where heads are normed, and immediates `p` with `positions`, `dim` and `first` as in
/// [`Rotation`], and `q_normed` and `k_normed`, the `dim` of each [`HeadNorm`], 0 without.
#[must_use]
pub fn rotary_wgsl(head_dim: u32, room: u32, interleaved: bool, q_norm: bool, k_norm: bool) -> String {
    let normed = |norm: bool, name: &str| if norm { format!("head[i] * scale * {name}[i]") } else { "head[i]".into() };
    format!(
        "const HEAD_DIM = {head_dim}u;\nconst HEAD_ROOM = {room}u;\nconst INTERLEAVED = {interleaved};\n\
         const NORM = {};\n\
         fn normed(i: u32, query: bool, scale: f32) -> f32 {{\n    \
             if (i >= normed_dim(query)) {{ return head[i]; }}\n    \
             if (query) {{ return {}; }}\n    return {};\n}}\n{}",
        q_norm || k_norm,
        normed(q_norm, "q_norm"),
        normed(k_norm, "k_norm"),
        include_str!("rotary.wgsl")
    )
}

/// WGSL that reads a query head in two parts: `of_parts(at, i)`, element `i` of the head that has `at` heads before it,
/// those of earlier rows among them.
///
/// The kernel declares `q_front` and `q_back` (`array<f32>`) and immediates `p` with the `offset`, `stride` and `dim`
/// of each [`HeadPart`]: `front_offset` to `back_dim`.
pub const HEAD_PARTS_WGSL: &str = include_str!("parts.wgsl");

#[cfg(test)]
mod tests {
    use naga::{
        back::{hlsl, msl, spv},
        valid::{Capabilities, ValidationFlags, Validator},
    };
    use polyattn_device::DType;

    use super::Form;
    use crate::{KvDType, KvLayout};

    /// Every variant of the shader, in every language that wgpu hands it to a driver in.
    #[test]
    fn translates() {
        for number in 0..6 * 3 * 64 {
            let flag = |bit: usize| number >> bit & 1 == 1;
            let layout = [KvLayout::PageTokenHead, KvLayout::PageHeadToken, KvLayout::PageTokenLatent][number / 64 % 3];
            let queries = [None, Some(DType::F32), Some(DType::F16), Some(DType::BF16)][number >> 4 & 3];
            let form = Form {
                dtype: KvDType::ALL[number / 192],
                layout,
                head_dim: 64,
                value_dim: (layout != KvLayout::PageTokenLatent).then_some(128),
                interleaved: flag(0),
                queries,
                parts: flag(3) && queries.is_some(),
                q_norm: flag(1) && queries.is_some(),
                k_norm: flag(2),
            };
            let source = form.source();
            let context = |error: String| format!("{form:?}: {error}\n{source}");
            let module = naga::front::wgsl::parse_str(&source)
                .unwrap_or_else(|error| panic!("{}", context(error.emit_to_string(&source))));
            let capabilities = Capabilities::IMMEDIATES | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
            let info = Validator::new(ValidationFlags::all(), capabilities)
                .validate(&module)
                .unwrap_or_else(|error| panic!("{}", context(error.emit_to_string(&source))));
            assert_eq!(source.matches("@binding(").count(), form.bindings().count(), "{form:?}");
            let text = |what: &str, error: &dyn std::fmt::Display| context(format!("{what}: {error}"));
            spv::write_vec(&module, &info, &spv::Options::default(), None)
                .unwrap_or_else(|error| panic!("{}", text("SPIR-V", &error)));
            let options = msl::Options { fake_missing_bindings: true, ..msl::Options::default() };
            msl::write_string(&module, &info, &options, &msl::PipelineOptions::default())
                .unwrap_or_else(|error| panic!("{}", text("MSL", &error)));
            let options = hlsl::Options {
                fake_missing_bindings: true,
                immediates_target: Some(hlsl::BindTarget::default()),
                special_constants_binding: Some(hlsl::BindTarget::default()),
                ..hlsl::Options::default()
            };
            hlsl::Writer::new(&mut String::new(), &options, &hlsl::PipelineOptions::default())
                .write(&module, &info, None)
                .unwrap_or_else(|error| panic!("{}", text("HLSL", &error)));
        }
    }
}
