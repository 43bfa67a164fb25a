//! The typed preamble of WGSL kernels: declarations of storage buffers whose element type is chosen when the
//! pipeline is made. Everything else is specialised by `override`s.
//!
//! 16-bit elements travel as packed words and are widened in the kernel (`unpack2x16float` for f16, a shift for
//! bf16), so no kernel needs the `shader-f16` feature.

use std::fmt::Write;

use crate::DType;

/// Declares a read-only storage buffer `name` of `dtype` elements at `binding` of group 0, and two functions:
/// `name_at(i) -> f32`, one element, and `name_load8(i) -> array<vec4<f32>, 2>`, eight elements from an index `i`
/// that is a multiple of 8 (16-byte loads).
#[must_use]
pub fn storage_loader(binding: u32, name: &str, dtype: DType) -> String {
    let mut out = String::new();
    let element = match dtype {
        DType::F32 => "vec4<f32>",
        DType::F16 | DType::BF16 => "vec4<u32>",
    };
    let _ = writeln!(out, "@group(0) @binding({binding}) var<storage, read> {name}: array<{element}>;");
    match dtype {
        DType::F32 => {
            let _ = writeln!(out, "fn {name}_at(i: u32) -> f32 {{ return {name}[i >> 2u][i & 3u]; }}");
            let _ = writeln!(
                out,
                "fn {name}_load8(i: u32) -> array<vec4<f32>, 2> {{ let w = i >> 2u; return array<vec4<f32>, 2>({name}[w], {name}[w + 1u]); }}"
            );
        }
        DType::F16 | DType::BF16 => {
            let _ = writeln!(
                out,
                "fn {name}_at(i: u32) -> f32 {{ let pair = widen2({name}[i >> 3u][(i >> 1u) & 3u]); return select(pair.x, pair.y, (i & 1u) == 1u); }}"
            );
            let _ = writeln!(
                out,
                "fn {name}_load8(i: u32) -> array<vec4<f32>, 2> {{ let w = {name}[i >> 3u]; return array<vec4<f32>, 2>(vec4<f32>(widen2(w.x), widen2(w.y)), vec4<f32>(widen2(w.z), widen2(w.w))); }}"
            );
            out = out.replace("widen2", widen_name(dtype));
        }
    }
    out
}

/// How 8-bit elements are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Byte {
    /// Signed whole numbers.
    I8,
    /// Floats of 4 exponent and 3 mantissa bits, without infinities.
    E4M3,
    /// Floats of 5 exponent and 2 mantissa bits.
    E5M2,
}

/// As [`storage_loader`], of 8-bit elements: declares the buffer and `name_load8(i) -> array<vec4<f32>, 2>` (8-byte
/// loads).
#[must_use]
pub fn byte_loader(binding: u32, name: &str, byte: Byte) -> String {
    let widen = match byte {
        Byte::I8 => "widen_i8x4",
        Byte::E4M3 => "widen_e4m3x4",
        Byte::E5M2 => "widen_e5m2x4",
    };
    format!(
        "@group(0) @binding({binding}) var<storage, read> {name}: array<vec2<u32>>;\n\
         fn {name}_load8(i: u32) -> array<vec4<f32>, 2> {{ let w = {name}[i >> 3u]; return array<vec4<f32>, 2>({widen}(w.x), {widen}(w.y)); }}\n"
    )
}

/// Helpers that [`byte_loader`] calls; put it before it. Bytes of floats become halves by shifts: one of 5 exponent
/// bits is the upper byte of a half, one of 4 is a half 256 times too small, whose code for NaN is given the exponent
/// of NaN.
pub const BYTES_PREAMBLE: &str = "\
fn widen_i8x4(w: u32) -> vec4<f32> { return vec4<f32>(vec4<i32>(bitcast<i32>(w << 24u), bitcast<i32>(w << 16u), bitcast<i32>(w << 8u), bitcast<i32>(w)) >> vec4<u32>(24u)); }
fn widen_e5m2x4(w: u32) -> vec4<f32> { return vec4<f32>(unpack2x16float(((w & 0xffu) << 8u) | ((w & 0xff00u) << 16u)), unpack2x16float(((w >> 8u) & 0xff00u) | (w & 0xff000000u))); }
fn widen_e4m3x2(upper: u32) -> vec2<f32> { let m = (upper & 0x7f007f00u) >> 1u; let n = (m + 0x00800080u) & 0x40004000u; return unpack2x16float((upper & 0x80008000u) | m | ((n >> 14u) * 0x7c00u)) * 256.0; }
fn widen_e4m3x4(w: u32) -> vec4<f32> { return vec4<f32>(widen_e4m3x2(((w & 0xffu) << 8u) | ((w & 0xff00u) << 16u)), widen_e4m3x2(((w >> 8u) & 0xff00u) | (w & 0xff000000u))); }
";

fn widen_name(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "widen_bf16x2",
        _ => "unpack2x16float",
    }
}

/// Helpers that [`storage_loader`] and kernels that store 16-bit words call; put it once at the head of a shader.
pub const PREAMBLE: &str = "\
fn widen_bf16x2(word: u32) -> vec2<f32> { return vec2<f32>(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u)); }
fn round_bf16(x: f32) -> u32 { let b = bitcast<u32>(x); if ((b & 0x7fffffffu) > 0x7f800000u) { return (b >> 16u) | 0x40u; } return (b + 0x7fffu + ((b >> 16u) & 1u)) >> 16u; }
fn narrow_bf16x2(v: vec2<f32>) -> u32 { return round_bf16(v.x) | (round_bf16(v.y) << 16u); }
";

/// The WGSL expression that packs a `vec2<f32>` expression into one word of a 16-bit type: `pack2x16float(v)` or
/// `narrow_bf16x2(v)`.
#[must_use]
pub fn narrow2(dtype: DType, expression: &str) -> String {
    match dtype {
        DType::BF16 => format!("narrow_bf16x2({expression})"),
        _ => format!("pack2x16float({expression})"),
    }
}
