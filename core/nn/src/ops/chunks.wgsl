// Eight columns at a time. `row` is the index of a row's first element, `col` a multiple of 8.

struct Params {
    rows: u32,
    cols: u32,
    // Outputs that this dispatch computes, the first of them, and the elements of an output row.
    outs: u32,
    first: u32,
    stride: u32,
    accumulate: u32,
    row_tiles: u32,
    eps: f32,
//if !SINGLE
    // Parts of a row (or pairs to a row of x), elements from one part to the next, and the element where the first
    // matrix begins.
    count: u32,
    x_stride: u32,
    base: u32,
//end
}
var<immediate> p: Params;

alias Chunk = array<vec4<f32>, 2>;

//if ALIGNED
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;

fn x_chunk(row: u32, col: u32) -> Chunk {
    let i = (row + col) >> 2u;
    return Chunk(x[i], x[i + 1u]);
}

fn w_chunk(row: u32, col: u32) -> Chunk {
    return weights_load8(row + col);
}
//end
//if !ALIGNED
// The last columns are no whole chunk: there `x` gives zeros, and the weights something finite to multiply them with.
@group(0) @binding(0) var<storage, read> x: array<f32>;

fn x_at(row: u32, col: u32) -> f32 {
    if (col < p.cols) {
        return x[row + col];
    }
    return 0.0;
}

fn x_chunk(row: u32, col: u32) -> Chunk {
    return Chunk(
        vec4<f32>(x_at(row, col), x_at(row, col + 1u), x_at(row, col + 2u), x_at(row, col + 3u)),
        vec4<f32>(x_at(row, col + 4u), x_at(row, col + 5u), x_at(row, col + 6u), x_at(row, col + 7u)),
    );
}

fn w_one(row: u32, col: u32) -> f32 {
    return weights_at(row + min(col, p.cols - 1u));
}

fn w_chunk(row: u32, col: u32) -> Chunk {
    return Chunk(
        vec4<f32>(w_one(row, col), w_one(row, col + 1u), w_one(row, col + 2u), w_one(row, col + 3u)),
        vec4<f32>(w_one(row, col + 4u), w_one(row, col + 5u), w_one(row, col + 6u), w_one(row, col + 7u)),
    );
}
//end

@group(0) @binding(2) var<storage, read_write> y: array<f32>;

//if EXPERTS
@group(0) @binding(3) var<storage, read> order: array<u32>;
@group(0) @binding(4) var<storage, read> tiles: array<vec4<u32>>;
//end

//if NORM
//if ALIGNED
@group(0) @binding(3) var<storage, read> norm: array<vec4<f32>>;

fn norm_chunk(col: u32) -> Chunk {
    return Chunk(norm[col >> 2u], norm[(col >> 2u) + 1u]);
}
//end
//if !ALIGNED
@group(0) @binding(3) var<storage, read> norm: array<f32>;

fn norm_one(col: u32) -> f32 {
    return norm[min(col, p.cols - 1u)];
}

fn norm_chunk(col: u32) -> Chunk {
    return Chunk(
        vec4<f32>(norm_one(col), norm_one(col + 1u), norm_one(col + 2u), norm_one(col + 3u)),
        vec4<f32>(norm_one(col + 4u), norm_one(col + 5u), norm_one(col + 6u), norm_one(col + 7u)),
    );
}
//end
//end

//if BIAS
@group(0) @binding($BIAS_AT) var<storage, read> bias: array<f32>;
//end

// One chain of fused multiply-adds, so that no compiler sums two variants of a kernel in two orders.
fn fma8(sum: f32, a: Chunk, b: Chunk) -> f32 {
    var s = fma(a[0].x, b[0].x, sum);
    s = fma(a[0].y, b[0].y, s);
    s = fma(a[0].z, b[0].z, s);
    s = fma(a[0].w, b[0].w, s);
    s = fma(a[1].x, b[1].x, s);
    s = fma(a[1].y, b[1].y, s);
    s = fma(a[1].z, b[1].z, s);
    return fma(a[1].w, b[1].w, s);
}

//if PAIRED
fn put(row: u32, out: u32, sum: vec2<f32>, scale: f32) {
    let gate = sum.x * scale;
    let up = sum.y * scale;
    y[row * p.stride + out] = gate / (1.0 + exp(-gate)) * up;
}
//end
//if !PAIRED
fn put(row: u32, out: u32, sum: f32, scale: f32) {
    let at = row * p.stride + p.first + out;
    var base = 0.0;
    if (p.accumulate != 0u) {
        base = y[at];
    }
//if BIAS
    base += bias[p.first + out];
//end
    y[at] = fma(sum, scale, base);
}
//end
