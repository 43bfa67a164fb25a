//! The CPU's inner loops, for the instructions the processor turns out to have. All unsafe code of the operations is
//! here.

#![expect(unsafe_code, reason = "vector instructions, the gemm crate, and columns written by several threads")]

use std::{marker::PhantomData, ops::Range, slice};

use half::{bf16, f16};
use rayon::prelude::*;

/// Rows that are multiplied with a weight while it is in a register.
const ROWS: usize = 4;
/// Outputs that are computed together for a single row.
pub(super) const OUTPUTS: usize = 8;

/// Rows of weights, as they are held.
#[derive(Clone, Copy, Debug)]
pub(super) enum Weights<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
    Bf16(&'a [u16]),
}

/// The instructions that kernels exist for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Isa {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

fn isa() -> Isa {
    #[cfg(target_arch = "x86_64")]
    {
        // The standard library looks once and remembers.
        let avx2 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl");
        if avx2 && avx512 {
            return Isa::Avx512;
        }
        if avx2 {
            return Isa::Avx2;
        }
    }
    Isa::Portable
}

/// `sums[r · width + o] = Σ_i x[r · cols + i] · weights[(first + o) · cols + i]`, with `width` outputs from
/// `outputs.start` on. Each sum is formed in the same order whatever the rows and outputs beside it.
///
/// # Panics
/// Slices too short for these sizes.
pub(super) fn dots(weights: Weights<'_>, outputs: Range<usize>, x: &[f32], cols: usize, sums: &mut [f32]) {
    assert!(cols > 0 && x.len().is_multiple_of(cols));
    assert!(sums.len() >= x.len() / cols * outputs.len());
    match weights {
        Weights::F32(all) => dots_of::<F32>(&all[outputs.start * cols..outputs.end * cols], x, cols, sums),
        Weights::F16(all) => dots_of::<F16>(&all[outputs.start * cols..outputs.end * cols], x, cols, sums),
        Weights::Bf16(all) => dots_of::<Bf16>(&all[outputs.start * cols..outputs.end * cols], x, cols, sums),
    }
}

fn dots_of<F: Format>(weights: &[F::Element], x: &[f32], cols: usize, sums: &mut [f32]) {
    match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has these instructions.
        Isa::Avx512 => unsafe { x86::dots_avx512::<F>(weights, x, cols, sums) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has these instructions.
        Isa::Avx2 => unsafe { x86::dots_avx2::<F>(weights, x, cols, sums) },
        Isa::Portable => tiles::<Portable, F>(weights, x, cols, sums),
    }
}

/// Vectors of f32 of one instruction set. Its functions may be called only where those instructions exist, and are
/// inlined into functions compiled for them.
trait Lanes: Copy {
    /// Outputs computed together for [`ROWS`] rows, as the registers allow.
    const OUTPUTS: usize;
    const WIDTH: usize;
    unsafe fn zero() -> Self;
    unsafe fn load(at: *const f32) -> Self;
    unsafe fn load_f16(at: *const u16) -> Self;
    unsafe fn load_bf16(at: *const u16) -> Self;
    unsafe fn fma(self, b: Self, sum: Self) -> Self;
    unsafe fn total(self) -> f32;
    /// Has the memory at `at`, which need not exist, on its way into the cache.
    fn prefetch<T>(at: *const T);
}

/// A format of weights.
trait Format {
    type Element: Copy + Default + Send + Sync;
    unsafe fn load<L: Lanes>(at: *const Self::Element) -> L;
}

struct F32;
struct F16;
struct Bf16;

impl Format for F32 {
    type Element = f32;
    #[inline(always)]
    unsafe fn load<L: Lanes>(at: *const f32) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load(at) }
    }
}

impl Format for F16 {
    type Element = u16;
    #[inline(always)]
    unsafe fn load<L: Lanes>(at: *const u16) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load_f16(at) }
    }
}

