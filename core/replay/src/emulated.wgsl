// Matrices of 16 by 16 for devices that cannot multiply them: a thread of a subgroup has whole rows of the left matrix and
// of the sum, and reads the right one where it lies. Places count vectors of four.
const OWN: u32 = 16u / WIDTH;
struct Left { x: array<vec4<f32>, OWN * 4u> }
struct Right { at: u32, columns: bool }
struct Sum { x: array<vec4<f32>, OWN * 4u> }
var<private> me: u32;

fn queries_tile(at: u32) -> Left {
    var m: Left;
    for (var i = 0u; i < OWN * 4u; i++) { m.x[i] = vec4<f32>(TILE[at + (i / 4u * WIDTH + me) * STRIDE_OF_TILE + i % 4u]); }
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
                for (var i = 0u; i < 4u; i++) {
                    b[i] = f32(TILE[right.at + (n * 4u + i) * STRIDE_OF_TILE + k / 4u][k % 4u]);
                }
            } else {
                b = vec4<f32>(TILE[right.at + k * STRIDE_OF_TILE + n]);
            }
            for (var r = 0u; r < OWN; r++) {
                m.x[r * 4u + n] = fma(vec4<f32>(a.x[r * 4u + k / 4u][k % 4u]), b, m.x[r * 4u + n]);
            }
        }
    }
    return m;
}
fn both(a: Sum, b: Sum) -> Sum {
    var m = a;
    for (var i = 0u; i < OWN * 4u; i++) { m.x[i] += b.x[i]; }
    return m;
}
fn no_sum() -> Sum { return Sum(); }
