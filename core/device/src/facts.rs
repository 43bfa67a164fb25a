use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::DType;

/// The two kinds of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// The processor the program runs on.
    Cpu,
    /// An adapter reached through wgpu.
    Gpu,
}

/// Limits of a device that decide whether a kernel can run. Zero on the CPU, where nothing is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DeviceLimits {
    /// Bytes of one storage binding.
    pub binding_bytes: u64,
    /// Bytes of one buffer.
    pub buffer_bytes: u64,
    /// Bytes of workgroup memory.
    pub workgroup_bytes: u32,
    /// Invocations of one workgroup.
    pub workgroup_invocations: u32,
    /// Workgroups in each dimension of a dispatch.
    pub workgroups_per_dimension: u32,
    /// Bytes of immediates (push constants).
    pub immediate_bytes: u32,
    /// Storage buffers of one shader.
    pub storage_buffers: u32,
    /// Alignment of a binding's offset in bytes.
    pub offset_alignment: u32,
}

/// Square matrices that a subgroup multiplies as one (cooperative matrices): `side` rows and columns each, of `input`
/// elements, added up in `sum`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CooperativeTile {
    /// Rows and columns; WGSL can spell 8 and 16.
    pub side: u32,
    /// Elements of the two factors.
    pub input: DType,
    /// Elements of the sum.
    pub sum: DType,
}

impl CooperativeTile {
    /// A tile of `side` rows and columns.
    #[must_use]
    pub const fn new(side: u32, input: DType, sum: DType) -> Self {
        Self { side, input, sum }
    }
}

/// What is known of a device: the facts that backends and the selector decide by. Plain data, so that a test can
/// describe any device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DeviceFacts {
    /// CPU or GPU.
    pub kind: DeviceKind,
    /// The adapter's name; `cpu` for the CPU.
    pub name: String,
    /// The graphics interface it is reached by (`vulkan`, `metal`, `dx12`), or `cpu`.
    pub interface: String,
    /// Driver name and version, empty for the CPU.
    pub driver: String,
    /// Whether the adapter is hardware; a software rasteriser is not.
    pub hardware: bool,
    /// wgpu features by their kebab-case names (`shader-f16`, `subgroups`, …).
    pub features: BTreeSet<String>,
    /// Narrowest subgroup the driver may run, 0 without subgroups.
    pub subgroup_min: u32,
    /// Widest subgroup the driver may run, 0 without subgroups.
    pub subgroup_max: u32,
    /// Shapes of cooperative matrices; none without the feature `wgpu-cooperative-matrix`.
    #[serde(default)]
    pub cooperative_tiles: Vec<CooperativeTile>,
    /// Its limits.
    pub limits: DeviceLimits,
}

impl DeviceFacts {
    /// The CPU.
    #[must_use]
    pub fn cpu() -> Self {
        Self {
            kind: DeviceKind::Cpu,
            name: "cpu".into(),
            interface: "cpu".into(),
            driver: String::new(),
            hardware: true,
            features: BTreeSet::new(),
            subgroup_min: 0,
            subgroup_max: 0,
            cooperative_tiles: Vec::new(),
            limits: DeviceLimits {
                binding_bytes: u64::MAX,
                buffer_bytes: u64::MAX,
                workgroup_bytes: 0,
                workgroup_invocations: 0,
                workgroups_per_dimension: 0,
                immediate_bytes: 0,
                storage_buffers: 0,
                offset_alignment: 1,
            },
        }
    }

    /// A GPU with no optional feature and the limits every current desktop driver has; add to it with
    /// [`with_feature`](Self::with_feature) or by its fields.
    #[must_use]
    pub fn gpu(name: impl Into<String>) -> Self {
        Self {
            kind: DeviceKind::Gpu,
            name: name.into(),
            interface: "vulkan".into(),
            driver: String::new(),
            hardware: true,
            features: BTreeSet::from(["immediates".to_owned()]),
            subgroup_min: 0,
            subgroup_max: 0,
            cooperative_tiles: Vec::new(),
            limits: DeviceLimits {
                binding_bytes: 128 << 20,
                buffer_bytes: 256 << 20,
                workgroup_bytes: 32 << 10,
                workgroup_invocations: 256,
                workgroups_per_dimension: 65_535,
                immediate_bytes: 128,
                storage_buffers: 8,
                offset_alignment: 256,
            },
        }
    }

    /// The same device with one more feature, by its kebab-case name.
    #[must_use]
    pub fn with_feature(mut self, feature: &str) -> Self {
        self.features.insert(feature.to_owned());
        self
    }

    /// The same device with subgroups of `min` to `max` invocations.
    #[must_use]
    pub fn with_subgroups(mut self, min: u32, max: u32) -> Self {
        self.subgroup_min = min;
        self.subgroup_max = max;
        self.with_feature("subgroups")
    }

    /// The same device with cooperative matrices of one more shape.
    #[must_use]
    pub fn with_cooperative_tile(mut self, side: u32, input: DType, sum: DType) -> Self {
        self.cooperative_tiles.push(CooperativeTile { side, input, sum });
        self.with_feature("wgpu-cooperative-matrix")
    }

    /// Whether it has a feature, by its kebab-case name.
    #[must_use]
    pub fn has(&self, feature: &str) -> bool {
        self.features.contains(feature)
    }

    /// Whether it multiplies cooperative matrices of this shape.
    #[must_use]
    pub fn has_cooperative_tile(&self, side: u32, input: DType, sum: DType) -> bool {
        self.cooperative_tiles.contains(&CooperativeTile { side, input, sum })
    }

    /// Whether it is the CPU.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        self.kind == DeviceKind::Cpu
    }
}
