use std::{fmt, sync::Arc};

use bytemuck::Pod;

use crate::{
    Buffer, Commands, DeviceChoice, DeviceError, DeviceFacts, Pipeline, PipelineSpec,
    gpu::{self, Gpu},
};

/// A GPU or the CPU, open and ready. Cloning it shares the device.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

struct Inner {
    facts: DeviceFacts,
    gpu: Option<Arc<Gpu>>,
    notice: Option<String>,
}

impl Device {
    /// The facts of every device there is: adapters, best first, then the CPU.
    #[must_use]
    pub fn list() -> Vec<DeviceFacts> {
        gpu::adapters().into_iter().map(|(_, facts)| facts).chain([DeviceFacts::cpu()]).collect()
    }

    /// The CPU.
    #[must_use]
    pub fn cpu() -> Self {
        Self::new(DeviceFacts::cpu(), None, None)
    }

    fn new(facts: DeviceFacts, gpu: Option<Arc<Gpu>>, notice: Option<String>) -> Self {
        Self { inner: Arc::new(Inner { facts, gpu, notice }) }
    }

    /// Opens a device. [`DeviceChoice::Auto`] on a machine without a hardware adapter opens the CPU and says so in
    /// [`notice`](Self::notice).
    ///
    /// # Errors
    /// No adapter fits the choice, or its driver refuses.
    pub fn open(choice: &DeviceChoice) -> Result<Self, DeviceError> {
        if *choice == DeviceChoice::Cpu {
            return Ok(Self::cpu());
        }
        let adapters = gpu::adapters();
        let count = adapters.len();
        let available = adapters
            .iter()
            .enumerate()
            .map(|(index, (_, facts))| format!("{index} '{}'", facts.name))
            .chain(["cpu".to_owned()])
            .collect::<Vec<_>>()
            .join(", ");
        let software = adapters.iter().find(|(_, facts)| !facts.hardware).map(|(_, facts)| facts.name.clone());
        let found = match choice {
            DeviceChoice::Auto => adapters.into_iter().find(|(_, facts)| facts.hardware),
            DeviceChoice::Gpu => adapters.into_iter().next(),
            DeviceChoice::Index(index) if *index == count => return Ok(Self::cpu()),
            DeviceChoice::Index(index) => adapters.into_iter().nth(*index),
            DeviceChoice::Name(name) => {
                let name = name.to_lowercase();
                adapters.into_iter().find(|(_, facts)| facts.name.to_lowercase().contains(&name))
            }
            DeviceChoice::Cpu => None,
        };
        match found {
            Some((adapter, facts)) => {
                let gpu = Gpu::open(&adapter, facts)?;
                Ok(Self::new(gpu.facts.clone(), Some(gpu), None))
            }
            None if *choice == DeviceChoice::Auto => {
                let hint = match software {
                    Some(name) => format!("; the software adapter '{name}' is taken with --device gpu"),
                    None => String::new(),
                };
                Ok(Self::new(
                    DeviceFacts::cpu(),
                    None,
                    Some(format!("no hardware GPU found: running on the CPU{hint}")),
                ))
            }
            None => Err(DeviceError::NoDevice { wanted: choice.to_string(), available }),
        }
    }

    /// What the user should be told once about how this device was chosen.
    #[must_use]
    pub fn notice(&self) -> Option<&str> {
        self.inner.notice.as_deref()
    }

    /// What is known of it.
    #[must_use]
    pub fn facts(&self) -> &DeviceFacts {
        &self.inner.facts
    }

    /// Whether it is the CPU.
    #[must_use]
    pub fn is_cpu(&self) -> bool {
        self.inner.gpu.is_none()
    }

    pub(crate) fn gpu(&self) -> Option<&Arc<Gpu>> {
        self.inner.gpu.as_ref()
    }

    /// Memory of `bytes` bytes, holding zeros.
    ///
    /// # Errors
    /// Out of memory, or beyond what one buffer may hold.
    pub fn alloc(&self, bytes: u64, label: &str) -> Result<Buffer, DeviceError> {
        match self.gpu() {
            Some(gpu) => gpu.alloc(bytes, label),
            None => Buffer::cpu(bytes, label),
        }
    }

