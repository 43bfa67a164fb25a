// Rows by index. Elements are moved as bits: ids pass too.

struct Params { rows: u32, cols: u32, held: u32 }
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<u32>;
@group(0) @binding(1) var<storage, read> indices: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<u32>;

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (workgroup.x + workgroup.y * workgroups.x) * 128u + local;
    let row = i / p.cols;
    if (row < p.rows) {
        y[i] = x[min(indices[row], p.held - 1u) * p.cols + i % p.cols];
    }
}
