//! From a problem to the texts of its two shaders.

use std::fmt::Write;

use polyattn_api::{
    AttentionProblem, BATCH_WGSL, DType, Decline, DeviceFacts, Mask,
    device::{Access, wgsl},
};

/// Head dims that lanes divide evenly, with few enough elements a lane.
pub(crate) const HEAD_DIMS: [u32; 6] = [32, 64, 96, 128, 192, 256];

/// Rows of a tile: the components of a vector.
pub(crate) const ROWS: u32 = 4;

/// Threads that serve a tile.
pub(crate) const TILE_THREADS: u32 = 64;

/// Positions of a chunk. Fixed, so that a row's arithmetic does not depend on its company.
pub(crate) const CHUNK: u32 = 256;

/// Keys that a stream has in flight.
const KEYS: u32 = 4;

/// Workgroup memory of one tile of the smallest head dim.
pub(crate) const LEAST_WORKGROUP_BYTES: u32 = Variant { tiles: 1, head_dim: 64, lanes: 8 }.workgroup_bytes();

/// Threads of a merging workgroup at the most.
const MERGE_THREADS: u32 = 256;

/// Why a device that has subgroups cannot carry the kernel.
pub(crate) fn device_decline(head_dim: u32, device: &DeviceFacts) -> Option<Decline> {
    let (min, max) = (device.subgroup_min, device.subgroup_max);
    if !(min.is_power_of_two() && min >= 4 && max <= TILE_THREADS && max.is_power_of_two()) {
        return Some(Decline::Other(format!("subgroups of {min} to {max}").into()));
    }
    let smallest = Variant { tiles: 1, head_dim, lanes: lanes(head_dim, min) }.workgroup_bytes();
    (smallest > device.limits.workgroup_bytes)
        .then_some(Decline::NeedsWorkgroupMemory { needed: smallest, available: device.limits.workgroup_bytes })
}

/// What is chosen for a device, apart from what the problem says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Variant {
    /// Tiles of rows in a work item.
    pub(crate) tiles: u32,
    pub(crate) head_dim: u32,
    /// Threads of a stream.
    pub(crate) lanes: u32,
}

impl Variant {
    /// The numbers of tiles that a device's limits allow, smallest first.
    pub(crate) fn all(head_dim: u32, facts: &DeviceFacts) -> impl Iterator<Item = Self> {
        let limits = facts.limits;
        let lanes = lanes(head_dim, facts.subgroup_min);
        [1, 2, 4, 8, 16].into_iter().map(move |tiles| Self { tiles, head_dim, lanes }).filter(move |variant| {
            variant.tiles * TILE_THREADS <= limits.workgroup_invocations
                && variant.workgroup_bytes() <= limits.workgroup_bytes
        })
    }

    /// Rows of a work item.
    pub(crate) const fn rows(self) -> u32 {
        self.tiles * ROWS
    }

    const fn streams(self) -> u32 {
        TILE_THREADS / self.lanes
    }

    /// Sums on their way to be merged, of half the streams; highest score and sum of each stream.
    const fn workgroup_bytes(self) -> u32 {
        self.tiles * 16 * (self.streams().div_ceil(2) * self.head_dim + 2 * self.streams())
    }

    /// The bindings of [`partial`](Self::partial).
    pub(crate) fn partial_bindings(problem: &AttentionProblem) -> Vec<Access> {
        use Access::{Read, ReadWrite};
        let alibi = problem.alibi.then_some(Read);
        [Read, Read, Read, Read, ReadWrite].into_iter().chain(alibi).collect()
    }

    /// The bindings of [`merge`](Self::merge).
    pub(crate) fn merge_bindings(problem: &AttentionProblem) -> Vec<Access> {
        use Access::{Read, ReadWrite};
        let optional = [problem.lse.then_some(ReadWrite), problem.sinks.then_some(Read)];
        [Read, Read, ReadWrite].into_iter().chain(optional.into_iter().flatten()).collect()
    }

