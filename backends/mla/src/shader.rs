//! From a problem to the texts of its shaders.

use std::fmt::Write;

use polyattn_api::{
    AttentionProblem, BATCH_WGSL, DType, DeviceFacts, KvDType,
    device::{Access, wgsl},
};

/// Largest latent: a merging workgroup has a thread for four elements.
pub(crate) const MOST_LATENT: u32 = 1024;

/// Largest rope key.
pub(crate) const MOST_ROPE: u32 = 256;

/// Workgroup memory of the fewest rows.
pub(crate) const LEAST_WORKGROUP_BYTES: u32 = scalar_bytes(4);

/// Positions of a chunk in plain arithmetic. Fixed, so that a row's arithmetic does not depend on its company.
const CHUNK: u32 = 256;

/// Threads of an item in plain arithmetic.
const THREADS: u32 = 128;

/// Elements of the queries that lie in workgroup memory at once.
const SLICE: u32 = 64;

/// Threads that make weights of a quad's scores.
const LANES: u32 = 32;

/// Threads of a merging workgroup at the most, and the most vectors of a row that it answers: a few workgroups for each
/// row, so that one row with many chunks finishes sooner.
const MERGE_THREADS: u32 = 256;
const MERGE_BLOCK: u32 = 32;

/// Scores, queries, maxima and sums of a quad; places of the keys; what the rows see.
const fn scalar_bytes(rows: u32) -> u32 {
    rows / 4 * 16 * (CHUNK + SLICE + 2 * LANES) + 4 * CHUNK + rows * 20
}

/// How products are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Products {
    /// In plain arithmetic.
    Plain,
    /// By cooperative matrices.
    Matrices(Matrices),
}

/// A workgroup that multiplies cooperative matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Matrices {
    /// Invocations of a subgroup.
    pub(crate) width: u32,
    /// Matrices that the keys of a step fill.
    pub(crate) tiles: u32,
}

/// What is chosen for a device and a batch, apart from what the problem says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Variant {
    pub(crate) products: Products,
    /// Rows of a work item.
    pub(crate) rows: u32,
}

impl Variant {
    /// What the device allows, fewest rows first. All have the same products, so that a row has the same bits in each.
    pub(crate) fn all(problem: &AttentionProblem, facts: &DeviceFacts) -> Vec<Self> {
        if let Some(matrices) = Matrices::of(problem, facts) {
            return vec![Self { products: Products::Matrices(matrices), rows: MATRIX_ROWS }];
        }
        let fits = |rows: &u32| scalar_bytes(*rows) <= facts.limits.workgroup_bytes;
        [4, 8, 16].into_iter().filter(fits).map(|rows| Self { products: Products::Plain, rows }).collect()
    }

    /// Positions of a chunk: the same for all variants of a problem on a device.
    pub(crate) const fn chunk(self) -> u32 {
        match self.products {
            Products::Plain => CHUNK,
            Products::Matrices(_) => MATRIX_CHUNK,
        }
    }

    /// The shader that answers a chunk.
    pub(crate) fn partial(self, problem: &AttentionProblem) -> String {
        let (dim, latent) = (problem.kind.query_dim(), problem.kind.output_dim());
        let mut text = match self.products {
            Products::Plain => String::new(),
            Products::Matrices(_) => "enable f16;\nenable wgpu_cooperative_matrix;\n".to_owned(),
        };
        text += BATCH_WGSL;
        text += &problem.row_wgsl();
        let scaled = problem.kv_dtype == KvDType::Q8;
        let mut optional = Optional { text: &mut text, next: 4 };
        optional.read("slope_of", problem.alibi, "0.0");
        optional.read("cache_scale_of", scaled, "1.0");
        let _ = writeln!(text, "const SCALED: bool = {scaled};");
        numbers(&mut text, &[("DIM", dim), ("LATENT", latent), ("CHUNK", self.chunk())]);
        text += include_str!("rows.wgsl");
        let Matrices { width, tiles } = match self.products {
            Products::Plain => {
                self.plain(&mut text, problem);
                return text;
            }
            Products::Matrices(matrices) => {
                text += include_str!("matrices.wgsl");
                matrices
            }
        };
        let parts = parts(dim);
        let columns = (latent / 16).div_ceil(tiles * parts);
        numbers(&mut text, &[("WIDTH", width), ("TILES", tiles), ("PARTS", parts), ("COLUMNS", columns)]);
        text += &expanded(include_str!("cooperative.wgsl"), [tiles, dim / 16 / parts, columns]);
        text
    }

