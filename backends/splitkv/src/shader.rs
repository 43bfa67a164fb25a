//! From a problem to the texts of its two shaders.

use std::fmt::Write;

use polyattn_api::{
    AttentionProblem, BATCH_WGSL, DType, Decline, DeviceFacts, KvDType,
    device::{Access, wgsl},
};

use crate::{Multiply, plan};

/// Head dims that lanes divide evenly, with few enough elements a lane.
pub(crate) const HEAD_DIMS: [u32; 6] = [32, 64, 96, 128, 192, 256];

/// Threads that serve a tile of four rows.
const TILE_THREADS: u32 = 64;

/// Keys that a stream takes at once, one for each of so many of its threads, at the most.
const KEYS: u32 = 4;

/// The same where a processor plays the GPU.
const NARROW_KEYS: u32 = 8;

/// Bytes of a line of a processor's cache.
const LINE: u32 = 64;

/// Keys of a block that cooperative matrices are multiplied with.
const BLOCK: u32 = 64;

/// Rows and columns of a cooperative matrix.
const SIDE: u32 = 16;

/// Workgroup memory of one tile of the smallest head dim.
pub(crate) const LEAST_WORKGROUP_BYTES: u32 =
    Variant { products: Products::Lanes(8), tiles: 1, head_dim: 64, direct: false }.workgroup_bytes();

/// Threads of a merging workgroup at the most.
const MERGE_THREADS: u32 = 256;

/// Why a device that has subgroups cannot carry the kernel.
pub(crate) fn device_decline(
    problem: &AttentionProblem,
    device: &DeviceFacts,
    wanted: Option<Multiply>,
) -> Option<Decline> {
    let (min, max) = (device.subgroup_min, device.subgroup_max);
    if !(min.is_power_of_two() && min >= 4 && max <= TILE_THREADS && max.is_power_of_two()) {
        return Some(Decline::Other(format!("subgroups of {min} to {max}").into()));
    }
    let (needed, available) = (Variant::partial_bindings(problem, false).len(), device.limits.storage_buffers);
    if needed > available as usize {
        let what = format!("{needed} storage buffers in one kernel, where the device has {available},");
        return Some(Decline::Other(what.into()));
    }
    let head_dim = problem.kind.query_dim();
    let Some(products) = Products::choose(problem, device, wanted) else {
        let what = match wanted {
            Some(Multiply::Matrices) => {
                "f16 queries and cache, and cooperative matrices of 16 x 16 halves in subgroups of 32"
            }
            _ => "subgroups of one width",
        };
        return Some(Decline::Other(format!("{what}, which its settings want,").into()));
    };
    let smallest = Variant { products, tiles: 1, head_dim, direct: false }.workgroup_bytes();
    (smallest > device.limits.workgroup_bytes)
        .then_some(Decline::NeedsWorkgroupMemory { needed: smallest, available: device.limits.workgroup_bytes })
}

/// What multiplies queries with keys, and weights with values, on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Products {
    /// So many threads of a subgroup, which share a key's elements; tiles of 4 rows.
    Lanes(u32),
    /// The same where a processor plays the GPU: one subgroup so wide serves all tiles, because threads that take turns
    /// hide no latency, and reading an element costs more than multiplying it.
    Narrow { lanes: u32, width: u32 },
    /// Cooperative matrices of subgroups so wide; tiles of 16 rows.
    Matrices(u32),
}

impl Products {
    /// Without a wish, matrices where the device has them for the problem's formats. A device and the formats alone
    /// decide, so that decode and verify are answered alike. `None` where the wish cannot be had.
    fn choose(problem: &AttentionProblem, facts: &DeviceFacts, wanted: Option<Multiply>) -> Option<Self> {
        let (min, max) = (facts.subgroup_min, facts.subgroup_max);
        let lanes = lanes(problem.kind.query_dim(), min);
        let narrow = (min == max).then_some(Self::Narrow { lanes, width: min });
        match wanted {
            Some(Multiply::Matrices) => Self::matrices(problem, facts),
            Some(Multiply::Lanes) => Some(Self::Lanes(lanes)),
            Some(Multiply::Narrow) => narrow,
            None => {
                let narrow = narrow.filter(|_| !facts.hardware);
                Self::matrices(problem, facts).or(narrow).or(Some(Self::Lanes(lanes)))
            }
        }
    }