impl Format for Bf16 {
    type Element = u16;
    #[inline(always)]
    unsafe fn load<L: Lanes>(at: *const u16) -> L {
        // SAFETY: the caller's promise.
        unsafe { L::load_bf16(at) }
    }
}

/// All sums, in tiles of up to [`ROWS`] rows × some outputs whose sums stay in registers.
#[inline(always)]
fn tiles<L: Lanes, F: Format>(weights: &[F::Element], x: &[f32], cols: usize, sums: &mut [f32]) {
    let width = weights.len() / cols;
    let rows = x.len() / cols;
    let mut row = 0;
    while row < rows {
        let count = (rows - row).min(ROWS);
        let x = &x[row * cols..(row + count) * cols];
        let sums = &mut sums[row * width..(row + count) * width];
        match count {
            1 => outputs::<L, F, 1>(weights, x, cols, sums),
            2 => outputs::<L, F, 2>(weights, x, cols, sums),
            3 => outputs::<L, F, 3>(weights, x, cols, sums),
            _ => outputs::<L, F, ROWS>(weights, x, cols, sums),
        }
        row += count;
    }
}

#[inline(always)]
fn outputs<L: Lanes, F: Format, const R: usize>(weights: &[F::Element], x: &[f32], cols: usize, sums: &mut [f32]) {
    let width = weights.len() / cols;
    let mut output = 0;
    if R == 1 {
        while output + OUTPUTS <= width {
            tile::<L, F, R, OUTPUTS>(&weights[output * cols..], x, cols, &mut sums[output..], width);
            output += OUTPUTS;
        }
    } else if L::OUTPUTS == 4 {
        while output + 4 <= width {
            tile::<L, F, R, 4>(&weights[output * cols..], x, cols, &mut sums[output..], width);
            output += 4;
        }
    } else {
        while output + 2 <= width {
            tile::<L, F, R, 2>(&weights[output * cols..], x, cols, &mut sums[output..], width);
            output += 2;
        }
    }
    while output < width {
        tile::<L, F, R, 1>(&weights[output * cols..], x, cols, &mut sums[output..], width);
        output += 1;
    }
}

/// One tile: R rows × O outputs, each with one chain of fused multiply-adds over chunks of the vector's width, the last
/// chunk filled up with zeros.
#[inline(always)]
fn tile<L: Lanes, F: Format, const R: usize, const O: usize>(
    weights: &[F::Element],
    x: &[f32],
    cols: usize,
    sums: &mut [f32],
    stride: usize,
) {
    // The slices that are read in the loop below; a panic here is what keeps its pointers inside.
    let (weights, x) = (&weights[..O * cols], &x[..R * cols]);
    // SAFETY: pointers stay within `O · cols` weights and `R · cols` values: whole chunks end at `cols`, and the rest is
    // copied to arrays of a whole chunk. `L` fits the processor, as whoever chose it has found out.
    unsafe {
        let mut acc = [[L::zero(); R]; O];
        let whole = cols / L::WIDTH * L::WIDTH;
        let mut at = 0;
        while at < whole {
            let mut values = [L::zero(); R];
            for (r, value) in values.iter_mut().enumerate() {
                *value = L::load(x.as_ptr().add(r * cols + at));
            }
            for (o, acc) in acc.iter_mut().enumerate() {
                let w: L = F::load(weights.as_ptr().add(o * cols + at));
                if R == 1 {
                    // A single row waits for memory: the next tile's weights come while this one is computed.
                    L::prefetch(weights.as_ptr().wrapping_add((o + O) * cols + at));
                }
                for (acc, value) in acc.iter_mut().zip(values) {
                    *acc = w.fma(value, *acc);
                }
            }
            at += L::WIDTH;
        }
        if whole < cols {
            let rest = cols - whole;
            let mut values = [L::zero(); R];
            for (r, value) in values.iter_mut().enumerate() {
                let mut chunk = [0.0; 16];
                chunk[..rest].copy_from_slice(&x[r * cols + whole..(r + 1) * cols]);
                *value = L::load(chunk.as_ptr());
            }
            for (o, acc) in acc.iter_mut().enumerate() {
                let mut chunk = [F::Element::default(); 16];
                chunk[..rest].copy_from_slice(&weights[o * cols + whole..(o + 1) * cols]);
                let w: L = F::load(chunk.as_ptr());
                for (acc, value) in acc.iter_mut().zip(values) {
                    *acc = w.fma(value, *acc);
                }
            }
        }
        for (o, acc) in acc.into_iter().enumerate() {
            for (r, acc) in acc.into_iter().enumerate() {
                sums[r * stride + o] = acc.total();
            }
        }
    }
}