    fn plain(self, text: &mut String, problem: &AttentionProblem) {
        let latent = problem.kind.output_dim();
        text.push_str(wgsl::PREAMBLE);
        *text += &wgsl::storage_loader(1, "q", problem.dtype);
        *text += &problem.kv_dtype.loaders_wgsl(&[(2, "cache")]);
        numbers(
            text,
            &[
                ("QUADS", self.rows / 4),
                ("THREADS", THREADS),
                ("KEYS", CHUNK / THREADS),
                ("SLICE", SLICE),
                ("LANES", LANES),
                ("EIGHTS", latent / 8),
                ("GROUPS", teams(latent)),
            ],
        );
        *text += include_str!("scalar.wgsl");
    }
}

fn numbers(text: &mut String, numbers: &[(&str, u32)]) {
    for (name, value) in numbers {
        let _ = writeln!(text, "const {name}: u32 = {value}u;");
    }
}

/// Rows of a cooperative matrix.
const MATRIX_ROWS: u32 = 16;

/// Positions of a chunk where cooperative matrices are multiplied.
const MATRIX_CHUNK: u32 = 512;

/// Subgroups that share the elements of a row there: each has a whole number of matrices.
fn parts(dim: u32) -> u32 {
    if (dim / 16).is_multiple_of(4) { 4 } else { 3 }
}

impl Matrices {
    /// Those that a device multiplies for a problem, if it can.
    fn of(problem: &AttentionProblem, facts: &DeviceFacts) -> Option<Self> {
        let (dim, latent) = (problem.kind.query_dim(), problem.kind.output_dim());
        let width = facts.subgroup_min;
        let served = problem.dtype == DType::F16
            && problem.kv_dtype == KvDType::F16
            && dim.is_multiple_of(16 * parts(dim))
            && latent.is_multiple_of(16);
        let able = facts.has_cooperative_tile(16, DType::F16, DType::F32)
            && facts.has("shader-f16")
            && facts.has("subgroups")
            && facts.subgroup_max == width
            && [8, 16, 32, 64].contains(&width)
            // The threads share what is read of the cache evenly.
            && (2 * dim).is_multiple_of(parts(dim) * width);
        let fits = |matrices: &Self| {
            let subgroups = parts(dim) * matrices.tiles;
            matrices.workgroup_bytes(dim) <= facts.limits.workgroup_bytes
                && subgroups * width <= facts.limits.workgroup_invocations
                // More sums would not fit a subgroup's registers.
                && (latent / 16).div_ceil(subgroups) <= 8
        };
        [2, 1].map(|tiles| Self { width, tiles }).into_iter().find(fits).filter(|_| served && able)
    }

    /// A step's latents, weights, a matrix of each subgroup, places of the chunk's keys, states and factors of rows.
    fn workgroup_bytes(self, dim: u32) -> u32 {
        let (step, subgroups) = (16 * self.tiles, parts(dim) * self.tiles);
        step * (dim + 8) * 2 + MATRIX_ROWS * (step + 8) * 2 + subgroups * 1024 + MATRIX_CHUNK * 4 + MATRIX_ROWS * 8 + 16
    }
}

