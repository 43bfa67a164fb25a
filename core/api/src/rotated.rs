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

/// An RMS norm of each head: `x / sqrt(mean(x²) + eps) · weight`.
#[derive(Clone, Copy, Debug)]
pub struct HeadNorm<'a> {
    /// `[head_dim]`, f32.
    pub weight: BufferSlice<'a>,
    /// What is added to the mean of squares.
    pub eps: f32,
}

/// Where queries come from and go to.
#[derive(Clone, Copy, Debug)]
pub struct RotatedQueries<'a> {
    /// First element of row 0 in the buffer of the K rows; rows lie as far apart as those of K.
    pub offset: u32,
    /// A norm of each head, before the rotation.
    pub norm: Option<HeadNorm<'a>>,
    /// `[rows, query_heads, head_dim]` of the problem's dtype, what [`AttentionIo`](crate::AttentionIo) takes as `q`.
    pub out: BufferSlice<'a>,
}

/// New rows of K and V, and of queries, as their projection leaves them: queries and keys are still to be normed and
/// rotated. See [`AttentionKernel::store_rotated`](crate::AttentionKernel::store_rotated).
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
    /// `false`, and nothing is recorded, where the two steps must do: on the CPU, where nothing is dispatched; with
    /// latent attention; for heads of an odd number of elements or of no whole number of words in the cache; beyond the
    /// device's storage buffers or workgroup memory.
    ///
    /// # Errors
    /// Buffers that do not fit the problem, the batch or each other; the device.
    pub fn record_provided(
        &self,
        problem: &AttentionProblem,
        commands: &mut Commands,
        plan: &Plan,
    ) -> Result<bool, BackendError> {
        let AttentionKind::Gqa { query_heads, kv_heads, head_dim, value_dim } = problem.kind else { return Ok(false) };
        let form = Form {
            dtype: problem.kv_dtype,
            layout: problem.kv_layout,
            head_dim,
            value_dim,
            interleaved: self.rotation.interleaved,
            queries: self.queries.map(|_| problem.dtype),
            q_norm: self.queries.is_some_and(|queries| queries.norm.is_some()),
            k_norm: self.k_norm.is_some(),
        };
        if commands.device().is_cpu() || !form.fits(commands.device()) {
            return Ok(false);
        }
        plan.stores()?;
        let batch = plan.batch();
        let (k, v) = Rows::of(problem.kind, &self.store, true);
        for rows in [Some(&k), v.as_ref()].into_iter().flatten() {
            rows.validate(batch, form.dtype)?;
        }
        self.validate(problem, batch.rows())?;

        let device = commands.device();
        let pipeline = device.cached_pipeline("store_rotated", form.variant(), |device| form.compile(device))?;
        let q_norm = self.queries.and_then(|queries| queries.norm);
        let eps = |norm: Option<HeadNorm<'_>>| norm.map_or(0.0, |norm| norm.eps);
        let call = Immediates {
            query_heads: if self.queries.is_some() { query_heads } else { 0 },
            kv_heads,
            q_offset: self.queries.map_or(0, |queries| queries.offset),
            k_offset: self.store.k_offset,
            k_stride: self.store.k_stride,
            v_offset: self.store.v_offset,
            v_stride: self.store.v_stride,
            positions: self.rotation.table_positions,
            dim: self.rotation.dim,
            first: self.rotation.first,
            q_eps: eps(q_norm),
            k_eps: eps(self.k_norm),
        };
        let index = plan.index(commands)?;
        let StoreKv { k, v, k_cache, v_cache, k_scale, v_scale, .. } = self.store;
        let mut slices = [index; MOST_BINDINGS];
        slices[1..7].copy_from_slice(&[self.rotation.table, self.rotation.positions, k, v, k_cache, v_cache]);
        let scaled = form.dtype == KvDType::Q8;
        let optional = [
            k_scale.filter(|_| scaled),
            v_scale.filter(|_| scaled),
            self.queries.map(|queries| queries.out),
            q_norm.map(|norm| norm.weight),
            self.k_norm.map(|norm| norm.weight),
        ];
        let mut bound = 7;
        for slice in optional.into_iter().flatten() {
            slices[bound] = slice;
            bound += 1;
        }
        let rows = batch.rows();
        let groups = [call.query_heads + 2 * kv_heads, rows.min(MOST_ROWS), rows.div_ceil(MOST_ROWS)];
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
        check("rotations", table, u64::from(table_positions) * u64::from(dim) * 4)?;
        check("positions", positions, u64::from(rows) * 4)?;
        if let Some(norm) = self.k_norm {
            check("weights of the key norm", norm.weight, head_dim * 4)?;
        }
        let Some(queries) = self.queries else { return Ok(()) };
        if let Some(norm) = queries.norm {
            check("weights of the query norm", norm.weight, head_dim * 4)?;
        }
        check("rotated queries", queries.out, u64::from(rows) * heads * head_dim * problem.dtype.bytes())?;
        let before = u64::from(rows.saturating_sub(1)) * u64::from(self.store.k_stride);
        let end = if rows > 0 { u64::from(queries.offset) + before + heads * head_dim } else { 0 };
        check("rows of queries", self.store.k, end * 4)
    }
}