    fn matrices(problem: &AttentionProblem, facts: &DeviceFacts) -> Option<Self> {
        let (min, max) = (facts.subgroup_min, facts.subgroup_max);
        let halves = problem.dtype == DType::F16 && problem.kv_dtype == KvDType::F16;
        let products = Self::Matrices(min);
        let variant = Variant { products, tiles: 1, head_dim: problem.kind.query_dim(), direct: false };
        let has_them = halves
            && facts.has_cooperative_tile(SIDE, DType::F16, DType::F32)
            && facts.has("shader-f16")
            && (min, max) == (32, 32);
        (has_them && variant.fits(facts)).then_some(products)
    }
}

/// What is chosen for a device, apart from what the problem says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Variant {
    pub(crate) products: Products,
    /// Tiles of rows in a work item.
    pub(crate) tiles: u32,
    pub(crate) head_dim: u32,
    /// Whether a sequence of one chunk is answered without merging.
    pub(crate) direct: bool,
}

impl Variant {
    /// The numbers of tiles that a device's limits allow, smallest first.
    pub(crate) fn all(
        problem: &AttentionProblem,
        facts: &DeviceFacts,
        wanted: Option<Multiply>,
    ) -> impl Iterator<Item = Self> {
        let head_dim = problem.kind.query_dim();
        let direct = Self::partial_bindings(problem, true).len() <= facts.limits.storage_buffers as usize;
        Products::choose(problem, facts, wanted)
            .into_iter()
            .flat_map(move |products| {
                let most = if matches!(products, Products::Lanes(_)) { 16 } else { 4 };
                let tiles = [1, 2, 4, 8, 16].into_iter().filter(move |tiles| *tiles <= most);
                tiles.map(move |tiles| Self { products, tiles, head_dim, direct })
            })
            .filter(|variant| variant.fits(facts))
    }

    fn fits(self, facts: &DeviceFacts) -> bool {
        self.threads() <= facts.limits.workgroup_invocations && self.workgroup_bytes() <= facts.limits.workgroup_bytes
    }

    /// Rows of a work item.
    pub(crate) const fn rows(self) -> u32 {
        match self.products {
            Products::Lanes(_) | Products::Narrow { .. } => self.tiles * 4,
            Products::Matrices(_) => self.tiles * SIDE,
        }
    }

    /// Positions of a chunk. Fixed, so that a row's arithmetic does not depend on its company.
    pub(crate) const fn chunk(self) -> u32 {
        match self.products {
            Products::Lanes(_) | Products::Narrow { .. } => 256,
            // As many bytes for narrow heads as for wide ones, so that there are as many items.
            Products::Matrices(_) if self.head_dim <= 64 => 256,
            Products::Matrices(_) => 512,
        }
    }

    /// Spans that one work item may take; where it may not take one, it takes a chunk.
    pub(crate) const fn most_spans(self) -> u32 {
        match self.products {
            Products::Lanes(_) | Products::Narrow { .. } => 0,
            Products::Matrices(_) => 4,
        }
    }

    /// Work items that run at once, about. No adapter tells its number of cores; this suits large GPUs and small ones.
    /// Results do not depend on it.
    pub(crate) const fn resident(self) -> u64 {
        match self.products {
            Products::Narrow { .. } => 16,
            Products::Lanes(_) | Products::Matrices(_) => 256,
        }
    }

    const fn threads(self) -> u32 {
        match self.products {
            Products::Lanes(_) => self.tiles * TILE_THREADS,
            Products::Narrow { width, .. } => width,
            Products::Matrices(_) => {
                // As many as divide the 16-byte units of a block among them.
                if self.tiles == 4 && (BLOCK * self.head_dim / 8).is_multiple_of(512) { 512 } else { 256 }
            }
        }
    }

