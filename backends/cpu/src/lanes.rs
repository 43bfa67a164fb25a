//! The inner loops, compiled once for each instruction set, and the choice among them when the program runs.
//!
//! Loops over slices are plain Rust that the compiler vectorises under the features of its caller; products and the
//! transposition name their vector registers ([`Lanes`]), because they live or die by what stays in one. All unsafe
//! code of the crate is here: calls into functions whose features were detected, and intrinsics inside those.

#![allow(unsafe_code)]

use half::{f16, slice::HalfFloatSliceExt};

use crate::kernel::TILE;

/// Rows that a product keeps in registers at once.
pub(crate) const BLOCK: usize = 6;

/// An instruction set that this CPU has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Isa(Set);

#[derive(Clone, Copy, Debug)]
enum Set {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Isa {
    /// The widest there is.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            if avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
                return Self(Set::Avx512);
            }
            if avx2 {
                return Self(Set::Avx2);
            }
        }
        Self(Set::Portable)
    }

    /// Every one this CPU has.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let mut all = vec![Self(Set::Portable)];
        #[cfg(target_arch = "x86_64")]
        match Self::detect().0 {
            Set::Avx512 => all.extend([Self(Set::Avx2), Self(Set::Avx512)]),
            Set::Avx2 => all.push(Self(Set::Avx2)),
            Set::Portable => {}
        }
        all
    }
}

/// A vector register of f32.
trait Lanes: Copy {
    /// Its elements.
    const N: usize;
    fn splat(value: f32) -> Self;
    fn load(from: &[f32]) -> Self;
    fn store(self, to: &mut [f32]);
    /// `a · b + self`, in one rounding where the CPU has it.
    fn add_product(self, a: Self, b: Self) -> Self;
}

#[derive(Clone, Copy)]
struct Portable([f32; 4]);