const MOST_BINDINGS: usize = 12;

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
    q_eps: f32,
    k_eps: f32,
}

/// What decides the shader.
#[derive(Clone, Copy, Debug)]
struct Form {
    dtype: KvDType,
    layout: KvLayout,
    head_dim: u32,
    value_dim: u32,
    interleaved: bool,
    /// Format of the queries, if there are any.
    queries: Option<DType>,
    q_norm: bool,
    k_norm: bool,
}

impl Form {
    /// Whether a workgroup can write a head by itself.
    fn fits(&self, device: &Device) -> bool {
        let limits = &device.facts().limits;
        let words = |dim: u32| (u64::from(dim) * self.dtype.bytes()).is_multiple_of(4);
        let memory = u64::from(self.head_dim.max(self.value_dim)) * 4 + 2 * 256;
        self.head_dim.is_multiple_of(2)
            && words(self.head_dim)
            && words(self.value_dim)
            && memory <= limits.workgroup_bytes.into()
            && self.bindings().1 <= limits.storage_buffers as usize
    }

    /// Workgroup memory keeps dimensions far below 24 bits.
    fn variant(&self) -> u64 {
        let queries = match self.queries {
            None => 0,
            Some(DType::F32) => 1,
            Some(DType::F16) => 2,
            Some(_) => 3,
        };
        let flags = u64::from(self.interleaved) | u64::from(self.q_norm) << 1 | u64::from(self.k_norm) << 2;
        let formats = queries << 3 | (self.layout as u64) << 5 | (self.dtype as u64) << 7;
        u64::from(self.head_dim) << 40 | u64::from(self.value_dim) << 16 | formats | flags
    }

    /// The bindings, and how many there are.
    fn bindings(&self) -> ([Access; MOST_BINDINGS], usize) {
        use Access::{Read, ReadWrite};
        let mut bindings = [Read; MOST_BINDINGS];
        bindings[5..7].fill(ReadWrite);
        let scaled = (self.dtype == KvDType::Q8).then_some(ReadWrite);
        let norms = [self.q_norm, self.k_norm].map(|norm| norm.then_some(Read));
        let optional = [scaled, scaled, self.queries.map(|_| ReadWrite), norms[0], norms[1]];
        let mut bound = 7;
        for access in optional.into_iter().flatten() {
            bindings[bound] = access;
            bound += 1;
        }
        (bindings, bound)
    }

    fn compile(&self, device: &Device) -> Result<Pipeline, DeviceError> {
        let (bindings, bound) = self.bindings();
        device.pipeline(&PipelineSpec {
            label: "store_rotated",
            source: &self.source(),
            entry: "store_rotated",
            bindings: &bindings[..bound],
            immediate_bytes: size_of::<Immediates>() as u32,
            constants: &[],
        })
    }

