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

/// Writes out the loops of a shader whose first line ends in `// unroll`, for compilers that would leave arrays they index
/// out of registers: `for (var i = FIRST; i < END; i++) {`. The ends are products and quotients of numbers and of the
/// text's `const NAME: u32 = …;` before the loop. Any other loop stays one.
#[must_use]
pub fn unroll(text: &str) -> String {
    unrolled(text, Vec::new())
}

const UNROLL: &str = "// unroll";

/// The same, with constants of what comes before the text.
fn unrolled<'a>(text: &'a str, mut constants: Vec<(&'a str, u32)>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(end) = rest.find('\n').map(|end| end + 1).or((!rest.is_empty()).then_some(rest.len())) {
        let line = rest[..end].trim_end();
        if let Some(constant) = line.strip_prefix("const ").and_then(|line| line.strip_suffix(';'))
            && let Some((name, value)) = constant.split_once(": u32 = ")
            && let Some(value) = evaluate(value, &constants)
        {
            constants.push((name, value));
        }
        let Some((name, range, behind, body)) = line.ends_with(UNROLL).then(|| marked(rest, end, &constants)).flatten()
        else {
            out += &rest[..end];
            rest = &rest[end..];
            continue;
        };
        for value in range {
            let body = substitute(body, name, &format!("{value}u"));
            out += "{";
            out += &unrolled(&body, constants.clone());
            out += "}\n";
        }
        rest = behind;
    }
    out
}

/// A marked loop at the beginning of a text, whose first line has `line` bytes: its variable's name and values, what
/// follows it, and its body.
fn marked<'a>(
    text: &'a str,
    line: usize,
    constants: &[(&str, u32)],
) -> Option<(&'a str, std::ops::Range<u32>, &'a str, &'a str)> {
    let head = text.trim_start().strip_prefix("for (var ")?;
    let (name, head) = head.split_once(" = ")?;
    let (first, head) = head.split_once(&format!("; {name} < "))?;
    let (end, head) = head.split_once(&format!("; {name}++) {{"))?;
    let range = evaluate(first, constants)?..evaluate(end, constants)?;
    let mut depth = 1u32;
    let close = head.char_indices().find_map(|(at, c)| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        (depth == 0).then_some(at)
    })?;
    // A loop of one line has its mark behind the body, a longer one before it.
    let body = text.len() - head.len();
    let body = if body + close < line { &head[..close] } else { &text[line..body + close] };
    let behind = head[close + 1..].trim_start_matches(' ');
    Some((name, range, behind.strip_prefix(UNROLL).unwrap_or(behind), body))
}

/// Products and quotients of numbers and constants, from left to right.
fn evaluate(text: &str, constants: &[(&str, u32)]) -> Option<u32> {
    let mut value = 1u32;
    let mut divides = false;
    for word in text.split(' ') {
        match word {
            "*" => divides = false,
            "/" => divides = true,
            _ => {
                let number = word.strip_suffix('u').and_then(|number| number.parse().ok());
                let constant = || constants.iter().find(|(name, _)| *name == word).map(|(_, value)| *value);
                let number: u32 = number.or_else(constant)?;
                value = if divides { value.checked_div(number)? } else { value.checked_mul(number)? };
            }
        }
    }
    Some(value)
}

/// The text with a variable's value in place of its name.
fn substitute(text: &str, name: &str, value: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut rest = text;
    while let Some(start) = rest.find(is_word) {
        let end = rest[start..].find(|c| !is_word(c)).map_or(rest.len(), |length| start + length);
        let is_member = rest[..start].ends_with('.');
        out += &rest[..start];
        out += if &rest[start..end] == name && !is_member { value } else { &rest[start..end] };
        rest = &rest[end..];
    }
    out + rest
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_loops_are_written_out() {
        let text = "\
const TILES: u32 = 2u;
const ALL: u32 = 6u;
for (var t = 0u; t < TILES; t++) { // unroll
    a.t[t] = ut + 1u;
    for (var u = t * 2u; u < ALL / TILES; u++) { b[t][u] += 1.0; } // unroll
}
for (var kept = 0u; kept < TILES; kept++) { c[kept] = 0.0; }
for (var kept = 0u; kept < unknown; kept++) { d[kept] = 0.0; } // unroll
";
        let want = "\
const TILES: u32 = 2u;
const ALL: u32 = 6u;
{    a.t[0u] = ut + 1u;
{ b[0u][0u] += 1.0; }
{ b[0u][1u] += 1.0; }
{ b[0u][2u] += 1.0; }
}
{    a.t[1u] = ut + 1u;
{ b[1u][2u] += 1.0; }
}
for (var kept = 0u; kept < TILES; kept++) { c[kept] = 0.0; }
for (var kept = 0u; kept < unknown; kept++) { d[kept] = 0.0; } // unroll
";
        let lines = |text: &str| text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(lines(&unroll(text)), lines(want));
    }

    #[test]
    fn loops_that_are_not_understood_stay() {
        for text in [
            "for (var i = 0u; i < 2u; i++) { a(); // unroll",
            "for (var i = 0u; i < 2u / 0u; i++) { a(); } // unroll",
            "for (var i = 0u; i < 4294967295u * 2u; i++) { a(); } // unroll",
            "for (var i = 0u; i <= 2u; i++) { a(); } // unroll\n",
            "while (true) { a(); } // unroll\n",
            "// unroll",
        ] {
            assert_eq!(unroll(text), text);
        }
    }
}