    /// Threads that serve a row between products of matrices.
    const fn row_threads(self) -> u32 {
        if self.tiles == 1 { 16 } else { 8 }
    }

    /// Whether the halves of a score are two subgroups' work.
    const fn split(self) -> bool {
        self.tiles == 1
    }

    /// Whether keys and values have a tile each, which pays for heads that are neither narrow nor too wide for it.
    const fn apart(self) -> bool {
        self.tiles <= 2 && self.head_dim > 64 && self.head_dim <= 128
    }

    /// Whether queries stay in workgroup memory, which leaves registers to more workgroups. Weights make room for them.
    const fn stay(self) -> bool {
        self.tiles == 1 && self.apart()
    }

    /// Columns of values that are summed at once by matrices.
    const fn slice(self) -> u32 {
        if self.tiles >= 2 && self.head_dim == 128 || self.head_dim > 128 { 64 } else { self.head_dim }
    }

    const fn workgroup_bytes(self) -> u32 {
        match self.products {
            Products::Lanes(lanes) => self.tiles * self.tile_bytes(TILE_THREADS / lanes),
            Products::Narrow { lanes, width } => self.tile_bytes(width / lanes),
            // Keys and values, weights, scores or sums, places.
            Products::Matrices(_) => {
                let row = (self.head_dim + 8) * 2;
                let weights = (BLOCK + 8) * 2;
                let tile = BLOCK * row * if self.apart() { 2 } else { 1 };
                let beside = if self.apart() { 0 } else { weights } + if self.stay() { row } else { 0 };
                let scores = (BLOCK + 8) * if self.split() { 8 } else { 4 };
                let sums = (self.slice() + 8) * 4;
                let products = if scores > sums { scores } else { sums };
                tile + self.rows() * (beside + products) + BLOCK * 8
            }
        }
    }

    /// Sums on their way to be merged, of half the streams; highest score and sum of each stream.
    const fn tile_bytes(self, streams: u32) -> u32 {
        16 * (streams.div_ceil(2) * self.head_dim + 2 * streams)
    }

    /// The bindings of [`partial`](Self::partial), which ends sequences of one chunk where it is `direct`.
    pub(crate) fn partial_bindings(problem: &AttentionProblem, direct: bool) -> Vec<Access> {
        use Access::{Read, ReadWrite};
        let scales = problem.kv_dtype == KvDType::Q8;
        let optional = [(problem.alibi, Read), (scales, Read), (scales, Read)];
        let optional = optional.into_iter().filter(|(wanted, _)| *wanted).map(|(_, access)| access);
        let endings = if direct { Self::ending_bindings(problem) } else { Vec::new() };
        [Read, Read, Read, Read, ReadWrite].into_iter().chain(optional).chain(endings).collect()
    }

    /// The bindings of [`merge`](Self::merge).
    pub(crate) fn merge_bindings(problem: &AttentionProblem) -> Vec<Access> {
        [Access::Read, Access::Read].into_iter().chain(Self::ending_bindings(problem)).collect()
    }

    fn ending_bindings(problem: &AttentionProblem) -> Vec<Access> {
        use Access::{Read, ReadWrite};
        let optional = [problem.lse.then_some(ReadWrite), problem.sinks.then_some(Read)];
        [ReadWrite].into_iter().chain(optional.into_iter().flatten()).collect()
    }

