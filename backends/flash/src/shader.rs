//! From a problem to the text of its shader.

use std::fmt::Write;

use polyattn_api::{
    AttentionKind, AttentionProblem, BATCH_WGSL, DeviceFacts, KvDType,
    device::{Access, wgsl},
};

/// Of queries and keys, and of values.
pub(crate) const MIN_DIM: u32 = 16;
pub(crate) const MAX_DIM: u32 = 512;

/// Threads of a workgroup, and keys of a tile: each thread scores one key.
const THREADS: u32 = 256;

/// Elements of a value that one thread sums.
const ELEMENTS: u32 = 8;

/// Vectors of four rows that the memory shared by queries and merging holds.
const SCRATCH: u32 = 512;

/// Workgroup memory of the smallest tile of rows on any device: what the capabilities ask for.
pub(crate) const LEAST_WORKGROUP_BYTES: u32 =
    Variant { quads: 1, head_dim: MIN_DIM, value_dim: MIN_DIM, exchange: Exchange::Workgroup }.workgroup_bytes();

/// How the threads of a slice see each other's scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exchange {
    /// By subgroup shuffles.
    Subgroup,
    /// Through workgroup memory, between barriers.
    Workgroup,
}

impl Exchange {
    /// Shuffles, where every subgroup of the device holds whole slices.
    pub(crate) fn choose(problem: &AttentionProblem, facts: &DeviceFacts) -> Self {
        let fits = facts.subgroup_min >= lanes(problem.kind.output_dim())
            && [facts.subgroup_min, facts.subgroup_max]
                .iter()
                .all(|width| width.is_power_of_two() && *width <= THREADS);
        if facts.has("subgroups") && fits { Self::Subgroup } else { Self::Workgroup }
    }
}

/// Threads of a slice: a power of two, so that slices tile a subgroup, and not so few that what is kept for each slice
/// would outgrow 16 KiB.
const fn lanes(value_dim: u32) -> u32 {
    let lanes = value_dim.div_ceil(ELEMENTS).next_power_of_two();
    if lanes < 4 { 4 } else { lanes }
}

/// What is chosen for a device, apart from what the problem says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Variant {
    /// Vectors of four rows in a work item.
    pub(crate) quads: u32,
    pub(crate) head_dim: u32,
    pub(crate) value_dim: u32,
    pub(crate) exchange: Exchange,
}

impl Variant {
    /// The tiles of rows that `limit` bytes of workgroup memory allow, smallest first.
    pub(crate) fn all(kind: AttentionKind, exchange: Exchange, limit: u32) -> impl Iterator<Item = Self> {
        let (head_dim, value_dim) = (kind.query_dim(), kind.output_dim());
        [1, 2, 4]
            .into_iter()
            .map(move |quads| Self { quads, head_dim, value_dim, exchange })
            .filter(move |variant| head_dim * variant.quads <= SCRATCH && variant.workgroup_bytes() <= limit)
    }

    /// Rows of a work item.
    pub(crate) const fn rows(self) -> u32 {
        self.quads * 4
    }

    const fn slices(self) -> u32 {
        THREADS / lanes(self.value_dim)
    }

    const fn workgroup_bytes(self) -> u32 {
        // Scratch, highest score and sum of each slice, four facts of each row, weight and place of each key.
        SCRATCH * 16 + self.slices() * 32 + self.rows() * 16 + THREADS * (self.quads * 16 + 4)
    }

    /// The bindings of [`source`](Self::source).
    pub(crate) fn bindings(problem: &AttentionProblem) -> Vec<Access> {
        use Access::{Read, ReadWrite};
        let scaled = problem.kv_dtype == KvDType::Q8;
        let optional =
            [(problem.lse, ReadWrite), (problem.sinks, Read), (problem.alibi, Read), (scaled, Read), (scaled, Read)];
        let optional = optional.into_iter().filter(|(wanted, _)| *wanted).map(|(_, access)| access);
        [Read, Read, Read, Read, ReadWrite].into_iter().chain(optional).collect()
    }

