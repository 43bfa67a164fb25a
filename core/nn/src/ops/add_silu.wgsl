// y = x + silu(gate)

struct Params { count: u32 }
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> x: array<f32>;
@group(0) @binding(1) var<storage, read> gate: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = (workgroup.x + workgroup.y * workgroups.x) * 128u + local;
    if (i < p.count) {
        y[i] = x[i] + gate[i] / (1.0 + exp(-gate[i]));
    }
}
