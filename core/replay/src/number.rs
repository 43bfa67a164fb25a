//! Stored elements as f64 and back.

use half::{bf16, f16};
use polyattn_api::{DType, KvDType};

/// Reads element `index` of raw little-endian data; a `q8` element comes without its scale. Past the end it is NaN.
pub(crate) fn element(data: &[u8], dtype: KvDType, index: usize) -> f64 {
    let bytes = dtype.bytes() as usize;
    let Some(raw) = data.get(index * bytes..(index + 1) * bytes) else { return f64::NAN };
    match (dtype, raw) {
        (KvDType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]).into(),
        (KvDType::F16, &[a, b]) => f16::from_le_bytes([a, b]).into(),
        (KvDType::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).into(),
        (KvDType::Q8, &[a]) => f64::from(a.cast_signed()),
        (KvDType::F8E4M3, &[a]) => float8(a, 4, 3),
        (KvDType::F8E5M2, &[a]) => float8(a, 5, 2),
        _ => f64::NAN,
    }
}

/// Reads element `index` of query rows.
pub(crate) fn query(data: &[u8], dtype: DType, index: usize) -> f64 {
    element(data, dtype.into(), index)
}

/// Appends `value` in a float format; `q8` has no code without a scale and rounds to whole numbers.
pub(crate) fn push(data: &mut Vec<u8>, dtype: KvDType, value: f32) {
    match dtype {
        KvDType::F16 => data.extend(f16::from_f32(value).to_le_bytes()),
        KvDType::BF16 => data.extend(bf16::from_f32(value).to_le_bytes()),
        KvDType::Q8 => data.push((value.round() as i8).cast_unsigned()),
        KvDType::F8E4M3 => data.push(narrow_float8(value, 4, 3)),
        KvDType::F8E5M2 => data.push(narrow_float8(value, 5, 2)),
        _ => data.extend(value.to_le_bytes()),
    }
}

fn float8(code: u8, exponent_bits: u32, mantissa_bits: u32) -> f64 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(code & 0x7f) >> mantissa_bits;
    let fraction = f64::from(code & ((1 << mantissa_bits) - 1)) / f64::from(1u32 << mantissa_bits);
    let bias = (1 << (exponent_bits - 1)) - 1;
    let magnitude = match (exponent_bits, code & 0x7f) {
        // The finite variant spends a single code on NaN and none on infinity.
        (4, 0x7f) => f64::NAN,
        (5, 0x7c) => f64::INFINITY,
        (5, 0x7d..=0x7f) => f64::NAN,
        _ if exponent == 0 => 2f64.powi(1 - bias) * fraction,
        _ => 2f64.powi(exponent - bias) * (1.0 + fraction),
    };
    sign * magnitude
}

/// The nearest finite code; NaN for NaN.
fn narrow_float8(value: f32, exponent_bits: u32, mantissa_bits: u32) -> u8 {
    if value.is_nan() {
        return 0x7f;
    }
    let magnitude = f64::from(value.abs());
    let distance = |code: u8| (float8(code, exponent_bits, mantissa_bits) - magnitude).abs();
    let nearest = (0..0x7fu8)
        .filter(|code| float8(*code, exponent_bits, mantissa_bits).is_finite())
        .min_by(|a, b| distance(*a).total_cmp(&distance(*b)))
        .unwrap_or(0);
    nearest | if value.is_sign_negative() { 0x80 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_bit_floats() {
        assert_eq!(float8(0x38, 4, 3), 1.0);
        assert_eq!(float8(0x7e, 4, 3), 448.0);
        assert_eq!(float8(0x01, 4, 3), 2f64.powi(-9));
        assert!(float8(0xff, 4, 3).is_nan());
        assert_eq!(float8(0x3c, 5, 2), 1.0);
        assert_eq!(float8(0x7b, 5, 2), 57344.0);
        assert_eq!(float8(0xfc, 5, 2), f64::NEG_INFINITY);
        assert!(float8(0x7e, 5, 2).is_nan());
        for code in 0..=255u8 {
            for (dtype, exponent, mantissa) in [(KvDType::F8E4M3, 4, 3), (KvDType::F8E5M2, 5, 2)] {
                let value = float8(code, exponent, mantissa);
                if value.is_finite() {
                    let mut data = Vec::new();
                    push(&mut data, dtype, value as f32);
                    assert_eq!(data, [code], "{dtype}");
                }
            }
        }
    }
}
