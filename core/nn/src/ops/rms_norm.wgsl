// One row by workgroup.

struct Params { rows: u32, cols: u32, eps: f32 }
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> norm: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

var<workgroup> squares: array<f32, 256>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let row = workgroup.x + workgroup.y * workgroups.x;
    if (row >= p.rows) {
        return;
    }
    let base = row * p.cols;
    var square = 0.0;
    for (var i = local; i < p.cols; i += 256u) {
        square = fma(x[base + i], x[base + i], square);
    }
    squares[local] = square;
    workgroupBarrier();
    for (var half = 128u; half > 0u; half >>= 1u) {
        if (local < half) {
            squares[local] += squares[local + half];
        }
        workgroupBarrier();
    }
    let scale = inverseSqrt(squares[0] / f32(p.cols) + p.eps);
    for (var i = local; i < p.cols; i += 256u) {
        y[base + i] = x[base + i] * scale * norm[i];
    }
}