impl Lanes for Portable {
    const N: usize = 4;

    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; 4])
    }

    #[inline(always)]
    fn load(from: &[f32]) -> Self {
        Self([from[0], from[1], from[2], from[3]])
    }

    #[inline(always)]
    fn store(self, to: &mut [f32]) {
        to[..4].copy_from_slice(&self.0);
    }

    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        // Without the instruction, a fused product is a slow library call.
        let fused = cfg!(any(target_feature = "fma", target_arch = "aarch64"));
        Self(std::array::from_fn(|at| {
            if fused { a.0[at].mul_add(b.0[at], self.0[at]) } else { a.0[at] * b.0[at] + self.0[at] }
        }))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use half::f16;

    use super::Lanes;

    /// Exists only inside functions compiled for AVX2 and FMA.
    #[derive(Clone, Copy)]
    pub(super) struct Avx2(__m256);

    /// Exists only inside functions compiled for AVX-512.
    #[derive(Clone, Copy)]
    pub(super) struct Avx512(__m512);

    macro_rules! lanes {
        ($lanes:ty, $n:literal, $splat:ident, $load:ident, $store:ident, $madd:ident) => {
            impl Lanes for $lanes {
                const N: usize = $n;

                #[inline(always)]
                fn splat(value: f32) -> Self {
                    // SAFETY: only functions compiled for the features, called after detection, use this type.
                    Self(unsafe { $splat(value) })
                }

                #[inline(always)]
                fn load(from: &[f32]) -> Self {
                    let from = &from[..$n];
                    // SAFETY: as in `splat`; the slice has as many elements as the register.
                    Self(unsafe { $load(from.as_ptr()) })
                }

                #[inline(always)]
                fn store(self, to: &mut [f32]) {
                    let to = &mut to[..$n];
                    // SAFETY: as in `load`.
                    unsafe { $store(to.as_mut_ptr(), self.0) }
                }

                #[inline(always)]
                fn add_product(self, a: Self, b: Self) -> Self {
                    // SAFETY: as in `splat`.
                    Self(unsafe { $madd(a.0, b.0, self.0) })
                }
            }
        };
    }
    lanes!(Avx2, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps);
    lanes!(Avx512, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps);

    /// Widens as many elements as `into` has.
    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn widen_f16(from: &[f16], into: &mut [f32]) {
        let from = &from[..into.len()];
        let (whole, rest) = from.as_chunks::<8>();
        let (into, into_rest) = into.as_chunks_mut::<8>();
        for (from, into) in whole.iter().zip(into) {
            // SAFETY: both arrays have as many elements as the registers.
            unsafe { _mm256_storeu_ps(into.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()))) }
        }
        for (from, into) in rest.iter().zip(into_rest) {
            *into = from.to_f32();
        }
    }

    /// Writes 8 × 8 elements of `from` (rows `from_stride` apart) as columns of `to`.
    #[target_feature(enable = "avx2")]
    pub(super) fn transpose8(from: &[f32], from_stride: usize, to: &mut [f32], to_stride: usize) {
        let r: [__m256; 8] = std::array::from_fn(|row| {
            let row = &from[row * from_stride..][..8];
            // SAFETY: the slice has as many elements as the register.
            unsafe { _mm256_loadu_ps(row.as_ptr()) }
        });
        let pairs: [__m256; 8] = [
            _mm256_unpacklo_ps(r[0], r[1]),
            _mm256_unpackhi_ps(r[0], r[1]),
            _mm256_unpacklo_ps(r[2], r[3]),
            _mm256_unpackhi_ps(r[2], r[3]),
            _mm256_unpacklo_ps(r[4], r[5]),
            _mm256_unpackhi_ps(r[4], r[5]),
            _mm256_unpacklo_ps(r[6], r[7]),
            _mm256_unpackhi_ps(r[6], r[7]),
        ];
        let quads: [__m256; 8] = [
            _mm256_shuffle_ps::<0x44>(pairs[0], pairs[2]),
            _mm256_shuffle_ps::<0xee>(pairs[0], pairs[2]),
            _mm256_shuffle_ps::<0x44>(pairs[1], pairs[3]),
            _mm256_shuffle_ps::<0xee>(pairs[1], pairs[3]),
            _mm256_shuffle_ps::<0x44>(pairs[4], pairs[6]),
            _mm256_shuffle_ps::<0xee>(pairs[4], pairs[6]),
            _mm256_shuffle_ps::<0x44>(pairs[5], pairs[7]),
            _mm256_shuffle_ps::<0xee>(pairs[5], pairs[7]),
        ];
        for column in 0..8 {
            let (low, high) = (quads[column % 4], quads[column % 4 + 4]);
            let whole = if column < 4 {
                _mm256_permute2f128_ps::<0x20>(low, high)
            } else {
                _mm256_permute2f128_ps::<0x31>(low, high)
            };
            let to = &mut to[column * to_stride..][..8];
            // SAFETY: the slice has as many elements as the register.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), whole) }
        }
    }
}