    /// The shader that answers a chunk.
    pub(crate) fn partial(self, problem: &AttentionProblem) -> String {
        let mut text = match self.products {
            Products::Lanes(_) | Products::Narrow { .. } => wgsl::PREAMBLE.to_owned(),
            Products::Matrices(_) => "enable f16;\nenable wgpu_cooperative_matrix;\n".to_owned(),
        };
        text += BATCH_WGSL;
        text += problem.kv_layout.wgsl();
        text += &problem.row_wgsl();
        text += &place_of(problem);
        self.constants(&mut text, problem);
        flags(&mut text, &[("SCALED", problem.kv_dtype == KvDType::Q8), ("DIRECT", self.direct)]);
        let mut next = 5;
        let mut optional = |wanted: bool, name: &str, of: &str, otherwise: &str| {
            text += &if wanted {
                next += 1;
                format!(
                    "@group(0) @binding({}) var<storage, read> {name}: array<f32>;\n\
                     fn {of}(i: u32) -> f32 {{ return {name}[i]; }}\n",
                    next - 1
                )
            } else {
                format!("fn {of}(i: u32) -> f32 {{ return {otherwise}; }}\n")
            };
        };
        optional(problem.alibi, "slopes", "slope_of", "0.0");
        optional(problem.kv_dtype == KvDType::Q8, "k_scale", "k_scale_of", "1.0");
        optional(problem.kv_dtype == KvDType::Q8, "v_scale", "v_scale_of", "1.0");
        text += include_str!("call.wgsl");
        endings(&mut text, problem, self.direct.then_some(next));
        match self.products {
            Products::Lanes(_) | Products::Narrow { .. } => {
                text += &wgsl::storage_loader(1, "q", problem.dtype);
                text += &problem.kv_dtype.loaders_wgsl(&[(2, "k"), (3, "v")]);
                text += include_str!("partial.wgsl");
                wgsl::unroll(&text)
            }
            Products::Matrices(_) => text + &self.cooperative(),
        }
    }

    /// The text of cooperative.wgsl. What it does with matrices is unrolled, because no index into them may be left for
    /// a compiler to keep out of registers.
    fn cooperative(self) -> String {
        let lines = |count: u32, line: &dyn Fn(u32) -> String| (0..count).map(line).collect::<String>();
        // Steps along a half of a head, and along a block.
        let (steps, blocks) = (self.head_dim / 2 / SIDE, BLOCK / SIDE);
        let queries = lines(if self.split() { steps } else { 2 * steps }, &|i| {
            let at = i * SIDE / 4;
            format!("let q{i} = coopLoadT<coop_mat16x16<f16, A>>(&tile[queries_at + {at}u], TILE_STRIDE);\n")
        });
        let half = |sum: &str, first: u32| {
            let products = lines(steps, &|i| {
                let (i, at) = (first + i, (first + i) * SIDE / 4);
                let keys = format!("coopLoad<coop_mat16x16<f16, B>>(&tile[keys_at + {at}u], TILE_STRIDE)");
                format!("{sum} = coopMultiplyAdd(q{i}, {keys}, {sum});\n")
            });
            format!("var {sum} = coop_mat16x16<f32, C>();\n{products}")
        };
        let score = if self.split() {
            half("score", 0)
        } else {
            [&half("low", 0), &half("high", steps), "let score = low + high;\n"].concat()
        };
        let (queries, score) = if self.stay() { (String::new(), queries + &score) } else { (queries, score) };
        let weights = lines(blocks, &|i| {
            let at = i * SIDE / 4;
            format!("let w{i} = coopLoadT<coop_mat16x16<f16, A>>(&tile[weights_at + {at}u], WEIGHT_STRIDE);\n")
        });
        let sum = lines(blocks, &|i| {
            let at = format!("values_at + {}u * TILE_STRIDE", i * SIDE);
            let values = format!("coopLoadT<coop_mat16x16<f16, B>>(&tile[{at}], TILE_STRIDE)");
            format!("sum = coopMultiplyAdd(w{i}, {values}, sum);\n")
        });
        include_str!("cooperative.wgsl")
            .replace("LOAD_QUERIES\n", &queries)
            .replace("SCORE\n", &score)
            .replace("LOAD_WEIGHTS\n", &weights)
            .replace("SUM\n", &format!("var sum = coop_mat16x16<f32, C>();\n{sum}"))
    }

