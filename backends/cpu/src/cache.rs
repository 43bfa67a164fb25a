//! Reading stored numbers as f32.

use std::{ops::Range, sync::LazyLock};

use half::{bf16, f16};
use polyattn_api::{BackendError, BatchLayout, KvDType, KvLayout};

use crate::lanes::{self, Isa};

/// How many keys before its use a row is asked for. A cache's rows lie scattered, one head's among those of others, so
/// that processors do not foresee them; without asking, a long context waits for memory most of the time.
const AHEAD: u32 = 16;

/// Rows of one tensor in their stored format.
#[derive(Clone, Copy)]
pub(crate) enum Stored<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    Q8(&'a [i8], &'a [f32]),
    F8(&'a [u8], &'a [f32; 256]),
}

impl<'a> Stored<'a> {
    /// `bytes` of `dtype`; `scales` belong to `q8`, one for each row.
    pub(crate) fn new(
        name: &str,
        bytes: &'a [u8],
        dtype: KvDType,
        scales: Option<&'a [f32]>,
    ) -> Result<Self, BackendError> {
        let misaligned = |error| BackendError::Io(format!("{name} does not lie on whole elements of {dtype}: {error}"));
        Ok(match dtype {
            KvDType::F16 => Self::F16(bytemuck::try_cast_slice(bytes).map_err(misaligned)?),
            KvDType::BF16 => Self::BF16(bytemuck::try_cast_slice(bytes).map_err(misaligned)?),
            KvDType::Q8 => {
                let scales = scales.ok_or_else(|| BackendError::Io(format!("scales of {name} are missing")))?;
                Self::Q8(bytemuck::cast_slice(bytes), scales)
            }
            KvDType::F8E4M3 => Self::F8(bytes, &E4M3),
            KvDType::F8E5M2 => Self::F8(bytes, &E5M2),
            _ => Self::F32(bytemuck::try_cast_slice(bytes).map_err(misaligned)?),
        })
    }

    /// Asks for the first `dim` elements of row `row` to be brought near, if there is such a row.
    fn prefetch(&self, row: usize, width: usize, dim: usize) {
        let range = row * width..row * width + dim;
        match self {
            Self::F32(data) => lanes::prefetch(data.get(range)),
            Self::F16(data) => lanes::prefetch(data.get(range)),
            Self::BF16(data) => lanes::prefetch(data.get(range)),
            Self::Q8(data, _) => lanes::prefetch(data.get(range)),
            Self::F8(data, _) => lanes::prefetch(data.get(range)),
        }
    }

    /// Widens the first elements of row `row`, of rows that lie `width` elements apart.
    pub(crate) fn widen(&self, isa: Isa, row: usize, width: usize, into: &mut [f32]) {
        let range = row * width..row * width + into.len();
        match self {
            Self::F32(data) => into.copy_from_slice(&data[range]),
            Self::F16(data) => lanes::widen_f16(isa, &data[range], into),
            Self::BF16(data) => {
                for (to, from) in into.iter_mut().zip(&data[range]) {
                    *to = f32::from_bits(u32::from(from.to_bits()) << 16);
                }
            }
            Self::Q8(data, scales) => {
                let scale = scales[row];
                for (to, from) in into.iter_mut().zip(&data[range]) {
                    *to = f32::from(*from) * scale;
                }
            }
            Self::F8(data, table) => {
                for (to, from) in into.iter_mut().zip(&data[range]) {
                    *to = table[usize::from(*from)];
                }
            }
        }
    }
}

/// Keys or values of one head in a paged cache.
#[derive(Clone, Copy)]
pub(crate) struct Paged<'a> {
    pub(crate) stored: Stored<'a>,
    /// Elements from one stored row to the next.
    pub(crate) width: usize,
    /// Rows of a slot: the heads.
    pub(crate) heads: usize,
    /// How rows follow each other.
    pub(crate) layout: KvLayout,
}

impl Paged<'_> {
    /// Widens positions `keys` of a sequence into rows of `dim` elements, `stride` apart; the first goes to row `at`.
    pub(crate) fn gather(
        &self,
        isa: Isa,
        batch: &BatchLayout,
        (sequence, head): (usize, usize),
        keys: Range<u32>,
        (dim, stride): (usize, usize),
        into: &mut [f32],
    ) {
        let row_of = |slot: usize| self.layout.row(slot, head, self.heads, batch.page_size as usize);
        let mut rows = into.chunks_mut(stride);
        let (mut key, last) = (keys.start, batch.kv_len[sequence].saturating_sub(1));
        while key < keys.end {
            // One page: its slots follow each other.
            let slot = batch.slot(sequence, key);
            let end = keys.end.min((key / batch.page_size + 1).saturating_mul(batch.page_size));
            let ahead = batch.slot(sequence, last.min(key.saturating_add(AHEAD)));
            for (at, row) in (&mut rows).take((end - key) as usize).enumerate() {
                // Often past the page it was meant for; then it is a wasted hint.
                self.stored.prefetch(row_of(ahead + at), self.width, dim);
                self.stored.widen(isa, row_of(slot + at), self.width, &mut row[..dim]);
            }
            key = end;
        }
    }
}

static E4M3: LazyLock<[f32; 256]> = LazyLock::new(|| table(3));
static E5M2: LazyLock<[f32; 256]> = LazyLock::new(|| table(2));

/// All values of an 8-bit float with this many mantissa bits: 3 is the finite variant, 2 has infinities.
fn table(mantissa_bits: u32) -> [f32; 256] {
    std::array::from_fn(|code| {
        let magnitude = code as u32 & 0x7f;
        let (exponent, mantissa) = (magnitude >> mantissa_bits, magnitude & ((1 << mantissa_bits) - 1));
        let bias = (1 << (6 - mantissa_bits)) - 1;
        let fraction = mantissa as f32 / (1u32 << mantissa_bits) as f32;
        let value = match (mantissa_bits, magnitude) {
            (3, 0x7f) | (2, 0x7d..) => f32::NAN,
            (2, 0x7c) => f32::INFINITY,
            _ if exponent == 0 => fraction * 2f32.powi(1 - bias),
            _ => (1.0 + fraction) * 2f32.powi(exponent.cast_signed() - bias),
        };
        if code & 0x80 == 0 { value } else { -value }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bit_floats() {
        assert_eq!((E4M3[0x38], E4M3[0x7e], E4M3[0x81]), (1.0, 448.0, -(2f32.powi(-9))));
        assert_eq!((E5M2[0x3c], E5M2[0x7b], E5M2[0xfc]), (1.0, 57344.0, f32::NEG_INFINITY));
        assert!(E4M3[0xff].is_nan() && E5M2[0x7d].is_nan());
        // e5m2 is the upper half of an f16.
        for code in 0..=255u8 {
            let same = f16::from_bits(u16::from(code) << 8).to_f32();
            assert!(E5M2[usize::from(code)] == same || same.is_nan());
        }
    }
}
