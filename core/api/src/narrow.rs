//! Numbers of 8 bits from f32, bit by bit the same here and in WGSL: nothing but whole numbers, products and
//! comparisons, for a GPU's division may be off in the last bits.

/// An 8-bit float.
#[derive(Clone, Copy)]
pub(crate) struct Float8 {
    mantissa: u32,
    bias: u32,
    /// The largest finite code.
    most: u32,
}

/// 4 exponent and 3 mantissa bits, up to 448.
pub(crate) const E4M3: Float8 = Float8 { mantissa: 3, bias: 7, most: 0x7e };
/// 5 exponent and 2 mantissa bits, up to 57344.
pub(crate) const E5M2: Float8 = Float8 { mantissa: 2, bias: 15, most: 0x7b };

const INFINITY: u32 = 0x7f80_0000;

impl Float8 {
    /// The nearest code, the even one of two; beyond the largest that one; NaN for NaN.
    pub(crate) fn narrow(self, x: f32) -> u8 {
        let (bits, size) = (x.to_bits(), x.to_bits() & 0x7fff_ffff);
        let sign = bits >> 24 & 0x80;
        if size > INFINITY {
            return (sign | 0x7f) as u8;
        }
        let (exponent, least) = (size >> 23, 128 - self.bias);
        let shift = 23 - self.mantissa + least.saturating_sub(exponent);
        if shift > 24 {
            return sign as u8;
        }
        let number = if exponent < least { size & 0x7f_ffff | 0x80_0000 } else { size };
        let rounded = (number + (1 << (shift - 1)) - 1 + (number >> shift & 1)) >> shift;
        let code = if exponent < least { rounded } else { rounded - ((least - 1) << self.mantissa) };
        (sign | code.min(self.most)) as u8
    }

    /// [`narrow`](Self::narrow) in WGSL, `byte_of(x: f32) -> u32`.
    pub(crate) fn wgsl(self) -> String {
        let Self { mantissa, bias, most } = self;
        let least = 128 - bias;
        format!(
            "fn byte_of(x: f32) -> u32 {{
                let size = bitcast<u32>(x) & 0x7fffffffu;
                let sign = (bitcast<u32>(x) >> 24u) & 0x80u;
                if (size > 0x7f800000u) {{ return sign | 0x7fu; }}
                let exponent = size >> 23u;
                let shift = {} + {least}u - min(exponent, {least}u);
                if (shift > 24u) {{ return sign; }}
                let low = exponent < {least}u;
                let number = select(size, (size & 0x7fffffu) | 0x800000u, low);
                let rounded = (number + (1u << (shift - 1u)) - 1u + ((number >> shift) & 1u)) >> shift;
                return sign | min(rounded - select({}u, 0u, low), {most}u);
            }}\n",
            23 - mantissa,
            (least - 1) << mantissa
        )
    }
}

/// Rows whose largest number is below it have scale 0: the GPU may take their products for 0.
const LEAST: f32 = 1e-30;

/// The scale of a row whose largest magnitude has these bits: a 127th of it. A row with a number that is not finite has
/// scale NaN.
pub(crate) fn scale(largest: u32) -> f32 {
    let size = f32::from_bits(largest);
    match largest {
        INFINITY.. => f32::NAN,
        _ if size < LEAST => 0.0,
        _ => size * (1.0 / 127.0),
    }
}

/// The bits of the largest magnitude.
pub(crate) fn largest(row: &[f32]) -> u32 {
    row.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0)
}

/// The nearest whole number of steps of `scale`, the even one of two.
pub(crate) fn steps(x: f32, scale: f32) -> u8 {
    if scale.is_nan() || scale == 0.0 {
        return 0;
    }
    let size = x.abs();
    // The quotient may be off; the comparisons put that right.
    let near = (size / scale + 0.5).floor().min(127.0);
    let (below, above) = ((near - 0.5) * scale, (near + 0.5) * scale);
    let odd = near as u32 & 1 == 1;
    let down = size < below || (size == below && odd);
    let up = size > above || (size == above && odd);
    let steps = (near - f32::from(u8::from(down)) + f32::from(u8::from(up))).clamp(0.0, 127.0) as i8;
    (if x < 0.0 { -steps } else { steps }).cast_unsigned()
}

/// [`scale`] and [`steps`] in WGSL: `scale_of(largest: u32) -> u32`, its bits, and `byte_of(x: f32, scale: u32) -> u32`.
pub(crate) const SCALED_WGSL: &str = "\
fn scale_of(largest: u32) -> u32 {
    if (largest >= 0x7f800000u) { return 0x7fc00000u; }
    let size = bitcast<f32>(largest);
    return select(bitcast<u32>(size * (1.0 / 127.0)), 0u, size < 1e-30);
}
fn byte_of(x: f32, bits: u32) -> u32 {
    if (bits == 0u || bits >= 0x7f800000u) { return 0u; }
    let scale = bitcast<f32>(bits);
    let size = abs(x);
    let near = min(floor(size / scale + 0.5), 127.0);
    let below = (near - 0.5) * scale;
    let above = (near + 0.5) * scale;
    let odd = (u32(near) & 1u) == 1u;
    let down = size < below || (size == below && odd);
    let up = size > above || (size == above && odd);
    let steps = i32(clamp(near - select(0.0, 1.0, down) + select(0.0, 1.0, up), 0.0, 127.0));
    return bitcast<u32>(select(steps, -steps, x < 0.0)) & 0xffu;
}
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_numbers() {
        for (x, code) in [(1.0, 0x38), (448.0, 0x7e), (1e9, 0x7e), (-1e9, 0xfe), (0.001_953_125, 1), (0.000_9, 0)] {
            assert_eq!(E4M3.narrow(x), code, "{x}");
        }
        for (x, code) in [(1.0, 0x3c), (57344.0, 0x7b), (f32::INFINITY, 0x7b), (-0.0, 0x80), (1.125, 0x3c)] {
            assert_eq!(E5M2.narrow(x), code, "{x}");
        }
        assert_eq!((E4M3.narrow(f32::NAN) & 0x7f, E5M2.narrow(f32::NAN) & 0x7f), (0x7f, 0x7f));
        assert_eq!([0.5, 1.5, -2.5, 127.0, 0.0].map(|x| steps(x, 1.0).cast_signed()), [0, 2, -2, 127, 0]);
        assert_eq!((scale(largest(&[0.0, -0.0])), scale(largest(&[-127.0, 3.0]))), (0.0, 1.0));
        assert!(scale(largest(&[1.0, f32::NEG_INFINITY])).is_nan());
    }
}