    fn constants(self, text: &mut String, problem: &AttentionProblem) {
        let line = LINE / problem.kv_dtype.bytes() as u32;
        let streams = |lanes: u32, threads: u32, [groups, tiles, keys]: [u32; 3]| {
            let eights = self.head_dim / (8 * lanes);
            vec![
                ("GROUPS", groups),
                ("TILES", tiles),
                ("THREADS", threads),
                ("LANES", lanes),
                ("STREAMS", threads / lanes),
                ("EIGHTS", eights),
                ("ELEMENTS", 8 * eights),
                ("KEYS", keys.min(lanes)),
                ("LINE", line),
            ]
        };
        let own = match self.products {
            Products::Lanes(lanes) => streams(lanes, TILE_THREADS, [self.tiles, 1, KEYS]),
            Products::Narrow { lanes, width } => streams(lanes, width, [1, self.tiles, NARROW_KEYS]),
            Products::Matrices(width) => {
                vec![
                    ("TILES", self.tiles),
                    ("THREADS", self.threads()),
                    ("ROW_THREADS", self.row_threads()),
                    ("WIDTH", width),
                    ("SLICE", self.slice()),
                    ("KEYS", BLOCK),
                ]
            }
        };
        let both = [("CHUNK", self.chunk()), ("HEAD_DIM", self.head_dim)];
        for (name, value) in own.into_iter().chain(both) {
            let _ = writeln!(text, "const {name}: u32 = {value}u;");
        }
        match self.products {
            Products::Lanes(_) => flags(text, &[("PREFETCH", false)]),
            Products::Narrow { .. } => flags(text, &[("PREFETCH", true)]),
            Products::Matrices(_) => {
                flags(text, &[("SPLIT", self.split()), ("APART", self.apart()), ("STAY", self.stay())])
            }
        }
    }

    /// Groups of merging threads; each takes every so-manieth span. Where threads take turns, one group does it sooner.
    fn merge_groups(self) -> u32 {
        match self.products {
            Products::Narrow { .. } => 1,
            Products::Lanes(_) | Products::Matrices(_) => 1 << (MERGE_THREADS / (self.head_dim / 4)).ilog2(),
        }
    }

    /// The shader that merges a row's chunks.
    pub(crate) fn merge(self, problem: &AttentionProblem) -> String {
        let mut text = BATCH_WGSL.to_owned();
        let (vectors, groups) = (self.head_dim / 4, self.merge_groups());
        for (name, value) in [
            ("HEAD_DIM", self.head_dim),
            ("VECTORS", vectors),
            ("GROUPS", groups),
            ("SPAN", plan::SPAN),
            ("THREADS_POWER", (vectors * groups).next_power_of_two()),
        ] {
            let _ = writeln!(text, "const {name}: u32 = {value}u;");
        }
        endings(&mut text, problem, Some(2));
        flags(&mut text, &[("DIRECT", self.direct)]);
        text += include_str!("merge.wgsl");
        text
    }
}

/// Where the cache has a position of a sequence: `place_of(sequence, position, kv_head)`, in rows. A page size that is
/// known makes shifts of divisions.
fn place_of(problem: &AttentionProblem) -> String {
    let size = problem.page_size.map_or("batch_page_size()".to_owned(), |size| format!("{size}u"));
    format!(
        "fn place_of(sequence: u32, position: u32, kv_head: u32) -> u32 {{ \
         let slot = page(sequence, position / {size}) * {size} + position % {size}; \
         return cache_row(slot, kv_head, call.kv_heads); }}\n"
    )
}

fn flags(text: &mut String, flags: &[(&str, bool)]) {
    for (name, value) in flags {
        let _ = writeln!(text, "const {name}: bool = {value};");
    }
}

