// Matrices of 16 by 16 in subgroups of 32, on any device. Two threads share a row of the left matrix and of the sum: both
// have the whole left row, each has half of the sum's columns. The right matrix is read where it lies, when it is
// multiplied. Places and strides count vectors of four. What names BUFFER stands once for each array that it is needed
// for. Drivers write loops of a known length out, and take minutes over that: none is known here.

alias MatrixA = mat4x4<f32>;
struct MatrixB {
    place: u32,
    stride: u32,
    columns: bool,
}
alias MatrixC = mat2x4<f32>;
var<private> me: u32;
var<private> four: u32; // 4, which no driver knows
var<workgroup> shuffled: array<f32, THREADS>;

fn shuffle_xor(x: f32, hop: u32) -> f32 {
    shuffled[me] = x;
    workgroupBarrier();
    let other = shuffled[me ^ hop];
    workgroupBarrier();
    return other;
}

fn row_at() -> u32 { return me % WIDTH / 2u; }

fn half_at() -> u32 { return me % 2u * 2u; }

fn left_vector(a: MatrixA, i: u32) -> vec4<f32> {
    return select(select(a[0], a[1], i == 1u), select(a[2], a[3], i == 3u), i >= 2u);
}

fn multiply_add(a: MatrixA, b: MatrixB, c: MatrixC) -> MatrixC {
    var sum = c;
    // The vectors of the thread's columns, or of its half of the rows.
    for (var i = 0u; i < 8u * four; i++) {
        var add: vec4<f32>;
        var to: u32;
        if (b.columns) {
            let right = vec4<f32>(BUFFER[b.place + (half_at() * 4u + i / 4u) * b.stride + i % 4u]);
            let product = vec4<f32>(dot(left_vector(a, i % 4u), right));
            add = select(vec4<f32>(), product, vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(i / 4u % 4u));
            to = i / 16u;
        } else {
            let right = vec4<f32>(BUFFER[b.place + i / 2u * b.stride + half_at() + i % 2u]);
            add = left_vector(a, i / 8u)[i / 2u % 4u] * right;
            to = i % 2u;
        }
        sum += MatrixC(select(vec4<f32>(), add, to == 0u), select(vec4<f32>(), add, to == 1u));
    }
    return sum;
}

fn coopLoadT_A_BUFFER(place: u32, stride: u32) -> MatrixA {
    let at = place + row_at() * stride;
    var a: MatrixA;
    for (var i = 0u; i < four; i++) {
        let v = vec4<f32>(BUFFER[at + i]);
        a = MatrixA(
            select(a[0], v, i == 0u), select(a[1], v, i == 1u), select(a[2], v, i == 2u), select(a[3], v, i == 3u),
        );
    }
    return a;
}

fn coopLoad_B_BUFFER(place: u32, stride: u32) -> MatrixB { return MatrixB(place, stride, true); }

fn coopLoadT_B_BUFFER(place: u32, stride: u32) -> MatrixB { return MatrixB(place, stride, false); }

fn coopLoadT_C_BUFFER(place: u32, stride: u32) -> MatrixC {
    let at = place + row_at() * stride + half_at();
    return MatrixC(BUFFER[at], BUFFER[at + 1u]);
}

fn coopStoreT_BUFFER(c: MatrixC, place: u32, stride: u32) {
    let at = place + row_at() * stride + half_at();
    BUFFER[at] = c[0];
    BUFFER[at + 1u] = c[1];
}
