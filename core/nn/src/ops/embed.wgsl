// Rows of a table by id, widened to f32. The table may be bound in parts of `count` rows from `first` on.

struct Params { rows: u32, cols: u32, table_rows: u32, first: u32, count: u32 }
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (workgroup.x + workgroup.y * workgroups.x) * 128u + local;
    let row = i / p.cols;
    if (row >= p.rows) {
        return;
    }
    // Below `first` it wraps round to a large number.
    let id = min(ids[row], p.table_rows - 1u) - p.first;
    if (id < p.count) {
        y[i] = weights_at(id * p.cols + i % p.cols);
    }
}