    /// The shader that answers a chunk.
    pub(crate) fn partial(self, problem: &AttentionProblem) -> String {
        let kv_dtype = problem.kv_dtype.as_dtype().unwrap_or(DType::F32);
        let mut text = [wgsl::PREAMBLE, BATCH_WGSL].concat();
        for (binding, name, dtype) in [(1, "q", problem.dtype), (2, "k", kv_dtype), (3, "v", kv_dtype)] {
            text += &wgsl::storage_loader(binding, name, dtype);
        }
        for (name, value) in [
            ("TILES", self.tiles),
            ("TILE_THREADS", TILE_THREADS),
            ("LANES", self.lanes),
            ("STREAMS", self.streams()),
            ("EIGHTS", self.head_dim / (8 * self.lanes)),
            ("KEYS", KEYS),
            ("CHUNK", CHUNK),
            ("HEAD_DIM", self.head_dim),
        ] {
            let _ = writeln!(text, "const {name}: u32 = {value}u;");
        }
        for (name, value) in
            [("TREE", problem.mask == Mask::Tree), ("SOFTCAP", problem.softcap.is_some()), ("ALIBI", problem.alibi)]
        {
            let _ = writeln!(text, "const {name}: bool = {value};");
        }
        text += if problem.alibi {
            "@group(0) @binding(5) var<storage, read> slopes: array<f32>;\n\
             fn slope_of(head: u32) -> f32 { return slopes[head]; }\n"
        } else {
            "fn slope_of(head: u32) -> f32 { return 0.0; }\n"
        };
        text += include_str!("partial.wgsl");
        text
    }

    /// The shader that merges a row's chunks.
    pub(crate) fn merge(self, problem: &AttentionProblem) -> String {
        let mut text = BATCH_WGSL.to_owned();
        for (name, value) in
            [("HEAD_DIM", self.head_dim), ("VECTORS", self.head_dim / 4), ("GROUPS", merge_groups(self.head_dim))]
        {
            let _ = writeln!(text, "const {name}: u32 = {value}u;");
        }
        let _ = writeln!(text, "const SINKS: bool = {};", problem.sinks);
        let mut binding = 3;
        text += if problem.lse {
            binding += 1;
            "@group(0) @binding(3) var<storage, read_write> lse: array<f32>;\n\
             fn write_lse(i: u32, x: f32) { lse[i] = x; }\n"
        } else {
            "fn write_lse(i: u32, x: f32) {}\n"
        };
        if problem.sinks {
            let _ = writeln!(text, "@group(0) @binding({binding}) var<storage, read> sinks: array<f32>;");
            text += "fn sink_of(head: u32) -> f32 { return sinks[head]; }\n";
        } else {
            text += "fn sink_of(head: u32) -> f32 { return 0.0; }\n";
        }
        text += include_str!("merge.wgsl");
        text
    }
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

/// Groups of merging threads; each takes every so-manieth chunk.
pub(crate) const fn merge_groups(head_dim: u32) -> u32 {
    let most = MERGE_THREADS / (head_dim / 4);
    1 << most.ilog2()
}

/// The variants there are, for tests.
#[cfg(test)]
pub(crate) fn variants() -> impl Iterator<Item = (Variant, AttentionProblem)> {
    use polyattn_api::AttentionKind;

    let problem = |head_dim| {
        let kind = AttentionKind::Gqa { query_heads: 9, kv_heads: 3, head_dim, value_dim: head_dim };
        AttentionProblem::new(kind, DType::F16)
    };
    let dims = HEAD_DIMS.into_iter().map(problem);
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    let dtypes = dtypes.into_iter().flat_map(move |dtype| dtypes.map(|kv_dtype| (dtype, kv_dtype)));
    let dtypes = dtypes.map(move |(dtype, kv_dtype)| {
        let mut problem = problem(64);
        (problem.dtype, problem.kv_dtype) = (dtype, kv_dtype.into());
        problem
    });
    let features = (0..32u32).map(move |bits| {
        let mut problem = problem(64).mask(if bits & 1 == 1 { Mask::Tree } else { Mask::Causal });
        problem.softcap = (bits & 2 != 0).then_some(30.0);
        (problem.sinks, problem.alibi, problem.lse) = (bits & 4 != 0, bits & 8 != 0, bits & 16 != 0);
        problem
    });
    dims.chain(dtypes).chain(features).flat_map(|problem| {
        [4, 8, 16, 32, 64].into_iter().flat_map(move |width| {
            let problem = problem.clone();
            let mut facts = DeviceFacts::gpu("any").with_subgroups(width, width);
            facts.limits.workgroup_bytes = 64 << 10;
            facts.limits.workgroup_invocations = 1024;
            let all: Vec<_> = Variant::all(problem.kind.query_dim(), &facts).collect();
            all.into_iter().map(move |variant| (variant, problem.clone()))
        })
    })
}
