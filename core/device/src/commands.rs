use std::{any::Any, fmt, sync::Arc, time::Duration};

use bytemuck::Pod;
use parking_lot::Mutex;

use crate::{BufferSlice, Device, DeviceError, Pipeline, gpu::Gpu};

/// How many passes of one recording carry timestamps; later ones run untimed.
const TIMED_PASSES: u32 = 32;

/// One recording. On a GPU, dispatches between two copies share one compute pass, and nothing runs before
/// [`submit`](Self::submit) or [`flush`](Self::flush); on the CPU everything runs as it is recorded.
pub struct Commands {
    device: Device,
    gpu: Option<Recording>,
    dispatches: u64,
    /// Dispatches after which what is recorded is submitted, and those recorded since.
    hand_over: Option<(u64, u64)>,
    kept: Vec<Arc<dyn Any + Send + Sync>>,
}

struct Recording {
    gpu: Arc<Gpu>,
    encoder: wgpu::CommandEncoder,
    pass: Option<wgpu::ComputePass<'static>>,
    bound: u64,
    key: Vec<u64>,
    reads: Vec<Arc<GpuRead>>,
    timing: Option<Timing>,
}

struct Timing {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    passes: u32,
}

struct GpuRead {
    gpu: Arc<Gpu>,
    staging: Mutex<Option<wgpu::Buffer>>,
    bytes: u64,
    state: Mutex<ReadState>,
}

enum ReadState {
    Recorded,
    Submitted(wgpu::SubmissionIndex),
    Mapped,
    Failed(String),
}