/// What ends a row: its buffers from a binding on, or none.
fn endings(text: &mut String, problem: &AttentionProblem, binding: Option<u32>) {
    flags(text, &[("SINKS", problem.sinks && binding.is_some())]);
    let mut next = binding.unwrap_or(0);
    let mut optional = |wanted: bool, buffer: &str, with: &str, without: &str| {
        if wanted && binding.is_some() {
            let _ = writeln!(text, "@group(0) @binding({next}) {buffer}");
            next += 1;
            *text += with;
        } else {
            *text += without;
        }
    };
    optional(
        true,
        "var<storage, read_write> out: array<f32>;",
        "fn write_out(i: u32, x: f32) { out[i] = x; }\n",
        "fn write_out(i: u32, x: f32) {}\n",
    );
    optional(
        problem.lse,
        "var<storage, read_write> lse: array<f32>;",
        "fn write_lse(i: u32, x: f32) { lse[i] = x; }\n",
        "fn write_lse(i: u32, x: f32) {}\n",
    );
    optional(
        problem.sinks,
        "var<storage, read> sinks: array<f32>;",
        "fn sink_of(head: u32) -> f32 { return sinks[head]; }\n",
        "fn sink_of(head: u32) -> f32 { return 0.0; }\n",
    );
    *text += include_str!("ending.wgsl");
}

/// Threads of a stream: 8 elements each where a subgroup is wide enough, otherwise more. A power of two that divides
/// the head, so that streams tile a subgroup.
fn lanes(head_dim: u32, subgroup: u32) -> u32 {
    let most = (head_dim / 8).min(subgroup);
    let mut lanes = 1;
    while lanes * 2 <= most && (head_dim / 8).is_multiple_of(lanes * 2) {
        lanes *= 2;
    }
    lanes
}

/// The variants there are, for tests.
#[cfg(test)]
pub(crate) fn variants() -> impl Iterator<Item = (Variant, AttentionProblem)> {
    use polyattn_api::{AttentionKind, KvLayout, Mask};

    let problem = |head_dim| {
        let kind = AttentionKind::Gqa { query_heads: 9, kv_heads: 3, head_dim, value_dim: head_dim };
        AttentionProblem::new(kind, DType::F16)
    };
    let dims = HEAD_DIMS.into_iter().map(problem);
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    let dtypes = dtypes.into_iter().flat_map(move |dtype| KvDType::ALL.map(|kv_dtype| (dtype, kv_dtype)));
    let dtypes = dtypes.map(move |(dtype, kv_dtype)| {
        let mut problem = problem(64);
        (problem.dtype, problem.kv_dtype) = (dtype, kv_dtype);
        problem
    });
    let features = (0..64u32).map(move |bits| {
        let mut problem = problem(64).mask(if bits & 1 == 1 { Mask::Tree } else { Mask::Causal });
        problem.softcap = (bits & 2 != 0).then_some(30.0);
        (problem.sinks, problem.alibi, problem.lse) = (bits & 4 != 0, bits & 8 != 0, bits & 16 != 0);
        if bits & 32 != 0 {
            (problem.kv_dtype, problem.kv_layout) = (KvDType::Q8, KvLayout::PageHeadToken);
        }
        problem
    });
    dims.chain(dtypes).chain(features).flat_map(|problem| {
        let featured = problem.lse || problem.alibi || problem.softcap.is_some();
        // Features do not meet tiles and widths: one of each will do.
        let widths: &[u32] = if featured { &[32] } else { &[4, 8, 16, 32, 64] };
        let scalar = widths.iter().map(move |width| {
            let mut facts = DeviceFacts::gpu("any").with_subgroups(*width, *width);
            facts.limits.workgroup_bytes = 48 << 10;
            facts.limits.workgroup_invocations = 1024;
            // With too few buffers nothing is answered without merging.
            facts.limits.storage_buffers = if *width == 16 { 5 } else { 16 };
            facts
        });
        let matrices = scalar
            .clone()
            .filter(|facts| facts.subgroup_min == 32)
            .map(|facts| facts.with_feature("shader-f16").with_cooperative_tile(SIDE, DType::F16, DType::F32));
        let narrow = scalar.clone().filter(move |facts| featured || facts.subgroup_min <= 8);
        let of = |wanted| move |facts| (facts, wanted);
        let every = scalar.chain(matrices).map(of(None)).chain(narrow.map(of(Some(Multiply::Narrow))));
        every.flat_map(move |(facts, wanted)| {
            let all = Variant::all(&problem, &facts, wanted).filter(|variant| !featured || variant.tiles <= 2);
            all.map(|variant| (variant, problem.clone())).collect::<Vec<_>>()
        })
    })
}
