//! Block dequantisation of every stored type into f32.
//!
//! The block layouts are those of GGML. All numbers are little-endian. Nibble arrays hold two
//! elements a byte; which half of the block the low nibbles belong to is said at each type.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// How a tensor's elements are stored in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StoredType {
    /// The upper half of an f32.
    BF16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// Blocks of 32: scale, 16 bytes of nibbles; value = scale · (q − 8). 18 bytes.
    Q4_0,
    /// Blocks of 32: scale, minimum, 16 bytes of nibbles; value = scale · q + minimum. 20 bytes.
    Q4_1,
    /// Blocks of 256 in 8 groups, each with a 6-bit scale and minimum, 4 bits a value. 144 bytes.
    Q4K,
    /// As `Q4K` with a fifth bit a value, in a plane of its own. 176 bytes.
    Q5K,
    /// Blocks of 256 in 16 groups with an 8-bit scale, 6 bits a value. 210 bytes.
    Q6K,
    /// Blocks of 32: scale, 32 signed bytes. 34 bytes.
    Q8_0,
}

impl StoredType {
    /// All stored types that can be read.
    pub const ALL: [Self; 9] =
        [Self::F32, Self::F16, Self::BF16, Self::Q8_0, Self::Q4_0, Self::Q4_1, Self::Q4K, Self::Q5K, Self::Q6K];

    /// Elements of one block, 1 for the types without blocks.
    pub const fn block_len(self) -> usize {
        match self {
            Self::BF16 | Self::F16 | Self::F32 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q8_0 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::BF16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Q8_0 => 34,
        }
    }

    /// Bytes of `elements` elements, or `None` where they are not whole blocks or the product
    /// does not fit.
    pub const fn bytes_of(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_len()) {
            return None;
        }
        (elements / self.block_len()).checked_mul(self.block_bytes())
    }

    /// The type's name as GGUF and safetensors tools print it, for example `Q4_K`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BF16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::Q8_0 => "Q8_0",
        }
    }

    /// The names of all stored types, for error messages.
    pub(crate) fn names() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    /// The number that stands for this type in a GGUF file.
    pub const fn gguf_number(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 8,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::BF16 => 30,
        }
    }

    /// The type that a number in a GGUF file stands for, if it is one that can be read.
    pub fn from_gguf_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.gguf_number() == number)
    }
}

impl std::fmt::Display for StoredType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The bytes handed to [`dequantize`] are not those of the values asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{bytes} bytes of {ty} do not hold {values} values: a block of {} values takes {} bytes",
    ty.block_len(),
    ty.block_bytes()
)]
pub struct DequantizeError {
    /// The stored type.
    pub ty: StoredType,
    /// How many bytes there were.
    pub bytes: usize,
    /// How many values were asked for.
    pub values: usize,
}

