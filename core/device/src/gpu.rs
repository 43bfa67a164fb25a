//! The wgpu side of a device: adapters, and the caches that live as long as the device does.

#![expect(
    unsafe_code,
    reason = "kernels are compiled without run-time checks, see `Gpu::pipeline`; one feature of wgpu is experimental"
)]

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::{Mutex, RwLock};

use crate::{
    Access, Buffer, BufferSlice, CooperativeTile, DType, DeviceError, DeviceFacts, DeviceKind, DeviceLimits, Pipeline,
    PipelineSpec,
    pipeline::{PipelineInner, PipelineKey},
};

/// Features that are used where an adapter has them.
const WANTED: wgpu::Features = wgpu::Features::SHADER_F16
    .union(wgpu::Features::SUBGROUP)
    .union(wgpu::Features::SUBGROUP_BARRIER)
    .union(wgpu::Features::IMMEDIATES)
    .union(wgpu::Features::TIMESTAMP_QUERY)
    .union(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);

/// Features without which no kernel of this project runs.
const REQUIRED: wgpu::Features = wgpu::Features::IMMEDIATES;

pub(crate) struct Gpu {
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    pub(crate) facts: DeviceFacts,
    fault: Arc<Mutex<Option<DeviceError>>>,
    next_id: AtomicU64,
    layouts: Mutex<HashMap<Vec<Access>, (u64, wgpu::BindGroupLayout)>>,
    pipelines: RwLock<HashMap<PipelineKey, Pipeline>>,
    pub(crate) named: RwLock<HashMap<(&'static str, u64), Pipeline>>,
    /// Bind groups by layout and ranges; an entry goes when one of its buffers does.
    bind_groups: Mutex<HashMap<Box<[u64]>, wgpu::BindGroup>>,
    forgotten: Mutex<Vec<u64>>,
    staging: Mutex<HashMap<u64, Vec<wgpu::Buffer>>>,
}

/// The adapters there are, best first, hardware before software.
pub(crate) fn adapters() -> Vec<(wgpu::Adapter, DeviceFacts)> {
    static INSTANCE: OnceLock<wgpu::Instance> = OnceLock::new();
    let instance = INSTANCE.get_or_init(|| {
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        // GL would list Mesa's software GPU a second time, without f16 and subgroups.
        descriptor.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
        if cfg!(feature = "gl") {
            descriptor.backends |= wgpu::Backends::GL;
        }
        // Debug builds of wgpu would load Vulkan's validation layers and print to the terminal.
        descriptor.flags = wgpu::InstanceFlags::empty();
        wgpu::Instance::new(descriptor)
    });
    let mut found: Vec<_> = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()))
        .into_iter()
        .map(|adapter| {
            let facts = facts(&adapter);
            let rank = match adapter.get_info().device_type {
                wgpu::DeviceType::DiscreteGpu => 0,
                wgpu::DeviceType::IntegratedGpu => 1,
                wgpu::DeviceType::VirtualGpu => 2,
                wgpu::DeviceType::Other => 3,
                wgpu::DeviceType::Cpu => 4,
            };
            (rank, adapter, facts)
        })
        .collect();
    found.sort_by_key(|(rank, ..)| *rank);
    found.into_iter().map(|(_, adapter, facts)| (adapter, facts)).collect()
}

