//! Which spellings of cooperative matrices are emulated.

#![allow(clippy::unwrap_used, reason = "a failing test may panic")]

use polyattn_replay::emulated_matrices;

const HEAD: &str = "enable f16;\nenable wgpu_cooperative_matrix;\n// coopLoad\nconst WIDTH: u32 = 32u;\n";
const THREADS: &str = "@builtin(subgroup_id) subgroup: u32,\n@builtin(subgroup_invocation_id) invocation: u32,\n) {\n\
                       let thread = subgroup * WIDTH + invocation;\n";

fn emulated(line: &str) -> Result<String, String> {
    emulated_matrices(&format!("{HEAD}{THREADS}{line}\n}}\n")).map_err(|error| error.to_string())
}

#[test]
fn words_become_calls() {
    let becomes = |line: &str, want: &str| {
        let text = emulated(line).unwrap();
        assert!(text.contains(want), "{line}: {text}");
    };
    becomes("var s = coop_mat16x16<f32, C>();", "var s = MatrixC();");
    becomes(
        "let q = coopLoadT<coop_mat16x16<f16, A>>(&tile[at + 4u], 18u);",
        "let q = coopLoadT_A_tile(at + 4u, 18u);",
    );
    let product = "s = coopMultiplyAdd(q, coopLoad<coop_mat16x16<f16, B>>(&tile[at], STRIDE), s);";
    becomes(product, "s = multiply_add(q, coopLoad_B_tile(at, STRIDE), s);");
    becomes(product, "vec4<f32>(tile[b.place");
    becomes("coopStoreT(s, &sums[to], STRIDE);", "coopStoreT_sums(s, to, STRIDE);");
    becomes("x = subgroupShuffleXor(x, hop);", "x = shuffle_xor(x, hop);");
    assert!(!emulated(product).unwrap().contains("BUFFER"));
}

#[test]
fn what_is_not_known_is_refused() {
    for line in [
        "var s = coop_mat8x8<f32, C>();",
        "var s = coop_mat16x16<f16, C>();",
        "let q = coopLoad<coop_mat16x16<f16, A>>(&tile[at], STRIDE);",
        "let q = coopLoadT<coop_mat16x16<f16, A>>(&tile, STRIDE);",
        "coopStore(s, &sums[to], STRIDE);",
        "x = subgroupAdd(x);",
        "x = f32(subgroup_size);",
        // It would be read too late.
        "let keys = coopLoad<coop_mat16x16<f16, B>>(&tile[at], STRIDE);",
    ] {
        let from = line.find("coop").or_else(|| line.find("subgroup")).unwrap();
        assert_eq!(emulated(line).unwrap_err(), format!("no emulation of `{}`", &line[from..]));
    }
    let error = emulated_matrices("const WIDTH: u32 = 64u;").unwrap_err().to_string();
    assert_eq!(error, "no emulation of a shader without one `enable wgpu_cooperative_matrix;`");
}