    /// The whole text.
    pub(crate) fn source(self, problem: &AttentionProblem) -> String {
        let mut text = [wgsl::PREAMBLE, BATCH_WGSL, problem.kv_layout.wgsl(), &problem.row_wgsl()].concat();
        text += &wgsl::storage_loader(1, "q", problem.dtype);
        text += &problem.kv_dtype.loaders_wgsl(&[(2, "k"), (3, "v")]);
        for (name, value) in [
            ("THREADS", THREADS),
            ("SCRATCH", SCRATCH),
            ("QUADS", self.quads),
            ("LANES", lanes(self.value_dim)),
            ("SLICES", self.slices()),
            ("HEAD_DIM", self.head_dim),
            ("VALUE_DIM", self.value_dim),
            ("COLUMNS", self.value_dim.div_ceil(THREADS)),
        ] {
            let _ = writeln!(text, "const {name}: u32 = {value}u;");
        }
        let scaled = problem.kv_dtype == KvDType::Q8;
        for (name, value) in [("SCALED", scaled), ("SINKS", problem.sinks)] {
            let _ = writeln!(text, "const {name}: bool = {value};");
        }

        // A buffer that the problem does not have is not bound: a function stands in for it.
        let mut binding = 5;
        let mut optional = |wanted: bool, buffer: &str, with: &str, without: &str| {
            if wanted {
                let _ = writeln!(text, "@group(0) @binding({binding}) {buffer}");
                binding += 1;
            }
            text += if wanted { with } else { without };
        };
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
        optional(
            problem.alibi,
            "var<storage, read> slopes: array<f32>;",
            "fn slope_of(head: u32) -> f32 { return slopes[head]; }\n",
            "fn slope_of(head: u32) -> f32 { return 0.0; }\n",
        );
        optional(
            scaled,
            "var<storage, read> k_scale: array<f32>;",
            "fn k_scale_of(row: u32) -> f32 { return k_scale[row]; }\n",
            "fn k_scale_of(row: u32) -> f32 { return 1.0; }\n",
        );
        optional(
            scaled,
            "var<storage, read> v_scale: array<f32>;",
            "fn v_scale_of(row: u32) -> f32 { return v_scale[row]; }\n",
            "fn v_scale_of(row: u32) -> f32 { return 1.0; }\n",
        );

        // Barriers must stand in the entry point, so they are put there as text.
        let (exchange, barrier) = match self.exchange {
            Exchange::Subgroup => (include_str!("subgroup.wgsl"), ""),
            Exchange::Workgroup => (include_str!("workgroup.wgsl"), "workgroupBarrier();"),
        };
        text += exchange;
        text += &include_str!("flash.wgsl").replace("SCORE_BARRIER", barrier);
        text
    }
}

/// The variants there are, for tests: whatever takes part in the text varies against the rest of it at least once.
#[cfg(test)]
pub(crate) fn variants() -> impl Iterator<Item = (Variant, AttentionProblem)> {
    use polyattn_api::{DType, KvLayout, Mask};

    let problem = |head_dim, value_dim| {
        let kind = AttentionKind::Gqa { query_heads: 9, kv_heads: 3, head_dim, value_dim };
        AttentionProblem::new(kind, DType::F16)
    };
    let sizes = (MIN_DIM..=MAX_DIM).step_by(8);
    let dims = sizes.clone().map(move |dim| problem(dim, dim)).chain(sizes.step_by(4).map(move |dim| problem(64, dim)));
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    let dtypes = dtypes.into_iter().flat_map(move |dtype| KvDType::ALL.map(|kv_dtype| (dtype, kv_dtype)));
    let dtypes = dtypes.map(move |(dtype, kv_dtype)| {
        let mut problem = problem(64, 64);
        (problem.dtype, problem.kv_dtype) = (dtype, kv_dtype);
        problem
    });
    let features = (0..128u32).map(move |bits| {
        let mut problem = problem(64, 64).mask(if bits & 1 == 1 { Mask::Tree } else { Mask::Causal });
        problem.softcap = (bits & 2 != 0).then_some(30.0);
        (problem.sinks, problem.alibi, problem.lse) = (bits & 4 != 0, bits & 8 != 0, bits & 16 != 0);
        problem.prefix_spans = bits & 32 != 0;
        if bits & 64 != 0 {
            (problem.kv_dtype, problem.kv_layout) = (KvDType::Q8, KvLayout::PageHeadToken);
        }
        problem
    });
    dims.chain(dtypes).chain(features).flat_map(|problem| {
        [Exchange::Subgroup, Exchange::Workgroup].into_iter().flat_map(move |exchange| {
            let problem = problem.clone();
            Variant::all(problem.kind, exchange, u32::MAX).map(move |variant| (variant, problem.clone()))
        })
    })
}
