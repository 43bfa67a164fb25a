// Ids by index, or given in the place of one.

struct Params { rows: u32, held: u32 }
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> ids: array<u32>;
@group(0) @binding(1) var<storage, read> sources: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<u32>;

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let row = (workgroup.x + workgroup.y * workgroups.x) * 128u + local;
    if (row < p.rows) {
        let source = sources[row];
        let given = (source & 0x80000000u) != 0u;
        y[row] = select(ids[min(source, p.held - 1u)], source & 0x7fffffffu, given);
    }
}
