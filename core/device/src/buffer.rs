use std::{
    fmt,
    ops::{Deref, DerefMut},
    sync::{Arc, Weak},
};

use bytemuck::Pod;
use parking_lot::{MappedRwLockReadGuard, MappedRwLockWriteGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::{DeviceError, gpu::Gpu};

/// Memory on a device. Cloning it shares the memory.
///
/// Sizes are rounded up to 16 bytes, and new memory holds zeros.
#[derive(Clone)]
pub struct Buffer(Arc<Inner>);

struct Inner {
    id: u64,
    bytes: u64,
    label: String,
    storage: Storage,
}

enum Storage {
    Cpu(RwLock<Vec<u128>>),
    Gpu { buffer: wgpu::Buffer, owner: Weak<Gpu> },
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Storage::Gpu { owner, .. } = &self.storage
            && let Some(gpu) = owner.upgrade()
        {
            gpu.forget(self.id);
        }
    }
}

impl Buffer {
    pub(crate) fn cpu(bytes: u64, label: &str) -> Result<Self, DeviceError> {
        let out_of_memory = || DeviceError::OutOfMemory { bytes, what: label.to_owned(), device: "cpu".into() };
        let words = usize::try_from(bytes.div_ceil(16)).map_err(|_| out_of_memory())?;
        let mut data: Vec<u128> = Vec::new();
        data.try_reserve_exact(words).map_err(|_| out_of_memory())?;
        data.resize(words, 0);
        Ok(Self(Arc::new(Inner { id: 0, bytes, label: label.to_owned(), storage: Storage::Cpu(RwLock::new(data)) })))
    }

    pub(crate) fn gpu(id: u64, bytes: u64, label: &str, buffer: wgpu::Buffer, owner: Weak<Gpu>) -> Self {
        Self(Arc::new(Inner { id, bytes, label: label.to_owned(), storage: Storage::Gpu { buffer, owner } }))
    }

    /// Its size in bytes, as asked for.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// What it was called when it was made.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.0.label
    }

    pub(crate) fn id(&self) -> u64 {
        self.0.id
    }

    /// The whole buffer.
    #[must_use]
    pub fn whole(&self) -> BufferSlice<'_> {
        BufferSlice { buffer: self, offset: 0, bytes: self.bytes() }
    }

    /// `bytes` bytes from `offset`.
    ///
    /// # Errors
    /// A range outside the buffer.
    pub fn slice(&self, offset: u64, bytes: u64) -> Result<BufferSlice<'_>, DeviceError> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes() => Ok(BufferSlice { buffer: self, offset, bytes }),
            end => Err(self.range_error(offset, end.unwrap_or(u64::MAX), "outside the buffer")),
        }
    }

    pub(crate) fn range_error(&self, offset: u64, end: u64, reason: &'static str) -> DeviceError {
        DeviceError::Range { label: self.label().to_owned(), offset, end, bytes: self.bytes(), reason }
    }

    /// Reads CPU memory as elements of `T`.
    ///
    /// # Errors
    /// A GPU buffer, or one that is being written.
    pub fn read<T: Pod>(&self) -> Result<CpuRead<'_, T>, DeviceError> {
        let Storage::Cpu(lock) = &self.0.storage else { return Err(self.not_cpu()) };
        let guard = lock.try_read().ok_or_else(|| DeviceError::InUse(self.label().to_owned()))?;
        Ok(CpuRead(RwLockReadGuard::map(guard, |data| cast(data, self.bytes()))))
    }

    /// Writes CPU memory as elements of `T`.
    ///
    /// # Errors
    /// A GPU buffer, or one that is being read or written.
    pub fn write<T: Pod>(&self) -> Result<CpuWrite<'_, T>, DeviceError> {
        let Storage::Cpu(lock) = &self.0.storage else { return Err(self.not_cpu()) };
        let guard = lock.try_write().ok_or_else(|| DeviceError::InUse(self.label().to_owned()))?;
        Ok(CpuWrite(RwLockWriteGuard::map(guard, |data| {
            let whole = whole_elements::<T>(self.bytes());
            bytemuck::cast_slice_mut(&mut bytemuck::cast_slice_mut::<u128, u8>(data)[..whole])
        })))
    }

    fn not_cpu(&self) -> DeviceError {
        DeviceError::WrongDevice(format!("buffer '{}' lies on a GPU, the CPU cannot address it", self.label()))
    }

    pub(crate) fn wgpu(&self) -> Result<&wgpu::Buffer, DeviceError> {
        match &self.0.storage {
            Storage::Gpu { buffer, .. } => Ok(buffer),
            Storage::Cpu(_) => Err(DeviceError::WrongDevice(format!(
                "buffer '{}' lies in CPU memory, a GPU cannot address it",
                self.label()
            ))),
        }
    }
}

fn whole_elements<T>(bytes: u64) -> usize {
    let size = size_of::<T>().max(1);
    bytes as usize / size * size
}

fn cast<T: Pod>(data: &[u128], bytes: u64) -> &[T] {
    bytemuck::cast_slice(&bytemuck::cast_slice::<u128, u8>(data)[..whole_elements::<T>(bytes)])
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer('{}', {} bytes)", self.label(), self.bytes())
    }
}

/// A range of a [`Buffer`].
#[derive(Clone, Copy, Debug)]
pub struct BufferSlice<'a> {
    pub(crate) buffer: &'a Buffer,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl<'a> BufferSlice<'a> {
    /// The buffer it lies in.
    #[must_use]
    pub fn buffer(&self) -> &'a Buffer {
        self.buffer
    }

    /// Its start in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl<'a> From<&'a Buffer> for BufferSlice<'a> {
    fn from(buffer: &'a Buffer) -> Self {
        buffer.whole()
    }
}

/// CPU memory open for reading.
pub struct CpuRead<'a, T>(MappedRwLockReadGuard<'a, [T]>);

/// CPU memory open for writing.
pub struct CpuWrite<'a, T>(MappedRwLockWriteGuard<'a, [T]>);

impl<T> Deref for CpuRead<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> Deref for CpuWrite<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> DerefMut for CpuWrite<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T> fmt::Debug for CpuRead<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuRead({} elements)", self.len())
    }
}

impl<T> fmt::Debug for CpuWrite<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuWrite({} elements)", self.len())
    }
}