    /// New memory that holds `data`.
    ///
    /// # Errors
    /// As [`alloc`](Self::alloc).
    pub fn upload<T: Pod>(&self, data: &[T], label: &str) -> Result<Buffer, DeviceError> {
        let buffer = self.alloc(size_of_val(data) as u64, label)?;
        self.write(&buffer, 0, data)?;
        Ok(buffer)
    }

    /// Writes `data` from `offset` (bytes) on. On a GPU the write takes effect before the next submission and after
    /// those before it.
    ///
    /// # Errors
    /// A range outside the buffer, or, on a GPU, an offset that is no multiple of 4.
    pub fn write<T: Pod>(&self, buffer: &Buffer, offset: u64, data: &[T]) -> Result<(), DeviceError> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let slice = buffer.slice(offset, bytes.len() as u64)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let Some(gpu) = self.gpu() else {
            let start = slice.offset() as usize;
            buffer.write::<u8>()?[start..start + bytes.len()].copy_from_slice(bytes);
            return Ok(());
        };
        if !offset.is_multiple_of(4) {
            return Err(buffer.range_error(offset, offset + slice.bytes(), "offset is no multiple of 4"));
        }
        let (whole, tail) = bytes.split_at(bytes.len() / 4 * 4);
        if !whole.is_empty() {
            gpu.queue.write_buffer(buffer.wgpu()?, offset, whole);
        }
        if !tail.is_empty() {
            let mut word = [0; 4];
            word[..tail.len()].copy_from_slice(tail);
            gpu.queue.write_buffer(buffer.wgpu()?, offset + whole.len() as u64, &word);
        }
        Ok(())
    }

    /// Reads a whole buffer back and waits for it. For tests and one-off results; a step uses
    /// [`Commands::read_back`].
    ///
    /// # Errors
    /// The device failed, or the size is no multiple of the element's.
    pub fn download<T: Pod>(&self, buffer: &Buffer) -> Result<Vec<T>, DeviceError> {
        let mut commands = self.commands()?;
        let readback = commands.read_back(buffer.whole())?;
        commands.submit()?;
        readback.wait_as()
    }

    /// A pipeline, compiled on first use and shared by equal specifications.
    ///
    /// # Errors
    /// The shader does not compile, or the device is the CPU.
    pub fn pipeline(&self, spec: &PipelineSpec<'_>) -> Result<Pipeline, DeviceError> {
        match self.gpu() {
            Some(gpu) => gpu.pipeline(spec),
            None => Err(DeviceError::WrongDevice(format!("shader '{}' needs a GPU", spec.label))),
        }
    }

    /// The pipeline known as `variant` of `name`, made by `make` on first use: a cheap look-up for callers on the path
    /// of every step, where hashing a shader's text would cost more than recording its dispatch.
    ///
    /// # Errors
    /// As `make`.
    pub fn cached_pipeline(
        &self,
        name: &'static str,
        variant: u64,
        make: impl FnOnce(&Self) -> Result<Pipeline, DeviceError>,
    ) -> Result<Pipeline, DeviceError> {
        let Some(gpu) = self.gpu() else {
            return Err(DeviceError::WrongDevice(format!("shader '{name}' needs a GPU")));
        };
        if let Some(pipeline) = gpu.named.read().get(&(name, variant)) {
            return Ok(pipeline.clone());
        }
        let pipeline = make(self)?;
        gpu.named.write().insert((name, variant), pipeline.clone());
        Ok(pipeline)
    }

    /// Starts recording.
    ///
    /// # Errors
    /// The device was lost.
    pub fn commands(&self) -> Result<Commands, DeviceError> {
        Commands::new(self.clone(), false)
    }

    /// Starts recording with GPU timestamps; [`Submission::gpu_time`](crate::Submission::gpu_time) reads them. A
    /// device without the feature `timestamp-query` records without.
    ///
    /// # Errors
    /// The device was lost.
    pub fn timed_commands(&self) -> Result<Commands, DeviceError> {
        Commands::new(self.clone(), self.facts().has("timestamp-query"))
    }

    /// Waits until everything submitted has run.
    ///
    /// # Errors
    /// The device failed meanwhile.
    pub fn wait(&self) -> Result<(), DeviceError> {
        match self.gpu() {
            Some(gpu) => {
                let polled = gpu.device.poll(wgpu::PollType::wait_indefinitely());
                gpu.check()?;
                polled.map(|_| ()).map_err(|error| DeviceError::Lost(error.to_string()))
            }
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device('{}')", self.facts().name)
    }
}