/// What any compiler makes vectors of, or not.
#[derive(Clone, Copy)]
struct Portable([f32; 8]);

impl Lanes for Portable {
    const OUTPUTS: usize = 2;
    const WIDTH: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; 8])
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: the caller's promise of eight elements.
        Self(unsafe { at.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_f16(at: *const u16) -> Self {
        // SAFETY: the caller's promise of eight elements.
        let bits = unsafe { at.cast::<[u16; 8]>().read_unaligned() };
        Self(bits.map(|bits| f16::from_bits(bits).to_f32()))
    }

    #[inline(always)]
    unsafe fn load_bf16(at: *const u16) -> Self {
        // SAFETY: the caller's promise of eight elements.
        let bits = unsafe { at.cast::<[u16; 8]>().read_unaligned() };
        Self(bits.map(|bits| bf16::from_bits(bits).to_f32()))
    }

    #[inline(always)]
    unsafe fn fma(self, b: Self, sum: Self) -> Self {
        // Not `mul_add`, which is a function call where there is no such instruction.
        Self(std::array::from_fn(|lane| self.0[lane] * b.0[lane] + sum.0[lane]))
    }

    #[inline(always)]
    unsafe fn total(self) -> f32 {
        let v = self.0;
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    #[inline(always)]
    fn prefetch<T>(_: *const T) {}
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Format, Lanes, tiles};

    #[derive(Clone, Copy)]
    struct Avx512(__m512);

    impl Lanes for Avx512 {
        const OUTPUTS: usize = 4;
        const WIDTH: usize = 16;

        // SAFETY of every block here: the caller's promise that the instructions exist and that a whole vector lies at
        // the pointer.
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_setzero_ps() })
        }

        #[inline(always)]
        unsafe fn load(at: *const f32) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_loadu_ps(at) })
        }

        #[inline(always)]
        unsafe fn load_f16(at: *const u16) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) })
        }

        #[inline(always)]
        unsafe fn load_bf16(at: *const u16) -> Self {
            // SAFETY: see above.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }

        #[inline(always)]
        unsafe fn fma(self, b: Self, sum: Self) -> Self {
            // SAFETY: see above.
            Self(unsafe { _mm512_fmadd_ps(self.0, b.0, sum.0) })
        }

        #[inline(always)]
        unsafe fn total(self) -> f32 {
            // SAFETY: see above.
            unsafe { _mm512_reduce_add_ps(self.0) }
        }

        #[inline(always)]
        fn prefetch<T>(at: *const T) {
            // SAFETY: prefetching reads nothing that the program sees, and never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
        }
    }

    #[derive(Clone, Copy)]
    struct Avx2(__m256);

    impl Lanes for Avx2 {
        const OUTPUTS: usize = 2;
        const WIDTH: usize = 8;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm256_setzero_ps() })
        }

        #[inline(always)]
        unsafe fn load(at: *const f32) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm256_loadu_ps(at) })
        }

        #[inline(always)]
        unsafe fn load_f16(at: *const u16) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) })
        }

        #[inline(always)]
        unsafe fn load_bf16(at: *const u16) -> Self {
            // SAFETY: as above.
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast()));
                Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
            }
        }

        #[inline(always)]
        unsafe fn fma(self, b: Self, sum: Self) -> Self {
            // SAFETY: as above.
            Self(unsafe { _mm256_fmadd_ps(self.0, b.0, sum.0) })
        }

        #[inline(always)]
        unsafe fn total(self) -> f32 {
            // SAFETY: as above.
            unsafe {
                let half = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
                let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
                _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
            }
        }

        #[inline(always)]
        fn prefetch<T>(at: *const T) {
            // SAFETY: prefetching reads nothing that the program sees, and never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    pub(super) fn dots_avx512<F: Format>(weights: &[F::Element], x: &[f32], cols: usize, sums: &mut [f32]) {
        tiles::<Avx512, F>(weights, x, cols, sums);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn dots_avx2<F: Format>(weights: &[F::Element], x: &[f32], cols: usize, sums: &mut [f32]) {
        tiles::<Avx2, F>(weights, x, cols, sums);
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
    pub(super) fn silu_avx512(gate: &mut [f32], up: &[f32]) {
        super::silu(gate, up);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn silu_avx2(gate: &mut [f32], up: &[f32]) {
        super::silu(gate, up);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn widen_f16_avx2(from: &[u16], to: &mut [f32]) {
        let (from, from_rest) = from.as_chunks::<8>();
        let (to, to_rest) = to.as_chunks_mut::<8>();
        for (from, to) in from.iter().zip(to) {
            // SAFETY: eight elements at either pointer.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()))) };
        }
        super::widen_each(from_rest, to_rest);
    }
}

fn widen_each(from: &[u16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f16::from_bits(*from).to_f32();
    }
}

/// Widens the weights of `outputs` into `panel`, `[outputs, cols]`.
///
/// # Panics
/// Slices too short for these sizes.
pub(super) fn widen(weights: Weights<'_>, outputs: Range<usize>, cols: usize, panel: &mut [f32]) {
    let range = outputs.start * cols..outputs.end * cols;
    let panel = &mut panel[..range.len()];
    match weights {
        Weights::F32(all) => panel.copy_from_slice(&all[range]),
        Weights::Bf16(all) => {
            for (to, from) in panel.iter_mut().zip(&all[range]) {
                *to = bf16::from_bits(*from).to_f32();
            }
        }
        Weights::F16(all) => match isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the processor has these instructions.
            Isa::Avx512 | Isa::Avx2 => unsafe { x86::widen_f16_avx2(&all[range], panel) },
            Isa::Portable => widen_each(&all[range], panel),
        },
    }
}

/// `gate = gate / (1 + exp(-gate)) · up`.
pub(super) fn gated(gate: &mut [f32], up: &[f32]) {
    match isa() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has these instructions.
        Isa::Avx512 => unsafe { x86::silu_avx512(gate, up) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has these instructions.
        Isa::Avx2 => unsafe { x86::silu_avx2(gate, up) },
        Isa::Portable => silu(gate, up),
    }
}

#[inline(always)]
fn silu(gate: &mut [f32], up: &[f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp(-*gate)) * up;
    }
}

/// exp within 2 units in the last place, of operations that compilers turn into vectors; beyond ±87 as there, where the
/// quotient above is its argument or nothing.
#[inline(always)]
fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to a whole number.
    let x = x.clamp(-87.0, 87.0);
    let shifted = x * std::f32::consts::LOG2_E + MAGIC;
    let n = shifted - MAGIC;
    // ln 2 in two parts, the first of few bits, so that its product with n is exact.
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.0 / 720.0 * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r + 1.0;
    p = p * r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127);
    p * f32::from_bits(exponent << 23)
}