fn facts(adapter: &wgpu::Adapter) -> DeviceFacts {
    let info = adapter.get_info();
    let limits = adapter.limits();
    let features = adapter.features();
    let subgroups = features.contains(wgpu::Features::SUBGROUP);
    DeviceFacts {
        kind: DeviceKind::Gpu,
        name: info.name,
        interface: info.backend.to_str().to_owned(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        hardware: info.device_type != wgpu::DeviceType::Cpu,
        features: features.iter().filter_map(|feature| feature.as_str().map(str::to_owned)).collect(),
        subgroup_min: if subgroups { info.subgroup_min_size } else { 0 },
        subgroup_max: if subgroups { info.subgroup_max_size } else { 0 },
        cooperative_tiles: cooperative_tiles(adapter),
        limits: DeviceLimits {
            binding_bytes: limits.max_storage_buffer_binding_size,
            buffer_bytes: limits.max_buffer_size,
            workgroup_bytes: limits.max_compute_workgroup_storage_size,
            workgroup_invocations: limits.max_compute_invocations_per_workgroup,
            workgroups_per_dimension: limits.max_compute_workgroups_per_dimension,
            immediate_bytes: limits.max_immediate_size,
            storage_buffers: limits.max_storage_buffers_per_shader_stage,
            offset_alignment: limits.min_storage_buffer_offset_alignment,
        },
    }
}

/// Those of the driver's shapes that WGSL can spell.
fn cooperative_tiles(adapter: &wgpu::Adapter) -> Vec<CooperativeTile> {
    let dtype = |scalar| match scalar {
        wgpu::CooperativeScalarType::F32 => Some(DType::F32),
        wgpu::CooperativeScalarType::F16 => Some(DType::F16),
        _ => None,
    };
    let mut tiles = Vec::new();
    if adapter.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) {
        for shape in adapter.cooperative_matrix_properties() {
            let side = shape.m_size;
            if let (Some(input), Some(sum)) = (dtype(shape.ab_type), dtype(shape.cr_type))
                && [8, 16].contains(&side)
                && (shape.n_size, shape.k_size) == (side, side)
                && !tiles.contains(&CooperativeTile { side, input, sum })
            {
                tiles.push(CooperativeTile { side, input, sum });
            }
        }
    }
    tiles
}

impl Gpu {
    pub(crate) fn open(adapter: &wgpu::Adapter, mut facts: DeviceFacts) -> Result<Arc<Self>, DeviceError> {
        let unusable = |reason: String| DeviceError::Unusable { device: facts.name.clone(), reason };
        if !adapter.features().contains(REQUIRED) {
            return Err(unusable("needs feature immediates".into()));
        }
        let mut features = adapter.features() & WANTED;
        if std::env::var_os("POLYATTN_NO_COOPERATIVE_MATRICES").is_some() {
            features.remove(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
            facts.cooperative_tiles.clear();
        }
        let experimental_features = if features.intersects(wgpu::Features::all_experimental_mask()) {
            // SAFETY: the only experimental feature that is wanted is cooperative matrices. Kernels reach them in
            // uniform control flow, and their results are compared with the reference's on every device that has them.
            unsafe { wgpu::ExperimentalFeatures::enabled() }
        } else {
            wgpu::ExperimentalFeatures::disabled()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("polyattn"),
            required_features: features,
            required_limits: adapter.limits(),
            experimental_features,
            ..wgpu::DeviceDescriptor::default()
        }))
        .map_err(|error| unusable(error.to_string()))?;
        // What was not enabled cannot be used.
        facts.features = features.iter().filter_map(|feature| feature.as_str().map(str::to_owned)).collect();
        if std::env::var_os("POLYATTN_NO_SUBGROUPS").is_some() {
            facts.features.remove("subgroups");
            (facts.subgroup_min, facts.subgroup_max) = (0, 0);
        }