impl Commands {
    pub(crate) fn new(device: Device, timed: bool) -> Result<Self, DeviceError> {
        let gpu = match device.gpu() {
            None => None,
            Some(gpu) => {
                gpu.check()?;
                gpu.collect_forgotten();
                let timing = timed.then(|| Timing {
                    queries: gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                        label: None,
                        ty: wgpu::QueryType::Timestamp,
                        count: TIMED_PASSES * 2,
                    }),
                    resolved: gpu.device.create_buffer(&wgpu::BufferDescriptor {
                        label: Some("timestamps"),
                        size: u64::from(TIMED_PASSES) * 16,
                        usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                        mapped_at_creation: false,
                    }),
                    passes: 0,
                });
                Some(Recording {
                    gpu: Arc::clone(gpu),
                    encoder: gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default()),
                    pass: None,
                    bound: 0,
                    key: Vec::new(),
                    reads: Vec::new(),
                    timing,
                })
            }
        };
        Ok(Self { device, gpu, dispatches: 0, hand_over: None, kept: Vec::new() })
    }

    /// The device it records for.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Dispatches recorded so far.
    #[must_use]
    pub fn dispatches(&self) -> u64 {
        self.dispatches
    }

    /// Submits what is recorded after every `dispatches` dispatches, so that the GPU works while the rest is recorded:
    /// for a recording whose answer is waited for. One that others follow before its answer is read gains nothing.
    #[must_use]
    pub fn handed_over_every(mut self, dispatches: u64) -> Self {
        self.hand_over = Some((dispatches.max(1), 0));
        self
    }

    /// Keeps `thing` alive until everything recorded is submitted: for memory that is written anew once it is dropped.
    pub fn keep(&mut self, thing: Arc<dyn Any + Send + Sync>) {
        if !self.kept.iter().any(|kept| std::ptr::addr_eq(Arc::as_ptr(kept), Arc::as_ptr(&thing))) {
            self.kept.push(thing);
        }
    }

    /// Records one dispatch: `slices` are the storage bindings in order, `immediates` the bytes of `var<immediate>`,
    /// `workgroups` their number in x, y and z. With a zero among them nothing is recorded.
    ///
    /// # Errors
    /// The CPU device; bindings or immediates that do not fit the pipeline; limits of the device.
    pub fn dispatch(
        &mut self,
        pipeline: &Pipeline,
        slices: &[BufferSlice<'_>],
        immediates: &[u8],
        workgroups: [u32; 3],
    ) -> Result<(), DeviceError> {
        let inner = &pipeline.0;
        let recording = self
            .gpu
            .as_mut()
            .ok_or_else(|| DeviceError::WrongDevice(format!("shader '{}' needs a GPU", inner.label)))?;
        if slices.len() != inner.bindings || immediates.len() != inner.immediate_bytes as usize {
            return Err(DeviceError::Other(format!(
                "shader '{}' has {} bindings and {} bytes of immediates, given {} and {}",
                inner.label,
                inner.bindings,
                inner.immediate_bytes,
                slices.len(),
                immediates.len()
            )));
        }
        let allowed = recording.gpu.facts.limits.workgroups_per_dimension;
        let most = workgroups.into_iter().max().unwrap_or(0);
        if most > allowed {
            return Err(DeviceError::Limit {
                what: inner.label.clone(),
                needed: most.into(),
                allowed: allowed.into(),
                unit: "workgroups in one dimension",
                device: recording.gpu.facts.name.clone(),
            });
        }
        if workgroups.contains(&0) {
            return Ok(());
        }
        let Recording { gpu, encoder, pass, bound, key, timing, .. } = recording;
        let pass = pass.get_or_insert_with(|| begin_pass(encoder, timing.as_mut()));
        if *bound != inner.id {
            pass.set_pipeline(&inner.pipeline);
            *bound = inner.id;
        }
        gpu.with_bind_group(inner, slices, key, |group| pass.set_bind_group(0, group, &[]))?;
        if !immediates.is_empty() {
            pass.set_immediates(0, immediates);
        }
        pass.dispatch_workgroups(workgroups[0], workgroups[1], workgroups[2]);
        self.dispatches += 1;
        if let Some((most, since)) = &mut self.hand_over {
            *since += 1;
            if *since >= *most {
                *since = 0;
                return self.flush();
            }
        }
        Ok(())
    }

    /// Records a copy. Ranges of one buffer must not overlap. On a GPU it ends the compute pass, so it is for rare use;
    /// offsets and length are multiples of 4 there.
    ///
    /// # Errors
    /// Different lengths, misaligned ranges.
    pub fn copy(&mut self, from: BufferSlice<'_>, to: BufferSlice<'_>) -> Result<(), DeviceError> {
        if from.bytes != to.bytes {
            return Err(to.buffer.range_error(to.offset, to.offset + to.bytes, "copied range has another length"));
        }
        let Some(recording) = &mut self.gpu else {
            let (source, target, length) = (from.offset as usize, to.offset as usize, from.bytes as usize);
            let data = from.buffer.read::<u8>()?[source..source + length].to_vec();
            to.buffer.write::<u8>()?[target..target + length].copy_from_slice(&data);
            return Ok(());
        };
        if [from.offset, to.offset, from.bytes].iter().any(|number| !number.is_multiple_of(4)) {
            return Err(to.buffer.range_error(to.offset, to.offset + to.bytes, "copied range is no multiple of 4"));
        }
        recording.end_pass();
        recording.encoder.copy_buffer_to_buffer(
            from.buffer.wgpu()?,
            from.offset,
            to.buffer.wgpu()?,
            to.offset,
            Some(from.bytes),
        );
        Ok(())
    }

    /// Records that a range is to be read by the host as it is at this point; the answer is there after submission.
    ///
    /// # Errors
    /// On a GPU, a range that is no multiple of 4; no staging memory.
    pub fn read_back(&mut self, slice: BufferSlice<'_>) -> Result<Readback, DeviceError> {
        let Some(recording) = &mut self.gpu else {
            let start = slice.offset as usize;
            let data = slice.buffer.read::<u8>()?[start..start + slice.bytes as usize].to_vec();
            return Ok(Readback(ReadbackInner::Cpu(data)));
        };
        if !slice.offset.is_multiple_of(4) {
            return Err(slice.buffer.range_error(
                slice.offset,
                slice.offset + slice.bytes,
                "offset is no multiple of 4",
            ));
        }
        recording.end_pass();
        let staging = recording.gpu.take_staging(slice.bytes.max(4))?;
        // Buffers are padded to 16 bytes, so rounding up to whole words stays inside.
        let bytes = slice.bytes.next_multiple_of(4);
        if bytes > 0 {
            recording.encoder.copy_buffer_to_buffer(slice.buffer.wgpu()?, slice.offset, &staging, 0, Some(bytes));
        }
        Ok(recording.add_read(staging, slice.bytes))
    }

    /// Submits what is recorded so far, so that the GPU starts on it, and goes on recording.
    ///
    /// # Errors
    /// The device failed.
    pub fn flush(&mut self) -> Result<(), DeviceError> {
        match &mut self.gpu {
            Some(recording) => recording.submit(),
            None => Ok(()),
        }
    }

    /// Submits everything.
    ///
    /// # Errors
    /// The device failed.
    pub fn submit(mut self) -> Result<Submission, DeviceError> {
        let Some(recording) = &mut self.gpu else { return Ok(Submission { timestamps: None, period: 0.0 }) };
        let timestamps = match recording.timing.take() {
            Some(timing) if timing.passes > 0 => {
                recording.pass = None;
                let bytes = u64::from(timing.passes) * 16;
                recording.encoder.resolve_query_set(&timing.queries, 0..timing.passes * 2, &timing.resolved, 0);
                let staging = recording.gpu.take_staging(bytes)?;
                recording.encoder.copy_buffer_to_buffer(&timing.resolved, 0, &staging, 0, Some(bytes));
                Some(recording.add_read(staging, bytes))
            }
            _ => None,
        };
        recording.submit()?;
        Ok(Submission { timestamps, period: recording.gpu.queue.get_timestamp_period() })
    }
}