/// A text whose lines are repeated as cooperative.wgsl says, for so many tiles, products and columns: matrices in an
/// array are in registers only where a compiler unrolls every loop over them. A backslash joins two lines.
fn expanded(source: &str, [tiles, products, columns]: [u32; 3]) -> String {
    let each = [("EACH_TILE ", '@', tiles), ("EACH_PRODUCT ", '#', products), ("EACH_COLUMN ", '#', columns)];
    let mut text = String::new();
    for line in source.replace("\\\n", "").lines() {
        let mut lines = vec![line.trim_start().to_owned()];
        for (prefix, sign, count) in each {
            let repeated = |line: String| match line.strip_prefix(prefix) {
                Some(line) => (0..count).map(|number| line.replace(sign, &number.to_string())).collect(),
                None => vec![line],
            };
            lines = lines.into_iter().flat_map(repeated).collect();
        }
        text.extend(lines.into_iter().map(|line| line + "\n"));
    }
    text
}

/// Teams of threads that share a chunk's keys when latents are summed. It decides the order of sums, so it depends on
/// nothing but the latent.
fn teams(latent: u32) -> u32 {
    1 << (THREADS / (latent / 4)).max(1).ilog2()
}

/// The bindings of [`Variant::partial`].
pub(crate) fn partial_bindings(problem: &AttentionProblem) -> Vec<Access> {
    use Access::{Read, ReadWrite};
    let optional = usize::from(problem.alibi) + usize::from(problem.kv_dtype == KvDType::Q8);
    [Read, Read, Read, ReadWrite].into_iter().chain(std::iter::repeat_n(Read, optional)).collect()
}

/// The shader that merges a row's chunks.
pub(crate) fn merge(problem: &AttentionProblem) -> String {
    let vectors = problem.kind.output_dim() / 4;
    let block = merge_block(problem);
    let groups = 1 << (MERGE_THREADS / block).ilog2();
    let mut text = BATCH_WGSL.to_owned();
    numbers(&mut text, &[("VECTORS", vectors), ("BLOCK", block), ("GROUPS", groups)]);
    let _ = writeln!(text, "const SINKS: bool = {};", problem.sinks);
    let mut next = 3;
    text += if problem.lse {
        next += 1;
        "@group(0) @binding(3) var<storage, read_write> lse: array<f32>;\n\
         fn write_lse(i: u32, x: f32) { lse[i] = x; }\n"
    } else {
        "fn write_lse(i: u32, x: f32) {}\n"
    };
    Optional { text: &mut text, next }.read("sink_of", problem.sinks, "0.0");
    text += include_str!("merge.wgsl");
    text
}

/// Vectors of four elements that a merging workgroup answers: a whole number of workgroups makes a row.
pub(crate) fn merge_block(problem: &AttentionProblem) -> u32 {
    let vectors = problem.kind.output_dim() / 4;
    (1..=MERGE_BLOCK).rev().find(|block| vectors.is_multiple_of(*block)).unwrap_or(1)
}

/// The bindings of [`merge`].
pub(crate) fn merge_bindings(problem: &AttentionProblem) -> Vec<Access> {
    use Access::{Read, ReadWrite};
    let optional = [problem.lse.then_some(ReadWrite), problem.sinks.then_some(Read)];
    [Read, Read, ReadWrite].into_iter().chain(optional.into_iter().flatten()).collect()
}

/// Buffers of f32 that are bound where a problem has them, one behind the other.
struct Optional<'a> {
    text: &'a mut String,
    next: u32,
}

impl Optional<'_> {
    /// Declares a function that reads an element, of a buffer or always `otherwise`.
    fn read(&mut self, function: &str, there: bool, otherwise: &str) {
        let _ = if there {
            let binding = self.next;
            self.next += 1;
            writeln!(
                self.text,
                "@group(0) @binding({binding}) var<storage, read> {function}_: array<f32>;\n\
                 fn {function}(i: u32) -> f32 {{ return {function}_[i]; }}"
            )
        } else {
            writeln!(self.text, "fn {function}(i: u32) -> f32 {{ return {otherwise}; }}")
        };
    }
}
