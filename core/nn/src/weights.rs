//! Weights on their way from a checkpoint to a device.

use half::{bf16, f16};
use polyattn_device::{Buffer, DType, Device, DeviceError};
use rayon::prelude::*;

use crate::{
    NnError,
    load::{Checkpoint, StoredType},
    ops::{Matrix, Vector},
};

/// f32 elements that are dequantised at once: the host never holds more of a model as f32.
const CHUNK: usize = 1 << 20;

/// Places weights of one checkpoint on a device.
pub struct WeightLoader<'a> {
    checkpoint: &'a Checkpoint,
    device: &'a Device,
    progress: &'a mut dyn FnMut(u64),
}

impl<'a> WeightLoader<'a> {
    /// A loader that reports the bytes it has read of the checkpoint, tensor by tensor.
    pub fn new(checkpoint: &'a Checkpoint, device: &'a Device, progress: &'a mut dyn FnMut(u64)) -> Self {
        Self { checkpoint, device, progress }
    }

    /// The checkpoint.
    #[must_use]
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// The format a matrix is held in: as stored where it is a float, f16 where it is quantised.
    ///
    /// # Errors
    /// No such tensor, or one of an unknown type.
    pub fn held_as(&self, name: &str) -> Result<DType, NnError> {
        Ok(match self.checkpoint.dtype(name)? {
            StoredType::F32 => DType::F32,
            StoredType::BF16 => DType::BF16,
            _ => DType::F16,
        })
    }

    /// The matrix made of the rows of these tensors, one below the other, held as `dtype`; all have `cols` columns.
    ///
    /// # Errors
    /// A tensor that is missing or has another width; no memory.
    pub fn matrix(&mut self, names: &[String], cols: u32, dtype: DType) -> Result<Matrix, NnError> {
        let mut rows = Vec::with_capacity(names.len());
        for name in names {
            let (count, width) = self.checkpoint.rows_and_columns(name)?;
            if width != cols as usize {
                return Err(NnError::Shape(format!("tensor '{name}' has {width} columns, expected {cols}")));
            }
            rows.push(count);
        }
        let total: usize = rows.iter().sum();
        let count = u32::try_from(total).map_err(|_| NnError::Shape(format!("{total} rows exceed 32 bits")))?;
        let bytes = total as u64 * u64::from(cols) * dtype.bytes();
        let label = names.first().map_or("weights", String::as_str);
        let buffer = self.device.alloc(bytes, label)?;
        let mut first = 0;
        for (name, rows) in names.iter().zip(rows) {
            self.fill(name, rows, cols as usize, dtype, &buffer, first as u64 * u64::from(cols) * dtype.bytes())?;
            first += rows;
            self.checkpoint.release(name);
        }
        self.settle()?;
        Ok(Matrix { buffer, rows: count, cols, dtype })
    }

    /// The vectors of these tensors, one behind the other, as f32.
    ///
    /// # Errors
    /// A tensor that is missing; no memory.
    pub fn vector(&mut self, names: &[String]) -> Result<Vector, NnError> {
        let mut values = Vec::new();
        for name in names {
            let (rows, cols) = self.checkpoint.rows_and_columns(name)?;
            let start = values.len();
            values.resize(start + rows * cols, 0.0);
            self.checkpoint.read_rows(name, 0..rows, &mut values[start..])?;
            (self.progress)(self.checkpoint.row_bytes(name, 0..rows)?.len() as u64);
        }
        let label = names.first().map_or("weights", String::as_str);
        let len = u32::try_from(values.len()).map_err(|_| NnError::Shape("vector exceeds 32 bits".into()))?;
        Ok(Vector { buffer: self.device.upload(&values, label)?, len })
    }

    /// The elements of a tensor of this shape as f32, for a matrix that holds them in another order.
    ///
    /// # Errors
    /// A tensor that is missing or of another shape.
    pub fn values(&mut self, name: &str, rows: u32, cols: u32) -> Result<Vec<f32>, NnError> {
        let found = self.checkpoint.rows_and_columns(name)?;
        if found != (rows as usize, cols as usize) {
            return Err(NnError::Shape(format!("tensor '{name}' is {found:?}, expected {:?}", (rows, cols))));
        }
        let mut values = vec![0.0; found.0 * found.1];
        self.checkpoint.read_rows(name, 0..found.0, &mut values)?;
        (self.progress)(self.checkpoint.row_bytes(name, 0..found.0)?.len() as u64);
        self.checkpoint.release(name);
        Ok(values)
    }

    /// A matrix of these elements, `[rows, cols]`, held as `dtype`.
    ///
    /// # Errors
    /// Another number of elements; no memory.
    pub fn matrix_of(
        &mut self,
        values: &[f32],
        rows: u32,
        cols: u32,
        dtype: DType,
        label: &str,
    ) -> Result<Matrix, NnError> {
        if values.len() as u64 != u64::from(rows) * u64::from(cols) {
            return Err(NnError::Shape(format!("{} elements for '{label}', expected {rows} × {cols}", values.len())));
        }
        let buffer = match dtype {
            DType::F32 => self.device.upload(values, label)?,
            DType::F16 => {
                let narrow: Vec<u16> = values.par_iter().map(|value| f16::from_f32(*value).to_bits()).collect();
                self.device.upload(&narrow, label)?
            }
            _ => {
                let narrow: Vec<u16> = values.par_iter().map(|value| bf16::from_f32(*value).to_bits()).collect();
                self.device.upload(&narrow, label)?
            }
        };
        Ok(Matrix { buffer, rows, cols, dtype })
    }

    fn fill(
        &mut self,
        name: &str,
        rows: usize,
        cols: usize,
        dtype: DType,
        buffer: &Buffer,
        offset: u64,
    ) -> Result<(), NnError> {
        // A whole number of words, so that each chunk starts at one.
        let step = (CHUNK / cols.max(1)).max(1).next_multiple_of(2);
        let row_bytes = cols as u64 * dtype.bytes();
        let mut chunk = vec![0f32; step.min(rows) * cols];
        let mut narrow: Vec<u16> = Vec::new();
        for start in (0..rows).step_by(step) {
            let end = rows.min(start + step);
            let values = &mut chunk[..(end - start) * cols];
            let per_thread = (end - start).div_ceil(rayon::current_num_threads());
            values.par_chunks_mut((per_thread * cols).max(1)).enumerate().try_for_each(|(place, values)| {
                let first = start + place * per_thread;
                self.checkpoint.read_rows(name, first..first + values.len() / cols, values)
            })?;
            let at = offset + start as u64 * row_bytes;
            match dtype {
                DType::F32 => self.device.write(buffer, at, values)?,
                DType::F16 => {
                    narrow.clear();
                    narrow.par_extend(values.par_iter().map(|value| f16::from_f32(*value).to_bits()));
                    self.device.write(buffer, at, &narrow)?;
                }
                _ => {
                    narrow.clear();
                    narrow.par_extend(values.par_iter().map(|value| bf16::from_f32(*value).to_bits()));
                    self.device.write(buffer, at, &narrow)?;
                }
            }
            (self.progress)(self.checkpoint.row_bytes(name, start..end)?.len() as u64);
        }
        Ok(())
    }

    /// Lets the device take in what was written, so that staging memory does not pile up beside the weights.
    fn settle(&self) -> Result<(), DeviceError> {
        if self.device.is_cpu() {
            return Ok(());
        }
        let _ = self.device.commands()?.submit()?;
        self.device.wait()
    }
}

impl std::fmt::Debug for WeightLoader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "WeightLoader({})", self.checkpoint.path().display())
    }
}