fn begin_pass(encoder: &mut wgpu::CommandEncoder, timing: Option<&mut Timing>) -> wgpu::ComputePass<'static> {
    let mut timestamp_writes = None;
    if let Some(timing) = timing
        && timing.passes < TIMED_PASSES
    {
        timestamp_writes = Some(wgpu::ComputePassTimestampWrites {
            query_set: &timing.queries,
            beginning_of_pass_write_index: Some(timing.passes * 2),
            end_of_pass_write_index: Some(timing.passes * 2 + 1),
        });
        timing.passes += 1;
    }
    encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some("step"), timestamp_writes }).forget_lifetime()
}

impl Recording {
    fn end_pass(&mut self) {
        self.pass = None;
        self.bound = 0;
    }

    fn add_read(&mut self, staging: wgpu::Buffer, bytes: u64) -> Readback {
        let read = Arc::new(GpuRead {
            gpu: Arc::clone(&self.gpu),
            staging: Mutex::new(Some(staging)),
            bytes,
            state: Mutex::new(ReadState::Recorded),
        });
        self.reads.push(Arc::clone(&read));
        Readback(ReadbackInner::Gpu(read))
    }

    fn submit(&mut self) -> Result<(), DeviceError> {
        self.end_pass();
        let next = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let recorded = std::mem::replace(&mut self.encoder, next);
        let index = self.gpu.queue.submit([recorded.finish()]);
        for read in self.reads.drain(..) {
            *read.state.lock() = ReadState::Submitted(index.clone());
            if let Some(staging) = &*read.staging.lock() {
                let told = Arc::clone(&read);
                staging.slice(..).map_async(wgpu::MapMode::Read, move |result| {
                    *told.state.lock() = match result {
                        Ok(()) => ReadState::Mapped,
                        Err(error) => ReadState::Failed(error.to_string()),
                    };
                });
            }
        }
        self.gpu.check()
    }
}

impl fmt::Debug for Commands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Commands({:?}, {} dispatches)", self.device, self.dispatches)
    }
}

/// Bytes on their way to the host.
pub struct Readback(ReadbackInner);

enum ReadbackInner {
    Cpu(Vec<u8>),
    Gpu(Arc<GpuRead>),
}

impl Readback {
    /// Waits for the submission that carries it and returns the bytes.
    ///
    /// # Errors
    /// It was not submitted, or the device failed.
    pub fn wait(self) -> Result<Vec<u8>, DeviceError> {
        match self.0 {
            ReadbackInner::Cpu(data) => Ok(data),
            ReadbackInner::Gpu(read) => read.wait(),
        }
    }

    /// Waits and returns the bytes as elements.
    ///
    /// # Errors
    /// As [`wait`](Self::wait); the number of bytes is no multiple of the element's size.
    pub fn wait_as<T: Pod>(self) -> Result<Vec<T>, DeviceError> {
        let bytes = self.wait()?;
        if bytes.len() % size_of::<T>() != 0 {
            return Err(DeviceError::Other(format!(
                "{} bytes are no whole number of {}-byte elements",
                bytes.len(),
                size_of::<T>()
            )));
        }
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }
}

impl fmt::Debug for Readback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            ReadbackInner::Cpu(data) => write!(f, "Readback({} bytes)", data.len()),
            ReadbackInner::Gpu(read) => write!(f, "Readback({} bytes)", read.bytes),
        }
    }
}

impl GpuRead {
    fn wait(&self) -> Result<Vec<u8>, DeviceError> {
        let index = match &*self.state.lock() {
            ReadState::Recorded => return Err(DeviceError::Other("read back before submission".into())),
            ReadState::Submitted(index) => Some(index.clone()),
            ReadState::Mapped | ReadState::Failed(_) => None,
        };
        if let Some(index) = index {
            let polled = self.gpu.device.poll(wgpu::PollType::Wait { submission_index: Some(index), timeout: None });
            self.gpu.check()?;
            polled.map_err(|error| DeviceError::Lost(error.to_string()))?;
        }
        if let ReadState::Failed(message) = &*self.state.lock() {
            return Err(DeviceError::Lost(message.clone()));
        }
        let Some(staging) = self.staging.lock().take() else {
            return Err(DeviceError::Other("read back twice".into()));
        };
        let view = staging
            .slice(..self.bytes.next_multiple_of(4).max(4))
            .get_mapped_range()
            .map_err(|error| DeviceError::Lost(error.to_string()))?;
        let data = view[..self.bytes as usize].to_vec();
        drop(view);
        staging.unmap();
        self.gpu.return_staging(staging);
        Ok(data)
    }
}

/// A recording under way on the device.
#[derive(Debug)]
pub struct Submission {
    timestamps: Option<Readback>,
    period: f32,
}

impl Submission {
    /// Waits for it and returns the time its compute passes took on the GPU; `None` where it was not timed.
    ///
    /// # Errors
    /// The device failed.
    pub fn gpu_time(self) -> Result<Option<Duration>, DeviceError> {
        let Some(timestamps) = self.timestamps else { return Ok(None) };
        let ticks: u64 = timestamps.wait_as::<u64>()?.chunks(2).map(|pair| pair[1].saturating_sub(pair[0])).sum();
        Ok(Some(Duration::from_nanos((ticks as f64 * f64::from(self.period)) as u64)))
    }
}
