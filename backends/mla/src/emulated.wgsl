// What matrices.wgsl does, for devices without cooperative matrices: a thread of a subgroup has whole rows of the left
// matrix and of the sum, and reads the right one where it lies. For tests alone.
const OWN: u32 = 16u / WIDTH;
struct Left { x: array<vec4<f32>, OWN * 4u> }
struct Right { at: u32, columns: bool }
struct Sum { x: array<vec4<f32>, OWN * 4u> }
var<private> me: u32;

fn queries_tile(at: u32) -> Left {
    var m: Left;
    for (var i = 0u; i < OWN * 4u; i++) { m.x[i] = vec4<f32>(stage[at + (i / 4u * WIDTH + me) * STRIDE + i % 4u]); }
    return m;
}
fn weights_tile(at: u32) -> Left {
    var m: Left;
    for (var i = 0u; i < OWN * 4u; i++) {
        m.x[i] = vec4<f32>(weights[at + (i / 4u * WIDTH + me) * WEIGHT_STRIDE + i % 4u]);
    }
    return m;
}
fn keys_tile(at: u32) -> Right { return Right(at, true); }
fn values_tile(at: u32) -> Right { return Right(at, false); }
fn multiply(left: Left, right: Right, sum: Sum) -> Sum {
    var a = left;
    var m = sum;
    for (var k = 0u; k < 16u; k++) {
        for (var n = 0u; n < 4u; n++) {
            var b: vec4<f32>;
            if (right.columns) {
                for (var i = 0u; i < 4u; i++) { b[i] = f32(stage[right.at + (n * 4u + i) * STRIDE + k / 4u][k % 4u]); }
            } else {
                b = vec4<f32>(stage[right.at + k * STRIDE + n]);
            }
            for (var r = 0u; r < OWN; r++) {
                m.x[r * 4u + n] = fma(vec4<f32>(a.x[r * 4u + k / 4u][k % 4u]), b, m.x[r * 4u + n]);
            }
        }
    }
    return m;
}
fn no_sum() -> Sum { return Sum(); }
fn load_sum(at: u32) -> Sum {
    var m: Sum;
    for (var i = 0u; i < OWN * 4u; i++) {
        m.x[i] = scratch[at + (i / 4u * WIDTH + me) * 4u + i % 4u];
    }
    return m;
}
fn store_sum(sum: Sum, at: u32) {
    var m = sum;
    for (var i = 0u; i < OWN * 4u; i++) {
        scratch[at + (i / 4u * WIDTH + me) * 4u + i % 4u] = m.x[i];
    }
}