/// Dequantises whole blocks: `bytes` holds exactly the blocks of `out.len()` values.
///
/// Runs on the calling thread; rows are independent, so callers split a tensor by rows to use
/// several. Values are computed in f32, scale times integer (plus or minus the minimum).
///
/// # Errors
/// If `out.len()` is not a whole number of blocks, or `bytes` has another length than they need.
/// Nothing is written then.
pub fn dequantize(ty: StoredType, bytes: &[u8], out: &mut [f32]) -> Result<(), DequantizeError> {
    if ty.bytes_of(out.len()) != Some(bytes.len()) {
        return Err(DequantizeError { ty, bytes: bytes.len(), values: out.len() });
    }
    match ty {
        StoredType::F32 => {
            for (b, y) in bytes.as_chunks::<4>().0.iter().zip(out) {
                *y = f32::from_le_bytes(*b);
            }
        }
        StoredType::BF16 => {
            for (b, y) in bytes.as_chunks::<2>().0.iter().zip(out) {
                *y = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
        StoredType::F16 => f16_values(bytes, out),
        StoredType::Q4_0 => blocks::<18, 32>(bytes, out, q4_0),
        StoredType::Q4_1 => blocks::<20, 32>(bytes, out, q4_1),
        StoredType::Q4K => blocks::<144, 256>(bytes, out, q4_k),
        StoredType::Q5K => blocks::<176, 256>(bytes, out, q5_k),
        StoredType::Q6K => blocks::<210, 256>(bytes, out, q6_k),
        StoredType::Q8_0 => blocks::<34, 32>(bytes, out, q8_0),
    }
    Ok(())
}

/// Calls `one` for each pair of a stored block of `B` bytes and its `N` values.
fn blocks<const B: usize, const N: usize>(bytes: &[u8], out: &mut [f32], one: impl Fn(&[u8; B], &mut [f32; N])) {
    let (stored, _) = bytes.as_chunks::<B>();
    let (values, _) = out.as_chunks_mut::<N>();
    for (b, y) in stored.iter().zip(values) {
        one(b, y);
    }
}

/// Half floats by way of a small aligned buffer, so that the conversion can use the processor's
/// own instructions whatever the alignment of the file.
fn f16_values(bytes: &[u8], out: &mut [f32]) {
    const CHUNK: usize = 512;
    let mut aligned = [f16::ZERO; CHUNK];
    for (b, y) in bytes.chunks(2 * CHUNK).zip(out.chunks_mut(CHUNK)) {
        for (pair, h) in b.as_chunks::<2>().0.iter().zip(&mut aligned) {
            *h = f16::from_le_bytes(*pair);
        }
        aligned[..y.len()].convert_to_f32_slice(y);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Low nibbles are values 0 to 15, high nibbles 16 to 31.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    for (i, q) in block[2..].iter().enumerate() {
        out[i] = scale * (f32::from(q & 0xf) - 8.0);
        out[i + 16] = scale * (f32::from(q >> 4) - 8.0);
    }
}

/// Low nibbles are values 0 to 15, high nibbles 16 to 31.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    let min = half_at(block, 2);
    for (i, q) in block[4..].iter().enumerate() {
        out[i] = scale * f32::from(q & 0xf) + min;
        out[i + 16] = scale * f32::from(q >> 4) + min;
    }
}

fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    for (y, q) in out.iter_mut().zip(&block[2..]) {
        *y = scale * f32::from(*q as i8);
    }
}

/// The 6-bit scale and minimum of group `j` (0 to 7) out of the 12 packed bytes.
///
/// Groups 0 to 3 lie in the low six bits of bytes 0 to 3 (scales) and 4 to 7 (minima). Groups 4 to
/// 7 have their low four bits in bytes 8 to 11 and their high two bits on top of the first eight.
fn k_scale_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        ((packed[j + 4] & 0xf) | ((packed[j - 4] >> 6) << 4), (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))
    };
    (f32::from(scale), f32::from(min))
}

/// f16 scale of scales, f16 scale of minima, 12 packed bytes, 128 bytes of nibbles. Each run of 32
/// bytes holds two groups: low nibbles the even one, high nibbles the odd one.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    let runs = block[16..].as_chunks::<32>().0;
    for (j, (q, y)) in runs.iter().zip(out.as_chunks_mut::<64>().0).enumerate() {
        let (s0, m0) = k_scale_min(packed, 2 * j);
        let (s1, m1) = k_scale_min(packed, 2 * j + 1);
        let (s0, m0, s1, m1) = (d * s0, dmin * m0, d * s1, dmin * m1);
        for (i, q) in q.iter().enumerate() {
            y[i] = s0 * f32::from(q & 0xf) - m0;
            y[i + 32] = s1 * f32::from(q >> 4) - m1;
        }
    }
}

/// As `Q4_K`, with 32 bytes before the nibbles: bit g of byte i is the fifth bit of value i of
/// group g.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    let high = &block[16..48];
    let runs = block[48..].as_chunks::<32>().0;
    for (j, (q, y)) in runs.iter().zip(out.as_chunks_mut::<64>().0).enumerate() {
        let (s0, m0) = k_scale_min(packed, 2 * j);
        let (s1, m1) = k_scale_min(packed, 2 * j + 1);
        let (s0, m0, s1, m1) = (d * s0, dmin * m0, d * s1, dmin * m1);
        for (i, (q, h)) in q.iter().zip(high).enumerate() {
            let h = h >> (2 * j);
            y[i] = s0 * f32::from((q & 0xf) | ((h & 1) << 4)) - m0;
            y[i + 32] = s1 * f32::from((q >> 4) | ((h & 2) << 3)) - m1;
        }
    }
}