/// `sums[r, o] = Σ_i x[r, i] · panel[o, i]` by the gemm crate, in this thread.
///
/// # Panics
/// Slices too short for these sizes.
pub(super) fn gemm_panel(rows: usize, outputs: usize, cols: usize, x: &[f32], panel: &[f32], sums: &mut [f32]) {
    assert!(x.len() >= rows * cols && panel.len() >= outputs * cols && sums.len() >= rows * outputs);
    let stride = |length: usize| length as isize;
    // SAFETY: the strides describe the three slices, whose lengths were checked; `sums` is not read.
    unsafe {
        gemm::gemm(
            rows,
            outputs,
            cols,
            sums.as_mut_ptr(),
            1,
            stride(outputs),
            false,
            x.as_ptr(),
            1,
            stride(cols),
            panel.as_ptr(),
            stride(cols),
            1,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Some columns of a row-major matrix, writable while other threads write others.
pub(super) struct Columns<'a> {
    data: *mut f32,
    rows: usize,
    stride: usize,
    range: Range<usize>,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: ranges of columns of one matrix are disjoint, so each element is reached by one `Columns` only.
unsafe impl Send for Columns<'_> {}

impl<'a> Columns<'a> {
    /// The columns of `data`, rows of `stride` elements, `width` at a time.
    pub(super) fn split(
        data: &'a mut [f32],
        stride: usize,
        width: usize,
    ) -> impl IndexedParallelIterator<Item = Columns<'a>> {
        struct Shared(*mut f32);
        // SAFETY: it is only used to make disjoint `Columns`.
        unsafe impl Sync for Shared {}
        // SAFETY: likewise.
        unsafe impl Send for Shared {}
        let rows = data.len().checked_div(stride).unwrap_or(0);
        let shared = Shared(data.as_mut_ptr());
        let width = width.max(1);
        (0..stride.div_ceil(width)).into_par_iter().map(move |place| {
            let shared = &shared;
            let range = place * width..stride.min((place + 1) * width);
            Columns { data: shared.0, rows, stride, range, owner: PhantomData }
        })
    }

    /// Which columns.
    pub(super) fn range(&self) -> Range<usize> {
        self.range.clone()
    }

    /// Its elements of one row.
    ///
    /// # Panics
    /// No such row.
    pub(super) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.rows);
        // SAFETY: within the matrix, and this object's alone; the borrow ends before another of its rows is lent.
        unsafe { slice::from_raw_parts_mut(self.data.add(row * self.stride + self.range.start), self.range.len()) }
    }
}