/// Defines a function of `Isa` and arguments, that calls `body` compiled for the instruction set.
macro_rules! for_each_isa {
    ($(#[$doc:meta])* $visible:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? {
        portable: $portable:expr, avx2: $avx2:expr, avx512: $avx512:expr $(,)?
    }) => {
        $(#[$doc])*
        #[inline]
        $visible fn $name(isa: Isa, $($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($argument: $type),*) $(-> $result)? {
                $avx2
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma,f16c")]
            fn avx512($($argument: $type),*) $(-> $result)? {
                $avx512
            }
            match isa.0 {
                Set::Portable => $portable,
                // SAFETY: an `Isa` comes from `detect`, which has seen the features on this CPU.
                #[cfg(target_arch = "x86_64")]
                Set::Avx2 => unsafe { avx2($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Set::Avx512 => unsafe { avx512($($argument),*) },
            }
        }
    };
}

/// The left factor of a product: `rows` rows, `stride` elements apart, of which the first `depth` count.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) depth: usize,
}

/// A result, or the right factor: rows of whole multiples of 16 elements, `stride` apart, of which `columns` count.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) stride: usize,
    pub(crate) columns: usize,
}

for_each_isa! {
    /// `c += a · b`, for at most [`BLOCK`] rows. Every element is summed in order of depth, whatever the other sizes.
    /// `b` and `c` have `columns` (a multiple of 16) columns.
    pub(crate) fn product(a: Left<'_>, b: (&[f32], usize), c: &mut [f32], shape: Shape) {
        portable: product_rows::<Portable, 4, 4>(a, b, c, shape),
        avx2: product_rows::<x86::Avx2, 2, 2>(a, b, c, shape),
        avx512: product_rows::<x86::Avx512, 4, 1>(a, b, c, shape),
    }
}

#[inline(always)]
fn product_rows<L: Lanes, const WIDE: usize, const NARROW: usize>(
    a: Left<'_>,
    b: (&[f32], usize),
    c: &mut [f32],
    shape: Shape,
) {
    match a.rows {
        0 => {}
        1 => product_columns::<L, 1, WIDE, NARROW>(a, b, c, shape),
        2 => product_columns::<L, 2, WIDE, NARROW>(a, b, c, shape),
        3 => product_columns::<L, 3, WIDE, NARROW>(a, b, c, shape),
        4 => product_columns::<L, 4, WIDE, NARROW>(a, b, c, shape),
        5 => product_columns::<L, 5, WIDE, NARROW>(a, b, c, shape),
        _ => product_columns::<L, BLOCK, WIDE, NARROW>(a, b, c, shape),
    }
}

/// Columns in blocks of `WIDE` registers, what is left in blocks of `NARROW` registers (16 elements).
#[inline(always)]
fn product_columns<L: Lanes, const R: usize, const WIDE: usize, const NARROW: usize>(
    a: Left<'_>,
    b: (&[f32], usize),
    c: &mut [f32],
    shape: Shape,
) {
    let mut column = 0;
    while column + WIDE * L::N <= shape.columns {
        product_block::<L, R, WIDE>(a, b, c, shape.stride, column);
        column += WIDE * L::N;
    }
    while column + NARROW * L::N <= shape.columns {
        product_block::<L, R, NARROW>(a, b, c, shape.stride, column);
        column += NARROW * L::N;
    }
}

#[inline(always)]
fn product_block<L: Lanes, const R: usize, const V: usize>(
    a: Left<'_>,
    (b, b_stride): (&[f32], usize),
    c: &mut [f32],
    c_stride: usize,
    column: usize,
) {
    let rows: [&[f32]; R] = std::array::from_fn(|row| &a.data[row * a.stride..][..a.depth]);
    let mut sums = [[L::splat(0.0); V]; R];
    for (row, sums) in sums.iter_mut().enumerate() {
        let c = &c[row * c_stride + column..][..V * L::N];
        for (at, sum) in sums.iter_mut().enumerate() {
            *sum = L::load(&c[at * L::N..]);
        }
    }
    for (at, b) in b.chunks(b_stride).take(a.depth).enumerate() {
        let b = &b[column..][..V * L::N];
        let mut right = [L::splat(0.0); V];
        for (at, right) in right.iter_mut().enumerate() {
            *right = L::load(&b[at * L::N..]);
        }
        for row in 0..R {
            let left = L::splat(rows[row][at]);
            for column in 0..V {
                sums[row][column] = sums[row][column].add_product(left, right[column]);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        let c = &mut c[row * c_stride + column..][..V * L::N];
        for (at, sum) in sums.iter().enumerate() {
            sum.store(&mut c[at * L::N..]);
        }
    }
}

for_each_isa! {
    /// Turns rows of `dim` elements into columns: `to[d · TILE + row] = from[row · dim + d]`. There are memory for
    /// [`TILE`] rows, of which those in `first..end` are turned, and with them some of their neighbours.
    pub(crate) fn transpose(from: &[f32], dim: usize, to: &mut [f32], first: usize, end: usize) {
        portable: transpose_plain(from, dim, to, first, end, 0),
        avx2: transpose_blocks(from, dim, to, first, end),
        avx512: transpose_blocks(from, dim, to, first, end),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn transpose_blocks(from: &[f32], dim: usize, to: &mut [f32], first: usize, end: usize) {
    let whole = dim / 8 * 8;
    for row in (first / 8 * 8..end).step_by(8) {
        for d in (0..whole).step_by(8) {
            x86::transpose8(&from[row * dim + d..], dim, &mut to[d * TILE + row..], TILE);
        }
    }
    transpose_plain(from, dim, to, first, end, whole);
}

#[inline(always)]
fn transpose_plain(from: &[f32], dim: usize, to: &mut [f32], first: usize, end: usize, from_dim: usize) {
    for row in first..end {
        for d in from_dim..dim {
            to[d * TILE + row] = from[row * dim + d];
        }
    }
}

for_each_isa! {
    /// Widens as many elements as `into` has.
    pub(crate) fn widen_f16(from: &[f16], into: &mut [f32]) {
        portable: from[..into.len()].convert_to_f32_slice(into),
        avx2: x86::widen_f16(from, into),
        avx512: x86::widen_f16(from, into),
    }
}

/// Asks for memory to be brought near. A hint: it changes nothing.
#[inline]
pub(crate) fn prefetch<T>(data: Option<&[T]>) {
    #[cfg(target_arch = "x86_64")]
    if let Some(data) = data {
        const LINE: usize = 64;
        for line in data.chunks((LINE / size_of::<T>().max(1)).max(1)) {
            // SAFETY: a prefetch has no effect a program could observe, on any address.
            unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.as_ptr().cast()) }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
}

/// What becomes of dot products before the softmax.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Logits {
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
    /// ALiBi slope, and the distance from the row's position to the tile's first key.
    pub(crate) alibi: Option<(f32, f32)>,
}

for_each_isa! {
    /// Turns a row's dot products with a tile of keys into logits, −∞ where `mask` has no bit, and returns the largest.
    pub(crate) fn logits(row: &mut [f32; TILE], to: Logits, mask: u64) -> f32 {
        portable: logits_row(row, to, mask),
        avx2: logits_row(row, to, mask),
        avx512: logits_row(row, to, mask),
    }
}

#[inline(always)]
fn logits_row(row: &mut [f32; TILE], to: Logits, mask: u64) -> f32 {
    for x in row.iter_mut() {
        *x *= to.scale;
    }
    if let Some(softcap) = to.softcap {
        for x in row.iter_mut() {
            *x = softcap * tanh(*x / softcap);
        }
    }
    if let Some((slope, distance)) = to.alibi {
        for (at, x) in row.iter_mut().enumerate() {
            *x += slope * (distance + at as f32);
        }
    }
    if mask != u64::MAX {
        for (at, x) in row.iter_mut().enumerate() {
            *x = if mask >> at & 1 == 1 { *x } else { f32::NEG_INFINITY };
        }
    }
    let mut largest = [f32::NEG_INFINITY; 16];
    for chunk in row.as_chunks::<16>().0 {
        for (largest, x) in largest.iter_mut().zip(chunk) {
            *largest = if *x > *largest { *x } else { *largest };
        }
    }
    largest.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

for_each_isa! {
    /// Turns logits into weights e^(x − top) and returns their sum.
    pub(crate) fn weights(row: &mut [f32; TILE], top: f32) -> f32 {
        portable: weights_row(row, top),
        avx2: weights_row(row, top),
        avx512: weights_row(row, top),
    }
}

#[inline(always)]
fn weights_row(row: &mut [f32; TILE], top: f32) -> f32 {
    let mut sums = [0f32; 16];
    for chunk in row.as_chunks_mut::<16>().0 {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *x = exp(*x - top);
            *sum += *x;
        }
    }
    // A fixed order, so that the sum is the same on every path.
    for half in [8, 4, 2, 1] {
        for at in 0..half {
            sums[at] += sums[at + half];
        }
    }
    sums[0]
}

/// e^x to about one unit in the last place, for x up to 0 or a little more; 0 where it would be subnormal.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Added and subtracted, it leaves a number rounded to a whole one, which then stands in its lowest bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let r = (x - whole * LN2_HIGH) - whole * LN2_LOW;
    // The series up to r^7: |r| is at most ln 2 / 2, where r^8 / 8! is below half a unit.
    let mut series = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        series = series * r + coefficient;
    }
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    // A NaN fails the comparison and stays one.
    if x < -87.3 { 0.0 } else { series * f32::from_bits(exponent) }
}

#[inline(always)]
fn tanh(x: f32) -> f32 {
    let size = x.abs();
    let e = exp(-2.0 * size);
    let far = (1.0 - e) / (1.0 + e);
    // Near 0 the difference above loses its digits; there the series has them.
    let square = x * x;
    let mut series = 62.0 / 2835.0;
    for coefficient in [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0] {
        series = series * square + coefficient;
    }
    if size < 0.25 { x * series } else { far.copysign(x) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_and_tanh_are_close() {
        let mut x = 0.0f32;
        while x > -87.0 {
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) - want).abs() <= want * 2e-7, "exp({x})");
            let want = f64::from(x).tanh();
            assert!((f64::from(tanh(x)) - want).abs() <= want.abs() * 4e-7, "tanh({x})");
            x -= 0.00371;
        }
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY), exp(-200.0)), (1.0, 0.0, 0.0));
        assert_eq!((tanh(0.0), tanh(1e9), tanh(f32::NEG_INFINITY)), (0.0, 1.0, -1.0));
        assert!(exp(f32::NAN).is_nan() && tanh(f32::NAN).is_nan());
    }

    #[test]
    fn every_instruction_set_agrees() {
        let number = |at: usize| ((at * 7919 % 1013) as f32 - 500.0) / 300.0;
        for isa in Isa::all() {
            for (rows, depth, columns) in [(1, 5, 16), (2, 64, 48), (3, 7, 64), (5, 1, 80), (6, 33, 144)] {
                let (a_stride, b_stride, c_stride) = (depth + 3, columns + 16, columns + 16);
                let a: Vec<f32> = (0..rows * a_stride).map(number).collect();
                let b: Vec<f32> = (0..depth * b_stride).map(number).collect();
                let mut c: Vec<f32> = (0..rows * c_stride).map(number).collect();
                let old = c.clone();
                let left = Left { data: &a, stride: a_stride, rows, depth };
                product(isa, left, (&b, b_stride), &mut c, Shape { stride: c_stride, columns });
                for row in 0..rows {
                    for column in 0..c_stride {
                        let sum: f32 = (0..depth).map(|k| a[row * a_stride + k] * b[k * b_stride + column]).sum();
                        let want = old[row * c_stride + column] + if column < columns { sum } else { 0.0 };
                        assert!((c[row * c_stride + column] - want).abs() < 1e-4, "{isa:?} {row} {column}");
                    }
                }
            }
            for dim in [1, 8, 20, 64] {
                let from: Vec<f32> = (0..TILE * dim).map(number).collect();
                let mut to = vec![f32::NAN; TILE * dim];
                transpose(isa, &from, dim, &mut to, 3, 50);
                for row in 3..50 {
                    for d in 0..dim {
                        assert_eq!(to[d * TILE + row], from[row * dim + d], "{isa:?}");
                    }
                }
            }
            let halves: Vec<f16> = (0..29).map(number).map(f16::from_f32).collect();
            let mut wide = [0.0; 29];
            widen_f16(isa, &halves, &mut wide);
            assert!(halves.iter().zip(wide).all(|(half, wide)| half.to_f32() == wide), "{isa:?}");
            let mut row: [f32; TILE] = std::array::from_fn(number);
            let to = Logits { scale: 0.5, softcap: Some(3.0), alibi: Some((0.25, -70.0)) };
            let top = logits(isa, &mut row, to, !(1 << 9));
            for (at, x) in row.iter().enumerate().filter(|(at, _)| *at != 9) {
                let want = 3.0 * (number(at) * 0.5 / 3.0).tanh() + 0.25 * (at as f32 - 70.0);
                assert!((x - want).abs() < 1e-5 && *x <= top, "{isa:?}");
            }
            assert_eq!(row[9], f32::NEG_INFINITY);
            let before = row;
            let sum = weights(isa, &mut row, top);
            let want: f32 = before.iter().map(|x| (x - top).exp()).sum();
            assert!((sum - want).abs() < 1e-5 && row[9] == 0.0, "{isa:?}");
        }
    }
}