/// 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 signed scales, f16 scale of scales.
/// Each half of the block (128 values) takes 64 + 32 + 8 bytes; within it, value 32·g + i has its
/// low bits in byte i + 32·(g mod 2), nibble g / 2, and its high bits in pair g of byte i.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for (n, y) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let low = &block[64 * n..64 * n + 64];
        let high = &block[128 + 32 * n..160 + 32 * n];
        let scales = &block[192 + 8 * n..200 + 8 * n];
        let scale = |g: usize| d * f32::from(scales[g] as i8);
        for i in 0..32 {
            let (a, b, h, s) = (low[i], low[i + 32], high[i], i / 16);
            let value = |q: u8, bits: u8| f32::from(q | ((bits & 3) << 4)) - 32.0;
            y[i] = scale(s) * value(a & 0xf, h);
            y[i + 32] = scale(s + 2) * value(b & 0xf, h >> 2);
            y[i + 64] = scale(s + 4) * value(a >> 4, h >> 4);
            y[i + 96] = scale(s + 6) * value(b >> 4, h >> 6);
        }
    }
}

/// Stores f32 values as one of the types without a search for good scales: F32, F16, BF16, Q8_0,
/// Q4_0 and Q4_1. `None` for other types and for lengths that are not whole blocks.
///
/// Meant for tests and small tools.
pub fn quantize(ty: StoredType, values: &[f32]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(ty.bytes_of(values.len())?);
    match ty {
        StoredType::F32 => out.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        StoredType::F16 => out.extend(values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes())),
        StoredType::BF16 => {
            out.extend(values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()));
        }
        StoredType::Q8_0 => {
            for block in values.chunks_exact(32) {
                let largest = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let scale = f16::from_f32(largest / 127.0);
                out.extend(scale.to_le_bytes());
                let inverse = inverse_of(scale.to_f32());
                out.extend(block.iter().map(|v| (v * inverse).round().clamp(-127.0, 127.0) as i8 as u8));
            }
        }
        StoredType::Q4_0 => {
            for block in values.chunks_exact(32) {
                let largest = block.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let scale = f16::from_f32(largest / 7.0);
                out.extend(scale.to_le_bytes());
                let inverse = inverse_of(scale.to_f32());
                let q = |v: f32| (v * inverse + 8.0).round().clamp(0.0, 15.0) as u8;
                out.extend((0..16).map(|i| q(block[i]) | (q(block[i + 16]) << 4)));
            }
        }
        StoredType::Q4_1 => {
            for block in values.chunks_exact(32) {
                let least = block.iter().fold(f32::INFINITY, |m, v| m.min(*v));
                let largest = block.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
                let min = f16::from_f32(least);
                let scale = f16::from_f32((largest - least) / 15.0);
                out.extend(scale.to_le_bytes());
                out.extend(min.to_le_bytes());
                let inverse = inverse_of(scale.to_f32());
                let q = |v: f32| ((v - min.to_f32()) * inverse).round().clamp(0.0, 15.0) as u8;
                out.extend((0..16).map(|i| q(block[i]) | (q(block[i + 16]) << 4)));
            }
        }
        StoredType::Q4K | StoredType::Q5K | StoredType::Q6K => return None,
    }
    Some(out)
}