#[cfg(test)]
mod tests {
    use super::{F16, Portable, Weights, dots, exp, tiles};
    use half::f16;

    #[test]
    fn exponentials_are_near() {
        for step in -8700..8700 {
            let x = step as f32 / 100.0;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 3e-7, "{x}: {} {exact}", exp(x));
        }
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn all_instruction_sets_agree() {
        for cols in [1, 7, 8, 16, 33, 100] {
            let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 64.0;
            let x: Vec<f32> = (0..6 * cols).map(value).collect();
            let weights: Vec<u16> = (0..11 * cols).map(|i| f16::from_f32(value(i + 5)).to_bits()).collect();
            let mut best = vec![f32::NAN; 66];
            dots(Weights::F16(&weights), 0..11, &x, cols, &mut best);
            let mut portable = vec![f32::NAN; 66];
            tiles::<Portable, F16>(&weights, &x, cols, &mut portable);
            let mut others = vec![portable];
            #[cfg(target_arch = "x86_64")]
            if super::isa() != super::Isa::Portable {
                let mut avx2 = vec![f32::NAN; 66];
                // SAFETY: every set beyond the portable one includes these instructions.
                unsafe { super::x86::dots_avx2::<F16>(&weights, &x, cols, &mut avx2) };
                others.push(avx2);
            }
            for other in others {
                for (a, b) in best.iter().zip(other) {
                    assert!((a - b).abs() <= 1e-5 * cols as f32, "{cols}: {a} {b}");
                }
            }
        }
    }
}