    fn source(&self) -> String {
        let Self { dtype, layout, head_dim, value_dim, interleaved, q_norm, k_norm, .. } = *self;
        let scaled = dtype == KvDType::Q8;
        let mut declared = format!("const VALUE_DIM = {value_dim}u;\n");
        let mut binding = 7;
        let mut bind = |wanted: bool, access: &str, name: &str, element: &str| {
            if wanted {
                declared +=
                    &format!("@group(0) @binding({binding}) var<storage, {access}> {name}: array<{element}>;\n");
                binding += 1;
            }
        };
        bind(scaled, "read_write", "k_scale", "u32");
        bind(scaled, "read_write", "v_scale", "u32");
        let wide = self.queries == Some(DType::F32);
        bind(self.queries.is_some(), "read_write", "q_out", if wide { "f32" } else { "u32" });
        bind(q_norm, "read", "q_norm", "f32");
        bind(k_norm, "read", "k_norm", "f32");
        if scaled {
            declared += "var<workgroup> sizes: array<u32, 64>;\n";
        }
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
            "var most = 0u;
             for (var i = local; i < select(VALUE_DIM, HEAD_DIM, key); i += 64u) {
                 most = max(most, bitcast<u32>(head[i]) & 0x7fffffffu);
             }
             sizes[local] = most;
             workgroupBarrier();
             for (var half = 32u; half > 0u; half >>= 1u) {
                 if (local < half) { sizes[local] = max(sizes[local], sizes[local + half]); }
                 workgroupBarrier();
             }
             let scale = scale_of(sizes[0]);"
        } else {
            ""
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
        let main = include_str!("rotated.wgsl")
            .replace("MOST_ROWS", &MOST_ROWS.to_string())
            .replace("QUERIES", &queries)
            .replace("SCALE", scale)
            .replace("K_STORE", &store("k", head_dim))
            .replace("V_STORE", &store("v", value_dim));
        let rotary = rotary_wgsl(head_dim, head_dim.max(value_dim), interleaved, q_norm, k_norm);
        [wgsl::PREAMBLE, BATCH_WGSL, layout.wgsl(), &helpers(dtype), &declared, &rotary, &main].concat()
    }
}

/// WGSL that norms and rotates a head, for kernels of a workgroup of 64 invocations by head: `head`, `room` f32 elements
/// of workgroup memory, at least `head_dim`; `head_scale(local, square, eps)`, a barrier after which `head` is complete
/// and the factor of the norm; `turn_head(local, row, query, scale)`, both in place, with a barrier to follow.
///
/// The kernel declares `table` (`array<vec2<f32>>`, cosine and sine of each pair), `positions` (`array<u32>`), `q_norm`
/// and `k_norm` (`array<f32>`) where heads are normed, and immediates `p` with `positions`, `dim` and `first` as in
/// [`Rotation`].
#[must_use]
pub fn rotary_wgsl(head_dim: u32, room: u32, interleaved: bool, q_norm: bool, k_norm: bool) -> String {
    let normed = |norm: bool, name: &str| if norm { format!("head[i] * scale * {name}[i]") } else { "head[i]".into() };
    format!(
        "const HEAD_DIM = {head_dim}u;\nconst HEAD_ROOM = {room}u;\nconst INTERLEAVED = {interleaved};\n\
         const NORM = {};\n\
         fn normed(i: u32, query: bool, scale: f32) -> f32 {{ if (query) {{ return {}; }} return {}; }}\n{}",
        q_norm || k_norm,
        normed(q_norm, "q_norm"),
        normed(k_norm, "k_norm"),
        include_str!("rotary.wgsl")
    )
}

#[cfg(test)]
mod tests {
    use naga::{
        back::{hlsl, msl, spv},
        valid::{Capabilities, ValidationFlags, Validator},
    };
    use polyattn_device::{Access, DType};

    use super::Form;
    use crate::{KvDType, KvLayout};

    /// Every variant of the shader, in every language that wgpu hands it to a driver in.
    #[test]
    fn translates() {
        for number in 0..6 * 2 * 32 {
            let flag = |bit: usize| number >> bit & 1 == 1;
            let form = Form {
                dtype: KvDType::ALL[number / 64],
                layout: if flag(5) { KvLayout::PageTokenHead } else { KvLayout::PageHeadToken },
                head_dim: 64,
                value_dim: 128,
                interleaved: flag(0),
                queries: [None, Some(DType::F32), Some(DType::F16), Some(DType::BF16)][number >> 3 & 3],
                q_norm: flag(1) && number >> 3 & 3 != 0,
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
            let (bindings, bound) = form.bindings();
            for (binding, access) in bindings[..bound].iter().enumerate().skip(1) {
                let access = if *access == Access::Read { "read" } else { "read_write" };
                let declared = format!("@group(0) @binding({binding}) var<storage, {access}>");
                assert!(source.contains(&declared), "{}", context(declared));
            }
            assert_eq!(source.matches("@binding(").count(), bound, "{form:?}");
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
