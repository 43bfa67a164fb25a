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