        let fault = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&fault);
        let name = facts.name.clone();
        device.on_uncaptured_error(Arc::new(move |error| {
            slot.lock().get_or_insert(classify(error, 0, "a command", &name));
        }));
        let slot = Arc::clone(&fault);
        device.set_device_lost_callback(move |reason, message| {
            if reason != wgpu::DeviceLostReason::Destroyed {
                *slot.lock() = Some(DeviceError::Lost(message));
            }
        });
        Ok(Arc::new(Self {
            device,
            queue,
            facts,
            fault,
            next_id: AtomicU64::new(1),
            layouts: Mutex::default(),
            pipelines: RwLock::default(),
            named: RwLock::default(),
            bind_groups: Mutex::default(),
            forgotten: Mutex::default(),
            staging: Mutex::default(),
        }))
    }

    /// The error that was reported since the device was opened, if any. A lost device stays lost.
    pub(crate) fn check(&self) -> Result<(), DeviceError> {
        let mut fault = self.fault.lock();
        match &*fault {
            Some(lost @ DeviceError::Lost(_)) => Err(lost.clone()),
            Some(_) => fault.take().map_or(Ok(()), Err),
            None => Ok(()),
        }
    }

    fn id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Runs `make` and turns what wgpu reports into a typed error.
    fn guarded<T>(&self, bytes: u64, what: &str, make: impl FnOnce() -> T) -> Result<T, DeviceError> {
        self.check()?;
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = self.device.push_error_scope(wgpu::ErrorFilter::Internal);
        let made = make();
        let errors = [
            pollster::block_on(internal.pop()),
            pollster::block_on(validation.pop()),
            pollster::block_on(memory.pop()),
        ];
        match errors.into_iter().flatten().next() {
            Some(error) => Err(classify(error, bytes, what, &self.facts.name)),
            None => Ok(made),
        }
    }

    pub(crate) fn alloc(self: &Arc<Self>, bytes: u64, label: &str) -> Result<Buffer, DeviceError> {
        let allowed = self.facts.limits.buffer_bytes;
        if bytes > allowed {
            return Err(DeviceError::Limit {
                what: label.to_owned(),
                needed: bytes,
                allowed,
                unit: "bytes in one buffer",
                device: self.facts.name.clone(),
            });
        }
        let buffer = self.guarded(bytes, label, || {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size: bytes.next_multiple_of(16).max(16),
                usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })?;
        Ok(Buffer::gpu(self.id(), bytes, label, buffer, Arc::downgrade(self)))
    }

    pub(crate) fn pipeline(&self, spec: &PipelineSpec<'_>) -> Result<Pipeline, DeviceError> {
        let key = PipelineKey::from(spec);
        if let Some(pipeline) = self.pipelines.read().get(&key) {
            return Ok(pipeline.clone());
        }
        if spec.immediate_bytes > self.facts.limits.immediate_bytes {
            return Err(DeviceError::Limit {
                what: spec.label.to_owned(),
                needed: spec.immediate_bytes.into(),
                allowed: self.facts.limits.immediate_bytes.into(),
                unit: "bytes of immediates",
                device: self.facts.name.clone(),
            });
        }
        let (layout_id, layout) = self.layout(spec.bindings);
        let checks = if std::env::var_os("POLYATTN_SHADER_CHECKS").is_some() {
            wgpu::ShaderRuntimeChecks::checked()
        } else {
            wgpu::ShaderRuntimeChecks::unchecked()
        };
        let made = self.guarded(0, spec.label, || {
            let descriptor = wgpu::ShaderModuleDescriptor {
                label: Some(spec.label),
                source: wgpu::ShaderSource::Wgsl(spec.source.into()),
            };
            // SAFETY: kernels index storage only by page tables and lengths that were validated on the host, and mask
            // tails by hand; their loops are bounded by those lengths. The same kernels run checked in the tests.
            let module = unsafe { self.device.create_shader_module_trusted(descriptor, checks) };
            let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: Some(spec.label),
                bind_group_layouts: &[Some(&layout)],
                immediate_size: spec.immediate_bytes,
            });
            self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(spec.label),
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: Some(spec.entry),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: spec.constants,
                    zero_initialize_workgroup_memory: false,
                },
                cache: None,
            })
        });
        let pipeline = made.map_err(|error| match error {
            DeviceError::Other(message) => DeviceError::Shader { label: spec.label.to_owned(), message },
            other => other,
        })?;
        let pipeline = Pipeline(Arc::new(PipelineInner {
            id: self.id(),
            layout_id,
            label: spec.label.to_owned(),
            layout,
            bindings: spec.bindings.len(),
            immediate_bytes: spec.immediate_bytes,
            pipeline,
        }));
        Ok(self.pipelines.write().entry(key).or_insert(pipeline).clone())
    }

    fn layout(&self, bindings: &[Access]) -> (u64, wgpu::BindGroupLayout) {
        let mut layouts = self.layouts.lock();
        if let Some(found) = layouts.get(bindings) {
            return found.clone();
        }
        let entries: Vec<_> = bindings
            .iter()
            .zip(0..)
            .map(|(access, binding)| wgpu::BindGroupLayoutEntry {
                binding,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Storage { read_only: *access == Access::Read },
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let layout =
            self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
        let made = (layouts.len() as u64, layout);
        layouts.insert(bindings.to_vec(), made.clone());
        made
    }

    /// Calls `with` on the bind group of `pipeline` over `slices`; `key` is scratch memory.
    pub(crate) fn with_bind_group(
        &self,
        pipeline: &PipelineInner,
        slices: &[BufferSlice<'_>],
        key: &mut Vec<u64>,
        with: impl FnOnce(&wgpu::BindGroup),
    ) -> Result<(), DeviceError> {
        key.clear();
        key.push(pipeline.layout_id);
        for slice in slices {
            key.extend([slice.buffer.id(), slice.offset, slice.bytes]);
        }
        let mut cache = self.bind_groups.lock();
        if let Some(group) = cache.get(key.as_slice()) {
            with(group);
            return Ok(());
        }
        let limits = &self.facts.limits;
        let mut entries = Vec::with_capacity(slices.len());
        for (slice, binding) in slices.iter().zip(0..) {
            let end = slice.offset + slice.bytes;
            if slice.bytes > limits.binding_bytes {
                return Err(DeviceError::Limit {
                    what: slice.buffer.label().to_owned(),
                    needed: slice.bytes,
                    allowed: limits.binding_bytes,
                    unit: "bytes in one binding",
                    device: self.facts.name.clone(),
                });
            }
            if !slice.offset.is_multiple_of(limits.offset_alignment.into()) {
                return Err(slice.buffer.range_error(slice.offset, end, "offset not aligned for a binding"));
            }
            // The memory is a multiple of 16 bytes, so that a kernel may load whole vectors at its end.
            let size = std::num::NonZeroU64::new(slice.bytes.next_multiple_of(16).max(16));
            entries.push(wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: slice.buffer.wgpu()?,
                    offset: slice.offset,
                    size,
                }),
            });
        }
        let group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.layout,
            entries: &entries,
        });
        with(&group);
        cache.insert(key.as_slice().into(), group);
        Ok(())
    }

    /// Called when a buffer is dropped: its bind groups go with the next recording.
    pub(crate) fn forget(&self, id: u64) {
        self.forgotten.lock().push(id);
    }

    pub(crate) fn collect_forgotten(&self) {
        let gone = std::mem::take(&mut *self.forgotten.lock());
        if !gone.is_empty() {
            let gone: std::collections::HashSet<u64> = gone.into_iter().collect();
            self.bind_groups.lock().retain(|key, _| !key[1..].chunks(3).any(|slice| gone.contains(&slice[0])));
        }
    }

    pub(crate) fn take_staging(&self, bytes: u64) -> Result<wgpu::Buffer, DeviceError> {
        let size = bytes.next_power_of_two().max(256);
        if let Some(buffer) = self.staging.lock().get_mut(&size).and_then(Vec::pop) {
            return Ok(buffer);
        }
        self.guarded(size, "read-back", || {
            self.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("read-back"),
                size,
                usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })
    }

    pub(crate) fn return_staging(&self, buffer: wgpu::Buffer) {
        self.staging.lock().entry(buffer.size()).or_default().push(buffer);
    }
}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu('{}')", self.facts.name)
    }
}

fn classify(error: wgpu::Error, bytes: u64, what: &str, device: &str) -> DeviceError {
    match error {
        wgpu::Error::OutOfMemory { .. } => {
            DeviceError::OutOfMemory { bytes, what: what.to_owned(), device: device.to_owned() }
        }
        wgpu::Error::Validation { description, .. } | wgpu::Error::Internal { description, .. } => {
            DeviceError::Other(description)
        }
    }
}
