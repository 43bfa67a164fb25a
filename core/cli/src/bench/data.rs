//! Random data that host and device make alike, so that gigabytes need not travel for a few rows to be checked.

use rayon::prelude::*;

use crate::{
    api::{DType, KvDType},
    device::{Access, Buffer, Device, DeviceError, PipelineSpec},
};

use super::BenchError;

const FILL: &str = include_str!("fill.wgsl");

/// Element `index` of the data named by `seed`: uniform over the odd 128ths between −2 and 2, which every float format
/// of 16 bits and more holds exactly. The generator is PCG (M. E. O'Neill, HMC-CS-2014-0905), as a hash of the index.
#[must_use]
pub fn value(seed: u32, index: u32) -> f32 {
    let state =
        index.wrapping_add(seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
    let word = ((state >> ((state >> 28) + 4)) ^ state).wrapping_mul(277_803_737);
    let bits = (word >> 22) ^ word;
    ((bits >> 24) as i32 * 2 - 255) as f32 / 128.0
}

/// Elements `first..first + count` in their stored format.
///
/// # Errors
/// A format that has no such numbers.
pub fn values(seed: u32, first: u32, count: u32, dtype: KvDType) -> Result<Vec<u8>, BenchError> {
    /// Elements that one thread makes.
    const PART: usize = 1 << 16;
    fn write<const N: usize>(data: &mut [u8], seed: u32, first: u32, bytes: impl Fn(f32) -> [u8; N] + Sync) {
        data.par_chunks_mut(PART * N).enumerate().for_each(|(part, data)| {
            let first = first.wrapping_add((part * PART) as u32);
            for (element, at) in data.chunks_exact_mut(N).zip(0u32..) {
                element.copy_from_slice(&bytes(value(seed, first.wrapping_add(at))));
            }
        });
    }
    let mut data = vec![0; count as usize * dtype.bytes() as usize];
    match dtype {
        KvDType::F32 => write(&mut data, seed, first, f32::to_le_bytes),
        KvDType::F16 => write(&mut data, seed, first, |number| half::f16::from_f32(number).to_le_bytes()),
        KvDType::BF16 => write(&mut data, seed, first, |number| half::bf16::from_f32(number).to_le_bytes()),
        _ => return Err(BenchError::Reference(format!("{dtype} is not measured"))),
    }
    Ok(data)
}

/// Fills `buffer` with the data named by `seed`.
pub(super) fn fill(device: &Device, buffer: &Buffer, seed: u32, dtype: DType) -> Result<(), BenchError> {
    if device.is_cpu() {
        let count = (buffer.bytes() / dtype.bytes()) as u32;
        device.write(buffer, 0, &values(seed, 0, count, dtype.into())?)?;
        return Ok(());
    }
    let format = match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        _ => 2,
    };
    Ok(dispatch(device, buffer, [format, seed])?)
}

/// Fills an f32 buffer with NaN, so that what a kernel leaves unwritten cannot pass for an answer.
pub(super) fn poison(device: &Device, buffer: &Buffer) -> Result<(), BenchError> {
    if device.is_cpu() {
        buffer.write::<f32>()?.fill(f32::NAN);
        return Ok(());
    }
    Ok(dispatch(device, buffer, [3, 0])?)
}

fn dispatch(device: &Device, buffer: &Buffer, [format, seed]: [u32; 2]) -> Result<(), DeviceError> {
    let pipeline = device.pipeline(&PipelineSpec {
        label: "fill",
        source: FILL,
        entry: "fill",
        bindings: &[Access::ReadWrite],
        immediate_bytes: 16,
        constants: &[],
    })?;
    let words = (buffer.bytes() / 4) as u32;
    let mut commands = device.commands()?;
    let immediates: Vec<u8> = [words, format, seed, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    commands.dispatch(&pipeline, &[buffer.whole()], &immediates, [words.div_ceil(256).min(4096), 1, 1])?;
    commands.submit()?;
    device.wait()
}
