use std::fmt::Write;

/// WGSL that multiplies matrices of 16 × 16 halves as cooperative matrices would, for tests of kernels that take them on
/// devices that have none. Subgroups of 8 or 16.
///
/// It declares `Left`, `Right`, `Sum`, `queries_tile`, `weights_tile`, `keys_tile` (keys in columns), `values_tile`,
/// `multiply`, `both` (their sum) and `no_sum`, and reads queries, keys and values from `tile`, an array of `vec4<f16>` and the constant that
/// its rows are apart, and weights from `weights`, with `WEIGHT_STRIDE`. For each of `sums`, a name, an array of
/// `vec4<f32>` and its stride, it declares `load_{name}` and `store_{name}`. The kernel has a constant `WIDTH`, the width
/// of a subgroup, and sets `me`, the invocation's number in it, before all else.
#[must_use]
pub fn emulated_matrices(tile: (&str, &str), sums: &[(&str, &str, &str)]) -> String {
    let mut text =
        include_str!("emulated.wgsl").replace("STRIDE_OF_TILE", tile.1).replace("TILE[", &format!("{}[", tile.0));
    for (name, array, stride) in sums {
        let _ = write!(
            text,
            "fn load_{name}(at: u32) -> Sum {{\n    \
                 var m: Sum;\n    \
                 for (var i = 0u; i < OWN * 4u; i++) {{ m.x[i] = {array}[at + (i / 4u * WIDTH + me) * {stride} + i % 4u]; }}\n    \
                 return m;\n\
             }}\n\
             fn store_{name}(sum: Sum, at: u32) {{\n    \
                 var m = sum;\n    \
                 for (var i = 0u; i < OWN * 4u; i++) {{ {array}[at + (i / 4u * WIDTH + me) * {stride} + i % 4u] = m.x[i]; }}\n\
             }}\n"
        );
    }
    text
}