fn inverse_of(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a failing test may panic")]
mod tests {
    use super::*;

    /// A small generator, so that the tests need no crate for it.
    fn noise(seed: u64, len: usize) -> Vec<u8> {
        let mut x = seed | 1;
        (0..len)
            .map(|_| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                (x >> 32) as u8
            })
            .collect()
    }

    /// Bits `at .. at + count` of a byte string, lowest first.
    fn bits(bytes: &[u8], at: usize, count: usize) -> u32 {
        (0..count).fold(0, |v, i| {
            let bit = at + i;
            v | (u32::from(bytes[bit / 8] >> (bit % 8)) & 1) << i
        })
    }

    fn half(bytes: &[u8], at: usize) -> f64 {
        let b = bits(bytes, 8 * at, 16);
        let (sign, exponent, fraction) = (b >> 15, (b >> 10) & 31, b & 1023);
        let magnitude = match exponent {
            0 => f64::from(fraction) * 2f64.powi(-24),
            _ => (1.0 + f64::from(fraction) / 1024.0) * 2f64.powi(exponent as i32 - 15),
        };
        if sign == 1 { -magnitude } else { magnitude }
    }

    /// The value of element `e` of one block, from its definition, bit by bit.
    fn naive(ty: StoredType, b: &[u8], e: usize) -> f64 {
        // Position of the nibble of element e in plain order of 32: byte e mod 16, half e / 16.
        let nibble32 = |start: usize| f64::from(bits(b, 8 * (start + e % 16) + 4 * (e / 16), 4));
        // Scales of the 4- and 5-bit K types: group g = e / 32.
        let k = |g: usize| -> (f64, f64) {
            let p = &b[4..16];
            let (s, m) = if g < 4 {
                (bits(p, 8 * g, 6), bits(p, 8 * (g + 4), 6))
            } else {
                (
                    bits(p, 8 * (g + 4), 4) + 16 * bits(p, 8 * (g - 4) + 6, 2),
                    bits(p, 8 * (g + 4) + 4, 4) + 16 * bits(p, 8 * g + 6, 2),
                )
            };
            (f64::from(s), f64::from(m))
        };
        let g = e / 32;
        match ty {
            StoredType::F32 => f64::from(f32::from_bits(bits(b, 0, 32))),
            StoredType::F16 => half(b, 0),
            StoredType::BF16 => f64::from(f32::from_bits(bits(b, 0, 16) << 16)),
            StoredType::Q4_0 => half(b, 0) * (nibble32(2) - 8.0),
            StoredType::Q4_1 => half(b, 0) * nibble32(4) + half(b, 2),
            StoredType::Q8_0 => half(b, 0) * f64::from(b[2 + e] as i8),
            StoredType::Q4K => {
                let q = bits(b, 8 * (16 + 32 * (g / 2) + e % 32) + 4 * (g % 2), 4);
                let (s, m) = k(g);
                half(b, 0) * s * f64::from(q) - half(b, 2) * m
            }
            StoredType::Q5K => {
                let low = bits(b, 8 * (48 + 32 * (g / 2) + e % 32) + 4 * (g % 2), 4);
                let high = bits(b, 8 * (16 + e % 32) + g, 1);
                let (s, m) = k(g);
                half(b, 0) * s * f64::from(low + 16 * high) - half(b, 2) * m
            }
            StoredType::Q6K => {
                let (n, g, i) = (e / 128, (e % 128) / 32, e % 32);
                let low = bits(b, 8 * (64 * n + 32 * (g % 2) + i) + 4 * (g / 2), 4);
                let high = bits(b, 8 * (128 + 32 * n + i) + 2 * g, 2);
                let scale = b[192 + e / 16] as i8;
                half(b, 208) * f64::from(scale) * (f64::from(low + 16 * high) - 32.0)
            }
        }
    }

    #[test]
    fn every_type_agrees_with_its_definition_on_random_blocks() {
        for ty in StoredType::ALL {
            let count = 40;
            let mut bytes = noise(7 + u64::from(ty.gguf_number()), count * ty.block_bytes());
            // Keep every scale finite: clear the top exponent bit of the halves.
            for block in bytes.chunks_exact_mut(ty.block_bytes()) {
                for at in match ty {
                    StoredType::F32 => vec![2],
                    StoredType::BF16 | StoredType::F16 => vec![0],
                    StoredType::Q8_0 | StoredType::Q4_0 => vec![0],
                    StoredType::Q6K => vec![208],
                    _ => vec![0, 2],
                } {
                    block[at + 1] &= 0xbf;
                }
            }
            let mut out = vec![0.0; count * ty.block_len()];
            dequantize(ty, &bytes, &mut out).unwrap();
            for (b, y) in bytes.chunks_exact(ty.block_bytes()).zip(out.chunks_exact(ty.block_len())) {
                for (e, y) in y.iter().enumerate() {
                    let want = naive(ty, b, e);
                    let slack = 1e-5 * want.abs().max(half_scale(ty, b));
                    assert!((f64::from(*y) - want).abs() <= slack, "{ty} element {e}: {y} in place of {want}");
                }
            }
        }
    }

    /// A bound on the terms that cancel in value = scale · q − minimum.
    fn half_scale(ty: StoredType, b: &[u8]) -> f64 {
        match ty {
            StoredType::Q4_1 => half(b, 0).abs() * 15.0 + half(b, 2).abs(),
            StoredType::Q4K | StoredType::Q5K => (half(b, 0).abs() * 31.0 + half(b, 2).abs()) * 63.0,
            _ => 0.0,
        }
    }

    #[test]
    fn hand_made_blocks() {
        let one = f16::ONE.to_le_bytes();
        let two = f16::from_f32(2.0).to_le_bytes();

        let mut q4_0 = two.to_vec();
        q4_0.extend([0xf8; 16]);
        let mut out = [0.0; 32];
        dequantize(StoredType::Q4_0, &q4_0, &mut out).unwrap();
        assert_eq!((out[0], out[15], out[16], out[31]), (0.0, 0.0, 14.0, 14.0));

        let mut q4_1 = two.to_vec();
        q4_1.extend(one);
        q4_1.extend((0..16).map(|i| i | (15 - i) << 4));
        dequantize(StoredType::Q4_1, &q4_1, &mut out).unwrap();
        assert_eq!((out[0], out[3], out[16], out[31]), (1.0, 7.0, 31.0, 1.0));

        let mut q8_0 = two.to_vec();
        q8_0.extend((0..32).map(|i| (i - 16i8) as u8));
        dequantize(StoredType::Q8_0, &q8_0, &mut out).unwrap();
        assert_eq!((out[0], out[16], out[31]), (-32.0, 0.0, 30.0));

        // Q4_K: d = 1, dmin = 2; group 0 has scale 3, minimum 1; group 5 has scale 16 + 2 = 18 and
        // minimum 32 + 5 = 37.
        let mut q4_k = vec![0u8; 144];
        q4_k[..2].copy_from_slice(&one);
        q4_k[2..4].copy_from_slice(&two);
        q4_k[4] = 3;
        q4_k[8] = 1;
        q4_k[4 + 1] = 1 << 6;
        q4_k[4 + 5] = 2 << 6;
        q4_k[4 + 9] = 2 | 5 << 4;
        q4_k[16] = 7;
        q4_k[16 + 64] = 9 << 4;
        let mut out = [0.0; 256];
        dequantize(StoredType::Q4K, &q4_k, &mut out).unwrap();
        assert_eq!((out[0], out[1]), (3.0 * 7.0 - 2.0, -2.0));
        assert_eq!((out[160], out[161]), (18.0 * 9.0 - 74.0, -74.0));

        // Q6_K: d = 1, scale of group 3 (values 48 to 63) is −2; value 50 has low nibble 5 and high
        // pair 2, so q = 37 − 32 = 5.
        let mut q6_k = vec![0u8; 210];
        q6_k[208..].copy_from_slice(&one);
        q6_k[192 + 3] = (-2i8) as u8;
        q6_k[32 + 18] = 5;
        q6_k[128 + 18] = 2 << 2;
        dequantize(StoredType::Q6K, &q6_k, &mut out).unwrap();
        assert_eq!((out[50], out[51], out[0]), (-10.0, 64.0, 0.0));
    }

    #[test]
    fn lengths_that_do_not_fit_are_errors() {
        let mut out = [1.0; 31];
        let error = dequantize(StoredType::Q8_0, &[0; 34], &mut out).unwrap_err();
        assert_eq!(error.to_string(), "34 bytes of Q8_0 do not hold 31 values: a block of 32 values takes 34 bytes");
        assert!(out.iter().all(|v| *v == 1.0));
        assert!(dequantize(StoredType::F16, &[0; 3], &mut out[..1]).is_err());
    }

    #[test]
    fn quantize_and_back_stays_within_half_a_step() {
        let values: Vec<f32> = noise(3, 64).iter().map(|b| f32::from(*b) / 64.0 - 2.0).collect();
        for (ty, slack) in [
            (StoredType::F32, 0.0),
            (StoredType::F16, 2e-3),
            (StoredType::BF16, 1e-2),
            (StoredType::Q8_0, 2e-2),
            (StoredType::Q4_0, 0.2),
            (StoredType::Q4_1, 0.15),
        ] {
            let bytes = quantize(ty, &values).unwrap();
            let mut out = [0.0; 64];
            dequantize(ty, &bytes, &mut out).unwrap();
            for (a, b) in values.iter().zip(out) {
                assert!((a - b).abs() <= slack, "{ty}: {a} became {b}");
            }
        }
        assert!(quantize(StoredType::Q6K, &[0.0; 256]).is_none());
    }
}
