//! From a problem to the texts of its shaders.

use std::fmt::Write;

use polyattn_api::{
    AttentionProblem, BATCH_WGSL, DType, DeviceFacts, KvDType, Mask,
    device::{
        Access,
        wgsl::{self, Byte},
    },
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

/// Threads of a merging workgroup at the most.
const MERGE_THREADS: u32 = 256;

/// Scores, queries, maxima and sums of a quad; places of the keys; what the rows see.
const fn scalar_bytes(rows: u32) -> u32 {
    rows / 4 * 16 * (CHUNK + SLICE + 2 * LANES) + 4 * CHUNK + rows * 20
}

/// What is chosen for a device and a batch, apart from what the problem says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Variant {
    /// Rows of a work item.
    pub(crate) rows: u32,
}

impl Variant {
    /// What the device's limits allow, fewest rows first.
    pub(crate) fn all(_problem: &AttentionProblem, facts: &DeviceFacts) -> Vec<Self> {
        let fits = |rows: &u32| scalar_bytes(*rows) <= facts.limits.workgroup_bytes;
        [4, 8, 16].into_iter().filter(fits).map(|rows| Self { rows }).collect()
    }

    /// Positions of a chunk: the same for all variants of a problem on a device.
    pub(crate) const fn chunk(self) -> u32 {
        CHUNK
    }

    /// The shader that answers a chunk.
    pub(crate) fn partial(self, problem: &AttentionProblem) -> String {
        let (dim, latent) = (problem.kind.query_dim(), problem.kind.output_dim());
        let mut text = [wgsl::PREAMBLE, wgsl::BYTES_PREAMBLE, BATCH_WGSL].concat();
        text += &wgsl::storage_loader(1, "q", problem.dtype);
        text += &match problem.kv_dtype {
            KvDType::Q8 => wgsl::byte_loader(2, "cache", Byte::I8),
            KvDType::F8E4M3 => wgsl::byte_loader(2, "cache", Byte::E4M3),
            KvDType::F8E5M2 => wgsl::byte_loader(2, "cache", Byte::E5M2),
            other => wgsl::storage_loader(2, "cache", other.as_dtype().unwrap_or(DType::F32)),
        };
        let numbers = [
            ("QUADS", self.rows / 4),
            ("CHUNK", CHUNK),
            ("THREADS", THREADS),
            ("KEYS", CHUNK / THREADS),
            ("SLICE", SLICE),
            ("LANES", LANES),
            ("DIM", dim),
            ("LATENT", latent),
            ("EIGHTS", latent / 8),
            ("GROUPS", teams(latent)),
        ];
        for (name, value) in numbers {
            let _ = writeln!(text, "const {name}: u32 = {value}u;");
        }
        let scaled = problem.kv_dtype == KvDType::Q8;
        let features = [
            ("TREE", problem.mask == Mask::Tree),
            ("SOFTCAP", problem.softcap.is_some()),
            ("ALIBI", problem.alibi),
            ("SCALED", scaled),
        ];
        for (name, value) in features {
            let _ = writeln!(text, "const {name}: bool = {value};");
        }
        let mut optional = Optional { text: &mut text, next: 4 };
        optional.read("slope_of", problem.alibi, "0.0");
        optional.read("cache_scale_of", scaled, "1.0");
        text += include_str!("rows.wgsl");
        text += include_str!("scalar.wgsl");
        text
    }
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
    let groups = 1 << (MERGE_THREADS / vectors).ilog2();
    let mut text = BATCH_WGSL.to_owned();
    for (name, value) in [("VECTORS", vectors), ("GROUPS", groups)] {
        let _ = writeln!(text, "const {name}: u32 = {value}u;");
    }
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
